# SPDX-License-Identifier: Apache-2.0
"""The chunkwise form against the float64 oracle: outputs, final states and every gradient."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mesa_inputs import (
    CONVERGED,
    FAMILIES,
    FLOAT32_BOUND,
    FLOAT64_BOUND,
    Inputs,
    assert_close,
    chunkwise,
    cu_seqlens_of,
    evaluate,
    float32_bound,
    make_inputs,
    make_state,
    oracle,
    relative_error,
)
from torch.profiler import ProfilerActivity, profile

from modeling_mesanet.mesa import MesaState, mesa_attention, mesa_chunkwise, mesa_reference

# Sequences with no token and with one, first, in the middle and last; whole chunks of 16 and parts of them.
PACKINGS = {
    "empty at the ends and inside": [0, 5, 0, 0, 33, 16, 0],
    "one token at the ends and inside": [1, 20, 1, 32, 1],
    "empty beside one token": [0, 1, 40, 1, 0],
    "a single sequence": [37],
}


def solution(inputs: Inputs, max_steps: int, tolerance: float | None, chunk_size: int = 16):
    """The solver's x `[B, T, H, K]`, steps and residuals; q and k are used as given."""
    _, _, _, x, steps, residual = mesa_chunkwise.chunkwise(
        *inputs, None, None, None, max_steps, tolerance, max_steps, tolerance, chunk_size
    )
    return x, steps, residual


def true_residual(inputs: Inputs, x: torch.Tensor) -> torch.Tensor:
    """`||q_t - (H_t + Lambda) x_t|| / ||q_t||` `[B, T, H]`, from the recurrence in float64."""
    q, k, _, log_gamma, beta, lam = inputs.to(torch.float64)
    h = torch.zeros(*k.shape[:1], *k.shape[2:], k.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(q.shape[1]):
        h = log_gamma[:, t].exp()[..., None, None] * h
        h = h + beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        product = torch.einsum("bhij,bhj->bhi", h + torch.diag_embed(lam), x[:, t].double())
        rows.append((q[:, t] - product).norm(dim=-1) / q[:, t].norm(dim=-1))
    return torch.stack(rows, dim=1)


class TestAgainstOracle:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_float64(self, family):
        inputs, state = make_inputs(family), make_state(2, 2, 16, 12)
        assert_close(evaluate(chunkwise, inputs, state, **CONVERGED), oracle(inputs, state), FLOAT64_BOUND)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_float32(self, family):
        inputs = make_inputs(family, dtype=torch.float32)
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        actual = evaluate(chunkwise, inputs, state, max_steps=100)
        assert all(tensor.dtype == torch.float32 for tensor in actual.values())
        assert_close(actual, oracle(inputs, state), float32_bound(family))

    @pytest.mark.parametrize("family", ["normal", "scream", "rank8"])
    def test_float32_at_the_published_head_size(self, family):
        inputs = make_inputs(family, batch=1, length=200, heads=1, key_dim=128, value_dim=128, dtype=torch.float32)
        assert_close(evaluate(chunkwise, inputs, max_steps=30), oracle(inputs), float32_bound(family))

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "key_dim", "value_dim", "chunk_size"),
        [
            (1, 1, 1, 8, 8, 64),  # a single token
            (2, 16, 2, 8, 8, 16),  # exactly one chunk
            (2, 17, 2, 8, 8, 16),  # one token more
            (2, 48, 1, 8, 8, 16),  # whole chunks
            (3, 37, 3, 8, 20, 16),  # values larger than keys
            (2, 21, 2, 20, 4, 1),  # chunks of one token
            (1, 70, 2, 12, 8, 64),
            (1, 9, 1, 8, 8, 1000),  # a chunk larger than the sequence
            (1, 5, 1, 1, 1, 2),  # everything of size 1
        ],
    )
    def test_shapes(self, batch, length, heads, key_dim, value_dim, chunk_size):
        inputs = make_inputs("mixed", batch, length, heads, key_dim, value_dim)
        state = make_state(batch, heads, key_dim, value_dim)
        actual = evaluate(chunkwise, inputs, state, chunk_size=chunk_size, **CONVERGED)
        assert_close(actual, oracle(inputs, state), FLOAT64_BOUND)

    @pytest.mark.parametrize("group", [1, 2, 3])
    def test_more_chunks_than_a_scan_group(self, group, monkeypatch):
        monkeypatch.setattr(mesa_chunkwise, "SCAN_GROUP", group)
        inputs, state = make_inputs("mixed", length=30), make_state(2, 2, 16, 12)
        actual = evaluate(chunkwise, inputs, state, chunk_size=4, **CONVERGED)
        assert_close(actual, oracle(inputs, state), FLOAT64_BOUND)

    def test_without_an_initial_state(self):
        inputs = make_inputs("mixed")
        assert_close(evaluate(chunkwise, inputs, **CONVERGED), oracle(inputs), FLOAT64_BOUND)

    def test_without_normalising(self):
        inputs = make_inputs("normal", length=40)
        actual = evaluate(chunkwise, inputs, normalize_qk=False, **CONVERGED)
        assert_close(actual, oracle(inputs, normalize_qk=False), FLOAT64_BOUND)
        assert relative_error(actual["o"], oracle(inputs)["o"]) > 0.1

    def test_a_reset_at_every_token(self):
        inputs = make_inputs("mixed", length=20)
        inputs = inputs._replace(log_gamma=torch.full_like(inputs.log_gamma, -torch.inf))
        state = make_state(2, 2, 16, 12)
        actual = evaluate(chunkwise, inputs, state, chunk_size=8, **CONVERGED)
        assert_close(actual, oracle(inputs, state), FLOAT64_BOUND)
        assert not actual["d_initial_h"].any()

    @pytest.mark.parametrize("differentiated", [("o",), ("final_h",), ("final_g",)])
    def test_gradients_from_one_output_alone(self, differentiated):
        inputs, state = make_inputs("mixed", length=40), make_state(2, 2, 16, 12)
        actual = evaluate(chunkwise, inputs, state, differentiated, chunk_size=16, **CONVERGED)
        assert_close(actual, oracle(inputs, state, differentiated=differentiated), FLOAT64_BOUND)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_packing(data):
    """Random sizes, packings, chunk and group sizes, gates at their limits: the oracle's values and gradients."""
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any), label="lengths")
    packed = data.draw(st.booleans(), label="packed")
    heads, key_dim, value_dim = (data.draw(st.integers(1, 6), label=name) for name in ("H", "K", "V"))
    batch, length = (1, sum(lengths)) if packed else (data.draw(st.integers(1, 3), label="B"), max(lengths))
    seed = data.draw(st.integers(0, 2**20), label="seed")
    family = data.draw(st.sampled_from(["normal", "strong", "mixed", "scream", "cluster4"]), label="family")
    inputs = make_inputs(family, batch, length, heads, key_dim, value_dim, seed=seed)
    limits = data.draw(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=length, max_size=length), label="gamma")
    for t, gamma in enumerate(limits):
        if gamma is not None:
            inputs.log_gamma[:, t] = torch.tensor(gamma).log()
    options = {"cu_seqlens": cu_seqlens_of(lengths)} if packed else {}
    sequences = len(lengths) if packed else batch
    with_state = data.draw(st.booleans(), label="initial state")
    state = make_state(sequences, heads, key_dim, value_dim, seed=seed) if with_state else None
    chunk_size = data.draw(st.integers(1, 14), label="C")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesa_chunkwise, "SCAN_GROUP", data.draw(st.integers(1, 5), label="scan group"))
        actual = evaluate(chunkwise, inputs, state, chunk_size=chunk_size, **options, **CONVERGED)
    assert_close(actual, oracle(inputs, state, **options), FLOAT64_BOUND)


class TestPacked:
    @pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
    @pytest.mark.parametrize("with_state", [True, False])
    def test_against_the_oracle(self, lengths, with_state):
        inputs, cu_seqlens = make_inputs("mixed", 1, sum(lengths)), cu_seqlens_of(lengths)
        state = make_state(len(lengths), 2, 16, 12) if with_state else None
        actual = evaluate(chunkwise, inputs, state, cu_seqlens=cu_seqlens, chunk_size=16, **CONVERGED)
        assert_close(actual, oracle(inputs, state, cu_seqlens=cu_seqlens), FLOAT64_BOUND)

    @pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_equals_separate_runs(self, lengths, dtype):
        inputs, state = make_inputs("mixed", 1, sum(lengths)), make_state(len(lengths), 2, 16, 12)
        bounds = cu_seqlens_of(lengths)
        packed_o, packed_state = chunkwise(*inputs, initial_state=state, cu_seqlens=bounds.to(dtype), chunk_size=16)
        for s, length in enumerate(lengths):
            own = MesaState(state.h[s : s + 1], state.g[s : s + 1])
            if length == 0:
                final = own
            else:
                tokens = inputs.tokens(bounds[s], bounds[s + 1])
                o, final = chunkwise(*tokens, initial_state=own, chunk_size=16)
                assert relative_error(packed_o[:, bounds[s] : bounds[s + 1]], o) < 1e-12
            assert relative_error(packed_state.h[s : s + 1], final.h) < 1e-12
            assert relative_error(packed_state.g[s : s + 1], final.g) < 1e-12

    def test_an_empty_sequence_keeps_its_state_to_the_bit(self):
        inputs, state = make_inputs("mixed", 1, 20), make_state(3, 2, 16, 12)
        _, final = chunkwise(*inputs, initial_state=state, cu_seqlens=cu_seqlens_of([0, 20, 0]))
        for s in (0, 2):
            assert torch.equal(final.h[s], state.h[s])
            assert torch.equal(final.g[s], state.g[s])
        assert not torch.equal(final.h[1], state.h[1])


class TestNoTokens:
    @pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0, 0])])
    def test_length_zero_returns_the_initial_state(self, cu_seqlens):
        inputs = make_inputs("normal", 2 if cu_seqlens is None else 1, 0)
        state = make_state(2, 2, 16, 12)
        state.h.requires_grad_()
        o, final = chunkwise(*inputs, initial_state=state, cu_seqlens=cu_seqlens)
        assert o.shape == (*inputs.q.shape[:3], 12)
        assert torch.equal(final.h, state.h)
        assert torch.equal(final.g, state.g)
        (grad,) = torch.autograd.grad(final.h.sum(), state.h)
        assert torch.equal(grad, torch.ones_like(state.h))

    def test_length_zero_without_an_initial_state_returns_zeros(self):
        o, final = chunkwise(*make_inputs("normal", 2, 0))
        assert o.shape == (2, 0, 2, 12)
        assert final.h.shape == (2, 2, 16, 16)
        assert not final.h.any()
        assert not final.g.any()

    def test_an_empty_batch(self):
        o, final = chunkwise(*make_inputs("normal", 0, 5))
        assert o.shape == (0, 5, 2, 12)
        assert final.g.shape == (0, 2, 16, 12)


class TestSplits:
    """A sequence processed in pieces, the state carried from one to the next, is the sequence processed at once."""

    @pytest.mark.parametrize("pieces", [[49, 1], [1, 49], [16, 16, 18], [7, 13, 1, 29], [1] * 50, [20, 0, 30]])
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, FLOAT32_BOUND)])
    def test_pieces(self, pieces, dtype, bound):
        inputs = make_inputs("mixed", length=50, dtype=dtype)
        expected, expected_state = chunkwise(*inputs, chunk_size=16)
        state, outputs = None, []
        for start, end in pairwise(cu_seqlens_of(pieces).tolist()):
            o, state = chunkwise(*inputs.tokens(start, end), initial_state=state, chunk_size=16)
            outputs.append(o)
        assert relative_error(torch.cat(outputs, dim=1), expected) <= bound
        assert relative_error(state.h, expected_state.h) <= bound
        assert relative_error(state.g, expected_state.g) <= bound

    def test_gradients_flow_through_the_carried_state(self):
        def pieces(*tensors, initial_state, **options):
            inputs, state, outputs = Inputs(*tensors), initial_state, []
            for start, end in ((0, 7), (7, 8), (8, 40)):
                o, state = chunkwise(*inputs.tokens(start, end), initial_state=state, chunk_size=16, **options)
                outputs.append(o)
            return torch.cat(outputs, dim=1), state

        inputs, state = make_inputs("mixed", length=40), make_state(2, 2, 16, 12)
        assert_close(evaluate(pieces, inputs, state, **CONVERGED), oracle(inputs, state), FLOAT64_BOUND)

    @pytest.mark.parametrize("chunk_size", [1, 3, 64])
    def test_the_chunk_size_does_not_matter(self, chunk_size):
        inputs = make_inputs("mixed", length=50)
        expected = evaluate(chunkwise, inputs, chunk_size=16, **CONVERGED)
        assert_close(evaluate(chunkwise, inputs, chunk_size=chunk_size, **CONVERGED), expected, 1e-10)


class TestPads:
    @pytest.mark.parametrize("where", [[0, 0, 0], [50] * 30, [0, 10, 10, 31, 50], list(range(0, 50, 2))])
    def test_pads_anywhere_change_nothing(self, where):
        """Tokens with beta = 0 and log_gamma = 0, whatever their q, k and v, put before the tokens at `where`."""
        inputs = make_inputs("mixed", length=50)
        pads = make_inputs("normal", length=len(where), seed=9)
        pads = pads._replace(log_gamma=torch.zeros_like(pads.log_gamma), beta=torch.zeros_like(pads.beta))
        order = torch.tensor([*range(50), *(position - 0.5 for position in where)]).argsort()
        padded = Inputs(
            *(torch.cat(pair, dim=1)[:, order] for pair in zip(inputs[:5], pads[:5], strict=True)), inputs.lam
        )
        kept = order.argsort()[:50]

        def without_pads(*tensors, **options):
            o, state = chunkwise(*tensors, **options)
            return o[:, kept], state

        state = make_state(2, 2, 16, 12)
        expected = evaluate(chunkwise, inputs, state, chunk_size=16, **CONVERGED)
        actual = evaluate(without_pads, padded, state, chunk_size=16, **CONVERGED)
        for name in ("d_k", "d_v"):  # a pad writes nothing
            assert not actual[name][:, order >= 50].any()
        for name in ("d_q", "d_k", "d_v", "d_log_gamma", "d_beta"):
            actual[name] = actual[name][:, kept]
        assert_close(actual, expected, 1e-10)

    def test_pads_alone_keep_the_state_to_the_bit(self):
        inputs, state = make_inputs("normal", length=40, dtype=torch.float32), make_state(2, 2, 16, 12)
        state = MesaState(state.h.float(), state.g.float())
        inputs = inputs._replace(log_gamma=torch.zeros_like(inputs.log_gamma), beta=torch.zeros_like(inputs.beta))
        _, final = chunkwise(*inputs, initial_state=state, chunk_size=16)
        assert torch.equal(final.h, state.h)
        assert torch.equal(final.g, state.g)

    def test_zero_keys_and_queries_are_finite(self):
        inputs = make_inputs("normal", length=20)
        inputs.q[:, 3:6], inputs.k[:, 4:8] = 0, 0
        assert_close(evaluate(chunkwise, inputs, **CONVERGED), oracle(inputs), FLOAT64_BOUND)


class TestWithoutSolver:
    @pytest.mark.parametrize("cu_seqlens", [None, cu_seqlens_of([0, 1, 30, 0, 19])])
    def test_is_gated_linear_attention(self, cu_seqlens):
        inputs = make_inputs("mixed", 2 if cu_seqlens is None else 1, 50)
        state = make_state(2 if cu_seqlens is None else 5, 2, 16, 12)
        options = {"cu_seqlens": cu_seqlens}
        actual = evaluate(chunkwise, inputs, state, max_steps=0, chunk_size=16, **options)
        assert_close(actual, oracle(inputs, state, solve=False, **options), FLOAT64_BOUND)

    def test_does_not_read_lambda(self):
        inputs = make_inputs("mixed", length=20)
        actual = evaluate(chunkwise, inputs, max_steps=0)
        other = evaluate(chunkwise, inputs._replace(lam=1e6 * inputs.lam), max_steps=0)
        assert_close(actual, other, 0.0)
        assert not actual["d_lam"].any()

    def test_has_no_backward_solve(self):
        inputs = make_inputs("mixed", length=20)
        expected = evaluate(chunkwise, inputs, max_steps=0)
        assert_close(evaluate(chunkwise, inputs, max_steps=0, backward_max_steps=5), expected, 0.0)

    def test_statistics_are_zero(self):
        stats = mesa_attention(*make_inputs("normal", length=5), max_steps=0, output_stats=True).stats
        assert not stats.steps.any()


class TestSolverInPlace:
    """The solver as the chunkwise form drives it: its products are those of the recurrence."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
    def test_every_token_meets_the_tolerance(self, family, tolerance):
        inputs = make_inputs(family, length=60)
        x, steps, residual = solution(inputs, 64, tolerance)
        true = true_residual(inputs, x)
        assert (true <= tolerance / 2 * (1 + 1e-6)).all()
        assert torch.allclose(residual, true, rtol=1e-4, atol=1e-12)
        assert steps.min() >= 1
        assert steps.max() < 64

    def test_float32_meets_the_tolerance(self):
        inputs = make_inputs("scream", length=100, dtype=torch.float32)
        x, _, _ = solution(inputs, 64, 1e-4)
        # The recurrence for the residual drifts from the true one by the rounding of each step's product, which is
        # relative to the largest eigenvalue while the solution grows with the inverse of the smallest.
        condition = 1 + inputs.beta.sum(1).max() / inputs.lam.min()
        drift = 8 * torch.finfo(torch.float32).eps * condition
        assert (true_residual(inputs, x) <= 1e-4 + drift).all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_error_of_the_output_is_within_the_tolerance(self, family):
        inputs = make_inputs(family, 1, 200, 2, 64, 64)
        o = mesa_attention(*inputs, max_steps=100, tolerance=1e-3).o
        expected = mesa_reference(*inputs)[0]
        assert (o - expected).norm() <= 1e-3 * expected.norm()

    def test_tolerance_governs_the_error_of_the_output(self):
        inputs = make_inputs("power", length=60)
        expected = mesa_reference(*inputs)[0]
        outputs = [mesa_attention(*inputs, max_steps=64, tolerance=t).o for t in (1e-2, 1e-4, 1e-6)]
        rough, fine, finest = (relative_error(o, expected) for o in outputs)
        assert rough > 10 * fine > 100 * finest

    def test_the_backward_solve_has_its_own_limits(self):
        inputs = make_inputs("power", length=60)
        expected = evaluate(chunkwise, inputs, **CONVERGED)
        rough = evaluate(chunkwise, inputs, **CONVERGED, backward_max_steps=1)
        assert_close({"o": rough["o"]}, {"o": expected["o"]}, 0.0)
        assert relative_error(rough["d_q"], expected["d_q"]) > 1e-2
        rough = evaluate(chunkwise, inputs, **CONVERGED, backward_tolerance=1e-1)
        assert relative_error(rough["d_q"], expected["d_q"]) > 1e-3


class TestMemory:
    """States exist only between chunks: no tensor has the size of one state a token."""

    LENGTH, SIZE = 1024, 64

    def largest_allocation(self, chunk_size: int) -> int:
        """Bytes of the largest tensor that a forward and a backward pass in float32 allocate."""
        inputs = make_inputs("normal", 1, self.LENGTH, 1, self.SIZE, self.SIZE, dtype=torch.float32)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            mesa_attention(*leaves, max_steps=3, chunk_size=chunk_size).o.sum().backward()
        return max(event.self_cpu_memory_usage for event in recorded.events())

    def test_largest_tensor(self):
        a_state_per_token = 4 * self.LENGTH * self.SIZE**2
        both_states_per_chunk = 4 * self.LENGTH // 64 * 2 * self.SIZE**2
        assert self.largest_allocation(64) <= both_states_per_chunk == a_state_per_token / 32
        # What the measurement shows where every token is a chunk.
        assert self.largest_allocation(1) >= a_state_per_token

    def test_saved_for_the_backward_pass(self):
        """The inputs, the solutions x, and nothing of the size of a state."""
        inputs = make_inputs("normal", 1, self.LENGTH, 1, self.SIZE, self.SIZE, dtype=torch.float32)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        saved = {}

        def pack(tensor):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mesa_attention(*leaves, max_steps=3, normalize_qk=False)
        assert sum(saved.values()) <= sum(tensor.numel() for tensor in leaves) + self.LENGTH * self.SIZE
