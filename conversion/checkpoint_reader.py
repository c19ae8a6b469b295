# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint tensor by tensor, checked before the first one is read.

safetensors files are read in pieces of a few megabytes and never mapped into memory, so that what is resident does not
grow with the checkpoint. Pickled files (`.bin`) are read one at a time, and only by who asks for it.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..loading import CheckpointError, TensorHeader, read_header, weight_files

# The dtypes of weights, in safetensors' spelling.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

PIECE_BYTES = 16 * 2**20

# What belongs to a checkpoint beside its weights and its config, and means the same to any model.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
)

_HEADER_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little-endian


class Extent(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: Path
    start: int
    length: int


class CheckpointReader:
    """The tensors of a checkpoint in safetensors files.

    Args:
        folder: of the checkpoint.
        argument: what to call `folder` in messages.

    Attributes:
        headers: shape and dtype of every tensor.

    Raises:
        CheckpointError: a file is missing, truncated or lies outside of the folder; a tensor occurs twice, or not
            where the index says; a dtype is none of `DTYPES`.
    """

    single, index = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME

    def __init__(self, folder: Path, *, argument: str = "source"):
        self.folder, self.argument = folder, argument
        self.files = weight_files(folder, single=self.single, index_name=self.index, argument=argument)
        self.headers: dict[str, TensorHeader] = {}
        self._files: dict[str, Path] = {}
        self._extents: dict[Path, dict[str, Extent]] = {}
        for file in self.files:
            for name, header in self._read_header(file).items():
                if name in self.headers:
                    self._refuse(
                        f"{self._files[name].name} and {file.name} both hold {name}", "save the checkpoint again"
                    )
                if header.dtype not in DTYPES:
                    self._refuse(
                        f"tensor {name} has dtype {header.dtype}",
                        f"save the checkpoint unquantised, in one of {', '.join(DTYPES)}",
                    )
                self.headers[name], self._files[name] = header, file
        if len(self.files) > 1 or self.files[0].name != self.single:
            self._check_index()

    def _read_header(self, file: Path) -> dict[str, TensorHeader]:
        return read_header(file, argument=self.argument)

    def _check_index(self) -> None:
        index = json.loads((self.folder / self.index).read_text(encoding="utf-8"))["weight_map"]
        for name, file in sorted(index.items()):
            if name not in self._files or self._files[name].name != file:
                self._refuse(f"{self.index} places {name} in {file}, which does not hold it", "download it again")
        unlisted = sorted(set(self._files) - set(index))
        if unlisted:
            self._refuse(
                f"{self._files[unlisted[0]].name} holds {unlisted[0]}, which {self.index} does not list",
                "download it again",
            )

    def _refuse(self, cause: str, remedy: str) -> None:
        raise CheckpointError(f"{self.argument} is '{self.folder}', whose {cause}; {remedy}.")

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> None:
        """Refuse a checkpoint whose tensors are not those `expected` (name to shape); `optional` ones may be there.

        Raises:
            CheckpointError: a tensor is missing, misshapen or unknown, or the matrices differ in dtype.
        """
        for name, shape in expected.items():
            if name not in self.headers and name not in optional:
                self._refuse(f"weights lack {name}, which config.json asks for", "use the files saved together")
            if name in self.headers and self.headers[name].shape != tuple(shape):
                self._refuse(
                    f"tensor {name} has shape {self.headers[name].shape} where config.json asks for {tuple(shape)}",
                    "use the files saved together",
                )
        extra = sorted(set(self.headers) - set(expected) - set(optional))
        if extra:
            self._refuse(
                f"weights hold {extra[0]}, which config.json does not ask for and nothing here is the counterpart of",
                "remove it, or use the files saved together",
            )
        dtypes = {}
        for name, header in self.headers.items():
            if name.endswith(".weight") and len(header.shape) > 1:
                dtypes.setdefault(header.dtype, name)
        if len(dtypes) > 1:
            (one, first), (other, second) = list(dtypes.items())[:2]
            self._refuse(
                f"tensor {second} has dtype {other} where {first} has {one}", "save the matrices in one dtype"
            )

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces of at most `PIECE_BYTES`.

        Raises:
            CheckpointError: the file cannot be read any more, or became shorter since its header was read.
        """
        extent = self._extent(name)
        try:
            with open(extent.file, "rb") as file:
                file.seek(extent.start)
                left = extent.length
                while left:
                    piece = file.read(min(left, PIECE_BYTES))
                    if not piece:
                        self._refuse(f"{extent.file.name} ends within {name}", "download the checkpoint again")
                    left -= len(piece)
                    yield memoryview(piece)
        except OSError as error:
            self._refuse(f"{extent.file.name} cannot be read ({error.strerror or error})", "check its disk")

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, whole."""
        header = self.headers[name]
        data = bytearray().join(self.pieces(name))
        return torch.frombuffer(data, dtype=DTYPES[header.dtype]).reshape(header.shape)

    def fingerprint(self) -> str:
        """Differs when a file of the checkpoint or its place does (told by size and time of change, not content)."""
        digest = hashlib.sha256(str(self.folder.resolve()).encode())
        for file in (self.folder / "config.json", *self.files):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _extent(self, name: str) -> Extent:
        path = self._files[name]
        if path not in self._extents:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            begin = _HEADER_LENGTH_BYTES + length
            offsets = {name: entry["data_offsets"] for name, entry in header.items()}
            self._extents[path] = {name: Extent(path, begin + a, b - a) for name, (a, b) in offsets.items()}
        return self._extents[path][name]


class PickledCheckpointReader(CheckpointReader):
    """The tensors of a checkpoint in `.bin` files, read with `weights_only=True`; one file is held at a time."""

    single, index = WEIGHTS_NAME, WEIGHTS_INDEX_NAME

    def __init__(self, folder: Path, *, argument: str = "source"):
        self._loaded: tuple[Path, dict[str, torch.Tensor]] | None = None
        super().__init__(folder, argument=argument)

    def _read_header(self, file: Path) -> dict[str, TensorHeader]:
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            name: TensorHeader(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in self._load(file).items()
        }

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None  # frees the file before the next is read
            try:
                try:
                    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files of torch before 1.6 cannot be mapped
                    tensors = torch.load(file, map_location="cpu", weights_only=True)
                if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
                    raise TypeError("not a dictionary of tensors")
            except FileNotFoundError:
                self._refuse(f"index names {file.name}, which is missing", "download the checkpoint again")
            # What torch raises depends on the byte that it stumbles over; its longer messages advise to unpickle all.
            except Exception as error:
                raise CheckpointError(
                    f"{self.argument} is '{self.folder}', whose {file.name} is truncated or holds other things than "
                    f"tensors ({type(error).__name__}); download the checkpoint again."
                ) from error
            self._loaded = file, tensors
        return self._loaded[1]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, whole."""
        return self._load(self._files[name])[name]

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor."""
        yield from tensor_pieces(self.tensor(name))


def open_checkpoint(folder: Path, *, allow_pickle: bool = False, argument: str = "source") -> CheckpointReader:
    """The reader of the checkpoint in `folder`: its safetensors files, or else, with `allow_pickle`, its `.bin` ones.

    Raises:
        CheckpointError: as `CheckpointReader`; or only pickled files are there and `allow_pickle` is not given.
    """
    safe = any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    pickled = any((folder / name).exists() for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    if safe or not pickled:
        return CheckpointReader(folder, argument=argument)
    if not allow_pickle:
        raise CheckpointError(
            f"{argument} is '{folder}', whose weights are pickled (.bin); give allow_pickle (--allow-pickle) if you "
            "trust where they come from."
        )
    return PickledCheckpointReader(folder, argument=argument)


def companions(folder: Path) -> dict[str, Path]:
    """Files of generation, tokenizer, chat templates and licence of a checkpoint, by their paths in its folder."""
    files = [file for pattern in _COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def tensor_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor`, as they are stored."""
    if tensor.numel():
        yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_bytes(header: TensorHeader) -> int:
    """Bytes that a tensor of this shape and dtype takes."""
    return math.prod(header.shape) * DTYPES[header.dtype].itemsize
