# SPDX-License-Identifier: Apache-2.0
"""The last two kernels of the backward pass: from solutions and adjoint states to the gradients of a chunk's inputs.

Dimensions and formats as in `mesa_triton_helpers` and `mesa_triton_states`; s is the token that was written, t >= s
one that reads it. Everything is laid out by s, so that a gradient is a row. Importing this needs triton.
"""

from .mesa_triton_helpers import (
    decay_to_end,
    dot_pairs,
    load_pair,
    load_rows,
    locate_chunk,
    normalizer,
    scale_rows,
    split_half,
)
from .mesa_triton_states import CHUNK_NUMBERS, DECAY

try:
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def weighted_sum(weights, right, right_rest, sums, TERMS: tl.constexpr):
    """`sums + weights right` for float32 `weights` `[C, C]` of any size."""
    weights, unit = scale_rows(weights)
    top, rest = split_half(weights)
    zeros = tl.zeros(sums.shape, dtype=tl.float32)
    return sums + dot_pairs(top, rest, right, right_rest, zeros, 2, TERMS) * unit[:, None]


@triton.jit
def through_norm(gradient, scaled, rho, unit, NORMALIZE: tl.constexpr):
    """The gradient of a vector `unit * scaled` from that of its normalised form `rho * scaled`, row by row."""
    if NORMALIZE:
        projection = tl.sum(gradient * scaled, 1) * rho * rho
        return (gradient - projection[:, None] * scaled) * (rho / unit)[:, None]
    else:
        return gradient


@triton.jit
def tail(rest, TERMS: tl.constexpr):
    if TERMS == 2:
        return rest.to(tl.float32)
    else:
        return 0.0


@triton.jit
def decay_factors(decay_whole, decay_fraction, vectors, token, C: tl.constexpr):
    """`zeta_ts` `[C, C]` by rows s and columns t, and `zeta_end,s` `[C]`."""
    whole, fraction = tl.load(decay_whole + vectors), tl.load(decay_fraction + vectors)
    to_end, _ = decay_to_end(whole, fraction, C)
    exponent = (whole[None, :] - whole[:, None]) + (fraction[None, :] - fraction[:, None])
    causal = token[None, :] >= token[:, None]
    return tl.where(causal, tl.exp2(tl.where(causal, exponent, 0.0)), 0.0), to_end


@triton.jit
def value_gradients(
    x, x_rest, x_unit, y, y_rest, y_unit, q, keys, keys_rest, grad_rows, grad_rows_rest, grad_unit, dg_high, dg_low,
    dg_scale, value_weight, grad_q, grad_v, grad_lam, zeta, to_end, index, row, inside, epsilon,
    NORMALIZE: tl.constexpr, SOLVED: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of v, q and Lambda.

    `dv_s = beta_s (sum_t zeta_ts (x_t . k_s) e_t + zeta_end,s dG^T k_s)`, `dq_t = y_t`, `dLambda = -sum_t x_t * y_t`.
    """
    token, channel = tl.arange(0, C), tl.arange(0, KP)
    vectors = index * C + token
    offset = vectors[:, None] * KP + channel[None, :]
    tops, rests = load_pair(x, x_rest, offset, 2)
    units = tl.load(x_unit + vectors)
    solved, solved_rest = load_pair(y, y_rest, offset, 2)
    gradient = (solved.to(tl.float32) + solved_rest.to(tl.float32)) * tl.load(y_unit + vectors)[:, None]
    if SOLVED:
        products = (tops.to(tl.float32) + rests.to(tl.float32)) * units[:, None] * gradient
        tl.store(grad_lam + index * KP + channel, -tl.sum(products, 0))
    else:
        tl.store(grad_lam + index * KP + channel, tl.zeros([KP], dtype=tl.float32))
    scaled, unit = scale_rows(load_rows(q, row, inside, channel, K))
    rho = normalizer(scaled, unit, epsilon, NORMALIZE)
    gradient = through_norm(gradient, scaled, rho, unit, NORMALIZE)
    outside = inside[:, None] & (channel[None, :] < K)
    tl.store(grad_q + row[:, None] * K + channel[None, :], gradient.to(grad_q.dtype.element_ty), mask=outside)

    k, k_rest = load_pair(keys, keys_rest, offset, TERMS)
    zeros = tl.zeros([C, C], dtype=tl.float32)
    weights = dot_pairs(k, k_rest, tl.trans(tops), tl.trans(rests), zeros, TERMS, 2)
    weights *= zeta * (units * tl.load(grad_unit + vectors))[None, :]
    factor = tl.load(value_weight + vectors)
    scale = tl.load(dg_scale + index * (VP // BV))
    for start in range(0, VP, BV):
        column = start + tl.arange(0, BV)
        state_offset = index * KP * VP + channel[:, None] * VP + column[None, :]
        top, rest = load_pair(dg_high, dg_low, state_offset, 2)
        sums = tl.zeros([C, BV], dtype=tl.float32)
        sums = dot_pairs(k, k_rest, top, rest, sums, TERMS, 2) * (to_end * scale)[:, None]
        top, rest = load_pair(grad_rows, grad_rows_rest, vectors[:, None] * VP + column[None, :], TERMS)
        sums = weighted_sum(weights, top, rest, sums, TERMS) * factor[:, None]
        where = inside[:, None] & (column[None, :] < V)
        tl.store(grad_v + row[:, None] * V + column[None, :], sums.to(grad_v.dtype.element_ty), mask=where)


@triton.jit
def carried_gradients(
    keys, keys_rest, values, values_rest, dh_high, dh_low, dh_scale, dg_high, dg_low, dg_scale, key_factor, value_unit,
    later, carried, to_end, index, part, TERMS: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients that reach each token through the states after the chunk.

    Columns `part` of `z_s (dG v_s + (dH + dH^T) k_s)` to `later`, and their share of `z_s k_s . (dG v_s + dH k_s)` to
    `carried`, with `z_s = zeta_end,s`.
    """
    token, channel = tl.arange(0, C), part * BK + tl.arange(0, BK)
    vectors = index * C + token
    rho, unit_v = tl.load(key_factor + vectors), tl.load(value_unit + vectors)
    offset = vectors[:, None] * KP + channel[None, :]
    from_values = tl.zeros([C, BK], dtype=tl.float32)
    for start in range(0, VP, BV):
        column = start + tl.arange(0, BV)
        v, v_rest = load_pair(values, values_rest, vectors[:, None] * VP + column[None, :], TERMS)
        state_offset = index * KP * VP + channel[:, None] * VP + column[None, :]
        top, rest = load_pair(dg_high, dg_low, state_offset, 2)
        from_values = dot_pairs(v, v_rest, tl.trans(top), tl.trans(rest), from_values, TERMS, 2)
    from_values *= (to_end * unit_v * tl.load(dg_scale + index * (VP // BV)))[:, None]
    from_keys = tl.zeros([C, BK], dtype=tl.float32)
    for start in range(0, KP, BK):
        other = start + tl.arange(0, BK)
        k, k_rest = load_pair(keys, keys_rest, vectors[:, None] * KP + other[None, :], TERMS)
        top, rest = load_pair(dh_high, dh_low, index * KP * KP + other[:, None] * KP + channel[None, :], 2)
        from_keys = dot_pairs(k, k_rest, top, rest, from_keys, TERMS, 2)
        top, rest = load_pair(dh_high, dh_low, index * KP * KP + channel[:, None] * KP + other[None, :], 2)
        from_keys = dot_pairs(k, k_rest, tl.trans(top), tl.trans(rest), from_keys, TERMS, 2)
    from_keys *= (to_end * rho * tl.load(dh_scale + index * (KP // BK)))[:, None]
    k, k_rest = load_pair(keys, keys_rest, offset, TERMS, True)
    scaled = k.to(tl.float32) + tail(k_rest, TERMS)
    products = tl.sum(scaled * (from_values + 0.5 * from_keys), 1) * rho
    tl.store(carried + (index * (KP // BK) + part) * C + token, products)
    tl.store(later + offset, from_values + from_keys)


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def key_gradients_kernel(
    x,
    x_rest,
    x_unit,
    y,
    y_rest,
    y_unit,
    beta,
    keys,
    keys_rest,
    values,
    values_rest,
    decay_whole,
    decay_fraction,
    key_unit,
    key_factor,
    value_unit,
    numbers,
    grad_rows,
    grad_rows_rest,
    grad_unit,
    later,
    carried,
    crossing,
    from_earlier,
    grad_k,
    grad_log_gamma,
    grad_beta,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    SOLVED: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    CROSSINGS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    r"""Gradients of k, beta and log gamma, with `c_ts = (e_t . v_s) - (y_t . k_s)`; program chunk * heads + head.

    `dk_s = beta_s (sum_t zeta_ts (c_ts x_t - (x_t . k_s) y_t) + later_s)`,
    `dbeta_s = sum_t zeta_ts (x_t . k_s) c_ts + carried_s`, and for gamma the inner products of states and adjoints,
    split by whether the state and the output lie inside the chunk.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    first, tokens = locate_chunk(tl.program_id(0) // heads, length, chunks_per_row, chunk_table, C, PACKED)
    if tokens <= 0:
        return
    token, channel = tl.arange(0, C), tl.arange(0, KP)
    inside = token < tokens
    row = (first + token) * heads + head
    vectors = index * C + token
    zeta, _ = decay_factors(decay_whole, decay_fraction, vectors, token, C)
    offset = vectors[:, None] * KP + channel[None, :]
    k, k_rest = load_pair(keys, keys_rest, offset, TERMS)
    rho, unit_v = tl.load(key_factor + vectors), tl.load(value_unit + vectors)
    strength = tl.load(beta + row, mask=inside, other=0.0)

    # Rows s and columns t. Tiles are loaded again for their second use: in registers they would displace the sums.
    tops, rests = load_pair(x, x_rest, offset, 2)
    units = tl.load(x_unit + vectors)
    from_x = tl.zeros([C, C], dtype=tl.float32)
    from_x = dot_pairs(k, k_rest, tl.trans(tops), tl.trans(rests), from_x, TERMS, 2) * units[None, :] * rho[:, None]
    coefficient = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, VP, BV):
        column = start + tl.arange(0, BV)
        v, v_rest = load_pair(values, values_rest, vectors[:, None] * VP + column[None, :], TERMS)
        e, e_rest = load_pair(grad_rows, grad_rows_rest, vectors[:, None] * VP + column[None, :], TERMS)
        coefficient = dot_pairs(v, v_rest, tl.trans(e), tl.trans(e_rest), coefficient, TERMS, TERMS)
    coefficient *= unit_v[:, None] * tl.load(grad_unit + vectors)[None, :]
    if SOLVED:
        solved, solved_rest = load_pair(y, y_rest, offset, 2)
        units_y = tl.load(y_unit + vectors)
        products = tl.zeros([C, C], dtype=tl.float32)
        products = dot_pairs(k, k_rest, tl.trans(solved), tl.trans(solved_rest), products, TERMS, 2)
        coefficient -= products * units_y[None, :] * rho[:, None]
    coefficient *= zeta
    gate = from_x * coefficient
    after = tl.zeros([C], dtype=tl.float32)
    for part in range(KP // BK):
        after += tl.load(carried + (index * (KP // BK) + part) * C + token)
    tl.store(grad_beta + row, tl.sum(gate, 1) + after, mask=inside)
    # sum_{s' < s} sum_{t >= s} of the gates: the inner sums as a product with a triangle of ones.
    ones = (token[:, None] >= token[None, :]).to(tl.float16)
    sums = tl.zeros([C, C], dtype=tl.float32)
    sums = weighted_sum(gate * strength[:, None], ones, ones, sums, 1)
    log_gamma = tl.sum(tl.where(token[:, None] < token[None, :], sums, 0.0), 0)
    after *= strength
    crossed = tl.sum(tl.load(crossing + index * CROSSINGS + tl.arange(0, CROSSINGS)), 0)
    log_gamma += crossed * tl.load(numbers + index * CHUNK_NUMBERS + DECAY) + tl.cumsum(after, 0) - after
    log_gamma += tl.cumsum(tl.load(from_earlier + vectors), 0, reverse=True)
    tl.store(grad_log_gamma + row, log_gamma, mask=inside)

    gradient = tl.load(later + offset)
    if SOLVED:
        solved, solved_rest = load_pair(y, y_rest, offset, 2, True)
        gradient = weighted_sum(from_x * zeta * -units_y[None, :], solved, solved_rest, gradient, 2)
    tops, rests = load_pair(x, x_rest, offset, 2, True)
    gradient = weighted_sum(coefficient * units[None, :], tops, rests, gradient, 2)
    k, k_rest = load_pair(keys, keys_rest, offset, TERMS, True)
    scaled = k.to(tl.float32) + tail(k_rest, TERMS)
    gradient = through_norm(gradient * strength[:, None], scaled, rho, tl.load(key_unit + vectors), NORMALIZE)
    where = inside[:, None] & (channel[None, :] < K)
    tl.store(grad_k + row[:, None] * K + channel[None, :], gradient.to(grad_k.dtype.element_ty), mask=where)


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def value_gradients_kernel(
    x,
    x_rest,
    x_unit,
    y,
    y_rest,
    y_unit,
    q,
    keys,
    keys_rest,
    values,
    values_rest,
    decay_whole,
    decay_fraction,
    key_factor,
    value_unit,
    value_weight,
    grad_rows,
    grad_rows_rest,
    grad_unit,
    dh_high,
    dh_low,
    dh_scale,
    dg_high,
    dg_low,
    dg_scale,
    later,
    carried,
    grad_q,
    grad_v,
    grad_lam,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    epsilon,
    SOLVED: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (chunk * heads + head, part): `later` `[N, H, C, KP]` and `carried` `[N, H, KP / BK, C]` for
    `key_gradients_kernel`, a block of columns each; the last part is the gradients of v, q and Lambda (`grad_lam`
    `[N, H, KP]`, a part for each chunk).
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    first, tokens = locate_chunk(tl.program_id(0) // heads, length, chunks_per_row, chunk_table, C, PACKED)
    if tokens <= 0:
        return
    token = tl.arange(0, C)
    vectors = index * C + token
    zeta, to_end = decay_factors(decay_whole, decay_fraction, vectors, token, C)
    if tl.program_id(1) < KP // BK:
        carried_gradients(
            keys, keys_rest, values, values_rest, dh_high, dh_low, dh_scale, dg_high, dg_low, dg_scale, key_factor,
            value_unit, later, carried, to_end, index, tl.program_id(1), TERMS, C, KP, VP, BK, BV,
        )  # fmt: skip
    else:
        value_gradients(
            x, x_rest, x_unit, y, y_rest, y_unit, q, keys, keys_rest, grad_rows, grad_rows_rest, grad_unit, dg_high,
            dg_low, dg_scale, value_weight, grad_q, grad_v, grad_lam, zeta, to_end, index,
            (first + token) * heads + head, token < tokens, epsilon, NORMALIZE, SOLVED, TERMS, C, K, V, KP, VP, BV,
        )  # fmt: skip
