# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generate() in its smallest sizes on a CPU, what it does not time, and the table of its results."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

BENCHMARKS = Path(__file__).parents[1] / "kernels" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch) -> SimpleNamespace:
    """The benchmark's modules, imported as its scripts import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_generation
    import plot_generation
    import readme_tables

    return SimpleNamespace(bench=gpu_generation, plot=plot_generation, tables=readme_tables)


def run(scripts, folder: Path, **options) -> dict:
    arguments = {"device": "cpu", "only": "", "revision": "abc", "output": folder, "seconds": 200, "smoke": True}
    scripts.bench.main(**arguments | options)
    return json.loads((folder / "gpu_generation_cpu.json").read_text(encoding="utf-8"))


def test_smoke_run_measures_every_section(scripts, tmp_path):
    pytest.importorskip("matplotlib", reason="the train extra is not installed")
    sections = [name for name in scripts.bench.SECTIONS if name != "cold"]  # processes of their own
    results = run(scripts, tmp_path, only=",".join(sections))
    for section in sections:
        assert results[section], section
        assert not any({"failed", "skipped"} & row.keys() for row in results[section]), section
    plan = results["plan"]
    measured = {
        (row["operator"], row["cache"], row["plain"], row["batch"], row["context"]) for row in results["steps"]
    }
    assert len(measured) == 8, "ours with graphs and without, Llama's static and dynamic, short and far"
    for row in results["steps"]:
        assert 0 < row["ms"] < math.inf
        assert row.get("error", 0) < 1e-5
        assert ("error" in row) == (row["operator"] == "mesa" or not row["context"])
        if row["operator"] == "mesa" and not row["plain"]:
            assert (row["recompiled"], row["graph_breaks"]) == (0, 0)
    assert [row["operator"] for row in results["prompt"]] == ["mesa", "llama"]
    assert all(row["error"] < 1e-5 and 0 < row["ms"] < math.inf for row in results["prompt"])
    assert {row["chunk"] for row in results["prefill"]} == {plan["prefill"], plan["prefill_chunk"]}
    assert all(row["error"] < 1e-5 for row in results["prefill"] if row["chunk"] < row["tokens"])
    assert [(row["operator"], row["chunk"]) for row in results["chunks"]] == [
        (operator, plan["stream_chunk"]) for operator in ("mesa", "llama")
    ]
    assert all(row["error"] < 1e-5 and 0 < row["ms"] < math.inf for row in results["chunks"])
    read, states, written = results["memory"]
    assert len(read["peak_mib"]) == len(plan["streamed"])
    assert states["finite"]
    assert states["heads"] > 0
    assert states["error"] < 1e-5
    assert written["new_tokens"] == plan["written"][-1]
    assert len(written["peak_mib"]) == len(plan["written"])
    assert (tmp_path / results["figure"]).read_bytes().startswith(b"\x89PNG")
    assert scripts.tables.gpu_generation(results).startswith("| ms a step")


def test_first_token_of_a_process_of_its_own(scripts, tmp_path):
    (row,) = run(scripts, tmp_path, only="cold")["cold"]
    assert min(row["import_s"], row["first_token_s"], row["first_steps_s"], row["again_s"]) > 0


@pytest.mark.parametrize(("operator", "contexts"), [("mesa", (0, 24)), ("peer", (0,))])
def test_wrong_logits_are_not_timed(scripts, tmp_path, monkeypatch, operator, contexts):
    bench, build = scripts.bench, scripts.bench.build

    def negate(module, arguments, options, output):
        if options.get("past_key_values") is not None:
            output.logits = -output.logits
        return output

    def wrong(operator, *arguments):
        model = build("mesa", *arguments)
        model.register_forward_hook(negate, with_kwargs=True)
        return model

    monkeypatch.setattr(bench, "build", wrong)
    # However much the peer's rounding errors grow.
    monkeypatch.setattr(bench.Bench, "sensitivity", lambda self, model: 3.0)
    cases = [bench.Case(operator, "dynamic", 1, context) for context in contexts]
    monkeypatch.setattr(bench.Bench, "cases", lambda self: cases)
    # A peer that fails is no fault of ours.
    with pytest.raises(typer.Exit) if operator == "mesa" else nullcontext():
        run(scripts, tmp_path, only="steps")
    rows = json.loads((tmp_path / "gpu_generation_cpu.json").read_text(encoding="utf-8"))["steps"]
    assert len(rows) == len(contexts)
    assert all("ms" not in row and "relative error of logits" in row["failed"] for row in rows)


def test_sensitivity_is_that_of_rounding(scripts):
    bench = scripts.bench
    device, plan = torch.device("cpu"), bench.SMOKE
    found = []
    for dtype in ("float32", "bfloat16"):
        run = bench.Bench(bench.Clock(device, 60), replace(plan, dtype=dtype), None)
        found.append(run.sensitivity(run.model("mesa")))
    assert 0 < found[0] < 1e-5
    assert 1e-4 < found[1] < 0.1


def test_states_that_are_off_are_found(scripts):
    bench = scripts.bench
    device, plan = torch.device("cpu"), bench.SMOKE
    model = bench.build("mesa", plan.small_model, torch.float32, device)
    _, cache, inputs = bench.Bench(bench.Clock(device, 60), plan, None).stream(model)
    found = bench.compare_states(model, cache, inputs)
    assert found["finite"]
    assert found["error"] < 1e-5
    cache.layers[1].recurrent_states[1].mul_(1.01)
    assert bench.compare_states(model, cache, inputs)["error"] == pytest.approx(0.01, rel=0.01)
    cache.layers[0].recurrent_states[0][0, 0, 0, 0] = torch.inf
    found = bench.compare_states(model, cache, inputs)
    assert not found["finite"]
    assert math.isnan(found["error"])
    with pytest.raises(ArithmeticError, match="no head has forgotten enough"):
        bench.compare_states(model, cache, [x[:, -4:] for x in inputs])


def test_rows_that_no_time_is_left_for_are_named(scripts, tmp_path):
    results = run(scripts, tmp_path, seconds=0)
    rows = [row for section in scripts.bench.SECTIONS for row in results[section]]
    assert all("ms" not in row for row in rows)
    assert all(row["skipped"].startswith("no time left") for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"smoke": False}, "add --smoke"), ({"only": "steps,stairs"}, "stairs: take some of steps, cold")],
)
def test_what_cannot_be_run_is_refused(scripts, tmp_path, options, message):
    with pytest.raises(typer.BadParameter, match=message):
        run(scripts, tmp_path, **options)


def sample() -> dict:
    """Results as of a GPU, with made-up figures."""

    def step(operator: str, cache: str, batch: int, context: int, ms: float, plain: bool = False) -> dict:
        row = {"operator": operator, "cache": cache, "batch": batch, "context": context, "plain": plain}
        row["parameters"] = 938e6
        more = {"warmup_s": 20.0 + batch, "recompiled": 0} if operator == "mesa" and not plain else {}
        return row | {"ms": ms, "tokens_per_second": 1e3 * batch / ms} | more

    return {
        "gpu": "NVIDIA H200",
        "driver": "1.2",
        "versions": {"torch": "2.11", "triton": "3.6", "transformers": "5.17", "flash-linear-attention": "0.6.0"},
        "measured": {"steps": {"date": "2030-01-02", "revision": "abcdef"}},
        "figure": "gpu_generation_H200.png",
        "plan": {"dtype": "bfloat16", "prompt": 64, "new_tokens": 128, "eager_tokens": 40, "prefill": 32768},
        "steps": [
            step("mesa", "dynamic", 1, 0, 1.9),
            step("mesa", "dynamic", 8, 0, 2.2),
            step("mesa", "dynamic", 1, 32768, 1.91),
            step("mesa", "dynamic", 1, 0, 20, plain=True),
            step("peer", "dynamic", 1, 0, 56.8),
            step("llama", "static", 1, 0, 3),
            step("llama", "static", 1, 32768, 9),
            {"operator": "llama", "cache": "dynamic", "batch": 1, "context": 0, "plain": False, "failed": "OOM: all"},
        ],
        "prefill": [
            {"operator": "mesa", "tokens": 32768, "chunk": 32768, "ms": 300.0, "kernels_ms": {"the solver": 280.0}},
            {"operator": "peer", "tokens": 32768, "chunk": 32768, "ms": 450.0},
            {"operator": "mesa", "tokens": 32768, "chunk": 8192, "ms": 310.0, "kernels_ms": {"the solver": 250.0}},
            {"operator": "peer", "tokens": 32768, "chunk": 8192, "ms": 930.0},
        ],
        "chunks": [
            {"operator": "mesa", "tokens": 32768, "chunk": 1024, "ms": 320.0},
            {"operator": "peer", "tokens": 32768, "chunk": 1024, "ms": 2000.0},
        ],
        "prompt": [
            {"operator": "mesa", "tokens": 64, "ms": 36.0, "kernels_ms": {"states": 2.0, "other": 1.0}},
            {"operator": "llama", "tokens": 64, "ms": 20.0},
        ],
        "cold": [
            {"operator": "mesa", "import_s": 4.0, "first_token_s": 17.0, "first_steps_s": 2.5},
        ],
        "memory": [
            {"what": "read", "tokens": [1024, 1048576], "peak_mib": [400, 400], "growth": 0.0},
            {"what": "states", "tokens": 1048576, "finite": True, "heads": 70, "reread": 4096, "error": 2e-3},
            {"what": "written", "tokens": [1024, 50000], "peak_mib": [500, 510], "growth": 0.02},
        ],
    }


STEP_TABLE = """\
| short, batch 1 | at most 2 | 1.90 (526 tokens/s) | 20.00 (50 tokens/s) | 56.80 (17.6 tokens/s) \
| 3.00 (333 tokens/s) | failed |
| short, batch 8 | at most 2.1 | 2.20 (3,636 tokens/s), missed | - | - | - | - |
| 32,768 tokens, batch 1 | at most 2 | 1.91 (524 tokens/s) | - | - | 9.00 (111 tokens/s) | - |
"""


def test_table(scripts):
    text = scripts.tables.gpu_generation(sample())
    assert text.startswith("| ms a step through `generate()` | goal on an H200 | ours | ours, without")
    assert STEP_TABLE in text
    for sentence in (
        "Not timed: Llama, dynamic cache, short, batch 1 (OOM: all).",
        "at once ours 300 ms (1.5 times the peer's speed, missed), peer 450 ms; "
        "in chunks of 8,192 ours 310 ms (3.0 times the peer's speed, the GPU is busy for 250 ms of them), "
        "peer 930 ms.",
        "Where the GPU's time goes in our pass at once, ms: the solver 280.",
        "1,024 at a time (ours by `read_tokens`, its recording included): ours 320 ms, peer 2,000 ms.",
        "Reading 64 tokens, where the processor is what takes time: ours 36 ms, Llama 20 ms; "
        "ours keeps the GPU busy for 3 ms of them.",
        "at most 20 s wanted: 21.0 s, missed, 4.0 s of them to import; eight tokens then take 2.5 s.",
        "0.00% from 1,024 to 1,048,576 tokens read as a prompt; 2.00%, missed from 1,024 to 50,000 tokens written.",
        "all are finite; those of the 70 heads",
        "The first run of ours, which compiles the kernels and records the step, takes up to 28 s; "
        "other prompts, lengths and pads compile nothing more.",
        "(kernels/benchmarks/results/gpu_generation_H200.png)",
        "2030-01-02, revision abcdef",
    ):
        assert sentence in text, sentence


def test_kernels_are_told_apart(scripts):
    names = {
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_128x256_64x3_tn_align2>": "matrix products",
        "solve_chunks_hopper_kernel": "the solver",
        "carry_states_kernel": "states",
        "void at::native::vectorized_elementwise_kernel<8>": "norms, gates and SiLU",
        "Memcpy DtoD (Device -> Device)": "other",
    }
    assert {name: scripts.bench.kernel_group(name) for name in names} == names


def test_figure_shows_what_has_several_points(scripts):
    assert scripts.plot.curves(sample()) == {
        "MesaNet, batch 1": [(64, 1.9), (32768, 1.91)],
        "Llama, compiled for a static cache, batch 1": [(64, 3), (32768, 9)],
    }
