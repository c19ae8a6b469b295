# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits, by torchao."""

import sys

import pytest
import torch
from small_models import random_ids
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_mesanet import bundled_checkpoint, int8_weights
from modeling_mesanet.cli import app


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="int8 weights need torchao"):
        int8_weights()


def test_the_command_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    run = CliRunner().invoke(app, ["generate", "--int8"])
    assert run.exit_code == 2
    assert "int8 weights need torchao" in " ".join(run.stderr.replace("│", " ").split())


def test_the_command():
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    run = CliRunner().invoke(app, ["generate", "--int8", "--max-new-tokens", "3", "--temperature", "0"])
    assert run.exit_code == 0, run.stderr
    assert len(run.stdout) > 20


def test_int8_weights():
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    plain = AutoModelForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(
        bundled_checkpoint(), dtype=torch.float32, quantization_config=int8_weights()
    ).eval()
    quantised = {
        name for name, part in model.named_modules() if type(getattr(part, "weight", None)).__name__ == "Int8Tensor"
    }
    linear = {name for name, part in plain.named_modules() if type(part) is torch.nn.Linear and name != "lm_head"}
    assert {name for name in quantised if "embed" not in name} == linear - {
        name for name in linear if name.endswith(("beta_proj", "gamma_proj"))
    }
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected, actual = plain(ids).logits, model(ids).logits
    error = ((actual - expected).norm() / expected.norm()).item()
    assert 0 < error < 0.02
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
