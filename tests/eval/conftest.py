# SPDX-License-Identifier: Apache-2.0
"""What the tests of the evaluations share: a small checkpoint with a tokenizer, and the command line."""

import json
from pathlib import Path

import pytest
import torch
from eval_inputs import SENTENCE, save_checkpoint
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from modeling_mesanet.cli import app
from modeling_mesanet.eval.task_data import DATA_VARIABLE


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    """A random MesaNet with `<|endoftext|>` as the special token."""
    model = tiny_model(vocab_size=300, max_position_embeddings=16)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", model, bos="<|endoftext|>")


@pytest.fixture(scope="session")
def other_checkpoint(tiny_model, tmp_path_factory) -> Path:
    """Another one with the same tokenizer."""
    model = tiny_model(seed=1, vocab_size=300)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "other", model, bos="<|endoftext|>")


@pytest.fixture
def texts(tmp_path) -> Path:
    """Three documents of different lengths."""
    file = tmp_path / "texts.jsonl"
    rows = [{"id": name, "text": SENTENCE * count} for name, count in (("long", 4), ("short", 1), ("middle", 2))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def no_data_folder(monkeypatch):
    """MESANET_DATA is not set, and what a command sets it to does not outlive the test."""
    monkeypatch.setenv(DATA_VARIABLE, "")
    monkeypatch.delenv(DATA_VARIABLE)


@pytest.fixture
def quick_lm_eval(monkeypatch):
    """lm-eval without what takes it seconds every time."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install 'modeling-mesanet[eval]'")
    # Of its own tasks, in 14,000 files, one folder, and only where no other is asked for.
    manager, some = tasks.TaskManager, Path(tasks.__path__[0]) / "arc"

    def task_manager(include_path=None, include_defaults=True, metadata=None):
        return manager(include_path=include_path or some, include_defaults=False, metadata=metadata)

    monkeypatch.setattr(tasks, "TaskManager", task_manager)
    # It asks pip, the compiler and the driver for their versions.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def mesanet():
    """`mesanet(*arguments)` runs the command line; it must end well, with `code`, or with a sentence with `fails`."""
    verbosity = transformers_logging.get_verbosity()

    def run(*arguments, fails: str | None = None, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if fails is None:
            assert result.exit_code == code, result.stderr
        else:
            assert result.exit_code == 1, result.output
            (line,) = [line for line in result.stderr.splitlines() if "mesanet: error:" in line]
            assert fails in line
        return result

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    torch.set_num_threads(1)
