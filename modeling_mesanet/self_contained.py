# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that bring the model's code: folders that load where this package is not installed.

transformers runs code from such a folder (`trust_remote_code=True`) if every file lies in the folder itself and
imports the others only as `from .sibling import name`. This package's model files are written that way, so that the
folder gets them byte for byte; only the operators' facade, `mesa/__init__.py`, becomes `mesa.py`.
"""

import os
import re
import shutil
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from .files import replacing

# Where transformers' Auto classes find the classes in a folder that brings its code.
AUTO_MAP = {
    "AutoConfig": "configuration_mesanet.MesaNetConfig",
    "AutoModel": "modeling_mesanet.MesaNetModel",
    "AutoModelForCausalLM": "modeling_mesanet.MesaNetForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mesanet.MesaNetForSequenceClassification",
}
REQUIREMENTS = "requirements.txt"

_DISTRIBUTION = "modeling-mesanet"

ModelOrConfig = TypeVar("ModelOrConfig", PreTrainedModel, PreTrainedConfig)


def self_contained(model: ModelOrConfig) -> ModelOrConfig:
    """Make a model (or a config) bring its code: every `save_pretrained` and `push_to_hub` of it writes the code too.

    What they write loads with `trust_remote_code=True` where this package is not installed, and so does what is saved
    after loading that, with or without this package. Returns `model`: `self_contained(model).push_to_hub("me/mine")`.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    config.auto_map = dict(AUTO_MAP)
    return model


def code_files() -> dict[str, Path]:
    """The files of code that a self-contained folder needs, by their names there.

    They are the model's module and what it imports in turn, found as transformers does when it loads such a folder.

    Raises:
        RuntimeError: two of them would get one name.
    """
    files: dict[str, Path] = {}
    found = [f"{__package__}.modeling_mesanet"]
    for module in found:  # grows while it is read
        spec = find_spec(module)
        name, file = f"{module.rpartition('.')[2]}.py", Path(spec.origin)
        if name in files:
            raise RuntimeError(f"{file} and {files[name]} would both become {name} in a self-contained folder.")
        files[name] = file
        for sibling in sorted(get_relative_imports(file)):
            if (needed := f"{spec.parent}.{sibling}") not in found:
                found.append(needed)
    return files


def required_versions() -> list[str]:
    """Requirement specifiers (PEP 508) of the libraries that the code in a self-contained folder imports."""
    try:
        specifiers = [line for line in requires(_DISTRIBUTION) if "extra ==" not in line]
    except PackageNotFoundError:  # a source tree on the path, not installed
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        specifiers = project["dependencies"]
    imported = {module for file in code_files().values() for module in get_imports(file)}
    return sorted(line for line in specifiers if re.match(r"[\w.-]+", line)[0].replace("-", "_") in imported)


def write_code(config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Copy the code into `folder`, with the requirements it has, and make `config` refer to all of its classes."""
    config.auto_map = dict(AUTO_MAP)
    folder = Path(folder)
    for name, file in code_files().items():
        with replacing(folder / name) as temporary:
            shutil.copyfile(file, temporary)
    with replacing(folder / REQUIREMENTS) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in required_versions()), encoding="utf-8")
