# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that carry the states, and backwards their adjoints, from chunk to chunk.

    H <- zeta H + sum_s w_s k_s k_s^T,   G <- zeta G + sum_s w_s k_s v_s^T            (forward)
    dH <- zeta dH - sum_t f_t y_t x_t^T,   dG <- zeta dG + sum_t f_t x_t e_t^T         (backward, from the last chunk)

A first kernel prepares every chunk by itself: keys and values in float16, scaled by powers of two a row, and what the
gates come to. Then a program carries one block of columns of one head's H or G through a segment of consecutive
chunks in float32, and stores it at every chunk boundary as float16 pairs with a power-of-two scale: 22 significant
bits in the bytes of one float32, ready for the tensor cores. Importing this needs triton; dimensions as in
`mesa_triton_helpers`.
"""

from .mesa_triton_helpers import (
    decay_exponents,
    decay_to_end,
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

# States are stored in units in which no entry can exceed this. The bound is a running sum of the largest that every
# update could add; entries are usually some hundred times smaller, and the pairs' 22 bits reach 2^-38 of it.
STATE_PEAK = tl.constexpr(2.0**14)

# Numbers that `prepare_chunks_kernel` writes for a chunk and head: the decay across the chunk; the units of the
# updates of H and G; and the largest that they can add to an entry of H and G.
DECAY, UNIT_H, UNIT_G, GROWTH_H, GROWTH_G, CHUNK_NUMBERS = (tl.constexpr(i) for i in range(6))

# What a launch does with a segment: all there is to do where it is a whole sequence; or, where sequences are cut,
# first sum it up from zero, and then, going on from the sums of those before it, store its states.
SINGLE_PASS, FIRST_PASS, SECOND_PASS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Numbers that the first pass writes for a segment and head: the decay across it, and what bounds the entries of its
# sums of H and G.
ACROSS, BOUND_H, BOUND_G, SEGMENT_NUMBERS = (tl.constexpr(i) for i in range(4))

# Columns of a table of segments: first chunk and number of chunks, the sequence, and how many of its segments come
# before and after. A segment that does not exist has no chunks, at least one segment before it, and fewer than none
# after it.
FIRST_CHUNK, CHUNKS, SEQUENCE, BEFORE, AFTER, SEGMENT_COLUMNS = (tl.constexpr(i) for i in range(6))


@triton.jit
def locate_segment(segment, chunks_per_row, chunks_per_segment, table, PACKED: tl.constexpr):
    """First chunk, number of chunks, sequence, segments before and after; packed sequences have a table of them."""
    if PACKED:
        table += SEGMENT_COLUMNS * segment
        first = tl.load(table + FIRST_CHUNK).to(tl.int32)
        count = tl.load(table + CHUNKS).to(tl.int32)
        sequence = tl.load(table + SEQUENCE).to(tl.int32)
        before = tl.load(table + BEFORE).to(tl.int32)
        after = tl.load(table + AFTER).to(tl.int32)
    else:
        per_row = tl.cdiv(chunks_per_row, chunks_per_segment)
        sequence = segment // per_row
        before = segment - sequence * per_row
        after = per_row - 1 - before
        first = sequence * chunks_per_row + before * chunks_per_segment
        count = tl.minimum(chunks_per_segment, chunks_per_row - before * chunks_per_segment)
    return first, count, sequence, before, after


@triton.jit
def load_state(pointer, index, block, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr):
    """Columns `block` of state number `index` from float32 `[.., K, D]`, padded with zeros to `[KP, BN]`."""
    row, column = tl.arange(0, KP), block * BN + tl.arange(0, BN)
    inside = (row[:, None] < K) & (column[None, :] < D)
    return tl.load(pointer + index * K * D + row[:, None] * D + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_state(pointer, state, index, block, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr):
    row, column = tl.arange(0, KP), block * BN + tl.arange(0, BN)
    inside = (row[:, None] < K) & (column[None, :] < D)
    tl.store(pointer + index * K * D + row[:, None] * D + column[None, :], state, mask=inside)


@triton.jit
def store_halves(high, low, scale, state, bound, index, block, DP: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr):
    """Store `state` `[KP, BN]`, no entry above `bound`, as columns `block` of float16 pairs `[.., KP, DP]`."""
    row, column = tl.arange(0, KP), block * BN + tl.arange(0, BN)
    offset = index * KP * DP + row[:, None] * DP + column[None, :]
    unit = power_of_two(bound) / STATE_PEAK * 2.0
    top, rest = split_half(state * (1.0 / unit))
    tl.store(high + offset, top)
    tl.store(low + offset, rest)
    tl.store(scale + index, unit)  # of all blocks the same


@triton.jit
def largest(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def chunk_unit(x):
    """A power of two for `x` `[C]` to be divided by."""
    return power_of_two(tl.max(tl.abs(x), 0))


@triton.jit
def store_scaled(rows, high, low, units, vectors, column, DP: tl.constexpr, TERMS: tl.constexpr):
    """Store float32 `rows` `[R, DP]` as vectors number `vectors` `[R]`: one or two float16 terms, and their `units`.

    Returns:
        What was stored, in float32, and the units `[R]`, the powers of two that the rows were divided by.
    """
    scaled, unit = scale_rows(rows)
    top, rest = split_half(scaled)
    offset = vectors[:, None] * DP + column[None, :]
    tl.store(high + offset, top)
    if TERMS == 2:
        tl.store(low + offset, rest)
    tl.store(units + vectors, unit)
    return scaled, unit


@triton.jit
def store_weights(
    strength, log_forget, rho, value_unit, decay_whole, decay_fraction, key_weight, value_weight, key_update,
    value_update, numbers, block, C: tl.constexpr,
):  # fmt: skip
    """Store what the gates of a chunk come to, from beta and the log of gamma, 0 for tokens that do not exist.

    Args:
        strength, log_forget, rho, value_unit: `[C]`; the gates, what normalises the stored keys, the values' unit.
        block: number of the chunk and head, chunk * heads + head (int64).
    """
    vectors = block * C + tl.arange(0, C)
    whole, fraction = decay_exponents(log_forget)
    tl.store(decay_whole + vectors, whole)
    tl.store(decay_fraction + vectors, fraction)
    tl.store(key_weight + vectors, strength * rho * rho)
    tl.store(value_weight + vectors, strength * rho)
    to_end, across = decay_to_end(whole, fraction, C)
    to_end *= strength * rho
    numbers += block * CHUNK_NUMBERS
    tl.store(numbers + DECAY, tl.exp2(across))
    # Rows of keys and values have entries of up to 2.
    update = to_end * rho
    unit_h = chunk_unit(update)
    tl.store(key_update + vectors, update * (1.0 / unit_h))
    tl.store(numbers + UNIT_H, unit_h)
    tl.store(numbers + GROWTH_H, 4.0 * tl.sum(tl.abs(update), 0))
    update = to_end * value_unit
    unit_g = chunk_unit(update)
    tl.store(value_update + vectors, update * (1.0 / unit_g))
    tl.store(numbers + UNIT_G, unit_g)
    tl.store(numbers + GROWTH_G, 4.0 * tl.sum(tl.abs(update), 0))


@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def prepare_chunks_kernel(
    k,
    v,
    log_gamma,
    beta,
    keys,
    keys_rest,
    values,
    values_rest,
    decay_whole,
    decay_fraction,
    key_unit,
    key_factor,
    key_weight,
    value_unit,
    value_weight,
    key_update,
    value_update,
    numbers,
    chunk_table,
    heads,
    length,
    chunks_per_row,
    epsilon,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
):
    """Program chunk * heads + head. Writes zero keys, values and weights for tokens that do not exist."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(0) % heads
    first, tokens = locate_chunk(tl.program_id(0) // heads, length, chunks_per_row, chunk_table, C, PACKED)
    token, channel, column = tl.arange(0, C), tl.arange(0, KP), tl.arange(0, VP)
    inside = token < tokens
    row = (first + token) * heads + head
    vectors = block * C + token
    rows = load_rows(k, row, inside, channel, K)
    scaled, unit = store_scaled(rows, keys, keys_rest, key_unit, vectors, channel, KP, TERMS)
    rho = normalizer(scaled, unit, epsilon, NORMALIZE)
    tl.store(key_factor + vectors, rho)
    rows = load_rows(v, row, inside, column, V)
    _, unit = store_scaled(rows, values, values_rest, value_unit, vectors, column, VP, TERMS)
    strength = tl.load(beta + row, mask=inside, other=0.0)
    log_forget = tl.load(log_gamma + row, mask=inside, other=0.0)
    store_weights(
        strength, log_forget, rho, unit, decay_whole, decay_fraction, key_weight, value_weight, key_update,
        value_update, numbers, block, C,
    )  # fmt: skip


@triton.jit
def load_right(right, right_rest, update, index, offset, token, C: tl.constexpr, TERMS: tl.constexpr):
    """The weighted rows `[C, BN]` of an update in float32, and their weights `[C]`."""
    rows = tl.load(right + offset).to(tl.float32)
    if TERMS == 2:
        rows += tl.load(right_rest + offset).to(tl.float32)
    return rows, tl.load(update + index * C + token)


@triton.jit
def outer_products(left, left_rest, offset, right, TERMS: tl.constexpr):
    """`left^T right` with rows `[C, KP]` in one or two float16 terms and float32 `right` `[C, BN]`, at most 4."""
    top, rest = split_half(right)
    rows = tl.trans(tl.load(left + offset))
    product = tl.dot(rows, top)
    product = tl.dot(rows, rest, product)
    if TERMS == 2:
        product = tl.dot(tl.trans(tl.load(left_rest + offset)), top, product)
    return product


@triton.jit
def start_state(
    initial, parts, segment_numbers, segment, head, heads, sequence, before, block, IS_KEY: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, PASS: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns `block` of the state that a segment starts from, and a bound of all entries of the whole of it.

    In REVERSE, `before` segments of its sequence come after it.
    """
    state = tl.zeros([KP, BN], dtype=tl.float32)
    bound = 0.0
    if HAS_INITIAL:
        # All blocks of a state have one bound, and so one scale.
        whole = sequence.to(tl.int64) * heads + head
        for other in range(DP // BN):
            bound = tl.maximum(bound, largest(load_state(initial, whole, other, K, D, KP, BN)))
        state = load_state(initial, whole, block, K, D, KP, BN)
    if PASS == SECOND_PASS:
        i = 0
        while i < before:  # Triton 3.6 cannot interpret a range of a number that it has loaded
            if REVERSE:
                earlier = segment + before - i
            else:
                earlier = segment - before + i
            index = earlier.to(tl.int64) * heads + head
            across = tl.load(segment_numbers + index * SEGMENT_NUMBERS + ACROSS)
            if IS_KEY:
                largest_part = tl.load(segment_numbers + index * SEGMENT_NUMBERS + BOUND_H)
            else:
                largest_part = tl.load(segment_numbers + index * SEGMENT_NUMBERS + BOUND_G)
            state = state * across + load_state(parts, index, block, K, D, KP, BN)
            bound = bound * across + largest_part
            i += 1
    return state, bound


@triton.jit
def end_segment(
    state, bound, total, final, parts, segment_numbers, segment, head, heads, sequence, after, block,
    IS_KEY: tl.constexpr, PASS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store what a segment leaves: its own sum, for the second pass, or the sequence's state after the last one."""
    if PASS == FIRST_PASS:
        index = segment.to(tl.int64) * heads + head
        store_state(parts, state, index, block, K, D, KP, BN)
        if block == 0:
            numbers = segment_numbers + index * SEGMENT_NUMBERS
            if IS_KEY:
                tl.store(numbers + ACROSS, total)
                tl.store(numbers + BOUND_H, bound)
            else:
                tl.store(numbers + BOUND_G, bound)
    else:
        if after == 0:
            store_state(final, state, sequence.to(tl.int64) * heads + head, block, K, D, KP, BN)


@triton.jit
def carry_chunk(
    state, bound, total, index, block, keys, keys_rest, others, others_rest, update, numbers, high, low, scale,
    IS_KEY: tl.constexpr, PASS: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store columns `block` of a state before chunk and head `index`, and carry it over; its bound and decay, too."""
    token, channel, column = tl.arange(0, C), tl.arange(0, KP), block * BN + tl.arange(0, BN)
    row = index * C + token[:, None]
    right, weight = load_right(others, others_rest, update, index, row * DP + column[None, :], token, C, TERMS)
    decay = tl.load(numbers + index * CHUNK_NUMBERS + DECAY)
    if IS_KEY:
        unit = tl.load(numbers + index * CHUNK_NUMBERS + UNIT_H)
        growth = tl.load(numbers + index * CHUNK_NUMBERS + GROWTH_H)
    else:
        unit = tl.load(numbers + index * CHUNK_NUMBERS + UNIT_G)
        growth = tl.load(numbers + index * CHUNK_NUMBERS + GROWTH_G)
    if (PASS != FIRST_PASS) & (high is not None):
        store_halves(high, low, scale, state, bound, index, block, DP, KP, BN)
    product = outer_products(keys, keys_rest, row * KP + channel[None, :], right * weight[:, None], TERMS)
    # Not by the tensor cores' own accumulation, which rounds towards zero: over many chunks that adds up.
    return state * decay + product * unit, bound * decay + growth, total * decay


@triton.jit
def carry_columns(
    block,
    keys,
    keys_rest,
    others,
    others_rest,
    update,
    numbers,
    initial,
    final,
    parts,
    high,
    low,
    scale,
    segment_numbers,
    segment,
    head,
    heads,
    first_chunk,
    count,
    sequence,
    before,
    after,
    IS_KEY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PASS: tl.constexpr,
    TERMS: tl.constexpr,
    STAGES: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    KP: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
):
    """Carry columns `block` of H (IS_KEY, `others` = keys) or G (`others` = values) through one segment.

    With STAGES above 1, so many chunks less one are loaded ahead.
    """
    state, bound = start_state(
        initial, parts, segment_numbers, segment, head, heads, sequence, before, block,
        IS_KEY, False, HAS_INITIAL, PASS, K, D, KP, DP, BN,
    )  # fmt: skip
    total = 1.0
    if STAGES > 1:
        for i in tl.range(0, count, num_stages=STAGES):
            index = (first_chunk + i).to(tl.int64) * heads + head
            state, bound, total = carry_chunk(
                state, bound, total, index, block, keys, keys_rest, others, others_rest, update, numbers,
                high, low, scale, IS_KEY, PASS, TERMS, C, D, KP, DP, BN,
            )  # fmt: skip
    else:  # what Triton 3.6 can interpret
        i = 0
        while i < count:
            index = (first_chunk + i).to(tl.int64) * heads + head
            state, bound, total = carry_chunk(
                state, bound, total, index, block, keys, keys_rest, others, others_rest, update, numbers,
                high, low, scale, IS_KEY, PASS, TERMS, C, D, KP, DP, BN,
            )  # fmt: skip
            i += 1
    end_segment(
        state, bound, total, final, parts, segment_numbers, segment, head, heads, sequence, after, block,
        IS_KEY, PASS, K, D, KP, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "chunks_per_row", "chunks_per_segment"])
def carry_states_kernel(
    keys,
    keys_rest,
    values,
    values_rest,
    key_update,
    value_update,
    numbers,
    initial_h,
    initial_g,
    final_h,
    final_g,
    parts_h,
    parts_g,
    h_high,
    h_low,
    h_scale,
    g_high,
    g_low,
    g_scale,
    segment_numbers,
    segment_table,
    heads,
    chunks_per_row,
    chunks_per_segment,
    HAS_INITIAL: tl.constexpr,
    PASS: tl.constexpr,
    PACKED: tl.constexpr,
    TERMS: tl.constexpr,
    STAGES: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (segment * heads + head, block): the blocks of H's columns come first, then those of G's.

    Without `h_high` to `g_scale`, all None, only the final states are stored.
    """
    segment, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = tl.program_id(1)
    first, count, sequence, before, after = locate_segment(
        segment, chunks_per_row, chunks_per_segment, segment_table, PACKED
    )
    if (PASS == SECOND_PASS) & (h_high is None):
        # The sums of all segments, the last one's too, are the final state already; `after` tells who stores it. (A
        # loop over no chunks at all, known to the compiler, is more than triton 3.6 can take.)
        segment, before, count = segment + 1, tl.where(after == 0, before + 1, 0), tl.minimum(count, 0)
    if block < KP // BK:
        carry_columns(
            block, keys, keys_rest, keys, keys_rest, key_update, numbers, initial_h, final_h, parts_h,
            h_high, h_low, h_scale, segment_numbers, segment, head, heads, first, count, sequence, before, after,
            True, HAS_INITIAL, PASS, TERMS, STAGES, C, K, K, KP, KP, BK,
        )  # fmt: skip
    else:
        carry_columns(
            block - KP // BK, keys, keys_rest, values, values_rest, value_update, numbers, initial_g, final_g, parts_g,
            g_high, g_low, g_scale, segment_numbers, segment, head, heads, first, count, sequence, before, after,
            False, HAS_INITIAL, PASS, TERMS, STAGES, C, K, V, KP, VP, BV,
        )  # fmt: skip


@triton.jit
def carry_adjoint_columns(
    block,
    left,
    left_rest,
    right,
    right_rest,
    update,
    numbers,
    initial,
    final,
    parts,
    high,
    low,
    scale,
    before_high,
    before_low,
    before_scale,
    crossing,
    segment_numbers,
    segment,
    head,
    heads,
    first_chunk,
    count,
    sequence,
    before,
    after,
    IS_KEY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PASS: tl.constexpr,
    RIGHT_TERMS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    KP: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    CROSSINGS: tl.constexpr,
):
    """Carry columns `block` of dH (IS_KEY: `left` = y, `right` = x) or dG (`left` = x, `right` = grad o) backwards."""
    token, channel, column = tl.arange(0, C), tl.arange(0, KP), block * BN + tl.arange(0, BN)
    state, bound = start_state(
        initial, parts, segment_numbers, segment, head, heads, sequence, after, block,
        IS_KEY, True, HAS_INITIAL, PASS, K, D, KP, DP, BN,
    )  # fmt: skip
    total = 1.0
    i = 0
    while i < count:
        index = (first_chunk + count - 1 - i).to(tl.int64) * heads + head
        row = index * C + token[:, None]
        rows, weight = load_right(right, right_rest, update, index, row * DP + column[None, :], token, C, RIGHT_TERMS)
        decay = tl.load(numbers + index * CHUNK_NUMBERS + DECAY)
        unit = chunk_unit(weight)
        growth = 4.0 * tl.sum(tl.abs(weight), 0)
        if PASS != FIRST_PASS:
            store_halves(high, low, scale, state, bound, index, block, DP, KP, BN)
            offset = index * KP * DP + channel[:, None] * DP + column[None, :]
            earlier = tl.load(before_high + offset).to(tl.float32) + tl.load(before_low + offset).to(tl.float32)
            products = tl.sum(earlier * state, 1) * tl.load(before_scale + index)
            tl.store(crossing + index * CROSSINGS + channel, products)
        rows = rows * (weight * (1.0 / unit))[:, None]
        product = outer_products(left, left_rest, row * KP + channel[None, :], rows, 2)
        state = state * decay + product * unit
        bound = bound * decay + growth
        total *= decay
        i += 1
    end_segment(
        state, bound, total, final, parts, segment_numbers, segment, head, heads, sequence, before, block,
        IS_KEY, PASS, K, D, KP, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "chunks_per_row", "chunks_per_segment"])
def carry_adjoints_kernel(
    x,
    x_rest,
    y,
    y_rest,
    grad_rows,
    grad_rows_rest,
    update_h,
    update_g,
    numbers,
    initial_h,
    initial_g,
    final_h,
    final_g,
    parts_h,
    parts_g,
    dh_high,
    dh_low,
    dh_scale,
    dg_high,
    dg_low,
    dg_scale,
    h_high,
    h_low,
    h_scale,
    g_high,
    g_low,
    g_scale,
    crossing,
    segment_numbers,
    segment_table,
    heads,
    chunks_per_row,
    chunks_per_segment,
    HAS_INITIAL: tl.constexpr,
    PASS: tl.constexpr,
    PACKED: tl.constexpr,
    TERMS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CROSSINGS: tl.constexpr,
):
    """As `carry_states_kernel`, from the last chunk to the first.

    `initial_h`, `initial_g` are the gradients of the final states, `final_h`, `final_g` those of the initial ones.
    `crossing` `[N, H, CROSSINGS]` takes the inner products, row by row, of the adjoints after and the states before a
    chunk.
    """
    segment, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = tl.program_id(1)
    first, count, sequence, before, after = locate_segment(
        segment, chunks_per_row, chunks_per_segment, segment_table, PACKED
    )
    if block < KP // BK:
        carry_adjoint_columns(
            block, y, y_rest, x, x_rest, update_h, numbers, initial_h, final_h, parts_h, dh_high, dh_low, dh_scale,
            h_high, h_low, h_scale, crossing + block * KP, segment_numbers,
            segment, head, heads, first, count, sequence, before, after,
            True, HAS_INITIAL, PASS, 2, C, K, K, KP, KP, BK, CROSSINGS,
        )  # fmt: skip
    else:
        carry_adjoint_columns(
            block - KP // BK, x, x_rest, grad_rows, grad_rows_rest, update_g, numbers, initial_g, final_g, parts_g,
            dg_high, dg_low, dg_scale, g_high, g_low, g_scale, crossing + block * KP, segment_numbers,
            segment, head, heads, first, count, sequence, before, after,
            False, HAS_INITIAL, PASS, TERMS, C, K, V, KP, VP, BV, CROSSINGS,
        )  # fmt: skip
