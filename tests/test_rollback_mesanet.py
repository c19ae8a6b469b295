# SPDX-License-Identifier: Apache-2.0
"""Taking tokens back, and the decoding methods that draft tokens and need it: the same tokens as without drafts."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_ids as ids_of
from small_models import states
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_mesanet import MesaNetForCausalLM, cache_mesanet, rollback_mesanet

# So few tokens that pairs of them recur and prompt lookup finds drafts, right ones and wrong ones.
VOCABULARY = 11
random_ids = partial(ids_of, vocab_size=VOCABULARY)
GREEDY = {"max_new_tokens": 24, "do_sample": False}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}


def assert_same_state(cache, expected, tolerance: float) -> None:
    assert int(cache.get_seq_length()) == int(expected.get_seq_length())
    for state, wanted in zip(states(cache), states(expected), strict=True):
        torch.testing.assert_close(state, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def make(tiny_model):
    def make(dtype=torch.float32, seed=0, **overrides) -> MesaNetForCausalLM:
        options = {"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "conv_on_value": True}
        options |= {"vocab_size": VOCABULARY}
        model = tiny_model(dtype=dtype, seed=seed, **options | overrides)
        # By default an assistant stops drafting when it is unsure, which an untrained one always is.
        model.generation_config.assistant_confidence_threshold = 0.0
        model.generation_config.num_assistant_tokens = 5
        return model

    return make


@pytest.fixture(scope="module")
def model(make) -> MesaNetForCausalLM:
    return make(torch.float64)


@pytest.fixture(scope="module")
def relative(make) -> MesaNetForCausalLM:
    """Nearly the model: some of its drafts are right."""
    return perturbed(make(torch.float64), 0.02)


@torch.no_grad()
def perturbed(model: MesaNetForCausalLM, size: float) -> MesaNetForCausalLM:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * size)
    return model


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval().to(dtype)
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


class Crops:
    """Counts what the caches of a block were asked to take back."""

    def __init__(self, monkeypatch):
        from modeling_mesanet.cache_mesanet import MesaNetCacheLayer

        self.removed, plain = [], MesaNetCacheLayer.crop

        def crop(layer, tokens):
            self.removed.append(-int(tokens))
            plain(layer, tokens)

        monkeypatch.setattr(MesaNetCacheLayer, "crop", crop)


# ----------------------------------------------------------------------------------------------------------- crop


@st.composite
def recorded_runs(draw):
    """Pieces fed before and while recording, how many tokens to take back, and where pads stand."""
    before = draw(st.lists(st.integers(1, 5), max_size=2))
    pieces = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    removed = draw(st.integers(0, sum(pieces)))
    length, batch = sum(before) + sum(pieces), draw(st.integers(1, 2))
    pads = draw(st.booleans())
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor([draw(flags) if pads else [True] * length for _ in range(batch)])
    return before, pieces, removed, mask, draw(st.booleans())


@given(recorded_runs())
def test_taking_tokens_back_equals_never_having_read_them(model, run):
    before, pieces, removed, mask, inference = run
    input_ids = random_ids(*mask.shape)
    cache, kept = DynamicCache(config=model.config), mask.shape[1] - removed
    with torch.inference_mode(inference), torch.no_grad():
        bounds = list(itertools.accumulate([0, *before, *pieces]))
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            if index == len(before):
                cache.activate_past_recording()
            model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    cache.crop(-removed)
    with torch.no_grad():
        if kept:
            expected = DynamicCache(config=model.config)
            model(input_ids[:, :kept], attention_mask=mask[:, :kept], past_key_values=expected)
            assert_same_state(cache, expected, 1e-10)
        else:
            assert int(cache.get_seq_length()) == 0
            assert not cache.has_previous_state()
        new = random_ids(mask.shape[0], 3, seed=2)
        full = torch.cat([input_ids[:, :kept], new], dim=1)
        wanted = model(full, attention_mask=F.pad(mask[:, :kept], (0, 3), value=True), use_cache=False).logits
        logits = model(new, past_key_values=cache).logits
        torch.testing.assert_close(logits, wanted[:, -3:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_taking_tokens_back_in_other_dtypes(make, dtype):
    model = make(dtype)
    input_ids = random_ids(1, 20)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for each in (cache, expected):
        model(input_ids[:, :6], past_key_values=each)
    cache.activate_past_recording()
    for piece in (input_ids[:, 6:7], input_ids[:, 7:17], input_ids[:, 17:]):
        model(piece, past_key_values=cache)
    cache.crop(-4)
    # In the pieces of the recorded run: in bfloat16 the layers above see other roundings in other pieces.
    for piece in (input_ids[:, 6:7], input_ids[:, 7:16]):
        model(piece, past_key_values=expected)
    assert [state.dtype for state in states(cache)] == [state.dtype for state in states(expected)]
    assert_same_state(cache, expected, 2e-5 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_recording_can_go_on_after_a_crop(model):
    input_ids = random_ids(1, 30)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    cache.activate_past_recording()
    position = 0
    for length, removed in ((7, 3), (1, 0), (5, 5), (4, 1), (1, 1), (6, 2)):
        model(input_ids[:, position : position + length], past_key_values=cache)
        cache.crop(-removed)
        position += length - removed
    model(input_ids[:, :position], past_key_values=expected)
    assert_same_state(cache, expected, 1e-10)


@pytest.mark.parametrize("kept", [2, 64])
@torch.no_grad()
def test_tokens_that_stayed_can_be_taken_back_later(model, monkeypatch, kept):
    monkeypatch.setattr(cache_mesanet, "KEPT_TOKENS", kept)
    input_ids, mask = random_ids(2, 40), torch.ones(2, 40).bool()
    mask[0, :8] = mask[1, 12] = False
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    cache.activate_past_recording()
    position = 6
    for length, removed in ((4, 1), (3, 2), (1, 3), (5, 0), (6, 0), (2, 4), (3, 3), (2, 1)):
        end = position + length
        model(input_ids[:, position:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache.crop(-removed)
        position = end - removed
        expected = DynamicCache(config=model.config)
        model(input_ids[:, :position], attention_mask=mask[:, :position], past_key_values=expected)
        assert_same_state(cache, expected, 1e-10)
        held = cache.layers[0]
        assert held.past.tokens <= 2 * kept + length, "what is left of the last call, beside what was kept"
    held.record_past = False  # as transformers ends it
    assert (held.tape, held.past) == (None, None)
    with pytest.raises(RuntimeError, match=r"1 tokens cannot be taken back, .* 0 are recorded"):
        held.crop(-1)


@torch.no_grad()
def test_a_state_goes_on_after_all_of_it_was_taken_back(model):
    input_ids = random_ids(1, 9)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(random_ids(1, 4, seed=3), past_key_values=cache)
    cache.crop(-4)
    for piece in input_ids.split(3, dim=1):
        model(piece, past_key_values=cache)
    model(input_ids, past_key_values=expected)
    assert_same_state(cache, expected, 1e-10)


@torch.no_grad()
def test_nothing_is_kept_from_before_a_tape_that_grew_too_long(model, monkeypatch):
    monkeypatch.setattr(rollback_mesanet, "LONGEST_TAPE", 4)
    input_ids = random_ids(1, 30)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(input_ids[:, :3], past_key_values=cache)
    cache.crop(0)
    model(input_ids[:, 3:20], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"5 tokens cannot be taken back, .* 4 are recorded"):
        cache.crop(-5)
    cache.crop(-3)
    model(input_ids[:, :17], past_key_values=expected)
    assert_same_state(cache, expected, 1e-10)


@torch.no_grad()
def test_a_tape_keeps_no_more_than_its_limit(model, monkeypatch):
    monkeypatch.setattr(rollback_mesanet, "LONGEST_TAPE", 8)
    input_ids, mask = random_ids(2, 60), torch.ones(2, 60).bool()
    mask[0, :5] = mask[1, 30] = mask[1, 41] = False
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    cache.activate_past_recording()
    for start, end in ((0, 25), *((t, t + 1) for t in range(25, 55)), (55, 60)):
        model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        tape = cache.layers[0].tape
        assert tape.tokens <= 2 * 8
        assert sum(piece.k.untyped_storage().nbytes() for piece in tape.pieces) <= 2 * 2 * 8 * 32 * 8 + 8 * 2 * 32 * 8
    cache.crop(-7)
    model(input_ids[:, :53], attention_mask=mask[:, :53], past_key_values=expected)
    assert_same_state(cache, expected, 1e-10)


@torch.no_grad()
def test_what_was_not_recorded_cannot_be_taken_back(model):
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 5), past_key_values=cache)
    cache.crop(0)
    cache.activate_past_recording()
    model(random_ids(1, 3), past_key_values=cache)
    before = [state.clone() for state in states(cache)]
    for tokens, error, message in (
        (-4, RuntimeError, r"4 tokens cannot be taken back, .* 3 are recorded; call activate_past_recording\(\)"),
        (2, ValueError, r"tokens_to_remove is 2; give minus the number of tokens to take back, such as -2\."),
    ):
        with pytest.raises(error, match=message):
            cache.crop(tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
    assert int(cache.get_seq_length()) == 8
    cache.crop(-3)
    with pytest.raises(RuntimeError, match=r"1 tokens cannot be taken back, .* 0 are recorded"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
        lambda cache: cache.activate_past_recording(),
    ],
    ids=["repeat", "select", "reorder", "reset", "record anew"],
)
@torch.no_grad()
def test_a_tape_of_other_sequences_is_not_replayed(model, operation):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(random_ids(2, 5), past_key_values=cache)
    operation(cache)
    with pytest.raises(RuntimeError, match="0 are recorded"):
        cache.crop(-1)


@torch.no_grad()
def test_without_recording_nothing_is_kept(model, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("recorded")

    monkeypatch.setattr(rollback_mesanet.StateTape, "append", fail)
    cache = DynamicCache(config=model.config)
    for piece in random_ids(2, 9).split([5, 1, 3], dim=1):
        model(piece, past_key_values=cache)
    assert all(layer.tape is None for layer in cache.layers)


def test_recording_with_gradients_keeps_no_graph(model):
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(random_ids(1, 5), past_key_values=cache)
    tape = cache.layers[0].tape
    assert not any(tensor.requires_grad for piece in tape.pieces for tensor in (*piece.conv_inputs, *piece[1:5]))


# --------------------------------------------------------------------------------------------- drafts in generate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drafts", ["itself", "relative", "stranger", "llama", "prompt lookup", "early exit"])
def test_drafts_change_nothing(make, dtype, drafts, monkeypatch):
    model = make(dtype)
    options = {
        "itself": lambda: {"assistant_model": copy.deepcopy(model)},
        "relative": lambda: {"assistant_model": perturbed(make(dtype), 0.02)},
        "stranger": lambda: {"assistant_model": make(dtype, seed=7, num_hidden_layers=1)},
        "llama": lambda: {"assistant_model": llama(dtype)},
        "prompt lookup": lambda: LOOKUP,
        "early exit": lambda: {"assistant_early_exit": 1},
    }[drafts]()
    for seed in (1, 2):
        input_ids = random_ids(1, 9, seed)
        plain = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
        expected = model.generate(input_ids, **plain)
        crops, steps = Crops(monkeypatch), []
        hook = model.register_forward_pre_hook(lambda *_, steps=steps: steps.append(1))
        output = model.generate(input_ids, **options, **plain)
        hook.remove()
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(
            torch.cat(output.logits),
            torch.cat(expected.logits),
            rtol=1e-3,
            atol=1e-3 if dtype == torch.float32 else 1e-6,
        )
        if drafts == "itself":
            assert len(steps) <= 7, "all drafts are right: several tokens a step"
        else:
            assert any(removed > 0 for removed in crops.removed), "no draft was wrong: nothing was tested"
        monkeypatch.undo()


def test_drafts_by_several_settings_and_prompts(model, relative):
    for seed in range(3, 8):
        input_ids = random_ids(1, seed, seed)
        expected = model.generate(input_ids, **GREEDY)
        for options in (
            {"assistant_model": relative, "prefill_chunk_size": 2},
            {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 2},
        ):
            assert torch.equal(model.generate(input_ids, **options, **GREEDY), expected)


@pytest.mark.parametrize("drafts", ["relative", "llama", "prompt lookup", "early exit"])
def test_solver_limits_and_statistics_with_drafts(model, relative, drafts):
    options = {
        "relative": {"assistant_model": relative},
        "llama": {"assistant_model": llama()},
        "prompt lookup": LOOKUP,
        "early exit": {"assistant_early_exit": 1},
    }[drafts]
    wanted = {"cg_max_steps": 3, "output_solver_stats": True, "return_dict_in_generate": True, **GREEDY}
    expected = model.generate(random_ids(1, 9), **wanted)
    passes = []
    hook = model.register_forward_hook(lambda *called: passes.append(called[-1]))
    output = model.generate(random_ids(1, 9), **options, **wanted)
    hook.remove()
    assert torch.equal(output.sequences, expected.sequences)
    checked = [passed for passed in passes if passed.solver_stats is not None]
    assert len(output.solver_stats) == len(checked), "what is recorded are the passes that check drafts"
    assert {int(layer.steps.max()) for passed in output.solver_stats for layer in passed} == {3}


def test_a_padded_prompt_with_drafts(model, relative):
    prompt = random_ids(1, 6)
    padded, mask = F.pad(prompt, (4, 0)), F.pad(torch.ones_like(prompt), (4, 0))
    expected = model.generate(prompt, **GREEDY)
    for options in ({"assistant_model": relative}, LOOKUP):
        assert torch.equal(model.generate(padded, attention_mask=mask, **options, **GREEDY)[:, 4:], expected)


def test_an_end_of_text_among_the_drafts(model, relative):
    input_ids = random_ids(1, 9)
    end = int(model.generate(input_ids, **GREEDY)[0, 20])
    expected = model.generate(input_ids, eos_token_id=end, **GREEDY)
    assert expected.shape[1] < 9 + 24
    for options in ({"assistant_model": copy.deepcopy(model)}, {"assistant_model": relative}, LOOKUP):
        cache = DynamicCache(config=model.config)
        output = model.generate(input_ids, eos_token_id=end, past_key_values=cache, **options, **GREEDY)
        assert torch.equal(output, expected)
        with torch.no_grad():
            wanted = model(expected[:, : int(cache.get_seq_length())], use_cache=True).past_key_values
        assert_same_state(cache, wanted, 1e-9)


def test_mesanet_assists_another_architecture(model, monkeypatch):
    target, crops = llama(), Crops(monkeypatch)
    target.generation_config.num_assistant_tokens = 5
    for seed in (1, 2, 3):
        input_ids = random_ids(1, 9, seed)
        expected = target.generate(input_ids, **GREEDY)
        assert torch.equal(target.generate(input_ids, assistant_model=model, **GREEDY), expected)
    assert any(removed > 0 for removed in crops.removed)


def test_an_assistant_with_another_tokenizer(make):
    """Its last tokens are made anew from text, so that more is taken back than it drafted last."""
    text = ["abad baba dab abba bad dad cab abaca dabba", "cabab abab bacab"]
    tokenizers = []
    for size in (8, 24):
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<s>"])
        backend.train_from_iterator(text, trainer)
        tokenizers.append(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>"))
    models_of = [make(torch.float64, seed=i, vocab_size=len(each)) for i, each in enumerate(tokenizers)]
    for main, other in ((0, 1), (1, 0)):
        options = {"tokenizer": tokenizers[main], "assistant_tokenizer": tokenizers[other]}
        for prompt in ("abad dab", "cab abba dabba ba"):
            input_ids = tokenizers[main](prompt, return_tensors="pt").input_ids
            plain = {"suppress_tokens": [0, 1], **GREEDY}
            expected = models_of[main].generate(input_ids, **plain)
            output = models_of[main].generate(input_ids, assistant_model=models_of[other], **options, **plain)
            assert torch.equal(output, expected)


def test_sampling_with_drafts_is_reproducible(model, relative):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(model.generate(random_ids(1, 9), assistant_model=relative, do_sample=True, max_new_tokens=12))
    assert torch.equal(*runs)
    assert runs[0].shape == (1, 21)


@pytest.mark.parametrize("drafts", ["relative", "prompt lookup"])
@pytest.mark.parametrize("way", ["full ids", "full ids and mask", "tail and full mask", "padded"])
def test_drafts_after_the_users_cache(model, relative, way, drafts):
    first, tail = random_ids(1, 8), random_ids(1, 4, seed=5)
    mask = torch.ones(1, 12).long()
    if way == "padded":
        mask[0, :3] = 0
    full = torch.cat([first, tail], dim=1)
    expected = model.generate(full, attention_mask=mask, use_cache=False, **GREEDY)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(first, attention_mask=mask[:, :8], past_key_values=cache)
    options = LOOKUP if drafts == "prompt lookup" else {"assistant_model": relative}
    arguments = {
        "full ids": {"input_ids": full},
        "full ids and mask": {"input_ids": full, "attention_mask": mask},
        "padded": {"input_ids": full, "attention_mask": mask},
        "tail and full mask": {"input_ids": tail, "attention_mask": mask},
    }[way]
    output = model.generate(past_key_values=cache, **arguments, **options, **GREEDY)
    assert torch.equal(output[:, -24:], expected[:, -24:])
    assert output.shape[1] == 24 + arguments["input_ids"].shape[1]
    # The cache is the user's again: it goes on, and records no more.
    assert not any(layer.record_past or layer.tape for layer in cache.layers)
    assert int(cache.get_seq_length()) == 12 + 23
    onward = torch.cat([full, output[:, -24:], random_ids(1, 2, seed=6)], dim=1)
    onward_mask = F.pad(mask, (0, onward.shape[1] - 12), value=1)
    expected = model.generate(onward, attention_mask=onward_mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(onward, attention_mask=onward_mask, past_key_values=cache, **GREEDY), expected)


def test_drafts_after_the_users_cache_of_everything_are_refused(model):
    input_ids = random_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"input_ids ends 0 tokens before the end of what past_key_values"):
        model.generate(input_ids, past_key_values=cache, **LOOKUP, **GREEDY)
    tail, mask = random_ids(1, 3), torch.tensor([[1] * 8 + [0, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask marks pads among new tokens"):
        model.generate(tail, attention_mask=mask, past_key_values=cache, **LOOKUP, **GREEDY)
    assert int(cache.get_seq_length()) == 8


def test_drafting_for_several_sequences_or_a_static_cache_is_refused(model):
    for options, message in (
        ({"input_ids": random_ids(2, 5)}, "batch_size = 1"),
        ({"input_ids": random_ids(1, 5), "cache_implementation": "static"}, "Static cache"),
        ({"input_ids": random_ids(1, 5), "use_cache": False}, "use_cache=True"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**options, **LOOKUP, **GREEDY)


@pytest.mark.parametrize("layer", [0, 2, 1.5])
def test_an_early_exit_outside_the_model_is_refused(model, layer):
    with pytest.raises(ValueError, match=f"assistant_early_exit is {layer}; a model of 2 layers drafts with 1 to 1"):
        model.generate(random_ids(1, 5), assistant_early_exit=layer, **GREEDY)
    assert model.config.num_hidden_layers == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_tokens_back_on_a_gpu(make, dtype):
    """The Triton path; greedy tokens are compared in float32, where no two of so few logits tie."""
    device = torch.device("cuda")
    model = make(dtype, head_dim=64, value_head_dim=64).to(device)
    input_ids = random_ids(1, 200).to(device)
    with torch.no_grad():
        cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(input_ids[:, :150], past_key_values=expected)
        model(input_ids[:, :100], past_key_values=cache)
        cache.activate_past_recording()
        model(input_ids[:, 100:101], past_key_values=cache)
        model(input_ids[:, 101:], past_key_values=cache)
        cache.crop(-50)
    assert_same_state(cache, expected, 1e-3 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        prompt = input_ids[:, :20]
        plain = model.generate(prompt, **GREEDY)
        for options in (
            LOOKUP,
            {"assistant_model": perturbed(make(dtype, head_dim=64, value_head_dim=64), 0.02).to(device)},
        ):
            assert torch.equal(model.generate(prompt, **options, **GREEDY), plain)
