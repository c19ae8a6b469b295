# SPDX-License-Identifier: Apache-2.0
"""The training benchmark in its smallest sizes on a CPU, on text made up here, and the tables made of its results."""

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from transformers import AutoTokenizer

from modeling_mesanet import bundled_checkpoint, modeling_mesanet

BENCHMARKS = Path(__file__).parents[1] / "kernels" / "benchmarks"
WORDS = ("the", "ship", "captain", "said", "old", "man", "never", "night", "sea", "and", "of", "to")


@pytest.fixture
def scripts(monkeypatch) -> SimpleNamespace:
    """The benchmark's modules, imported as its scripts import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import readme_tables
    import training_curves

    return SimpleNamespace(curves=training_curves, tables=readme_tables)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A corpus of three made-up documents, named by MESANET_DATA."""
    rng = np.random.default_rng(0)
    rows = [json.dumps({"text": " ".join(rng.choice(WORDS, size=900))}) for _ in range(3)]
    (tmp_path / "corpus").mkdir()
    with gzip.open(tmp_path / "corpus" / "novels_train.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(rows))
    monkeypatch.setenv("MESANET_DATA", str(tmp_path))
    return tmp_path


def run(scripts, folder: Path, **options) -> dict:
    arguments = {"device": "cpu", "data_dir": None, "steps": None, "repeated_steps": None, "control": False}
    arguments |= {"learning_rate": None, "head_norm_eps": None, "revision": "abc", "output": folder, "smoke": True}
    arguments |= {"only": ""}
    scripts.curves.main(**arguments | options)
    return json.loads((folder / "training_curves_cpu.json").read_text(encoding="utf-8"))


def test_smoke_run_trains_and_compares(scripts, data, tmp_path):
    pytest.importorskip("matplotlib", reason="the train extra is not installed")
    results = run(scripts, tmp_path, steps=3, repeated_steps=2)
    # No Triton on a CPU: torch is compared with itself at another chunk size.
    found = {precision: results[precision]["runs"] for precision in ("float32", "bfloat16")}
    for precision, (compared, reference) in found.items():
        assert compared["precision"] == reference["precision"] == precision
        assert (compared["backend"], compared["chunk_size"]) == ("torch", 16)
        assert (reference["backend"], reference["chunk_size"]) == ("torch", 64)
        assert 0 <= compared["difference"] < (1e-5 if precision == "float32" else 5e-3)
        assert 1 <= compared["step"] <= 3
    bounded, unbounded = results["repeated"]["runs"]
    assert (bounded["forget_gate_bound"], unbounded["forget_gate_bound"]) == (0.9975, None)
    for row, steps in (*((row, 3) for rows in found.values() for row in rows), (bounded, 2), (unbounded, 2)):
        assert "failed" not in row
        for name in ("losses", "gradient_norms", "residuals"):
            assert len(row[name]) == steps
            assert all(0 < number < math.inf for number in row[name])
        assert max(row["residuals"]) <= 1e-4
    assert results["repeated"]["longest_run"] >= 16
    assert [row["family"] for row in results["errors"]] == ["scream", "rank8", "repeat"]
    assert all(row["errors"]["mesa, tolerance 1e-4"] < 2e-4 for row in results["errors"])
    assert {part["revision"] for part in results["measured"].values()} == {"abc"}
    assert results["plan"]["head_norm_eps"] == 1e-3
    assert (tmp_path / results["figure"]).read_bytes().startswith(b"\x89PNG")
    text = scripts.tables.training_curves(results)
    assert text.startswith("| training on | steps |")
    assert "| near-constant keys | " in text
    assert "head norm's epsilon 0.001" in text
    # An interrupted run has not all sections.
    assert scripts.tables.training_curves(results | {"repeated": None, "errors": []}).startswith("| training on |")
    # One section again: the others stay.
    again = run(scripts, tmp_path, steps=3, repeated_steps=2, only="bfloat16")
    assert again["float32"] == results["float32"]
    other = run(scripts, tmp_path, steps=1, only="float32", head_norm_eps=0.5)
    assert other["plan"]["head_norm_eps"] == 0.5
    assert other["float32"]["runs"][1]["losses"][0] != results["float32"]["runs"][1]["losses"][0]
    with pytest.raises(typer.BadParameter, match="text: take some of float32, bfloat16"):
        run(scripts, tmp_path, only="text")


def test_a_number_that_is_not_finite_ends_a_run(scripts, data, tmp_path, monkeypatch):
    right = modeling_mesanet.mesa_attention

    def broken(*inputs, **options):
        output = right(*inputs, **options)
        return output._replace(o=output.o * math.nan)

    monkeypatch.setattr(modeling_mesanet, "mesa_attention", broken)
    with pytest.raises(typer.Exit):
        run(scripts, tmp_path)
    results = json.loads((tmp_path / "training_curves_cpu.json").read_text(encoding="utf-8"))
    for row in results["float32"]["runs"] + results["bfloat16"]["runs"] + results["repeated"]["runs"]:
        assert row["failed"].startswith("not finite at step 1: losses nan")
        assert row["losses"] == []
    assert results["float32"]["runs"][0]["difference"] is None
    assert "not finite at step 1" in scripts.tables.training_curves(results)


def test_control_is_a_run_of_its_own(scripts, monkeypatch):
    curves = scripts.curves.Curves(scripts.curves.SMOKE, torch.device("cuda"), None, None, None, control=True)
    monkeypatch.setattr(curves, "train", lambda run, tokens, steps: {"name": run.name, "losses": [1.0]})
    assert [row["name"] for row in curves.bfloat16()["runs"]] == ["Triton", "torch, chunks of 16", "torch"]
    assert [row["name"] for row in curves.float32()["runs"]] == ["Triton", "torch"]


def test_a_loss_off_the_reference_is_missed(scripts):
    reference, off = {"losses": [4.0, 2.0, 1.0]}, {"losses": [4.0, 2.02, 1.001]}
    assert scripts.curves.compare(off, reference) == {"difference": pytest.approx(0.01), "step": 2}
    row = {"name": "Triton", "gradient_norms": [1, 2, 1], "residuals": [1e-4, 1e-4, 1e-5]} | off
    row |= scripts.curves.compare(off, reference)
    # Not in bfloat16, where rounding alone does so.
    results = {"float32": {"runs": [row, reference]}, "bfloat16": {"runs": [row, row, reference]}}
    assert scripts.curves.problems(results) == ["Triton: the loss differs by 1.00% at step 2, by more than 0.5%"]
    line = scripts.tables.curve_row("text", row, 5e-3)
    assert ", missed" not in scripts.tables.curve_row("text", row)
    assert line == "| text: Triton | 3 | 4.000, 1.001 | 1.00% at step 2, missed | 2.00 | 1.0e-04 |"


def test_runs_of_one_token_replace_a_third(scripts):
    tokens = np.random.default_rng(0).integers(0, 500, size=200_000).astype(np.uint16)
    repeated = scripts.curves.with_runs(tokens, 0, 64, 1024)
    assert repeated.shape == tokens.shape
    same = repeated[1:] == repeated[:-1]
    assert 0.28 < same.mean() < 0.39
    assert 900 < scripts.curves.longest_run(repeated) <= 1030
    assert not (same & (repeated[1:] == 0) & (tokens[1:] != 0)).any()


def test_epsilons_of_the_head_norm_are_compared(scripts, data, tmp_path, monkeypatch):
    import head_norm

    cases = ((1e-6, 0), (0.5, 0), (1e-6, 1))
    monkeypatch.setattr(head_norm, "CASES", cases)
    options = {"data_dir": None, "threads": 1, "output": tmp_path, "smoke": True}
    head_norm.main(**options, revision="abc")
    results = json.loads((tmp_path / "head_norm.json").read_text(encoding="utf-8"))
    small, large, other = results["cases"]
    assert tuple((case["head_norm_eps"], case["seed"]) for case in results["cases"]) == cases
    for case in results["cases"]:
        assert [run["chunk_size"] for run in case["runs"]] == [64, 16]
        assert all(len(run["losses"]) == len(run["gradient_norms"]) == 4 for run in case["runs"])
        assert 0 <= case["difference"] < 1e-3
    firsts = [case["runs"][0]["losses"][0] for case in results["cases"]]
    assert len(set(firsts)) == 3  # the epsilon and the seed reach the model
    text = scripts.tables.head_norm(results)
    norms = [run["gradient_norms"] for run in small["runs"]]
    row = f"| 1e-06 | 0 | {small['runs'][0]['losses'][3]:.3f}, {small['runs'][1]['losses'][3]:.3f} | "
    assert f"\n{row}{max(map(max, norms)):.1f} | - | {small['difference']:.1e} |\n" in text
    # With more steps the early ones are left out of one column.
    other["runs"][1]["gradient_norms"] = [9.0] * 10 + [2.0, 3.0]
    large["runs"][0]["failed"] = "not finite at step 1: losses nan"
    text = scripts.tables.head_norm(results)
    assert " | 9.0 | 3.0 | " in text
    assert "\n| 0.5 | 0 | not finite at step 1: losses nan | - | - | - |\n" in text

    monkeypatch.delenv("MESANET_DATA")
    with pytest.raises(typer.BadParameter, match=r"set MESANET_DATA to\) the folder that holds corpus/novels_train"):
        head_norm.main(**options)


def test_what_cannot_be_run_is_refused(scripts, tmp_path, monkeypatch):
    monkeypatch.delenv("MESANET_DATA", raising=False)
    with pytest.raises(typer.BadParameter, match=r"set MESANET_DATA to\) the folder that holds corpus/novels_train"):
        run(scripts, tmp_path)
    with pytest.raises(typer.BadParameter, match="has no folder 'corpus'"):
        run(scripts, tmp_path, data_dir=tmp_path)
    (tmp_path / "corpus").mkdir()
    with pytest.raises(typer.BadParameter, match="No such file"):
        run(scripts, tmp_path, data_dir=tmp_path)
    with pytest.raises(typer.BadParameter, match="add --smoke"):
        run(scripts, tmp_path, smoke=False)


README = "# Title\n<!-- results: training_curves -->\n<!-- end results -->\nrest\n"


def test_readme_is_filled_once_there_are_results(scripts, data, tmp_path):
    assert scripts.tables.render("nothing", tmp_path) == "nothing"
    results = run(scripts, tmp_path, steps=1, repeated_steps=1)
    text = scripts.tables.render(README, tmp_path)
    assert text.startswith("# Title\n<!-- results: training_curves -->\n| training on |")
    assert text.endswith("revision abc; from `kernels/benchmarks/training_curves.py`.\n<!-- end results -->\nrest\n")
    results["measured"]["float32"]["revision"] = None
    (tmp_path / "training_curves_cpu.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(SystemExit, match="names no git revision"):
        scripts.tables.render(README, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_is_compared_on_a_gpu(scripts, data):
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
    tokens = scripts.curves.read_tokens(data, tokenizer, 1000)
    curves = scripts.curves.Curves(scripts.curves.SMOKE, torch.device("cuda"), None, tokenizer, tokens, False)
    triton, reference = curves.float32()["runs"]
    assert (triton["backend"], reference["backend"]) == ("triton", "torch")
    assert triton["difference"] < 5e-3
    assert max(triton["residuals"]) <= 1e-4
