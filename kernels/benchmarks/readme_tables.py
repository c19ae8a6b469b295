# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of `results/` into the READMEs: `python kernels/benchmarks/readme_tables.py`.

A table NAME stands between `<!-- results: NAME -->` and `<!-- end results -->` and comes from `results/NAME.json`, or
from each `results/NAME_<machine>.json`; that of the synthetic tasks from `eval/results/`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from modeling_mesanet.files import replacing

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
ROOT = BENCHMARKS.parents[1]
EVALUATIONS = ROOT / "eval" / "results"


def cpu_generation(results: dict) -> str:
    """Prefill and decode on a CPU beside the per-token loop."""
    lines = ["| tokens/s | MesaNet | per-token loop | ratio |", "|---|---|---|---|"]
    for name, row in results["rows"].items():
        ours, loop = row["tokens_per_second"], row["loop_tokens_per_second"]
        lines.append(f"| {name} | {ours:,.0f} | {loop:,.0f} | {row['ratio']:.1f} |")
    versions = results["versions"]
    lines.append("")
    lines.append(
        f"Bundled checkpoint, float32, {results['threads']} threads of {results['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, revision {results['revision']}; medians, from "
        "`kernels/benchmarks/cpu_generation.py`. The loop computes the layer as defined, one dense solve a token, "
        "over 256 tokens of prompt; for one token with heads of 64 that is a single library call, which takes about "
        "as long as the dozen small products of the iteration."
    )
    return "\n".join(lines)


def int8_weights(results: dict) -> str:
    """Loss, speed and bytes with weights in eight bits, beside the same without."""
    bundled, presets = results["bundled"], results["preset_bytes"]
    kinds = [(dtype, kind) for dtype in bundled for kind in bundled[dtype]]
    heads = ["int8 beside it" if kind == "int8" else dtype for dtype, kind in kinds]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(kinds)) + "|"]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    measured = [bundled[dtype][kind] for dtype, kind in kinds]
    row("bundled checkpoint: MB of all tensors", [f"{one['bytes'] / 1e6:.1f}" for one in measured])
    row(f"loss on the text of {results['text']['file']}", [f"{one['loss']:.4f}" for one in measured])
    for batch in measured[0]["tokens_per_second"]:
        row(f"tokens/s, batch {batch}", [f"{one['tokens_per_second'][batch]:,.0f}" for one in measured])
    for name, sizes in presets.items():
        row(f"{name} size: MB of all tensors", [f"{sizes[dtype][kind] / 1e6:,.0f}" for dtype, kind in kinds])
    versions = results["versions"]
    lines.append("")
    lines.append(
        f"Loss in nats per token over {results['text']['tokens']:,} tokens; greedy decoding, the fastest run of each "
        f"on {results['threads']} of the threads of {results['cpu']}, torch {versions['torch']}, torchao "
        f"{versions['torchao']}, transformers {versions['transformers']}; {results['date']}, revision "
        f"{results['revision']}; from `kernels/benchmarks/int8_weights.py`."
    )
    return "\n".join(lines)


def speculative_decoding(results: dict) -> str:
    """Decoding with drafts beside plain greedy decoding, and what a step of several tokens costs."""
    lines = [
        "| model | drafts | tokens/s | greedy alone = 1 | tokens a step | as greedy |",
        "|---|---|---|---|---|---|",
    ]
    costs = []
    for name, model in results["models"].items():
        for row in model["generation"]:
            apart = row["logit_steps_apart"]
            tie = "" if apart is None else f", then logits {apart:.2g} steps of {results['dtype']} apart"
            lines.append(
                f"| {name} | {row['method']} | {row['tokens_per_second']:.1f} | {row['ratio']:.2f} | "
                f"{row['tokens_per_step']:.2f} | {row['same_tokens']} of {row['tokens']}{tie} |"
            )
        shown = [f"{row['tokens']}: {row['plain_ms']:.1f} ({row['rollback_ms']:.1f})" for row in model["steps"]]
        costs.append(f"{name}, {', '.join(shown)}")
    versions = results["versions"]
    threads = "" if results["driver"] else f"{results['threads']} of the threads of "
    lines.append("")
    lines.append(
        "Milliseconds a step of so many tokens (and with all but one taken back): "
        f"{'; '.join(costs)}. {results['prompts']} prompts, {results['new_tokens']} new tokens each, "
        f"{results['dtype']}; {threads}{results['machine']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {results['date']}, revision {results['revision']}; from "
        "`kernels/benchmarks/speculative_decoding.py`."
    )
    return "\n".join(lines)


def synthetic(results: dict) -> str:
    """Accuracy of the layers on the synthetic tasks, and of a grid of learning rates the best.

    Raises:
        SystemExit: the runs differ in machine or versions.
    """
    table, runs = results["table"], results["runs"]
    layers = list(dict.fromkeys(row["layer"] for row in table))
    lines = [f"| accuracy, % | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
    for task, test in dict.fromkeys((row["task"], row["test"]) for row in table):
        rates = sorted({run["learning_rate"] for run in runs if run["task"] == task})
        cells = []
        for layer in layers:
            row = find(results, "table", task=task, test=test, layer=layer)
            rate = f" (at {row['learning_rate']:g})" if len(rates) > 1 and not test else ""
            cells.append(f"{100 * row['accuracy']:.1f}{rate}")
        name = f"{task}, {test}" if test else f"{task}, rates {', '.join(f'{rate:g}' for rate in rates)}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    places = {(run["device"], run["versions"]["torch"], run["versions"]["transformers"]) for run in runs}
    if len(places) > 1:
        raise SystemExit("the synthetic tasks were trained on several machines or versions: train them in one place.")
    device, torch, transformers = next(iter(places))
    steps = [run["steps"] for run in runs]
    lines.append("")
    lines.append(
        f"One seed, {min(steps):,} to {max(steps):,} steps, {device}, torch {torch}, transformers {transformers}; "
        "from `mesanet synthetic`."
    )
    return "\n".join(lines)


EARLY_STEPS = 10  # many spikes are among them, so one column leaves them out


def head_norm(results: dict) -> str:
    """Gradient norms and losses by the epsilon of the heads' norm, of two runs each."""
    plan, versions = results["plan"], results["versions"]
    lines = [
        f"| `head_norm_eps` | seed of the weights | loss at step {plan['steps']}, both runs | largest gradient norm | "
        f"from step {EARLY_STEPS + 1} on | largest relative difference of the two losses |",
        "|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        cells = next(([run["failed"], "-", "-", "-"] for run in case["runs"] if "failed" in run), None)
        if cells is None:
            norms = [run["gradient_norms"] for run in case["runs"]]
            late = [norm for run in norms for norm in run[EARLY_STEPS:]]
            cells = [
                ", ".join(f"{run['losses'][-1]:.3f}" for run in case["runs"]),
                f"{max(map(max, norms)):.1f}",
                f"{max(late):.1f}" if late else "-",
                f"{case['difference']:.1e}",
            ]
        lines.append(f"| {case['head_norm_eps']:g} | {case['seed']} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"{plan['layers']} layers of {plan['hidden_size']}, {plan['heads']} heads of {plan['head_dim']}, MLP "
        f"{plan['intermediate_size']}, {plan['batch']} x {plan['length']} tokens of the novels a step, "
        f"{plan['steps']} steps of AdamW in float32 with a peak rate of {plan['learning_rate']:g}, gradients clipped "
        f"at {plan['gradient_clip']:g}; gradient norms before clipping, the larger of both runs. Torch path on "
        f"{results['threads']} of the threads of {results['cpu']}, torch {versions['torch']}; {results['date']}, "
        f"revision {results['revision']}; from `kernels/benchmarks/head_norm.py`."
    )
    return "\n".join(lines)


# What is aimed at on an H200: a name, the section and what is equal in its rows, our solver setting, the measure, and
# the largest value wanted.
FORWARD = {"batch": 16, "length": 2048, "heads": 12, "size": 128, "kind": "easy"}
LONG, HARD = FORWARD | {"batch": 1, "length": 32768}, FORWARD | {"kind": "hard"}
TIME_GOALS = (
    ("forward, 16 x 2048", "forward", FORWARD, "tolerance 1e-4", 1.6),
    ("the same, 30 steps asked for", "forward", FORWARD, "30 steps", 2.6),
    ("the same, hard inputs", "forward", HARD, "tolerance 1e-4", 3.2),
    ("forward, 1 x 32768", "forward", LONG, "tolerance 1e-4", 1.8),
    ("forward + backward, 16 x 2048", "backward", FORWARD, "tolerance 1e-4", 5.5),
)
DECODE_GOALS = {1: 20, 8: 22, 64: 100, 256: 320}  # microseconds by batch
FIRST_CALL_GOAL = 15  # seconds
ERROR_GOALS = {"tolerance 1e-3": 1e-3, "tolerance 1e-4": 2e-4}  # in every family of inputs
SHOWN_FAMILIES = {"easy": "easy", "scream": "near-constant keys", "rank8": "rank-8 keys"}
CURVE_SIZES = {"gradient_norms": ".2f", "residuals": ".1e"}
NEIGHBOURS = {"gdn": "Gated DeltaNet", "gla": "gated linear attention", "sdpa": "flash attention (SDPA)"}


def find(results: dict, section: str, **wanted) -> dict:
    """The first row of a section in which all of `wanted` is so; empty where there is none."""
    rows = results.get(section, [])
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def significant(value: float) -> str:
    """Three digits, or all in front of the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def provenance(results: dict) -> str:
    """The days and revisions of the sections, which are named where they differ."""
    groups: dict[str, list[str]] = {}
    for section, measured in results["measured"].items():
        groups.setdefault(f"{measured['date']}, revision {measured['revision']}", []).append(section)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(sections)}: {group}" for group, sections in groups.items())


def goal_row(name: str, unit: str, goal: float, peer: float | None, ours: float | None, failed: str | None) -> str:
    """One line of the goal table; a goal that is not reached is called missed."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{significant(value)} {unit}"

    # Written so that NaN misses.
    missed = ", missed" if ours is not None and not ours <= goal else ""
    ratio = f"{peer / ours:.1f}" if peer and ours else "-"
    return f"| {name} | {shown(peer)} | at most {goal:g} {unit} | {failed or shown(ours) + missed} | {ratio} |"


def error_row(results: dict, setting: str, goal: float) -> str:
    """Errors of the families shown; a family beyond the goal, shown or not, is named."""
    rows = [find(results, "errors", family=family)["errors"] for family in SHOWN_FAMILIES]
    ours = [row.get(f"mesa, {setting}") for row in rows]
    # Where the peer does not take float32 values, its output in bfloat16 stands.
    peer = [row.get("peer, 30 steps, float32 values", row.get("peer, 30 steps")) for row in rows]

    def shown(errors: list[float | None]) -> str:
        return " / ".join("-" if error is None else f"{error:.1e}" for error in errors)

    ratios = [f"{a / b:,.0f}" if a and b else "-" for a, b in zip(peer, ours, strict=True)]
    everywhere = [(row["family"], row["errors"].get(f"mesa, {setting}")) for row in results["errors"]]
    beyond = dict.fromkeys(family for family, error in everywhere if error is not None and not error <= goal)
    missed = f", missed by {', '.join(beyond)}" if beyond else ""
    return (
        f"| relative error of o, {setting}: {' / '.join(SHOWN_FAMILIES.values())} | {shown(peer)} | "
        f"at most {goal:.0e}, everywhere | {shown(ours)}{missed} | {' / '.join(ratios)} |"
    )


def gpu_operators(results: dict) -> str:
    """The Mesa operator beside flash-linear-attention's, and the goals."""
    lines = ["| | peer | goal on an H200 | ours | peer / ours |", "|---|---|---|---|---|"]
    for name, section, case, setting, goal in TIME_GOALS:
        peer = find(results, section, operator="peer", setting="30 steps", **case)
        ours = find(results, section, operator="mesa", setting=setting, **case)
        failed = "wrong or broken" if "failed" in ours else None
        lines.append(goal_row(name, "ms", goal, peer.get("ms"), ours.get("ms"), failed))
    eager = []
    for batch, goal in DECODE_GOALS.items():
        peer = find(results, "decode", operator="peer", setting="30 steps", batch=batch)
        ours = find(results, "decode", operator="mesa", setting="tolerance 1e-4", batch=batch)
        failed = "wrong or broken" if "failed" in ours else None
        times = [row.get("graph", {}).get("us") for row in (peer, ours)]
        lines.append(goal_row(f"decode step, batch {batch}", "us", goal, *times, failed))
        times = [row.get("eager", {}).get("us") for row in (peer, ours)]
        eager.append(" and ".join("-" if us is None else significant(us) for us in times))
    peer, ours = (find(results, "cold", operator=operator) for operator in ("peer", "mesa"))
    failed = "wrong or broken" if "failed" in ours else None
    seconds = [row.get("first_call_s") for row in (peer, ours)]
    name = "first forward + backward of a process, nothing compiled"
    lines.append(goal_row(name, "s", FIRST_CALL_GOAL, *seconds, failed))
    if "errors" in results:
        lines += [error_row(results, setting, goal) for setting, goal in ERROR_GOALS.items()]

    versions = results["versions"]
    around = [
        f"{name} {significant(row['ms'])}"
        for operator, name in NEIGHBOURS.items()
        if "ms" in (row := find(results, "neighbours", operator=operator, backward=False, **FORWARD))
    ]
    lines.append("")
    if results["figure"]:
        lines += [f"![times and errors](kernels/benchmarks/results/{results['figure']})", ""]
    lines.append(
        f"{results['gpu']}, driver {results['driver']}, torch {versions['torch']}, triton {versions['triton']}, peer: "
        f"flash-linear-attention {versions['flash-linear-attention']} at its 30 steps; {provenance(results)}. "
        "bfloat16, 12 heads, K = V = 128; ours at tolerance 1e-4 where the row does not say "
        "otherwise; medians, with cold caches, from `kernels/benchmarks/gpu_operators.py`, which compares our result "
        "with float64 before it times it. Decode steps are replayed as a CUDA graph; called one by one from Python, "
        f"peer and ours take {', '.join(eager)} us."
        + (f" Forward of other layers on the same machine, 16 x 2048, ms: {', '.join(around)}." if around else "")
    )
    return "\n".join(lines)


CURVE_FAMILIES = SHOWN_FAMILIES | {"repeat": "one token repeated"}
CURVE_ERRORS = {
    "ours, tolerance 1e-3": ("mesa, tolerance 1e-3",),
    "ours, tolerance 1e-4": ("mesa, tolerance 1e-4",),
    "ours, 30 steps": ("mesa, 30 steps",),
    # Where the peer does not take float32 values, its output in bfloat16 stands.
    "peer, 30 steps": ("peer, 30 steps, float32 values", "peer, 30 steps"),
}


def curve_row(text: str, row: dict, goal: float | None = None) -> str:
    """One line of the table of trainings; a run whose losses differ by more than the goal is called missed."""
    losses = row["losses"]
    shown = f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else "-"
    largest = [f"{max(row[key]):{form}}" if losses else "-" for key, form in CURVE_SIZES.items()]
    difference = row.get("difference")
    differs = "-"
    if difference is not None:
        missed = goal is not None and not difference <= goal
        differs = f"{difference:.2%} at step {row['step']}{', missed' * missed}"
    steps = row.get("failed") or len(losses)
    return f"| {text}: {row['name']} | {steps} | {shown} | {differs} | {' | '.join(largest)} |"


def training_curves(results: dict) -> str:
    """Training through the Triton path beside torch's, and on repeated tokens; errors on such inputs."""
    # Written section by section: what an interrupted run did not reach is left out.
    exact, rounded, repeated = (results.get(name) for name in ("float32", "bfloat16", "repeated"))
    errors = results.get("errors", [])
    wanted = f" (wanted in float32: at most {exact['goal']:.1%})" if exact else ""
    lines = [
        f"| training on | steps | loss, first and last | largest difference to torch at any step{wanted} "
        "| largest gradient norm | largest residual of the solver |",
        "|---|---|---|---|---|---|",
    ]
    if exact:
        lines += [curve_row("text, float32", row, exact["goal"]) for row in exact["runs"]]
    if rounded:
        lines += [curve_row("text, bfloat16 autocast", row) for row in rounded["runs"]]
    if repeated:
        lines += [curve_row("text, a third of it runs of one token", row) for row in repeated["runs"]]
    if errors:
        lines += ["", f"| relative error of o | {' | '.join(CURVE_ERRORS)} |", "|---" * (1 + len(CURVE_ERRORS)) + "|"]
    for row in errors:
        found = [[row["errors"][key] for key in keys if key in row["errors"]] for keys in CURVE_ERRORS.values()]
        shown = " | ".join(f"{error[0]:.1e}" if error else "-" for error in found)
        lines.append(f"| {CURVE_FAMILIES[row['family']]} | {shown} |")
    plan, versions = results["plan"], results["versions"]
    lines.append("")
    if results["figure"]:
        lines += [f"![losses](kernels/benchmarks/results/{results['figure']})", ""]
    longest = f" The longest run of one token has {repeated['longest_run']:,}." if repeated else ""
    lines.append(
        f"{plan['layers']} layers of {plan['hidden_size']} with {plan['heads']} heads of {plan['head_dim']}, "
        f"{plan['batch']} x {plan['length']} tokens of the novels a step, AdamW with a peak rate of "
        f"{plan['learning_rate']:g}, head norm's epsilon {plan['head_norm_eps']:g}; at most "
        f"{plan['cg_max_steps_training']} solver steps to a tolerance of {plan['cg_tolerance_training']:.0e}, on both "
        f"paths.{longest} Errors: output in float32 against a dense float64 solve, "
        f"K = V = {plan['error_size']}, "
        f"{plan['error_length']:,} tokens; peer: flash-linear-attention {versions['flash-linear-attention']}. "
        f"{results['gpu']}, torch {versions['torch']}, triton {versions['triton']}; "
        f"{provenance(results)}; from `kernels/benchmarks/training_curves.py`."
    )
    return "\n".join(lines)


# What is aimed at on an H200: milliseconds a step by batch, at any context; the speed of prefill as a multiple of the
# peer's; seconds to the first token; growth of the memory.
STEP_GOALS = {1: 2.0, 8: 2.1, 64: 4.2}
STEP_COLUMNS = (
    ("mesa", "dynamic", False),
    ("mesa", "dynamic", True),
    ("peer", "dynamic", False),
    ("llama", "static", False),
    ("llama", "dynamic", False),
)
PREFILL_GOAL, FIRST_TOKEN_GOAL, GROWTH_GOAL = 2.0, 20, 0.01
OPERATORS = {"mesa": "ours", "peer": "peer", "llama": "Llama"}
MEMORY_TASKS = {"read": "read as a prompt", "written": "written"}


def step_row(results: dict, batch: int, context: int) -> str:
    """One line of the table of steps; a cell says what failed or missed its goal."""

    def cell(operator: str, cache: str, plain: bool) -> str:
        row = find(results, "steps", operator=operator, cache=cache, plain=plain, batch=batch, context=context)
        if "ms" not in row:
            return "failed" if "failed" in row else "-"
        goal = STEP_GOALS.get(batch, math.inf) if (operator, plain) == ("mesa", False) else math.inf
        missed = ", missed" if not row["ms"] <= goal else ""
        return f"{row['ms']:.2f} ({significant(row['tokens_per_second'])} tokens/s){missed}"

    before = f"{context:,} tokens" if context else "short"
    cells = " | ".join(cell(*column) for column in STEP_COLUMNS)
    goal = f"at most {STEP_GOALS[batch]:g}" if batch in STEP_GOALS else "-"
    return f"| {before}, batch {batch} | {goal} | {cells} |"


def failed_steps(results: dict) -> str:
    """Why rows of the table of steps have no time; each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in results.get("steps", []):
        if "failed" in row:
            before = f"{row['context']:,} tokens" if row["context"] else "short"
            way = "no graph, " if row["plain"] else ""
            case = f"{OPERATORS[row['operator']]}, {row['cache']} cache, {way}{before}, batch {row['batch']}"
            reasons.setdefault(row["failed"], []).append(case)
    return "; ".join(f"{' and '.join(cases)} ({reason})" for reason, cases in reasons.items())


def reading_times(results: dict, section: str, **case) -> tuple[dict[str, dict], list[str]]:
    """The rows of a case by operator, and the times of those that have one."""
    rows = {name: find(results, section, operator=name, **case) for name in OPERATORS}
    return rows, [f"{OPERATORS[name]} {significant(row['ms'])} ms" for name, row in rows.items() if "ms" in row]


def generation_notes(results: dict) -> list[str]:
    """Prefill, first token and memory, each a sentence with its goal; what was not measured is left out."""
    notes = []
    if failed := failed_steps(results):
        notes.append(f"Not timed: {failed}.")
    times, tokens = [], results["plan"]["prefill"]
    for chunk in sorted({row["chunk"] for row in results.get("prefill", [])}, reverse=True):
        rows, shown = reading_times(results, "prefill", chunk=chunk)
        if {"ms"} <= rows["mesa"].keys() & rows["peer"].keys():
            ratio = rows["peer"]["ms"] / rows["mesa"]["ms"]
            remarks = [f"{ratio:.1f} times the peer's speed", *(["missed"] if not ratio >= PREFILL_GOAL else [])]
            busy = sum(rows["mesa"].get("kernels_ms", {}).values())
            # Otherwise the GPU waits for the processor.
            if busy and busy < 0.9 * rows["mesa"]["ms"]:
                remarks.append(f"the GPU is busy for {significant(busy)} ms of them")
            shown[0] += f" ({', '.join(remarks)})"
        if shown:
            way = "at once" if chunk == tokens else f"in chunks of {chunk:,}"
            times.append(f"{way} {', '.join(shown)}")
    if times:
        notes.append(
            f"Reading {tokens:,} tokens, at least {PREFILL_GOAL:g} times as fast as the peer wanted: "
            f"{'; '.join(times)}."
        )
    rows, shown = reading_times(results, "chunks")
    if shown:
        notes.append(
            f"Reading {tokens:,} tokens as a text of any length is read, {rows['mesa']['chunk']:,} at a time (ours by "
            f"`read_tokens`, its recording included): {', '.join(shown)}."
        )
    groups = find(results, "prefill", operator="mesa", chunk=tokens).get("kernels_ms")
    if groups:
        shares = ", ".join(f"{name} {significant(ms)}" for name, ms in groups.items())
        notes.append(f"Where the GPU's time goes in our pass at once, ms: {shares}.")
    rows, shown = reading_times(results, "prompt")
    if shown:
        busy = sum(rows["mesa"].get("kernels_ms", {}).values())
        alone = f"; ours keeps the GPU busy for {significant(busy)} ms of them" if busy else ""
        notes.append(
            f"Reading {results['plan']['prompt']:,} tokens, where the processor is what takes time: "
            f"{', '.join(shown)}{alone}."
        )
    cold = find(results, "cold")
    if "first_token_s" in cold:
        seconds = cold["import_s"] + cold["first_token_s"]
        missed = ", missed" if not seconds <= FIRST_TOKEN_GOAL else ""
        notes.append(
            f"First token of a fresh process with nothing compiled, at most {FIRST_TOKEN_GOAL} s wanted: "
            f"{seconds:.1f} s{missed}, {cold['import_s']:.1f} s of them to import; eight tokens then take "
            f"{cold['first_steps_s']:.1f} s."
        )
    peaks = []
    for task, name in MEMORY_TASKS.items():
        row = find(results, "memory", what=task)
        if "growth" in row:
            missed = ", missed" if not row["growth"] <= GROWTH_GOAL else ""
            first, last = row["tokens"][0], row["tokens"][-1]
            peaks.append(f"{row['growth']:.2%}{missed} from {first:,} to {last:,} tokens {name}")
    if peaks:
        notes.append(f"Growth of the peak memory, at most {GROWTH_GOAL:.0%} wanted: {'; '.join(peaks)}.")
    states = find(results, "memory", what="states")
    if "error" in states:
        finite = "all are finite" if states["finite"] else "not all are finite"
        notes.append(
            f"Of the states after {states['tokens']:,} tokens {finite}; those of the {states['heads']} heads that "
            f"have forgotten all but their last {states['reread']:,} tokens differ by at most {states['error']:.1e} "
            "from float64's after these alone."
        )
    return notes


def gpu_generation(results: dict) -> str:
    """A step of `generate()` beside the peer's and Llama's; prefill, first token and memory."""
    lines = [
        "| ms a step through `generate()` | goal on an H200 | ours | ours, without CUDA graphs | peer | "
        "Llama, compiled for a static cache | Llama |",
        "|---|---|---|---|---|---|---|",
    ]
    steps = results.get("steps", [])
    cases = sorted({(row["context"], row["batch"]) for row in steps})
    lines += [step_row(results, batch, context) for context, batch in cases]
    lines += ["", *generation_notes(results)]
    versions, plan = results["versions"], results["plan"]
    sizes = {OPERATORS[row["operator"]]: row["parameters"] for row in steps if "parameters" in row}
    sizes = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in sizes.items())
    compiled = [row for row in steps if row["operator"] == "mesa" and not row["plain"] and "ms" in row]
    warm = ""
    if compiled:
        slowest, again = max(row["warmup_s"] for row in compiled), sum(row["recompiled"] for row in compiled)
        warm = (
            f" The first run of ours, which compiles the kernels and records the step, takes up to {slowest:.0f} s; "
            f"other prompts, lengths and pads compile {again or 'nothing'} more."
        )
    lines.append("")
    if results["figure"]:
        lines += [f"![steps and memory](kernels/benchmarks/results/{results['figure']})", ""]
    lines.append(
        f"Random {plan['dtype']} models of the same sizes (parameters: {sizes}), greedy, after {plan['prompt']} "
        f"tokens or the context named, {plan['new_tokens']} new tokens ({plan['eager_tokens']} where neither a CUDA "
        "graph nor compiled), prefill not counted. Ours without CUDA graphs is what hooks and quantised weights are "
        "left with (`generate(disable_compile=True)`)."
        f"{warm} Logits are compared with those of an uncached pass first. "
        f"{results['gpu']}, driver {results['driver']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"transformers {versions['transformers']}, peer: flash-linear-attention {versions['flash-linear-attention']}; "
        f"{provenance(results)}; from `kernels/benchmarks/gpu_generation.py`."
    )
    return "\n".join(lines)


TABLES = {
    "cpu_generation": cpu_generation,
    "int8_weights": int8_weights,
    "speculative_decoding": speculative_decoding,
    "gpu_operators": gpu_operators,
}
# These stand in the README once they were measured.
MEASURED_LATER = {"training_curves": training_curves, "gpu_generation": gpu_generation}
# Every file that quotes results, where they are, and its tables.
DOCUMENTS = {
    ROOT / "README.md": (RESULTS, TABLES | MEASURED_LATER),
    ROOT / "examples" / "README.md": (RESULTS, {"head_norm": head_norm}),
    ROOT / "eval" / "README.md": (EVALUATIONS, {"synthetic": synthetic}),
}
# Written by an installed command, which knows versions but no commit.
WITHOUT_REVISION = {"synthetic"}


def results_of(name: str, folder: Path = RESULTS) -> list[dict]:
    """The measurements of a table, by machine; none where nothing was measured.

    Raises:
        SystemExit: they cannot be traced to a commit.
    """
    found = []
    for path in sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}_*.json")]):
        results = json.loads(path.read_text(encoding="utf-8"))
        parts = [] if name in WITHOUT_REVISION else results.get("measured", {"all": results}).values()
        for revision in {part["revision"] for part in parts}:
            if revision is None:
                raise SystemExit(f"results/{path.name} names no git revision: measure again with --revision.")
            if revision.endswith("-dirty"):
                raise SystemExit(
                    f"results/{path.name} was measured with uncommitted changes: commit, and measure again."
                )
        found.append(results)
    return found


def render(text: str, folder: Path = RESULTS, tables: dict[str, Callable] = TABLES | MEASURED_LATER) -> str:
    """`text` with each of `tables` made anew from its results files in `folder`; without any, a table stays as it is.

    Raises:
        SystemExit: a table has no place in `text`, or its results cannot be traced to a commit.
    """
    for name, table in tables.items():
        machines = results_of(name, folder)
        if not machines:
            continue
        begin, end = f"<!-- results: {name} -->\n", "<!-- end results -->"
        if begin not in text:
            raise SystemExit(f"there are results, but no place for them: add {begin.strip()} and {end} to the README.")
        before, rest = text.split(begin, 1)
        content = "\n\n".join(table(results) for results in machines)
        text = before + begin + content + "\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    for document, (folder, quoted) in DOCUMENTS.items():
        rendered = render(document.read_text(encoding="utf-8"), folder, quoted)
        with replacing(document) as temporary:
            temporary.write_text(rendered, encoding="utf-8")
