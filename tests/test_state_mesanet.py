# SPDX-License-Identifier: Apache-2.0
"""Prompt states: files that hold exactly what was in memory or are refused, and states as values."""

import copy
import json
import re
import stat
from functools import partial, wraps

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import random_ids as ids_of
from small_models import states
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_mesanet import (
    MesaNetForCausalLM,
    MesaNetForSequenceClassification,
    MesaNetModel,
    StateError,
    bundled_checkpoint,
    continue_from,
    fork_state,
    load_state,
    merge_states,
    read_state_info,
    save_state,
    split_state,
    state_mesanet,
)
from modeling_mesanet.cache_mesanet import MesaNetCacheLayer
from modeling_mesanet.state_mesanet import fingerprint_tokenizer, fingerprint_weights

GREEDY = {"max_new_tokens": 8, "do_sample": False}
VOCABULARY = 6144  # the bundled tokenizer's
random_ids = partial(ids_of, vocab_size=VOCABULARY)


def assert_equal(cache, expected) -> None:
    assert int(cache.get_seq_length()) == int(expected.get_seq_length())
    for state, wanted in zip(states(cache), states(expected), strict=True):
        assert state.dtype == wanted.dtype
        assert torch.equal(state, wanted)


@pytest.fixture(scope="module")
def make(tiny_model):
    def make(cls=MesaNetForCausalLM, **overrides):
        options = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 0}
        return tiny_model(cls, **options | overrides)

    return make


@pytest.fixture(scope="module")
def model(make):
    return make(dtype=torch.float64)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_checkpoint())


@torch.no_grad()
def filled(model, batch: int = 1, length: int = 7, seed: int = 1, **options) -> DynamicCache:
    return model(random_ids(batch, length, seed), use_cache=True, **options).past_key_values


def rewrite(path, *, metadata=(), tensors=()) -> None:
    """Write a state file again with some of its content changed."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file({**load_file(path), **dict(tensors)}, path, metadata={**old, **dict(metadata)})


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_saved_state_comes_back_bit_by_bit(make, tmp_path, tokenizer, dtype, batch):
    model = make(dtype=dtype, conv_on_value=batch == 3)
    cache, path = filled(model, batch), tmp_path / "prompt.safetensors"
    info = save_state(cache, path, model=model, tokenizer=tokenizer)
    assert info == read_state_info(path)
    assert info.tokens == 7
    assert f"torch.{info.dtype}" == str(dtype)
    loaded = load_state(path, model=model, tokenizer=tokenizer)
    assert_equal(loaded, cache)
    new = random_ids(batch, 4, seed=2)
    with torch.no_grad():
        assert torch.equal(model(new, past_key_values=loaded).logits, model(new, past_key_values=cache).logits)
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.safetensors"], "a temporary file was left"


@torch.no_grad()
def test_a_loaded_state_and_its_file_go_their_own_ways(model, tmp_path):
    cache, path = filled(model), tmp_path / "state"
    save_state(cache, path, model=model)
    content = path.read_bytes()
    loaded = load_state(path, model=model)
    model(random_ids(1, 3, seed=2), past_key_values=load_state(path, model=model))
    assert path.read_bytes() == content
    with open(path, "r+b") as file:  # in place, as no program should
        file.write(bytes(len(content)))
    assert_equal(loaded, cache)


@torch.no_grad()
def test_generation_from_a_saved_state_equals_generation_from_the_prompt(model, tmp_path, tokenizer):
    prompt = tokenizer("The old captain looked at the sea.", return_tensors="pt")["input_ids"]
    cache = model(prompt, use_cache=True).past_key_values
    save_state(cache, tmp_path / "state", model=model, tokenizer=tokenizer)
    state = load_state(tmp_path / "state", model=model, tokenizer=tokenizer)
    texts = [" He was", " The", " Then, with a cry of joy"]
    before = copy.deepcopy(state)
    together = model.generate(**continue_from(state, tokenizer, texts), **GREEDY)
    for row, text in enumerate(texts):
        tail = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = torch.cat([prompt, tail], dim=1)
        # Without a mask generate() would take the first token, whose number is that of pads too, for a pad.
        expected = model.generate(whole, attention_mask=torch.ones_like(whole), use_cache=False, **GREEDY)
        for options in ({}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}):
            alone = model.generate(**continue_from(state, tokenizer, text), **options, **GREEDY)
            assert torch.equal(alone[0, -8:], expected[0, -8:])
        assert torch.equal(together[row, -8:], expected[0, -8:])
    assert_equal(state, before)


def test_one_text_for_every_sequence_of_a_batch(model, tokenizer):
    cache = filled(model, 2)
    outputs = model.generate(**continue_from(cache, tokenizer, " He"), **GREEDY)
    for row, part in enumerate(split_state(cache)):
        assert torch.equal(model.generate(**continue_from(part, tokenizer, " He"), **GREEDY)[0], outputs[row])


@pytest.mark.parametrize("cls", [MesaNetModel, MesaNetForSequenceClassification])
def test_heads_do_not_matter(make, tmp_path, cls):
    """A state belongs to the decoder: what stands on it, and a cache class, may differ."""
    model = make(num_labels=2)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
    save_state(cache, tmp_path / "state", model=model)
    other = make(cls, num_labels=2)
    (other if cls is MesaNetModel else other.model).load_state_dict(model.model.state_dict())
    assert_equal(load_state(tmp_path / "state", model=other), cache)


def test_what_may_differ_between_saving_and_loading(make, tmp_path, tokenizer):
    model = make()
    save_state(filled(model), tmp_path / "state", model=model, tokenizer=tokenizer)
    lazier = make(cg_max_steps=3, cg_tolerance=1e-2, chunk_size=16, kernel_backend="torch")
    load_state(tmp_path / "state", model=lazier)  # without a tokenizer, too
    tokenizer(["a", "b b b b"], padding=True, truncation=True, max_length=3)
    load_state(tmp_path / "state", model=model, tokenizer=tokenizer)
    save_state(filled(model), tmp_path / "state", model=model)
    load_state(tmp_path / "state", model=model, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "made by a model with other weights"),
        ({"dtype": torch.bfloat16}, "made by weights in float32 while this model's are in bfloat16"),
        ({"forget_gate_bound": None}, "whose forget_gate_bound is 0.9975 while this model's is None"),
        ({"head_norm_eps": 1e-3}, "whose effective_head_norm_eps is 1e-06 while this model's is 0.001"),
        ({"num_hidden_layers": 3}, "whose num_hidden_layers is 2 while this model's is 3"),
        ({"head_dim": 8}, "whose head_dim is 16 while this model's is 8"),
    ],
)
def test_a_state_of_another_model_is_refused(make, tmp_path, other, message):
    model = make()
    save_state(filled(model), tmp_path / "state", model=model)
    with pytest.raises(StateError, match=message) as caught:
        load_state(tmp_path / "state", model=make(**other), argument="--state")
    assert str(caught.value).startswith(f"--state is '{tmp_path / 'state'}'")
    assert "\n" not in str(caught.value)


def test_one_changed_weight_is_noticed(make, tmp_path):
    model = make()
    before = fingerprint_weights(model)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
        assert fingerprint_weights(model) == before, "the head does not make the state"
        model.model.layers[1].mixer.lambda_param[0, 3] += 1e-6
    assert fingerprint_weights(model) != before


def test_another_tokenizer_is_refused(make, tmp_path, tokenizer):
    model = make()
    save_state(filled(model), tmp_path / "state", model=model, tokenizer=tokenizer)
    before = fingerprint_tokenizer(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert fingerprint_tokenizer(tokenizer) != before
    with pytest.raises(StateError, match="made with another tokenizer"):
        load_state(tmp_path / "state", model=model, tokenizer=tokenizer)


def test_every_truncated_or_altered_file_is_refused_before_a_cache_is_made(make, tmp_path, monkeypatch):
    model = make()
    path, bad = tmp_path / "state", tmp_path / "bad"
    save_state(filled(model), path, model=model)
    content = path.read_bytes()

    def fail(*arguments, **options):
        raise AssertionError("wrote into a cache")

    monkeypatch.setattr(MesaNetCacheLayer, "write", fail)
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(StateError, match="truncated or not a safetensors file"):
            load_state(bad, model=model)
    for position in (len(content) - 1, len(content) - 5000):
        altered = bytearray(content)
        altered[position] ^= 1
        bad.write_bytes(altered)
        with pytest.raises(StateError, match="content is damaged"):
            load_state(bad, model=model)
    bad.write_bytes(content + b"x")
    with pytest.raises(StateError, match="truncated or not a safetensors file"):
        load_state(bad, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"format": "pt"}}, "is no MesaNet state"),
        ({"metadata": {"format_version": "1"}}, "of format version 1, but this package reads 2"),
        ({"metadata": {"tokens": "none"}}, "metadata are damaged"),
        ({"metadata": {"tokens": "-3"}}, "metadata are damaged"),
        ({"metadata": {"tokens": "true"}}, "metadata are damaged"),
        ({"metadata": {"tokens": "1" + "0" * 30}}, "metadata are damaged"),
        ({"metadata": {"config": "[" * 100_000}}, "metadata are damaged"),
        ({"metadata": {"tokens": "5"}}, "content is damaged"),
        ({"metadata": {"tokenizer": '"0"'}}, "content is damaged"),
        ({"metadata": {"config": "[]"}}, "metadata are damaged"),
        ({"tensors": {"layers.0.h": torch.zeros(2, 2, 16, 16)}}, "content is damaged"),
        ({"tensors": {"layers.0.h": torch.zeros(0, 2, 16, 16)}}, "content is damaged"),
        ({"tensors": {"layers.1.g": torch.zeros(1, 2, 16, 8)}}, "content is damaged"),
        ({"tensors": {"layers.2.g": torch.zeros(1, 2, 16, 8)}}, "content is damaged"),
    ],
    ids=str,
)
def test_a_foreign_or_edited_file_is_refused(make, tmp_path, change, message):
    model = make()
    save_state(filled(model), tmp_path / "state", model=model)
    rewrite(tmp_path / "state", **change)
    with pytest.raises(StateError, match=message):
        load_state(tmp_path / "state", model=model)


def test_files_that_are_no_states_are_refused(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    for name, message in (
        ("model.safetensors", "is no MesaNet state"),
        ("config.json", "truncated or not a safetensors file"),
        ("absent", "does not exist"),
        ("", "a folder; give the name of a file"),
    ):
        with pytest.raises(StateError, match=message):
            load_state(tmp_path / name, model=model)


def test_what_cannot_be_saved_leaves_the_old_file(make, tmp_path, monkeypatch):
    model, path = make(), tmp_path / "state"
    save_state(filled(model), path, model=model)
    content = path.read_bytes()
    spoilt = filled(model)
    spoilt.layers[1].recurrent_states[0][0, 0, 1, 1] = torch.nan
    with pytest.raises(StateError, match=r"NaN or infinite values \(layers\.1\.h\)"):
        save_state(spoilt, path, model=model)
    with pytest.raises(StateError, match="has not consumed any token"):
        save_state(DynamicCache(config=model.config), path, model=model)
    with pytest.raises(StateError, match="cache is a list that no MesaNet has used"):
        save_state([], path, model=model)
    with pytest.raises(ValueError, match="past_key_values has 2 layers but the model has 3"):
        save_state(filled(model), path, model=make(num_hidden_layers=3))
    llama = LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(StateError, match="LlamaForCausalLM without a MesaNet"):
        save_state(filled(model), path, model=LlamaForCausalLM(llama))
    with pytest.raises(StateError, match=r"cannot be written .*a folder that exists"):
        save_state(filled(model), tmp_path / "absent" / "state", model=model)
    for folder in (tmp_path, "."):
        with pytest.raises(StateError, match="a folder; give the name of a file"):
            save_state(filled(model), folder, model=model)

    def interrupted(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(state_mesanet, "save_file", interrupted)
    with pytest.raises(StateError, match=r"cannot be written \(no space left\)"):
        save_state(filled(model), path, model=model)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


# ------------------------------------------------------------------------------------------------- states as values


@torch.no_grad()
def test_a_state_file_can_be_shared(make, tmp_path):
    """It has the permissions of any new file: safetensors makes files that their owner alone may read."""
    model = make()
    cache = model(random_ids(1, 3), use_cache=True).past_key_values
    save_state(cache, tmp_path / "state", model=model)
    (tmp_path / "any").touch()
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "any").stat().st_mode


@torch.no_grad()
def test_a_state_file_that_was_made_private_stays_so(make, tmp_path):
    """And a link to it stays a link."""
    model = make()
    cache = model(random_ids(1, 3), use_cache=True).past_key_values
    (tmp_path / "state").touch(mode=0o600)
    (tmp_path / "link").symlink_to("state")
    save_state(cache, tmp_path / "link", model=model)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
    assert_equal(load_state(tmp_path / "state", model=model), cache)


@torch.no_grad()
def test_forks_are_independent(model):
    cache = filled(model, 2)
    before = copy.deepcopy(cache)
    fork = fork_state(cache, 3)
    assert fork.batch_size == 6
    new = random_ids(6, 3, seed=4)
    logits = model(new, past_key_values=fork).logits
    assert_equal(cache, before)
    prompts = random_ids(2, 7).repeat_interleave(3, 0)
    expected = model(torch.cat([prompts, new], dim=1), use_cache=False).logits[:, -3:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_static_states(model, tokenizer):
    """Copies of a static cache are static, too."""
    plain, static = filled(model, 2), StaticCache(config=model.config, max_cache_len=64)
    model(random_ids(2, 7), past_key_values=static)
    assert_equal(static, plain)
    copies = (fork_state(static, 2), *split_state(static), merge_states([static, plain]))
    assert all(type(copied) is StaticCache and copied.is_compileable for copied in copies)
    assert type(merge_states([plain, static])) is type(fork_state(plain)) is DynamicCache
    found, expected = (
        model.generate(**continue_from(state, tokenizer, " the sea"), **GREEDY) for state in (static, plain)
    )
    assert torch.equal(found, expected)


def test_beams_and_samples_from_a_state(model, tokenizer):
    state = filled(model)
    prompt = torch.cat([random_ids(1, 7), tokenizer(" the sea", return_tensors="pt")["input_ids"][:, 1:]], dim=1)
    for options in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 3, "do_sample": True}):
        torch.manual_seed(0)
        expected = model.generate(prompt, max_new_tokens=8, **options)
        torch.manual_seed(0)
        found = model.generate(**continue_from(state, tokenizer, " the sea"), max_new_tokens=8, **options)
        assert torch.equal(found, expected[:, 7:])
    assert_equal(state, filled(model))


def test_a_step_does_not_grow_with_what_a_state_has_read(model, tokenizer, monkeypatch):
    inputs = continue_from(filled(model, length=50), tokenizer, ["a b c", "d"])
    widths, forward = [], MesaNetForCausalLM.forward

    @wraps(forward)
    def watch(self, *arguments, **options):
        tensors = (options.get(name) for name in ("attention_mask", "position_ids"))
        widths.append([0 if tensor is None else tensor.shape[1] for tensor in tensors])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(MesaNetForCausalLM, "forward", watch)
    update, held = model._update_model_kwargs_for_generation, []

    def keep(*arguments, **options):
        kwargs = update(*arguments, **options)
        held.append([value.shape for value in kwargs.values() if torch.is_tensor(value)])
        return kwargs

    monkeypatch.setattr(model, "_update_model_kwargs_for_generation", keep)
    model.generate(**inputs, **GREEDY)
    assert len(held) == len(widths) == GREEDY["max_new_tokens"]
    assert max(map(max, widths[1:])) <= 1
    assert held == [[]] * len(held)


def test_a_fork_of_a_state_made_in_inference_mode(model):
    with torch.inference_mode():
        cache = filled(model)
    assert_equal(fork_state(cache), cache)
    model(random_ids(1, 2), past_key_values=fork_state(cache))


@torch.no_grad()
def test_splitting_and_merging_are_inverse(model):
    cache = filled(model, 3)
    parts = split_state(cache)
    assert [part.batch_size for part in parts] == [1, 1, 1]
    assert_equal(merge_states(parts), cache)
    model(random_ids(1, 2), past_key_values=parts[0])
    assert_equal(merge_states(split_state(cache)), cache)
    swapped = merge_states([parts[2], parts[1]])
    cache.batch_select_indices([2, 1])
    assert_equal(swapped, cache)


@torch.no_grad()
def test_states_of_different_lengths_go_on_as_one_batch(model, tokenizer):
    cases = [(5, 1, " He"), (9, 2, " She was"), (2, 3, " The")]
    caches = [filled(model, length=length, seed=seed) for length, seed, _ in cases]
    merged = merge_states(caches)
    assert int(merged.get_seq_length()) == 9
    output = model.generate(**continue_from(merged, tokenizer, [text for *_, text in cases]), **GREEDY)
    for row, (length, seed, text) in enumerate(cases):
        tail = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        prompt = torch.cat([random_ids(1, length, seed), tail], dim=1)
        assert torch.equal(output[row, -8:], model.generate(prompt, use_cache=False, **GREEDY)[0, -8:])


def test_what_does_not_fit_is_refused(make, model, tokenizer):
    cache = filled(model, 2)
    for call, message in (
        (lambda: merge_states([]), "caches is empty"),
        (lambda: merge_states([cache, filled(make())]), r"caches\[1\] does not fit caches\[0\]: layers.0.conv.0 is "),
        (lambda: merge_states([cache, DynamicCache(config=model.config)]), "no MesaNet has used"),
        (lambda: fork_state(cache, 0), "copies is 0"),
        (lambda: fork_state(None), "cache is a NoneType"),
        (lambda: continue_from(cache, tokenizer, ["a", "b", "c"]), "texts holds 3 texts but the state 2 sequences"),
        (lambda: continue_from(cache, tokenizer, []), "texts holds 0 texts"),
        (lambda: continue_from(cache, tokenizer, ["a", ""]), r"texts\[1\] is '', which has no tokens"),
    ):
        with pytest.raises(StateError, match=message):
            call()


def test_metadata_are_readable_without_this_package(make, tmp_path):
    model = make()
    save_state(filled(model), tmp_path / "state", model=model)
    with safe_open(tmp_path / "state", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("mesanet-state", "2")
    assert json.loads(metadata["config"])["head_dim"] == 16
    assert re.fullmatch("[0-9a-f]{64}", json.loads(metadata["weights"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_moves_between_cpu_and_gpu(make, tmp_path, tokenizer):
    """Made on the GPU, read on the CPU and the other way round; the fingerprints do not depend on the device."""
    cpu, gpu = make(), make().cuda()
    prompt, new = random_ids(1, 50), random_ids(1, 3, seed=2)
    with torch.no_grad():
        expected = cpu(torch.cat([prompt, new], dim=1), use_cache=False).logits[:, -3:]
        for source, target in ((cpu, gpu), (gpu, cpu)):
            cache = source(prompt.to(source.device), use_cache=True).past_key_values
            save_state(cache, tmp_path / "state", model=source, tokenizer=tokenizer)
            loaded = load_state(tmp_path / "state", model=target, tokenizer=tokenizer)
            for state in (loaded, fork_state(cache, device=target.device)):
                assert all(tensor.device.type == target.device.type for tensor in states(state))
                logits = target(new.to(target.device), past_key_values=state).logits
                torch.testing.assert_close(logits.cpu(), expected, rtol=2e-3, atol=2e-3)
