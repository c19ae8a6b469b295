# SPDX-License-Identifier: Apache-2.0
"""The Triton convolutions, norms and gates against torch in float64: interpreted on a CPU, compiled on a GPU.

Outputs and the gradients of every input, at odd sizes, for every dtype the operators take.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM
from modeling_mesanet.mesa import gates, head_norm, mesa_layers, short_convolution, short_convolutions

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# Relative error in the Euclidean and in the maximum norm: float32 arithmetic, then one rounding to the dtype.
TOLERANCES = {FLOAT32: 2e-6, BFLOAT16: 2**-8, FLOAT16: 2**-11}

# A process of its own, because Triton reads the variable when a kernel is defined.
INTERPRETED = """
import json, torch
import test_mesa_triton_layers as tests
torch.set_num_threads(1)
# Uninitialised memory reads as NaN.
torch.use_deterministic_algorithms(True, warn_only=True)
tests.interpret()
results = [tests.small_errors("cpu"), tests.model_errors("cpu"), tests.compiled_error("cpu", "aot_eager")]
print(json.dumps([*results, tests.run_together("cpu")]))
"""


def interpret():
    """Let a CPU take the Triton operators wherever a GPU would."""
    from modeling_mesanet.mesa.mesa_triton_layers import LAUNCHES  # noqa: F401  (importing registers the operators)

    def use_triton(backend, *tensors):
        return all(tensor is None or tensor.dtype in TOLERANCES for tensor in tensors)

    mesa_layers.use_triton = use_triton


@dataclass
class Convolution:
    """A call of `short_convolution`: sizes, dtypes, and how its tensors lie in memory."""

    batch: int = 2
    length: int = 19
    channels: int = 24
    width: int = 4
    dtype: torch.dtype = FLOAT32
    weight_dtype: torch.dtype | None = None
    with_state: bool = False
    bounds: list[int] | None = None
    bounds_dtype: torch.dtype = torch.int64
    view: str = ""

    def inputs(self, device, generator):
        shape = (self.batch, self.length, self.channels)
        if self.view == "part":  # of a wider projection
            x = normal((*shape[:2], self.channels + 40), self.dtype, device, generator)[..., 16 : 16 + self.channels]
        elif self.view == "channels first":
            x = normal((self.batch, self.channels, self.length), self.dtype, device, generator).transpose(1, 2)
        else:
            x = normal(shape, self.dtype, device, generator)
        weight = normal((self.channels, self.width), self.weight_dtype or self.dtype, device, generator)
        state = None
        if self.with_state:
            state = normal((self.batch, self.channels, self.width - 1), self.dtype, device, generator)
        return x, weight, state

    def call(self, x, weight, state):
        bounds = None if self.bounds is None else torch.tensor(self.bounds, dtype=self.bounds_dtype, device=x.device)
        y, new_state = short_convolution(x, weight, state, bounds)
        return (y,) if bounds is not None else (y, new_state)


@dataclass
class Norm:
    """A call of `head_norm`."""

    shape: tuple[int, ...]
    dtype: torch.dtype = FLOAT32
    weight_dtype: torch.dtype | None = None
    gate_dtype: torch.dtype | None = None
    view: str = ""
    extreme: bool = False

    def inputs(self, device, generator):
        o = normal(self.shape, self.dtype, device, generator)
        if self.view:
            o = normal((*self.shape[:-1], self.shape[-1] + 3), self.dtype, device, generator)[..., 3:]
        if self.extreme:  # sizes on either side of epsilon's, and a zero row
            scale = torch.logspace(-6, 3, self.shape[-2], device=device).to(self.dtype)
            scale[0] = 0
            o = o * scale[:, None]
        weight = normal(self.shape[-1:], self.weight_dtype or self.dtype, device, generator)
        gate = None if self.gate_dtype is None else 3 * normal(self.shape, self.gate_dtype, device, generator)
        return o, weight, gate

    def call(self, o, weight, gate):
        return (head_norm(o, weight, 1e-6, gate),)


@dataclass
class Gates:
    """A call of `gates`."""

    batch: int
    length: int
    heads: int
    bound: float | None
    with_mask: bool

    def inputs(self, device, generator):
        shape = (self.batch, self.length, self.heads)
        logits = [normal(shape, FLOAT32, device, generator) * 6 for _ in range(2)]
        # Saturated on either side: sigmoids of exactly 0 and 1, and tails that must not vanish or overflow.
        for logit in logits:
            logit.view(-1)[:8] = torch.tensor([-200.0, -88, -30, -15, 15, 30, 88, 200], device=device)
        return *logits, *(normal((self.heads,), FLOAT32, device, generator) for _ in range(2))

    def call(self, *inputs):
        mask = None
        if self.with_mask:
            mask = (torch.arange(self.batch * self.length, device=inputs[0].device) % 3 != 1).view(self.batch, -1)
        return gates(*inputs, self.bound, mask)


def normal(shape, dtype, device, generator):
    return torch.randn(shape, generator=generator).to(device, dtype)


def gradients(case, inputs, weights):
    """Outputs of a call, and gradients of its inputs for output gradients `weights` (an output without one: None)."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    outputs = case.call(*leaves)
    if weights is None:
        return outputs, None
    used = [i for i, weight in enumerate(weights) if weight is not None]
    return outputs, torch.autograd.grad(
        [outputs[i] for i in used],
        [leaf for leaf in leaves if leaf is not None],
        [weights[i].to(outputs[i]) for i in used],
        materialize_grads=True,
    )


def difference(computed, expected):
    """Relative error in the Euclidean or maximum norm, whichever is larger; infinite where something is not finite."""
    computed, expected = computed.double(), expected.double()
    if computed.shape != expected.shape or not computed.isfinite().all():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = computed - expected
    return max(
        (error.norm() / expected.norm().clamp_min(1e-30)).item(),
        (error.abs().max() / expected.abs().max().clamp_min(1e-30)).item(),
    )


def errors(case, device, unused=()):
    """The largest error in units of what each tensor's dtype allows; outputs numbered `unused` get no gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(device, generator)
    doubles = [None if tensor is None else tensor.double() for tensor in inputs]
    outputs, _ = gradients(case, doubles, None)
    weights = [
        None if i in unused else torch.randn(o.shape, generator=generator).to(o).to(inputs[0].dtype)
        for i, o in enumerate(outputs)
    ]
    outputs, expected = gradients(case, doubles, weights)
    computed, found = gradients(case, inputs, weights)
    if device != "cpu":  # the interpreter has no order to vary
        again = [tensor for tensors in gradients(case, inputs, weights) for tensor in tensors]
        assert all(torch.equal(*pair) for pair in zip((*computed, *found), again, strict=True))
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(case.call(*inputs), computed, strict=True))
    assert all(output.dtype == inputs[0].dtype for output in computed)
    assert [grad.dtype for grad in found] == [tensor.dtype for tensor in inputs if tensor is not None]
    pairs = zip((*computed, *found), (*outputs, *expected), strict=True)
    return max(difference(ours, theirs) / TOLERANCES[ours.dtype] for ours, theirs in pairs)


SMALL = {
    "convolution": Convolution(),
    "bfloat16, state": Convolution(dtype=BFLOAT16, with_state=True),
    "float16, odd channels, one sequence": Convolution(1, 30, 7, dtype=FLOAT16, bounds=[0, 30]),
    "widest": Convolution(1, 19, 5, width=8, with_state=True),
    "narrowest": Convolution(1, 19, 5, width=2, with_state=True),
    "float32 weights": Convolution(1, dtype=BFLOAT16, weight_dtype=FLOAT32, view="part"),
    "shorter than the state": Convolution(length=2, with_state=True),
    "one token": Convolution(length=1, channels=300, with_state=True, dtype=BFLOAT16),
    "one token, no state": Convolution(length=1, width=3),
    "channels first": Convolution(1, view="channels first", with_state=True),
    "packed": Convolution(1, 28, bounds=[0, 0, 1, 2, 5, 5, 5, 6, 14, 27, 28, 28]),
    "packed, widest": Convolution(1, 21, width=8, bounds=[0, 3, 4, 11, 21], bounds_dtype=torch.int32),
    "packed, many": Convolution(1, 20, 3, bounds=[0] * 140 + [5, 6] + [17] * 150 + [20]),
    "norm": Norm((2, 5, 3, 16)),
    "norm of extremes": Norm((2, 5, 10, 16), gate_dtype=FLOAT32, extreme=True),
    "norm of an odd size": Norm((7, 5, 24), BFLOAT16, FLOAT32, view="part"),
    "norm of a long row": Norm((3, 2, 3000), FLOAT16),
    "gated norm": Norm((2, 21, 3, 64), BFLOAT16, BFLOAT16, BFLOAT16),
    "gated norm, mixed": Norm((1, 4, 2, 8), FLOAT32, FLOAT32, FLOAT16),
    "norm without rows": Norm((0, 3, 8), gate_dtype=FLOAT32),
    "gates": Gates(2, 7, 3, 0.9975, False),
    "gates, mask": Gates(3, 101, 2, 0.3, True),
    "gates, no bound": Gates(1, 5, 6, None, True),
    "gates, bound 1": Gates(1, 5, 6, 1, False),
}


def small_errors(device):
    results = {name: errors(case, device) for name, case in SMALL.items()}
    results["only the new state is used"] = errors(SMALL["bfloat16, state"], device, unused=[0])
    results["only y is used"] = errors(SMALL["shorter than the state"], device, unused=[1])
    results["only log_gamma is used"] = errors(SMALL["gates"], device, unused=[0])
    results["tails of the gates"] = tail_error(device)
    return results


def tail_error(device):
    """The largest relative error of a single gate, in units of 1e-5: also those near 0 must have their digits."""
    logits = torch.linspace(-60, 60, 241, device=device).view(1, -1, 1)
    bias = torch.zeros(1, device=device)
    computed = gates(logits, logits, bias, bias, 0.9975)
    expected = gates(logits.double(), logits.double(), bias.double(), bias.double(), 0.9975)
    relative = [((ours - theirs) / theirs).abs().max() for ours, theirs in zip(computed, expected, strict=True)]
    return max(relative).item() / 1e-5


# Convolutions computed together, and in how many launches.
TOGETHER = {
    "alike": ([Convolution()] * 3, 1),
    "bfloat16, state": ([Convolution(dtype=BFLOAT16, with_state=True)] * 2, 1),
    "packed": ([SMALL["packed"]] * 2, 1),
    "parts of wider projections": ([Convolution(view="part", with_state=True)] * 2, 1),
    "one": ([Convolution()], 1),
    "other channels": ([Convolution(), Convolution(), Convolution(channels=7)], 3),
    "other strides": ([Convolution(), Convolution(view="part")], 2),
    "other dtypes": ([Convolution(), Convolution(dtype=BFLOAT16)], 2),
    "another width": ([Convolution(), Convolution(width=3)], 2),
    "a state for one": ([Convolution(), Convolution(with_state=True)], 2),
}


@torch.no_grad()
def run_together(device):
    """The launches of each of TOGETHER, and whether the results are, bit by bit, those of calls one by one."""
    from modeling_mesanet.mesa.mesa_triton_layers import LAUNCHES

    results, launches = {}, {name: LAUNCHES[name] for name in ("short_convolution", "short_convolutions")}
    for case, (parts, _) in TOGETHER.items():
        generator, called = torch.Generator().manual_seed(0), []
        inputs = [part.inputs(device, generator) for part in parts]
        expected = [part.call(*tensors) for part, tensors in zip(parts, inputs, strict=True)]
        bounds = None if parts[0].bounds is None else torch.tensor(parts[0].bounds, device=device)

        def count(launch, called=called):
            return lambda *arguments: (called.append(launch), launch(*arguments))[1]

        try:
            LAUNCHES.update({name: count(launch) for name, launch in launches.items()})
            outputs = short_convolutions(*map(list, zip(*inputs, strict=True)), bounds)
        finally:
            LAUNCHES.update(launches)
        pairs = zip(zip(*outputs, strict=True), expected, strict=True)
        # Packed sequences leave no state.
        same = all(torch.equal(*pair) for ours, theirs in pairs for pair in zip(ours, theirs, strict=False))
        results[case] = len(called), same
    return results


def run_model(device, arguments, continued):
    """Loss, logits and gradients of a small model, in training mode with checkpointing, or of a continued sequence."""
    torch.manual_seed(0)
    config = MesaNetConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        value_head_dim=4,
        intermediate_size=16,
        chunk_size=8,
        conv_on_value=True,
        use_output_gate=True,
        cg_tolerance=None,
    )
    model = MesaNetForCausalLM(config).to(device)
    tokens = torch.randint(50, (2, 12), device=device)
    if continued:
        model.eval()
        with torch.no_grad():
            first = model(tokens[:, :7])
            return [model(tokens[:, 7:11], past_key_values=first.past_key_values).logits]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    arguments = {name: torch.tensor(value, device=device) for name, value in arguments.items()}
    output = model.train()(tokens, labels=tokens, **arguments)
    output.loss.backward()
    return [output.logits.detach(), *(parameter.grad for parameter in model.parameters())]


def model_errors(device):
    """What the kernels change in a model's outputs and gradients."""
    results, use_triton = {}, mesa_layers.use_triton
    for name, arguments in {
        "plain": {},
        "pads": {"attention_mask": [[0] * 3 + [1] * 9, [1] * 5 + [0] + [1] * 6]},
        "packed": {"cu_seq_lens_q": [0, 5, 5, 6, 24]},
        "continued": None,
    }.items():
        computed = run_model(device, arguments, arguments is None)
        try:
            mesa_layers.use_triton = lambda *tensors: False
            expected = run_model(device, arguments, arguments is None)
        finally:
            mesa_layers.use_triton = use_triton
        results[name] = max(difference(*pair) for pair in zip(computed, expected, strict=True))
    return results


def layer(x, weight, logits, bias, norm, gate):
    y, state = short_convolution(x, weight)
    beta, log_gamma = gates(logits, logits, bias, bias, 0.99)
    heads = y.unflatten(-1, (2, -1)) * (beta * log_gamma.exp()).unsqueeze(-1)
    return head_norm(heads, norm, 1e-6, gate).sum() + state.square().sum()


def compiled_error(device, backend):
    """What compiling a whole graph of all three, forward and backward, changes in the gradients, with two lengths."""
    generator = torch.Generator().manual_seed(0)
    compiled, worst = torch.compile(layer, backend=backend, fullgraph=True), 0.0
    for length in (9, 14):
        shapes = (2, length, 16), (16, 4), (2, length, 2), (2,), (8,), (2, length, 2, 8)
        inputs = [normal(shape, FLOAT32, device, generator).requires_grad_() for shape in shapes]
        ours, theirs = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, layer))
        worst = max(worst, *(difference(*pair) for pair in zip(ours, theirs, strict=True)))
    return worst


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton", reason="triton is not installed; the kernels cannot be interpreted")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_interpreted_operators_agree_with_float64(interpreted):
    # The interpreter cuts bfloat16 off where a GPU rounds.
    assert {name: error for name, error in interpreted[0].items() if not error <= 2} == {}


def test_interpreted_operators_in_a_model(interpreted):
    assert {name: error for name, error in interpreted[1].items() if not error <= 3e-5} == {}


def test_interpreted_operators_in_a_compiled_graph(interpreted):
    assert interpreted[2] <= 1e-6


def test_interpreted_convolutions_together(interpreted):
    assert interpreted[3] == {name: [launches, True] for name, (_, launches) in TOGETHER.items()}


def test_convolutions_together_in_torch():
    pytest.importorskip("triton", reason="triton is not installed; there are no launches to count")
    assert run_together("cpu") == dict.fromkeys(TOGETHER, (0, True))


def test_a_cpu_keeps_to_torch():
    assert not mesa_layers.use_triton(None, torch.zeros(1))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@cuda
def test_operators_on_a_gpu_agree_with_float64():
    assert mesa_layers.use_triton(None, torch.zeros(1, device="cuda"))
    assert not mesa_layers.use_triton(None, torch.zeros(1, device="cuda", dtype=torch.float64))
    assert {name: error for name, error in small_errors("cuda").items() if not error <= 1.1} == {}
    assert run_together("cuda") == {name: (launches, True) for name, (_, launches) in TOGETHER.items()}


LARGE = {
    "convolution": Convolution(4, 2049, 768, dtype=BFLOAT16, with_state=True),
    "convolution, autocast": Convolution(2, 4096, 1024, dtype=BFLOAT16, weight_dtype=FLOAT32),
    "convolution, float32": Convolution(3, 1027, 768),
    "convolution, float16": Convolution(2, 999, 640, width=3, dtype=FLOAT16, view="part"),
    "convolution, widest": Convolution(2, 1027, 768, width=8, dtype=BFLOAT16),
    "packed": Convolution(
        1, 5001, 768, dtype=BFLOAT16, bounds=[0, 0, 1, 1000, 1001, 1900, *range(2000, 5001, 3), 5001]
    ),
    "decode": Convolution(300, 1, 768, dtype=BFLOAT16, with_state=True),
    "heads": Norm((4, 2049, 6, 128), BFLOAT16, FLOAT32, BFLOAT16),
    "heads of 96": Norm((4, 517, 6, 96), BFLOAT16),
    "rows": Norm((3000, 3, 768), BFLOAT16),
    "rows of 5000": Norm((300, 2, 5000), FLOAT32, gate_dtype=FLOAT32),
    "gates": Gates(8, 2049, 6, 0.9975, True),
}


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", LARGE)
def test_real_sizes_on_a_gpu(name):
    # Sums over tens of thousands of tokens in float32.
    limit = 5 if LARGE[name].inputs("cuda", torch.Generator())[0].dtype == FLOAT32 else 1.1
    assert errors(LARGE[name], "cuda") <= limit


@pytest.mark.gpu
@cuda
def test_model_on_a_gpu():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert {name: error for name, error in model_errors("cuda").items() if not error <= 3e-5} == {}


@pytest.mark.gpu
@cuda
def test_compiled_graph_on_a_gpu():
    assert compiled_error("cuda", "inductor") <= 1e-5


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["bfloat16, state", "packed", "gated norm", "norm", "gates, mask"])
def test_operators_are_registered_rightly(name):
    mesa_layers.use_triton(None, torch.zeros(1, device="cuda"))
    case = SMALL[name]
    inputs = case.inputs("cuda", torch.Generator().manual_seed(0))
    operators = torch.ops.modeling_mesanet
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    if isinstance(case, Convolution):
        bounds = None if case.bounds is None else torch.tensor(case.bounds, device="cuda")
        torch.library.opcheck(operators.short_convolution.default, (*leaves, bounds))
    elif isinstance(case, Norm):
        torch.library.opcheck(operators.head_norm.default, (*leaves[:2], 1e-6, leaves[2]))
    else:
        mask = torch.ones(case.batch, case.length, dtype=torch.bool, device="cuda")
        torch.library.opcheck(operators.gates.default, (*leaves, case.bound, mask))
