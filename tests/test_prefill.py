# SPDX-License-Identifier: Apache-2.0
"""Reading long texts: the tokens of the whole text, in constant memory."""

import io
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_ids
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from modeling_mesanet import bundled_checkpoint, prefill, read_tokens
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


def test_a_tokenizer_that_puts_a_space_before_a_text():
    """It would put one before every piece, too, if a piece did not come with what precedes it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "ab,cd.ab!?abcd;ba " * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer(".")["input_ids"] != tokenizer("a.")["input_ids"][-1:]
    assert leading_tokens(tokenizer) == []
    assert streamed(tokenizer, text) == tokenizer(text)["input_ids"]


def test_a_text_without_a_place_to_cut(tokenizer):
    text = "a" * 500
    assert streamed(tokenizer, text) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("alphabet", ["acgt", "東京é"])
def test_words_without_end_are_read_in_pieces(tokenizer, monkeypatch, alphabet):
    monkeypatch.setattr(prefill, "_LONGEST_WORD", 60)
    text = "".join(random.Random(0).choices(alphabet, k=2000))
    pieces = list(stream_tokens(tokenizer, io.StringIO(text)))
    assert max(map(len, pieces)) < 400  # of which a character takes up to three
    ids = [token for piece in pieces for token in piece]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


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


@torch.no_grad()
def test_tokens_read_in_chunks(tiny_model):
    model, ids = tiny_model(dtype=torch.float64), random_ids(3, 23)
    expected = model(ids, use_cache=True)
    state = read_tokens(model, ids[:, :9], chunk_tokens=4)
    assert read_tokens(model, ids[:, 9:9], state=state) is state
    read_tokens(model, ids[:, 9:-1], state=state, chunk_tokens=100)
    logits = model(ids[:, -1:], past_key_values=state).logits
    torch.testing.assert_close(logits, expected.logits[:, -1:], rtol=1e-9, atol=1e-9)
    assert read_tokens(model, ids[:, :0]) is None


def test_tokens_that_cannot_be_read(tiny_model):
    model, ids = tiny_model(), random_ids(2, 6)
    state = read_tokens(model, ids)
    for arguments, message in (
        ({"input_ids": ids[0]}, r"input_ids is of shape \(6,\); give a tensor \[batch, tokens\]"),
        ({"input_ids": ids.tolist()}, "input_ids is list; give a tensor"),
        ({"input_ids": ids, "chunk_tokens": 0}, "chunk_tokens is 0; give a whole number of at least 1"),
        ({"input_ids": ids, "chunk_tokens": 1.5}, r"chunk_tokens is 1\.5; give a whole number"),
        ({"input_ids": ids, "chunk_tokens": True}, "chunk_tokens is True; give a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tokens(model, **arguments, state=state)
    with pytest.raises(ValueError, match="model is in training mode"):
        read_tokens(model.train(), ids, state=state)
    assert int(state.get_seq_length()) == 6


def test_an_empty_text_has_no_state(tiny_model, tokenizer):
    assert prefill.prefill(tiny_model(vocab_size=6144), tokenizer, io.StringIO("\n")) is None


MEMORY = """
import io, resource, sys
import torch
from transformers import AutoTokenizer, DynamicCache
from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint
from modeling_mesanet.prefill import prefill

class Endless(io.TextIOBase):
    def __init__(self, characters):
        self.left = characters
    def read(self, size):
        size = min(size, self.left)
        self.left -= size
        return ("the old captain looked at the sea, and was silent. " * (size // 50 + 1))[:size]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, value_head_dim=16)
model = MesaNetForCausalLM(MesaNetConfig(vocab_size=6144, intermediate_size=64, **sizes)).eval()
tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
peaks = []
for characters in (200_000, 1_000_000):
    state = prefill(model, tokenizer, Endless(characters), chunk_tokens=512)
    peaks.append(peak())
token = torch.ones(1, 1, dtype=torch.long)
with torch.no_grad():
    for tokens in (100, 1000):
        for _ in range(tokens):
            model(token, past_key_values=state)
        peaks.append(peak())
print(int(state.get_seq_length()), *peaks)
"""


def test_memory_does_not_grow_with_the_text():
    """Peak memory of the whole process: five times the text, and ten times the generated tokens."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    tokens, first, longer, some, more = map(int, run.stdout.split())
    assert tokens > 200_000
    assert longer < 1.01 * first
    assert more < 1.01 * some
