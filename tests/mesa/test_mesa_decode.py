# SPDX-License-Identifier: Apache-2.0
"""The one-token step: against the oracle, beside the chunkwise form, and what it does to its state; a few tokens."""

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

from modeling_mesanet.mesa import MesaState, mesa_attention, mesa_decode, mesa_operator, mesa_reference, mesa_step


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


@pytest.fixture
def few(monkeypatch):
    """The lengths that `decode_tokens` is called with."""
    lengths, right = [], mesa_operator.decode_tokens

    def watched(q, *arguments):
        lengths.append(q.shape[1])
        return right(q, *arguments)

    monkeypatch.setattr(mesa_operator, "decode_tokens", watched)
    return lengths


class TestFewTokens:
    """Of `mesa_attention` on a CPU: states one token after the other, all systems in one solve."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("with_state", [False, True])
    def test_against_the_oracle(self, few, family, dtype, with_state):
        inputs = make_inputs(family, length=12, dtype=dtype)
        state = make_state(2, 2, 16, 12, dtype=dtype) if with_state else None
        exact = None if state is None else MesaState(state.h.double(), state.g.double())
        expected = mesa_reference(*inputs, initial_state=exact)
        actual = chunkwise(*inputs, initial_state=state)
        assert few == [12]
        bound = FLOAT64_BOUND if dtype == torch.float64 else float32_bound(family)
        assert_close(outputs_of(*actual), outputs_of(*expected), bound)

    @pytest.mark.parametrize(
        "solver", [{"tolerance": 1e-2}, {"tolerance": 1e-4}, {"max_steps": 0}, {"max_steps": 1}, {"max_steps": 3}]
    )
    def test_as_the_chunkwise_form(self, few, monkeypatch, solver):
        inputs, state = make_inputs("scream", length=11), make_state(2, 2, 16, 12)
        options = {"initial_state": state, "output_final_state": True, "output_stats": True, **solver}
        actual = mesa_attention(*inputs, **options)
        monkeypatch.setattr(mesa_decode, "FEW_TOKENS", 0)
        expected = mesa_attention(*inputs, **options)
        assert few == [11]
        assert torch.equal(actual.stats.steps, expected.stats.steps)
        torch.testing.assert_close(actual.stats.residual, expected.stats.residual, rtol=1e-5, atol=1e-12)
        # A difference of method would be of the tolerance's size.
        assert relative_error(actual.o, expected.o) < 1e-7
        for ours, theirs in zip(actual.final_state, expected.final_state, strict=True):
            assert relative_error(ours, theirs) < 1e-12

    def test_resets_and_pads(self, few):
        inputs, state = make_inputs("normal", length=9, dtype=torch.float32), make_state(2, 2, 16, 12).h
        state = MesaState(state.float(), make_state(2, 2, 16, 12).g.float())
        keep = inputs._replace(log_gamma=torch.zeros_like(inputs.log_gamma), beta=torch.zeros_like(inputs.beta))
        output = mesa_attention(*keep, initial_state=state, output_final_state=True)
        assert all(torch.equal(*pair) for pair in zip(output.final_state, state, strict=True))
        inputs.log_gamma[:, 4] = -torch.inf
        output = mesa_attention(*inputs, initial_state=state, output_final_state=True)
        fresh = mesa_attention(*inputs.tokens(4, 9), output_final_state=True)
        assert relative_error(output.o[:, 4:], fresh.o) < 1e-6
        assert all(torch.equal(*pair) for pair in zip(output.final_state, fresh.final_state, strict=True))
        assert few == [9, 9, 5]

    def test_sequences_do_not_see_each_other(self, few):
        inputs = make_inputs("scream", batch=3, length=5)
        expected = mesa_attention(*inputs, tolerance=1e-4).o
        inputs.v[1, 2], inputs.k[1, 3] = torch.inf, torch.nan
        actual = mesa_attention(*inputs, tolerance=1e-4).o
        assert few == [5, 5]
        assert relative_error(actual[[0, 2]], expected[[0, 2]]) < 1e-12
        assert relative_error(actual[1, :2], expected[1, :2]) < 1e-12
        assert actual[1, 3:].isnan().all()

    def test_states_that_come_back_hold_nothing_else(self, few):
        state = make_state(2, 2, 16, 12)
        before = MesaState(state.h.clone(), state.g.clone())
        output = mesa_attention(*make_inputs(length=8), initial_state=state, output_final_state=True)
        assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in output.final_state)
        assert few == [8]

    def test_what_the_chunkwise_form_keeps(self, few):
        inputs = make_inputs(length=13)
        mesa_attention(*inputs)
        mesa_attention(*inputs.tokens(0, 0), output_final_state=True)
        single = make_inputs(batch=1, length=6)
        mesa_attention(*single, cu_seqlens=torch.tensor([0, 2, 6]))
        mesa_attention(*make_inputs(batch=1, length=12, heads=3, key_dim=256))  # many entries
        learning = single._replace(q=single.q.requires_grad_())
        mesa_attention(*learning).o.sum().backward()
        assert few == []
        with torch.no_grad():
            mesa_attention(*learning)
        assert few == [6]
        torch._dynamo.reset()
        compiled = torch.compile(mesa_attention, backend="eager", fullgraph=True)
        with torch.no_grad():
            assert relative_error(compiled(*learning).o, mesa_attention(*learning).o) < 1e-9
        assert few == [6, 6]
        torch._dynamo.reset()

    def test_speed_settings_do_not_reach_it(self, few):
        """As for every path: no 16-bit products in place of float32."""
        inputs, state = (
            make_inputs("scream", length=7, dtype=torch.float32),
            make_state(2, 2, 16, 12, dtype=torch.float32),
        )
        expected = mesa_attention(*inputs, initial_state=state, output_final_state=True, tolerance=1e-4)
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                actual = mesa_attention(*inputs, initial_state=state, output_final_state=True, tolerance=1e-4)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert few == [7, 7]
        assert torch.equal(actual.o, expected.o)
        assert all(torch.equal(*pair) for pair in zip(actual.final_state, expected.final_state, strict=True))

    def test_is_not_kept_in_a_trace(self, few):
        inputs = make_inputs(length=6)
        other = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        with torch.no_grad():
            traced = torch.jit.trace(lambda q: mesa_attention(q, *inputs[1:]).o, inputs.q, check_trace=False)
            assert few == []
            assert relative_error(traced(other), mesa_attention(other, *inputs[1:]).o) < 1e-9
