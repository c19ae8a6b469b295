# SPDX-License-Identifier: Apache-2.0
"""One token of the Mesa layer in plain torch, updating its states in place."""

import torch

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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Update `h`, `g` with one token and read the output from them.

    All floating tensors share one dtype; q, k `[B, H, K]`, v `[B, H, V]`, gates `[B, H]`, `h` `[B, H, K, K]` and `g`
    `[B, H, K, V]` are changed in place.

    Returns:
        o `[B, H, V]`, steps (int32) and relative residual `[B, H]`.
    """
    with full_precision(q.device):
        gamma = log_gamma.exp()[..., None, None]
        weighted_key = (beta.unsqueeze(-1) * k).unsqueeze(-1)
        h.mul_(gamma).addcmul_(weighted_key, k.unsqueeze(-2))
        g.mul_(gamma).addcmul_(weighted_key, v.unsqueeze(-2))
        b = q.unsqueeze(-2)
        if max_steps == 0:
            x = b
            steps = torch.zeros(q.shape[:-1], dtype=torch.int32, device=q.device)
            residual = torch.zeros_like(beta)
        else:
            # One system a sequence and head, in one dimension: the plain batched product has the least overhead.
            matrices = h.flatten(0, 1)
            diagonal = lam.expand_as(q).reshape(-1, 1, lam.shape[-1])
            x, steps, residual = conjugate_gradient(
                lambda p: torch.bmm(p, matrices).addcmul_(p, diagonal),
                b.flatten(0, 1),
                max_steps=max_steps,
                tolerance=tolerance,
            )
            x, steps, residual = x.view_as(b), steps.view_as(beta), residual.view_as(beta)
        return torch.matmul(x, g).squeeze(-2), steps, residual


# The operator that compiled and exported graphs hold; eager decoding calls the function itself, which spares the
# dispatch of a Python operator for every token and layer.
decode_step_op = torch.library.custom_op(f"{NAMESPACE}::decode_step", decode_step, mutates_args=("h", "g"))


@decode_step_op.register_fake
def _(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance):
    return torch.empty_like(v), torch.empty_like(beta, dtype=torch.int32), torch.empty_like(beta)
