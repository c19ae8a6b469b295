# SPDX-License-Identifier: Apache-2.0
"""`mesanet card`: a model card from the files that training, evaluation, checks and benchmarks wrote.

Every figure on a card comes from one of those files, from the checkpoint's config and headers, or from an `about`
file, which holds what only people know (summary, licence, limits, published figures). The words lie in
`model_cards/template.md`.
"""

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
from jinja2 import Environment, StrictUndefined, UndefinedError

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint
from modeling_mesanet.cache_mesanet import state_bytes
from modeling_mesanet.files import replacing
from modeling_mesanet.info import describe
from modeling_mesanet.loading import CheckpointError, find_checkpoint, one_line, read_config
from modeling_mesanet.self_contained import required_versions

from .card_records import TASK, Checkpoint, read_benchmark, read_certificate, read_evaluation, read_training

CARD = "README.md"
TAGS = ("mesanet", "recurrent", "linear-attention")

# What an `about` file may say, and what stands on the card where it does not; the licence has no default.
ABOUT = {
    "title": None,
    "summary": "A MesaNet language model.",
    "license": None,
    "license_name": None,
    "license_link": None,
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

# What a field of an `about` file holds that is not text.
_KINDS = {
    "language": (str, list),
    "datasets": (str, list),
    "base_model": (str, list),
    "tags": (list,),
    "widget": (list,),
    "recipe": (dict,),
    "published": (dict,),
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
        evaluations: results of lm-eval (a file below its `--output_path`); folders that `mesanet eval`, `perplexity`
            or `compute-sweep` wrote; results of examples/evaluate_novels.py.
        certificate: what `mesanet check --json` wrote.
        benchmarks: results of kernels/benchmarks.
        repo_id: where the card's examples load the model from; the folder's name if None.
        license: identifier of the Hub's list, such as apache-2.0; goes before the one in `about`.

    Raises:
        CheckpointError: the checkpoint is broken, a file is missing, of another format or about other weights, or the
            Hub would not understand what the card would say.
    """
    if repo_id is not None:
        check_repo_id(repo_id, argument="--repo-id")
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
    checkpoint = Checkpoint(path, report["parameters"]["total"])
    found = [read_evaluation(Path(file), checkpoint, known["evaluation_note"]) for file in evaluations]
    measured = [read_benchmark(Path(file)) for file in benchmarks]
    return _render(
        config,
        known,
        [figure for evaluation in found for figure in evaluation.figures],
        parameters=checkpoint.parameters,
        dtypes=report["parameters"]["by_dtype"],
        trained=True,
        training=None if training is None else read_training(Path(training)),
        evaluation_tables=[table for evaluation in found for table in evaluation.tables],
        certificate=None if certificate is None else read_certificate(Path(certificate), checkpoint),
        speed_tables=[table for speed, _ in measured for table in speed],
        solver_tables=[
            *(table for evaluation in found for table in evaluation.solver_tables),
            *(table for _, solver in measured for table in solver),
        ],
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


def check_repo_id(repo_id: str, *, argument: str = "REPO_ID") -> None:
    """Refuse what is no Hub id.

    Raises:
        CheckpointError: as above.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(
            f"{argument} is '{repo_id}', which is no Hub id ({one_line(error).rstrip('.')}); give owner/name."
        ) from error


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
        license_name=about["license_name"],
        license_link=about["license_link"],
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
    try:
        text = environment.from_string(template).render(
            metadata=metadata.to_yaml(),
            config=config,
            about=about,
            requirements=[f"`{line}`" for line in required_versions()],
            memory=_memory(config, details["parameters"]),
            solver=_solver_cost(config, details["parameters"]),
            **details,
        )
        text = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
        _check_metadata(ModelCard(text))
    except (UndefinedError, ValueError) as error:  # a table of `published` without one of its fields
        raise CheckpointError(
            f"the card would not be valid ({one_line(error)}); correct --license, or the file of --about."
        ) from error
    return text


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
    for name, value in content.items():
        kinds = _KINDS.get(name, (str,))
        if value is not None and not isinstance(value, kinds):
            wanted = " or ".join({str: "text", list: "a list", dict: "a mapping"}[kind] for kind in kinds)
            raise CheckpointError(f"--about is '{file}', whose field '{name}' is {value!r}; give {wanted}.")
    return ABOUT | {name: value for name, value in content.items() if value is not None}
