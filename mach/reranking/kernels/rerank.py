"""Linear classifiers over candidates: fitting by dual coordinate descent, and their margins.

A class's classifier minimises ``|w|^2 / 2 + b^2 / 2 + cost * sum_i loss(y_i (w x_i + b))`` over its own rows and its
hard negatives. With ``loss(m) = max(0, 1 - m)^2`` that is done by dual coordinate descent with shrinking (Hsieh, Chang,
Lin, Keerthi and Sundararajan, "A dual coordinate descent method for large-scale linear SVM", ICML 2008, algorithm 3),
with ``log(1 + exp(-m))`` by the one of Yu, Huang and Lin ("Dual coordinate descent methods for logistic regression and
maximum entropy models", Machine Learning 85, 2011, algorithm 5), here over the log-odds u of the dual variables
``cost / (1 + exp(-u))``. Every class starts its own random numbers, so its weights do not depend on which classes are
fitted with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.kernels.views import N_HASHED, with_pairs
from mach.files.compiled import kernel
from mach.networks.kernels.memory import prefetch
from mach.sketch.kernels.sorting import sort

FIRST_ODDS = -16.0  # of dual variables that are as good as 0
UNSEEN = -5.0  # log-odds of a class without a positive row
FILTER = 2**14  # entries of the table of last bits
LINE, MOST_AHEAD = 32, 2048  # weights whose gaps fill a cache line, and of the next class that are asked for early
Array = NDArray[Any]


@kernel(error_model="numpy")
def _dual_odds(odds: float, margin: float, norm: float, cost: float) -> Any:
    """Root u of ``norm * (alpha(u) - alpha(odds)) + margin + u``, which rises at least as u does; to 0.01.

    There the dual objective is least along one variable: Newton's steps, halving the bracket where they leave it.
    """
    before, u = cost / (1.0 + np.exp(-odds)), odds
    slope = margin + odds
    low, high = odds - max(slope, 0.0), odds - min(slope, 0.0)
    for _ in range(10):
        alpha = cost / (1.0 + np.exp(-u))
        slope = norm * (alpha - before) + margin + u
        if abs(slope) < 0.01:
            break
        if slope > 0:
            high = u
        else:
            low = u
        u -= slope / (norm * alpha * (1.0 - alpha / cost) + 1.0)
        if not low < u < high:
            u = 0.5 * (low + high)
    return u


@kernel(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def fit_classes(
    indptr: Array,
    indices: Array,
    values: Array,
    positive_indptr: Array,
    positive_rows: Array,
    listed_indptr: Array,
    listed_rows: Array,
    n_features: int,
    pairs: int,
    is_logistic: bool,
    cost: float,
    most: int,
    iterations: int,
    tolerance: float,
    threshold: float,
    most_weights: int,
    seed: int,
    power: float = 1.0,
) -> tuple[Array, Array, Array, Array, Any]:
    """Fit consecutive classes, each on its positive rows and on the rows that list it and are not its own.

    All rows' features are CSR (int64, int32, float32), and so are the positive and listed rows of the classes (int64,
    int32, ascending within a class). The settings are those of `mach.reranking.settings.FitSettings`; a class has
    at most ``most`` negatives for each of its rows and as many more, of more so many at equal distances. The seed is
    the first class's; the next have the following ones.

    Returns offsets, features, weights, biases and the number of pairs of row and class that were learned from. Weights
    of class i are at ``offsets[i]..offsets[i + 1]``, features ascending; -1, or `UNSEEN` with logistic loss, is the
    bias of a class without a positive row.

    Scratch: 4 bytes a feature, and 24 bytes a row and 12 a feature of a row of the largest class: its rows are copied
    out of the map they lie in, with features numbered as they occur, so that its weights stay in the nearest cache.
    """
    n_classes = len(positive_indptr) - 1
    longest = 0  # loops here, as slices, differences and sorts of numpy's take seconds to compile
    for k in range(n_classes):
        n_listed = listed_indptr[k + 1] - listed_indptr[k]
        longest = max(longest, positive_indptr[k + 1] - positive_indptr[k] + n_listed)
    rows, order = np.empty(longest, np.int32), np.empty(longest, np.int32)
    signs, alphas, norms = np.empty(longest, np.float32), np.empty(longest, np.float32), np.empty(longest, np.float32)
    slot_D = np.full(n_features + (N_HASHED if pairs > 1 else 0), -1, np.int32)  # of a feature among a class's own
    offsets, biases, n_kept = np.zeros(n_classes + 1, np.int64), np.empty(n_classes, np.float32), 0
    features, weights = np.empty(1 << 16, np.int32), np.empty(1 << 16, np.float32)
    half = np.float32(0.5 / cost)
    n_pairs = 0
    for k in range(n_classes):
        first, last = positive_indptr[k], positive_indptr[k + 1]
        n_positive = last - first
        if n_positive == 0:
            biases[k], offsets[k + 1] = np.float32(UNSEEN if is_logistic else -1), n_kept
            continue
        m = n_positive
        for i in range(m):
            rows[i] = positive_rows[first + i]
        for j in range(listed_indptr[k], listed_indptr[k + 1]):
            while first < last and positive_rows[first] < listed_rows[j]:
                first += 1
            if first == last or positive_rows[first] != listed_rows[j]:
                rows[m] = listed_rows[j]
                m += 1
        n_negative, n_taken = m - n_positive, most * (n_positive + 1)
        if n_negative > n_taken:
            for i in range(n_taken):
                rows[n_positive + i] = rows[n_positive + i * n_negative // n_taken]
            m = n_positive + n_taken
        n_pairs += m
        begins, touched, numbers = with_pairs(indptr, indices, values, rows[:m], pairs, n_features, power)
        slots, n_touched = np.empty(len(touched), np.int32), 0
        for i in range(m):
            norm = np.float32(1)  # the bias's feature
            for j in range(begins[i], begins[i + 1]):
                norm += numbers[j] * numbers[j]
                feature = touched[j]
                if slot_D[feature] < 0:
                    slot_D[feature] = n_touched
                    touched[n_touched] = feature  # at or before j: read already
                    n_touched += 1
                slots[j] = slot_D[feature]
            signs[i], norms[i], order[i] = 1 if i < n_positive else -1, norm, i
            alphas[i] = FIRST_ODDS if is_logistic else 0
        w = np.zeros(n_touched, np.float32)
        bias = np.float32(0)
        random = np.uint64(seed + k)
        active, cut = m, np.float32(np.inf)
        for _ in range(iterations):
            worst = np.float32(0)
            for i in range(active - 1):
                random = random * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)  # Knuth's MMIX
                other = i + np.int64((random >> np.uint64(33)) % np.uint64(active - i))
                order[i], order[other] = order[other], order[i]
            i = 0
            while i < active:
                at = order[i]
                begin, end = begins[at], begins[at + 1]
                z = np.float32(0)
                for j in range(begin, end):
                    z += w[slots[j]] * numbers[j]
                if is_logistic:
                    margin = np.float64(signs[at] * (z + bias))
                    worst = max(worst, abs(np.float32(margin + alphas[at])))
                    odds = _dual_odds(np.float64(alphas[at]), margin, np.float64(norms[at]), cost)
                    moved = cost / (1.0 + np.exp(-odds)) - cost / (1.0 + np.exp(-np.float64(alphas[at])))
                    change, alphas[at] = np.float32(moved) * signs[at], np.float32(odds)
                    for j in range(begin, end):
                        w[slots[j]] += change * numbers[j]
                    bias += change
                    i += 1
                    continue
                slope = signs[at] * (z + bias) - np.float32(1) + alphas[at] * half
                if alphas[at] == 0 and slope > cut:  # it will stay at 0: leave it out
                    active -= 1
                    order[i], order[active] = order[active], order[i]
                    continue
                if alphas[at] > 0 or slope < 0:
                    worst = max(worst, abs(slope))
                    alpha = max(alphas[at] - slope / (norms[at] + half), np.float32(0))
                    change = (alpha - alphas[at]) * signs[at]
                    alphas[at] = alpha
                    if change != 0:
                        for j in range(begin, end):
                            w[slots[j]] += change * numbers[j]
                        bias += change
                i += 1
            cut = worst if worst > 0 else np.float32(np.inf)
            if worst < tolerance:
                if active == m:
                    break
                active, cut = m, np.float32(np.inf)  # look at those left out once more
        if n_kept + n_touched > len(features):
            size = max(2 * len(features), n_kept + n_touched)
            wider, longer = np.empty(size, np.int32), np.empty(size, np.float32)
            for j in range(n_kept):
                wider[j], longer[j] = features[j], weights[j]
            features, weights = wider, longer
        begin = n_kept
        for i in range(n_touched):
            if abs(w[i]) >= threshold and w[i] != 0:
                features[n_kept] = touched[i]
                n_kept += 1
        sort(features[begin:n_kept])
        for j in range(begin, n_kept):
            weights[j] = w[slot_D[features[j]]]
        n_above = n_kept - begin
        if n_above > most_weights:
            sizes = np.empty(n_above, np.float32)
            for i in range(n_above):
                sizes[i] = abs(weights[begin + i])
            sort(sizes)
            least, end, n_kept = sizes[n_above - most_weights], n_kept, begin
            for j in range(begin, end):
                if abs(weights[j]) >= least and n_kept - begin < most_weights:
                    features[n_kept], weights[n_kept] = features[j], weights[j]
                    n_kept += 1
        for i in range(n_touched):
            slot_D[touched[i]] = -1
        biases[k], offsets[k + 1] = bias, n_kept
    return offsets, features[:n_kept].copy(), weights[:n_kept].copy(), biases, n_pairs


@kernel(error_model="numpy", fastmath={"contract"})
def margins(
    csr: tuple[Array, Array, Array], ids_NC: Array, classifiers: tuple[Array, ...], x_D: Array, out_NC: Array
) -> None:
    """Margins ``w_k x_n + b_k`` of the candidates by offsets, gaps, codes, scales and biases; 0 for an id of -1.

    ``x_D`` is scratch of D + 1 zeros, left as zeros; features that a damaged file puts beyond D read the last one. What
    stands twice in a row adds up. Few of a class's features are the row's: a table of their last bits, which the
    nearest cache holds, keeps the rest from looking into ``x_D``.
    """
    (indptr, indices, values), (offsets, gaps, codes, scales, biases) = csr, classifiers
    beyond, last_bits = np.uint64(len(x_D) - 1), np.uint64(FILTER - 1)
    may_be_in, gaps_1W, codes_1W = np.zeros(FILTER, np.bool_), gaps.reshape(1, -1), codes.reshape(1, -1)
    for n in range(len(indptr) - 1):
        for j in range(indptr[n], indptr[n + 1]):
            x_D[indices[j]] += values[j]
            may_be_in[np.uint64(indices[j]) & last_bits] = True
        for c in range(ids_NC.shape[1]):
            k = ids_NC[n, c]
            out_NC[n, c] = 0
            if k < 0:
                continue
            feature, begin, end = np.uint64(0), offsets[k], offsets[k + 1]
            if not 0 <= begin <= end <= len(codes):
                continue
            later = max(ids_NC[n, min(c + 1, ids_NC.shape[1] - 1)], 0)
            for j in range(offsets[later], min(offsets[later + 1], offsets[later] + MOST_AHEAD), LINE):
                prefetch(gaps_1W, 0, j)
                prefetch(codes_1W, 0, j)
            total = np.float32(0)
            own_gaps, own_codes = gaps[begin:end], codes[begin:end]  # from 0: no index may be below, which takes time
            for j in range(len(own_gaps)):
                feature += np.uint64(own_gaps[j])
                if may_be_in[feature & last_bits]:
                    total += np.float32(own_codes[j]) * x_D[min(feature, beyond)]
            out_NC[n, c] = scales[k] * total + biases[k]
        for j in range(indptr[n], indptr[n + 1]):
            x_D[indices[j]] = 0
            may_be_in[np.uint64(indices[j]) & last_bits] = False
