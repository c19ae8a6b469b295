# SPDX-License-Identifier: Apache-2.0
"""`mesanet compute-sweep`: what conjugate-gradient steps buy, and where a trained model spends them.

The same text is read with several fixed numbers of steps and several tolerances. Beside the loss, each setting tells
the steps and residuals of every layer, head and position; the checkpoint's own setting also tells the condition
numbers of the systems that are solved, the gates and the regularisers.

Dimensions: B batch, T tokens of a window, L layers, H heads, K key size.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from modeling_mesanet import MesaNetConfig
from modeling_mesanet import modeling_mesanet as modeling
from modeling_mesanet.files import replacing, write_json
from modeling_mesanet.mesa import MesaOutput, MesaState, SolverStats

from .harness import TASKS, choose_tasks
from .perplexity import (
    FIRST_BAND,
    LoadedModel,
    PositionSums,
    band_edges,
    bins,
    default_tokens_at_once,
    encode,
    iterate_losses,
    load_model,
    usable_tokens,
)
from .results import (
    UsageError,
    environment,
    open_results,
    output_console,
    parse_numbers,
    progress_bar,
    read_named_documents,
    require,
    save_figure,
    write_csv,
)
from .task_data import DATA_VARIABLE

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN = "checkpoint"


class Setting(NamedTuple):
    """A setting of the solver: at most `max_steps` steps, to `tolerance` (None: all of them)."""

    name: str
    max_steps: int
    tolerance: float | None


# ---------------------------------------------------------------------------------------------------- the solver


def mixers(model: PreTrainedModel) -> list[modeling.MesaNetMixer]:
    """The Mesa layers, first to last."""
    return [module for module in model.modules() if isinstance(module, modeling.MesaNetMixer)]


class SolverCall(NamedTuple):
    """What one layer did with a piece of text: `start` is the position of its first token; `log_gamma` and `beta`
    `[B, T, H]`, `lam` `[H, K]`, `state` after the last token (None without a cache).
    """

    layer: int
    start: int
    log_gamma: torch.Tensor
    beta: torch.Tensor
    lam: torch.Tensor
    stats: SolverStats
    state: MesaState | None


@contextmanager
def recorded_solver(model: PreTrainedModel, record: Callable[[SolverCall], None]) -> Iterator[None]:
    """Call `record` for each Mesa layer and piece of text of more than one token.

    The layers call the operator by its name in their module, where it is replaced by one that asks for statistics.
    """
    running: list[int] = []
    position: dict[int, int] = {}
    operator = modeling.mesa_attention

    def operator_with_record(*arguments, **options) -> MesaOutput:
        output = operator(*arguments, **options | {"output_stats": True})
        _, _, _, log_gamma, beta, lam = arguments
        layer, length = running[-1], log_gamma.shape[1]
        start = 0 if options.get("initial_state") is None else position[layer]
        position[layer] = start + length
        record(SolverCall(layer, start, log_gamma, beta, lam, output.stats, output.final_state))
        return output

    def enter(mixer: nn.Module, arguments: tuple) -> None:
        running[:] = [mixer.layer_idx]

    hooks = [mixer.register_forward_pre_hook(enter) for mixer in mixers(model)]
    modeling.mesa_attention = operator_with_record
    try:
        yield
    finally:
        modeling.mesa_attention = operator
        for hook in hooks:
            hook.remove()


class SolverSums:
    """Steps and residuals of a run, summed over windows: `steps` and `residual` `[L, T, H]`."""

    def __init__(self, layers: int, length: int, heads: int):
        self.steps = np.zeros((layers, length, heads))
        self.residual = np.zeros((layers, length, heads))

    def add(self, call: SolverCall) -> None:
        piece = slice(call.start, call.start + call.beta.shape[1])
        self.steps[call.layer, piece] += call.stats.steps.sum(0).cpu().numpy()
        self.residual[call.layer, piece] += call.stats.residual.double().sum(0).cpu().numpy()


class Diagnosis:
    """Gates of all tokens and condition numbers at the ends of all pieces, by layer; regularisers."""

    def __init__(self, layers: int):
        self.beta: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self.gamma: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self.conditions: list[dict[int, list[np.ndarray]]] = [{} for _ in range(layers)]
        self.lam: list[np.ndarray] = [np.empty(0)] * layers

    def add(self, call: SolverCall) -> None:
        self.beta[call.layer].append(call.beta.float().flatten(0, 1).cpu().numpy())
        self.gamma[call.layer].append(call.log_gamma.float().exp().flatten(0, 1).cpu().numpy())
        self.lam[call.layer] = call.lam.float().cpu().numpy()
        if call.state is not None:
            end = call.start + call.beta.shape[1]
            condition = condition_numbers(call.state.h, call.lam)
            self.conditions[call.layer].setdefault(end, []).append(condition.cpu().numpy())

    def arrays(self) -> dict[str, np.ndarray]:
        """`beta` and `gamma` at 5, 50 and 95 % `[L, 3, H]`, `lam` `[L, H, K]`, `ends` `[E]`, `conditions` median and
        largest `[L, E, 2, H]`.
        """
        shares = (5, 50, 95)
        ends = sorted(self.conditions[0])
        return {
            "beta": np.stack([np.percentile(np.concatenate(parts), shares, axis=0) for parts in self.beta]),
            "gamma": np.stack([np.percentile(np.concatenate(parts), shares, axis=0) for parts in self.gamma]),
            "lam": np.stack(self.lam),
            "ends": np.array(ends),
            "conditions": np.stack(
                [
                    [np.percentile(np.concatenate(held[end]), (50, 100), axis=0) for end in ends]
                    for held in self.conditions
                ]
            ),
        }


def condition_numbers(h: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Largest over smallest eigenvalue of `H + Lambda`, `[B, H]`, from `h` `[B, H, K, K]` and `lam` `[H, K]`."""
    eigenvalues = torch.linalg.eigvalsh(h.double() + torch.diag_embed(lam.double()))
    return eigenvalues[..., -1] / eigenvalues[..., 0]


# ---------------------------------------------------------------------------------------------------- the sweep


def measure(
    model: PreTrainedModel, windows: list[np.ndarray], setting: Setting, journal: Path, *, label: str, **options
) -> dict[str, np.ndarray]:
    """Losses and solver statistics of one setting, from its file in `journal` if a run has finished it before.

    Returns:
        `nats` `[T]` summed over windows, `steps` and `residual` `[L, T, H]` as means; of the checkpoint's own setting
        also `Diagnosis.arrays`.
    """
    file = journal / f"{setting.name}.npz"
    try:
        with np.load(file, allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError, EOFError):
        pass  # not measured yet
    layers, length = len(mixers(model)), len(windows[0]) - 1
    sums = SolverSums(layers, length, model.config.num_attention_heads)
    diagnosis = Diagnosis(layers) if setting.name == OWN else None

    def record(call: SolverCall) -> None:
        sums.add(call)
        if diagnosis is not None:
            diagnosis.add(call)

    with (
        progress_bar() as bar,
        model.solver(cg_max_steps=setting.max_steps, cg_tolerance=setting.tolerance),
        recorded_solver(model, record),
    ):
        task = bar.add_task(label, total=len(windows) * length)
        losses = [
            values for _, values in iterate_losses(model, windows, advance=lambda n: bar.advance(task, n), **options)
        ]
    arrays = {
        "nats": PositionSums.of(losses).nats,
        "steps": sums.steps / len(windows),
        "residual": sums.residual / len(windows),
        **({} if diagnosis is None else diagnosis.arrays()),
    }
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)
    return arrays


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: list[str],
    manager: "TaskManager",
    setting: Setting,
    *,
    max_length: int,
    limit: int | None,
    batch_size: int,
    journal: Path,
) -> dict[str, float]:
    """Metrics of lm-eval tasks with one setting, by "task metric"; from the journal if finished before.

    Args:
        tasks: names that `manager` knows.
        max_length: tokens of a sequence at most.
        limit, batch_size: examples of a task at most, and at a time.
    """
    file = journal / f"{setting.name}-tasks.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # not measured yet
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        backend="causal",  # lm-eval knows the transformers classes alone
    )
    with loaded.model.solver(cg_max_steps=setting.max_steps, cg_tolerance=setting.tolerance):
        results = simple_evaluate(
            wrapped, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    metrics = {
        f"{task} {metric.removesuffix(',none')}": value
        for task, held in results["results"].items()
        for metric, value in held.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    write_json(file, metrics)
    return metrics


def run(
    texts: list[Path],
    *,
    output: Path,
    model: str | None = None,
    length: int = 2048,
    max_tokens: int | None = None,
    steps: str = "1,2,3,5,8,15,30",
    tolerances: str = "1e-1,1e-2,1e-3,1e-4,1e-5",
    tasks: str | None = None,
    data_dir: str | None = None,
    skip_missing: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    chunk: int = 256,
    tokens_at_once: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    resume: bool = False,
    plot: bool = True,
) -> dict:
    """Sweep the solver's settings over documents cut into windows; writes tables and figures into `output`.

    `compute_sweep.json` holds everything; `settings.csv` has a row a setting, `positions.csv` a row a setting and band
    of positions, `heads.csv` a row a layer and head, `conditions.csv` a row a layer, head and position.

    Args:
        texts, model, max_tokens, tokens_at_once, resume: as in `perplexity.run`; the model must be a MesaNet.
        length: tokens of a window, each read with an empty state; shorter documents are left out.
        steps, tolerances: what to try, with commas; 0 steps leave the solver out.
        tasks, data_dir, skip_missing: tasks to run with every setting, as in `harness.evaluate`; None runs none.
        limit, batch_size: examples of each task at most, and at a time.
        chunk: tokens read at a time, at the ends of which condition numbers are taken; divides `length`.

    Returns:
        The content of `compute_sweep.json`.

    Raises:
        UsageError: a file, an option or the folder does not fit.
        CheckpointError: the model cannot be loaded.
    """
    if plot:
        require("matplotlib", "the figure (--no-plot leaves it out)")
    fixed = parse_numbers(steps, "--steps", lowest=0)
    relative = parse_numbers(tolerances, "--tolerances", kind=float, lowest=1e-12, below=1.0)
    chunk = min(chunk, length)
    if length < 2 or length % chunk or chunk < 2:
        raise UsageError(
            f"--length is {length} and --chunk {chunk}; give lengths of at least 2 of which --chunk divides --length."
        )
    chosen = None
    if tasks is not None:
        require("lm_eval", "--tasks")
        # It warns of a model that is passed to it already loaded, for every setting.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        chosen = choose_tasks(tasks, data_dir=data_dir, skip_missing=skip_missing)
    named = read_named_documents(texts)
    loaded = load_model(model, device=device, dtype=dtype, argument="--model")
    config = loaded.model.config
    if config.model_type != MesaNetConfig.model_type:
        raise UsageError(f"--model is '{model}', a '{config.model_type}', which has no solver; give a MesaNet.")
    documents = {name: encode(loaded.tokenizer, name, text, max_tokens) for name, text in named.items()}
    usable = usable_tokens(documents, [length])
    windows = [window for name, tokens in usable.items() for window in documents[name].windows(length, tokens)]
    sweep = [Setting(OWN, config.cg_max_steps, config.cg_tolerance)]
    sweep += [Setting(f"steps-{number}", number, None) for number in fixed]
    sweep += [Setting(f"tolerance-{number:g}", config.cg_max_steps, number) for number in reversed(relative)]
    settings = {
        "command": "compute-sweep",
        "model": loaded.description,
        "documents": {name: hashlib.sha256(named[name].encode()).hexdigest() for name in named},
        "length": length,
        "chunk": chunk,
        "max_tokens": max_tokens,
        "steps": fixed,
        "tolerances": relative,
        "tasks": None if chosen is None else chosen.names,
        "data": None if chosen is None else os.environ.get(DATA_VARIABLE),
        "limit": limit,
        "dtype": dtype,
    }
    folder = open_results(output, settings, resume=resume)

    options = {"chunk": chunk, "tokens_at_once": tokens_at_once or default_tokens_at_once(device)}
    measured, metrics = {}, {}
    if chosen is not None:
        from lm_eval.tasks import TaskManager

        # As in `harness.evaluate`: a MesaNet has no limit of its own.
        max_length = max(config.max_position_embeddings, chosen.max_tokens)
        metadata = {"tokenizer": loaded.tokenizer.name_or_path, "max_length": max_length}
        manager = TaskManager(include_path=str(TASKS), metadata=metadata)
    for number, setting in enumerate(sweep, 1):
        label = f"{number}/{len(sweep)} {setting.name}"
        measured[setting.name] = measure(loaded.model, windows, setting, folder / "measured", label=label, **options)
        if chosen is not None:
            metrics[setting.name] = evaluate_tasks(
                loaded,
                chosen.names,
                manager,
                setting,
                max_length=max_length,
                limit=limit,
                batch_size=batch_size,
                journal=folder / "measured",
            )
    result = {
        "settings": settings,
        "environment": environment(device),
        "windows": len(windows),
        "left_out": sorted(named.keys() - usable.keys()),
        **summarize(sweep, measured, metrics, len(windows)),
    }
    write_tables(folder, result)
    if plot:
        plot_sweep(folder / "compute_sweep.png", result, measured, len(windows))
        plot_heads(folder / "heads.png", result, measured[OWN])
    write_json(folder / "compute_sweep.json", result)
    return result


def summarize(
    sweep: list[Setting], measured: dict[str, dict[str, np.ndarray]], metrics: dict[str, dict], count: int
) -> dict:
    """The figures of a sweep over `count` windows, in JSON types."""
    own = measured[OWN]
    length = len(own["nats"])
    edges = band_edges(length, min(FIRST_BAND, length))
    base = own["nats"].sum() / (count * length)
    entries, positions = [], []
    for setting in sweep:
        arrays = measured[setting.name]
        nll = float(arrays["nats"].sum() / (count * length))
        entries.append(
            {
                **setting._asdict(),
                "nll": nll,
                "perplexity": math.exp(nll),
                "difference": float(nll - base),
                "mean_steps": float(arrays["steps"].mean()),
                "mean_residual": float(arrays["residual"].mean()),
                "tasks": metrics.get(setting.name, {}),
            }
        )
        for start, stop in pairwise(edges):
            positions.append(
                {
                    "setting": setting.name,
                    "from": start,
                    "to": stop,
                    "nll": float(arrays["nats"][start:stop].sum() / (count * (stop - start))),
                    "mean_steps": float(arrays["steps"][:, start:stop].mean()),
                }
            )
    heads, conditions = [], []
    layer_count, _, head_count = own["steps"].shape
    for layer in range(layer_count):
        for head in range(head_count):
            place = {"layer": layer, "head": head}
            lam = own["lam"][layer, head]
            beta, gamma = own["beta"][layer, :, head].tolist(), own["gamma"][layer, :, head].tolist()
            heads.append(
                {
                    **place,
                    "mean_steps": float(own["steps"][layer, :, head].mean()),
                    "condition_median": float(own["conditions"][layer, -1, 0, head]),
                    "condition_largest": float(own["conditions"][layer, :, 1, head].max()),
                    **{f"beta_{share}": value for share, value in zip((5, 50, 95), beta, strict=True)},
                    **{f"gamma_{share}": value for share, value in zip((5, 50, 95), gamma, strict=True)},
                    "lambda_smallest": float(lam.min()),
                    "lambda_mean": float(lam.mean()),
                    "lambda_largest": float(lam.max()),
                }
            )
            for end, (median, largest) in zip(
                own["ends"].tolist(), own["conditions"][layer, :, :, head].tolist(), strict=True
            ):
                conditions.append({**place, "position": end, "median": median, "largest": largest})
    return {"sweep": entries, "positions": positions, "heads": heads, "conditions": conditions}


def write_tables(folder: Path, result: dict) -> None:
    """The lists of `result` as CSV."""
    tasks = list(dict.fromkeys(name for entry in result["sweep"] for name in entry["tasks"]))
    rows = [{**entry, **{name: entry["tasks"].get(name) for name in tasks}} for entry in result["sweep"]]
    for name, entries in (
        ("settings", [{key: value for key, value in row.items() if key != "tasks"} for row in rows]),
        ("positions", result["positions"]),
        ("heads", result["heads"]),
        ("conditions", result["conditions"]),
    ):
        write_csv(folder / f"{name}.csv", list(entries[0]), (entry.values() for entry in entries))


# ---------------------------------------------------------------------------------------------------- figures


def plot_sweep(path: Path, result: dict, measured: dict[str, dict[str, np.ndarray]], count: int) -> None:
    """Quality against steps, and loss and steps by position for every setting; tasks where they were run."""
    from matplotlib.figure import Figure

    entries = {entry["name"]: entry for entry in result["sweep"]}
    families = {
        "fixed steps": [entry for entry in result["sweep"] if entry["name"] != OWN and entry["tolerance"] is None],
        "tolerance": [entry for entry in result["sweep"] if entry["name"] != OWN and entry["tolerance"] is not None],
    }
    tasks = list(entries[OWN]["tasks"])
    panels = 4 + len(tasks)
    rows = math.ceil(panels / 2)
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, 2).flatten()

    def against_steps(axes, value: Callable[[dict], float], label: str) -> None:
        for family, members in families.items():
            members = sorted(members, key=lambda entry: entry["mean_steps"])
            steps, values = [entry["mean_steps"] for entry in members], [value(entry) for entry in members]
            axes.plot(steps, values, "o-", label=family)
        axes.plot(entries[OWN]["mean_steps"], value(entries[OWN]), "k*", markersize=10, label="checkpoint's setting")
        axes.set(xlabel="mean steps a token, layer and head", ylabel=label)
        axes.set_xscale("symlog", linthresh=1)
        axes.legend()

    against_steps(grid[0], lambda entry: entry["nll"], "loss, nats a token")
    # Without a solver there is no residual, and zero has no logarithm.
    against_steps(grid[1], lambda entry: entry["mean_residual"] or math.nan, "mean relative residual")
    grid[1].set_yscale("log")
    length = len(measured[OWN]["nats"])
    edges = bins(length, log=True, count=24)
    centres = (edges[:-1] + edges[1:] + 1) / 2
    base = PositionSums(measured[OWN]["nats"], np.full(length, count)).binned(edges)
    for name, arrays in measured.items():
        loss = PositionSums(arrays["nats"], np.full(length, count)).binned(edges)
        steps = PositionSums(arrays["steps"].mean(axis=(0, 2)), np.ones(length, np.int64)).binned(edges)
        style = {"color": "black", "linewidth": 2} if name == OWN else {}
        if entries[name] in families["tolerance"]:
            style = {"linestyle": "--"}  # there are more settings than colours
        grid[2].plot(centres, loss - base, label=name, **style)
        grid[3].plot(centres, steps, label=name, **style)
    for axes, label in ((grid[2], "loss above the checkpoint's setting, nats"), (grid[3], "mean steps")):
        axes.set(xlabel="position, tokens", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="x-small", ncols=2)
    for axes, task in zip(grid[4:], tasks, strict=False):
        against_steps(axes, lambda entry, task=task: entry["tasks"][task], task)
    for axes in grid[panels:]:
        axes.set_axis_off()
    for axes in grid[:panels]:
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_heads(path: Path, result: dict, own: dict[str, np.ndarray]) -> None:
    """Steps, condition numbers, gates and regularisers by layer and head; condition numbers by position."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers, _, heads = own["steps"].shape
    maps = {
        "mean steps": (own["steps"].mean(axis=1), None),
        "condition number at the end, median": (own["conditions"][:, -1, 0], LogNorm()),
        "write gate beta, median": (own["beta"][:, 1], None),
        "memory 1 / (1 - gamma), median, tokens": (1 / (1 - own["gamma"][:, 1]).clip(1e-6), LogNorm()),
        "regulariser Lambda, mean": (own["lam"].mean(axis=2), None),
    }
    figure = Figure(figsize=(15, 8), layout="constrained")
    grid = figure.subplots(2, 3).flatten()
    for axes, (title, (values, norm)) in zip(grid, maps.items(), strict=False):
        image = axes.imshow(values, aspect="auto", norm=norm, origin="lower")
        axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
        figure.colorbar(image, ax=axes)
    for layer in range(layers):
        median, largest = own["conditions"][layer, :, 0], own["conditions"][layer, :, 1]
        grid[5].plot(own["ends"], np.median(median, axis=1), color=f"C{layer % 10}", label=f"layer {layer}")
        grid[5].plot(own["ends"], largest.max(axis=1), ":", color=f"C{layer % 10}")
    grid[5].set(title="condition number: median, largest dotted", xlabel="position, tokens", yscale="log")
    grid[5].legend(fontsize="x-small", ncols=2)
    grid[5].grid(alpha=0.3)
    save_figure(figure, path)


def print_result(result: dict) -> None:
    """The settings and the heads as tables on standard output."""
    console = output_console()
    tasks = list(result["sweep"][0]["tasks"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("setting")
    for heading in ("nats a token", "difference", "mean steps", "mean residual", *tasks):
        table.add_column(heading, justify="right")
    for entry in result["sweep"]:
        cells = [f"{entry['nll']:.4f}", f"{entry['difference']:+.5f}", f"{entry['mean_steps']:.2f}"]
        cells += [f"{entry['mean_residual']:.1e}", *(f"{entry['tasks'][task]:.4f}" for task in tasks)]
        table.add_row(entry["name"], *cells)
    console.print(table)
    table = Table(title=f"at the {OWN}'s setting", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("layer", "head", "mean steps", "condition", "largest", "beta", "gamma", "Lambda"):
        table.add_column(heading, justify="right")
    for entry in result["heads"]:
        table.add_row(
            str(entry["layer"]),
            str(entry["head"]),
            f"{entry['mean_steps']:.1f}",
            f"{entry['condition_median']:.1f}",
            f"{entry['condition_largest']:.1f}",
            f"{entry['beta_50']:.3f}",
            f"{entry['gamma_50']:.4f}",
            f"{entry['lambda_mean']:.3f}",
        )
    console.print(table)
