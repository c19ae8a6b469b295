# SPDX-License-Identifier: Apache-2.0
"""The figure of `gpu_operators.py`: times over the sequence length, and errors by family of inputs.

python kernels/benchmarks/plot_operators.py kernels/benchmarks/results/gpu_operators_H200.json
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from modeling_mesanet.files import replacing

# What a curve or bar is called, by the `operator` and `setting` of its rows.
CURVES = {
    ("mesa", "tolerance 1e-4"): "Mesa, ours, tolerance 1e-4",
    ("peer", "30 steps"): "Mesa, flash-linear-attention, 30 steps",
    ("gdn", ""): "Gated DeltaNet",
    ("gla", ""): "gated linear attention",
    ("sdpa", ""): "flash attention",
}
BARS = {
    "mesa, tolerance 1e-3": "ours, tolerance 1e-3",
    "mesa, tolerance 1e-4": "ours, tolerance 1e-4",
    "mesa, 30 steps": "ours, 30 steps",
    "peer, 30 steps, float32 values": "flash-linear-attention, 30 steps",
    "peer, 30 steps": "flash-linear-attention, 30 steps, output in bfloat16",
}


def curves(results: dict, backward: bool) -> dict[str, list[tuple[int, float]]]:
    """Points (T, ms) of each curve, for the plan's number of tokens a call, heads and head size."""
    plan, found = results["plan"], {}
    rows = [row for section in ("forward", "backward", "neighbours") for row in results.get(section, [])]
    for row in rows:
        name = CURVES.get((row["operator"], row["setting"]))
        usual = row["kind"] == "easy" and row["batch"] * row["length"] == plan["tokens"]
        if name and usual and row["backward"] == backward and "ms" in row:
            found.setdefault(name, []).append((row["length"], row["ms"]))
    return {name: sorted(found[name]) for name in CURVES.values() if name in found}


def draw(results: dict, path: Path) -> None:
    """Draw `results` as a PNG. Raises ImportError where matplotlib is not installed."""
    from matplotlib.figure import Figure

    plan = results["plan"]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(
        f"{results['gpu']}, {plan['tokens']:,} tokens a call, {plan['heads']} heads, K = V = {plan['size']}, bfloat16"
    )
    panels = figure.subplots(1, 3)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "fontsize": "small", "frameon": False}
    colors = {name: f"C{index}" for index, name in enumerate(CURVES.values())}
    for axes, backward in zip(panels[:2], (False, True), strict=True):
        found = curves(results, backward)
        for name, points in found.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colors[name], label=name)
        axes.set(title="forward + backward" if backward else "forward", xlabel="tokens a sequence", ylabel="ms")
        if found:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            lengths = sorted({length for points in found.values() for length, _ in points})
            axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
            for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
            axes.legend(**below)
        axes.grid(alpha=0.3, which="both")

    axes = panels[2]
    rows = results.get("errors", [])
    names = [name for name in BARS if any(name in row["errors"] for row in rows)]
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) / (len(names) + 1) for place in range(len(rows))]
        axes.barh(places, [row["errors"].get(name, 0) for row in rows], 1 / (len(names) + 1), label=BARS[name])
    if names:
        axes.set_xscale("log")
        axes.legend(**below)
    labels = [row["family"] + (f", {row['length']}" if row["length"] != plan["length"] else "") for row in rows]
    axes.set(title="output in float32 against a float64 solve", xlabel="relative error")
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(results: Annotated[Path, typer.Argument(help="JSON that gpu_operators.py wrote.")]) -> None:
    """Draw the figure of a results file beside it."""
    draw(json.loads(results.read_text(encoding="utf-8")), results.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
