# SPDX-License-Identifier: Apache-2.0
"""Training through the Triton kernels: beside the torch path on text, and on text full of repeated tokens.

    python kernels/benchmarks/training_curves.py [--data-dir DATA] [--only float32,repeated] [--revision REVISION]
    python kernels/benchmarks/training_curves.py --device cpu --smoke

Needs the corpus of `examples/train_novels.py` (`--data-dir` or MESANET_DATA: the folder that holds
`corpus/novels_train.jsonl.gz`); the tokenizer is that of the bundled checkpoint. Sections:

- float32: the same model, seed and batches through `kernel_backend="triton"` and `"torch"`, and how far their losses
  differ at every step;
- bfloat16: the same under bfloat16 autocast, as `Trainer` has it, without a goal. `--control` adds torch with its sums
  in another order: how far rounding alone takes two runs apart;
- repeated: text of which a third is long runs of one token, with and without the bound on the forget gate, under
  autocast; a number that is not finite ends a run. Each step's loss, gradient norm and largest solver residual are in
  the file;
- errors: the operator's output on such inputs against a dense float64 solve, ours and, where it is installed,
  flash-linear-attention's, as `gpu_operators.py` compares them.

Float32 weights; AdamW with warm-up, cosine and clipped gradients. The solver takes at most 30 steps to a tolerance of
1e-4 on either path, as in `examples/train_novels.py`. The head norm's epsilon is 1e-3: a first token's output is its
value times `k . q`, and where that is nearly 0, an epsilon of 1e-6 makes a large gradient of what rounding left, so
that any two runs come apart that round differently. `--head-norm-eps 1e-6` shows it.

Results go to `results/training_curves_<GPU>.json` after each section, a figure beside them at the end; the README
quotes them. A later run with the same versions, GPU and sizes replaces only the sections that it measures; each names
the revision that measured it.

No Triton runs on a CPU: with `--device cpu --smoke` the two paths are both torch, with chunks of different sizes.
"""

import json
import math
import re
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from gpu_operators import (
    CONSOLE,
    PROMISED,
    RESULTS,
    ROOT,
    Bench,
    Clock,
    family_inputs,
    find_peer,
    read_driver,
    read_revision,
    record,
    start_results,
    table_of,
    versions,
)
from gpu_operators import Plan as OperatorPlan
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint
from modeling_mesanet.files import replacing, write_json
from modeling_mesanet.mesa import select_backend

sys.path.append(str(ROOT / "examples"))
from novels import TrainingBlocks, UsageError, data_folder, encode_documents, pack, read_documents

SEED = 0
# The largest relative difference between the losses of the two paths, at any step, in float32.
GOAL = 5e-3
# More than a token of the corpus has on average, so that the documents read suffice for a run.
CHARACTERS_A_TOKEN = 6
# Inputs of tests/mesa/mesa_inputs.py like those that repeated tokens make.
FAMILIES = ("scream", "rank8", "repeat")


@dataclass(frozen=True)
class Plan:
    """The model, its training, and the sizes of the operator's comparison."""

    layers: int = 12
    hidden_size: int = 512
    heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 1536
    length: int = 1024  # tokens a sequence
    batch: int = 8  # sequences a step
    steps: int = 200  # on text
    repeated_steps: int = 100  # on text with repeated tokens
    runs: tuple[int, int] = (64, 1024)  # lengths of the shortest and the longest run of one token
    # The peak, after a tenth of the steps; a tenth of it at the end. At 1e-3 the loss spikes.
    learning_rate: float = 3e-4
    gradient_clip: float = 1.0
    cg_max_steps_training: int = 30
    cg_tolerance_training: float = 1e-4
    head_norm_eps: float = 1e-3  # with that of the other norms, 1e-6, runs come apart by rounding alone
    error_length: int = 2048
    error_size: int = 128


SMOKE = Plan(
    layers=2,
    hidden_size=32,
    heads=2,
    head_dim=16,
    intermediate_size=64,
    length=64,
    batch=2,
    steps=4,
    repeated_steps=3,
    runs=(16, 64),
    error_length=32,
    error_size=16,
)


@dataclass(frozen=True)
class Run:
    """One training: what differs between them."""

    name: str
    backend: str
    precision: str = "bfloat16"  # of autocast, or float32: none
    chunk_size: int = 64  # of the torch path
    forget_gate_bound: float | None = 0.9975
    seed: int = SEED  # of the weights


TRITON = Run("Triton", "triton")
REFERENCE = Run("torch", "torch")
# The reference with its sums in another order. Where Triton cannot run it takes Triton's place.
OTHER_CHUNKS = Run("torch, chunks of 16", "torch", chunk_size=16)


def build_model(plan: Plan, run: Run, tokenizer: PreTrainedTokenizerBase) -> MesaNetForCausalLM:
    """The model of a run; its weights depend on `run.seed` alone."""
    torch.manual_seed(run.seed)
    config = MesaNetConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        head_dim=plan.head_dim,
        value_head_dim=plan.head_dim,
        intermediate_size=plan.intermediate_size,
        forget_gate_bound=run.forget_gate_bound,
        cg_max_steps_training=plan.cg_max_steps_training,
        cg_tolerance_training=plan.cg_tolerance_training,
        head_norm_eps=plan.head_norm_eps,
        chunk_size=run.chunk_size,
        kernel_backend=run.backend,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MesaNetForCausalLM(config).train()


def train(
    run: Run, plan: Plan, tokenizer: PreTrainedTokenizerBase, blocks: TrainingBlocks, place: torch.device
) -> dict:
    """One run over all of `blocks`, as a result row; the first number that is not finite ends it as `failed`."""
    row = asdict(run) | {"losses": [], "gradient_norms": [], "residuals": []}
    model = build_model(plan, run, tokenizer).to(place)
    # Over so few steps weight decay would change nothing.
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=place.type == "cuda"
    )
    steps = len(blocks) // plan.batch
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps, min_lr_rate=0.1)
    seconds = []
    for step in track(range(steps), run.name, console=CONSOLE):
        began = time.perf_counter()
        rows = [blocks[step * plan.batch + index] for index in range(plan.batch)]
        batch = {name: tensor.to(place) for name, tensor in pack(rows, tokenizer.bos_token_id).items()}
        with torch.autocast(place.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
            output = model(**batch, use_cache=False, output_solver_stats=True)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clip)
        residual = torch.stack([layer.residual.max() for layer in output.solver_stats]).max()
        found = {"losses": output.loss, "gradient_norms": norm, "residuals": residual}
        numbers = torch.stack([tensor.detach().float() for tensor in found.values()]).tolist()
        if broken := [f"{name} {x}" for name, x in zip(found, numbers, strict=True) if not math.isfinite(x)]:
            row["failed"] = f"not finite at step {step + 1}: {', '.join(broken)}"
            break
        for name, number in zip(found, numbers, strict=True):
            row[name].append(number)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - began)
    if seconds:
        row["step_ms"] = 1e3 * statistics.median(seconds)
    return row


def compare(row: dict, reference: dict) -> dict:
    """The largest relative difference between two runs' losses and its step; None if one of them did not finish."""
    if "failed" in row or "failed" in reference:
        return {"difference": None, "step": None}
    pairs = zip(row["losses"], reference["losses"], strict=True)
    differences = [abs(ours / theirs - 1) for ours, theirs in pairs]
    largest = max(differences)
    return {"difference": largest, "step": 1 + differences.index(largest)}


def read_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> np.ndarray:
    """At least `count` tokens from the beginning of the corpus if it has so many; whole documents."""
    kept, characters = [], 0
    for text in read_documents(folder / "corpus" / "novels_train.jsonl.gz"):
        if characters >= CHARACTERS_A_TOKEN * count:
            break
        kept.append(text)
        characters += len(text)
    return encode_documents(tokenizer, kept, "tokenising")


def with_runs(tokens: np.ndarray, bos: int, shortest: int, longest: int) -> np.ndarray:
    """A copy of `tokens` `[N]` where runs of one token, of all lengths between the two, replace a third of the text.

    Each run repeats the token at which it begins, or the next one where a document begins there.
    """
    source = np.random.default_rng(SEED)
    logs = math.log(shortest), math.log(longest)
    mean = (longest - shortest) / (logs[1] - logs[0])
    repeated, place = tokens.copy(), 0
    while True:
        place += round(source.exponential(2 * mean))
        length = round(math.exp(source.uniform(*logs)))
        if place + length > len(tokens):
            return repeated
        text = tokens[place : place + length]
        repeated[place : place + length] = text[text != bos][0]
        place += length


def longest_run(tokens: np.ndarray) -> int:
    """How many times one token stands in a row in `tokens` `[N]`, at most."""
    changes = np.flatnonzero(np.diff(tokens)) + 1
    return int(np.diff(np.concatenate([[0], changes, [len(tokens)]])).max())


class Curves:
    """The sections of one benchmark run, each as it stands in the results file."""

    def __init__(
        self,
        plan: Plan,
        place: torch.device,
        peer_version: str | None,
        tokenizer: PreTrainedTokenizerBase,
        tokens: np.ndarray,
        control: bool,
    ):
        self.plan, self.place, self.peer_version = plan, place, peer_version
        self.tokenizer, self.tokens, self.control = tokenizer, tokens, control
        self.on_gpu = place.type == "cuda"

    def train(self, run: Run, tokens: np.ndarray, steps: int) -> dict:
        blocks = TrainingBlocks(tokens, self.plan.length, steps * self.plan.batch, SEED)
        return train(run, self.plan, self.tokenizer, blocks, self.place)

    def compare(self, *compared: Run, precision: str) -> list[dict]:
        """Runs on text beside the reference, which comes last: it takes longest."""
        rows = [
            self.train(replace(run, precision=precision), self.tokens, self.plan.steps)
            for run in (*compared, REFERENCE)
        ]
        for row in rows[:-1]:
            row |= compare(row, rows[-1])
        return rows

    def float32(self) -> dict:
        return {"runs": self.compare(TRITON if self.on_gpu else OTHER_CHUNKS, precision="float32"), "goal": GOAL}

    def bfloat16(self) -> dict:
        compared = [TRITON] if self.on_gpu else []
        if self.control or not self.on_gpu:
            compared.append(OTHER_CHUNKS)
        return {"runs": self.compare(*compared, precision="bfloat16")}

    def repeated(self) -> dict:
        name, backend = ("Triton", "triton") if self.on_gpu else (REFERENCE.name, REFERENCE.backend)
        tokens = with_runs(self.tokens, self.tokenizer.bos_token_id, *self.plan.runs)
        runs = [
            Run(f"{name}, forget gate bound {REFERENCE.forget_gate_bound}", backend),
            Run(f"{name}, no forget gate bound", backend, forget_gate_bound=None),
        ]
        return {
            "runs": [self.train(run, tokens, self.plan.repeated_steps) for run in runs],
            "share_equal_to_the_token_before": float((np.diff(tokens) == 0).mean()),
            "longest_run": longest_run(tokens),
        }

    def errors(self) -> list[dict]:
        """Rows as in the section of that name of `gpu_operators.py`, of `FAMILIES`."""
        names, (*tensors, lam) = family_inputs(self.plan.error_length, self.plan.error_size, self.place)
        heads = [names.index(family) for family in FAMILIES]
        inputs = (*(tensor[:, :, heads] for tensor in tensors), lam[heads])
        bench = Bench(Clock(self.place, math.inf), OperatorPlan(), self.peer_version)
        return bench.family_errors(list(FAMILIES), inputs)


# In this order: the peer, which tunes itself first, last.
SECTIONS = {
    "float32": Curves.float32,
    "bfloat16": Curves.bfloat16,
    "repeated": Curves.repeated,
    "errors": Curves.errors,
}


def runs_table(title: str, rows: list[dict]) -> Table:
    """What the runs of a section did, for the terminal."""
    columns = ("run", "steps", "first loss", "last loss", "gradient norm", "residual", "ms a step", "difference", "")
    table = Table(*columns, box=SIMPLE, title=f"{title}; gradient norm and residual: the largest of all steps")
    for row in rows:
        losses = row["losses"]
        cells = [str(len(losses))]
        if losses:
            cells += [f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{max(row['gradient_norms']):.2f}"]
            cells += [f"{max(row['residuals']):.1e}", f"{row['step_ms']:.0f}"]
        else:
            cells += [""] * 5
        differs = row.get("difference") is not None
        cells.append(f"{row['difference']:.2%} at step {row['step']}" if differs else "")
        table.add_row(row["name"], *cells, row.get("failed"))
    return table


def problems(results: dict) -> list[str]:
    """What was promised and is not so, as sentences."""
    runs = {name: results[name]["runs"] for name in ("float32", "bfloat16", "repeated") if name in results}
    found = [f"{row['name']}: {row['failed']}" for rows in runs.values() for row in rows if "failed" in row]
    found += [
        f"{row['name']}: the loss differs by {row['difference']:.2%} at step {row['step']}, by more than {GOAL:.1%}"
        for row in runs.get("float32", [])[:-1]
        if row["difference"] is not None and not row["difference"] <= GOAL
    ]
    for row in results.get("errors", []):
        for setting, promised in PROMISED.items():
            error = row["errors"].get(f"mesa, {setting}", math.nan)
            if not error <= promised:
                found.append(f"{row['family']}: relative error {error:.1e} at {setting}, {promised:.0e} is promised")
    return found


def draw(results: dict, path: Path) -> None:
    """Draw `results` as a PNG. Raises ImportError where matplotlib is not installed."""
    from matplotlib.figure import Figure

    plan = results["plan"]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(
        f"{plan['layers']} layers of {plan['hidden_size']}, K = V = {plan['head_dim']}, {plan['batch']} x "
        f"{plan['length']} tokens a step, {results['gpu']}"
    )
    panels = figure.subplots(2, 2)

    def curve(axes, row: dict, values: list[float], **style) -> None:
        axes.plot(range(1, len(values) + 1), values, linewidth=1, label=row["name"], **style)

    losses, differences, repeated, sizes = panels.flat
    for precision in ("float32", "bfloat16"):
        *compared, reference = results.get(precision, {"runs": [None]})["runs"]
        for row in (*compared, reference) if reference else ():
            dashes = "--" if row is reference else "-"
            curve(losses, row | {"name": f"{row['name']}, {precision}"}, row["losses"], linestyle=dashes)
        for row in compared:
            both = zip(row["losses"], reference["losses"], strict=False)
            apart = [100 * abs(ours / theirs - 1) for ours, theirs in both]
            curve(differences, row | {"name": f"{row['name']}, {precision}"}, apart)
    losses.set(title="text", ylabel="cross-entropy, nats per token")
    differences.axhline(100 * GOAL, color="gray", linestyle=":", label="goal in float32")
    differences.set(title=f"text: difference of the losses to {REFERENCE.name}", ylabel="%", yscale="log")
    for index, row in enumerate(results.get("repeated", {"runs": []})["runs"]):
        curve(repeated, row, row["losses"], color=f"C{index}")
        curve(sizes, row, row["gradient_norms"], color=f"C{index}")
        curve(sizes, row, row["residuals"], color=f"C{index}", linestyle=":")
    repeated.set(title="a third of the text is runs of one token", ylabel="cross-entropy, nats per token")
    sizes.set(title="the same: gradient norm (above), largest relative residual (dotted)", yscale="log")
    for axes in panels.flat:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1, or cpu with --smoke.")] = "cuda",
    only: Annotated[str, typer.Option(help=f"Sections, with commas: {', '.join(SECTIONS)}. All by default.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds corpus/ (default: MESANET_DATA).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each path on text (200).")] = None,
    repeated_steps: Annotated[int | None, typer.Option(min=1, help="Of each run on repeated tokens (100).")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="The peak (3e-4).")] = None,
    head_norm_eps: Annotated[
        float | None, typer.Option(min=1e-12, help="Epsilon of the norm of each head's output (1e-3).")
    ] = None,
    control: Annotated[
        bool, typer.Option(help="In bfloat16, also train by torch with other chunks: what rounding alone changes.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to instead of results/.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the program; written to outputs/.")] = False,
) -> None:
    """Train through the Triton kernels and through torch, and compare."""
    began = time.monotonic()
    selected = [name.strip() for name in only.split(",") if name.strip()] or list(SECTIONS)
    if unknown := set(selected) - set(SECTIONS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: take some of {', '.join(SECTIONS)}.")
    place = torch.device(device)
    if place.type != "cuda" and not smoke:
        raise typer.BadParameter(f"On {device} the full sizes would take hours; add --smoke.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device; --device cpu --smoke tries the program without one.")
    try:
        if place.type == "cuda":
            select_backend(place, "triton")
        folder = data_folder(data_dir)
        plan = SMOKE if smoke else Plan()
        given = {
            "steps": steps,
            "repeated_steps": repeated_steps,
            "learning_rate": learning_rate,
            "head_norm_eps": head_norm_eps,
        }
        plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
        tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
        count = (max(plan.steps, plan.repeated_steps) * plan.batch + 1) * plan.length
        tokens = read_tokens(folder, tokenizer, count)
    # A GPU without Triton, a folder without the corpus: the message says what to do.
    except (UsageError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error

    peer_version = find_peer(place)
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    name = "training_curves_" + re.sub(r"[^A-Za-z0-9]+", "_", gpu.removeprefix("NVIDIA ")).strip("_")
    path = (output or (ROOT / "outputs" if smoke else RESULTS)) / f"{name}.json"
    revision = revision or read_revision()
    about = {
        "gpu": gpu,
        "driver": read_driver(),
        "versions": versions(peer_version) | {"transformers": transformers.__version__},
        "plan": json.loads(json.dumps(asdict(plan))),
        "figure": None,
    }
    results = start_results(path, about, SECTIONS)
    if revision is None:
        CONSOLE.print(
            "The git revision cannot be read here, and the README takes no figures without: give --revision."
        )
    if place.type != "cuda":
        CONSOLE.print("No Triton runs on a CPU: the torch path is compared with itself at another chunk size.")
    with ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))
        curves = Curves(plan, place, peer_version, tokenizer, tokens, control)
        for section in (name for name in SECTIONS if name in selected):
            rows = SECTIONS[section](curves)
            record(results, section, rows, revision, path)
            CONSOLE.print(table_of(section, rows) if section == "errors" else runs_table(section, rows["runs"]))
    try:
        draw(results, path.with_suffix(".png"))
        write_json(path, results | {"figure": f"{name}.png"})
    except ImportError:
        CONSOLE.print("matplotlib is not installed, so there is no figure.")
    CONSOLE.print(f"{path}, after {time.monotonic() - began:.0f} s")
    if found := problems(results):
        CONSOLE.print("\n".join(found))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
