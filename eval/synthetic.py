# SPDX-License-Identifier: Apache-2.0
"""`mesanet synthetic`: sequence layers compared on small tasks, each trained from scratch in minutes.

The model is the published one of MAD and MQAR: two blocks of width 128 with 8 heads of key size 16. Every layer is
trained by the same program on the same examples in the same order.

Dimensions: N examples, T tokens, V vocabulary, d width, M scored positions.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from transformers import LlamaConfig, LlamaModel

from modeling_mesanet import MesaNetConfig, MesaNetModel
from modeling_mesanet.files import write_json

from . import synthetic_data
from .results import (
    UsageError,
    environment,
    open_results,
    output_console,
    parse_numbers,
    progress_bar,
    require,
    save_figure,
    write_csv,
)
from .synthetic_data import IGNORED, Examples

# The learning rate falls along a cosine to this, after a linear warm-up over this share of the steps.
LOWEST_LEARNING_RATE = 1e-6
WARMUP = 0.05

# Steps over which the training loss is averaged.
LOSS_EVERY = 20

# The records of finished runs, inside the results folder.
RUNS = "runs"


# ---------------------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass(frozen=True)
class Segment:
    """`count` examples of one kind: options of the task's generator, and the name of its row in the table."""

    count: int
    options: dict
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Passes over the examples, and the grid of settings of which the best is reported."""

    epochs: int
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a model, by default those published for MAD."""

    width: int = 128
    blocks: int = 2
    heads: int = 8

    @property
    def head(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark: how to make its examples, and how long to train.

    `quick` is enough to tell layers apart in minutes; `published` is the protocol of the task's authors.
    """

    vocab: int
    generate: Callable[..., Examples]
    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    quick: Schedule
    published: Schedule
    batch_size: int = 128
    size: Size = Size()
    # All tokens are read off the output of the last one, by an MLP (MAD's compression task).
    from_last_output: bool = False


def mad(generate, *, train: int = 12_800, quick_epochs: int = 20, from_last_output: bool = False, **options) -> Task:
    """A task of MAD in its baseline setting: 12,800 examples to train on, 1,280 to test on, batches of 128."""
    return Task(
        vocab=options["vocab"],
        generate=generate,
        train=(Segment(train, options),),
        test=(Segment(1280, options),),
        quick=Schedule(quick_epochs, (1e-3,), (0.1,)),
        published=Schedule(200, (1e-4, 5e-4, 1e-3), (0.0, 0.1)),
        from_last_output=from_last_output,
    )


MAD_TASKS = {
    "in-context-recall": mad(synthetic_data.in_context_recall, length=128, vocab=16, noise=0.0, noise_vocab=0),
    "noisy-recall": mad(synthetic_data.in_context_recall, length=128, vocab=32, noise=0.2, noise_vocab=16),
    "fuzzy-recall": mad(synthetic_data.fuzzy_in_context_recall, length=128, vocab=16, motif=3),
    "selective-copying": mad(synthetic_data.selective_copying, length=256, vocab=16, copied=16),
    # Two batches an epoch: the published 200 epochs are quick.
    "memorization": mad(
        synthetic_data.memorization, train=256, quick_epochs=200, length=32, vocab=256, mapping_seed=12345
    ),
    "compression": mad(synthetic_data.compression, from_last_output=True, length=32, vocab=16),
}

MQAR_VOCAB = 8192


def _mqar(length: int, pairs: int, count: int) -> Segment:
    return Segment(count, {"length": length, "pairs": pairs, "vocab": MQAR_VOCAB}, f"{pairs} pairs")


TASKS = {
    **MAD_TASKS,
    "mqar": Task(
        vocab=MQAR_VOCAB,
        generate=synthetic_data.multi_query_recall,
        train=(_mqar(64, 4, 100_000), *(_mqar(max(128, 4 * n), n, 20_000) for n in (8, 16, 32, 64))),
        test=tuple(_mqar(max(64, 4 * pairs), pairs, 1000) for pairs in (4, 8, 16, 32, 64, 128, 256)),
        quick=Schedule(3, (3e-3,), (0.1,)),
        published=Schedule(32, (1e-3, 10**-2.5, 10**-2, 10**-1.5), (0.1,)),
        batch_size=256,
        # A head tells at most as many keys apart as its key size: 8 of size 16 could not hold what is asked here.
        size=Size(heads=2),
    ),
    "regbench": Task(
        vocab=20,
        generate=synthetic_data.in_context_language,
        train=(Segment(5000, {"length": 512, "alphabet": 18}),),
        test=(Segment(500, {"length": 512, "alphabet": 18}),),
        quick=Schedule(40, (1e-3,), (0.1,)),
        published=Schedule(200, (1e-4, 2.5e-4, 5e-4, 1e-3), (0.1,)),
        batch_size=64,
    ),
}
GROUPS = {"mad": tuple(MAD_TASKS), "all": tuple(TASKS)}


def make_examples(task: Task, segment: Segment, rng: np.random.Generator, training: bool) -> Examples:
    return task.generate(rng, segment.count, training, **segment.options)


class ExampleBatches(Dataset):
    """Examples of several lengths, read by batches of indices that fall into one segment.

    A batch holds `inputs` `[N, T]`, `asked` `[M]` (positions with a target, counted over the flattened batch), their
    `targets` `[M]` and, if other answers count as right, `accepted` `[M, V]`.
    """

    def __init__(self, segments: list[Examples]):
        self.segments = segments
        self.bounds = np.cumsum([0] + [len(examples.inputs) for examples in segments])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        segment = int(np.searchsorted(self.bounds, indices[0], side="right")) - 1
        rows = np.asarray(indices) - self.bounds[segment]
        examples = self.segments[segment]
        targets = examples.targets[rows].reshape(-1)
        # Counted here, because a GPU would have to be waited for before the size of the result is known.
        asked = np.flatnonzero(targets != IGNORED)
        batch = {"inputs": examples.inputs[rows], "asked": asked, "targets": targets[asked]}
        if examples.accepted is not None:
            batch["accepted"] = examples.accepted[rows].reshape(len(targets), -1)[asked]
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


class OneLengthBatches(BatchSampler):
    """Batches that hold examples of one segment each, in a random order, another one every epoch."""

    def __init__(self, dataset: ExampleBatches, batch_size: int, generator: torch.Generator):
        super().__init__(RandomSampler(dataset, generator=generator), batch_size, drop_last=False)
        self.dataset, self.generator = dataset, generator

    def __iter__(self):
        batches = []
        for start, stop in itertools.pairwise(self.dataset.bounds):
            order = torch.randperm(stop - start, generator=self.generator) + start
            batches += order.split(self.batch_size)
        for index in torch.randperm(len(batches), generator=self.generator):
            yield batches[index].tolist()

    def __len__(self) -> int:
        sizes = np.diff(self.dataset.bounds)
        return int(np.ceil(sizes / self.batch_size).sum())


# ---------------------------------------------------------------------------------------------------- models


def mesanet_backbone(size: Size, vocab: int, longest: int, steps: int | None = None) -> nn.Module:
    """MesaNet; `steps` fixes the conjugate-gradient steps, 0 leaving gated linear attention."""
    solver = {} if steps is None else {"cg_max_steps": steps, "cg_max_steps_training": steps, "cg_tolerance": None}
    config = MesaNetConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        head_dim=size.head,
        value_head_dim=size.head,
        intermediate_size=3 * size.width,
        max_position_embeddings=longest,
        **solver,
    )
    return MesaNetModel(config)


def attention_backbone(size: Size, vocab: int, longest: int) -> nn.Module:
    """Softmax attention with rotary positions: transformers' Llama."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.head,
        intermediate_size=3 * size.width,
        max_position_embeddings=longest,
    )
    return LlamaModel(config)


# What is compared: layers by name, each making a backbone of transformers (`last_hidden_state` from `input_ids`).
LAYERS: dict[str, Callable[[Size, int, int], nn.Module]] = {
    "mesanet": mesanet_backbone,
    "gla": functools.partial(mesanet_backbone, steps=0),
    "attention": attention_backbone,
}


class SequenceModel(nn.Module):
    """A backbone with a head; computes logits where something is asked."""

    def __init__(self, backbone: nn.Module, width: int, vocab: int, decoded: int | None = None):
        """`decoded`: read so many tokens off the last output, by an MLP that takes it and a position."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        self.decoder = None
        if decoded is not None:
            parts = [(nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)]
            self.decoder = nn.Sequential(*itertools.chain(*parts), nn.RMSNorm(width))
            self.register_buffer("positions", sinusoids(decoded, width), persistent=False)

    def forward(self, inputs: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Logits `[M, V]` at the positions `asked` (int64 `[M]`) of the flattened `inputs` `[N, T]`."""
        outputs = self.backbone(input_ids=inputs, use_cache=False).last_hidden_state
        if self.decoder is not None:
            outputs = self.decoder(outputs[:, -1:] + self.positions)
        return self.head(outputs.flatten(0, 1).index_select(0, asked))


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Sine and cosine position codes `[length, width]`."""
    angles = torch.arange(length)[:, None] * 10_000 ** -torch.linspace(0, 1, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Parameters that weight decay applies to: matrices and convolutions.

    Left out are embeddings (with the head tied to them), norms and gate biases (one dimension each), and the
    regulariser `lambda_param`, whose decay would pull Lambda towards a value that means nothing.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in embeddings and not name.endswith("lambda_param")
    ]


# ---------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a layer on a task with one setting of the optimizer."""

    task: str
    layer: str
    learning_rate: float
    weight_decay: float
    seed: int
    epochs: int

    @classmethod
    def of(cls, record: dict) -> "Run":
        """The run that a record is of."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})

    @property
    def name(self) -> str:
        numbers = f"lr{self.learning_rate:g}-wd{self.weight_decay:g}-seed{self.seed}-epochs{self.epochs}"
        return f"{self.task}-{self.layer}-{numbers}"

    @property
    def steps(self) -> int:
        task = TASKS[self.task]
        return self.epochs * sum(math.ceil(segment.count / task.batch_size) for segment in task.train)


def learning_rate_factor(step: int, steps: int, peak: float) -> float:
    """The learning rate at `step` as a share of its peak: linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    lowest = min(1.0, LOWEST_LEARNING_RATE / peak)
    progress = (step - warmup) / max(1, steps - warmup)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2


def train(
    run: Run,
    *,
    device: str = "cpu",
    mixed_precision: str = "no",
    advance: Callable[[int], None] | None = None,
) -> dict:
    """Train and test one run.

    Args:
        device: "cpu" or a GPU.
        mixed_precision: of `accelerate`: "no" or "bf16".
        advance: called with the number of steps done since the last call; what it raises ends the training.

    Returns:
        JSON types: the run's fields, `accuracy` (mean over `segments`, the accuracy of each kind of test example),
        `loss` (pairs of step and mean training loss), `diverged`, `parameters`, `steps`, `seconds`, `environment`.
    """
    from accelerate import Accelerator

    task = TASKS[run.task]
    began = time.monotonic()
    # Drawn from the seed alone, so that every layer sees the same examples in the same order.
    train_rng, test_rng = (np.random.default_rng([run.seed, part]) for part in range(2))
    dataset = ExampleBatches([make_examples(task, segment, train_rng, True) for segment in task.train])
    tests = [make_examples(task, segment, test_rng, False) for segment in task.test]
    order = torch.Generator().manual_seed(run.seed)
    sampler = OneLengthBatches(dataset, task.batch_size, order)
    batches = DataLoader(dataset, batch_sampler=sampler, collate_fn=as_it_is)

    torch.manual_seed(run.seed)
    longest = max(segment.options["length"] for segment in (*task.train, *task.test))
    backbone = LAYERS[run.layer](task.size, task.vocab, longest)
    decoded = task.train[0].options["length"] if task.from_last_output else None
    model = SequenceModel(backbone, task.size.width, task.vocab, decoded)
    decayed = set(decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == wanted], "weight_decay": decay}
        for wanted, decay in ((True, run.weight_decay), (False, 0.0))
    ]
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    optimizer = torch.optim.AdamW(groups, lr=run.learning_rate, fused=accelerator.device.type == "cuda")
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(learning_rate_factor, steps=run.steps, peak=run.learning_rate)
    )

    model.train()
    losses, recent, step, diverged = [], [], 0, False
    while step < run.steps and not diverged:
        for batch in batches:
            loss = F.cross_entropy(model(batch["inputs"], batch["asked"]).float(), batch["targets"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recent.append(loss.detach())
            step += 1
            if advance is not None:
                advance(1)
            if step % LOSS_EVERY == 0 or step == run.steps:
                losses.append((step, torch.stack(recent).mean().item()))
                recent = []
                if not math.isfinite(losses[-1][1]):
                    diverged = True
                    break
    if advance is not None:
        advance(run.steps - step)

    segments = {
        segment.name: accuracy(model, examples, task.batch_size, accelerator.device)
        for segment, examples in zip(task.test, tests, strict=True)
    }
    return {
        **dataclasses.asdict(run),
        "accuracy": statistics.mean(segments.values()),
        "segments": segments,
        "loss": losses,
        "diverged": diverged,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "mixed_precision": mixed_precision,
        **environment(accelerator.device),
    }


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, batch_size: int, device: torch.device) -> float:
    """Share of the scored positions whose likeliest token is the target, or one of the accepted ones."""
    model.eval()
    dataset, right, total = ExampleBatches([examples]), 0, 0
    for indices in torch.arange(len(dataset)).split(batch_size):
        batch = {name: tensor.to(device) for name, tensor in dataset.__getitems__(indices.tolist()).items()}
        answers = model(batch["inputs"], batch["asked"]).argmax(dim=-1)
        if "accepted" in batch:
            hits = batch["accepted"].gather(1, answers[:, None])
        else:
            hits = answers == batch["targets"]
        right, total = right + int(hits.sum()), total + len(answers)
    return right / total


# ---------------------------------------------------------------------------------------------------- the benchmark


class Stopped(Exception):
    """Trainings are to end before they are finished."""


# In a worker, what its parent reads and says: a queue of finished steps, and the event that stops all trainings.
_parent: dict = {}


def _begin_worker(threads: int, reports, stop) -> None:
    torch.set_num_threads(threads)
    reports.cancel_join_thread()  # a worker must not wait for a parent that has stopped reading
    _parent.update(reports=reports, stop=stop)
    # Ctrl-C reaches the workers, too, but it is the parent that ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot say so, and its workers would go on holding the GPU."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _train_in_worker(run: Run, file: Path, options: dict) -> None:
    def advance(steps: int) -> None:
        if _parent["stop"].is_set():
            raise Stopped
        _parent["reports"].put(steps)

    advance(0)
    write_json(file, train(run, advance=advance, **options))


def train_all(
    runs: dict[Run, Path],
    *,
    jobs: int,
    until: float = math.inf,
    finished: Callable[[], None],
    **options,
) -> dict[Run, Exception]:
    """Train `runs`, `jobs` of them at a time in processes of their own, and write each result to its file.

    Small models leave a GPU waiting for Python most of the time, so that several processes share it well.

    Args:
        until: a time of `time.monotonic()`; trainings that are not finished by then are given up.
        finished: called after each training.
        options: of `train`.

    Returns:
        The trainings that failed; they do not end the others. Those given up are not among them.
    """
    failed: dict[Run, Exception] = {}
    with progress_bar() as bar:
        task = bar.add_task("training steps", total=sum(run.steps for run in runs))
        if jobs == 1:

            def advance(steps: int) -> None:
                bar.advance(task, steps)
                if time.monotonic() > until:
                    raise Stopped

            for run, file in runs.items():
                bar.update(task, description=f"{run.task}, {run.layer}")
                try:
                    advance(0)
                    write_json(file, train(run, advance=advance, **options))
                except Stopped:
                    break
                except Exception as error:
                    failed[run] = error
                finished()
            return failed
        context = multiprocessing.get_context("spawn")
        reports, stop = context.Queue(), context.Event()
        beginning = (max(1, (os.cpu_count() or 1) // jobs), reports, stop)
        with ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=beginning) as pool:
            futures = {pool.submit(_train_in_worker, run, file, options): run for run, file in runs.items()}
            try:
                pending = set(futures)
                while pending:
                    with contextlib.suppress(queue.Empty):
                        bar.advance(task, reports.get(timeout=0.5))
                    if time.monotonic() > until:
                        stop.set()
                    for future in [future for future in pending if future.done()]:
                        pending.remove(future)
                        error = future.exception()
                        if error is not None and not isinstance(error, Stopped):
                            failed[futures[future]] = error
                        finished()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
    return failed


def benchmark(
    tasks: list[str],
    *,
    output: Path,
    layers: str = ",".join(LAYERS),
    published: bool = False,
    epochs: int | None = None,
    learning_rates: str | None = None,
    weight_decays: str | None = None,
    seeds: str = "0",
    jobs: int = 1,
    device: str = "cpu",
    mixed_precision: str = "no",
    time_limit: float | None = None,
    resume: bool = False,
    plot: bool = True,
) -> dict:
    """Train every layer on every task; writes `synthetic.json`, `synthetic.csv` and `synthetic.png` into `output`.

    Of a grid of settings the one with the best mean over the seeds is reported, as the tasks' authors do. The first
    two files are written anew after each training, so that an interruption leaves the table of what is finished.

    Args:
        tasks: names in `TASKS` or `GROUPS`.
        layers: names in `LAYERS`, with commas.
        published: the schedules of the tasks' authors instead of the quick ones.
        epochs, learning_rates, weight_decays: replace those of the schedule.
        seeds: of examples, order and weights, with commas.
        jobs: trainings at a time.
        time_limit: seconds after which trainings that are not finished are given up.
        resume: keep the finished runs in `output`, whatever their tasks, layers and settings, and add to them.

    Returns:
        The content of `synthetic.json`: `table` (one entry a task, kind of test example and layer) and `runs`, both of
        all finished runs in `output`; `missing`, the names of runs that were asked for and are not finished.

    Raises:
        UsageError: an option or the folder does not fit, accelerate is missing, or a training failed (after the others
            are finished).
    """
    began = time.monotonic()
    require("accelerate", "training")
    if plot:
        require("matplotlib", "the figure (--no-plot leaves it out)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but these models are too small to be spread; start one "
            "process and give --jobs instead."
        )
    chosen = list(dict.fromkeys(itertools.chain(*(GROUPS.get(name, (name,)) for name in tasks))))
    compared = list(dict.fromkeys(layers.split(",")))
    for option, names, known in (("TASK", chosen, [*GROUPS, *TASKS]), ("--layers", compared, LAYERS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(f"{option} is '{unknown[0]}'; choose from {', '.join(known)}.")
    if mixed_precision not in ("no", "bf16"):
        raise UsageError(f"--mixed-precision is '{mixed_precision}'; choose no or bf16.")
    positive = {"kind": float, "lowest": 1e-8, "below": 1.0}
    rates = None if learning_rates is None else parse_numbers(learning_rates, "--learning-rates", **positive)
    decays = (
        None
        if weight_decays is None
        else parse_numbers(weight_decays, "--weight-decays", kind=float, lowest=0.0, below=1.0)
    )
    numbers = parse_numbers(seeds, "--seeds", lowest=0, below=2**32)

    runs = []
    for name in chosen:
        schedule = TASKS[name].published if published else TASKS[name].quick
        grid = itertools.product(compared, rates or schedule.learning_rates, decays or schedule.weight_decays, numbers)
        runs += [Run(name, *setting, epochs=epochs or schedule.epochs) for setting in grid]
    folder = open_results(output, {"command": "synthetic", "mixed_precision": mixed_precision}, resume=resume)
    epochs_of = {run.task: run.epochs for run in runs}
    for record in read_runs(folder):
        if record["epochs"] != epochs_of.get(record["task"], record["epochs"]):
            raise UsageError(
                f"--output is '{folder}', whose runs of {record['task']} differ in epochs ({record['epochs']}, not "
                f"{epochs_of[record['task']]}); give another folder, or --epochs {record['epochs']} to add to them."
            )

    def write_table(plot: bool) -> dict:
        records = read_runs(folder)
        missing = sorted({run.name for run in runs} - {Run.of(record).name for record in records})
        result = {"mixed_precision": mixed_precision, "missing": missing, "table": best_of(records), "runs": records}
        columns = ["task", "test", "layer", "accuracy", "deviation", "learning_rate", "weight_decay", "parameters"]
        write_csv(folder / "synthetic.csv", columns, ([row[column] for column in columns] for row in result["table"]))
        if plot and records:
            plot_table(folder / "synthetic.png", result)
        write_json(folder / "synthetic.json", result)
        return result

    files = {run: folder / RUNS / f"{run.name}.json" for run in runs}
    # The longest first, so that no worker begins one when the others are done.
    waiting = sorted((run for run in runs if read_run(files[run]) is None), key=lambda run: run.steps, reverse=True)
    try:
        failed = train_all(
            {run: files[run] for run in waiting},
            jobs=max(1, min(jobs, len(waiting))),
            until=math.inf if time_limit is None else began + time_limit,
            finished=functools.partial(write_table, plot=False),
            device=device,
            mixed_precision=mixed_precision,
        )
    finally:
        result = write_table(plot)
    for run, error in failed.items():
        raise UsageError(
            f"{len(failed)} of {len(waiting)} trainings failed, among them {run.name} ({type(error).__name__}: "
            f"{error}); the others are in '{folder}', and --resume trains what is missing."
        ) from error
    return result


def read_runs(folder: Path) -> list[dict]:
    """The records of all finished runs in a results folder, in the order of the tasks and layers."""
    places = {name: place for place, name in enumerate([*TASKS, *LAYERS])}
    records = [record for file in (folder / RUNS).glob("[!.]*.json") if (record := read_run(file)) is not None]
    order = ("learning_rate", "weight_decay", "seed")
    return sorted(
        records,
        key=lambda r: (
            *(places.get(r[name], len(places)) for name in ("task", "layer")),
            *(r[name] for name in order),
        ),
    )


def read_run(path: Path) -> dict | None:
    """The record of a finished run, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def best_of(records: list[dict]) -> list[dict]:
    """Of each task, kind of test example and layer the best setting's accuracy: mean and deviation over the seeds."""
    table = []
    by_pair: dict[tuple, dict[tuple, list[dict]]] = {}
    for record in records:
        settings = by_pair.setdefault((record["task"], record["layer"]), {})
        settings.setdefault((record["learning_rate"], record["weight_decay"]), []).append(record)
    for (task, layer), settings in by_pair.items():
        best = max(settings.values(), key=lambda seeds: statistics.mean(record["accuracy"] for record in seeds))
        rows = {"": [record["accuracy"] for record in best]}
        if len(best[0]["segments"]) > 1:
            rows |= {name: [record["segments"][name] for record in best] for name in best[0]["segments"]}
        for test, values in rows.items():
            table.append(
                {
                    "task": task,
                    "test": test,
                    "layer": layer,
                    "accuracy": statistics.mean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "learning_rate": best[0]["learning_rate"],
                    "weight_decay": best[0]["weight_decay"],
                    "parameters": best[0]["parameters"],
                }
            )
    return table


def rows_and_layers(table: list[dict]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """The table by row ("task" or "task, test") and layer, and the layers."""
    rows: dict[str, dict[str, dict]] = {}
    for entry in table:
        rows.setdefault(", ".join(filter(None, (entry["task"], entry["test"]))), {})[entry["layer"]] = entry
    return rows, list(dict.fromkeys(entry["layer"] for entry in table))


def plot_table(path: Path, result: dict) -> None:
    """Accuracy of every layer by task, and the training loss of the runs that the table reports."""
    from matplotlib.figure import Figure

    rows, layers = rows_and_layers(result["table"])
    tasks = list(dict.fromkeys(entry["task"] for entry in result["table"]))
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(max(9, 0.9 * len(rows)), 4 + 2.6 * lines), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4, 2.6 * lines])
    axes = above.subplots()
    width = 0.8 / len(layers)
    for index, layer in enumerate(layers):
        places = np.arange(len(rows)) + (index - (len(layers) - 1) / 2) * width
        entries = [(place, held[layer]) for place, held in zip(places, rows.values(), strict=True) if layer in held]
        deviations = [entry["deviation"] or 0 for _, entry in entries]
        accuracies = [entry["accuracy"] for _, entry in entries]
        axes.bar([place for place, _ in entries], accuracies, width, yerr=deviations, label=layer)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha="right")
    axes.set(ylabel="accuracy", ylim=(0, 1))
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    grid = below.subplots(lines, columns, squeeze=False).flatten()
    for panel in grid[len(tasks) :]:
        panel.set_axis_off()
    for panel, task in zip(grid, tasks, strict=False):
        for index, layer in enumerate(layers):
            chosen = rows[task].get(layer)
            shown = [r for r in result["runs"] if chosen is not None and all(r[key] == chosen[key] for key in KEYS)]
            for record in shown:
                panel.plot(*zip(*record["loss"], strict=True), color=f"C{index}", label=layer, alpha=0.8)
        panel.set(title=task, xlabel="step", ylabel="training loss")
        panel.grid(alpha=0.3)
    save_figure(figure, path)


# What tells the runs of one entry of the table, up to their seeds.
KEYS = ("task", "layer", "learning_rate", "weight_decay")


def print_result(result: dict) -> None:
    """The table on standard output: accuracy in percent."""
    rows, layers = rows_and_layers(result["table"])
    table = Table(title="accuracy, %", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("task")
    for layer in layers:
        table.add_column(layer, justify="right")
    for name, held in rows.items():
        cells = []
        for layer in layers:
            if layer not in held:
                cells.append("-")
                continue
            deviation = held[layer]["deviation"]
            spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
            cells.append(f"{100 * held[layer]['accuracy']:.1f}{spread}")
        table.add_row(name, *cells)
    console = output_console()
    if rows:
        console.print(table)
    for record in result["runs"]:
        if record["diverged"]:
            rate = record["learning_rate"]
            console.print(f"{record['task']}, {record['layer']}: diverged at learning rate {rate:g}")
    if result["missing"]:
        console.print(f"{len(result['missing'])} trainings are not finished; --resume goes on with them.")
