# SPDX-License-Identifier: Apache-2.0
"""`mesanet synthetic`: the examples are what the tasks say, layers learn them, tables and resumption, bad input."""

import csv
import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the eval extra is not installed")
pytest.importorskip("matplotlib", reason="the eval extra is not installed")

from accelerate.state import AcceleratorState

from modeling_mesanet.eval import synthetic, synthetic_data
from modeling_mesanet.eval.synthetic import LAYERS, TASKS, Run, Schedule, Segment, Size, Task
from modeling_mesanet.eval.synthetic_data import IGNORED

TINY = {"length": 16, "pairs": 3, "vocab": 16}
TINY_SIZE = Size(width=32, blocks=2, heads=2)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_task(monkeypatch) -> str:
    """A small MQAR with two kinds of test examples."""
    schedule = Schedule(1, (1e-2,), (0.1,))
    task = Task(
        vocab=16,
        generate=synthetic_data.multi_query_recall,
        train=(Segment(1536, TINY), Segment(512, TINY | {"length": 12})),
        test=(Segment(64, TINY | {"pairs": 2}, "2 pairs"), Segment(64, TINY, "3 pairs")),
        quick=schedule,
        published=schedule,
        batch_size=32,
        size=TINY_SIZE,
    )
    monkeypatch.setitem(TASKS, "tiny", task)
    return "tiny"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def answers(examples, row: int) -> list[tuple[int, int]]:
    """Positions of a row where something is asked, and what."""
    asked = np.flatnonzero(examples.targets[row] != IGNORED)
    return [(int(place), int(examples.targets[row, place])) for place in asked]


class TestExamples:
    @pytest.mark.parametrize("name", [name for name in TASKS if name != "mqar"])
    def test_published_sizes(self, name, rng):
        task = TASKS[name]
        segment = dataclasses.replace(task.train[0], count=3)
        for training in (True, False):
            examples = synthetic.make_examples(task, segment, rng, training)
            assert examples.inputs.shape == examples.targets.shape
            assert examples.inputs.shape[1] in (segment.options["length"], segment.options["length"] - 1)
            assert 0 <= examples.inputs.min() <= examples.inputs.max() < task.vocab
            asked = examples.targets[examples.targets != IGNORED]
            assert 0 <= asked.min() <= asked.max() < task.vocab
            # Every example asks for something.
            assert (examples.targets != IGNORED).any(axis=1).all()

    @pytest.mark.parametrize("noise", [0.0, 0.4])
    def test_in_context_recall(self, rng, noise):
        options = {"length": 32, "vocab": 16 + 16 * (noise > 0), "noise": noise, "noise_vocab": 16 * (noise > 0)}
        examples = synthetic_data.in_context_recall(rng, 50, False, **options)
        noisy = 0
        for row, line in enumerate(examples.inputs):
            asked, known = dict(answers(examples, row)), {}
            for place in range(0, len(line), 2):
                if line[place] >= 16:
                    assert line[place + 1] >= 16
                    noisy += 1
                    continue
                assert line[place] < 8
                # The last value is not part of the inputs.
                value = asked[place] if place == len(line) - 1 else line[place + 1]
                assert 8 <= value < 16
                if line[place] in known:
                    assert asked.pop(place) == known[line[place]] == value
                known[line[place]] = value
            assert not asked
            assert len(known) > 1
        assert noisy / (50 * 16) == pytest.approx(noise, abs=0.1)

    def test_recall_is_trained_on_every_next_token(self, rng):
        options = {"length": 32, "vocab": 16, "noise": 0.0, "noise_vocab": 0}
        examples = synthetic_data.in_context_recall(rng, 5, True, **options)
        np.testing.assert_array_equal(examples.inputs[:, 1:], examples.targets[:, :-1])

    def test_fuzzy_recall(self, rng):
        """Keys of three tokens; a value that is asked for follows an earlier occurrence of its key."""
        examples = synthetic_data.fuzzy_in_context_recall(rng, 60, False, length=64, vocab=16, motif=3)
        for row in range(60):
            line = np.append(examples.inputs[row], examples.targets[row, -1])
            line = line[line != 15].tolist()
            pairs, place = [], 0
            while place < len(line):
                key, place = tuple(line[place : place + 3]), place + 3
                assert len(set(key)) == 3
                assert max(key) < 7
                value = []
                while place < len(line) and line[place] >= 7:
                    value.append(line[place])
                    place += 1
                assert 1 <= len(value) == len(set(value)) <= 3
                pairs.append((key, tuple(value)))
            known, asked = {}, []
            for key, value in pairs:
                if key in known:
                    assert known[key] == value
                    asked += value
                known[key] = value
            assert pairs[-1] in pairs[:-1]
            assert [token for _, token in answers(examples, row)] == asked

    def test_fuzzy_training_shows_what_it_asks_for(self, rng):
        examples = synthetic_data.fuzzy_in_context_recall(rng, 200, True, length=48, vocab=16, motif=3)
        lines = np.concatenate([examples.inputs, examples.targets[:, -1:]], axis=1)
        for line in lines.tolist():
            text = "".join(chr(97 + token) for token in line if token != 15)
            start = max(place for place in range(1, len(text)) if text[place] <= "g" and text[place - 1] > "g")
            assert text.index(text[start:]) < start

    def test_selective_copying(self, rng):
        examples = synthetic_data.selective_copying(rng, 50, True, length=40, vocab=16, copied=6)
        for row, line in enumerate(examples.inputs):
            (copy,) = np.flatnonzero(line == 15)
            assert copy == 40 - 6 - 1
            assert (line[copy + 1 :] == 14).all()
            shown = line[:copy][line[:copy] < 14].tolist()
            assert answers(examples, row) == list(enumerate(shown, copy + 1))
            assert len(shown) == 6

    def test_memorization_has_one_mapping(self, rng):
        options = {"length": 32, "vocab": 64, "mapping_seed": 3}
        values: dict[int, set] = {}
        for training in (True, False):
            examples = synthetic_data.memorization(rng, 100, training, **options)
            assert (examples.inputs[:, 1::2] == 63).all()
            for row, line in enumerate(examples.inputs):
                for place, value in answers(examples, row):
                    values.setdefault(int(line[place - 1]), set()).add(value)
        assert all(len(found) == 1 for found in values.values())
        assert len(values) == 31
        assert len(set.union(*values.values())) == 31

    def test_multi_query_recall(self, rng):
        examples = synthetic_data.multi_query_recall(rng, 200, True, length=64, vocab=100, pairs=8)
        first = []
        for row, line in enumerate(examples.inputs):
            mapping = dict(zip(line[:16:2].tolist(), line[1:16:2].tolist(), strict=True))
            assert len(mapping) == 8
            assert max(mapping) < 50 <= min(mapping.values())
            assert 0 not in mapping
            asked = answers(examples, row)
            assert {line[place]: value for place, value in asked} == mapping
            assert min(place for place, _ in asked) >= 16
            first.append(asked[0][0])
        # Distances follow a power law: the place right after the pairs is the likeliest by far.
        assert first.count(16) > 150

    def test_in_context_languages(self, rng):
        examples = synthetic_data.in_context_language(rng, 30, False, length=128, alphabet=18)
        for row in range(30):
            scored = answers(examples, row)
            assert len(scored) > 50
            for place, symbol in scored:
                accepted = np.flatnonzero(examples.accepted[row, place])
                assert symbol in accepted
                assert 1 <= len(accepted) <= 4
                assert accepted.max() < 18
            # A string begins in the first state: what may follow a separator is always the same.
            starts = np.flatnonzero(examples.inputs[row, :-1] == 18)
            starts = [place for place in starts if examples.targets[row, place] != IGNORED]
            assert len({examples.accepted[row, place].tobytes() for place in starts}) <= 1

    def test_distinct_numbers_are_uniform(self, rng):
        drawn = synthetic_data.distinct(rng, 4000, 3, 5)
        assert all(len(set(row)) == 3 for row in drawn.tolist())
        np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=5) / 4000, 0.2, atol=0.03)
        assert sorted(synthetic_data.distinct(rng, 1, 5, 5)[0].tolist()) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("name", list(TASKS))
    def test_a_seed_gives_the_same_examples(self, name):
        task = TASKS[name]
        segment = dataclasses.replace(task.test[0], count=4)
        first, again, other = (
            synthetic.make_examples(task, segment, np.random.default_rng(seed), False) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first.inputs, again.inputs)
        np.testing.assert_array_equal(first.targets, again.targets)
        assert not np.array_equal(first.inputs, other.inputs)


def test_runs_that_differ_have_names_that_differ():
    runs = [Run("mqar", "gla", rate, 0.1, 0, 3) for rate in (1e-3, 1.04e-3, 10**-2.5)]
    assert len({run.name for run in runs}) == 3
    assert all(Run.of(dataclasses.asdict(run) | {"accuracy": 1.0}) == run for run in runs)


class TestTraining:
    def test_mesanet_learns_to_recall(self, tiny_task):
        """A guess among the eight values is right in one case of eight."""
        result = synthetic.train(Run(tiny_task, "mesanet", 1e-2, 0.1, seed=0, epochs=1))
        assert result["accuracy"] > 0.6
        assert result["steps"] == 64
        assert result["loss"][-1][1] < 0.5 * result["loss"][0][1]
        assert set(result["segments"]) == {"2 pairs", "3 pairs"}
        assert not result["diverged"]

    def test_compression_reads_all_tokens_off_the_last_output(self, monkeypatch):
        options = {"length": 4, "vocab": 5}
        small = {"vocab": 5, "train": (Segment(4096, options),), "test": (Segment(64, options),), "batch_size": 64}
        small["size"] = TINY_SIZE
        monkeypatch.setitem(TASKS, "compression", dataclasses.replace(TASKS["compression"], **small))
        result = synthetic.train(Run("compression", "attention", 1e-2, 0.0, seed=0, epochs=2))
        assert result["accuracy"] > 0.6  # the end token is a quarter of all, and a guess one in four of the rest

    def test_a_run_repeats_itself(self, tiny_task):
        run = Run(tiny_task, "attention", 1e-2, 0.1, seed=1, epochs=1)
        first, again = (synthetic.train(run) for _ in range(2))
        assert first["loss"] == again["loss"]
        assert first["segments"] == again["segments"]

    def test_divergence_is_told(self, tiny_task, monkeypatch):
        monkeypatch.setattr(synthetic.F, "cross_entropy", lambda logits, targets: logits.sum() * float("nan"))
        result = synthetic.train(Run(tiny_task, "attention", 1e-2, 0.1, seed=1, epochs=1))
        assert result["diverged"]
        assert result["steps"] < 64

    def test_layers_have_one_size_and_differ_in_the_solver(self):
        counts = {}
        for name, make in LAYERS.items():
            model = synthetic.SequenceModel(make(Size(), 16, 128), 128, 16)
            counts[name] = sum(parameter.numel() for parameter in model.parameters())
        assert counts["mesanet"] == counts["gla"]
        assert counts["attention"] == pytest.approx(counts["mesanet"], rel=0.05)
        config = LAYERS["gla"](Size(), 16, 128).config
        assert (config.cg_max_steps, config.cg_max_steps_training) == (0, 0)
        config = LAYERS["mesanet"](Size(), 16, 128).config
        assert (config.num_attention_heads, config.head_dim, config.hidden_size) == (8, 16, 128)
        assert config.cg_max_steps_training == 30

    def test_batches_hold_one_length_each_and_all_examples(self, tiny_task, rng):
        task = TASKS[tiny_task]
        dataset = synthetic.ExampleBatches([synthetic.make_examples(task, part, rng, True) for part in task.train])
        sampler = synthetic.OneLengthBatches(dataset, 100, torch.Generator().manual_seed(0))
        epochs = [list(sampler) for _ in range(2)]
        assert len(epochs[0]) == len(sampler) == 16 + 6
        for batches in epochs:
            assert sorted(index for batch in batches for index in batch) == list(range(2048))
            for batch in batches:
                assert dataset.__getitems__(batch)["inputs"].shape == (len(batch), 16 if batch[0] < 1536 else 12)
        assert epochs[0] != epochs[1]

    def test_the_learning_rate_warms_up_and_falls(self):
        rates = [synthetic.learning_rate_factor(step, 200, 1e-3) for step in range(201)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert rates[10] == pytest.approx(1)
        assert (np.diff(rates[10:]) < 0).all()
        assert rates[200] == pytest.approx(1e-3)


class TestCommand:
    def test_table(self, mesanet, tiny_task, tmp_path, monkeypatch):
        task = TASKS[tiny_task]
        monkeypatch.setitem(TASKS, tiny_task, dataclasses.replace(task, train=(Segment(128, TINY),)))
        output = tmp_path / "out"
        printed = mesanet("synthetic", tiny_task, "-o", output, "--layers", "gla,attention", "--seeds", "0,1").stdout
        result = json.loads((output / "synthetic.json").read_text())
        assert [(run["layer"], run["seed"], run["steps"]) for run in result["runs"]] == [
            (layer, seed, 4) for layer in ("gla", "attention") for seed in (0, 1)
        ]
        assert [(entry["test"], entry["layer"]) for entry in result["table"]] == [
            (test, layer) for layer in ("gla", "attention") for test in ("", "2 pairs", "3 pairs")
        ]
        for entry in result["table"]:
            assert f"{100 * entry['accuracy']:.1f} ± {100 * entry['deviation']:.1f}" in printed
        with open(output / "synthetic.csv", newline="") as stream:
            assert len(list(csv.DictReader(stream))) == len(result["table"])
        assert (output / "synthetic.png").read_bytes().startswith(b"\x89PNG")

    def test_the_best_setting_is_reported(self):
        """The best by its mean over the seeds, not by its best seed."""
        common = {"task": "t", "layer": "l", "weight_decay": 0.1, "parameters": 7}
        accuracies = {1e-2: (0.9, 0.1), 1e-3: (0.6, 0.8)}
        records = [
            {**common, "learning_rate": rate, "accuracy": value, "segments": {"a": value - 0.1, "b": value + 0.1}}
            for rate, values in accuracies.items()
            for value in values
        ]
        whole, a, b = synthetic.best_of(records)
        assert (whole["test"], a["test"], b["test"]) == ("", "a", "b")
        assert {entry["learning_rate"] for entry in (whole, a, b)} == {1e-3}
        assert [entry["accuracy"] for entry in (whole, a, b)] == pytest.approx([0.7, 0.6, 0.8])
        assert whole["deviation"] == pytest.approx(0.02**0.5)

    def test_an_interrupted_benchmark_goes_on(self, mesanet, tiny_task, tmp_path, monkeypatch):
        arguments = ("synthetic", tiny_task, "-o", tmp_path / "out", "--layers", "attention", "--seeds", "0,1,2")
        original, trained = synthetic.train, []

        def interrupted(run, **options):
            trained.append(run.seed)
            if len(trained) == 2:
                raise KeyboardInterrupt
            return original(run, **options)

        monkeypatch.setattr(synthetic, "train", interrupted)
        mesanet(*arguments, code=130)
        mesanet(*arguments, fails="--resume")
        mesanet(*arguments, "--resume", "--mixed-precision", "bf16", fails="differs in mixed precision")
        mesanet(*arguments, "--resume")
        assert trained == [0, 1, 1, 2]
        result = json.loads((tmp_path / "out" / "synthetic.json").read_text())
        assert len(result["runs"]) == 3
        assert not result["missing"]

    def test_an_interruption_leaves_the_table_of_what_is_finished(self, mesanet, tiny_task, tmp_path, monkeypatch):
        original = synthetic.train

        def interrupted(run, **options):
            if run.layer == "gla":
                raise KeyboardInterrupt
            return original(run, **options)

        monkeypatch.setattr(synthetic, "train", interrupted)
        mesanet("synthetic", tiny_task, "-o", tmp_path / "out", "--layers", "attention,gla", code=130)
        result = json.loads((tmp_path / "out" / "synthetic.json").read_text())
        assert {entry["layer"] for entry in result["table"]} == {"attention"}
        assert result["missing"] == ["tiny-gla-lr0.01-wd0.1-seed0-epochs1"]
        assert (tmp_path / "out" / "synthetic.png").is_file()

    def test_invocations_add_up(self, mesanet, tiny_task, tmp_path, monkeypatch):
        """Each with its own tasks, layers and settings; the table is that of the folder."""
        monkeypatch.setitem(TASKS, "other", dataclasses.replace(TASKS[tiny_task], train=(Segment(128, TINY),)))
        output = ("-o", tmp_path / "out", "--no-plot")
        mesanet("synthetic", "other", *output, "--layers", "attention")
        mesanet("synthetic", "other", *output, "--layers", "gla", "--resume", "--learning-rates", "1e-3")
        printed = mesanet("synthetic", tiny_task, *output, "--layers", "attention", "--resume").stdout
        result = json.loads((tmp_path / "out" / "synthetic.json").read_text())
        rows, _ = synthetic.rows_and_layers(result["table"])
        assert {name: set(held) for name, held in rows.items() if "," not in name} == {
            "other": {"attention", "gla"},
            "tiny": {"attention"},
        }
        assert rows["other"]["gla"]["learning_rate"] == 1e-3
        (line,) = [line for line in printed.splitlines() if line.startswith("tiny, 2 pairs")]
        assert line.split()[-1] == "-"  # gla was not trained on it
        # Of unequal training no table is made.
        mesanet("synthetic", "other", *output, "--resume", "--epochs", 2, fails="differ in epochs (1, not 2)")

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_time_limit(self, mesanet, tiny_task, tmp_path, jobs):
        arguments = ("synthetic", "memorization", "-o", tmp_path / "out", "--layers", "attention,gla", "--no-plot")
        began = time.monotonic()
        printed = mesanet(*arguments, "--jobs", jobs, "--epochs", 10_000, "--time-limit", 2).stdout
        assert time.monotonic() - began < 40
        assert "2 trainings are not finished" in printed
        assert json.loads((tmp_path / "out" / "synthetic.json").read_text())["table"] == []

    def test_a_training_that_fails_does_not_end_the_others(self, mesanet, tiny_task, tmp_path, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("out of memory")

        monkeypatch.setitem(LAYERS, "gla", broken)
        arguments = ("synthetic", tiny_task, "-o", tmp_path / "out", "--layers", "gla,attention", "--no-plot")
        mesanet(*arguments, fails="1 of 2 trainings failed, among them tiny-gla")
        assert [run["layer"] for run in json.loads((tmp_path / "out" / "synthetic.json").read_text())["runs"]] == [
            "attention"
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["sorting"], "TASK is 'sorting'"),
            (["tiny", "--layers", "gla,lstm"], "--layers is 'lstm'"),
            (["tiny", "--learning-rates", "fast"], "--learning-rates is 'fast'"),
            (["tiny", "--weight-decays", "2"], "--weight-decays is '2'"),
            (["tiny", "--seeds", ""], "--seeds is ''"),
            (["tiny", "--mixed-precision", "fp4"], "--mixed-precision is 'fp4'"),
        ],
    )
    def test_bad_options(self, mesanet, tiny_task, tmp_path, arguments, message):
        mesanet("synthetic", *arguments, "-o", tmp_path / "out", fails=message)
        assert not (tmp_path / "out").exists()

    def test_several_processes_are_refused(self, mesanet, tiny_task, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        mesanet("synthetic", tiny_task, "-o", tmp_path / "out", fails="WORLD_SIZE is 2")


def test_jobs_run_in_processes_of_their_own(mesanet, tmp_path):
    arguments = ("synthetic", "memorization", "-o", tmp_path / "out", "--layers", "attention,gla", "--epochs", 1)
    mesanet(*arguments, "--jobs", 2, "--no-plot")
    runs = json.loads((tmp_path / "out" / "synthetic.json").read_text())["runs"]
    assert [(run["layer"], run["steps"]) for run in runs] == [("gla", 2), ("attention", 2)]


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """They would hold the GPU for good."""
    psutil = pytest.importorskip("psutil")
    seeds = ",".join(map(str, range(500)))
    command = ["synthetic", "memorization", "-o", tmp_path, "--layers", "attention", "--epochs", 1, "--seeds", seeds]
    code = "import sys; from modeling_mesanet.cli import app; app(sys.argv[1:])"
    arguments = [sys.executable, "-c", code, *map(str, command), "--jobs", "2", "--resume"]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 120
        while not (tmp_path / "synthetic.json").exists():
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert len(workers) >= 2
    assert not alive
    # What was finished is there, in a table, too.
    assert json.loads((tmp_path / "synthetic.json").read_text())["mixed_precision"] == "no"


def test_groups_are_tasks():
    assert len(synthetic.GROUPS["mad"]) == 6
    assert set(synthetic.GROUPS["all"]) == set(TASKS) >= set(synthetic.GROUPS["mad"])
