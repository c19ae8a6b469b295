# SPDX-License-Identifier: Apache-2.0
"""The rows of the tasks: from a local folder where one is given, else from the Hub.

Local rows are read, checked and brought into the form that the data set has on the Hub, so that one processing
(lm-eval's, where it has the task) serves both.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .results import UsageError

# The folder with local data; without it the Hub is asked.
DATA_VARIABLE = "MESANET_DATA"

# Length and number of the words in the word-scrambling sets of GPT-3.
_LETTERS = "[a-z]{5,14}"
_WORDS = 10_000


class Source(NamedTuple):
    """Rows of a local file, and how to bring them into the Hub's form.

    Attributes:
        file: path below the data folder: `.jsonl` with one object a line, `.txt`, or a folder of `.txt`.
        fields: name and type of the fields that each line must have.
        convert: makes a row in the Hub's form of a line.
    """

    file: str
    fields: dict[str, type]
    convert: Callable[[dict], dict] = dict

    @property
    def format(self) -> str:
        if self.file.endswith(".jsonl"):
            fields = ", ".join(f"{name} ({kind.__name__})" for name, kind in self.fields.items())
            return f"a JSON object a line with the fields {fields}"
        if self.file.endswith(".txt"):
            return "UTF-8 text"
        return "a folder of .txt files, one a document"


def _hellaswag(row: dict) -> dict:
    # The Hub has the finished sentences and the begun one in two fields; here they are one text.
    finished, begun = re.fullmatch(r"(?s)(.*[.!?](?= )|)(.*)", row["ctx"]).groups()
    return {**row, "ctx_a": finished, "ctx_b": begun.strip()}


def _race(row: dict) -> dict:
    return {"article": row["article"], "problems": repr(row["problems"])}


def _question(passage: str, question: str) -> str:
    return f"{passage.strip()}\nQuestion: {question.strip()}\nAnswer:".lstrip()


def _squad(row: dict) -> dict:
    return {"text": _question(row["context"], row["question"]), "answers": [[answer] for answer in row["answers"]]}


def _drop(row: dict) -> dict:
    return {"text": _question(row["passage"], row["question"]), "answers": row["answers"]}


def _triviaqa(row: dict) -> dict:
    answers = [[answer] for answer in dict.fromkeys([row["answer"], *row["aliases"]])]
    return {"text": _question("", row["question"]), "answers": answers}


def _cloze(row: dict) -> dict:
    return {"text": row["text"].strip(), "answers": [[row["value"].strip()]]}


_ARC = {"id": str, "question": str, "choices": dict, "answerKey": str}
_CLOZE = {"text": str, "value": str}
_STORY = {f"input_sentence_{number}": str for number in (1, 2, 3, 4)}

SOURCES = {
    "lambada": Source("global_reasoning/lambada_openai.jsonl", {"text": str}),
    "hellaswag": Source(
        "global_reasoning/hellaswag.jsonl",
        {"activity_label": str, "ctx": str, "endings": list, "label": int},
        _hellaswag,
    ),
    "race_m": Source("global_reasoning/race_middle.jsonl", {"article": str, "problems": list}, _race),
    "race_h": Source("global_reasoning/race_high.jsonl", {"article": str, "problems": list}, _race),
    "piqa": Source("local_reasoning/piqa.jsonl", {"goal": str, "sol1": str, "sol2": str, "label": int}),
    "winogrande": Source(
        "local_reasoning/winogrande_xl.jsonl", {"sentence": str, "option1": str, "option2": str, "answer": str}
    ),
    "arc_easy": Source("local_reasoning/arc_easy.jsonl", _ARC),
    "arc_challenge": Source("local_reasoning/arc_challenge.jsonl", _ARC),
    "siqa": Source(
        "local_reasoning/siqa.jsonl",
        {"context": str, "question": str, "answerA": str, "answerB": str, "answerC": str, "label": str},
    ),
    "boolq": Source(
        "local_reasoning/boolq.jsonl",
        {"question": str, "passage": str, "answer": bool},
        lambda row: {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])},
    ),
    "openbookqa": Source(
        "local_reasoning/openbookqa.jsonl", {"id": str, "question_stem": str, "choices": dict, "answerKey": str}
    ),
    "storycloze": Source(
        "local_reasoning/storycloze.jsonl",
        {**_STORY, "sentence_quiz1": str, "sentence_quiz2": str, "answer_right_ending": int},
    ),
    "swde": Source("recall/swde.jsonl", _CLOZE, _cloze),
    "fda": Source("recall/fda.jsonl", _CLOZE, _cloze),
    "squad": Source("recall/squad_v1_dev.jsonl", {"context": str, "question": str, "answers": list}, _squad),
    "triviaqa": Source(
        "recall/triviaqa_closed_book.jsonl", {"question": str, "answer": str, "aliases": list}, _triviaqa
    ),
    "nq": Source("recall/nq_open_gold_passage.jsonl", {"context": str, "question": str, "answers": list}, _squad),
    "drop": Source("recall/drop_dev.jsonl", {"passage": str, "question": str, "answers": list}, _drop),
    **{
        name: Source(f"fewshot/{file}.jsonl", {foreign: str, "en": str}, lambda row: {"translation": row})
        for name, file, foreign in (
            ("fr_en", "wmt14_fr-en", "fr"),
            ("de_en", "wmt16_de-en", "de"),
            ("ro_en", "wmt16_ro-en", "ro"),
        )
    },
    "wikitext": Source("perplexity/wikitext2_test.raw.txt", {}),
    "books": Source("perplexity/books", {}),
    "govreport": Source("perplexity/govreport.jsonl", {"text": str}),
    "qasper": Source("perplexity/qasper.jsonl", {"text": str}),
}


def data_folder() -> Path | None:
    """The folder that MESANET_DATA names, or None where it is not set.

    Raises:
        UsageError: there is no such folder.
    """
    name = os.environ.get(DATA_VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"The data folder (--data-dir, {DATA_VARIABLE}) is '{name}', but there is no such folder; correct the "
            "path, or leave it out to take the data sets from the Hub."
        )
    return folder


def missing_file(name: str, folder: Path) -> str | None:
    """What `folder` lacks for the source `name` (`words` for `local_words`), as words of a sentence; or None."""
    books = SOURCES["books"]
    if name == "words":
        if _words_file(folder).exists() or (folder / books.file).exists():
            return None
        return f"fewshot/words.txt (a word a line) or {books.file} ({books.format})"
    source = SOURCES[name]
    return None if (folder / source.file).exists() else f"{source.file} ({source.format})"


def local_rows(name: str, task: str) -> list[dict] | None:
    """The rows of the source `name`, in the Hub's form; None where no data folder is given.

    Texts to be read whole (`wikitext`, `books`) become rows with one field, `page` or `text`.

    Raises:
        UsageError: the file is missing, cannot be read, holds no rows, or holds a row that lacks a field, has
            one of another type, or is empty.
    """
    folder = data_folder()
    if folder is None:
        return None
    _require(name, folder, task)
    source = SOURCES[name]
    path = folder / source.file
    if path.is_dir():
        rows = [{"text": _nonempty(_read(file), str(file))} for file in sorted(path.glob("*.txt"))]
    elif path.suffix == ".txt":
        rows = [{"page": page} for page in _articles(_read(path))]
    else:
        rows = [source.convert(row) for row in _json_rows(path, source)]
    if not rows:
        raise UsageError(f"'{path}' holds no rows; it must be {source.format}.")
    return rows


def local_words(task: str) -> list[str] | None:
    """Ten thousand words of 5 to 14 letters, the commonest first; None where no data folder is given.

    They come from `fewshot/words.txt` (one a line) where the folder has it, else from the books.

    Raises:
        UsageError: the folder has neither.
    """
    folder = data_folder()
    if folder is None:
        return None
    _require("words", folder, task)
    file = _words_file(folder)
    if file.exists():
        words = list(dict.fromkeys(word for word in _read(file).lower().split() if re.fullmatch(_LETTERS, word)))
    else:
        text = "\n".join(row["text"] for row in local_rows("books", task))
        # Words that are only ever capitalised are names; a word beside letters or an apostrophe is a piece of one.
        counts = Counter(re.findall(rf"(?<![\w’']){_LETTERS}(?![\w’'])", text))
        words = sorted(counts, key=lambda word: (-counts[word], word))
    return words[:_WORDS]


def check_texts(rows: Iterable[dict], field: str, where: str) -> None:
    """Refuse empty documents.

    Raises:
        UsageError: `field` of a row holds no text.
    """
    for number, row in enumerate(rows, 1):
        _nonempty(row[field], f"{where}, document {number}")


def _require(name: str, folder: Path, task: str) -> None:
    if missing := missing_file(name, folder):
        raise UsageError(
            f"The data folder '{folder}' holds no {missing}, which {task} needs; put it there, or leave "
            f"{DATA_VARIABLE} and --data-dir out to take the data set from the Hub."
        )


def _words_file(folder: Path) -> Path:
    return folder / "fewshot" / "words.txt"


def _nonempty(text: str, where: str) -> str:
    if not text.strip():
        raise UsageError(f"{where} is empty; remove it or give it text.")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' cannot be read as UTF-8 text ({error}); replace the file.") from error


def _json_rows(path: Path, source: Source) -> Iterator[dict]:
    # Only \n ends a line: splitlines would also cut at separators that JSON allows inside strings.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"'{path}', line {number},"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON ({error}); the file must be {source.format}.") from error
        for name, kind in source.fields.items():
            # A bool is an int to Python, and a wrong label here.
            if not isinstance(row, dict) or type(row.get(name)) is not kind:
                raise UsageError(f"{where} lacks the field {name} ({kind.__name__}); it must be {source.format}.")
            if kind is str:
                _nonempty(row[name], f"{where} field {name},")
        yield row


def _articles(text: str) -> list[str]:
    """The articles of a WikiText file: each begins at a line `= Title =`."""
    starts = [match.start() for match in re.finditer(r"(?m)^ = (?!=)[^\n]*[^=\s] = ?$", text)]
    if not starts:
        return [text] if text.strip() else []
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
