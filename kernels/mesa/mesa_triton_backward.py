# SPDX-License-Identifier: Apache-2.0
"""The last kernel of the backward pass: from solutions and adjoint states to the gradients of a chunk's inputs.

With the solutions `x_t`, `y_t`, `e_t = dL/do_t`, the keys `k_s` that the operator computes with, `zeta_ts` the decay
after s up to t, `z_s` that up to the chunk's end, and dG, dH the adjoints of the states after the chunk:

    dv_s    = beta_s [sum_{t >= s} zeta_ts (x_t . k_s) e_t + z_s dG^T k_s]
    dk_s    = beta_s [sum_{t >= s} zeta_ts (D_ts x_t - (x_t . k_s) y_t) + z_s (dG v_s + (dH + dH^T) k_s)]
    dbeta_s = sum_{t >= s} zeta_ts (x_t . k_s) D_ts + z_s (k_s . dG v_s + k_s . dH k_s)

where `D_ts = e_t . v_s - y_t . k_s`; `dq_t = y_t`, `dLambda = -sum_t x_t * y_t`, and for gamma the inner products of
states and adjoints, split by whether the state and the output lie inside the chunk. Everything is laid out by s, so
that a gradient is a row. Importing this needs triton; dimensions and formats as in `mesa_triton_helpers` and
`mesa_triton_states`.
"""

from .mesa_triton_helpers import (
    decay_to_end,
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


@triton.jit
def load_tile(top, rest, row, column, D: tl.constexpr, TERMS: tl.constexpr):
    """Rows and columns of `[.., D]`, as `load_pair` loads them."""
    return load_pair(top, rest, row[:, None] * D + column[None, :], TERMS)


@triton.jit
def joined(top, rest, TERMS: tl.constexpr):
    """One or two float16 terms as float32."""
    if TERMS == 2:
        return top.to(tl.float32) + rest.to(tl.float32)
    else:
        return top.to(tl.float32)


@triton.jit
def load_keys(keys, keys_rest, C: tl.constexpr, KP: tl.constexpr, TERMS: tl.constexpr):
    """A chunk's keys, divided by their units, in float32 `[C, KP]`."""
    top, rest = load_tile(keys, keys_rest, tl.arange(0, C), tl.arange(0, KP), KP, TERMS)
    return joined(top, rest, TERMS)


@triton.jit
def load_solution(top, rest, unit, C: tl.constexpr, KP: tl.constexpr):
    """A chunk's solutions in float32 `[C, KP]`."""
    high, low = load_tile(top, rest, tl.arange(0, C), tl.arange(0, KP), KP, 2)
    return joined(high, low, 2) * tl.load(unit + tl.arange(0, C))[:, None]


@triton.jit
def through_norm(gradient, scaled, norm, unit, NORMALIZE: tl.constexpr):
    """The gradient of a vector `unit * scaled` from that of its normalised form `norm * scaled`, row by row."""
    if NORMALIZE:
        along = tl.sum(gradient * scaled, 1) * norm * norm
        return (gradient - along[:, None] * scaled) * (norm / unit)[:, None]
    else:
        return gradient


@triton.jit
def decay_to(target, source, decay_whole, decay_fraction):
    """`zeta_ts` for s <= t, else 0; rows are the sources s, columns the targets t."""
    exponent = tl.load(decay_whole + target)[None, :] - tl.load(decay_whole + source)[:, None]
    exponent += tl.load(decay_fraction + target)[None, :] - tl.load(decay_fraction + source)[:, None]
    causal = target[None, :] >= source[:, None]
    return tl.where(causal, tl.exp2(tl.where(causal, exponent, 0.0)), 0.0)


@triton.jit
def query_gradients(
    x, x_rest, x_unit, y, y_rest, y_unit, q, grad_q, grad_lam, heads, count, epsilon,
    NORMALIZE: tl.constexpr, SOLVED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The gradients of q and, this chunk's part, of Lambda."""
    token, channel = tl.arange(0, C), tl.arange(0, KP)
    inside = token < count
    gradient = load_solution(y, y_rest, y_unit, C, KP)
    if SOLVED:
        tl.store(grad_lam + channel, -tl.sum(load_solution(x, x_rest, x_unit, C, KP) * gradient, 0))
    else:
        tl.store(grad_lam + channel, tl.zeros([KP], dtype=tl.float32))
    scaled, unit = scale_rows(load_rows(q, token * heads, inside, channel, K))
    norm = normalizer(scaled, unit, epsilon, NORMALIZE)
    gradient = through_norm(gradient, scaled, norm, unit, NORMALIZE)
    offset = token[:, None] * (heads * K) + channel[None, :]
    tl.store(grad_q + offset, gradient.to(grad_q.dtype.element_ty), mask=inside[:, None] & (channel[None, :] < K))


@triton.jit
def value_gradients(
    x, x_rest, x_unit, keys, keys_rest, key_factor, grad_rows, grad_rows_rest, grad_unit, beta,
    decay_whole, decay_fraction, dg_high, dg_low, dg_scale, grad_v, heads, count,
    TERMS: tl.constexpr, C: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of v, BV columns at a time."""
    token, channel = tl.arange(0, C), tl.arange(0, KP)
    inside = token < count
    norm = tl.load(key_factor + token)
    k, k_rest = load_tile(keys, keys_rest, token, channel, KP, TERMS)
    top, rest = load_tile(x, x_rest, token, channel, KP, 2)
    kx = dot_pairs(k, k_rest, tl.trans(top), tl.trans(rest), tl.zeros([C, C], dtype=tl.float32), TERMS, 2)
    kx *= norm[:, None] * (tl.load(x_unit + token) * tl.load(grad_unit + token))[None, :]
    kx, unit = scale_rows(kx * decay_to(token, token, decay_whole, decay_fraction))
    kx, kx_rest = split_half(kx)
    strength = tl.load(beta + token * heads, mask=inside, other=0.0)
    to_end, _ = decay_to_end(tl.load(decay_whole + token), tl.load(decay_fraction + token), C)
    past_end = strength * norm * tl.load(dg_scale) * to_end
    for start in range(0, VP, BV):
        column = start + tl.arange(0, BV)
        zeros = tl.zeros([C, BV], dtype=tl.float32)
        e, e_rest = load_tile(grad_rows, grad_rows_rest, token, column, VP, TERMS)
        gradient = dot_pairs(kx, kx_rest, e, e_rest, zeros, 2, TERMS) * (unit * strength)[:, None]
        k, k_rest = load_tile(keys, keys_rest, token, channel, KP, TERMS)
        high, low = load_tile(dg_high, dg_low, channel, column, VP, 2)
        gradient += dot_pairs(k, k_rest, high, low, zeros, TERMS, 2) * past_end[:, None]
        offset = token[:, None] * (heads * V) + column[None, :]
        mask = inside[:, None] & (column[None, :] < V)
        tl.store(grad_v + offset, gradient.to(grad_v.dtype.element_ty), mask=mask)


@triton.jit
def key_gradients(
    x, x_rest, x_unit, y, y_rest, y_unit, keys, keys_rest, key_unit, key_factor, values, values_rest, value_unit,
    grad_rows, grad_rows_rest, grad_unit, beta, decay_whole, decay_fraction, dh_high, dh_low, dh_scale,
    dg_high, dg_low, dg_scale, crossing, from_earlier, grad_k, grad_log_gamma, grad_beta, heads, count,
    NORMALIZE: tl.constexpr, SOLVED: tl.constexpr, TERMS: tl.constexpr, CROSSINGS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """The gradients of k, beta and log gamma.

    The barriers keep the compiler from merging loads of the same tile: in registers until its next use, it would
    displace the sums.
    """
    token, channel, column = tl.arange(0, C), tl.arange(0, KP), tl.arange(0, VP)
    inside = token < count
    norm = tl.load(key_factor + token)

    # (dH + dH^T) k. All columns of a state have one scale.
    gradient = tl.zeros([C, KP], dtype=tl.float32)
    for start in range(0, KP, BK):
        part = start + tl.arange(0, BK)
        k, k_rest = load_tile(keys, keys_rest, token, part, KP, TERMS)
        high, low = load_tile(dh_high, dh_low, part, channel, KP, 2)
        gradient = dot_pairs(k, k_rest, high, low, gradient, TERMS, 2)
        high, low = load_tile(dh_high, dh_low, channel, part, KP, 2)
        gradient = dot_pairs(k, k_rest, tl.trans(high), tl.trans(low), gradient, TERMS, 2)
    gradient *= (norm * tl.load(dh_scale))[:, None]
    tl.debug_barrier()
    quadratic = tl.sum(gradient * load_keys(keys, keys_rest, C, KP, TERMS), 1)

    # dG v.
    product = tl.zeros([C, KP], dtype=tl.float32)
    for start in range(0, VP, BV):
        part = start + tl.arange(0, BV)
        v, v_rest = load_tile(values, values_rest, token, part, VP, TERMS)
        high, low = load_tile(dg_high, dg_low, channel, part, VP, 2)
        product = dot_pairs(v, v_rest, tl.trans(high), tl.trans(low), product, TERMS, 2)
    gradient += product * (tl.load(value_unit + token) * tl.load(dg_scale))[:, None]
    tl.debug_barrier()

    # What passes the chunk's end, and what comes from before it. k . dH k is half of k . (dH + dH^T) k.
    to_end, across = decay_to_end(tl.load(decay_whole + token), tl.load(decay_fraction + token), C)
    along = tl.sum(gradient * load_keys(keys, keys_rest, C, KP, TERMS), 1)
    d_beta = (along - 0.5 * quadratic) * (norm * to_end)
    gradient *= to_end[:, None]
    strength = tl.load(beta + token * heads, mask=inside, other=0.0)
    earlier = token[:, None] > token[None, :]
    before = tl.load(from_earlier + token, mask=inside, other=0.0)
    d_decay = tl.sum(tl.where(earlier, (d_beta * strength)[None, :], before[None, :]), 1)
    d_decay += tl.sum(tl.load(crossing + tl.arange(0, CROSSINGS)), 0) * tl.exp2(across)
    tl.debug_barrier()

    # Between tokens of the chunk, by blocks of targets t; rows are the sources s, as the last products want them.
    for start in range(0, C, TARGETS):
        target = start + tl.arange(0, TARGETS)
        zeros = tl.zeros([C, TARGETS], dtype=tl.float32)
        v, v_rest = load_tile(values, values_rest, token, column, VP, TERMS)
        e, e_rest = load_tile(grad_rows, grad_rows_rest, target, column, VP, TERMS)
        difference = dot_pairs(v, v_rest, tl.trans(e), tl.trans(e_rest), zeros, TERMS, TERMS)
        difference *= tl.load(value_unit + token)[:, None] * tl.load(grad_unit + target)[None, :]
        k, k_rest = load_tile(keys, keys_rest, token, channel, KP, TERMS)
        x_top, x_low = load_tile(x, x_rest, target, channel, KP, 2)
        unit_x = tl.load(x_unit + target)
        kx = dot_pairs(k, k_rest, tl.trans(x_top), tl.trans(x_low), zeros, TERMS, 2)
        kx *= norm[:, None] * unit_x[None, :]
        if SOLVED:
            y_top, y_low = load_tile(y, y_rest, target, channel, KP, 2)
            unit_y = tl.load(y_unit + target)
            ky = dot_pairs(k, k_rest, tl.trans(y_top), tl.trans(y_low), zeros, TERMS, 2)
            difference -= ky * (norm[:, None] * unit_y[None, :])
        zeta = decay_to(target, token, decay_whole, decay_fraction)
        kx *= zeta
        gate = kx * difference
        d_beta += tl.sum(gate, 1)

        # d log gamma_s takes all gates from sources before s to targets from s on. The sum over targets is a product
        # with ones.
        gate, unit = scale_rows(gate)
        gate, gate_rest = split_half(gate)
        ones = (target[None, :] >= token[:, None]).to(tl.float16)
        later = dot_pairs(ones, ones, tl.trans(gate), tl.trans(gate_rest), tl.zeros([C, C], dtype=tl.float32), 1, 2)
        d_decay += tl.sum(tl.where(earlier, later * (unit * strength)[None, :], 0.0), 1)

        left = difference * zeta * unit_x[None, :]
        peak = tl.max(tl.abs(left), 1)
        if SOLVED:
            right = -kx * unit_y[None, :]
            peak = tl.maximum(peak, tl.max(tl.abs(right), 1))
        unit = power_of_two(peak)
        left, left_rest = split_half(left * (1.0 / unit)[:, None])
        sums = tl.zeros([C, KP], dtype=tl.float32)
        sums = dot_pairs(left, left_rest, x_top, x_low, sums, 2, 2)
        if SOLVED:
            right, right_rest = split_half(right * (1.0 / unit)[:, None])
            sums = dot_pairs(right, right_rest, y_top, y_low, sums, 2, 2)
        gradient += sums * unit[:, None]

    tl.store(grad_log_gamma + token * heads, d_decay, mask=inside)
    tl.store(grad_beta + token * heads, d_beta, mask=inside)
    scaled = load_keys(keys, keys_rest, C, KP, TERMS)
    gradient = through_norm(gradient * strength[:, None], scaled, norm, tl.load(key_unit + token), NORMALIZE)
    offset = token[:, None] * (heads * K) + channel[None, :]
    tl.store(grad_k + offset, gradient.to(grad_k.dtype.element_ty), mask=inside[:, None] & (channel[None, :] < K))


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def gradients_kernel(
    x,
    x_rest,
    x_unit,
    y,
    y_rest,
    y_unit,
    q,
    keys,
    keys_rest,
    key_unit,
    key_factor,
    values,
    values_rest,
    value_unit,
    grad_rows,
    grad_rows_rest,
    grad_unit,
    beta,
    decay_whole,
    decay_fraction,
    dh_high,
    dh_low,
    dh_scale,
    dg_high,
    dg_low,
    dg_scale,
    crossing,
    from_earlier,
    grad_q,
    grad_k,
    grad_v,
    grad_log_gamma,
    grad_beta,
    grad_lam,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    epsilon,
    NORMALIZE: tl.constexpr,
    SOLVED: tl.constexpr,
    PACKED: tl.constexpr,
    TERMS: tl.constexpr,
    CROSSINGS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """Programs 2 (chunk * heads + head) + i: the gradients of k and of the gates (i = 0), those of v, q and Lambda.

    In one program, more vectors would be alive than there are registers; side by side, the two share what they read
    through the cache.

    Args:
        x, y: solutions as pairs `[N, H, C, KP]` and units `[N, H, C]`.
        keys, values, grad_rows: `[N, H, C, KP]` and `[N, H, C, VP]` with their units; key_factor makes of the keys
            those that the operator computes with.
        dh, dg: adjoints of H and G after every chunk as pairs.
        crossing: `[N, H, CROSSINGS]`, parts of `<dG, G> + <dH, H>` with the states before the chunk.
        from_earlier: `[N, H, C]`, `zeta_t0 (x_t . G e_t - y_t . H x_t)` with the states before the chunk.
        grad_lam: `[N, H, KP]`, a part for each chunk.
        BK, BV, TARGETS: columns of the states, and tokens t, that are taken at once.
    """
    block, head = (tl.program_id(0) // 2).to(tl.int64), (tl.program_id(0) // 2) % heads
    first, count = locate_chunk(tl.program_id(0) // 2 // heads, length, chunks_per_row, chunk_table, C, PACKED)
    grad_lam += block * KP
    if count <= 0:
        tl.store(grad_lam + tl.arange(0, KP), tl.zeros([KP], dtype=tl.float32))
        return
    row = first * heads + head
    x, x_rest, x_unit = x + block * C * KP, x_rest + block * C * KP, x_unit + block * C
    y, y_rest, y_unit = y + block * C * KP, y_rest + block * C * KP, y_unit + block * C
    keys, key_factor = keys + block * C * KP, key_factor + block * C
    grad_rows, grad_unit = grad_rows + block * C * VP, grad_unit + block * C
    if TERMS == 2:
        keys_rest += block * C * KP
        grad_rows_rest += block * C * VP
    beta += row
    decay_whole, decay_fraction = decay_whole + block * C, decay_fraction + block * C
    dg_high, dg_low, dg_scale = dg_high + block * KP * VP, dg_low + block * KP * VP, dg_scale + block
    if tl.program_id(0) % 2 == 0:
        if TERMS == 2:
            values_rest += block * C * VP
        key_gradients(
            x, x_rest, x_unit, y, y_rest, y_unit, keys, keys_rest, key_unit + block * C, key_factor,
            values + block * C * VP, values_rest, value_unit + block * C, grad_rows, grad_rows_rest, grad_unit,
            beta, decay_whole, decay_fraction,
            dh_high + block * KP * KP, dh_low + block * KP * KP, dh_scale + block,
            dg_high, dg_low, dg_scale, crossing + block * CROSSINGS, from_earlier + block * C,
            grad_k + row * K, grad_log_gamma + row, grad_beta + row, heads, count,
            NORMALIZE, SOLVED, TERMS, CROSSINGS, C, K, KP, VP, BK, BV, TARGETS,
        )  # fmt: skip
    else:
        query_gradients(
            x, x_rest, x_unit, y, y_rest, y_unit, q + row * K, grad_q + row * K, grad_lam, heads, count, epsilon,
            NORMALIZE, SOLVED, C, K, KP,
        )  # fmt: skip
        value_gradients(
            x, x_rest, x_unit, keys, keys_rest, key_factor, grad_rows, grad_rows_rest, grad_unit,
            beta, decay_whole, decay_fraction, dg_high, dg_low, dg_scale, grad_v + row * V, heads, count,
            TERMS, C, V, KP, VP, BV,
        )  # fmt: skip
