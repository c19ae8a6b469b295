# SPDX-License-Identifier: Apache-2.0
"""Initialising a MesaNet from a softmax transformer: Llama, Mistral, Qwen2, Qwen3.

This is a beginning for further training, not a conversion: no setting of a Mesa layer computes softmax attention, and
without training the result writes poor text. What is taken over and how the rest is set:

- Embeddings, output head, norms and MLPs are the source's, byte for byte; embeddings are not scaled nor logits capped.
- q, k, v and output projections are the source's; grouped key and value heads are repeated, once for each query. Norms
  of q and k (Qwen3) are folded into their projections, for all but the direction a Mesa layer normalises away.
- Biases of the projections, rotary embeddings and attention windows have no counterpart and are left out. Forgetting
  and, once trained, the convolutions tell the order of tokens.
- The convolutions pass the newest token on, times `CONVOLUTION_TAP`: so small that the SiLU behind is nearly linear.
- Gates do not look at the input yet. `INITIAL_BETA` is small beside `INITIAL_LAMBDA`, so that the solve changes the
  query little: the layer starts near gated linear attention. A layer's heads forget at the rates of a fresh model.
- Heads of a Mesa layer put out vectors of RMS 1, those of attention averages of values. The output projection's
  columns are scaled by the RMS that the head's values have on white inputs, times `AVERAGING`.

Dimensions: d hidden size, H heads, G heads of keys and values, K head size.
"""

import math
from collections.abc import Callable, Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from ..configuration_mesanet import MesaNetConfig
from ..loading import TensorHeader, one_line
from ..modeling_mesanet import MesaNetForCausalLM
from .checkpoint_reader import DTYPES, CheckpointReader, tensor_pieces
from .checkpoint_writer import ConversionError, Plan, PlannedTensor

# Model types by the name of the family that the user gives.
FAMILIES = {"llama": ("llama",), "mistral": ("mistral",), "qwen": ("qwen2", "qwen3")}

CONVOLUTION_TAP = 0.1
INITIAL_BETA = 0.1
INITIAL_LAMBDA = 4.0
AVERAGING = 0.5

# Fields that only attention reads, and those that initialise, describe the file or change speed.
_LEFT_OUT = {
    "architectures",
    "attention_bias",
    "attention_dropout",
    "auto_map",
    "dtype",
    "initializer_range",
    "layer_types",
    "max_window_layers",
    "model_type",
    "pretraining_tp",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "torch_dtype",
    "use_sliding_window",
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Tensors that are the source's as they are, by our name within a layer.
_COPIED = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}


def read_source_config(fields: Mapping):
    """The transformers config of the source, from the fields of its config.json; the model type is one of `FAMILIES`.

    Raises:
        ConversionError: a field is unknown, has no counterpart or a bad value.
    """
    model_type = fields["model_type"]
    try:
        config = AutoConfig.for_model(model_type, **{k: v for k, v in fields.items() if k != "model_type"})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"config is not valid ({one_line(error)}); correct that field.") from error
    defaults = type(config)().to_dict()
    known = {*_LEFT_OUT, *_SAME, *defaults, "head_dim"}  # Qwen2 reads this field without declaring it
    unknown = sorted(fields.keys() - known)
    if unknown:
        name = unknown[0]
        raise ConversionError(
            f"config field {name} is {fields[name]!r}, which {type(config).__name__} does not have and MesaNet has no "
            "counterpart for; remove the field if the model was trained without it."
        )
    if getattr(config, "mlp_bias", False):
        raise ConversionError(
            "config field mlp_bias is True, for which MesaNet has no counterpart; use a model without."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConversionError(
            f"config field num_attention_heads is {config.num_attention_heads}, no multiple of num_key_value_heads "
            f"({config.num_key_value_heads}); correct one of them."
        )
    return config


def config_from_transformer(source) -> MesaNetConfig:
    """The config of the MesaNet that is initialised from a model of the config `source`.

    Raises:
        ConversionError: a field has a value that MesaNet does not take.
    """
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    try:
        return MesaNetConfig(
            **{name: getattr(source, name) for name in _SAME},
            head_dim=head_dim,
            value_head_dim=head_dim,
            lambda_init=INITIAL_LAMBDA,
            embedding_scale=1.0,
            logit_soft_cap=None,
            dtype=source.dtype,
            architectures=["MesaNetForCausalLM"],
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"config is not valid ({one_line(error)}); correct that field.") from error


def expected_tensors(source) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model of the config `source`, by name."""
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(source).named_parameters()
        }


def plan_from_transformer(reader: CheckpointReader, source, config: MesaNetConfig) -> Plan:
    """What every tensor of the MesaNet is made of; `source` and `config` as in `config_from_transformer`."""
    dtype = reader.headers["model.embed_tokens.weight"].dtype
    with torch.device("meta"):
        model = MesaNetForCausalLM(config)
    # The values of a fresh model, for what has no counterpart: those of one mixer, without its matrices.
    fresh = fresh_mixer_values(config)
    plan: Plan = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not name.startswith("model.layers."):
            plan[name] = PlannedTensor(reader.headers[name], lambda name=name: reader.pieces(name))
            continue
        _, _, index, inside = name.split(".", 3)
        layer = f"model.layers.{index}."
        if inside in _COPIED:
            origin = layer + _COPIED[inside]
            plan[name] = PlannedTensor(reader.headers[origin], lambda origin=origin: reader.pieces(origin))
        elif inside in fresh:
            kept = "F32" if inside.rpartition(".")[2] in model._keep_in_fp32_modules_strict else dtype
            plan[name] = computed(shape, kept, lambda value=fresh[inside]: value)
        else:
            make = _PROJECTIONS[inside]
            plan[name] = computed(shape, dtype, lambda make=make, layer=layer: make(reader, layer, source, config))
    if config.tie_word_embeddings and "lm_head.weight" in reader.headers:
        plan["lm_head.weight"] = PlannedTensor(
            reader.headers["lm_head.weight"], lambda: reader.pieces("lm_head.weight")
        )
    return plan


def computed(shape: tuple[int, ...], dtype: str, make: Callable[[], torch.Tensor]) -> PlannedTensor:
    """A tensor that `make` returns, stored in `dtype`."""
    return PlannedTensor(TensorHeader(shape, dtype), lambda: tensor_pieces(make().to(DTYPES[dtype])))


def fresh_mixer_values(config: MesaNetConfig) -> dict[str, torch.Tensor]:
    """What a mixer begins with beside its projections, float32, by name within a layer."""
    small = {"vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    kept = {name: getattr(config, name) for name in _MIXER_FIELDS}
    with torch.random.fork_rng(devices=[]):  # the user's random numbers are not ours to draw
        fresh = MesaNetForCausalLM(MesaNetConfig(**small, **kept)).model.layers[0].mixer
    heads, key_channels = config.num_attention_heads, config.num_attention_heads * config.head_dim
    convolution = torch.zeros(key_channels, 1, config.conv_kernel_size)
    convolution[..., -1] = CONVOLUTION_TAP
    return {
        "mixer.q_conv.weight": convolution,
        "mixer.k_conv.weight": convolution,
        "mixer.beta_proj.weight": torch.zeros(heads, config.hidden_size),
        "mixer.gamma_proj.weight": torch.zeros(heads, config.hidden_size),
        "mixer.beta_bias": torch.full((heads,), math.log(INITIAL_BETA / (1 - INITIAL_BETA))),
        "mixer.gamma_bias": fresh.gamma_bias.detach(),
        "mixer.lambda_param": fresh.lambda_param.detach(),
        "mixer.o_norm.weight": fresh.o_norm.weight.detach(),
    }


# What the initial values of biases, regulariser and head norm depend on.
_MIXER_FIELDS = ("num_attention_heads", "head_dim", "value_head_dim", "lambda_lower_bound", "lambda_init")


def _queries(reader: CheckpointReader, layer: str, source, config: MesaNetConfig) -> torch.Tensor:
    weight = reader.tensor(layer + "self_attn.q_proj.weight")
    return _folded(reader, layer + "self_attn.q_norm.weight", weight, config)


def _keys(reader: CheckpointReader, layer: str, source, config: MesaNetConfig) -> torch.Tensor:
    weight = _repeated(reader.tensor(layer + "self_attn.k_proj.weight"), source, config)
    return _folded(reader, layer + "self_attn.k_norm.weight", weight, config)


def _values(reader: CheckpointReader, layer: str, source, config: MesaNetConfig) -> torch.Tensor:
    return _repeated(reader.tensor(layer + "self_attn.v_proj.weight"), source, config)


def _outputs(reader: CheckpointReader, layer: str, source, config: MesaNetConfig) -> torch.Tensor:
    weight = reader.tensor(layer + "self_attn.o_proj.weight").float().unflatten(1, (config.num_attention_heads, -1))
    norm = reader.tensor(layer + "input_layernorm.weight").float()
    values = _values(reader, layer, source, config).float() * norm
    # On white inputs of variance 1 a value's variance is the squared length of its row.
    rms = values.unflatten(0, (config.num_attention_heads, -1)).square().sum(-1).mean(-1).sqrt()
    return (weight * (AVERAGING * rms)[:, None]).flatten(1)


def _repeated(weight: torch.Tensor, source, config: MesaNetConfig) -> torch.Tensor:
    """`[G * K, d]` to `[H * K, d]`: each group's head once for each of its queries, in the order of the queries."""
    repeats = config.num_attention_heads // source.num_key_value_heads
    return weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)


def _folded(reader: CheckpointReader, norm: str, weight: torch.Tensor, config: MesaNetConfig) -> torch.Tensor:
    """`weight` `[H * K, d]` times the norm's weight `[K]`, if the source has that norm."""
    if norm not in reader.headers:
        return weight
    scale = reader.tensor(norm).float()[:, None]
    return (weight.float().unflatten(0, (-1, config.head_dim)) * scale).flatten(0, 1)


_PROJECTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mixer.q_proj.weight": _queries,
    "mixer.k_proj.weight": _keys,
    "mixer.v_proj.weight": _values,
    "mixer.o_proj.weight": _outputs,
}


def left_out(reader: CheckpointReader) -> list[str]:
    """The source's tensors that nothing is made of: biases of its projections."""
    return sorted(name for name in reader.headers if name.endswith("_proj.bias"))
