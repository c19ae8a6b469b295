# SPDX-License-Identifier: Apache-2.0
"""A data folder with invented rows for every task, in the format of the real ones."""

import json
from pathlib import Path

SENTENCE = "The captain {verb} the {thing} near the old harbour before the rain came"
VERBS = ("found", "lost", "painted", "sold", "mended", "bought")
THINGS = ("anchor", "ladder", "lantern", "barrel", "compass", "violin")
TEXTS = [SENTENCE.format(verb=verb, thing=thing) for verb, thing in zip(VERBS, THINGS, strict=True)]

PROBLEMS = [
    {"question": "What was found ?", "options": ["a ladder", "an anchor", "a coin", "rain"], "answer": "B"},
    {"question": "It was near the  _  .", "options": ["harbour", "hill", "house", "road"], "answer": "A"},
]
CHOICES = {"text": ["the anchor", "a ladder that nobody wanted", "rain", "the sea"], "label": ["A", "B", "C", "D"]}


def rows_by_file() -> dict[str, list[dict]]:
    """The rows of every .jsonl file by its path below the data folder."""
    stories = {f"input_sentence_{number}": f"{TEXTS[number]}." for number in (1, 2, 3, 4)}
    recall = [
        {"context": f"{text}.", "question": "What was it", "answers": [thing, "nothing"], "title": "t"}
        for text, thing in zip(TEXTS, THINGS, strict=True)
    ]
    arc = [
        {"id": str(i), "question": f"{text}?", "choices": CHOICES, "answerKey": "B"} for i, text in enumerate(TEXTS)
    ]
    return {
        "global_reasoning/lambada_openai.jsonl": [{"text": text, "target": "came"} for text in TEXTS],
        "global_reasoning/hellaswag.jsonl": [
            {
                "row": number,
                "activity_label": "Sailing",
                "ctx": f"{text}. the captain",
                "endings": ["smiles.", "sold the [header] boat to nobody.", "is ripping tiles off.", "goes home."],
                "label": number % 4,
            }
            for number, text in enumerate(TEXTS)
        ],
        "global_reasoning/race_middle.jsonl": [{"article": f"{text}.", "problems": PROBLEMS} for text in TEXTS],
        "global_reasoning/race_high.jsonl": [{"article": f"{text}!", "problems": PROBLEMS[::-1]} for text in TEXTS],
        "local_reasoning/piqa.jsonl": [
            {"goal": text, "sol1": "use a rope", "sol2": "use the long wooden ladder", "label": number % 2}
            for number, text in enumerate(TEXTS)
        ],
        "local_reasoning/winogrande_xl.jsonl": [
            {"sentence": f"{text} so _ was happy.", "option1": "he", "option2": "she", "answer": "2"} for text in TEXTS
        ],
        "local_reasoning/arc_easy.jsonl": arc,
        "local_reasoning/arc_challenge.jsonl": arc[::-1],
        "local_reasoning/siqa.jsonl": [
            {"context": f"{text}.", "question": "Why?", "answerA": "a", "answerB": "b c", "answerC": "d", "label": "3"}
            for text in TEXTS
        ],
        "local_reasoning/boolq.jsonl": [
            {"question": "did it rain", "passage": f"{text}.", "answer": number % 2 == 0}
            for number, text in enumerate(TEXTS)
        ],
        "local_reasoning/openbookqa.jsonl": [
            {"id": str(number), "question_stem": text, "choices": CHOICES, "answerKey": "D"}
            for number, text in enumerate(TEXTS)
        ],
        "local_reasoning/storycloze.jsonl": [
            {**stories, "sentence_quiz1": "It rained.", "sentence_quiz2": "It did not.", "answer_right_ending": 2}
        ]
        * 3,
        "recall/swde.jsonl": [{"text": f"{text}. The thing:", "value": "it"} for text in TEXTS],
        "recall/fda.jsonl": [{"text": f"{text}. The device:", "value": "it"} for text in TEXTS],
        "recall/squad_v1_dev.jsonl": recall,
        "recall/nq_open_gold_passage.jsonl": recall,
        "recall/triviaqa_closed_book.jsonl": [
            {"question": "What floats?", "answer": "a boat", "aliases": ["boat", "ship"]}
        ]
        * 3,
        "recall/drop_dev.jsonl": [
            {"query_id": "q", "passage": f"{text}.", "question": "Which two?", "answers": [["anchor", "rain"], ["7"]]}
            for text in TEXTS
        ],
        **{
            f"fewshot/{name}.jsonl": [
                {language: f"le vieux {i} est venu hier", "en": f"the old {i} came home yesterday"} for i in range(120)
            ]
            for name, language in (("wmt14_fr-en", "fr"), ("wmt16_de-en", "de"), ("wmt16_ro-en", "ro"))
        },
        "perplexity/govreport.jsonl": [{"text": f"{text}.\n" * 3, "summary": "s"} for text in TEXTS[:2]],
        "perplexity/qasper.jsonl": [{"text": f"{text}.\n" * 2, "questions": [], "answers": []} for text in TEXTS[:2]],
    }


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> Path:
    """Write all files to `folder`."""
    for name, rows in rows_by_file().items():
        write_rows(folder / name, rows)
    articles = [f" = Article {number} = \n \n {text} @-@ once , twice . \n" for number, text in enumerate(TEXTS[:3])]
    (folder / "perplexity" / "wikitext2_test.raw.txt").write_text(" \n".join(["", *articles]), encoding="utf-8")
    books = folder / "perplexity" / "books"
    books.mkdir()
    for number, text in enumerate(TEXTS[:2]):
        (books / f"book{number}.txt").write_text(f"CHAPTER I\n\n{text}.\n" * 3, encoding="utf-8")
    words = [f"{first}{middle}{last}" for first in "bcdfghjklm" for middle in ("ara", "elo", "iru") for last in VERBS]
    (folder / "fewshot" / "words.txt").write_text("\n".join([*words, "the", "x-ray", *words[:5]]), encoding="utf-8")
    return folder
