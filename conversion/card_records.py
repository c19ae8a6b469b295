# SPDX-License-Identifier: Apache-2.0
"""What a model card is made of: the files that training, evaluation, checks and benchmarks wrote, as text and tables.

Every reader refuses what it does not know, and results of other weights than the card's wherever the file tells.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult

from modeling_mesanet.loading import CheckpointError, one_line, weights_sha256

TASK = "text-generation"


class Checkpoint(NamedTuple):
    """Whose card it is: its folder and its number of parameters."""

    folder: Path
    parameters: int


class Figure(EvalResult):
    """A result for the metadata, which keeps tasks apart that share their data."""

    @property
    def unique_identifier(self) -> tuple:
        """What the results that become one entry of the `model-index` have in common."""
        # The library leaves out the name and the arguments, and gives all entries those of the first.
        return (*super().unique_identifier, self.dataset_name, json.dumps(self.dataset_args, sort_keys=True))


class Evaluation(NamedTuple):
    """What a file of results adds to a card: figures for the metadata, tables, and tables about the solver."""

    figures: list[Figure]
    tables: list[str]
    solver_tables: list[str]


def _table(header: list[str], rows: Iterable[Iterable]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def read_training(file: Path) -> dict[str, str]:
    """What a record of training says, by headings.

    Raises:
        CheckpointError: it is no record of a known format.
    """
    content = _read_json(file, "--training")
    known = "training_log.json of examples/train_novels.py, or trainer_state.json of transformers' Trainer"
    try:
        if "recipe" in content:
            return _own_training(content)
        if "log_history" in content:
            return _trainer_training(content)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise _unknown_format(file, "--training", known, error) from error
    raise _unknown_format(file, "--training", known)


def _own_training(log: dict) -> dict[str, str]:
    recipe, data, run = log["recipe"], log["data"]["train"], log["runs"][0]
    hardware, versions = run["hardware"], run["versions"]
    head_norm = recipe.get("head_norm_eps")
    return {
        "Corpus": (
            f"{data['documents']} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens (`{data['file']}`, "
            f"SHA-256 `{data['sha256'][:16]}…`)."
        ),
        "Tokens seen": (
            f"{log['tokens_seen']:,} ({log['epochs']:.1f} passes), in {log['steps']} steps of {recipe['batch_size']} "
            f"sequences of {recipe['sequence_length']} tokens."
        ),
        "Recipe": (
            f"AdamW, betas ({recipe['adam_beta1']}, {recipe['adam_beta2']}), eps {recipe['adam_epsilon']}, weight "
            f"decay {recipe['weight_decay']} (none on embeddings, norms, gate biases and the regulariser), peak rate "
            f"{recipe['learning_rate']} after {recipe['warmup_steps']} steps of warm-up, cosine to "
            f"{100 * recipe['final_learning_rate_ratio']:.0f} % of it, clip {recipe['gradient_clip']}; solver "
            f"tolerance {recipe['cg_tolerance']}"
            + ("." if head_norm is None else f"; epsilon {head_norm} in the norm of each head's output.")
        ),
        "Hardware and time": (
            f"{hardware['accelerators'] or 'no'} {hardware['accelerator'] or 'accelerator'}, "
            f"{log['wall_seconds'] / 60:.0f} minutes, {run['tokens_per_second']:,.0f} tokens a second; torch "
            f"{versions['torch']}, transformers {versions['transformers']}."
        ),
    }


def _trainer_training(state: dict) -> dict[str, str]:
    seen = state.get("num_input_tokens_seen")
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    validation = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    facts = {"Steps": f"{state['global_step']:,} ({state['epoch']:.2f} passes)."}
    if seen:
        facts["Tokens seen"] = f"{seen:,}."
    if losses:
        facts["Loss"] = f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last, in nats a token."
    if validation:
        facts["Validation loss"] = f"{validation[-1]:.3f}."
    return facts


# The files of results by the commands that write a folder of them.
_SUMMARIES = ("evaluation.json", "perplexity.json", "compute_sweep.json")


def read_evaluation(path: Path, checkpoint: Checkpoint, note: str | None) -> Evaluation:
    """Results of an evaluation.

    Args:
        path: a file of results, or the folder that `mesanet eval`, `perplexity` or `compute-sweep` wrote.
        note: what people say about the texts of examples/evaluate_novels.py.

    Raises:
        CheckpointError: it is neither, of an unfinished evaluation, or of other weights.
    """
    known = (
        "the results of lm-eval or of examples/evaluate_novels.py, or what `mesanet eval`, `perplexity` or "
        "`compute-sweep` wrote"
    )
    file = path
    if path.is_dir():
        found = [path / name for name in _SUMMARIES if (path / name).is_file()]
        if len(found) != 1:
            raise CheckpointError(f"--evaluation is '{path}', a folder without one file of results; give {known}.")
        file = found[0]
    content = _read_json(file, "--evaluation")
    try:
        if "novels_valid" in content:
            _require_weights(content["checkpoint"]["sha256"], file, "--evaluation", checkpoint)
            return _text_evaluation(content, note)
        if "settings" in content:
            return _own_results(content, file, checkpoint)
        if "results" in content:
            return _lm_eval(content, file, checkpoint)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_format(file, "--evaluation", known, error) from error
    raise _unknown_format(file, "--evaluation", known)


def _require_weights(sha256: str, file: Path, option: str, checkpoint: Checkpoint) -> None:
    if sha256 != weights_sha256(checkpoint.folder):
        raise CheckpointError(
            f"{option} is '{file}', which is of other weights than those in '{checkpoint.folder}'; make it again."
        )


def _own_results(content: dict, file: Path, checkpoint: Checkpoint) -> Evaluation:
    """What `mesanet eval`, `perplexity` or `compute-sweep` wrote."""
    settings = content["settings"]
    command = settings.get("command", "eval")
    weights = settings["weights"] if command == "eval" else settings["model"]["weights"]
    _require_weights(weights, file, "--evaluation", checkpoint)
    if command == "perplexity":
        return _perplexity(content)
    if command == "compute-sweep":
        return _compute_sweep(content)
    if content["status"] != "finished":
        raise CheckpointError(
            f"--evaluation is '{file}', whose evaluation was interrupted; repeat its command, which goes on with it."
        )
    results = file.parent / content["results"]
    evaluation = _lm_eval(_read_json(results, "--evaluation"), results, checkpoint)
    if settings["data"] is None:
        return evaluation
    return evaluation._replace(tables=[f"{table}\n\nThe data were local files." for table in evaluation.tables])


def _lm_eval(content: dict, file: Path, checkpoint: Checkpoint) -> Evaluation:
    counted = content["config"].get("model_num_parameters", checkpoint.parameters)
    if counted != checkpoint.parameters:
        raise CheckpointError(
            f"--evaluation is '{file}', which is of a model of {counted:,} parameters, but '{checkpoint.folder}' has "
            f"{checkpoint.parameters:,}; give the results of this one."
        )
    found, rows = [], []
    for task, values in content["results"].items():
        settings = content.get("configs", {}).get(task, {})
        shots = content.get("n-shot", {}).get(task)
        version = content.get("versions", {}).get(task)
        samples = content.get("n-samples", {}).get(task)
        limited = samples is not None and samples["effective"] < samples["original"]
        # A task read from a local file names the loader (`json`) or a path in place of a data set.
        dataset = settings.get("dataset_path") or ""
        dataset = dataset if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else task
        name = str(values.get("alias", task)).strip(" -")
        arguments = {} if shots is None else {"num_few_shot": shots}
        if limited:
            arguments["num_examples"] = samples["effective"]
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            number = isinstance(value, int | float) and math.isfinite(value)
            if not comma or not number or metric.endswith("_stderr"):
                continue
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            arrow = {True: " ↑", False: " ↓"}.get(content.get("higher_is_better", {}).get(task, {}).get(metric), "")
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                (
                    name,
                    "-" if samples is None else f"{samples['effective']:,}",
                    "-" if shots is None else shots,
                    shown + arrow,
                    f"{value:.4f}",
                    f"{error:.4f}" if isinstance(error, int | float) else "-",
                    f"{version:g}" if isinstance(version, int | float) else "-",  # "Yaml" if the task states none
                )
            )
            found.append(
                Figure(
                    task_type=TASK,
                    dataset_type=dataset,
                    dataset_name=name,
                    dataset_config=settings.get("dataset_name"),
                    dataset_split=settings.get("test_split") or settings.get("validation_split"),
                    dataset_args=arguments or None,
                    metric_type=metric,
                    metric_name=shown,
                    metric_value=value,
                )
            )
    header = ["task", "examples", "shots", "metric", "value", "standard error", "version of the task"]
    precision = content["config"].get("model_dtype")
    about = f"By lm-eval {content['lm_eval_version']}" if "lm_eval_version" in content else "By lm-eval"
    if precision:
        about += f" in {str(precision).removeprefix('torch.')}"
    if content["config"].get("limit"):
        about += ", on the first examples of each task only"
    return Evaluation(found, [f"{about}:\n\n{_table(header, rows)}"], [])


def _text_evaluation(content: dict, note: str | None) -> Evaluation:
    valid, book = content["novels_valid"], content["book"]
    title = Path(book["file"]).stem.replace("_", " ").title()
    note = f" {note.strip()}" if note else ""
    prose = (
        f"By `examples/evaluate_novels.py`, every token predicted exactly once.{note}\n\n"
        f"- **{valid['bits_per_byte']:.4f} bits per byte** on `{valid['file']}`, {len(valid['documents'])} documents, "
        "each read from its first token to its last with one recurrent state.\n"
        f"- **Perplexity per token of *{title}***, cut into windows that each start with an empty state:"
    )
    windows = [(f"{int(length):,}", f"{value:.2f}") for length, value in book["perplexity"].items()]
    result = Figure(
        task_type=TASK,
        dataset_type="text",
        dataset_name=valid["file"],
        metric_type="bits_per_byte",
        metric_value=round(valid["bits_per_byte"], 4),
    )
    return Evaluation([result], [prose, _table(["window, tokens", "perplexity"], windows)], [])


def _perplexity(content: dict) -> Evaluation:
    settings = content["settings"]
    texts = ", ".join(f"*{name}*" for name in content["documents"])
    with_bits = all("bits_per_byte" in entry for entry in content["lengths"].values())
    found, rows = [], []
    for length, entry in content["lengths"].items():
        window = f"{int(length):,} tokens" if length.isdecimal() else "none"
        bits = [f"{entry['bits_per_byte']:.4f}"] if with_bits else []
        rows.append((window, f"{entry['tokens']:,}", f"{entry['nll']:.4f}", f"{entry['perplexity']:.2f}", *bits))
        found.append(
            Figure(
                task_type=TASK,
                dataset_type="text",
                dataset_name=", ".join(content["documents"]),
                dataset_args={"context_length": int(length)} if length.isdecimal() else None,
                metric_type="perplexity",
                metric_value=round(entry["perplexity"], 4),
            )
        )
    header = ["window", "tokens", "nats a token", "perplexity a token", *(["bits a byte"] if with_bits else [])]
    tables = [
        f"By `mesanet perplexity` in {settings['dtype']}, on {texts}, each window begun with an empty state, every "
        f"token predicted once:\n\n{_table(header, rows)}"
    ]
    training = content["training_length"]
    longest = max((int(length) for length in content["lengths"] if length.isdecimal()), default=0)
    if str(training) in content["lengths"] and longest > training:
        change = content["lengths"][str(longest)]["nll"] - content["lengths"][str(training)]["nll"]
        tables.append(
            f"The training length is {training:,} tokens; windows {longest / training:g} times as long change the "
            f"loss of the same tokens by {change:+.4f} nats."
        )
    if content["extrapolation"] is not None:
        rows = [
            (f"{entry['from'] + 1:,} to {entry['to']:,}", f"{entry['tokens']:,}", f"{entry['perplexity']:.2f}")
            for entry in content["extrapolation"].values()
        ]
        tables.append(
            "Within and beyond the training length, which is other text:\n\n"
            f"{_table(['position', 'tokens', 'perplexity a token'], rows)}"
        )
    return Evaluation(found, tables, [])


def _compute_sweep(content: dict) -> Evaluation:
    settings = content["settings"]
    tasks = list(dict.fromkeys(name for entry in content["sweep"] for name in entry["tasks"]))
    rows = []
    for entry in content["sweep"]:
        tolerance = "-" if entry["tolerance"] is None else f"{entry['tolerance']:g}"
        figures = (f"{entry['mean_steps']:.1f}", f"{entry['perplexity']:.2f}", f"{entry['difference']:+.4f}")
        measured = (f"{entry['tasks'][task]:.4f}" if task in entry["tasks"] else "-" for task in tasks)
        rows.append((entry["max_steps"], tolerance, *figures, *measured))
    header = ["steps at most", "tolerance", "steps taken, mean", "perplexity a token", "nats a token above row 1"]
    texts = ", ".join(f"*{name}*" for name in settings["documents"])
    about = (
        f"What they cost in quality, by `mesanet compute-sweep` in {settings['dtype']}, on windows of "
        f"{settings['length']:,} tokens of {texts}; row 1 is this checkpoint's own setting:"
    )
    table = f"{about}\n\n{_table([*header, *tasks], rows)}"
    return Evaluation([], [], [table, *_fixed_steps(content["sweep"])])


# Losses that differ by no more are called the same, in nats a token.
_SAME_LOSS = 1e-3


def _fixed_steps(sweep: list[dict]) -> list[str]:
    """What fixed numbers of steps buy, as a sentence, or nothing where none were tried."""
    fixed = {entry["max_steps"]: entry["difference"] for entry in sweep[1:] if entry["tolerance"] is None}
    said = []
    if 0 in fixed:
        said.append(f"without the solver (0 steps) the loss differs from row 1's by {fixed[0]:+.4f} nats")
        if worse := [str(steps) for steps, difference in fixed.items() if difference > fixed[0]]:
            said.append(f"{' or '.join(worse)} steps are worse than none")
    different = [steps for steps, difference in fixed.items() if abs(difference) > _SAME_LOSS]
    if enough := [steps for steps in fixed if steps > max(different, default=-1)]:
        said.append(f"from {min(enough)} steps on it is the same within {_SAME_LOSS:g}")
    return [f"With fixed steps: {'; '.join(said)}."] if said else []


def read_certificate(file: Path, checkpoint: Checkpoint) -> dict:
    """The verdict, checks and versions of what `mesanet check --json` wrote.

    Raises:
        CheckpointError: it is something else, or of other weights.
    """
    content = _read_json(file, "--certificate")
    known = "what `mesanet check --json` wrote"
    try:
        _require_weights(content["weights"], file, "--certificate", checkpoint)
        checks = [
            {"name": one["name"], "error": one.get("error"), "bound": one.get("bound"), "status": one["status"]}
            for one in content["checks"]
        ]
        return {"verdict": content["verdict"], "checks": checks, "versions": content.get("versions") or {}}
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_format(file, "--certificate", known, error) from error


def read_benchmark(file: Path) -> tuple[list[str], list[str]]:
    """Tables of speed, and of what the solver costs.

    Raises:
        CheckpointError: it is no results file of kernels/benchmarks that cards know.
    """
    content = _read_json(file, "--benchmark")
    known = "a results file of kernels/benchmarks (cpu_generation or gpu_operators)"
    try:
        if "rows" in content and "threads" in content:
            return [_cpu_speed(content)], []
        if "forward" in content and "gpu" in content:
            return [], [_solver_times(content)]
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_format(file, "--benchmark", known, error) from error
    raise _unknown_format(file, "--benchmark", known)


def _cpu_speed(content: dict) -> str:
    versions = content["versions"]
    about = (
        f"The bundled checkpoint on {content['threads']} threads of {content['cpu']}, float32, torch "
        f"{versions['torch']}, transformers {versions['transformers']}:"
    )
    measures = ("tokens_per_second", "loop_tokens_per_second")
    rows = [(name, *(f"{row[measure]:,.0f}" for measure in measures)) for name, row in content["rows"].items()]
    return f"{about}\n\n{_table(['tokens a second', 'MesaNet', 'a loop over the tokens, one dense solve each'], rows)}"


def _solver_times(content: dict) -> str:
    """Forward passes of the operator alone that differ in the solver's settings only."""
    first = next(row for row in content["forward"] if row["operator"] == "mesa")
    case = {key: first[key] for key in ("batch", "length", "heads", "size")}
    rows = [
        (row["setting"], row["kind"], f"{row['steps'][0]:.1f}", f"{row['ms']:.2f}", f"{row['error']:.1e}")
        for row in content["forward"]
        if row["operator"] == "mesa" and "ms" in row and all(row[key] == value for key, value in case.items())
    ]
    header = ["asked for", "inputs", "steps taken, mean", "milliseconds", "relative error to float64"]
    return (
        f"Measured on one {content['gpu']}: the operator of one layer alone, forward, {case['batch']} x "
        f"{case['length']:,} tokens, {case['heads']} heads of {case['size']}, bfloat16:\n\n{_table(header, rows)}"
    )


def _read_json(file: Path, option: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{option} is '{file}', which cannot be read as JSON ({one_line(error)}); give a file as it was written."
        ) from error
    return content


def _unknown_format(file: Path, option: str, known: str, error: BaseException | None = None) -> CheckpointError:
    cause = f" ({type(error).__name__}: {one_line(error)})" if error else ""
    return CheckpointError(f"{option} is '{file}', which is not of a known format{cause}; give {known}.")
