# SPDX-License-Identifier: Apache-2.0
"""`mesanet card`: a model card from the files that training, evaluation, checks and benchmarks wrote.

Every figure on a card comes from one of those files, from the checkpoint's config and headers, or from an `about`
file, which holds what only people know (summary, licence, limits, published figures). The words lie in
`model_cards/template.md`.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint
from modeling_mesanet.cache_mesanet import state_bytes
from modeling_mesanet.files import fingerprint, replacing
from modeling_mesanet.info import describe
from modeling_mesanet.loading import CheckpointError, find_checkpoint, one_line, read_config
from modeling_mesanet.self_contained import required_versions

CARD = "README.md"
TAGS = ("mesanet", "recurrent", "linear-attention")
TASK = "text-generation"

# What an `about` file may say, and what stands on the card where it does not; the licence has no default.
ABOUT = {
    "title": None,
    "summary": "A MesaNet language model.",
    "license": None,
    "language": None,
    "datasets": None,
    "base_model": None,
    "tags": (),
    "prompt": "It was a dark night",
    "widget": (),
    "data": None,
    "recipe": None,
    "training_note": None,
    "evaluation_note": None,
    "published": None,
    "intended_use": "Not stated by its author.",
    "limits": (
        "Not stated by its author. As with every model of constant state, what was read long ago is kept only in "
        "part; what it writes may be false or offensive."
    ),
}

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def card_of_folder(
    folder: str | os.PathLike | None,
    *,
    about: str | os.PathLike | None = None,
    training: str | os.PathLike | None = None,
    evaluations: Iterable[str | os.PathLike] = (),
    certificate: str | os.PathLike | None = None,
    benchmarks: Iterable[str | os.PathLike] = (),
    repo_id: str | None = None,
    license: str | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        folder: the checkpoint; None is the bundled one.
        about: YAML with fields of `ABOUT`.
        training: `training_log.json` of examples/train_novels.py, or `trainer_state.json` of transformers' Trainer.
        evaluations: results of lm-eval (`--output_path`) or of examples/evaluate_novels.py.
        certificate: what `mesanet check --json` wrote.
        benchmarks: results of kernels/benchmarks.
        repo_id: where the card's examples load the model from; the folder's name if None.
        license: identifier of the Hub's list, such as apache-2.0; goes before the one in `about`.

    Raises:
        CheckpointError: the checkpoint is broken, or a file is missing, of another format or about other weights.
    """
    path = find_checkpoint(folder, argument="FOLDER")
    report = describe(path, argument="FOLDER")
    config = read_config(path, argument="FOLDER")
    known = _read_about(about)
    known["license"] = license or known["license"]
    if not known["license"]:
        raise CheckpointError("the licence is missing; give --license, or `license:` in the file of --about.")
    known["title"] = known["title"] or (repo_id or path.resolve().name).rpartition("/")[2]
    if os.path.samefile(path, bundled_checkpoint()):
        use = {"use": "bundled", "path": bundled_checkpoint.__name__, "trust": ""}
    elif getattr(config, "auto_map", None):
        use = {"use": "code", "path": repo_id or path.resolve().name, "trust": ", trust_remote_code=True"}
    else:
        use = {"use": "package", "path": repo_id or path.resolve().name, "trust": ""}
    results, evaluation_tables = [], []
    for file in evaluations:
        found, tables = _read_evaluation(Path(file), path, known)
        results += found
        evaluation_tables += tables
    speed_tables, solver_tables = [], []
    for file in benchmarks:
        speed, solver = _read_benchmark(Path(file))
        speed_tables += speed
        solver_tables += solver
    return _render(
        config,
        known,
        results,
        parameters=report["parameters"]["total"],
        dtypes=report["parameters"]["by_dtype"],
        trained=True,
        training=None if training is None else _read_training(Path(training)),
        evaluation_tables=evaluation_tables,
        certificate=None if certificate is None else _read_certificate(Path(certificate)),
        speed_tables=speed_tables,
        solver_tables=solver_tables,
        **use,
    )


def card_of_preset(preset: str, about: str | os.PathLike) -> str:
    """The card of a published size (`MesaNetConfig.preset`) of which there are no weights; `about` as above."""
    config = MesaNetConfig.preset(preset)
    with torch.device("meta"):
        parameters = MesaNetForCausalLM(config).num_parameters()
    return _render(
        config,
        _read_about(about),
        [],
        parameters=parameters,
        dtypes=None,
        trained=False,
        training=None,
        evaluation_tables=[],
        certificate=None,
        speed_tables=[],
        solver_tables=[],
        use="preset",
        path=preset,
        trust="",
    )


def write_card(text: str, file: Path) -> None:
    """Write a card, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_card(file: Path, *, argument: str = "FOLDER") -> ModelCard:
    """Refuse a card whose metadata the Hub would refuse or not understand; needs no network.

    Raises:
        CheckpointError: as above.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if not REGEX_YAML_BLOCK.search(text):
            raise ValueError("it begins with no block of metadata between lines of ---")
        card = ModelCard(text)
        _check_metadata(card)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise CheckpointError(
            f"{argument} is '{file.parent}', whose {file.name} is no valid card ({one_line(error)}); correct it, or "
            "write it anew with `mesanet card`."
        ) from error
    return card


def _check_metadata(card: ModelCard) -> None:
    """Raises ValueError with the first fault."""
    data = card.data.to_dict()
    if not _LICENSE.fullmatch(str(data.get("license", ""))):
        raise ValueError("`license` is missing or no identifier of the Hub's list, such as apache-2.0")
    if data["license"] == "other" and not data.get("license_name"):
        raise ValueError("`license: other` needs a `license_name`")
    if data.get("library_name") != "transformers":
        raise ValueError("`library_name` must be transformers, or the Hub offers no way to load the model")
    for name in ("tags", "datasets", "base_model", "language"):
        values = data.get(name) or []
        values = values if isinstance(values, list) else [values]
        for value in values:
            if not isinstance(value, str) or not value:
                raise ValueError(f"`{name}` holds {value!r}, which is no text")
            if name == "language" and not _LANGUAGE.fullmatch(value):
                raise ValueError(f"`language` holds {value!r}, which is no code of two or three letters")
            if name in ("datasets", "base_model"):
                try:
                    validate_repo_id(value)
                except HFValidationError as error:
                    raise ValueError(f"`{name}` holds {value!r}, which is no Hub id") from error
    for example in data.get("widget") or []:
        if not isinstance(example, dict) or not isinstance(example.get("text"), str):
            raise ValueError(f"`widget` holds {example!r}; its entries must be of the form `text: ...`")
    if "model-index" in data:
        _check_model_index(data["model-index"])
    if not re.search(r"^# \S", card.text, re.MULTILINE):
        raise ValueError("it has no title (a line that begins with `# `)")
    if left := re.search(r"{{.*?}}|{%.*?%}|\bTODO\b|\[More Information Needed\]", card.text):
        raise ValueError(f"it holds a place that was not filled in: {left[0]}")


def _check_model_index(index: list) -> None:
    """What the Hub requires of `model-index`, beyond what parsing it does. Raises ValueError with the first fault."""
    name, results = model_index_to_eval_results(index)
    if not name:
        raise ValueError("`model-index` names no model")
    for result in results:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"`model-index` gives {value!r} as {result.metric_type}, which is no finite number")
        for field in ("task_type", "dataset_type", "dataset_name", "metric_type"):
            if not isinstance(getattr(result, field), str) or not getattr(result, field).strip():
                raise ValueError(f"`model-index` holds a result without {field.replace('_', '.')}")


def _render(config: MesaNetConfig, about: dict, results: list[EvalResult], **details) -> str:
    metadata = ModelCardData(
        model_name=about["title"],
        language=about["language"],
        license=about["license"],
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[*TAGS, *(["custom_code"] if details["use"] == "code" else []), *about["tags"]],
        datasets=about["datasets"],
        base_model=about["base_model"],
        eval_results=results or None,
        widget=[{"text": text} for text in about["widget"]] or None,
    )
    if not results:
        metadata.pop("model_name")  # only goes into the model-index
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = (files("modeling_mesanet.model_cards") / "template.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        metadata=metadata.to_yaml(),
        config=config,
        about=about,
        requirements=[f"`{line}`" for line in required_versions()],
        memory=_memory(config, details["parameters"]),
        solver=_solver_cost(config, details["parameters"]),
        **details,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _memory(config: MesaNetConfig, parameters: int) -> list[dict[str, str]]:
    """Rows of the memory table, computed: weights, state, and the keys and values that attention would keep."""
    channels = config.num_attention_heads * (config.head_dim + config.value_head_dim)

    def row(name: str, size) -> dict[str, str]:
        return {"name": name, **{str(dtype).removeprefix("torch."): _bytes(size(dtype)) for dtype in dtypes}}

    dtypes = (torch.float32, torch.bfloat16)
    rows = [row("weights", lambda dtype: parameters * dtype.itemsize)]
    rows += [
        row(f"state of {batch} sequence{'s' * (batch > 1)}", lambda dtype, n=batch: state_bytes(config, n, dtype))
        for batch in (1, 64)
    ]
    return rows + [
        row(
            f"for comparison: keys and values of softmax attention with these heads, 1 sequence of {length:,} tokens",
            lambda dtype, n=length: config.num_hidden_layers * channels * n * dtype.itemsize,
        )
        for length in (2048, 32768)
    ]


def _solver_cost(config: MesaNetConfig, parameters: int) -> dict[str, float]:
    """What solver steps cost per token, in MFLOP and in percent of the rest of the model (2 operations a weight)."""
    step = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim**2
    # An embedding that is not also the head is looked up, not multiplied.
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    model = 2 * (parameters - looked_up)
    return {
        "step_mflop": step / 1e6,
        "model_mflop": model / 1e6,
        "step_percent": 100 * step / model,
        "most_percent": 100 * step * config.cg_max_steps / model,
    }


def _bytes(count: int) -> str:
    """`count` bytes in the largest binary unit of which there is at least one."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count} bytes"


def _table(header: list[str], rows: Iterable[Iterable]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _read_about(file: str | os.PathLike | None) -> dict:
    if file is None:
        return dict(ABOUT)
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping of fields")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise CheckpointError(
            f"--about is '{file}', which cannot be read as YAML ({one_line(error)}); correct it."
        ) from error
    if unknown := sorted(set(content) - set(ABOUT)):
        raise CheckpointError(
            f"--about is '{file}', which has a field '{unknown[0]}' that no card has; use {', '.join(ABOUT)}."
        )
    return {**ABOUT, **content}


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


def _read_training(file: Path) -> dict[str, str]:
    """What a record of training says, by headings."""
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
            f"tolerance {recipe['cg_tolerance']}."
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


def _read_evaluation(file: Path, folder: Path, about: dict) -> tuple[list[EvalResult], list[str]]:
    """Results for the metadata, and tables for the text."""
    content = _read_json(file, "--evaluation")
    known = "the results of lm-eval or of examples/evaluate_novels.py"
    try:
        if "results" in content:
            return _lm_eval(content)
        if "novels_valid" in content:
            stored, weights = content["checkpoint"]["sha256"], folder / "model.safetensors"
            if not weights.is_file() or stored != fingerprint(weights):
                raise CheckpointError(
                    f"--evaluation is '{file}', which is of other weights than those in '{folder}'; evaluate it again."
                )
            return _text_evaluation(content, about)
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_format(file, "--evaluation", known, error) from error
    raise _unknown_format(file, "--evaluation", known)


def _lm_eval(content: dict) -> tuple[list[EvalResult], list[str]]:
    found, rows = [], []
    for task, values in content["results"].items():
        settings = content.get("configs", {}).get(task, {})
        shots = content.get("n-shot", {}).get(task)
        version = content.get("versions", {}).get(task)
        # A task read from a local file names the loader (`json`) or a path in place of a data set.
        dataset = settings.get("dataset_path") or ""
        dataset = dataset if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else task
        name = str(values.get("alias", task)).strip(" -")
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            number = isinstance(value, int | float) and math.isfinite(value)
            if not comma or not number or metric.endswith("_stderr"):
                continue
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            error = values.get(f"{metric}_stderr,{filtered}")
            spread = f"{error:.4f}" if isinstance(error, int | float) else "-"
            rows.append((name, "-" if shots is None else shots, shown, f"{value:.4f}", spread, version))
            found.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=dataset,
                    dataset_name=name,
                    dataset_config=settings.get("dataset_name"),
                    dataset_split=settings.get("test_split") or settings.get("validation_split"),
                    dataset_args=None if shots is None else {"num_few_shot": shots},
                    metric_type=metric,
                    metric_name=shown,
                    metric_value=value,
                )
            )
    header = ["task", "shots", "metric", "value", "standard error", "version of the task"]
    harness = f"lm-eval {content['lm_eval_version']}" if "lm_eval_version" in content else "lm-eval"
    return found, [f"By {harness}:\n\n{_table(header, rows)}"]


def _text_evaluation(content: dict, about: dict) -> tuple[list[EvalResult], list[str]]:
    valid, book = content["novels_valid"], content["book"]
    title = Path(book["file"]).stem.replace("_", " ").title()
    note = f" {about['evaluation_note'].strip()}" if about["evaluation_note"] else ""
    prose = (
        f"By `examples/evaluate_novels.py`, every token predicted exactly once.{note}\n\n"
        f"- **{valid['bits_per_byte']:.4f} bits per byte** on `{valid['file']}`, {len(valid['documents'])} documents, "
        "each read from its first token to its last with one recurrent state.\n"
        f"- **Perplexity per token of *{title}***, cut into windows that each start with an empty state:"
    )
    windows = [(f"{int(length):,}", f"{value:.2f}") for length, value in book["perplexity"].items()]
    result = EvalResult(
        task_type=TASK,
        dataset_type="text",
        dataset_name=valid["file"],
        metric_type="bits_per_byte",
        metric_value=round(valid["bits_per_byte"], 4),
    )
    return [result], [prose, _table(["window, tokens", "perplexity"], windows)]


def _read_certificate(file: Path) -> dict:
    content = _read_json(file, "--certificate")
    known = "what `mesanet check --json` wrote"
    try:
        checks = [
            {"name": one["name"], "error": one.get("error"), "bound": one.get("bound"), "status": one["status"]}
            for one in content["checks"]
        ]
        return {"verdict": content["verdict"], "checks": checks, "versions": content.get("versions") or {}}
    except (KeyError, TypeError, AttributeError) as error:
        raise _unknown_format(file, "--certificate", known, error) from error


def _read_benchmark(file: Path) -> tuple[list[str], list[str]]:
    """Tables of speed, and of what the solver costs."""
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
