"""Sixteen numbers at a time: the vector instructions that LLVM does not choose by itself.

On processors with AVX-512 a gather instruction looks sixteen values up; elsewhere, and on AMD's, where it is slower
than single loads, sixteen loads do. Either way the sums are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from mach.files.compiled import kernel

LANES = 16
BLOCK = 64  # values that `largest_below` looks at
GATHERS = llvm.get_host_cpu_features().get("avx512f", False) and not llvm.get_host_cpu_name().startswith("znver")
LOOK_NS = 0.45 if GATHERS else 1.0  # that a value which is looked up takes
I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTEGERS, WIDE, FLOATS = (ir.VectorType(kind, LANES) for kind in (I32, I64, FLOAT))
EVERY_LANE = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)


@intrinsic
def fill(context: Any, sums: Any, j: Any, value: Any) -> Any:
    """``sums[j : j + 16] = value``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1])
        _store(builder, spread(builder, arguments[2], FLOATS), at)
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.float32), codegen


@intrinsic
def add_progression(
    context: Any, sums: Any, j: Any, values: Any, s: Any, steps: Any, r: Any, start: Any, modulus: Any, test: Any
) -> Any:
    """Add to ``sums[j : j + 16]`` the values of classes whose images run through a progression; see `add_listed`.

    The images are ``(start + steps[r, s, j : j + 16]) mod p``, their buckets the remainders of these by B, and
    ``modulus`` is (p, B, multiplier, shift) with ``z // B == z * multiplier >> shift`` for every z below 2**31.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, j, values, s, steps, r, start, modulus, test = arguments
        kinds = signature.args
        p, n_buckets, multiplier, shift = (builder.extract_value(modulus, i) for i in range(4))
        image = _load(builder, pointer_to(context, builder, kinds[4], steps, r, s, j), I32)
        image = builder.add(image, spread(builder, start, INTEGERS))
        less = builder.sub(image, spread(builder, p, INTEGERS))  # below p it wraps to a larger number
        image = builder.select(builder.icmp_unsigned("<", image, less), image, less)
        product = builder.mul(builder.zext(image, WIDE), spread(builder, builder.zext(multiplier, I64), WIDE))
        quotient = builder.trunc(builder.lshr(product, spread(builder, shift, WIDE)), INTEGERS)
        bucket = builder.sub(image, builder.mul(quotient, spread(builder, n_buckets, INTEGERS)))
        found = _gather(builder, pointer_to(context, builder, kinds[2], values, s, I64(0)), bucket)
        return _accumulate(builder, pointer_to(context, builder, kinds[0], sums, j), found, test)

    return types.uint32(
        sums, types.int64, values, types.int64, steps, types.int64, types.uint32, modulus, test
    ), codegen


@intrinsic
def add_listed(
    context: Any, sums: Any, j: Any, values: Any, s: Any, lists: Any, r: Any, g: Any, at: Any, test: Any
) -> Any:
    """Add to ``sums[j : j + 16]`` the values in repetition s of the buckets ``lists[r, g, at : at + 16]``.

    ``values`` are float32 of shape (R, B), ``lists`` uint16 or uint32 of three axes, and j is a multiple of 16. The
    ``test`` is a least sum, a least value, and whether instead of a value -1 is added where it is less than the least
    value, else 0. Returns a bit for every sum that is at least the least.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, j, values, s, lists, r, g, at, test = arguments
        kinds = signature.args
        listed = _load(
            builder, pointer_to(context, builder, kinds[4], lists, r, g, at), ir.IntType(kinds[4].dtype.bitwidth)
        )
        bucket = listed if listed.type == INTEGERS else builder.zext(listed, INTEGERS)
        found = _gather(builder, pointer_to(context, builder, kinds[2], values, s, I64(0)), bucket)
        return _accumulate(builder, pointer_to(context, builder, kinds[0], sums, j), found, test)

    return types.uint32(sums, types.int64, values, types.int64, lists, *[types.int64] * 3, test), codegen


@intrinsic
def reaching(context: Any, values: Any, r: Any, b: Any, least: Any) -> Any:
    """A bit for every one of ``values[r, b : b + 16]`` that is at least the least."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, r, b, least = arguments
        found = _load(builder, pointer_to(context, builder, signature.args[0], values, r, b), FLOAT)
        return _bits(builder, builder.fcmp_ordered(">=", found, spread(builder, least, FLOATS)))

    return types.uint32(values, types.int64, types.int64, types.float32), codegen


@intrinsic
def sum_rows(context: Any, out: Any, i: Any, starts: Any, values: Any, places: Any, begin: Any, end: Any) -> Any:
    """``out[i] = starts + sum(values[places[j]] for j in range(begin, end))``, and a bit for every sum of at least 0.

    Rows of ``out`` and ``values`` and ``starts`` have sixteen float32; there is at least one place.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, i, starts, values, places, begin, end = arguments
        kinds = signature.args
        start = _load(builder, pointer_to(context, builder, kinds[2], starts, I64(0)), FLOAT)
        entry, loop, done = builder.basic_block, builder.append_basic_block("places"), builder.append_basic_block("sum")
        builder.branch(loop)
        builder.position_at_end(loop)
        j, total = builder.phi(I64), builder.phi(FLOATS)
        place = builder.sext(builder.load(pointer_to(context, builder, kinds[4], places, j)), I64)
        new = builder.fadd(total, _load(builder, pointer_to(context, builder, kinds[3], values, place, I64(0)), FLOAT))
        after = builder.add(j, I64(1))
        for value, first, again in ((j, begin, after), (total, start, new)):
            value.add_incoming(first, entry)
            value.add_incoming(again, loop)
        builder.cbranch(builder.icmp_signed("<", after, end), loop, done)
        builder.position_at_end(done)
        _store(builder, new, pointer_to(context, builder, kinds[0], out, i, I64(0)))
        return _bits(builder, builder.fcmp_ordered(">=", new, ir.Constant(FLOATS, [0.0] * LANES)))

    return types.uint32(out, types.int64, starts, values, places, types.int64, types.int64), codegen


@intrinsic
def largest_below(context: Any, values: Any, r: Any, b: Any, limit: Any) -> Any:
    """The largest of ``values[r, b : b + 64]`` that is less than the limit; -inf if none is."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, r, b, limit = arguments
        limits, none = spread(builder, limit, FLOATS), ir.Constant(FLOATS, [float("-inf")] * LANES)
        pointer = pointer_to(context, builder, signature.args[0], values, r, b)
        best = none
        for i in range(BLOCK // LANES):
            found = _load(builder, builder.gep(pointer, [I64(i * LANES)]), FLOAT)
            found = builder.select(builder.fcmp_ordered("<", found, limits), found, none)
            best = builder.select(builder.fcmp_ordered(">", found, best), found, best)
        for width in (8, 4, 2, 1):
            turned = ir.Constant(INTEGERS, [(lane + width) % LANES for lane in range(LANES)])
            other = builder.shuffle_vector(best, best, turned)
            best = builder.select(builder.fcmp_ordered(">", other, best), other, best)
        return builder.extract_element(best, I32(0))

    return types.float32(values, types.int64, types.int64, types.float32), codegen


@intrinsic
def prefetch(context: Any, array: Any, r: Any, g: Any, at: Any) -> Any:
    """Ask for the cache line that holds ``array[r, g, at]``."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, pointer_to(context, builder, signature.args[0], *arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, types.int64), codegen


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """Position of the lowest bit that is set, of some."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), I64)

    return types.int64(types.uint32), codegen


@intrinsic
def _transpose_tile(context: Any, source: Any, row: Any, column: Any, into: Any) -> Any:
    """``into[c : c + 16, r : r + 16] = source[r : r + 16, c : c + 16].T``, in registers.

    Four rounds; the one of step s swaps blocks of s x s entries between rows that are s apart.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (kind, _, _, kind_into), (source, row, column, into) = signature.args, arguments
        item = context.get_value_type(kind.dtype)
        rows, columns = ([builder.add(first, I64(i)) for i in range(LANES)] for first in (row, column))
        lines = [_load(builder, pointer_to(context, builder, kind, source, r, column), item) for r in rows]
        for step in (1, 2, 4, 8):
            low = [i if not i & step else i - step + LANES for i in range(LANES)]
            high = [i + step if not i & step else i + LANES for i in range(LANES)]
            for i in range(LANES):
                if not i & step:
                    pair = lines[i], lines[i + step]
                    lines[i], lines[i + step] = (
                        builder.shuffle_vector(*pair, ir.Constant(INTEGERS, mask)) for mask in (low, high)
                    )
        for c, line in zip(columns, lines, strict=True):
            _store(builder, line, pointer_to(context, builder, kind_into, into, c, row))
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, into), codegen


@kernel()
def transpose(z_BN: NDArray[Any], first: int, end: int, g_NB: NDArray[Any]) -> None:
    """``g[:, first:end] = z[first:end].T``."""
    whole_B, whole_N = end - (end - first) % LANES, z_BN.shape[1] - z_BN.shape[1] % LANES
    for n in range(0, whole_N, LANES):
        for b in range(first, whole_B, LANES):
            _transpose_tile(z_BN, b, n, g_NB)
    for b in range(first, end):
        for n in range(whole_N if b < whole_B else 0, z_BN.shape[1]):
            g_NB[n, b] = z_BN[b, n]


def _accumulate(builder: Any, at: Any, found: Any, test: Any) -> Any:
    least_sum, least_value, is_counting = (builder.extract_value(test, i) for i in range(3))
    is_missed = builder.fcmp_ordered("<", found, spread(builder, least_value, FLOATS))
    counted = builder.select(is_missed, ir.Constant(FLOATS, [-1.0] * LANES), ir.Constant(FLOATS, [0.0] * LANES))
    counts = builder.trunc(is_counting, ir.IntType(1)) if is_counting.type != ir.IntType(1) else is_counting
    total = builder.fadd(_load(builder, at, FLOAT), builder.select(counts, counted, found))
    _store(builder, total, at)
    return _bits(builder, builder.fcmp_ordered(">=", total, spread(builder, least_sum, FLOATS)))


def _bits(builder: Any, truths: Any) -> Any:
    return builder.zext(builder.bitcast(truths, I16), I32)


def _gather(builder: Any, values: Any, indices: Any) -> Any:
    if GATHERS:
        pointer = I8.as_pointer()
        kind = ir.FunctionType(FLOATS, [FLOATS, pointer, INTEGERS, EVERY_LANE.type, I32])
        gather = builder.module.declare_intrinsic("llvm.x86.avx512.mask.gather.dps.512", (), kind)
        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        return builder.call(gather, [nothing, builder.bitcast(values, pointer), indices, EVERY_LANE, I32(4)])
    found = ir.Constant(FLOATS, ir.Undefined)
    for lane in range(LANES):
        place = builder.zext(builder.extract_element(indices, I32(lane)), I64)
        found = builder.insert_element(found, builder.load(builder.gep(values, [place])), I32(lane))
    return found


def pointer_to(context: Any, builder: Any, kind: Any, array: Any, *indices: Any) -> Any:
    """Where an entry of an array of this numba type stands."""
    view = make_array(kind)(context, builder, array)
    return get_item_pointer(context, builder, kind, view, list(indices), wraparound=False)


def ask_for(builder: Any, pointer: Any) -> None:
    """Add code that asks for the cache line of a pointer."""
    byte = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    read, all_levels, data = I32(0), I32(3), I32(1)
    builder.call(function, [builder.bitcast(pointer, byte), read, all_levels, data])


def _load(builder: Any, pointer: Any, element: Any) -> Any:
    vector = builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer())
    return builder.load(vector, align=1)


def _store(builder: Any, vector: Any, pointer: Any) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=1)


def spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of this type that repeats a number."""
    unknown = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(unknown, number, I32(0))
    return builder.shuffle_vector(first, unknown, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))
