# SPDX-License-Identifier: Apache-2.0
"""The chunkwise Mesa layer in plain torch: forward, implicit gradients, and their registration as torch operators.

A sequence is cut into chunks of C tokens. States exist only at chunk boundaries (memory grows with T/C states, not T);
inside a chunk, products with `H_t` and `G_t` are two dense products and a masked one for all tokens at once:

    H_t p = zeta_t0 H_c p + sum_{s <= t} W_ts (k_s . p) k_s,    W_ts = zeta_ts beta_s

where `H_c` is the state before the chunk and `zeta_ts` the product of the gammas after s up to t. The forward and the
backward pass are opaque operators, so that the data-dependent number of solver steps and the precision settings
survive `torch.compile`, and the graph of a model holds one node a layer.

Dimensions: B batch, S sequences, T tokens, H heads, K key size, V value size, C chunk size, N chunks a line, L lines.
"""

from itertools import pairwise

import torch

from .mesa_library import NAMESPACE, OPERATORS
from .mesa_solver import conjugate_gradient, full_precision

# Chunks whose states are computed from each other in one product; groups follow one another in a loop.
SCAN_GROUP = 64

# On a CPU, chunks are solved in blocks of about so many entries a vector: a block's vectors then stay in the cache
# from step to step, and a block ends with its own slowest token.
CPU_BLOCK_ENTRIES = 1 << 17


class ChunkLayout:
    """Where each token lies among the chunks, for equal-length rows (`cu_seqlens` None) and for packed sequences.

    Chunks stand in L lines of N: one line a row of the batch, or a single line with all packed sequences one after the
    other. Every sequence starts a chunk of its own and is padded to whole chunks with identity updates (`beta = 0`,
    `log_gamma = 0`), so that nothing inside a chunk needs to know about boundaries.

    Attributes:
        sequences, firsts, lasts: for each sequence that has tokens: its index, its first and its last chunk, counted
            through all lines.
    """

    def __init__(
        self, batch: int, length: int, chunk_size: int, cu_seqlens: torch.Tensor | None, device: torch.device
    ):
        self.lines, self.length, self.chunk_size = batch, length, chunk_size
        if cu_seqlens is None:
            self.gather = None
            self.chunks_per_line = max(1, -(-length // chunk_size))  # no tokens: one chunk of pads
            self.sequences = torch.arange(batch if length else 0, device=device)
            self.firsts = self.sequences * self.chunks_per_line
            self.lasts = self.firsts + self.chunks_per_line - 1
            return
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        counts = torch.tensor([-(-n // chunk_size) for n in lengths], dtype=torch.long)
        ends = counts.cumsum(0)
        firsts = ends - counts
        self.chunks_per_line = max(1, int(ends[-1]))
        # Row `length` of the source is a zero row: the pad.
        gather = torch.full((self.chunks_per_line * chunk_size,), length, dtype=torch.long)
        for start, n, first in zip(bounds[:-1], lengths, firsts.tolist(), strict=True):
            gather[first * chunk_size : first * chunk_size + n] = torch.arange(start, start + n)
        self.scatter = torch.argsort(gather, stable=True)[:length].to(device)
        self.gather = gather.to(device)
        used = counts > 0
        self.sequences = used.nonzero().flatten().to(device)
        self.firsts, self.lasts = firsts[used].to(device), (ends - 1)[used].to(device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, D]` to chunks `[L, H, N, C, D]`, contiguous."""
        heads, dim = x.shape[2:]
        if self.gather is None:
            pad = self.chunks_per_line * self.chunk_size - self.length
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad))
        else:
            x = torch.cat([x[0], x.new_zeros(1, heads, dim)]).index_select(0, self.gather)
        x = x.reshape(self.lines, self.chunks_per_line, self.chunk_size, heads, dim)
        return x.permute(0, 3, 1, 2, 4).contiguous()

    def join(self, chunks: torch.Tensor) -> torch.Tensor:
        """Chunks `[L, H, N, C, D]` back to `[B, T, H, D]`."""
        heads, dim = chunks.shape[1], chunks.shape[-1]
        x = chunks.permute(0, 2, 3, 1, 4).reshape(self.lines, self.chunks_per_line * self.chunk_size, heads, dim)
        return x[:, : self.length].contiguous() if self.gather is None else x[:, self.scatter]

    def scan(
        self, updates: torch.Tensor, log_decay: torch.Tensor, initial: torch.Tensor, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `state <- exp(log_decay_n) * state + updates_n` over the chunks of every sequence.

        Args:
            updates: `[L, H, N, K, D]`.
            log_decay: `[L, H, N]`, the log of each chunk's product of gammas.
            initial: `[S, H, K, D]`.
            reverse: from the last chunk to the first (the adjoint recurrence).

        Returns:
            The state each chunk receives, `[L, H, N, K, D]`, and the last state of every sequence, `[S, H, K, D]`.
        """
        firsts, lasts = (self.lasts, self.firsts) if reverse else (self.firsts, self.lasts)
        line, chunk = firsts // self.chunks_per_line, firsts % self.chunks_per_line
        starting = initial[self.sequences]
        # A sequence's first chunk takes nothing from its neighbour in the line: its decay becomes 0, and what is left
        # of the initial state is part of its update.
        updates, log_first = updates.clone(), log_decay[line, :, chunk]
        updates[line, :, chunk] += log_first.exp()[..., None, None] * starting
        log_decay = log_decay.clone()
        log_decay[line, :, chunk] = -torch.inf
        if reverse:
            updates, log_decay = updates.flip(2), log_decay.flip(2)
        after = torch.empty_like(updates)
        carry = torch.zeros_like(updates[:, :, 0])
        for group in range(0, self.chunks_per_line, SCAN_GROUP):
            span = slice(group, group + SCAN_GROUP)
            decay, decay_from_start = decay_factors(log_decay[:, :, span])
            part = torch.matmul(decay, updates[:, :, span].flatten(3)).unflatten(-1, updates.shape[3:])
            after[:, :, span] = part.addcmul_(decay_from_start[..., None, None], carry.unsqueeze(2))
            carry = after[:, :, span][:, :, -1]
        if reverse:
            after = after.flip(2)
        received = after.roll(-1 if reverse else 1, dims=2)
        received[line, :, chunk] = starting
        final = initial.clone()
        final[self.sequences] = after[lasts // self.chunks_per_line, :, lasts % self.chunks_per_line]
        return received, final


def decay_factors(log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of decays over all spans, from their logs `[..., n]`.

    Sums are accumulated span by span: differences of one running sum would cancel under strong forgetting and be NaN
    for a decay of exactly 0.

    Returns:
        `[..., n, n]`, at (t, s) the product of the decays after s up to t, for s <= t, else 0; and `[..., n]`, the
        product up to and including t.
    """
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    spans = torch.where(later, log_decay.unsqueeze(-1), 0).cumsum(-2)
    return spans.exp_().tril_(), log_decay.cumsum(-1).exp_()


class ChunkFactors:
    """The decay factors inside every chunk, from the log forget gates `[L, H, N, C]`.

    Attributes:
        zeta: `[L, H, N, C, C]`, `zeta_ts` for s <= t, else 0.
        from_start: `[L, H, N, C, 1]`, decay from the state before the chunk to each token.
        to_end: `[L, H, N, C, 1]`, decay from each token to the end of the chunk.
        log_whole, whole: `[L, H, N]`, decay across the chunk.
    """

    def __init__(self, log_gamma: torch.Tensor):
        self.zeta, from_start = decay_factors(log_gamma)
        self.from_start = from_start.unsqueeze(-1)
        self.to_end = self.zeta[..., -1, :].unsqueeze(-1)
        self.log_whole, self.whole = log_gamma.sum(-1), from_start[..., -1]


def chunk_states(layout, factors, k, v, beta, initial_h, initial_g):
    """States before each chunk, `H` `[L, H, N, K, K]` and `G` `[L, H, N, K, V]`, and the final states."""
    weighted_key = (k * (beta * factors.to_end)).transpose(-1, -2)
    updates = torch.matmul(weighted_key, torch.cat([k, v], dim=-1))
    received, final = layout.scan(updates, factors.log_whole, torch.cat([initial_h, initial_g], dim=-1))
    sizes = [k.shape[-1], v.shape[-1]]
    # Copied even where a split is contiguous already: an operator's outputs must not alias one another.
    copies = (state.clone(memory_format=torch.contiguous_format) for state in final.split(sizes, dim=-1))
    return *received.split(sizes, dim=-1), *copies


def final_states(
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states after the last token alone, in one sum over all tokens; arguments as in `chunkwise`."""
    log_decay = log_gamma.flip(1).cumsum(1).flip(1)  # from before each token to the end
    after = torch.nn.functional.pad(log_decay[:, 1:], (0, 0, 0, 1))
    with full_precision(k.device):
        weighted_key = (k * (beta * after.exp()).unsqueeze(-1)).permute(0, 2, 3, 1)
        h, g = (torch.matmul(weighted_key, rows.transpose(1, 2)) for rows in (k, v))
    if initial_h is not None:
        decay = log_gamma.sum(1)[..., None, None].exp()
        h, g = h.addcmul_(decay, initial_h), g.addcmul_(decay, initial_g)
    return h, g


def chunk_solve(b, k, h, lam, factors, weights, max_steps, tolerance):
    """Solve `(H_t + Lambda) x_t = b_t` for every token of every chunk; `b` `[L, H, N, C, K]`."""
    lam = lam[:, None, None, :].expand(*b.shape[:3], 1, -1)
    tensors = [tensor.flatten(0, 2) for tensor in (b, k, h, lam, factors.from_start, weights)]
    size = len(tensors[0]) if b.device.type != "cpu" else max(1, CPU_BLOCK_ENTRIES // (b.shape[-2] * b.shape[-1]))
    blocks = [
        solve_block(*block, max_steps, tolerance)
        for block in zip(*(tensor.split(max(size, 1)) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(part).unflatten(0, b.shape[:3]) for part in zip(*blocks, strict=True))


def solve_block(b, k, h, lam, from_start, weights, max_steps, tolerance):
    """The same for M chunks and heads in one dimension: `b`, `k` `[M, C, K]`, `h` `[M, K, K]`, `lam` `[M, 1, K]`."""
    key_transposed = k.transpose(-1, -2)

    def matvec(p: torch.Tensor) -> torch.Tensor:
        before = torch.bmm(p * from_start, h)
        return before.baddbmm_(torch.bmm(p, key_transposed).mul_(weights), k).addcmul_(p, lam)

    return conjugate_gradient(matvec, b, max_steps=max_steps, tolerance=tolerance)


def initial_states(initial_h, initial_g, sequences, k, v):
    heads, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    if initial_h is None:
        initial_h = k.new_zeros(sequences, heads, key_dim, key_dim)
        initial_g = k.new_zeros(sequences, heads, key_dim, value_dim)
    return initial_h, initial_g


def num_sequences(k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.custom_op(f"{NAMESPACE}::chunkwise", mutates_args=())
def chunkwise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
    backward_max_steps: int,
    backward_tolerance: float | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward pass; all floating tensors share one dtype, float32 or float64.

    Returns:
        o `[B, T, H, V]`, final states `[S, H, K, K]` and `[S, H, K, V]`, the solutions x `[B, T, H, K]`, and per token
        the solver's steps (int32) and relative residual, `[B, T, H]`.
    """
    with full_precision(q.device):
        layout = ChunkLayout(*q.shape[:2], chunk_size, cu_seqlens, q.device)
        initial_h, initial_g = initial_states(initial_h, initial_g, num_sequences(k, cu_seqlens), k, v)
        qc, kc, vc = layout.split(q), layout.split(k), layout.split(v)
        beta_c, factors = (
            layout.split(beta.unsqueeze(-1)),
            ChunkFactors(layout.split(log_gamma.unsqueeze(-1)).squeeze(-1)),
        )
        h, g, final_h, final_g = chunk_states(layout, factors, kc, vc, beta_c, initial_h, initial_g)
        weights = factors.zeta * beta_c.transpose(-1, -2)
        if max_steps == 0:
            x = qc.clone()  # an operator's output must not alias its input
            steps = torch.zeros(qc.shape[:-1], dtype=torch.int32, device=q.device)
            residual = torch.zeros_like(qc[..., 0])
        else:
            x, steps, residual = chunk_solve(qc, kc, h, lam, factors, weights, max_steps, tolerance)
        o = torch.matmul(torch.matmul(x, kc.transpose(-1, -2)) * weights, vc).addcmul_(
            torch.matmul(x, g), factors.from_start
        )
        steps, residual = (layout.join(stat.unsqueeze(-1)).squeeze(-1) for stat in (steps, residual))
        return layout.join(o), final_h, final_g, layout.join(x), steps, residual


@chunkwise.register_fake
def _(q, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens, *options):
    sequences, (heads, key_dim), value_dim = num_sequences(k, cu_seqlens), q.shape[2:], v.shape[3]
    return (
        v.new_empty(v.shape),
        q.new_empty(sequences, heads, key_dim, key_dim),
        q.new_empty(sequences, heads, key_dim, value_dim),
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=torch.int32),
        q.new_empty(q.shape[:3]),
    )


@torch.library.custom_op(f"{NAMESPACE}::chunkwise_backward", mutates_args=())
def chunkwise_backward(
    grad_o: torch.Tensor | None,
    grad_final_h: torch.Tensor | None,
    grad_final_g: torch.Tensor | None,
    x: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gamma: torch.Tensor,
    beta: torch.Tensor,
    lam: torch.Tensor,
    initial_h: torch.Tensor | None,
    initial_g: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_steps: int,
    tolerance: float | None,
    chunk_size: int,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    r"""Implicit gradients: exact at the solution of the linear system, whatever path the solver took to it.

    With `e_t = dL/do_t` and the second solve `y_t = (H_t + Lambda)^{-1} G_t e_t`, the adjoints of the states are
    `dG_s = sum_{t >= s} zeta_ts x_t e_t^T` and `dH_s = -sum_{t >= s} zeta_ts y_t x_t^T` (plus the decayed gradient of
    the final states); everything below is an inner product with them, evaluated chunkwise.

    Returns:
        Gradients of q, k, v, log_gamma, beta, lam and of the two initial states.
    """
    with full_precision(k.device):
        layout = ChunkLayout(*k.shape[:2], chunk_size, cu_seqlens, k.device)
        initial_h, initial_g = initial_states(initial_h, initial_g, num_sequences(k, cu_seqlens), k, v)
        grad_final_h = torch.zeros_like(initial_h) if grad_final_h is None else grad_final_h
        grad_final_g = torch.zeros_like(initial_g) if grad_final_g is None else grad_final_g
        grad_o = torch.zeros_like(v) if grad_o is None else grad_o
        xc, kc, vc, e = layout.split(x), layout.split(k), layout.split(v), layout.split(grad_o)
        beta_c, factors = (
            layout.split(beta.unsqueeze(-1)),
            ChunkFactors(layout.split(log_gamma.unsqueeze(-1)).squeeze(-1)),
        )
        zeta, from_start, to_end = factors.zeta, factors.from_start, factors.to_end
        h, g, _, _ = chunk_states(layout, factors, kc, vc, beta_c, initial_h, initial_g)
        weights = zeta * beta_c.transpose(-1, -2)
        key_transposed, value_transposed = kc.transpose(-1, -2), vc.transpose(-1, -2)

        ev = torch.matmul(e, value_transposed)
        y = torch.matmul(ev * weights, kc).addcmul_(torch.matmul(e, g.transpose(-1, -2)), from_start)
        xk = torch.matmul(xc, key_transposed)
        solved = max_steps > 0
        if solved:
            y, _, _ = chunk_solve(y, kc, h, lam, factors, weights, max_steps, tolerance)
            yk = torch.matmul(y, key_transposed)
            decayed_y = (y * from_start).transpose(-1, -2)
            adjoint_h, grad_initial_h = layout.scan(
                torch.matmul(decayed_y, xc).neg_(), factors.log_whole, grad_final_h, reverse=True
            )
            grad_lam = -(xc * y).sum((0, 2, 3))
        else:  # x = q does not depend on H or Lambda, and y is the gradient of q itself
            yk = None
            adjoint_h, grad_initial_h = layout.scan(torch.zeros_like(h), factors.log_whole, grad_final_h, reverse=True)
            grad_lam = torch.zeros_like(lam)
        decayed_x = (xc * from_start).transpose(-1, -2)
        adjoint_g, grad_initial_g = layout.scan(
            torch.matmul(decayed_x, e), factors.log_whole, grad_final_g, reverse=True
        )

        # dG_s v_s and (dH_s + dH_s^T) k_s, without beta
        ev_zeta, xk_zeta = (ev * zeta).transpose(-1, -2), (xk * zeta).transpose(-1, -2)
        adjoint_g_v = torch.matmul(ev_zeta, xc).addcmul_(torch.matmul(vc, adjoint_g.transpose(-1, -2)), to_end)
        adjoint_h_k = torch.matmul(kc, adjoint_h + adjoint_h.transpose(-1, -2)) * to_end
        # (x_t . k_s) (e_t . v_s) - (x_t . k_s) (y_t . k_s), the common factor of the gate gradients
        gate = ev * xk
        if solved:
            adjoint_h_k -= torch.matmul(xk_zeta, y) + torch.matmul((yk * zeta).transpose(-1, -2), xc)
            gate -= xk * yk
        grad_k = adjoint_g_v + adjoint_h_k
        grad_v = torch.matmul(xk_zeta, e).addcmul_(torch.matmul(kc, adjoint_g), to_end)
        grad_beta = (kc * (adjoint_g_v + 0.5 * adjoint_h_k)).sum(-1, keepdim=True)

        # d log gamma_s = <dG_s, gamma_s G_{s-1}> + <dH_s, gamma_s H_{s-1}>, split by where the state and the output
        # come from: before the chunk or inside it, after the chunk or inside it. All terms are plain inner products:
        # the shorter running-sum identity cancels and loses a digit and more.
        crossing = (adjoint_g * g).sum((-1, -2)) + (adjoint_h * h).sum((-1, -2))
        into_later = (to_end * beta_c) * (
            (kc * torch.matmul(vc, adjoint_g.transpose(-1, -2))).sum(-1, keepdim=True)
            + (kc * torch.matmul(kc, adjoint_h)).sum(-1, keepdim=True)
        )
        from_earlier = (xc * torch.matmul(e, g.transpose(-1, -2))).sum(-1, keepdim=True)
        if solved:
            from_earlier -= (y * torch.matmul(xc, h)).sum(-1, keepdim=True)
        from_earlier = from_earlier * from_start
        inside = (gate * weights).cumsum(-1) - gate * weights  # exclusive over the source tokens
        grad_log_gamma = (
            (factors.whole * crossing)[..., None, None]
            + (into_later.cumsum(-2) - into_later)
            + from_earlier.flip(-2).cumsum(-2).flip(-2)
            + inside.tril().sum(-2).unsqueeze(-1)
        )

        grad_k = layout.join(grad_k * beta_c)
        grad_v = layout.join(grad_v * beta_c)
        grad_log_gamma, grad_beta = layout.join(grad_log_gamma).squeeze(-1), layout.join(grad_beta).squeeze(-1)
        return layout.join(y), grad_k, grad_v, grad_log_gamma, grad_beta, grad_lam, grad_initial_h, grad_initial_g


@chunkwise_backward.register_fake
def _(grad_o, grad_final_h, grad_final_g, x, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens, *options):
    sequences, (heads, key_dim), value_dim = num_sequences(k, cu_seqlens), k.shape[2:], v.shape[3]
    states = k.new_empty(sequences, heads, key_dim, key_dim), k.new_empty(sequences, heads, key_dim, value_dim)
    return (*(t.new_empty(t.shape) for t in (x, k, v, log_gamma, beta, lam)), *states)


def _setup_context(ctx, inputs, output):
    (_, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens, max_steps, _, *backward_options) = inputs
    x = output[3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(x, k, v, log_gamma, beta, lam, initial_h, initial_g, cu_seqlens)
    ctx.backward_max_steps, ctx.backward_tolerance, ctx.chunk_size = backward_options
    ctx.solved = max_steps > 0


def _backward(ctx, grad_o, grad_final_h, grad_final_g, *_):
    max_steps = ctx.backward_max_steps if ctx.solved else 0
    saved = ctx.saved_tensors  # once: gradient checkpointing forbids unpacking a tensor twice
    grads = OPERATORS.chunkwise_backward(
        *(None if grad is None else grad.contiguous() for grad in (grad_o, grad_final_h, grad_final_g)),
        *saved,
        max_steps,
        ctx.backward_tolerance,
        ctx.chunk_size,
    )
    has_initial_state = saved[6] is not None
    return (*grads[:6], *(grads[6:] if has_initial_state else (None, None)), *[None] * 6)


chunkwise.register_autograd(_backward, setup_context=_setup_context)
