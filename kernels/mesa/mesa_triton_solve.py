# SPDX-License-Identifier: Apache-2.0
"""The chunkwise solve as one Triton kernel: a chunk's whole conjugate-gradient iteration stays on chip.

The plain torch iteration writes every vector of every step to memory; on a GPU that, and not the arithmetic, is its
cost. Products run as three TF32 products each ("tf32x3"), which keeps them at float32 accuracy on the tensor cores.
"""

import torch

from .mesa_solver import RESIDUAL_FLOOR

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch iteration runs everywhere
    triton = None

# The state, the keys, the decay matrix and four vectors a token live in registers and shared memory together: with
# sizes up to 64 that is 112 kB of float32, which 8 warps hold without spilling.
FUSED_SIZES = (16, 32, 64)


# TF32 products exist from this compute capability on; its devices also have the shared memory (82 kB at most, 131 kB
# where the compiler uses Hopper's instructions).
FUSED_CAPABILITY = (8, 0)


def fused_solve_runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether the kernel runs on `device`, and why (not)."""
    if device.type != "cuda":
        return False, f"no Triton kernel runs on {device.type}"
    if triton is None:
        return False, "triton is not installed"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < FUSED_CAPABILITY:
        return False, "the Triton solve needs an NVIDIA GPU of compute capability 8.0"
    return (
        True,
        f"head sizes and chunks of {', '.join(map(str, FUSED_SIZES))} in float32 are solved by a Triton kernel",
    )


def fused_solve_fits(b: torch.Tensor) -> bool:
    """Whether the kernel takes right-hand sides `b` `[..., C, K]`; otherwise torch iterates."""
    return (
        b.dtype == torch.float32
        and b.shape[-1] in FUSED_SIZES
        and b.shape[-2] in FUSED_SIZES
        and fused_solve_runs_on(b.device)[0]
    )


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
    fused_chunk_solve_kernel[(lines * heads * chunks,)](
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


if triton is not None:

    @triton.jit
    def fused_chunk_solve_kernel(
        b,
        k,
        h,
        lam,
        from_start,
        weights,
        x,
        steps,
        residual,
        max_steps,
        threshold,
        tiny,
        h_stride,
        h_row_stride,
        heads,
        chunks,
        C: tl.constexpr,
        K: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64)
        head = (block // chunks) % heads
        row, channel = tl.arange(0, C), tl.arange(0, K)
        vectors = block * C * K + row[:, None] * K + channel[None, :]
        keys = tl.load(k + vectors)
        state = tl.load(h + block * h_stride + channel[:, None] * h_row_stride + channel[None, :])
        weight = tl.load(weights + block * C * C + row[:, None] * C + row[None, :])
        decay = tl.load(from_start + block * C + row)[:, None]
        regularizer = tl.load(lam + head * K + channel)[None, :]

        # Rows in units of their norm; the largest entry first, so that squares cannot overflow.
        r = tl.load(b + vectors)
        peak = tl.maximum(tl.max(tl.abs(r), 1), tiny)
        r = r / peak[:, None]
        norm = tl.maximum(tl.sqrt(tl.sum(r * r, 1)), tiny)
        r = r / norm[:, None]
        p = r
        solution = tl.zeros_like(r)
        rr = tl.sum(r * r, 1)
        active = rr > threshold
        count = tl.zeros([C], dtype=tl.int32)
        step = 0
        remaining = tl.max(active.to(tl.int32), 0)
        while (step < max_steps) & (remaining > 0):
            inside = tl.dot(p, tl.trans(keys), input_precision="tf32x3") * weight
            a = tl.dot(inside, keys, input_precision="tf32x3")
            a += tl.dot(p, state, input_precision="tf32x3") * decay + regularizer * p
            curvature = tl.sum(p * a, 1)
            active = active & (curvature > 0)
            alpha = tl.where(active, rr / curvature, 0.0)[:, None]
            solution += alpha * p
            r -= alpha * a
            count += active.to(tl.int32)
            rr_next = tl.sum(r * r, 1)
            p = r + (rr_next / tl.maximum(rr, tiny))[:, None] * p
            rr = rr_next
            active = active & (rr > threshold)
            step += 1
            remaining = tl.max(active.to(tl.int32), 0)
        tl.store(x + vectors, solution * norm[:, None] * peak[:, None])
        tl.store(steps + block * C + row, count)
        tl.store(residual + block * C + row, tl.sqrt(rr))
