# SPDX-License-Identifier: Apache-2.0
"""The one-token Triton kernel against the oracle, the torch step and the layer in torch.

Interpreted on a CPU, compiled on a GPU: the same tests, but that a CPU runs them in a process of its own, because
Triton reads the variable that says so when a kernel is defined.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from mesa_inputs import (
    CONVERGED,
    FLOAT32_BOUND,
    HARD,
    OUTPUTS,
    WELL_CONDITIONED,
    Inputs,
    assert_close,
    float32_bound,
    generator,
    make_inputs,
    make_state,
    relative_error,
)
from transformers.cache_utils import DynamicCache

from modeling_mesanet import MesaNetConfig
from modeling_mesanet.cache_mesanet import upgrade_cache
from modeling_mesanet.mesa import MesaState, mesa_reference
from modeling_mesanet.mesa.mesa_decode import decode_step
from modeling_mesanet.mesa.mesa_solver import l2_normalize
from modeling_mesanet.modeling_mesanet import MesaNetMixer, Solver

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED or torch.cuda.is_available():
    from modeling_mesanet.mesa import mesa_triton_decode
    from modeling_mesanet.mesa.mesa_triton_decode import triton_decode_layer, triton_decode_step

runs_the_kernel = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; test_interpreted runs these on a CPU"
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

# The compiled kernel takes a head at a time; the interpreter takes its time.
SIZES = [(12, 7), (1, 1), (32, 40), (128, 128), (256, 24)]
COMPILED_SIZES = [(16, 12), (64, 64), (128, 256), (256, 256), (200, 130), (16, 256)]


@pytest.mark.skipif(INTERPRETED, reason="these are the interpreted tests")
def test_interpreted():
    pytest.importorskip("triton", reason="triton is not installed; the kernel cannot be interpreted")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.fixture(autouse=True)
def compared_with_torch(monkeypatch):
    monkeypatch.setenv("MESANET_BACKEND", "torch")


def on_device(tensors):
    """Copies on the device under test."""
    return type(tensors)(*(tensor.to(DEVICE).clone() for tensor in tensors))


def run_steps(inputs: Inputs, state: MesaState, max_steps=64, tolerance=1e-4, normalize=True):
    """All tokens of `inputs` by the kernel, from a copy of `state`: o, states, steps and residuals, on the CPU."""
    inputs, state = on_device(inputs), on_device(state)
    outputs = []
    for t in range(inputs.q.shape[1]):
        token = (tensor[:, t] for tensor in inputs[:5])
        outputs.append(triton_decode_step(*token, inputs.lam, *state, max_steps, tolerance, normalize))
    o, steps, residual = (torch.stack(parts, 1).cpu() for parts in zip(*outputs, strict=True))
    return SimpleNamespace(o=o, h=state.h.cpu(), g=state.g.cpu(), steps=steps, residual=residual)


def torch_steps(inputs: Inputs, state: MesaState, max_steps=64, tolerance=1e-4, normalize=True):
    """The same in torch, on the CPU."""
    inputs, state = Inputs(*(tensor.float() for tensor in inputs)), MesaState(*(tensor.clone() for tensor in state))
    outputs = []
    for t in range(inputs.q.shape[1]):
        q, k, v, log_gamma, beta = (tensor[:, t] for tensor in inputs[:5])
        q, k = (l2_normalize(q), l2_normalize(k)) if normalize else (q, k)
        outputs.append(decode_step(q, k, v, log_gamma, beta, inputs.lam, *state, max_steps, tolerance))
    o, steps, residual = (torch.stack(parts, 1) for parts in zip(*outputs, strict=True))
    return SimpleNamespace(o=o, h=state.h, g=state.g, steps=steps, residual=residual)


def states_close(actual, expected) -> bool:
    return relative_error(actual.h, expected.h) < 1e-6 and relative_error(actual.g, expected.g) < 1e-6


@pytest.mark.gpu
@runs_the_kernel
class TestStep:
    @pytest.mark.parametrize("family", WELL_CONDITIONED + HARD)
    def test_against_the_oracle(self, family):
        inputs = make_inputs(family, 1, 3, 2, dtype=torch.float32)
        state = make_state(1, 2, 16, 12, dtype=torch.float32)
        o, final = mesa_reference(*inputs, initial_state=state)
        actual = run_steps(inputs, state, **CONVERGED)
        expected = dict(zip(OUTPUTS, (o, *final), strict=True))
        assert_close(dict(zip(OUTPUTS, (actual.o, actual.h, actual.g), strict=True)), expected, float32_bound(family))

    @pytest.mark.parametrize(
        ("key_dim", "value_dim"), SIZES + [pytest.param(*size, marks=compiled_only) for size in COMPILED_SIZES]
    )
    # One head alone and many take different paths: of the former, both states are loaded at once.
    @pytest.mark.parametrize("heads", [1, pytest.param(300, marks=compiled_only)])
    def test_against_torch(self, key_dim, value_dim, heads):
        inputs = make_inputs("mixed", 2, 1, heads, key_dim, value_dim, dtype=torch.float32)
        state = make_state(2, heads, key_dim, value_dim, dtype=torch.float32)
        actual, expected = run_steps(inputs, state), torch_steps(inputs, state)
        assert relative_error(actual.o, expected.o) < FLOAT32_BOUND
        assert states_close(actual, expected)
        # A residual at the threshold may fall on either side of it.
        assert (actual.steps - expected.steps).abs().max() <= 1
        assert relative_error(actual.h, actual.h.mT) < 1e-7
        unstopped = actual.steps == expected.steps
        difference = (actual.residual - expected.residual).abs()[unstopped]
        assert difference.max() < 1e-6

    def test_a_head_alone(self):
        inputs = make_inputs("normal", 1, 2, 1, 128, 128, dtype=torch.float32)
        state = make_state(1, 1, 128, 128, dtype=torch.float32)
        actual, expected = run_steps(inputs, state), torch_steps(inputs, state)
        assert relative_error(actual.o, expected.o) < FLOAT32_BOUND
        assert states_close(actual, expected)

    @pytest.mark.parametrize("max_steps", [0, 1, 5])
    def test_fixed_steps(self, max_steps):
        inputs = make_inputs("normal", 2, 2, 2, dtype=torch.float32)
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        options = {"max_steps": max_steps, "tolerance": None}
        actual, expected = run_steps(inputs, state, **options), torch_steps(inputs, state, **options)
        assert relative_error(actual.o, expected.o) < FLOAT32_BOUND
        assert (actual.steps == max_steps).all()
        assert relative_error(actual.residual, expected.residual) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_only_at_the_end(self, dtype):
        inputs = make_inputs("silu", 2, 1, 2, dtype=torch.float32)
        rounded = Inputs(*(tensor.to(dtype) for tensor in inputs[:3]), *inputs[3:])
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        actual = run_steps(rounded, state)
        expected = run_steps(Inputs(*(tensor.float() for tensor in rounded)), state)
        assert actual.o.dtype == dtype
        # Half a unit in the last place; one where the interpreter cuts bfloat16 off instead of rounding.
        allowed = torch.finfo(dtype).eps * expected.o.abs()
        assert ((actual.o.float() - expected.o).abs() <= allowed).all()
        assert states_close(actual, expected)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_any_scale_of_q(self, scale, normalize):
        inputs = make_inputs("normal", 1, 1, 2, dtype=torch.float32)
        state = make_state(1, 2, 16, 12, dtype=torch.float32)
        inputs = inputs._replace(k=l2_normalize(inputs.k))
        options = {"normalize": normalize, "max_steps": 10, "tolerance": None}
        actual = run_steps(inputs._replace(q=inputs.q * scale), state, **options)
        expected = run_steps(inputs, state, **options)
        # Normalised, q is q / eps^.5 where it is tiny, else the same.
        norm = inputs.q.double().norm(dim=-1, keepdim=True)
        factor = scale
        if normalize:
            factor = scale * ((norm**2 + 1e-6) / ((scale * norm) ** 2 + 1e-6)).sqrt()
        assert relative_error(actual.o.double(), expected.o.double() * factor) < FLOAT32_BOUND
        assert torch.equal(actual.steps, expected.steps)

    def test_any_scale_of_k_and_v(self):
        inputs = make_inputs("normal", 1, 1, 2, dtype=torch.float32)
        state = make_state(1, 2, 16, 12, dtype=torch.float32)
        actual = run_steps(inputs._replace(k=inputs.k * 1e30, v=inputs.v * 1e30), state)
        expected = torch_steps(inputs._replace(v=inputs.v * 1e30), state)
        assert relative_error(actual.o.double(), expected.o.double()) < 1e-5
        # The small epsilon of the norm is what differs.
        assert relative_error(actual.h, expected.h) < 1e-5

    def test_zero_and_nan_queries_and_zero_keys(self):
        inputs = make_inputs("normal", 2, 1, 2, dtype=torch.float32)
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        special = inputs._replace(q=inputs.q.clone(), k=inputs.k.clone())
        special.q[0, 0, 0], special.q[0, 0, 1, 3], special.k[1, 0, 0] = 0, torch.nan, 0
        actual, expected = run_steps(special, state), torch_steps(special, state)
        assert (actual.o[0, 0, 0] == 0).all()
        assert actual.steps[0, 0, 0] == 0
        assert actual.residual[0, 0, 0] == 0
        assert actual.o[0, 0, 1].isnan().all()
        assert relative_error(actual.o[1], expected.o[1]) < FLOAT32_BOUND
        assert states_close(actual, expected)

    def test_breakdown_keeps_the_last_good_iterate(self):
        """An H with negative eigenvalues, as no sequence of tokens makes it."""
        inputs = make_inputs("normal", 1, 1, 2, dtype=torch.float32)
        inputs = inputs._replace(lam=torch.full_like(inputs.lam, 0.5), q=torch.zeros_like(inputs.q))
        # A first direction of positive curvature, a second one of negative; and a first one of negative.
        inputs.q[..., :2], inputs.beta[:], inputs.log_gamma[:] = 1, 0, 0
        h = torch.zeros(1, 2, 16, 16)
        h[0, 0, 0, 0], h[0, 0, 1, 1], h[0, 1, 0, 0] = 4, -1, -4
        state = MesaState(h, make_state(1, 2, 16, 12, dtype=torch.float32).g)
        actual, expected = run_steps(inputs, state), torch_steps(inputs, state)
        assert actual.steps.flatten().tolist() == expected.steps.flatten().tolist() == [1, 0]
        assert relative_error(actual.o, expected.o) < FLOAT32_BOUND
        assert (actual.o[0, 0, 1] == 0).all()
        assert relative_error(actual.residual, expected.residual) < FLOAT32_BOUND

    def test_pads_and_resets(self):
        inputs = make_inputs("normal", 2, 1, 1, dtype=torch.float32)
        state = make_state(2, 1, 16, 12, dtype=torch.float32)
        inputs.beta[0], inputs.log_gamma[0], inputs.log_gamma[1] = 0, 0, -torch.inf
        actual = run_steps(inputs, state)
        assert torch.equal(actual.h[0], state.h[0])
        assert torch.equal(actual.g[0], state.g[0])
        k = l2_normalize(inputs.k[1, 0, 0])
        assert relative_error(actual.h[1, 0], inputs.beta[1] * torch.outer(k, k)) < 1e-6

    def test_any_strides(self):
        inputs = make_inputs("normal", 2, 1, 2, 16, 16, dtype=torch.float32)
        state = make_state(2, 2, 16, 16, dtype=torch.float32)
        expected = run_steps(inputs, state)
        token, state = on_device(inputs), on_device(state)
        fused = torch.stack([token.q[:, 0], token.k[:, 0], token.v[:, 0]], dim=2)  # [B, H, 3, K]
        q, k = fused[:, :, 0], fused[:, :, 1]
        v = fused[:, :, 2].mT.contiguous().mT  # whose last dimension is not contiguous
        log_gamma, beta = (gate[:, 0].t().contiguous().t() for gate in (token.log_gamma, token.beta))
        h, g = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in state)
        o, *_ = triton_decode_step(q, k, v, log_gamma, beta, token.lam, h, g, 64, 1e-4)
        assert torch.equal(o.cpu(), expected.o[:, 0])
        assert torch.equal(h.cpu(), expected.h)
        assert torch.equal(g.cpu(), expected.g)

    def test_statistics_are_optional(self):
        inputs, state = make_inputs("normal", 1, 1, 1, dtype=torch.float32), make_state(1, 1, 16, 12).h.new_zeros
        arguments = [tensor[:, 0].to(DEVICE) for tensor in inputs[:5]]
        states = [state((1, 1, 16, size), dtype=torch.float32, device=DEVICE) for size in (16, 12)]
        o, steps, residual = triton_decode_step(*arguments, inputs.lam.to(DEVICE), *states, 30, 1e-4, True, False)
        assert o.isfinite().all()
        assert steps is None
        assert residual is None

    def test_refuses_what_it_would_read_beyond(self):
        inputs, state = (
            on_device(make_inputs("normal", 2, 1, 2).to(torch.float32)),
            on_device(make_state(2, 2, 16, 12)),
        )
        token = [tensor[:, 0] for tensor in inputs[:5]]
        with pytest.raises(ValueError, match=r"h is torch\.float64 and g is torch\.float64; the kernel keeps states"):
            triton_decode_step(*token, inputs.lam, *state, 30, 1e-4)
        h, g = (part.float() for part in state)
        with pytest.raises(ValueError, match=r"h has shape \(1, 2, 16, 16\); it must be \(2, 2, 16, 16\)"):
            triton_decode_step(*token, inputs.lam, h[:1], g, 30, 1e-4)
        with pytest.raises(ValueError, match=r"beta has shape \(1, 2\); it must be \(2, 2\)"):
            triton_decode_step(*token[:4], token[4][:1], inputs.lam, h, g, 30, 1e-4)
        wide = torch.zeros(2, 2, 300, device=DEVICE)
        with pytest.raises(ValueError, match="K is 300 and V is 12; the kernel takes heads of at most 256"):
            triton_decode_step(wide, wide, *token[2:], inputs.lam, h, g, 30, 1e-4)
        assert torch.equal(h.cpu().double(), make_state(2, 2, 16, 12).h.float().double())

    def test_operator(self):
        inputs, state = on_device(make_inputs("normal", 2, 1, 2, dtype=torch.float32)), make_state(2, 2, 16, 12)
        state = on_device(MesaState(*(part.float() for part in state)))
        token = [tensor[:, 0].contiguous() for tensor in inputs[:5]]
        expected = triton_decode_step(*token, inputs.lam, *(part.clone() for part in state), 64, 1e-4)
        operator = torch.ops.modeling_mesanet.triton_decode_step.default
        torch.library.opcheck(operator, (*token, inputs.lam, *(part.clone() for part in state), 64, 1e-4))
        actual = operator(*token, inputs.lam, *state, 64, 1e-4)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


class Layer:
    """A mixer in torch with a cache that holds a few tokens, and the arguments of `triton_decode_layer` for the next.

    Args:
        dtype: of weights, inputs and convolution states.
        batch: B.
        overrides: fields of the config.
    """

    def __init__(self, dtype=torch.float32, batch=2, **overrides):
        fields = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "value_head_dim": 12}
        fields |= {"num_hidden_layers": 1, "vocab_size": 8, "cg_max_steps": 200, "cg_tolerance": 1e-6}
        self.config = MesaNetConfig(**(fields | overrides))
        self.source = generator(3)
        mixer = MesaNetMixer(self.config, 0).eval()
        with torch.no_grad():
            for parameter in mixer.parameters():
                spread = 1.0 if parameter.ndim != 2 else 2 * parameter.shape[1] ** -0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=self.source))
        for name, parameter in mixer.named_parameters():
            if name not in ("beta_bias", "gamma_bias", "lambda_param"):
                parameter.data = parameter.data.to(dtype)
        self.mixer, self.dtype, self.batch = mixer.to(DEVICE), dtype, batch
        self.solver = Solver(self.config.cg_max_steps, self.config.cg_tolerance, output_stats=False)
        self.cache = upgrade_cache(DynamicCache(config=self.config), self.config)
        with torch.no_grad():
            self.mixer(self.hidden(5), None, self.cache, solver=self.solver)
        layer = self.cache.layers[0]
        self.conv_states = [layer.conv_states[slot].clone() for slot in range(len(layer.conv_states))]
        self.states = [layer.recurrent_states[slot].clone() for slot in range(2)]

    def hidden(self, length):
        shape = (self.batch, length, self.config.hidden_size)
        return torch.randn(shape, generator=self.source).to(DEVICE, self.dtype)

    @torch.no_grad()
    def arguments(self, hidden, mask=None):
        """Of `triton_decode_layer`, for `hidden` `[B, 1, d]`; the states are the layer's own."""
        mixer, config = self.mixer, self.config
        convolutions = [mixer.q_conv, mixer.k_conv, mixer.v_conv]
        convolved = config.conv_on_value
        gate = None if mixer.output_gate_proj is None else mixer.output_gate_proj(hidden)
        return (
            mixer.q_proj(hidden),
            mixer.k_proj(hidden),
            mixer.v_proj(hidden),
            mixer.beta_proj(hidden),
            mixer.gamma_proj(hidden),
            *self.conv_states,
            *([] if convolved else [None]),
            *self.states,
            *(None if conv is None else conv.weight.detach() for conv in convolutions),
            mixer.beta_bias.detach(),
            mixer.gamma_bias.detach(),
            mixer.lambda_param.detach(),
            mixer.o_norm.weight.detach(),
            gate,
            mask,
            config.forget_gate_bound,
            config.lambda_lower_bound,
            mixer.o_norm.eps,
            config.cg_max_steps,
            config.cg_tolerance,
        )

    @torch.no_grad()
    def next(self, mask=None):
        """The next token by the mixer and by the kernel; the layer's states move on."""
        hidden = self.hidden(1)
        expected, _ = self.mixer(hidden, mask, self.cache, solver=self.solver)
        o, steps, residual = triton_decode_layer(*self.arguments(hidden, mask))
        return self.mixer.o_proj(o), expected, steps, residual

    def conv_errors(self):
        layer = self.cache.layers[0]
        return [relative_error(state, layer.conv_states[slot]) for slot, state in enumerate(self.conv_states)]

    def state_errors(self):
        layer = self.cache.layers[0]
        return [relative_error(state, layer.recurrent_states[slot]) for slot, state in enumerate(self.states)]


VARIANTS = {
    "plain": {},
    "everything": {"conv_on_value": True, "use_output_gate": True, "conv_kernel_size": 3, "head_norm_eps": 1e-2},
    "without bound": {"forget_gate_bound": None, "conv_kernel_size": 2, "head_dim": 12},
    "wide convolution": {"conv_kernel_size": 8, "conv_on_value": True, "lambda_lower_bound": 0.01},
    "without solver": {"cg_max_steps": 0, "use_output_gate": True},
    "large": {"head_dim": 128, "value_head_dim": 128, "num_attention_heads": 1, "conv_on_value": True},
}


@pytest.mark.gpu
@runs_the_kernel
class TestLayer:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_several_tokens(self, variant):
        layer = Layer(**VARIANTS[variant])
        for _ in range(2):
            actual, expected, steps, residual = layer.next()
            assert relative_error(actual, expected) < 2e-5
            assert layer.conv_errors() == [0] * len(layer.conv_states)
            assert max(layer.state_errors()) < 1e-5
            if layer.config.cg_max_steps:
                assert (steps > 0).all()
                assert (residual <= 1e-6).all()
            else:
                assert (steps == 0).all()
                assert (residual == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        layer = Layer(dtype, conv_on_value=True, use_output_gate=True)
        for _ in range(2):
            actual, expected, *_ = layer.next()
            assert actual.dtype == dtype
            # torch rounds every product of the convolution, the output before its norm, and after it.
            assert relative_error(actual, expected) < (3e-2 if dtype == torch.bfloat16 else 4e-3)
            assert layer.conv_errors() == [0, 0, 0]
            assert max(layer.state_errors()) < (2e-2 if dtype == torch.bfloat16 else 2e-3)

    @pytest.mark.parametrize("conv_on_value", [False, True])
    def test_pads(self, conv_on_value):
        layer = Layer(batch=3, conv_on_value=conv_on_value)
        for pattern in ([True, False, True], [False, True, True]):
            mask = torch.tensor(pattern, device=DEVICE)[:, None]
            before = [state.clone() for state in (*layer.states, *layer.conv_states)]
            actual, expected, *_ = layer.next(mask)
            # What comes out at a pad is of no use, but it is the same.
            assert relative_error(actual, expected) < 2e-5
            assert layer.conv_errors() == [0] * len(layer.conv_states)
            assert max(layer.state_errors()) < 1e-5
            for old, new in zip(before, (*layer.states, *layer.conv_states), strict=True):
                unchanged = (old == new).flatten(1).all(1).tolist()
                assert unchanged == [not real for real in pattern]

    def test_any_strides(self):
        layer, twin = Layer(use_output_gate=True), Layer(use_output_gate=True)
        hidden = layer.hidden(1)
        arguments = list(layer.arguments(hidden))
        expected, *_ = triton_decode_layer(*arguments)
        strided = list(twin.arguments(hidden))
        wide = torch.cat([strided[0], strided[1], strided[2], strided[17]], dim=-1)
        strided[0], strided[1], strided[2], strided[17] = wide.split([32, 32, 24, 24], dim=-1)
        for index in (5, 8):  # the state of q's convolution, and H
            strided[index] = strided[index].transpose(0, 1).contiguous().transpose(0, 1)
        actual, *_ = triton_decode_layer(*strided)
        assert torch.equal(actual, expected)
        for ours, theirs in zip(strided[5:10], arguments[5:10], strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)

    def test_extreme_gates_and_parameters(self):
        """Gates that are shut or wide open, and a softplus at both ends."""
        layer = Layer(cg_tolerance=1e-7)  # a step more or less, by rounding, would show in an output this small
        with torch.no_grad():
            layer.mixer.beta_bias.copy_(torch.tensor([200.0, -200.0]))
            layer.mixer.gamma_bias.copy_(torch.tensor([-200.0, 200.0]))
            layer.mixer.lambda_param[0, :4] = torch.tensor([-90.0, -10.0, 19.0, 60.0])
        actual, expected, *_ = layer.next()
        assert actual.isfinite().all()
        assert relative_error(actual, expected) < 2e-5
        assert max(layer.state_errors()) < 1e-5

    def test_refuses_what_it_would_read_beyond(self):
        layer = Layer()
        arguments = list(layer.arguments(layer.hidden(1)))
        for index, wrong, message in (
            (5, arguments[5][:1], r"q_state has shape \(1, 32, 3\); it must be \(2, 32, 3\)"),
            (11, arguments[11][:5], r"k_weight has shape \(5, 1, 4\); it must be \(32, 4\) or \(32, 1, 4\)"),
            (7, arguments[5], "v_state and v_weight belong together; give both or neither"),
            (2, arguments[2][..., :20], r"g has shape \(2, 2, 16, 12\); it must be \(2, 2, 16, 10\)"),
            (10, torch.zeros(32, 1, 9, device=DEVICE), "the convolutions have width 9; the kernel takes 2 to 8"),
        ):
            with pytest.raises(ValueError, match=message):
                triton_decode_layer(*arguments[:index], wrong, *arguments[index + 1 :])

    def test_operator(self):
        options = {"conv_on_value": True, "use_output_gate": True}
        layer, twin = Layer(**options), Layer(**options)
        hidden, mask = layer.hidden(1), torch.tensor([True, False], device=DEVICE)
        expected = triton_decode_layer(*twin.arguments(hidden, mask))
        operator = torch.ops.modeling_mesanet.triton_decode_layer.default
        copies = (
            argument.clone() if isinstance(argument, torch.Tensor) else argument
            for argument in layer.arguments(hidden, mask)
        )
        torch.library.opcheck(operator, tuple(copies))
        actual = operator(*layer.arguments(hidden, mask))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
        for ours, theirs in zip(layer.states + layer.conv_states, twin.states + twin.conv_states, strict=True):
            assert torch.equal(ours, theirs)

    def test_operator_without_what_is_optional(self):
        layer, twin = Layer(), Layer()
        hidden = layer.hidden(1)
        expected = triton_decode_layer(*twin.arguments(hidden))
        actual = torch.ops.modeling_mesanet.triton_decode_layer(*layer.arguments(hidden))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.gpu
@runs_the_kernel
@compiled_only
class TestOnAGpu:
    @pytest.mark.parametrize("batch", [1, 100])
    def test_graph_of_a_step(self, batch):
        inputs = make_inputs("silu", batch, 4, 2, 128, 128, dtype=torch.float32)
        state = make_state(batch, 2, 128, 128, dtype=torch.float32)
        expected = run_steps(inputs, state)
        inputs, state = on_device(inputs), on_device(state)
        token = [tensor[:, 0].clone() for tensor in inputs[:5]]
        triton_decode_step(*token, inputs.lam, *(part.clone() for part in state), 64, 1e-4)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, steps, _ = triton_decode_step(*token, inputs.lam, *state, 64, 1e-4)
        for t in range(4):
            for static, tensor in zip(token, inputs[:5], strict=True):
                static.copy_(tensor[:, t])
            graph.replay()
            assert torch.equal(o.cpu(), expected.o[:, t])
            assert torch.equal(steps.cpu(), expected.steps[:, t])
        assert torch.equal(state.h.cpu(), expected.h)
        assert torch.equal(state.g.cpu(), expected.g)

    def test_graph_of_a_layer(self):
        options = {"head_dim": 128, "value_head_dim": 128, "conv_on_value": True, "use_output_gate": True}
        layer, twin = Layer(torch.bfloat16, **options), Layer(torch.bfloat16, **options)
        static = layer.arguments(layer.hidden(1))
        # A third layer's states take the step that compiles.
        triton_decode_layer(*Layer(torch.bfloat16, **options).arguments(layer.hidden(1)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, *_ = triton_decode_layer(*static)
        for _ in range(3):
            token = twin.arguments(layer.hidden(1))
            for index in (0, 1, 2, 3, 4, 17):  # the projections
                static[index].copy_(token[index])
            graph.replay()
            expected, *_ = triton_decode_layer(*token)
            assert torch.equal(o, expected)
        for ours, theirs in zip(layer.states + layer.conv_states, twin.states + twin.conv_states, strict=True):
            assert torch.equal(ours, theirs)

    def test_repeats_bit_by_bit(self):
        inputs = make_inputs("scream", 40, 2, 4, 128, 128, dtype=torch.float32)
        state = make_state(40, 4, 128, 128, dtype=torch.float32)
        first, second = run_steps(inputs, state), run_steps(inputs, state)
        assert torch.equal(first.o, second.o)
        assert torch.equal(first.h, second.h)
        assert torch.equal(first.g, second.g)

    def test_more_than_two_to_the_31_elements_of_state(self):
        batch = 2**31 // 128**2 + 5
        needed = 4 * batch * 128 * (128 + 1)
        if torch.cuda.mem_get_info()[0] < 1.2 * needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
        inputs = make_inputs("normal", 1, 1, 1, 128, 1, dtype=torch.float32)
        state = make_state(1, 1, 128, 1, dtype=torch.float32)
        expected = run_steps(inputs, state)
        h, g = (torch.zeros(batch, *part.shape[1:], device=DEVICE) for part in state)
        h[-1], g[-1] = state.h[0].to(DEVICE), state.g[0].to(DEVICE)
        token = [tensor[:, 0].to(DEVICE).expand(batch, *tensor.shape[2:]) for tensor in inputs[:5]]
        o, *_ = triton_decode_step(*token, inputs.lam.to(DEVICE), h, g, 64, 1e-4)
        assert relative_error(o[-1].cpu(), expected.o[0, 0]) < 1e-5
        assert relative_error(h[-1].cpu(), expected.h[0]) < 1e-6
        assert relative_error(g[-1].cpu(), expected.g[0]) < 1e-6

    def test_compiles_once_for_all_batches(self):
        """Two variants, for few programs and for many; nothing else depends on the data."""
        device = torch.cuda.current_device()
        count = len(mesa_triton_decode.decode_kernel.device_caches[device][0])
        for batch in (1, 2, 3, 16, 300, 304, 999):
            inputs = make_inputs("normal", batch, 1, 3, 40, 24, dtype=torch.float32)
            run_steps(inputs, make_state(batch, 3, 40, 24, dtype=torch.float32), max_steps=batch)
        assert len(mesa_triton_decode.decode_kernel.device_caches[device][0]) <= count + 2
