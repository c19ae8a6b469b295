# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradient: start, stop, floor, breakdown, scale, and the independence of its rows."""

import pytest
import torch
from mesa_inputs import generator, relative_error

from modeling_mesanet.mesa import mesa_solver
from modeling_mesanet.mesa.mesa_solver import RESIDUAL_FLOOR, conjugate_gradient, full_precision, l2_normalize

ROWS, SIZE = 40, 24


def systems(condition: float = 100.0, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A symmetric positive definite matrix a row, `[R, K, K]`, eigenvalues from 1 to `condition`; `b` `[R, K]`."""
    source = generator(seed)
    basis, _ = torch.linalg.qr(torch.randn(ROWS, SIZE, SIZE, generator=source, dtype=torch.float64))
    eigenvalues = condition ** torch.linspace(0, 1, SIZE, dtype=torch.float64)
    matrix = basis @ torch.diag_embed(eigenvalues.expand(ROWS, SIZE)) @ basis.mT
    return matrix.to(dtype), torch.randn(ROWS, SIZE, generator=source, dtype=torch.float64).to(dtype)


def solve(matrix: torch.Tensor, b: torch.Tensor, max_steps: int = 200, tolerance: float | None = None):
    def matvec(p):  # no batched product: its rounding could depend on the number of rows
        return (matrix * p.unsqueeze(-2)).sum(-1)

    return conjugate_gradient(matvec, b, max_steps=max_steps, tolerance=tolerance)


def relative_residual(matrix: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    residual = b.double() - torch.einsum("rij,rj->ri", matrix.double(), x.double())
    return residual.norm(dim=-1) / b.double().norm(dim=-1)


class TestStart:
    def test_starts_at_zero_without_preconditioning(self):
        """One step is the steepest descent from zero: `x = (b.b / b.Ab) b`."""
        matrix, b = systems()
        x, steps, _ = solve(matrix, b, max_steps=1)
        curvature = torch.einsum("ri,rij,rj->r", b, matrix, b)
        assert relative_error(x, (b.square().sum(-1) / curvature)[:, None] * b) < 1e-12
        assert (steps == 1).all()

    def test_zero_right_hand_side(self):
        matrix, b = systems()
        b[3] = 0
        x, steps, residual = solve(matrix, b)
        assert not x[3].any()
        assert steps[3] == 0
        assert residual[3] == 0
        assert (steps[4:] > 0).all()


class TestStop:
    @pytest.mark.parametrize("condition", [3.0, 1e3])
    @pytest.mark.parametrize("tolerance", [1e-1, 1e-4, 1e-8])
    def test_stops_at_the_first_residual_within_the_tolerance(self, condition, tolerance):
        matrix, b = systems(condition)
        x, steps, residual = solve(matrix, b, tolerance=tolerance)
        true = relative_residual(matrix, x, b)
        assert (true <= tolerance / 2 * (1 + 1e-3)).all()
        assert torch.allclose(residual, true, rtol=1e-3)
        assert steps.min() > 1
        for taken in steps.unique().tolist():
            rows = steps == taken
            before = solve(matrix[rows], b[rows], max_steps=taken - 1)[0]
            assert (relative_residual(matrix[rows], before, b[rows]) > tolerance / 2).all()

    def test_float32_meets_a_tolerance_above_its_rounding(self):
        matrix, b = systems(1e3, torch.float32)
        x, _, _ = solve(matrix, b, tolerance=1e-4)
        assert (relative_residual(matrix, x, b) <= 1e-4).all()

    def test_tighter_tolerances_never_take_fewer_steps(self):
        matrix, b = systems(1e3)
        taken = torch.stack([solve(matrix, b, tolerance=t)[1] for t in (0.5, 1e-1, 1e-2, 1e-4, 1e-8, 1e-12)])
        assert (taken.diff(dim=0) >= 0).all()
        assert (taken[-1] > taken[0]).all()

    @pytest.mark.parametrize("tolerance", [None, 1e-12])
    def test_takes_no_more_than_max_steps(self, tolerance):
        matrix, b = systems(1e3)
        _, steps, residual = solve(matrix, b, max_steps=4, tolerance=tolerance)
        assert (steps == 4).all()
        assert (residual > 1e-12).all()

    def test_every_step_lowers_the_error_in_the_norm_of_the_matrix(self):
        matrix, b = systems(1e3)
        exact = torch.linalg.solve(matrix, b)
        previous = torch.full((ROWS,), torch.inf, dtype=torch.float64)
        for max_steps in range(1, 20):
            error = solve(matrix, b, max_steps=max_steps)[0] - exact
            energy = torch.einsum("ri,rij,rj->r", error, matrix, error)
            assert (energy < previous).all()
            previous = energy

    def test_as_many_steps_as_distinct_eigenvalues(self):
        """Rank-3 keys plus a multiple of the identity need 4 steps, and take no more."""
        source = generator(0)
        keys = torch.randn(ROWS, SIZE, 3, generator=source, dtype=torch.float64)
        matrix = keys @ keys.mT + 0.25 * torch.eye(SIZE, dtype=torch.float64)
        b = torch.randn(ROWS, SIZE, generator=source, dtype=torch.float64)
        x, steps, _ = solve(matrix, b, tolerance=1e-8)
        assert (steps <= 4).all()
        assert relative_error(x, torch.linalg.solve(matrix, b)) < 1e-6


class TestFloor:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_fixed_steps_end_at_the_floor(self, dtype):
        matrix, b = systems(10.0, dtype)
        x, steps, residual = solve(matrix, b, max_steps=1000)
        assert steps.max() < 100
        assert (residual <= RESIDUAL_FLOOR[dtype]).all()
        assert relative_error(x, torch.linalg.solve(matrix.double(), b.double())) < 10 * torch.finfo(dtype).eps

    def test_a_tolerance_below_the_floor_is_the_floor(self):
        matrix, b = systems(10.0, torch.float32)
        for below, floor in zip(solve(matrix, b, tolerance=1e-30), solve(matrix, b), strict=True):
            assert torch.equal(below, floor)

    @pytest.mark.parametrize("tolerance", [None, 1e-4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_converged_rows_stay_put(self, tolerance, dtype):
        """Rows of very different condition: the early ones wait unchanged, to the bit, for the late ones."""
        easy, b = systems(2.0, dtype)
        hard, _ = systems(1e4, dtype, seed=1)
        matrix = torch.where(torch.arange(ROWS)[:, None, None] % 2 == 0, easy, hard)
        x, steps, residual = solve(matrix, b, 1000, tolerance)
        enough = int(steps[::2].max())
        assert enough < steps[1::2].min()
        early_x, early_steps, early_residual = solve(matrix, b, enough, tolerance)
        assert torch.equal(x[::2], early_x[::2])
        assert torch.equal(steps[::2], early_steps[::2])
        assert torch.equal(residual[::2], early_residual[::2])
        assert not torch.equal(x[1::2], early_x[1::2])


class TestScale:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
    def test_size_of_the_right_hand_side_does_not_matter(self, scale, dtype):
        matrix, b = systems(10.0, dtype)
        expected, expected_steps, _ = solve(matrix, b, tolerance=1e-4)
        x, steps, residual = solve(matrix, b * scale, tolerance=1e-4)
        assert relative_error(x.double() / scale, expected) < 1e-5
        assert torch.equal(steps, expected_steps)
        assert (residual <= 1e-4).all()

    def test_rows_of_all_sizes_side_by_side(self):
        matrix, b = systems(10.0, torch.float32)
        scale = 10.0 ** torch.linspace(-30, 30, ROWS, dtype=torch.float64)[:, None]
        x, _, _ = solve(matrix, (b * scale).float())
        expected = torch.linalg.solve(matrix.double(), b.double())
        assert relative_error(x / scale, expected) < 1e-5

    def test_subnormal_right_hand_side_is_finite(self):
        matrix, b = systems(10.0, torch.float32)
        assert solve(matrix, b * 1e-40)[0].isfinite().all()


class TestRowsAreIndependent:
    @pytest.mark.parametrize("tolerance", [None, 1e-4])
    def test_alone_or_together(self, tolerance):
        matrix, b = systems(1e3)
        together = solve(matrix, b, 60, tolerance)
        for row in range(0, ROWS, 7):
            alone = solve(matrix[row : row + 1], b[row : row + 1], 60, tolerance)
            assert all(torch.equal(own[0], shared[row]) for own, shared in zip(alone, together, strict=True))

    def test_whatever_the_neighbours_hold(self):
        matrix, b = systems(1e3, torch.float32)
        others = b.clone()
        others[1:] *= 1e10 * torch.randn(ROWS - 1, SIZE, generator=generator(1))
        first, second = solve(matrix, b, tolerance=1e-5), solve(matrix, others, tolerance=1e-5)
        assert all(torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_what_is_not_finite_stays_in_its_row(self, poison):
        matrix, b = systems()
        expected, expected_steps, _ = solve(matrix, b)
        b[5, 7] = poison
        x, steps, _ = solve(matrix, b)
        others = torch.arange(ROWS) != 5
        assert x[5].isnan().any()
        assert torch.equal(x[others], expected[others])
        assert torch.equal(steps[others], expected_steps[others])

    def test_a_matrix_with_nan_stays_in_its_row(self):
        matrix, b = systems()
        expected = solve(matrix, b)[0]
        matrix[5, 1, 2] = torch.nan
        x = solve(matrix, b)[0]
        others = torch.arange(ROWS) != 5
        assert x[5].isnan().any()
        assert torch.equal(x[others], expected[others])


class TestBreakdown:
    def test_a_negative_definite_matrix_returns_the_start(self):
        matrix, b = systems()
        x, steps, residual = solve(-matrix, b)
        assert not x.any()
        assert not steps.any()
        assert torch.allclose(residual, torch.ones_like(residual))

    def test_an_indefinite_matrix_keeps_the_last_good_iterate(self):
        """Eigenvalues of both signs: each row ends finite, where it was before the curvature turned negative."""
        matrix, b = systems()
        matrix = matrix - 10 * torch.eye(SIZE, dtype=torch.float64)
        x, steps, residual = solve(matrix, b, max_steps=200)
        assert x.isfinite().all()
        broken = residual > 1e-8
        assert broken.any()
        assert torch.allclose(residual, relative_residual(matrix, x, b), rtol=1e-6)
        for row in broken.nonzero().flatten():
            taken = int(steps[row])
            one = slice(row, row + 1)
            before = solve(matrix[one], b[one], max_steps=taken)[0] if taken else torch.zeros_like(b[one])
            assert torch.equal(x[one], before)

    def test_a_healthy_row_does_not_notice_a_broken_one(self):
        matrix, b = systems()
        expected = solve(matrix, b)[0]
        matrix[5] = -matrix[5]
        x = solve(matrix, b)[0]
        others = torch.arange(ROWS) != 5
        assert torch.equal(x[others], expected[others])


class TestL2Normalize:
    def test_unit_rows(self):
        x = 10 * torch.randn(7, 5, generator=generator(0), dtype=torch.float64)
        assert torch.allclose(l2_normalize(x).norm(dim=-1), torch.ones(7, dtype=torch.float64), atol=1e-6)

    def test_a_zero_row_and_its_gradient_are_finite(self):
        x = torch.zeros(2, 5, requires_grad=True)
        y = l2_normalize(x)
        assert not y.any()
        y.sum().backward()
        assert x.grad.isfinite().all()


class TestFullPrecision:
    def test_leaves_autocast_and_returns_to_it(self):
        a = torch.randn(4, 4, generator=generator(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16
            with full_precision(a.device):
                assert (a @ a).dtype == torch.float32
            assert (a @ a).dtype == torch.bfloat16

    def test_returns_to_autocast_after_an_error(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
                raise ZeroDivisionError
            assert torch.is_autocast_enabled("cpu")

    def test_leaves_bfloat16_products_and_returns_to_them(self):
        setting = torch.backends.mkldnn.matmul
        before = setting.fp32_precision
        try:
            setting.fp32_precision = "bf16"
            with full_precision(torch.device("cpu")):
                assert setting.fp32_precision == "ieee"
            assert setting.fp32_precision == "bf16"
        finally:
            setting.fp32_precision = before

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_leaves_tf32_and_returns_to_it(self):
        a = torch.randn(512, 512, generator=generator(0)).cuda()
        exact = a.double() @ a.double()
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert relative_error(a @ a, exact) > 1e-5
            with full_precision(a.device):
                assert relative_error(a @ a, exact) < 1e-6
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def test_a_device_is_asked_every_few_steps_only(monkeypatch):
    """Where the check costs a synchronisation, rows still stop where they would have; only the loop ends later."""
    matrix, b = systems(10.0)
    expected = solve(matrix, b, tolerance=1e-4)
    looks = []

    def count(device, active):
        looks.append(int(active.sum()))
        return bool(active.any())

    monkeypatch.setattr(mesa_solver, "any_active", count)
    for plain, counted in zip(expected, solve(matrix, b, tolerance=1e-4), strict=True):
        assert torch.equal(plain, counted)
    assert looks[-1] == 0
