# SPDX-License-Identifier: Apache-2.0
"""The kinds of tasks that the YAML files in tasks/ configure: lm-eval's ConfigurableTask with the paper's scoring.

What a YAML file says in `metadata` beside its version:

    lm_eval_config: YAML file below lm_eval/tasks/ whose fields hold where ours says nothing
    source: name of the local rows in task_data.SOURCES
    max_tokens: longest sequence that the task makes (`mesanet eval` gives the model that much room)

Counting tokens needs the tokenizer of the model. It is the one that lm-eval's `--model_args` names (`tokenizer` or
`pretrained`), which lm-eval hands to tasks; with `simple_evaluate(model=...)` pass `metadata={"tokenizer": ...}`.
"""

import statistics
from functools import cache, cached_property
from itertools import chain, groupby
from pathlib import Path
from random import Random
from types import SimpleNamespace

import lm_eval.tasks
import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.squad_completion.task import contains_score
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import generated
from .results import UsageError
from .task_data import DATA_VARIABLE, check_texts, local_rows, local_words

# The one number of a task that groups average, from 0 to 1: what the paper reports of it.
SCORE = "score"


@cache
def _load_tokenizer(name: str, **options: str | bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name, **options)


class MesaNetTask(ConfigurableTask):
    """A task with rows from a local folder or the Hub. Nothing is ever cut off silently: see `construct_requests`."""

    def __init__(self, config: dict) -> None:
        config = {name: value for name, value in config.items() if name != "class"}
        if base := config["metadata"].get("lm_eval_config"):
            config = {**load_yaml(Path(lm_eval.tasks.__path__[0]) / base), **config}
        super().__init__(config=config)

    # ---------------------------------------------------------------- data

    def download(self, dataset_kwargs: dict | None = None, **_) -> None:
        self.dataset = {
            split: rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
            for split, rows in self.rows(dataset_kwargs).items()
        }

    def rows(self, dataset_kwargs: dict | None) -> dict:
        """Rows by split, in the form that the processing expects."""
        rows = local_rows(self.config.metadata["source"], self.config.task)
        if rows is None:
            return self.hub_rows(dataset_kwargs)
        split = self.evaluated_split
        # The local file is the split that is evaluated; there are no others to look for examples in.
        self.config.training_split = None
        if self.config.test_split:
            self.config.validation_split = None
        return {split: rows}

    def hub_rows(self, dataset_kwargs: dict | None) -> dict:
        """The data set's splits from the Hub.

        Raises:
            UsageError: the Hub does not provide it.
        """
        try:
            super().download(dataset_kwargs)
        # Whatever the client, its HTTP library and the data set's builder raise means the same here.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.config.task}: the Hub did not provide the data set '{self.config.dataset_path}' ({reason}); "
                f"check the network, or give a folder with local files (--data-dir or {DATA_VARIABLE})."
            ) from error
        return self.dataset

    @property
    def evaluated_split(self) -> str:
        return self.config.test_split or self.config.validation_split

    # ---------------------------------------------------------------- tokens

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        metadata = self.config.metadata
        name = metadata.get("tokenizer") or metadata.get("pretrained")
        if not isinstance(name, str):
            raise UsageError(
                f"{self.config.task} counts tokens and knows no tokenizer; name one with --model_args tokenizer=..., "
                "or pass metadata={'tokenizer': ...} to simple_evaluate."
            )
        options = ("revision", "subfolder", "trust_remote_code")
        return _load_tokenizer(name, **{option: metadata[option] for option in options if metadata.get(option)})

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, special ones included."""
        return len(self.tokenizer.encode(text))

    def split_tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what is scored after it, split as lm-eval does when it scores them."""
        if not context:
            return [], self.tokenizer.encode(continuation, add_special_tokens=False)
        coder = SimpleNamespace(backend="causal", tok_encode=self.tokenizer.encode)
        return TemplateLM._encode_pair(coder, context, continuation)

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> list[Instance] | Instance:
        """As lm-eval.

        Raises:
            UsageError: a sequence has more tokens than `max_length` of the model's arguments, where that is
                given.
                lm-eval would cut off its beginning and only log it.
        """
        requests = super().construct_requests(doc, ctx, **kwargs)
        self.check_lengths(requests if isinstance(requests, list) else [requests])
        return requests

    def check_lengths(self, requests: list[Instance]) -> None:
        """What `construct_requests` promises."""
        if limit := self.config.metadata.get("max_length"):
            for request in requests:
                self._check_length(request, int(limit))

    def _check_length(self, request: Instance, limit: int) -> None:
        if request.request_type == "loglikelihood":
            # The last token is only predicted; an empty context is replaced by one token.
            tokens = sum(map(len, self.split_tokens(*request.args[:2]))) - bool(request.args[0])
        elif request.request_type == "generate_until":
            tokens = self.count_tokens(request.args[0]) + request.args[1].get("max_gen_toks", 256)
        else:
            return  # rolling windows fit by construction
        if tokens > limit:
            raise UsageError(
                f"{self.config.task}, document {request.doc_id}, needs {tokens} tokens, but max_length is {limit}; "
                "allow as many (--max-length, or max_length in --model_args) if the model can read them."
            )

    # ---------------------------------------------------------------- scoring

    def aggregation(self) -> dict:
        return {SCORE: mean, **super().aggregation()}

    def higher_is_better(self) -> dict:
        return {SCORE: True, **super().higher_is_better()}


class CountsTokens(MesaNetTask):
    """A task whose log-likelihoods come to `process_results` with their number of tokens, as (nll, greedy, tokens)."""

    def apply_filters(self) -> None:
        super().apply_filters()
        for request in self.instances:
            tokens = len(self.split_tokens(*request.args[:2])[1])
            request.filtered_resps = {name: (*result, tokens) for name, result in request.filtered_resps.items()}


class MultipleChoice(CountsTokens):
    """The option whose NLL divided by its number of tokens is least; lm-eval's own metrics beside it."""

    def process_results(self, doc: dict, results: list[tuple[float, bool, int]]) -> dict:
        likelihoods, greedy, tokens = zip(*results, strict=True)
        plain = super().process_results(doc, list(zip(likelihoods, greedy, strict=True)))
        gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
        chosen = int(np.argmax(np.array(likelihoods) / np.array(tokens)))
        return {SCORE: float(chosen == gold), **plain}


class RaceByQuestions(MultipleChoice):
    """RACE from the data set with a row a question, put together by article, as lm-eval's processing has it."""

    def hub_rows(self, dataset_kwargs: dict | None) -> dict:
        rows = super().hub_rows(dataset_kwargs)[self.evaluated_split]
        articles = []
        for article, questions in groupby(rows, key=lambda row: row["article"]):
            problems = [{name: row[name] for name in ("question", "answer", "options")} for row in questions]
            articles.append({"article": article, "problems": repr(problems)})
        return {self.evaluated_split: articles}


class GreedyMatch(MesaNetTask):
    """Right when every token of the target is the likeliest one."""

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict:
        return {SCORE: float(results[0][1]), **super().process_results(doc, results)}


class Recall(MesaNetTask):
    """Reads a text that ends in a question, and continues it; right when the continuation holds an answer.

    `metadata.input_tokens` is what is left of the text, its end, special tokens included. `metadata.repeats` is how
    often the cut text is shown.
    """

    def rows(self, dataset_kwargs: dict | None) -> dict:
        return {split: map(self._row, rows) for split, rows in super().rows(dataset_kwargs).items()}

    def hub_rows(self, dataset_kwargs: dict | None) -> dict:
        return {self.evaluated_split: super().hub_rows(dataset_kwargs)[self.evaluated_split]}

    @staticmethod
    def _row(row: dict) -> dict:
        if "value" in row:
            return {"text": row["text"].strip(), "answers": [[row["value"].strip()]]}
        if "text" in row:
            return {"text": row["text"], "answers": row["answers"]}
        # A cloze: the passage, which may end in the question already, then the beginning of a sentence.
        question, passage = row["question"].strip(), row["context"].strip()
        for mark in ("[PAR]", "[DOC]", "[TLE]"):
            passage = passage.replace(mark, "")
        while question and passage.lower().endswith(question.lower()):
            passage = passage[: -len(question)].rstrip()
        text = f"{passage.rstrip('. ')}. {question}"
        return {"text": text, "answers": [[answer] for answer in row["answers"]]}

    def doc_to_text(self, doc: dict, doc_to_text=None) -> str:
        text = self.cut(doc["text"], self.config.metadata["input_tokens"])
        return "\n\n".join([text] * self.config.metadata.get("repeats", 1))

    def doc_to_target(self, doc: dict, doc_to_target=None) -> str:
        return doc["answers"][0][0]

    def cut(self, text: str, tokens: int) -> str:
        """The end of `text` that has at most `tokens` tokens, special ones included."""
        while (excess := self.count_tokens(text) - tokens) > 0:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            text = text[max(offsets[excess][0], 1) :]  # tokens of one character may share their beginning
        return text

    def process_results(self, doc: dict, results: list[str]) -> dict:
        # An answer of several spans is given when all of them are.
        held = [min(contains_score(results[0], [span]) for span in spans) for spans in doc["answers"] if spans]
        return {SCORE: float(max(held, default=0))}


class Windows(CountsTokens):
    """Perplexity of texts cut into windows of `metadata.window` tokens, each read from an empty state.

    Every token of every text is predicted once, by what precedes it in its window; the first by the token that lm-eval
    puts before a text. `metadata.field` names the field with the text.
    """

    def rows(self, dataset_kwargs: dict | None) -> dict:
        rows = super().rows(dataset_kwargs)[self.evaluated_split]
        field = self.config.metadata["field"]
        rows = [
            {"text": self._text(next(row[name] for name in (field, "text", "page") if name in row))} for row in rows
        ]
        check_texts(rows, "text", self.config.task)
        length = self.config.metadata["window"]
        windows = [
            {"document": number, "window": index, "text": window}
            for number, row in enumerate(rows)
            for index, window in enumerate(self.windows(row["text"], length))
        ]
        return {self.evaluated_split: windows}

    @staticmethod
    def _text(value: str | dict) -> str:
        if isinstance(value, str):
            return value
        sections = zip(value["section_name"], value["paragraphs"], strict=True)
        return "\n".join("\n".join(filter(None, (name, *paragraphs))) for name, paragraphs in sections)

    def windows(self, text: str, length: int) -> list[str]:
        """`text` in pieces of `length` tokens; fewer where the cut would make more of them."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoding["offset_mapping"]]
        pieces, first, begin = [], 0, 0
        while begin < len(text):
            last = min(first + length, len(starts))
            while True:
                end = starts[last] if last < len(starts) else len(text)
                piece = text[begin:end]
                tokens = len(self.tokenizer.encode(piece, add_special_tokens=False))
                if tokens <= length or last <= first + 1:
                    break
                last -= 1
            if piece:
                pieces.append(piece)
            first, begin = last, end
        return pieces

    def doc_to_text(self, doc: dict, doc_to_text=None) -> str:
        return ""

    def doc_to_target(self, doc: dict, doc_to_target=None) -> str:
        return doc["text"]

    def process_results(self, doc: dict, results: list[tuple[float, bool, int]]) -> dict:
        ((likelihood, _, tokens),) = results
        size = len(doc["text"].encode())
        return {"perplexity": (likelihood, tokens), "bits_per_byte": (likelihood, size)}

    def aggregation(self) -> dict:
        return {"perplexity": weighted_perplexity, "bits_per_byte": bits_per_byte}

    def higher_is_better(self) -> dict:
        return dict.fromkeys(self.aggregation(), False)


class FewShot(MesaNetTask):
    """Shows examples that depend on the draw (`draw` of the document, else 0) and on nothing else.

    So they are the same whatever the order of the documents, the limit and the number of processes.
    """

    _seed: int | None = None

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        self._seed = seed
        super().set_fewshot_seed(seed)

    def fewshot_context(self, doc: dict, num_fewshot: int, **kwargs) -> str:
        if num_fewshot > len(self.sampler.df):
            raise UsageError(
                f"{self.config.task} shows {num_fewshot} examples, but there are only {len(self.sampler.df)} to draw "
                "from; give a longer file, or take the task with fewer."
            )
        self.sampler.set_rnd(f"{self._seed} {doc.get('draw', 0)}")
        return super().fewshot_context(doc, num_fewshot, **kwargs)


class Translation(FewShot):
    """Translation by sacreBLEU. Without a validation split, which local files lack, examples are their first rows."""

    def rows(self, dataset_kwargs: dict | None) -> dict:
        rows = super().rows(dataset_kwargs)
        pool = self.config.fewshot_split
        if pool not in rows:
            every = list(rows[self.evaluated_split])
            held_out = min(self.config.metadata["held_out"], len(every) // 2)
            rows = {pool: every[:held_out], self.evaluated_split: every[held_out:]}
        return {split: rows[split] for split in (pool, self.evaluated_split)}


class Scrambling(FewShot):
    """Unscrambling words: the same words in every draw of examples; mean and deviation of the accuracy over draws.

    `metadata.words` are evaluated, the first of the list; examples are drawn from the others.
    """

    def rows(self, dataset_kwargs: dict | None) -> dict:
        metadata = self.config.metadata
        words = local_words(self.config.task)
        if words is None:
            rows = [self._row(row) for row in self.hub_rows(dataset_kwargs)[self.evaluated_split]]
        else:
            how = metadata["scrambling"]
            rng = Random(how)
            rows = [{"question": f"{generated.scramble(word, how, rng)} =", "completion": word} for word in words]
        evaluated = min(metadata["words"], len(rows) // 2)
        # Without examples all draws are the same.
        draws = metadata["draws"] if self.config.num_fewshot else 1
        documents = [{**row, "draw": draw} for row in rows[:evaluated] for draw in range(draws)]
        return {self.config.fewshot_split: rows[evaluated:], self.evaluated_split: documents}

    @staticmethod
    def _row(row: dict) -> dict:
        # The last line; the instruction before it is shown once, by `description`.
        question = row["context"].strip().rpartition("\n")[2].rpartition(": ")[2].removesuffix("=").strip()
        return {"question": f"{question} =", "completion": row["completion"].strip()}

    def process_results(self, doc: dict, results: list[str]) -> dict:
        right = float(results[0].strip() == doc["completion"])
        return {SCORE: right, "score_deviation": (doc["draw"], right)}

    def aggregation(self) -> dict:
        return {**super().aggregation(), "score_deviation": deviation_over_draws}


def deviation_over_draws(items: list[tuple[int, float]]) -> float:
    """Standard deviation of the accuracies of the draws; 0 for one draw.

    Args:
        items: (draw, 0 or 1) of every document.
    """
    draws = {}
    for draw, right in items:
        draws.setdefault(draw, []).append(right)
    return statistics.stdev(map(mean, draws.values())) if len(draws) > 1 else 0.0


def mean_where_known(items: list[float | None]) -> float:
    """Mean of the numbers among `items`; NaN without any."""
    known = [item for item in items if item is not None]
    return mean(known) if known else float("nan")


class Generated(MesaNetTask):
    """Documents made from `metadata.seed`; a score for all of them, and one for each value of what is varied.

    Attributes:
        by: the field of a document that says what varies.
        varied: the name of the list of its values in `metadata`.
    """

    by: str
    varied: str

    def download(self, dataset_kwargs: dict | None = None, **_) -> None:
        metadata = self.config.metadata
        values = metadata[self.varied]
        try:
            groups = [
                self.make(metadata, value) for value in (values if isinstance(values, list | tuple) else [values])
            ]
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{self.config.task}: {error}") from error
        # By turns, so that a limit takes some of each.
        rounds = zip(*groups, strict=True)
        self.dataset = {self.evaluated_split: Dataset.from_list(list(chain.from_iterable(rounds)))}

    def make(self, metadata: dict, value: int) -> list[dict]:
        raise NotImplementedError

    @cached_property
    def values(self) -> list[int]:
        """What the varied field takes, in rising order."""
        return sorted(set(self.dataset[self.evaluated_split][self.by]))

    def scores(self, doc: dict, score: float) -> dict:
        # The same names for every document, as lm-eval wants from each of several processes, which may not have
        # documents of all values.
        parts = {f"{SCORE}_{value}": score if value == doc[self.by] else None for value in self.values}
        return {SCORE: score, **parts}

    def aggregation(self) -> dict:
        return {**super().aggregation(), **{f"{SCORE}_{value}": mean_where_known for value in self.values}}

    def higher_is_better(self) -> dict:
        return dict.fromkeys(self.aggregation(), True)


class Needle(Generated):
    """A needle in a haystack of `metadata.lengths` tokens; right when the continuation holds the value."""

    by, varied = "length", "lengths"

    def make(self, metadata: dict, value: int) -> list[dict]:
        names = ("samples", "seed", "haystack", "keys", "values")
        return generated.needle_documents(self.count_tokens, length=value, **{name: metadata[name] for name in names})

    def process_results(self, doc: dict, results: list[str]) -> dict:
        return self.scores(doc, float(contains_score(results[0], doc["answers"][0])))


class Passkey(Needle):
    """A pass key in noise."""

    def make(self, metadata: dict, value: int) -> list[dict]:
        names = ("samples", "seed")
        return generated.passkey_documents(self.count_tokens, length=value, **{name: metadata[name] for name in names})


class AssociativeRecall(Generated):
    """Several queries a document; the share of those whose value has only likeliest tokens."""

    by = varied = "pairs"

    def make(self, metadata: dict, value: int) -> list[dict]:
        names = ("queries", "samples", "seed")
        return generated.associative_recall_documents(pairs=value, **{name: metadata[name] for name in names})

    def doc_to_text(self, doc: dict, doc_to_text=None) -> str:
        return doc["prompts"][0]

    def doc_to_target(self, doc: dict, doc_to_target=None) -> str:
        return doc["targets"][0]

    def construct_requests(self, doc: dict, ctx: str, **kwargs) -> list[Instance]:
        kwargs = {"metadata": kwargs["metadata"]}  # the rest is of chat templates, which change nothing here
        pairs = zip(doc["prompts"], doc["targets"], strict=True)
        requests = [Instance("loglikelihood", doc, pair, idx=number, **kwargs) for number, pair in enumerate(pairs)]
        self.check_lengths(requests)
        return requests

    def process_results(self, doc: dict, results: list[tuple[float, bool]]) -> dict:
        return self.scores(doc, mean([float(greedy) for _, greedy in results]))
