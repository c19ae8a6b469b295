# SPDX-License-Identifier: Apache-2.0
"""Reading a text of any length into a state, in constant memory."""

from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

# Characters read at a time; those at the end of what was read that wait for what follows, since it may change their
# tokens; and those before a piece that its tokenization sees as well, since some tokenizers treat the start of a text
# in their own way.
_READ, _MARGIN, _CONTEXT = 1 << 16, 1 << 10, 1 << 8


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
    the end of the text is dropped.

    Args:
        text: a file opened for reading text.
        chunk_tokens: tokens a forward pass, at least 1; memory grows with it.
        progress: called with each piece of text once it is read from the file.

    Returns:
        The state of one sequence, None where the text has no tokens.
    """
    state, waiting = None, []

    def feed(ids: list[int]) -> Cache:
        input_ids = torch.tensor([ids], device=model.device)
        return model(input_ids, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values

    with torch.no_grad():
        for ids in stream_tokens(tokenizer, text, progress):
            waiting += ids
            while len(waiting) >= chunk_tokens:
                state, waiting = feed(waiting[:chunk_tokens]), waiting[chunk_tokens:]
        return feed(waiting) if waiting else state


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
        last = next(
            (
                index
                for index in range(len(ids) - 1, first, -1)
                if starts[index] <= len(buffer) - _MARGIN and words[index] != words[index - 1]
            ),
            first,
        )
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
