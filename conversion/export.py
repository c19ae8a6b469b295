# SPDX-License-Identifier: Apache-2.0
"""`mesanet export`: a checkpoint as a folder that brings its code and loads where this package is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import modeling_mesanet
from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, self_contained
from modeling_mesanet.files import replacing_folder
from modeling_mesanet.info import describe
from modeling_mesanet.loading import CheckpointError, find_checkpoint, load_checkpoint, read_config, weight_files
from modeling_mesanet.self_contained import AUTO_MAP

from .card import CARD
from .checkpoint_reader import companions

# Relative difference of the outputs that the check lets pass: libraries may add in another order in another process.
TOLERANCE = 1e-5

_TOKENS = 64

# A line of an example on a card.
_IMPORT = re.compile(r"^(from|import) modeling_mesanet\b", re.MULTILINE)

# Before anything else in a process in which this package cannot be imported: what a folder lacks, it does not find
# elsewhere.
WITHOUT_PACKAGE = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mesanet":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
"""

_LOADER = (
    WITHOUT_PACKAGE
    + """
import json
import torch
import transformers
from safetensors.torch import save_file

folder, auto_class, tokens, output = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, use_safetensors=True, local_files_only=True
)
with torch.no_grad():
    save_file({"output": model.eval()(torch.tensor(json.loads(tokens)))[0].contiguous()}, output)
"""
)


def export(source: str | os.PathLike | None, destination: str | os.PathLike, *, check: bool = True) -> float | None:
    """Write a checkpoint to a new folder together with the code of its model.

    The folder loads with `from_pretrained(folder, trust_remote_code=True)` of transformers' Auto classes. Weights,
    tokenizer, generation config and code are copied byte for byte; the config gets an `auto_map`, and
    `requirements.txt` lists the libraries and versions that the code needs. A card goes along, with its pictures,
    unless its examples import this package, which who loads the folder need not have.

    Args:
        source: a folder, a Hub id, or None for the bundled checkpoint.
        destination: a folder that does not exist yet, or is empty; it appears when it is complete.
        check: load the folder in a process without this package, and compare the outputs of random tokens.

    Returns:
        The relative difference of those outputs, None without `check`.

    Raises:
        CheckpointError: the source is broken, the destination exists or cannot be written, or the check failed; there
            is no destination then.
    """
    folder, destination = find_checkpoint(source, argument="SRC"), Path(destination).expanduser()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"DST is '{destination}', which exists and is not empty; give a new folder.")
    describe(folder, argument="SRC")  # refuses what does not belong together
    config = read_config(folder, argument="SRC")
    _auto_class(folder, config)  # refuses what would not load
    files = {file.name: file for file in weight_files(folder, argument="SRC")}
    if SAFE_WEIGHTS_NAME not in files:
        files[SAFE_WEIGHTS_INDEX_NAME] = folder / SAFE_WEIGHTS_INDEX_NAME
    files |= companions(folder)
    card = folder / CARD
    if card.is_file() and not _IMPORT.search(card.read_text(encoding="utf-8", errors="replace")):
        files |= {file.name: file for file in (card, *folder.glob("*.png"))}
    try:
        with replacing_folder(destination) as temporary:
            for name, file in files.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, temporary / name)
            self_contained(config).save_pretrained(temporary)
            return compare_without_package(folder, temporary) if check else None
    except OSError as error:
        raise CheckpointError(
            f"DST is '{destination}', which cannot be written ({error.strerror or error}); give a folder that "
            "you may write, on a disk with enough space."
        ) from error


def compare_without_package(source: Path, exported: Path) -> float:
    """The relative difference between the outputs of `source`, loaded with this package, and of `exported`, without.

    Raises:
        CheckpointError: `exported` does not load without this package, or gives other outputs; or no Auto class makes
            the model that the config of `source` names.
    """
    config = read_config(source)
    auto_class, architecture = _auto_class(source, config)
    tokens = torch.randint(config.vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    model = load_checkpoint(source, model_class=getattr(modeling_mesanet, architecture))
    with torch.no_grad():
        expected = model(tokens)[0]
    del model
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.safetensors"
        arguments = [exported.resolve(), auto_class, json.dumps(tokens.tolist()), output]
        done = subprocess.run(
            [sys.executable, "-P", "-c", _LOADER, *map(str, arguments)],
            cwd=scratch,
            env={**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            cause = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
            raise CheckpointError(
                f"what was exported from '{source}' does not load without this package ({cause}); use a transformers "
                "version that this package supports."
            )
        found = load_file(output)["output"]
    difference = ((found - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"what was exported from '{source}' gives other outputs without this package (relative difference "
            f"{difference:.1e}); export from an unchanged installation of it."
        )
    return difference


def _auto_class(folder: Path, config: MesaNetConfig) -> tuple[str, str]:
    """Names of the Auto class that makes the model in `folder`, and of its own class.

    Raises:
        CheckpointError: there is none.
    """
    architecture = (config.architectures or [MesaNetForCausalLM.__name__])[0]
    known = {reference.rpartition(".")[2]: name for name, reference in AUTO_MAP.items() if name != "AutoConfig"}
    if architecture not in known:
        raise CheckpointError(
            f"SRC is '{folder}', whose config.json names the architecture {architecture!r}; it must be "
            f"one of {', '.join(known)}."
        )
    return known[architecture], architecture
