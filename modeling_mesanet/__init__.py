# SPDX-License-Identifier: Apache-2.0
"""MesaNet for transformers: importing this package registers the models with the Auto classes."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

# Started in a checkout, Python finds this folder before an installed package; some of its parts then lie beside it.
_here = Path(__file__).parent
for _folder, _part in ((_here.parent / "kernels", "mesa"), (_here.parent, "eval")):
    if (_folder / _part).is_dir() and not (_here / _part).is_dir():
        __path__.append(str(_folder))

from .configuration_mesanet import MesaNetConfig  # noqa: E402
from .loading import int8_weights, load_checkpoint  # noqa: E402
from .modeling_mesanet import (  # noqa: E402
    MesaNetForCausalLM,
    MesaNetForSequenceClassification,
    MesaNetModel,
    MesaNetPreTrainedModel,
)
from .prefill import read_tokens  # noqa: E402
from .self_contained import self_contained, write_code  # noqa: E402
from .state_mesanet import (  # noqa: E402
    StateError,
    StateInfo,
    continue_from,
    fork_state,
    load_state,
    merge_states,
    read_state_info,
    save_state,
    split_state,
)

try:
    __version__ = version("modeling-mesanet")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

MesaNetConfig.write_code = write_code
AutoConfig.register("mesanet", MesaNetConfig, exist_ok=True)
AutoModel.register(MesaNetConfig, MesaNetModel, exist_ok=True)
AutoModelForCausalLM.register(MesaNetConfig, MesaNetForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MesaNetConfig, MesaNetForSequenceClassification, exist_ok=True)


def bundled_checkpoint() -> str:
    """Path of the small checkpoint that comes with the package; `from_pretrained` takes it.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    path = Path(__file__).parent / "checkpoints" / "novels"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"The bundled checkpoint is missing at {path}; reinstall modeling-mesanet.")
    return str(path)


__all__ = [
    "MesaNetConfig",
    "MesaNetForCausalLM",
    "MesaNetForSequenceClassification",
    "MesaNetModel",
    "MesaNetPreTrainedModel",
    "StateError",
    "StateInfo",
    "bundled_checkpoint",
    "continue_from",
    "fork_state",
    "int8_weights",
    "load_checkpoint",
    "load_state",
    "merge_states",
    "read_state_info",
    "read_tokens",
    "save_state",
    "self_contained",
    "split_state",
]
