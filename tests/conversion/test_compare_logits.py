# SPDX-License-Identifier: Apache-2.0
"""The comparison with fla: its verdict, and, with fla's kernels stood in for, that it tells right from wrong."""

import json

import pytest
import torch
from fla_checkpoints import fla_without_triton

from modeling_mesanet.conversion import convert_from_fla, convert_to_fla
from modeling_mesanet.conversion.compare_logits import (
    LogitComparison,
    compare_logits,
    exact_reference,
    relative_difference,
)


@pytest.mark.parametrize(
    ("dtype", "difference", "ours", "fla", "ok"),
    [
        (torch.float32, 9e-4, 9e-4, 1e-4, True),
        (torch.float32, 3e-3, 2e-4, 3e-3, True),  # fla's own error
        (torch.float32, 3e-3, 3e-3, 1e-4, False),
        (torch.bfloat16, 1.9e-2, 3e-2, 3e-2, True),
        (torch.bfloat16, 3e-2, 3e-2, 1e-2, False),
        (torch.float32, float("nan"), float("nan"), 1e-4, False),
    ],
)
def test_verdict(dtype, difference, ours, fla, ok):
    comparison = LogitComparison(dtype, 400, difference, ours, fla)
    assert comparison.ok is ok
    assert str(comparison).startswith("logits of 400 random tokens in ")
    assert f"{difference:.1e}" in str(comparison)


def test_relative_difference():
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == float("inf")
    assert relative_difference(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


class TestWithFla:
    """On a CPU: fla's layers are its own, its kernels are stood in for, its solver by its own exact reference."""

    @pytest.fixture(autouse=True)
    def kernels(self):
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        with exact_reference(), fla_without_triton():
            yield

    @pytest.mark.parametrize("fields", [{}, {"use_output_gate": True, "tie_word_embeddings": True}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_conversions_agree(self, fla_checkpoint, tmp_path, dtype, fields):
        source, _, _ = fla_checkpoint(dtype=dtype, **fields)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
        convert_from_fla(source, tmp_path / "ours")
        convert_to_fla(tmp_path / "ours", tmp_path / "back")
        for folder in (source, tmp_path / "back"):
            comparison = compare_logits(folder, tmp_path / "ours", length=40, device="cpu")
            assert comparison.dtype == dtype
            assert comparison.tokens == 80
            assert comparison.fla == 0
            assert comparison.ok, comparison

    def test_a_wrong_conversion_is_found(self, fla_checkpoint, tmp_path):
        source, _, _ = fla_checkpoint()
        convert_from_fla(source, tmp_path / "ours")
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "forget_gate_bound": 0.5}))
        assert not compare_logits(source, tmp_path / "ours", length=40, device="cpu").ok
