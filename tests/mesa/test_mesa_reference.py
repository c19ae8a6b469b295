# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against definitions that share no code with it."""

import pytest
import torch
from mesa_inputs import Inputs, assert_close, cu_seqlens_of, evaluate, make_inputs, make_state, relative_error

from modeling_mesanet.mesa import MesaState, mesa_reference


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def decay_matrix(inputs: Inputs, row: int, head: int) -> torch.Tensor:
    """`zeta_ts beta_s` for s <= t, `[T, T]`, from products of the gammas."""
    gamma, beta = inputs.log_gamma[row, :, head].exp(), inputs.beta[row, :, head]
    length = len(gamma)
    weights = torch.zeros(length, length, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            weights[t, s] = gamma[s + 1 : t + 1].prod() * beta[s]
    return weights


def test_is_the_ridge_regression_on_everything_seen_so_far():
    """`o_t = M q_t`, M the minimiser of `sum_s zeta_ts beta_s ||M k_s - v_s||^2 + tr(M Lambda M^T)`."""
    inputs = make_inputs("mixed", 1, 12, 2, 5, 3)
    o, _ = mesa_reference(*inputs)
    q, k = unit(inputs.q), unit(inputs.k)
    for head in range(2):
        weights = decay_matrix(inputs, 0, head)
        for t in range(12):
            # Least squares with the regulariser as extra rows: no normal equations, no recurrence.
            scale = weights[t].sqrt()[:, None]
            design = torch.cat([scale * k[0, :, head], inputs.lam[head].sqrt().diag()])
            target = torch.cat([scale * inputs.v[0, :, head], torch.zeros(5, 3, dtype=torch.float64)])
            fitted = torch.linalg.lstsq(design, target).solution
            assert relative_error(o[0, t, head], fitted.mT @ q[0, t, head]) < 1e-10


def test_without_the_solver_is_masked_linear_attention():
    inputs = make_inputs("mixed", 2, 15, 2, 6, 4)
    o, _ = mesa_reference(*inputs, solve=False)
    q, k = unit(inputs.q), unit(inputs.k)
    for row in range(2):
        for head in range(2):
            scores = (q[row, :, head] @ k[row, :, head].mT) * decay_matrix(inputs, row, head)
            assert relative_error(o[row, :, head], scores @ inputs.v[row, :, head]) < 1e-12


def test_final_state_is_the_decayed_sum():
    inputs, state = make_inputs("mixed", 1, 15, 2, 6, 4), make_state(1, 2, 6, 4)
    _, (h, g) = mesa_reference(*inputs, initial_state=state)
    k = unit(inputs.k)
    for head in range(2):
        weights, left = decay_matrix(inputs, 0, head)[-1], inputs.log_gamma[0, :, head].exp().prod()
        weighted = weights[:, None] * k[0, :, head]
        assert relative_error(h[0, head], left * state.h[0, head] + weighted.mT @ k[0, :, head]) < 1e-12
        assert relative_error(g[0, head], left * state.g[0, head] + weighted.mT @ inputs.v[0, :, head]) < 1e-12


def test_gradients_are_the_numerical_ones():
    inputs, (h, g) = make_inputs("mixed", 1, 4, 2, 3, 2), make_state(1, 2, 3, 2)
    # At gamma = 0 the derivative with respect to log(gamma) has no finite difference.
    inputs = inputs._replace(log_gamma=inputs.log_gamma.clamp(min=-2))

    def flat(q, k, v, log_gamma, beta, lam, h, g):
        o, state = mesa_reference(q, k, v, log_gamma, beta, lam, initial_state=(h, g))
        return o, *state

    assert torch.autograd.gradcheck(flat, [tensor.requires_grad_() for tensor in (*inputs, h, g)])


def test_packed_equals_separate():
    lengths = [0, 4, 1, 0, 9, 0]
    inputs, state, bounds = make_inputs("mixed", 1, sum(lengths)), make_state(6, 2, 16, 12), cu_seqlens_of(lengths)
    o, (h, g) = mesa_reference(*inputs, initial_state=state, cu_seqlens=bounds)
    for s in range(len(lengths)):
        own = MesaState(state.h[s : s + 1], state.g[s : s + 1])
        part, final = mesa_reference(*inputs.tokens(bounds[s], bounds[s + 1]), initial_state=own)
        assert torch.equal(o[:, bounds[s] : bounds[s + 1]], part)
        assert torch.equal(h[s : s + 1], final[0])
        assert torch.equal(g[s : s + 1], final[1])


def test_pieces_equal_the_whole():
    inputs, state = make_inputs("mixed", length=20), make_state(2, 2, 16, 12)

    def pieces(*tensors, initial_state):
        inputs, state = Inputs(*tensors), initial_state
        first, state = mesa_reference(*inputs.tokens(0, 8), initial_state=state)
        second, state = mesa_reference(*inputs.tokens(8, 20), initial_state=state)
        return torch.cat([first, second], dim=1), state

    assert_close(evaluate(pieces, inputs, state), evaluate(mesa_reference, inputs, state), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_float64_whatever_it_is_given(dtype):
    inputs = make_inputs("normal", length=6, dtype=dtype)
    o, (h, g) = mesa_reference(*inputs)
    assert o.dtype == h.dtype == g.dtype == torch.float64
    assert torch.equal(o, mesa_reference(*inputs.to(torch.float64))[0])
