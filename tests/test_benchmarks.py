# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark in its smallest sizes on a CPU, what it holds to be right, and the table made from its results."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from modeling_mesanet.mesa import mesa_reference

BENCHMARKS = Path(__file__).parents[1] / "kernels" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch) -> SimpleNamespace:
    """The benchmark's modules, imported as its scripts import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_operators
    import readme_tables

    return SimpleNamespace(gpu=gpu_operators, tables=readme_tables)


def run(scripts, folder: Path, **options) -> dict:
    arguments = {"device": "cpu", "only": "", "revision": "abc", "output": folder, "seconds": 60, "smoke": True}
    scripts.gpu.main(**arguments | options)
    return json.loads((folder / "gpu_operators_cpu.json").read_text(encoding="utf-8"))


def test_smoke_run_measures_every_section(scripts, tmp_path):
    pytest.importorskip("matplotlib", reason="the train extra is not installed")
    # The cold start is a process of its own that imports everything again.
    sections = [name for name in scripts.gpu.SECTIONS if name != "cold"]
    results = run(scripts, tmp_path, only=",".join(sections))
    for section in sections:
        assert results[section], section
        assert not any({"failed", "failures", "skipped"} & row.keys() for row in results[section]), section
    for row in results["forward"] + results["backward"]:
        assert 0 < row["ms"] < math.inf
        assert row["error"] < 4e-3
    assert all(row["eager"]["us"] > 0 for row in results["decode"])
    for row in results["errors"]:
        assert row["errors"]["mesa, tolerance 1e-3"] < 1e-3
        assert row["errors"]["mesa, tolerance 1e-4"] < 2e-4
    assert {name: part["revision"] for name, part in results["measured"].items()} == dict.fromkeys(sections, "abc")
    assert (tmp_path / results["figure"]).read_bytes().startswith(b"\x89PNG")
    # A table is made of any results, also of those without the rows of its goals.
    assert scripts.tables.gpu_operators(results).startswith("| ")


def test_cold_start_runs_in_a_process_of_its_own(scripts, tmp_path, monkeypatch):
    # The run leads Triton to its own cache; this puts the variable back.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (row,) = run(scripts, tmp_path, only="cold")["cold"]
    assert row["operator"] == "mesa"
    assert min(row["import_s"], row["first_call_s"], row["second_call_s"]) > 0
    compile(scripts.gpu.FIRST_CALL["peer"], "the peer's", "exec")


def test_a_later_run_keeps_the_sections_that_committed_code_measured(scripts, tmp_path):
    run(scripts, tmp_path, only="neighbours,decode")
    results = run(scripts, tmp_path, only="decode", revision="def")
    revisions = {name: part["revision"] for name, part in results["measured"].items()}
    assert revisions == {"neighbours": "abc", "decode": "def"}
    assert {"neighbours", "decode"} <= results.keys()
    day = results["measured"]["decode"]["date"]
    text = scripts.tables.provenance(results)
    assert text == f"decode: {day}, revision def; neighbours: {day}, revision abc"
    run(scripts, tmp_path, only="decode", revision="abc-dirty")
    results = run(scripts, tmp_path, only="neighbours")
    assert list(results["measured"]) == ["neighbours"]
    assert "decode" not in results
    # With other versions nothing is kept.
    path = tmp_path / "gpu_operators_cpu.json"
    path.write_text(json.dumps(results | {"versions": {}}), encoding="utf-8")
    assert "neighbours" not in run(scripts, tmp_path, only="decode")


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_result_is_not_timed(scripts, tmp_path, monkeypatch, factor):
    right = scripts.gpu.mesa_attention

    def wrong(*inputs, **options):
        output = right(*inputs, **options)
        return output._replace(o=output.o * factor)

    monkeypatch.setattr(scripts.gpu, "mesa_attention", wrong)
    with pytest.raises(typer.Exit):
        run(scripts, tmp_path, only="forward,backward")
    results = json.loads((tmp_path / "gpu_operators_cpu.json").read_text(encoding="utf-8"))
    promised = [row for row in results["forward"] + results["backward"] if row["setting"] == "tolerance 1e-4"]
    assert promised
    assert all("ms" not in row and "relative error of " in row["failed"] for row in promised)


def test_rows_that_no_time_is_left_for_are_named(scripts, tmp_path):
    results = run(scripts, tmp_path, only="forward", seconds=0)
    assert all("ms" not in row and row["skipped"].startswith("no time left") for row in results["forward"])


def test_without_the_peer_one_sentence_says_so(scripts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert scripts.gpu.find_peer(torch.device("cuda")) is None
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("flash-linear-attention cannot be imported (")
    assert "only our columns are measured" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoke": False}, "add --smoke"),
        ({"only": "forward,backwards"}, "backwards: take some of cold, forward"),
    ],
)
def test_what_cannot_be_run_is_refused(scripts, tmp_path, options, message):
    with pytest.raises(typer.BadParameter, match=message):
        run(scripts, tmp_path, **options)


def test_dense_solve_is_the_reference(scripts):
    """Output and all gradients, with resets and pads, over several chunks and a rest."""
    scripts.gpu.family_inputs(16, 16, torch.device("cpu"))  # puts the tests' inputs on the path
    from mesa_inputs import make_inputs

    leaves = [tensor.requires_grad_() for tensor in make_inputs("mixed", 2, 150, 2, 16, 12)]
    expected, _ = mesa_reference(*leaves)
    actual = scripts.gpu.dense_solve(*leaves)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, theirs in (
        (actual, expected),
        *zip(*(torch.autograd.grad(o, leaves, weights) for o in (actual, expected)), strict=True),
    ):
        assert scripts.gpu.relative_error(ours, theirs) < 1e-11


def test_decoding_starts_from_the_states_of_the_operator(scripts):
    case = scripts.gpu.Case("easy", 2, 40, 2, 16)
    inputs = scripts.gpu.timed_inputs(case, torch.device("cpu"))
    _, expected = mesa_reference(*inputs)
    for ours, theirs in zip(scripts.gpu.DecodeStates.after(*inputs), expected, strict=True):
        # The keys are normalised before they are rounded to 16 bits.
        assert scripts.gpu.relative_error(ours, theirs) < 2e-3


def sample() -> dict:
    """Results as of a GPU, with made-up figures: every goal reached but that of one time and one family."""
    usual = {"kind": "easy", "batch": 16, "length": 2048, "heads": 12, "size": 128, "backward": False}

    def pair(setting: str, peer: float, ours: float | None, **changes) -> list[dict]:
        rows = [("peer", "30 steps", peer), ("mesa", setting, ours)]
        return [
            usual | {"operator": operator, "setting": name} | changes | ({} if ms is None else {"ms": ms})
            for operator, name, ms in rows
        ]

    def errors(family: str, peer: float, coarse: float, fine: float) -> dict:
        by_name = {"peer, 30 steps": peer, "mesa, tolerance 1e-3": coarse, "mesa, tolerance 1e-4": fine}
        return {"family": family, "length": 2048, "errors": by_name}

    easy = errors("easy", 4e-3, 3e-4, 4e-5)
    easy["errors"]["peer, 30 steps, float32 values"] = 2.6e-3
    decode = []
    for batch, peer, ours in ((1, 68, 10), (8, 72, 11), (64, 406, 90)):
        for operator, setting, us in (("peer", "30 steps", peer), ("mesa", "tolerance 1e-4", ours)):
            times = {"graph": {"us": us}, "eager": {"us": 2 * us}}
            decode.append({"operator": operator, "setting": setting, "batch": batch} | times)
    return {
        "gpu": "NVIDIA H200",
        "driver": "1.2",
        "versions": {"torch": "2.11", "triton": "3.6", "flash-linear-attention": "0.6.0"},
        "figure": "gpu_operators_H200.png",
        "measured": {"forward": {"date": "2030-01-02", "revision": "abcdef"}},
        "forward": [
            *pair("tolerance 1e-4", 5.5, 1.25),
            *pair("30 steps", 5.5, 2.75)[1:],
            *pair("tolerance 1e-4", 5.5, 3.0, kind="hard"),
            *pair("tolerance 1e-4", 5.8, None, batch=1, length=32768),
        ],
        "backward": [
            *pair("tolerance 1e-4", 16.4, 4.1)[:1],
            usual | {"operator": "mesa", "setting": "tolerance 1e-4", "failed": "ArithmeticError: wrong"},
        ],
        "decode": decode,
        "cold": [{"operator": "peer", "first_call_s": 60.0}, {"operator": "mesa", "first_call_s": 12.0}],
        "errors": [
            easy,
            errors("scream", 6.9e-2, 5e-5, 2e-5),
            errors("rank8", 4.2e-1, 6e-4, 4e-5),
            errors("power", 1e-2, 1e-4, 3e-4),
        ],
        "neighbours": [usual | {"operator": "gdn", "setting": "", "ms": 0.75}],
    }


GOAL_TABLE = """\
| | peer | goal on an H200 | ours | peer / ours |
|---|---|---|---|---|
| forward, 16 x 2048 | 5.5 ms | at most 1.6 ms | 1.25 ms | 4.4 |
| the same, 30 steps asked for | 5.5 ms | at most 2.6 ms | 2.75 ms, missed | 2.0 |
| the same, hard inputs | 5.5 ms | at most 3.2 ms | 3 ms | 1.8 |
| forward, 1 x 32768 | 5.8 ms | at most 1.8 ms | - | - |
| forward + backward, 16 x 2048 | 16.4 ms | at most 5.5 ms | wrong or broken | - |
| decode step, batch 1 | 68 us | at most 20 us | 10 us | 6.8 |
| decode step, batch 8 | 72 us | at most 22 us | 11 us | 6.5 |
| decode step, batch 64 | 406 us | at most 100 us | 90 us | 4.5 |
| decode step, batch 256 | - | at most 320 us | - | - |
| first forward + backward of a process, nothing compiled | 60 s | at most 15 s | 12 s | 5.0 |
| relative error of o, tolerance 1e-3: easy / near-constant keys / rank-8 keys | 2.6e-03 / 6.9e-02 / 4.2e-01 | \
at most 1e-03, everywhere | 3.0e-04 / 5.0e-05 / 6.0e-04 | 9 / 1,380 / 700 |
| relative error of o, tolerance 1e-4: easy / near-constant keys / rank-8 keys | 2.6e-03 / 6.9e-02 / 4.2e-01 | \
at most 2e-04, everywhere | 4.0e-05 / 2.0e-05 / 4.0e-05, missed by power | 65 / 3,450 / 10,500 |
"""


def test_goal_table(scripts):
    text = scripts.tables.gpu_operators(sample())
    assert text.startswith(GOAL_TABLE)
    assert "(kernels/benchmarks/results/gpu_operators_H200.png)" in text
    assert "136 and 20, 144 and 22, 812 and 180, - and - us" in text
    assert "2030-01-02, revision abcdef" in text
    assert "16 x 2048, ms: Gated DeltaNet 0.75." in text


README = "# Title\n<!-- results: gpu_operators -->\nold\n<!-- end results -->\nrest\n"


def test_readme_is_filled_from_the_results_of_each_machine(scripts, tmp_path):
    assert scripts.tables.render(README, tmp_path) == README
    assert scripts.tables.render("nothing", tmp_path) == "nothing"
    for gpu in ("H200", "A100"):
        (tmp_path / f"gpu_operators_{gpu}.json").write_text(json.dumps(sample() | {"gpu": gpu}), encoding="utf-8")
    text = scripts.tables.render(README, tmp_path)
    assert text.startswith("# Title\n<!-- results: gpu_operators -->\n| | peer |")
    assert text.endswith("<!-- end results -->\nrest\n")
    assert text.index("\nA100, driver 1.2") < text.index("\nH200, driver 1.2")
    assert "\nold\n" not in text
    assert scripts.tables.render(text, tmp_path) == text
    with pytest.raises(SystemExit, match="no place for them: add <!-- results: gpu_operators -->"):
        scripts.tables.render("nothing", tmp_path)


@pytest.mark.parametrize(("revision", "message"), [(None, "names no git revision"), ("abc-dirty", "uncommitted")])
def test_results_without_a_commit_are_refused(scripts, tmp_path, revision, message):
    results = sample()
    results["measured"]["decode"] = {"date": "2030-01-02", "revision": revision}
    (tmp_path / "gpu_operators_H200.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        scripts.tables.render(README, tmp_path)


def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """The interpreter takes programs that the compiler refuses; 8.6 has the plain solve, 9.0 the one for Hopper."""
    pytest.importorskip("triton", reason="triton is not installed; nothing can be compiled")
    options = {"--sizes": "64", "--devices": "86,90", "--around": "86"}
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "shared_memory.py"), *itertools.chain(*options.items())],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "does not compile" not in run.stdout, run.stderr[-2000:]
    operator = ("solve_chunks, backward", "solve_chunks_hopper, backward", "gradients", "decode")
    convolutions = ("short_convolution, packed", "short_convolution_backward", "convolve_chunks")
    linears = ("norm_linears", "add_linear", "norm_gated_linears", "norm_row", "norm_tile", "gate_rows")
    for kernel in (*operator, *convolutions, *linears, "head_norm_backward", "gates", "decode_gluon, layer"):
        assert f"| {kernel} | 64 |" in run.stdout
    assembly = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert any("shfl.sync.bfly" in text for text in assembly)
    assert [name for text in assembly for name in unequal_sums(text)] == []


def unequal_sums(assembly: str) -> list[str]:
    """Registers with a sum over threads that differs from thread to thread.

    That is where a thread's own product is fused into the addition of another's, or may still be: the one is not
    rounded, the other is. A loop that ends by such a sum may end in some threads only, and the kernel then never does.
    """
    products, received, unequal = set(), set(), []
    for line in assembly.splitlines():
        operation, *operands = line.replace(",", " ").split() or [""]
        if operation.startswith("mul") and operation.endswith("f32"):
            products.add(operands[0])
        elif operation.startswith("shfl.sync.bfly"):
            received.add(operands[0])
        elif operation.startswith("fma.rn") and operands[3].rstrip(";") in received:
            unequal.append(operands[0])
        elif operation.startswith("add") and operation.endswith("f32"):
            first, second = (operand.rstrip(";") for operand in operands[1:3])
            if (first in received and second in products) or (second in received and first in products):
                unequal.append(operands[0])
    return unequal


def test_unequal_sums_are_found():
    shuffle = "mul.f32 %r1, %r0, %r0;\n\tshfl.sync.bfly.b32 \t%r2, %r1, 8, 31, -1;\n"
    assert unequal_sums(shuffle + "fma.rn.f32 %r3, %r0, %r0, %r2;") == ["%r3"]
    assert unequal_sums(shuffle + "add.f32 \t%r3, %r1, %r2;") == ["%r3"]
    assert unequal_sums(shuffle.replace("mul", "add") + "add.f32 %r3, %r1, %r2;") == []


def test_drafted_tokens_are_timed_and_compared(scripts, tmp_path, monkeypatch):
    import speculative_decoding

    from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = MesaNetConfig(vocab_size=6144, value_head_dim=16, intermediate_size=64, **sizes)
    monkeypatch.setattr(MesaNetForCausalLM, "from_pretrained", lambda *_, **__: MesaNetForCausalLM(config))
    options = {"device": "cpu", "models": "bundled", "dtype": "float32", "threads": 1, "revision": "abc"}
    speculative_decoding.main(**options, new_tokens=12, prompts=1, repeats=1, output=tmp_path)
    results = json.loads((tmp_path / "speculative_decoding.json").read_text(encoding="utf-8"))
    rows, steps = results["models"]["bundled"].values()
    assert all(row["same_tokens"] == row["tokens"] == 12 for row in rows)
    assert all(row["logit_steps_apart"] is None for row in rows)
    assert (rows[0]["ratio"], rows[0]["tokens_per_step"]) == (1.0, 1.0)
    # Random weights repeat one token, which prompt lookup finds.
    assert rows[2]["tokens_per_step"] > 1.3
    assert all(0 < row[name] < math.inf for row in steps for name in ("plain_ms", "rollback_ms"))
    assert results["revision"] == "abc"
    text = scripts.tables.speculative_decoding(results)
    assert text.startswith("| model | drafts | tokens/s |")
    assert f"\n| bundled | greedy | {rows[0]['tokens_per_second']:.1f} | 1.00 | 1.00 | 12 of 12 |\n" in text
    assert f"bundled, 1: {steps[0]['plain_ms']:.1f} ({steps[0]['rollback_ms']:.1f}), " in text
    assert "1 of the threads of " in text
    assert text.endswith("revision abc; from `kernels/benchmarks/speculative_decoding.py`.")
    rows[1] |= {"same_tokens": 3, "logit_steps_apart": 1.0}
    assert " | 3 of 12, then logits 1 steps of float32 apart |\n" in scripts.tables.speculative_decoding(results)
    model, tokens = MesaNetForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    logits = model(tokens[:, :2]).logits[0, -1].detach()
    other = torch.tensor([[1, 2, int(logits.argmax())]])
    apart = speculative_decoding.distance(model, tokens, other)
    assert apart == pytest.approx(
        float((logits.max() - logits[3]) / (torch.nextafter(logits.max(), torch.tensor(torch.inf)) - logits.max()))
    )
    assert speculative_decoding.distance(model, other, other) == 0


def test_int8_weights_are_weighed_scored_and_timed(scripts, tmp_path, monkeypatch):
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    import int8_weights

    text = tmp_path / "LICENSE"
    text.write_text(int8_weights.TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    monkeypatch.setattr(int8_weights, "TEXT", text)
    int8_weights.main(presets="", threads=1, repeats=1, new_tokens=2, revision="abc", output=tmp_path)
    results = json.loads((tmp_path / "int8_weights.json").read_text(encoding="utf-8"))
    model = int8_weights.load_checkpoint(None)
    head, every = model.lm_head.weight.numel(), sum(tensor.numel() for tensor in model.parameters())
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        plain, int8 = results["bundled"][dtype].values()
        # A few tensors stay float32 whatever the rest is; the tied head is there once.
        assert width * every <= plain["bytes"] < width * every * 1.01
        assert every + (width - 1) * head < int8["bytes"] < 0.7 * plain["bytes"]
        assert 0 < abs(int8["loss"] - plain["loss"]) < 0.02
        assert 1 < plain["loss"] < math.log(len(model.get_input_embeddings().weight))
        assert all(0 < rate < math.inf for one in (plain, int8) for rate in one["tokens_per_second"].values())
    text = scripts.tables.int8_weights(results | {"preset_bytes": {"1B": PRESET_BYTES}})
    assert text.startswith(
        "| | float32 | int8 beside it | bfloat16 | int8 beside it |\n|---|---|---|---|---|\n| bundled"
    )
    assert "\n| 1B size: MB of all tensors | 4,000 | 2,000 | 1,900 | 1,000 |\n" in text
    assert "revision abc; from `kernels/benchmarks/int8_weights.py`" in text


PRESET_BYTES = {"float32": {"plain": 4e9, "int8": 2e9}, "bfloat16": {"plain": 1.9e9, "int8": 1e9}}


def test_int8_weights_of_a_published_size(scripts, monkeypatch):
    pytest.importorskip("torchao", reason="int8 weights need torchao")
    import int8_weights

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    tiny = int8_weights.MesaNetConfig(vocab_size=100, value_head_dim=32, intermediate_size=128, **sizes)
    monkeypatch.setattr(int8_weights.MesaNetConfig, "preset", lambda name: {"tiny": tiny}[name])
    weights = int8_weights.preset_bytes("tiny")
    parameters = sum(tensor.numel() for tensor in int8_weights.MesaNetForCausalLM(tiny).parameters())
    assert weights["float32"]["plain"] == 4 * parameters
    assert parameters < weights["bfloat16"]["int8"] < weights["float32"]["int8"] < 3 * parameters


def test_int8_benchmark_without_torchao(scripts, tmp_path, monkeypatch):
    import int8_weights

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(typer.BadParameter, match="int8 weights need torchao"):
        int8_weights.main(output=tmp_path)
