# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for what surrounds the Mesa operator: short convolutions, gates, norms of heads, with gradients.

All of them are bound by memory: each reads its inputs once, computes in float32 and writes its outputs once. The
backward passes recompute what they need from the inputs, and sum the gradients of weights in a fixed order (a partial
sum a program, then one sum over programs). Importing this needs triton; `mesa_layers` does so when a GPU asks for it.

Dimensions: B batch, T tokens a row, H heads, V value size, W convolution width, S packed sequences.
"""

import torch

from .mesa_library import NAMESPACE, OPERATORS
from .mesa_triton_helpers import ceil_div, round_to_power_of_two

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise

# Channels that one warp of a convolution takes, by the bytes of an input: forward 16 bytes a thread and access,
# backward so few that the registers (100 to 130 a thread at W = 4) let 16 warps share a multiprocessor. Half of it
# beyond W = 4.
FORWARD_CHANNELS, BACKWARD_CHANNELS = {2: 256, 4: 128}, {2: 128, 4: 128}

# Tokens that a program of the convolution walks through, at least and at most. It also reads the W - 1 tokens before
# (backward: and after) them and, backward, writes a partial sum, so that long spans cost least; but about
# ENOUGH_PROGRAMS warps should share the work.
FORWARD_SPAN, BACKWARD_SPAN = (8, 64), (16, 128)
ENOUGH_PROGRAMS = 2048

# Tokens whose loads are under way together.
UNROLL = 4

# Bounds of packed sequences that are searched at once.
SEARCH = 128

# Entries of a norm's tile; a longer row is a tile of its own. Backward, at most NORM_PROGRAMS programs share the tiles
# and write a partial sum each.
NORM_TILE = 2048
NORM_PROGRAMS = 1024

GATE_BLOCK = 512


@triton.jit
def silu(x):
    """`x * sigmoid(x)`, to rounding, in half the instructions: a convolution has about as many around it."""
    # 1 / (1 + e) as a square: a quotient of floats guards against denominators that cannot be.
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return x * root * root


@triton.jit
def silu_gradient(x):
    """The derivative of `x * sigmoid(x)`; no infinity times zero at either end."""
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def log1p(x):
    """`log(1 + x)` for float32 `x` in (-1, 1], to rounding also near 0."""
    # 2 artanh(s), s = x / (2 + x), |s| <= 1/3, as a series whose next term is below 2^-29.
    s = x / (2.0 + x)
    z = s * s
    series = 1.0 / 11 + z * (1.0 / 13 + z * (1.0 / 15))
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * series))))
    return tl.where(x < -0.5, tl.log(1.0 + x), 2.0 * s * series)


@triton.jit
def find_sequence(token, bounds, sequences, SEARCH: tl.constexpr):
    """The number and the bounds of the packed sequence that holds `token`."""
    sequence = 0  # as many as end at or before the token
    block = 0
    # Not `for`, here and below: Triton 3.6 interprets no `range` of a number it was given together with NumPy 2.4.
    while block < sequences:
        number = block + tl.arange(0, SEARCH)
        inside = number < sequences
        end = tl.load(bounds + 1 + number, mask=inside, other=0)
        sequence += tl.sum((inside & (end <= token)).to(tl.int32), 0)
        block += SEARCH
    return sequence, tl.load(bounds + sequence).to(tl.int32), tl.load(bounds + sequence + 1).to(tl.int32)


@triton.jit
def visible(previous, position, back, PACKED: tl.constexpr):
    """`previous`, or zeros where it lies before its packed sequence: `back` tokens ago, now at `position`."""
    return tl.where(position >= back, previous, 0.0) if PACKED else previous


@triton.jit
def within(inside, number, low, high):
    """The mask `inside` if `low <= number < high`, else an empty one.

    Compared as blocks, because Triton's interpreter garbles the `&` of a block and a single truth value.
    """
    block = tl.full(inside.shape, number, tl.int32)
    return inside & (block >= low) & (block < high)


@triton.jit
def load_input(x, state, token, length, time_stride, inside, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Input number `token` of a row: of `x` from 0 on, before that of the carried state; zeros outside both."""
    here = within(inside, token, 0, length)
    value = tl.load(x + tl.cast(token, tl.int64) * time_stride, mask=here, other=0.0).to(tl.float32)
    if HAS_STATE:
        before = within(inside, token, 1 - W, 0)
        value += tl.load(state + (token + W - 1), mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_taps(weight, channel, inside, W: tl.constexpr):
    """The W weights of each channel, oldest input first, as a tuple."""
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_window(x, state, first, length, time_stride, inside, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The W - 1 inputs before token `first` of a row, oldest first, as a tuple."""
    window = ()
    for j in tl.static_range(W - 1):
        window += (load_input(x, state, first - (W - 1) + j, length, time_stride, inside, W, HAS_STATE),)
    return window


@triton.jit
def store_last_inputs(x, state, new_state, length, time_stride, inside, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The state that a row of `length` tokens leaves, at the channels whose pointers are given."""
    for j in tl.static_range(W - 1):
        value = load_input(x, state, length - (W - 1) + j, length, time_stride, inside, W, HAS_STATE)
        tl.store(new_state + j, value.to(new_state.dtype.element_ty), mask=inside)


@triton.jit
def load_tokens(x, first, end, stride, inside, COUNT: tl.constexpr):
    """COUNT tokens from `first` on, zeros from `end` on, as a tuple: loaded together, none waits for another."""
    tokens = ()
    for i in tl.static_range(COUNT):
        token = first + i
        here = within(inside, token, first, end)
        tokens += (tl.load(x + tl.cast(token, tl.int64) * stride, mask=here, other=0.0),)
    return tokens


@triton.jit
def advance(token, sequence, start, stop, bounds, sequences):
    """The number and the bounds of the packed sequence that holds `token`, from those of an earlier token."""
    while (stop <= token) & (sequence + 1 < sequences):
        sequence += 1
        start = stop
        stop = tl.load(bounds + sequence + 1).to(tl.int32)
    return sequence, start, stop


# Rows are walked through in spans of `span` tokens, `spans` a row, by one warp that keeps the last W - 1 inputs of its
# channels in registers.
@triton.jit
def convolve_span(
    x,
    weight,
    state,
    bounds,
    y,
    new_state,
    length,
    sequences,
    span,
    spans,
    batch_stride,
    time_stride,
    CHANNELS: tl.constexpr,
    W: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Span `program_id(0)` of block `program_id(1)` of the channels of one input."""
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    first = (program % spans) * span
    end = tl.minimum(first + span, length)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    memory = (row * CHANNELS + channel) * (W - 1)
    x += row * batch_stride + channel
    y += row * length * CHANNELS + channel
    if HAS_STATE:
        state += memory
    taps = load_taps(weight, channel, inside, W)
    window = load_window(x, state, first, length, time_stride, inside, W, HAS_STATE)
    position, sequence, start, stop = 0, 0, 0, 0
    if PACKED:
        sequence, start, stop = find_sequence(first, bounds, sequences, SEARCH)
    block = first
    while block < end:
        inputs = load_tokens(x, block, end, time_stride, inside, UNROLL)
        for i in tl.static_range(UNROLL):
            token = block + i
            if PACKED:
                sequence, start, stop = advance(token, sequence, start, stop, bounds, sequences)
                position = token - start
            current = inputs[i].to(tl.float32)
            total = taps[W - 1] * current
            for back in tl.static_range(1, W):
                total += taps[W - 1 - back] * visible(window[W - 1 - back], position, back, PACKED)
            value = silu(total).to(y.dtype.element_ty)
            tl.store(y + token.to(tl.int64) * CHANNELS, value, mask=within(inside, token, first, end))
            window = window[1:]
            window += (current,)
        block += UNROLL
    if not PACKED:
        last = within(inside, program % spans, spans - 1, spans)
        store_last_inputs(x, state, new_state + memory, length, time_stride, last, W, HAS_STATE)


# The sequence length must not enter the compile key, nor recompile where a count is 1 or even.
@triton.jit(do_not_specialize=["length", "sequences", "span", "spans"])
def short_convolution_kernel(
    xs,
    weights,
    states,
    bounds,
    ys,
    new_states,
    length,
    sequences,
    span,
    spans,
    batch_stride,
    time_stride,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    W: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """`convolve_span` of input number `program_id(2)` of COUNT."""
    chosen = tl.program_id(2)
    for i in tl.static_range(COUNT):
        if chosen == i:
            convolve_span(
                xs[i], weights[i], states[i], bounds, ys[i], new_states[i], length, sequences, span, spans,
                batch_stride, time_stride, CHANNELS, W, HAS_STATE, PACKED, BLOCK, UNROLL, SEARCH,
            )  # fmt: skip


# The gradient of an input is complete W - 1 tokens later, so a program walks that far past its span. `pending` holds
# the unfinished gradients of the last W - 1 tokens, oldest first.
@triton.jit(do_not_specialize=["length", "sequences", "span", "spans"])
def short_convolution_backward_kernel(
    grad_y,
    grad_new_state,
    x,
    weight,
    state,
    bounds,
    grad_x,
    grad_weight,
    grad_state,
    length,
    sequences,
    span,
    spans,
    batch_stride,
    time_stride,
    grad_batch_stride,
    grad_time_stride,
    CHANNELS: tl.constexpr,
    W: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_NEW_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SEARCH: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    first = (program % spans) * span
    end = tl.minimum(first + span, length)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    memory = (row * CHANNELS + channel) * (W - 1)
    x += row * batch_stride + channel
    grad_y += row * grad_batch_stride + channel
    grad_x += row * length * CHANNELS + channel
    if HAS_STATE:
        state += memory
        grad_state += memory
    if HAS_NEW_STATE:
        grad_new_state += memory
    taps = load_taps(weight, channel, inside, W)
    window = load_window(x, state, first, length, time_stride, inside, W, HAS_STATE)
    sums = ()
    for _ in tl.static_range(W):
        sums += (tl.zeros([BLOCK], dtype=tl.float32),)
    pending = sums[1:]
    position, sequence, start, stop = 0, 0, 0, 0
    if PACKED:
        sequence, start, stop = find_sequence(first, bounds, sequences, SEARCH)
    block = first
    while block < end + W - 1:
        inputs = load_tokens(x, block, length, time_stride, inside, UNROLL)
        gradients = load_tokens(grad_y, block, length, grad_time_stride, inside, UNROLL)
        for i in tl.static_range(UNROLL):
            token = block + i
            if PACKED:
                sequence, start, stop = advance(token, sequence, start, stop, bounds, sequences)
                position = token - start
            seen = window
            seen += (inputs[i].to(tl.float32),)
            total = taps[W - 1] * seen[W - 1]
            for back in tl.static_range(1, W):
                total += taps[W - 1 - back] * visible(seen[W - 1 - back], position, back, PACKED)
            # Zero from the end of the row on, like the gradient of y.
            gradient = gradients[i].to(tl.float32) * silu_gradient(total)
            own = tl.where(token < end, gradient, 0.0)
            new_sums, new_pending = (), ()
            for j in tl.static_range(W):
                new_sums += (sums[j] + own * visible(seen[j], position, W - 1 - j, PACKED),)
                contribution = taps[j] * visible(gradient, position, W - 1 - j, PACKED)
                if j < W - 1:
                    contribution += pending[j]
                new_pending += (contribution,)
            sums = new_sums
            window = seen[1:]
            pending = new_pending[1:]
            finished = new_pending[0]
            ready = token - (W - 1)
            if HAS_NEW_STATE:
                slot = ready - (length - (W - 1))
                carried = within(inside, slot, 0, W - 1)
                finished += tl.load(grad_new_state + slot, mask=carried, other=0.0).to(tl.float32)
            here = grad_x + tl.cast(ready, tl.int64) * CHANNELS
            tl.store(here, finished.to(grad_x.dtype.element_ty), mask=within(inside, ready, first, end))
            if HAS_STATE:
                # The input W - 1 tokens before belongs to the state; only a row's first program sees such tokens, as
                # spans are longer than W - 1.
                before = within(inside, token, 0, W - 1)
                tl.store(grad_state + token, finished.to(grad_state.dtype.element_ty), mask=before)
        block += UNROLL
    for j in tl.static_range(W):
        offset = (program.to(tl.int64) * W + j) * CHANNELS + channel
        tl.store(grad_weight + offset, sums[j], mask=inside)


@triton.jit(do_not_specialize=["rows"])
def head_norm_kernel(
    o, weight, gate, y, epsilon, rows, V: tl.constexpr, HAS_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < V)[None, :]
    offset = row[:, None] * V + channel[None, :]
    values = tl.load(o + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=channel < V, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, 1) / V + epsilon)
    result = values * rstd[:, None] * scale[None, :]
    if HAS_GATE:
        g = tl.load(gate + offset, mask=inside, other=0.0).to(tl.float32)
        result *= g * tl.sigmoid(g)
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


# A program takes `tiles` tiles of ROWS rows one after the other, and one partial sum of the weight's gradient.
@triton.jit(do_not_specialize=["rows", "tiles"])
def head_norm_backward_kernel(
    grad_y,
    o,
    weight,
    gate,
    grad_o,
    grad_weight,
    grad_gate,
    epsilon,
    rows,
    tiles,
    V: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    scale = tl.load(weight + channel, mask=channel < V, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    tile = 0
    while tile < tiles:
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < V)[None, :]
        offset = row[:, None] * V + channel[None, :]
        values = tl.load(o + offset, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad_y + offset, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, 1) / V + epsilon)[:, None]
        normed = values * rstd
        if HAS_GATE:
            g = tl.load(gate + offset, mask=inside, other=0.0).to(tl.float32)
            grad_g = gradient * normed * scale * silu_gradient(g)
            tl.store(grad_gate + offset, grad_g.to(grad_gate.dtype.element_ty), mask=inside)
            gradient *= g * tl.sigmoid(g)
        total += gradient * normed
        gradient *= scale
        along = tl.sum(gradient * normed, 1)[:, None] / V
        grad_values = (gradient - normed * along) * rstd
        tl.store(grad_o + offset, grad_values.to(grad_o.dtype.element_ty), mask=inside)
        tile += 1
    tl.store(grad_weight + program * V + channel, tl.sum(total, 0), mask=channel < V)


@triton.jit
def gate_logits(
    beta_logit,
    gamma_logit,
    beta_bias,
    gamma_bias,
    mask,
    count,
    H: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    head = index % H
    beta_in = tl.load(beta_logit + index, mask=inside, other=0.0) + tl.load(beta_bias + head)
    gamma_in = tl.load(gamma_logit + index, mask=inside, other=0.0) + tl.load(gamma_bias + head)
    real = inside
    if HAS_MASK:
        real = inside & (tl.load(mask + index // H, mask=inside, other=0) != 0)
    return index, inside, real, beta_in, gamma_in


@triton.jit
def open_gates(beta_in, gamma_in, bound_less_one, HAS_BOUND: tl.constexpr):
    """Input strength and log forget strength, from the logits with their biases."""
    strength = tl.sigmoid(beta_in)
    log_forget = tl.minimum(gamma_in, 0.0) - log1p(tl.exp(-tl.abs(gamma_in)))
    if HAS_BOUND:
        log_forget += log1p(bound_less_one * strength * strength)
    return strength, log_forget


@triton.jit(do_not_specialize=["count"])
def gates_kernel(
    beta_logit,
    gamma_logit,
    beta_bias,
    gamma_bias,
    mask,
    beta,
    log_gamma,
    bound_less_one,
    count,
    H: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, inside, real, beta_in, gamma_in = gate_logits(
        beta_logit, gamma_logit, beta_bias, gamma_bias, mask, count, H, HAS_MASK, BLOCK
    )
    strength, log_forget = open_gates(beta_in, gamma_in, bound_less_one, HAS_BOUND)
    tl.store(beta + index, tl.where(real, strength, 0.0), mask=inside)
    tl.store(log_gamma + index, tl.where(real, log_forget, 0.0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def gates_backward_kernel(
    grad_beta,
    grad_log_gamma,
    beta_logit,
    gamma_logit,
    beta_bias,
    gamma_bias,
    mask,
    grad_logits,
    bound_less_one,
    count,
    H: tl.constexpr,
    HAS_BOUND: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, inside, real, beta_in, gamma_in = gate_logits(
        beta_logit, gamma_logit, beta_bias, gamma_bias, mask, count, H, HAS_MASK, BLOCK
    )
    # Pads are loaded as zeros: even an infinite gradient stops there.
    to_beta = tl.load(grad_beta + index, mask=real, other=0.0)
    to_log_gamma = tl.load(grad_log_gamma + index, mask=real, other=0.0)
    strength = tl.sigmoid(beta_in)
    if HAS_BOUND:
        slope = bound_less_one * strength
        to_beta += to_log_gamma * 2.0 * slope / (1.0 + slope * strength)
    # 1 - sigmoid(x) as sigmoid(-x), which does not cancel.
    to_beta *= strength * tl.sigmoid(-beta_in)
    tl.store(grad_logits + index, to_beta, mask=inside)
    tl.store(grad_logits + count + index, to_log_gamma * tl.sigmoid(-gamma_in), mask=inside)


def convolution_blocks(x: torch.Tensor, width: int, channels: dict, spans: tuple[int, int]) -> tuple[int, int]:
    """Channels and tokens of a program that convolves `x` `[B, T, channels]`."""
    block = min(channels[x.element_size()] // (1 if width <= 4 else 2), round_to_power_of_two(x.shape[2]))
    shortest, longest = spans
    programs_of_one_token = x.shape[0] * x.shape[1] * ceil_div(x.shape[2], block)
    span = shortest
    while span < longest and programs_of_one_token >= 2 * span * ENOUGH_PROGRAMS:
        span *= 2
    return block, span


def with_dense_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_short_convolutions(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    states: list[torch.Tensor | None],
    cu_seqlens: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`launch_short_convolution` of several inputs in one launch.

    Args:
        xs: of one shape, dtype and strides.
        weights: of one shape, one for each input.
        states: one for each input, all None or none of them.
        cu_seqlens: as there.
    """
    xs, weights = [with_dense_channels(x) for x in xs], [weight.contiguous() for weight in weights]
    x, (channels, width), packed = xs[0], weights[0].shape, cu_seqlens is not None
    batch, length = x.shape[:2]
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in xs]
    new_states = [x.new_empty(batch, channels, 0 if packed else width - 1) for _ in xs]
    block, span = convolution_blocks(x, width, FORWARD_CHANNELS, FORWARD_SPAN)
    spans = ceil_div(length, span)
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(x):
        short_convolution_kernel[(batch * spans, ceil_div(channels, block), len(xs))](
            xs=tuple(xs),
            weights=tuple(weights),
            states=tuple(None if state is None else state.contiguous() for state in states),
            bounds=None if cu_seqlens is None else cu_seqlens.contiguous(),
            ys=tuple(ys),
            new_states=tuple(new_states),
            length=length,
            sequences=cu_seqlens.shape[0] - 1 if packed else 0,
            span=span,
            spans=spans,
            batch_stride=x.stride(0),
            time_stride=x.stride(1),
            COUNT=len(xs),
            CHANNELS=channels,
            W=width,
            HAS_STATE=states[0] is not None,
            PACKED=packed,
            BLOCK=block,
            UNROLL=UNROLL,
            SEARCH=SEARCH,
            num_warps=1,
        )
    return ys, new_states


def launch_short_convolution(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution and SiLU.

    Args:
        x: `[B, T, channels]` float32, bfloat16 or float16, T at least 1.
        weight: `[channels, W]`, W from 2 to 8, any of these dtypes.
        state: the W - 1 inputs before, oldest first, `[B, channels, W - 1]`, None for zeros.
        cu_seqlens: `[S + 1]` bounds of packed sequences, B = 1; excludes `state`.

    Returns:
        `y` as `x`, and the state after the last token `[B, channels, W - 1]` (packed: `[B, channels, 0]`), in the
        dtype of `x`.
    """
    (y,), (new_state,) = launch_short_convolutions([x], [weight], [state], cu_seqlens)
    return y, new_state


short_convolution_op = torch.library.custom_op(
    f"{NAMESPACE}::short_convolution", launch_short_convolution, mutates_args=()
)


@short_convolution_op.register_fake
def _(x, weight, state, cu_seqlens):
    memory = weight.shape[1] - 1 if cu_seqlens is None else 0
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], memory)


@torch.library.custom_op(f"{NAMESPACE}::short_convolution_backward", mutates_args=())
def short_convolution_backward_op(
    grad_y: torch.Tensor,
    grad_new_state: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `x`, `weight` and `state` (empty without one), in their dtypes."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    packed = cu_seqlens is not None
    x, grad_y = with_dense_channels(x), with_dense_channels(grad_y)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_state = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    has_new_state = grad_new_state is not None and not packed
    block, span = convolution_blocks(x, width, BACKWARD_CHANNELS, BACKWARD_SPAN)
    spans = ceil_div(length, span)
    partial = x.new_empty(batch * spans, width, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        short_convolution_backward_kernel[(batch * spans, ceil_div(channels, block))](
            grad_y=grad_y,
            grad_new_state=grad_new_state.contiguous() if has_new_state else None,
            x=x,
            weight=weight.contiguous(),
            state=None if state is None else state.contiguous(),
            bounds=None if cu_seqlens is None else cu_seqlens.contiguous(),
            grad_x=grad_x,
            grad_weight=partial,
            grad_state=grad_state,
            length=length,
            sequences=cu_seqlens.shape[0] - 1 if packed else 0,
            span=span,
            spans=spans,
            batch_stride=x.stride(0),
            time_stride=x.stride(1),
            grad_batch_stride=grad_y.stride(0),
            grad_time_stride=grad_y.stride(1),
            CHANNELS=channels,
            W=width,
            HAS_STATE=state is not None,
            HAS_NEW_STATE=has_new_state,
            PACKED=packed,
            BLOCK=block,
            UNROLL=UNROLL,
            SEARCH=SEARCH,
            num_warps=1,
        )
    return grad_x, partial.sum(0).t().contiguous().to(weight.dtype), grad_state


@short_convolution_backward_op.register_fake
def _(grad_y, grad_new_state, x, weight, state, cu_seqlens):
    grad_state = x.new_empty(0) if state is None else state.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_state


def _convolution_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _convolution_backward(ctx, grad_y, grad_new_state):
    x, weight, state, cu_seqlens = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    grad_x, grad_weight, grad_state = OPERATORS.short_convolution_backward(
        grad_y, grad_new_state, x, weight, state, cu_seqlens
    )
    return grad_x, grad_weight, None if state is None else grad_state, None


short_convolution_op.register_autograd(_convolution_backward, setup_context=_convolution_context)


def norm_blocks(size: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile for rows of `size`."""
    block = round_to_power_of_two(size)
    rows = max(1, NORM_TILE // block)
    return rows, block, min(32, max(4, block // 256))


def launch_head_norm(o: torch.Tensor, weight: torch.Tensor, epsilon: float, gate: torch.Tensor | None) -> torch.Tensor:
    """`o / sqrt(mean(o^2) + epsilon) * weight * silu(gate)` over the last dimension.

    Args:
        o: `[..., V]` float32, bfloat16 or float16.
        weight: `[V]`.
        gate: as `o`, in any of these dtypes; None leaves the factor out.

    Returns:
        As `o`, contiguous.
    """
    o = o.contiguous()
    y = torch.empty_like(o)
    write_head_norm(o, weight, epsilon, gate, y)
    return y


def write_head_norm(
    o: torch.Tensor, weight: torch.Tensor, epsilon: float, gate: torch.Tensor | None, y: torch.Tensor
) -> None:
    """`launch_head_norm` of a contiguous `o` into `y`, which may be `o` itself."""
    size = o.shape[-1]
    rows = o.numel() // size
    tile, block, warps = norm_blocks(size)
    with torch.cuda.device_of(o):
        head_norm_kernel[(ceil_div(rows, tile),)](
            o=o,
            weight=weight.contiguous(),
            gate=None if gate is None else gate.contiguous(),
            y=y,
            epsilon=epsilon,
            rows=rows,
            V=size,
            HAS_GATE=gate is not None,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
        )


head_norm_op = torch.library.custom_op(f"{NAMESPACE}::head_norm", launch_head_norm, mutates_args=())


@head_norm_op.register_fake
def _(o, weight, epsilon, gate):
    return o.new_empty(o.shape)


@torch.library.custom_op(f"{NAMESPACE}::head_norm_backward", mutates_args=())
def head_norm_backward_op(
    grad_y: torch.Tensor, o: torch.Tensor, weight: torch.Tensor, epsilon: float, gate: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `o`, `weight` and `gate` (empty without one), in their dtypes."""
    size = o.shape[-1]
    o, weight = o.contiguous(), weight.contiguous()
    grad_o = torch.empty_like(o)
    grad_gate = o.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows = o.numel() // size
    tile, block, warps = norm_blocks(size)
    tiles = max(1, ceil_div(rows, tile * NORM_PROGRAMS))
    programs = ceil_div(rows, tile * tiles)
    partial = o.new_empty(programs, size, dtype=torch.float32)
    with torch.cuda.device_of(o):
        head_norm_backward_kernel[(programs,)](
            grad_y=grad_y.contiguous(),
            o=o,
            weight=weight,
            gate=None if gate is None else gate.contiguous(),
            grad_o=grad_o,
            grad_weight=partial,
            grad_gate=grad_gate,
            epsilon=epsilon,
            rows=rows,
            tiles=tiles,
            V=size,
            HAS_GATE=gate is not None,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
        )
    return grad_o, partial.sum(0).to(weight.dtype), grad_gate


@head_norm_backward_op.register_fake
def _(grad_y, o, weight, epsilon, gate):
    grad_gate = o.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return o.new_empty(o.shape), weight.new_empty(weight.shape), grad_gate


def _norm_context(ctx, inputs, output):
    o, weight, ctx.epsilon, gate = inputs
    ctx.save_for_backward(o, weight, gate)


def _norm_backward(ctx, grad_y):
    o, weight, gate = ctx.saved_tensors
    grad_o, grad_weight, grad_gate = OPERATORS.head_norm_backward(grad_y, o, weight, ctx.epsilon, gate)
    return grad_o, grad_weight, None, None if gate is None else grad_gate


head_norm_op.register_autograd(_norm_backward, setup_context=_norm_context)


def launch_gates(
    beta_logit: torch.Tensor,
    gamma_logit: torch.Tensor,
    beta_bias: torch.Tensor,
    gamma_bias: torch.Tensor,
    bound: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input strength beta and log forget strength, float32 `[B, T, H]`.

    Args:
        beta_logit, gamma_logit: float32 `[B, T, H]`.
        beta_bias, gamma_bias: float32 `[H]`.
        bound: forget strengths are multiplied by `1 - (1 - bound) beta^2`; None leaves the factor out.
        mask: bool `[B, T]`, False for tokens that get 0 twice.
    """
    beta_logit, gamma_logit = beta_logit.contiguous(), gamma_logit.contiguous()
    beta, log_gamma = torch.empty_like(beta_logit), torch.empty_like(gamma_logit)
    count = beta.numel()
    with torch.cuda.device_of(beta):
        gates_kernel[(ceil_div(count, GATE_BLOCK),)](
            beta_logit=beta_logit,
            gamma_logit=gamma_logit,
            beta_bias=beta_bias.contiguous(),
            gamma_bias=gamma_bias.contiguous(),
            mask=None if mask is None else mask.contiguous(),
            beta=beta,
            log_gamma=log_gamma,
            bound_less_one=0.0 if bound is None else bound - 1,
            count=count,
            H=beta.shape[-1],
            HAS_BOUND=bound is not None,
            HAS_MASK=mask is not None,
            BLOCK=GATE_BLOCK,
            num_warps=4,
        )
    return beta, log_gamma


gates_op = torch.library.custom_op(f"{NAMESPACE}::gates", launch_gates, mutates_args=())


@gates_op.register_fake
def _(beta_logit, gamma_logit, *others):
    return beta_logit.new_empty(beta_logit.shape), gamma_logit.new_empty(gamma_logit.shape)


@torch.library.custom_op(f"{NAMESPACE}::gates_backward", mutates_args=())
def gates_backward_op(
    grad_beta: torch.Tensor,
    grad_log_gamma: torch.Tensor,
    beta_logit: torch.Tensor,
    gamma_logit: torch.Tensor,
    beta_bias: torch.Tensor,
    gamma_bias: torch.Tensor,
    bound: float | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two logits `[2, B, T, H]` and of the two biases `[2, H]`."""
    grad_logits = beta_logit.new_empty(2, *beta_logit.shape)
    count, heads = beta_logit.numel(), beta_logit.shape[-1]
    with torch.cuda.device_of(beta_logit):
        gates_backward_kernel[(ceil_div(count, GATE_BLOCK),)](
            grad_beta=grad_beta.contiguous(),
            grad_log_gamma=grad_log_gamma.contiguous(),
            beta_logit=beta_logit.contiguous(),
            gamma_logit=gamma_logit.contiguous(),
            beta_bias=beta_bias.contiguous(),
            gamma_bias=gamma_bias.contiguous(),
            mask=None if mask is None else mask.contiguous(),
            grad_logits=grad_logits,
            bound_less_one=0.0 if bound is None else bound - 1,
            count=count,
            H=heads,
            HAS_BOUND=bound is not None,
            HAS_MASK=mask is not None,
            BLOCK=GATE_BLOCK,
            num_warps=4,
        )
    return grad_logits, grad_logits.view(2, -1, heads).sum(1)


@gates_backward_op.register_fake
def _(grad_beta, grad_log_gamma, beta_logit, *others):
    return beta_logit.new_empty(2, *beta_logit.shape), beta_logit.new_empty(2, beta_logit.shape[-1])


def _gates_context(ctx, inputs, output):
    *tensors, ctx.bound, mask = inputs
    ctx.save_for_backward(*tensors, mask)


def _gates_backward(ctx, grad_beta, grad_log_gamma):
    *tensors, mask = ctx.saved_tensors
    grad_beta, grad_log_gamma = (
        torch.zeros_like(tensors[0]) if grad is None else grad for grad in (grad_beta, grad_log_gamma)
    )
    (to_beta, to_gamma), (to_beta_bias, to_gamma_bias) = OPERATORS.gates_backward(
        grad_beta, grad_log_gamma, *tensors, ctx.bound, mask
    )
    return to_beta, to_gamma, to_beta_bias, to_gamma_bias, None, None


gates_op.register_autograd(_gates_backward, setup_context=_gates_context)

# What the operators do, for callers that neither autograd nor a compiler watches.
LAUNCHES = {
    "short_convolution": launch_short_convolution,
    "short_convolutions": launch_short_convolutions,
    "head_norm": launch_head_norm,
    "gates": launch_gates,
}
