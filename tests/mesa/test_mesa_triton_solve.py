# SPDX-License-Identifier: Apache-2.0
"""The Triton solve against the torch solve and the float64 oracle: interpreted on a CPU, compiled on a GPU."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from modeling_mesanet.mesa import mesa_attention, mesa_chunkwise, mesa_reference, mesa_triton_solve

# A process of its own, because Triton reads the variable when the kernel is defined.
INTERPRETED = """
import json, torch
from test_mesa_triton_solve import solves
print(json.dumps([list(map(float, row)) for row in solves("cpu")]))
"""


def systems(device):
    """Right-hand sides and factors of a few chunks, easy and hard, with a zero, a tiny and a NaN row."""
    generator = torch.Generator().manual_seed(0)
    lines, heads, chunks, size, key_dim = 1, 2, 2, 16, 32

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    for nearly_constant in (False, True):
        k = normal(lines, heads, chunks, size, key_dim)
        if nearly_constant:
            k = 1 + 0.01 * k
        k = torch.nn.functional.normalize(k, dim=-1)
        past = torch.nn.functional.normalize(k + 0.01 * normal(*k.shape), dim=-1)
        # States are columns of a wider tensor, as the scan returns them.
        state = torch.cat([past.transpose(-1, -2) @ past, normal(lines, heads, chunks, key_dim, 24)], dim=-1)
        b = normal(*k.shape)
        b[0, 0, 0, 3] = 0
        b[0, 0, 0, 4] *= 1e-30
        b[0, 1, 1, 5, 2] = torch.nan
        log_gamma = (
            torch.zeros(lines, heads, chunks, size) if nearly_constant else -0.1 * normal(1, heads, chunks, size).abs()
        )
        factors = mesa_chunkwise.ChunkFactors(log_gamma)
        lam = torch.full((heads, key_dim), 0.25)
        arguments = (b, k, state[..., :key_dim], lam, factors, factors.zeta * 0.9)
        yield tuple(
            argument.to(device) if torch.is_tensor(argument) else mesa_chunkwise.ChunkFactors(log_gamma.to(device))
            for argument in arguments
        )


def solves(device):
    """For each system: largest relative error of a row between the kernel and torch, difference in steps, and whether
    the special rows came out as they should."""
    fits, mesa_chunkwise.fused_solve_fits = mesa_chunkwise.fused_solve_fits, lambda b: False
    try:
        for b, k, h, lam, factors, weights in systems(device):
            options = {"max_steps": 64, "tolerance": 1e-6}
            expected, expected_steps, _ = mesa_chunkwise.chunk_solve(b, k, h, lam, factors, weights, **options)
            x, steps, residual = mesa_triton_solve.fused_chunk_solve(
                b, k, h, lam, factors.from_start, weights, **options
            )
            special = x[0, 0, 0, 3].eq(0).all() and x[0, 1, 1, 5].isnan().any() and residual[0, 0, 0, 4] <= 1e-6
            finite = expected.isfinite().all(-1)
            others = int((~x.isfinite().all(-1)).sum() - (~finite).sum())
            difference = (x - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
            yield difference[finite].max(), (steps - expected_steps).abs().max(), special, others
    finally:
        mesa_chunkwise.fused_solve_fits = fits


def check(results):
    assert len(results) == 2
    for difference, steps, special, others in results:
        assert difference < 1e-4
        assert steps <= 1  # a residual at the threshold may fall on either side of it
        assert special
        assert others == 0


def test_interpreted_kernel_agrees_with_torch():
    pytest.importorskip("triton", reason="triton is not installed; the kernel cannot be interpreted")
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    check(json.loads(run.stdout.splitlines()[-1]))


def test_a_broken_triton_or_the_environment_leaves_the_solve_to_torch(monkeypatch):
    mesa_triton_solve.load_kernel.cache_clear()
    monkeypatch.setenv("MESANET_BACKEND", "torch")
    assert mesa_triton_solve.load_kernel() == (None, "MESANET_BACKEND is torch")
    monkeypatch.setenv("MESANET_BACKEND", "tritn")
    mesa_triton_solve.load_kernel.cache_clear()
    with pytest.raises(ValueError, match="MESANET_BACKEND is 'tritn'; set it to 'auto' or 'torch'"):
        mesa_triton_solve.load_kernel()
    monkeypatch.delenv("MESANET_BACKEND")
    monkeypatch.setitem(sys.modules, "modeling_mesanet.mesa.mesa_triton_kernels", None)
    kernel, reason = mesa_triton_solve.load_kernel()
    assert kernel is None
    assert "triton cannot be imported" in reason
    mesa_triton_solve.load_kernel.cache_clear()


def solve_by_torch(b, k, h, lam, from_start, weights, **options):
    factors = SimpleNamespace(from_start=from_start)
    return mesa_chunkwise.chunk_solve(b, k, h, lam, factors, weights, **options)


def fail(*arguments, **options):
    raise RuntimeError("PassManager::run failed")


def solve_wrongly(*arguments, **options):
    x, steps, residual = solve_by_torch(*arguments, **options)
    return x * 1.001, steps, residual


@pytest.mark.parametrize(
    ("solve", "warning"),
    [
        (solve_by_torch, None),
        (fail, "RuntimeError: PassManager::run failed"),
        (solve_wrongly, "a relative error of 1.0e-03"),
    ],
)
def test_first_use_checks_the_kernel(monkeypatch, solve, warning):
    monkeypatch.setattr(mesa_triton_solve, "fused_chunk_solve", solve)
    # The cache would keep the verdict on a patched kernel.
    check = mesa_triton_solve.kernel_is_right.__wrapped__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right = check(torch.device("cpu"), 16, 32)
    assert right == (warning is None)
    assert len(caught) == (warning is not None)
    if warning is not None:
        assert warning in str(caught[0].message)


def test_torch_iterates_on_a_cpu():
    assert not mesa_triton_solve.fused_solve_fits(torch.zeros(1, 1, 1, 32, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_kernel_agrees_with_torch():
    check([list(map(float, row)) for row in solves("cuda")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("key_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_attention_on_a_gpu_agrees_with_the_oracle(key_dim, chunk_size):
    fits = key_dim in mesa_triton_solve.FUSED_SIZES
    assert mesa_triton_solve.fused_solve_fits(torch.zeros(1, 1, 1, chunk_size, key_dim, device="cuda")) == fits
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 150, 2, key_dim, generator=generator) for _ in range(3))
    log_gamma = torch.nn.functional.logsigmoid(torch.randn(2, 150, 2, generator=generator) + 4)
    beta, lam = torch.rand(2, 150, 2, generator=generator), torch.full((2, key_dim), 0.25)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, log_gamma, beta, lam)]
    expected, _ = mesa_reference(*leaves)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    on_gpu = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    # Neither autocast nor TF32 may reach the solver.
    with torch.autocast("cuda", torch.bfloat16):
        o = mesa_attention(*on_gpu, max_steps=64, tolerance=1e-6, chunk_size=chunk_size).o
    computed = torch.autograd.grad((o * weights.cuda()).sum(), on_gpu)
    for name, ours, theirs in zip(
        ("o", "q", "k", "v", "log_gamma", "beta", "lam"), (o, *computed), (expected, *gradients), strict=True
    ):
        error = (ours.cpu().double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 1e-4, f"{name}: {error:.1e}"
