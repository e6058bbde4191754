"""Bytes of repository and svmlight text to CSR arrays, about a nanosecond a byte.

The kernel never raises: it returns a code and the position of the offending token, and `mach.data.readers` makes
a message of them. Numbers are exact: a value equals ``np.float32(float(token))`` bit for bit. A decimal with at
most 53 bits of mantissa and a small exponent is one correctly rounded float64 operation (Clinger, "How to read
floating point numbers accurately", PLDI 1990). Any other is computed to four units in the last place of float64,
which settles the float32 unless a rounding border lies within; those few are left to the caller.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.sorting import sort

DONE, BAD_CLASS, CLASS_RANGE, BAD_FEATURE, FEATURE_RANGE, FEATURE_ORDER, BAD_VALUE, EXTRA_ROW = range(8)

_TAB, _NEWLINE, _RETURN, _BLANK, _HASH, _PLUS, _COMMA, _MINUS, _DOT, _ZERO, _COLON = b"\t\n\r #+,-.0:"
_LOWEST, _HIGHEST = -80, 60  # outside them 18 digits are 0 or infinity in float32
POWERS = np.array([float(f"1e{e}") for e in range(_LOWEST, _HIGHEST + 1)])
_SETTLED, _UNSETTLED, _MALFORMED = range(3)


@kernel(error_model="numpy")
def _is_blank(byte: int) -> bool:
    return byte in (_BLANK, _TAB, _RETURN)


@kernel(error_model="numpy")
def _is_end(byte: int, svmlight: bool) -> bool:
    """Whether the byte ends a token."""
    return _is_blank(byte) or byte == _NEWLINE or (svmlight and byte == _HASH)


@kernel(error_model="numpy")
def _is_nan(text: NDArray[np.uint8], i: int) -> bool:
    """Whether a missing class stands there, ``nan`` in any case; the text's last byte is a newline."""
    if text[i] not in (78, 110) or text[i + 1] not in (65, 97):
        return False
    return text[i + 2] in (78, 110)


@kernel(error_model="numpy")
def _integer(text: NDArray[np.uint8], i: int) -> tuple[int, int]:
    """The digits from i on and the position behind them; 2**40 stands for anything larger."""
    value = 0
    while _ZERO <= text[i] < _COLON:
        value = min(value * 10 + text[i] - _ZERO, 1 << 40)
        i += 1
    return value, i


@kernel(error_model="numpy")
def _real(text: NDArray[np.uint8], i: int, powers: NDArray[np.float64]) -> tuple[np.float32, int, int]:
    """A decimal from i on, the position behind it, and whether the value is settled."""
    sign = 1.0
    if text[i] in (_MINUS, _PLUS):
        sign = -1.0 if text[i] == _MINUS else 1.0
        i += 1
    mantissa, exponent, n_digits, point = 0, 0, 0, False
    while True:
        if _ZERO <= text[i] < _COLON:
            n_digits += 1
            if mantissa < 10**17:  # the first 18 digits count, the rest are worth 1e-17 of the value
                mantissa = mantissa * 10 + text[i] - _ZERO
                exponent -= point
            else:
                exponent += not point
        elif text[i] == _DOT and not point:
            point = True
        else:
            break
        i += 1
    if n_digits == 0:
        return np.float32(0), i, _MALFORMED
    if text[i] in (101, 69):  # e, E
        i += 1
        direction = -1 if text[i] == _MINUS else 1
        if text[i] in (_MINUS, _PLUS):
            i += 1
        digits, after = _integer(text, i)
        if after == i:
            return np.float32(0), i, _MALFORMED
        exponent += direction * digits
        i = after
    if mantissa <= 1 << 53 and -22 <= exponent <= 22:
        scale = powers[abs(exponent) - _LOWEST]
        exact = mantissa * scale if exponent >= 0 else mantissa / scale
        return np.float32(sign * exact), i, _SETTLED
    if mantissa == 0 or exponent < _LOWEST:
        return np.float32(sign * 0.0), i, _SETTLED
    if exponent > _HIGHEST:
        return np.float32(np.inf), i, _SETTLED
    near = sign * mantissa * powers[exponent - _LOWEST]
    low, high = np.float32(near * (1.0 - 2.0**-51)), np.float32(near * (1.0 + 2.0**-51))
    return low, i, _SETTLED if low == high else _UNSETTLED


@kernel(error_model="numpy")
def _sort_unique(ids: NDArray[np.int32]) -> int:
    """Sort ids in place, merge equal ones and return how many remain."""
    ascending = min(len(ids), 1)
    while ascending < len(ids) and ids[ascending] > ids[ascending - 1]:
        ascending += 1
    if ascending == len(ids):
        return len(ids)
    sort(ids)
    n_unique = 1
    for j in range(1, len(ids)):
        if ids[j] != ids[n_unique - 1]:
            ids[n_unique] = ids[j]
            n_unique += 1
    return n_unique


@kernel(error_model="numpy")
def parse_rows(
    text: NDArray[np.uint8],
    svmlight: bool,
    n_rows: int,
    n_features: int,
    n_classes: int,
    powers: NDArray[np.float64],
    class_indptr: NDArray[np.int64],
    class_ids: NDArray[np.int32],
    feature_indptr: NDArray[np.int64],
    feature_indices: NDArray[np.int32],
    feature_values: NDArray[np.float32],
    unsettled: NDArray[np.int64],
) -> tuple[int, int, int, int]:
    """Parse whole lines into the given arrays, which must be large enough.

    The text ends in a newline, so that no scan runs past it. With ``svmlight``, ``+1`` and ``1.0`` are classes, and
    ``qid:``, comments and blank lines are passed over. ``nan`` is no class. Not more than ``n_rows`` rows are allowed,
    -1: any number; blank lines behind them are passed over. ``unsettled`` of shape (n, 2) receives (entry, position of
    its token) of values that the caller must parse.

    Returns `DONE` or the kind of error, the position of its token, and the numbers of rows and of unsettled values.
    """
    i, row, n_ids, n_entries, n_unsettled = 0, 0, 0, 0, 0
    class_indptr[0] = feature_indptr[0] = 0
    while i < len(text):
        unlabelled = not svmlight and _is_end(text[i], svmlight)
        while _is_blank(text[i]):
            i += 1
        if text[i] == _NEWLINE and (svmlight or row == n_rows):
            i += 1
            continue
        if svmlight and text[i] == _HASH:
            while text[i] != _NEWLINE:
                i += 1
            continue
        if row == n_rows:
            return EXTRA_ROW, i, row, n_unsettled

        begin = n_ids
        while not unlabelled:
            start = i + 1 if svmlight and text[i] == _PLUS else i
            k, after = _integer(text, start)
            if after > start and text[after] == _COLON and n_ids == begin:
                break  # the line begins with a feature: no class
            is_missing = after == i and _is_nan(text, i)
            if is_missing:
                after += 3
            elif svmlight and after > start and text[after] == _DOT:
                after += 1
                while text[after] == _ZERO:
                    after += 1
            if after == start or not (text[after] == _COMMA or _is_end(text[after], svmlight)):
                return BAD_CLASS, i, row, n_unsettled
            if not is_missing:
                if k >= n_classes:
                    return CLASS_RANGE, i, row, n_unsettled
                class_ids[n_ids] = k
                n_ids += 1
            i = after
            if text[i] != _COMMA:
                break
            i += 1
            if _is_end(text[i], svmlight):
                return BAD_CLASS, i - 1, row, n_unsettled
        n_ids = begin + _sort_unique(class_ids[begin:n_ids])

        previous = -1
        while True:
            while _is_blank(text[i]):
                i += 1
            if text[i] == _NEWLINE:
                break
            if svmlight and text[i] == _HASH:
                while text[i] != _NEWLINE:
                    i += 1
                break
            if svmlight and text[i] == 113 and text[i + 1] == 105 and text[i + 2] == 100 and text[i + 3] == _COLON:
                while not _is_end(text[i], svmlight):  # qid:7
                    i += 1
                continue
            index, after = _integer(text, i)
            if after == i or text[after] != _COLON:
                return BAD_FEATURE, i, row, n_unsettled
            if index >= n_features:
                return FEATURE_RANGE, i, row, n_unsettled
            if index <= previous:
                return FEATURE_ORDER, i, row, n_unsettled
            value, after, state = _real(text, after + 1, powers)
            if state == _MALFORMED or not _is_end(text[after], svmlight) or np.isinf(value):
                return BAD_VALUE, i, row, n_unsettled
            if state == _UNSETTLED:
                unsettled[n_unsettled, 0] = n_entries
                unsettled[n_unsettled, 1] = i
                n_unsettled += 1
            feature_indices[n_entries] = index
            feature_values[n_entries] = value
            n_entries += 1
            previous = index
            i = after
        i += 1
        row += 1
        class_indptr[row] = n_ids
        feature_indptr[row] = n_entries
    return DONE, i, row, n_unsettled
