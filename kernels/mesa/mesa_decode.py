# SPDX-License-Identifier: Apache-2.0
"""One token of the Mesa layer in plain torch, updating its states in place."""

import torch

from .mesa_cpu_decode import solve
from .mesa_library import NAMESPACE
from .mesa_solver import conjugate_gradient, full_precision


def decode_step(
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
    output_stats: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Update `h`, `g` with one token and read the output from them.

    All floating tensors share one dtype; q, k `[B, H, K]`, v `[B, H, V]`, gates `[B, H]`, `h` `[B, H, K, K]` and `g`
    `[B, H, K, V]` are changed in place.

    Returns:
        o `[B, H, V]`, and, where they are wanted, steps (int32) and relative residual `[B, H]`.
    """
    with full_precision(q.device):
        gamma = log_gamma.exp()[..., None, None]
        weighted_key = (beta.unsqueeze(-1) * k).unsqueeze(-1)
        h.mul_(gamma).addcmul_(weighted_key, k.unsqueeze(-2))
        g.mul_(gamma).addcmul_(weighted_key, v.unsqueeze(-2))
        if max_steps == 0:
            x, steps, residual = q, torch.zeros_like(beta, dtype=torch.int32), torch.zeros_like(beta)
        elif q.device.type == "cpu":
            x, steps, residual = solve(h, lam, q, max_steps, tolerance)
            x = torch.from_numpy(x)
        else:
            # One system a sequence and head, in one dimension: the plain batched product has the least overhead.
            matrices = h.flatten(0, 1)
            diagonal = lam.expand_as(q).reshape(-1, 1, lam.shape[-1])
            x, steps, residual = conjugate_gradient(
                lambda p: torch.bmm(p, matrices).addcmul_(p, diagonal),
                q.reshape(-1, 1, q.shape[-1]),
                max_steps=max_steps,
                tolerance=tolerance,
            )
        o = torch.matmul(x.view_as(q).unsqueeze(-2), g).squeeze(-2)
        if not output_stats:
            return o, None, None
        steps = torch.as_tensor(steps, dtype=torch.int32).view(beta.shape)
        return o, steps, torch.as_tensor(residual, dtype=beta.dtype).view(beta.shape)


@torch.library.custom_op(f"{NAMESPACE}::decode_step", mutates_args=("h", "g"))
def decode_step_op(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decode_step` with statistics, as compiled and exported graphs hold it.

    Eager decoding calls the function itself, which spares the dispatch of a Python operator for every token and layer.
    """
    return decode_step(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance)


@decode_step_op.register_fake
def _(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance):
    return torch.empty_like(v), torch.empty_like(beta, dtype=torch.int32), torch.empty_like(beta)
