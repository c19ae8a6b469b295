# SPDX-License-Identifier: Apache-2.0
"""Passes as CUDA graphs: the same tokens as without, and never a graph for what it was not recorded for.

Without a GPU nothing can be recorded; there a graph's place is taken by a call of the model with the graph's own
tensors, which finds every mistake but those of the recording itself.
"""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from small_models import random_ids
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation import GenerationMixin

from modeling_mesanet import MesaNetForCausalLM, decode_graph, prefill, read_tokens
from modeling_mesanet.decode_graph import GRAPHS, DecodeGraph, composition

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
PLAIN = {"disable_compile": True}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class FakeGraph:
    """Replays by calling the model with the tensors that it was recorded for."""

    def __init__(self, model, inputs: dict):
        self.model, self.inputs, self.replays = model, inputs, 0
        self.logits = None

    def replay(self) -> None:
        self.replays += 1
        with decode_graph.counted_at_once(self.inputs["past_key_values"], self.inputs["input_ids"].shape[1]):
            self.logits.copy_(self.model(**self.inputs).logits)


def fake_record(model, case, inputs):
    """As `decode_graph.record`, but nothing is captured."""
    mask = decode_graph.last_column(inputs.get("attention_mask"))
    own = {"input_ids": torch.zeros_like(inputs["input_ids"]), "attention_mask": None if mask is None else mask * 0}
    constants = {name: inputs[name] for name in decode_graph.CONSTANTS if name in inputs}
    graph = FakeGraph(model, own | constants | {"past_key_values": inputs["past_key_values"]})
    graph.logits = torch.full(
        (own["input_ids"].shape[0], 1, model.config.vocab_size), torch.nan, dtype=model.dtype, device=model.device
    )
    output = decode_graph.ModelOutput(logits=graph.logits)
    return decode_graph.Recorded(case, graph, own["input_ids"], own["attention_mask"], output)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    monkeypatch.setattr(decode_graph, "record", fake_record)
    monkeypatch.setattr(decode_graph, "runs_on_one_gpu", lambda model: True)
    usual = GenerationMixin._valid_auto_compile_criteria

    def valid(self, model_kwargs, generation_config):
        wanted = type(model_kwargs.get("past_key_values")) is StaticCache and not generation_config.disable_compile
        return wanted or usual(self, model_kwargs, generation_config)

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", valid)
    return "cpu"


@pytest.fixture
def model(tiny_model, device) -> MesaNetForCausalLM:
    dtype = torch.float64 if device == "cpu" else torch.float32
    return tiny_model(dtype=dtype, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1).to(device)


@pytest.fixture(params=list(CACHES))
def cache(request) -> dict:
    """The arguments of `generate()` for a kind of cache."""
    return CACHES[request.param]


def ids(model, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return random_ids(batch, length, seed=seed).to(model.device)


def recorded(model):
    graph = GRAPHS.of.get(model)
    return None if graph is None else graph.recorded


def test_the_same_tokens_for_any_prompt(model, cache):
    for batch, length, pads in ((2, 5, 0), (3, 9, 3), (1, 4, 0), (3, 7, 2), (2, 6, 0)):
        input_ids, mask = ids(model, batch, length, seed=length), torch.ones(batch, length, device=model.device).long()
        mask[0, :pads] = 0
        expected = model.generate(input_ids, attention_mask=mask, **GREEDY, **PLAIN)
        actual = model.generate(input_ids, attention_mask=mask, **GREEDY, **cache)
        assert torch.equal(actual, expected)
        assert recorded(model).input_ids.shape == (batch, 1)


@torch.no_grad()
def test_pads_among_the_new_tokens(model):
    graph = DecodeGraph(model, composition(model))
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    for cache in caches:
        model(ids(model, 3, 5), past_key_values=cache)
    for step in range(5):
        token, mask = ids(model, 3, 1, seed=step), torch.tensor([[1], [step % 2], [1]], device=model.device)
        found, expected = (
            call(input_ids=token, attention_mask={"linear_attention": mask}, past_key_values=cache).logits
            for call, cache in zip((graph, model), caches, strict=True)
        )
        real = mask.flatten().bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert graph.recorded.mask.shape == (3, 1)


def test_all_but_the_first_steps_are_replayed(model, device, cache, monkeypatch):
    calls = []
    forward = MesaNetForCausalLM.forward

    def counting(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MesaNetForCausalLM, "forward", counting)
    model.generate(ids(model, 2, 5), **GREEDY, **cache)
    if device == "cuda":
        # Prompt, a step as it is, a step recorded.
        assert calls == [5, 1, 1]
    else:
        assert recorded(model).graph.replays == NEW - 2


def test_logits_of_each_step_stay(model, cache):
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids(model, 2, 5), **GREEDY, **options, **PLAIN)
    actual = model.generate(ids(model, 2, 5), **GREEDY, **options, **cache)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())


def test_sampling(model):
    samples = []
    for options in (PLAIN, *CACHES.values()):
        torch.manual_seed(0)
        samples.append(model.generate(ids(model, 2, 5), do_sample=True, max_new_tokens=NEW, pad_token_id=0, **options))
    assert all(torch.equal(sample, samples[0]) for sample in samples)


@pytest.mark.parametrize("kind", [DynamicCache, partial(StaticCache, max_cache_len=64)], ids=["dynamic", "static"])
def test_a_cache_goes_on_from_turn_to_turn(model, kind):
    tokens = ids(model, 2, 4)
    cache = kind(config=model.config)
    for turn in range(3):
        full = torch.cat([tokens, ids(model, 2, 5, seed=turn)], dim=1)
        tokens = model.generate(full, past_key_values=cache, **GREEDY)
        assert torch.equal(tokens, model.generate(full, **GREEDY, **PLAIN))
        assert recorded(model) is not None


def test_solver_limits_have_graphs_of_their_own(model, cache):
    input_ids = ids(model, 2, 5)
    for limits in ({}, {"cg_max_steps": 0}, {"cg_tolerance": 0.5}, {}):
        expected = model.generate(input_ids, **GREEDY, **limits, **PLAIN)
        assert torch.equal(model.generate(input_ids, **GREEDY, **limits, **cache), expected)
        with model.solver(**limits):
            assert torch.equal(model.generate(input_ids, **GREEDY, **cache), expected)


def test_a_changed_model_is_noticed(model, cache):
    input_ids = ids(model, 2, 5)
    before = model.generate(input_ids, **GREEDY, **cache)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)
    in_place = model.generate(input_ids, **GREEDY, **cache)
    assert torch.equal(in_place, model.generate(input_ids, **GREEDY, **PLAIN))
    assert not torch.equal(in_place, before)
    projection = model.model.layers[0].mixer.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.flip(0).contiguous())
    replaced = model.generate(input_ids, **GREEDY, **cache)
    assert torch.equal(replaced, model.generate(input_ids, **GREEDY, **PLAIN))
    assert not torch.equal(replaced, in_place)


def test_adapters_in_use_are_noticed(model, cache):
    """Which of them are on is a setting of their modules, and no weight."""
    peft = pytest.importorskip("peft")
    input_ids, seen = ids(model, 2, 5), []
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    for switch in (nullcontext, adapted.disable_adapter, nullcontext):
        with switch():
            expected = model.generate(input_ids, **GREEDY, **PLAIN)
            assert torch.equal(adapted.generate(input_ids=input_ids, **GREEDY, **cache), expected)
            seen.append((expected, GRAPHS.of[model]))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert len({id(graph) for _, graph in seen}) == 3


def test_what_a_graph_was_made_for_stays(model, cache):
    made_of = composition(model)
    for _ in range(2):
        model.generate(ids(model, 2, 5), **GREEDY, **cache)
        assert GRAPHS.of[model].made_of == made_of


def test_hooks_run_at_every_step(model):
    model.generate(ids(model, 2, 5), **GREEDY)
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *arguments: seen.append(1))
    assert composition(model) is None
    model.generate(ids(model, 2, 5), **GREEDY)
    assert len(seen) == NEW
    handle.remove()
    assert composition(model) is not None


def test_drafts_and_beams_and_no_cache_go_without(model):
    for options in ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"use_cache": False}):
        model.generate(ids(model, 1, 5), **GREEDY, **options)
        assert recorded(model) is None


@torch.no_grad()
def test_what_no_graph_is_made_for(model):
    graph = DecodeGraph(model, composition(model))
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids(model, 2, 5), past_key_values=cache)
    token = ids(model, 2, 1)
    for options in (
        {"output_hidden_states": True},
        {"output_solver_stats": True},
        {"labels": token},
        {"return_dict": False},
        {"logits_to_keep": torch.zeros(1, dtype=torch.long, device=model.device)},
    ):
        for _ in range(3):
            graph(input_ids=token, past_key_values=cache, **options)
        assert graph.recorded is None
    for _ in range(3):
        graph(input_ids=ids(model, 2, 2), past_key_values=cache)
        graph(input_ids=token, past_key_values=None)
        graph(input_ids=token, past_key_values=DynamicCache(config=model.config))
    assert graph.recorded is None
    # What is off changes nothing.
    for _ in range(2):
        graph(input_ids=token, past_key_values=cache, output_hidden_states=False)
    assert graph.recorded is not None
    with torch.enable_grad():
        assert graph(input_ids=token, past_key_values=cache).logits.requires_grad


@torch.no_grad()
def test_a_step_that_cannot_be_recorded_runs_without(model, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(decode_graph, "record", fails)
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph \(RuntimeError: operation not"):
        tokens = model.generate(ids(model, 2, 5), **GREEDY)
    assert torch.equal(tokens, model.generate(ids(model, 2, 5), **GREEDY, **PLAIN))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [5, 70])
def test_chunks_of_a_long_text(model, chunk, monkeypatch):
    recordings, record = [], decode_graph.record

    def recording(model, case, inputs):
        recordings.append(tuple(inputs["input_ids"].shape))
        return record(model, case, inputs)

    monkeypatch.setattr(decode_graph, "record", recording)
    tokens, expected = ids(model, 2, 6 * chunk + 3), DynamicCache(config=model.config)
    model(tokens, past_key_values=expected)
    state = read_tokens(model, tokens[:, : 2 * chunk], chunk_tokens=chunk)
    assert recordings == []
    monkeypatch.setattr(prefill, "_LARGEST_GRAPH", 2 * chunk - 1)
    read_tokens(model, tokens, chunk_tokens=chunk)
    assert recordings == []
    monkeypatch.setattr(prefill, "_LARGEST_GRAPH", 2 * chunk)
    assert read_tokens(model, tokens[:, 2 * chunk :], state=state, chunk_tokens=chunk) is state
    assert recordings == [(2, chunk)]
    assert int(state.get_seq_length()) == tokens.shape[1]
    for found, wanted in zip(state.layers, expected.layers, strict=True):
        for kind in ("recurrent_states", "conv_states"):
            for slot in (0, 1):
                ours, theirs = getattr(found, kind)[slot], getattr(wanted, kind)[slot]
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_explicit_compile_config_is_followed(model, device, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    static = CACHES["static"]
    model.generate(ids(model, 2, 5), **GREEDY, **static, compile_config=CompileConfig(backend="eager", mode=None))
    assert len(asked) == 1
    assert recorded(model) is None


def test_threads_do_not_share_a_graph(model, cache):
    prompts = [ids(model, 2, 5, seed=seed) for seed in range(4)]
    expected = [model.generate(prompt, **GREEDY, **PLAIN) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            found = pool.map(lambda prompt: model.generate(prompt, **GREEDY, **cache), prompts)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert recorded(model) is None


def test_neither_model_nor_cache_is_kept_alive(model, cache):
    other = copy.deepcopy(model)
    output = other.generate(ids(model, 2, 5), return_dict_in_generate=True, **GREEDY, **cache)
    assert recorded(other) is not None
    held = weakref.ref(other)
    if isinstance(recorded(other).graph, FakeGraph):
        recorded(other).graph.model = recorded(other).graph.inputs = None  # the fake's own
    state = weakref.ref(output.past_key_values)
    del output, other
    gc.collect()
    assert held() is None
    assert state() is None
