# SPDX-License-Identifier: Apache-2.0
"""The public Mesa operators: validation, precision, and the choice of the backend, in one place.

Dimensions: B batch, S sequences (S = B unless packed), T tokens, H heads, K key size, V value size, C chunk size.
"""

from itertools import pairwise
from numbers import Integral, Real
from operator import index
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .mesa_chunkwise import chunkwise, final_states
from .mesa_decode import decode_step, decode_step_op, decode_tokens, decodes_tokens
from .mesa_dispatch import use_triton
from .mesa_solver import l2_normalize

# What the Triton kernels read as it is; other dtypes are converted to float32.
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Bounds of packed sequences that were found right: how often they had been written to, and for how many tokens.
_READ_BOUNDS = WeakTensorKeyDictionary()


class SolverStats(NamedTuple):
    """What the solver did for each token and head: `steps` int32 and relative `residual`, both `[B, T, H]`."""

    steps: torch.Tensor
    residual: torch.Tensor


class MesaState(NamedTuple):
    """State of S sequences after their last token: `h` `[S, H, K, K]`, `g` `[S, H, K, V]`, float32 (or float64)."""

    h: torch.Tensor
    g: torch.Tensor


class MesaOutput(NamedTuple):
    """`o` `[B, T, H, V]` in the dtype of `v`; `final_state` and `stats` where they were asked for, else None."""

    o: torch.Tensor
    final_state: MesaState | None
    stats: SolverStats | None


def mesa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    *,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    max_steps: int = 30,
    tolerance: float | None = None,
    backward_max_steps: int | None = None,
    backward_tolerance: float | None = None,
    chunk_size: int = 64,
    normalize_qk: bool = True,
    output_stats: bool = False,
    backend: str | None = None,
) -> MesaOutput:
    r"""The Mesa layer over whole sequences, chunkwise.

    .. math::
        H_t = \gamma_t H_{t-1} + \beta_t k_t k_t^T, \quad G_t = \gamma_t G_{t-1} + \beta_t k_t v_t^T, \quad
        o_t = G_t^T (H_t + \Lambda)^{-1} q_t

    (equations 7 to 9 of arXiv 2506.05233), the linear system solved by conjugate gradient. Differentiable in every
    floating tensor, with implicit gradients (exact where the solver converged).

    Args:
        q: queries `[B, T, H, K]`, any floating dtype.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`; V may differ from K.
        log_gamma: log of the forget strength `[B, T, H]`, at most 0 (0 keeps the state, -inf resets it).
        beta: input strength `[B, T, H]`, in [0, 1]. A token with `beta = 0` and `log_gamma = 0` leaves the states
            alone.
        lam: diagonal regulariser `[H, K]`, positive.
        initial_state: `(H_0, G_0)`, `[S, H, K, K]` symmetric and `[S, H, K, V]`; None is zero.
        output_final_state: also return the states after the last token.
        cu_seqlens: int32 or int64 `[S + 1]`, from 0 to T, not decreasing: B is 1 and T holds S packed sequences.
        max_steps: conjugate-gradient steps, >= 0; 0 leaves the solver out (`x = q`, gated linear attention).
        tolerance: relative error of the output to reach, in (0, 1): a token stops at `||r|| <= tolerance / 2 * ||q||`.
            None runs `max_steps` steps.
        backward_max_steps, backward_tolerance: the same for the second solve of the backward pass; None takes the
            forward's.
        chunk_size: C, tokens a chunk in torch, >= 1; the Triton kernels have their own.
        normalize_qk: L2-normalise q and k over K first (in float32).
        output_stats: also return each token's steps and residual.
        backend: "triton", "torch" or "auto"; None and "auto" leave the choice to the environment variable
            MESANET_BACKEND and then to the device (see `mesa_dispatch`).

    Returns:
        `MesaOutput`. Computation, states and statistics are in float32, or float64 when `q` is float64.

    Raises:
        ValueError: a shape, an option or `cu_seqlens` is out of range; the message names it.
        BackendError: the backend that was asked for does not exist or cannot run (a ValueError, too).
    """
    _check_shapes(q=q, k=k, v=v, log_gamma=log_gamma, beta=beta, lam=lam)
    max_steps, tolerance = check_solver(max_steps, tolerance)
    backward_max_steps, backward_tolerance = check_solver(
        max_steps if backward_max_steps is None else backward_max_steps,
        tolerance if backward_tolerance is None else backward_tolerance,
        prefix="backward_",
    )
    if max_steps > 0 and backward_max_steps == 0:
        raise ValueError("backward_max_steps is 0 while max_steps is not; give it at least 1.")
    if not isinstance(chunk_size, Integral) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be a whole number of at least 1.")
    sequences = q.shape[0] if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, *q.shape[:2])
    initial_h, initial_g = _check_state(initial_state, sequences, q.shape[2], q.shape[3], v.shape[3], q.device)

    out_dtype, dtype = v.dtype, _compute_dtype(q)
    log_gamma, beta, lam = (tensor.to(dtype) for tensor in (log_gamma, beta, lam))
    if initial_h is not None:
        initial_h, initial_g = initial_h.to(dtype), initial_g.to(dtype)
    limits = (max_steps, tolerance, backward_max_steps, backward_tolerance)
    floats = (q, k, v, log_gamma, beta, lam) + (() if initial_h is None else (initial_h, initial_g))
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
    if v.numel() and _runs_in_triton(q, k, v, backend, differentiable):
        from .mesa_triton import launch_chunkwise, triton_chunkwise  # imports triton

        q, k, v = (tensor if tensor.dtype in _TRITON_DTYPES else tensor.float() for tensor in (q, k, v))
        inputs = [tensor.contiguous() for tensor in (q, k, v, log_gamma, beta, lam)]
        inputs += (None, None) if initial_h is None else (initial_h.contiguous(), initial_g.contiguous())
        inputs.append(None if cu_seqlens is None else cu_seqlens.to(q.device))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            o, final_h, final_g, steps, residual, *_ = triton_chunkwise(
                *inputs, *limits, normalize_qk, differentiable, output_stats
            )
        else:  # past the dispatcher, which takes a launch's time
            o, final_h, final_g, steps, residual, _ = launch_chunkwise(
                *inputs, max_steps, tolerance, normalize_qk, False, output_stats
            )
    else:
        q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
        if normalize_qk:
            q, k = l2_normalize(q), l2_normalize(k)
        inputs = (q, k, v, log_gamma, beta, lam, initial_h, initial_g)
        if not differentiable and cu_seqlens is None and decodes_tokens(q):
            o, final_h, final_g, steps, residual = decode_tokens(*inputs, max_steps, tolerance)
        else:
            o, final_h, final_g, _, steps, residual = chunkwise(*inputs, cu_seqlens, *limits, chunk_size)
    return MesaOutput(
        o.to(out_dtype),
        MesaState(final_h, final_g) if output_final_state else None,
        SolverStats(steps, residual) if output_stats else None,
    )


@torch.no_grad()
def mesa_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalize_k: bool = True,
    backend: str | None = None,
) -> MesaState:
    """The final state of `mesa_attention` alone, without gradients: for tokens whose outputs nobody asks for.

    Args:
        k, v, log_gamma, beta: as in `mesa_attention`.
        initial_state: `(H_0, G_0)`, `[B, H, K, K]` symmetric and `[B, H, K, V]`; None is zero.
        normalize_k: L2-normalise k over K first (in float32).
        backend: as in `mesa_attention`.

    Returns:
        `MesaState` in float32, or float64 when `k` is float64.

    Raises:
        ValueError: a shape is out of range; the message names it.
        BackendError: as in `mesa_attention`.
    """
    _check_shapes(k=k, v=v, log_gamma=log_gamma, beta=beta)
    initial_h, initial_g = _check_state(initial_state, k.shape[0], *k.shape[2:], v.shape[3], k.device)
    dtype = _compute_dtype(k)
    log_gamma, beta = log_gamma.to(dtype), beta.to(dtype)
    if initial_h is not None:
        initial_h, initial_g = initial_h.to(dtype), initial_g.to(dtype)
    if v.numel() and _runs_in_triton(k, k, v, backend):
        from .mesa_triton import launch_states

        k, v = (tensor if tensor.dtype in _TRITON_DTYPES else tensor.float() for tensor in (k, v))
        inputs = [tensor.contiguous() for tensor in (k, v, log_gamma, beta)]
        inputs += (None, None) if initial_h is None else (initial_h.contiguous(), initial_g.contiguous())
        return MesaState(*launch_states(*inputs, normalize_k))
    k, v = k.to(dtype), v.to(dtype)
    k = l2_normalize(k) if normalize_k else k
    return MesaState(*final_states(k, v, log_gamma, beta, initial_h, initial_g))


@torch.no_grad()
def mesa_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    *,
    max_steps: int = 30,
    tolerance: float | None = None,
    normalize_qk: bool = True,
    output_stats: bool = False,
    backend: str | None = None,
) -> MesaOutput:
    """One token of `mesa_attention`, without gradients: T is 1 and `state` is updated in place.

    Args:
        q, k, v, log_gamma, beta, lam: as in `mesa_attention`, T = 1.
        max_steps, tolerance, normalize_qk, output_stats, backend: as in `mesa_attention`.
        state: `(H, G)`, `[B, H, K, K]` and `[B, H, K, V]`, float32 (float64 when `q` is); overwritten with the new
            state.

    Returns:
        `MesaOutput` with `final_state` the given tensors.

    Raises:
        ValueError: a shape, dtype or option is out of range; the state is then untouched.
    """
    _check_shapes(q=q, k=k, v=v, log_gamma=log_gamma, beta=beta, lam=lam)
    max_steps, tolerance = check_solver(max_steps, tolerance)
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens; mesa_step takes one. Use mesa_attention for more.")
    if state is None:
        raise ValueError("state is None; mesa_step needs the pair (H, G), zeros before the first token.")
    h, g = _check_state(state, q.shape[0], q.shape[2], q.shape[3], v.shape[3], q.device)
    out_dtype, dtype = v.dtype, _compute_dtype(q)
    if h.dtype != dtype or g.dtype != dtype:
        raise ValueError(f"state is {h.dtype} and {g.dtype}; it must be {dtype}, the precision of the computation.")
    if _runs_in_triton(q, k, v, backend):
        from .mesa_triton_decode import triton_decode_step, triton_decode_step_op

        inputs = (*(tensor.squeeze(1) for tensor in (q, k, v, log_gamma, beta)), lam, h, g, max_steps, tolerance)
        if torch.compiler.is_compiling():
            o, steps, residual = triton_decode_step_op(*inputs, normalize_qk)
        else:
            o, steps, residual = triton_decode_step(*inputs, normalize_qk, output_stats)
    else:
        q, k, v, log_gamma, beta = (tensor.squeeze(1).to(dtype).contiguous() for tensor in (q, k, v, log_gamma, beta))
        if normalize_qk:
            q, k = l2_normalize(q), l2_normalize(k)
        inputs = (q, k, v, log_gamma, beta, lam.to(dtype), h, g, max_steps, tolerance)
        if torch.compiler.is_compiling():
            o, steps, residual = decode_step_op(*inputs)
        else:
            o, steps, residual = decode_step(*inputs, output_stats)
    stats = SolverStats(steps.unsqueeze(1), residual.unsqueeze(1)) if output_stats else None
    return MesaOutput(o.unsqueeze(1).to(out_dtype), MesaState(h, g), stats)


def check_solver(max_steps: int, tolerance: float | None, prefix: str = "") -> tuple[int, float | None]:
    """Validate the solver's limits; returns them as `(int, float or None)`.

    Raises:
        ValueError: `max_steps` is negative or no whole number, or `tolerance` is not in (0, 1).
    """
    whole = isinstance(max_steps, Real) and not isinstance(max_steps, bool) and max_steps % 1 == 0
    if not whole or max_steps < 0:
        raise ValueError(
            f"{prefix}max_steps is {max_steps!r}; it must be a whole number of at least 0 (0: no solver)."
        )
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 < tolerance < 1):
        raise ValueError(
            f"{prefix}tolerance is {tolerance!r}; it must lie between 0 and 1, or be None for fixed steps."
        )
    return int(max_steps), None if tolerance is None else float(tolerance)


def _runs_in_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str | None, differentiable: bool = False
) -> bool:
    # Float32 keys or values take other kernels, which need a test of their own.
    dtype = torch.float32 if q.dtype != torch.float64 and torch.float32 in (k.dtype, v.dtype) else q.dtype
    # Where a compiler holds all sizes symbolic, `index` fixes those of the heads: the answer depends on them.
    return use_triton(q.device, dtype, index(q.shape[3]), index(v.shape[3]), backend, differentiable)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_shapes(**inputs: torch.Tensor) -> None:
    """Refuse inputs, by their names in the order of the arguments, that do not fit the first, which is q or k."""
    (leader, first), *_ = inputs.items()
    if first.ndim != 4:
        raise ValueError(f"{leader} has shape {tuple(first.shape)}; it must be [batch, time, heads, key size].")
    expected = {
        "q": first.shape,
        "k": first.shape,
        "v": (*first.shape[:3], inputs["v"].shape[-1]),
        "log_gamma": first.shape[:3],
        "beta": first.shape[:3],
        "lam": first.shape[2:],
    }
    for name, tensor in inputs.items():
        shape = torch.Size(expected[name])
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with {leader} of shape {tuple(first.shape)} it must be "
                f"{tuple(shape)}."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {leader} is on {first.device}; move them to one device."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must have a floating-point dtype.")


def _check_state(
    state, sequences, heads, key_dim, value_dim, device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2 or not all(isinstance(s, torch.Tensor) for s in state):
        raise ValueError(f"the state is a {type(state).__name__}; it must be the pair of tensors (H, G).")
    h, g = state
    for name, tensor, shape in (
        ("H", h, (sequences, heads, key_dim, key_dim)),
        ("G", g, (sequences, heads, key_dim, value_dim)),
    ):
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"the state {name} has shape {tuple(tensor.shape)}; it must be {shape}.")
        if tensor.device != device:
            raise ValueError(
                f"the state {name} is on {tensor.device}, the other inputs on {device}; move them to one device."
            )
    return h, g


def _check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, length: int) -> int:
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; it must be a vector of at "
            "least two whole numbers."
        )
    if batch != 1:
        raise ValueError(f"cu_seqlens was given with a batch of {batch}; pack the sequences into a batch of 1.")
    # Reading the values waits for the device, so that what the layers of a model share is read once; and it cannot be
    # traced: a graph trusts its caller.
    if torch.compiler.is_compiling():
        return cu_seqlens.shape[0] - 1
    case = None if cu_seqlens.is_inference() else (cu_seqlens._version, length)
    if case is None or _READ_BOUNDS.get(cu_seqlens) != case:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(b > e for b, e in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must rise from 0 to the number of tokens, "
                f"{length}."
            )
        if case is not None:
            _READ_BOUNDS[cu_seqlens] = case
    return cu_seqlens.shape[0] - 1
