"""Sums of weighted rows whose accumulators stay in registers, where a plain loop of numba keeps them in memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.memory import CACHE_LINE
from mach.sketch.kernels.lanes import ask_for, pointer_to, spread

Array = NDArray[Any]
INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = ir.IntType(8).as_pointer()
AHEAD = 8  # rows between asking for one and adding it
WIDE = 128 if get_host_cpu_features().get("avx512f") else 64  # sums that half of the vector registers hold


def _adder(width: int, ahead: int) -> Any:
    """Code for ``out[c : c + width] += sum(scales[j] * source[rows[j], c : c + width] for j in range(begin, end))``.

    Rows are asked for ``ahead`` turns early, unless that is 0. Sums run in the order of j, whatever the width.
    """
    floats, integers = ir.VectorType(FLOAT, width), ir.VectorType(INT32, width)

    @intrinsic
    def add(context: Any, out: Any, scales: Any, rows: Any, begin: Any, end: Any, source: Any, column: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, _, rows, begin, end, _, column = arguments

            def pointer(i: int, *where: Any) -> Any:
                return pointer_to(context, builder, signature.args[i], arguments[i], *where)

            def row_of(j: Any) -> Any:
                return builder.sext(builder.load(pointer(2, j)), INT64)

            def wide_row(j: Any) -> Any:
                kind = signature.args[5].dtype
                item = context.get_value_type(kind)
                at = builder.bitcast(pointer(5, row_of(j), column), ir.VectorType(item, width).as_pointer())
                numbers = builder.load(at, align=kind.bitwidth // 8)
                if kind == types.uint16:
                    upper = builder.shl(builder.zext(numbers, integers), ir.Constant(integers, [16] * width))
                    return builder.bitcast(upper, floats)
                return builder.sitofp(numbers, floats) if kind == types.int8 else numbers

            def ask_for_row(j: Any) -> None:
                line = builder.bitcast(pointer(5, row_of(j), column), POINTER)
                for offset in range(0, width * signature.args[5].dtype.bitwidth // 8, CACHE_LINE):
                    ask_for(builder, builder.gep(line, [INT64(offset)]))

            sums = builder.bitcast(pointer(0, column), floats.as_pointer())
            start = builder.load(sums, align=4)
            n_rows = make_array(signature.args[2])(context, builder, rows).nitems
            entry = builder.basic_block
            loop, done = builder.append_basic_block("rows"), builder.append_basic_block("sum")
            builder.cbranch(builder.icmp_signed("<", begin, end), loop, done)
            builder.position_at_end(loop)
            j, total = builder.phi(INT64), builder.phi(floats)
            if ahead:
                later, last = builder.add(j, INT64(ahead)), builder.sub(n_rows, INT64(1))
                ask_for_row(builder.select(builder.icmp_signed("<", later, last), later, last))
            scale = spread(builder, builder.load(pointer(1, j)), floats)
            product = builder.fmul(scale, wide_row(j), flags=("contract",))
            new = builder.fadd(total, product, flags=("contract",))
            after = builder.add(j, INT64(1))
            for value, first, again in ((j, begin, after), (total, start, new)):
                value.add_incoming(first, entry)
                value.add_incoming(again, builder.basic_block)
            builder.cbranch(builder.icmp_signed("<", after, end), loop, done)
            back = builder.basic_block
            builder.position_at_end(done)
            result = builder.phi(floats)
            result.add_incoming(start, entry)
            result.add_incoming(new, back)
            builder.store(result, sums, align=4)
            return context.get_dummy_value()

        return types.void(out, scales, rows, types.int64, types.int64, source, types.int64), codegen

    return add


_far_wide, _far_16, _far_1 = (_adder(width, AHEAD) for width in (WIDE, 16, 1))
_near_wide, _near_16, _near_1 = (_adder(width, 0) for width in (WIDE, 16, 1))


@kernel()
def add_rows(out_H: Array, scales: Array, rows: Array, begin: int, end: int, source: Array, is_far: bool) -> None:
    """``out += sum(scales[j] * source[rows[j]] for j in range(begin, end))``, of float32, bfloat16 or int8 rows.

    Rows of a source that is far, beyond the caches, are asked for early, those after ``end`` too.
    """
    h, width = 0, len(out_H)
    while h + WIDE <= width:
        if is_far:
            _far_wide(out_H, scales, rows, begin, end, source, h)
        else:
            _near_wide(out_H, scales, rows, begin, end, source, h)
        h += WIDE
    while h + 16 <= width:
        if is_far:
            _far_16(out_H, scales, rows, begin, end, source, h)
        else:
            _near_16(out_H, scales, rows, begin, end, source, h)
        h += 16
    while h < width:
        if is_far:
            _far_1(out_H, scales, rows, begin, end, source, h)
        else:
            _near_1(out_H, scales, rows, begin, end, source, h)
        h += 1
