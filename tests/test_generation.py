# SPDX-License-Identifier: Apache-2.0
"""generate(): every way of decoding against the plain loop, continuation, compilation, and clear refusals."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_ids
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)
from transformers.integrations import executorch

from modeling_mesanet import MesaNetForCausalLM, modeling_mesanet
from modeling_mesanet.cache_mesanet import MesaNetCacheLayer
from modeling_mesanet.mesa import mesa_solver

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def model(tiny_model) -> MesaNetForCausalLM:
    """Untied, because an untrained tied head repeats its input; float64, so that no two tokens tie."""
    return tiny_model(dtype=torch.float64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1)


@pytest.fixture(scope="module")
def undecided_model(tiny_model) -> MesaNetForCausalLM:
    """Its logits are so even that beams keep overtaking one another."""
    return tiny_model(dtype=torch.float64, tie_word_embeddings=False, pad_token_id=0, logit_soft_cap=0.5)


def snapshot(cache) -> list[torch.Tensor]:
    slots = [s for layer in cache.layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return [s.clone() for s in slots if s is not None] + [torch.as_tensor(cache.get_seq_length()).clone()]


@torch.no_grad()
def greedy(model, input_ids: torch.Tensor, steps: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding written out, the whole sequence through the model for every token: tokens and their logits."""
    logits = []
    for _ in range(steps):
        logits.append(model(input_ids, use_cache=False).logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return input_ids, torch.stack(logits)


# ---------------------------------------------------------------------------------------------------- one prompt


def test_the_test_model_writes_something_varied(model):
    tokens, _ = greedy(model, random_ids(3, 9))
    assert len(set(tokens[:, 9:].flatten().tolist())) > NEW, "repetition would hide errors"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 100},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["ids", "embeddings"])
def test_greedy(model, options, prompt):
    input_ids = random_ids(3, 9)
    tokens, logits = greedy(model, input_ids)
    given = {"input_ids": input_ids}
    if prompt == "embeddings":
        given, tokens = {"inputs_embeds": model.get_input_embeddings()(input_ids)}, tokens[:, 9:]
    output = model.generate(**given, **GREEDY, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, tokens)
    # generate() hands logits out in float32.
    torch.testing.assert_close(torch.stack(output.logits), logits.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_greedy_with_the_users_cache(model, cache_class):
    input_ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    if cache_class is StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=64)
    output = model.generate(input_ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, greedy(model, input_ids)[0])
    assert output.past_key_values is cache
    assert all(type(layer) is MesaNetCacheLayer for layer in cache.layers)
    assert cache.get_seq_length() == 9 + NEW - 1, "the last token was chosen, not consumed"


@pytest.mark.parametrize("static", [False, True])
def test_left_padded_batch_equals_single_runs(model, static):
    lengths = [9, 1, 5]
    prompts = [random_ids(1, n, seed=n) for n in lengths]
    batch = torch.cat([F.pad(prompt, (9 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([F.pad(torch.ones_like(prompt), (9 - prompt.shape[1], 0)) for prompt in prompts])
    options = {"cache_implementation": "static"} if static else {}
    for more in ({}, {"prefill_chunk_size": 3}, {"use_cache": False} if not static else {"prefill_chunk_size": 2}):
        tokens = model.generate(batch, attention_mask=mask, **GREEDY, **options, **more)[:, 9:]
        for row, prompt in enumerate(prompts):
            assert torch.equal(tokens[row], greedy(model, prompt)[0][0, prompt.shape[1] :])


def test_a_finished_row_does_not_disturb_the_others(model):
    input_ids = random_ids(3, 9)
    tokens, _ = greedy(model, input_ids)
    stop = int(tokens[0, 11])  # the third new token of the first row
    output = model.generate(input_ids, eos_token_id=stop, **GREEDY)
    for row in range(3):
        new = tokens[row, 9:].tolist()
        end = new.index(stop) + 1 if stop in new else NEW
        assert output[row, 9 : 9 + end].tolist() == new[:end]
        assert not output[row, 9 + end :].any(), "pads after the end"
    assert output.shape[1] > 12, "some row must run on for this to test anything"


@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]),
)
def test_greedy_over_random_prompts(model, batch, length, seed, options):
    input_ids = random_ids(batch, length, seed)
    tokens = model.generate(input_ids, max_new_tokens=3, do_sample=False, **options)
    assert torch.equal(tokens, greedy(model, input_ids, steps=3)[0])


# ------------------------------------------------------------------------------------------ sampling and searching


def test_sampling_is_reproducible_and_independent_of_the_cache(model):
    input_ids = random_ids(2, 9)
    runs = {}
    for name, options in {
        "first": {},
        "again": {},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "other seed": {},
    }.items():
        torch.manual_seed(1 if name == "other seed" else 0)
        runs[name] = model.generate(input_ids, do_sample=True, max_new_tokens=12, top_k=50, top_p=0.95, **options)
    for name in ("again", "no cache", "static"):
        assert torch.equal(runs["first"], runs[name]), name
    assert not torch.equal(runs["first"], runs["other seed"])


def test_several_samples_of_a_prompt(model):
    input_ids = random_ids(2, 9)
    torch.manual_seed(0)
    tokens = model.generate(input_ids, do_sample=True, max_new_tokens=12, num_return_sequences=3)
    assert tokens.shape == (6, 21)
    assert torch.equal(tokens[:, :9], input_ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in tokens}) == 6
    torch.manual_seed(0)
    uncached = model.generate(input_ids, do_sample=True, max_new_tokens=12, num_return_sequences=3, use_cache=False)
    assert torch.equal(tokens, uncached)


@pytest.mark.parametrize("prompt", ["plain", "padded"])
def test_beams(undecided_model, prompt):
    model = undecided_model
    input_ids, mask = random_ids(2, 9), torch.ones(2, 9).long()
    if prompt == "padded":
        mask[0, :4] = 0
    options = {
        "attention_mask": mask,
        "num_beams": 4,
        "num_return_sequences": 4,
        "output_scores": True,
        "return_dict_in_generate": True,
        **GREEDY,
    }
    cached = model.generate(input_ids, **options)
    reference = model.generate(input_ids, use_cache=False, **options)
    static = model.generate(input_ids, cache_implementation="static", **options)
    for output in (cached, static):
        assert torch.equal(output.sequences, reference.sequences)
        torch.testing.assert_close(output.sequences_scores, reference.sequences_scores, rtol=1e-6, atol=1e-6)
    assert not torch.equal(cached.sequences[0], cached.sequences[1])
    moves = cached.beam_indices
    assert (moves[:, 2:] != moves[:, 1:-1]).any(), "no beam ever changed place: reordering was not tested"


def test_beams_from_the_users_cache(model):
    prefix = random_ids(2, 6)
    input_ids = torch.cat([prefix, random_ids(2, 3, seed=4)], dim=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    expected = model.generate(input_ids, num_beams=3, use_cache=False, **GREEDY)
    before = snapshot(cache)
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"batch size 6 but past_key_values holds 4 .*batch_repeat_interleave"):
        model.generate(input_ids, num_beams=3, past_key_values=other, **GREEDY)
    other.batch_select_indices(torch.tensor([0, 2]))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(other), strict=True))
    # A state of the prompts is copied, one of the beams is taken as it is.
    assert torch.equal(model.generate(input_ids, num_beams=3, past_key_values=cache, **GREEDY), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(input_ids, num_beams=3, past_key_values=cache, **GREEDY), expected)


RIGHT = {
    "default": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("pads", [1, 5])
def test_pads_on_the_right(model, way, pads):
    """What is written follows the last token, not the pads behind it."""
    options = {"num_beams": 3} if way == "beams" else {}
    prompt = random_ids(1, 6)
    expected = model.generate(prompt, **GREEDY, **options)[:, 6:]
    ids, mask = F.pad(prompt, (0, pads), value=7), F.pad(torch.ones_like(prompt), (0, pads))
    found = model.generate(ids, attention_mask=mask, **GREEDY, **RIGHT[way])
    assert torch.equal(found[:, 6 + pads :], expected)
    # Beside a row without pads; drafts take one sequence at a time.
    if way not in ("prompt lookup", "early exit"):
        other = random_ids(1, 6 + pads, seed=9)
        rows, masks = torch.cat([ids, other]), torch.cat([mask, torch.ones_like(mask)])
        found = model.generate(rows, attention_mask=masks, **GREEDY, **RIGHT[way])
        assert torch.equal(found[:, : 6 + pads], rows)
        assert torch.equal(found[:1, 6 + pads :], expected)
        assert torch.equal(found[1:], model.generate(other, **GREEDY, **options))


def test_pads_on_the_right_of_what_continues_a_state(model):
    cache, full, mask, expected = turns(model, padded=True)
    tail = F.pad(full[:, int(cache.get_seq_length()) :], (0, 3), value=7)
    tokens = model.generate(tail, attention_mask=F.pad(mask, (0, 3)), past_key_values=cache, **GREEDY)
    assert torch.equal(tokens[:, -NEW:], expected)


def test_a_state_needs_the_cache(model):
    cache, full, _, _ = turns(model, padded=False)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="use_cache is False although past_key_values is given"):
        model.generate(full, past_key_values=cache, use_cache=False, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


# --------------------------------------------------------------------------------------------------- continuation


def turns(model, padded: bool) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A first turn in a cache; all tokens up to the second prompt, their mask, and the tokens expected after them."""
    first, mask = random_ids(2, 6), torch.ones(2, 6).long()
    if padded:
        mask[1, :4] = 0
    cache = DynamicCache(config=model.config)
    spoken = model.generate(first, attention_mask=mask, past_key_values=cache, **GREEDY)
    full = torch.cat([spoken, random_ids(2, 4, seed=3)], dim=1)
    mask = F.pad(mask, (0, full.shape[1] - mask.shape[1]), value=1)
    expected = model.generate(full, attention_mask=mask, use_cache=False, **GREEDY)
    return cache, full, mask, expected[:, full.shape[1] :]


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("prefill_chunk_size", [None, 2, 50])
@pytest.mark.parametrize("way", ["full ids", "full ids and mask", "tail and full mask", "full embeddings"])
def test_continuation(model, way, prefill_chunk_size, padded):
    cache, full, mask, expected = turns(model, padded)
    tail = full[:, int(cache.get_seq_length()) :]
    assert tail.shape[1] == 5, "the last token of the first turn and four of the second"
    arguments = {
        "full ids": {"input_ids": full},
        "full ids and mask": {"input_ids": full, "attention_mask": mask},
        "tail and full mask": {"input_ids": tail, "attention_mask": mask},
        "full embeddings": {"inputs_embeds": model.get_input_embeddings()(full), "attention_mask": mask},
    }[way]
    tokens = model.generate(past_key_values=cache, prefill_chunk_size=prefill_chunk_size, **arguments, **GREEDY)
    assert torch.equal(tokens[:, -NEW:], expected)


@pytest.mark.parametrize("prefill_chunk_size", [None, 2, 50])
@pytest.mark.parametrize("tail", [5, 0, 13])
def test_a_prompt_of_which_nothing_is_new_is_refused(model, tail, prefill_chunk_size):
    """A short tail without a mask, and all cached tokens over again: transformers would feed the wrong ones."""
    cache, full, _, _ = turns(model, padded=False)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"input_ids has no tokens|past_key_values already holds; pass all tokens"):
        model.generate(full[:, :tail], past_key_values=cache, prefill_chunk_size=prefill_chunk_size, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


def test_forks_of_one_prompt(model):
    prompt = random_ids(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt, past_key_values=cache)
    for seed in (4, 5):
        full = torch.cat([prompt, random_ids(1, 3, seed=seed)], dim=1)
        tokens = model.generate(full, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(tokens, greedy(model, full)[0])
    assert cache.get_seq_length() == 9


# ---------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def dynamo():
    """A clean compiler before and after, and its counters."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
    counters.clear()


@torch.no_grad()
def test_one_graph_serves_every_step_prompt_and_padding(model, dynamo):
    step = torch.compile(model, backend="eager", fullgraph=True)
    for length, pads in ((5, 0), (8, 0), (8, 3)):
        mask = torch.ones(2, length).bool()
        mask[0, :pads] = False
        full = random_ids(2, length + 4, seed=length)
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(full[:, :length], attention_mask=mask, past_key_values=cache)
        for position in range(length, length + 4):
            token = full[:, position : position + 1].clone(memory_format=torch.contiguous_format)
            seen = F.pad(mask, (0, position + 1 - length), value=True)
            expected = model(full[:, : position + 1], attention_mask=seen, use_cache=False).logits[:, -1:]
            torch.testing.assert_close(step(token, past_key_values=cache).logits, expected, rtol=1e-9, atol=1e-9)
        assert cache.get_seq_length() == length + 4
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


def compiling(backend) -> dict:
    """Arguments by which `generate` compiles its step on a CPU too."""
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # transformers' own switch
    return {"cache_implementation": "static", "compile_config": compile_config}


def test_generate_compiles_its_step_once(model, dynamo):
    for length, pads in ((5, 0), (9, 0), (9, 4)):
        input_ids, mask = random_ids(2, length, seed=length), torch.ones(2, length).long()
        mask[1, :pads] = 0
        arguments = {"input_ids": input_ids, "attention_mask": mask, **GREEDY}
        tokens = model.generate(**compiling("eager"), **arguments)
        assert torch.equal(tokens, model.generate(use_cache=False, **arguments))
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


@torch.no_grad()
def test_solver_arguments_in_a_full_graph(model, dynamo):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    input_ids = random_ids(2, 9)
    for limits in ({"cg_tolerance": 1e-1}, {"cg_tolerance": 1e-3}, {"cg_tolerance": None, "cg_max_steps": 4}):
        actual = compiled(input_ids, output_solver_stats=True, **limits)
        expected = model(input_ids, output_solver_stats=True, **limits)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-9, atol=1e-9)
        assert all(
            torch.equal(a.steps, b.steps) for a, b in zip(actual.solver_stats, expected.solver_stats, strict=True)
        )
    assert not dynamo["graph_break"]


@pytest.mark.parametrize("chunk", [4, 50])
def test_chunks_of_a_prompt_are_not_compiled(model, dynamo, chunk):
    for length in (9, 12):
        input_ids = random_ids(2, length, seed=length)
        tokens = model.generate(input_ids, prefill_chunk_size=chunk, **compiling("eager"), **GREEDY)
        assert torch.equal(tokens, greedy(model, input_ids)[0])
    assert dynamo["stats"]["unique_graphs"] == 1


def test_sampling_and_continuation_take_the_same_compiled_step(model, dynamo):
    input_ids = random_ids(2, 9)
    arguments = {key: value for key, value in compiling("eager").items() if key == "compile_config"}
    model.generate(input_ids, **compiling("eager"), **GREEDY)
    sampled = []
    for options in (compiling("eager"), {}):
        torch.manual_seed(0)
        sampled.append(model.generate(input_ids, do_sample=True, max_new_tokens=NEW, **options))
    assert torch.equal(*sampled)
    cache = StaticCache(config=model.config, max_cache_len=64)
    tokens = random_ids(2, 4, seed=3)
    for _ in range(2):
        full = torch.cat([tokens, random_ids(2, 5, seed=4)], dim=1)
        tokens = model.generate(full, past_key_values=cache, **arguments, **GREEDY)
        assert torch.equal(tokens, greedy(model, full)[0])
    assert dynamo["stats"]["unique_graphs"] == 1


def test_a_compiled_step_updates_the_states_where_they_are(model, dynamo):
    """CUDA graphs refuse states that move, and a copy of them would take as long as the step itself."""
    graphs = []

    def backend(graph, inputs):
        graphs.append((graph, [id(tensor) for tensor in inputs]))
        return graph.forward

    input_ids = random_ids(2, 9)
    output = model.generate(input_ids, return_dict_in_generate=True, **compiling(backend), **GREEDY)
    ((graph, inputs),) = graphs
    states = [state for layer in output.past_key_values.layers for state in layer.recurrent_states.values()]
    places = graph.graph.find_nodes(op="placeholder")
    of_states = [places[inputs.index(id(state))] for state in states]
    for node in of_states:
        assert [str(user.target) for user in node.users] == ["modeling_mesanet.decode_step.default"]
    held = [*states, *(state for layer in output.past_key_values.layers for state in layer.conv_states.values())]
    held += [layer.seen_tokens for layer in output.past_key_values.layers]
    assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in held)
    # What a graph returns besides logits would be assigned to the cache, and overwritten by the next run.
    (returned,) = graph.graph.find_nodes(op="output")[0].args
    assert len(returned) == 1


class DeviceReads(TorchDispatchMode):
    """Counts the values that are read from tensors into Python, for which an accelerator would have to be awaited."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("static", [False, True])
def test_a_step_reads_nothing_from_the_device_but_whether_to_stop(model, monkeypatch, static):
    # The torch path stops its solver early by such a read; the kernel of a GPU does that by itself.
    monkeypatch.setattr(mesa_solver, "any_active", lambda *arguments: True)
    # As on an accelerator.
    monkeypatch.setattr(modeling_mesanet, "stays_unread", lambda length, device: length == 1)
    input_ids, mask = random_ids(2, 9), torch.ones(2, 9).long()
    mask[0, :3] = 0
    expected = greedy(model, input_ids[:1, 3:])[0][0, 6:]
    options = {"cache_implementation": "static"} if static else {}
    reads = []
    for new in (4, 12):
        with DeviceReads() as counted:
            tokens = model.generate(input_ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
        reads.append(counted.count)
        assert torch.equal(tokens[0, 9 : 9 + NEW], expected[:new])
    assert reads[1] - reads[0] == 8, "one a token: transformers' own"


def test_training_and_prefill_compile_in_one_graph(tiny_model, dynamo):
    model = tiny_model(dtype=torch.float64).train()
    input_ids, mask = random_ids(2, 11), torch.ones(2, 11).bool()
    mask[0, :3] = False
    expected = model(input_ids, attention_mask=mask, labels=input_ids)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    # aot_eager traces the backward pass as well.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(input_ids, attention_mask=mask, labels=input_ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)
    assert dynamo["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"use_cache": False}], ids=str
)
def test_bad_prompts_get_one_clear_sentence(model, options):
    embeds = model.get_input_embeddings()(random_ids(1, 5)).detach()
    embeds[0, 2, 3] = torch.nan
    for arguments, message in (
        ({"input_ids": torch.zeros(1, 0).long()}, "input_ids has no tokens"),
        ({"input_ids": torch.zeros(2, 0).long()}, "input_ids has no tokens"),
        ({"input_ids": [[1, 2]]}, "input_ids is list; it must be a tensor of whole numbers, [batch, time]"),
        ({"inputs_embeds": torch.zeros(1, 0, 32).double()}, "inputs_embeds has no tokens"),
        ({"inputs_embeds": embeds}, "inputs_embeds contains NaN or infinite values"),
        ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(2, 4)}, "attention_mask has shape (2, 4)"),
        ({"input_ids": random_ids(1, 2), "attention_mask": [[1, 1]]}, "attention_mask is list; give a tensor"),
        ({"input_ids": random_ids(2, 5), "attention_mask": torch.zeros(2, 6)}, "attention_mask has shape (2, 6)"),
        ({"input_ids": random_ids(2, 5), "attention_mask": torch.ones(1, 5)}, "attention_mask has shape (1, 5)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            model.generate(**arguments, **options, **GREEDY)
        assert "\n" not in str(caught.value)


def test_a_mask_of_the_wrong_length_leaves_the_users_cache_alone(model):
    cache, full, mask, _ = turns(model, padded=False)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.generate(full[:, -5:], attention_mask=mask[:, 3:], past_key_values=cache, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


def test_a_cache_without_a_config_is_refused(model):
    cache = DynamicCache()
    with pytest.raises(ValueError, match=r"made without a config; pass DynamicCache\(config=model.config\)"):
        model.generate(random_ids(1, 5), past_key_values=cache, **GREEDY)
    assert not cache.layers


def test_paged_and_quantized_caches_are_refused(model):
    with pytest.raises(ValueError, match=r"cache_implementation is 'quantized', which .* leave it out"):
        model.generate(random_ids(1, 5), cache_implementation="quantized", **GREEDY)
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=-1)
    for refused in (
        lambda: model.generate_batch([[1, 2, 3]], generation_config=settings),
        lambda: model.init_continuous_batching(generation_config=settings),
        lambda: model.continuous_batching_context_manager(generation_config=settings).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"which a recurrent state has not; use generate\(\) with a padded batch"):
            refused()


def test_what_transformers_itself_refuses(model):
    """Nothing of the model runs before these end, so the sentences are transformers'."""
    if hasattr(type(model), "supports_context_parallel"):  # newer than the oldest transformers
        assert not model.supports_context_parallel
    # In a process of its own: what other exports register for caches stays registered in theirs.
    program = """
import torch
from small_models import make_model, random_ids
from transformers.integrations import executorch
executorch.export_with_dynamic_cache(make_model(), random_ids(1, 5), torch.ones(1, 5).long())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "should be applied to DynamicCache containing only" in run.stderr
    exported = copy.deepcopy(model)
    exported.generation_config = GenerationConfig(cache_implementation="static", use_cache=True)
    with pytest.raises(AttributeError, match="'LinearAttentionLayer' object has no attribute"):
        executorch.TorchExportableModuleForDecoderOnlyLM(exported, batch_size=1, max_cache_len=16)


# ------------------------------------------------------------------------------------------------- solver


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_solver_statistics_of_every_token(model, options):
    arguments = {"output_solver_stats": True, "return_dict_in_generate": True, **GREEDY, **options}
    output = model.generate(random_ids(2, 5), cg_tolerance=1e-3, **arguments)
    widths = [5, *([1] * (NEW - 1))] if "use_cache" not in options else range(5, 5 + NEW)
    assert [[layer.steps.shape for layer in passed] for passed in output.solver_stats] == [
        [(2, width, 2)] * 2 for width in widths
    ]
    whole = model(output.sequences[:, :-1], cg_tolerance=1e-3, output_solver_stats=True).solver_stats
    for layer in range(2):
        for index in range(2):  # steps, residual
            last = [passed[layer][index][:, -1] for passed in output.solver_stats]
            torch.testing.assert_close(torch.stack(last, dim=1), whole[layer][index][:, 4:], rtol=1e-6, atol=1e-9)
    assert max(layer.residual.max() for layer in whole) <= 1e-3
    # Each way to read a prompt tells of all of it.
    chunked = (
        model.generate(random_ids(2, 5), cg_tolerance=1e-3, prefill_chunk_size=2, **arguments)
        if not options
        else output
    )
    assert chunked.solver_stats[0][0].steps.shape == (2, 5, 2)


def test_solver_limits_of_generate_and_of_a_block(model):
    def steps(**options) -> int:
        arguments = {"output_solver_stats": True, "return_dict_in_generate": True, **GREEDY, **options}
        stats = model.generate(random_ids(1, 5), **arguments).solver_stats
        return max(int(layer.steps.max()) for passed in stats for layer in passed)

    free = steps()
    assert free > 6
    assert steps(cg_max_steps=3) == 3
    assert steps(cg_tolerance=1e-1) < steps(cg_tolerance=1e-4) < free
    with model.solver(cg_max_steps=5):
        assert steps() == 5
        assert steps(cg_max_steps=2) == 2, "what a call says comes first"
        with model.solver(cg_tolerance=0.5):
            assert steps() < 5
        assert steps() == 5
    assert steps() == free


def test_solver_limits_in_a_generation_config(model):
    def steps(config=None, **options) -> int:
        arguments = {"output_solver_stats": True, "return_dict_in_generate": True, **options}
        stats = model.generate(random_ids(1, 5), generation_config=config, **arguments).solver_stats
        return max(int(layer.steps.max()) for passed in stats for layer in passed)

    config = GenerationConfig(cg_max_steps=3, **GREEDY)
    assert steps(config) == 3
    assert steps(config, cg_max_steps=2) == 2, "what a call says comes first"
    with pytest.raises(ValueError, match="cg_tolerance is 2; it must lie between 0 and 1"):
        steps(GenerationConfig(cg_tolerance=2, **GREEDY))


def test_solver_limits_reach_beams_and_samples(model):
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(random_ids(2, 9), cg_max_steps=0, **options),
        model.generate(random_ids(2, 9), cg_max_steps=0, use_cache=False, **options),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cg_tolerance": 2}, "cg_tolerance is 2; it must lie between 0 and 1"),
        ({"cg_tolerance": "tight"}, "cg_tolerance is 'tight'; it must lie between 0 and 1"),
        ({"cg_tolerance": float("nan")}, "cg_tolerance is nan; it must lie between 0 and 1"),
        ({"cg_max_steps": -1}, "cg_max_steps is -1; it must be a whole number of at least 0"),
        ({"cg_max_steps": None}, "cg_max_steps is None; it must be a whole number of at least 0"),
        ({"output_solver_stats": True}, "output_solver_stats is True, .* pass return_dict_in_generate=True"),
    ],
)
def test_bad_solver_arguments_get_one_clear_sentence(model, arguments, message):
    with torch.no_grad():
        cache = model(random_ids(1, 4), use_cache=True).past_key_values
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(random_ids(1, 5), past_key_values=cache, **arguments, **GREEDY)
    assert "\n" not in str(caught.value)
    if "output_solver_stats" not in arguments:
        with pytest.raises(ValueError, match=message):
            model(random_ids(1, 5), past_key_values=cache, **arguments)
        with pytest.raises(ValueError, match=message), model.solver(**arguments):
            pass
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(cache), strict=True))


# ----------------------------------------------------------------------------------------------------- odds and ends


def test_generate_returns_what_it_is_asked_for(model):
    output = model.generate(
        random_ids(2, 5),
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        output_scores=True,
        **GREEDY,
    )
    assert [len(states) for states in output.hidden_states] == [3] * NEW
    assert [tuple(states[0].shape) for states in output.hidden_states] == [(2, 5, 32)] + [(2, 1, 32)] * (NEW - 1)
    assert output.attentions == ((),) * NEW
    assert len(output.scores) == NEW
    assert output.past_key_values.get_seq_length() == 5 + NEW - 1


def test_logits_processors_see_the_whole_sequence(model):
    lengths = []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return scores

    model.generate(random_ids(1, 5), logits_processor=LogitsProcessorList([Recorder()]), **GREEDY)
    assert lengths == list(range(5, 5 + NEW))


def test_a_prompt_from_nothing_is_the_bos_token(model):
    assert torch.equal(model.generate(**GREEDY), greedy(model, torch.tensor([[1]]))[0])
