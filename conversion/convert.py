# SPDX-License-Identifier: Apache-2.0
"""Conversions of whole checkpoints: fla to MesaNet and back, and initialisation from softmax transformers."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..configuration_mesanet import MesaNetConfig
from ..loading import CheckpointError, find_checkpoint, one_line, read_config, read_config_fields
from ..modeling_mesanet import MesaNetForCausalLM
from .checkpoint_reader import CheckpointReader, companions, open_checkpoint
from .checkpoint_writer import CheckpointWriter, ConversionError, Plan, PlannedTensor
from .compare_logits import LogitComparison, compare_logits, why_fla_cannot_run
from .fla_format import FLA_MODEL_TYPE, config_from_fla, config_to_fla, fla_name, fla_shape
from .transformer_format import (
    FAMILIES,
    config_from_transformer,
    expected_tensors,
    left_out,
    plan_from_transformer,
    read_source_config,
)


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        destination: the folder made.
        tensors, bytes: number and size of the tensors in it.
        shards: its files of weights; `resumed` of them were complete from an earlier run.
        carried: other files copied from the source.
        compared: what was compared before the folder got its name, and what could not be; a sentence.
        logits: the difference of logits, None where they were not compared.
        left_out: tensors of the source that nothing was made of (only where a model is initialised).
    """

    destination: str
    tensors: int
    bytes: int
    shards: list[str]
    resumed: int
    carried: list[str]
    compared: str
    logits: LogitComparison | None
    left_out: list[str]

    def as_json(self) -> dict:
        """The fields as JSON types; `logits` without what follows from it, None for what is no finite number."""
        fields = asdict(self)
        if self.logits is not None:
            values = self.logits._asdict() | {"dtype": str(self.logits.dtype).removeprefix("torch.")}
            fields["logits"] = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
        return fields


def convert_from_fla(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    compare: bool = True,
    progress: bool = False,
) -> ConversionReport:
    """Convert a MesaNet checkpoint of flash-linear-attention (0.6.0) into one of this package.

    Args:
        source: folder, or Hub id.
        destination: folder to make; must not exist, or be empty.
        max_shard_size: bytes, or text such as "5GB", of a file of weights.
        allow_pickle: read `.bin` files where there is no safetensors file (with `weights_only=True`).
        compare: also compare logits on random tokens, where flash-linear-attention is installed and finds a GPU.
        progress: show a progress bar on standard error.

    Raises:
        CheckpointError: the source is not a whole checkpoint of that model; or, as `ConversionError`, a field of its
            config has no counterpart, the destination cannot be written, or the logits differ.
    """
    source, destination = find_checkpoint(source, argument="source"), Path(destination).expanduser()
    with _about(source):
        config = config_from_fla(_read_fields(source, (FLA_MODEL_TYPE,)))
    reader = open_checkpoint(source, allow_pickle=allow_pickle)
    plan = _renamed(reader, config, lambda name, shape: ((fla_name(name), fla_shape(name, shape)), (name, shape)))
    text = config.to_json_string()
    writer = _writer(reader, plan, destination, text, "from fla", max_shard_size)
    return _run(writer, reader, text, progress, _compare_with_fla(source, source, writer.folder, compare))


def convert_to_fla(
    source: str | os.PathLike | None,
    destination: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    compare: bool = True,
    progress: bool = False,
) -> ConversionReport:
    """Convert a MesaNet checkpoint of this package into one of flash-linear-attention (0.6.0).

    Args and Raises: as `convert_from_fla`; `source` may be None for the bundled checkpoint.
    """
    source, destination = find_checkpoint(source, argument="source"), Path(destination).expanduser()
    config = read_config(source, argument="source")
    with _about(source):
        fields = config_to_fla(config)
    reader = open_checkpoint(source, allow_pickle=allow_pickle)
    plan = _renamed(reader, config, lambda name, shape: ((name, shape), (fla_name(name), fla_shape(name, shape))))
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    writer = _writer(reader, plan, destination, text, "to fla", max_shard_size)
    return _run(writer, reader, text, progress, _compare_with_fla(source, writer.folder, source, compare))


def initialize_from_transformer(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    family: str,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Initialise a MesaNet from a softmax transformer, for further training; `transformer_format` says how.

    Args:
        family: "llama", "mistral" or "qwen" (Qwen2 and Qwen3).

    The other arguments, and Raises: as `convert_from_fla`.
    """
    source, destination = find_checkpoint(source, argument="source"), Path(destination).expanduser()
    if family not in FAMILIES:
        raise ConversionError(f"family is {family!r}; choose one of {', '.join(FAMILIES)}.")
    with _about(source):
        origin = read_source_config(_read_fields(source, FAMILIES[family]))
        config = config_from_transformer(origin)
    reader = open_checkpoint(source, allow_pickle=allow_pickle)
    expected = expected_tensors(origin)
    optional = {name for name in reader.headers if name.endswith("rotary_emb.inv_freq")}  # tables in old checkpoints
    if origin.tie_word_embeddings:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        optional.add("lm_head.weight")
    reader.check(expected, optional)
    plan = plan_from_transformer(reader, origin, config)
    text = config.to_json_string()
    writer = _writer(reader, plan, destination, text, f"from {family}", max_shard_size)

    def not_compared() -> tuple[str, None]:
        return "Logits were not compared: an initialisation computes another function than its source.", None

    return _run(writer, reader, text, progress, not_compared, left_out(reader))


@contextmanager
def _about(source: Path) -> Iterator[None]:
    """Say in messages about a config whose it is."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"source is '{source}', whose {error}") from error


def _read_fields(folder: Path, model_types: tuple[str, ...]) -> dict:
    """The fields of config.json.

    Raises:
        CheckpointError: they cannot be read, or are of another model.
    """
    fields = read_config_fields(folder, argument="source")
    if fields.get("model_type") not in model_types:
        known = {FLA_MODEL_TYPE: "fla"} | {name: family for family, names in FAMILIES.items() for name in names}
        remedy = {
            MesaNetConfig.model_type: "give the format to convert to (--to fla)",
            **{name: f"give its format (--from {family})" for name, family in known.items()},
        }.get(fields.get("model_type"), f"give a checkpoint of one of {', '.join(known)}")
        raise CheckpointError(
            f"source is '{folder}', whose config.json has model_type {fields.get('model_type')!r} instead of "
            f"{' or '.join(map(repr, model_types))}; {remedy}."
        )
    return fields


NameAndShape = tuple[str, tuple[int, ...]]


def _renamed(
    reader: CheckpointReader,
    config: MesaNetConfig,
    names: Callable[[str, tuple[int, ...]], tuple[NameAndShape, NameAndShape]],
) -> Plan:
    """The plan that copies every tensor's bytes, after a check that the source's tensors are the config's.

    Args:
        names: from our name and shape, name and shape in the source and in the destination.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MesaNetForCausalLM(config).named_parameters()}
    optional = set()
    if config.tie_word_embeddings:  # a tied head may have been saved beside the embedding
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        optional.add("lm_head.weight")
    pairs = [names(name, shape) for name, shape in shapes.items()]
    reader.check(dict(old for old, _ in pairs), optional)
    return {
        new: PlannedTensor(reader.headers[old]._replace(shape=shape), lambda old=old: reader.pieces(old))
        for (old, _), (new, shape) in pairs
        if old in reader.headers
    }


def _writer(
    reader: CheckpointReader, plan: Plan, destination: Path, config: str, operation: str, max_shard_size: int | str
) -> CheckpointWriter:
    fingerprint = f"{operation}; {reader.fingerprint()}; {config}"
    return CheckpointWriter(plan, destination, fingerprint, max_shard_size=max_shard_size)


def _compare_with_fla(
    source: Path, fla_folder: Path, mesanet_folder: Path, compare: bool
) -> Callable[[], tuple[str, LogitComparison | None]]:
    """What compares the logits once both folders are complete: a sentence, and the comparison if there was one."""

    def run() -> tuple[str, LogitComparison | None]:
        obstacle = why_fla_cannot_run() if compare else "it was not asked for"
        if obstacle is not None:
            return f"Logits were not compared: {obstacle}.", None
        try:
            comparison = compare_logits(fla_folder, mesanet_folder)
        except CheckpointError:
            raise
        # fla's kernels and the driver fail in many ways; what has been written is none the worse for it.
        except Exception as error:
            raise ConversionError(
                f"source is '{source}', whose logits could not be compared ({type(error).__name__}: "
                f"{one_line(error)}); run the same again, which goes on from here, with compare=False (--no-compare)."
            ) from error
        return f"The {comparison}.", comparison

    return run


def _run(
    writer: CheckpointWriter,
    reader: CheckpointReader,
    config: str,
    progress: bool,
    compare: Callable[[], tuple[str, LogitComparison | None]],
    unused: list[str] | None = None,
) -> ConversionReport:
    """Write, compare, and give the destination its name."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        writing = bar.add_task("writing", total=writer.total_bytes)
        writer.write(lambda count: bar.advance(writing, count))
        writer.write_text("config.json", config)
        carried = companions(reader.folder)
        for name, file in carried.items():
            writer.copy(file, name)
        reading = bar.add_task("comparing", total=writer.total_bytes)
        writer.compare(lambda count: bar.advance(reading, count))
    sentence, logits = compare()
    if logits is not None and not logits.ok:
        writer.discard()
        raise ConversionError(
            f"source is '{reader.folder}', whose {logits}; do not use this conversion, and report the config."
        )
    writer.finish()
    return ConversionReport(
        destination=str(writer.destination),
        tensors=len(writer.plan),
        bytes=writer.total_bytes,
        shards=list(writer.split.filename_to_tensors),
        resumed=len(writer.resumed),
        carried=list(carried),
        compared=f"All {len(writer.plan)} tensors were read back and equal the source's, byte for byte. {sentence}",
        logits=logits,
        left_out=unused or [],
    )
