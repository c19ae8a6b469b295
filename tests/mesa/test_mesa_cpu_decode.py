# SPDX-License-Identifier: Apache-2.0
"""A token in NumPy: the solver against torch's, a layer against its modules, and when it keeps out of the way."""

import copy

import numpy as np
import pytest
import torch
from mesa_inputs import generator, relative_error
from small_models import random_ids, states

from modeling_mesanet.mesa import head_norm, mesa_cpu_decode, mesa_layers
from modeling_mesanet.mesa.mesa_cpu_decode import conjugate_gradient_on_cpu
from modeling_mesanet.mesa.mesa_solver import conjugate_gradient

ROWS, SIZE = 7, 16


def systems(condition, dtype=torch.float64, seed=0):
    """Matrices `[ROWS, SIZE, SIZE]` with eigenvalues from 1 to `condition`, and right-hand sides."""
    source = generator(seed)
    basis = torch.linalg.qr(torch.randn(ROWS, SIZE, SIZE, generator=source, dtype=torch.float64))[0]
    values = torch.logspace(0, np.log10(condition), SIZE, dtype=torch.float64)
    b = torch.randn(ROWS, SIZE, generator=source, dtype=torch.float64)
    return ((basis * values) @ basis.mT).to(dtype), b.to(dtype)


def both(matrices, b, max_steps=100, tolerance=1e-4):
    """What NumPy and torch find: `(x, steps, residual)` each."""
    limits = {"max_steps": max_steps, "tolerance": tolerance}
    x, steps, residual = conjugate_gradient_on_cpu(matrices, b.numpy(), **limits)
    ours = torch.from_numpy(x), torch.tensor(steps), torch.tensor(residual, dtype=b.dtype)
    x, steps, residual = conjugate_gradient(lambda p: torch.bmm(p, matrices), b.unsqueeze(1), **limits)
    return ours, (x.squeeze(1), steps.squeeze(1), residual.squeeze(1))


class TestSolver:
    @pytest.mark.parametrize("large", [False, True])
    @pytest.mark.parametrize(("max_steps", "tolerance"), [(100, 1e-1), (100, 1e-4), (100, 1e-8), (3, 1e-4), (3, None)])
    def test_as_torch(self, monkeypatch, max_steps, tolerance, large):
        """Rows of very different condition, and one that is solved from the start."""
        if large:
            monkeypatch.setattr(mesa_cpu_decode, "LARGE_PRODUCT", 0)
        matrices, b = systems(10.0)
        matrices[::2] = systems(2.0, seed=1)[0][::2]
        b[3] = 0
        (x, steps, residual), expected = both(matrices, b, max_steps, tolerance)
        assert relative_error(x, expected[0]) < 1e-9
        assert torch.equal(steps, expected[1])
        assert len(steps.unique()) > 1
        torch.testing.assert_close(residual, expected[2], rtol=1e-2, atol=1e-12)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_size_of_the_right_hand_side_does_not_matter(self, scale):
        matrices, b = systems(10.0, torch.float32)
        one, _ = both(matrices, b)
        scaled, _ = both(matrices, b * scale)
        assert relative_error(scaled[0].double() / scale, one[0].double()) < 1e-5
        assert torch.equal(scaled[1], one[1])

    def test_an_indefinite_matrix_keeps_the_last_good_iterate(self):
        matrices, b = systems(10.0)
        matrices[2] -= 4 * torch.eye(SIZE, dtype=torch.float64)
        (x, steps, _), expected = both(matrices, b, tolerance=1e-2)
        assert torch.equal(steps, expected[1])
        assert steps[2] < steps.max()
        assert relative_error(x, expected[0]) < 1e-9

    @pytest.mark.parametrize("where", ["matrix", "right-hand side"])
    def test_what_is_not_finite_stays_in_its_row(self, where):
        matrices, b = systems(10.0)
        healthy, _ = both(matrices, b)
        (matrices[5, 1] if where == "matrix" else b[5])[2] = torch.nan
        (x, steps, _), _ = both(matrices, b)
        others = torch.arange(ROWS) != 5
        assert x[5].isnan().any()
        assert relative_error(x[others], healthy[0][others]) < 1e-9
        assert torch.equal(steps[others], healthy[1][others])


def steps_of(model, mask=None, tokens=3):
    """Logits, statistics and states of a few tokens after a prompt."""
    ids = random_ids(2, 9 + tokens)
    with torch.no_grad():
        output = model(ids[:, :9], use_cache=True)
        results = []
        for position in range(9, 9 + tokens):
            output = model(
                ids[:, position : position + 1],
                attention_mask=None if mask is None else mask,
                past_key_values=output.past_key_values,
                use_cache=True,
                output_solver_stats=True,
            )
            results += [output.logits, *(values for stats in output.solver_stats for values in stats)]
    return results + states(output.past_key_values)


@pytest.fixture
def calls(monkeypatch):
    """How often a layer's token was computed in NumPy."""
    from modeling_mesanet.mesa import mesa_layers

    seen = []
    function = mesa_layers.cpu_decode_layer
    monkeypatch.setattr(
        mesa_layers, "cpu_decode_layer", lambda *args, **kwargs: seen.append(1) or function(*args, **kwargs)
    )
    return seen


# Largest differences: of the solver at its tolerance, or of the rounding between modules.
DIFFERENCES = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", DIFFERENCES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_on_value": True, "use_output_gate": True, "value_head_dim": 24, "conv_kernel_size": 3},
        {"forget_gate_bound": None, "cg_max_steps": 0},
        {"head_norm_eps": 1e-2},
    ],
)
def test_a_layer_is_what_its_modules_are(tiny_model, calls, dtype, padded, options):
    model = tiny_model(**{"cg_tolerance": 1e-6} | options).to(dtype)
    mask = torch.tensor([[1], [0]]) if padded else None
    actual = steps_of(model, mask)
    assert len(calls) == 3 * model.config.num_hidden_layers
    for layer in model.model.layers:
        layer.mixer.o_norm.register_forward_hook(lambda *arguments: None)
    expected = steps_of(model, mask)
    assert len(calls) == 3 * model.config.num_hidden_layers, "a module that is watched must be called"
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=5 * DIFFERENCES[dtype], atol=DIFFERENCES[dtype])


@pytest.mark.parametrize("numpy", [True, False])
def test_the_head_norm_s_epsilon_in_every_form(tiny_model, calls, numpy):
    """A token after the others is what it is among them, in NumPy and by the modules; a small epsilon is another."""
    ids = random_ids(2, 9)

    def last_logits(eps):
        model = tiny_model(head_norm_eps=eps, num_hidden_layers=1)
        if not numpy:
            model.model.layers[0].mixer.o_norm.register_forward_hook(lambda *arguments: None)
        with torch.no_grad():
            at_once = model(ids, use_cache=False).logits[:, -1]
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            return at_once, model(ids[:, -1:], past_key_values=cache).logits[:, -1]

    at_once, cached = last_logits(1e-2)
    assert len(calls) == numpy
    torch.testing.assert_close(cached, at_once, rtol=1e-3, atol=1e-4)
    for small, large in zip(last_logits(None), (at_once, cached), strict=True):
        assert relative_error(small, large) > 5e-3


def test_keeps_out_of_the_way(tiny_model, calls):
    """Weights of several dtypes, autocast and modules of other kinds."""
    model = tiny_model()
    mixed = copy.deepcopy(model)
    for layer in mixed.model.layers:
        layer.mixer.o_norm.to(torch.bfloat16)
    steps_of(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps_of(model)
    for layer in model.model.layers:
        layer.mixer.q_conv = torch.nn.Sequential(layer.mixer.q_conv)
    assert not calls


class TestNorm:
    """Of one token, without gradients."""

    @pytest.fixture
    def norms(self, monkeypatch):
        """Shapes that NumPy has normalised."""
        shapes, right = [], mesa_layers.cpu_norm

        def watched(x, *arguments):
            shapes.append(tuple(x.shape))
            return right(x, *arguments)

        monkeypatch.setattr(mesa_layers, "cpu_norm", watched)
        return shapes

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(
        ("dtype", "bound"),
        [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
    )
    @pytest.mark.parametrize("shape", [(1, 1, 12), (3, 1, 12)])
    def test_as_torch(self, norms, dtype, bound, shape):
        x = torch.randn(*shape, generator=generator(0), dtype=dtype)
        weight = torch.nn.Parameter(torch.randn(12, generator=generator(1), dtype=dtype))
        x[..., 0, :3] = torch.inf
        x[0, 0] = 0
        with torch.no_grad():
            actual = head_norm(x, weight, 1e-3)
            wide = torch.promote_types(dtype, torch.float32)
            expected = torch.nn.functional.rms_norm(x.to(wide), (12,), weight.to(wide), 1e-3).to(dtype)
        assert norms == [shape]
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound, equal_nan=True)

    @torch.no_grad()
    def test_a_view_of_any_strides(self, norms):
        wide = torch.randn(1, 3, 24, generator=generator(0))
        x, weight = wide.transpose(0, 1)[..., ::2], torch.ones(24)[::2]
        expected = head_norm(x.contiguous(), weight.contiguous(), 1e-6)
        torch.testing.assert_close(head_norm(x, weight, 1e-6), expected)
        assert norms == [(3, 1, 12)] * 2

    def test_left_to_torch(self, norms):
        x, weight = torch.randn(2, 1, 12, generator=generator(0)), torch.ones(12)
        learning = weight.clone().requires_grad_()
        head_norm(x, learning, 1e-6).sum().backward()
        assert learning.grad is not None
        with torch.no_grad():
            head_norm(x.bfloat16(), weight, 1e-6)
            head_norm(x, weight.double(), 1e-6)
            head_norm(x, weight, 1e-6, gate=x)
            head_norm(torch.ones(2000, 1, 12), weight, 1e-6)
            head_norm(torch.ones(1, 2, 12), weight, 1e-6)
            head_norm(torch.ones(1, 12), weight, 1e-6)
            head_norm(x.to("meta"), weight.to("meta"), 1e-6)
            # A trace would keep what NumPy gives as a constant.
            traced = torch.jit.trace(lambda x: head_norm(x, weight, 1e-6), x, check_trace=False)
            assert norms == []
            torch.testing.assert_close(traced(2 * x + 1), head_norm(2 * x + 1, weight, 1e-6))
        assert len(norms) == 1
