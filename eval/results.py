# SPDX-License-Identifier: Apache-2.0
"""What the evaluations share: reading documents, results folders that can be resumed, files written whole."""

import csv
import gzip
import importlib.util
import json
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modeling_mesanet.files import replacing, write_json

# What determines the results of a run; written first, compared before anything is resumed.
SETTINGS = "settings.json"


class UsageError(Exception):
    """A mistake of the caller's, explained in one sentence that names the argument, the value and the remedy."""


# ---------------------------------------------------------------------------------------------------- documents


def read_rows(path: Path) -> list[dict]:
    """The lines of a JSON-lines file (`.gz` or plain), each with at least a field `text`.

    Raises:
        UsageError: there is no such file, or it holds anything else.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise UsageError(
            f"No such file: {path}. Check the path (and --data-dir), or give a .jsonl, .jsonl.gz or .txt file."
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); give a .txt, .jsonl or .jsonl.gz file in UTF-8."
        ) from error
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
        raise UsageError(f"{path} must hold one JSON object with a field 'text' per line, and at least one line.")
    return rows


def read_documents(path: Path) -> list[str]:
    """The texts of a JSON-lines file, or the whole of a `.txt` file as one document.

    Raises:
        UsageError: as `read_rows`.
    """
    path = Path(path)
    if path.suffix == ".txt" and path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read ({error}); give a text file in UTF-8.") from error
    return [row["text"] for row in read_rows(path)]


def read_named_documents(paths: Iterable[Path]) -> dict[str, str]:
    """The documents of several files by name: that of the file, for JSON lines with `:` and the row's `id` or number.

    Raises:
        UsageError: a file is missing or of another kind, a document is empty, or two have one name.
    """
    documents = {}
    for path in map(Path, paths):
        if path.suffix == ".txt":
            named = {path.stem: read_documents(path)[0]}
        else:
            rows = read_rows(path)
            stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
            named = {f"{stem}:{row.get('id', index)}": row["text"] for index, row in enumerate(rows)}
            if len(named) < len(rows):
                raise UsageError(f"{path} holds two rows with one 'id'; make them distinct or leave the field out.")
        for name, text in named.items():
            if not text.strip():
                raise UsageError(f"{path} holds an empty document ({name}); remove it or give it text.")
            if name in documents:
                raise UsageError(f"{path} was given twice, or beside another file of that name; rename one of them.")
            documents[name] = text
    return documents


def utf8_bytes(documents: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in documents)


def parse_numbers(text: str, option: str, *, kind: type = int, lowest: float = 1, below: float = float("inf")) -> list:
    """Distinct numbers of a list with commas, in rising order; `kind` is int or float.

    Raises:
        UsageError: the list is empty, or an entry is no number in `[lowest, below)`.
    """
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(lowest <= number < below for number in numbers):
        what = "whole numbers" if kind is int else "numbers"
        bounds = f"of at least {lowest}" if below == float("inf") else f"from {lowest} up to, not including, {below}"
        raise UsageError(f"{option} is '{text}'; give {what} {bounds}, with commas between them.")
    return numbers


# ---------------------------------------------------------------------------------------------------- files


def write_csv(path: Path, columns: list[str], rows: Iterable[Iterable]) -> None:
    """Rows as CSV, floats with six digits, None as an empty cell."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])


def save_figure(figure, path: Path) -> None:
    """A matplotlib figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def open_results(folder: Path, settings: dict, *, resume: bool) -> Path:
    """The results folder of a run: new or empty, or one that an interrupted run of the same settings left.

    Args:
        settings: JSON types; everything that determines the results.
        resume: go on where a run in this folder stopped; starts anew where there is none.

    Raises:
        UsageError: the folder holds files and is not to be resumed, or is of a run with other settings.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will when read back
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output is '{folder}', which is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise UsageError(
                f"--output is '{folder}', which exists and is not empty; give another folder, or --resume to go on "
                "with the run in it."
            )
        try:
            known = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--output is '{folder}', which holds no readable {SETTINGS} of a run to resume; give another folder."
            ) from error
        changed = sorted(name for name in known.keys() | settings.keys() if known.get(name) != settings.get(name))
        if changed:
            raise UsageError(
                f"--output is '{folder}', whose run differs in {changed[0].replace('_', ' ')}; repeat its options to "
                "resume it, or give another folder."
            )
        return folder
    write_json(folder / SETTINGS, settings)
    return folder


# ---------------------------------------------------------------------------------------------------- surroundings


def require(module: str, purpose: str) -> None:
    """Refuse to begin without an optional library.

    Raises:
        UsageError: `module` is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{purpose} needs {module}, which is not installed: pip install 'modeling-mesanet[eval]'.")


def environment(device: torch.device | str) -> dict:
    """Device and versions, for the records."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {library: version(library) for library in ("torch", "transformers")}
    return {"device": name, "versions": {"python": platform.python_version(), **versions}}


def progress_bar() -> Progress:
    """A progress bar on standard error, which leaves standard output to the results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def output_console() -> Console:
    """Standard output for tables; without a terminal wide enough not to break any row."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)
