# SPDX-License-Identifier: Apache-2.0
"""`mesanet push`: a checkpoint's folder to the Hub, looked over before anything leaves the machine."""

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_imports

from modeling_mesanet.info import describe
from modeling_mesanet.loading import CheckpointError, load_tokenizer, one_line, read_config, weight_files

from .card import CARD, check_card, check_repo_id

# What Python unpickles runs code of whoever wrote it; torch.save writes such files, in a zip archive or (as older
# versions, and pickle itself) with a protocol mark in front.
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
PICKLE_MARKS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))

# Folders that exist on the machines of people, not on those of readers; what stands before must not be a longer path
# or an address.
_LOCAL_PATH = re.compile(
    r"(?<![\w./:~-])(?:/(?:home|root|Users|tmp|mnt|media|scratch|workspace)/|[A-Za-z]:\\)[\w.\\/-]+"
)
# A JSON value that is nothing but a path.
_PATH = re.compile(r"/[\w.-]+(?:/[\w.-]+)+/?")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
# Vocabularies contain anything, paths among it.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"}
_TEXTS = {".json", ".jsonl", ".jinja", ".md", ".py", ".txt", ".yaml", ".yml", ".toml", ".csv", ".cfg"}


class HubFile(NamedTuple):
    """A file that goes up: its path in the repository, and its size in bytes."""

    path: str
    size: int


def files_to_push(folder: str | os.PathLike, *, argument: str = "FOLDER") -> list[HubFile]:
    """What of `folder` would go to the Hub: all but hidden files and folders.

    Raises:
        CheckpointError: the folder is no whole checkpoint with tokenizer and card, or holds what should not be
            published: pickles, weights that belong to nothing, paths of this machine, access tokens.
    """
    folder = Path(folder).expanduser()
    where = f"{argument} is '{folder}'"
    if not folder.is_dir():
        raise CheckpointError(f"{where}, but there is no such folder; give one written by save_pretrained.")
    paths = sorted(_visible_files(folder))
    for path in paths:
        _check_file(folder, path, where)
    describe(folder, argument=argument)
    load_tokenizer(folder, argument=argument)
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{where}, which holds no card ({CARD}); write one with `mesanet card`.")
    check_card(folder / CARD, argument=argument)
    used = weight_files(folder, argument=argument)
    stray = [path for path in paths if path.suffix == ".safetensors" and folder / path not in used]
    if stray:
        raise CheckpointError(f"{where}, whose {stray[0]} belongs to no part of the model; move it elsewhere.")
    _check_code(folder, where, argument)
    return [HubFile(path.as_posix(), (folder / path).stat().st_size) for path in paths]


def push(folder: str | os.PathLike, repo_id: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a checkpoint's folder to a model repository on the Hub, which is made where there is none.

    Files that the repository already has are not sent again, so that an interrupted upload goes on when it is
    repeated. The access token is the one of `hf auth login` or of the environment variable `HF_TOKEN`.

    Args:
        folder: what `files_to_push` accepts.
        repo_id: `owner/name`, or `name` for the owner of the token.
        private: make the repository private; one that exists must be so already.
        endpoint: address of the Hub; None is what `HF_ENDPOINT` says, or else huggingface.co.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: as `files_to_push`; `repo_id` is malformed or public; or the Hub refused.
    """
    check_repo_id(repo_id)
    files = files_to_push(folder)
    api = HfApi(endpoint=endpoint, library_name="modeling-mesanet")
    # What the client raises changed between its versions, and may quote the request's headers, the token among them.
    # So no cause is chained, not even for a traceback.
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = private and not api.repo_info(repo_id).private
    except Exception as error:
        raise CheckpointError(_refusal(repo_id, error)) from None
    if is_public:
        raise CheckpointError(
            f"REPO_ID is '{repo_id}', which exists and is public; make it private on the Hub, or leave out --private."
        )
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder).expanduser(),
            allow_patterns=[glob.escape(file.path) for file in files],
            commit_message="Upload a MesaNet checkpoint",
        )
    except Exception as error:
        raise CheckpointError(_refusal(repo_id, error)) from None
    return commit.commit_url


def _refusal(repo_id: str, error: Exception) -> str:
    message = " ".join(str(error).split()) or "no reason given"
    if token := get_token():
        message = message.replace(token, "<token>")
    message = _TOKEN.sub("<token>", message).rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedy = "try again: what has been sent is not sent again"
    if status in (401, 403):
        remedy = "log in with `hf auth login` (or set HF_TOKEN) with a token that may write to this repository"
    return f"REPO_ID is '{repo_id}', and the upload failed ({type(error).__name__}: {message}); {remedy}."


def _visible_files(folder: Path) -> Iterator[Path]:
    """Paths below `folder`, without those in or of hidden folders and files (`.git`, `.cache`)."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name).relative_to(folder) for name in names if not name.startswith("."))


def _check_file(folder: Path, path: Path, where: str) -> None:
    file = folder / path
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{where}, whose {path} is a link to a file outside of it; copy the file there.")
    with open(file, "rb") as stream:
        start = stream.read(8)
    # A safetensors file begins with the length of its header, which may look like anything.
    marked = path.suffix != ".safetensors" and start.startswith(PICKLE_MARKS)
    if path.suffix.lower() in PICKLES or marked:
        raise CheckpointError(
            f"{where}, whose {path} is a pickle, which runs code when it is loaded; save the weights as safetensors "
            "(save_pretrained does) and move other files elsewhere."
        )
    if path.suffix == ".safetensors":
        _check_metadata(file, path, where)
    elif path.suffix in _TEXTS and path.name not in _VOCABULARIES:
        _check_text(file, path, where)


def _check_metadata(file: Path, path: Path, where: str) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
    except Exception:  # reading the headers reports what is wrong with the file
        return
    for value in metadata.values():
        _refuse_private(value, path, where)


def _check_text(file: Path, path: Path, where: str) -> None:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}, whose {path} is not UTF-8 text ({error.reason}); convert it.") from error
    _refuse_private(text, path, where)
    if path.suffix != ".json":
        return
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}, whose {path} is no JSON ({one_line(error)}); save it again.") from error
    for value in _strings(content):
        if _PATH.fullmatch(value) or PureWindowsPath(value).drive:
            raise CheckpointError(_private(where, path, value))


def _refuse_private(text: str, path: Path, where: str) -> None:
    if _TOKEN.search(text):
        raise CheckpointError(f"{where}, whose {path} contains an access token; remove it, and revoke it on the Hub.")
    home = str(Path.home())
    found = _LOCAL_PATH.search(text)
    if found or (len(PurePosixPath(home).parts) > 2 and home in text):
        raise CheckpointError(_private(where, path, found[0] if found else home))


def _private(where: str, path: Path, value: str) -> str:
    return f"{where}, whose {path} contains the path '{value}' of this machine; remove it."


def _strings(content) -> Iterator[str]:
    """The strings in JSON types, keys left out."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _strings(value)


def _check_code(folder: Path, where: str, argument: str) -> None:
    """Refuse a config that refers to code which the folder does not hold, or not all of it."""
    references = getattr(read_config(folder, argument=argument), "auto_map", None) or {}
    needed = [f"{reference.partition('.')[0]}.py" for reference in references.values()]
    for name in needed:  # grows while it is read
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{where}, whose config.json refers to code but which holds no {name}; write the folder with `mesanet "
                "export`."
            )
        needed += [one for sibling in get_relative_imports(folder / name) if (one := f"{sibling}.py") not in needed]
