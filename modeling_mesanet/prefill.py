# SPDX-License-Identifier: Apache-2.0
"""Reading tokens, or a text, of any length into a state, in constant memory."""

from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .decode_graph import DecodeGraph, recordable_composition
from .modeling_mesanet import MesaNetForCausalLM

# Characters read at a time; those at the end of what was read that wait for what follows, since it may change their
# tokens; and those before a piece that its tokenization sees as well, since some tokenizers treat the start of a text
# in their own way.
_READ, _MARGIN, _CONTEXT = 1 << 16, 1 << 10, 1 << 8
# Characters without a place to cut between words, from which on a cut goes through a word: to tokenize all that waits
# with every piece that is read would take longer and longer.
_LONGEST_WORD = 1 << 16
# Tokens of a chunk from which on a GPU is busy for about as long as the processor takes to launch its kernels.
_LARGEST_GRAPH = 1 << 12


def read_tokens(
    model: PreTrainedModel, input_ids: torch.LongTensor, *, state: Cache | None = None, chunk_tokens: int = 2048
) -> Cache | None:
    """The state of `model` after tokens, read chunk by chunk, without gradients.

    On a GPU, chunks of up to 4,096 tokens are from the third on one CUDA graph: they would wait for the processor.

    Args:
        model: a `MesaNetForCausalLM`, or what wraps one.
        input_ids: `[B, T]`, without pads, on any device.
        state: what to go on from, updated in place; None starts anew.
        chunk_tokens: tokens of each sequence in a forward pass, at least 1; memory grows with it.

    Returns:
        The state, for `past_key_values` and `save_state`; `state` itself if T is 0.

    Raises:
        ValueError: an argument is out of range or misshapen, or `model` is in training mode. `state` is then
            untouched.
    """
    if not torch.is_tensor(input_ids) or input_ids.ndim != 2:
        found = f"of shape {tuple(input_ids.shape)}" if torch.is_tensor(input_ids) else type(input_ids).__name__
        raise ValueError(f"input_ids is {found}; give a tensor [batch, tokens].")
    read = chunk_reader(model, chunk_tokens)
    for chunk in input_ids.split(chunk_tokens, dim=1) if input_ids.shape[1] else ():
        state = read(chunk, state)
    return state


def chunk_reader(model: PreTrainedModel, chunk_tokens: int) -> Callable[[torch.LongTensor, Cache | None], Cache]:
    """What reads a chunk `[B, T]` into a state: a new one, or the one given, in place."""
    if type(chunk_tokens) is not int or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens!r}; give a whole number of at least 1.")
    if model.training:  # where it starts no cache
        raise ValueError("model is in training mode; call model.eval() first.")
    made_of = recordable_composition(model) if isinstance(model, MesaNetForCausalLM) else None
    # A graph of this reader's own, so that its memory is given back with it.
    graph = model if made_of is None else DecodeGraph(model, made_of, chunk_tokens)

    @torch.no_grad()
    def read(chunk: torch.LongTensor, state: Cache | None) -> Cache:
        chunk = chunk.to(model.device)
        forward = graph if chunk.numel() <= _LARGEST_GRAPH else model
        return forward(input_ids=chunk, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values

    return read


def prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextIO,
    *,
    chunk_tokens: int = 2048,
    progress: Callable[[str], None] = lambda piece: None,
) -> Cache | None:
    """The state of `model` after a text, read piece by piece.

    The tokens are those that `tokenizer(whole_text)` makes, special tokens at the beginning included; one newline at
    the end of the text is dropped. (Words of more than 65,536 characters may be tokenized in pieces.)

    Args:
        text: a file opened for reading text.
        chunk_tokens: as in `read_tokens`.
        progress: called with each piece of text once it is read from the file.

    Returns:
        The state of one sequence, None where the text has no tokens.
    """
    read, state, waiting = chunk_reader(model, chunk_tokens), None, []
    for ids in stream_tokens(tokenizer, text, progress):
        waiting += ids
        while len(waiting) >= chunk_tokens:
            chunk, waiting = waiting[:chunk_tokens], waiting[chunk_tokens:]
            state = read(torch.tensor([chunk]), state)
    return read(torch.tensor([waiting]), state) if waiting else state


def stream_tokens(
    tokenizer: PreTrainedTokenizerBase, text: TextIO, progress: Callable[[str], None] = lambda piece: None
) -> Iterator[list[int]]:
    """The tokens of a text in lists, as `tokenizer` would make them of the whole; arguments as in `prefill`.

    Pieces end where a word (a piece that the tokenizer never joins to its neighbours) begins. Needs a tokenizer that
    tells offsets, which all but those in pure Python do.
    """
    # `buffer` holds some context, then from `cut` on what is not given out yet.
    buffer, cut, leading = "", 0, leading_tokens(tokenizer)
    while True:
        piece = text.read(_READ)
        progress(piece)
        buffer += piece
        if not piece:
            buffer = buffer.removesuffix("\n").removesuffix("\r")
        encoding = tokenizer(buffer, add_special_tokens=False, return_offsets_mapping=True)
        ids, words = encoding["input_ids"], encoding.word_ids()
        starts = [start for start, _ in encoding["offset_mapping"]]
        first = next((index for index, start in enumerate(starts) if start >= cut), len(ids))
        if cut and first < len(ids) and starts[first] != cut:  # in this context another token lies across the cut
            buffer, cut = buffer[cut:], 0
            encoding = tokenizer(buffer, add_special_tokens=False, return_offsets_mapping=True)
            ids, words, first = encoding["input_ids"], encoding.word_ids(), 0
            starts = [start for start, _ in encoding["offset_mapping"]]
        if not piece:
            if ids[first:]:
                yield leading + ids[first:]
            return
        settled = [index for index in range(first + 1, len(ids)) if starts[index] <= len(buffer) - _MARGIN]
        last = next((index for index in reversed(settled) if words[index] != words[index - 1]), first)
        if last == first and len(buffer) - cut > _LONGEST_WORD:
            # Some tokens are parts of characters; not between these.
            ends = [end for _, end in encoding["offset_mapping"]]
            last = next((index for index in reversed(settled) if ends[index - 1] <= starts[index]), first)
        if last > first:
            yield leading + ids[first:last]
            leading, position = [], starts[last]
            kept = max(0, position - _CONTEXT)
            buffer, cut = buffer[kept:], position - kept


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as the beginning-of-text token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)
    return whole[:start]
