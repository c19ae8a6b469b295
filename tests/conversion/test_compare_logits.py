# SPDX-License-Identifier: Apache-2.0
"""The comparison with fla: its verdict, and, with fla's kernels stood in for, that it tells right from wrong."""

import json
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from fla_checkpoints import fla_without_triton
from safetensors.torch import load_file, save_file

from modeling_mesanet.conversion import convert_from_fla, convert_to_fla
from modeling_mesanet.conversion.compare_logits import (
    LogitComparison,
    compare_logits,
    relative_difference,
    typical_difference,
)
from modeling_mesanet.mesa.mesa_solver import l2_normalize


@pytest.mark.parametrize(
    ("dtype", "ours_float32", "difference", "ours", "fla", "ok"),
    [
        (torch.float32, 1e-5, 9e-4, 9e-4, 1e-4, True),
        (torch.float32, 1e-5, 3e-3, 1e-5, 3e-3, True),  # fla's own error
        (torch.float32, 1e-5, 3e-3, 3e-3, 1e-4, False),
        (torch.bfloat16, 1e-5, 1.9e-2, 3e-2, 2e-2, True),
        (torch.bfloat16, 1e-5, 3e-2, 3e-2, 1e-2, False),
        # Rounding that both models amplify.
        (torch.bfloat16, 1e-5, 2e-1, 1.7e-1, 1.8e-1, True),
        (torch.bfloat16, 1e-5, 2e-1, 1.9e-1, 1.8e-1, True),
        (torch.bfloat16, 1e-5, 2e-1, 2.1e-1, 1.8e-1, False),
        # Another function, whatever the dtype hides.
        (torch.bfloat16, 1.1e-3, 1e-2, 1e-2, 1e-2, False),
        (torch.float32, 1.1e-3, 1e-4, 1.1e-3, 1.1e-3, False),
        # Numbers that are none: ours, fla's, both in a dtype without the range.
        (torch.float32, float("nan"), float("nan"), float("inf"), 1e-4, False),
        (torch.bfloat16, 1e-5, float("nan"), float("inf"), 1e-2, False),
        (torch.bfloat16, 1e-5, float("nan"), 1e-2, float("inf"), True),
        (torch.float16, 1e-5, float("nan"), float("inf"), float("inf"), True),
    ],
)
def test_verdict(dtype, ours_float32, difference, ours, fla, ok):
    comparison = LogitComparison(dtype, 400, ours_float32, difference, ours, fla)
    assert comparison.ok is ok
    assert str(comparison).startswith("logits of 400 random tokens differ")
    for value in (ours_float32, difference, ours, fla):
        assert f"{value:.1e}" in str(comparison)


def test_relative_difference():
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == float("inf")
    assert relative_difference(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


def test_typical_difference():
    b = torch.ones(1, 4, 3, dtype=torch.float64)
    errors = torch.tensor([1e-3, 1e-2, 1e-2, 1e-1])  # one in a hundred, each as far above it as below
    assert typical_difference(b + errors[:, None], b) == pytest.approx(1e-2)
    assert typical_difference(b, b) < 1e-6
    assert typical_difference(b.index_fill(1, torch.tensor([2]), float("nan")), b) == float("inf")


@contextmanager
def kernels_of_few_digits():
    """What fla's kernels compute: q and k rounded to float16, a fixed number of conjugate-gradient steps."""
    from fla.ops.mesa_net.naive import naive_mesa_net_CG

    def solve(q, k, v, g, beta, lamb, max_CG_iteration, **options):
        q, k = (l2_normalize(x.float()).half() for x in (q, k))
        o, h_kk, h_kv = naive_mesa_net_CG(q, k, v, g, lamb, beta, q.shape[1], max_CG_iteration)
        return o.to(v.dtype), h_kk, h_kv

    with mock.patch("fla.layers.mesa_net.chunk_mesa_net", solve):
        yield


class TestWithFla:
    """On a CPU: fla's layers are its own; what its kernels compute, plain torch does."""

    @pytest.fixture(autouse=True)
    def kernels(self):
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        with kernels_of_few_digits(), fla_without_triton():
            yield

    @pytest.fixture
    def converted(self, fla_checkpoint, tmp_path):
        """`converted(dtype, fields, **changes)`: a checkpoint, and its conversion with `changes` to its config."""

        def convert(dtype=torch.float32, fields=None, **changes):
            source, _, _ = fla_checkpoint(dtype=dtype, **(fields or {}))
            edit(source, dtype=str(dtype).removeprefix("torch."))
            convert_from_fla(source, tmp_path / "ours")
            edit(tmp_path / "ours", **changes)
            return source, tmp_path / "ours"

        return convert

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_output_gate": True, "tie_word_embeddings": True},
            {"max_cg_step_training": 3, "max_cg_step_decoding": 3},
            {"num_hidden_layers": 6},
        ],
        ids=["plain", "output gate, tied", "too few steps", "deep"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_conversions_agree(self, converted, tmp_path, dtype, fields):
        source, ours = converted(dtype, fields)
        convert_to_fla(ours, tmp_path / "back")
        for folder in (source, tmp_path / "back"):
            comparison = compare_logits(folder, ours, length=100, device="cpu")
            assert comparison.dtype == dtype
            assert comparison.tokens == 200
            assert comparison.ours_float32 < 1e-4
            assert comparison.ok, comparison
            if dtype == torch.float32 and "max_cg_step_training" not in fields:
                assert comparison.ours < 1e-4 < comparison.fla

    def test_rounding_that_both_amplify_is_no_fault(self, converted):
        """Through layers and layers of random weights, what bfloat16 rounds away grows beyond any tolerance."""
        comparison = compare_logits(*converted(torch.bfloat16, {"num_hidden_layers": 12}), length=100, device="cpu")
        assert comparison.difference > 3 * comparison.tolerance
        assert comparison.ours == pytest.approx(comparison.fla, rel=0.1)
        assert comparison.ok

    @pytest.mark.parametrize(
        "changes",
        [
            {"forget_gate_bound": 0.5},
            {"lambda_lower_bound": 0.26},  # bfloat16's rounding is as large
            {"rms_norm_eps": 1e-5},
            {"cg_max_steps": 4},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_wrong_conversion_is_found(self, converted, dtype, changes):
        comparison = compare_logits(*converted(dtype, **changes), length=100, device="cpu")
        assert not comparison.ok
        assert (comparison.ours_float32 > 1e-3) is ("cg_max_steps" not in changes)

    def test_the_reference_holds_what_the_dtype_of_the_checkpoint_rounds_away(self, converted):
        """Ours keep biases in float32 beside matrices in bfloat16, and so does what fla gets from us."""
        source, ours = converted(torch.bfloat16)
        for folder, name in ((source, "model.layers.0.attn.a_proj.bias"), (ours, "model.layers.0.mixer.gamma_bias")):
            file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
            tensors = load_file(file)
            save_file({**tensors, name: tensors[name].float() * (1 + 2**-10)}, file, metadata={"format": "pt"})
        assert compare_logits(source, ours, length=40, device="cpu").ours_float32 < 1e-5


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
