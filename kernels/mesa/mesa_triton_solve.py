# SPDX-License-Identifier: Apache-2.0
"""The chunkwise solve as one Triton kernel: a chunk's whole conjugate-gradient iteration stays on chip.

The plain torch iteration writes every vector of every step to memory; on a GPU that, and not the arithmetic, is its
cost. Products run as three TF32 products each ("tf32x3"), which keeps them at float32 accuracy on the tensor cores.
"""

import functools
import os
import warnings
from collections.abc import Callable

import torch

from .mesa_solver import RESIDUAL_FLOOR, conjugate_gradient, l2_normalize

# Environment variable: "torch" keeps every solve in torch, "auto" (the default) uses the kernel where it fits.
BACKEND_VARIABLE = "MESANET_BACKEND"

# Relative difference to torch that the first use on a device lets pass.
SELF_TEST_TOLERANCE = 1e-4

# The state, the keys, the decay matrix and four vectors a token live in registers and shared memory together: with
# sizes up to 64 that is 112 kB of float32, which 8 warps hold without spilling.
FUSED_SIZES = (16, 32, 64)

# TF32 products exist from this compute capability on; its devices also have the shared memory (82 kB at most, 131 kB
# where the compiler uses Hopper's instructions).
FUSED_CAPABILITY = (8, 0)


class BackendError(ValueError):
    """The environment asks for a backend that does not exist."""


@functools.cache
def load_kernel() -> tuple[Callable | None, str]:
    """The kernel, or None and why there is none.

    Imported at first use: a CPU pays neither for triton nor for its faults.

    Raises:
        BackendError: the environment variable has another value than "auto" or "torch".
    """
    backend = os.environ.get(BACKEND_VARIABLE, "auto")
    if backend not in ("auto", "torch"):
        raise BackendError(f"{BACKEND_VARIABLE} is {backend!r}; set it to 'auto' or 'torch', or unset it.")
    if backend == "torch":
        return None, f"{BACKEND_VARIABLE} is torch"
    try:
        from .mesa_triton_kernels import fused_chunk_solve_kernel
    # A triton that does not fit the installation fails in many ways; torch iterates then.
    except Exception as error:
        return None, f"triton cannot be imported ({type(error).__name__}: {error})"
    return fused_chunk_solve_kernel, ""


def fused_solve_runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether the kernel runs on `device`, and why (not)."""
    if device.type != "cuda":
        return False, f"no Triton kernel runs on {device.type}"
    kernel, reason = load_kernel()
    if kernel is None:
        return False, reason
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < FUSED_CAPABILITY:
        return False, "the Triton solve needs an NVIDIA GPU of compute capability 8.0"
    sizes = ", ".join(map(str, FUSED_SIZES))
    return True, f"a Triton kernel solves heads and chunks of {sizes} in float32, torch operators all others"


def fused_solve_fits(b: torch.Tensor) -> bool:
    """Whether the kernel takes right-hand sides `b` `[..., C, K]`; otherwise torch iterates."""
    return (
        b.dtype == torch.float32
        and b.shape[-1] in FUSED_SIZES
        and b.shape[-2] in FUSED_SIZES
        and fused_solve_runs_on(b.device)[0]
        and kernel_is_right(b.device, b.shape[-2], b.shape[-1])
    )


@functools.cache
def kernel_is_right(device: torch.device, size: int, key_dim: int) -> bool:
    """Whether the kernel compiles for chunks of `size` and heads of `key_dim` on `device` and agrees with torch there.

    Tried once, on one chunk; a kernel that fails is not used, with a warning.
    """
    generator = torch.Generator().manual_seed(0)
    k, b = (torch.randn(1, 1, 1, size, key_dim, generator=generator).to(device) for _ in range(2))
    k = l2_normalize(k)
    h, weights = k.transpose(-1, -2) @ k, torch.ones(1, 1, 1, size, size, device=device).tril()
    lam, from_start = torch.ones(1, key_dim, device=device), torch.full_like(k[..., :1], 0.5)
    options = {"max_steps": 64, "tolerance": 1e-6}

    def matvec(p: torch.Tensor) -> torch.Tensor:
        return from_start * (p @ h) + ((p @ k.transpose(-1, -2)) * weights) @ k + lam * p

    expected, _, _ = conjugate_gradient(matvec, b, **options)
    try:
        x, _, _ = fused_chunk_solve(b, k, h, lam, from_start, weights, **options)
        error = ((x - expected).norm() / expected.norm()).item()
        problem = None if error <= SELF_TEST_TOLERANCE else f"a relative error of {error:.1e}"
    # Whatever a compiler or driver raises: the solve goes on without it.
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}"
    if problem is not None:
        warnings.warn(
            f"The Triton solve for heads of {key_dim} does not work on {device} ({problem}); torch solves instead, "
            f"more slowly. {BACKEND_VARIABLE}=torch avoids the attempt.",
            stacklevel=2,
        )
    return problem is None


def fused_chunk_solve(
    b: torch.Tensor,
    k: torch.Tensor,
    h: torch.Tensor,
    lam: torch.Tensor,
    from_start: torch.Tensor,
    weights: torch.Tensor,
    max_steps: int,
    tolerance: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve `(H_t + Lambda) x_t = b_t` for every token of every chunk.

    Args:
        b, k: `[L, H, N, C, K]` float32, contiguous.
        h: states before each chunk, `[L, H, N, K, K]`; rows may be strided.
        lam: `[H, K]`.
        from_start: `[L, H, N, C, 1]`.
        weights: `W_ts` `[L, H, N, C, C]`.
        max_steps, tolerance: as in `mesa_solver.conjugate_gradient`, which this agrees with to rounding.

    Returns:
        `x` as `b`; steps int32 and relative residual, `[L, H, N, C]`.
    """
    lines, heads, chunks, size, key_dim = b.shape
    x = torch.empty_like(b)
    steps = torch.empty(b.shape[:-1], dtype=torch.int32, device=b.device)
    residual = torch.empty(b.shape[:-1], dtype=b.dtype, device=b.device)
    h = h.flatten(0, 2)  # a view: only rows are strided
    kernel, _ = load_kernel()
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device_of(b):
        kernel[(lines * heads * chunks,)](
            b=b,
            k=k,
            h=h,
            lam=lam.contiguous(),
            from_start=from_start.contiguous(),
            weights=weights.contiguous(),
            x=x,
            steps=steps,
            residual=residual,
            max_steps=max_steps,
            threshold=max(tolerance or 0.0, RESIDUAL_FLOOR[b.dtype]) ** 2,
            tiny=torch.finfo(b.dtype).tiny,
            h_stride=h.stride(0),
            h_row_stride=h.stride(1),
            heads=heads,
            chunks=chunks,
            C=size,
            K=key_dim,
            num_warps=8 if size * key_dim >= 4096 else 4,
        )
    return x, steps, residual
