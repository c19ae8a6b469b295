# SPDX-License-Identifier: Apache-2.0
"""Cards: every figure from a file, metadata that the Hub understands, examples that run; and the committed ones."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import DynamicCache
from typer.testing import CliRunner

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint, load_checkpoint
from modeling_mesanet.cli import app
from modeling_mesanet.configuration_mesanet import PRESETS
from modeling_mesanet.conversion.card import CARD, card_of_folder, card_of_preset, check_card
from modeling_mesanet.conversion.export import export
from modeling_mesanet.files import fingerprint
from modeling_mesanet.loading import CheckpointError, weights_sha256

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "kernels" / "benchmarks" / "results"

LM_EVAL = {
    "results": {
        "arc_easy": {
            "alias": " - arc_easy",
            "acc,none": 0.4321,
            "acc_stderr,none": 0.0123,
            "acc_norm,none": 0.4,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 100,
        },
        "local_words": {"alias": "local_words", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.05},
    },
    "configs": {
        "arc_easy": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "test_split": "test"},
        "local_words": {"dataset_path": "/home/me/words", "validation_split": "validation"},
    },
    "n-shot": {"arc_easy": 5, "local_words": 0},
    "versions": {"arc_easy": 1.0, "local_words": 2.0},
    "n-samples": {"arc_easy": {"original": 2376, "effective": 2376}, "local_words": {"original": 50, "effective": 9}},
    "higher_is_better": {"arc_easy": {"acc": True}, "local_words": {"exact_match": False}},
    "config": {"model_dtype": "torch.bfloat16", "limit": None},
    "lm_eval_version": "0.4.13",
}
CERTIFICATE = {
    "verdict": "pass",
    "checks": [
        {"name": "left padding", "error": 1.24e-6, "bound": 1e-4, "status": "pass"},
        {"name": "Triton against torch", "error": None, "bound": None, "status": "skipped"},
    ],
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}


def examples(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def section(card: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def write(folder: Path, name: str, content) -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def own_evaluation(folder: Path) -> dict:
    """What examples/evaluate_novels.py writes, of the weights in `folder`."""
    recorded = json.loads((ROOT / "model_cards" / "novels" / "evaluation.json").read_text())
    return {**recorded, "checkpoint": {"sha256": fingerprint(folder / "model.safetensors")}}


class TestSections:
    def test_a_card_of_nothing_but_a_checkpoint(self, checkpoint):
        card = card_of_folder(checkpoint, license="mit")
        data = metadata(card)
        assert data == {
            "library_name": "transformers",
            "license": "mit",
            "pipeline_tag": "text-generation",
            "tags": ["mesanet", "recurrent", "linear-attention"],
        }
        assert "# tiny\n" in card
        assert "No results are recorded" in section(card, "Evaluation")
        assert "Not recorded" in section(card, "Training")
        assert "Conformance" not in card
        parameters = load_checkpoint(checkpoint).num_parameters()
        assert f"| parameters | {parameters:,} |" in section(card, "Model")

    def test_state_is_what_a_cache_holds(self, checkpoint):
        model = load_checkpoint(checkpoint)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
        held = sum(
            state.nbytes
            for layer in cache.layers
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
            if state is not None
        )
        table = section(card_of_folder(checkpoint, license="mit"), "State and memory")
        assert f"| state of 1 sequence | {held / 1024:,.2f} KiB |" in table
        assert f"| state of 64 sequences | {64 * held / 1024:,.2f} KiB |" in table
        # Keys and values of both heads in both layers, float32, 2,048 tokens.
        assert f"{2 * 2 * (16 + 8) * 2048 * 4 / 1024:,.2f} KiB" in table

    def test_solver_settings_and_what_they_cost(self, checkpoint):
        file = next(RESULTS.glob("gpu_operators_*.json"))
        text = section(card_of_folder(checkpoint, license="mit", benchmarks=[file]), "Solver")
        config = MesaNetConfig.from_pretrained(checkpoint)
        assert f"| generation and evaluation | {config.cg_max_steps} | 0.0001 |" in text
        assert "| training | 30 | -, all steps are taken |" in text
        parameters = load_checkpoint(checkpoint).num_parameters()
        step = 2 * 2 * 2 * 16 * 16  # operations, layers, heads, the matrix
        assert f"{100 * step / (2 * parameters):.1f} % of the" in text
        measured = json.loads(file.read_text())
        row = next(row for row in measured["forward"] if row["operator"] == "mesa" and row["setting"] == "30 steps")
        assert f"| 30 steps | easy | {row['steps'][0]:.1f} | {row['ms']:.2f} |" in text

    def test_speed(self, checkpoint):
        file = RESULTS / "cpu_generation.json"
        row = json.loads(file.read_text())["rows"]["decode, batch 8"]
        text = section(card_of_folder(checkpoint, license="mit", benchmarks=[file]), "Speed")
        assert f"| decode, batch 8 | {row['tokens_per_second']:,.0f} |" in text

    def test_lm_eval(self, checkpoint, tmp_path):
        card = card_of_folder(checkpoint, license="mit", evaluations=[write(tmp_path, "results.json", LM_EVAL)])
        text = section(card, "Evaluation")
        assert "| arc_easy | 2,376 | 5 | acc ↑ | 0.4321 | 0.0123 | 1 |" in text
        assert "| arc_easy | 2,376 | 5 | acc_norm | 0.4000 | - | 1 |" in text
        assert "| local_words | 9 | 0 | exact_match (strict) ↓ | 0.2500 | 0.0500 | 2 |" in text
        assert "By lm-eval 0.4.13 in bfloat16:" in text
        assert "sample_len" not in text
        assert "/home/me" not in card
        results = {result.metric_name: result for result in ModelCard(card).data.eval_results}
        assert set(results) == {"acc", "acc_norm", "exact_match (strict)"}
        assert results["acc"].dataset_type == "allenai/ai2_arc"
        assert results["acc"].dataset_split == "test"
        assert results["acc"].metric_value == 0.4321
        assert results["acc"].dataset_args == {"num_few_shot": 5}
        assert results["exact_match (strict)"].dataset_type == "local_words"
        assert results["exact_match (strict)"].dataset_args == {"num_few_shot": 0, "num_examples": 9}

    def test_tasks_on_the_same_data_stay_apart(self, checkpoint, tmp_path):
        """Reading comprehension with and without repetition, or the same with other examples in front."""
        settings = {"dataset_path": "rajpurkar/squad", "validation_split": "validation"}
        results = {
            "results": {"squad": {"acc,none": 0.1}, "squad_twice": {"acc,none": 0.2}, "squad_5": {"acc,none": 0.3}},
            "configs": {"squad": settings, "squad_twice": settings, "squad_5": settings},
            "n-shot": {"squad": 0, "squad_twice": 0, "squad_5": 5},
            "config": {},
        }
        card = card_of_folder(checkpoint, license="mit", evaluations=[write(tmp_path, "results.json", results)])
        found = {
            (result.dataset_name, result.dataset_args["num_few_shot"]): result.metric_value
            for result in ModelCard(card).data.eval_results
        }
        assert found == {("squad", 0): 0.1, ("squad_twice", 0): 0.2, ("squad_5", 5): 0.3}

    def test_results_of_our_own_commands(self, checkpoint, tmp_path):
        """Losses by context length of the bundled checkpoint, and what the solver's settings cost."""
        (tmp_path / "tale.txt").write_text("It was a dark night and the rain fell in torrents. " * 12)
        common = [str(tmp_path / "tale.txt"), "--no-plot", "-o"]
        for command, *options in (
            ("perplexity", "windows", "--lengths", "16,64"),
            ("perplexity", "whole"),
            ("compute-sweep", "sweep", "--length", "32", "--steps", "0,3", "--tolerances", "1e-2"),
        ):
            done = CliRunner().invoke(app, [command, *common, str(tmp_path / options[0]), *options[1:]])
            assert done.exit_code == 0, done.output
        files = [tmp_path / "windows", tmp_path / "whole" / "perplexity.json", tmp_path / "sweep"]
        card = card_of_folder(None, license="mit", evaluations=files)
        windows, whole = (
            json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("windows", "whole")
        )
        text = section(card, "Evaluation")
        for length, entry in windows["lengths"].items():
            assert f"| {length} tokens | {entry['tokens']} | {entry['nll']:.4f} | {entry['perplexity']:.2f} |" in text
        entry = whole["lengths"]["whole"]
        assert f"| none | {entry['tokens']} | {entry['nll']:.4f} | {entry['perplexity']:.2f} |" in text
        assert f"| {entry['bits_per_byte']:.4f} |" in text
        assert "on *tale*" in text
        found = {
            (result.dataset_args or {}).get("context_length"): result.metric_value
            for result in ModelCard(card).data.eval_results
        }
        expected = {16: windows["lengths"]["16"], 64: windows["lengths"]["64"], None: entry}
        assert found == {length: round(one["perplexity"], 4) for length, one in expected.items()}
        sweep = json.loads((tmp_path / "sweep" / "compute_sweep.json").read_text())["sweep"]
        solver = section(card, "Solver")
        for one in sweep:
            row = f"{one['mean_steps']:.1f} | {one['perplexity']:.2f} | {one['difference']:+.4f} |"
            assert f"| {one['max_steps']} | {one['tolerance'] or '-'} | {row}" in solver
        assert len(sweep) == 4
        with pytest.raises(CheckpointError, match="of other weights"):
            card_of_folder(checkpoint, license="mit", evaluations=files[:1])

    def test_within_and_beyond_the_training_length(self, checkpoint, tmp_path):
        """That table is there where texts are longer than what the model was trained on."""
        text = {"nll": 2.0, "perplexity": 7.389, "tokens": 4}
        content = {
            "settings": {
                "command": "perplexity",
                "model": {"weights": weights_sha256(checkpoint)},
                "dtype": "float32",
            },
            "lengths": {"2": text | {"nll": 2.5}, "4": text | {"nll": 2.125}, "8": text},
            "documents": {"tale": text},
            "training_length": 4,
            "extrapolation": {"within": {"from": 0, "to": 4, **text}, "beyond": {"from": 4, "to": 8, **text}},
        }
        file = write(tmp_path, "perplexity.json", content)
        card = card_of_folder(checkpoint, license="mit", evaluations=[file])
        assert "| 5 to 8 | 4 | 7.39 |" in section(card, "Evaluation")
        sentence = (
            "The training length is 4 tokens; windows 2 times as long change the loss of the same tokens by -0.1250"
        )
        assert sentence in section(card, "Evaluation")

    @pytest.mark.parametrize(
        ("differences", "sentence"),
        [
            (
                {0: 0.0827, 1: 0.0784, 2: 0.1254, 5: 0.0007, 8: -0.00004},
                "With fixed steps: without the solver (0 steps) the loss differs from row 1's by +0.0827 nats; "
                "2 steps are worse than none; from 5 steps on it is the same within 0.001.",
            ),
            ({1: 0.5, 3: 0.0001}, "With fixed steps: from 3 steps on it is the same within 0.001."),
            ({0: 0.5, 1: 0.25}, "(0 steps) the loss differs from row 1's by +0.5000 nats."),
            ({2: 0.0001, 4: 0.5}, None),
            ({}, None),
        ],
    )
    def test_what_fixed_steps_buy(self, checkpoint, tmp_path, differences, sentence):
        def entry(steps, tolerance, difference):
            figures = {"mean_steps": 4.0, "perplexity": 9.0, "difference": difference, "tasks": {}}
            return {"max_steps": steps, "tolerance": tolerance, **figures}

        content = {
            "settings": {
                "command": "compute-sweep",
                "model": {"weights": weights_sha256(checkpoint)},
                "dtype": "float32",
                "length": 8,
                "documents": ["tale"],
            },
            # Tolerances are no fixed steps.
            "sweep": [entry(64, 1e-4, 0.0), *(entry(n, None, d) for n, d in differences.items()), entry(64, 0.1, 0.7)],
        }
        card = card_of_folder(checkpoint, license="mit", evaluations=[write(tmp_path, "compute_sweep.json", content)])
        assert ("With fixed steps" in card) == (sentence is not None)
        assert sentence is None or sentence in section(card, "Solver")

    def test_own_evaluation_and_training(self, checkpoint, tmp_path):
        evaluation = own_evaluation(checkpoint)
        card = card_of_folder(
            checkpoint,
            license="mit",
            training=ROOT / "model_cards" / "novels" / "training_log.json",
            evaluations=[write(tmp_path, "evaluation.json", evaluation)],
        )
        assert "**Tokens seen:** 65,536,000 (5.9 passes), in 2000 steps" in section(card, "Training")
        assert "; epsilon 0.001 in the norm of each head's output." in section(card, "Training")
        perplexity = evaluation["book"]["perplexity"]["8192"]
        assert f"| 8,192 | {perplexity:.2f} |" in section(card, "Evaluation")
        (result,) = ModelCard(card).data.eval_results
        bits = round(evaluation["novels_valid"]["bits_per_byte"], 4)
        assert (result.metric_type, result.metric_value) == ("bits_per_byte", bits)

    def test_training_by_trainer(self, checkpoint, tmp_path):
        history = [{"loss": 5.5, "step": 1}, {"loss": 2.25, "step": 9}, {"eval_loss": 2.5, "step": 9}]
        state = {"global_step": 1200, "epoch": 1.5, "num_input_tokens_seen": 76800, "log_history": history}
        card = card_of_folder(checkpoint, license="mit", training=write(tmp_path, "trainer_state.json", state))
        text = section(card, "Training")
        assert "1,200 (1.50 passes)" in text
        assert "76,800" in text
        assert "5.500 at first, 2.250 at last" in text

    def test_certificate(self, checkpoint, tmp_path):
        certificate = {**CERTIFICATE, "weights": weights_sha256(checkpoint)}
        card = card_of_folder(checkpoint, license="mit", certificate=write(tmp_path, "check.json", certificate))
        text = section(card, "Conformance")
        assert "**pass**" in text
        assert "| left padding | 1.2e-06 | 1.0e-04 | pass |" in text
        assert "| Triton against torch | - | - | skipped |" in text
        assert "torch 2.13.0" in text

    def test_what_people_say(self, checkpoint, tmp_path):
        about = {
            "title": "Mine",
            "license": "mit",
            "language": ["en", "de"],
            "datasets": ["me/words"],
            "widget": ["Once"],
            "tags": ["tales"],
            "limits": "Only tales.",
            "intended_use": "Bedtime.",
        }
        card = card_of_folder(checkpoint, about=write(tmp_path, "about.yaml", yaml.safe_dump(about)))
        data = metadata(card)
        assert data["language"] == ["en", "de"]
        assert data["datasets"] == ["me/words"]
        assert data["widget"] == [{"text": "Once"}]
        assert "tales" in data["tags"]
        assert section(card, "Limits").strip() == "Only tales."
        assert section(card, "Intended use").strip() == "Bedtime."
        assert "# Mine\n" in card


class TestRefusals:
    @pytest.mark.parametrize(
        ("option", "content", "message"),
        [
            ("training", "{", "--training is .*cannot be read as JSON"),
            ("training", {"loss": 1}, "--training is .*not of a known format"),
            ("training", {"recipe": {}}, r"--training is .*not of a known format \(KeyError: 'data'\)"),
            ("evaluations", {"scores": 1}, "--evaluation is .*not of a known format"),
            ("evaluations", [1], "--evaluation is .*no JSON object"),
            ("certificate", {"verdict": "pass"}, "--certificate is .*not of a known format"),
            ("benchmarks", {"x": 1}, "--benchmark is .*not of a known format"),
            ("about", "titel: x", "has a field 'titel' that no card has"),
            ("about", "- x", "no mapping of fields"),
            ("about", "widget: Once", "whose field 'widget' is 'Once'; give a list"),
            ("about", "summary: [1]", r"whose field 'summary' is \[1\]; give text"),
            ("about", "published: {tables: []}", "would not be valid .*has no attribute 'source'"),
        ],
    )
    def test_files_of_other_formats(self, checkpoint, tmp_path, option, content, message):
        file = write(tmp_path, "file", content)
        with pytest.raises(CheckpointError, match=message) as caught:
            card_of_folder(
                checkpoint, license="mit", **{option: [file] if option in ("evaluations", "benchmarks") else file}
            )
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)

    def test_results_of_other_weights(self, checkpoint, tmp_path):
        evaluation = {**own_evaluation(checkpoint), "checkpoint": {"sha256": "0" * 64}}
        with pytest.raises(CheckpointError, match=r"--evaluation is .*of other weights"):
            card_of_folder(checkpoint, license="mit", evaluations=[write(tmp_path, "evaluation.json", evaluation)])
        results = {**LM_EVAL, "config": {"model_num_parameters": 7}}
        with pytest.raises(CheckpointError, match="of a model of 7 parameters"):
            card_of_folder(checkpoint, license="mit", evaluations=[write(tmp_path, "results.json", results)])
        certificate = {**CERTIFICATE, "weights": "0" * 64}
        with pytest.raises(CheckpointError, match=r"--certificate is .*of other weights"):
            card_of_folder(checkpoint, license="mit", certificate=write(tmp_path, "check.json", certificate))

    def test_a_folder_without_results(self, checkpoint, tmp_path):
        with pytest.raises(CheckpointError, match=r"--evaluation is .*without one file of results"):
            card_of_folder(checkpoint, license="mit", evaluations=[tmp_path])

    def test_weights_in_several_files(self, checkpoint, tmp_path):
        """They are told from others whatever else the folder holds."""
        model = load_checkpoint(checkpoint)
        for name, size in (("one", "1GB"), ("many", "50KB"), ("again", "50KB")):
            model.save_pretrained(tmp_path / name, max_shard_size=size)
        (tmp_path / "again" / "config.json").write_text("{}")
        assert weights_sha256(tmp_path / "one") == fingerprint(tmp_path / "one" / "model.safetensors")
        assert weights_sha256(tmp_path / "many") == weights_sha256(tmp_path / "again")
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
        assert weights_sha256(tmp_path / "many") != weights_sha256(tmp_path / "again")

    def test_no_licence(self, checkpoint):
        with pytest.raises(CheckpointError, match="licence is missing"):
            card_of_folder(checkpoint)

    def test_what_the_hub_would_not_understand_is_not_written(self, checkpoint, tmp_path):
        with pytest.raises(CheckpointError, match=r"would not be valid \(`license` is missing or no identifier"):
            card_of_folder(checkpoint, license="My License")
        with pytest.raises(CheckpointError, match=r"needs a `license_name`"):
            card_of_folder(checkpoint, license="other")
        about = {"license": "other", "license_name": "house-rules", "license_link": "LICENSE"}
        card = card_of_folder(checkpoint, about=write(tmp_path, "about.yaml", yaml.safe_dump(about)))
        assert about.items() <= metadata(card).items()
        with pytest.raises(CheckpointError, match="--repo-id is 'a b', which is no Hub id"):
            card_of_folder(checkpoint, license="mit", repo_id="a b")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"license": None}, "`license` is missing"),
            ({"license": "Do What You Want"}, "`license` is missing or no identifier"),
            ({"license": "other"}, "needs a `license_name`"),
            ({"library_name": "mesanet"}, "`library_name` must be transformers"),
            ({"language": "English"}, "`language` holds 'English'"),
            ({"datasets": ["a b"]}, "`datasets` holds 'a b'"),
            ({"tags": [1]}, "`tags` holds 1"),
            ({"widget": ["Once"]}, "`widget` holds 'Once'"),
            ({"model-index": [{"name": "x"}]}, "model_index"),
            ({"model-index": "value: high"}, "'high' as acc, which is no finite number"),
            ({"model-index": "value: .nan"}, "nan as acc"),
            ({"model-index": "value: 0.5"}, None),
        ],
    )
    def test_metadata(self, checkpoint, tmp_path, change, message):
        card = card_of_folder(checkpoint, license="mit")
        for name, value in change.items():
            if isinstance(value, str) and name == "model-index":
                metric = yaml.safe_load(f"{{type: acc, {value}}}")
                result = {"task": {"type": "text-generation"}, "dataset": {"type": "a/b", "name": "b"}}
                change = {name: [{"name": "mine", "results": [{**result, "metrics": [metric]}]}]}
        data = {name: value for name, value in {**metadata(card), **change}.items() if value is not None}
        file = write(tmp_path, CARD, f"---\n{yaml.safe_dump(data)}---\n{card.split('---', 2)[2]}")
        if message is None:
            assert check_card(file).data.eval_results[0].metric_value == 0.5
            return
        with pytest.raises(CheckpointError, match=re.escape(message)):
            check_card(file)

    def test_text(self, checkpoint, tmp_path):
        card = card_of_folder(checkpoint, license="mit")
        for wrong, message in (
            (card.replace("# tiny", "tiny"), "has no title"),
            (card + "\n{{ more }}\n", "not filled in"),
            ("# tiny\n", "no block of metadata"),
            ("---\n: [\n---\n", "no valid card"),
        ):
            with pytest.raises(CheckpointError, match=message):
                check_card(write(tmp_path, CARD, wrong))


class TestExamples:
    @pytest.mark.parametrize("kind", ["package", "code"])
    def test_run(self, checkpoint, tmp_path, monkeypatch, capsys, kind, run_without_package):
        folder = tmp_path / "me" / "tiny"
        if kind == "code":
            export(checkpoint, folder, check=False)
        else:
            shutil.copytree(checkpoint, folder)
        card = card_of_folder(folder, license="mit", repo_id="me/tiny")
        assert check_card(write(tmp_path, CARD, card))
        sources = examples(card)
        assert len(sources) == 2
        assert ("trust_remote_code=True" in card) is (kind == "code")
        assert ("custom_code" in metadata(card)["tags"]) is (kind == "code")
        if kind == "code":
            assert all("modeling_mesanet" not in source for source in sources)
            program = f"import contextlib, io, json, os\nos.chdir({str(tmp_path)!r})\nprinted = io.StringIO()\n"
            program += f"with contextlib.redirect_stdout(printed):\n    for source in {sources!r}:\n"
            program += "        exec(source, {'__name__': '__main__'})\nprint(json.dumps(printed.getvalue()))"
            printed = run_without_package(program)
        else:
            monkeypatch.chdir(tmp_path)
            for source in sources:
                exec(source, {"__name__": "__main__"})
            printed = capsys.readouterr().out
        assert printed.count("It was a dark night") == 2

    def test_of_the_bundled_checkpoint_run(self, capsys):
        sources = examples((Path(bundled_checkpoint()) / CARD).read_text(encoding="utf-8"))
        assert len(sources) == 2
        for source in sources:
            exec(source, {"__name__": "__main__"})
        assert capsys.readouterr().out.count("It was a dark night") == 2

    @pytest.mark.parametrize("preset", PRESETS)
    def test_of_published_sizes_run(self, preset, capsys):
        (source,) = examples((ROOT / "model_cards" / preset / CARD).read_text(encoding="utf-8"))
        exec(source, {"__name__": "__main__"})
        with torch.device("meta"):
            count = MesaNetForCausalLM(MesaNetConfig.preset(preset)).num_parameters()
        assert capsys.readouterr().out == f"{count:,} parameters\n"


class TestCommitted:
    def test_are_what_the_builder_makes_of_the_records(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        cards = importlib.import_module("write_card").cards()
        sys.modules.pop("write_card")
        assert len(cards) == 1 + len(PRESETS)
        for file, text in cards.items():
            assert file.read_text(encoding="utf-8") == text, f"{file} is old: run python examples/write_card.py"
            check_card(file)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_published_sizes_are_marked_as_not_trained_here(self, preset):
        card = card_of_preset(preset, ROOT / "model_cards" / preset / "about.yaml")
        assert "**Not trained here.**" in card
        assert "As published (not run here)" in section(card, "Training")
        assert "model-index" not in metadata(card)
        if "|" in section(card, "Evaluation"):
            assert "Figures of the paper, not measured here. Source:" in section(card, "Evaluation")

    def test_published_figures_of_1b(self):
        card = (ROOT / "model_cards" / "1B" / CARD).read_text(encoding="utf-8")
        assert "| MesaNet | 10.83 | 26.78 | 11.49 | 10.71 | 9.80 | 13.13 |" in card
        assert "arXiv 2506.05233" in section(card, "Evaluation")


class TestCommand:
    def test_writes_and_replaces_only_when_told(self, copy):
        run = CliRunner().invoke
        result = run(app, ["card", str(copy), "--license", "mit", "--repo-id", "me/tiny"])
        assert result.exit_code == 0, result.output
        card = (copy / CARD).read_text(encoding="utf-8")
        assert 'path = "me/tiny"' in card
        refused = run(app, ["card", str(copy), "--license", "apache-2.0"])
        assert refused.exit_code == 1
        assert "--overwrite" in refused.stderr
        assert (copy / CARD).read_text(encoding="utf-8") == card
        assert run(app, ["card", str(copy), "--license", "apache-2.0", "--overwrite"]).exit_code == 0
        assert metadata((copy / CARD).read_text(encoding="utf-8"))["license"] == "apache-2.0"
