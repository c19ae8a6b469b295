# SPDX-License-Identifier: Apache-2.0
"""`mesanet eval`: every group on the bundled checkpoint, results folders, interruption, and mistakes."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_inputs import save_checkpoint
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from task_inputs import write_data
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import modeling_mesanet
from modeling_mesanet.cli import app
from modeling_mesanet.conversion.card import card_of_folder
from modeling_mesanet.loading import CheckpointError

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modeling-mesanet[eval]'")

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from modeling_mesanet.eval import harness

GROUPS = ("reasoning_global", "reasoning_local", "recall", "recall_twice", "perplexity", "niah")
SINGLE = ("mqar", "passkey", "wikitext")


@pytest.fixture(autouse=True)
def environment(monkeypatch, quick_lm_eval, no_data_folder):
    """The command sets variables and logging for its own process, which here is every test's."""
    for name in ("LMEVAL_LOG_LEVEL", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Resampling for the standard error of a perplexity or BLEU takes longer than these few documents.
    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", lambda **_: None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A random MesaNet whose tokenizer has an end token, and whose config states a shorter length than tasks need."""
    network = tiny_model(vocab_size=300, max_position_embeddings=16)
    return with_end_token(save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", network, bos=None))


def with_end_token(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(mesanet, model, data, *options, tasks="mesanet_piqa,mesanet_reasoning_global", **expected):
    arguments = ("--model", model, "--data-dir", data, "--batch_size", 4, "--limit", 2)
    return mesanet("eval", "--tasks", tasks, *arguments, *options, **expected)


class TestGroups:
    def test_every_group_runs_offline_on_the_bundled_checkpoint(self, mesanet, data, tmp_path):
        """In one run, with as few tokens as will do."""
        try:
            modeling_mesanet.bundled_checkpoint()
        except FileNotFoundError:
            pytest.skip("the bundled checkpoint is not part of this installation")
        options = ("--data-dir", data, "--limit", 1, "--batch_size", 8, "--gen_kwargs", "max_gen_toks=2")
        options += ("--metadata", '{"lengths": [240], "samples": 2, "words": 3, "draws": 2, "pairs": [4]}')
        groups = [f"mesanet_{name}" for name in GROUPS + SINGLE]
        result = mesanet("eval", "--output", tmp_path / "most", "--tasks", ",".join(groups), *options)
        # A hundred examples take this checkpoint minutes on a busy core; they are for the tiny model below.
        options += ("--num_fewshot", 2)
        result_fewshot = mesanet("eval", "--output", tmp_path / "fewshot", "--tasks", "mesanet_fewshot", *options)
        summaries = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("most", "fewshot")]
        printed = result.stdout + result_fewshot.stdout
        assert [summary["status"] for summary in summaries] == ["finished"] * 2
        found = summaries[0]["figures"] + summaries[1]["figures"]
        figures = {(figure["task"], figure["metric"]): figure["value"] for figure in found}
        for group, tasks in {
            "reasoning_global": ("lambada", "hellaswag", "race_m", "race_h"),
            "recall": ("swde", "squad", "fda", "triviaqa", "nq", "drop"),
            "recall_twice": ("swde_twice", "squad_twice", "fda_twice", "triviaqa_twice", "nq_twice", "drop_twice"),
            "scrambling_100shot": ("cycle_letters_100shot", "anagrams2_100shot"),
        }.items():
            scores = [figures[f"mesanet_{task}", "score"] for task in tasks]
            assert figures[f"mesanet_{group}", "score"] == pytest.approx(sum(scores) / len(scores))
            assert f"mesanet_{group}" in printed
        for task in ("wikitext_2k", "books_4k", "govreport_32k", "qasper_2k", "lambada_perplexity"):
            # A uniform guess would give 6144.
            assert 5 < figures[f"mesanet_{task}", "perplexity"] < 6144
        assert figures["mesanet_translation_50shot", "bleu"] >= 0
        assert 0 <= figures["mesanet_mqar", "score_4"] <= 1
        assert figures["mesanet_passkey", "score_240"] == figures["mesanet_passkey", "score"]
        index = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
        without_mean = {"mesanet_fewshot", "mesanet_perplexity"} | {f"mesanet_perplexity_{k}k" for k in (2, 4, 32)}
        assert {task for task, _ in figures} == set(index.all_tasks) - without_mean

    def test_batches_and_pads_do_not_change_what_a_trained_model_scores(self, mesanet, data, tmp_path):
        """The NLL of a token to 1e-5, where the solver is more exact than that."""
        try:
            modeling_mesanet.bundled_checkpoint()
        except FileNotFoundError:
            pytest.skip("the bundled checkpoint is not part of this installation")
        tasks = ("piqa", "hellaswag", "boolq", "arc_easy", "lambada_perplexity")
        found = []
        for size in (1, 7):
            arguments = ("--tasks", ",".join(f"mesanet_{name}" for name in tasks), "--data-dir", data, "--limit", 6)
            options = ("--model_args", "cg_tolerance=1e-6", "--batch_size", size)
            mesanet("eval", *arguments, *options, "--output", tmp_path / str(size))
            replies = {}
            for file in (tmp_path / str(size)).glob("*/samples_*.jsonl"):
                name = file.name.removeprefix("samples_mesanet_").rpartition("_")[0]
                for row in map(json.loads, file.read_text().splitlines()):
                    for number, (likelihood, _, tokens) in enumerate(row["filtered_resps"]):
                        replies[name, row["doc_id"], number] = float(likelihood) / int(tokens)
            found.append(replies)
        assert {name for name, *_ in found[0]} == set(tasks)
        assert len(set(found[0].values())) > 40
        assert found[1] == pytest.approx(found[0], abs=1e-5)

    def test_all_examples(self, mesanet, model, data):
        tasks = "mesanet_scrambling_100shot,mesanet_translation_50shot"
        options = ("--gen_kwargs", "max_gen_toks=2", "--metadata", "words=20")
        result = evaluate(mesanet, model, data, *options, tasks=tasks)
        assert re.search(r"mesanet_cycle_letters_100shot *\| *1\|none *\| *100\|", result.stdout)
        assert re.search(r"mesanet_ro_en_50shot *\| *1\|none *\| *50\|", result.stdout)


class TestResults:
    def test_output_and_table(self, mesanet, model, data, tmp_path):
        result = evaluate(mesanet, model, data, "--output", tmp_path / "out")
        assert "|mesanet_piqa" in result.stdout
        assert "Groups" in result.stdout
        summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        results = json.loads((tmp_path / "out" / summary["results"]).read_text())
        assert results["config"]["model_args"]["dtype"] == "float32"
        (samples,) = (tmp_path / "out").glob("*/samples_mesanet_piqa_*.jsonl")
        assert len(samples.read_text().splitlines()) == 2
        for figure in summary["figures"]:
            part = results["results"].get(figure["task"]) or results["groups"][figure["task"]]
            assert part[f"{figure['metric']},none"] == figure["value"]
            assert figure["limit"] == 2

    def test_reach_the_model_card(self, mesanet, model, data, tmp_path):
        evaluate(mesanet, model, data, "--output", tmp_path / "out")
        summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        card = card_of_folder(model, license="mit", evaluations=[tmp_path / "out"])
        entries = ModelCard(card).data.eval_results
        found = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in entries}
        assert found == {(figure["task"], figure["metric"]): figure["value"] for figure in summary["figures"]}
        assert {"mesanet_piqa", "mesanet_reasoning_global"} <= {task for task, _ in found}
        assert "on the first examples of each task only" in card
        assert "| mesanet_piqa | 2 | 0 | acc_norm ↑ |" in card
        assert "The data were local files." in card
        assert str(data) not in card
        # Not of other weights, nor of half a run.
        weights = load_file(model / "model.safetensors")
        changed = shutil.copytree(model, tmp_path / "changed")
        weights["model.norm.weight"][0] += 1
        save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="is of other weights"):
            card_of_folder(changed, license="mit", evaluations=[tmp_path / "out"])
        (tmp_path / "out" / "evaluation.json").write_text(json.dumps({**summary, "status": "running"}))
        with pytest.raises(CheckpointError, match="was interrupted"):
            card_of_folder(model, license="mit", evaluations=[tmp_path / "out"])

    def test_room_for_the_longest_sequence(self, model, data, mesanet, monkeypatch):
        """The model's config states 16 tokens, which for a MesaNet is no limit; the tasks ask for more."""
        lengths = []
        monkeypatch.setattr(
            "lm_eval._cli.HarnessCLI.execute", lambda _, arguments: lengths.append(arguments.model_args)
        )
        evaluate(mesanet, model, data, tasks="mesanet_books_4k,mesanet_squad")
        evaluate(mesanet, model, data, "--max-length", 77)
        evaluate(mesanet, model, data, "--model_args", "max_length=88,tokenizer=x")
        assert [found["max_length"] for found in lengths] == [4096, 77, 88]
        assert lengths[2]["tokenizer"] == "x"
        assert lengths[2]["pretrained"] == str(model)

    def test_other_models(self, mesanet, data, tmp_path):
        """A transformer keeps its own limit, and is told where a task exceeds it."""
        config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
        folder = with_end_token(save_checkpoint(tmp_path / "gpt2", GPT2LMHeadModel(config), bos=None))
        result = evaluate(mesanet, folder, data, tasks="mesanet_lambada")
        assert "|mesanet_lambada|" in result.stdout
        evaluate(mesanet, folder, data, tasks="mesanet_squad", fails="tokens, but max_length is 64; allow as many")

    def test_the_model_named_is_the_model_evaluated(self, mesanet, model, data, tmp_path, monkeypatch):
        """However it is named, so that no results are filed under another model's weights."""
        config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
        other = with_end_token(save_checkpoint(tmp_path / "gpt2", GPT2LMHeadModel(config), bos=None))
        arguments = ("eval", "--tasks", "mesanet_lambada", "--data-dir", data, "--limit", 2)
        mesanet(*arguments, "--model_args", f"pretrained={other}", "--output", tmp_path / "out")
        settings = json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]
        assert (settings["model"], settings["weights"]) == (str(other), None)
        assert settings["model_args"]["pretrained"] == str(other)
        words = f"--model is '{model}' and --model_args names pretrained={other}; give the model once"
        evaluate(mesanet, model, data, "--model_args", f"pretrained={other}", fails=words)
        words = "--model_args names revision=x, by which no MesaNet can be chosen"
        evaluate(mesanet, model, data, "--model_args", "revision=x", fails=words)
        # With an adapter the weights are not the checkpoint's.
        monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda *_: None)
        monkeypatch.setattr(harness, "_finish", lambda *_: None)
        evaluate(mesanet, model, data, "--model_args", "peft=x", "--output", tmp_path / "peft")
        assert json.loads((tmp_path / "peft" / "evaluation.json").read_text())["settings"]["weights"] is None

    def test_models_that_bring_their_code(self, mesanet, data, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
        folder = with_end_token(save_checkpoint(tmp_path / "own", GPT2LMHeadModel(config), bos=None))
        code = "from transformers import {0}\n\n\nclass {1}({0}):\n    "
        text = code.format("GPT2Config", "OwnConfig") + "model_type = 'own_code'\n"
        text += code.format("GPT2LMHeadModel", "OwnModel") + "config_class = OwnConfig\n"
        (folder / "own_code.py").write_text(text)
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_code", "auto_map": classes}))
        evaluate(mesanet, folder, data, tasks="mesanet_lambada", fails="whose config could not be read")
        result = evaluate(mesanet, folder, data, "--trust_remote_code", tasks="mesanet_lambada")
        assert "|mesanet_lambada|" in result.stdout

    def test_tasks_of_lm_eval_and_patterns(self, model, data, monkeypatch, mesanet):
        found = []
        monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda _, arguments: found.append(arguments))
        evaluate(mesanet, model, data, "--num_fewshot", 3, tasks="mesanet_arc_*,arc_easy")
        (arguments,) = found
        assert arguments.tasks == ["mesanet_arc_challenge", "mesanet_arc_easy", "arc_easy"]
        assert arguments.num_fewshot == 3
        assert arguments.include_path == [str(harness.TASKS)]


def launched(folder: Path, arguments: list) -> str:
    """What is printed by two processes that share the documents as they would on two GPUs."""
    program = folder / "program.py"
    program.write_text(
        "import sys, torch\n"
        "torch.cuda.device_count = lambda: 2  # lm-eval shares documents out where it counts several GPUs\n"
        "from modeling_mesanet.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "finally:  # or some processes would be aborted at their very end\n"
        "    assert not torch.distributed.is_initialized()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", program, *arguments]
    variables = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(part) for part in command], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_several_processes_share_the_documents(mesanet, model, data, tmp_path):
    """With the figures of one process, and one table."""
    tasks = ("piqa", "reversed_words_1shot", "wikitext", "books_2k", "mqar")
    arguments = ["eval", "--tasks", ",".join(f"mesanet_{name}" for name in tasks), "--model", model]
    arguments += ["--data-dir", data, "--limit", "5", "--batch_size", "4", "--gen_kwargs", "max_gen_toks=4"]
    arguments += ["--metadata", '{"words": 3, "draws": 2, "pairs": [4, 5], "samples": 3}']
    printed = launched(tmp_path, [*arguments, "--output", tmp_path / "two"])
    assert printed.count("|mesanet_piqa") == 1
    mesanet(*arguments, "--output", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert len(list((tmp_path / "two").glob("responses_*_rank*.db"))) == 2

    def figures(summary):
        return {(figure["task"], figure["metric"]): figure["value"] for figure in summary["figures"]}

    assert ("mesanet_mqar", "score_5") in figures(one)
    assert figures(two) == pytest.approx(figures(one), rel=1e-5)


class TestInterruption:
    def test_goes_on_and_loses_nothing(self, mesanet, model, data, tmp_path, monkeypatch):
        evaluate(mesanet, model, data, "--output", tmp_path / "whole")
        asked = []
        forward = HFLM._model_call

        def counted(self, inputs, *arguments, **options):
            asked.append(inputs.shape[0])
            if len(asked) == interrupt_at:
                raise KeyboardInterrupt
            return forward(self, inputs, *arguments, **options)

        monkeypatch.setattr(HFLM, "_model_call", counted)
        interrupt_at = 3
        evaluate(mesanet, model, data, "--output", tmp_path / "out", code=130)
        assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["status"] == "running"
        before, interrupt_at = asked[:2], None
        asked.clear()
        result = evaluate(mesanet, model, data, "--output", tmp_path / "out")
        assert "going on with the interrupted evaluation" in result.stderr
        whole, continued = (
            {
                (f["task"], f["metric"]): f["value"]
                for f in json.loads((tmp_path / name / harness.SUMMARY).read_text())["figures"]
            }
            for name in ("whole", "out")
        )
        assert whole.keys() == continued.keys()
        for key, value in whole.items():
            assert continued[key] == pytest.approx(value, rel=1e-5)
        # What had been answered is not asked again.
        first_run = sum(before) + sum(asked)
        asked.clear()
        evaluate(mesanet, model, data, "--output", tmp_path / "again")
        assert sum(asked) == first_run

    def test_other_settings_do_not_go_on(self, mesanet, model, data, tmp_path):
        evaluate(mesanet, model, data, "--output", tmp_path / "out")
        file = tmp_path / "out" / "evaluation.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps({"status": "running", "settings": summary["settings"]}))
        words = "holds an interrupted evaluation of another tasks; repeat its command"
        evaluate(mesanet, model, data, "--output", tmp_path / "out", tasks="mesanet_piqa", fails=words)
        words = "holds an interrupted evaluation of another fingerprint"
        evaluate(mesanet, model, data, "--output", tmp_path / "out", "--dtype", "bfloat16", fails=words)

    def test_changed_weights_change_the_fingerprint(self, model, tmp_path):
        before = harness._fingerprint("name", model, {})
        assert before == harness._fingerprint("name", model, {})
        for file in model.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert before == harness._fingerprint("name", tmp_path, {})
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert before != harness._fingerprint("name", tmp_path, {})
        assert before != harness._fingerprint("name", model, {"max_length": 1})


class TestMistakes:
    def test_finished_results_are_kept(self, mesanet, model, data, tmp_path):
        evaluate(mesanet, model, data, "--output", tmp_path / "out")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
        words = "holds the results of a finished evaluation; give another folder, or --overwrite"
        evaluate(mesanet, model, data, "--output", tmp_path / "out", fails=words)
        assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
        evaluate(mesanet, model, data, "--output", tmp_path / "out", "--overwrite", tasks="mesanet_piqa")
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
        assert len(list((tmp_path / "out").glob("*/results_*.json"))) == 1
        assert not list((tmp_path / "out").glob("*/samples_mesanet_lambada*"))

    def test_folders_of_others(self, mesanet, model, data, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        evaluate(mesanet, model, data, "--output", tmp_path, fails="holds other files than an evaluation's")
        evaluate(mesanet, model, data, "--output", tmp_path / "notes.txt", fails="which is a file; give a folder")

    def test_unknown_task(self, mesanet, model, data):
        words = "--tasks names 'mesanet_helaswag', which is neither one of our tasks"
        result = evaluate(mesanet, model, data, tasks="mesanet_piqa,mesanet_helaswag", fails=words)
        assert "did you mean mesanet_hellaswag" in result.stderr
        evaluate(mesanet, model, data, tasks=" , ", fails="--tasks names no task")

    def test_missing_data_files(self, mesanet, model, tmp_path):
        data = write_data(tmp_path / "data")
        for name in ("global_reasoning/race_high.jsonl", "recall/swde.jsonl"):
            (data / name).unlink()
        tasks = "mesanet_reasoning_global,mesanet_recall,mesanet_piqa"
        words = (
            "holds no global_reasoning/race_high.jsonl (a JSON object a line with the fields article (str), problems "
            "(list)), no recall/swde.jsonl"
        )
        evaluate(mesanet, model, data, tasks=tasks, fails=words)
        result = evaluate(mesanet, model, data, "--skip-missing", tasks=tasks)
        assert "left out for want of a data file: mesanet_race_h, mesanet_swde\n" in result.stderr
        assert "|mesanet_race_m" in result.stdout
        assert "|mesanet_nq" in result.stdout
        assert "mesanet_reasoning_global" not in result.stdout  # no mean of fewer tasks under the group's name
        evaluate(mesanet, model, data, "--skip-missing", tasks="mesanet_swde", fails="a file for none of the tasks")
        evaluate(mesanet, model, "/nowhere", fails="The data folder (--data-dir, MESANET_DATA) is '/nowhere'")

    def test_sequence_longer_than_the_limit(self, mesanet, model, data):
        words = "mesanet_piqa, document 0, needs "
        result = evaluate(mesanet, model, data, "--max-length", 10, tasks="mesanet_piqa", fails=words)
        assert re.search(r"needs \d+ tokens, but max_length is 10; allow as many \(--max-length", result.stderr)

    def test_empty_document(self, mesanet, model, tmp_path):
        data = write_data(tmp_path / "data")
        (data / "perplexity/books/book0.txt").write_text("\n")
        evaluate(
            mesanet, model, data, tasks="mesanet_books_2k", fails="book0.txt is empty; remove it or give it text."
        )

    def test_models_that_cannot_be_used(self, mesanet, model, data, tmp_path, monkeypatch):
        for file in model.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        evaluate(mesanet, tmp_path, data, fails="do not fit its config.json: model.norm.weight is missing")
        (tmp_path / "config.json").write_text("{")
        evaluate(mesanet, tmp_path, data, fails="whose config could not be read")
        evaluate(mesanet, tmp_path / "missing" / "too", data, fails="--model is")

    def test_without_lm_eval(self, mesanet, model, data, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        evaluate(
            mesanet,
            model,
            data,
            fails="lm-eval is not installed; install it with pip install 'modeling-mesanet[eval]'",
        )

    @pytest.mark.parametrize(
        ("option", "value", "words"),
        [
            ("--limit", "0", "--limit is 0; give a number of examples"),
            ("--limit", "-3", "--limit is -3"),
            ("--batch_size", "0", "--batch_size is '0'; give a whole number of at least 1, or auto"),
            ("--batch_size", "many", "--batch_size is 'many'"),
            ("--device", "warp", "--device is 'warp', which this machine"),
        ],
    )
    def test_bad_values(self, mesanet, model, data, tmp_path, option, value, words):
        arguments = ("--model", model, "--data-dir", data, "--output", tmp_path / "out")
        mesanet("eval", "--tasks", "mesanet_piqa", *arguments, option, value, fails=words)
        assert not (tmp_path / "out").exists()

    def test_batch_size_found_out(self, model, data, monkeypatch, mesanet):
        sizes = []
        monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda _, arguments: sizes.append(arguments.batch_size))
        for size in ("auto", "auto:4", "16"):
            mesanet("eval", "--tasks", "mesanet_piqa", "--model", model, "--data-dir", data, "--batch_size", size)
        assert sizes == ["auto", "auto:4", "16"]

    def test_unknown_option(self, mesanet, model, data):
        evaluate(mesanet, model, data, "--sing", code=2)


def test_is_listed():
    assert "eval" in {command.name for command in app.registered_commands}
