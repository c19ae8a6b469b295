# SPDX-License-Identifier: Apache-2.0
"""The figure of `gpu_generation.py`: time of a step over the context, and memory over the tokens.

python kernels/benchmarks/plot_generation.py kernels/benchmarks/results/gpu_generation_H200.json
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from modeling_mesanet.files import replacing

# What a curve is called, by the `operator`, `cache` and `plain` of its rows.
CURVES = {
    ("mesa", "dynamic", False): "MesaNet",
    ("mesa", "dynamic", True): "MesaNet, no CUDA graph",
    ("peer", "dynamic", False): "MesaNet of flash-linear-attention",
    ("llama", "static", False): "Llama, compiled for a static cache",
    ("llama", "dynamic", False): "Llama",
}
MEMORY = {"read": "prompt read in chunks", "written": "tokens written"}


def curves(results: dict) -> dict[str, list[tuple[int, float]]]:
    """Points (tokens of context, ms a step) of each curve and batch that has several of them."""
    found = {}
    for row in results.get("steps", []):
        if "ms" in row and (name := CURVES.get((row["operator"], row["cache"], row["plain"]))):
            context = row["context"] or results["plan"]["prompt"]
            found.setdefault(f"{name}, batch {row['batch']}", []).append((context, row["ms"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def draw(results: dict, path: Path) -> None:
    """Draw `results` as a PNG. Raises ImportError where matplotlib is not installed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    figure.suptitle(f"generate() on {results['gpu']}, {results['plan']['dtype']}")
    steps, memory = figure.subplots(1, 2)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "fontsize": "small", "frameon": False, "ncols": 2}
    found = curves(results)
    for name, points in found.items():
        steps.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    steps.set(title="a step", xlabel="tokens of context", ylabel="ms")
    found_memory = [row for row in results.get("memory", []) if row.get("peak_mib") and None not in row["peak_mib"]]
    for row in found_memory:
        memory.plot(row["tokens"], row["peak_mib"], marker="o", markersize=4, label=MEMORY[row["what"]])
    memory.set(title="peak memory of a smaller model, with its weights", xlabel="tokens", ylabel="MiB")
    for axes, filled in ((steps, found), (memory, found_memory)):
        axes.grid(alpha=0.3, which="both")
        if filled:
            axes.set_xscale("log", base=2)
            axes.legend(**below)
            ticks = sorted({place for line in axes.get_lines() for place in line.get_xdata()})
            # Names of places closer than this would overlap.
            named = [place for i, place in enumerate(ticks) if i == 0 or place > 1.4 * ticks[i - 1]]
            axes.set_xticks(named, [f"{place // 1024}k" if place >= 1024 else str(place) for place in named])
            axes.minorticks_off()
    if found:
        # From 2 to 70 ms: on a linear axis the fast ones are one line.
        steps.set_yscale("log", base=2)
        steps.yaxis.set_major_formatter("{x:g}")
    if found_memory:
        memory.set_ylim(0, 1.2 * max(max(row["peak_mib"]) for row in found_memory))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(results: Annotated[Path, typer.Argument(help="JSON that gpu_generation.py wrote.")]) -> None:
    """Draw the figure of a results file beside it."""
    draw(json.loads(results.read_text(encoding="utf-8")), results.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
