# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for what a prompt needs between the projections of a layer and the states, without gradients.

The short convolutions of q, k and v, the gates, and what `prepare_chunks_kernel` makes of k, v and the gates: keys and
values go from their projections straight to what the tensor cores read, and their convolutions are never written to
memory. Importing this needs triton; dimensions as in `mesa_triton_helpers`, W convolution width.
"""

from .mesa_triton_helpers import normalizer
from .mesa_triton_layers import load_taps, open_gates, silu, store_last_inputs
from .mesa_triton_states import store_scaled, store_weights

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise

# A program is one warp: nothing waits at a barrier, and what precedes the first token is done once. It walks through
# its chunk in tiles of TILE entries, 16 bytes of 16-bit inputs a thread, and has loaded UNROLL of them before it
# computes.
TILE = tl.constexpr(256)
UNROLL = tl.constexpr(4)


@triton.jit
def load_input_rows(x, state, token, start, length, exists, W: tl.constexpr):
    """Inputs number `token` `[G, 1]` of a row of a batch, to which `x` `[G, DP]` points; zeros where there are none.

    Args:
        state: points to the channels `[1, DP]` of the W - 1 inputs before the first; None reads no tokens before it.
        start: number of the chunk's first token.
        exists: which channels there are, `[1, DP]`.
    """
    value = tl.load(x, mask=exists & (token >= 0) & (token < length), other=0.0)
    if state is not None:
        before = exists & (token < 0)
        if start == 0:
            value = tl.where(before, tl.load(state + (token + W - 1), mask=before, other=0.0), value)
    return value.to(tl.float32)


@triton.jit
def convolve_head(
    x, state, weight, new_state, y, high, low, units, factors, row, head, heads, start, length, block, batch_stride,
    time_stride, epsilon, TERMS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Convolve one input of one head's chunk, and store it in `y`; or, without `y`, as `prepare_chunks_kernel` does.

    The G rows of a tile are as many stretches of the chunk, side by side: a thread keeps the last W - 1 inputs of its
    channels in registers, as in `convolve_span`, and sums in the same order, for the same numbers.

    Args:
        weight: None takes the input as it is.
        factors: for what normalises the vectors, or None.
        row, start: the chunk's row (int64), and the number of its first token there.
        block: number of the chunk and head (int64).
    """
    G: tl.constexpr = TILE // DP
    STRETCH: tl.constexpr = C // G
    channel, place = tl.arange(0, DP), tl.arange(0, G) * STRETCH
    exists, token = (channel < D)[None, :], (start + place)[:, None]
    x += row * batch_stride + head * D
    here = x + start.to(tl.int64) * time_stride + place[:, None] * time_stride + channel[None, :]
    window = ()
    if weight is not None:
        memory = ((row * heads + head) * D + channel)[None, :] * (W - 1)
        if state is not None:
            state += memory
        taps = load_taps(weight, (head * D + channel)[None, :], exists, W)
        for j in tl.static_range(1 - W, 0):
            window += (load_input_rows(here + j * time_stride, state, token + j, start, length, exists, W),)
    for first in range(0, STRETCH, UNROLL):
        inputs = ()
        for j in tl.static_range(UNROLL):
            step = first + j
            inputs += (load_input_rows(here + step * time_stride, None, token + step, start, length, exists, W),)
        for j in tl.static_range(UNROLL):
            step, rows = first + j, inputs[j]
            if weight is not None:
                total = taps[W - 1] * rows
                for back in tl.static_range(1, W):
                    total += taps[W - 1 - back] * window[W - 1 - back]
                window = window[1:]
                window += (rows,)
                rows = silu(total).to(x.dtype.element_ty).to(tl.float32)
            if y is not None:
                inside = exists & (token + step < length)
                there = y + ((row * length + start + step) * heads + head) * D
                there += place[:, None] * heads * D + channel[None, :]
                tl.store(there, rows.to(y.dtype.element_ty), mask=inside)
            else:
                vectors = block * C + step + place
                # Past the end of a row, the convolution still sees the tokens before it.
                rows = tl.where(token + step < length, rows, 0.0)
                scaled, unit = store_scaled(rows, high, low, units, vectors, channel, DP, TERMS)
                if factors is not None:
                    tl.store(factors + vectors, normalizer(scaled, unit, epsilon, True))
    if weight is not None:
        columns = x + channel[None, :]
        if start + C >= length:
            store_last_inputs(columns, state, new_state + memory, length, time_stride, exists, W, state is not None)


# Strides are multiples of 16 or not, which decides how wide loads are; the sizes of a prompt must not recompile.
@triton.jit(do_not_specialize=["heads", "length", "chunks_per_row"])
def convolve_chunks_kernel(
    xs,
    weights,
    states,
    new_states,
    batch_strides,
    time_strides,
    beta_logit,
    gamma_logit,
    beta_bias,
    gamma_bias,
    q,
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
    heads,
    length,
    chunks_per_row,
    bound_less_one,
    epsilon,
    HAS_BOUND: tl.constexpr,
    TERMS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
):
    """Program (chunk * heads + head, 0) convolves keys and values, program (chunk * heads + head, 1) the queries.

    `xs` to `time_strides` are those of q, k and v; all of `weights`, `states` and `new_states` but the weights of q
    and k may be None. Keys, values and numbers are those of `prepare_chunks_kernel`, with zeros for tokens that do not
    exist.
    """
    program, head = tl.program_id(0), tl.program_id(0) % heads
    chunk, block = program // heads, program.to(tl.int64)
    row = chunk // chunks_per_row
    start = (chunk - row * chunks_per_row) * C
    row = row.to(tl.int64)
    if tl.program_id(1) == 1:
        convolve_head(
            xs[0], states[0], weights[0], new_states[0], q, None, None, None, None, row, head, heads, start, length,
            block, batch_strides[0], time_strides[0], epsilon, TERMS, W, C, K, KP,
        )  # fmt: skip
    else:
        # Loaded first, to have arrived when they are needed.
        token = start + tl.arange(0, C)
        inside = token < length
        gate = (row * length + token) * heads + head
        beta_in = tl.load(beta_logit + gate, mask=inside, other=0.0)
        gamma_in = tl.load(gamma_logit + gate, mask=inside, other=0.0)
        convolve_head(
            xs[1], states[1], weights[1], new_states[1], None, keys, keys_rest, key_unit, key_factor, row, head, heads,
            start, length, block, batch_strides[1], time_strides[1], epsilon, TERMS, W, C, K, KP,
        )  # fmt: skip
        convolve_head(
            xs[2], states[2], weights[2], new_states[2], None, values, values_rest, value_unit, None, row, head, heads,
            start, length, block, batch_strides[2], time_strides[2], epsilon, TERMS, W, C, V, VP,
        )  # fmt: skip
        beta_in += tl.load(beta_bias + head).to(tl.float32)
        gamma_in += tl.load(gamma_bias + head).to(tl.float32)
        strength, log_forget = open_gates(beta_in, gamma_in, bound_less_one, HAS_BOUND)
        strength, log_forget = tl.where(inside, strength, 0.0), tl.where(inside, log_forget, 0.0)
        # What the tiles have left, token by token, is read again for the chunk as a whole.
        tl.debug_barrier()
        vectors = block * C + tl.arange(0, C)
        rho, unit = tl.load(key_factor + vectors), tl.load(value_unit + vectors)
        store_weights(
            strength, log_forget, rho, unit, decay_whole, decay_fraction, key_weight, value_weight, key_update,
            value_update, numbers, block, C,
        )  # fmt: skip
