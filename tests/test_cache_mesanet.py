# SPDX-License-Identifier: Apache-2.0
"""The recurrent-state cache: constant size, the same result however a sequence reaches it, and no partial updates."""

import copy
import io
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_ids, states
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from modeling_mesanet import MesaNetModel
from modeling_mesanet.cache_mesanet import MesaNetCacheLayer, state_bytes, upgrade_cache


def snapshot(cache: Cache) -> list[torch.Tensor]:
    counters = [torch.as_tensor(layer.get_seq_length()) for layer in cache.layers]
    return [tensor.clone() for tensor in (*states(cache), *counters)]


def assert_unchanged(cache: Cache, before: list[torch.Tensor]) -> None:
    after = snapshot(cache)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def all_tensors(value, seen: set[int]) -> list[torch.Tensor]:
    """Every tensor reachable from `value` through attributes, dictionaries and sequences."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    children = []
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, (list, tuple)):
        children = list(value)
    elif hasattr(value, "__dict__"):
        children = list(vars(value).values())
    return [tensor for child in children for tensor in all_tensors(child, seen)]


@pytest.fixture(scope="module")
def exact_model(tiny_model):
    """Float64 and a converged solver: two ways to the same state agree to rounding."""
    return tiny_model(dtype=torch.float64, conv_on_value=True)


# ----------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"conv_on_value": True, "conv_kernel_size": 3}, torch.bfloat16)],
)
@torch.no_grad()
def test_bytes_do_not_depend_on_the_number_of_tokens(tiny_model, options, dtype):
    model = tiny_model(MesaNetModel, dtype=dtype, cg_max_steps=1, chunk_size=64, **options)
    input_ids = random_ids(2, 5000)
    cache = DynamicCache(config=model.config)
    sizes = {}
    consumed = 0
    for upto in (100, 101, 4000, 5000):
        model(input_ids[:, consumed:upto], past_key_values=cache)
        consumed = upto
        # Storage, not shape: a view of the last tokens would keep the whole prompt alive.
        tensors = all_tensors(cache, set())
        sizes[upto] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert cache.get_seq_length() == upto
    assert set(sizes.values()) == {sizes[100]}
    counters = 8 * model.config.num_hidden_layers
    assert sizes[100] == state_bytes(model.config, batch_size=2, dtype=dtype) + counters


def test_state_bytes_by_hand(tiny_config):
    # Per layer and sequence: q and k convolutions of 32 channels x 3, H of 2 x 16 x 16 and G of 2 x 16 x 8.
    assert state_bytes(tiny_config()) == 2 * 4 * (2 * 32 * 3 + 2 * 16 * 16 + 2 * 16 * 8)
    assert state_bytes(tiny_config(), batch_size=3, dtype=torch.bfloat16) == 3 * 2 * (2 * 32 * 3 * 2 + 4 * (512 + 256))
    assert state_bytes(tiny_config(conv_on_value=True)) == state_bytes(tiny_config()) + 2 * 4 * 16 * 3


# ------------------------------------------------------------------------------------------------- the invariant


@st.composite
def fed_batches(draw):
    """A batch of sequences, pads strewn among their tokens, cut into pieces."""
    batch = draw(st.integers(1, 3))
    length = draw(st.integers(1, 22))
    rows = []
    for _ in range(batch):
        real = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        side = draw(st.sampled_from(["none", "left", "right", "anywhere"]))
        if side == "none":
            real = [True] * length
        elif side != "anywhere":
            real = sorted(real, reverse=side == "right")
        rows.append(real)
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=length)) if length > 1 else set()
    bounds = [0, *sorted(cuts), length]
    full_masks = draw(st.booleans())
    kind = draw(st.sampled_from(["dynamic", "static", "own"]))
    return torch.tensor(rows), list(pairwise(bounds)), full_masks, kind, draw(st.integers(0, 99))


@settings(max_examples=60)
@given(fed_batches())
@torch.no_grad()
def test_full_equals_any_split_with_pads_anywhere(exact_model, case):
    mask, pieces, full_masks, kind, seed = case
    config = exact_model.config
    input_ids = random_ids(*mask.shape, seed=seed).masked_fill(~mask, 0)
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
        "own": lambda: None,
    }[kind]()
    logits = []
    for start, end in pieces:
        seen = mask[:, :end] if full_masks else mask[:, start:end]
        output = exact_model(input_ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    assert cache.get_seq_length() == mask.shape[1]
    for row, real in enumerate(mask):
        if not real.any():
            assert not any(state[row].any() for state in states(cache)), "pads alone must leave the state at zero"
            continue
        alone = exact_model(input_ids[row : row + 1, real], use_cache=True)
        torch.testing.assert_close(logits[row : row + 1, real], alone.logits, rtol=1e-9, atol=1e-9)
        for state, expected in zip(states(cache), states(alone.past_key_values), strict=True):
            torch.testing.assert_close(state[row : row + 1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"cg_max_steps": 0}, {"use_output_gate": True, "conv_kernel_size": 2}])
@torch.no_grad()
def test_token_by_token_equals_full(tiny_model, options):
    model = tiny_model(dtype=torch.float64, **options)
    input_ids = random_ids(2, 20)
    full = model(input_ids, use_cache=True)
    cache = DynamicCache(config=model.config)
    steps = [model(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full.logits, rtol=1e-9, atol=1e-9)
    for state, expected in zip(states(cache), states(full.past_key_values), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_token_by_token_at_the_published_tolerance(tiny_model, dtype):
    model = tiny_model(dtype=dtype, cg_tolerance=1e-4)
    input_ids = random_ids(2, 40)
    full = model(input_ids).logits.float()
    cache = DynamicCache(config=model.config)
    steps = [model(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(40)]
    difference = (torch.cat(steps, dim=1).float() - full).abs().max()
    assert difference < (2e-3 if dtype == torch.float32 else 0.15)


@torch.no_grad()
def test_the_cache_carries_the_past(exact_model):
    """Without this, a cache that remembered nothing but zeros could pass by a model that forgets."""
    input_ids = random_ids(1, 12)
    cache = exact_model(input_ids[:, :8]).past_key_values
    continued = exact_model(input_ids[:, 8:], past_key_values=cache).logits
    assert (continued - exact_model(input_ids[:, 8:]).logits).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------- operations


@torch.no_grad()
def filled(model, batch: int = 3, length: int = 7, seed: int = 1) -> tuple[DynamicCache, torch.Tensor]:
    input_ids = random_ids(batch, length, seed)
    return model(input_ids, use_cache=True).past_key_values, input_ids


@torch.no_grad()
def continue_rows(model, input_ids: torch.Tensor, rows: list[int], new: torch.Tensor) -> torch.Tensor:
    """Logits of `new` after the prompts `rows`, without any cache."""
    return model(torch.cat([input_ids[rows], new], dim=1), use_cache=False).logits[:, -new.shape[1] :]


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.batch_select_indices([2, 0]), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "select by mask", "select by list", "repeat"],
)
@pytest.mark.parametrize("new_tokens", [1, 4])
@torch.no_grad()
def test_batch_operations(exact_model, operation, rows, new_tokens):
    cache, input_ids = filled(exact_model)
    operation(cache)
    assert cache.batch_size == len(rows)
    assert cache.get_seq_length() == 7
    new = random_ids(len(rows), new_tokens, seed=5)
    logits = exact_model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits, continue_rows(exact_model, input_ids, rows, new), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_reset_forgets_everything_and_keeps_addresses(exact_model):
    cache, _ = filled(exact_model)
    addresses = [state.data_ptr() for state in states(cache)]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not any(state.any() for state in states(cache))
    assert not cache.has_previous_state()
    other = random_ids(3, 5, seed=8)
    logits = exact_model(other, past_key_values=cache).logits
    torch.testing.assert_close(logits, exact_model(other).logits, rtol=1e-12, atol=1e-12)
    assert [state.data_ptr() for state in states(cache)] == addresses
    assert cache.get_seq_length() == 5
    # And then remembers again.
    new = random_ids(3, 1, seed=9)
    logits = exact_model(new, past_key_values=cache).logits
    expected = exact_model(torch.cat([other, new], dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_states_are_updated_in_place(exact_model):
    cache, _ = filled(exact_model)
    addresses = [state.data_ptr() for state in states(cache)]
    for length in (1, 6, 1):
        exact_model(random_ids(3, length), past_key_values=cache)
        assert [state.data_ptr() for state in states(cache)] == addresses


@pytest.mark.parametrize(
    ("part", "gradients", "copied"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_the_first_states_are_stored_without_a_copy_where_they_may_be(part, gradients, copied):
    shapes = [(2, 6, 3), (2, 6, 3), (2, 1, 4, 4), (2, 1, 4, 4)]
    given = [torch.randn(*shape, 2)[..., 0] if part else torch.randn(shape) for shape in shapes]
    if gradients:
        given = [(tensor.requires_grad_() * 1.0).exp() for tensor in given]
    layer = MesaNetCacheLayer()
    with torch.set_grad_enabled(gradients):
        layer.write(given[:2], tuple(given[2:]), 5)
    stored = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    for ours, theirs in zip(stored, given, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
        assert ours.untyped_storage().nbytes() == ours.nbytes
        assert (ours.data_ptr() != theirs.data_ptr()) is copied
    assert layer.get_seq_length() == 5
    assert layer.conv_kernel_size == {0: 3, 1: 3}
    # Later states are written over the first.
    later = [torch.randn(shape) for shape in shapes]
    with torch.no_grad():
        layer.write(later[:2], tuple(later[2:]), 1)
    assert all(torch.equal(*pair) for pair in zip(stored, later, strict=True))
    if gradients:  # which autograd needs as they were
        sum(tensor.sum() for tensor in given).backward()


@pytest.mark.parametrize("duplicate", ["deepcopy", "torch.save"])
@torch.no_grad()
def test_copies_go_their_own_way(exact_model, duplicate):
    cache, input_ids = filled(exact_model)
    if duplicate == "deepcopy":
        fork = copy.deepcopy(cache)
    else:
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        fork = torch.load(buffer, weights_only=False)
    before = snapshot(cache)
    new = random_ids(3, 2, seed=5)
    logits = exact_model(new, past_key_values=fork).logits
    assert_unchanged(cache, before)
    expected = continue_rows(exact_model, input_ids, [0, 1, 2], new)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact_model(new, past_key_values=cache).logits, expected, rtol=1e-9, atol=1e-9)


def test_an_unused_cache_says_so(tiny_config):
    cache = upgrade_cache(DynamicCache(config=tiny_config()), tiny_config())
    assert [type(layer) for layer in cache.layers] == [MesaNetCacheLayer] * 2
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    assert cache.get_max_length() == -1
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert not cache.has_previous_state()
    assert not cache.is_compileable
    assert not cache.is_croppable
    static = StaticCache(config=tiny_config(), max_cache_len=8)
    assert upgrade_cache(static, tiny_config()).is_compileable


@torch.no_grad()
def test_what_transformers_asks_a_used_cache(exact_model):
    cache, _ = filled(exact_model)
    assert cache.batch_size == 3
    assert cache.get_mask_sizes(5, 0) == (12, 0)
    assert cache.has_previous_state()
    layer = cache.layers[0]
    assert layer.recurrent_states[0].shape == (3, 2, 16, 16)
    assert layer.recurrent_states[1].shape == (3, 2, 16, 8)
    assert [layer.conv_states[slot].shape for slot in range(3)] == [(3, 32, 3), (3, 32, 3), (3, 16, 3)]
    with pytest.raises(NotImplementedError, match="no keys and values"):
        cache.update(torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 0)


# ------------------------------------------------------------------------------------------------ autograd, modes


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("pieces", [(1, 4, 1), (4, 1, 1)], ids=["token first", "chunk first"])
def test_a_cache_made_in_inference_mode_continues_outside(exact_model, pieces, with_gradients):
    input_ids = random_ids(2, 12)
    expected = exact_model(input_ids).logits.detach()
    prompt, *parts, back = input_ids.split([5, *pieces, 1], dim=1)
    with torch.inference_mode():
        cache = exact_model(prompt, use_cache=True).past_key_values
    with torch.set_grad_enabled(with_gradients):
        logits = [exact_model(part, past_key_values=cache).logits for part in parts]
    with torch.inference_mode():
        again = exact_model(back, past_key_values=cache).logits
    logits = torch.cat([*logits, again.clone()], dim=1)
    torch.testing.assert_close(logits, expected[:, 5:], rtol=1e-9, atol=1e-9)
    if with_gradients:
        exact_model.zero_grad()
        logits.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in exact_model.parameters())


@pytest.mark.parametrize("cut", [False, True])
def test_a_cache_of_inference_mode_can_be_reset_and_cut_outside(exact_model, cut):
    with torch.inference_mode():
        cache = exact_model(random_ids(2, 6), use_cache=True).past_key_values
    if cut:
        cache.batch_select_indices(torch.tensor([1]))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not any(state.any() for state in states(cache))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("length", [1, 5])
def test_gradients_with_a_cache_are_truncated_at_it(tiny_model, training, length):
    model = tiny_model(dtype=torch.float64).train(training)
    prompt, first, second = random_ids(2, 6), random_ids(2, length, seed=2), random_ids(2, length, seed=3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    checkpoint = copy.deepcopy(cache)

    # Two passes before the backward pass: the second one updates the states that the first one read.
    one = model(first, past_key_values=cache).logits
    two = model(second, past_key_values=cache).logits
    (one.square().sum() + two.square().sum()).backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(not state.requires_grad for state in states(cache))

    model.zero_grad()
    model(first, past_key_values=checkpoint).logits.square().sum().backward()
    model(second, past_key_values=checkpoint).logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)
        assert gradient.isfinite().all()


# ----------------------------------------------------------------------------------------------------- bad caches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda config: DynamicCache(), "past_key_values is a DynamicCache made without a config"),
        (lambda config: (torch.zeros(1),), "past_key_values is a tuple"),
        (
            lambda config: Cache(layers=[LinearAttentionLayer(2), DynamicLayer()]),
            "keys and values (a DynamicLayer at layer 1)",
        ),
    ],
    ids=["no config", "tuple", "attention"],
)
def test_a_cache_that_cannot_work_is_refused_and_left_alone(tiny_model, make, message):
    model = tiny_model()
    cache = make(model.config)
    layers = list(getattr(cache, "layers", []))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        model(random_ids(1, 3), past_key_values=cache)
    assert "DynamicCache(config=model.config)" in str(caught.value)
    left = getattr(cache, "layers", [])
    assert len(left) == len(layers)
    assert all(now is then for now, then in zip(left, layers, strict=True))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 3}, "past_key_values has 3 layers but the model has 2"),
        ({"head_dim": 8}, "past_key_values holds the state of another model at layer 0"),
        ({"value_head_dim": 4}, "past_key_values holds the state of another model at layer 0"),
        ({"num_attention_heads": 4, "head_dim": 8}, "past_key_values holds the state of another model at layer 0"),
        ({"conv_kernel_size": 3}, "past_key_values holds the state of another model at layer 0"),
        ({"conv_on_value": True}, "past_key_values holds the state of another model at layer 0"),
    ],
)
def test_a_cache_of_another_model_is_refused_and_left_alone(tiny_model, other, message):
    cache, _ = filled(tiny_model(**other))
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(3, 2), past_key_values=cache)
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("made", "used"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float32"), ("float32", "float64")],
)
@pytest.mark.parametrize("new_tokens", [1, 4])
def test_a_cache_of_another_precision_is_refused_and_left_alone(tiny_model, made, used, new_tokens):
    cache, _ = filled(tiny_model(dtype=getattr(torch, made)))
    before = snapshot(cache)
    model = tiny_model(dtype=getattr(torch, used))
    message = f"past_key_values was made with activations in torch.{made} but this model's are in torch.{used}"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(random_ids(3, new_tokens), past_key_values=cache)
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match=message):
        model.generate(random_ids(3, 7 + new_tokens), past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert_unchanged(cache, before)


def test_a_cache_goes_on_under_autocast_but_not_out_of_it(tiny_model):
    model = tiny_model()
    new = random_ids(3, 2, seed=5)
    with torch.no_grad():
        cache, _ = filled(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(new, past_key_values=cache)
            narrow = model(random_ids(3, 7), use_cache=True).past_key_values
            model(new, past_key_values=narrow)
        model(new, past_key_values=cache)
        before = snapshot(narrow)
        with pytest.raises(ValueError, match=r"made with activations in torch\.bfloat16"):
            model(new, past_key_values=narrow)
    assert_unchanged(narrow, before)


def test_a_stock_layer_with_a_state_is_refused(tiny_model):
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    cache.layers[1].update_conv_state(torch.zeros(1, 32, 3), 0)
    with pytest.raises(ValueError, match="holds a LinearAttentionLayer at layer 1"):
        model(random_ids(1, 3), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer] * 2


@pytest.mark.parametrize("new_tokens", [1, 4])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda n: {"input_ids": random_ids(2, n)}, "batch size 2 but past_key_values holds 3 sequences"),
        (lambda n: {"input_ids": random_ids(6, n)}, "batch size 6 but past_key_values holds 3 sequences"),
        (
            lambda n: {"input_ids": random_ids(3, n), "attention_mask": torch.ones(3, n + 3)},
            r"attention_mask has shape \(3, \d\); for these inputs it must be \(3, \d+\) or \(3, \d+\)",
        ),
        (
            lambda n: {"input_ids": random_ids(3, n), "attention_mask": torch.ones(1, n + 7)},
            r"attention_mask has shape \(1, \d+\)",
        ),
        (
            lambda n: {"input_ids": random_ids(3, n), "attention_mask": torch.ones(3, 1, n, n + 7)},
            r"attention_mask has shape \(3, 1, ",
        ),
        (lambda n: {"input_ids": random_ids(3, n), "labels": random_ids(3, n + 1)}, r"labels has shape \(3, \d\)"),
        (lambda n: {"input_ids": random_ids(3, 0)}, "input_ids has no tokens"),
        (
            lambda n: {"input_ids": torch.ones(3, n)},
            "input_ids is torch.float32; it must be",
        ),
        (lambda n: {"inputs_embeds": torch.full((3, n, 32), torch.nan)}, "inputs_embeds contains NaN"),
        (lambda n: {"inputs_embeds": torch.zeros(3, n, 31)}, "inputs_embeds has shape"),
        (lambda n: {"input_ids": random_ids(3, n), "inputs_embeds": torch.zeros(3, n, 32)}, "exactly one of"),
        (lambda n: {"input_ids": random_ids(3, n), "cu_seq_lens_q": torch.tensor([0, 3 * n])}, "past_key_values"),
    ],
)
def test_a_refused_call_leaves_the_cache_untouched(tiny_model, arguments, message, new_tokens):
    model = tiny_model()
    cache, input_ids = filled(model)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        model(past_key_values=cache, **arguments(new_tokens))
    assert_unchanged(cache, before)
    new = random_ids(3, new_tokens, seed=5)
    with torch.no_grad():
        logits = model(new, past_key_values=cache).logits
    torch.testing.assert_close(logits, continue_rows(model, input_ids, [0, 1, 2], new), rtol=1e-3, atol=1e-3)


def test_a_token_outside_the_vocabulary_leaves_the_cache_untouched(tiny_model):
    model = tiny_model()
    cache, _ = filled(model)
    before = snapshot(cache)
    with pytest.raises(IndexError):
        model(torch.full((3, 2), 97), past_key_values=cache)
    assert_unchanged(cache, before)
