# SPDX-License-Identifier: Apache-2.0
"""Configuration of MesaNet models."""

import math
import os
import sys

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# Section 4 of arXiv 2506.05233: the published sizes, all with key and value heads of 128 and an MLP of three times d.
PRESETS = {
    "140M": {"num_hidden_layers": 14, "num_attention_heads": 6, "hidden_size": 768, "intermediate_size": 2304},
    "440M": {"num_hidden_layers": 28, "num_attention_heads": 8, "hidden_size": 1024, "intermediate_size": 3072},
    "1B": {"num_hidden_layers": 28, "num_attention_heads": 12, "hidden_size": 1536, "intermediate_size": 4608},
}

# What PEFT's LoRA adapts where its user names nothing.
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]


@strict
class MesaNetConfig(PreTrainedConfig):
    r"""Configuration of a MesaNet (arXiv 2506.05233); the defaults are the published 140M model.

    Args:
        vocab_size (`int`, defaults to 50257): entries of the vocabulary.
        hidden_size (`int`, defaults to 768): width d of the residual stream.
        num_hidden_layers (`int`, defaults to 14): blocks, each a Mesa layer and a gated MLP.
        num_attention_heads (`int`, defaults to 6): heads H of every Mesa layer (also `num_heads`).
        head_dim (`int`, defaults to 128): key size K of a head.
        value_head_dim (`int`, defaults to 128): value size V of a head; may differ from `head_dim`.
        intermediate_size (`int`, defaults to 2304): width of the MLP.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP's gate.
        conv_kernel_size (`int`, defaults to 4): width of the causal convolutions on q and k, at least 2.
        conv_on_value (`bool`, defaults to `False`): convolve v too (with SiLU).
        forget_gate_bound (`float`, *optional*, defaults to 0.9975): a token written with strength beta forgets at
            least `(1 - bound) * beta**2` of the state, which bounds the condition of the linear system when one token
            repeats; `None` switches it off. In (0, 1].
        lambda_lower_bound (`float`, defaults to 0.25): smallest regulariser, > 0.
        lambda_init (`float`, defaults to 1.0): regulariser at initialisation, > `lambda_lower_bound`.
        cg_max_steps_training (`int`, defaults to 30): conjugate-gradient steps in training mode; 0 leaves the solver
            out (gated linear attention).
        cg_tolerance_training (`float`, *optional*): relative error of a layer's output to reach in training mode: a
            token stops at half as large a relative residual. In (0, 1); `None` runs all steps.
        cg_max_steps (`int`, defaults to 64): largest number of steps at inference.
        cg_tolerance (`float`, *optional*, defaults to 1e-4): the same at inference.
        chunk_size (`int`, defaults to 64): tokens a chunk of the chunkwise form in torch; changes speed and memory,
            not results.
        kernel_backend (`str`, defaults to `"auto"`): what computes the Mesa layers: `"triton"`, `"torch"`, or
            `"auto"`, which is what the environment variable `MESANET_BACKEND` says, or else Triton where it runs.
        use_output_gate (`bool`, defaults to `False`): multiply each head's normalised output by `SiLU(W x)`.
        embedding_scale (`float`, *optional*): factor on the embeddings; `None` means `sqrt(hidden_size)`.
        logit_soft_cap (`float`, *optional*, defaults to 30.0): logits become `cap * tanh(logits / cap)`; `None` is
            off.
        rms_norm_eps (`float`, defaults to 1e-6): epsilon of every RMSNorm.
        head_norm_eps (`float`, *optional*): epsilon of the norm of each head's output, finite and > 0; `None` means
            `rms_norm_eps`. A first token has nearly no output o where its key and query are nearly orthogonal, and
            the norm's gradient there is about `1 / |o|`: gradient norms have spikes at 1e-6 and none at 1e-3
            (examples/README.md). So set 1e-3 to train from scratch; it belongs to the trained weights.
        max_position_embeddings (`int`, defaults to 2048): training length; the model itself has no limit.
        tie_word_embeddings (`bool`, defaults to `True`): share the embedding with the output head.
        use_cache (`bool`, defaults to `True`): return the recurrent state outside training.
        layer_types (`list[str]`, *optional*): one `"linear_attention"` a layer (the default); no other type exists
            yet.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): special tokens.

    Example:

    ```python
    >>> from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM

    >>> config = MesaNetConfig.preset("140M")
    >>> model = MesaNetForCausalLM(config)
    ```
    """

    model_type = "mesanet"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_heads": "num_attention_heads"}
    base_model_tp_plan = {
        f"layers.*.{module}": "colwise_gather_output"
        for module in (
            "mixer.q_proj",
            "mixer.k_proj",
            "mixer.v_proj",
            "mixer.output_gate_proj",
            "mixer.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # Set by the package: puts the code of the models beside a config whose `auto_map` refers to it. Where this file
    # itself came with a checkpoint it stays None, and transformers copies the code that it loaded.
    write_code = None

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 14
    num_attention_heads: int = 6
    head_dim: int = 128
    value_head_dim: int = 128
    intermediate_size: int = 2304
    hidden_act: str = "silu"
    conv_kernel_size: int = 4
    conv_on_value: bool = False
    forget_gate_bound: float | int | None = 0.9975
    lambda_lower_bound: float | int = 0.25
    lambda_init: float | int = 1.0
    cg_max_steps_training: int = 30
    cg_tolerance_training: float | None = None
    cg_max_steps: int = 64
    cg_tolerance: float | None = 1e-4
    chunk_size: int = 64
    kernel_backend: str = "auto"
    use_output_gate: bool = False
    embedding_scale: float | int | None = None
    logit_soft_cap: float | int | None = 30.0
    rms_norm_eps: float = 1e-6
    head_norm_eps: float | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    layer_types: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        # The base class looks the name up in torch, which has no such name, or another kind of thing.
        name = kwargs.get("torch_dtype") if self.dtype is None else self.dtype
        dtype = getattr(torch, name, None) if isinstance(name, str) else name
        if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {name!r}; it must be a floating dtype of torch, such as 'bfloat16', or None.")
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides) -> "MesaNetConfig":
        """The configuration of a published model: `"140M"`, `"440M"` or `"1B"`, with fields replaced by `overrides`.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def number_of_conv_states(self) -> int:
        """Convolution states a layer keeps: q, k and, with `conv_on_value`, v (read by transformers' caches)."""
        return 3 if self.conv_on_value else 2

    @property
    def effective_embedding_scale(self) -> float:
        """The factor the embeddings are multiplied by."""
        return self.hidden_size**0.5 if self.embedding_scale is None else float(self.embedding_scale)

    @property
    def effective_head_norm_eps(self) -> float:
        """The epsilon of the norm of each head's output."""
        return self.rms_norm_eps if self.head_norm_eps is None else self.head_norm_eps

    def to_dict(self) -> dict:
        """The fields as a dictionary."""
        # PEFT reads this dictionary right before it looks up which modules to adapt. Telling it here, if it is loaded,
        # spares everyone else the seconds that importing it takes.
        if (peft := sys.modules.get("peft.utils.constants")) is not None:
            targets = peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets.setdefault(self.model_type, LORA_TARGET_MODULES)
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As in transformers; a config with an `auto_map` is never saved without the code that it refers to."""
        if self.write_code is not None and getattr(self, "auto_map", None):
            self.write_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the ranges of all sizes and options."""
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "value_head_dim",
            "intermediate_size",
            "chunk_size",
            "max_position_embeddings",
        ):
            self._require(field, getattr(self, field) >= 1, "a whole number of at least 1")
        backends = ("auto", "triton", "torch")
        self._require("kernel_backend", self.kernel_backend in backends, "'auto', 'triton' or 'torch'")
        self._require("conv_kernel_size", self.conv_kernel_size >= 2, "at least 2")
        bound = self.forget_gate_bound
        self._require("forget_gate_bound", bound is None or 0 < bound <= 1, "in (0, 1], or None to switch it off")
        self._require("lambda_lower_bound", 0 < self.lambda_lower_bound < math.inf, "finite and greater than 0")
        self._require(
            "lambda_init",
            self.lambda_lower_bound < self.lambda_init < math.inf,
            f"finite and greater than lambda_lower_bound ({self.lambda_lower_bound})",
        )
        for field in ("cg_max_steps", "cg_max_steps_training"):
            self._require(field, getattr(self, field) >= 0, "at least 0 (0 leaves the solver out)")
        for field in ("cg_tolerance", "cg_tolerance_training"):
            value = getattr(self, field)
            self._require(field, value is None or 0 < value < 1, "between 0 and 1, or None for a fixed number")
        self._require("rms_norm_eps", 0 < self.rms_norm_eps < math.inf, "finite and greater than 0")
        for field in ("head_norm_eps", "logit_soft_cap", "embedding_scale"):
            value = getattr(self, field)
            self._require(field, value is None or 0 < value < math.inf, "finite and greater than 0, or None")
        self._require("hidden_act", self.hidden_act in ACT2FN, f"one of {', '.join(sorted(ACT2FN))}")

    def validate_layer_type(self):
        """Part of `@strict`-powered validation: `layer_types` names one known type a layer."""
        unknown = sorted(set(self.layer_types) - {"linear_attention"})
        if unknown:
            raise ValueError(
                f"layer_types contains {unknown}; every layer must be 'linear_attention' (the Mesa layer), "
                "so leave the field out or list that type once a layer."
            )
        self._require(
            "layer_types",
            len(self.layer_types) == self.num_hidden_layers,
            f"a list of num_hidden_layers ({self.num_hidden_layers}) entries",
        )

    def _require(self, field: str, ok: bool, remedy: str) -> None:
        if not ok:
            raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {remedy}.")


__all__ = ["MesaNetConfig"]
