# SPDX-License-Identifier: Apache-2.0
"""MesaNet in flash-linear-attention ("fla", model type `mesa_net`, as of 0.6.0) and here: configs and names.

Where neither config asks for what the other lacks, the two compute the same function of the same numbers: every
tensor is carried over byte for byte; only the regulariser changes its shape, `[H * K]` there and `[H, K]` here.
What differs:

| | fla | here |
|---|---|---|
| logit of the forget strength | `a_proj`, weight and bias | `gamma_proj`, `gamma_bias` |
| logit of the input strength | `b_proj`, weight and bias | `beta_proj`, `beta_bias` |
| both computed in | the model's dtype, sigmoid in float32 | float32 |
| bounded forgetting | none | `forget_gate_bound`, None in a converted checkpoint |
| epsilon of the head norm | that of all norms | `head_norm_eps`, None in a converted checkpoint |
| embedding scale, logit cap | none | 1 and None in a converted checkpoint |
| steps for prompts | `max_cg_step_training`, fixed | `cg_max_steps`, `cg_tolerance` |
| steps for single tokens | `max_cg_step_decoding`, fixed | the same |
| solver's start | 0 for prompts, `q / diag` for single tokens; 1e-5 added to its divisors | 0 |
| solver's inputs | q, k rounded to float16, states to the model's dtype | float32 |
| value heads | as large as key heads, at most 128 | any size |

Start, inputs and the dtype of the gates make differences of rounding only, as long as the steps suffice.
"""

import math
import re
from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_mesanet import MesaNetConfig
from ..loading import one_line
from .checkpoint_writer import ConversionError

FLA_MODEL_TYPE = "mesa_net"
_LARGEST_FLA_HEAD = 128

# fla's names of the tensors outside and inside of the layers, by ours.
_OUTSIDE = {
    "model.embed_tokens.weight": "model.embeddings.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.q_proj.weight": "attn.q_proj.weight",
    "mixer.k_proj.weight": "attn.k_proj.weight",
    "mixer.v_proj.weight": "attn.v_proj.weight",
    "mixer.o_proj.weight": "attn.o_proj.weight",
    "mixer.output_gate_proj.weight": "attn.g_proj.weight",
    "mixer.beta_proj.weight": "attn.b_proj.weight",
    "mixer.beta_bias": "attn.b_proj.bias",
    "mixer.gamma_proj.weight": "attn.a_proj.weight",
    "mixer.gamma_bias": "attn.a_proj.bias",
    "mixer.lambda_param": "attn.lambda_params",
    "mixer.q_conv.weight": "attn.q_conv1d.weight",
    "mixer.k_conv.weight": "attn.k_conv1d.weight",
    "mixer.o_norm.weight": "attn.o_norm.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")

# Fields that mean the same on both sides, by our name.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "conv_kernel_size": "conv_size",
    "use_output_gate": "use_output_gate",
    "lambda_lower_bound": "lambda_lower_bound",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# What fla 0.6.0 takes where config.json is silent, as far as this conversion reads it.
_FLA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "head_dim": 128,
    "conv_size": 4,
    "use_output_gate": False,
    "lambda_lower_bound": 0.25,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "max_cg_step_training": 30,
    "max_cg_step_decoding": 30,
}
# Fields of fla's that choose a kernel, initialise weights or describe the file, and leave the function as it is.
_FLA_WITHOUT_EFFECT = {
    "attn_mode",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "initializer_range",
    "architectures",
    "auto_map",
    "model_type",
    "torch_dtype",
    "_attn_implementation_autoset",
}
# Fields of fla's that change the function and have no counterpart, with the values that switch them off.
_FLA_REQUIRED = {
    "attn": (None,),
    "attnres_block_size": (None,),
    "hidden_act": ("swish", "silu"),
    "use_short_conv": (True,),
    "conv_bias": (False,),
    "use_l2warp": (False,),
}
# Ours, likewise. The chunk size, the backend and the initial regulariser do not change the function.
_OUR_REQUIRED = {
    "forget_gate_bound": (None, 1),
    "embedding_scale": (1,),
    "logit_soft_cap": (None,),
    "conv_on_value": (False,),
    "hidden_act": ("silu", "swish"),
    "cg_tolerance": (None,),
    "cg_tolerance_training": (None,),
}


def fla_name(name: str) -> str:
    """fla's name of the tensor that is called `name` here."""
    in_layer = _LAYER.fullmatch(name)
    return in_layer[1] + _IN_LAYER[in_layer[2]] if in_layer else _OUTSIDE[name]


def fla_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """fla's shape of the tensor that is called `name` here and has `shape`."""
    return (shape[0] * shape[1],) if name.endswith(".lambda_param") else tuple(shape)


def state_dict_to_fla(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a `MesaNetForCausalLM` under fla's names, as views of the same memory."""
    return {fla_name(name): tensor.reshape(fla_shape(name, tensor.shape)) for name, tensor in state_dict.items()}


def state_dict_from_fla(state_dict: Mapping[str, torch.Tensor], config: MesaNetConfig) -> dict[str, torch.Tensor]:
    """The tensors of fla's `MesaNetForCausalLM` under our names, as views; `config` is from `config_from_fla`.

    Raises:
        ConversionError: a tensor has no counterpart.
    """
    inside, outside = ({theirs: ours for ours, theirs in names.items()} for names in (_IN_LAYER, _OUTSIDE))
    converted = {}
    for name, tensor in state_dict.items():
        in_layer = _LAYER.fullmatch(name)
        ours = inside.get(in_layer[2]) if in_layer else outside.get(name)
        if ours is None:
            raise ConversionError(f"state_dict holds {name}, which has no counterpart in MesaNet; remove it.")
        if ours == "mixer.lambda_param":
            tensor = tensor.reshape(config.num_attention_heads, config.head_dim)
        converted[in_layer[1] + ours if in_layer else ours] = tensor
    return converted


def config_from_fla(fields: Mapping) -> MesaNetConfig:
    """The config of the same model here.

    Args:
        fields: of fla's config.json (`MesaNetConfig.to_dict()` there).

    Raises:
        ConversionError: a field has no counterpart, or a bad value; it is named.
    """
    base = PreTrainedConfig().to_dict()
    given = {name: value for name, value in fields.items() if name not in _FLA_WITHOUT_EFFECT}
    known = _FLA_DEFAULTS.keys() | _FLA_REQUIRED.keys() | base.keys()
    unknown = sorted(given.keys() - known)
    if unknown:
        name = unknown[0]
        raise ConversionError(
            f"config field {name} is {given[name]!r}, which fla 0.6.0's MesaNet does not have and MesaNet has no "
            "counterpart for; remove the field if the model was trained without it."
        )
    _require(given, _FLA_REQUIRED, "MesaNet")
    values = {**_FLA_DEFAULTS, **given}
    steps = values["max_cg_step_training"]
    if values["max_cg_step_decoding"] != steps:
        raise ConversionError(
            f"config field max_cg_step_decoding is {values['max_cg_step_decoding']!r} and max_cg_step_training is "
            f"{steps!r}; MesaNet takes the same steps for prompts and for single tokens, so set them to one number."
        )
    if not isinstance(steps, int) or steps < 1:
        raise ConversionError(
            f"config field max_cg_step_training is {steps!r}; MesaNet's counterpart begins at 1 step."
        )
    lower = values["lambda_lower_bound"]
    if not isinstance(lower, int | float) or not 0 < lower < 1:
        raise ConversionError(f"config field lambda_lower_bound is {lower!r}; it must be greater than 0 and below 1.")
    converted = {ours: values[theirs] for ours, theirs in _SAME.items()}
    common = {name: given[name] for name in (base.keys() & given.keys()) - {"transformers_version"}}
    converted = {**common, **converted}
    if "torch_dtype" in fields and given.get("dtype") is None:
        converted["dtype"] = fields["torch_dtype"]
    try:
        return MesaNetConfig(
            **converted,
            value_head_dim=values["head_dim"],
            intermediate_size=_intermediate_size(values),
            forget_gate_bound=None,
            embedding_scale=1.0,
            logit_soft_cap=None,
            cg_max_steps_training=steps,
            cg_tolerance_training=None,
            cg_max_steps=steps,
            cg_tolerance=None,
            architectures=["MesaNetForCausalLM"],
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"config is not valid ({one_line(error)}); correct that field.") from error


def _intermediate_size(values: Mapping) -> int:
    """The MLP's width: as given, or two thirds of `hidden_ratio` times d, rounded up to a multiple of 256.

    Raises:
        ConversionError: one of them is no such number.
    """
    if values["intermediate_size"] is not None:
        return values["intermediate_size"]
    ratio = 4 if values["hidden_ratio"] is None else values["hidden_ratio"]
    for name, value in (("hidden_size", values["hidden_size"]), ("hidden_ratio", ratio)):
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConversionError(f"config field {name} is {value!r}; it must be a number greater than 0.")
    return -(-int(values["hidden_size"] * ratio * 2 / 3) // 256) * 256


def config_to_fla(config: MesaNetConfig) -> dict:
    """The fields of fla's config.json for the same model.

    Raises:
        ConversionError: a field has no counterpart; it is named.
    """
    fields = {name: getattr(config, name) for name in _OUR_REQUIRED}
    fields["embedding_scale"] = config.effective_embedding_scale
    _require(fields, _OUR_REQUIRED, "fla's MesaNet")
    if config.value_head_dim != config.head_dim:
        raise ConversionError(
            f"config field value_head_dim is {config.value_head_dim} and head_dim is {config.head_dim}; fla's MesaNet "
            "has heads of one size only, so train another model for it."
        )
    if config.effective_head_norm_eps != config.rms_norm_eps:
        raise ConversionError(
            f"config field head_norm_eps is {config.head_norm_eps} and rms_norm_eps is {config.rms_norm_eps}; fla's "
            "MesaNet has one epsilon for all norms, so train another model for it."
        )
    if config.head_dim > _LARGEST_FLA_HEAD:
        raise ConversionError(
            f"config field head_dim is {config.head_dim}; fla's kernels take at most {_LARGEST_FLA_HEAD}."
        )
    if config.cg_max_steps != config.cg_max_steps_training or config.cg_max_steps < 1:
        raise ConversionError(
            f"config field cg_max_steps is {config.cg_max_steps} and cg_max_steps_training is "
            f"{config.cg_max_steps_training}; fla's MesaNet reads prompts with its steps for training, so set them to "
            "one number of at least 1 (30 is fla's)."
        )
    base = PreTrainedConfig().to_dict().keys()
    common = {name: value for name, value in config.to_diff_dict().items() if name in base}
    return {
        **common,
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "architectures": ["MesaNetForCausalLM"],
        "model_type": FLA_MODEL_TYPE,
        "attn": None,
        "attn_mode": "chunk",
        "hidden_act": "swish",
        "hidden_ratio": None,
        "intermediate_size": config.intermediate_size,
        "max_cg_step_training": config.cg_max_steps_training,
        "max_cg_step_decoding": config.cg_max_steps,
        "use_short_conv": True,
    }


def _require(fields: Mapping, allowed: Mapping[str, tuple], target: str) -> None:
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            raise ConversionError(
                f"config field {name} is {fields[name]!r}, for which {target} has no counterpart; it must be "
                f"{' or '.join(repr(value) for value in values)}, so set it to that if the model may change, or keep "
                "the checkpoint where it is."
            )
