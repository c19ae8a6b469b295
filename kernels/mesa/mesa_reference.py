# SPDX-License-Identifier: Apache-2.0
"""The Mesa layer as it is defined: a recurrence over tokens and a dense solve a token, in float64.

This is the oracle that every other path is tested against, outputs, final states and (through autograd) gradients. It
reads like the equations and is far too slow for anything else.
"""

from itertools import pairwise

import torch

from .mesa_solver import l2_normalize


def mesa_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    *,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalize_qk: bool = True,
    solve: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""Output and final state of the Mesa layer, token by token.

    .. math::
        H_t = \gamma_t H_{t-1} + \beta_t k_t k_t^T, \quad G_t = \gamma_t G_{t-1} + \beta_t k_t v_t^T, \quad
        o_t = G_t^T (H_t + \Lambda)^{-1} q_t

    (equations 7 to 9 of arXiv 2506.05233). Arguments are those of `mesa_attention`; every tensor is converted to
    `dtype`.

    Args:
        solve: False leaves the solver out, `x_t = q_t` (gated linear attention).
        dtype: the precision to compute in; float64 makes it the oracle.

    Returns:
        `o` `[B, T, H, V]` and the final state (`[S, H, K, K]`, `[S, H, K, V]`), S the number of sequences, in `dtype`.
    """
    q, k, v, log_gamma, beta, lam = (tensor.to(dtype) for tensor in (q, k, v, log_gamma, beta, lam))
    if normalize_qk:
        q, k = l2_normalize(q), l2_normalize(k)
    batch, length, heads, key_dim = k.shape
    if cu_seqlens is None:
        spans = [(row, 0, length) for row in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in pairwise(bounds)]

    outputs, final_h, final_g = [], [], []
    for sequence, (row, start, end) in enumerate(spans):
        if initial_state is None:
            h = k.new_zeros(heads, key_dim, key_dim)
            g = k.new_zeros(heads, key_dim, v.shape[-1])
        else:
            h, g = (state[sequence].to(dtype) for state in initial_state)
        for t in range(start, end):
            gamma = log_gamma[row, t].exp()[:, None, None]
            weighted_key = beta[row, t][:, None, None] * k[row, t][:, :, None]
            h = gamma * h + weighted_key * k[row, t][:, None, :]
            g = gamma * g + weighted_key * v[row, t][:, None, :]
            x = torch.linalg.solve(h + torch.diag_embed(lam), q[row, t]) if solve else q[row, t]
            outputs.append(torch.einsum("hkv,hk->hv", g, x))
        final_h.append(h)
        final_g.append(g)
    o = torch.stack(outputs).reshape(batch, length, heads, v.shape[-1]) if outputs else torch.zeros_like(v)
    return o, (torch.stack(final_h), torch.stack(final_g))
