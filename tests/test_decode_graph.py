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
from transformers import CompileConfig, DynamicCache, LogitsProcessor, StaticCache
from transformers.generation import GenerationMixin

from modeling_mesanet import MesaNetForCausalLM, decode_graph, modeling_mesanet, prefill, read_tokens
from modeling_mesanet.decode_graph import GRAPHS, DecodeGraph, DraftGraphs, DraftReader, composition, filled_length

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
PLAIN = {"disable_compile": True}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


class FakeGraph:
    """Replays by calling what it was captured from, and copying what that returns to where it lay.

    `cache` is the one that it was captured with, whose states then lay in `states`, wherever they lie now.
    """

    def __init__(self, function):
        self.function, self.replays = function, 0
        self.cache, self.states, self.drafts = None, [], False
        self.returned = function()
        for tensor in tensors_of(self.returned):
            tensor.fill_(torch.nan)  # nothing has been executed

    def replay(self) -> None:
        self.replays += 1
        layers, states = self.cache.layers, iter(self.states)
        now, recording = iter(states_of(self.cache)), [(layer._record_past, layer.tape) for layer in layers]
        for layer in layers:
            layer.move(lambda state: next(states))
            layer._record_past, layer.tape = self.drafts, None
        for stored, tensor in zip(tensors_of(self.returned), tensors_of(self.function()), strict=True):
            stored.copy_(tensor)
        for layer, before in zip(layers, recording, strict=True):
            layer.move(lambda state: next(now))
            layer._record_past, layer.tape = before


def tensors_of(returned) -> list[torch.Tensor]:
    """All in what is captured: logits, and tapes."""
    if returned is None:
        return []
    output, tapes = returned
    consumed = [(*tape.conv_states, *tape.recurrent_states, *tape.pieces[0].conv_inputs) for tape in tapes]
    consumed += [tape.pieces[0][1:5] for tape in tapes]
    return [output.logits, *(tensor for tensors in consumed for tensor in tensors)]


def states_of(cache) -> list[torch.Tensor]:
    states = []
    for layer in cache.layers:
        layer.move(lambda state: states.append(state) or state)
    return states


def assert_same_state(found, wanted) -> None:
    for ours, theirs in zip(states_of(found), states_of(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def fake_capture(function, device):
    graph = FakeGraph(function)
    return graph, graph.returned


def without_effect(record):
    """`record`, after which the states are what they were, though what is captured was executed."""

    def recording(model, case, inputs):
        states = states_of(inputs["past_key_values"])
        before = [state.clone() for state in states]
        recorded = record(model, case, inputs)
        for state, value in zip(states, before, strict=True):
            state.copy_(value)
        for graph in [recorded.graph] + ([recorded.rewind.graph] if recorded.rewind else []):
            graph.cache, graph.states, graph.drafts = inputs["past_key_values"], states, recorded.rewind is not None
        return recorded

    return recording


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"
    monkeypatch.setattr(decode_graph, "capture", fake_capture)
    monkeypatch.setattr(decode_graph, "record", without_effect(decode_graph.record))
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


def new_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config)


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


def test_beams_and_no_cache_go_without(model):
    for options in ({"num_beams": 2}, {"use_cache": False}):
        model.generate(ids(model, 1, 5), **GREEDY, **options)
        assert recorded(model) is None


@pytest.fixture
def readers(monkeypatch) -> list[DraftReader]:
    """What has stood for a model in a loop over drafts."""
    made = []

    class Noted(DraftReader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(decode_graph, "DraftReader", Noted)
    return made


@pytest.fixture
def draft_graphs(model) -> DraftGraphs:
    return DraftGraphs(model, composition(model), set())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4])
def test_drafts_are_taken_back(model, tokens):
    graph, cache, kept = (
        DecodeGraph(model, composition(model), tokens, drafts=True),
        new_cache(model),
        ids(model, 1, 5),
    )
    model(kept, past_key_values=cache)
    cache.activate_past_recording()
    for step, left in enumerate((tokens, 1, tokens - 1, 0, min(2, tokens), tokens)):
        draft = ids(model, 1, tokens, seed=step)
        found = graph(input_ids=draft, past_key_values=cache).logits
        torch.testing.assert_close(found, model(torch.cat([kept, draft], 1)).logits[:, -tokens:], rtol=1e-4, atol=1e-4)
        cache.crop(left - tokens)
        kept, expected = torch.cat([kept, draft[:, :left]], 1), new_cache(model)
        model(kept, past_key_values=expected)
        assert_same_state(cache, expected)
        assert (graph.recorded is not None) == (step > 0)
    # Once nothing is recorded any more, nothing can be taken back.
    for layer in cache.layers:
        layer.stop_recording()
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "drafts", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=["lookup", "exit"]
)
def test_drafts_give_the_same_tokens(model, readers, drafts):
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for prompt in (ids(model, 1, 7), ids(model, 1, 3).repeat(1, 4)):
        expected = model.generate(prompt, return_dict_in_generate=True, **options, **PLAIN)
        for _ in range(2):
            found = model.generate(prompt, return_dict_in_generate=True, **options, **drafts)
            assert torch.equal(found.sequences, expected.sequences)
            assert_same_state(found.past_key_values, expected.past_key_values)
            assert all(not layer.record_past for layer in found.past_key_values.layers)
            assert any(graph.recorded for graph in readers[-1].graphs.graphs.values())
    made = len(readers)
    model.generate(prompt, **options, **drafts, **PLAIN)
    model.model.layers[0].register_forward_hook(lambda *arguments: None)
    assert torch.equal(model.generate(prompt, **options, **drafts), expected.sequences)
    assert len(readers) == made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_texts_share_the_graphs_of_drafts(model, mode, monkeypatch):
    recordings, record = [], decode_graph.record

    def recording(model, case, inputs):
        recordings.append(case.kind)
        return record(model, case, inputs)

    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    prompts, kept = [ids(model, 1, length, seed=length).repeat(1, 2) for length in (3, 5, 9)], []
    plain = [model.generate(prompt, **options, **PLAIN) for prompt in prompts]
    with mode():
        model.generate(prompts[0], **options, prompt_lookup_num_tokens=3)
        monkeypatch.setattr(decode_graph, "record", recording)
        for _ in range(2):
            kept += [model.generate(prompt, **options, prompt_lookup_num_tokens=3) for prompt in prompts]
    assert len(recordings) == len(set(recordings)) <= 2  # one token, or filled up to six
    for found, expected in zip(kept, plain + plain, strict=True):  # also of a text that others followed
        assert torch.equal(found.sequences, expected.sequences)
        assert_same_state(found.past_key_values, expected.past_key_values)
    # Turn by turn, in a state of the caller's.
    state, tokens = new_cache(model), prompts[0]
    for turn in range(3):
        tokens = torch.cat([tokens, ids(model, 1, 3, seed=turn)], 1)
        expected = model.generate(tokens, **options, **PLAIN).sequences
        tokens = model.generate(tokens, past_key_values=state, **options, prompt_lookup_num_tokens=3).sequences
        assert torch.equal(tokens, expected)


def test_a_text_within_a_text_does_without_graphs(model, readers):
    """Such as one that a streamer asks for."""
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 3}
    outer, inner = ids(model, 1, 3).repeat(1, 2), ids(model, 1, 4).repeat(1, 2)
    expected = [model.generate(prompt, **options, **PLAIN) for prompt in (outer, inner)]
    found = []

    class Asks:
        def put(self, tokens):
            found.append(model.generate(inner, **options))

        def end(self):
            pass

    assert torch.equal(model.generate(outer, streamer=Asks(), **options), expected[0])
    assert all(torch.equal(tokens, expected[1]) for tokens in found)
    # The prompt is streamed, too, before its text is begun.
    assert len(readers) == 2 < len(found)


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["graphs", "plain"])
@pytest.mark.parametrize("written", [0, 6, 12])
def test_what_is_interrupted_leaves_a_state_of_checked_tokens(model, options, written):
    """Of the prompt and what was written, or, while the prompt is read, of what was there before."""
    prompt, state = ids(model, 1, 4).repeat(1, 3), new_cache(model)
    with torch.no_grad():
        model(prompt[:, :5], past_key_values=state)

    class Interrupts(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] >= prompt.shape[1] + written:
                raise KeyboardInterrupt
            return scores

    model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            prompt,
            past_key_values=state,
            logits_processor=[Interrupts()],
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            prompt_lookup_num_tokens=3,
            **options,
        )
    assert not any(layer.record_past for layer in state.layers)
    text = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, **PLAIN)
    expected, length = new_cache(model), int(state.get_seq_length())
    assert (length == 5) if written == 0 else (prompt.shape[1] <= length <= prompt.shape[1] + written)
    with torch.no_grad():
        model(text[:, :length], past_key_values=expected)
    assert_same_state(state, expected)


def test_few_graphs_of_drafts_are_kept(model, draft_graphs, monkeypatch):
    monkeypatch.setattr(decode_graph, "MOST_DRAFT_GRAPHS", 2)
    cache, prompt = new_cache(model), ids(model, 1, 5)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        cache.activate_past_recording()
        reader = DraftReader(model, draft_graphs)
        reader(input_ids=prompt, past_key_values=cache)
        for tokens in (1, 7, 1, 3, 1, 4, 5):
            cache.crop(0)
            reader(input_ids=ids(model, 1, tokens), past_key_values=cache)
    assert list(draft_graphs.graphs) == [1, 6]


def test_drafts_are_filled_up_to_few_lengths():
    assert [filled_length(tokens) for tokens in (1, 2, 6, 7, 11, 12, 21, 22)] == [1, 6, 6, 11, 11, 21, 21, 41]


@torch.no_grad()
def test_what_fills_a_draft_up_is_taken_back(model, draft_graphs):
    reader, cache, kept = (
        DraftReader(model, draft_graphs),
        new_cache(model),
        ids(model, 1, 5),
    )
    cache.activate_past_recording()
    with pytest.raises(AttributeError):  # all but calls is the model's own
        _ = reader.nothing
    reader(input_ids=kept, past_key_values=cache)
    cache.crop(0)
    for step, (tokens, left) in enumerate(((3, 2), (3, 2), (4, 4), (6, 6), (6, 1), (1, 1), (1, 1), (2, 1), (8, 5))):
        draft, expected = ids(model, 1, tokens, seed=step), new_cache(model)
        found = reader(input_ids=draft, past_key_values=cache, logits_to_keep=tokens).logits
        wanted = model(torch.cat([kept, draft], 1)).logits[:, -tokens:]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        cache.crop(left - tokens)
        kept = torch.cat([kept, draft[:, :left]], 1)
        model(kept, past_key_values=expected)
        assert_same_state(cache, expected)
    assert sorted(draft_graphs.graphs) == [1, 6, 11]
    # Where more is asked for than a graph gives, drafts are not filled up.
    hidden = reader(input_ids=draft, past_key_values=cache, output_hidden_states=True).hidden_states
    assert hidden[0].shape[1] == draft.shape[1]


def test_a_drafting_model_does_not_look_for_graphs(model, monkeypatch):
    """It has none, and drafts few tokens a call."""
    looked = []
    for module in (modeling_mesanet, decode_graph):
        monkeypatch.setattr(module, "decode_graph", lambda model: looked.append(model))
    model.generate(ids(model, 1, 5), max_new_tokens=30, do_sample=False, pad_token_id=0, assistant_early_exit=1)
    assert looked == [model]


def test_a_state_made_in_inference_mode_goes_on_outside(model):
    """Its tensors move when they are first written to."""
    graph, tokens, states = DecodeGraph(model, composition(model)), ids(model, 2, 5), []
    for mode in (torch.no_grad, torch.inference_mode):
        states.append(new_cache(model))
        with mode():
            model(tokens, past_key_values=states[-1])
        with torch.no_grad():
            for token in tokens.split(1, dim=1):
                graph(input_ids=token, past_key_values=states[-1])
    assert graph.recorded is not None
    assert_same_state(*states)


@torch.no_grad()
def test_what_no_graph_is_made_for(model):
    graph = DecodeGraph(model, composition(model))
    drafts, recording = DecodeGraph(model, composition(model), drafts=True), new_cache(model)
    recording.activate_past_recording()
    cache = StaticCache(config=model.config, max_cache_len=16)
    for used in (cache, recording):
        model(ids(model, 2, 5), past_key_values=used)
        used.crop(0)
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
        graph(input_ids=token, past_key_values=recording)
        drafts(input_ids=token, past_key_values=cache)
    assert graph.recorded is drafts.recorded is None
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


class Waits(torch.nn.Module):
    """Reads a value from the device, which no graph may."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x.sum().item()
        return self.inner(x)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_random_numbers_after_a_step_that_cannot_be_recorded(model, device):
    model.model.layers[0].mlp = Waits(model.model.layers[0].mlp)
    with pytest.warns(
        UserWarning, match="cannot be recorded as a CUDA graph .*not permitted when stream is capturing"
    ):
        samples = model.generate(ids(model, 2, 5), do_sample=True, max_new_tokens=NEW, pad_token_id=0)
    assert samples.shape == (2, 5 + NEW)


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
    assert_same_state(state, expected)


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
        recorded(other).graph.function = recorded(other).graph.cache = None  # the fake's own
    state = weakref.ref(output.past_key_values)
    del output, other
    gc.collect()
    assert held() is None
    assert state() is None
