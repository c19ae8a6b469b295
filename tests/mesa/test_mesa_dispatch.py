# SPDX-License-Identifier: Apache-2.0
"""Which backend is chosen, by whom, and what happens where it cannot run; stand-ins for the kernels need no GPU."""

import copy
import functools
import inspect
import os
import subprocess
import sys
import types
import warnings
from unittest import mock

import pytest
import torch
from mesa_inputs import make_inputs, make_state, relative_error
from torch.utils.checkpoint import checkpoint

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, modeling_mesanet
from modeling_mesanet.mesa import (
    BackendError,
    mesa_attention,
    mesa_dispatch,
    mesa_layers,
    mesa_operator,
    mesa_step,
    requested_backend,
    select_backend,
)
from modeling_mesanet.mesa.mesa_chunkwise import chunkwise
from modeling_mesanet.mesa.mesa_decode import decode_step
from modeling_mesanet.mesa.mesa_layers import decodes_layer, fuses_linears
from modeling_mesanet.mesa.mesa_solver import l2_normalize

CPU = torch.device("cpu")
PACKAGE = mesa_dispatch.__package__
CACHED = (mesa_dispatch.triton_imports, mesa_dispatch.triton_runs_on, mesa_dispatch.kernels_are_right)


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    """No wish in the environment, and nothing remembered from before or for later."""
    monkeypatch.delenv("MESANET_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(mesa_dispatch, "FAULTY", set())
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


class Kernels:
    """Stand-ins for the kernels, in torch: `fault` is applied to their outputs, `step_fault` to those of a step."""

    def __init__(self):
        self.calls = []
        self.fault = self.step_fault = lambda o: o

    def chunkwise(self, q, k, v, log_gamma, beta, lam, h, g, cu_seqlens, *options):
        *limits, normalize, _, _ = options
        self.calls.append("attention")
        dtype, (q, k, v) = v.dtype, (tensor.float() for tensor in (q, k, v))
        q, k = (l2_normalize(q), l2_normalize(k)) if normalize else (q, k)
        o, final_h, final_g, _, *stats = chunkwise(q, k, v, log_gamma, beta, lam, h, g, cu_seqlens, *limits, 64)
        return self.fault(o).to(dtype), final_h, final_g, *stats

    def launch(self, *arguments):
        *inputs, max_steps, tolerance, normalize, keep_solution, output_stats = arguments
        limits = (max_steps, tolerance) * 2
        return *self.chunkwise(*inputs, *limits, normalize, keep_solution, output_stats), None

    def step(self, q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance, normalize, output_stats=True):
        self.calls.append("step")
        dtype, (q, k, v) = v.dtype, (tensor.float() for tensor in (q, k, v))
        q, k = (l2_normalize(q), l2_normalize(k)) if normalize else (q, k)
        o, *stats = decode_step(q, k, v, log_gamma, beta, lam, h, g, max_steps, tolerance)
        return self.step_fault(o).to(dtype), *stats


@pytest.fixture
def kernels(monkeypatch) -> Kernels:
    """A CPU for which there are kernels."""
    kernels = Kernels()
    modules = {
        "mesa_triton": {"triton_chunkwise": kernels.chunkwise, "launch_chunkwise": kernels.launch},
        "mesa_triton_decode": {"triton_decode_step": kernels.step, "triton_decode_step_op": kernels.step},
    }
    for name, functions in modules.items():
        module = types.ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mesa_dispatch, "triton_runs_on", lambda device: (True, "there is a stand-in"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return kernels


def some_inputs(length=20):
    return make_inputs("silu", 1, length, 1, 16, 12, dtype=torch.float32)


class TestPrecedence:
    @pytest.mark.parametrize(
        ("argument", "variable", "expected"),
        [
            (None, None, "auto"),
            ("auto", None, "auto"),
            (None, "torch", "torch"),
            ("auto", "triton", "triton"),
            (None, "auto", "auto"),
            ("torch", "triton", "torch"),
            ("triton", "torch", "triton"),
            ("torch", "nonsense", "torch"),
        ],
    )
    def test_argument_then_environment(self, monkeypatch, argument, variable, expected):
        if variable is not None:
            monkeypatch.setenv("MESANET_BACKEND", variable)
        assert requested_backend(argument) == expected

    def test_unknown_names(self, monkeypatch):
        for name in ("Triton", "", "cuda"):
            with pytest.raises(
                BackendError, match=f"backend is '{name}'; it must be one of 'auto', 'triton', 'torch'"
            ):
                requested_backend(name)
            with pytest.raises(BackendError, match=f"backend is '{name}'"):
                mesa_attention(*some_inputs(), backend=name)
        for name in ("tritn", ""):
            monkeypatch.setenv("MESANET_BACKEND", name)
            for argument in (None, "auto"):
                with pytest.raises(BackendError, match=f"MESANET_BACKEND is '{name}'; set it to one of 'auto'"):
                    select_backend("cpu", argument)

    def test_a_cpu_takes_torch(self):
        assert select_backend("cpu") == ("torch", "no Triton kernel runs on cpu")
        assert select_backend(CPU, "auto")[0] == "torch"
        assert select_backend("cpu", "torch") == ("torch", "it was asked for")
        assert select_backend("meta") == ("torch", "no Triton kernel runs on meta")
        assert decodes_layer(CPU, torch.float32, 16, 16, 4, "auto")
        assert decodes_layer(CPU, torch.bfloat16, 16, 16, 4, "auto")

    def test_a_cpu_refuses_triton(self):
        message = "the Triton backend was asked for, but no Triton kernel runs on cpu; use 'auto' or 'torch'"
        inputs, state = some_inputs(1), make_state(1, 1, 16, 12, dtype=torch.float32)
        before = [tensor.clone() for tensor in state]
        with pytest.raises(ValueError, match=message):
            mesa_attention(*inputs, backend="triton")
        with pytest.raises(BackendError, match=message):
            mesa_step(*inputs, state, backend="triton")
        assert all(torch.equal(old, new) for old, new in zip(before, state, strict=True))
        assert mesa_attention(*inputs, backend="torch").o.isfinite().all()

    def test_the_environment_asks_for_triton_on_gpus_alone(self, monkeypatch):
        monkeypatch.setenv("MESANET_BACKEND", "triton")
        assert select_backend("cpu") == ("torch", "no Triton kernel runs on cpu")
        assert mesa_attention(*some_inputs(1)).o.isfinite().all()
        monkeypatch.setattr(mesa_dispatch, "triton_runs_on", lambda device: (False, "it is broken"))
        with pytest.raises(BackendError, match="asked for, but it is broken"):
            select_backend("cuda:0")

    def test_the_interpreter_runs_on_a_cpu_that_asks_for_triton(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(mesa_dispatch, "triton_imports", lambda: (True, ""))
        assert select_backend("cpu", "triton") == ("triton", "Triton's interpreter runs the kernels")
        assert select_backend("cpu")[0] == "torch"
        monkeypatch.setattr(mesa_dispatch, "triton_imports", lambda: (False, "triton cannot be imported (why)"))
        with pytest.raises(BackendError, match=r"asked for, but triton cannot be imported \(why\); use"):
            select_backend("cpu", "triton")

    @pytest.mark.parametrize(
        ("capability", "hip", "imports", "expected"),
        [
            ((9, 0), None, (True, ""), (True, "the Triton kernels run on this GPU")),
            ((8, 0), None, (True, ""), (True, "the Triton kernels run on this GPU")),
            ((7, 5), None, (True, ""), (False, "the Triton kernels need compute capability 8.0; this GPU has 7.5")),
            ((9, 0), "6.4", (True, ""), (False, "the Triton kernels were written for NVIDIA GPUs")),
            ((9, 0), None, (False, "no triton"), (False, "no triton")),
        ],
    )
    def test_which_gpus(self, monkeypatch, capability, hip, imports, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(mesa_dispatch, "triton_imports", lambda: imports)
        assert select_backend("cuda:0") == ("triton" if expected[0] else "torch", expected[1])
        assert select_backend("cuda:0", "torch")[0] == "torch"
        if not expected[0]:
            with pytest.raises(BackendError, match=expected[1]):
                select_backend("cuda:0", "triton")

    def test_a_gpu_without_number_is_the_current_one(self, monkeypatch):
        asked = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(mesa_dispatch, "triton_runs_on", lambda device: (bool(asked.append(device)), ""))
        select_backend("cuda")
        assert asked == [torch.device("cuda:3")]

    def test_a_triton_that_does_not_import(self, monkeypatch):
        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise OSError("no compiler")

        for module, reason in ((None, "ModuleNotFoundError|ImportError"), (Broken("triton"), "OSError: no compiler")):
            mesa_dispatch.triton_imports.cache_clear()
            monkeypatch.setitem(sys.modules, f"{PACKAGE}.mesa_triton", module)
            imports, found = mesa_dispatch.triton_imports()
            assert not imports
            assert found.startswith("triton cannot be imported (")
            assert any(part in found for part in reason.split("|"))
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            with pytest.raises(BackendError, match="triton cannot be imported"):
                mesa_attention(*some_inputs(), backend="triton")
            assert mesa_attention(*some_inputs()).o.isfinite().all()


class TestLimits:
    @pytest.mark.parametrize(
        ("dtype", "key_dim", "value_dim"),
        [(torch.float64, 16, 16), (torch.float32, 257, 16), (torch.bfloat16, 16, 300)],
    )
    def test_what_the_kernels_do_not_take(self, kernels, monkeypatch, dtype, key_dim, value_dim):
        sizes = (dtype, key_dim, value_dim)
        with pytest.raises(
            BackendError, match=rf"neither float64 nor heads above 256 \(here {dtype}, K {key_dim}, V {value_dim}\)"
        ):
            mesa_dispatch.use_triton(CPU, *sizes, "triton")
        assert not mesa_dispatch.use_triton(CPU, *sizes)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not mesa_dispatch.use_triton(CPU, *sizes)
        assert not kernels.calls

    def test_the_largest_heads(self, kernels):
        assert mesa_dispatch.use_triton(CPU, torch.float16, 256, 256, "triton")
        assert not kernels.calls

    def test_no_test_during_a_capture(self, kernels, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert mesa_dispatch.use_triton(CPU, torch.float32, 16, 12)
        assert not kernels.calls

    def test_kernels_that_failed_are_not_captured(self, kernels, monkeypatch):
        kernels.fault = lambda o: o * 2
        with pytest.warns(UserWarning, match="do not work on cpu"):
            assert not mesa_dispatch.use_triton(CPU, torch.float32, 16, 12)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not mesa_dispatch.use_triton(CPU, torch.float32, 16, 12)

    def test_nothing_to_compute_asks_nobody(self, kernels):
        inputs = make_inputs("silu", 1, 0, 1, 16, 12, dtype=torch.float32)
        assert mesa_attention(*inputs).o.shape == (1, 0, 1, 12)
        assert not kernels.calls


class GradientFault(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def broken(o):
    raise RuntimeError("out of resource: shared memory")


class TestSelfTest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_good_kernels_are_used_and_tested_once(self, kernels, dtype):
        inputs = some_inputs()
        inputs = [*(tensor.to(dtype) for tensor in inputs[:3]), *inputs[3:]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            o = mesa_attention(*inputs).o
            assert kernels.calls == ["attention", "step", "attention"]
            mesa_attention(*inputs)
            assert kernels.calls[3:] == ["attention"]
            mesa_step(
                *(tensor[:, :1] for tensor in inputs[:5]), inputs[5], make_state(1, 1, 16, 12, dtype=torch.float32)
            )
            assert kernels.calls[4:] == ["step"]
            # Other gradients, other kernels.
            inputs[0] = inputs[0].requires_grad_()
            mesa_attention(*inputs).o.sum().backward()
            assert kernels.calls[5:] == ["attention", "attention"]
        assert relative_error(o, mesa_attention(*inputs, backend="torch").o) < 1e-2

    @pytest.mark.parametrize(
        ("fault", "step_fault", "problem"),
        [
            (broken, None, "RuntimeError: out of resource: shared memory"),
            (lambda o: o * 1.01, None, r"a relative error of 1\.0e-02"),
            (lambda o: o * torch.nan, None, "a relative error of nan"),
            (None, broken, "RuntimeError: out of resource"),
            (None, lambda o: o * 0.9, r"a relative error of 1\.0e-01"),
            (None, lambda o: o * torch.nan, "a relative error of nan"),
        ],
    )
    def test_bad_kernels_are_not_used(self, kernels, fault, step_fault, problem):
        kernels.fault, kernels.step_fault = fault or kernels.fault, step_fault or kernels.step_fault
        inputs = some_inputs()
        expected = mesa_attention(*inputs, backend="torch").o
        with pytest.warns(UserWarning, match=rf"heads of 16 and 12 do not work on cpu \({problem}") as caught:
            o = mesa_attention(*inputs).o
        assert len(caught) == 1
        assert "MESANET_BACKEND=torch avoids the attempt" in str(caught[0].message)
        assert torch.equal(o, expected)
        calls = len(kernels.calls)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            state = make_state(1, 1, 16, 12, dtype=torch.float32)
            assert mesa_step(*(tensor[:, :1] for tensor in inputs[:5]), inputs[5], state).o.isfinite().all()
        assert len(kernels.calls) == calls

    @pytest.mark.parametrize("factor", [1.01, torch.nan])
    def test_bad_gradients(self, kernels, factor):
        kernels.fault = lambda o: GradientFault.apply(o, factor)
        inputs = [tensor.requires_grad_() for tensor in some_inputs()]
        with pytest.warns(UserWarning, match="do not work on cpu"):
            o = mesa_attention(*inputs).o
        expected = mesa_attention(*inputs, backend="torch").o
        for ours, theirs in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (o, expected)), strict=True):
            assert torch.equal(ours, theirs)
        with torch.no_grad():  # without gradients the kernels are good
            assert mesa_dispatch.use_triton(CPU, torch.float32, 16, 12)

    def test_one_bad_gradient_among_good_ones(self, kernels, monkeypatch):
        """Not a number is larger than nothing: it must not get lost among the others."""
        attend = mesa_operator.mesa_attention

        def faulty(q, *inputs, backend, **options):
            output = attend(q, *inputs, backend="torch", **options)
            lam = inputs[-1]
            if backend == "triton":
                output = output._replace(o=output.o + GradientFault.apply(lam * 0, torch.nan).sum())
            return output

        monkeypatch.setattr(mesa_operator, "mesa_attention", faulty)
        with pytest.warns(UserWarning, match="a relative error of nan"):
            assert not mesa_dispatch.kernels_are_right(CPU, 16, 12, torch.float32, True)

    def test_what_was_asked_for_is_not_tested(self, kernels):
        kernels.fault = lambda o: o * 2
        inputs = some_inputs()
        expected = mesa_attention(*inputs, backend="torch").o
        assert torch.equal(mesa_attention(*inputs, backend="triton").o, 2 * expected)
        assert kernels.calls == ["attention"]

    @pytest.mark.parametrize("differentiable", [False, True])
    def test_torchs_settings_do_not_matter(self, kernels, differentiable):
        def test():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert mesa_dispatch.kernels_are_right.__wrapped__(CPU, 16, 12, torch.float32, differentiable)

        default = torch.get_default_dtype()
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                test()
            finally:
                torch.set_default_dtype(default)
        with torch.device("meta"):
            test()
        with torch.autocast("cpu", torch.bfloat16):
            test()
        with torch.no_grad():
            test()
            assert not torch.is_grad_enabled()
        if not differentiable:
            with torch.inference_mode():
                test()

    def test_random_numbers_stay_the_same(self, kernels):
        state = torch.get_rng_state()
        mesa_attention(*some_inputs())
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_first_used_under_gradient_checkpointing(self, kernels, use_reentrant):
        inputs = [tensor.requires_grad_() for tensor in some_inputs()]
        expected = torch.autograd.grad(mesa_attention(*inputs, backend="torch").o.sum(), inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            o = checkpoint(lambda *tensors: mesa_attention(*tensors).o, *inputs, use_reentrant=use_reentrant)
            o.sum().backward()
        for tensor, gradient in zip(inputs, expected, strict=True):
            assert relative_error(tensor.grad, gradient) < 1e-5

    def test_first_used_by_a_compiler(self, kernels):
        torch._dynamo.reset()
        inputs = some_inputs()
        compiled = torch.compile(lambda *tensors: mesa_attention(*tensors).o, backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            o = compiled(*inputs)
        assert kernels.calls[:2] == ["attention", "step"]
        assert relative_error(o, mesa_attention(*inputs, backend="torch").o) < 1e-5
        torch._dynamo.reset()


class TestModel:
    SIZES = {
        "vocab_size": 17,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
        "value_head_dim": 8,
        "intermediate_size": 16,
        "use_output_gate": True,
    }
    CALLED = ("mesa_attention", "mesa_step", "short_convolution", "head_norm", "gates", "decodes_layer")

    def run(self, model):
        """Prefill with a pad, one token, and packed sequences."""
        tokens = torch.arange(6).reshape(2, 3)
        with torch.no_grad():
            mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
            cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
            model(tokens[:, :1], past_key_values=cache)
            # A module that is watched is called, and with it the operators one by one.
            with model.model.layers[0].mixer.o_norm.register_forward_hook(lambda *arguments: None):
                model(tokens[:, :1], past_key_values=cache)
        model(tokens[:1], cu_seq_lens_q=torch.tensor([0, 1, 3])).logits.sum().backward()

    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_the_config_reaches_every_operator(self, monkeypatch, backend):
        seen = {name: set() for name in self.CALLED}

        def spy(name):
            function = getattr(modeling_mesanet, name)
            signature = inspect.signature(inspect.unwrap(function))

            @functools.wraps(function)
            def called(*args, **kwargs):
                seen[name].add(signature.bind(*args, **kwargs).arguments.get("backend"))
                return function(*args, **kwargs)

            monkeypatch.setattr(modeling_mesanet, name, called)

        for name in self.CALLED:
            spy(name)
        self.run(MesaNetForCausalLM(MesaNetConfig(**self.SIZES, kernel_backend=backend)).eval())
        assert seen == {name: {backend} for name in self.CALLED}

    def test_triton_on_a_cpu_is_refused(self):
        model = MesaNetForCausalLM(MesaNetConfig(**self.SIZES, kernel_backend="triton"))
        with pytest.raises(BackendError, match="no Triton kernel runs on cpu"):
            model(torch.zeros(1, 3, dtype=torch.long))

    def test_the_environment_decides_for_auto_only(self, monkeypatch):
        monkeypatch.setenv("MESANET_BACKEND", "none")
        self.run(MesaNetForCausalLM(MesaNetConfig(**self.SIZES, kernel_backend="torch")).eval())
        with pytest.raises(BackendError, match="MESANET_BACKEND is 'none'"):
            self.run(MesaNetForCausalLM(MesaNetConfig(**self.SIZES)).eval())


def run_python(program: str, **environment) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("MESANET_BACKEND", "TRITON_INTERPRET")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip()


def test_a_cpu_needs_neither_triton_nor_the_kernels():
    program = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM
sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "use_output_gate": True}
model = MesaNetForCausalLM(MesaNetConfig(**sizes, num_attention_heads=1, head_dim=16, value_head_dim=16))
tokens = torch.zeros(1, 3, dtype=torch.long)
model(tokens, labels=tokens).loss.backward()
model.eval().generate(tokens, max_new_tokens=2, min_new_tokens=2)
print([name for name in sys.modules if name.startswith("modeling_mesanet.mesa.mesa_triton")])
"""
    assert run_python(program) == "[]"


def test_interpreted_by_the_environment():
    pytest.importorskip("triton", reason="triton is not installed; the kernels cannot be interpreted")
    program = """
import torch
from mesa_inputs import make_inputs, make_state, relative_error
from modeling_mesanet.mesa import mesa_attention, mesa_step, select_backend
print(select_backend("cpu")[0])
inputs = make_inputs("silu", 1, 1, 1, 16, 16, dtype=torch.float32)
for backend in (None, "torch"):
    state = make_state(1, 1, 16, 16, dtype=torch.float32)
    attended = mesa_attention(*inputs, initial_state=state, backend=backend).o
    stepped = mesa_step(*inputs, state, backend=backend).o
    if backend is None:
        results = attended, stepped
print(relative_error(results[0], attended) < 1e-4, relative_error(results[1], stepped) < 1e-4)
"""
    found = run_python(program, TRITON_INTERPRET="1", MESANET_BACKEND="triton", PYTHONWARNINGS="ignore")
    assert found.split() == ["triton", "True", "True"]


class TestFusedLinears:
    """The kernels of a decoding step's projections, with stand-ins in torch."""

    SIZES = (24, (16, 16, 2, 2), 20, 40)
    NUMBERS = (24, 20, 40, 16, 16, 2, 2)
    CASE = (CPU, torch.bfloat16, 2, "auto", *NUMBERS)

    @pytest.fixture(autouse=True)
    def stand_ins(self, kernels, monkeypatch):
        mesa_dispatch.linears_are_right.cache_clear()
        self.calls, self.fault = [], lambda name, y: y

        def normed(x, weight, eps):
            return torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

        self.copying = 1.0

        def norm_linears(x, weight, eps, weights, rounded, copy=None):
            if copy is not None:
                copy.copy_(x * self.copying)
            rows = normed(x, weight, eps)
            outputs = [rows.float() @ w.float().mT for w in weights]
            return [y.to(x.dtype) if i < rounded else y for i, y in enumerate(outputs)]

        def add_linear(x, weight, residual):
            return residual + x @ weight.mT

        def norm_gated_linears(x, weight, eps, gate, up):
            rows = normed(x, weight, eps)
            return torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)

        def counted(launch):
            def called(*arguments, **options):
                self.calls.append(launch.__name__)
                return self.fault(launch.__name__, launch(*arguments, **options))

            return called

        module = types.ModuleType(f"{PACKAGE}.mesa_triton_linear")
        launches = (norm_linears, add_linear, norm_gated_linears)
        module.LAUNCHES = {launch.__name__: counted(launch) for launch in launches}
        monkeypatch.setitem(sys.modules, module.__name__, module)
        yield
        mesa_dispatch.linears_are_right.cache_clear()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_good_kernels_are_used_and_tested_once(self, dtype):
        for _ in range(2):
            assert mesa_dispatch.use_fused_linears(CPU, dtype, 2, None, *self.NUMBERS)
            assert self.calls == ["norm_linears", "norm_gated_linears", "add_linear", "add_linear"]

    @pytest.mark.parametrize("name", ["norm_linears", "add_linear", "norm_gated_linears"])
    @pytest.mark.parametrize(("factor", "problem"), [(1.1, "a relative error of"), (torch.nan, "error of nan")])
    def test_bad_kernels_are_not_used(self, monkeypatch, name, factor, problem):
        def fault(called, y):
            return y if called != name else [part * factor for part in y] if name == "norm_linears" else y * factor

        self.fault = fault
        with pytest.warns(UserWarning, match=f"projections of a layer do not work on cpu .*{problem}"):
            assert not mesa_dispatch.use_fused_linears(*self.CASE)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not mesa_dispatch.use_fused_linears(*self.CASE)
        assert mesa_dispatch.use_fused_linears(CPU, torch.bfloat16, 4, None, *self.NUMBERS)  # untested, other kernels

    def test_a_bad_copy_of_the_residual_is_noticed(self):
        many = CPU, torch.float32, 32, "auto", *self.NUMBERS
        assert mesa_dispatch.use_fused_linears(*many)
        mesa_dispatch.linears_are_right.cache_clear()
        self.copying = 1.1
        with pytest.warns(UserWarning, match="projections of a layer do not work on cpu .*a relative error of"):
            assert not mesa_dispatch.use_fused_linears(*many)
        assert mesa_dispatch.use_fused_linears(*self.CASE)  # without a copy

    def test_kernels_that_do_not_compile(self):
        self.fault = lambda name, y: broken(y)
        with pytest.warns(UserWarning, match="RuntimeError: out of resource: shared memory"):
            assert not mesa_dispatch.use_fused_linears(*self.CASE)

    def test_who_decides(self, monkeypatch):
        assert not mesa_dispatch.use_fused_linears(CPU, torch.bfloat16, 2, "torch", *self.NUMBERS)
        assert mesa_dispatch.use_fused_linears(CPU, torch.bfloat16, 2, "triton", *self.NUMBERS)
        monkeypatch.setenv("MESANET_BACKEND", "torch")
        assert not mesa_dispatch.use_fused_linears(*self.CASE)
        assert self.calls == []

    def test_rows_dtypes_and_batches_of_a_layer(self):
        seen = []

        def spy(device, dtype, rows, backend, *numbers):
            seen.append((rows, backend, numbers))
            return True

        with mock.patch.object(mesa_layers, "use_fused_linears", spy):
            for batch, tokens in ((1, 1), (3, 1), (8, 1), (9, 1), (16, 1), (17, 1), (200, 1), (1, 5000)):
                assert fuses_linears(torch.zeros(batch, tokens, 24), self.SIZES, "auto")
            # Those of more than FEW_ROWS are two.
            assert [rows for rows, *_ in seen] == [1, 4, 8, 16, 16, 32, 32, 512]
            assert seen[0][1:] == ("auto", self.NUMBERS)
            assert not fuses_linears(torch.zeros(1, 1, 24, dtype=torch.float64), self.SIZES)
            assert not fuses_linears(torch.zeros(0, 3, 24), self.SIZES)
            assert len(seen) == 8

    def test_decided_while_a_compiler_traces(self):
        torch._dynamo.reset()

        def double(x, *weights):
            outputs = tuple(weight.shape[0] for weight in weights)
            return x * 2 if fuses_linears(x, (24, outputs, 20, 40), "auto") else x

        x, weights = torch.ones(3, 1, 24), [torch.nn.Parameter(torch.ones(size, 24)) for size in self.SIZES[1]]
        assert torch.equal(torch.compile(double, backend="eager", fullgraph=True)(x, *weights), 2 * x)
        assert len(self.calls) == 4
        torch._dynamo.reset()


class TestUnchangedLayers:
    """Which layers may be computed without their modules."""

    X = torch.zeros(1, 1, 16)

    @pytest.fixture
    def layer(self):
        return MesaNetForCausalLM(MesaNetConfig(**TestModel.SIZES)).model.layers[0]

    def test_a_fresh_one(self, layer):
        assert layer.known_parts(self.X)
        assert layer.known_parts(self.X)
        assert copy.deepcopy(layer).known_parts(self.X)

    @pytest.mark.parametrize("path", ["mixer", "mlp", "mlp_norm", "mixer.q_proj", "mixer.q_conv", "mlp.act_fn"])
    @pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_come_and_go(self, layer, path, hook):
        assert layer.known_parts(self.X)
        handle = getattr(layer.get_submodule(path), hook)(lambda *arguments: None)
        assert not layer.known_parts(self.X)
        handle.remove()
        assert layer.known_parts(self.X)

    def test_a_hook_on_the_layer_sees_all_it_would(self, layer):
        layer.register_forward_hook(lambda *arguments: None)
        assert layer.known_parts(self.X)

    def test_a_hook_on_every_module(self, layer):
        assert layer.known_parts(self.X)
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
        assert not layer.known_parts(self.X)
        handle.remove()
        assert layer.known_parts(self.X)

    @pytest.mark.parametrize("seen_before", [False, True])
    @pytest.mark.parametrize("path", ["mixer.o_proj", "mixer.gamma_proj", "mixer.output_gate_proj", "mlp.gate_proj"])
    def test_replaced_modules(self, layer, path, seen_before):
        class Adapted(torch.nn.Linear):
            pass

        if seen_before:
            assert layer.known_parts(self.X)
        layer.set_submodule(path, Adapted(16, 16, bias=False))
        assert not layer.known_parts(self.X)

    def test_other_changes(self, layer):
        def changed(change):
            other = copy.deepcopy(layer)
            assert other.known_parts(self.X)
            change(other)
            return not other.known_parts(self.X)

        assert changed(lambda layer: setattr(layer.mixer, "forward", lambda x: x))
        assert changed(lambda layer: setattr(layer.mlp.act_fn, "forward", lambda x: x))
        assert changed(lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()))
        assert changed(lambda layer: setattr(layer.mlp.up_proj, "bias", torch.nn.Parameter(torch.zeros(16))))
        assert changed(lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.mlp.down_proj))
        assert changed(lambda layer: layer.mlp.down_proj.to(torch.bfloat16))
        assert changed(lambda layer: layer.mixer.to("meta"))
        assert changed(lambda layer: setattr(layer, "mlp", torch.nn.Identity()))
        # Another weight is as good.
        weight = torch.nn.Parameter(torch.zeros(16, 16))
        assert not changed(lambda layer: setattr(layer.mlp.down_proj, "weight", weight))
        assert layer.known_parts(self.X.cpu())
        assert not layer.known_parts(self.X.half())
