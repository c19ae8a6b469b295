# SPDX-License-Identifier: Apache-2.0
"""The chunkwise solve in Triton, for every GPU that Triton knows: right-hand sides, conjugate gradient, read-out.

Conjugate gradient along rounded directions: the direction p is kept in float16 only, and is the exact direction of its
step, so that rounding it costs a little conjugacy but no accuracy. The matrix operands (H, G, the products with the
chunk's keys) enter as float16 pairs with 22 significant bits, accumulated in float32; x and r stay in float32.

Importing this needs triton; dimensions and formats as in `mesa_triton_helpers` and `mesa_triton_states`.
"""

from .mesa_triton_helpers import (
    dot_pairs,
    load_pair,
    load_rows,
    locate_chunk,
    normalizer,
    power_of_two,
    scale_rows,
    split_half,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    raise

# Directions are held at norms of at most twice this, which keeps their entries clear of subnormal float16 numbers.
DIRECTION_SCALE = tl.constexpr(256.0)


@triton.jit
def state_product(
    left, left_rest, source, source_rest, high, low, state_high, state_low, row, TERMS: tl.constexpr,
    RESIDENT: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """`[R, KP]` vectors times H, without its scale: with H on chip, or in slices of BS rows from memory.

    `left` (and `left_rest`, with two TERMS) are the vectors in float16; their slices come from rows `row` of `source`.
    """
    channel = tl.arange(0, KP)
    product = tl.zeros([R, KP], dtype=tl.float32)
    if RESIDENT:
        product = dot_pairs(left, left_rest, high, low, product, TERMS, 2)
    else:
        for start in range(0, KP, BS):
            part = start + tl.arange(0, BS)
            values, rest = load_pair(source, source_rest, row[:, None] * KP + part[None, :], TERMS)
            top, low_part = load_pair(state_high, state_low, part[:, None] * KP + channel[None, :], 2)
            product = dot_pairs(values, rest, top, low_part, product, TERMS, 2)
    return product


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row", "max_steps"])
def solve_chunks_kernel(
    b,
    keys,
    keys_rest,
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
    scratch,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    max_steps,
    threshold,
    epsilon,
    BACKWARD: tl.constexpr,
    SOLVE: tl.constexpr,
    STORE_SOLUTION: tl.constexpr,
    STATS: tl.constexpr,
    RESIDENT: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
):
    """Program (chunk * heads + head, row block): solve for R of a chunk's C tokens.

    Forward: `b` = q; writes `o`, and the solutions x to `solution` if STORE_SOLUTION. BACKWARD: `b` = gradient e of o,
    and the arguments `x` are the forward's solutions; the right-hand sides are `G_t e_t`. Writes y to `solution`, e in
    float16 to `grad_rows` (pairs if TERMS = 2), the weights with which `y x^T` and `x e^T` enter the adjoints of H and
    G before the chunk, and `from_earlier`, which is `zeta_t0 (x_t . G e_t - y_t . H x_t)` with the states before the
    chunk. Solutions are float16 pairs; they and `grad_rows` are in units of a power of two a token.
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    first, tokens = locate_chunk(tl.program_id(0) // heads, length, chunks_per_row, chunk_table, C, PACKED)
    if tokens <= 0:
        return
    t, s = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, C)
    channel = tl.arange(0, KP)
    row_t, inside_t = (first + t) * heads + head, t < tokens
    h_high, h_low = h_high + block * KP * KP, h_low + block * KP * KP
    g_high, g_low = g_high + block * KP * VP, g_low + block * KP * VP

    whole = tl.load(decay_whole + block * C + t)
    fraction = tl.load(decay_fraction + block * C + t)
    exponent = whole[:, None] - tl.load(decay_whole + block * C + s)[None, :]
    exponent += fraction[:, None] - tl.load(decay_fraction + block * C + s)[None, :]
    causal = t[:, None] >= s[None, :]
    zeta = tl.where(causal, tl.exp2(tl.where(causal, exponent, 0.0)), 0.0)
    from_start = tl.exp2(whole + fraction)
    key_decay = zeta * tl.load(key_weight + block * C + s)[None, :]
    value_decay = zeta * (tl.load(value_weight + block * C + s) * tl.load(value_unit + block * C + s))[None, :]

    key_offset = (block * C + s)[:, None] * KP + channel[None, :]
    k, k_rest = load_pair(keys, keys_rest, key_offset, TERMS)
    state_scale = tl.load(h_scale + block) * from_start[:, None]
    regularizer = tl.load(lam + head * K + channel, mask=channel < K, other=1.0)[None, :]
    if RESIDENT:
        state_offset = channel[:, None] * KP + channel[None, :]
        high, low = tl.load(h_high + state_offset), tl.load(h_low + state_offset)
    else:
        high, low = 0.0, 0.0

    if BACKWARD:
        # Right-hand side G_t e_t = zeta_t0 G e_t + sum_s W_ts k_s (v_s . e_t), in units of a row's own power of two.
        earlier = tl.zeros([R, KP], dtype=tl.float32)
        inner = tl.zeros([R, C], dtype=tl.float32)
        peak = tl.zeros([R], dtype=tl.float32)
        for start in range(0, VP, BV):
            column = start + tl.arange(0, BV)
            peak = tl.maximum(peak, tl.max(tl.abs(load_rows(b, row_t, inside_t, column, V)), 1))
        unit = power_of_two(peak)
        for start in range(0, VP, BV):
            column = start + tl.arange(0, BV)
            e, e_rest = split_half(load_rows(b, row_t, inside_t, column, V) * (1.0 / unit)[:, None])
            grad_offset = (block * C + t)[:, None] * VP + column[None, :]
            tl.store(grad_rows + grad_offset, e)
            if TERMS == 2:
                tl.store(grad_rows_rest + grad_offset, e_rest)
            value_offset = (block * C + s)[:, None] * VP + column[None, :]
            v, v_rest = load_pair(values, values_rest, value_offset, TERMS)
            inner = dot_pairs(e, e_rest, tl.trans(v), tl.trans(v_rest), inner, TERMS, TERMS)
            g_offset = channel[:, None] * VP + column[None, :]
            g, g_rest = load_pair(g_high, g_low, g_offset, 2)
            zeros = tl.zeros([R, KP], dtype=tl.float32)
            scale = tl.load(g_scale + block)
            earlier += dot_pairs(e, e_rest, tl.trans(g), tl.trans(g_rest), zeros, TERMS, 2) * scale
        earlier *= from_start[:, None]
        inner, inner_unit = scale_rows(inner * value_decay)
        inner, inner_rest = split_half(inner)
        zeros = tl.zeros([R, KP], dtype=tl.float32)
        product = dot_pairs(inner, inner_rest, k, k_rest, zeros, 2, TERMS)
        r = earlier + product * inner_unit[:, None]
        row_offset = (block * C + t)[:, None] * KP + channel[None, :]
        given, given_rest = tl.load(x + row_offset), tl.load(x_rest + row_offset)
        given_unit = tl.load(x_unit + block * C + t)
        crossing = tl.sum((given.to(tl.float32) + given_rest.to(tl.float32)) * earlier, 1) * (unit * given_unit)
        tl.store(update_g + block * C + t, from_start * given_unit * unit)
        tl.store(grad_unit + block * C + t, unit)
        r, second = scale_rows(r)
        unit = unit * second
    else:
        r, unit = scale_rows(load_rows(b, row_t, inside_t, channel, K))
        unit = normalizer(r, unit, epsilon, NORMALIZE)

    if SOLVE:
        system_scale = state_scale
        if not NORMALIZE:
            # Keys may be of any length, but their products with the directions must fit into float16: H + Lambda is
            # divided by a power of two. Normalised keys have weights of at most 1.
            divisor = 1.0 / tl.maximum(power_of_two(tl.max(tl.abs(tl.load(key_weight + block * C + s)), 0)), 1.0)
            key_decay *= divisor
            regularizer *= divisor
            system_scale *= divisor
            unit *= divisor
        result = tl.zeros([R, KP], dtype=tl.float32)
        rr = tl.sum(r * r, 1)
        limit = threshold * rr
        active = rr > limit
        p = (r * (1.0 / power_of_two(tl.sqrt(rr)) * DIRECTION_SCALE)[:, None]).to(tl.float16)
        size = tl.full([R], 2.0 * DIRECTION_SCALE, dtype=tl.float32)  # what the norm of p cannot exceed
        count = tl.zeros([R], dtype=tl.int32)
        source = scratch + block * C * KP
        step = 0
        remaining = tl.max(active.to(tl.int32), 0)
        while (step < max_steps) & (remaining > 0):
            if not RESIDENT:
                # The other warps must have read the last direction before this one replaces it, and see this one.
                tl.debug_barrier()
                tl.store(source + t[:, None] * KP + channel[None, :], p)
                tl.debug_barrier()
            inner = tl.zeros([R, C], dtype=tl.float32)
            inner = dot_pairs(p, p, tl.trans(k), tl.trans(k_rest), inner, 1, TERMS) * key_decay
            a = state_product(p, p, source, source, high, low, h_high, h_low, t, 1, RESIDENT, KP, R, BS)
            direction = p.to(tl.float32)
            a = a * system_scale + regularizer * direction
            inner, inner_rest = split_half(inner)
            a = dot_pairs(inner, inner_rest, k, k_rest, a, 2, TERMS)
            curvature = tl.sum(direction * a, 1)
            slope = tl.sum(direction * r, 1)
            active = active & (curvature > 0)
            alpha = tl.where(active, slope / curvature, 0.0)
            result += alpha[:, None] * direction
            r -= alpha[:, None] * a
            count += active.to(tl.int32)
            rr = tl.sum(r * r, 1)
            # A frozen row's direction is its residual: finite, and not used any more. So is that of a row whose
            # direction has been lost to rounding: it starts afresh.
            ahead = tl.where(active & (slope > 0), rr / slope, 0.0)
            direction = r + ahead[:, None] * direction
            # From the last direction's own bound: a constant one would shrink the directions step after step, while
            # they are much longer than the residuals, until float16 loses them.
            bound = tl.sqrt(rr) + ahead * size
            factor = 1.0 / power_of_two(bound) * DIRECTION_SCALE
            size = bound * factor
            p = (direction * factor[:, None]).to(tl.float16)
            active = active & (rr > limit)
            step += 1
            remaining = tl.max(active.to(tl.int32), 0)
        if STATS:
            tl.store(steps + row_t, count, mask=inside_t)
            start = limit / threshold
            tl.store(residual + row_t, tl.where(start == 0, 0.0, tl.sqrt(rr / start)), mask=inside_t)
        result += (limit * 0.0)[:, None]  # a row that is not finite says so
    else:
        result = r
    result, second = scale_rows(result)
    unit = unit * second
    top, rest = split_half(result)
    if STORE_SOLUTION:
        solution_offset = (block * C + t)[:, None] * KP + channel[None, :]
        tl.store(solution + solution_offset, top)
        tl.store(solution_rest + solution_offset, rest)
        tl.store(solution_unit + block * C + t, unit)

    if BACKWARD:
        if SOLVE:
            source = x + block * C * KP
            source_rest = x_rest + block * C * KP
            a = state_product(
                given, given_rest, source, source_rest, high, low, h_high, h_low, t, 2, RESIDENT, KP, R, BS
            )
            crossing -= tl.sum(result * (a * state_scale), 1) * (unit * given_unit)
            tl.store(update_h + block * C + t, -from_start * unit * given_unit)
        else:
            tl.store(update_h + block * C + t, tl.zeros([R], dtype=tl.float32))
        tl.store(from_earlier + block * C + t, crossing)
    else:
        inner = tl.zeros([R, C], dtype=tl.float32)
        inner = dot_pairs(top, rest, tl.trans(k), tl.trans(k_rest), inner, 2, TERMS)
        inner, weight_unit = scale_rows(inner * value_decay)
        inner, inner_rest = split_half(inner)
        for start in range(0, VP, BV):
            column = start + tl.arange(0, BV)
            value_offset = (block * C + s)[:, None] * VP + column[None, :]
            v, v_rest = load_pair(values, values_rest, value_offset, TERMS)
            g_offset = channel[:, None] * VP + column[None, :]
            g, g_rest = load_pair(g_high, g_low, g_offset, 2)
            zeros = tl.zeros([R, BV], dtype=tl.float32)
            earlier = dot_pairs(top, rest, g, g_rest, zeros, 2, 2)
            earlier *= (from_start * tl.load(g_scale + block))[:, None]
            zeros = tl.zeros([R, BV], dtype=tl.float32)
            product = dot_pairs(inner, inner_rest, v, v_rest, zeros, 2, TERMS)
            output = (earlier + product * weight_unit[:, None]) * unit[:, None]
            o_offset = row_t[:, None] * V + column[None, :]
            tl.store(o + o_offset, output.to(o.dtype.element_ty), mask=inside_t[:, None] & (column[None, :] < V))
