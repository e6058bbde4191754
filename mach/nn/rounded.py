"""The best classes by a scan of rounded weights: a quarter of the bytes, and a bound on what rounding can hide."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mach.nn.answers import check_finite
from mach.nn.kernels.rounded import possible

LEVELS = 127  # of a rounded weight, on either side of 0
MOST_BEST = 256  # k, at most: a list that long is kept in order
LEAST = 1e-30  # scale of weights, and of hidden states: smaller ones are no numbers to divide by
ROWS = 256  # scanned together
CHUNK = 2**22  # weights rounded at once


class RoundedRows:
    """Weights of K classes in a byte each, times a scale a class, and how far rounding moved a class.

    Rounding moves the score of a class by at most the length of its error times that of the hidden state. A scan of
    the bytes gives scores with such bounds, and with them the few classes that may be among the k best.
    """

    @torch.no_grad()
    def __init__(self, weight_KH: Tensor, bias_K: Tensor | None) -> None:
        K, self.H = weight_KH.shape
        self.codes_KH = np.empty((K, self.H), np.int8)
        self.scale_K, self.reach_K = np.empty(K, np.float32), np.empty(K, np.float32)
        self.bias_K = torch.zeros(K) if bias_K is None else bias_K.detach().float().clone()
        check_finite(self.bias_K)
        most = 0.0
        for begin in range(0, K, size := max(1, CHUNK // self.H)):
            part, rows = slice(begin, begin + size), weight_KH[begin : begin + size].float()
            scale = rows.abs().amax(1).clamp_min(LEAST) / LEVELS
            codes = (rows / scale[:, None]).round_()
            reach = torch.linalg.vector_norm(rows - codes * scale[:, None], dim=1)
            check_finite(reach)
            self.codes_KH[part], self.scale_K[part], self.reach_K[part] = codes.to(torch.int8), scale, reach
            most = max(most, float((torch.linalg.vector_norm(rows, dim=1) + reach).max()))
        self.most = most  # the length of a row, at most

    @property
    def n_bytes(self) -> int:
        """What they hold, beside the biases."""
        return self.codes_KH.nbytes + self.scale_K.nbytes + self.reach_K.nbytes

    @torch.no_grad()
    def possible(self, hidden_NH: Tensor, k: int, mask_K: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of a row and a class that may be one of its k best, ascending; and whether a row's are too many."""
        check_finite(hidden_NH)
        pairs, is_open = [(torch.empty(0, dtype=torch.int64),) * 2], [torch.zeros(0, dtype=torch.bool)]
        offset_K = self.bias_K if mask_K is None else self.bias_K.masked_fill(~mask_K, -torch.inf)
        for begin in range(0, len(hidden_NH), ROWS):
            rows_M, classes_M, open_N = self._scan(hidden_NH[begin : begin + ROWS].float(), offset_K, k)
            pairs.append((rows_M + begin, classes_M))
            is_open.append(open_N)
        rows, classes = (torch.cat(column) for column in zip(*pairs, strict=True))
        return rows, classes, torch.cat(is_open)

    def _scan(self, hidden_NH: Tensor, offset_K: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        N, M, most = len(hidden_NH), 64 * k + 1024, min(2**15 - 1, (2**31 - 1) // (LEVELS * self.H))
        step_N = hidden_NH.abs().amax(1).clamp_min(LEAST) / most
        codes_NH = (hidden_NH / step_N[:, None]).round_()
        length_N = torch.linalg.vector_norm(hidden_NH, dim=1)
        error_N = torch.linalg.vector_norm(hidden_NH - codes_NH * step_N[:, None], dim=1)
        # sums of H float32 numbers, here and where scores are computed exactly, and of a score and a bias
        rounding_N = 2.0**-22 * (self.H * self.most * length_N + float(self.bias_K.abs().max()))
        slack_N = (self.most * error_N + rounding_N).numpy()
        queries = codes_NH.to(torch.int16).numpy(), step_N.numpy(), length_N.numpy(), slack_N
        bounds = np.linspace(0, len(self.codes_KH), torch.get_num_threads() + 1).astype(int)
        parts = [slice(*ends) for ends in pairwise(bounds)]

        def scanned(part: slice) -> tuple[np.ndarray, np.ndarray]:
            ids_NM, n_found_N = np.empty((N, M), np.int32), np.zeros(N, np.int64)
            classes = self.codes_KH[part], self.scale_K[part], self.reach_K[part], offset_K.numpy()[part]
            possible(*classes, *queries, k, ids_NM, n_found_N)
            return ids_NM + part.start, n_found_N

        with ThreadPoolExecutor(len(parts)) as pool:
            ids, counts = zip(*(scanned(parts[0]),) if len(parts) == 1 else pool.map(scanned, parts), strict=True)
        ids_NM, counts_NT = np.concatenate(ids, 1), np.stack(counts, 1)
        is_there = np.concatenate([np.arange(M) < counts_N[:, None] for counts_N in counts], 1)
        rows_M, places_M = is_there.nonzero()
        classes_M = ids_NM[rows_M, places_M].astype(np.int64)
        return torch.from_numpy(rows_M), torch.from_numpy(classes_M), torch.from_numpy((counts_NT < 0).any(1))
