# SPDX-License-Identifier: Apache-2.0
"""The tasks: their rows, prompts and scores, against lm-eval's own tasks and against the model itself."""

import json
import math
import re
from pathlib import Path
from random import Random

import pytest
import torch
from eval_inputs import save_checkpoint
from task_inputs import PROBLEMS, TEXTS, rows_by_file, write_data, write_rows
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modeling-mesanet[eval]'")

import lm_eval.tasks
from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from modeling_mesanet import MesaNetForCausalLM
from modeling_mesanet.eval import generated, task_data, task_types
from modeling_mesanet.eval.harness import TASKS
from modeling_mesanet.eval.results import UsageError

MULTIPLE_CHOICE = [
    *("hellaswag", "race_m", "race_h", "piqa", "winogrande", "arc_easy", "arc_challenge", "siqa", "boolq"),
    *("openbookqa", "storycloze"),
]


@pytest.fixture(scope="session")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A random MesaNet whose tokenizer has an end token, which lm-eval asks for."""
    path = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_model(vocab_size=300), bos=None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def local(data, monkeypatch) -> Path:
    monkeypatch.setenv(task_data.DATA_VARIABLE, str(data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return data


@pytest.fixture
def own(local, tmp_path, monkeypatch) -> Path:
    """A data folder of the test's own."""
    folder = write_data(tmp_path / "own")
    monkeypatch.setenv(task_data.DATA_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="session")
def index():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture
def load(folder):
    """`load(name, **metadata)` builds one of our tasks."""

    def load(name: str, **metadata):
        metadata = {"tokenizer": str(folder), **metadata}
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
        return manager.load([f"mesanet_{name}"])["tasks"][f"mesanet_{name}"]

    return load


def requests_of(task, limit=None):
    task.set_fewshot_seed(1234)
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=limit)
    return task.instances


def run(tasks, folder, batch_size=4, limit=None):
    """The samples of every task by name, and lm-eval's results; `tasks` are tasks, or what a manager loaded."""
    loaded = tasks if isinstance(tasks, dict) else {"tasks": {task.task_name: task for task in tasks}, "groups": {}}
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    model = HFLM(
        pretrained=MesaNetForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=batch_size,
        max_length=4096,
        backend="causal",
    )
    results = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    samples = {name: sorted(found, key=lambda sample: sample["doc_id"]) for name, found in results["samples"].items()}
    return samples, results


class TestAgainstLmEval:
    """The same rows, given to lm-eval's own task in its own format, give the same requests and scores."""

    @staticmethod
    def original(config: str, split: str, rows: list[dict]) -> ConfigurableTask:
        config = load_yaml(Path(lm_eval.tasks.__path__[0]) / config)
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        dataset = {split: Dataset.from_list(rows)}
        return ConfigurableTask(
            config={**config, **splits, "validation_split": split, "custom_dataset": lambda **_: dataset}
        )

    @pytest.fixture
    def pairs(self, local, load):
        """Ours and lm-eval's task on the same rows, those of the latter written here as the Hub has them."""
        rows = rows_by_file()
        hellaswag = [
            {
                "activity_label": row["activity_label"],
                "ctx_a": row["ctx"].removesuffix(" the captain"),
                "ctx_b": "the captain",
                "endings": row["endings"],
                "label": str(row["label"]),
            }
            for row in rows["global_reasoning/hellaswag.jsonl"]
        ]
        wikitext = [{"page": page} for page in task_data.local_rows("wikitext", "test") for page in page.values()]
        assert [page["page"].split("\n")[0] for page in wikitext] == [f" = Article {number} = " for number in range(3)]
        return {
            "hellaswag": (load("hellaswag"), self.original("hellaswag/hellaswag.yaml", "validation", hellaswag)),
            "piqa": (
                load("piqa"),
                self.original("piqa/piqa.yaml", "validation", rows["local_reasoning/piqa.jsonl"]),
            ),
            "wikitext": (load("wikitext"), self.original("wikitext/wikitext.yaml", "test", wikitext)),
        }

    def test_requests(self, pairs):
        for name, (ours, theirs) in pairs.items():
            arguments = [request.args for request in requests_of(ours)]
            assert arguments == [request.args for request in requests_of(theirs)], name
            assert len(arguments) == {"hellaswag": 24, "piqa": 12, "wikitext": 3}[name]
        # Cleaned, and with the capital that lm-eval gives the begun sentence.
        assert pairs["hellaswag"][0].instances[1].args == (
            f"Sailing: {TEXTS[0]}. The captain",
            " sold the boat to nobody.",
        )

    def test_scores_example_by_example(self, pairs, folder):
        samples, results = run([task for pair in pairs.values() for task in pair], folder)
        for name, metrics in {
            "hellaswag": ("acc", "acc_norm"),
            "piqa": ("acc", "acc_norm"),
            "wikitext": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
        }.items():
            ours, theirs = samples[f"mesanet_{name}"], samples[name]
            for metric in metrics:
                assert [sample[metric] for sample in ours] == [sample[metric] for sample in theirs]
                key = f"{metric},none"
                assert results["results"][f"mesanet_{name}"][key] == results["results"][name][key]

    def test_race_questions_of_one_article_come_together(self, local, load, monkeypatch):
        """The data set with a row a question gives what the local file with a row an article gives."""
        grouped = load("race_m")
        rows = [{"article": f"{text}.", **problem} for text in TEXTS for problem in PROBLEMS]
        monkeypatch.delenv(task_data.DATA_VARIABLE)
        monkeypatch.setattr(
            "datasets.load_dataset",
            lambda path, name: {("ehovy/race", "middle"): {"test": Dataset.from_list(rows)}}[path, name],
        )
        expected = [request.args for request in requests_of(grouped)]
        assert [request.args for request in requests_of(load("race_m"))] == expected
        assert "Question: What was found ?\nAnswer: an anchor\n" in expected[0][0]


class TestScores:
    def test_options_are_normalised_by_their_tokens(self, local, load, folder):
        tasks = [load(name) for name in MULTIPLE_CHOICE]
        samples, _ = run(tasks, folder)
        model, tokenizer = MesaNetForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        differs = 0
        for task in tasks:
            for sample in samples[task.task_name][:2]:
                costs = []
                for argument in sample["arguments"]:
                    context = tokenizer(argument[0])["input_ids"]
                    whole = torch.tensor([tokenizer(argument[0] + argument[1])["input_ids"]])
                    with torch.no_grad():
                        loss = torch.nn.functional.cross_entropy(
                            model(whole).logits[0, :-1], whole[0, 1:], reduction="none"
                        )
                    costs.append(loss[len(context) - 1 :].mean().item())
                for cost, (likelihood, _, tokens) in zip(costs, sample["filtered_resps"], strict=True):
                    assert -likelihood / tokens == pytest.approx(cost, abs=1e-5)
                gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
                assert sample["score"] == float(min(range(len(costs)), key=costs.__getitem__) == gold)
                differs += sample["score"] != sample["acc"]
        assert differs > 0  # the two scores are not the same thing

    @pytest.mark.parametrize(("chosen", "score"), [(3, 1.0), (0, 0.0)])
    def test_gold_option(self, local, load, chosen, score):
        task = load("openbookqa")
        results = [(-8.0 if number == chosen else -10.0, False, 2) for number in range(4)]
        assert task.process_results(task.eval_docs[0], results)["score"] == score
        # A longer option wins by its tokens, and loses by its sum.
        results[1] = (-12.0, False, 4)
        assert task.process_results(task.eval_docs[0], results) == {"score": 0.0, "acc": score, "acc_norm": 0.0}

    def test_lambada_needs_every_token(self, local, load, folder):
        task = load("lambada")
        assert requests_of(task)[0].args == (TEXTS[0].removesuffix(" came"), " came")
        assert task.process_results(task.eval_docs[0], [(-1.0, True)])["score"] == 1.0
        assert task.process_results(task.eval_docs[0], [(-1.0, False)])["score"] == 0.0

    @pytest.mark.parametrize(
        ("name", "text", "score"),
        [
            ("squad", " It was the ANCHOR they saw", 1.0),
            ("squad", " nothing", 1.0),
            ("squad", " the ladder", 0.0),
            ("squad", "", 0.0),
            ("swde", " It", 1.0),
            ("drop", " an anchor in the rain", 1.0),
            ("drop", " an anchor", 0.0),  # one span of two
            ("drop", " 7", 1.0),
            ("triviaqa", "The Ship.", 1.0),
        ],
    )
    def test_recall_is_containment(self, local, load, name, text, score):
        task = load(name)
        assert task.process_results(task.eval_docs[0], [text]) == {"score": score}

    def test_recall_requests(self, local, load):
        once, twice = (requests_of(load(name), 1)[0].args for name in ("squad", "squad_twice"))
        assert once[0] == f"{TEXTS[0]}.\nQuestion: What was it\nAnswer:"
        assert twice[0] == f"{once[0]}\n\n{once[0]}"
        assert once[1]["max_gen_toks"] == 48
        assert once[1]["until"] == ["\n"]
        assert once[1]["do_sample"] is False

    def test_recall_keeps_the_end_of_long_inputs(self, own, load):
        row = {"context": "ä b. " * 3000 + "The end.", "question": "What?", "answers": ["end"]}
        write_rows(own / "recall/squad_v1_dev.jsonl", [row])
        task = load("squad")
        (request,) = requests_of(task)
        whole = task.eval_docs[0]["text"]
        assert whole.endswith(request.args[0])
        assert 1990 <= task.count_tokens(request.args[0]) <= 2000 < task.count_tokens(whole)
        assert request.args[0].endswith("The end.\nQuestion: What?\nAnswer:")

    def test_cloze_of_the_hub(self):
        row = {"context": "A [PAR]boat floats. The thing that floats is", "question": "The thing that floats is"}
        made = task_types.Recall._row({**row, "answers": ["boat"]})
        assert made == {"text": "A boat floats. The thing that floats is", "answers": [["boat"]]}


class TestWindows:
    def test_every_character_is_scored_once_in_windows_of_the_length(self, local, load):
        task = load("govreport_2k")
        texts = ["naïve 北京 — " * 40, "  " + TEXTS[0] * 9 + "\n\n", "x"]
        for text in texts:
            for length in (16, 50, 10_000):
                pieces = task.windows(text, length)
                assert "".join(pieces) == text
                tokens = [len(task.tokenizer.encode(piece)) for piece in pieces]
                assert max(tokens) <= length
                assert all(count > length // 2 for count in tokens[:-1])

    def test_sections_of_the_hub(self, load, monkeypatch):
        monkeypatch.delenv(task_data.DATA_VARIABLE, raising=False)
        paper = {"section_name": ["One", None], "paragraphs": [["a b", "c"], ["d"]]}
        rows = Dataset.from_list([{"full_text": paper}])
        monkeypatch.setattr("datasets.load_dataset", lambda **_: {"test": rows})
        assert [doc["text"] for doc in load("qasper_2k").eval_docs] == ["One\na b\nc\nd"]

    def test_perplexity_is_that_of_the_model(self, local, load, folder, monkeypatch):
        task = load("books_2k", window=32)
        task.config.metadata["window"] = 32
        task.download(None)
        samples, results = run([task], folder)
        model, tokenizer = MesaNetForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        loss, count, size = 0.0, 0, 0
        for row in task_data.local_rows("books", "test"):
            assert row["text"].startswith("CHAPTER")
            for piece in task.windows(row["text"], 32):
                ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(piece)["input_ids"]]])
                with torch.no_grad():
                    loss += torch.nn.functional.cross_entropy(
                        model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
                    ).item()
                count, size = count + ids.shape[1] - 1, size + len(piece.encode())
        found = results["results"]["mesanet_books_2k"]
        assert found["perplexity,none"] == pytest.approx(float(torch.tensor(loss / count).exp()), rel=1e-5)
        assert found["bits_per_byte,none"] == pytest.approx(loss / size / torch.tensor(2.0).log().item(), rel=1e-5)
        assert len(samples["mesanet_books_2k"]) > 4


class TestFewShot:
    def test_scramblings(self):
        rng = Random(0)
        for how in generated.SCRAMBLINGS:
            for word in ("reciprocal", "casino", "planet", "aaaaa"):
                made = generated.scramble(word, how, rng)
                if how == "random_insertion":
                    assert made[::2] == word
                    assert set(made[1::2]) <= set(" .,!?;:-/")
                else:
                    assert sorted(made) == sorted(word)
                    assert (made != word) is (word != "aaaaa")
        assert generated.scramble("abc", "reversed_words", rng) == "cba"
        assert generated.scramble("casino", "cycle_letters", rng) in ("casino" * 2)
        assert generated.scramble("inevitable", "anagrams2", rng)[:2] == "in"
        assert generated.scramble("inevitable", "anagrams2", rng)[-2:] == "le"

    def test_examples_depend_on_the_draw_alone(self, local, load):
        task = load("cycle_letters_10shot", words=4, draws=3)
        first = [request.args[0] for request in requests_of(task)]
        assert first == [request.args[0] for request in requests_of(task)]
        assert first[:5] == [request.args[0] for request in requests_of(task, 5)]
        lines = [text.split("\n") for text in first]
        documents = list(task.eval_docs)
        assert [document["draw"] for document in documents[:4]] == [0, 1, 2, 0]
        for line, document in zip(lines, documents, strict=True):
            assert line[0] == "Please unscramble the letters into a word, and write that word:"
            assert len(line) == 12
            assert line[-1] == document["question"]
            assert all(re.fullmatch(r"[a-z]+ = [a-z]+", example) for example in line[1:-1])
        examples = {document["draw"]: set() for document in documents}
        for line, document in zip(lines, documents, strict=True):
            examples[document["draw"]].add(tuple(line[1:-1]))
        assert all(len(found) == 1 for found in examples.values())
        assert len(set.union(*examples.values())) == 3
        # What is asked is never among the examples.
        evaluated = {document["completion"] for document in documents}
        assert not evaluated & {
            line.split(" = ")[1] for found in examples.values() for lines in found for line in lines
        }

    def test_words_are_those_of_gpt3s_lengths(self, local):
        words = task_data.local_words("test")
        assert len(words) == len(set(words)) > 150
        assert {"the", "x-ray"}.isdisjoint(words)

    def test_words_of_the_books(self, own):
        (own / "fewshot" / "words.txt").unlink()
        words = task_data.local_words("test")
        assert words[0] == "before"  # of the commonest, the first of the alphabet
        assert "captain" in words
        assert not {"chapter", "near", "harbours"} & set(words)

    def test_without_examples_there_is_one_draw(self, local, load):
        assert set(load("reversed_words_0shot").eval_docs["draw"]) == {0}

    def test_mean_and_deviation_over_draws(self, local, load):
        task = load("anagrams2_1shot")
        document = task.eval_docs[0]
        right = task.process_results(document, [f" {document['completion']} "])
        assert right == {"score": 1.0, "score_deviation": (document["draw"], 1.0)}
        assert task.process_results(document, [document["completion"][:-1]])["score"] == 0.0
        items = [(0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0), (2, 0.0), (2, 0.0)]
        assert task.aggregation()["score_deviation"](items) == pytest.approx(0.5)  # of 0.5, 1 and 0
        assert task.aggregation()["score_deviation"](items[:2]) == 0.0

    def test_gpt3s_file(self):
        context = "Please unscramble the letters into a word, and write that word:\nasinoc ="
        for text in (context, context + " ", context.replace("\n", " "), context[:-2]):
            row = task_types.Scrambling._row({"context": text, "completion": " casino"})
            assert row == {"question": "asinoc =", "completion": "casino"}

    def test_translation(self, local, load):
        task = load("fr_en_5shot")
        text = requests_of(task, 2)[0].args[0]
        assert text.count("French phrase: ") == 6
        example = r"French phrase: le vieux (\d+) est venu hier\nEnglish phrase: the old \1 came home yesterday\n\n"
        assert len(re.findall(example, text)) == 5
        assert text.endswith("\n\nFrench phrase: le vieux 60 est venu hier\nEnglish phrase:")
        # The first rows are examples, the others are evaluated.
        assert all(int(number) < 60 for number in re.findall(r"the old (\d+)", text))
        assert len(task.eval_docs) == 60
        perfect, wrong = (
            [task.process_results(doc, [text or doc["translation"]["en"]])["bleu"] for doc in task.eval_docs]
            for text in ("", "none of it at all")
        )
        assert task.aggregation()["bleu"](perfect) == pytest.approx(100)
        assert task.aggregation()["bleu"](wrong) < 1

    def test_too_few_examples(self, own, load):
        write_rows(own / "fewshot/wmt14_fr-en.jsonl", [{"fr": "le", "en": "the"}] * 20)
        with pytest.raises(UsageError, match="shows 50 examples, but there are only 10"):
            requests_of(load("fr_en_50shot"))


class TestGenerated:
    @pytest.mark.parametrize("haystack", generated.HAYSTACKS)
    @pytest.mark.parametrize(("keys", "values"), [("words", "numbers"), ("uuids", "words"), ("numbers", "uuids")])
    def test_needles(self, haystack, keys, values):
        arguments = {"length": 400, "samples": 5, "seed": 3, "haystack": haystack, "keys": keys, "values": values}
        rows = generated.needle_documents(lambda text: len(text.split()), **arguments)
        assert rows == generated.needle_documents(lambda text: len(text.split()), **arguments)
        assert rows != generated.needle_documents(lambda text: len(text.split()), **{**arguments, "seed": 4})
        places = []
        for row in rows:
            value = row["answers"][0][0]
            assert row["text"].count(value) == 1
            key = re.search(r"of the (\S+)\?\n", row["text"])[1]
            assert f"The secret {values[:-1]} of the {key} is {value}." in row["text"]
            assert row["text"].endswith(f"The secret {values[:-1]} of the {key} is")
            assert 370 <= len(row["text"].split()) <= 400
            places.append(row["text"].index(value) / len(row["text"]))
        assert places == sorted(places)
        assert places[0] < 0.1
        assert places[-1] > 0.75
        assert len({row["answers"][0][0] for row in rows}) == 5

    def test_length_in_the_model_s_tokens(self, local, load):
        task = load("niah_essay_numbers", lengths=[128, 300], samples=2)
        assert [doc["length"] for doc in task.eval_docs] == [128, 300, 128, 300]
        for doc in task.eval_docs:
            assert doc["length"] - 60 < task.count_tokens(doc["text"]) <= doc["length"]
        doc = task.eval_docs[1]
        value = doc["answers"][0][0]
        assert task.process_results(doc, [f" {value}. And"]) == {"score": 1.0, "score_128": None, "score_300": 1.0}
        assert task.process_results(doc, [value[:-1]]) == {"score": 0.0, "score_128": None, "score_300": 0.0}

    def test_passkey(self, local, load):
        task = load("passkey", lengths=[300], samples=3)
        requests = requests_of(task)
        for request, doc in zip(requests, task.eval_docs, strict=True):
            assert doc["text"].count(doc["answers"][0][0]) == 2
            assert request.args[0] == doc["text"]
            assert task.count_tokens(doc["text"]) <= 300

    def test_associative_recall(self, local, load):
        task = load("mqar", pairs=[4, 9], samples=3, queries=3)
        requests = requests_of(task)
        assert len(requests) == 2 * 3 * 3
        for request in requests:
            prompt, target = request.args
            assert target.strip() in prompt  # the value was shown
            key = prompt.rsplit("\n", 1)[1]
            assert f"{key}{target}\n" in prompt
        doc = task.eval_docs[1]
        assert doc["pairs"] == 9
        assert requests[-1].args[0].count("\n") == 9 + 1 + 2  # pairs, a blank line, earlier questions
        scores = task.process_results(doc, [(-1.0, True), (-1.0, False), (-1.0, True)])
        assert scores == {"score": pytest.approx(2 / 3), "score_4": None, "score_9": pytest.approx(2 / 3)}

    def test_scores_by_what_varies(self, local, load, folder):
        """Means of their own documents; NaN where a limit left none."""
        task = load("mqar", pairs=[4, 5, 6], samples=2, queries=2)
        replies = iter([(True, True), (True, False), (False, False)])
        scores = [
            task.process_results(doc, [(-1.0, greedy) for greedy in next(replies)]) for doc in list(task.eval_docs)[:3]
        ]
        aggregation = task.aggregation()
        means = {name: aggregation[name]([score[name] for score in scores]) for name in scores[0]}
        assert means == {"score": 0.5, "score_4": 1.0, "score_5": 0.5, "score_6": 0.0}
        results = run([task], folder, limit=2)[1]["results"]["mesanet_mqar"]
        assert math.isnan(results["score_6,none"])
        assert 0 <= results["score_5,none"] <= 1

    @pytest.mark.parametrize(
        ("name", "metadata", "words"),
        [
            ("niah_noise_numbers", {"lengths": [8]}, "length is 8, but the question alone has"),
            ("niah_noise_numbers", {"haystack": "sand"}, "haystack is 'sand'; it must be one of noise, essay"),
            ("niah_noise_numbers", {"keys": "colours"}, "keys is 'colours'"),
            ("mqar", {"pairs": [3]}, "queries is 4; it must be from 1 to pairs, which is 3"),
            ("mqar", {"pairs": [0]}, "pairs is 0"),
        ],
    )
    def test_values_out_of_range(self, local, load, name, metadata, words):
        # Fields of the YAML file give way to lm-eval's --metadata.
        with pytest.raises(UsageError, match=re.escape(words)) as error:
            load(name, **metadata)
        assert str(error.value).startswith(f"mesanet_{name}: ")


class TestBatches:
    def test_results_do_not_depend_on_batch_size_or_padding(self, local, load, folder):
        """One by one, and all together: padded on the right when scored, on the left when generated from."""
        names = ("hellaswag", "boolq", "lambada", "squad", "wikitext", "govreport_2k", "cycle_letters_1shot", "mqar")
        settings = {"words": 5, "draws": 2, "pairs": [4], "samples": 2}
        results = []
        for size in (1, 24):
            tasks = [load(name, **settings) for name in names]
            for task in tasks:
                if task.OUTPUT_TYPE == "generate_until":
                    task.set_config("generation_kwargs", {"max_gen_toks": 8}, update=True)
            results.append(run(tasks, folder, size, limit=6)[0])
        compared = 0
        for name in names:
            for first, second in zip(*(samples[f"mesanet_{name}"] for samples in results), strict=True):
                assert first["arguments"] == second["arguments"]
                for one, other in zip(first["filtered_resps"], second["filtered_resps"], strict=True):
                    if isinstance(one, str):
                        assert one == other
                        continue
                    size = len(str(first["arguments"][0][-1]).split()) if isinstance(one, float) else 1
                    size = one[2] if isinstance(one, tuple | list) and len(one) == 3 else size
                    nll, again = (value if isinstance(value, float) else value[0] for value in (one, other))
                    assert nll / size == pytest.approx(again / size, abs=1e-5)
                    compared += 1
        assert compared > 30


class TestMistakes:
    def test_missing_file(self, own, load):
        (own / "recall/swde.jsonl").unlink()
        words = (
            f"The data folder '{own}' holds no recall/swde.jsonl (a JSON object a line with the fields text (str), "
            "value (str)), which mesanet_swde needs; put it there, or leave MESANET_DATA and --data-dir out to take "
            "the data set from the Hub."
        )
        with pytest.raises(UsageError, match=re.escape(words)):
            load("swde")

    def test_neither_words_nor_books(self, own, load):
        (own / "fewshot/words.txt").unlink()
        (own / "perplexity/books").rename(own / "elsewhere")
        with pytest.raises(UsageError, match=r"holds no fewshot/words.txt \(a word a line\) or perplexity/books"):
            load("anagrams1_0shot")

    def test_no_such_folder(self, load, monkeypatch):
        monkeypatch.setenv(task_data.DATA_VARIABLE, "/nowhere")
        with pytest.raises(UsageError, match="is '/nowhere', but there is no such folder"):
            load("piqa")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("{", "line 2, is not JSON"),
            ("[1]", "line 2, lacks the field goal (str)"),
            ('{"goal": "g", "sol1": "a", "sol2": "b"}', "line 2, lacks the field label (int)"),
            ('{"goal": "g", "sol1": "a", "sol2": "b", "label": true}', "line 2, lacks the field label (int)"),
            ('{"goal": " ", "sol1": "a", "sol2": "b", "label": 1}', "line 2, field goal, is empty"),
        ],
    )
    def test_bad_rows(self, own, load, line, words):
        file = own / "local_reasoning/piqa.jsonl"
        file.write_text(file.read_text().split("\n")[0] + f"\n{line}\n")
        with pytest.raises(UsageError, match=re.escape(words)):
            load("piqa")

    def test_no_rows(self, own, load):
        (own / "local_reasoning/piqa.jsonl").write_text("\n")
        with pytest.raises(UsageError, match="holds no rows"):
            load("piqa")

    def test_not_utf8(self, own, load):
        (own / "local_reasoning/piqa.jsonl").write_bytes(b"\xff\xfe{}")
        with pytest.raises(UsageError, match="cannot be read as UTF-8"):
            load("piqa")

    def test_empty_documents(self, own, load):
        (own / "perplexity/books/book1.txt").write_text(" \n")
        with pytest.raises(UsageError, match=r"book1.txt is empty; remove it"):
            load("books_2k")

    def test_empty_document_of_the_hub(self, load, monkeypatch):
        monkeypatch.delenv(task_data.DATA_VARIABLE, raising=False)
        rows = Dataset.from_list([{"report": "text"}, {"report": ""}])
        monkeypatch.setattr("datasets.load_dataset", lambda **_: {"test": rows})
        with pytest.raises(UsageError, match="mesanet_govreport_2k, document 2 is empty"):
            load("govreport_2k")

    def test_unreachable_hub(self, load, monkeypatch):
        def unreachable(**_):
            raise ConnectionError("no route\nto host")

        monkeypatch.delenv(task_data.DATA_VARIABLE, raising=False)
        monkeypatch.setattr("datasets.load_dataset", unreachable)
        words = "mesanet_piqa: the Hub did not provide the data set 'baber/piqa' (no route); check the network"
        with pytest.raises(UsageError, match=re.escape(words)):
            load("piqa")

    @pytest.mark.parametrize("name", ["boolq", "squad", "mqar", "govreport_2k"])
    def test_sequence_longer_than_the_limit(self, local, load, name):
        task = load(name, max_length=20)
        with pytest.raises(UsageError, match=rf"mesanet_{name}, document 0, needs \d+ tokens, but max_length is 20;"):
            requests_of(task)

    def test_sequence_of_just_the_limit(self, local, load):
        task = load("lambada")
        context, target = requests_of(task, 1)[0].args
        tokens = task.count_tokens(context + target) - 1  # the last is only predicted
        requests_of(load("lambada", max_length=tokens), 1)
        with pytest.raises(UsageError, match=f"needs {tokens} tokens, but max_length is {tokens - 1}"):
            requests_of(load("lambada", max_length=tokens - 1), 1)

    def test_no_tokenizer(self, local, index):
        with pytest.raises(UsageError, match="knows no tokenizer; name one with --model_args tokenizer="):
            index.load(["mesanet_books_2k"])


class TestFiles:
    def test_names_groups_and_descriptions(self, index):
        assert {name for name in index.all_groups if name.count("_") == 1 or "reasoning" in name} == {
            f"mesanet_{name}"
            for name in ("reasoning_global", "reasoning_local", "recall", "fewshot", "perplexity", "niah")
        }
        assert all(name.startswith("mesanet_") for name in index.all_tasks)
        grouped = set()
        for name in index.all_groups:
            config = index.task_index[name].cfg
            assert set(config["task"]) <= set(index.all_tasks), name
            grouped |= set(config["task"])
        assert set(index.all_subtasks) - grouped == {"mesanet_mqar", "mesanet_passkey", "mesanet_wikitext"}
        for name in index.all_subtasks:
            assert index.task_index[name].cfg["metadata"]["version"] >= 1

    def test_every_folder_has_a_readme(self):
        folders = [path for path in TASKS.iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert len(folders) > 20
        for folder in folders:
            text = (folder / "README.md").read_text(encoding="utf-8")
            for file in folder.glob("*.yaml"):
                name = "mesanet_" + file.stem
                pattern = re.sub(r"\d+(shot|k)$", r"<n>\1", name)
                assert f"`{name}`" in text or f"`{pattern}`" in text, f"{folder.name}/README.md lacks {name}"
            assert "## Changelog\n\n- 1.0:" in text
            assert re.search(r"## Citation\n\n```bibtex\n@|\(arXiv\s\d{4}\.\d{5}\)", text), folder.name

    def test_local_files_are_those_of_the_data_folder(self, monkeypatch):
        """On the real data: what is there is read, and what is missing is known."""
        folder = task_data.data_folder()
        if folder is None:
            pytest.skip("the evaluation data (MESANET_DATA) are not here")
        missing = {name for name in task_data.SOURCES if task_data.missing_file(name, folder)}
        assert missing <= {"race_m", "race_h", "siqa", "storycloze", "swde", "fda"}
        for name in set(task_data.SOURCES) - missing:
            assert len(task_data.local_rows(name, "test")) >= (2 if name == "books" else 10)
        assert len(task_data.local_words("test")) == 10_000


def test_plain_lm_eval_reads_our_tasks(local, folder):
    """Through lm-eval's manager alone, as with `lm_eval --include_path`; the group's score is a plain mean."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(folder)})
    _, results = run(manager.load(["mesanet_reasoning_local"]), folder, limit=2)
    group = results["groups"]["mesanet_reasoning_local"]["score,none"]
    scores = [results["results"][name]["score,none"] for name in results["group_subtasks"]["mesanet_reasoning_local"]]
    assert len(scores) == 8
    assert group == pytest.approx(sum(scores) / 8)
    json.dumps(results["results"])
