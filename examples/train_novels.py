# SPDX-License-Identifier: Apache-2.0
"""Trains a small MesaNet on the novels corpus with transformers' `Trainer`, on a CPU or on GPUs.

    python examples/train_novels.py                                  # a few hundred steps, minutes on a laptop
    python examples/train_novels.py --preset checkpoint --resume     # the bundled checkpoint, on a GPU

The recipe is the published one (section 4 of arXiv 2506.05233) scaled down: AdamW, warm-up, cosine to 10 % of the
peak, clipped gradients, float32 weights with bfloat16 activations on a GPU, and no loss on the token that begins a
document.
"""

import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import accelerate
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import typer
from novels import (
    REPOSITORY,
    TrainingBlocks,
    UsageError,
    cached_tokens,
    data_folder,
    pack,
    read_documents,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM
from modeling_mesanet.eval.synthetic import decay_parameter_names
from modeling_mesanet.files import replacing, replacing_folder, write_json

# What --preset fills in where an option is not given; `Recipe` has the defaults of what is not here either.
PRESETS = {
    "laptop": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "layers": 2,
        "heads": 2,
        "head_dim": 64,
        "intermediate_size": 384,
        "sequence_length": 256,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "steps": 300,
        "eval_every": 100,
        "eval_tokens": 32768,
    },
    "checkpoint": {
        "vocab_size": 6144,
        "hidden_size": 256,
        "layers": 8,
        "heads": 4,
        "head_dim": 64,
        "intermediate_size": 768,
        "sequence_length": 2048,
        "batch_size": 16,
        "learning_rate": 4e-3,
        "weight_decay": 0.5,
        "head_norm_eps": 1e-3,
        "steps": 2000,
        "eval_every": 250,
        "eval_tokens": 131072,
    },
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines the result; a resumed run must agree in all of it. Every field is an option or a convention."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    intermediate_size: int
    sequence_length: int
    batch_size: int  # blocks an optimizer step, over all devices
    learning_rate: float  # the peak
    steps: int
    warmup_steps: int
    final_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    gradient_clip: float = 1.0
    cg_tolerance: float = 1e-4  # of the solver; at most 30 steps as published
    head_norm_eps: float | None = None  # None: that of all norms, 1e-6
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def validate(self) -> None:
        """Raise `UsageError` for the first value that cannot work."""
        for name in ("hidden_size", "layers", "heads", "head_dim", "intermediate_size", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.sequence_length < 2:
            raise UsageError(f"sequence_length is {self.sequence_length}; it must be at least 2, to predict a token.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UsageError(f"warmup_steps is {self.warmup_steps}; it must be from 0 to steps ({self.steps}).")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be greater than 0.")
        if self.head_norm_eps is not None and not 0 < self.head_norm_eps < math.inf:
            raise UsageError(f"head_norm_eps is {self.head_norm_eps}; it must be finite and greater than 0.")


def build_model(recipe: Recipe, special_token: int) -> PreTrainedModel:
    config = MesaNetConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        head_dim=recipe.head_dim,
        value_head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=max(2048, recipe.sequence_length),
        cg_tolerance_training=recipe.cg_tolerance,
        head_norm_eps=recipe.head_norm_eps,
        chunk_size=32,  # the fastest for heads of 64, on a CPU and on a GPU
        bos_token_id=special_token,
        eos_token_id=special_token,
        pad_token_id=special_token,
    )
    return MesaNetForCausalLM(config)


# ---------------------------------------------------------------------------------------------------- validation


class ValidationWindows(torch.utils.data.Dataset):
    """Consecutive windows of the validation tokens, each of L inputs and the L tokens that follow them.

    Every token but the first is predicted once; the state starts empty in each window, so the figure is a little
    higher than that of evaluate_novels.py, which carries it through whole novels.

    Args:
        tokens: `[N]`.
        length: L.
        special_token: fills up the last window; never scored, as a label.
        limit: use about so many tokens, in windows spread evenly over the corpus; None uses all.
    """

    def __init__(self, tokens: np.ndarray, length: int, special_token: int, limit: int | None = None):
        self.tokens, self.length, self.special_token = tokens, length, special_token
        windows = math.ceil((len(tokens) - 1) / length)
        wanted = windows if limit is None else min(windows, max(1, limit // length))
        self.starts = length * np.linspace(0, windows, wanted, endpoint=False).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        window = self.tokens[start : start + self.length + 1]
        return np.pad(window, (0, self.length + 1 - len(window)), constant_values=self.special_token)


class NovelsTrainer(Trainer):
    """`Trainer` with the parameter groups of the recipe, exact validation in bits per byte, and a rate of tokens."""

    def __init__(self, *, recipe: Recipe, bytes_of_token: np.ndarray, **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.bytes_of_token = torch.from_numpy(bytes_of_token)
        self.last_logged: tuple[int, float] | None = None  # step and time
        self.seconds_paused = 0.0  # spent in validation since then

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss (nats a token) and bits per byte over the validation windows, every scored token counted once."""
        began = time.monotonic()
        windows = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        device, bos = self.args.device, windows.special_token
        bytes_of_token = self.bytes_of_token.to(device)
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
        model = self.model.eval()
        mine = range(rank, len(windows), world)
        for first in range(0, len(mine), self.args.eval_batch_size):
            rows = np.stack([windows[i] for i in mine[first : first + self.args.eval_batch_size]])
            batch = {k: v.to(device) for k, v in pack(list(rows[:, :-1]), bos).items() if k != "labels"}
            targets = torch.from_numpy(rows[:, 1:].astype(np.int64)).to(device)
            with torch.no_grad(), self.accelerator.autocast():
                logits = model(**batch, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            scored = targets.flatten() != bos  # a special token has no bytes either
            sums += torch.stack([(losses.double() * scored).sum(), scored.sum(), bytes_of_token[targets].sum()])
        nats, tokens, size = self.accelerator.reduce(sums).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nats / tokens,
            f"{metric_key_prefix}_bits_per_byte": nats / math.log(2) / size,
        }
        self.seconds_paused += time.monotonic() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            step, now = self.state.global_step, time.monotonic()
            if self.last_logged is not None and step > self.last_logged[0]:
                tokens = (step - self.last_logged[0]) * self.recipe.tokens_per_step
                logs["tokens_per_second"] = round(tokens / (now - self.last_logged[1] - self.seconds_paused), 1)
            self.last_logged, self.seconds_paused = (step, now), 0.0
        super().log(logs, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------- records


class RunRecord(TrainerCallback):
    """Keeps `log.jsonl` and `loss.png` up to date, stops at the time budget, and refuses to go on from a NaN.

    Args:
        folder: where both are written.
        recipe: of the run.
        deadline: `time.monotonic()` at which to stop; None never does.
        trainer: set after construction; its log lines are recorded.
    """

    # Several processes must stop at the same step, which costs a message between them: asked for this often.
    STEPS_BETWEEN_AGREEMENTS = 10

    def __init__(self, folder: Path, recipe: Recipe, deadline: float | None):
        self.log_file, self.figure = folder / "log.jsonl", folder / "loss.png"
        self.recipe, self.deadline = recipe, deadline
        self.began = time.monotonic()
        self.first_step = 0
        self.entries: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        # What an earlier run logged after its last checkpoint is about to happen again.
        self.entries = [entry for entry in read_log(self.log_file) if entry["step"] <= state.global_step]
        with replacing(self.log_file) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and not control.should_training_stop and self.time_is_up(args, state):
            control.should_training_stop = control.should_save = control.should_log = True

    def time_is_up(self, args, state) -> bool:
        if args.world_size == 1:
            return time.monotonic() >= self.deadline
        if state.global_step % self.STEPS_BETWEEN_AGREEMENTS:
            return False
        answer = torch.tensor([float(time.monotonic() >= self.deadline)], device=args.device)
        return bool(accelerate.utils.broadcast(answer).item())

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is None:
            return  # the closing summary
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}: start again from the last checkpoint with a lower "
                "--learning-rate (in another --output-dir)."
            )
        if not state.is_world_process_zero:
            return
        entry = {
            "step": state.global_step,
            "tokens": state.global_step * self.recipe.tokens_per_step,
            "run_seconds": round(time.monotonic() - self.began, 2),
            **{key: value for key, value in logs.items() if isinstance(value, int | float) and key != "epoch"},
        }
        self.entries.append(entry)
        with open(self.log_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_losses(self.entries, self.figure)

    on_train_end = on_evaluate


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a last line cut short by a crash is dropped."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def plot_losses(entries: list[dict], path: Path) -> None:
    """Training and validation loss over tokens, and the validation's bits per byte, as a PNG."""
    from matplotlib.figure import Figure

    train = [(e["tokens"], e["loss"]) for e in entries if "loss" in e]
    # One point a step: the last validation, over all tokens, stands for the one of the last step.
    valid = {e["tokens"]: (e["tokens"], e["eval_loss"], e["eval_bits_per_byte"]) for e in entries if "eval_loss" in e}
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="tokens seen", ylabel="cross-entropy, nats per token", title="MesaNet on the novels corpus"
    )
    axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if valid:
        tokens, losses, bits = zip(*valid.values(), strict=True)
        (line,) = axes.plot(tokens, losses, marker="o", markersize=3, label="validation")
        # Bits per byte are nats per token times a constant of the tokenizer: one curve, two scales.
        ratio = bits[-1] / losses[-1]
        second = axes.secondary_yaxis("right", functions=(lambda x: x * ratio, lambda y: y / ratio))
        second.set_ylabel("validation, bits per byte")
        axes.annotate(
            f"{bits[-1]:.3f} bits per byte", (tokens[-1], losses[-1]), textcoords="offset points", xytext=(-4, 12),
            ha="right", color=line.get_color(),
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def describe_hardware(devices: int) -> dict:
    """What ran the training, as far as a model card needs it."""
    hardware = {"machine": platform.machine(), "cpu_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        hardware |= {
            "accelerator": torch.cuda.get_device_name(0),
            "accelerators": devices,
            "accelerator_memory_gib": round(memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return hardware


def describe_versions() -> dict:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{module.__name__: module.__version__ for module in (transformers, accelerate, tokenizers)},
    }
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        versions["revision"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        versions["revision"] = None  # not a checkout, or no git here
    return versions


# ---------------------------------------------------------------------------------------------------- the run


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the trainer's state is the last file of one."""
    complete = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            complete[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
        except (OSError, ValueError, KeyError):
            continue
    return complete[max(complete)] if complete else None


def check_output(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any; `UsageError` where the folder holds another run."""
    checkpoint, recipe_file = last_checkpoint(folder), folder / "recipe.json"
    if checkpoint is not None and not resume:
        raise UsageError(f"{folder} holds {checkpoint.name} already: give --resume to go on, or another --output-dir.")
    if checkpoint is not None and recipe_file.is_file():
        old = json.loads(recipe_file.read_text(encoding="utf-8"))
        new = dataclasses.asdict(recipe)
        changed = [f"{key} was {old.get(key)}, is now {value}" for key, value in new.items() if old.get(key) != value]
        if changed:
            raise UsageError(f"--resume cannot change the recipe of {folder}: {'; '.join(changed)}.")
    return checkpoint


def get_tokenizer(given: Path | None, output: Path, corpus: Path, vocab_size: int | None):
    """The tokenizer in `given`, else the one in the output folder, trained there if it is missing."""
    folder = given if given is not None else output / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        if given is not None:
            raise UsageError(f"--tokenizer is {given}, which has no tokenizer.json: give a folder that has one.")
        save_tokenizer(train_tokenizer(read_documents(corpus / "novels_train.jsonl.gz"), vocab_size), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token_id is None:
        raise UsageError(f"the tokenizer in {folder} has no bos token: give one made by train_tokenizer.py.")
    if given is None and vocab_size != len(tokenizer):
        raise UsageError(
            f"--vocab-size is {vocab_size}, but {folder} holds a tokenizer of {len(tokenizer)} entries: give that, or "
            "another --output-dir."
        )
    return tokenizer


def save_final(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Model in bfloat16 and tokenizer as one folder; loading decides what stays in float32, as for any user."""
    model.config.use_cache = True  # Trainer switched it off
    with replacing_folder(folder) as temporary:
        with tempfile.TemporaryDirectory(dir=folder.parent) as full:
            model.save_pretrained(full)
            type(model).from_pretrained(full, dtype=torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def train(
    recipe: Recipe,
    tokenizer,
    corpus: Path,
    output: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    eval_every: int = 250,
    eval_tokens: int | None = None,
    log_every: int = 10,
    accumulate: int = 1,
    torch_compile: bool = False,
    dataloader_workers: int = 0,
    use_cpu: bool = False,
    progress: bool = True,
) -> dict:
    """Train (or go on training) and write everything under `output`; returns the content of `training_log.json`.

    Args:
        corpus: folder with novels_train.jsonl.gz and novels_valid.jsonl.gz.
        resume: go on from the last complete checkpoint in `output`, if there is one.
        max_minutes: stop after so much time of this run, with a checkpoint; the schedule still refers to all steps.
        eval_every: steps between validations and between checkpoints.
        eval_tokens: validation tokens used for that; None uses all. The last validation always does.
        accumulate: micro-batches an optimizer step.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    recipe.validate()
    state = accelerate.PartialState(cpu=use_cpu)
    world = state.num_processes
    cuda = torch.cuda.is_available() and not use_cpu
    if cuda and world == 1 and torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if recipe.batch_size % (world * accumulate):
        raise UsageError(
            f"batch_size is {recipe.batch_size}; it must be a multiple of processes times --accumulate "
            f"({world} x {accumulate})."
        )
    checkpoint = check_output(output, recipe, resume)
    special_token, progress_here = tokenizer.bos_token_id, progress and state.is_main_process
    with state.main_process_first():
        (train_tokens, train_data), (valid_tokens, valid_data) = (
            cached_tokens(
                tokenizer,
                corpus / f"novels_{part}.jsonl.gz",
                output / f"tokens_{part}.npy",
                f"tokenising {part}" if progress_here else None,
            )
            for part in ("train", "valid")
        )
    blocks = TrainingBlocks(train_tokens, recipe.sequence_length, recipe.steps * recipe.batch_size, recipe.seed)
    windows = ValidationWindows(valid_tokens, recipe.sequence_length, special_token, eval_tokens)
    if state.is_main_process:
        write_json(output / "recipe.json", dataclasses.asdict(recipe))

    transformers.set_seed(recipe.seed)
    model = build_model(recipe, special_token)
    per_device = recipe.batch_size // (world * accumulate)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate_ratio},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.gradient_clip,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        torch_compile=torch_compile,
        use_cpu=use_cpu,
        # The filter reads the loss on the host after every step; RunRecord looks when it is logged anyway.
        logging_nan_inf_filter=False,
        logging_steps=log_every,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=eval_every,
        save_total_limit=2,
        seed=recipe.seed,
        # TrainingBlocks are in their order already.
        train_sampling_strategy="sequential",
        dataloader_num_workers=dataloader_workers,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=not progress,
    )
    record = RunRecord(output, recipe, None if max_minutes is None else began + 60 * max_minutes)
    trainer = NovelsTrainer(
        recipe=recipe,
        bytes_of_token=token_bytes(tokenizer),
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=windows,
        data_collator=functools.partial(pack, bos=special_token),
        processing_class=tokenizer,
        callbacks=[record],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step = trainer.state.global_step
    complete = step >= recipe.steps
    metrics = (
        trainer.evaluate(ValidationWindows(valid_tokens, recipe.sequence_length, special_token)) if complete else None
    )
    content = None
    if state.is_main_process:
        if complete:
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            save_final(trained, tokenizer, output / "final")
        mine = (entry for entry in record.entries if entry["step"] > record.first_step)
        rates = [entry["tokens_per_second"] for entry in mine if "tokens_per_second" in entry]
        this_run = {
            "started": started,
            "seconds": round(time.monotonic() - began, 1),
            "from_step": record.first_step,
            "to_step": step,
            "tokens_per_second": statistics.median(rates) if rates else None,
            "hardware": describe_hardware(world),
            "versions": describe_versions(),
        }
        runs = earlier_runs(output / "training_log.json", record.first_step)
        if step > record.first_step or not runs:  # else everything was done already
            runs.append(this_run)
        tokens_seen = step * recipe.tokens_per_step
        content = {
            "status": "complete" if complete else f"stopped at step {step} of {recipe.steps}",
            "recipe": dataclasses.asdict(recipe),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": step,
            "tokens_seen": tokens_seen,
            "epochs": tokens_seen / train_data["tokens"],
            "wall_seconds": round(sum(run["seconds"] for run in runs), 1),
            "validation": metrics,
            "data": {"train": train_data, "valid": valid_data},
            "runs": runs,
        }
        write_json(output / "training_log.json", content)
    state.wait_for_everyone()
    return content


def earlier_runs(path: Path, step: int) -> list[dict]:
    """The runs in a training log that led to `step`; one that went further was lost, and is done again."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError):
        return []
    return [run for run in runs if run["to_step"] <= step]


def main(
    output_dir: Annotated[Path, typer.Option(help="Checkpoints, log, loss curve and final/ go here.")] = Path(
        "novels-model"
    ),
    preset: Annotated[str, typer.Option(help=f"Defaults to start from: {' or '.join(PRESETS)}.")] = "laptop",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds corpus/ (default: MESANET_DATA).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder (default: train one).")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of the tokenizer trained here.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the residual stream.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of each Mesa layer.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Key and value size of a head.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the MLP.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a block.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks an optimizer step, over all devices.")] = None,
    accumulate: Annotated[int, typer.Option(help="Micro-batches an optimizer step.", min=1)] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"On matrices and convolutions only ({Recipe.weight_decay}).")
    ] = None,
    head_norm_eps: Annotated[
        float | None, typer.Option(help="Of the norm of each head's output; 1e-3 trains without spikes (1e-6).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the whole schedule.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Instead of --steps: passes over the corpus.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Default: 5 % of the steps.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop this run after so long, with a checkpoint to --resume from.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output-dir, if any.")] = False,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations and checkpoints.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Validation tokens used on the way; all at the end.")] = None,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    torch_compile: Annotated[bool, typer.Option(help="Compile the model.")] = False,
    dataloader_workers: Annotated[int | None, typer.Option(help="Default: 2 with a GPU, else 0.")] = None,
    cpu: Annotated[bool, typer.Option(help="Leave GPUs alone.")] = False,
) -> None:
    """Train a MesaNet on the novels; every option not given comes from --preset."""
    if preset not in PRESETS:
        raise UsageError(f"--preset is {preset!r}; choose {' or '.join(PRESETS)}.")
    if steps is not None and epochs is not None:
        raise UsageError("--steps and --epochs were both given: give one of them.")
    # Bars for writing and loading a few megabytes would only break up the one of the training.
    transformers.utils.logging.disable_progress_bar()
    given = locals()
    validation = ("eval_every", "eval_tokens")
    names = [*(field.name for field in dataclasses.fields(Recipe)), *validation]
    chosen = PRESETS[preset] | {name: given[name] for name in names if given.get(name) is not None}
    corpus = data_folder(data_dir) / "corpus"
    output_dir.mkdir(parents=True, exist_ok=True)
    with accelerate.PartialState(cpu=cpu).main_process_first():
        loaded = get_tokenizer(tokenizer, output_dir, corpus, chosen.pop("vocab_size"))
        if epochs is not None:
            _, data = cached_tokens(
                loaded, corpus / "novels_train.jsonl.gz", output_dir / "tokens_train.npy", "tokenising train"
            )
            per_step = chosen["batch_size"] * chosen["sequence_length"]
            chosen["steps"] = math.ceil(epochs * data["tokens"] / per_step)
    # Worker processes are forked after the tokenizer ran; it would warn in each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = {key: chosen.pop(key) for key in validation}
    chosen.setdefault("warmup_steps", max(1, round(0.05 * chosen["steps"])))
    recipe = Recipe(vocab_size=len(loaded), **chosen)
    if dataloader_workers is None:
        dataloader_workers = 2 if torch.cuda.is_available() and not cpu else 0
    content = train(
        recipe,
        loaded,
        corpus,
        output_dir,
        resume=resume,
        max_minutes=max_minutes,
        log_every=log_every,
        accumulate=accumulate,
        torch_compile=torch_compile,
        dataloader_workers=dataloader_workers,
        use_cpu=cpu,
        **settings,
    )
    if content is not None:
        print(f"{content['status']}: {content['tokens_seen']:,} tokens seen in {content['wall_seconds']} s")
        if content["validation"] is None:
            print("Give the same command with --resume to go on.")
        else:
            bits = content["validation"]["eval_bits_per_byte"]
            print(f"novels_valid: {bits:.4f} bits per byte; the model is in {output_dir / 'final'}")
    # A process that ends as a member of a group may be aborted by the group's own threads, after all its work.
    accelerate.PartialState().destroy_process_group()


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        sys.exit(f"error: {error}")
