# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of `results/` into the README: `python kernels/benchmarks/readme_tables.py`.

A table NAME stands between `<!-- results: NAME -->` and `<!-- end results -->` and comes from `results/NAME.json`.
"""

import json
import os
from pathlib import Path

BENCHMARKS = Path(__file__).parent
README = BENCHMARKS.parents[1] / "README.md"


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
        "over 256 tokens of prompt. For one token with heads of 64 that solve is a single library call, and quicker "
        "than the dozen small products of the iteration; with a batch it is not."
    )
    return "\n".join(lines)


TABLES = {"cpu_generation": cpu_generation}


def render(text: str) -> str:
    """`text` with every table made anew from its results file."""
    for name, table in TABLES.items():
        results = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
        if str(results["revision"]).endswith("-dirty"):
            raise SystemExit(f"results/{name}.json was measured with uncommitted changes: commit, and measure again.")
        begin, end = f"<!-- results: {name} -->\n", "<!-- end results -->"
        before, rest = text.split(begin, 1)
        text = before + begin + table(results) + "\n" + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    temporary = README.with_suffix(".tmp")
    temporary.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(temporary, README)
