# SPDX-License-Identifier: Apache-2.0
"""One token of the Mesa layer in plain torch, updating its states in place; and a few tokens on a CPU."""

import torch

from .mesa_cpu_decode import solve
from .mesa_library import NAMESPACE
from .mesa_solver import conjugate_gradient, full_precision

# On a CPU, tokens up to which `decode_tokens` is faster than the chunkwise form, of which calls take the time; and the
# entries of all tokens' matrices up to which it may hold them.
FEW_TOKENS, FEW_ENTRIES = 12, 2**21


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


def decodes_tokens(q: torch.Tensor) -> bool:
    """Whether `decode_tokens` takes queries like `q` `[B, T, H, K]`: few of them, on a CPU, which no compiler sees."""
    if q.device.type != "cpu" or type(q) is not torch.Tensor:
        return False
    # A trace would keep as a constant what NumPy solves.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return 0 < q.shape[1] <= FEW_TOKENS and 0 < q.numel() * q.shape[-1] <= FEW_ENTRIES


def decode_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The states of T tokens one after the other, then all their systems in one solve; without gradients.

    Arguments as of `mesa_chunkwise.chunkwise`, all in one dtype.

    Returns:
        o `[B, T, H, V]`, the states after the last token, and per token the solver's steps (int32) and relative
        residual, `[B, T, H]`.
    """
    batch, length, heads, key_dim = q.shape
    with full_precision(q.device):
        q, k, v, log_gamma, beta = (tensor.transpose(0, 1) for tensor in (q, k, v, log_gamma, beta))
        gamma = log_gamma.exp()[..., None, None]
        weighted_key = (beta.unsqueeze(-1) * k).unsqueeze(-1)
        states = []
        for before, columns in ((initial_h, k), (initial_g, v)):
            after = k.new_empty(length, batch, heads, key_dim, columns.shape[-1])
            if before is None:
                before = torch.zeros_like(after[0])
            for t in range(length):
                before = torch.mul(before, gamma[t], out=after[t]).addcmul_(weighted_key[t], columns[t].unsqueeze(-2))
            states.append(after)
        h, g = states
        if max_steps == 0:
            x, steps, residual = q, torch.zeros_like(beta, dtype=torch.int32), torch.zeros_like(beta)
        else:
            x, steps, residual = solve(h.flatten(0, 1), lam, q.flatten(0, 1), max_steps, tolerance)
            x = torch.from_numpy(x)
            steps = torch.tensor(steps, dtype=torch.int32).view(beta.shape)
            residual = torch.tensor(residual, dtype=beta.dtype).view(beta.shape)
        o = torch.matmul(x.reshape(length, batch, heads, 1, key_dim), g).squeeze(-2)
        # Copies, which do not hold the states of all tokens.
        final = h[-1].clone(), g[-1].clone()
        return o.transpose(0, 1).contiguous(), *final, steps.transpose(0, 1), residual.transpose(0, 1)
