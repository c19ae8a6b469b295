# SPDX-License-Identifier: Apache-2.0
"""MesaNet models: recurrent language models whose sequence layer solves a ridge regression at every token.

Dimensions: B batch, T tokens, d hidden size, H heads, K key size, V value size, S packed sequences.
"""

import copy
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_mesanet import CONV_K, CONV_Q, CONV_V, MesaNetCacheLayer, cached_length, upgrade_cache
from .configuration_mesanet import MesaNetConfig
from .mesa import (
    add_linear,
    decode_layer,
    decodes_layer,
    fuses_linears,
    gates,
    head_norm,
    mesa_attention,
    mesa_step,
    norm_gated_linears,
    norm_linears,
    short_convolution,
)

# At initialisation the heads of a layer forget at rates spread (evenly in the log) between these two, that is over
# memories of about ten to a thousand tokens.
INITIAL_FORGETTING = (1e-1, 1e-3)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


class MesaNetRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, if gated times `silu(gate)`, over the last dimension, in the dtype of `x`.

    Computed in float32 (or float64).
    """

    def __init__(self, size: int, eps: float, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.backend = eps, backend

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return head_norm(x, self.weight, self.eps, gate, self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MesaNetScaledEmbedding(nn.Embedding):
    """Embedding times a constant. Scaled here, because `inputs_embeds` also carries the states between the stages of a
    pipeline, and PEFT scales its adapters by an attribute of this name.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class PadOrder:
    """Moves pads out of a convolution's sight.

    The W - 1 remembered inputs of a convolution and the T new ones are reordered so that pads come first, then the
    memory, then the real tokens: each real token then sees the real tokens before it, wherever pads stand.

    Args:
        mask: bool `[B, T]`, True for real tokens.
        memory: W - 1, the number of remembered inputs.
    """

    def __init__(self, mask: torch.Tensor, memory: int):
        extended = F.pad(mask, (memory, 0), value=True)
        self.sorted = extended.int().argsort(dim=1, stable=True)
        # Where each new token's output lies; a pad's may fall before the first output and reads any.
        self.restored = (self.sorted.argsort(dim=1)[:, memory:] - memory).clamp_min(0)

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, channels, W - 1 + T]` into the order pads, memory, tokens."""
        return x.gather(2, self.sorted.unsqueeze(1).expand_as(x))

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs `[B, channels, T]` back into the order of the tokens."""
        return y.gather(2, self.restored.unsqueeze(1).expand_as(y))


class MesaNetShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time with SiLU, carrying its last W - 1 inputs from call to call."""

    def __init__(self, channels: int, kernel_size: int, backend: str = "auto"):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=False)
        self.backend = backend

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        pads: PadOrder | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve `x` `[B, T, channels]`, continuing after `state` `[B, channels, W - 1]` (None: zeros).

        Args:
            pads: the order that hides pads, or None where there are none.
            cu_seqlens: `[S + 1]` bounds of packed sequences (B is 1), each of which starts after zeros.

        Returns:
            `[B, T, channels]` and the state after the last token.
        """
        weight = self.weight.squeeze(1)
        if pads is None:
            return short_convolution(x, weight, state, cu_seqlens, self.backend)
        memory = weight.shape[1] - 1
        state = x.new_zeros(x.shape[0], x.shape[2], memory) if state is None else state.to(x.dtype)
        inputs = pads.sort(torch.cat([state, x.transpose(1, 2)], dim=-1))
        tokens, state = inputs[..., memory:].transpose(1, 2), inputs[..., :memory]
        y, state = short_convolution(tokens, weight, state, backend=self.backend)
        return pads.restore(y.transpose(1, 2)).transpose(1, 2), state


class MesaNetGateProjection(nn.Linear):
    """Linear map of `[B, T, d]` to one number a head, in float32 (or float64) whatever the dtypes of input and weight.

    The gates act on the state at every token, so that the rounding of their logits would add up.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(upcast(x), upcast(self.weight))


class MesaNetMixer(nn.Module):
    """The Mesa layer (section 3 of arXiv 2506.05233): projections, convolutions, gates, solve, head norm, output."""

    def __init__(self, config: MesaNetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim, self.value_head_dim = (
            config.num_attention_heads,
            config.head_dim,
            config.value_head_dim,
        )
        key_channels, value_channels = self.num_heads * self.head_dim, self.num_heads * self.value_head_dim
        self.q_proj = nn.Linear(config.hidden_size, key_channels, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_channels, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_channels, bias=False)
        self.beta_proj = MesaNetGateProjection(config.hidden_size, self.num_heads, bias=False)
        self.gamma_proj = MesaNetGateProjection(config.hidden_size, self.num_heads, bias=False)
        self.output_gate_proj = (
            nn.Linear(config.hidden_size, value_channels, bias=False) if config.use_output_gate else None
        )
        self.q_conv = MesaNetShortConvolution(key_channels, config.conv_kernel_size, config.kernel_backend)
        self.k_conv = MesaNetShortConvolution(key_channels, config.conv_kernel_size, config.kernel_backend)
        self.v_conv = (
            MesaNetShortConvolution(value_channels, config.conv_kernel_size, config.kernel_backend)
            if config.conv_on_value
            else None
        )
        self.beta_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.gamma_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.lambda_param = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.o_norm = MesaNetRMSNorm(self.value_head_dim, config.rms_norm_eps, config.kernel_backend)
        self.o_proj = nn.Linear(value_channels, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual_stream = True

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Input strength beta and log forget strength, float32 `[B, T, H]`; a pad neither writes nor forgets."""
        biases = upcast(self.beta_bias), upcast(self.gamma_bias)
        logits = self.beta_proj(x), self.gamma_proj(x)
        return gates(*logits, *biases, self.config.forget_gate_bound, mask, self.config.kernel_backend)

    def regularizer(self) -> torch.Tensor:
        """The diagonal of Lambda, float32 `[H, K]`."""
        return self.config.lambda_lower_bound + F.softplus(upcast(self.lambda_param))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix `hidden_states` `[B, T, d]` over time.

        Args:
            attention_mask: bool `[B, T]`, False for pads; None without pads.
            past_key_values: cache whose layer `layer_idx` is read and updated.
            cu_seqlens: bounds of packed sequences; excludes mask and cache.
        """
        cache: MesaNetCacheLayer | None = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        shape = hidden_states.shape
        if cu_seqlens is not None:  # packed sequences may run on from row to row
            hidden_states = hidden_states.reshape(1, -1, shape[-1])
        config, length = self.config, hidden_states.shape[1]
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        in_place = cache is not None and length == 1 and not torch.is_grad_enabled()
        if in_place:
            cache.make_writable()
        state = None if cache is None else cache.recurrent_state()
        if in_place and state is not None and self.decodes_in_one_launch(hidden_states):
            gate = None if self.output_gate_proj is None else self.output_gate_proj(hidden_states)
            with maybe_autocast(hidden_states.device.type, enabled=False):
                beta_logit, gamma_logit = self.beta_proj(hidden_states), self.gamma_proj(hidden_states)
            return self.o_proj(self.decode(q, k, v, gate, beta_logit, gamma_logit, attention_mask, cache))
        pads = None if attention_mask is None else PadOrder(attention_mask, config.conv_kernel_size - 1)

        def convolve(convolution: MesaNetShortConvolution, x: torch.Tensor, slot: int):
            return convolution(x, None if cache is None else cache.conv_state(slot), pads, cu_seqlens)

        q, q_state = convolve(self.q_conv, q, CONV_Q)
        k, k_state = convolve(self.k_conv, k, CONV_K)
        conv_states = [q_state, k_state]
        if self.v_conv is not None:
            v, v_state = convolve(self.v_conv, v, CONV_V)
            conv_states.append(v_state)

        with maybe_autocast(hidden_states.device.type, enabled=False):
            beta, log_gamma = self.gates(hidden_states, attention_mask)
            lam = self.regularizer()
        arguments = (*(x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v)), log_gamma, beta, lam)
        if in_place and state is not None:
            output = mesa_step(*arguments, state, **self.solver(), backend=config.kernel_backend)
        else:
            output = mesa_attention(
                *arguments,
                initial_state=state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                chunk_size=config.chunk_size,
                backend=config.kernel_backend,
                **self.solver(),
            )
        if cache is not None:
            cache.write(conv_states, output.final_state, length)

        gate = None
        if self.output_gate_proj is not None:
            gate = self.output_gate_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        o = self.o_norm(output.o, gate)
        return self.o_proj(o.flatten(2)).reshape(shape)

    def solver(self) -> dict:
        """The solver's `max_steps` and `tolerance`, which training and inference have of their own."""
        config = self.config
        if self.training:
            return {"max_steps": config.cg_max_steps_training, "tolerance": config.cg_tolerance_training}
        return {"max_steps": config.cg_max_steps, "tolerance": config.cg_tolerance}

    def input_weights(self) -> tuple[list[torch.Tensor], int]:
        """The weights of all projections of the layer's input, and how many come before those of the gates."""
        projections = [self.q_proj, self.k_proj, self.v_proj]
        if self.output_gate_proj is not None:
            projections.append(self.output_gate_proj)
        return [part.weight for part in (*projections, self.beta_proj, self.gamma_proj)], len(projections)

    def decodes_in_one_launch(self, hidden_states: torch.Tensor) -> bool:
        """Whether one kernel does all of a token between the projections: on a GPU, unless a module was replaced."""
        own = (
            isinstance(self.o_norm, MesaNetRMSNorm)
            and isinstance(self.q_conv, MesaNetShortConvolution)
            and isinstance(self.k_conv, MesaNetShortConvolution)
            and isinstance(self.v_conv, MesaNetShortConvolution | None)
        )
        sizes = self.head_dim, self.value_head_dim, self.config.conv_kernel_size
        return own and decodes_layer(hidden_states.device, hidden_states.dtype, *sizes, self.config.kernel_backend)

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        beta_logit: torch.Tensor,
        gamma_logit: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: MesaNetCacheLayer,
    ) -> torch.Tensor:
        """One token from its projections up to the output projection, `[B, 1, H * V]`; updates `cache` in place."""
        config, convolutions = self.config, (self.q_conv, self.k_conv, self.v_conv)
        state, solver = cache.recurrent_state(), self.solver()
        conv_states = [
            None if convolution is None else cache.conv_state(slot)
            for slot, convolution in zip((CONV_Q, CONV_K, CONV_V), convolutions, strict=True)
        ]
        o = decode_layer(
            q,
            k,
            v,
            beta_logit,
            gamma_logit,
            *conv_states,
            *state,
            *(None if convolution is None else convolution.weight for convolution in convolutions),
            self.beta_bias,
            self.gamma_bias,
            self.lambda_param,
            self.o_norm.weight,
            gate,
            attention_mask,
            config.forget_gate_bound,
            config.lambda_lower_bound,
            config.rms_norm_eps,
            solver["max_steps"],
            solver["tolerance"],
        )
        cache.write([held for held in conv_states if held is not None], state, 1)
        return o


class MesaNetMLP(nn.Module):
    """Gated MLP: `W_down (act(W_gate x) * W_up x)`."""

    def __init__(self, config: MesaNetConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_to_residual_stream = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


# What the parts of a layer must be for `MesaNetDecoderLayer.decode` to know what they compute.
LAYER_PARTS = {
    **dict.fromkeys(("mixer_norm", "mlp_norm"), (MesaNetRMSNorm,)),
    "mixer": (MesaNetMixer,),
    "mlp": (MesaNetMLP,),
}
MIXER_PARTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (nn.Linear,)),
    **dict.fromkeys(("beta_proj", "gamma_proj"), (MesaNetGateProjection,)),
    "output_gate_proj": (nn.Linear, type(None)),
    **dict.fromkeys(("q_conv", "k_conv"), (MesaNetShortConvolution,)),
    "v_conv": (MesaNetShortConvolution, type(None)),
    "o_norm": (MesaNetRMSNorm,),
}
MLP_PARTS = {
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (nn.Linear,)),
    "act_fn": (nn.SiLU, type(ACT2FN["silu"])),
}


class Composition(NamedTuple):
    """The parts of a layer that consists of this file's modules and torch's, with plain weights and without hooks.

    A layer with adapters, quantised weights, a tensor parallel plan, offloading, or a hook that watches activations is
    none.
    """

    # Dictionaries of modules, a name in each, and what it stood for (None: nothing).
    links: tuple[tuple[dict, str, object], ...]
    hooks: tuple[dict, ...]
    weights: tuple[torch.Tensor, ...]

    @staticmethod
    def of(layer: nn.Module) -> "Composition | None":
        """None if `layer` is no such layer."""
        links, weights = [], []
        hooks = [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        for parts, owner in ((LAYER_PARTS, layer), (MIXER_PARTS, layer.mixer), (MLP_PARTS, layer.mlp)):
            for name, kinds in parts.items():
                module = owner._modules.get(name)
                links.append((owner._modules, name, module))
                if type(module) not in kinds:
                    return None
                if module is None:
                    continue
                links.append((module.__dict__, "forward", None))
                hooks += [module._forward_hooks, module._forward_pre_hooks]
                if isinstance(module, nn.Linear):
                    weight = module._parameters.get("weight")
                    if type(weight) is not nn.Parameter or not weight.is_contiguous():
                        return None
                    links += [(module._parameters, "weight", weight), (module._parameters, "bias", None)]
                    weights.append(weight)
        found = Composition(tuple(links), tuple(hooks), tuple(weights))
        return found if found.holds() else None

    def holds(self) -> bool:
        """Whether nothing was replaced and no hook added since."""
        for names, name, value in self.links:
            if names.get(name) is not value:
                return False
        return not any(self.hooks)


# To find a layer's parts takes several times as long as to see that they are still there.
COMPOSITIONS: "weakref.WeakKeyDictionary[nn.Module, Composition]" = weakref.WeakKeyDictionary()


class MesaNetDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: Mesa layer, then gated MLP."""

    def __init__(self, config: MesaNetConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = MesaNetRMSNorm(config.hidden_size, config.rms_norm_eps, config.kernel_backend)
        self.mixer = MesaNetMixer(config, layer_idx)
        self.mlp_norm = MesaNetRMSNorm(config.hidden_size, config.rms_norm_eps, config.kernel_backend)
        self.mlp = MesaNetMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Arguments as in `MesaNetMixer.forward`; further ones are accepted for transformers' sake."""
        if past_key_values is not None and self.decodes_in_five_launches(hidden_states, past_key_values):
            return self.decode(hidden_states, attention_mask, past_key_values.layers[self.mixer.layer_idx])
        mixed = self.mixer(self.mixer_norm(hidden_states), attention_mask, past_key_values, cu_seqlens)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def decodes_in_five_launches(self, hidden_states: torch.Tensor, past_key_values: Cache) -> bool:
        """Whether `decode` may stand for the modules: one token, no gradients, a GPU, and nobody else has a say."""
        mixer = self.mixer
        if hidden_states.shape[1] != 1 or torch.is_grad_enabled() or type(mixer) is not MesaNetMixer:
            return False
        if not mixer.decodes_in_one_launch(hidden_states):
            return False
        if past_key_values.layers[mixer.layer_idx].recurrent_state() is None:
            return False
        if torch.is_autocast_enabled(hidden_states.device.type) or not self.is_unchanged(hidden_states):
            return False
        weights, _ = mixer.input_weights()
        outputs = tuple(weight.shape[0] for weight in weights)
        sizes = weights[0].shape[1], outputs, mixer.o_proj.in_features, self.mlp.down_proj.in_features
        return fuses_linears(hidden_states, sizes, mixer.config.kernel_backend)

    def is_unchanged(self, hidden_states: torch.Tensor) -> bool:
        """Whether the layer consists of what it was made of, in the dtype and on the device of `hidden_states`.

        Asked at every token: adapters, hooks and offloading may come and go.
        """
        found = None if torch.compiler.is_compiling() else COMPOSITIONS.get(self)
        if found is None or not found.holds():
            found = Composition.of(self)
            if found is None:
                return False
            if not torch.compiler.is_compiling():
                COMPOSITIONS[self] = found
        dtype, device = hidden_states.dtype, hidden_states.device
        return all(weight.dtype == dtype and weight.device == device for weight in found.weights)

    def decode(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: MesaNetCacheLayer
    ) -> torch.Tensor:
        """One token in five launches; updates `cache` in place. Rounds where the modules do."""
        mixer, mlp = self.mixer, self.mlp
        cache.make_writable()
        weights, rounded = mixer.input_weights()
        norm = self.mixer_norm
        *values, beta_logit, gamma_logit = norm_linears(hidden_states, norm.weight, norm.eps, weights, rounded)
        q, k, v, gate = values if len(values) == 4 else (*values, None)
        o = mixer.decode(q, k, v, gate, beta_logit, gamma_logit, attention_mask, cache)
        hidden_states = add_linear(o, mixer.o_proj.weight, hidden_states)
        norm = self.mlp_norm
        gated = norm_gated_linears(hidden_states, norm.weight, norm.eps, mlp.gate_proj.weight, mlp.up_proj.weight)
        return add_linear(gated, mlp.down_proj.weight, hidden_states)


class MesaNetPreTrainedModel(PreTrainedModel):
    """Initialisation and the properties transformers asks every model for."""

    config: MesaNetConfig
    config_class = MesaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MesaNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    # Decoding methods that take tokens back would need the state before them: transformers refuses them.
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["beta_bias", "gamma_bias", "lambda_param"]
    # No layer computes attention weights: `output_attentions` gives an empty tuple.
    _can_record_outputs = {"hidden_states": MesaNetDecoderLayer, "attentions": []}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with fan-in scaling; matrices that write to the residual stream with variance times 2 / layers."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            variance = 1 / module.in_features
            if getattr(module, "writes_to_residual_stream", False):
                variance *= 2 / self.config.num_hidden_layers
            init.normal_(module.weight, mean=0.0, std=math.sqrt(variance))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1 / math.sqrt(module.embedding_dim))
        elif isinstance(module, MesaNetShortConvolution):
            init.normal_(module.weight, mean=0.0, std=1 / math.sqrt(module.kernel_size[0]))
        elif isinstance(module, MesaNetMixer):
            init.zeros_(module.beta_bias)
            fastest, slowest = INITIAL_FORGETTING
            forgetting = torch.logspace(math.log10(fastest), math.log10(slowest), module.num_heads)
            init.copy_(module.gamma_bias, torch.logit(1 - forgetting))
            excess = self.config.lambda_init - self.config.lambda_lower_bound
            # The inverse of softplus, in the form that does not overflow.
            init.constant_(module.lambda_param, excess + math.log(-math.expm1(-excess)))


class MesaNetModel(MesaNetPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MesaNetConfig):
        super().__init__(config)
        self.embed_tokens = MesaNetScaledEmbedding(
            config.vocab_size, config.hidden_size, config.effective_embedding_scale
        )
        self.layers = nn.ModuleList(MesaNetDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MesaNetRMSNorm(config.hidden_size, config.rms_norm_eps, config.kernel_backend)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids: tokens `[B, T]`; give these or `inputs_embeds`.
            attention_mask: `[B, T]` or, continuing from a cache, `[B, past + T]`; 0 marks pads, which may stand
                anywhere and leave the state untouched. Also a dictionary with the key `"linear_attention"`.
            position_ids: only read to find packed sequences: where it does not rise by one, a new sequence starts
                (without mask and cache). The model itself needs no positions.
            past_key_values: state to continue from, updated in place.
            inputs_embeds: embeddings `[B, T, d]`, as `get_input_embeddings()` makes them: with the embedding scale.
            use_cache: return the state; never started by itself in training mode or for packed sequences.
            kwargs: `cu_seq_lens_q` `[S + 1]` or `seq_idx` `[B, T]` mark packed sequences explicitly.

        Raises:
            ValueError: an argument is missing, misshapen, not finite, or contradicts another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        if past_key_values is not None:
            upgrade_cache(past_key_values, self.config)
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        mask = local_mask(attention_mask, batch, length, past_key_values)
        cu_seqlens = packed_bounds(batch, length, position_ids, mask, past_key_values, kwargs)
        if use_cache and past_key_values is None and cu_seqlens is None and not self.training:
            past_key_values = upgrade_cache(DynamicCache(config=self.config), self.config)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None
        )


class MesaNetForCausalLM(MesaNetPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MesaNetConfig):
        super().__init__(config)
        self.model = MesaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels: `[B, T]`, shifted inside; -100 is ignored.
            logits_to_keep: compute logits only for the last so many tokens (0: all), or for these positions.

        The other arguments are those of `MesaNetModel.forward`.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
            # The loss would notice too, but only after the cache has been updated.
            raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be {tuple(inputs.shape[:2])}.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        cap = self.config.logit_soft_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_model_inputs(self, *args, **kwargs):
        # The first step of `generate` that sees the prompt: later ones stumble over an empty one, and drop a mask of
        # ones whatever its shape.
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        embeds = name == "inputs_embeds"
        check_inputs(None if embeds else inputs, inputs if embeds else None, self.config.hidden_size)
        cache = model_kwargs.get("past_key_values")
        past_length = 0 if cache is None else cached_length(upgrade_cache(cache, self.config))
        check_mask(model_kwargs.get("attention_mask"), *inputs.shape[:2], past_length)
        return inputs, name, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            upgrade_cache(model_kwargs["past_key_values"], self.config)
        return result

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get("past_key_values")
        continued = cache is not None and cache.get_seq_length() > 0
        if generation_config.prefill_chunk_size and (continued or model_kwargs.get("inputs_embeds") is not None):
            # In chunks, transformers feeds tokens that the cache already holds once more (5.17 always, 5.23 when there
            # are no others) and passes over embeddings (5.17).
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    # `generate` takes inputs_embeds only from models that name the argument here.
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        past_key_values = kwargs.get("past_key_values")
        continued = past_key_values is not None and past_key_values.get_seq_length() > 0
        if continued and next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"input_ids ends {-int(next_sequence_length)} tokens before the end of what past_key_values already "
                "holds; pass all tokens, the cached ones included, or the new ones with an attention_mask over all."
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )


class MesaNetForSequenceClassification(GenericForSequenceClassification, MesaNetPreTrainedModel):
    """The decoder with a classification head on the last token that is no pad."""


def check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, hidden_size: int) -> None:
    """Refuse inputs that would spoil a state: wrong shape, no tokens, embeddings that are not finite.

    Raises:
        ValueError: as above.
    """
    if input_ids is not None:
        name, tensor, expected = "input_ids", input_ids, "[batch, time]"
        fits = tensor.ndim == 2
    else:
        name, tensor, expected = "inputs_embeds", inputs_embeds, f"[batch, time, {hidden_size}]"
        fits = tensor.ndim == 3 and tensor.shape[-1] == hidden_size
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
    if tensor.shape[1] == 0:
        raise ValueError(
            f"{name} has no tokens (shape {tuple(tensor.shape)}); give at least one, for example the bos token. "
            "Continuing from a cache with new tokens alone needs an attention_mask over the cached ones too."
        )
    # Reading values waits for the device and cannot be traced.
    if inputs_embeds is not None and not torch.compiler.is_compiling() and not inputs_embeds.isfinite().all():
        raise ValueError("inputs_embeds contains NaN or infinite values; they would spoil the recurrent state.")


def local_mask(
    attention_mask: torch.Tensor | dict | None, batch: int, length: int, past_key_values: Cache | None
) -> torch.Tensor | None:
    """The mask of the T new tokens, bool `[B, T]`; None where no token is a pad.

    Raises:
        ValueError: the mask does not fit the inputs, or the cache holds another batch size.
    """
    cached_batch = -1 if past_key_values is None else past_key_values.batch_size
    if cached_batch not in (-1, batch):
        raise ValueError(
            f"the inputs have batch size {batch} but past_key_values holds {cached_batch} sequences; use a cache of "
            "the same batch (past_key_values.batch_repeat_interleave(n) expands one)."
        )
    if isinstance(attention_mask, dict):
        if "linear_attention" not in attention_mask:
            raise ValueError(f"attention_mask has the keys {sorted(attention_mask)}; it needs 'linear_attention'.")
        attention_mask = attention_mask["linear_attention"]
    if attention_mask is None:
        return None
    tracing = torch.compiler.is_compiling()
    # A counter read into a graph would be a new constant at every token.
    past_length = 0 if past_key_values is None or tracing else cached_length(past_key_values)
    check_mask(attention_mask, batch, length, past_length)
    mask = attention_mask[:, -length:].bool()
    return None if not tracing and mask.all() else mask


def check_mask(attention_mask: torch.Tensor | None, batch: int, length: int, past_length: int) -> None:
    """Refuse a mask that covers neither the new tokens nor the cached and the new ones.

    Raises:
        ValueError: as above.
    """
    if attention_mask is None:
        return
    shape, widths = attention_mask.shape, sorted({length, past_length + length})
    fits = len(shape) == 2 and shape[0] == batch
    if not fits or (shape[1] < length if torch.compiler.is_compiling() else shape[1] not in widths):
        expected = " or ".join(str((batch, width)) for width in widths)
        raise ValueError(
            f"attention_mask has shape {tuple(shape)}; for these inputs it must be {expected} (one entry a token, the "
            "cached ones included or not)."
        )


def packed_bounds(
    batch: int,
    length: int,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict,
) -> torch.Tensor | None:
    """Bounds `[S + 1]` of the sequences packed into the batch (flattened to one row), or None when nothing is packed.

    `cu_seq_lens_q` counts as given; `seq_idx` and `position_ids` mark a new sequence where the index changes or the
    position does not rise by one, and at every row.

    Raises:
        ValueError: a marker is misshapen or runs past the tokens, two disagree, or packing is combined with pads or a
            cache.
    """
    tracing = torch.compiler.is_compiling()  # values cannot be read then, and are trusted
    explicit, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    markers = {}
    if explicit is not None:
        markers["cu_seq_lens_q"] = explicit
        if not tracing:
            check_bounds(explicit, batch * length)
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; it must be {(batch, length)}.")
        markers["seq_idx"] = bounds_from_starts(seq_idx.diff(dim=1) != 0)
    # An exported graph cannot branch on values. A compiled one breaks here, unless bounds are given as well.
    unread = torch.compiler.is_exporting() or (tracing and (markers or past_key_values is not None))
    if position_ids is not None and length > 1 and not unread:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; it must be {(batch, length)}.")
        found = bounds_from_positions(position_ids.expand(batch, -1), mask, past_key_values is not None)
        if found is not None:
            markers["position_ids"] = found
    if not markers:
        return None
    if mask is not None or past_key_values is not None:
        raise ValueError(
            f"packed sequences ({' and '.join(markers)}) were given together with pads in attention_mask or with "
            "past_key_values; drop one of them."
        )
    (name, bounds), *others = markers.items()
    if others and not tracing:
        filled = bounds.unique_consecutive()  # only cu_seq_lens_q can tell of empty sequences
        for other, found in others:
            if not torch.equal(found, filled.to(found)):
                raise ValueError(
                    f"{name} {filled.tolist()} and {other}, which gives {found.tolist()}, disagree on where packed "
                    "sequences begin; pass one of them."
                )
    return bounds


@torch.compiler.disable(reason="position_ids are read to find packed sequences; pass cu_seq_lens_q for a full graph")
def bounds_from_positions(
    position_ids: torch.Tensor, mask: torch.Tensor | None, continued: bool
) -> torch.Tensor | None:
    """Bounds `[S + 1]` of the sequences that `position_ids` `[B, T]` tell of, None where they tell of none.

    transformers passes plain position_ids too. Where pads or a cache may explain a jump ahead, only a step back
    between real tokens begins a sequence; else every step other than one.
    """
    if mask is None and not continued:
        starts = position_ids.diff(dim=1) != 1
        return bounds_from_starts(starts) if starts.any() else None
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask
    # Among real tokens, position minus rank stays or (after pads that were counted) grows.
    lead = position_ids - real.cumsum(dim=1)
    highest = lead.masked_fill(~real, torch.iinfo(lead.dtype).min).cummax(dim=1).values
    starts = real & (lead < highest)
    return bounds_from_starts(starts[:, 1:]) if starts.any() else None


def bounds_from_starts(starts: torch.Tensor) -> torch.Tensor:
    """Bounds `[S + 1]` in the flattened batch, from bool `[B, T - 1]`: whether a token (not the first) begins anew."""
    starts = F.pad(starts, (1, 0), value=True).flatten()
    return torch.cat([starts.nonzero().flatten(), starts.new_full((1,), starts.numel(), dtype=torch.long)])


def check_bounds(cu_seq_lens: torch.Tensor, tokens: int) -> None:
    """Refuse bounds that do not rise from 0 to the number of tokens.

    Raises:
        ValueError: as above.
    """
    bounds = cu_seq_lens.tolist()
    whole = cu_seq_lens.ndim == 1 and not cu_seq_lens.is_floating_point() and len(bounds) > 1
    if not whole or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seq_lens_q is {bounds}; it must be a vector of whole numbers that rise from 0 to {tokens}, the "
            "number of tokens."
        )


__all__ = ["MesaNetForCausalLM", "MesaNetForSequenceClassification", "MesaNetModel", "MesaNetPreTrainedModel"]
