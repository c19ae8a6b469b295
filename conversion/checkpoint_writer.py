# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint in safetensors files, tensor by tensor; whole or not at all, and resumable.

Everything goes to a working folder beside the destination, which becomes the destination by one rename when it is
complete and compared. A file of weights there bears its final name only once it is complete, so that a second run with
the same source and options goes on after the last of them; a journal holds what tells the same run from another.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..loading import CheckpointError, TensorHeader
from .checkpoint_reader import DTYPES, CheckpointReader, tensor_bytes

_ALIGNMENT = 8  # of the first tensor in a safetensors file

# Beyond the weights: config, index, tokenizer. A run that would not leave these free is not begun.
_RESERVE_BYTES = 2**20


class ConversionError(CheckpointError):
    """A conversion that cannot be done; the message names the argument, its value, the cause and the remedy."""


class PlannedTensor(NamedTuple):
    """A tensor to write: shape and dtype, and what produces its bytes, called again to compare the written ones."""

    header: TensorHeader
    pieces: Callable[[], Iterable[memoryview]]


Plan = dict[str, PlannedTensor]
# Called with the bytes done since the last call.
Advance = Callable[[int], object]


class CheckpointWriter:
    """Writes `plan` and other files to `destination`.

    Args:
        plan: the tensors, by name.
        destination: folder that must not exist, or be empty.
        fingerprint: text that differs wherever the files written would.
        max_shard_size: bytes, or text such as "5GB"; a larger tensor gets a file of its own.
        argument: what to call `destination` in messages.

    Raises:
        ConversionError: the destination exists or cannot be there, a size makes no sense, or the disk has not enough
            room.
    """

    def __init__(
        self,
        plan: Plan,
        destination: Path,
        fingerprint: str,
        *,
        max_shard_size: int | str = "5GB",
        argument: str = "destination",
    ):
        self.plan, self.destination, self.argument = plan, destination, argument
        try:
            if isinstance(max_shard_size, int) and max_shard_size < 1:
                raise ValueError("no bytes")
            self.split = split_state_dict_into_shards_factory(
                plan,
                get_storage_size=lambda tensor: tensor_bytes(tensor.header),
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise ConversionError(
                f"max_shard_size is {max_shard_size!r}; give bytes, or text such as '5GB' or '200MB'."
            ) from error
        self.total_bytes = sum(tensor_bytes(tensor.header) for tensor in plan.values())
        check_destination(destination, argument)
        self.working = destination.parent / f".{destination.name}.partial"
        self.folder = self.working / "checkpoint"
        self._journal = self.working / "journal.json"
        self._entry = {"fingerprint": fingerprint, "max_shard_size": str(max_shard_size)}
        self.resumed = self._finished()
        self._check_room()

    def _finished(self) -> list[str]:
        """Names of the weight files that an earlier, equal run completed."""
        try:
            if json.loads(self._journal.read_text(encoding="utf-8")) != self._entry:
                return []
        except (OSError, ValueError):
            return []
        return [name for name in self.split.filename_to_tensors if (self.folder / name).is_file()]

    def _check_room(self) -> None:
        existing = next(folder for folder in self.destination.absolute().parents if folder.is_dir())
        done = sum((self.folder / name).stat().st_size for name in self.resumed)
        needed, free = self.total_bytes - done + _RESERVE_BYTES, shutil.disk_usage(existing).free
        if free < needed:
            raise ConversionError(
                f"{self.argument} is '{self.destination}', whose disk has {free:,} bytes free of the {needed:,} "
                "needed; free some, or choose another disk."
            )

    def write(self, advance: Advance) -> None:
        """Write the weights and their index into the working folder, but those that an earlier run completed.

        Raises:
            ConversionError: the disk is full or cannot be written to; completed files stay for the next run.
        """
        with self.explained_failures():
            if not self.resumed and self.working.exists():
                shutil.rmtree(self.working)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._journal, [json.dumps(self._entry).encode()])
            for name, members in self.split.filename_to_tensors.items():
                tensors = {member: self.plan[member] for member in members}
                if name in self.resumed:
                    advance(sum(tensor_bytes(tensor.header) for tensor in tensors.values()))
                else:
                    write_whole(self.folder / name, safetensors_pieces(tensors, advance))
            if self.split.is_sharded:
                index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
                self.write_text(SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a small file into the working folder."""
        with self.explained_failures():
            write_whole(self.folder / name, [text.encode()])

    def copy(self, file: Path, name: str) -> None:
        """Copy a small file into the working folder, byte for byte."""
        with self.explained_failures():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, [file.read_bytes()])

    def compare(self, advance: Advance) -> None:
        """Read back what was written and compare every byte with the plan.

        Raises:
            ConversionError: they differ; the files written are dropped.
        """
        try:
            written = CheckpointReader(self.folder, argument=self.argument)
            if written.headers != {name: tensor.header for name, tensor in self.plan.items()}:
                raise ConversionError("other tensors than planned")
            for name, tensor in self.plan.items():
                if not same_bytes(tensor.pieces(), written.pieces(name), advance):
                    raise ConversionError(name)
        except CheckpointError as error:
            shutil.rmtree(self.working, ignore_errors=True)
            raise ConversionError(
                f"{self.argument} is '{self.destination}', whose disk gave back something else than was written "
                f"({error}); check the disk, or that nobody changes the source, and convert again."
            ) from error

    def finish(self) -> None:
        """Rename the working folder to the destination.

        Raises:
            ConversionError: somebody made the destination meanwhile, or it cannot be written to.
        """
        check_destination(self.destination, self.argument)
        with self.explained_failures():
            os.replace(self.folder, self.destination)
            shutil.rmtree(self.working, ignore_errors=True)

    def discard(self) -> None:
        """Drop the working folder."""
        shutil.rmtree(self.working, ignore_errors=True)

    @contextmanager
    def explained_failures(self) -> Iterator[None]:
        """Turn an error of the file system into one sentence."""
        try:
            yield
        except OSError as error:
            raise ConversionError(
                f"{self.argument} is '{self.destination}', which could not be written ({error.strerror or error}); "
                f"make room, then run the same again: it goes on after the files completed in '{self.working}'."
            ) from error


def check_destination(destination: Path, argument: str) -> None:
    """Refuse a destination that holds anything.

    Raises:
        ConversionError: as above.
    """
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise ConversionError(f"{argument} is '{destination}', which exists; remove it, or give another folder.")
    # Python's own test of a path below a file is False, as if it were absent.
    blocking = next((folder for folder in destination.parents if folder.exists() and not folder.is_dir()), None)
    if blocking is not None:
        raise ConversionError(f"{argument} is '{destination}', but '{blocking}' is a file; give another folder.")


def write_whole(file: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `file` under a temporary name in the same folder and rename it, or leave nothing."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def safetensors_pieces(tensors: Plan, advance: Advance) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors."""
    # The widest dtypes first, as the library does, so that every tensor is aligned to its elements.
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].header.dtype].itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        shape, dtype = tensors[name].header
        begin, end = end, end + tensor_bytes(tensors[name].header)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        for piece in tensors[name].pieces():
            yield piece
            advance(len(piece))


def same_bytes(first: Iterable[memoryview], second: Iterable[memoryview], advance: Advance) -> bool:
    """Whether two streams of bytes are equal, wherever each is cut."""
    first, second = iter(first), iter(second)
    left, right = memoryview(b""), memoryview(b"")
    while True:
        left, right = left or next(first, None), right or next(second, None)
        if left is None or right is None:
            return left is right
        length = min(len(left), len(right))
        if left[:length] != right[:length]:
            return False
        advance(length)
        left, right = left[length:], right[length:]
