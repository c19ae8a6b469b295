# SPDX-License-Identifier: Apache-2.0
"""The chunkwise Triton kernels against the float64 oracle: interpreted on a CPU, compiled on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted_triton import CASES, CONVERGED, Case, compare
from mesa_inputs import (
    FAMILIES,
    Inputs,
    chunkwise,
    cu_seqlens_of,
    errors,
    evaluate,
    make_inputs,
    oracle,
    relative_error,
    token_by_token,
)

from modeling_mesanet.mesa import mesa_attention, mesa_reference

# What kernels/README.md promises is 2e-4 for output and states, and 3e-3 for gradients. Solved to the floor, these are
# that much better.
OUTPUT_BOUND = 2e-4
GRADIENT_BOUND = 1e-3
# An output in 16 bits is rounded to 2^-9 (bfloat16) of itself; so are gradients of 16-bit inputs.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def check(found: dict[str, float], dtype: torch.dtype, gradient_bound: float = GRADIENT_BOUND) -> None:
    for name, error in found.items():
        bound = gradient_bound if name.startswith("d_") else OUTPUT_BOUND
        assert error <= bound + ROUNDING[dtype], f"{name}: {error:.1e}, {found}"


class TestInterpreted:
    """Small shapes on a CPU, where the kernels' arithmetic and indices are those of the GPU."""

    @pytest.fixture(scope="class")
    def results(self) -> dict[str, dict[str, float]]:
        pytest.importorskip("triton", reason="triton is not installed; the kernels cannot be interpreted")
        folder = Path(__file__).parent
        names = list(CASES)
        # Two processes: each spends a second on imports, and the cases are independent.
        runs = [
            subprocess.Popen(
                [sys.executable, str(folder / "interpreted_triton.py"), *part],
                env={
                    **os.environ,
                    "TRITON_INTERPRET": "1",
                    "PYTHONPATH": os.pathsep.join(map(str, (folder, *sys.path))),
                },
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
    def test_agrees_with_the_oracle(self, results, name):
        check(results[name], CASES[name].dtype)


# The kernels that a GPU of compute capability 9.0 would compile, found without one.
COMPILE_AHEAD = """
import json
from collections import Counter
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from modeling_mesanet.mesa import mesa_hopper_solver, mesa_triton

active = mock.Mock()
active.get_current_device.return_value = active.get_current_stream.return_value = 0
active.get_current_target.return_value = GPUTarget("cuda", 90, 32)
driver.set_active(active)
qkv, gates = torch.zeros(3, 1, 96, 1, 64, dtype=torch.bfloat16), torch.zeros(2, 1, 96, 1)
hopper = {
    "hopper_kernel": lambda device: mesa_hopper_solver.solve_chunks_hopper_kernel,
    "is_hopper": lambda device: True,
    "shared_memory_of": lambda device: 232448,
}
compiled = []
for differentiable in (False, True, True):
    with mock.patch.multiple(mesa_triton, **hopper):
        mesa_triton.compile_ahead(*qkv, *gates, torch.ones(1, 64), differentiable)
    kernels = {**vars(mesa_triton), **vars(mesa_hopper_solver)}.items()
    caches = {name: kernel.device_caches[0][0] for name, kernel in kernels if hasattr(kernel, "device_caches")}
    compiled.append({name: len(cache) for name, cache in caches.items() if cache})
print(json.dumps(compiled))
"""


def test_kernels_compile_ahead(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed; nothing can be compiled")
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_AHEAD],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    forward, both, again = json.loads(run.stdout)
    names = ("prepare_chunks_kernel", "convolve_chunks_kernel", "carry_states_kernel")
    # A prompt's solve normalises its outputs.
    assert forward == dict.fromkeys(names, 1) | {"solve_chunks_hopper_kernel": 2}
    gradients = ("carry_adjoints_kernel", "gradients_kernel")
    # The solve that keeps its solutions, and that of the backward pass, are kernels of their own.
    assert both == forward | dict.fromkeys(gradients, 1) | {"solve_chunks_hopper_kernel": 4}
    assert again == both


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_the_oracle(self, name):
        check(compare(CASES[name], "cuda"), CASES[name].dtype)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("size", [64, 128])
    def test_every_family_at_full_size(self, family, dtype, size):
        found = compare(Case(family, 300, size, size, dtype=dtype, options={"max_steps": 200}), "cuda")
        check(found, dtype, gradient_bound=3e-3)

    @pytest.mark.parametrize(("tolerance", "bound"), [(1e-3, 1e-3), (1e-4, 2e-4)])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_accuracy_contract(self, family, tolerance, bound):
        """16-bit queries and keys, float32 values, so that the output is not rounded; errors in the Euclidean norm."""
        inputs = make_inputs(family, 1, 512, 2, 128, 128, dtype=torch.float32)
        inputs = inputs._replace(q=inputs.q.bfloat16(), k=inputs.k.bfloat16())
        expected, _ = mesa_reference(*inputs.to(torch.float64))
        on_gpu = [tensor.cuda() for tensor in inputs]
        o = mesa_attention(*on_gpu, max_steps=96, tolerance=tolerance, backend="triton").o.cpu().double()
        assert (o - expected).norm() <= bound * expected.norm()

    def test_bitwise_repeatable(self):
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs("silu", 2, 300, 2, 128, 128, dtype=torch.float32)))
        inputs = Inputs(*(tensor.bfloat16() for tensor in inputs[:3]), *inputs[3:])
        first, second = (evaluate(chunkwise, inputs, backend="triton", max_steps=64, tolerance=1e-4) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name

    def test_a_long_sequence_without_forgetting(self):
        inputs = make_inputs("silu", 1, 32768, 1, 128, 128, dtype=torch.float32)
        inputs = inputs._replace(log_gamma=torch.zeros_like(inputs.log_gamma))
        inputs = Inputs(*(tensor.bfloat16() for tensor in inputs[:2]), *inputs[2:])
        on_gpu = [tensor.cuda() for tensor in inputs]
        o, state, _ = mesa_attention(*on_gpu, max_steps=64, tolerance=1e-4, output_final_state=True, backend="triton")
        # The last token alone, from states summed up in float64.
        q, k = (torch.nn.functional.normalize(t[0, :, 0].double().cuda(), dim=-1) for t in inputs[:2])
        v, beta, lam = (t.double().cuda() for t in (inputs.v[0, :, 0], inputs.beta[0, :, 0], inputs.lam[0]))
        h, g = (k * beta[:, None]).T @ k, (k * beta[:, None]).T @ v
        expected = torch.linalg.solve(h + torch.diag(lam), q[-1]) @ g
        assert relative_error(state.h[0, 0].cpu(), h.cpu()) < 1e-5
        assert relative_error(state.g[0, 0].cpu(), g.cpu()) < 1e-5
        assert relative_error(o[0, -1, 0].cpu(), expected.cpu()) < 1e-3

    def test_chunkwise_is_token_by_token(self):
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs("silu", 2, 100, 2, 128, 128, dtype=torch.float32)))
        whole, state = chunkwise(*inputs, backend="triton", **CONVERGED)
        steps, last = token_by_token(inputs, **CONVERGED)
        assert relative_error(whole.cpu(), steps.cpu()) < 1e-4
        assert relative_error(state.h.cpu(), last.h.cpu()) < 1e-5

    def test_values_that_are_not_finite_stay_where_they_belong(self):
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs("silu", 2, 200, 2, 128, 128, dtype=torch.float32)))
        clean, _, _ = mesa_attention(*inputs, backend="triton")
        inputs.q[0, 70, 1, 3] = torch.nan
        o, _, stats = mesa_attention(*inputs, backend="triton", output_stats=True)
        assert o[0, 70, 1].isnan().all()
        assert stats.residual[0, 70, 1].isnan()
        o[0, 70, 1] = clean[0, 70, 1]
        assert torch.equal(o, clean)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_extreme_magnitudes_stay_finite(self, scale):
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs("silu", 1, 200, 2, 128, 128, dtype=torch.float32)))
        inputs = inputs._replace(q=inputs.q * scale, k=inputs.k * scale, v=(inputs.v * scale).bfloat16())
        for name, tensor in evaluate(chunkwise, inputs, backend="triton").items():
            assert tensor.isfinite().all(), name

    def test_a_zero_query_and_an_empty_state(self):
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs("silu", 1, 70, 1, 128, 128, dtype=torch.float32)))
        inputs.q[0, 3], inputs.beta[0, :10] = 0, 0
        result = evaluate(chunkwise, inputs, backend="triton")
        assert not result["o"][0, :10].any()
        assert all(tensor.isfinite().all() for tensor in result.values())

    def test_more_than_two_to_the_31_elements(self):
        """The states of the chunks alone have 2.2e9 elements; the last row must come out as it does by itself."""
        shape, generator = (70, 64 * 32, 60), torch.Generator("cuda").manual_seed(0)

        def normal(*sizes):
            return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16, generator=generator)

        q, k, v = (normal(*shape, 128) for _ in range(3))
        log_gamma, beta = torch.full(shape, -0.05, device="cuda"), torch.full(shape, 0.5, device="cuda")
        lam = torch.ones(60, 128, device="cuda")
        options = {"max_steps": 64, "tolerance": 1e-4, "backend": "triton"}
        whole = mesa_attention(q, k, v, log_gamma, beta, lam, **options).o[-1]
        alone = mesa_attention(*(t[-1:] for t in (q, k, v, log_gamma, beta)), lam, **options).o[0]
        assert relative_error(whole.cpu(), alone.cpu()) < 1e-2

    def test_operators_pass_opcheck(self):
        from modeling_mesanet.mesa.mesa_triton import triton_chunkwise

        for packed in (False, True):
            inputs = make_inputs("silu", 1, 70, 2, 64, 64, dtype=torch.float32)
            leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
            bounds = cu_seqlens_of([30, 0, 40]).cuda() if packed else None
            arguments = (*leaves, None, None, bounds, 20, 1e-4, 20, 1e-4, True, True, True)
            torch.library.opcheck(triton_chunkwise, arguments)

    def test_compiles_without_a_graph_break(self):
        inputs = make_inputs("silu", 2, 150, 2, 64, 64, dtype=torch.float32)

        def loss(*tensors):
            return mesa_attention(*tensors, max_steps=64, tolerance=1e-6, backend="triton").o.square().sum()

        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
            gradients.append(torch.autograd.grad(function(*leaves), leaves))
        for eager, compiled in zip(*gradients, strict=True):
            assert relative_error(compiled.cpu(), eager.cpu()) < 1e-5

    def test_under_autocast_and_on_a_stream_of_its_own(self):
        inputs = [tensor.cuda() for tensor in make_inputs("silu", 1, 100, 2, 64, 64, dtype=torch.float32)]
        expected = mesa_attention(*inputs, backend="triton").o
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
            o = mesa_attention(*inputs, backend="triton").o
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(o, expected)

    def test_gradient_checkpointing_changes_nothing(self):
        inputs = make_inputs("silu", 1, 100, 2, 64, 64, dtype=torch.float32)

        def output(*tensors):
            return mesa_attention(*tensors, backend="triton").o

        gradients = []
        for checkpointed in (False, True):
            leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
            if checkpointed:
                o = torch.utils.checkpoint.checkpoint(output, *leaves, use_reentrant=False)
            else:
                o = output(*leaves)
            gradients.append(torch.autograd.grad(o.square().sum(), leaves))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_takes_as_many_steps_as_torch(self):
        inputs = [tensor.cuda() for tensor in make_inputs("mixed", 2, 200, 2, 128, 128, dtype=torch.float32)]
        options = {"max_steps": 64, "tolerance": 1e-4, "output_stats": True}
        ours, torchs = (mesa_attention(*inputs, backend=name, **options).stats for name in ("triton", "torch"))
        # Rounded directions cost a step now and then.
        assert (ours.steps - torchs.steps).abs().max() <= 2
        assert ours.residual.max() <= 1e-4

    def test_gradients_where_the_backward_solve_has_limits_of_its_own(self):
        inputs = make_inputs("silu", 1, 100, 2, 64, 64, dtype=torch.float32)
        expected = oracle(inputs)
        on_gpu = Inputs(*(tensor.cuda() for tensor in inputs))
        options = {"max_steps": 64, "tolerance": None, "backend": "triton"}
        rough = evaluate(chunkwise, on_gpu, **options, backward_max_steps=1, backward_tolerance=None)
        exact = evaluate(chunkwise, on_gpu, **options)
        assert torch.equal(rough["o"], exact["o"])
        rough, exact = (errors({name: t.cpu() for name, t in found.items()}, expected) for found in (rough, exact))
        assert exact["d_q"] < 1e-3 < rough["d_q"]
