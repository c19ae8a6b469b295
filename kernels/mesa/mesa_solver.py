# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradient for many small symmetric positive definite systems at once, shared by every torch path.

Every path (chunkwise, one-token step, the adjoint solve of the backward pass) starts at zero, stops a row at
`residual_bound` and freezes it there, so that the same token gets the same answer however it is batched.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Relative residual below which a row cannot improve any more in that precision: it is frozen even when a fixed number
# of steps was asked for, because further steps would only divide rounding noise by rounding noise.
RESIDUAL_FLOOR = {torch.float32: 1e-7, torch.float64: 1e-15}

# What a tolerance promises is the error of the output, which is larger than the residual: by up to 1.8 on the families
# that the tests have.
RESIDUAL_PER_TOLERANCE = 0.5

# Added under the square root when q and k are normalised, so that an all-zero row (a pad) stays zero and finite.
L2_NORM_EPS = 1e-6

# Rows are only inspected for early exit every so many steps where the check costs a device synchronisation.
DEVICE_CHECK_INTERVAL = 4


def settle_cpu_functions() -> None:
    """Call each function that torch leaves to Intel's MKL once, for one entry and so by one thread.

    MKL picks a function's kernel in its first call in a process. Where several threads make that call at once, it may
    give one of them a kernel with half the digits (https://github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype, device="cpu")
        for function in (torch.exp, torch.sqrt, torch.tanh):
            function(one)


settle_cpu_functions()


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """`x / sqrt(||x||^2 + L2_NORM_EPS)` over the last dimension, in the dtype of `x`."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def residual_bound(tolerance: float | None, dtype: torch.dtype) -> float:
    """The relative residual `||r|| / ||b||` at which a row stops: half the tolerance, but not below the floor."""
    return max(RESIDUAL_PER_TOLERANCE * (tolerance or 0.0), RESIDUAL_FLOOR[dtype])


# What torch's switches say where float32 products are computed as such: "none" is that nobody asked for less.
FULL_PRECISION = ("none", "ieee")


class IeeeProducts:
    """Switches float32 products to full precision while anyone needs them.

    The switches belong to the process: the first thread to enter stores and sets those that stand elsewhere, the last
    to leave restores them.
    """

    def __init__(self):
        self.lock, self.users, self.before = threading.Lock(), 0, []
        self.switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)

    def enter(self) -> None:
        with self.lock:
            if self.users == 0:
                values = ((switch, switch.fp32_precision) for switch in self.switches)
                self.before = [(switch, value) for switch, value in values if value not in FULL_PRECISION]
                for switch, _ in self.before:
                    switch.fp32_precision = "ieee"
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for switch, value in self.before:
                    switch.fp32_precision = value


_IEEE_PRODUCTS = IeeeProducts()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run products in the dtype of their operands: no autocast, no TF32, no bfloat16 in place of float32.

    TF32 and 16-bit products lose the positive definiteness of `H + Lambda` on nearly constant keys, so the caller's
    speed settings must not reach the solver: on CPUs with bfloat16 products, `set_float32_matmul_precision("medium")`
    means those.
    """
    _IEEE_PRODUCTS.enter()
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        _IEEE_PRODUCTS.leave()


def conjugate_gradient(
    matvec: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    *,
    max_steps: int,
    tolerance: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve `A x = b` row by row, with `A` symmetric positive definite and given by its product.

    Args:
        matvec: maps rows `[..., R, K]` to `A` times each row, same shape; must not change its argument.
        b: right-hand sides `[..., R, K]`, float32 or float64.
        max_steps: largest number of steps, >= 1.
        tolerance: a row stops at `||r|| <= tolerance / 2 * ||b||`; None runs `max_steps` steps (or to the residual
            floor of the dtype, `RESIDUAL_FLOOR`).

    Returns:
        `x` `[..., R, K]`; the steps each row took, int32 `[..., R]`; the relative residual `||r|| / ||b||` of each row
        by the recurrence, `[..., R]` (0 for a zero right-hand side).

    A row whose curvature `p^T A p` is not positive (breakdown) is frozen at its last good iterate. Rows are solved in
    units of their own norm, so neither large nor tiny right-hand sides over- or underflow.
    """
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    threshold = torch.full((), residual_bound(tolerance, b.dtype) ** 2, dtype=b.dtype, device=b.device)
    zero, tiny = b.new_zeros(()), torch.finfo(b.dtype).tiny
    # Two-stage norm: the largest entry first, so that squares cannot overflow. NaN passes through to the solution.
    peak = torch.linalg.vector_norm(b, torch.inf, dim=-1, keepdim=True).clamp_min_(tiny)
    r = b / peak
    norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True).clamp_min_(tiny)
    r /= norm
    p = r.clone()
    x = torch.zeros_like(r)
    rr = r.square().sum(-1, keepdim=True)
    active = rr > threshold
    taken = []
    check_interval = 1 if b.device.type == "cpu" else DEVICE_CHECK_INTERVAL
    for step in range(max_steps):
        if step % check_interval == 0 and not any_active(b.device, active):
            break
        a = matvec(p)
        curvature = (p * a).sum(-1, keepdim=True)
        active = active & (curvature > zero)
        taken.append(active)
        # A row that is not active divides whatever it holds, even 0 by 0; the result is not used.
        alpha = torch.where(active, rr / curvature, zero)
        x.addcmul_(p, alpha)
        r.addcmul_(a, alpha, value=-1)
        rr_next = r.square().sum(-1, keepdim=True)
        p = torch.addcmul(r, p, torch.where(active, rr_next / rr, zero))
        rr = rr_next
        active = active & (rr > threshold)
    steps = torch.stack(taken).sum(0, dtype=torch.int32) if taken else torch.zeros_like(active, dtype=torch.int32)
    return x.mul_(norm).mul_(peak), steps.squeeze(-1), rr.sqrt().squeeze(-1)


def any_active(device: torch.device, active: torch.Tensor) -> bool:
    """Whether any row is still active; True unseen while a CUDA graph is captured, where reading is illegal."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return bool(active.any())
