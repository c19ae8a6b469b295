# SPDX-License-Identifier: Apache-2.0
"""A prompt's convolutions, gates and chunks in one kernel, against one kernel each: interpreted, and on a GPU."""

import json
import os
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from transformers.cache_utils import DynamicCache

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, modeling_mesanet
from modeling_mesanet.mesa import mesa_layers

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# A process of its own, because Triton reads the variable when a kernel is defined.
INTERPRETED = """
import json, sys, warnings
import torch
import test_mesa_triton_prefill as tests
torch.set_num_threads(1)
# Uninitialised memory reads as NaN.
torch.use_deterministic_algorithms(True, warn_only=True)
warnings.simplefilter("ignore")  # the interpreter divides zeros of rows that have converged
print(json.dumps({name: tests.RUNS[name]("cpu") for name in sys.argv[1:]}))
"""


class Case(NamedTuple):
    """A call of `launch_prefill`: sizes and dtype, and what a layer may leave out."""

    batch: int = 2
    length: int = 70
    key_dim: int = 16
    value_dim: int = 16
    width: int = 4
    dtype: torch.dtype = BFLOAT16
    weight_dtype: torch.dtype | None = None
    has_state: bool = True
    convolved_value: bool = True
    bound: float | None = 0.99
    view: bool = False
    gated: bool = False


CASES = {
    "bfloat16": Case(),
    "output gate": Case(1, gated=True),
    "float16, no state": Case(1, dtype=FLOAT16, has_state=False),
    "float32": Case(1, 20, dtype=FLOAT32),
    "one token": Case(length=1, has_state=False),
    "shorter than the state": Case(length=2),
    "whole chunks": Case(1, 128, bound=None, has_state=False),
    "padded sizes, values as they are": Case(1, 20, 48, 24, convolved_value=False),
    "widest": Case(1, 5, width=8, weight_dtype=FLOAT32),
    "narrowest, parts of wider projections": Case(1, 66, width=2, view=True),
    "wide keys": Case(1, 40, 136, 16),
    "wide values": Case(1, 20, 16, 200, dtype=FLOAT16),
}
HEADS = 2


def run_both(case, device, limits=(2, None)):
    """What a prompt's kernel gives, and what the kernels of its parts do: o, states, statistics, by name."""
    from modeling_mesanet.mesa.mesa_triton import launch_chunkwise, launch_prefill
    from modeling_mesanet.mesa.mesa_triton_layers import launch_gates, launch_head_norm, launch_short_convolution

    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=FLOAT32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, length = case.batch, case.length
    channels = [HEADS * size for size in (case.key_dim, case.key_dim, case.value_dim)]
    convolved = channels[: 3 if case.convolved_value else 2]
    if case.view:
        xs = [normal(batch, length, size + 40, dtype=case.dtype)[..., 16 : 16 + size] for size in channels]
    else:
        xs = [normal(batch, length, size, dtype=case.dtype) for size in channels]
    weights = [normal(size, case.width, dtype=case.weight_dtype or case.dtype) for size in convolved]
    states, initial = [None] * len(convolved), None
    if case.has_state:
        states = [normal(batch, size, case.width - 1, dtype=case.dtype) for size in convolved]
        root = normal(batch, HEADS, case.key_dim, case.key_dim)
        initial = root @ root.mT / case.key_dim, normal(batch, HEADS, case.key_dim, case.value_dim)
    logits = [3 * normal(batch, length, HEADS) for _ in range(2)]
    biases = [normal(HEADS) for _ in range(2)]
    lam = normal(HEADS, case.key_dim).exp()

    gate = normal(batch, length, HEADS, case.value_dim, dtype=case.dtype) if case.gated else None
    norm = normal(case.value_dim, dtype=case.weight_dtype or case.dtype), 1e-6, gate

    ours = launch_prefill(xs, weights, states, logits, biases, case.bound, lam, initial, *limits, True, norm)
    o, new_states, final, steps, residual = ours
    computed = [o, *new_states, *final, steps, residual]
    pairs = [launch_short_convolution(*each, None) for each in zip(xs, weights, states, strict=False)]
    qkv = [y for y, _ in pairs] + xs[len(pairs) :]
    q, k, v = (x.unflatten(-1, (HEADS, -1)).contiguous() for x in qkv)
    beta, log_gamma = launch_gates(*logits, *biases, case.bound, None)
    h, g = (None, None) if initial is None else initial
    o, final_h, final_g, steps, residual, _ = launch_chunkwise(
        q, k, v, log_gamma, beta, lam, h, g, None, *limits, True, False, True
    )
    expected = [launch_head_norm(o, *norm), *(state for _, state in pairs), final_h, final_g, steps, residual]
    names = ["o", *(f"conv_state_{i}" for i in range(len(pairs))), "h", "g", "steps", "residual"]
    return {name: pair for name, *pair in zip(names, computed, expected, strict=True)}


def different(case, device):
    """The names of what is not the same, bit by bit: the interpreter computes every number in the same order."""
    return [name for name, pair in run_both(case, device).items() if not torch.equal(*pair)]


def small_model(device, dtype, sizes, **overrides):
    torch.manual_seed(0)
    config = MesaNetConfig(
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=2,
        head_dim=sizes[0],
        value_head_dim=sizes[1],
        intermediate_size=32,
        use_output_gate=True,
        **{"num_hidden_layers": 2, **overrides},
    )
    model = MesaNetForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(device, dtype)


@torch.no_grad()
def read_in_pieces(model, lengths, recording=False):
    """Logits and states of a model that reads pieces of these lengths, and how many layers took one of them whole."""
    taken = []

    def count(*arguments):
        taken.append(1)
        return mesa_layers.prefill_layer(*arguments)

    device = model.device
    tokens = torch.randint(50, (2, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(device)
    cache, logits = DynamicCache(config=model.config), []
    with mock.patch.object(modeling_mesanet, "prefill_layer", count):
        for piece in tokens.split(lengths, 1):
            if recording and logits:
                cache.activate_past_recording()
            logits.append(model(piece, past_key_values=cache).logits)
    found = {f"logits_{i}": each.float() for i, each in enumerate(logits)}
    for i, layer in enumerate(cache.layers):
        for kind in ("conv_states", "recurrent_states"):
            states = {slot: state for slot, state in getattr(layer, kind).items() if state is not None}
            found |= {f"{kind}_{i}_{slot}": state.float() for slot, state in states.items()}
    return found, len(taken)


def model_errors(model, lengths):
    """Relative errors of what the prompt's kernel changes in a model, and how many layers it took."""
    with mock.patch.object(modeling_mesanet, "prefills_layer", return_value=False):
        expected, none = read_in_pieces(model, lengths)
    assert none == 0
    found, taken = read_in_pieces(model, lengths)
    errors = {name: ((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}
    return errors, taken


def interpreted_model(device):
    """`model_errors` of a model whose layers a CPU takes as a GPU would."""
    with (
        mock.patch.object(modeling_mesanet, "FUSED_DEVICES", ("cpu",)),
        mock.patch.object(mesa_layers, "triton_takes_layer", return_value=True),
    ):
        options = {"kernel_backend": "triton", "num_hidden_layers": 1, "cg_tolerance": None, "cg_max_steps": 4}
        model = small_model(device, FLOAT32, (8, 4), **options)
        errors, taken = model_errors(model, [20, 17])
        _, recorded = read_in_pieces(model, [3, 4], recording=True)
    return [max(errors.values()), taken, recorded]


RUNS = {name: lambda device, case=case: different(case, device) for name, case in CASES.items()}
RUNS["model"] = interpreted_model


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton", reason="triton is not installed; the kernels cannot be interpreted")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    names = list(RUNS)
    # Two processes: each spends a second on imports, and the runs are independent.
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", INTERPRETED, *part],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (names[::2], names[1::2])
    ]
    found = {}
    for run in runs:
        output, problems = run.communicate()
        assert run.returncode == 0, problems[-3000:]
        found |= json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_gives_what_its_parts_give(interpreted, name):
    assert interpreted[name] == []


def test_interpreted_kernel_in_a_model(interpreted):
    error, taken, recorded = interpreted["model"]
    assert error <= 1e-5
    # A layer, two pieces; what a cache records, it takes apart.
    assert (taken, recorded) == (2, 1)


@torch.no_grad()
def test_a_cpu_keeps_to_torch():
    x, weight = torch.zeros(1, 3, 8), torch.zeros(8, 4)
    assert not mesa_layers.prefills_layer([x] * 3, [weight] * 3, 8, 8)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestOnGPU:
    pytestmark = gpu

    LARGE = {
        "heads of 128": Case(2, 1000, 128, 128, gated=True),
        "heads of 64": Case(1, 2049, 64, 64, dtype=FLOAT16, gated=True),
        "float32, heads of 128": Case(1, 300, 128, 128, dtype=FLOAT32),
        "heads of 256": Case(1, 300, 256, 256),
        "segments": Case(1, 4000, 128, 128, convolved_value=False),
        "widest": Case(1, 300, 128, 64, width=8),
    }

    @torch.no_grad()
    @pytest.mark.parametrize("name", [*CASES, *LARGE])
    def test_kernel_gives_what_its_parts_give(self, name):
        case = (CASES | self.LARGE)[name]
        found = run_both(case, "cuda", (64, 1e-6))
        rounding = {FLOAT32: 1e-4, BFLOAT16: 2**-7, FLOAT16: 2**-9}[case.dtype]
        for tensor, (ours, theirs) in found.items():
            if tensor in ("steps", "residual"):
                continue
            if tensor.startswith("conv_state"):
                assert torch.equal(ours, theirs), tensor
                continue
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert error <= (rounding if tensor == "o" else 1e-4), f"{tensor}: {error:.1e}"
        again = run_both(case, "cuda", (64, 1e-6))
        assert all(torch.equal(again[tensor][0], ours) for tensor, (ours, _) in found.items())

    @pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
    @pytest.mark.parametrize("overrides", [{}, {"conv_on_value": True, "forget_gate_bound": None}])
    def test_model(self, dtype, overrides):
        model = small_model("cuda", dtype, (64, 32), cg_tolerance=None, **overrides)
        errors, taken = model_errors(model, [150, 1, 70, 2])
        # A single token after others is decoded.
        assert taken == 2 * 3
        bound = {FLOAT32: 1e-4, BFLOAT16: 3e-2, FLOAT16: 5e-3}[dtype]
        assert {name: error for name, error in errors.items() if not error <= bound} == {}

    def test_others_have_their_say(self):
        """What somebody watches, or a cache that records, is computed part by part."""
        model = small_model("cuda", BFLOAT16, (64, 64))
        assert read_in_pieces(model, [20, 10], recording=True)[1] == 2
        seen = []
        handle = model.model.layers[0].mixer.k_conv.register_forward_hook(lambda *arguments: seen.append(1))
        assert read_in_pieces(model, [20, 10])[1] == 2
        handle.remove()
        assert len(seen) == 2
        assert read_in_pieces(model, [20, 10])[1] == 4
