# SPDX-License-Identifier: Apache-2.0
"""`mesanet check`: sound models pass, and each kind of fault fails the check that names it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from modeling_mesanet import check as check_module
from modeling_mesanet import modeling_mesanet
from modeling_mesanet.check import BOUND, CHECKS, check, difference, largest
from modeling_mesanet.cli import app
from modeling_mesanet.loading import weights_sha256
from modeling_mesanet.modeling_mesanet import MesaNetShortConvolution, PadOrder


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A small checkpoint that solves as published checkpoints do."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model(cg_tolerance=1e-4, tie_word_embeddings=False, eos_token_id=5).save_pretrained(path)
    return path


def statuses(report: dict) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in report["checks"]}


def not_here() -> set[str]:
    return {"CPU against Triton"} | ({"rollback"} if modeling_mesanet.MesaNetForCausalLM._is_stateful else set())


def test_a_sound_checkpoint_passes(folder):
    report = check(folder)
    assert statuses(report) == {name: "not run" if name in not_here() else "pass" for name in CHECKS}
    assert report["verdict"] == "pass"
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["path"] == str(folder)
    assert report["device"] == "cpu"
    assert report["versions"]["torch"]
    assert report["weights"] == weights_sha256(folder)
    for entry in report["checks"]:
        if entry["status"] == "not run":
            assert entry["error"] is entry["bound"] is None
            assert entry["reason"]
        else:
            assert 0 <= entry["error"] <= entry["bound"] <= BOUND
            assert entry["reason"] is None


def test_the_bundled_checkpoint_passes_on_the_command_line():
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    assert "verdict: pass" in result.stdout
    assert result.stdout.count("PASS") == len(CHECKS) - len(not_here())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_bundled_checkpoint_passes_on_the_gpu():
    report = check(device="cuda")
    assert report["verdict"] == "pass"
    assert statuses(report)["CPU against Triton"] == ("pass" if report["backend"] == "triton" else "not run")


def leak_pads(monkeypatch):
    """Pads enter the convolutions."""
    monkeypatch.setattr(PadOrder, "sort", lambda self, x: x)
    monkeypatch.setattr(PadOrder, "restore", lambda self, y: y)


def write_pads(monkeypatch):
    """Pads are written into the state."""
    gates = modeling_mesanet.gates
    monkeypatch.setattr(modeling_mesanet, "gates", lambda *a: gates(*a[:5], None, *a[6:]))


def run_over_bounds(monkeypatch):
    """The convolution of a packed sequence sees the end of the one before it."""
    forward = MesaNetShortConvolution.forward
    monkeypatch.setattr(
        MesaNetShortConvolution, "forward", lambda self, x, state=None, *_: forward(self, x, state, None, None)
    )


def forget_convolutions(monkeypatch):
    """Each piece begins with an empty convolution."""
    forward = MesaNetShortConvolution.forward
    # One token, too, which otherwise does without the modules.
    monkeypatch.setattr(modeling_mesanet, "is_plain", lambda *arguments: False)
    monkeypatch.setattr(
        MesaNetShortConvolution, "forward", lambda self, x, _=None, *rest: forward(self, x, None, *rest)
    )


def mix_rows(monkeypatch):
    """A row's values depend on the other rows."""
    norm = modeling_mesanet.MesaNetRMSNorm.forward
    monkeypatch.setattr(
        modeling_mesanet.MesaNetRMSNorm,
        "forward",
        lambda self, x, gate=None: norm(self, x, gate) + 0.1 * x.mean(dim=0, keepdim=True),
    )


FAULTS = {
    leak_pads: {"padding left", "padding right", "padding between turns"},
    write_pads: {"padding left", "padding right", "padding between turns"},
    run_over_bounds: {"packing"},
    forget_convolutions: {"split", "fork of a state", "state file", "cached against uncached", "static cache"},
    mix_rows: {"batch size"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_checks_that_name_it(folder, monkeypatch, fault):
    fault(monkeypatch)
    report = check(folder)
    failed = {name for name, status in statuses(report).items() if status == "fail"}
    assert failed >= FAULTS[fault]
    assert report["verdict"] == "fail"


def test_weights_that_do_not_come_back_fail(folder, monkeypatch):
    load = check_module.load_checkpoint

    def load_and_disturb(*args, **kwargs):
        model = load(*args, **kwargs)
        if args[0] != folder:
            model.model.norm.weight.data += 1e-3
        return model

    monkeypatch.setattr(check_module, "load_checkpoint", load_and_disturb)
    assert statuses(check(folder))["save and reload"] == "fail"


def test_a_state_that_does_not_come_back_fails(folder, monkeypatch):
    load = check_module.load_state

    def load_and_disturb(*args, **kwargs):
        state = load(*args, **kwargs)
        state.layers[0].recurrent_states[0] *= 1.1
        return state

    monkeypatch.setattr(check_module, "load_state", load_and_disturb)
    failed = {name for name, status in statuses(check(folder)).items() if status == "fail"}
    assert failed == {"state file"}


def test_an_infinite_weight_fails_wherever_it_is(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[1].mixer.gamma_bias[0] = torch.inf  # a head that forgets nothing: all logits are finite
    model.save_pretrained(tmp_path)
    failed = {name for name, status in statuses(check(tmp_path)).items() if status == "fail"}
    assert failed == {"finite weights"}


def test_logits_of_zero_are_no_failure(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    assert check(tmp_path)["verdict"] == "pass"


def test_what_is_raised_or_not_finite_fails_with_a_reason(folder, monkeypatch):
    def raises(model):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(check_module, "CHECKS", {"raises": raises, "nan": lambda model: float("nan")})
    report = check(folder)
    assert [entry["status"] for entry in report["checks"]] == ["fail", "fail"]
    assert [entry["reason"] for entry in report["checks"]] == [
        "RuntimeError: out of memory",
        "the logits are not finite",
    ]
    json.dumps(report, allow_nan=False)


def test_a_fault_ends_the_command_with_1(folder, monkeypatch):
    leak_pads(monkeypatch)
    result = CliRunner().invoke(app, ["check", str(folder), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"] == "fail"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere/at/all"], "PATH is 'nowhere/at/all'"), (["--device", "abacus"], "--device is 'abacus'")],
)
def test_mistakes_get_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_looser_solver_widens_the_bound(tiny_model, tmp_path):
    tiny_model(cg_tolerance=1e-2).save_pretrained(tmp_path)
    bounds = {entry["name"]: entry["bound"] for entry in check(tmp_path)["checks"]}
    assert bounds["split"] == pytest.approx(0.1)
    assert bounds["save and reload"] == 0


def test_errors_are_relative_to_each_token_and_nan_is_the_largest():
    expected = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert difference(expected + torch.tensor([[0.0, 1.0], [0.0, 1.0]]), expected) == pytest.approx(0.2)
    assert largest([1.0, float("nan"), 2.0]) != largest([1.0, 2.0])
