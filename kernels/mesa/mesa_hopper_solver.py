# SPDX-License-Identifier: Apache-2.0
"""The chunkwise solve for Hopper GPUs, written in Gluon, Triton's dialect with explicit layouts.

The same iteration as `mesa_triton_solver`, for 16-bit keys with K and V of 64 or 128 in chunks of 64 tokens. One
warpgroup solves a chunk: its tensor core instructions take the directions from registers and H, as float16 pairs, and
the keys from shared memory, where nothing is written in a step but the solution. The residuals r, the directions p and
the product fill the registers; two programs share a multiprocessor, so that one computes on vectors while the other
multiplies. Importing this needs triton.
"""

from .mesa_triton_helpers import locate_chunk as triton_locate_chunk
from .mesa_triton_helpers import power_of_two as triton_power_of_two
from .mesa_triton_solver import DIRECTION_SCALE

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
except ImportError:
    raise

# Renamed in triton 3.8.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

locate_chunk = gluon.jit(triton_locate_chunk.fn)
power_of_two = gluon.jit(triton_power_of_two.fn)


@gluon.jit
def scale_rows(x):
    """As `mesa_triton_helpers.scale_rows`."""
    scale = power_of_two(gl.max(gl.abs(x), 1))
    return x * (1.0 / scale)[:, None], scale


@gluon.jit
def to_half(x):
    """`x` in float16. The compiler's own conversion of two neighbours swaps them and then swaps them back."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def split_half(x):
    """As `mesa_triton_helpers.split_half`."""
    high = to_half(x)
    return high, to_half(x - high.to(gl.float32))


@gluon.jit
def operand(x, MMA: gl.constexpr):
    """`x` as the left operand of a product whose result has the layout MMA; nothing moves between threads."""
    return gl.convert_layout(x, gl.DotOperandLayout(0, MMA, 2))


@gluon.jit
def unknown_zero(x):
    """0, but the compiler does not know: what is computed with it is computed where it stands, not before a loop."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start_tile(shared, pointer, zero, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Start copying a contiguous `[ROWS, COLUMNS]` tile to shared memory; `zero` may be an `unknown_zero`."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + zero
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    copy_to_shared(shared, pointer + row[:, None] * COLUMNS + column[None, :])


@gluon.jit
def pair_product(top, rest, right, right_rest, zeros):
    """`(top + rest) (right + right_rest)` without the product of the rests; the left pair comes from registers."""
    product = hopper.warpgroup_mma(top, right, zeros, use_acc=False, is_async=True)
    product = hopper.warpgroup_mma(rest, right, product, is_async=True)
    product = hopper.warpgroup_mma(top, right_rest, product, is_async=True)
    return hopper.warpgroup_mma_wait(0, deps=[product])


@gluon.jit(do_not_specialize=["heads", "length", "chunks_per_row", "max_steps"])
def solve_chunks_hopper_kernel(
    b,
    keys,
    values,
    values_rest,
    lam,
    h_high,
    h_low,
    h_scale,
    g_high,
    g_low,
    g_scale,
    decay_whole,
    decay_fraction,
    key_weight,
    value_weight,
    value_unit,
    o,
    x,
    x_rest,
    x_unit,
    solution,
    solution_rest,
    solution_unit,
    grad_rows,
    grad_rows_rest,
    grad_unit,
    update_h,
    update_g,
    from_earlier,
    steps,
    residual,
    norm_weight,
    norm_epsilon,
    gate,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    max_steps,
    threshold,
    epsilon,
    BACKWARD: gl.constexpr,
    STORE_SOLUTION: gl.constexpr,
    STATS: gl.constexpr,
    PACKED: gl.constexpr,
    VALUE_TERMS: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
):
    """Program chunk * heads + head; arguments as in `mesa_triton_solver.solve_chunks_kernel`, max_steps at least 1.

    VALUE_TERMS = 2 reads out values in float16 pairs; keys, and all that BACKWARD reads or writes of a gradient, are
    single float16 numbers. With `norm_weight` `[V]`, and perhaps `gate` `[B, T, H, V]`, outputs are normalised (and
    gated) as by `mesa_triton_layers.launch_head_norm`.
    """
    C: gl.constexpr = 64
    INNER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    KEY_TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    VALUE_TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    HALVES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # The solution lies in shared memory as the threads hold r, pair of columns after pair: without bank conflicts, and
    # at constant distances, for which no registers are needed.
    PAIRS: gl.constexpr = [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [8, 0]]
    COLUMNS: gl.constexpr = [[0, 8], [0, 16], [0, 32], [0, 64]] if K == 128 else [[0, 8], [0, 16], [0, 32]]
    FLOATS: gl.constexpr = gl.SharedLinearLayout(PAIRS + COLUMNS)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROW: gl.constexpr = gl.SliceLayout(1, KEY)
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])

    program = gl.program_id(0)
    block, head = program.to(gl.int64), program % heads
    first, tokens = locate_chunk(program // heads, length, chunks_per_row, chunk_table, C, PACKED)
    if tokens <= 0:
        return
    h_high, h_low = h_high + block * (K * K), h_low + block * (K * K)
    g_high, g_low = g_high + block * (K * V), g_low + block * (K * V)
    token = gl.arange(0, C, ROW)
    inside = token < tokens
    row = (first + token) * heads + head
    channel = gl.arange(0, K, gl.SliceLayout(0, KEY))
    column = gl.arange(0, V, gl.SliceLayout(0, VALUE))
    source = gl.arange(0, C, gl.SliceLayout(0, INNER))
    target = gl.arange(0, C, gl.SliceLayout(1, INNER))
    solutions = (block * C + token)[:, None] * K + channel[None, :]

    k = gl.allocate_shared_memory(gl.float16, [C, K], HALVES)
    start_tile(k, keys + block * (C * K), 0, C, K, KEY_TILE)
    if BACKWARD:
        v = gl.allocate_shared_memory(gl.float16, [C, V], HALVES)
        start_tile(v, values + block * (C * V), 0, C, V, VALUE_TILE)
        g_top = gl.allocate_shared_memory(gl.float16, [K, V], HALVES)
        g_rest = gl.allocate_shared_memory(gl.float16, [K, V], HALVES)
        start_tile(g_top, g_high, 0, K, V, VALUE_TILE)
        start_tile(g_rest, g_low, 0, K, V, VALUE_TILE)
        async_copy.commit_group()
    else:
        h_top = gl.allocate_shared_memory(gl.float16, [K, K], HALVES)
        h_rest = gl.allocate_shared_memory(gl.float16, [K, K], HALVES)
        start_tile(h_top, h_high, 0, K, K, KEY_TILE)
        start_tile(h_rest, h_low, 0, K, K, KEY_TILE)
        async_copy.commit_group()

    # W_ts = zeta_ts w_s as one power of two, 2^(exponent_t - (exponent_s - log2 w_s)).
    vector = gl.arange(0, C, VECTOR)
    exponent = gl.load(decay_whole + block * C + vector) + gl.load(decay_fraction + block * C + vector)
    key_exponent = gl.allocate_shared_memory(gl.float32, [C], PLAIN)
    key_exponent.store(exponent - gl.log2(gl.load(key_weight + block * C + vector)))
    ahead = gl.load(decay_whole + block * C + target) + gl.load(decay_fraction + block * C + target)
    from_start = gl.exp2(gl.convert_layout(ahead, ROW))
    lambdas = gl.allocate_shared_memory(gl.float32, [K], PLAIN)
    wide = gl.arange(0, K, VECTOR)
    lambdas.store(gl.load(lam + head * K + wide))

    if BACKWARD:
        # G_t e_t = zeta_t0 G e_t + sum_s W_ts k_s (v_s . e_t)
        value_row = gl.convert_layout(row, gl.SliceLayout(1, VALUE))
        value_inside = gl.convert_layout(inside, gl.SliceLayout(1, VALUE))
        e = gl.load(b + value_row[:, None] * V + column[None, :], mask=value_inside[:, None], other=0.0).to(gl.float32)
        e, unit = scale_rows(e)
        e = e.to(gl.float16)
        value_token = gl.arange(0, C, gl.SliceLayout(1, VALUE))
        gl.store(grad_rows + (block * C + value_token)[:, None] * V + column[None, :], e)
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        barrier()
        inner = gl.zeros([C, C], gl.float32, INNER)
        inner = hopper.warpgroup_mma(operand(e, INNER), v.permute((1, 0)), inner, use_acc=False, is_async=True)
        r = gl.zeros([C, K], gl.float32, KEY)
        r = hopper.warpgroup_mma(operand(e, KEY), g_top.permute((1, 0)), r, use_acc=False, is_async=True)
        r = hopper.warpgroup_mma(operand(e, KEY), g_rest.permute((1, 0)), r, is_async=True)
        inner = hopper.warpgroup_mma_wait(2, deps=[inner])
        weight = gl.load(value_weight + block * C + source) * gl.load(value_unit + block * C + source)
        behind = gl.load(decay_whole + block * C + source) + gl.load(decay_fraction + block * C + source)
        decay = gl.exp2(gl.minimum(ahead[:, None] - behind[None, :], 0.0)) * weight[None, :]
        inner, inner_unit = scale_rows(gl.where(target[:, None] >= source[None, :], inner * decay, 0.0))
        top, rest = split_half(inner)
        top, rest = operand(top, KEY), operand(rest, KEY)
        r = hopper.warpgroup_mma_wait(0, deps=[r])
        r = r * (from_start * gl.load(g_scale + block))[:, None]
        given = gl.load(x + solutions).to(gl.float32) + gl.load(x_rest + solutions).to(gl.float32)
        given_unit = gl.load(x_unit + block * C + token)
        unit = gl.convert_layout(unit, ROW)
        earlier = gl.sum(given * r, 1) * (unit * given_unit)
        gl.store(update_g + block * C + token, from_start * given_unit * unit)
        gl.store(grad_unit + block * C + token, unit)
        product = gl.zeros([C, K], gl.float32, KEY)
        product = hopper.warpgroup_mma(top, k, product, use_acc=False, is_async=True)
        product = hopper.warpgroup_mma(rest, k, product, is_async=True)
        product = hopper.warpgroup_mma_wait(0, deps=[product])
        r, second = scale_rows(r + product * gl.convert_layout(inner_unit, ROW)[:, None])
        unit = unit * second
        # G is done with; H takes its place.
        barrier()
        h_top = gl.allocate_shared_memory(gl.float16, [K, K], HALVES)
        h_rest = gl.allocate_shared_memory(gl.float16, [K, K], HALVES)
        start_tile(h_top, h_high, 0, K, K, KEY_TILE)
        start_tile(h_rest, h_low, 0, K, K, KEY_TILE)
        async_copy.commit_group()
    else:
        r = gl.load(b + row[:, None] * K + channel[None, :], mask=inside[:, None], other=0.0).to(gl.float32)
        r, unit = scale_rows(r)
        unit = gl.rsqrt(gl.sum(r * r, 1) + epsilon / unit / unit)

    rr = gl.sum(r * r, 1)
    limit = threshold * rr
    active = rr > limit
    p = operand((r * (1.0 / power_of_two(gl.sqrt(rr)) * DIRECTION_SCALE)[:, None]).to(gl.float16), KEY)
    size = gl.full([C], 2.0 * DIRECTION_SCALE, gl.float32, ROW)  # what the norm of p cannot exceed
    state_unit = from_start * gl.load(h_scale + block)
    result = gl.allocate_shared_memory(gl.float32, [C, K], FLOATS)
    result.store(gl.zeros([C, K], gl.float32, KEY))
    count = gl.zeros([C], gl.int32, ROW)
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    barrier()
    step = 0
    remaining = gl.max(active.to(gl.int32), 0)
    while (step < max_steps) & (remaining > 0):
        inner = gl.zeros([C, C], gl.float32, INNER)
        inner = hopper.warpgroup_mma(p, k.permute((1, 0)), inner, use_acc=False, is_async=True)
        a = gl.zeros([C, K], gl.float32, KEY)
        a = hopper.warpgroup_mma(p, h_top.permute((1, 0)), a, use_acc=False, is_async=True)
        a = hopper.warpgroup_mma(p, h_rest.permute((1, 0)), a, is_async=True)
        slope = gl.sum(gl.convert_layout(p, KEY).to(gl.float32) * r, 1)
        # The tensor cores go on with H while the product with the keys is brought into its final form.
        inner = hopper.warpgroup_mma_wait(2, deps=[inner])
        behind = key_exponent.load(gl.SliceLayout(0, INNER))
        causal = target[:, None] >= source[None, :]
        inner = gl.where(causal, inner * gl.exp2(ahead[:, None] - behind[None, :]), 0.0)
        top, rest = split_half(inner)
        top, rest = operand(top, KEY), operand(rest, KEY)
        a = hopper.warpgroup_mma_wait(0, deps=[a])
        direction = gl.convert_layout(p, KEY).to(gl.float32)
        regularizer = lambdas.load(gl.SliceLayout(0, KEY))
        a = a * state_unit[:, None] + regularizer[None, :] * direction
        a = hopper.warpgroup_mma(top, k, a, is_async=True)
        a = hopper.warpgroup_mma(rest, k, a, is_async=True)
        a = hopper.warpgroup_mma_wait(0, deps=[a])
        direction = gl.convert_layout(p, KEY).to(gl.float32)
        curvature = gl.sum(direction * a, 1)
        active = active & (curvature > 0)
        alpha = gl.where(active, slope / curvature, 0.0)
        r = r - alpha[:, None] * a
        rr = gl.sum(r * r, 1)
        count += active.to(gl.int32)
        # After the last use of a: the whole solution passes through registers here.
        direction = gl.convert_layout(p, KEY).to(gl.float32)
        result.store(result.load(KEY) + alpha[:, None] * direction)
        # As in `mesa_triton_solver`.
        ratio = gl.where(active & (slope > 0), rr / slope, 0.0)
        bound = gl.sqrt(rr) + ratio * size
        factor = 1.0 / power_of_two(bound) * DIRECTION_SCALE
        size = bound * factor
        p = operand(to_half((r + ratio[:, None] * direction) * factor[:, None]), KEY)
        active = active & (rr > limit)
        step += 1
        remaining = gl.max(active.to(gl.int32), 0)
    if STATS:
        start = limit / threshold
        gl.store(steps + row, count, mask=inside)
        gl.store(residual + row, gl.where(start == 0, 0.0, gl.sqrt(rr / start)), mask=inside)
    # A row that is not finite says so.
    found = result.load(KEY) + (limit * 0.0)[:, None]
    found, second = scale_rows(found)
    unit = unit * second
    top, rest = split_half(found)
    if STORE_SOLUTION:
        gl.store(solution + solutions, top)
        gl.store(solution_rest + solutions, rest)
        gl.store(solution_unit + block * C + token, unit)

    if BACKWARD:
        given, given_rest = gl.load(x + solutions), gl.load(x_rest + solutions)
        product = pair_product(
            operand(given, KEY), operand(given_rest, KEY), h_top, h_rest, gl.zeros([C, K], gl.float32, KEY)
        )
        unit = unit * gl.load(x_unit + block * C + token)
        later = gl.sum(found * (product * state_unit[:, None]), 1) * unit
        gl.store(from_earlier + block * C + token, earlier - later)
        gl.store(update_h + block * C + token, -from_start * unit)
    else:
        # All warps have read H and the solution; G and the values take their place.
        zero = unknown_zero(step)
        barrier()
        v = gl.allocate_shared_memory(gl.float16, [C, V], HALVES)
        g_top = gl.allocate_shared_memory(gl.float16, [K, V], HALVES)
        g_rest = gl.allocate_shared_memory(gl.float16, [K, V], HALVES)
        start_tile(v, values + block * (C * V), zero, C, V, VALUE_TILE)
        if VALUE_TERMS == 2:
            v_rest = gl.allocate_shared_memory(gl.float16, [C, V], HALVES)
            start_tile(v_rest, values_rest + block * (C * V), zero, C, V, VALUE_TILE)
        start_tile(g_top, g_high, zero, K, V, VALUE_TILE)
        start_tile(g_rest, g_low, zero, K, V, VALUE_TILE)
        async_copy.commit_group()
        inner = gl.zeros([C, C], gl.float32, INNER)
        inner = hopper.warpgroup_mma(operand(top, INNER), k.permute((1, 0)), inner, use_acc=False, is_async=True)
        inner = hopper.warpgroup_mma(operand(rest, INNER), k.permute((1, 0)), inner, is_async=True)
        inner = hopper.warpgroup_mma_wait(0, deps=[inner])
        weight = gl.load(value_weight + block * C + source) * gl.load(value_unit + block * C + source)
        behind = gl.load(decay_whole + block * C + source) + gl.load(decay_fraction + block * C + source)
        decay = gl.exp2(gl.minimum(ahead[:, None] - behind[None, :], 0.0)) * weight[None, :]
        inner, inner_unit = scale_rows(gl.where(target[:, None] >= source[None, :], inner * decay, 0.0))
        inner_top, inner_rest = split_half(inner)
        async_copy.wait_group(0)
        hopper.fence_async_shared()
        barrier()
        output = pair_product(
            operand(top, VALUE), operand(rest, VALUE), g_top, g_rest, gl.zeros([C, V], gl.float32, VALUE)
        )
        inner_unit = gl.convert_layout(inner_unit, gl.SliceLayout(1, VALUE))
        start_unit = gl.convert_layout(from_start * gl.load(g_scale + block), gl.SliceLayout(1, VALUE))
        output = output * (start_unit / inner_unit)[:, None]
        output = hopper.warpgroup_mma(operand(inner_top, VALUE), v, output, is_async=True)
        output = hopper.warpgroup_mma(operand(inner_rest, VALUE), v, output, is_async=True)
        if VALUE_TERMS == 2:
            output = hopper.warpgroup_mma(operand(inner_top, VALUE), v_rest, output, is_async=True)
        output = hopper.warpgroup_mma_wait(0, deps=[output])
        output = output * (gl.convert_layout(unit, gl.SliceLayout(1, VALUE)) * inner_unit)[:, None]
        value_row = gl.convert_layout(row, gl.SliceLayout(1, VALUE))
        value_inside = gl.convert_layout(inside, gl.SliceLayout(1, VALUE))
        places = value_row[:, None] * V + column[None, :]
        rounded = output.to(o.dtype.element_ty)
        if norm_weight is not None:  # as `head_norm_kernel`
            output = rounded.to(gl.float32)
            rstd = gl.rsqrt(gl.sum(output * output, 1) / V + norm_epsilon)
            output = output * rstd[:, None] * gl.load(norm_weight + column).to(gl.float32)[None, :]
            if gate is not None:
                opening = gl.load(gate + places, mask=value_inside[:, None], other=0.0).to(gl.float32)
                output = output * (opening / (1.0 + gl.exp(-opening)))
            rounded = output.to(o.dtype.element_ty)
        gl.store(o + places, rounded, mask=value_inside[:, None])
