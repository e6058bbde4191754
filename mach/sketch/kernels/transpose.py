"""Transposes in registers: sixteen rows and columns at a time, of two or four bytes an entry."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

TILE = 16


@intrinsic
def _transpose_tile(context: Any, source: Any, row: Any, column: Any, into: Any) -> Any:
    """``into[c : c + 16, r : r + 16] = source[r : r + 16, c : c + 16].T``, in registers.

    Four rounds; the one of step s swaps blocks of s x s entries between rows that are s apart.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_value_type(signature.args[0].dtype)
        line, size = ir.VectorType(item, TILE), signature.args[0].dtype.bitwidth // 8
        lanes = ir.VectorType(ir.IntType(32), TILE)

        def pointer(i: int, row: Any, column: Any) -> Any:
            kind = signature.args[i]
            view = make_array(kind)(context, builder, arguments[i])
            item_pointer = get_item_pointer(context, builder, kind, view, [row, column], wraparound=False)
            return builder.bitcast(item_pointer, line.as_pointer())

        def plus(number: Any, i: int) -> Any:
            return builder.add(number, ir.IntType(64)(i))

        _, row, column, _ = arguments
        lines = [builder.load(pointer(0, plus(row, i), column), align=size) for i in range(TILE)]
        for step in (1, 2, 4, 8):
            low = [i if not i & step else i - step + TILE for i in range(TILE)]
            high = [i + step if not i & step else i + TILE for i in range(TILE)]
            for i in range(TILE):
                if not i & step:
                    pair = lines[i], lines[i + step]
                    lines[i], lines[i + step] = (
                        builder.shuffle_vector(*pair, ir.Constant(lanes, mask)) for mask in (low, high)
                    )
        for i in range(TILE):
            builder.store(lines[i], pointer(3, plus(column, i), row), align=size)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, into), codegen


@njit(cache=True, nogil=True)
def transpose(z_BN: NDArray[Any], first: int, end: int, g_NB: NDArray[Any]) -> None:
    """``g[:, first:end] = z[first:end].T``."""
    whole_B, whole_N = end - (end - first) % TILE, z_BN.shape[1] - z_BN.shape[1] % TILE
    for n in range(0, whole_N, TILE):
        for b in range(first, whole_B, TILE):
            _transpose_tile(z_BN, b, n, g_NB)
    for b in range(first, end):
        for n in range(whole_N if b < whole_B else 0, z_BN.shape[1]):
            g_NB[n, b] = z_BN[b, n]
