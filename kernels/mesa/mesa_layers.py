# SPDX-License-Identifier: Apache-2.0
"""What surrounds the Mesa operator in a layer: short convolutions and their pads, norms, gates, projections.

The torch code is the specification and runs anywhere. On a GPU, the operators of `mesa_triton_layers` do the same in
one launch each, and those of `mesa_triton_linear` the projections without gradients, of which the model's modules are
the specification. Importing this does not import triton.

Dimensions: B batch, T tokens, H heads, V value size, W convolution width, S packed sequences.
"""

import torch
import torch.nn.functional as F

from .mesa_cpu_decode import cpu_decode_layer, cpu_norm
from .mesa_dispatch import select_backend, use_fused_linears
from .mesa_dispatch import use_triton as mesa_runs_in_triton
from .mesa_library import OPERATORS

# What the Triton operators take; everything else, such as float64, stays in torch.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of one token on a CPU.
NUMPY_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A wider convolution does not fit the registers of its warp.
WIDEST_CONVOLUTION = 8

# A longer row does not fit the registers of its program.
LONGEST_NORM = 8192

# Entries up to which the norm of one token is sooner computed in NumPy, on a CPU.
SMALL_NORM = 2**14

# Rows up to which the projections of a decoding step have kernels of their own; with more, torch's products pay.
FEW_ROWS = 16
# Rows from which a program of the norm takes several of them: with one each, weights of few outputs are read from the
# L2 cache for every row.
MANY_ROWS = 512


# A constant to whoever compiles a model: the answer for a device does not change.
@torch.compiler.assume_constant_result
def triton_operators_run_on(device: torch.device, backend: str | None) -> bool:
    """Whether the Triton operators run on `device`; the first time they do, they are registered."""
    if select_backend(device, backend)[0] != "triton":
        return False
    from .mesa_triton_layers import LAUNCHES  # noqa: F401  (importing registers the operators)

    return True


def use_triton(backend: str | None, *tensors: torch.Tensor | None) -> bool:
    """Whether the Triton operators take these tensors' dtypes, on the device of the first (`backend` as elsewhere)."""
    return (
        tensors[0].is_cuda
        and all(tensor is None or tensor.dtype in TRITON_DTYPES for tensor in tensors)
        and triton_operators_run_on(tensors[0].device, backend)
    )


def run_triton(name: str, *arguments) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Call the Triton operator `name`; past the dispatcher, which takes a launch's time, where none must see it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return getattr(OPERATORS, name)(*arguments)
    from .mesa_triton_layers import LAUNCHES

    return LAUNCHES[name](*arguments)


def decode_layer(
    q: torch.Tensor, *arguments, output_stats: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`mesa_triton_decode.triton_decode_layer`: one token, up to the output projection; its steps and residual."""
    if torch.compiler.is_compiling():
        return OPERATORS.triton_decode_layer(q, *arguments)
    if q.device.type == "cpu":
        return cpu_decode_layer(q, *arguments, output_stats=output_stats)
    from .mesa_triton_decode import triton_decode_layer

    return triton_decode_layer(q, *arguments, output_stats=output_stats)


@torch.compiler.assume_constant_result
def decodes_layer(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, width: int, backend: str | None = None
) -> bool:
    """Whether `decode_layer` takes layers of these sizes, with convolutions of this width, on `device`."""
    if device.type == "cpu":
        # Not where Triton's interpreter was asked for.
        return dtype in NUMPY_DTYPES and select_backend(device, backend)[0] == "torch"
    if not triton_takes_layer(device, dtype, key_dim, value_dim, width, backend):
        return False
    from .mesa_triton_decode import triton_decode_layer  # noqa: F401  (importing registers the operator)

    return True


def triton_takes_layer(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, width: int, backend: str | None
) -> bool:
    """Whether all of a layer between its projections, with convolutions of this width, may run in Triton."""
    if device.type != "cuda" or dtype not in TRITON_DTYPES or width > WIDEST_CONVOLUTION:
        return False
    return mesa_runs_in_triton(device, dtype, key_dim, value_dim, backend)


def prefills_layer(
    xs: list[torch.Tensor], weights: list[torch.Tensor], key_dim: int, value_dim: int, backend: str | None = None
) -> bool:
    """Whether `prefill_layer` takes these projections and convolutions, without gradients and outside of compilers."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    x, width = xs[0], weights[0].shape[-1]
    alike = all(other.dtype == x.dtype for other in xs) and all(weight.dtype in TRITON_DTYPES for weight in weights)
    return alike and triton_takes_layer(x.device, x.dtype, key_dim, value_dim, width, backend)


def prefill_layer(
    xs: list[torch.Tensor], weights: list[torch.Tensor], states: list[torch.Tensor | None], *arguments
) -> tuple[
    torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor | None, torch.Tensor | None
]:
    """`mesa_triton.launch_prefill`: several tokens, from the projections up to the output projection."""
    from .mesa_triton import launch_prefill

    states = [None if state is None else state.to(xs[0].dtype) for state in states]
    return launch_prefill(xs, weights, states, *arguments)


def fuses_linears(x: torch.Tensor, sizes: tuple[int, tuple[int, ...], int, int], backend: str | None = None) -> bool:
    """Whether `norm_linears`, `add_linear` and `norm_gated_linears` take the projections of a layer.

    Args:
        x: the layer's input, `[B, T, d]`.
        sizes: d; the projections of the normalised input, of which the last two are float32; the output projection's
            input; the MLP's intermediate size.
        backend: as in `mesa_attention`.
    """
    if x.dtype not in TRITON_DTYPES or x.numel() == 0:
        return False
    # A plain number also where a compiler traces a batch of any size: the kernels are compiled for powers of two, and
    # twice for all batches of more than FEW_ROWS.
    rows, tokens = 1, x.shape[0] * x.shape[1]
    while rows < tokens and rows <= FEW_ROWS:
        rows *= 2
    if tokens >= MANY_ROWS:
        rows = MANY_ROWS
    hidden, outputs, value_channels, intermediate = sizes
    # Numbers one by one, because a compiler does not take a tuple for a constant.
    return use_fused_linears(x.device, x.dtype, rows, backend, hidden, value_channels, intermediate, *outputs)


def run_linear(name: str, *arguments, **options):
    """Call the operator `name` of `mesa_triton_linear`; past the dispatcher, where no compiler must see it.

    `options` are what a compiler decides by itself: where to copy and what to overwrite.
    """
    if torch.compiler.is_compiling():
        return getattr(OPERATORS, name)(*arguments)
    from .mesa_triton_linear import LAUNCHES

    return LAUNCHES[name](*arguments, **options)


def norm_linears(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weights: list[torch.Tensor], rounded: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`mesa_triton_linear.launch_norm_linears`: projections of the normalised input, the first `rounded` rounded.

    Returns:
        The projections; and `x` again or, where `add_linear` is faster in place, a copy of it.
    """
    if torch.compiler.is_compiling() or x.shape[0] * x.shape[1] <= FEW_ROWS:
        return run_linear("norm_linears", x, norm_weight, eps, weights, rounded), x
    copy = torch.empty_like(x, memory_format=torch.contiguous_format)
    return run_linear("norm_linears", x, norm_weight, eps, weights, rounded, copy=copy), copy


def add_linear(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, overwrite: bool) -> torch.Tensor:
    """`mesa_triton_linear.launch_add_linear`: `residual + x weight^T`, perhaps in place if `overwrite`."""
    return run_linear("add_linear", x, weight, residual, overwrite=overwrite)


def norm_gated_linears(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, gate_weight: torch.Tensor, up_weight: torch.Tensor
) -> torch.Tensor:
    """`mesa_triton_linear.launch_norm_gated_linears`: `silu(gate) * up` of the normalised input."""
    return run_linear("norm_gated_linears", x, norm_weight, eps, gate_weight, up_weight)


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Causal depthwise convolution over time, then SiLU: `y_t = silu(sum_j weight_j x_{t - (W - 1) + j})`.

    Args:
        x: `[B, T, channels]`, any floating dtype, T at least 1.
        weight: `[channels, W]`, the oldest input's first; W is at least 2.
        state: the W - 1 inputs before the first, oldest first, `[B, channels, W - 1]`; None is zeros.
        cu_seqlens: int32 or int64 `[S + 1]`, from 0 to T, not decreasing: B is 1, and each of the S packed sequences
            starts after zeros. Excludes `state`.
        backend: as in `mesa_attention`.

    Returns:
        `y` as `x`, and the state after the last token, in the dtype of `x` (`[1, channels, 0]` for packed sequences).
    """
    state = None if state is None else state.to(x.dtype)
    if use_triton(backend, x, weight) and weight.shape[1] <= WIDEST_CONVOLUTION:
        return run_triton("short_convolution", x, weight, state, cu_seqlens)
    (channels, width), length = weight.shape, x.shape[1]
    memory = width - 1
    inputs = x.transpose(1, 2)
    if cu_seqlens is not None:
        # Each sequence gets W - 1 zeros of its own in front.
        tokens = torch.arange(length, device=x.device)
        sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True)
        positions = tokens + sequence * memory
        spread = inputs.new_zeros(*inputs.shape[:2], length + (cu_seqlens.shape[0] - 1) * memory)
        spread = spread.index_copy(2, positions + memory, inputs)
        y = F.conv1d(spread, weight.unsqueeze(1), groups=channels)[..., positions]
        state = inputs[..., :0]
    else:
        state = inputs.new_zeros(*inputs.shape[:2], memory) if state is None else state
        inputs = torch.cat([state, inputs], dim=-1)
        if length == 1:  # a dot product costs a fraction of a convolution call
            y = (inputs * weight).sum(-1, keepdim=True)
        else:
            y = F.conv1d(inputs, weight.unsqueeze(1), groups=channels)
        state = inputs[..., -memory:]
    return F.silu(y).transpose(1, 2), state


def short_convolutions(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    states: list[torch.Tensor | None],
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`short_convolution` of several inputs, without gradients; on a GPU in one launch if they are alike.

    Args:
        xs: inputs as `short_convolution` takes them, one for each of `weights` and `states`.
        cu_seqlens, backend: as there.

    Returns:
        The outputs, and the states after the last token.
    """
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if not traced and use_triton(backend, *xs, *weights) and are_alike(xs, weights, states):
        states = [None if state is None else state.to(xs[0].dtype) for state in states]
        return run_triton("short_convolutions", xs, weights, states, cu_seqlens)
    each = [
        short_convolution(x, weight, state, cu_seqlens, backend)
        for x, weight, state in zip(xs, weights, states, strict=True)
    ]
    return [y for y, _ in each], [state for _, state in each]


def are_alike(xs: list[torch.Tensor], weights: list[torch.Tensor], states: list[torch.Tensor | None]) -> bool:
    """Whether one launch takes these convolutions."""
    first, size, has_state = xs[0], weights[0].shape, states[0] is not None
    return size[1] <= WIDEST_CONVOLUTION and all(
        (x.shape, x.dtype, x.stride()) == (first.shape, first.dtype, first.stride())
        and weight.shape == size
        and (state is not None) == has_state
        for x, weight, state in zip(xs, weights, states, strict=True)
    )


class PadOrder:
    """Moves pads out of a convolution's sight.

    The W - 1 remembered inputs of a convolution and the T new ones are reordered so that pads come first, then the
    memory, then the real tokens: each real token then sees the real tokens before it, wherever pads stand.

    Args:
        mask: bool `[B, T]`, True for real tokens.
        memory: W - 1, the number of remembered inputs.
    """

    def __init__(self, mask: torch.Tensor, memory: int):
        extended = F.pad(mask, (memory, 0), value=True)
        self.sorted = extended.int().argsort(dim=1, stable=True)
        # Where each new token's output lies; a pad's may fall before the first output and reads any.
        self.restored = (self.sorted.argsort(dim=1)[:, memory:] - memory).clamp_min(0)

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, channels, W - 1 + T]` into the order pads, memory, tokens."""
        return x.gather(2, self.sorted.unsqueeze(1).expand_as(x))

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs `[B, channels, T]` back into the order of the tokens."""
        return y.gather(2, self.restored.unsqueeze(1).expand_as(y))


def is_small_token(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `x` `[B, 1, d]` and `weight` are sooner normalised in NumPy: few plain values, which nobody watches."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(x) is not torch.Tensor or x.ndim != 3 or x.shape[1] != 1 or x.numel() > SMALL_NORM:
        return False
    return x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and x.dtype in NUMPY_DTYPES


def head_norm(
    o: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension, computed in float32 (or float64), times `silu(gate)` if there is a gate.

    Args:
        o: `[..., V]`, any floating dtype.
        weight: `[V]`.
        eps: added to the mean square, greater than 0.
        gate: `[..., V]`, any floating dtype.
        backend: as in `mesa_attention`.

    Returns:
        `o / sqrt(mean(o^2) + eps) * weight * silu(gate)`, `[..., V]` in the dtype of `o`.
    """
    # A compiler fuses a norm without a gate with what is around it.
    opaque = gate is not None or not torch.compiler.is_compiling()
    if opaque and use_triton(backend, o, weight, gate) and o.shape[-1] <= LONGEST_NORM:
        return run_triton("head_norm", o, weight, eps, gate)
    if gate is None and is_small_token(o, weight):
        return cpu_norm(o, weight, eps)
    wide = torch.promote_types(o.dtype, torch.float32)
    normed = F.rms_norm(o.to(wide), weight.shape, weight.to(wide), eps).to(o.dtype)
    return normed if gate is None else (normed * F.silu(gate)).to(o.dtype)


def gates(
    beta_logit: torch.Tensor,
    gamma_logit: torch.Tensor,
    beta_bias: torch.Tensor,
    gamma_bias: torch.Tensor,
    forget_gate_bound: float | None = None,
    mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input strength and log forget strength of every token and head; a pad neither writes nor forgets.

    Args:
        beta_logit, gamma_logit: `[B, T, H]`, float32 (or float64).
        beta_bias, gamma_bias: `[H]`, as the logits.
        forget_gate_bound: in (0, 1]; the forget strength is multiplied by `1 - (1 - bound) * beta^2`. None: it is not.
        mask: bool `[B, T]`, False for pads.
        backend: as in `mesa_attention`.

    Returns:
        `beta` in [0, 1] and `log_gamma`, at most 0, `[B, T, H]` as the logits.
    """
    logits_and_biases = (beta_logit, gamma_logit, beta_bias, gamma_bias)
    if use_triton(backend, beta_logit) and all(tensor.dtype == torch.float32 for tensor in logits_and_biases):
        return run_triton("gates", *logits_and_biases, forget_gate_bound, mask)
    beta = torch.sigmoid(beta_logit + beta_bias)
    log_gamma = F.logsigmoid(gamma_logit + gamma_bias)
    if forget_gate_bound is not None:
        log_gamma = log_gamma + torch.log1p((forget_gate_bound - 1) * beta.square())
    if mask is not None:
        beta = beta.masked_fill(~mask.unsqueeze(-1), 0.0)
        log_gamma = log_gamma.masked_fill(~mask.unsqueeze(-1), 0.0)
    return beta, log_gamma
