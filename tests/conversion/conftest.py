# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in fla's format, and what every refusal has in common."""

import json
import re
from pathlib import Path

import pytest
import torch
from fla_checkpoints import FIELDS, fla_tensors
from huggingface_hub import save_torch_state_dict

from modeling_mesanet.loading import CheckpointError


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
