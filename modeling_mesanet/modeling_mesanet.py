# SPDX-License-Identifier: Apache-2.0
"""MesaNet models: recurrent language models whose sequence layer solves a ridge regression at every token.

Dimensions: B batch, T tokens, d hidden size, H heads, K key size, V value size, S packed sequences.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CompileConfig, GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_mesanet import CONV_K, CONV_Q, CONV_V, MesaNetCacheLayer, cached_length, upgrade_cache
from .configuration_mesanet import MesaNetConfig
from .decode_graph import decode_graph, draft_reader, everything_is_watched, runs_more
from .mesa import (
    PadOrder,
    SolverStats,
    add_linear,
    check_solver,
    decode_layer,
    decodes_layer,
    fuses_linears,
    gates,
    head_norm,
    mesa_attention,
    mesa_states,
    mesa_step,
    norm_gated_linears,
    norm_linears,
    prefill_layer,
    prefills_layer,
    short_convolution,
    short_convolutions,
)
from .rollback_mesanet import Consumed

# At initialisation the heads of a layer forget at rates spread (evenly in the log) between these two, that is over
# memories of about ten to a thousand tokens.
INITIAL_FORGETTING = (1e-1, 1e-3)

# What `cg_tolerance` and `cg_max_steps` are where the config decides: None already means that no token stops early.
FROM_CONFIG = "config"
SOLVER_LIMITS = ("cg_tolerance", "cg_max_steps")


class Solver(NamedTuple):
    """How the Mesa layers of one forward pass solve: at most `max_steps` steps, until `tolerance` (None: all)."""

    max_steps: int
    tolerance: float | None
    output_stats: bool


@dataclass
class MesaNetModelOutput(BaseModelOutputWithPast):
    """`solver_stats`, with `output_solver_stats=True`: for each layer `steps` (int32) and `residual`, `[B, T, H]`."""

    solver_stats: tuple[SolverStats, ...] | None = None


@dataclass
class MesaNetCausalLMOutput(CausalLMOutputWithPast):
    """`solver_stats` as in `MesaNetModelOutput`."""

    solver_stats: tuple[SolverStats, ...] | None = None


def upcast(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


class MesaNetRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, if gated times `silu(gate)`, over the last dimension, in the dtype of `x`.

    Computed in float32 (or float64).
    """

    def __init__(self, config: MesaNetConfig, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.config, self.eps = config, eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return head_norm(x, self.weight, self.eps, gate, self.config.kernel_backend)

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


class MesaNetShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time with SiLU, carrying its last W - 1 inputs from call to call."""

    def __init__(self, config: MesaNetConfig, channels: int):
        super().__init__(channels, channels, config.conv_kernel_size, groups=channels, bias=False)
        self.config = config

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
        weight, backend = self.weight.squeeze(1), self.config.kernel_backend
        if pads is None:
            return short_convolution(x, weight, state, cu_seqlens, backend)
        memory = weight.shape[1] - 1
        state = x.new_zeros(x.shape[0], x.shape[2], memory) if state is None else state.to(x.dtype)
        inputs = pads.sort(torch.cat([state, x.transpose(1, 2)], dim=-1))
        tokens, state = inputs[..., memory:].transpose(1, 2), inputs[..., :memory]
        y, state = short_convolution(tokens, weight, state, backend=backend)
        return pads.restore(y.transpose(1, 2)).transpose(1, 2), state


class MesaNetGateProjection(nn.Linear):
    """Linear map of `[B, T, d]` to one number a head, in float32 (or float64) whatever the dtypes of input and weight.

    The gates act on the state at every token, so that the rounding of their logits would add up.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if multiplies_into_float32(x, self.weight):
            return torch.mm(x.flatten(0, -2), self.weight.mT, out_dtype=torch.float32).view(*x.shape[:-1], -1)
        return F.linear(upcast(x), upcast(self.weight))


def is_watched(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's `forward`: a hook, or what replaced that (offloading)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(x: torch.Tensor, parts: list[nn.Module]) -> bool:
    """Whether NumPy may read `x` and the weights of `parts`: plain values of one dtype, which nobody watches.

    Not those that a compiler traces, that lie elsewhere (offloaded), or that autocast would convert.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or type(x) is not torch.Tensor:
        return False
    dtype, device = x.dtype, x.device
    for part in parts:
        weight = part._parameters.get("weight")
        if weight is None or weight.dtype != dtype or weight.device != device or is_watched(part):
            return False
    return True


def multiplies_into_float32(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `torch.mm` gives the product in float32 without copies of 16-bit factors in it: the same numbers.

    CUDA alone has it, and neither gradients nor a compiler know it in all versions of torch.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cuda":
        return False
    return x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16) and type(weight) is nn.Parameter


def reshape_stats(stats: SolverStats | None, shape: torch.Size) -> SolverStats | None:
    """Statistics of `[B, T, d]` inputs, `shape`: those of packed rows lie in one."""
    return None if stats is None else SolverStats(*(values.reshape(*shape[:2], -1) for values in stats))


# What `MesaNetMixer.decode` computes beside the solve.
DECODED_PARTS = ("o_norm", "q_conv", "k_conv", "v_conv")


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
        self.q_conv = MesaNetShortConvolution(config, key_channels)
        self.k_conv = MesaNetShortConvolution(config, key_channels)
        self.v_conv = MesaNetShortConvolution(config, value_channels) if config.conv_on_value else None
        self.beta_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.gamma_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.lambda_param = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.o_norm = MesaNetRMSNorm(config, self.value_head_dim, config.effective_head_norm_eps)
        self.o_proj = nn.Linear(value_channels, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual_stream = True

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Input strength beta and log forget strength, float32 `[B, T, H]`; a pad neither writes nor forgets."""
        return self.gates_of_logits(self.beta_proj(x), self.gamma_proj(x), mask)

    def gates_of_logits(
        self, beta_logit: torch.Tensor, gamma_logit: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `gates`, of what the projections give, `[B, T, H]`."""
        biases = upcast(self.beta_bias), upcast(self.gamma_bias)
        bound, backend = self.config.forget_gate_bound, self.config.kernel_backend
        return gates(beta_logit, gamma_logit, *biases, bound, mask, backend)

    def regularizer(self) -> torch.Tensor:
        """The diagonal of Lambda, float32 `[H, K]`."""
        return self.config.lambda_lower_bound + F.softplus(upcast(self.lambda_param))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        solver: Solver,
    ) -> tuple[torch.Tensor, SolverStats | None]:
        """Mix `hidden_states` `[B, T, d]` over time.

        Args:
            attention_mask: bool `[B, T]`, False for pads; None without pads.
            past_key_values: cache whose layer `layer_idx` is read and updated.
            cu_seqlens: bounds of packed sequences; excludes mask and cache.
            solver: limits of the solver, and whether its steps and residuals are wanted.

        Returns:
            `[B, T, d]`, and the statistics where they are wanted.
        """
        shape = hidden_states.shape
        if cu_seqlens is not None:  # packed sequences may run on from row to row
            hidden_states = hidden_states.reshape(1, -1, shape[-1])
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        gate = None if self.output_gate_proj is None else self.output_gate_proj(hidden_states)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            beta_logit, gamma_logit = self.beta_proj(hidden_states), self.gamma_proj(hidden_states)
        o, stats = self.mix(
            q, k, v, gate, beta_logit, gamma_logit, attention_mask, past_key_values, cu_seqlens, solver
        )
        return self.o_proj(o).reshape(shape), reshape_stats(stats, shape)

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        beta_logit: torch.Tensor,
        gamma_logit: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: torch.Tensor | None,
        solver: Solver,
        plain: bool = False,
    ) -> tuple[torch.Tensor, SolverStats | None]:
        """From the projections of `[B, T, d]` up to the output projection, `[B, T, H * V]`; arguments as in `forward`.

        Args:
            q, k, v, gate: `[B, T, H * K]` or `[B, T, H * V]`; `gate` is None without an output gate.
            beta_logit, gamma_logit: float32 `[B, T, H]`, without their biases.
            plain: nobody watches or has replaced the convolutions and the norm, so that they may be computed together
                with what is between them.
        """
        cache: MesaNetCacheLayer | None = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        config, length = self.config, q.shape[1]
        if cache is not None:  # in the first layer, before any state has changed
            cache.check_dtype(q.dtype, torch.is_autocast_enabled(q.device.type))
        recording = cache is not None and cache.record_past
        in_place = cache is not None and length == 1 and not torch.is_grad_enabled()
        if in_place:
            cache.make_writable()
        state = None if cache is None else cache.recurrent_state()
        stepping = in_place and state is not None
        # One launch would keep to itself what taking the token back needs.
        if stepping and not recording and self.decodes_in_one_launch(q):
            return self.decode(q, k, v, gate, beta_logit, gamma_logit, attention_mask, cache, solver)
        # Pads, packed sequences and a tape of what was consumed need the convolutions by themselves.
        if plain and not stepping and not recording and attention_mask is None and cu_seqlens is None:
            weights = [convolution.weight.squeeze(1) for convolution in self.convolutions]
            if prefills_layer([q, k, v], weights, self.head_dim, self.value_head_dim, config.kernel_backend):
                return self.prefill(q, k, v, gate, beta_logit, gamma_logit, weights, cache, solver)
        pads = None if attention_mask is None else PadOrder(attention_mask, config.conv_kernel_size - 1)

        conv_inputs = [q, k, v][: config.number_of_conv_states]
        convolved, conv_states = self.convolve(conv_inputs, cache, pads, cu_seqlens, plain)
        q, k, v = (*convolved, v)[:3]

        with maybe_autocast(q.device.type, enabled=False):
            beta, log_gamma = self.gates_of_logits(beta_logit, gamma_logit, attention_mask)
            lam = self.regularizer()
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        if recording:  # before the states change
            consumed = Consumed(conv_inputs, k, v, log_gamma, beta, attention_mask)
            cache.record(consumed, config.conv_kernel_size - 1, config.kernel_backend)
        arguments = (q, k, v, log_gamma, beta, lam)
        options = {
            "max_steps": solver.max_steps,
            "tolerance": solver.tolerance,
            "output_stats": solver.output_stats,
            "backend": config.kernel_backend,
        }
        if stepping:
            output = mesa_step(*arguments, state, **options)
        else:
            output = mesa_attention(
                *arguments,
                initial_state=state,
                output_final_state=cache is not None,
                cu_seqlens=cu_seqlens,
                chunk_size=config.chunk_size,
                **options,
            )
        if cache is not None:
            cache.write(conv_states, output.final_state, length)

        o = self.o_norm(output.o, None if gate is None else gate.unflatten(-1, (self.num_heads, -1)))
        stats = output.stats
        return o.flatten(2), None if stats is None else SolverStats(*(values.detach() for values in stats))

    @property
    def convolutions(self) -> list["MesaNetShortConvolution"]:
        """Those of q, k and, where the layer has one, v."""
        return [part for part in (self.q_conv, self.k_conv, self.v_conv) if part is not None]

    def conv_states(self, cache: MesaNetCacheLayer | None) -> list[torch.Tensor | None]:
        """What `cache` holds of the inputs of the layer's convolutions."""
        return [None if cache is None else cache.conv_state(slot) for slot in range(self.config.number_of_conv_states)]

    def convolve(
        self,
        inputs: list[torch.Tensor],
        cache: MesaNetCacheLayer | None,
        pads: PadOrder | None,
        cu_seqlens: torch.Tensor | None = None,
        plain: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The layer's convolutions of q, k and, where it has one, v, after what `cache` holds; and their new states.

        `plain` as in `mix`.
        """
        convolutions, states = self.convolutions, self.conv_states(cache)
        if plain and pads is None:
            weights = [convolution.weight.squeeze(1) for convolution in convolutions]
            return short_convolutions(inputs, weights, states, cu_seqlens, self.config.kernel_backend)
        pairs = [
            convolution(x, memory, pads, cu_seqlens)
            for convolution, x, memory in zip(convolutions, inputs, states, strict=True)
        ]
        return [y for y, _ in pairs], [state for _, state in pairs]

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor | None,
        beta_logit: torch.Tensor,
        gamma_logit: torch.Tensor,
        weights: list[torch.Tensor],
        cache: MesaNetCacheLayer | None,
        solver: Solver,
    ) -> tuple[torch.Tensor, SolverStats | None]:
        """`mix` of tokens without pads, in fewer launches; `weights` `[channels, W]` are those of the convolutions."""
        o, conv_states, state, *stats = prefill_layer(
            [q, k, v],
            weights,
            self.conv_states(cache),
            (beta_logit, gamma_logit),
            (self.beta_bias, self.gamma_bias),
            self.config.forget_gate_bound,
            self.regularizer(),
            None if cache is None else cache.recurrent_state(),
            solver.max_steps,
            solver.tolerance,
            solver.output_stats,
            (self.o_norm.weight, self.o_norm.eps, gate),
        )
        if cache is not None:
            cache.write(conv_states, state, q.shape[1])
        return o.flatten(2), SolverStats(*stats) if solver.output_stats else None

    def remember(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache
    ) -> None:
        """Take tokens whose outputs nobody asks for into the cache, without gradients; arguments as in `forward`."""
        cache: MesaNetCacheLayer = past_key_values.layers[self.layer_idx]
        config, memory = self.config, self.config.conv_kernel_size - 1
        # Of the queries, only what the convolution remembers counts; with pads, that may lie anywhere.
        recent = hidden_states[:, -memory:] if attention_mask is None else hidden_states
        q, k, v = self.q_proj(recent), self.k_proj(hidden_states), self.v_proj(hidden_states)
        cache.check_dtype(k.dtype, torch.is_autocast_enabled(k.device.type))
        pads = None if attention_mask is None else PadOrder(attention_mask, memory)
        (_, k, *convolved), conv_states = self.convolve([q, k, v][: config.number_of_conv_states], cache, pads)
        v = convolved[0] if convolved else v
        with maybe_autocast(k.device.type, enabled=False):
            beta, log_gamma = self.gates(hidden_states, attention_mask)
            k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (k, v))
            state = mesa_states(
                k, v, log_gamma, beta, initial_state=cache.recurrent_state(), backend=config.kernel_backend
            )
        cache.write(conv_states, state, hidden_states.shape[1])

    def decodes_in_one_launch(self, hidden_states: torch.Tensor) -> bool:
        """Whether one call does all of a token between the projections, unless a module was replaced or is watched."""
        # Asked for every token and layer: a module's own attributes take several times as long as these dictionaries.
        parts = []
        for name in DECODED_PARTS:
            part = self._modules.get(name)
            if isinstance(part, MesaNetRMSNorm | MesaNetShortConvolution):
                parts.append(part)
            elif part is not None:
                return False
        if hidden_states.is_cpu and not is_plain(hidden_states, parts):
            return False
        config = self.config
        sizes = self.head_dim, self.value_head_dim, config.conv_kernel_size
        return decodes_layer(hidden_states.device, hidden_states.dtype, *sizes, config.kernel_backend)

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
        solver: Solver,
    ) -> tuple[torch.Tensor, SolverStats | None]:
        """One token from its projections up to the output projection, `[B, 1, H * V]`; updates `cache` in place."""
        config, convolutions = self.config, (self.q_conv, self.k_conv, self.v_conv)
        state = cache.recurrent_state()
        conv_states = [
            None if convolution is None else cache.conv_state(slot)
            for slot, convolution in zip((CONV_Q, CONV_K, CONV_V), convolutions, strict=True)
        ]
        o, *stats = decode_layer(
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
            self.o_norm.eps,
            solver.max_steps,
            solver.tolerance,
            output_stats=solver.output_stats,
        )
        cache.write([held for held in conv_states if held is not None], state, 1)
        return o, SolverStats(*(values.unsqueeze(1) for values in stats)) if solver.output_stats else None


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


# Tokens of all sequences from which on it pays that a last layer computes no outputs of them. A GPU waits for the
# launches of fewer.
LEFT_OUT_ON_CPU, LEFT_OUT_ON_GPU = 64, 4096

# Where the projections of a layer have kernels of their own, and the logits of a token a product.
FUSED_DEVICES = ("cuda",)

# What the parts of a layer must be for `MesaNetDecoderLayer.compute_fused` to know what they compute.
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
    # Those of all projections of the layer's input, and how many come before those of the gates.
    input_weights: list[torch.Tensor]
    rounded: int
    # As `mesa_layers.fuses_linears` takes them.
    sizes: tuple[int, tuple[int, ...], int, int]

    @staticmethod
    def of(layer: nn.Module) -> "Composition | None":
        """None if `layer` is no such layer."""
        links, weights = [], {}
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
                    weights[name] = weight
        gates = [weights["beta_proj"], weights["gamma_proj"]]
        names = "q_proj", "k_proj", "v_proj", "output_gate_proj"
        inputs = [weights[name] for name in names if name in weights] + gates
        outputs = tuple(weight.shape[0] for weight in inputs)
        sizes = inputs[0].shape[1], outputs, weights["o_proj"].shape[1], weights["down_proj"].shape[1]
        found = Composition(
            tuple(links), tuple(hooks), tuple(weights.values()), inputs, len(inputs) - len(gates), sizes
        )
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
        self.mixer_norm = MesaNetRMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.mixer = MesaNetMixer(config, layer_idx)
        self.mlp_norm = MesaNetRMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.mlp = MesaNetMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        solver: Solver,
        tokens_to_keep: int = 0,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, SolverStats]:
        """Arguments as in `MesaNetMixer.forward`; further ones are accepted for transformers' sake.

        Args:
            tokens_to_keep: compute the outputs of the last so many tokens alone (0: all); the others only enter the
                cache. Without gradients.

        Returns:
            `[B, T, d]`, or `[B, tokens_to_keep, d]`; paired with the solver's statistics where they are wanted.
        """
        if tokens_to_keep:
            pieces = (slice(-tokens_to_keep), slice(-tokens_to_keep, None))
            before, hidden_states = (hidden_states[:, piece] for piece in pieces)
            mask_before, attention_mask = (
                (None, None) if attention_mask is None else (attention_mask[:, piece] for piece in pieces)
            )
            self.mixer.remember(self.mixer_norm(before), mask_before, past_key_values)
        parts = self.fusible_parts(hidden_states, past_key_values)
        if parts is not None:
            hidden_states, stats = self.compute_fused(
                parts, hidden_states, attention_mask, past_key_values, cu_seqlens, solver
            )
        else:
            mixed, stats = self.mixer(
                self.mixer_norm(hidden_states), attention_mask, past_key_values, cu_seqlens, solver=solver
            )
            hidden_states = hidden_states + mixed
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states if stats is None else (hidden_states, stats)

    def fusible_parts(self, hidden_states: torch.Tensor, past_key_values: Cache | None) -> Composition | None:
        """For `compute_fused`, where it may stand for the modules: no gradients, a GPU, and nobody else has a say."""
        if hidden_states.device.type not in FUSED_DEVICES or torch.is_grad_enabled():
            return None
        # Of a step, a compiler fuses what stands around the products itself.
        if torch.compiler.is_compiling() and (past_key_values is None or hidden_states.shape[1] != 1):
            return None
        if torch.is_autocast_enabled(hidden_states.device.type):
            return None
        parts = self.known_parts(hidden_states)
        if parts is None or not fuses_linears(hidden_states, parts.sizes, self.mixer.config.kernel_backend):
            return None
        return parts

    def known_parts(self, hidden_states: torch.Tensor) -> Composition | None:
        """What the layer was made of, if it still is, in the dtype and on the device of `hidden_states`.

        Asked at every token: adapters, hooks and offloading may come and go.
        """
        found = None if torch.compiler.is_compiling() else COMPOSITIONS.get(self)
        if found is None or not found.holds():
            found = Composition.of(self)
            if found is None:
                return None
            if not torch.compiler.is_compiling():
                COMPOSITIONS[self] = found
        dtype, device = hidden_states.dtype, hidden_states.device
        for weight in found.weights:
            if weight.dtype != dtype or weight.device != device:
                return None
        return found

    def compute_fused(
        self,
        parts: Composition,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: torch.Tensor | None,
        solver: Solver,
    ) -> tuple[torch.Tensor, SolverStats | None]:
        """What the modules compute, with what stands around products in the same calls; arguments as in `forward`."""
        mixer, mlp, norm = self.mixer, self.mlp, self.mixer_norm
        shape = hidden_states.shape
        if cu_seqlens is not None:  # packed sequences may run on from row to row
            hidden_states = hidden_states.reshape(1, -1, shape[-1])
        projected, residual = norm_linears(hidden_states, norm.weight, norm.eps, parts.input_weights, parts.rounded)
        *values, beta_logit, gamma_logit = projected
        q, k, v, gate = values if len(values) == 4 else (*values, None)
        o, stats = mixer.mix(
            q, k, v, gate, beta_logit, gamma_logit, attention_mask, past_key_values, cu_seqlens, solver, plain=True
        )
        # The layer's input belongs to others, too; what is made here does not.
        overwrite = residual is not hidden_states
        hidden_states = add_linear(o, mixer.o_proj.weight, residual, overwrite)
        norm = self.mlp_norm
        gated = norm_gated_linears(hidden_states, norm.weight, norm.eps, mlp.gate_proj.weight, mlp.up_proj.weight)
        hidden_states = add_linear(gated, mlp.down_proj.weight, hidden_states, overwrite=True).reshape(shape)
        return hidden_states, reshape_stats(stats, shape)


def can_leave_out(layer: nn.Module, batch: int, tokens: int, device: torch.device, cache: Cache | None) -> bool:
    """Whether the first `tokens` tokens of each sequence need only enter a layer's cache, and that is less work.

    Not where autograd, a compiler, a hook, a module in the place of ours, or a cache that records would notice.
    """
    # First, so that no graph depends on the number of tokens.
    if cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(layer) is not MesaNetDecoderLayer or type(layer.mixer) is not MesaNetMixer or layer.training:
        return False
    if batch * tokens < (LEFT_OUT_ON_CPU if device.type == "cpu" else LEFT_OUT_ON_GPU) or tokens <= 0:
        return False
    compiled = any(module._compiled_call_impl is not None for module in layer.modules())
    if compiled or everything_is_watched() or any(map(runs_more, layer.modules())):
        return False
    return not cache.layers[layer.mixer.layer_idx].record_past


class MesaNetPreTrainedModel(PreTrainedModel):
    """Initialisation and the properties transformers asks every model for."""

    config: MesaNetConfig
    config_class = MesaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MesaNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    # The cache can take drafted tokens back, so transformers need not refuse decoding methods that draft.
    _is_stateful = False
    _keep_in_fp32_modules_strict = ["beta_bias", "gamma_bias", "lambda_param"]
    # No layer computes attention weights: `output_attentions` gives an empty tuple.
    _can_record_outputs = {"hidden_states": MesaNetDecoderLayer, "attentions": []}

    @contextmanager
    def solver(
        self,
        *,
        cg_tolerance: float | Literal["config"] | None = FROM_CONFIG,
        cg_max_steps: int | Literal["config"] = FROM_CONFIG,
    ) -> Iterator[None]:
        """While the block runs, this model solves within these limits, in training mode and out of it.

        Blocks may be nested; what a call of the model or of `generate()` says itself comes first. The limits belong to
        the model, so they hold for its other threads too.

        Args:
            cg_tolerance: relative error of the layers' outputs to reach, in (0, 1); None runs all steps.
            cg_max_steps: largest number of steps, >= 0; 0 leaves the solver out.

        Raises:
            ValueError: an argument is out of range.
        """
        limits = check_limits(cg_tolerance=cg_tolerance, cg_max_steps=cg_max_steps)
        model = self.base_model
        outer = model.solver_limits
        model.solver_limits = outer | limits
        try:
            yield
        finally:
            model.solver_limits = outer

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
        self.norm = MesaNetRMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # What `solver()` sets while its block runs.
        self.solver_limits: dict[str, float | int | None] = {}
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
        cg_tolerance: float | Literal["config"] | None = FROM_CONFIG,
        cg_max_steps: int | Literal["config"] = FROM_CONFIG,
        output_solver_stats: bool = False,
        tokens_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MesaNetModelOutput:
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
            cg_tolerance: relative error of the layers' outputs to reach, in (0, 1), None to run all steps;
                left out, what `solver()` says, or else the config (for the mode, training or not).
            cg_max_steps: largest number of solver steps, >= 0, 0 to leave the solver out; left out, the same.
            output_solver_stats: return `solver_stats`: each layer's, token's and head's steps and residuals.
            tokens_to_keep: return the last hidden states of the last so many tokens alone (0, and always with
                `output_hidden_states`: of all), so that the last layer may leave out the others' outputs.
            kwargs: `cu_seq_lens_q` `[S + 1]` or `seq_idx` `[B, T]` mark packed sequences explicitly.

        Raises:
            ValueError: an argument is missing, misshapen, not finite, or contradicts another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if tokens_to_keep < 0:
            raise ValueError(f"tokens_to_keep is {tokens_to_keep}; give at least 1, or 0 for all tokens.")
        solver = self._solver(cg_tolerance, cg_max_steps, output_solver_stats)
        check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        if past_key_values is not None:
            upgrade_cache(past_key_values, self.config)
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        mask = local_mask(attention_mask, batch, length, past_key_values)
        cu_seqlens = packed_bounds(batch, length, position_ids, mask, past_key_values, kwargs)
        if cu_seqlens is not None:  # here, for all layers
            cu_seqlens = cu_seqlens.to((input_ids if inputs_embeds is None else inputs_embeds).device)
        if use_cache and past_key_values is None and cu_seqlens is None and not self.training:
            past_key_values = upgrade_cache(DynamicCache(config=self.config), self.config)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layers, solver_stats = self.layers[: self.config.num_hidden_layers], []
        if kwargs.get("output_hidden_states", self.config.output_hidden_states):
            tokens_to_keep = 0
        for layer in layers:
            ends = layer is layers[-1] and tokens_to_keep and not output_solver_stats
            shortened = ends and can_leave_out(
                layer, batch, length - tokens_to_keep, hidden_states.device, past_key_values
            )
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                solver=solver,
                tokens_to_keep=tokens_to_keep if shortened else 0,
            )
            if isinstance(hidden_states, tuple):
                hidden_states, stats = hidden_states
                solver_stats.append(stats)
        hidden_states = self.norm(hidden_states[:, -tokens_to_keep:])
        return MesaNetModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            solver_stats=tuple(solver_stats) if output_solver_stats else None,
        )

    def _solver(
        self,
        cg_tolerance: float | Literal["config"] | None,
        cg_max_steps: int | Literal["config"],
        output_solver_stats: bool,
    ) -> Solver:
        """The solver of one call: what its arguments say, or else `solver()`, or else the config."""
        config, limits = self.config, self.solver_limits
        if cg_tolerance != FROM_CONFIG or cg_max_steps != FROM_CONFIG:
            limits = limits | check_limits(cg_tolerance=cg_tolerance, cg_max_steps=cg_max_steps)
        own_steps, own_tolerance = config.cg_max_steps, config.cg_tolerance
        if self.training:
            own_steps, own_tolerance = config.cg_max_steps_training, config.cg_tolerance_training
        return Solver(
            limits.get("cg_max_steps", own_steps), limits.get("cg_tolerance", own_tolerance), output_solver_stats
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
        cg_tolerance: float | Literal["config"] | None = FROM_CONFIG,
        cg_max_steps: int | Literal["config"] = FROM_CONFIG,
        output_solver_stats: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MesaNetCausalLMOutput:
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
            cg_tolerance=cg_tolerance,
            cg_max_steps=cg_max_steps,
            output_solver_stats=output_solver_stats,
            tokens_to_keep=max(logits_to_keep, 0) if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.project(outputs.last_hidden_state[:, kept])
        cap = self.config.logit_soft_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MesaNetCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            solver_stats=outputs.solver_stats,
        )

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, vocabulary]`.

        On a GPU, one token of several sequences goes through the head as columns: cuBLAS has no fast product for rows
        whose length, like that of GPT-2's vocabulary, is no multiple of 8.
        """
        head = self.lm_head
        decoding = hidden_states.device.type in FUSED_DEVICES and hidden_states.shape[1] == 1 < hidden_states.shape[0]
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None
        if torch.is_grad_enabled() or not decoding or not plain or is_watched(head) or head.out_features % 8 == 0:
            return head(hidden_states)
        return (head.weight @ hidden_states[:, 0].mT).mT.unsqueeze(1)

    def generate(self, *args, output_solver_stats: bool = False, **kwargs):
        """transformers' `generate()`, which here also takes the solver's limits and returns its statistics.

        Args:
            args, kwargs: those of `GenerationMixin.generate`; further `cg_tolerance` and `cg_max_steps`, as in
                `MesaNetModel.forward`; a `GenerationConfig` may hold these two as well.
            output_solver_stats: with `return_dict_in_generate=True`, add `solver_stats` to the output: what each
                forward pass returns (of the prompt, then of each token but the last), as in `hidden_states`. A prompt
                is then not read in chunks.

        Raises:
            ValueError: a limit is out of range, or statistics are asked for without `return_dict_in_generate=True`.
        """
        check_limits(**{name: kwargs[name] for name in SOLVER_LIMITS if name in kwargs})
        if not output_solver_stats:
            return super().generate(*args, **kwargs)
        settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        if not kwargs.get("return_dict_in_generate", settings.return_dict_in_generate):
            raise ValueError(
                "output_solver_stats is True, but generate() returns tokens alone; pass return_dict_in_generate=True."
            )
        record = []
        output = super().generate(*args, output_solver_stats=True, solver_record=record, **kwargs)
        output["solver_stats"] = tuple(record)
        return output

    def _prepare_generation_config(self, generation_config, **kwargs):
        # A GenerationConfig keeps fields that transformers does not know, and takes arguments of their names in.
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        held = {name: value for name, value in vars(generation_config).items() if name in SOLVER_LIMITS}
        check_limits(**held)
        return generation_config, model_kwargs | held

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # Called after every forward pass: the one place where all ways of decoding hand out what the model returned.
        if model_kwargs.get("solver_record") is not None:
            # Copies, since a CUDA graph writes the next token's over them.
            stats = tuple(SolverStats(*(values.clone() for values in layer)) for layer in outputs.solver_stats)
            model_kwargs["solver_record"].append(stats)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        # Decoding with drafted tokens, which records, goes on counting by the mask.
        if model_kwargs.get("use_cache") and cache is not None and not cache.layers[0].record_past:
            # What is in the state needs neither mask nor positions; copied at every token, they would cost more and
            # more. New tokens are no pads.
            model_kwargs["attention_mask"] = model_kwargs["position_ids"] = None
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        cache, prompts = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds", input_ids)
        # Beams, or several sequences, from a state of the prompts: a copy, since the state given is its owner's.
        if expand_size > 1 and cache is not None and cache.batch_size == prompts.shape[0]:
            model_kwargs["past_key_values"] = copy.deepcopy(cache)
            model_kwargs["past_key_values"].batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

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

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether `generate()` calls `get_compiled_call` for each token: where a CUDA graph is, with any cache."""
        if super()._valid_auto_compile_criteria(model_kwargs, generation_config):
            return True
        cache = model_kwargs.get("past_key_values")
        if generation_config.compile_config is not None or generation_config.disable_compile or cache is None:
            return False
        # A draft's steps, of which some may be taken back, are remembered one by one.
        return not cache.layers[0].record_past and decode_graph(self) is not None

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """What `generate()` calls for each token on a GPU.

        A CUDA graph of the step (`decode_graph`), which takes no compiling; with a `compile_config`, or a static cache
        where such a graph cannot stand for the model (hooks, quantised or distributed weights, no Triton), what
        `torch.compile` makes of it.
        """
        graph = decode_graph(self) if compile_config is None else None
        return super().get_compiled_call(compile_config) if graph is None else graph

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the entrance of `generate_batch` and of the server's continuous batching.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch and continuous batching keep keys and values in pages, which a recurrent state has not; "
            "use generate() with a padded batch (and the server without --continuous-batching)."
        )

    def generate_batch(self, *args, **kwargs):
        """Refused, as `init_continuous_batching`."""
        self.init_continuous_batching()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation in ("quantized", "paged"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, which stores keys and values; a "
                "recurrent state has none and stays small, so leave it out or use 'static'."
            )
        given = model_kwargs.get("past_key_values")
        if given is not None and not generation_config.use_cache:
            raise ValueError(
                "use_cache is False although past_key_values is given, which would take in all new tokens again at "
                "every step; leave one of them out."
            )
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            if cache is not given:
                # While a model drafts with its first layers, transformers 5.17 makes a cache for all of them.
                del cache.layers[self.config.num_hidden_layers :]
            upgrade_cache(cache, self.config)
        return result

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get("past_key_values")
        if generation_config.prefill_chunk_size:
            generation_config = copy.copy(generation_config)
            # Only the step of one token is worth compiling: every length of a last chunk would be compiled anew, and
            # states that a graph makes lie in the memory that its next run writes to.
            generation_config.disable_compile = True
            continued = cache is not None and cache.get_seq_length() > 0
            whole = continued or model_kwargs.get("inputs_embeds") is not None
            if whole or model_kwargs.get("solver_record") is not None:
                # In chunks, transformers feeds tokens that the cache already holds once more (5.17 always, 5.23 when
                # there are no others), passes over embeddings (5.17), and keeps the last chunk's outputs only.
                generation_config.prefill_chunk_size = None
        input_ids, model_kwargs = pads_first(input_ids, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        generation_config = kwargs["generation_config"]
        exit_layer, layers = generation_config.assistant_early_exit, self.config.num_hidden_layers
        if exit_layer is not None and (not isinstance(exit_layer, int) or not 1 <= exit_layer < layers):
            # transformers would change the config first, fail, and leave it changed.
            raise ValueError(
                f"assistant_early_exit is {exit_layer!r}; a model of {layers} layers drafts with 1 to {layers - 1}."
            )
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if past_length:
            # transformers' loop was written for a cache that is empty. It cuts the mask to the length of input_ids,
            # which are all tokens or the new ones: here they keep a mask, by which `prepare_inputs_for_generation`
            # knows all tokens, or do without.
            length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if length <= input_ids.shape[1]:
                check_new_tokens(input_ids.shape[1] - past_length)
                kwargs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
            elif mask is not None and not mask[:, -input_ids.shape[1] :].all():
                raise ValueError(
                    "attention_mask marks pads among new tokens that continue past_key_values; leave the pads out, "
                    "since decoding with drafted tokens takes one sequence at a time."
                )
            else:
                kwargs.pop("attention_mask", None)
        else:
            input_ids, kwargs = pads_first(input_ids, kwargs)
        stock = super()._assisted_decoding.__func__
        try:
            with nullcontext(self) if generation_config.disable_compile else draft_reader(self) as reader:
                try:
                    return stock(reader, input_ids, *args, **kwargs)
                except BaseException:  # of a streamer, or the user's
                    if cache is not None:
                        for layer in cache.layers:
                            layer.take_back_unchecked()
                    raise
        finally:
            # transformers switches this on and leaves it: the user's cache would go on recording.
            if cache is not None:
                for layer in cache.layers:
                    layer.stop_recording()

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        # Drafts come from a `generate()` of their own, to which transformers passes on all that this one was given.
        # That one records nothing, and a model of another kind has no solver.
        unwanted = {"output_solver_stats", "solver_record"}
        if not isinstance(self if assistant_model is None else assistant_model, MesaNetPreTrainedModel):
            unwanted |= set(SOLVER_LIMITS)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in unwanted}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    # `generate` takes inputs_embeds, and what forward does not know, only from models that name the argument here.
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, solver_record=None, **kwargs
    ):
        past_key_values = kwargs.get("past_key_values")
        if kwargs.get("attention_mask") is not None:
            # Made from the mask; of pads, and of what follows them, they are not what marks packed sequences.
            kwargs.pop("position_ids", None)
        # The cache's length is read only where it matters, not at a step of stock decoding: that waits for the device.
        if next_sequence_length is None:
            mask = kwargs.get("attention_mask")
            length = 0
            if past_key_values is not None and mask is not None and mask.shape == input_ids.shape:
                length = int(past_key_values.get_seq_length())
            if length > 0:
                # All tokens, from decoding with drafted ones, which leaves it to the model to drop those in the cache.
                next_sequence_length = input_ids.shape[1] - length
                check_new_tokens(next_sequence_length)
        elif next_sequence_length <= 0 and past_key_values is not None and past_key_values.get_seq_length() > 0:
            check_new_tokens(int(next_sequence_length))
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )


class MesaNetForSequenceClassification(GenericForSequenceClassification, MesaNetPreTrainedModel):
    """The decoder with a classification head on the last token that is no pad."""

    def __init__(self, config: MesaNetConfig):
        # Not the generic class's own, which asks AutoModel for the decoder: that refuses code that came with a
        # checkpoint, since it does not know that this has been trusted.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = MesaNetModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


def check_limits(
    *,
    cg_tolerance: float | Literal["config"] | None = FROM_CONFIG,
    cg_max_steps: int | Literal["config"] = FROM_CONFIG,
) -> dict[str, float | int | None]:
    """Those of the solver's limits that are given, validated.

    Raises:
        ValueError: one is out of range.
    """
    # A number in range stands in for what is not given.
    max_steps, tolerance = check_solver(
        0 if cg_max_steps == FROM_CONFIG else cg_max_steps,
        None if cg_tolerance == FROM_CONFIG else cg_tolerance,
        prefix="cg_",
    )
    given = {} if cg_max_steps == FROM_CONFIG else {"cg_max_steps": max_steps}
    return given if cg_tolerance == FROM_CONFIG else given | {"cg_tolerance": tolerance}


def check_inputs(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, hidden_size: int) -> None:
    """Refuse inputs that would spoil a state: no tensor, wrong shape, no tokens, embeddings that are not finite.

    Raises:
        ValueError: as above.
    """
    if input_ids is not None:
        name, tensor, expected = "input_ids", input_ids, "[batch, time]"
        if not torch.is_tensor(tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
            kind = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
            raise ValueError(f"input_ids is {kind}; it must be a tensor of whole numbers, {expected}.")
        fits = tensor.ndim == 2
    else:
        name, tensor, expected = "inputs_embeds", inputs_embeds, f"[batch, time, {hidden_size}]"
        fits = tensor.ndim == 3 and tensor.shape[-1] == hidden_size
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}.")
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} has no sequences (shape {tuple(tensor.shape)}); give at least one.")
    if tensor.shape[1] == 0:
        raise ValueError(
            f"{name} has no tokens (shape {tuple(tensor.shape)}); give at least one, for example the bos token. "
            "Continuing from a cache with new tokens alone needs an attention_mask over the cached ones too."
        )
    # Reading values waits for the device and cannot be traced.
    if inputs_embeds is not None and not torch.compiler.is_compiling() and not inputs_embeds.isfinite().all():
        raise ValueError("inputs_embeds contains NaN or infinite values; they would spoil the recurrent state.")


def check_new_tokens(new: int) -> None:
    """Refuse a prompt of which `new` tokens go beyond the cache, unless that is at least one.

    Raises:
        ValueError: as above.
    """
    if new <= 0:
        raise ValueError(
            f"input_ids ends {-new} tokens before the end of what past_key_values already holds; pass all tokens, the "
            "cached ones included, or the new ones with an attention_mask over all."
        )


def pads_first(input_ids: torch.Tensor, model_kwargs: dict) -> tuple[torch.Tensor, dict]:
    """A prompt of which no row ends with pads: of one that does, the new tokens, each row's pads moved to its front.

    What is written first follows a row's last token, not the pads behind it; the states are the same.
    """
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    if mask is None or mask[:, -1].all():
        return input_ids, model_kwargs
    past_length = 0 if cache is None else cached_length(cache)
    order = mask[:, past_length:].bool().int().argsort(dim=1, stable=True)
    moved = {"attention_mask": reordered(mask, order)}
    if model_kwargs.get("inputs_embeds") is None:
        input_ids = reordered(input_ids, order)
    else:
        moved["inputs_embeds"] = reordered(model_kwargs["inputs_embeds"], order)
    return input_ids, model_kwargs | moved


def reordered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`x` `[B, T, ...]` with its last columns in the order `[B, columns]`."""
    before, after = x[:, : x.shape[1] - order.shape[1]], x[:, x.shape[1] - order.shape[1] :]
    index = order.view(*order.shape, *(1,) * (x.ndim - 2)).expand_as(after)
    return torch.cat([before, after.gather(1, index)], dim=1)


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
    check_is_tensor(attention_mask)
    unread = stays_unread(length, attention_mask.device)
    past_length = None if unread else 0 if past_key_values is None else cached_length(past_key_values)
    check_mask(attention_mask, batch, length, past_length)
    mask = attention_mask[:, -length:].bool()
    return mask if unread or not mask.all() else None


def stays_unread(length: int, device: torch.device) -> bool:
    """Whether values of mask and counter are not to be looked at: in a graph they would be a new constant at every
    token, and on an accelerator each token would wait for them.
    """
    return torch.compiler.is_compiling() or (length == 1 and device.type != "cpu")


def check_is_tensor(attention_mask: object) -> None:
    if not torch.is_tensor(attention_mask):
        raise ValueError(
            f"attention_mask is {type(attention_mask).__name__}; give a tensor [batch, time], 0 for pads and 1 for "
            "tokens."
        )


def check_mask(attention_mask: torch.Tensor | None, batch: int, length: int, past_length: int | None) -> None:
    """Refuse a mask that covers neither the new tokens nor the cached and the new ones.

    Without a `past_length`, which may be too dear to read, it may cover any number of cached ones.

    Raises:
        ValueError: as above.
    """
    if attention_mask is None:
        return
    check_is_tensor(attention_mask)
    shape, widths = attention_mask.shape, sorted({length, (past_length or 0) + length})
    fits = len(shape) == 2 and shape[0] == batch
    if not fits or (shape[1] < length if past_length is None else shape[1] not in widths):
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
