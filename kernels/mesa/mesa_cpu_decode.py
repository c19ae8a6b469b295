# SPDX-License-Identifier: Apache-2.0
"""One token on a CPU in NumPy, whose operators cost a third of torch's to call: for one token, calls take the time.

The arrays are views of torch's tensors, or float32 copies of 16-bit ones. What reads or writes whole states stays with
torch, which uses all threads.

Dimensions: B batch, H heads, K key size, V value size, W convolution width, N rows (B * H).
"""

import math
from functools import partial

import numpy as np
import torch

from .mesa_solver import L2_NORM_EPS, full_precision, residual_bound

# numpy 1 has no vecdot.
vecdot = getattr(np, "vecdot", None) or partial(np.einsum, "...k,...k->...")

# Entries of the matrices above which torch's product, on all threads, beats NumPy's.
LARGE_PRODUCT = 2**18


def conjugate_gradient_on_cpu(
    matrices: torch.Tensor, b: np.ndarray, *, max_steps: int, tolerance: float | None
) -> tuple[np.ndarray, list[int], list[float]]:
    """`mesa_solver.conjugate_gradient` for one row a matrix on a CPU: the same start, stop and answer.

    No row is frozen on the way. All go on until the last has stopped, and each then gets the iterate it had when it
    stopped, which is looked up in Python.

    Args:
        matrices: symmetric positive definite, `[N, K, K]`.
        b: right-hand sides `[N, K]`, float32 or float64.
        max_steps, tolerance: as there.

    Returns:
        `x` `[N, K]`; each row's steps and relative residual.
    """
    threshold, tiny = residual_bound(tolerance, matrices.dtype) ** 2, np.finfo(b.dtype).tiny
    with np.errstate(all="ignore"):
        # Two-stage norm: the largest entry first, so that squares cannot overflow. NaN passes through to the solution.
        peak = np.maximum(np.abs(b).max(-1, keepdims=True), tiny)
        r = b / peak
        norm = np.maximum(np.sqrt(vecdot(r, r))[:, None], tiny)
        r /= norm
        p, x, a = r.copy(), np.zeros_like(r), np.empty_like(r)
        if matrices.numel() > LARGE_PRODUCT:
            product = partial(
                large_product, torch.from_numpy(p).unsqueeze(1), matrices, torch.from_numpy(a).unsqueeze(1)
            )
        else:
            product = partial(np.matmul, p[:, None], matrices.numpy(), out=a[:, None])
        rr = vecdot(r, r)
        iterates, curvatures, squares = [x], [], [rr.tolist()]
        steps = [0] * len(b)
        # Rows that hold NaN compare False, and stop.
        running = [row for row, square in enumerate(squares[0]) if square > threshold]
        while running and len(curvatures) < max_steps:
            product()
            curvatures.append(vecdot(p, a))
            alpha = (rr / curvatures[-1])[:, None]
            x = x + alpha * p
            r -= np.multiply(a, alpha, out=a)
            before, rr = rr, vecdot(r, r)
            iterates.append(x)
            squares.append(rr.tolist())
            for row in running:
                steps[row] = len(curvatures)
            running = [row for row in running if squares[-1][row] > threshold]
            p *= (rr / before)[:, None]
            p += r
        # The smallest is NaN or not positive after a breakdown, and where a row went on long after it had stopped.
        if curvatures and not np.min(curvatures) > 0:
            for row, values in enumerate(np.transpose(curvatures).tolist()):
                steps[row] = next((step for step, value in enumerate(values[: steps[row]]) if value <= 0), steps[row])
        if len(set(steps)) == 1:
            x = iterates[steps[0]]
        else:
            x = np.stack([iterates[step][row] for row, step in enumerate(steps)])
        residuals = [math.sqrt(squares[step][row]) for row, step in enumerate(steps)]
        # One factor after the other, since their product may overflow.
        return x * norm * peak, steps, residuals


def large_product(p: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
    with full_precision(p.device):
        torch.bmm(p, matrices, out=out)


def solve(h: torch.Tensor, lam: torch.Tensor, q: torch.Tensor | np.ndarray, max_steps: int, tolerance: float | None):
    """`(H + Lambda) x = q` for `h` `[B, H, K, K]`, `lam` `[H, K]` and `q` `[B, H, K]`; as the solver returns them."""
    matrices = h.clone(memory_format=torch.contiguous_format)
    matrices.diagonal(dim1=-2, dim2=-1).add_(lam)
    rows = np.asarray(q).reshape(-1, q.shape[-1])
    return conjugate_gradient_on_cpu(matrices.flatten(0, 1), rows, max_steps=max_steps, tolerance=tolerance)


def cpu_decode_layer(
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
    output_stats: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`mesa_triton_decode.triton_decode_layer` on a CPU.

    q, k, v, gate and the weights of convolutions and norm share one dtype: float64, as the rest then does, or float32,
    bfloat16 or float16, with states and gates in float32.
    """
    batch, heads = beta_logit.shape[0], beta_logit.shape[-1]
    gates = (batch, heads)
    real = None if real is None else real.numpy().reshape(batch, 1)
    with np.errstate(all="ignore"):
        dtype = q.dtype
        q = unit(convolve(q, q_state, q_weight, real).reshape(batch, heads, -1))
        k = unit(convolve(k, k_state, k_weight, real).reshape(batch, heads, -1))
        v = array(v).reshape(batch, -1) if v_state is None else convolve(v, v_state, v_weight, real)
        v = v.reshape(batch, heads, -1)
        beta = sigmoid(array(beta_logit).reshape(gates) + array(beta_bias))
        gamma = sigmoid(array(gamma_logit).reshape(gates) + array(gamma_bias))
        if forget_gate_bound is not None:
            gamma *= 1 - (1 - forget_gate_bound) * beta * beta
        if real is not None:
            beta, gamma = np.where(real, beta, beta.dtype.type(0)), np.where(real, gamma, gamma.dtype.type(1))
        decay = torch.from_numpy(gamma)[..., None, None]
        key = torch.from_numpy(k).unsqueeze(-2)
        weighted_key = torch.from_numpy(beta[..., None] * k).unsqueeze(-1)
        h.mul_(decay).addcmul_(weighted_key, key)
        g.mul_(decay).addcmul_(weighted_key, torch.from_numpy(v).unsqueeze(-2))
        if max_steps == 0:
            x, steps, residuals = q, [0] * q[..., 0].size, [0.0] * q[..., 0].size
        else:
            lam = np.logaddexp(array(lambda_param), 0) + lambda_lower_bound
            x, steps, residuals = solve(h, torch.from_numpy(lam), q, max_steps, tolerance)
        o = np.matmul(x.reshape(batch, heads, 1, -1), g.numpy())[..., 0, :]
        o = normed(o, norm_weight, norm_eps)
        if gate is not None:
            o *= silu(array(gate)).reshape(o.shape)
    o = torch.from_numpy(o.reshape(batch, 1, -1)).to(dtype)
    if not output_stats:
        return o, None, None
    return o, torch.tensor(steps, dtype=torch.int32).view(gates), torch.tensor(residuals, dtype=h.dtype).view(gates)


def cpu_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`mesa_layers.head_norm` without a gate; `x` and `weight` share one dtype."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(normed(array(x), weight, eps)).to(x.dtype)


def array(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.float() if x.itemsize == 2 else x).numpy()


def normed(rows: np.ndarray, weight: torch.Tensor, eps: float) -> np.ndarray:
    scale = 1 / np.sqrt(vecdot(rows, rows) / rows.shape[-1] + eps)
    return rows * scale[..., None].astype(rows.dtype, copy=False) * array(weight)


def convolve(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, real: np.ndarray | None) -> np.ndarray:
    """The convolution's output for the token `x` `[B, 1, channels]`, `[B, channels]`; `state` takes the token in."""
    taps = array(weight).reshape(weight.shape[0], -1)
    inputs = np.concatenate([array(state), array(x).reshape(x.shape[0], -1, 1)], axis=-1)
    if real is not None:  # pads stand before what is remembered, as in `PadOrder`
        inputs = np.where(real[..., None], inputs, np.roll(inputs, 1, axis=-1))
    state.copy_(torch.from_numpy(inputs[..., 1:]))
    y = silu(vecdot(inputs, taps))
    if x.itemsize == 2:  # rounded, as between the modules
        y = array(torch.from_numpy(y).to(x.dtype))
    return y


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def unit(x: np.ndarray) -> np.ndarray:
    """`mesa_solver.l2_normalize`."""
    return x / np.sqrt(vecdot(x, x) + L2_NORM_EPS)[..., None]
