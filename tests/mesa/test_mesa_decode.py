# SPDX-License-Identifier: Apache-2.0
"""The one-token step: against the oracle, beside the chunkwise form, and what it does to its state."""

import pytest
import torch
from mesa_inputs import (
    CONVERGED,
    FAMILIES,
    FLOAT32_BOUND,
    FLOAT64_BOUND,
    OUTPUTS,
    REPEAT,
    Inputs,
    assert_close,
    chunkwise,
    float32_bound,
    make_inputs,
    make_state,
    relative_error,
    token_by_token,
)

from modeling_mesanet.mesa import MesaState, mesa_attention, mesa_reference, mesa_step


def outputs_of(o: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(OUTPUTS, (o, *state), strict=True))


class TestAgainstOracle:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_token_by_token(self, family, dtype):
        inputs, state = make_inputs(family, length=60, dtype=dtype), make_state(2, 2, 16, 12, dtype=dtype)
        exact = MesaState(state.h.double(), state.g.double())
        expected = mesa_reference(*inputs, initial_state=exact)
        actual = token_by_token(inputs, state, **CONVERGED)
        bound = FLOAT64_BOUND if dtype == torch.float64 else float32_bound(family)
        assert_close(outputs_of(*actual), outputs_of(*expected), bound)

    @pytest.mark.parametrize(("batch", "heads", "key_dim", "value_dim"), [(1, 1, 1, 1), (3, 1, 8, 20), (1, 3, 20, 4)])
    def test_shapes(self, batch, heads, key_dim, value_dim):
        inputs = make_inputs("mixed", batch, 9, heads, key_dim, value_dim)
        actual = token_by_token(inputs, **CONVERGED)
        assert_close(outputs_of(*actual), outputs_of(*mesa_reference(*inputs)), FLOAT64_BOUND)

    def test_without_the_solver_is_gated_linear_attention(self):
        inputs = make_inputs("mixed", length=30)
        actual = token_by_token(inputs, max_steps=0)
        assert_close(outputs_of(*actual), outputs_of(*mesa_reference(*inputs, solve=False)), FLOAT64_BOUND)

    def test_without_normalising(self):
        inputs = make_inputs("normal", length=10)
        actual = token_by_token(inputs, normalize_qk=False, **CONVERGED)
        assert_close(outputs_of(*actual), outputs_of(*mesa_reference(*inputs, normalize_qk=False)), FLOAT64_BOUND)


class TestBesideTheChunkwiseForm:
    # "power" takes more steps than the matrix has rows: there rounding decides when a token stops.
    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "power"])
    @pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
    def test_same_solver_start_and_stop(self, family, tolerance):
        """Prefill and decode agree at any tolerance, not only when converged: the same steps for every token."""
        inputs = make_inputs(family, length=40)
        solver = {"max_steps": 30, "tolerance": tolerance, "output_stats": True}
        whole = mesa_attention(*inputs, chunk_size=16, output_final_state=True, **solver)
        state = MesaState(torch.zeros_like(whole.final_state.h), torch.zeros_like(whole.final_state.g))
        for t in range(40):
            token = mesa_step(*inputs.tokens(t, t + 1), state, **solver)
            assert torch.equal(token.stats.steps, whole.stats.steps[:, t : t + 1])
            assert torch.allclose(token.stats.residual, whole.stats.residual[:, t : t + 1], rtol=1e-6)
            # A difference of method would be of the tolerance's size.
            assert relative_error(token.o, whole.o[:, t : t + 1]) < 1e-5 * tolerance

    @pytest.mark.parametrize("max_steps", [1, 3])
    def test_same_output_after_few_fixed_steps(self, max_steps):
        inputs = make_inputs("power", length=30)
        expected = mesa_attention(*inputs, max_steps=max_steps).o
        assert relative_error(token_by_token(inputs, max_steps=max_steps)[0], expected) < 1e-10

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, FLOAT32_BOUND)])
    def test_prefill_then_decode_then_prefill(self, dtype, bound):
        inputs = make_inputs("mixed", length=50, dtype=dtype)
        expected = chunkwise(*inputs, chunk_size=16)
        first, state = chunkwise(*inputs.tokens(0, 21), chunk_size=16)
        second, state = token_by_token(inputs.tokens(21, 34), state)
        third, state = chunkwise(*inputs.tokens(34, 50), initial_state=state, chunk_size=16)
        assert_close(outputs_of(torch.cat([first, second, third], dim=1), state), outputs_of(*expected), bound)

    def test_rows_do_not_depend_on_each_other(self):
        inputs, state = make_inputs("scream", batch=3, length=1), make_state(3, 2, 16, 12)
        together = token_by_token(inputs, state, max_steps=30, tolerance=1e-4)
        for row in range(3):
            alone = Inputs(*(tensor[row : row + 1] for tensor in inputs[:5]), inputs.lam)
            own = MesaState(state.h[row : row + 1], state.g[row : row + 1])
            apart = token_by_token(alone, own, max_steps=30, tolerance=1e-4)
            assert_close(outputs_of(*apart), {n: t[row : row + 1] for n, t in outputs_of(*together).items()}, 1e-12)


class TestState:
    def test_is_updated_in_place(self):
        inputs, state = make_inputs("normal", length=1), make_state(2, 2, 16, 12)
        before = MesaState(state.h.clone(), state.g.clone())
        addresses = [tensor.data_ptr() for tensor in state]
        output = mesa_step(*inputs, state)
        assert output.final_state.h is state.h
        assert output.final_state.g is state.g
        assert [tensor.data_ptr() for tensor in state] == addresses
        expected = mesa_reference(*inputs, initial_state=before)[1]
        assert relative_error(state.h, expected[0]) < 1e-12
        assert relative_error(state.g, expected[1]) < 1e-12

    def test_may_be_a_strided_view(self):
        """A cache may hold both states of all layers in one buffer."""
        inputs, expected = make_inputs("normal", length=1), make_state(2, 2, 16, 12)
        buffer = torch.full((2, 2, 16, 40), torch.nan, dtype=torch.float64)
        state = MesaState(buffer[..., 4:20], buffer[..., 20:32])
        state.h.copy_(expected.h)
        state.g.copy_(expected.g)
        o, expected_o = mesa_step(*inputs, state).o, mesa_step(*inputs, expected).o
        assert_close(outputs_of(o, state), outputs_of(expected_o, expected), 1e-14)
        assert buffer[..., :4].isnan().all()
        assert buffer[..., 32:].isnan().all()

    def test_a_pad_changes_no_bit(self):
        inputs = make_inputs("normal", length=1, dtype=torch.float32)
        inputs = inputs._replace(log_gamma=torch.zeros(2, 1, 2), beta=torch.zeros(2, 1, 2))
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        before = MesaState(state.h.clone(), state.g.clone())
        mesa_step(*inputs, state)
        assert torch.equal(state.h, before.h)
        assert torch.equal(state.g, before.g)

    def test_a_reset_forgets_everything(self):
        inputs, state = make_inputs("normal", length=1), make_state(2, 2, 16, 12)
        fresh = MesaState(torch.zeros_like(state.h), torch.zeros_like(state.g))
        inputs = inputs._replace(log_gamma=torch.full_like(inputs.log_gamma, -torch.inf))
        assert torch.equal(mesa_step(*inputs, state).o, mesa_step(*inputs, fresh).o)
        assert torch.equal(state.h, fresh.h)
        assert torch.equal(state.g, fresh.g)

    def test_keeps_no_graph(self):
        """Inputs that require gradients must not tie the state to an ever growing graph."""
        inputs, state = make_inputs("normal", length=1), make_state(2, 2, 16, 12)
        output = mesa_step(*(tensor.requires_grad_() for tensor in inputs), state)
        assert not output.o.requires_grad
        assert not state.h.requires_grad
        assert not state.g.requires_grad


@pytest.fixture(scope="module")
def repetition() -> tuple[Inputs, torch.Tensor]:
    """One token a thousand times, and the oracle's last output."""
    inputs = make_inputs(REPEAT, 1, 1000, 1, dtype=torch.float32)
    return inputs, mesa_reference(*inputs)[0][:, -1]


class TestLongRepetition:
    """Rounding errors of equal updates add up: the worst known case of float32 states. Runs of spaces look like this.

    H + Lambda has a condition number of 1,500, and every update of an entry is rounded the same way.
    """

    def test_chunkwise(self, repetition):
        inputs, expected = repetition
        assert relative_error(mesa_attention(*inputs, max_steps=30).o[:, -1], expected) < 5e-3

    def test_step(self, repetition):
        inputs, expected = repetition
        o, state = token_by_token(inputs, max_steps=30)
        assert relative_error(o[:, -1], expected) < 1e-1
        assert torch.linalg.eigvalsh(state.h + torch.diag_embed(inputs.lam)).min() > 0.2  # Lambda is 0.25
