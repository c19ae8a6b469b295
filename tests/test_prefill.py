# SPDX-License-Identifier: Apache-2.0
"""Reading long texts: the tokens of the whole text, in constant memory."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from modeling_mesanet import bundled_checkpoint, prefill
from modeling_mesanet.prefill import leading_tokens, stream_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_checkpoint())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for name, size in (("_READ", 40), ("_MARGIN", 25), ("_CONTEXT", 10)):
        monkeypatch.setattr(prefill, name, size)


def streamed(tokenizer, text: str) -> list[int]:
    return [token for ids in stream_tokens(tokenizer, io.StringIO(text, newline="")) for token in ids]


WORDS = [
    "the ",
    "captain",
    "'s",
    " sea",
    "\n",
    "\r\n",
    "\n\n  ",
    "  ",
    "1234",
    " — ",
    "é",
    "東京",
    "😀",
    "<|endoftext|>",
    ".",
]


@given(st.lists(st.sampled_from(WORDS), max_size=120))
def test_pieces_make_the_tokens_of_the_whole(tokenizer, words):
    text = "".join(words)
    whole = text.removesuffix("\n").removesuffix("\r")
    expected = tokenizer(whole)["input_ids"] if tokenizer(whole, add_special_tokens=False)["input_ids"] else []
    assert streamed(tokenizer, text) == expected


def test_a_tokenizer_that_marks_the_beginning_of_words():
    """It would put a space before every piece, as before the text, if a piece did not come with what precedes it."""
    vocabulary = {
        token: index for index, token in enumerate(["<unk>", "▁", *"▁".join("abcd"), "▁a", "ab", "▁ab", "cd"])
    }
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("c", "d")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "ab cd abcd ba a ab  cab " * 12
    assert leading_tokens(tokenizer) == []
    assert streamed(tokenizer, text) == tokenizer(text)["input_ids"]


def test_a_text_without_a_place_to_cut(tokenizer):
    text = "a" * 500
    assert streamed(tokenizer, text) == tokenizer(text)["input_ids"]


def test_the_special_tokens_before_a_text(tokenizer):
    assert leading_tokens(tokenizer) == [tokenizer.bos_token_id]


def test_what_waits_does_not_grow_with_the_text(tokenizer):
    sizes = []
    for ids in stream_tokens(tokenizer, io.StringIO("the old captain looked at the sea. " * 300)):
        sizes.append(len(ids))
    assert len(sizes) > 100
    assert max(sizes) < 60


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@torch.no_grad()
def test_the_state_after_a_text(tiny_model, tokenizer, chunk_tokens):
    model = tiny_model(vocab_size=6144, dtype=torch.float64)
    text, pieces = "the old captain looked at the sea, and was silent. " * 6, []
    state = prefill.prefill(model, tokenizer, io.StringIO(text), chunk_tokens=chunk_tokens, progress=pieces.append)
    assert "".join(pieces) == text
    expected = DynamicCache(config=model.config)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    model(ids, past_key_values=expected)
    assert int(state.get_seq_length()) == ids.shape[1]
    for layer, wanted in zip(state.layers, expected.layers, strict=True):
        for slot in (0, 1):
            torch.testing.assert_close(
                layer.recurrent_states[slot], wanted.recurrent_states[slot], rtol=1e-9, atol=1e-9
            )
            torch.testing.assert_close(layer.conv_states[slot], wanted.conv_states[slot], rtol=1e-9, atol=1e-9)


def test_an_empty_text_has_no_state(tiny_model, tokenizer):
    assert prefill.prefill(tiny_model(vocab_size=6144), tokenizer, io.StringIO("\n")) is None
