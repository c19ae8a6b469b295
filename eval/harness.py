# SPDX-License-Identifier: Apache-2.0
"""`mesanet eval`: checks what can be checked before anything is loaded, then hands over to lm-eval.

A results folder holds `evaluation.json` (what was asked for, and in the end the figures), the responses of the model
so far (`responses_*.db`, from which an interrupted run goes on), and lm-eval's own files in a folder named after the
model: `results_*.json` and `samples_*.jsonl`.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

from modeling_mesanet.configuration_mesanet import MesaNetConfig
from modeling_mesanet.files import replacing
from modeling_mesanet.info import describe
from modeling_mesanet.loading import find_checkpoint, weights_sha256

from .results import UsageError
from .task_data import DATA_VARIABLE, data_folder, missing_file

TASKS = Path(__file__).parent / "tasks"
SUMMARY = "evaluation.json"
# Room for tasks that do not say what they need: those that read one passage or few sentences.
_TOKENS = 4096
# What an earlier run leaves in the folder, and what `overwrite` removes.
_OURS = (SUMMARY, "responses_*.db", "*/results_*.json", "*/samples_*.jsonl")


def evaluate(
    model: str | None,
    tasks: str,
    *,
    data_dir: str | None = None,
    output: str | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    overwrite: bool = False,
    skip_missing: bool = False,
    options: Iterable[str] = (),
) -> None:
    """Run lm-eval on `tasks`; it prints its tables to standard output.

    Args:
        model: folder of a checkpoint or Hub id, of MesaNet or of another model; None is the bundled checkpoint.
        tasks: names of tasks or groups, ours or lm-eval's, with commas between them.
        data_dir: folder with local data; None leaves the choice to the environment variable MESANET_DATA.
        output: folder for results; None keeps none.
        dtype: of the weights.
        max_length: tokens of a sequence at most; None is what the tasks need for a MesaNet, else the model's limit.
        overwrite: begin anew in a folder that holds results.
        skip_missing: leave out tasks that the data folder has no file for; groups that lose a task lose their mean.
        options: further arguments of `lm_eval run`, such as `["--limit", "10", "--batch_size", "8"]`.

    Raises:
        UsageError: lm-eval is not installed, a task is unknown, a data file is missing, a sequence is too long,
            the model cannot be told from `model` and `options`, or `output` holds something else.
        CheckpointError: the model is a MesaNet that cannot be loaded whole.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed; install it with pip install 'modeling-mesanet[eval]'.")
    # Its notes on every step would bury the tables; read when lm-eval is imported.
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    chosen = choose_tasks(tasks, data_dir=data_dir, skip_missing=skip_missing)
    setup_logging()
    # lm-eval's parser reads sys.argv and nothing else.
    argv, sys.argv = sys.argv, ["lm-eval", "run", "--tasks", ",".join(chosen.names), *options]
    try:
        cli = HarnessCLI()
        arguments = cli.parse_args()
    finally:
        sys.argv = argv
    _check_numbers(arguments)
    given = dict(arguments.model_args or {})
    if getattr(arguments, "trust_remote_code", False):
        given["trust_remote_code"] = True
    if "pretrained" in given:
        # Taken from here by lm-eval, it would be evaluated in place of the model that the results are filed under.
        if model is not None:
            raise UsageError(
                f"--model is '{model}' and --model_args names pretrained={given['pretrained']}; give the model once, "
                "by --model."
            )
        model = given.pop("pretrained")
    name, checkpoint, limit = _describe_model(model, given)
    if max_length is None:
        max_length = max(limit, chosen.max_tokens) if checkpoint is not None else limit
    arguments.model = arguments.model or "hf"
    arguments.model_args = {
        "pretrained": name,
        "dtype": dtype,
        "max_length": max_length,
        "backend": "causal",  # lm-eval knows the transformers classes alone
        **given,
    }
    arguments.include_path = [str(TASKS), *([arguments.include_path] if arguments.include_path else [])]
    if output is None:
        cli.execute(arguments)
        return

    identity = _fingerprint(name, checkpoint, arguments.model_args)
    settings = {
        "model": name,
        # An adapter makes other weights of them.
        "weights": None
        if checkpoint is None or given.keys() & {"peft", "delta"}
        else weights_sha256(checkpoint, argument="--model"),
        "fingerprint": identity,
        "tasks": chosen.names,
        "data": os.environ.get(DATA_VARIABLE),
        "model_args": arguments.model_args,
        "options": list(options),
    }
    folder = Path(output)
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        _prepare(folder, settings, overwrite)
    arguments.output_path = str(folder)
    arguments.log_samples = True
    # The key of a response is the request alone, so responses of other weights or settings need another file.
    arguments.use_cache = str(folder / f"responses_{identity[:16]}")
    cli.execute(arguments)
    if main_process:
        _finish(folder, settings)


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse what lm-eval would only stumble over, some of it after the model is loaded, or never end with."""
    limit = getattr(arguments, "limit", None)
    if limit is not None and not limit > 0:
        raise UsageError(
            f"--limit is {limit:g}; give a number of examples of each task, or a share of them between 0 and 1."
        )
    size = str(getattr(arguments, "batch_size", 1))
    if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", size):
        raise UsageError(f"--batch_size is '{size}'; give a whole number of at least 1, or auto.")


class ChosenTasks(NamedTuple):
    """What to ask lm-eval for: names without patterns; `max_tokens` is the longest sequence of ours among them."""

    names: list[str]
    max_tokens: int


def choose_tasks(tasks: str, *, data_dir: str | None, skip_missing: bool) -> ChosenTasks:
    """Look up `tasks`, and whether the data folder has what ours need; arguments as for `evaluate`.

    Sets the environment variable MESANET_DATA where `data_dir` is given.

    Raises:
        UsageError: a task is unknown or a data file is missing.
    """
    if data_dir is not None:
        # The way by which it also reaches the tasks of a plain `lm_eval`, and the processes of `accelerate launch`.
        os.environ[DATA_VARIABLE] = str(Path(data_dir).expanduser().absolute())
    configs, names = _resolve([name for name in tasks.replace(",", " ").split() if name])
    names, configs = _without_missing(names, configs, skip_missing)
    needed = [config["metadata"].get("max_tokens", _TOKENS) for config in configs.values()]
    return ChosenTasks(names, max(needed, default=0))


def _resolve(names: list[str]) -> tuple[dict[str, dict], list[str]]:
    """The configs of our tasks among `names` and in our groups among them, by name; and `names` without patterns."""
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_path=str(TASKS), include_defaults=False)
    chosen, foreign = [], []
    for name in names:
        matches = ours.match_tasks([name])
        chosen += matches or [name]
        foreign += [] if matches or name.endswith(".yaml") or Path(name).is_dir() else [name]
    if not names:
        raise UsageError("--tasks names no task; give at least one, such as mesanet_reasoning_global.")
    if foreign:
        every = TaskManager()
        if unknown := [name for name in foreign if not every.match_tasks([name])]:
            close = get_close_matches(unknown[0], [*ours.all_tasks, *every.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists lm-eval's."
            raise UsageError(
                f"--tasks names '{unknown[0]}', which is neither one of our tasks ({TASKS}) nor one of lm-eval's; "
                f"{hint}"
            )
    configs = {}
    for name in chosen:
        configs |= _leaves(name, ours.task_index)
    return configs, list(dict.fromkeys(chosen))


def _leaves(name: str, index: dict) -> dict[str, dict]:
    if name not in index:
        return {}
    config = index[name].cfg
    if "group" not in config:
        return {name: config}
    return {leaf: found for child in config["task"] for leaf, found in _leaves(child, index).items()}


def _without_missing(chosen: list[str], configs: dict[str, dict], skip: bool) -> tuple[list[str], dict[str, dict]]:
    """`chosen` and `configs` without tasks that the data folder lacks a file for; groups that lose one are split."""
    from lm_eval.tasks import TaskManager

    folder = data_folder()
    if folder is None:
        return chosen, configs
    missing = {}
    for name, config in configs.items():
        source = "words" if "scrambling" in config["metadata"] else config["metadata"].get("source")
        if source and (file := missing_file(source, folder)):
            missing[name] = file
    if not missing:
        return chosen, configs
    if not skip:
        raise UsageError(
            f"The data folder '{folder}' holds no {', no '.join(dict.fromkeys(missing.values()))}, needed by "
            f"{', '.join(missing)}; put the files there, leave --data-dir and {DATA_VARIABLE} out to take the data "
            "sets from the Hub, or give --skip-missing to leave these tasks out."
        )
    index = TaskManager(include_path=str(TASKS), include_defaults=False).task_index
    kept = [part for name in chosen for part in _complete(name, index, missing)]
    if not kept:
        raise UsageError(f"The data folder '{folder}' has a file for none of the tasks; see --data-dir.")
    print(f"mesanet: left out for want of a data file: {', '.join(missing)}", file=sys.stderr)
    return list(dict.fromkeys(kept)), {name: config for name, config in configs.items() if name not in missing}


def _complete(name: str, index: dict, missing: dict) -> list[str]:
    """`name`, or in place of a group that lacks some of its tasks, those of its children that lack none."""
    leaves = _leaves(name, index)
    if not missing.keys() & leaves.keys():
        return [name]
    children = index[name].cfg["task"] if "group" in index[name].cfg else []
    return [part for child in children for part in _complete(child, index, missing)]


def _describe_model(model: str | None, model_args: dict) -> tuple[str, Path | None, int]:
    """What lm-eval is to load, the folder if it is a MesaNet, and the number of tokens that it states as its limit."""
    from lm_eval.models.utils import resolve_max_length

    folder = Path(model).expanduser() if model is not None else None
    # A folder without config.json is left to the checks below, whose sentences say what is wrong with it.
    if folder is not None and ((folder / "config.json").is_file() or not folder.exists()):
        config = _config(model if not folder.exists() else str(folder), model_args)
        if config.model_type != MesaNetConfig.model_type:
            return model, None, resolve_max_length(config)
    for option in ("revision", "subfolder"):
        if option in model_args:
            raise UsageError(
                f"--model_args names {option}={model_args[option]}, by which no MesaNet can be chosen; download that "
                "checkpoint and give its folder by --model."
            )
    # from_pretrained fills what a checkpoint lacks with random numbers; describe refuses such a checkpoint.
    checkpoint = find_checkpoint(model, argument="--model")
    describe(checkpoint, argument="--model")
    return str(checkpoint), checkpoint, MesaNetConfig.from_pretrained(checkpoint).max_position_embeddings


def _config(model: str, model_args: dict):
    # Never asked for on the terminal: what was not trusted in the command is not run.
    options = {"trust_remote_code": False} | {
        option: model_args[option] for option in ("revision", "subfolder", "trust_remote_code") if option in model_args
    }
    try:
        return AutoConfig.from_pretrained(model, **options)
    # As for a checkpoint: many kinds of errors, one meaning.
    except Exception as error:
        raise UsageError(
            f"--model is '{model}', whose config could not be read ({str(error).splitlines()[0]}); give the folder of "
            "a checkpoint or a Hub id."
        ) from error


def _fingerprint(name: str, checkpoint: Path | None, model_args: dict) -> str:
    """SHA-256 of what the responses depend on beside the requests."""
    digest = hashlib.sha256()
    digest.update(json.dumps([version("lm-eval"), name, model_args], sort_keys=True, default=str).encode())
    if checkpoint is not None:
        for file in sorted([*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors")]):
            with file.open("rb") as data:
                digest.update(file.name.encode() + hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()


def _prepare(folder: Path, settings: dict, overwrite: bool) -> None:
    """Make the results folder, or find in it an interrupted run of the same settings."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output is '{folder}', which is a file; give a folder.")
    found = _read_summary(folder)
    if found is None and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"--output is '{folder}', which holds other files than an evaluation's; give a new or an empty folder."
        )
    if found is not None and overwrite:
        for pattern in _OURS:
            for file in folder.glob(pattern):
                file.unlink()
    elif found is not None and found["status"] == "finished":
        raise UsageError(
            f"--output is '{folder}', which holds the results of a finished evaluation; give another folder, or "
            "--overwrite to begin anew."
        )
    elif found is not None:
        # Compared as JSON stores them.
        stored = json.loads(json.dumps(settings, default=str))
        if different := [name for name, value in stored.items() if found["settings"].get(name) != value]:
            raise UsageError(
                f"--output is '{folder}', which holds an interrupted evaluation of another {different[0]}; repeat its "
                "command to go on with it, give another folder, or --overwrite to begin anew."
            )
        print(f"mesanet: going on with the interrupted evaluation in {folder}", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_summary(folder, {"status": "running", "settings": settings})


def _finish(folder: Path, settings: dict) -> None:
    """Replace the summary of a running evaluation by that of a finished one."""
    files = sorted(folder.glob("*/results_*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UsageError(f"lm-eval wrote no results to '{folder}'; its messages say why.")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    _write_summary(
        folder,
        {
            "status": "finished",
            "settings": settings,
            "results": str(files[-1].relative_to(folder)),
            "figures": _figures(results),
        },
    )


def _figures(results: dict) -> list[dict]:
    """Every metric of every task and group of lm-eval's results: task, version, metric, value, stderr, shots."""
    limit = results["config"].get("limit")
    figures = []
    for part in ("results", "groups"):
        for task, values in results.get(part, {}).items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                if math.isnan(value):
                    continue  # no document that the limit left is of this kind
                stderr = values.get(f"{metric}_stderr,{filtered}")
                figures.append(
                    {
                        "task": task,
                        "version": results.get("versions", {}).get(task),
                        "metric": metric,
                        "value": value,
                        "stderr": stderr if isinstance(stderr, int | float) else None,
                        "shots": results.get("n-shot", {}).get(task),
                        "limit": limit,
                    }
                )
    # Groups are in both parts.
    return list({(figure["task"], figure["metric"]): figure for figure in figures}.values())


def _read_summary(folder: Path) -> dict | None:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return summary if {"status", "settings"} <= summary.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _write_summary(folder: Path, summary: dict) -> None:
    with replacing(folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
