# SPDX-License-Identifier: Apache-2.0
"""The public operators: dtypes, autocast, compilation, statistics, and what they say about bad arguments."""

from itertools import pairwise

import pytest
import torch
from mesa_inputs import (
    CONVERGED,
    FAMILIES,
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
    token_by_token,
)

from modeling_mesanet.mesa import (
    MesaState,
    check_solver,
    mesa_attention,
    mesa_chunkwise,
    mesa_decode,
    mesa_reference,
    mesa_states,
    mesa_step,
    select_backend,
)

HALF = [torch.bfloat16, torch.float16]


class TestDtypes:
    @pytest.mark.parametrize("dtype", HALF)
    def test_half_inputs_are_computed_in_float32(self, dtype):
        """Only the output and the gradients are rounded to 16 bits: what happens between is bit for bit float32's."""
        inputs = make_inputs("scream", length=40, dtype=dtype)
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        actual = evaluate(chunkwise, inputs, state)
        assert actual["o"].dtype == dtype
        assert actual["final_h"].dtype == actual["final_g"].dtype == torch.float32
        expected_o, expected_state = chunkwise(*inputs.to(torch.float32), initial_state=state)
        assert torch.equal(actual["o"], expected_o.to(dtype))
        assert torch.equal(actual["final_h"], expected_state.h)
        assert torch.equal(actual["final_g"], expected_state.g)
        for name, tensor in zip(Inputs._fields, inputs, strict=True):
            assert actual[f"d_{name}"].dtype == tensor.dtype
        assert_close(actual, oracle(inputs, state), 2 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("dtype", HALF)
    def test_half_inputs_of_a_step(self, dtype):
        inputs = make_inputs("scream", length=10, dtype=dtype)
        o, state = token_by_token(inputs)
        expected_o, expected_state = token_by_token(inputs.to(torch.float32))
        assert o.dtype == dtype
        assert state.h.dtype == torch.float32
        assert torch.equal(o, expected_o.to(dtype))
        assert torch.equal(state.h, expected_state.h)

    def test_gates_in_float32_beside_half_projections(self):
        """What a model passes: q, k, v in 16 bits, gates and lambda in float32. No gate is rounded on the way."""
        inputs = make_inputs("mixed", length=20, dtype=torch.float32)
        half = Inputs(*(tensor.bfloat16() for tensor in inputs[:3]), *inputs[3:])
        o, _ = chunkwise(*half)
        assert o.dtype == torch.bfloat16
        widened = Inputs(*(tensor.float() for tensor in half))
        assert torch.equal(o, chunkwise(*widened)[0].bfloat16())

    def test_float64_stays_float64(self):
        inputs = make_inputs("normal", length=10)
        output = mesa_attention(*inputs, output_final_state=True, output_stats=True)
        assert output.o.dtype == output.final_state.h.dtype == output.stats.residual.dtype == torch.float64

    def test_an_initial_state_of_another_precision_is_converted(self):
        inputs, state = make_inputs("normal", length=10, dtype=torch.float32), make_state(2, 2, 16, 12)
        o, final = chunkwise(*inputs, initial_state=state)
        assert final.h.dtype == torch.float32
        assert torch.equal(o, chunkwise(*inputs, initial_state=(state.h.float(), state.g.float()))[0])


class TestAutocast:
    def test_changes_no_bit(self):
        inputs = make_inputs("scream", length=40, dtype=torch.float32)
        state = make_state(2, 2, 16, 12, dtype=torch.float32)
        expected = evaluate(chunkwise, inputs, state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = evaluate(chunkwise, inputs, state)  # the backward pass under autocast as well
        assert_close(actual, expected, 0.0)

    def test_changes_no_bit_of_a_step(self):
        inputs = make_inputs("scream", length=10, dtype=torch.float32)
        expected_o, expected_state = token_by_token(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o, state = token_by_token(inputs)
        assert torch.equal(o, expected_o)
        assert torch.equal(state.h, expected_state.h)


@pytest.fixture(params=["high", "medium"])
def matmul_precision(request):
    """torch's promise of less precision for speed; "medium" means bfloat16 products on CPUs that have them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


class TestMatmulPrecision:
    def test_changes_nothing(self, matmul_precision):
        inputs = make_inputs("scream", 1, 100, 1, 64, 64, dtype=torch.float32)
        assert_close(evaluate(chunkwise, inputs), oracle(inputs), float32_bound("scream"))
        assert relative_error(token_by_token(inputs)[0], mesa_reference(*inputs)[0]) < float32_bound("scream")
        assert torch.get_float32_matmul_precision() == matmul_precision


class TestStates:
    """`mesa_states`: the final states by themselves."""

    @pytest.mark.parametrize("has_state", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_against_the_oracle(self, family, has_state):
        for dtype, bound in ((torch.float64, FLOAT64_BOUND), (torch.float32, float32_bound(family))):
            inputs = make_inputs(family, dtype=dtype)
            state = make_state(2, 2, 16, 12, dtype=dtype) if has_state else None
            wide = None if state is None else (state.h.double(), state.g.double())
            expected = MesaState(*mesa_reference(*inputs.to(torch.float64), initial_state=wide)[1])
            found = mesa_states(*inputs[1:5], initial_state=state)
            assert found.h.dtype == found.g.dtype == dtype
            assert relative_error(found.h, expected.h) <= bound
            assert relative_error(found.g, expected.g) <= bound

    def test_keys_as_they_are(self):
        inputs = make_inputs("normal")
        _, expected, _ = mesa_attention(*inputs, max_steps=0, normalize_qk=False, output_final_state=True)
        found = mesa_states(*inputs[1:5], normalize_k=False)
        assert all(relative_error(*pair) <= FLOAT64_BOUND for pair in zip(found, expected, strict=True))

    def test_no_tokens_leave_the_state_as_it_was(self):
        inputs, state = make_inputs("normal").tokens(0, 0), make_state(2, 2, 16, 12)
        found = mesa_states(*inputs[1:5], initial_state=state)
        assert all(torch.equal(*pair) for pair in zip(found, state, strict=True))

    def test_without_gradients_and_with_its_arguments_left_alone(self):
        inputs, state = make_inputs("mixed"), make_state(2, 2, 16, 12)
        given = [tensor.requires_grad_() for tensor in inputs[1:5]]
        before = [tensor.detach().clone() for tensor in (*given, *state)]
        found = mesa_states(*given, initial_state=state)
        assert not any(tensor.requires_grad for tensor in found)
        assert all(torch.equal(*pair) for pair in zip((*given, *state), before, strict=True))

    def test_bad_arguments(self):
        k, v, log_gamma, beta = make_inputs("normal")[1:5]
        with pytest.raises(ValueError, match=r"k has shape .* it must be \[batch, time, heads, key size\]"):
            mesa_states(k[0], v, log_gamma, beta)
        with pytest.raises(ValueError, match=r"v has shape .*; with k of shape"):
            mesa_states(k, v[:, 1:], log_gamma, beta)
        with pytest.raises(ValueError, match=r"the state G has shape"):
            mesa_states(k, v, log_gamma, beta, initial_state=make_state(2, 2, 16, 11))


class TestArguments:
    def test_inputs_and_initial_state_are_left_alone(self):
        inputs, state = make_inputs("mixed", length=40), make_state(2, 2, 16, 12)
        before = [tensor.clone() for tensor in (*inputs, *state)]
        evaluate(chunkwise, inputs, state, chunk_size=16)
        chunkwise(*inputs, initial_state=state, chunk_size=16)
        assert all(torch.equal(old, new) for old, new in zip(before, (*inputs, *state), strict=True))

    @pytest.mark.parametrize("max_steps", [0, 30])
    def test_strides_do_not_matter(self, max_steps):
        inputs, state = make_inputs("mixed", length=40), make_state(2, 2, 16, 12)

        def strided(tensor):  # heads before time
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)

        other = Inputs(*map(strided, inputs[:5]), inputs.lam.T.contiguous().T)
        assert not other.q.is_contiguous()
        expected = evaluate(chunkwise, inputs, state, max_steps=max_steps)
        other_state = MesaState(state.h.mT.contiguous().mT, state.g.mT.contiguous().mT)
        assert_close(evaluate(chunkwise, other, other_state, max_steps=max_steps), expected, 1e-13)

    def test_expanded_inputs(self):
        """One lambda for all heads, one row of keys for all heads."""
        inputs = make_inputs("mixed", length=20)
        shared = inputs._replace(lam=inputs.lam[:1].expand(2, 16), k=inputs.k[:, :, :1].expand(-1, -1, 2, -1))
        dense = Inputs(*(tensor.contiguous() for tensor in shared))
        assert torch.equal(chunkwise(*shared)[0], chunkwise(*dense)[0])

    def test_only_what_was_asked_for_is_returned(self):
        inputs = make_inputs("normal", length=5)
        output = mesa_attention(*inputs)
        assert output.final_state is None
        assert output.stats is None
        output = mesa_attention(*inputs, output_final_state=True, output_stats=True)
        assert output.final_state.h.shape == (2, 2, 16, 16)
        assert output.final_state.g.shape == (2, 2, 16, 12)
        assert output.stats.steps.shape == output.stats.residual.shape == (2, 5, 2)
        assert output.stats.steps.dtype == torch.int32

    def test_statistics_carry_no_gradient(self):
        inputs = Inputs(*(tensor.requires_grad_() for tensor in make_inputs("normal", length=5)))
        output = mesa_attention(*inputs, output_stats=True)
        assert output.o.requires_grad
        assert not output.stats.residual.requires_grad

    def test_statistics_of_packed_sequences_belong_to_their_tokens(self):
        inputs, bounds = make_inputs("cluster4", 1, 50), cu_seqlens_of([0, 1, 30, 19])
        options = {"tolerance": 1e-3, "chunk_size": 16, "output_stats": True}
        stats = mesa_attention(*inputs, cu_seqlens=bounds, **options).stats
        for start, end in pairwise(bounds.tolist()[1:]):
            own = mesa_attention(*inputs.tokens(start, end), **options).stats
            assert torch.equal(stats.steps[:, start:end], own.steps)

    def test_bounds_are_read_once_unless_they_change(self, monkeypatch):
        inputs, bounds, reads = make_inputs("normal", 1, 8), cu_seqlens_of([3, 5]), []
        read = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor) or read(tensor))
        for _ in range(3):
            mesa_attention(*inputs, cu_seqlens=bounds, backend="torch")
        # The computation in torch reads them each time, unlike the kernels.
        assert sum(tensor is bounds for tensor in reads) == 1 + 3
        with pytest.raises(ValueError, match="cu_seqlens runs from 0 to 8"):
            mesa_attention(*inputs.tokens(0, 7), cu_seqlens=bounds)
        bounds[1] = 9
        with pytest.raises(ValueError, match="must rise"):
            mesa_attention(*inputs, cu_seqlens=bounds)
        with torch.inference_mode():
            unversioned = cu_seqlens_of([3, 5])
            mesa_attention(*inputs, cu_seqlens=unversioned)
            unversioned[1] = 9
            with pytest.raises(ValueError, match="must rise"):
                mesa_attention(*inputs, cu_seqlens=unversioned)

    def test_a_batch_row_with_nan_leaves_the_others_alone(self):
        inputs = make_inputs("normal", batch=3, length=40)
        expected = mesa_attention(*inputs, chunk_size=16).o
        for tensor in inputs[:5]:
            tensor[1, 7] = torch.nan
        o = mesa_attention(*inputs, chunk_size=16).o
        assert torch.equal(o[[0, 2]], expected[[0, 2]])
        assert o[1, 7:].isnan().all()

    def test_a_query_with_nan_stays_in_its_token(self):
        inputs = make_inputs("normal", length=40)
        expected = mesa_attention(*inputs, chunk_size=16).o
        inputs.q[1, 7, 0] = torch.nan
        o = mesa_attention(*inputs, chunk_size=16).o
        assert o[1, 7, 0].isnan().all()
        o[1, 7, 0] = expected[1, 7, 0]
        assert torch.equal(o, expected)

    def test_in_inference_mode(self):
        inputs = make_inputs("normal", length=20)
        expected = mesa_attention(*inputs).o
        with torch.inference_mode():
            assert torch.equal(mesa_attention(*inputs).o, expected)
            assert relative_error(token_by_token(inputs)[0], expected) < 1e-12

    def test_backend_has_a_reason(self):
        name, reason = select_backend("cpu")
        assert name == "torch"
        assert reason


class TestGradients:
    @pytest.mark.parametrize("cu_seqlens", [None, cu_seqlens_of([2, 0, 3])])
    @pytest.mark.parametrize("max_steps", [0, 60])
    def test_are_the_numerical_ones(self, cu_seqlens, max_steps):
        inputs = make_inputs("mixed", 1, 5, 2, 3, 2)
        # At gamma = 0 the derivative with respect to log(gamma) has no finite difference.
        inputs = inputs._replace(log_gamma=inputs.log_gamma.clamp(min=-2))
        state = make_state(1 if cu_seqlens is None else 3, 2, 3, 2)

        def flat(q, k, v, log_gamma, beta, lam, h, g):
            o, final = chunkwise(
                *(q, k, v, log_gamma, beta, lam),
                initial_state=((h + h.mT) / 2, g),  # the solver relies on a symmetric state
                cu_seqlens=cu_seqlens,
                max_steps=max_steps,
                chunk_size=2,
            )
            return o, *final

        assert torch.autograd.gradcheck(flat, [tensor.requires_grad_() for tensor in (*inputs, *state)])

    def test_second_derivatives_are_refused_by_name(self):
        inputs = Inputs(*(tensor.requires_grad_() for tensor in make_inputs("normal", length=5)))
        (grad,) = torch.autograd.grad(mesa_attention(*inputs).o.sum(), inputs.q, create_graph=True)
        with pytest.raises(RuntimeError, match="chunkwise_backward"):
            grad.square().sum().backward()

    def test_only_some_inputs_require_gradients(self):
        inputs = make_inputs("mixed", length=20)
        expected = evaluate(chunkwise, inputs)["d_k"]
        inputs.k.requires_grad_()
        source = torch.Generator().manual_seed(2)
        o, (h, g) = chunkwise(*inputs)
        weights = [torch.randn(t.shape, generator=source, dtype=t.dtype) for t in (o, h, g)]
        (grad,) = torch.autograd.grad([o, h, g], [inputs.k], weights)
        assert torch.equal(grad, expected)

    def test_checkpointing_recomputes_the_same(self):
        inputs = make_inputs("mixed", length=20)

        def checkpointed(*tensors, **options):
            return torch.utils.checkpoint.checkpoint(chunkwise, *tensors, use_reentrant=False, **options)

        assert_close(evaluate(checkpointed, inputs), evaluate(chunkwise, inputs), 0.0)


class TestTorchOperators:
    """`torch.library.opcheck`: schema, fake tensors, autograd registration, ahead-of-time tracing."""

    def arguments(self, packed: bool = False, with_state: bool = True, strided: bool = False):
        inputs = make_inputs("mixed", 1 if packed else 2, 7, 2, 4, 3)
        if strided:
            inputs = Inputs(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:5]), inputs.lam)
        state = make_state(3 if packed else 2, 2, 4, 3) if with_state else (None, None)
        return inputs, state, cu_seqlens_of([2, 0, 5]) if packed else None

    @pytest.mark.parametrize("case", [{}, {"packed": True}, {"with_state": False}, {"strided": True}], ids=str)
    @pytest.mark.parametrize("max_steps", [0, 5])
    def test_chunkwise(self, case, max_steps):
        inputs, state, bounds = self.arguments(**case)
        leaves = [None if tensor is None else tensor.requires_grad_() for tensor in (*inputs, *state)]
        torch.library.opcheck(mesa_chunkwise.chunkwise, (*leaves, bounds, max_steps, 1e-3, max_steps, None, 4))

    @pytest.mark.parametrize("case", [{}, {"packed": True}, {"with_state": False}, {"strided": True}], ids=str)
    @pytest.mark.parametrize("max_steps", [0, 5])
    def test_chunkwise_backward(self, case, max_steps):
        inputs, state, bounds = self.arguments(**case)
        grads = (torch.ones_like(inputs.v), None, None)
        x = inputs.q
        torch.library.opcheck(
            mesa_chunkwise.chunkwise_backward, (*grads, x, *inputs[1:], *state, bounds, max_steps, 1e-3, 4)
        )

    @pytest.mark.parametrize("max_steps", [0, 5])
    def test_decode_step(self, max_steps):
        *token, lam = make_inputs("mixed", 2, 1, 2, 4, 3)
        arguments = (*(tensor.squeeze(1) for tensor in token), lam, *make_state(2, 2, 4, 3), max_steps, 1e-3)
        torch.library.opcheck(mesa_decode.decode_step_op, arguments)

    def test_outputs_of_size_one_do_not_share_memory(self):
        output = mesa_attention(*make_inputs("normal", 1, 3, 1, 1, 1), output_final_state=True)
        assert output.final_state.h.untyped_storage().data_ptr() != output.final_state.g.untyped_storage().data_ptr()


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """Without a break in the graph, and the same to the bit (`aot_eager` traces the backward pass as well)."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("lengths", [None, [0, 1, 25, 14]])
    def test_attention_forward_and_backward(self, backend, lengths):
        options = {"chunk_size": 16}
        if lengths is not None:
            options["cu_seqlens"] = cu_seqlens_of(lengths)
        inputs = make_inputs("mixed", 2 if lengths is None else 1, 40)
        state = make_state(2 if lengths is None else 4, 2, 16, 12)

        def layer(*tensors, **options):
            o, state = chunkwise(*tensors, **options)
            return torch.tanh(o), state

        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert_close(evaluate(compiled, inputs, state, **options), evaluate(layer, inputs, state, **options), 1e-14)

    def test_strided_inputs(self):
        """The traced strides are the real ones: a view of the output compiles only where they are."""
        inputs = make_inputs("mixed", length=20)
        inputs = Inputs(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[:5]), inputs.lam)

        def layer(*tensors, **options):
            output = mesa_attention(*tensors, output_final_state=True, **options)
            return output.o.view(2, 20, -1), output.final_state

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(evaluate(compiled, inputs), evaluate(layer, inputs), 1e-14)

    def test_other_lengths(self):
        compiled = torch.compile(chunkwise, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (20, 33, 64, 1):
            inputs = make_inputs("mixed", length=length)
            assert relative_error(compiled(*inputs)[0], chunkwise(*inputs)[0]) < 1e-14

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_step_updates_its_state_in_place(self, backend):
        inputs, state = make_inputs("mixed", length=4), make_state(2, 2, 16, 12)
        expected_o, expected_state = token_by_token(inputs, state, max_steps=30, tolerance=1e-4)

        def decode(inputs, state):
            return mesa_step(*inputs, state, max_steps=30, tolerance=1e-4).o.relu()

        compiled = torch.compile(decode, fullgraph=True, backend=backend)
        addresses = [tensor.data_ptr() for tensor in state]
        o = torch.cat([compiled(inputs.tokens(t, t + 1), state) for t in range(4)], dim=1)
        assert [tensor.data_ptr() for tensor in state] == addresses
        assert torch.equal(o, expected_o.relu())
        assert torch.equal(state.h, expected_state.h)
        assert torch.equal(state.g, expected_state.g)

    def test_step_with_strided_inputs(self):
        inputs, state = make_inputs("mixed", length=1), make_state(2, 2, 16, 12)
        expected = token_by_token(inputs, state)[0]
        inputs = Inputs(*(t.transpose(0, 2).contiguous().transpose(0, 2) for t in inputs[:5]), inputs.lam)

        def decode(inputs, state):
            return mesa_step(*inputs, state).o.view(2, 1, -1)

        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(inputs, state), expected) < 1e-14


def case(message: str, **arguments):
    """A call with some arguments replaced, and what the error has to say."""
    return pytest.param(arguments, message, id=message)


BAD_TENSORS = [
    case(r"q has shape \(2, 1, 2\)", q=torch.zeros(2, 1, 2)),
    case(r"k has shape \(2, 1, 2, 5\).*\(2, 1, 2, 4\)", k=torch.zeros(2, 1, 2, 5)),
    case(r"v has shape \(2, 4, 2, 6\)", v=torch.zeros(2, 4, 2, 6)),
    case(r"v has shape \(1, 2, 6\)", v=torch.zeros(1, 2, 6)),
    case(r"log_gamma has shape \(2, 1, 2, 1\)", log_gamma=torch.zeros(2, 1, 2, 1)),
    case(r"beta has shape \(2, 1\)", beta=torch.zeros(2, 1)),
    case(r"lam has shape \(4,\)", lam=torch.ones(4)),
    case("v is on meta but q is on cpu", v=torch.zeros(2, 1, 2, 6, device="meta")),
    case("q is torch.int64", q=torch.zeros(2, 1, 2, 4, dtype=torch.int64)),
    case("v is torch.int32", v=torch.zeros(2, 1, 2, 6, dtype=torch.int32)),
]
BAD_SOLVER = [
    case("max_steps is -1", max_steps=-1),
    case("max_steps is 2.5", max_steps=2.5),
    case("max_steps is nan", max_steps=float("nan")),
    case("max_steps is inf", max_steps=float("inf")),
    case("max_steps is None", max_steps=None),
    case("max_steps is 'many'", max_steps="many"),
    case("max_steps is True", max_steps=True),
    case("tolerance is 0", tolerance=0),
    case("tolerance is 1.0", tolerance=1.0),
    case("tolerance is -0.1", tolerance=-0.1),
    case("tolerance is nan", tolerance=float("nan")),
    case("tolerance is '1e-4'", tolerance="1e-4"),
]
BAD_ATTENTION = [
    case("backward_max_steps is -1", backward_max_steps=-1),
    case("backward_max_steps is 0 while", backward_max_steps=0),
    case("backward_tolerance is 2", backward_tolerance=2),
    case("chunk_size is 0", chunk_size=0),
    case("chunk_size is 16.0", chunk_size=16.0),
    case("chunk_size is None", chunk_size=None),
    case("cu_seqlens was given with a batch of 2", cu_seqlens=torch.tensor([0, 1])),
    case("state is a Tensor", initial_state=torch.zeros(2, 2, 4, 4)),
    case("state H has shape", initial_state=(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 6))),
    case("state G has shape", initial_state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 6, 4))),
    case("state G is on meta", initial_state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 6, device="meta"))),
]
BAD_CU_SEQLENS = [
    case(r"cu_seqlens has shape \(1,\)", cu_seqlens=torch.tensor([0])),
    case(r"cu_seqlens has shape \(2, 2\)", cu_seqlens=torch.tensor([[0, 3], [3, 6]])),
    case("cu_seqlens has .* dtype torch.float32", cu_seqlens=torch.tensor([0.0, 6.0])),
    case("cu_seqlens runs from 1 to 6", cu_seqlens=torch.tensor([1, 6])),
    case("cu_seqlens runs from 0 to 5", cu_seqlens=torch.tensor([0, 5])),
    case("cu_seqlens runs from 0 to 7", cu_seqlens=torch.tensor([0, 7])),
    case("cu_seqlens .* must rise", cu_seqlens=torch.tensor([0, 4, 3, 6])),
    case(r"state H has shape \(1,", cu_seqlens=torch.tensor([0, 2, 6]), initial_state=make_state(1, 2, 4, 6)),
]
BAD_STATES = [
    case("state is None", state=None),
    case("state is a tuple", state=(torch.zeros(2, 2, 4, 4),)),
    case("state H has shape", state=(torch.zeros(2, 2, 4, 6), torch.zeros(2, 2, 4, 6))),
    case("state G has shape", state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4))),
    case("state G is on meta", state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 6, device="meta"))),
    case(
        "torch.float32 and torch.bfloat16",
        state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 6, dtype=torch.bfloat16)),
    ),
    case("state is torch.float64", state=make_state(2, 2, 4, 6)),
]


class TestBadArguments:
    """One sentence that names the argument and its value."""

    @pytest.mark.parametrize(("arguments", "message"), BAD_TENSORS + BAD_SOLVER + BAD_ATTENTION)
    def test_attention(self, arguments, message):
        inputs = make_inputs("normal", 2, 1, 2, 4, 6, dtype=torch.float32)._asdict()
        with pytest.raises(ValueError, match=message):
            mesa_attention(**inputs | arguments)

    @pytest.mark.parametrize(("arguments", "message"), BAD_CU_SEQLENS)
    def test_packed(self, arguments, message):
        inputs = make_inputs("normal", 1, 6, 2, 4, 6, dtype=torch.float32)
        with pytest.raises(ValueError, match=message):
            mesa_attention(*inputs, **arguments)

    @pytest.mark.parametrize(("arguments", "message"), BAD_TENSORS + BAD_SOLVER + BAD_STATES)
    def test_step_leaves_its_state_untouched(self, arguments, message):
        inputs = make_inputs("normal", 2, 1, 2, 4, 6, dtype=torch.float32)._asdict()
        state = make_state(2, 2, 4, 6, dtype=torch.float32)
        arguments = {"state": state} | arguments
        given = [tensor for tensor in arguments["state"] or () if tensor.device.type == "cpu"]
        before = [tensor.clone() for tensor in given]
        with pytest.raises(ValueError, match=message):
            mesa_step(**inputs | arguments)
        assert all(torch.equal(old, new) for old, new in zip(before, given, strict=True))

    @pytest.mark.parametrize("length", [0, 2])
    def test_step_takes_one_token(self, length):
        with pytest.raises(ValueError, match=f"q has {length} tokens"):
            mesa_step(*make_inputs("normal", length=length), make_state(2, 2, 16, 12))

    @pytest.mark.parametrize("given", [(3, None), (3.0, 1e-3), (0, None)])
    def test_good_limits_of_the_solver(self, given):
        found = check_solver(*given)
        assert found == given
        assert type(found[0]) is int


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    @pytest.fixture
    def cuda_precision(self):
        """Restored by hand: torch answers for this attribute in a way that pytest's monkeypatch cannot undo."""
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        yield settings
        settings.fp32_precision = before

    @pytest.mark.parametrize("family", ["normal", "scream", "rank8"])
    @pytest.mark.parametrize("tf32", ["ieee", "tf32"])
    @pytest.mark.parametrize("size", [64, 48, 128])  # in one kernel, and step by step in torch
    def test_float32_against_the_oracle_whatever_the_tf32_setting(self, family, tf32, size, cuda_precision):
        cuda_precision.fp32_precision = tf32
        inputs = make_inputs(family, 2, 150, 2, size, size, dtype=torch.float32)
        expected = oracle(inputs)
        actual = evaluate(chunkwise, Inputs(*(tensor.cuda() for tensor in inputs)), max_steps=100)
        assert_close({name: tensor.cpu() for name, tensor in actual.items()}, expected, float32_bound(family))

    def test_step_against_the_oracle(self):
        inputs = make_inputs("scream", length=60, dtype=torch.float32)
        o, state = token_by_token(Inputs(*(tensor.cuda() for tensor in inputs)), **CONVERGED)
        expected, (h, _) = mesa_reference(*inputs)
        assert relative_error(o.cpu(), expected) <= float32_bound("scream")
        assert relative_error(state.h.cpu(), h) <= float32_bound("scream")

    def test_step_in_a_captured_graph(self):
        inputs = make_inputs("normal", length=2, dtype=torch.float32)
        expected, _ = token_by_token(inputs, max_steps=30, tolerance=1e-4)
        token = [tensor.cuda() for tensor in inputs.tokens(0, 1)]
        state = MesaState(torch.zeros(2, 2, 16, 16).cuda(), torch.zeros(2, 2, 16, 12).cuda())
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            mesa_step(*token, state, max_steps=30, tolerance=1e-4)  # libraries load outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = mesa_step(*token, state, max_steps=30, tolerance=1e-4).o
        for tensor in state:
            tensor.zero_()
        for t in range(2):
            for static, tensor in zip(token, inputs.tokens(t, t + 1), strict=True):
                static.copy_(tensor)
            graph.replay()
            assert relative_error(o.cpu(), expected[:, t : t + 1]) < 1e-5
