# SPDX-License-Identifier: Apache-2.0
"""Taking tokens back from a recurrent state: a snapshot, and a tape of what was consumed since.

A state does not contain its past, so that drafted tokens which the model rejects cannot be removed from it. The tape
keeps what each token wrote (its key, value and gates) and what the convolutions read; replayed on the snapshot up to
any token, it gives the state after that token. No linear system is solved again: the states do not depend on it.

Dimensions: B batch, T tokens, H heads, K key size, V value size, W convolution width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .mesa import PadOrder, mesa_states

# Tokens that can be taken back. Far more than any draft, and few enough that the tape of a long prompt, which is read
# in the same pass as the first draft, stays smaller than the activations of that pass.
LONGEST_TAPE = 1024

# Of the tokens that stayed when others were taken back, at least so many can still be, and at most twice as many are
# kept: where the assistant has another tokenizer, transformers tokenizes the last ones anew.
KEPT_TOKENS = 64


class Consumed(NamedTuple):
    """What a layer read of T tokens: `conv_inputs` `[B, T, channels]` a convolution, the convolved `k` `[B, T, H, K]`
    and `v` `[B, T, H, V]`, `log_gamma` and `beta` `[B, T, H]`, `mask` bool `[B, T]` (False for pads) or None.
    """

    conv_inputs: list[torch.Tensor]
    k: torch.Tensor
    v: torch.Tensor
    log_gamma: torch.Tensor
    beta: torch.Tensor
    mask: torch.Tensor | None


class StateTape:
    """The last tokens of a layer and its states before them.

    Args:
        conv_states: one `[B, channels, W - 1]` a convolution; not copied.
        recurrent_states: `(H, G)`, or None for zeros; not copied.
        backend: as in `mesa_attention`.
    """

    def __init__(
        self,
        conv_states: list[torch.Tensor],
        recurrent_states: tuple[torch.Tensor, torch.Tensor] | None,
        backend: str | None = None,
    ):
        self.conv_states, self.recurrent_states, self.backend = conv_states, recurrent_states, backend
        self.pieces: list[Consumed] = []
        self.tokens = 0  # on the tape; counted, since there may be thousands of pieces of one token
        # Of a tape that a CUDA graph writes anew at every pass: takes all but the first tokens back, in all layers.
        self.take_back: Callable[[int], None] | None = None

    @torch.no_grad()
    def append(self, consumed: Consumed) -> None:
        """Take `consumed` on; of a tape grown far too long, the oldest tokens go into the snapshot for good."""
        self.pieces.append(_sliced(consumed, slice(None), torch.Tensor.detach))
        self.tokens += consumed.k.shape[1]
        excess = self.tokens - LONGEST_TAPE
        # Not at every token: moving the snapshot replays the tape.
        if excess > LONGEST_TAPE or consumed.k.shape[1] > LONGEST_TAPE:
            self.settle(excess)

    @torch.no_grad()
    def settle(self, tokens: int) -> None:
        """Let the first `tokens` tokens go into the snapshot for good; not all of them."""
        whole = self._joined()
        self.conv_states, self.recurrent_states = self.states_after(tokens)
        # Copies, for a view of the last tokens would keep all of them.
        self.pieces = [_sliced(whole, slice(tokens, None), torch.clone)]
        self.tokens -= tokens

    def cut(self, tokens: int) -> None:
        """Keep the first `tokens` tokens alone."""
        if tokens < self.tokens:
            self.pieces = [_sliced(self._joined(), slice(tokens))] if tokens else []
            self.tokens = tokens

    def extend(self, tape: "StateTape") -> None:
        """Take on the tokens of `tape`, which begins where this one ends."""
        self.pieces += tape.pieces
        self.tokens += tape.tokens

    @torch.no_grad()
    def states_after(
        self, tokens: int | torch.Tensor
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        """Convolution and recurrent states after the first `tokens` tokens of the tape, in the form they came in.

        Of a tape without pads `tokens` may be a zero-dimensional tensor, whose value a CUDA graph reads anew.
        """
        if torch.is_tensor(tokens):
            first = _masked(self._joined(), tokens)
        elif tokens == 0:
            return self.conv_states, self.recurrent_states
        else:
            first = _sliced(self._joined(), slice(tokens))
        memory = self.conv_states[0].shape[-1]
        pads = None if first.mask is None else PadOrder(first.mask, memory)
        conv_states = []
        for state, x in zip(self.conv_states, first.conv_inputs, strict=True):
            inputs = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=-1)
            if torch.is_tensor(tokens):
                remembered = inputs.index_select(-1, tokens + torch.arange(memory, device=tokens.device))
            else:
                remembered = (inputs if pads is None else pads.sort(inputs))[..., -memory:]
            conv_states.append(remembered)
        state = mesa_states(
            first.k,
            first.v,
            first.log_gamma,
            first.beta,
            initial_state=self.recurrent_states,
            backend=self.backend,
        )
        return conv_states, state

    def _joined(self) -> Consumed:
        if len(self.pieces) == 1:
            return self.pieces[0]
        masks = [piece.mask for piece in self.pieces]
        if any(mask is not None for mask in masks):
            masks = [
                torch.ones(piece.k.shape[:2], dtype=torch.bool, device=piece.k.device) if mask is None else mask
                for piece, mask in zip(self.pieces, masks, strict=True)
            ]
        else:
            masks = None
        return Consumed(
            [torch.cat(inputs, dim=1) for inputs in zip(*(piece.conv_inputs for piece in self.pieces), strict=True)],
            *(torch.cat([getattr(piece, name) for piece in self.pieces], dim=1) for name in Consumed._fields[1:5]),
            None if masks is None else torch.cat(masks, dim=1),
        )


def _sliced(consumed: Consumed, tokens: slice, copy=lambda x: x) -> Consumed:
    return Consumed(
        [copy(x[:, tokens]) for x in consumed.conv_inputs],
        *(None if x is None else copy(x[:, tokens]) for x in consumed[1:]),
    )


def _masked(consumed: Consumed, tokens: torch.Tensor) -> Consumed:
    """`consumed` with all but the first `tokens` tokens made pads, which neither write nor forget."""
    left = (torch.arange(consumed.k.shape[1], device=tokens.device) < tokens)[:, None]
    zero = consumed.beta.new_zeros(())
    return consumed._replace(log_gamma=consumed.log_gamma.where(left, zero), beta=consumed.beta.where(left, zero))
