# SPDX-License-Identifier: Apache-2.0
"""`mesanet compute-sweep`: losses, steps, condition numbers and gates against direct computation; bad input."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib", reason="the eval extra is not installed")

from eval_inputs import save_checkpoint
from task_inputs import write_data

from modeling_mesanet import modeling_mesanet as modeling
from modeling_mesanet.eval import compute_sweep
from modeling_mesanet.eval.compute_sweep import mixers, recorded_solver
from modeling_mesanet.eval.results import read_named_documents

LENGTH, CHUNK = 24, 8
OPTIONS = ("--length", LENGTH, "--chunk", CHUNK, "--steps", "0,2", "--tolerances", "1e-1,1e-3")


@pytest.fixture(scope="module")
def solver_checkpoint(tiny_model, tmp_path_factory):
    """A random MesaNet that stops at a tolerance, with systems that differ in condition."""
    model = tiny_model(vocab_size=300, cg_tolerance=1e-2, cg_max_steps=20, lambda_init=0.3)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "solver", model, bos="<|endoftext|>")


@pytest.fixture(scope="module")
def model(solver_checkpoint):
    return AutoModelForCausalLM.from_pretrained(solver_checkpoint, dtype=torch.float32).eval()


@pytest.fixture
def windows(solver_checkpoint, texts) -> torch.Tensor:
    """All windows of the texts that are long enough, `[N, 1 + LENGTH]`."""
    tokenizer = AutoTokenizer.from_pretrained(solver_checkpoint)
    rows = []
    for text in read_named_documents([texts]).values():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        rows += [F.pad(window, (1, 0), value=tokenizer.bos_token_id) for window in ids.split(LENGTH)]
    return torch.stack([row for row in rows if len(row) == LENGTH + 1])


def read(folder) -> dict:
    return json.loads((folder / "compute_sweep.json").read_text())


def losses(model, windows) -> np.ndarray:
    with torch.no_grad():
        logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").numpy()


def test_figures_are_those_of_direct_computation(mesanet, solver_checkpoint, model, windows, texts, tmp_path):
    output = tmp_path / "out"
    printed = mesanet("compute-sweep", texts, "-m", solver_checkpoint, "-o", output, *OPTIONS).stdout
    result = read(output)
    assert result["windows"] == len(windows) > 2
    sweep = {entry["name"]: entry for entry in result["sweep"]}
    settings = {
        "checkpoint": (20, 1e-2),
        "steps-0": (0, None),
        "steps-2": (2, None),
        "tolerance-0.1": (20, 1e-1),
        "tolerance-0.001": (20, 1e-3),
    }
    assert {name: (entry["max_steps"], entry["tolerance"]) for name, entry in sweep.items()} == settings
    expected = {}
    for name, (max_steps, tolerance) in settings.items():
        with model.solver(cg_max_steps=max_steps, cg_tolerance=tolerance):
            expected[name] = losses(model, windows)
        assert sweep[name]["nll"] == pytest.approx(expected[name].mean(), abs=1e-4)
        assert name in printed
    # Settings that came to the same would show nothing.
    assert len({round(entry["nll"], 4) for entry in sweep.values()}) >= 3
    assert sweep["steps-2"]["difference"] == pytest.approx(
        expected["steps-2"].mean() - expected["checkpoint"].mean(), abs=2e-4
    )
    assert (sweep["steps-0"]["mean_steps"], sweep["steps-2"]["mean_steps"]) == (0, 2)
    steps = [sweep[name]["mean_steps"] for name in ("tolerance-0.1", "checkpoint", "tolerance-0.001")]
    assert steps[0] < steps[1] < steps[2] < 20
    assert 1e-5 < sweep["tolerance-0.001"]["mean_residual"] < 1e-3 < sweep["tolerance-0.1"]["mean_residual"] < 1e-1
    with open(output / "settings.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == list(settings)
    assert [row["tolerance"] for row in rows][:2] == ["0.01", ""]
    for name in ("compute_sweep.png", "heads.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_heads_tell_condition_numbers_gates_and_regularisers(
    mesanet, solver_checkpoint, model, windows, texts, tmp_path
):
    output = tmp_path / "out"
    mesanet("compute-sweep", texts, "-m", solver_checkpoint, "-o", output, *OPTIONS, "--no-plot")
    result = read(output)
    heads = {(entry["layer"], entry["head"]): entry for entry in result["heads"]}
    conditions = {
        (entry["layer"], entry["head"], entry["position"]): (entry["median"], entry["largest"])
        for entry in result["conditions"]
    }
    assert sorted({position for _, _, position in conditions}) == [8, 16, 24]
    inputs: dict[int, torch.Tensor] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda m, a: inputs.__setitem__(m.layer_idx, a[0])) for mixer in mixers(model)
    ]
    with torch.no_grad():
        for end in (8, 24):
            cache = model(windows[:, :end], use_cache=True).past_key_values
            for layer, mixer in enumerate(mixers(model)):
                lam = mixer.regularizer()
                h = cache.layers[layer].recurrent_state()[0].double() + torch.diag_embed(lam.double())
                expected = np.linalg.cond(h.numpy())
                for head in range(mixer.num_heads):
                    median, largest = conditions[layer, head, end]
                    assert median == pytest.approx(np.median(expected[:, head]), rel=1e-3)
                    assert largest == pytest.approx(expected[:, head].max(), rel=1e-3)
        for hook in hooks:
            hook.remove()
        for layer, mixer in enumerate(mixers(model)):
            beta, log_gamma = mixer.gates(inputs[layer], None)
            for head in range(mixer.num_heads):
                entry = heads[layer, head]
                shares = np.percentile(beta[..., head], (5, 50, 95))
                assert [entry["beta_5"], entry["beta_50"], entry["beta_95"]] == pytest.approx(shares, abs=1e-3)
                assert entry["gamma_50"] == pytest.approx(np.median(log_gamma[..., head].exp()), abs=1e-3)
                lam = mixer.regularizer()[head]
                assert entry["lambda_mean"] == pytest.approx(lam.mean().item(), rel=1e-5)
                assert (entry["lambda_smallest"], entry["lambda_largest"]) == pytest.approx(
                    (lam.min().item(), lam.max().item())
                )


def test_steps_and_residuals_are_filed_under_layer_head_and_position(model, windows):
    """Whole windows and pieces give the same statistics, which are those that the operator returns."""
    length = LENGTH
    whole = compute_sweep.SolverSums(2, length, 2)
    pieces = compute_sweep.SolverSums(2, length, 2)
    returned = []

    def record(call):
        whole.add(call)
        returned.append(call)

    with recorded_solver(model, record), torch.no_grad():
        model(windows[:, :-1], use_cache=False)
    with recorded_solver(model, pieces.add), torch.no_grad():
        cache = None
        for piece in windows[:, :-1].split(10, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    assert [call.layer for call in returned] == [0, 1]
    for call in returned:
        np.testing.assert_array_equal(whole.steps[call.layer], call.stats.steps.sum(0).numpy())
    # A residual close to the tolerance may fall on either side of it.
    assert np.abs(pieces.steps - whole.steps).max() <= 1
    assert (pieces.steps == whole.steps).mean() > 0.95
    np.testing.assert_allclose(pieces.residual, whole.residual, rtol=0.5, atol=0.02)
    assert len(np.unique(whole.steps)) > 3


def test_the_model_is_left_as_it_was(model, windows):
    operator, before = modeling.mesa_attention, (model.config.cg_max_steps, model.config.cg_tolerance)

    def fail(call):
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        model.solver(cg_max_steps=3, cg_tolerance=None),
        recorded_solver(model, fail),
    ):
        model(windows[:, :-1])
    assert modeling.mesa_attention is operator
    assert (model.config.cg_max_steps, model.config.cg_tolerance) == before
    assert not any(mixer._forward_pre_hooks for mixer in mixers(model))


def test_an_interrupted_sweep_goes_on(mesanet, solver_checkpoint, texts, tmp_path, monkeypatch):
    arguments = ("compute-sweep", texts, "-m", solver_checkpoint, *OPTIONS, "--no-plot")
    mesanet(*arguments, "-o", tmp_path / "whole")
    original, seen = compute_sweep.iterate_losses, []

    def counted(model, windows, **options):
        seen.append(model.config.cg_max_steps)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(model, windows, **options)

    monkeypatch.setattr(compute_sweep, "iterate_losses", counted)
    mesanet(*arguments, "-o", tmp_path / "out", code=130)
    mesanet(*arguments, "-o", tmp_path / "out", fails="--resume")
    mesanet(*arguments, "-o", tmp_path / "out", "--resume", "--dtype", "bfloat16", fails="differs in dtype")
    mesanet(*arguments, "-o", tmp_path / "out", "--resume")
    assert len(seen) == 3 + 3  # of the five settings, the first two were kept
    assert read(tmp_path / "out") == read(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2,x"], "--steps is '2,x'"),
        (["--steps", "-1"], "--steps is '-1'"),
        (["--tolerances", "1"], "--tolerances is '1'"),
        (["--length", 30], "--length is 30 and --chunk 8"),
        (["--length", 8000], "fewer than the longest context length, 8000"),
    ],
)
def test_bad_options(mesanet, solver_checkpoint, texts, tmp_path, options, message):
    arguments = ("compute-sweep", texts, "-m", solver_checkpoint, "-o", tmp_path / "out", *OPTIONS)
    mesanet(*arguments, *options, fails=message)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_solver(mesanet, texts, tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    llama = save_checkpoint(tmp_path / "llama", LlamaForCausalLM(config), bos="<|endoftext|>")
    mesanet("compute-sweep", texts, "-m", llama, "-o", tmp_path / "out", fails="a 'llama', which has no solver")


@pytest.mark.usefixtures("quick_lm_eval", "no_data_folder")
class TestTasks:
    def test_are_run_with_every_setting(self, mesanet, solver_checkpoint, model, texts, tmp_path):
        """Of ours, one that counts tokens and is longer than the config's length, and a group; on local data."""
        data = write_data(tmp_path / "data")
        tasks = "mesanet_books_2k,mesanet_reasoning_global"
        arguments = ("compute-sweep", texts, "-m", solver_checkpoint, "-o", tmp_path / "out", *OPTIONS, "--limit", 2)
        result = mesanet(*arguments, "--tasks", tasks, "--data-dir", data)
        tokenizer = AutoTokenizer.from_pretrained(solver_checkpoint)
        books = [file.read_text() for file in sorted((data / "perplexity/books").glob("*.txt"))]
        sweep = read(tmp_path / "out")["sweep"]
        for entry in sweep:
            nats = size = 0
            with model.solver(cg_max_steps=entry["max_steps"], cg_tolerance=entry["tolerance"]):
                for text in books:
                    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
                    nats, size = nats + losses(model, ids).sum(), size + len(text)
            found = entry["tasks"]
            assert found["mesanet_books_2k bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-4)
            scores = [found[f"mesanet_{name} score"] for name in ("lambada", "hellaswag", "race_m", "race_h")]
            assert found["mesanet_reasoning_global score"] == pytest.approx(sum(scores) / 4)
        assert len({entry["tasks"]["mesanet_books_2k bits_per_byte"] for entry in sweep}) == len(sweep)
        assert "mesanet_reasoning_global score" in result.stdout

    def test_mistakes_are_told_before_anything_is_measured(self, mesanet, solver_checkpoint, texts, tmp_path):
        data = write_data(tmp_path / "data")
        (data / "global_reasoning/race_high.jsonl").unlink()
        arguments = ("compute-sweep", texts, "-m", solver_checkpoint, "-o", tmp_path / "out", *OPTIONS)
        mesanet(*arguments, "--tasks", "arc_easy,absent", fails="--tasks names 'absent'")
        arguments += ("--tasks", "mesanet_reasoning_global", "--data-dir", data)
        mesanet(*arguments, fails="holds no global_reasoning/race_high.jsonl")
        assert not (tmp_path / "out").exists()
        mesanet(*arguments, "--skip-missing", "--limit", 1, "--no-plot")
        found = read(tmp_path / "out")["sweep"][0]["tasks"]
        assert "mesanet_race_m score" in found
        assert not any(name.startswith(("mesanet_race_h", "mesanet_reasoning")) for name in found)
