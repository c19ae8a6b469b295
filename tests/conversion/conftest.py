# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with a tokenizer, checkpoints in fla's format, refusals, and processes without the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fla_checkpoints import FIELDS, fla_tensors
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_mesanet.conversion.export import WITHOUT_PACKAGE
from modeling_mesanet.loading import CheckpointError

SENTENCE = "It was a dark night and the rain fell in torrents."


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    """A random model with every option, and a byte-pair tokenizer, saved in one folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator([SENTENCE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=pairs).save_pretrained(folder)
    options = {"conv_on_value": True, "use_output_gate": True, "cg_tolerance": 1e-4}
    tiny_model(vocab_size=pairs.get_vocab_size(), **options).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="session")
def run_without_package(tmp_path_factory):
    """Run a program in a process without the package; returns what it printed as JSON."""
    home = tmp_path_factory.mktemp("home")

    def run(program: str, *arguments, **environment) -> dict:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-P", "-c", WITHOUT_PACKAGE + program, *map(str, arguments)],
            cwd=home,
            env=variables | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def fla_checkpoint(tmp_path):
    """`fla_checkpoint(name, dtype=, shard=, **fields)` writes a checkpoint; returns its folder, config and tensors."""

    def write(name="fla", *, dtype=torch.float32, shard="20KB", **overrides) -> tuple[Path, dict, dict]:
        fields = {**FIELDS, **overrides}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(fields))
        tensors = fla_tensors(fields, dtype)
        save_torch_state_dict(tensors, folder, max_shard_size=shard)
        return folder, fields, tensors

    return write


@pytest.fixture
def refuse(tmp_path):
    """Context in which a CheckpointError of one sentence must be raised that matches all the given patterns, with
    nothing left beside what was there before."""

    class Refusal:
        def __init__(self, *patterns):
            self.patterns = patterns

        def __enter__(self):
            self.before = set(tmp_path.rglob("*"))

        def __exit__(self, kind, error, traceback):
            assert kind is not None, "nothing was refused"
            if not issubclass(kind, CheckpointError):
                return False
            message = str(error)
            assert "\n" not in message
            assert message.endswith(".")
            for pattern in self.patterns:
                assert re.search(pattern, message), message
            assert set(tmp_path.rglob("*")) == self.before
            return True

    return Refusal
