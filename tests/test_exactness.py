# SPDX-License-Identifier: Apache-2.0
"""One property: however its tokens reach a model, they give what the model makes of them alone and at once.

Random models, prompts, batches, pads, pieces and packings, in float32 and bfloat16, on the CPU through torch and (`-m
gpu`) on a GPU through Triton. The same in float64 and to rounding is in `test_cache_mesanet.py`, single features of
`generate()` are in `test_generation.py`.
"""

import copy
import functools
import tempfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_model
from transformers import DynamicCache, StaticCache

from modeling_mesanet import MesaNetForCausalLM, load_state, save_state
from modeling_mesanet.mesa import select_backend

# Relative to the norm of a token's logits. In float32 the ways differ by rounding, which the condition of the system
# multiplies; in bfloat16 by the rounding of the activations, of 2^-8, from layer to layer.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 6e-2}

# Each example may run up to a dozen passes.
FEW = settings(max_examples=12)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


# Few models, so that compiled kernels serve many examples.
MODELS = {
    "plain": {},
    "wide values": {"value_head_dim": 24, "conv_kernel_size": 2, "forget_gate_bound": None},
    "all options": {
        "conv_on_value": True,
        "use_output_gate": True,
        "tie_word_embeddings": False,
        "head_norm_eps": 1e-2,
    },
    "no solver": {"cg_max_steps": 0, "num_hidden_layers": 1},
}


@functools.cache
def model_of(name: str, dtype: torch.dtype, device: str) -> MesaNetForCausalLM:
    """On a GPU with heads of 16 and up, which the Triton kernels take."""
    options = {"value_head_dim": 16, "pad_token_id": 0, "cg_tolerance": 1e-6} | MODELS[name]
    return make_model(dtype=dtype, seed=len(name), **options).to(device)


def test_the_gpu_runs_triton(device):
    """Otherwise the properties below would only test torch twice."""
    if device == "cpu":
        assert select_backend(device)[0] == "torch"
    else:
        assert select_backend(device)[0] == "triton", "unset MESANET_BACKEND"


def random_ids(batch: int, length: int, seed: int, device: str) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def assert_agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits `[..., vocabulary]` agree at every token, within the bound of their dtype."""
    bound = BOUNDS[expected.dtype]
    actual, expected = actual.double(), expected.double()
    error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    assert error <= bound, f"relative error {error:.1e}, at most {bound:.0e}"


def alone(model: MesaNetForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, vocabulary]` of one row `[T]` at once, without a cache."""
    return model(ids.unsqueeze(0), use_cache=False).logits[0]


models = st.sampled_from(list(MODELS))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 99)


@st.composite
def pieces(draw, length: int) -> list[tuple[int, int]]:
    """Bounds of the pieces that a text is fed in: at once, in chunks of one size, token by token, or anyhow."""
    size = draw(st.sampled_from([length, 1, 2, 7, None]))
    if size is None:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=5))) if length > 1 else []
    else:
        cuts = list(range(size, length, size))
    return list(pairwise([0, *cuts, length]))


@st.composite
def masks(draw) -> torch.Tensor:
    """Which entries of a batch are tokens, bool `[B, T]`, each row with one at least."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    rows = []
    for _ in range(batch):
        side = draw(st.sampled_from(["none", "left", "right", "between turns"]))
        count = length if side == "none" else draw(st.integers(1, length))
        places = torch.arange(length)
        before = {"none": count, "left": 0, "right": count, "between turns": count // 2}[side]
        rows.append((places < before) | (places >= length - (count - before)))
    return torch.stack(rows)


@st.composite
def batches(draw) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """`masks`, and the pieces to feed the batch in."""
    mask = draw(masks())
    return mask, draw(pieces(mask.shape[1]))


@FEW
@given(models, dtypes, batches(), seeds, st.sampled_from([None, DynamicCache, StaticCache]), st.booleans())
@torch.no_grad()
def test_batches_pads_and_pieces(device, name, dtype, batch, seed, cache_class, saved):
    """uncached = cached = chunked = token by token = continued from a saved state, padded anywhere, in any batch."""
    model, (mask, cuts) = model_of(name, dtype, device), batch
    mask = mask.to(device)
    ids = random_ids(*mask.shape, seed, device)
    cache = None
    if cache_class is not None:
        limit = {"max_cache_len": 64} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **limit)
    logits = []
    for start, end in cuts:
        if saved and start:
            with tempfile.TemporaryDirectory() as folder:
                save_state(cache, f"{folder}/state", model=model)
                cache = load_state(f"{folder}/state", model=model)
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        cache = output.past_key_values
    logits = torch.cat(logits, dim=1)
    at_once = model(ids, attention_mask=mask, use_cache=False).logits
    for row, real in enumerate(mask):
        expected = alone(model, ids[row, real])
        assert_agree(logits[row, real], expected)
        assert_agree(at_once[row, real], expected)


@FEW
@given(
    models, dtypes, st.lists(st.integers(1, 20), min_size=1, max_size=4), seeds, st.sampled_from(["bounds", "index"])
)
@torch.no_grad()
def test_packing(device, name, dtype, lengths, seed, way):
    model, bounds = model_of(name, dtype, device), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids = random_ids(1, bounds[-1], seed, device)
    if way == "bounds":
        marker = {"cu_seq_lens_q": torch.tensor(bounds, device=device)}
    else:
        marker = {"seq_idx": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(device)}
    packed = model(ids, use_cache=False, **marker).logits[0]
    for start, end in pairwise(bounds):
        assert_agree(packed[start:end], alone(model, ids[0, start:end]))


# generate() itself: the tokens may differ where two are equally likely, so what it says of them is compared, and that
# its choice is the likeliest. Sampling and beams compare with themselves without a cache, in float64.


WAYS = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
}


@FEW
@given(models, masks(), seeds, st.sampled_from(list(WAYS)), st.booleans())
@torch.no_grad()
def test_greedy_decoding(device, name, mask, seed, way, embeddings):
    model, mask = model_of(name, torch.float32, device), mask.long().to(device)
    ids = random_ids(*mask.shape, seed, device)
    prompt = {"inputs_embeds": model.get_input_embeddings()(ids)} if embeddings else {"input_ids": ids}
    output = model.generate(
        **prompt,
        **WAYS[way],
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[:, -4:]
    logits = torch.stack(output.logits, dim=1)
    for row in range(len(mask)):
        whole = torch.cat([ids[row, mask[row].bool()], new[row, :-1]])
        assert_agree(logits[row], alone(model, whole)[-4:])
        assert torch.equal(logits[row].argmax(-1), new[row])


@FEW
@given(
    models,
    st.integers(1, 3),
    st.integers(1, 12),
    seeds,
    st.sampled_from(
        [
            {"do_sample": True, "top_k": 20},
            {"do_sample": True, "num_return_sequences": 2},
            {"do_sample": False, "num_beams": 3},
            {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        ]
    ),
    st.sampled_from([{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]),
)
@torch.no_grad()
def test_sampling_and_beams(name, batch, length, seed, options, way):
    """The same with and without a cache; float64, which only torch computes, so that near ties do not decide."""
    model = model_of(name, torch.float64, "cpu")
    ids = random_ids(batch, length, seed, "cpu")
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, **options}
    torch.manual_seed(seed)
    expected = model.generate(ids, use_cache=False, **arguments)
    torch.manual_seed(seed)
    assert torch.equal(model.generate(ids, **arguments, **way), expected)


@FEW
@given(models, st.integers(1, 20), st.integers(1, 20), seeds, st.integers(1, 3))
@torch.no_grad()
def test_forks_of_a_state(device, name, prefix, rest, seed, copies):
    """A prefix read once, its state multiplied, and each copy continued in its own way."""
    model = model_of(name, torch.float32, device)
    ids = random_ids(copies, prefix + rest, seed, device)
    ids[:, :prefix] = ids[:1, :prefix]
    state = model(ids[:1, :prefix], use_cache=True).past_key_values
    fork = copy.deepcopy(state)
    fork.batch_repeat_interleave(copies)
    logits = model(ids[:, prefix:], past_key_values=fork).logits
    for row in range(copies):
        assert_agree(logits[row], alone(model, ids[row])[prefix:])
    assert state.get_seq_length() == prefix, "the original stays"
