# SPDX-License-Identifier: Apache-2.0
"""The last Triton kernel of the backward pass: from solutions and adjoint states to the gradients of a chunk's inputs.

Dimensions and formats as in `mesa_triton_helpers` and `mesa_triton_states`; s is the token that was written, t >= s one
that reads it. Everything is laid out by s, so that a gradient is a row. Importing this needs triton.
"""

from .mesa_triton_helpers import decay_between, load_rows, locate_chunk, normalizer, scale_rows, split_half
from .mesa_triton_solver import dot_pairs

try:
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit
def load_pair(top, rest, offset, TERMS: tl.constexpr):
    high = tl.load(top + offset)
    if TERMS == 2:
        low = tl.load(rest + offset)
    else:
        low = high
    return high, low


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
def value_gradients(
    x, x_rest, x_unit, y, y_rest, y_unit, q, keys, keys_rest, grad_rows, grad_rows_rest, grad_unit, dg_high, dg_low,
    dg_scale, value_weight, grad_q, grad_v, grad_lam, zeta, to_end, index, row, inside, epsilon,
    NORMALIZE: tl.constexpr, SOLVED: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of v, q and Lambda: `dv_s = beta_s (sum_t zeta_ts (x_t . k_s) e_t + zeta_end,s dG^T k_s)`, `dq_t = y_t`,
    `dLambda = -sum_t x_t * y_t`.
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
def key_gradients(
    x, x_rest, x_unit, y, y_rest, y_unit, keys, keys_rest, values, values_rest, grad_rows, grad_rows_rest, grad_unit,
    dh_high, dh_low, dh_scale, dg_high, dg_low, dg_scale, beta, key_unit, key_factor, value_unit, crossing,
    from_earlier, numbers_decay, grad_k, grad_log_gamma, grad_beta, zeta, to_end, index, row, inside,
    NORMALIZE: tl.constexpr, SOLVED: tl.constexpr, TERMS: tl.constexpr, CROSSINGS: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    r"""Gradients of k, beta and log gamma, with `c_ts = (e_t . v_s) - (y_t . k_s)` and `z_s = zeta_end,s`:

    `dk_s = beta_s (sum_t zeta_ts (c_ts x_t - (x_t . k_s) y_t) + z_s (dG v_s + (dH + dH^T) k_s))`,
    `dbeta_s = sum_t zeta_ts (x_t . k_s) c_ts + z_s k_s . (dG v_s + dH k_s)`, and for gamma the inner products of states
    and adjoints, split by whether the state and the output lie inside the chunk.
    """
    token, channel = tl.arange(0, C), tl.arange(0, KP)
    vectors = index * C + token
    offset = vectors[:, None] * KP + channel[None, :]
    k, k_rest = load_pair(keys, keys_rest, offset, TERMS)
    rho = tl.load(key_factor + vectors)

    # What the states after the chunk hold of each token: z_s (dG v_s + (dH + dH^T) k_s).
    later = tl.zeros([C, KP], dtype=tl.float32)
    inner = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, VP, BV):
        column = start + tl.arange(0, BV)
        v, v_rest = load_pair(values, values_rest, vectors[:, None] * VP + column[None, :], TERMS)
        state_offset = index * KP * VP + channel[:, None] * VP + column[None, :]
        top, rest = load_pair(dg_high, dg_low, state_offset, 2)
        later = dot_pairs(v, v_rest, tl.trans(top), tl.trans(rest), later, TERMS, 2)
        top, rest = load_pair(grad_rows, grad_rows_rest, vectors[:, None] * VP + column[None, :], TERMS)
        inner = dot_pairs(v, v_rest, tl.trans(top), tl.trans(rest), inner, TERMS, TERMS)
    unit_v = tl.load(value_unit + vectors)
    later *= (to_end * unit_v * tl.load(dg_scale + index * (VP // BV)))[:, None]
    from_values = tl.sum(later * (k.to(tl.float32) + tail(k_rest, TERMS)), 1) * rho
    both = tl.zeros([C, KP], dtype=tl.float32)
    for start in range(0, KP, BK):
        part = start + tl.arange(0, BK)
        left, left_rest = load_pair(keys, keys_rest, vectors[:, None] * KP + part[None, :], TERMS)
        # Rows of dH, then columns.
        state_offset = index * KP * KP + part[:, None] * KP + channel[None, :]
        top, rest = load_pair(dh_high, dh_low, state_offset, 2)
        both = dot_pairs(left, left_rest, top, rest, both, TERMS, 2)
        transposed_offset = index * KP * KP + channel[:, None] * KP + part[None, :]
        top, rest = load_pair(dh_high, dh_low, transposed_offset, 2)
        both = dot_pairs(left, left_rest, tl.trans(top), tl.trans(rest), both, TERMS, 2)
    both *= (to_end * rho * tl.load(dh_scale + index * (KP // BK)))[:, None]
    from_keys = 0.5 * rho * tl.sum(both * (k.to(tl.float32) + tail(k_rest, TERMS)), 1)
    gradient = later + both

    # Inside the chunk: rows s, columns t.
    tops, rests = load_pair(x, x_rest, offset, 2)
    units = tl.load(x_unit + vectors)
    zeros = tl.zeros([C, C], dtype=tl.float32)
    from_x = dot_pairs(k, k_rest, tl.trans(tops), tl.trans(rests), zeros, TERMS, 2) * units[None, :] * rho[:, None]
    coefficient = inner * (unit_v[:, None] * tl.load(grad_unit + vectors)[None, :])
    if SOLVED:
        solved, solved_rest = load_pair(y, y_rest, offset, 2)
        units_y = tl.load(y_unit + vectors)
        products = dot_pairs(k, k_rest, tl.trans(solved), tl.trans(solved_rest), zeros, TERMS, 2)
        coefficient -= products * units_y[None, :] * rho[:, None]
        gradient = weighted_sum(from_x * zeta * -units_y[None, :], solved, solved_rest, gradient, 2)
    gradient = weighted_sum(coefficient * zeta * units[None, :], tops, rests, gradient, 2)

    strength = tl.load(beta + row, mask=inside, other=0.0)
    gate = from_x * coefficient * zeta
    carried = from_values + from_keys
    tl.store(grad_beta + row, tl.sum(gate, 1) + carried, mask=inside)
    gate *= strength[:, None]
    carried *= strength
    earlier = tl.cumsum(gate, 0) - gate
    earlier = tl.where(token[None, :] >= token[:, None], earlier, 0.0)
    crossed = tl.sum(tl.load(crossing + index * CROSSINGS + tl.arange(0, CROSSINGS)), 0)
    log_gamma = crossed * tl.load(numbers_decay) + tl.cumsum(carried, 0) - carried + tl.sum(earlier, 1)
    log_gamma += tl.cumsum(tl.load(from_earlier + vectors), 0, reverse=True)
    tl.store(grad_log_gamma + row, log_gamma, mask=inside)

    scaled = k.to(tl.float32) + tail(k_rest, TERMS)
    gradient = through_norm(gradient * strength[:, None], scaled, rho, tl.load(key_unit + vectors), NORMALIZE)
    where = inside[:, None] & (channel[None, :] < K)
    tl.store(grad_k + row[:, None] * K + channel[None, :], gradient.to(grad_k.dtype.element_ty), mask=where)


@triton.jit
def tail(rest, TERMS: tl.constexpr):
    if TERMS == 2:
        return rest.to(tl.float32)
    else:
        return 0.0


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def chunk_gradients_kernel(
    x,
    x_rest,
    x_unit,
    y,
    y_rest,
    y_unit,
    q,
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
    value_weight,
    numbers,
    grad_rows,
    grad_rows_rest,
    grad_unit,
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
    SOLVED: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    CROSSINGS: tl.constexpr,
    CHUNK_NUMBERS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (chunk * heads + head, part): part 0 the gradients of k and the gates, part 1 those of v, q and Lambda.

    `grad_lam` `[N, H, KP]` takes a part for each chunk.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    first, tokens = locate_chunk(tl.program_id(0) // heads, length, chunks_per_row, chunk_table, C, PACKED)
    if tokens <= 0:
        return
    token = tl.arange(0, C)
    inside = token < tokens
    row = (first + token) * heads + head
    vectors = index * C + token
    whole, fraction = tl.load(decay_whole + vectors), tl.load(decay_fraction + vectors)
    # zeta_ts by rows s and columns t
    zeta = tl.trans(decay_between(whole, fraction, C))
    last = token == C - 1
    whole_end, fraction_end = tl.sum(tl.where(last, whole, 0.0), 0), tl.sum(tl.where(last, fraction, 0.0), 0)
    to_end = tl.exp2((whole_end - whole) + (fraction_end - fraction))
    if tl.program_id(1) == 0:
        key_gradients(
            x, x_rest, x_unit, y, y_rest, y_unit, keys, keys_rest, values, values_rest, grad_rows, grad_rows_rest,
            grad_unit, dh_high, dh_low, dh_scale, dg_high, dg_low, dg_scale, beta, key_unit, key_factor, value_unit,
            crossing, from_earlier, numbers + index * CHUNK_NUMBERS, grad_k, grad_log_gamma, grad_beta, zeta, to_end,
            index, row, inside, NORMALIZE, SOLVED, TERMS, CROSSINGS, C, K, V, KP, VP, BK, BV,
        )  # fmt: skip
    else:
        value_gradients(
            x, x_rest, x_unit, y, y_rest, y_unit, q, keys, keys_rest, grad_rows, grad_rows_rest, grad_unit, dg_high,
            dg_low, dg_scale, value_weight, grad_q, grad_v, grad_lam, zeta, to_end, index, row, inside, epsilon,
            NORMALIZE, SOLVED, TERMS, C, K, V, KP, VP, BV,
        )  # fmt: skip
