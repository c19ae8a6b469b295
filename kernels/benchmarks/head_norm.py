# SPDX-License-Identifier: Apache-2.0
"""Spikes of the gradient as a training begins, by the epsilon of the heads' norm, on a CPU.

    python kernels/benchmarks/head_norm.py [--data-dir DATA] [--revision REVISION]
    python kernels/benchmarks/head_norm.py --smoke

Needs the corpus of `examples/train_novels.py` (`--data-dir` or MESANET_DATA: the folder that holds
`corpus/novels_train.jsonl.gz`). Each case, an epsilon and a seed of the weights, is trained twice as
`training_curves.py` does it, through torch in float32. The two runs differ in `chunk_size` alone, and so in rounding:
where they come apart, a large gradient came of what rounding left.

Prints a table and writes it with every step's loss and gradient norm (before clipping) to `results/head_norm.json`
after each case; `examples/README.md` quotes it. All cases take some twelve minutes on one thread.
"""

from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from cpu_generation import cpu_name
from gpu_operators import CONSOLE, RESULTS, ROOT, read_revision, versions
from readme_tables import head_norm as markdown_table
from rich.markdown import Markdown
from training_curves import (
    OTHER_CHUNKS,
    REFERENCE,
    SEED,
    SMOKE,
    Plan,
    TrainingBlocks,
    UsageError,
    compare,
    data_folder,
    read_tokens,
    train,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_mesanet import bundled_checkpoint
from modeling_mesanet.files import write_json

PLAN = Plan(layers=12, hidden_size=128, heads=2, head_dim=64, intermediate_size=384, length=128, steps=40)
# Epsilons and seeds; the first is that of the other norms.
CASES = ((1e-6, 0), (1e-5, 0), (1e-4, 0), (1e-3, 0), (1e-2, 0), (1e-6, 1), (1e-3, 1))


def train_case(plan: Plan, eps: float, seed: int, tokenizer: PreTrainedTokenizerBase, blocks: TrainingBlocks) -> dict:
    """Both runs of a case, and how far they come apart, as a result row."""
    plan = replace(plan, head_norm_eps=eps)
    runs = []
    for run in (REFERENCE, OTHER_CHUNKS):
        run = replace(run, name=f"{eps:g}, seed {seed}, chunks of {run.chunk_size}", precision="float32", seed=seed)
        runs.append(train(run, plan, tokenizer, blocks, torch.device("cpu")))
    return {"head_norm_eps": eps, "seed": seed, "runs": runs} | compare(*reversed(runs))


def main(
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds corpus/ (default: MESANET_DATA).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to instead of results/.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the program; written to outputs/.")] = False,
) -> None:
    """Train with several epsilons of the heads' norm."""
    torch.set_num_threads(threads)
    plan = SMOKE if smoke else PLAN
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
    try:
        tokens = read_tokens(data_folder(data_dir), tokenizer, (plan.steps * plan.batch + 1) * plan.length)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    blocks = TrainingBlocks(tokens, plan.length, plan.steps * plan.batch, SEED)
    path = (output or (ROOT / "outputs" if smoke else RESULTS)) / "head_norm.json"
    results = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": threads,
        "versions": versions(None) | {"transformers": transformers.__version__},
        "revision": revision or read_revision(),
        "plan": {name: value for name, value in asdict(plan).items() if name != "head_norm_eps"},
        "cases": [],
    }
    for eps, seed in CASES:
        results["cases"].append(train_case(plan, eps, seed, tokenizer, blocks))
        write_json(path, results)
    CONSOLE.print(Markdown(markdown_table(results)))


if __name__ == "__main__":
    typer.run(main)
