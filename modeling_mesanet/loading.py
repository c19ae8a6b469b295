# SPDX-License-Identifier: Apache-2.0
"""Checked loading: a checkpoint is either loaded whole or refused with one sentence.

`from_pretrained` is lenient: it initialises missing weights at random and drops those it does not know, each with a
warning. That is right for fine-tuning and wrong for generating text or measuring it, so this module refuses both.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_mesanet import MesaNetConfig
from .files import fingerprint
from .modeling_mesanet import MesaNetForCausalLM

# A Hub id: `name` or `owner/name`, of letters, digits, `-`, `_` and `.`, neither part beginning with `.` or `-`.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the argument, its value, the cause and the remedy."""


class TensorHeader(NamedTuple):
    """What a safetensors header says of one tensor: its shape, and its dtype in safetensors' spelling (`BF16`)."""

    shape: tuple[int, ...]
    dtype: str


def find_checkpoint(model: str | os.PathLike | None = None, *, argument: str = "path") -> Path:
    """The local folder of a checkpoint.

    Args:
        model: a folder written by `save_pretrained`, a Hub id (`name` or `owner/name`, downloaded into the Hub's cache
            where no folder of that name exists), or None for the bundled checkpoint.
        argument: what to call `model` in messages.

    Raises:
        CheckpointError: there is no such folder and the Hub does not provide it.
    """
    if model is None:
        from . import bundled_checkpoint  # here, because the package imports this module

        try:
            model = bundled_checkpoint()
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from error
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if name and folder.is_dir():  # "" would be the current folder
        return folder
    if name and folder.exists():
        raise CheckpointError(f"{argument} is '{name}', which is a file; give the folder that holds config.json.")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{argument} is '{name}', but there is no such folder; give a folder written by save_pretrained, or a Hub "
            "id such as owner/name."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    # The Hub's client raises its own errors, those of its HTTP library (which changed between its versions) and of the
    # file system. To a caller they all mean the same, and the cause is kept.
    except Exception as error:
        raise CheckpointError(
            f"{argument} is '{name}', but there is no folder of that name here and the Hub did not provide it "
            f"({type(error).__name__}); check the spelling and the network, or give the path of a local folder."
        ) from error


def read_config(folder: Path, *, argument: str = "path") -> MesaNetConfig:
    """The validated config of the checkpoint in `folder`.

    Raises:
        CheckpointError: config.json is missing, is no JSON, is of another model, or holds a bad value.
    """
    model_type = read_config_fields(folder, argument=argument).get("model_type")
    if model_type != MesaNetConfig.model_type:
        raise CheckpointError(
            f"{argument} is '{folder}', whose config.json has model_type {model_type!r}; give a checkpoint of "
            f"model_type '{MesaNetConfig.model_type}'."
        )
    try:
        return MesaNetConfig.from_pretrained(folder)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{argument} is '{folder}', whose config.json is not valid ({one_line(error)}); correct that field."
        ) from error


def read_config_fields(folder: Path, *, argument: str = "path") -> dict:
    """The fields of the config.json in `folder`, of whatever model.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{argument} is '{folder}', which holds no config.json; give a folder written by save_pretrained."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{argument} is '{folder}', whose config.json cannot be read ({one_line(error)}); download or save the "
            "checkpoint again."
        ) from error
    return fields


def read_headers(folder: Path, *, argument: str = "path") -> dict[str, TensorHeader]:
    """Name, shape and dtype of every tensor of a checkpoint, read from the safetensors headers alone.

    A header states where the last tensor ends, so that a truncated file is found without reading its tensors.

    Raises:
        CheckpointError: there is no safetensors file, a shard is missing, or a file is truncated or of another format.
    """
    headers = {}
    for file in weight_files(folder, argument=argument):
        headers |= read_header(file, argument=argument)
    return headers


def read_header(file: Path, *, argument: str = "path") -> dict[str, TensorHeader]:
    """`read_headers` of one safetensors file of a checkpoint's folder.

    Raises:
        CheckpointError: the file is missing, truncated or of another format.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (it has no __iter__)
            return {name: TensorHeader(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{argument} is '{file.parent}', whose index names {file.name}, which is missing; download or save the "
            "checkpoint again."
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{argument} is '{file.parent}', whose {file.name} is truncated or not a safetensors file "
            f"({one_line(error)}); download or save the checkpoint again."
        ) from error


def int8_weights() -> TorchAoConfig:
    """The `quantization_config` of `from_pretrained` that keeps the weights of most linear layers in eight bits.

    Embedding, head and the projections of the gates, whose rounding would add up in the state, stay as they are.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ImportError('int8 weights need torchao, which is not installed; pip install "torchao>=0.15".') from error
    # Regular expressions, which transformers matches from the start of a parameter's name.
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[r".*\.beta_proj", r".*\.gamma_proj"])


def load_checkpoint(
    path: str | os.PathLike | None = None,
    *,
    model_class: type[PreTrainedModel] = MesaNetForCausalLM,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    quantization_config: QuantizationConfigMixin | None = None,
    argument: str = "path",
) -> PreTrainedModel:
    """Load a checkpoint whole, in evaluation mode, or not at all.

    Args:
        path: as `model` of `find_checkpoint`; None is the bundled checkpoint.
        model_class: the class to load it into.
        dtype: of the weights (those that must stay float32 do); "auto" keeps the checkpoint's.
        device: to put the model on.
        quantization_config: as `from_pretrained` takes it, such as `int8_weights()`.
        argument: what to call `path` in messages.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, of another model, or its tensors are not exactly those
            that its config describes.
    """
    folder = find_checkpoint(path, argument=argument)
    config = read_config(folder, argument=argument)
    read_headers(folder, argument=argument)
    # Differences in shape are let through here to be refused below, with the other differences and in one sentence.
    with _without_loading_report():
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            quantization_config=quantization_config,
        )
    problems = [
        f"{name} has shape {tuple(stored)} instead of {tuple(expected)}"
        for name, stored, expected in sorted(report["mismatched_keys"])
    ]
    problems += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    problems += [f"{name} is not part of the model" for name in sorted(report["unexpected_keys"])]
    if problems:
        others = f" (and {len(problems) - 1} more such tensors)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{argument} is '{folder}', whose weights do not fit its config.json: {problems[0]}{others}; use the two "
            "files that were saved together."
        )
    return model.to(device).eval()


def load_tokenizer(path: str | os.PathLike | None = None, *, argument: str = "path") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; `path` as in `load_checkpoint`.

    Raises:
        CheckpointError: the folder holds none, or one that cannot be read or does not fit the model's vocabulary.
    """
    folder = find_checkpoint(path, argument=argument)
    config = read_config(folder, argument=argument)
    # Without this file transformers falls back to looking for other kinds, with an error about sentencepiece.
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{argument} is '{folder}', which holds no tokenizer.json; save the tokenizer into that folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    # The tokenizers library reports a file that it cannot read as a bare Exception.
    except Exception as error:
        raise CheckpointError(
            f"{argument} is '{folder}', whose tokenizer cannot be read ({one_line(error)}); download or save the "
            "checkpoint again."
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{argument} is '{folder}', whose tokenizer has {len(tokenizer)} entries but whose model only "
            f"{config.vocab_size}; use the tokenizer that the model was trained with."
        )
    return tokenizer


def weight_files(
    folder: Path,
    *,
    single: str = SAFE_WEIGHTS_NAME,
    index_name: str = SAFE_WEIGHTS_INDEX_NAME,
    argument: str = "path",
) -> list[Path]:
    """The files that hold a checkpoint's weights: the one of the name `single`, or those that an index names.

    Raises:
        CheckpointError: there are neither, or the index cannot be read or names a file outside of the folder.
    """
    if (folder / single).exists():
        return [folder / single]
    index = folder / index_name
    if not index.exists():
        raise CheckpointError(
            f"{argument} is '{folder}', which holds no {single}; give a folder written by save_pretrained."
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if name != Path(name).name or "\\" in name or name in ("", ".."))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{argument} is '{folder}', whose {index.name} cannot be read ({one_line(error)}); download or save the "
            "checkpoint again."
        ) from error
    if outside:
        raise CheckpointError(
            f"{argument} is '{folder}', whose {index.name} names '{outside[0]}', which is not a file of that folder; "
            "get the checkpoint from a source that you trust."
        )
    return [folder / name for name in sorted(names)]


def weights_sha256(folder: Path, *, argument: str = "path") -> str:
    """What tells a checkpoint's weights from others: SHA-256 of their file; of several, of names and hashes.

    Raises:
        CheckpointError: as `weight_files`.
    """
    files = weight_files(folder, argument=argument)
    if len(files) == 1:
        return fingerprint(files[0])
    return hashlib.sha256("".join(f"{file.name} {fingerprint(file)}\n" for file in files).encode()).hexdigest()


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Mute the table that transformers logs of the differences that we are about to report ourselves."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def one_line(error: BaseException) -> str:
    """The message of `error` as part of a sentence; of a nested message only the cause, which comes last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w+Error: |\.$", "", lines[-1]) if lines else type(error).__name__
