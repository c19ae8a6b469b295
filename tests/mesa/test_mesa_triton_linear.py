# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for the projections of a decoding step, alone and in a model, against torch.

Interpreted on a CPU, compiled on a GPU: the same tests, but that a CPU runs them in a process of its own, because
Triton reads the variable that says so when a kernel is defined.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mesa_inputs import relative_error
from small_models import states
from transformers.cache_utils import StaticCache

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, modeling_mesanet
from modeling_mesanet.mesa import mesa_dispatch, mesa_layers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED or torch.cuda.is_available():
    from modeling_mesanet.mesa import mesa_triton_linear
    from modeling_mesanet.mesa.mesa_triton_linear import (
        REGISTERS,
        TABLE,
        TENSOR,
        launch_add_linear,
        launch_norm_gated_linears,
        launch_norm_linears,
    )

runs_the_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; test_interpreted runs these on a CPU"
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# In units of the last place: one for a value at a tie that another order of the sums rounds otherwise. The interpreter
# cuts bfloat16 off where a GPU rounds, which also adds up over the rounded inputs of a product.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 12 if INTERPRETED else 1, torch.float16: 1}

# Rows, input size, output sizes: odd ones, beyond a step of the kernels and below one.
# The last two with torch's products, with a row and with several rows of the norm a program.
SIZES = [(1, 300, (33, 16, 3, 3)), (3, 72, (20, 5)), (16, 31, (7, 1)), (17, 72, (20, 19, 5)), (514, 300, (20, 19, 5))]


@pytest.mark.skipif(INTERPRETED, reason="these are the interpreted tests")
def test_interpreted():
    pytest.importorskip("triton", reason="triton is not installed; the kernels cannot be interpreted")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.fixture(params=["tensor cores", "registers"])
def blocks(request, monkeypatch):
    """Both ways to compute with weights of 16 bits."""
    chosen = TENSOR if request.param == "tensor cores" else REGISTERS
    table = {key: chosen if key[1] == 2 else entry for key, entry in TABLE.items()}
    monkeypatch.setattr(mesa_triton_linear, "TABLE", table)


def random(source: torch.Generator, *shape: int, dtype=torch.float32, scale=1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=source) * scale).to(DEVICE, dtype)


def norm(x, weight, eps=1e-6):
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def exactly(x, weight, dtype=None):
    """A projection in float64, rounded once."""
    return F.linear(x.double(), weight.double()).to(dtype or x.dtype)


def assert_rounded_alike(actual, expected, dtype=None):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    dtype = dtype or actual.dtype
    # Relative to the largest entries: what cancels in a sum has the rounding of what was added.
    scale = expected.double().abs().max()
    allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    assert ((actual.double() - expected.double()).abs() <= allowed * scale).all()
    assert relative_error(actual.double(), expected.double()) <= allowed / 2


@pytest.mark.gpu
@runs_the_kernels
class TestKernels:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("batch", "size", "outputs"), SIZES)
    def test_norm_linears(self, generator, blocks, dtype, batch, size, outputs):
        x, weight = random(generator, batch, 1, size, dtype=dtype), random(generator, size, dtype=dtype)
        weights = [random(generator, output, size, dtype=dtype, scale=size**-0.5) for output in outputs]
        rounded = len(outputs) - 2
        found = launch_norm_linears(x, weight, 1e-6, weights, rounded)
        normed = norm(x, weight)
        assert len(found) == len(outputs)
        for i, (actual, projection) in enumerate(zip(found, weights, strict=True)):
            expected = exactly(normed, projection, dtype if i < rounded else torch.float32)
            # Sums of rounded inputs, of which a few round otherwise.
            assert_rounded_alike(actual, expected, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("batch", "size", "output"), [(1, 300, 21), (16, 31, 3), (17, 31, 3)])
    def test_add_linear(self, generator, blocks, dtype, batch, size, output):
        x, weight = random(generator, batch, size, dtype=dtype), random(generator, output, size, dtype=dtype)
        residual = random(generator, batch, output, dtype=dtype, scale=size**0.5)
        assert_rounded_alike(launch_add_linear(x, weight, residual), residual + exactly(x, weight))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("batch", "size", "output"), [(1, 300, 21), (16, 31, 3), (17, 31, 3)])
    def test_norm_gated_linears(self, generator, blocks, dtype, batch, size, output):
        x, weight = random(generator, batch, 1, size, dtype=dtype), random(generator, size)
        gate, up = (random(generator, output, size, dtype=dtype, scale=size**-0.5) for _ in range(2))
        normed = norm(x, weight)
        expected = F.silu(exactly(normed, gate)) * exactly(normed, up)
        actual = launch_norm_gated_linears(x, weight, 1e-6, gate, up)
        # Three roundings more, of which torch has the same.
        assert_rounded_alike(actual / 4, expected / 4)

    @pytest.mark.parametrize("batch", [3, 17, 514])
    def test_rows_do_not_see_each_other(self, generator, blocks, batch):
        x, weight = random(generator, batch, 40, dtype=torch.float16), random(generator, 40)
        projection, other = (random(generator, 20, 40, dtype=torch.float16) for _ in range(2))
        spoilt = x.clone()
        spoilt[1] = torch.nan
        for compute in (
            lambda x: launch_norm_linears(x, weight, 1e-6, [projection], 1)[0],
            lambda x: launch_norm_linears(x, weight, 1e-6, [projection], 0)[0],
            lambda x: launch_add_linear(x, projection, x[:, :20]),
            lambda x: launch_norm_gated_linears(x, weight, 1e-6, projection, other),
        ):
            expected, actual = compute(x), compute(spoilt)
            assert torch.equal(actual[[0, *range(2, batch)]], expected[[0, *range(2, batch)]])
            assert actual[1].isnan().all()

    @pytest.mark.parametrize("batch", [17, 514])
    @pytest.mark.parametrize("outputs", [(5,), (5, 3, 3)])
    def test_in_place(self, generator, batch, outputs):
        """Of many rows: the residual is copied on the way, and the product added to the copy."""
        x, weight = random(generator, 2, batch // 2 + 1, 40), random(generator, 40)
        weights = [random(generator, output, 40) for output in outputs]
        copy = torch.full_like(x, torch.nan)
        found = launch_norm_linears(x, weight, 1e-6, weights, 1, copy=copy)
        assert torch.equal(copy, x)
        for ours, theirs in zip(found, launch_norm_linears(x, weight, 1e-6, weights, 1), strict=True):
            assert torch.equal(ours, theirs)
        wide, projection = random(generator, *x.shape[:2], 7), random(generator, 40, 7)
        expected = launch_add_linear(wide, projection, x)
        actual = launch_add_linear(wide, projection, copy, overwrite=True)
        assert actual.data_ptr() == copy.data_ptr()
        assert torch.equal(actual, expected)
        # A residual that no view makes rows of is not written to.
        transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(launch_add_linear(wide, projection, transposed, overwrite=True), expected)
        assert torch.equal(transposed, x)

    def test_zeros(self, generator, blocks):
        x, weight = torch.zeros(2, 40, dtype=torch.float16, device=DEVICE), random(generator, 40)
        projection = random(generator, 20, 40, dtype=torch.float16)
        (found,) = launch_norm_linears(x, weight, 1e-6, [projection], 1)
        assert torch.equal(found, torch.zeros_like(found))

    def test_any_strides(self, generator):
        wide, weight = random(generator, 2, 80), random(generator, 80)
        projection, residual = random(generator, 40, 9), random(generator, 9, 2)
        x, transposed = wide[:, ::2], projection.T
        expected = launch_add_linear(x.contiguous(), transposed.contiguous(), residual.T.contiguous())
        assert torch.equal(launch_add_linear(x, transposed, residual.T), expected)
        (expected,) = launch_norm_linears(x.contiguous(), weight[::2].contiguous(), 1e-6, [transposed.contiguous()], 1)
        assert torch.equal(launch_norm_linears(x, weight[::2], 1e-6, [transposed], 1)[0], expected)

    def test_refuses_what_it_would_read_beyond(self):
        x, weight, norm_weight = (torch.zeros(*shape, device=DEVICE) for shape in ((2, 8), (4, 8), (8,)))
        for arguments, message in (
            ((x[:0], weight, x), r"x has shape \(0, 8\); the kernels take at least one row"),
            ((x, weight[:, :7], x), r"a weight is torch.float32 of shape \(4, 7\); it must be torch.float32 of"),
            ((x, weight.half(), x), "a weight is torch.float16"),
            ((x, weight, x), r"residual is torch.float32 of shape \(2, 8\); it must be torch.float32 of \(2, 4\)"),
        ):
            with pytest.raises(ValueError, match=message):
                launch_add_linear(*arguments)
        with pytest.raises(ValueError, match=r"norm_weight has shape \(7,\); it must be \(8,\)"):
            launch_norm_linears(x, norm_weight[:7], 1e-6, [weight], 1)
        with pytest.raises(ValueError, match=r"gate_weight has shape \(4, 8\), up_weight \(3, 8\); they must agree"):
            launch_norm_gated_linears(x, norm_weight, 1e-6, weight, weight[:3])

    def test_operators(self, generator):
        x, weight = random(generator, 2, 1, 24, dtype=torch.bfloat16), random(generator, 24)
        first, second = (random(generator, 9, 24, dtype=torch.bfloat16) for _ in range(2))
        operators = torch.ops.modeling_mesanet
        for operator, arguments in (
            (operators.norm_linears.default, (x, weight, 1e-6, [first, second], 1)),
            (operators.add_linear.default, (x, first, x[..., :9])),
            (operators.norm_gated_linears.default, (x, weight, 1e-6, first, second)),
        ):
            torch.library.opcheck(operator, arguments)

    @compiled_only
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [2, 3, 8, 16])
    def test_a_row_alone_gives_the_same_bits(self, generator, blocks, dtype, batch):
        hidden, intermediate = 1536, 4608
        x, weight = random(generator, batch, hidden, dtype=dtype), random(generator, hidden)
        wide = random(generator, batch, intermediate, dtype=dtype)
        q, gate, up = (random(generator, size, hidden, dtype=dtype) for size in (hidden, intermediate, intermediate))
        down = random(generator, hidden, intermediate, dtype=dtype)

        def compute(x, wide):
            (projected,) = launch_norm_linears(x, weight, 1e-6, [q], 1)
            gated = launch_norm_gated_linears(x, weight, 1e-6, gate, up)
            return [projected, gated, launch_add_linear(wide, down, x)]

        whole = compute(x, wide)
        for row in range(batch):
            alone = compute(x[row : row + 1], wide[row : row + 1])
            assert all(torch.equal(ours[row], theirs[0]) for ours, theirs in zip(whole, alone, strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, compute(x, wide), strict=True))

    @compiled_only
    @pytest.mark.parametrize("ahead", [False, True])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_start_of_a_program(self, generator, monkeypatch, ahead, overlap):
        if overlap and torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("overlapping launches need compute capability 9.0")
        hidden, intermediate = 1536, 4608
        x, weight = random(generator, 2, hidden, dtype=torch.bfloat16), random(generator, hidden)
        gate, up, down = (
            random(generator, *shape, dtype=torch.bfloat16, scale=shape[1] ** -0.5)
            for shape in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        )

        def compute():
            rows = x
            for _ in range(20):
                rows = launch_add_linear(launch_norm_gated_linears(rows, weight, 1e-6, gate, up), down, rows)
            return rows

        expected = compute()
        table = {key: entry._replace(ahead=ahead, overlap=overlap) for key, entry in TABLE.items()}
        monkeypatch.setattr(mesa_triton_linear, "TABLE", table)
        assert torch.equal(compute(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = compute()
        for _ in range(3):
            graph.replay()
        assert torch.equal(actual, expected)


@pytest.fixture
def fused(monkeypatch):
    """Lets a CPU decode through the kernels, and counts their launches."""
    launches = []

    def watched(name, launch):
        def launched(*arguments, **options):
            launches.append(name)
            return launch(*arguments, **options)

        return launched

    for name, launch in mesa_triton_linear.LAUNCHES.items():
        monkeypatch.setitem(mesa_triton_linear.LAUNCHES, name, watched(name, launch))
    # The first use on a device tries the kernels out.
    problem_of_linears = mesa_dispatch.problem_of_linears

    def untold(*arguments):
        before = len(launches)
        problem = problem_of_linears(*arguments)
        del launches[before:]
        return problem

    monkeypatch.setattr(mesa_dispatch, "problem_of_linears", untold)
    if INTERPRETED:
        # Otherwise a CPU keeps to torch.
        from modeling_mesanet.mesa.mesa_triton_decode import triton_decode_layer  # noqa: F401  (registers the operator)

        monkeypatch.setattr(modeling_mesanet, "FUSED_DEVICES", ("cpu",))
        monkeypatch.setattr(modeling_mesanet, "decodes_layer", lambda *arguments: True)
        monkeypatch.setattr(mesa_layers, "use_fused_linears", lambda *arguments: True)
        # Few programs: it is their number that the interpreter takes its time for.
        few = mesa_triton_linear.Blocks(rows=64, slices=0, width=64, stages=1, warps=4)
        monkeypatch.setattr(mesa_triton_linear, "TABLE", dict.fromkeys(TABLE, few))
    return launches


OF_A_LAYER = ["norm_linears", "add_linear", "norm_gated_linears", "add_linear"]
# Few steps of the solver, which the interpreter takes its time for.
FEW = {"cg_max_steps": 3, "num_hidden_layers": 1}
VARIANTS = {
    "plain": {"num_hidden_layers": 2},
    "everything": {"use_output_gate": True, "conv_on_value": True, "hidden_size": 40, "intermediate_size": 56},
}


@torch.no_grad()
def decode(model, tokens, steps=2, **options):
    """Logits and hidden states of the last `steps` tokens, one at a time after the others."""
    cache = model(tokens[:, :-steps], use_cache=True, **options).past_key_values
    outputs = [
        model(tokens[:, t : t + 1], past_key_values=cache, output_hidden_states=True)
        for t in range(tokens.shape[1] - steps, tokens.shape[1])
    ]
    return outputs, cache


@pytest.mark.gpu
@runs_the_kernels
class TestModel:
    def without(self, model):
        """The same model, whose layers do not know that they might be fused."""
        model = copy.deepcopy(model)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda *arguments: None)
        return model

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_same_as_the_modules(self, tiny_model, generator, fused, variant):
        model = tiny_model(**FEW | VARIANTS[variant]).to(DEVICE)
        tokens = torch.randint(0, 97, (2, 7), generator=generator).to(DEVICE)
        expected, expected_cache = decode(self.without(model), tokens)
        assert fused == []
        actual, cache = decode(model, tokens)
        layers = model.config.num_hidden_layers
        assert fused == OF_A_LAYER * layers * 3
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_error(ours.logits, theirs.logits) < 1e-5
            assert len(ours.hidden_states) == layers + 1
            for ours_at, theirs_at in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                assert relative_error(ours_at, theirs_at) < 1e-5
        for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
            assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 7
            for slot in range(2):
                assert relative_error(ours.recurrent_states[slot], theirs.recurrent_states[slot]) < 1e-5

    def test_many_sequences(self, tiny_model, generator, fused):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (18, 3), generator=generator).to(DEVICE)
        expected, _ = decode(self.without(model), tokens, 1)
        actual, _ = decode(model, tokens, 1)
        assert fused == OF_A_LAYER * 2
        assert relative_error(actual[0].logits, expected[0].logits) < 1e-5

    def test_pads(self, tiny_model, generator, fused):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (3, 5), generator=generator).to(DEVICE)
        mask = torch.tensor([[1], [0], [1]], device=DEVICE)
        outputs = []
        for each in (self.without(model), model):
            _, cache = decode(each, tokens, 1)
            with torch.no_grad():
                outputs.append(each(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits[::2])
        assert fused == OF_A_LAYER * 3
        assert relative_error(outputs[1], outputs[0]) < 1e-5

    @pytest.mark.parametrize(("rows", "steps"), [((2, 4), 3), ((2, 10), 3), pytest.param((1, 514), 0, id="tiles")])
    def test_a_prompt(self, tiny_model, generator, fused, rows, steps):
        """Up to FEW_ROWS, above, and where a program of the norm takes several rows: the modules' results, and no
        tensor that others hold is written to.
        """
        model = tiny_model(**FEW | {"num_hidden_layers": 2, "cg_max_steps": steps}).to(DEVICE)
        tokens = torch.randint(0, 97, rows, generator=generator).to(DEVICE)
        options = {"use_cache": True, "output_hidden_states": True, "output_solver_stats": True}
        with torch.no_grad():
            expected = self.without(model)(tokens, **options)
            embeds = model.get_input_embeddings()(tokens)
            given, held = embeds.clone(), []
            handles = [
                layer.register_forward_hook(lambda _, inputs, output: held.append((output, copy.deepcopy(output))))
                for layer in model.model.layers
            ]
            actual = model(inputs_embeds=embeds, **options)
            for handle in handles:
                handle.remove()
        assert fused == OF_A_LAYER * 2
        assert torch.equal(embeds, given)
        assert all(torch.equal(output[0], when_made[0]) for output, when_made in held)
        assert relative_error(actual.logits, expected.logits) < 1e-5
        assert len(actual.hidden_states) == 3
        for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(ours, theirs) < 1e-5
        for ours, theirs in zip(actual.solver_stats, expected.solver_stats, strict=True):
            assert ours.steps.shape == (*rows, 2)
            assert torch.equal(ours.steps, theirs.steps)
        for ours, theirs in zip(states(actual.past_key_values), states(expected.past_key_values), strict=True):
            assert relative_error(ours, theirs) < 1e-5

    @pytest.mark.parametrize("length", [4, 12])
    def test_packed_sequences(self, tiny_model, generator, fused, length):
        """Which run on from row to row, so that the layer sees one row."""
        model = tiny_model(**FEW | VARIANTS["everything"]).to(DEVICE)
        tokens = torch.randint(0, 97, (2, length), generator=generator).to(DEVICE)
        bounds = torch.tensor([0, 3, 3, length + 2, 2 * length], device=DEVICE)
        options = {"cu_seq_lens_q": bounds, "output_hidden_states": True, "output_solver_stats": True}
        with torch.no_grad():
            expected = self.without(model)(tokens, **options)
            actual = model(tokens, **options)
        assert fused == OF_A_LAYER
        assert relative_error(actual.logits, expected.logits) < 1e-5
        assert [tuple(states.shape) for states in actual.hidden_states] == [(2, length, 40)] * 2
        for ours, theirs in zip(actual.solver_stats, expected.solver_stats, strict=True):
            assert ours.steps.shape == (2, length, 2)
            assert torch.equal(ours.steps, theirs.steps)

    @pytest.mark.parametrize("pieces", [(3, 1, 2), (18,)])
    def test_tokens_taken_back(self, tiny_model, generator, fused, pieces):
        model = tiny_model(**FEW | VARIANTS["everything"]).to(DEVICE)
        prompt = torch.randint(0, 97, (1, 5), generator=generator).to(DEVICE)
        drafts = torch.randint(0, 97, (1, sum(pieces)), generator=generator).to(DEVICE)
        with torch.no_grad():
            wanted = self.without(model)(torch.cat([prompt, drafts[:, :-2]], 1), use_cache=True).past_key_values
            assert fused == []
            cache = model(prompt, use_cache=True).past_key_values
            for layer in cache.layers:
                layer.activate_past_recording()
            for piece in drafts.split(pieces, dim=1):
                model(piece, past_key_values=cache)
            cache.crop(-2)
        assert fused == OF_A_LAYER * (1 + len(pieces))
        for ours, theirs in zip(cache.layers, wanted.layers, strict=True):
            assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 3 + sum(pieces)
        for ours, theirs in zip(states(cache), states(wanted), strict=True):
            assert relative_error(ours, theirs) < 1e-5

    def test_drafts_and_several_sequences_in_generate(self, tiny_model, generator, fused):
        model = tiny_model(**FEW | {"num_hidden_layers": 2, "eos_token_id": None, "pad_token_id": 0}).to(DEVICE)
        tokens = torch.randint(1, 97, (1, 5), generator=generator).to(DEVICE)
        for options in ({"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}, {"num_beams": 2}):
            options |= {"max_new_tokens": 4, "do_sample": False}
            expected = self.without(model).generate(tokens, **options)
            assert fused == []
            assert torch.equal(model.generate(tokens, **options), expected)
            assert fused[:4] == OF_A_LAYER
            del fused[:]

    def test_not_where_something_else_is_asked(self, tiny_model, generator, fused):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (1, 4), generator=generator).to(DEVICE)
        _, cache = decode(model, tokens, 1)
        del fused[:]
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            model(tokens[:, :1], past_key_values=cache)
        model(tokens[:, :2])  # with gradients
        assert fused == []
        with torch.no_grad():
            model(tokens[:, :1], past_key_values=cache)
        assert fused == OF_A_LAYER

    def test_notices_what_is_changed(self, tiny_model, generator, fused):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (1, 4), generator=generator).to(DEVICE)
        _, cache = decode(model, tokens, 1)
        seen = []
        handle = model.model.layers[0].mixer.o_proj.register_forward_hook(lambda *arguments: seen.append(1))
        del fused[:]
        with torch.no_grad():
            model(tokens[:, :1], past_key_values=cache)
            assert (fused, seen) == ([], [1])
            handle.remove()
            model(tokens[:, :1], past_key_values=cache)
        assert (fused, seen) == (OF_A_LAYER, [1])

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=compiled_only)])
    def test_compiled_graph(self, tiny_model, generator, fused, backend):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (2, 6), generator=generator).to(DEVICE)
        expected, _ = decode(model, tokens)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=8)
            cache = model(tokens[:, :-2], past_key_values=cache, use_cache=True).past_key_values
            del fused[:]
            for t, theirs in zip((4, 5), expected, strict=True):
                ours = compiled(tokens[:, t : t + 1], past_key_values=cache)
                assert relative_error(ours.logits, theirs.logits) < 1e-5
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        assert fused == []  # the operators, not the launches
        assert graphs >= 1

    @compiled_only
    @pytest.mark.parametrize("batch", [1, 4, 16, 64])
    def test_tokens_of_a_real_layer(self, fused, batch):
        """Two layers of the 1B preset in bfloat16 predict what their modules do."""
        torch.manual_seed(0)
        config = MesaNetConfig.preset("1B", num_hidden_layers=2, vocab_size=512, cg_tolerance=None)
        model = MesaNetForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
        tokens = torch.randint(0, 512, (batch, 40), device=DEVICE)
        expected, _ = decode(self.without(model), tokens, 8)
        assert fused == []
        actual, _ = decode(model, tokens, 8)
        assert fused == OF_A_LAYER * 2 * 9
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_error(ours.logits.float(), theirs.logits.float()) < 2e-2
            # Equal but where the two best tokens lie within rounding of each other.
            best = theirs.logits.float().topk(2).values
            clear = (best[..., 0] - best[..., 1]) > 0.05 * best[..., 0].abs()
            assert torch.equal(ours.logits.argmax(-1)[clear], theirs.logits.argmax(-1)[clear])

    @compiled_only
    def test_graph_of_a_step(self, tiny_model, generator, fused):
        model = tiny_model(**FEW).to(DEVICE)
        tokens = torch.randint(0, 97, (1, 6), generator=generator).to(DEVICE)
        expected, _ = decode(model, tokens, 3)
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=8)
            cache = model(tokens[:, :3], past_key_values=cache, use_cache=True).past_key_values
            token = tokens[:, 3:4].clone()
            first = model(token, past_key_values=cache).logits
            assert relative_error(first, expected[0].logits) < 1e-6
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(token, past_key_values=cache).logits
            for t in (1, 2):
                token.copy_(tokens[:, 3 + t : 4 + t])
                graph.replay()
                assert relative_error(logits, expected[t].logits) < 1e-6
