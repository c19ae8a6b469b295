# SPDX-License-Identifier: Apache-2.0
"""One token of the Mesa layer in one Triton kernel, its states updated in place. Importing this needs triton.

A program is one head of one sequence. It reads H once, updates it, writes it back and keeps it in registers for the
conjugate gradient; it reads and writes G once. That traffic, 256 kB a head at K = V = 128, bounds the time of large
batches, and the latency of the solver's steps that of small ones. Products are float32, not tensor cores: with one
right-hand side there is nothing for those to do.

Heads of 64 and 128 go to the kernel in `mesa_gluon_decode` where it runs; the one here takes all sizes and, in the
interpreter, any device.

`triton_decode_step` is `mesa_decode.decode_step` (and normalises); `triton_decode_layer` also does what lies between
the projections of q, k, v and the output projection: convolutions, gates, regulariser, head norm, output gate.

Dimensions: B batch, H heads, K key size, V value size, W width of the convolutions.
"""

import functools
import warnings

import torch

from .mesa_library import NAMESPACE
from .mesa_solver import L2_NORM_EPS, residual_bound
from .mesa_triton_helpers import round_to_power_of_two

try:  # in a try block, so that an export of the model does not list triton as required
    import triton
    import triton.language as tl
except ImportError:
    raise

# Limits of the kernel: K and V, width of the convolutions.
LARGEST_SIZE, LARGEST_WIDTH = 256, 8

# K and V that `mesa_gluon_decode` takes, and why it was given up.
GLUON_SIZES = (64, 128)
GLUON_FAULTS: list[Exception] = []

EPSILON = tl.constexpr(L2_NORM_EPS)

# Limits of the powers of two that scale a vector: both, and their inverses, are normal numbers.
SMALLEST_POWER, LARGEST_POWER = tl.constexpr(2.0**-126), tl.constexpr(2.0**126)

# From this on, softplus(x) is x in float32; torch says so too.
LINEAR_SOFTPLUS = tl.constexpr(20.0)


@triton.jit
def inner(x, y, axis: tl.constexpr = 0):
    """Inner products along an axis, the same to the last bit in every thread that gets one.

    Where a thread adds its own product to another thread's, the compiler would fuse its own multiplication into the
    addition: it would round the other's product but not its own, and so would the other. Threads that then differ on
    whether the solve has ended wait for each other forever. The result of a fused operation is not fused again.
    """
    return tl.sum(tl.fma(x, y, 0.0), axis)


@triton.jit
def scaled(x, NORMALIZE: tl.constexpr):
    """A vector `[D]` as `length * y`: returns y, which cannot overflow when squared, `||y||^2` and `length`.

    With `NORMALIZE` it is `x / sqrt(||x||^2 + eps)` that this holds for, else x itself. Huge and tiny vectors come out
    right, NaN and infinity as NaN in `||y||^2`.
    """
    exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) & 0x7F800000
    scale = tl.minimum(tl.maximum(exponent.to(tl.float32, bitcast=True), SMALLEST_POWER), LARGEST_POWER)
    y = x * (1.0 / scale)
    square = inner(y, y)
    length = scale
    if NORMALIZE:
        # Which of the two squares is in range depends on the scale.
        large = tl.rsqrt(square + EPSILON / scale / scale)
        small = scale * tl.rsqrt(square * scale * scale + EPSILON)
        length = tl.where(scale > 1.0, large, small)
    return y, square, length


@triton.jit
def softplus(x):
    exponential = tl.exp(tl.minimum(x, LINEAR_SOFTPLUS))
    u = 1.0 + exponential
    # log(1 + e) without the rounding of 1 + e, which would leave nothing of a small e.
    logarithm = tl.where(u == 1.0, exponential, tl.log(u) * (exponential / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > LINEAR_SOFTPLUS, x, logarithm)


@triton.jit
def tile(first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """Offsets `[ROWS / 8, 8, COLUMNS]` of the rows from `first` of a `[K, D]` matrix, and which of them exist.

    Rows have two dimensions so that the compiler sees constant distances between a thread's rows: with one address a
    row in registers instead, there are not enough.
    """
    row = first + tl.arange(0, ROWS // 8)[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    return row * D + column, (row < K) & (column < D)


@triton.jit
def along_rows(x, first, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The part of a vector `[SIZE]` that belongs to the rows of a tile, `[ROWS / 8, 8, 1]`."""
    if ROWS != SIZE:
        x = tl.gather(x, first + tl.arange(0, ROWS), 0)
    return tl.reshape(x, [ROWS // 8, 8, 1])


@triton.jit
def sum_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum `[COLUMNS]` of a tile over its rows."""
    return tl.sum(tl.reshape(x, [ROWS, COLUMNS]), 0)


# The next three get their indices as arguments, because `mesa_gluon_decode` uses them too, with layouts of its own.


@triton.jit
def read_window(x, state, weight, channel, pad, row, tap, D: tl.constexpr, W: tl.constexpr):
    """What `convolve` needs for one output of a head's causal convolution, as it is in memory.

    Args:
        x: pointer to the new inputs of the head.
        state: to the last W - 1 inputs of the head's channels, `[D, W - 1]`, oldest first.
        weight: to `[channels, W]`.
        channel: the head's first channel.
        pad: 1 where the input is a pad. It then counts as older than the state, which stays as it is.
        row, tap: indices `[DP, 1]` and `[1, WP]`, of at least D and W.

    Returns:
        The state as the first (of a pad: last) W - 1 columns of `[DP, WP]`, new inputs `[DP, 1]`, weights `[DP, WP]`.
    """
    remembered = tap - pad
    inside = (row < D) & (remembered >= 0) & (remembered < W - 1)
    old = tl.load(state + row * (W - 1) + remembered, mask=inside, other=0.0)
    new = tl.load(x + row, mask=row < D, other=0.0)
    return old, new, tl.load(weight + (channel + row) * W + tap, mask=(row < D) & (tap < W), other=0.0)


@triton.jit
def convolve(old, new, weights, state, pad, row, tap, D: tl.constexpr, W: tl.constexpr):
    """SiLU of the convolution `[DP]` of what `read_window` returned; the state moves on by one input."""
    # A state in another dtype is read as the inputs are.
    window = tl.where(tap == tl.where(pad == 1, 0, W - 1), new, old.to(new.dtype)).to(tl.float32)
    inside = (row < D) & (tap >= 1) & (tap < W)
    tl.store(state + row * (W - 1) + (tap - 1), window.to(state.dtype.element_ty), mask=inside)
    y = inner(window, weights.to(tl.float32), 1)
    # Rounded as in prefill, so that both compute with the same keys.
    return (y * tl.sigmoid(y)).to(new.dtype).to(tl.float32)


@triton.jit
def read_factor(norm_weight, gate, column, V: tl.constexpr):
    """What the normalised output of a head is multiplied by: the weight of the norm, and SiLU of the gate."""
    factor = tl.load(norm_weight + column, mask=column < V, other=0.0).to(tl.float32)
    if gate is not None:
        opening = tl.load(gate + column, mask=column < V, other=0.0).to(tl.float32)
        factor *= opening * tl.sigmoid(opening)
    return factor


# Strides and counts must not recompile the kernel where they happen to be 1 or even, nor must gates by where those of
# a token begin in a tensor of many.
@triton.jit(
    do_not_specialize=["q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head", "heads", "max_steps"],
    do_not_specialize_on_alignment=["decay", "beta"],
)
def decode_kernel(
    q,
    k,
    v,
    decay,
    beta,
    lam,
    h,
    g,
    o,
    steps,
    residual,
    layer,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    heads,
    max_steps,
    threshold,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    KP: tl.constexpr,
    VP: tl.constexpr,
    H_ROWS: tl.constexpr,
    G_ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LAYER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`decay`, `beta` and `lam` are log gamma, beta and Lambda, or with LAYER the logits and the parameter of these.

    `layer` holds what only a layer has; one argument, because a launch takes time for every argument. States come in
    blocks of H_ROWS and G_ROWS rows; H stays in registers if it is one block. EARLY loads G (one block) before the
    solve: that hides its latency where no other program of the multiprocessor does.
    """
    program = tl.program_id(0)
    sequence, head = (program // heads).to(tl.int64), program % heads
    program = program.to(tl.int64)
    h += program * (K * K)
    g += program * (K * V)
    q += sequence * q_batch + head.to(tl.int64) * q_head
    k += sequence * k_batch + head.to(tl.int64) * k_head
    v += sequence * v_batch + head.to(tl.int64) * v_head
    row, column = tl.arange(0, KP), tl.arange(0, VP)
    in_key, in_value = row < K, column < V

    # First of all what takes longest to arrive.
    if H_ROWS == KP:
        offset, inside = tile(0, KP, KP, K, K)
        matrix = tl.load(h + offset, mask=inside, other=0.0)
    if EARLY:
        offset, inside = tile(0, KP, VP, V, K)
        values = tl.load(g + offset, mask=inside, other=0.0)

    diagonal = tl.load(lam + head * K + row, mask=in_key, other=0.0)
    weight = tl.load(beta + program).to(tl.float32)
    gamma = tl.load(decay + program).to(tl.float32)
    if LAYER:
        (
            q_state,
            k_state,
            v_state,
            q_weight,
            k_weight,
            v_weight,
            beta_bias,
            gamma_bias,
            norm_weight,
            gate,
            gate_batch,
            real,
            bounded,
            lower_bound,
            norm_epsilon,
        ) = layer
        WP: tl.constexpr = 2 if W == 2 else (4 if W <= 4 else 8)
        if gate is not None:
            gate += sequence * gate_batch + head * V
        pad = 0
        if real is not None:
            pad = tl.where(tl.load(real + sequence), 0, 1)
        weight += tl.load(beta_bias + head).to(tl.float32)
        gamma += tl.load(gamma_bias + head).to(tl.float32)
        q_state += program * ((W - 1) * K)
        k_state += program * ((W - 1) * K)
        tap, key_row, value_row = tl.arange(0, WP)[None, :], row[:, None], column[:, None]
        q_old, q_new, q_weights = read_window(q, q_state, q_weight, head * K, pad, key_row, tap, K, W)
        k_old, k_new, k_weights = read_window(k, k_state, k_weight, head * K, pad, key_row, tap, K, W)
        if v_state is not None:
            v_state += program * ((W - 1) * V)
            v_old, v_new, v_weights = read_window(v, v_state, v_weight, head * V, pad, value_row, tap, V, W)
        else:
            value = tl.load(v + column, mask=in_value, other=0.0)
        if EARLY:
            factor = read_factor(norm_weight, gate, column, V)
    else:
        query = tl.load(q + row, mask=in_key, other=0.0)
        key = tl.load(k + row, mask=in_key, other=0.0)
        value = tl.load(v + column, mask=in_value, other=0.0)

    # Everything is on its way before anything is waited for, and a layer's convolution states have been read by all
    # threads before the first of them overwrites one.
    tl.debug_barrier()

    if LAYER:
        # Only a gather keeps the layout of the windows from spreading to the vectors of the solve, and so to H.
        query = tl.gather(convolve(q_old, q_new, q_weights, q_state, pad, key_row, tap, K, W), row, 0)
        key = tl.gather(convolve(k_old, k_new, k_weights, k_state, pad, key_row, tap, K, W), row, 0)
        if v_state is not None:
            value = tl.gather(convolve(v_old, v_new, v_weights, v_state, pad, value_row, tap, V, W), column, 0)
        else:
            value = value.to(tl.float32)
        weight = tl.sigmoid(weight)
        gamma = tl.sigmoid(gamma) * (1.0 - bounded * weight * weight)
        weight = tl.where(pad == 1, 0.0, weight)
        gamma = tl.where(pad == 1, 1.0, gamma)
        diagonal = tl.where(in_key, lower_bound + softplus(diagonal.to(tl.float32)), 0.0)
    else:
        gamma = tl.exp(gamma)
        # Without a gather, the compiler loads the key once for every layout, with sixteen loads a thread.
        key = tl.gather(key, row, 0)
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
        diagonal = diagonal.to(tl.float32)

    if NORMALIZE:
        key, _, key_length = scaled(key, NORMALIZE)
        key *= key_length
    r, square, length = scaled(query, NORMALIZE)
    norm = tl.where(square == 0.0, 1.0, tl.sqrt(square))
    r /= norm

    # The product of the keys comes first: it is symmetric to the last bit, and H remains so.
    for first in tl.static_range(0, KP, H_ROWS):
        offset, inside = tile(first, H_ROWS, KP, K, K)
        if H_ROWS != KP:
            matrix = tl.load(h + offset, mask=inside, other=0.0)
        matrix = gamma * matrix + weight * (along_rows(key, first, H_ROWS, KP) * key[None, None, :])
        tl.store(h + offset, matrix, mask=inside)
    if H_ROWS != KP:
        tl.debug_barrier()

    # Conjugate gradient as in mesa_solver. H is symmetric, and summing over its rows leaves the sum where the vectors
    # are, one copy a warp: the inner products then need no barrier.
    p = r
    solution = tl.zeros_like(r)
    rr = inner(r, r)
    active = rr > threshold
    count = 0
    while (count < max_steps) & active:
        if H_ROWS == KP:
            product = matrix * along_rows(p, 0, KP, KP)
        else:
            product = tl.zeros([H_ROWS // 8, 8, KP], dtype=tl.float32)
            for block in range(KP // H_ROWS):
                offset, inside = tile(block * H_ROWS, H_ROWS, KP, K, K)
                product += tl.load(h + offset, mask=inside, other=0.0) * along_rows(p, block * H_ROWS, H_ROWS, KP)
        a = sum_rows(product, H_ROWS, KP)
        a += diagonal * p
        curvature = inner(p, a)
        active = curvature > 0
        alpha = tl.where(active, rr / curvature, 0.0)
        solution += alpha * p
        r -= alpha * a
        rr_next = inner(r, r)
        p = r + (rr_next / rr) * p
        rr = rr_next
        count += active.to(tl.int32)
        active = active & (rr > threshold)
    # Without steps, the loop has left r as it was: q in units of its norm.
    x = tl.where(max_steps == 0, r, solution) * norm * length
    if steps is not None:
        tl.store(steps + program, count)
        tl.store(residual + program, tl.where(max_steps == 0, 0.0, tl.sqrt(rr)))

    if LAYER and not EARLY:
        factor = read_factor(norm_weight, gate, column, V)
    weighted_key = weight * key
    output = tl.zeros([VP], dtype=tl.float32)
    for first in tl.static_range(0, KP, G_ROWS):
        offset, inside = tile(first, G_ROWS, VP, V, K)
        if not EARLY:
            values = tl.load(g + offset, mask=inside, other=0.0)
        values = gamma * values + along_rows(weighted_key, first, G_ROWS, KP) * value[None, None, :]
        tl.store(g + offset, values, mask=inside)
        output += sum_rows(values * along_rows(x, first, G_ROWS, KP), G_ROWS, VP)

    if LAYER:
        output *= tl.rsqrt(inner(output, output) / V + norm_epsilon) * factor
    tl.store(o + program * V + column, output.to(o.dtype.element_ty), mask=in_value)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter's CPU counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def padded(size: int) -> int:
    """`size` rounded up to a power of two of at least 16."""
    return round_to_power_of_two(size, 16)


@functools.cache
def launch_options(key_dim: int, value_dim: int, alone: bool) -> dict:
    """Block sizes and warps for heads of these sizes; `alone`: every program has a multiprocessor of its own.

    Registers a thread as compiled for compute capability 9.0 by triton 3.6, a whole layer; nothing is spilled up to
    K = V = 128, and 24 bytes at 256:

        K = V | warps | of H and G | registers if alone | else | programs a multiprocessor then
        ------|-------|------------|--------------------|------|-------------------------------
        16    | 1     | 8 + 8      | 72                 | 96   | 21
        32    | 2     | 16 + 16    | 115                | 118  | 8
        64    | 4     | 32 + 32    | 141                | 128  | 4
        128   | 8     | 64 + 64    | 226                | 128  | 2 (G after H)
        256   | 8     | in blocks  | 171                | 128  | 2
    """
    key_padded, value_padded = padded(key_dim), padded(value_dim)
    # With a sixteenth as many warps as channels, a vector has half as many entries as there are threads. Only then
    # does the compiler load it where it is needed, a copy in each warp.
    warps = min(8, max(key_padded, value_padded) // 16)
    # At most 64 registers a thread for a block. H of 256 channels comes from memory again in every step.
    h_rows = key_padded if key_padded <= 128 else 32
    g_rows = min(key_padded, 64 * 32 * 8 // value_padded)
    held = (h_rows * key_padded + g_rows * value_padded) // (32 * warps)
    return {
        "KP": key_padded,
        "VP": value_padded,
        "H_ROWS": h_rows,
        "G_ROWS": g_rows,
        "EARLY": h_rows == g_rows == key_padded and (alone or held <= 64),
        "num_warps": warps,
        "num_stages": 1,
        # Leaves room for programs that fill each other's waits.
        "maxnreg": None if alone else 128,
        # Off by default from triton 3.10 on.
        "enable_fp_fusion": True,
    }


def check_shape(name: str, tensor: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor that has none of `shapes`: the kernel would read or write beyond it.

    Raises:
        ValueError: as above.
    """
    if tensor.shape not in shapes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {' or '.join(map(str, shapes))}.")


def check_states(h: torch.Tensor, g: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse states that are not float32 or not of B, H, K and V as in `shape`, or too large for the kernel.

    Raises:
        ValueError: as above.
    """
    batch, heads, key_dim, value_dim = shape
    if max(key_dim, value_dim) > LARGEST_SIZE:
        raise ValueError(f"K is {key_dim} and V is {value_dim}; the kernel takes heads of at most {LARGEST_SIZE}.")
    check_shape("h", h, (batch, heads, key_dim, key_dim))
    check_shape("g", g, (batch, heads, key_dim, value_dim))
    if h.dtype != torch.float32 or g.dtype != torch.float32:
        raise ValueError(f"h is {h.dtype} and g is {g.dtype}; the kernel keeps states in float32.")


def readable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if the entries of its last dimension do not follow one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Contiguous:
    """Tensors to be changed in place, as the kernel needs them: contiguous; `copies` of those that are not."""

    def __init__(self, *tensors: torch.Tensor | None):
        self.tensors = tensors
        self.copies = [None if tensor is None else tensor.contiguous() for tensor in tensors]

    def write_back(self) -> None:
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def launch(h: torch.Tensor, max_steps: int, tolerance: float | None, output_stats: bool, **arguments):
    """Run the kernel on arguments that were checked; returns steps and residual, `[B, H]`, or None for both."""
    batch, heads, key_dim, _ = h.shape
    steps = residual = None
    if output_stats:
        steps = torch.empty(batch, heads, dtype=torch.int32, device=h.device)
        residual = torch.empty(batch, heads, dtype=torch.float32, device=h.device)
    arguments |= {
        "h": h,
        "steps": steps,
        "residual": residual,
        "heads": heads,
        "max_steps": max_steps,
        "threshold": residual_bound(tolerance, torch.float32) ** 2,
        "K": key_dim,
    }
    programs, value_dim = batch * heads, arguments["V"]
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(h):
        if not launch_gluon(h.device, programs, key_dim, value_dim, arguments):
            options = launch_options(key_dim, value_dim, programs <= processors(h.device))
            decode_kernel[(programs,)](**arguments, **options)
    return steps, residual


def launch_gluon(device: torch.device, programs: int, key_dim: int, value_dim: int, arguments: dict) -> bool:
    """Launch the kernel written for such heads; False where there is none, or where it failed once."""
    kernel = gluon_kernel(device, key_dim, value_dim)
    if kernel is None or GLUON_FAULTS:
        return False
    try:
        kernel[(programs,)](**arguments, num_warps=key_dim // 32)
    # Gluon is younger than the rest of triton, and still moves; the plain kernel does the same.
    except Exception as error:
        GLUON_FAULTS.append(error)
        message = f"The Gluon kernel of a token fails ({type(error).__name__}: {error}); a slower kernel takes over."
        warnings.warn(message, stacklevel=2)
    return not GLUON_FAULTS


@functools.cache
def gluon_kernel(device: torch.device, key_dim: int, value_dim: int):
    """The kernel written for heads of such sizes, or None."""
    if device.type != "cuda" or key_dim not in GLUON_SIZES or value_dim not in GLUON_SIZES:
        return None
    # G lies in shared memory, with 1 kB for the passing of vectors.
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 4 * key_dim * value_dim + 1024:
        return None
    try:
        from .mesa_gluon_decode import decode_gluon_kernel
    except Exception as error:  # as in `launch_gluon`
        warnings.warn(f"Triton's Gluon cannot be used ({error}); a slower kernel takes over.", stacklevel=2)
        return None
    return decode_gluon_kernel


def triton_decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    max_steps: int,
    tolerance: float | None,
    normalize_qk: bool = True,
    output_stats: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Update `h`, `g` with one token and read the output from them, as `mesa_decode.decode_step` does in torch.

    Args:
        q, k: `[B, H, K]`, any floating dtypes, K at most 256. Only the last dimension needs to be contiguous.
        v: `[B, H, V]`, the same.
        log_gamma, beta: `[B, H]`.
        lam: `[H, K]`.
        h: `[B, H, K, K]` float32, symmetric, changed in place (fastest if contiguous).
        g: `[B, H, K, V]` float32, the same.
        max_steps, tolerance: as in `mesa_solver.conjugate_gradient`; 0 steps leave the solver out.
        normalize_qk: L2-normalise q and k first, as `mesa_solver.l2_normalize` does.
        output_stats: also return steps and residual.

    Returns:
        o `[B, H, V]` in the dtype of `v`; steps (int32) and relative residual (float32), `[B, H]`, or None for both.

    Raises:
        ValueError: a shape or the dtype of a state is wrong; the states are then untouched.
    """
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    check_states(h, g, (batch, heads, key_dim, value_dim))
    check_shape("k", k, q.shape)
    check_shape("v", v, (batch, heads, value_dim))
    check_shape("log_gamma", log_gamma, (batch, heads))
    check_shape("beta", beta, (batch, heads))
    check_shape("lam", lam, (heads, key_dim))
    q, k, v = readable(q), readable(k), readable(v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = Contiguous(h, g)
    (q_batch, q_head, _), (k_batch, k_head, _), (v_batch, v_head, _) = q.stride(), k.stride(), v.stride()
    steps, residual = launch(
        states.copies[0],
        max_steps,
        tolerance,
        output_stats,
        g=states.copies[1],
        q=q,
        k=k,
        v=v,
        decay=log_gamma.contiguous(),
        beta=beta.contiguous(),
        lam=lam.contiguous(),
        o=o,
        layer=None,
        q_batch=q_batch,
        q_head=q_head,
        k_batch=k_batch,
        k_head=k_head,
        v_batch=v_batch,
        v_head=v_head,
        V=value_dim,
        W=0,
        NORMALIZE=normalize_qk,
        LAYER=False,
    )
    states.write_back()
    return o, steps, residual


def triton_decode_layer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta_logit: torch.Tensor,
    gamma_logit: torch.Tensor,
    q_state: torch.Tensor,
    k_state: torch.Tensor,
    v_state: torch.Tensor | None,
    h: torch.Tensor,
    g: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor | None,
    beta_bias: torch.Tensor,
    gamma_bias: torch.Tensor,
    lambda_param: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor | None,
    real: torch.Tensor | None,
    forget_gate_bound: float | None,
    lambda_lower_bound: float,
    norm_eps: float,
    max_steps: int,
    tolerance: float | None,
    output_stats: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One token of a whole Mesa layer, from the projections of q, k, v up to the output projection.

    Convolutions with SiLU, L2 norms, gates, regulariser, state update, solve, read-out, head norm, output gate. What
    the convolutions give is rounded to the dtype of the projections, as in prefill; all else is float32, rounded once
    at the end.

    Args:
        q, k: projections `[B, H*K]` or `[B, 1, H*K]`, any floating dtype, K at most 256.
        v: `[B, H*V]` or `[B, 1, H*V]`, the same.
        beta_logit, gamma_logit: `[B, H]` or `[B, 1, H]`, the gates' projections without bias.
        q_state, k_state: the convolutions' last W - 1 inputs `[B, H*K, W - 1]`, oldest first, W from 2 to 8; changed
            in place (fastest if contiguous).
        v_state: `[B, H*V, W - 1]`, the same; None if v is not convolved.
        h: `[B, H, K, K]` float32, symmetric, changed in place (fastest if contiguous).
        g: `[B, H, K, V]` float32, the same.
        q_weight, k_weight: `[H*K, W]` or `[H*K, 1, W]`.
        v_weight: `[H*V, W]` or `[H*V, 1, W]`; None if v is not convolved.
        beta_bias, gamma_bias: `[H]`.
        lambda_param: `[H, K]`; Lambda is `lambda_lower_bound + softplus(lambda_param)`.
        norm_weight: `[V]`, of the head norm, whose epsilon is `norm_eps`.
        gate: the output gate's projection, shaped as `v`: the output is multiplied by its SiLU; None leaves it out.
        real: bool `[B]` or `[B, 1]`, False for pads, which change no state; None if all tokens are real.
        forget_gate_bound: in (0, 1]; None leaves it out.
        max_steps, tolerance: as in `mesa_solver.conjugate_gradient`; 0 steps leave the solver out.
        output_stats: also return steps and residual.

    Returns:
        o, shaped as `v` and in its dtype; steps (int32) and relative residual (float32), `[B, H]`, or None for both.

    Raises:
        ValueError: a shape or the dtype of a state is wrong; the states are then untouched.
    """
    batch, heads = q.shape[0], beta_logit.shape[-1]
    key_channels, value_channels, width = q.shape[-1], v.shape[-1], q_weight.shape[-1]
    key_dim, value_dim = key_channels // heads, value_channels // heads
    check_states(h, g, (batch, heads, key_dim, value_dim))
    if not 2 <= width <= LARGEST_WIDTH:
        raise ValueError(f"the convolutions have width {width}; the kernel takes 2 to {LARGEST_WIDTH}.")
    if (v_state is None) != (v_weight is None):
        raise ValueError("v_state and v_weight belong together; give both or neither.")
    tokens = {"q": (q, heads * key_dim), "k": (k, heads * key_dim), "v": (v, heads * value_dim)}
    tokens |= {"beta_logit": (beta_logit, heads), "gamma_logit": (gamma_logit, heads)}
    if gate is not None:
        tokens["gate"] = (gate, value_channels)
    for name, (tensor, size) in tokens.items():
        check_shape(name, tensor, (batch, size), (batch, 1, size))
    convolutions = {"q": (q_state, q_weight, key_channels), "k": (k_state, k_weight, key_channels)}
    if v_state is not None:
        convolutions["v"] = (v_state, v_weight, value_channels)
    for name, (state, weight, channels) in convolutions.items():
        check_shape(f"{name}_state", state, (batch, channels, width - 1))
        check_shape(f"{name}_weight", weight, (channels, width), (channels, 1, width))
    check_shape("beta_bias", beta_bias, (heads,))
    check_shape("gamma_bias", gamma_bias, (heads,))
    check_shape("lambda_param", lambda_param, (heads, key_dim))
    check_shape("norm_weight", norm_weight, (value_dim,))
    if real is not None:
        check_shape("real", real, (batch,), (batch, 1))
    q, k, v = readable(q), readable(k), readable(v)
    gate = None if gate is None else readable(gate)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = Contiguous(h, g, q_state, k_state, v_state)
    steps, residual = launch(
        states.copies[0],
        max_steps,
        tolerance,
        output_stats,
        g=states.copies[1],
        q=q,
        k=k,
        v=v,
        decay=gamma_logit.contiguous(),
        beta=beta_logit.contiguous(),
        lam=lambda_param.contiguous(),
        o=o,
        layer=(
            *states.copies[2:],
            q_weight.contiguous(),
            k_weight.contiguous(),
            None if v_weight is None else v_weight.contiguous(),
            beta_bias.contiguous(),
            gamma_bias.contiguous(),
            norm_weight.contiguous(),
            gate,
            0 if gate is None else gate.stride(0),
            None if real is None else real.contiguous(),
            0.0 if forget_gate_bound is None else 1.0 - forget_gate_bound,
            float(lambda_lower_bound),
            float(norm_eps),
        ),
        q_batch=q.stride(0),
        q_head=key_dim,
        k_batch=k.stride(0),
        k_head=key_dim,
        v_batch=v.stride(0),
        v_head=value_dim,
        V=value_dim,
        W=width,
        NORMALIZE=True,
        LAYER=True,
    )
    states.write_back()
    return o, steps, residual


# The operators that compiled and exported graphs hold; eager decoding calls the functions themselves, which spares the
# dispatch of a Python operator for every token and layer. An operator returns tensors, so that these have statistics.


@torch.library.custom_op(f"{NAMESPACE}::triton_decode_step", mutates_args=("h", "g"))
def triton_decode_step_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    max_steps: int,
    tolerance: float | None,
    normalize_qk: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_decode_step` with statistics."""
    return triton_decode_step(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance, normalize_qk)


@triton_decode_step_op.register_fake
def _(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance, normalize_qk=True):
    gates = q.shape[:2]
    return v.new_empty(v.shape), q.new_empty(gates, dtype=torch.int32), q.new_empty(gates, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::triton_decode_layer", mutates_args=("q_state", "k_state", "v_state", "h", "g"))
def triton_decode_layer_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta_logit: torch.Tensor,
    gamma_logit: torch.Tensor,
    q_state: torch.Tensor,
    k_state: torch.Tensor,
    v_state: torch.Tensor | None,
    h: torch.Tensor,
    g: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor | None,
    beta_bias: torch.Tensor,
    gamma_bias: torch.Tensor,
    lambda_param: torch.Tensor,
    norm_weight: torch.Tensor,
    gate: torch.Tensor | None,
    real: torch.Tensor | None,
    forget_gate_bound: float | None,
    lambda_lower_bound: float,
    norm_eps: float,
    max_steps: int,
    tolerance: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_decode_layer` with statistics."""
    return triton_decode_layer(
        q,
        k,
        v,
        beta_logit,
        gamma_logit,
        q_state,
        k_state,
        v_state,
        h,
        g,
        q_weight,
        k_weight,
        v_weight,
        beta_bias,
        gamma_bias,
        lambda_param,
        norm_weight,
        gate,
        real,
        forget_gate_bound,
        lambda_lower_bound,
        norm_eps,
        max_steps,
        tolerance,
    )


@triton_decode_layer_op.register_fake
def _(q, k, v, beta_logit, gamma_logit, q_state, k_state, v_state, h, *rest):
    gates = h.shape[:2]
    return v.new_empty(v.shape), q.new_empty(gates, dtype=torch.int32), q.new_empty(gates, dtype=torch.float32)
