# SPDX-License-Identifier: Apache-2.0
"""A pass as a CUDA graph: the decoding steps of `generate()`, and a long text's chunks, on a GPU.

transformers has `torch.compile` make such a graph, for static caches only. A recurrent state is static in any cache,
the kernels of a step are written already, so there is nothing to compile, and replaying a graph spares the processor
the guards and wrappers of a compiled step.
"""

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .cache_mesanet import MesaNetCacheLayer
from .mesa import select_backend

# What a step may be called with: tensors (a recurrent state does not read positions), and what a graph is made for.
TENSORS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
CONSTANTS = ("use_cache", "return_dict", "logits_to_keep", "cg_tolerance", "cg_max_steps")

# Hooks of this module do nothing unless a call asks for hidden states, which no graph is made for.
HARMLESS_HOOKS = "transformers.utils.output_capturing"

# What any module has, whatever it computes.
INTERNALS = vars(nn.Module()).keys() - {"training"}

RECORDING = threading.Lock()


class Recorded(NamedTuple):
    """A graph, the case it was recorded for, and the tensors that it reads and writes."""

    case: tuple
    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor
    mask: torch.Tensor | None
    output: ModelOutput


class DecodeGraph:
    """Calls a model, by a CUDA graph where as many tokens go to the same batch, cache and solver as before.

    The first pass of a kind runs as it is, which compiles its kernels; the second is recorded, and from then on
    replayed. Recording does not execute: states change only when the graph is replayed. Whatever else is called runs
    as it is.

    Args:
        model: any that takes the arguments of `MesaNetForCausalLM`; not kept alive.
        made_of: its `composition`.
        tokens: new tokens of each sequence in the passes to record; several only without pads.
    """

    def __init__(self, model: nn.Module, made_of: tuple, tokens: int = 1):
        self.model, self.made_of, self.tokens = weakref.ref(model), made_of, tokens
        self.last_case: tuple | None = None
        self.recorded: Recorded | None = None
        self.failed = False

    def __call__(self, **inputs: Any) -> ModelOutput:
        model = self.model()
        case = None if self.failed else case_of(model, inputs, self.tokens)
        if case is None or (case != self.last_case and (self.recorded is None or case != self.recorded.case)):
            self.last_case = case
            return model(**inputs)
        if self.recorded is None or case != self.recorded.case:
            self.recorded = None  # gives its memory back first
            try:
                self.recorded = record(model, case, inputs)
            except Exception as error:  # drivers and libraries raise many kinds; the step runs without
                self.failed = True
                warnings.warn(
                    f"A pass cannot be recorded as a CUDA graph ({type(error).__name__}: {error}); it runs "
                    "without, more slowly.",
                    stacklevel=2,
                )
                return model(**inputs)
        recorded = self.recorded
        recorded.input_ids.copy_(inputs["input_ids"])
        if recorded.mask is not None:
            recorded.mask.copy_(last_column(inputs["attention_mask"]))
        recorded.graph.replay()
        # A copy of the logits, since the next pass writes over them.
        logits = recorded.output.logits.clone()
        return type(recorded.output)(logits=logits, past_key_values=inputs["past_key_values"])


def record(model: nn.Module, case: tuple, inputs: dict) -> Recorded:
    """Record `model(**inputs)`, without executing it, for tensors of its own in place of ids and mask."""
    input_ids, mask = inputs["input_ids"].clone(), last_column(inputs.get("attention_mask"))
    mask = None if mask is None else mask.clone()
    constants = {name: inputs[name] for name in CONSTANTS if name in inputs}
    graph, cache = torch.cuda.CUDAGraph(), inputs["past_key_values"]
    with (
        # Other threads may go on using the GPU meanwhile, but only one at a time may wait for it and begin a graph.
        RECORDING,
        torch.cuda.device_of(input_ids),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
        counted_at_once(cache, input_ids.shape[1]),
    ):
        output = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **constants)
    # The cache is the caller's; the graph does not keep it alive.
    return Recorded(case, graph, input_ids, mask, type(output)(logits=output.logits))


@contextmanager
def counted_at_once(cache: Cache, tokens: int) -> Iterator[None]:
    """Lets the layers leave the counting of `tokens`, which would be a launch each, to the end of the block."""
    for layer in cache.layers:
        layer.is_counting = False
    try:
        yield
        torch._foreach_add_([layer.seen_tokens for layer in cache.layers], tokens)
    finally:
        for layer in cache.layers:
            layer.is_counting = True


def case_of(model: nn.Module, inputs: dict, tokens: int) -> tuple | None:
    """All that a graph of so many tokens depends on besides its inputs' values; None where none is to be made."""
    input_ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    given = {name: value for name, value in inputs.items() if name not in TENSORS}
    if any(name not in CONSTANTS and value is not None and value is not False for name, value in given.items()):
        return None
    if given.get("return_dict") is False or any(torch.is_tensor(value) for value in given.values()):
        return None
    if input_ids is None or input_ids.shape[1] != tokens or cache is None:
        return None
    padded = last_column(inputs.get("attention_mask")) is not None
    if padded and tokens > 1:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(input_ids.device.type):
        return None
    addresses = state_addresses(cache)
    if addresses is None:
        return None
    return (
        tuple(input_ids.shape),
        padded,
        tuple((name, given[name]) for name in CONSTANTS if name in given),
        tuple(sorted(model.base_model.solver_limits.items())),
        torch.is_inference_mode_enabled(),
        addresses,
    )


def last_column(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | None:
    """The mask of the new token `[B, 1]`, from what `generate()` passes; None where no token is a pad."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("linear_attention")
    return None if attention_mask is None else attention_mask[:, -1:]


def state_addresses(cache: Cache) -> tuple | None:
    """Where the states of a cache lie; None for one that is not in use yet, or remembers what may be taken back."""
    addresses = []
    for layer in cache.layers:
        if not isinstance(layer, MesaNetCacheLayer) or not layer.is_initialized or layer.record_past:
            return None
        tensors = (layer.seen_tokens, *layer.conv_states.values(), *layer.recurrent_states.values())
        addresses += [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return tuple(addresses)


class Graphs(threading.local):
    """The graph of each model that has decoded with one: a graph has one set of tensors, so every thread its own."""

    def __init__(self):
        self.of: weakref.WeakKeyDictionary[nn.Module, DecodeGraph] = weakref.WeakKeyDictionary()


GRAPHS = Graphs()


def decode_graph(model: nn.Module) -> DecodeGraph | None:
    """The model's `DecodeGraph`, a new one where the model has changed; None where there is to be none."""
    made_of = recordable_composition(model)
    if made_of is None:
        GRAPHS.of.pop(model, None)
        return None
    graph = GRAPHS.of.get(model)
    if graph is None or graph.made_of != made_of:
        graph = GRAPHS.of[model] = DecodeGraph(model, made_of)
    return graph


def recordable_composition(model: nn.Module) -> tuple | None:
    """The `composition` of a model whose passes may be recorded; None for others."""
    return composition(model) if runs_on_one_gpu(model) else None


def runs_on_one_gpu(model: nn.Module) -> bool:
    """Whether all of the model lies on one GPU, where the Triton kernels run."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return False
    return select_backend(device, model.config.kernel_backend)[0] == "triton"


def composition(model: nn.Module) -> tuple | None:
    """What a recorded step takes for given: modules, weights and where they lie, and settings.

    None where Python code is to run at every step (hooks, offloading), or something else than plain weights.
    """
    config = model.config
    if model.training or everything_is_watched() or config.output_hidden_states or config.output_attentions:
        return None
    parts: list = [repr(vars(config))]
    for module in model.modules():
        if runs_more(module):
            return None
        parts.append(id(module))
        if module is not model:  # to which `generate()` attaches what it remembers
            parts += ((name, repr(value)) for name, value in vars(module).items() if is_setting(name, value))
        for parameter in module._parameters.values():
            if parameter is not None:
                if type(parameter) is not nn.Parameter:
                    return None
                parts += (id(parameter), parameter.data_ptr(), parameter.dtype)
    return tuple(parts)


def is_setting(name: str, value: Any) -> bool:
    """Whether a module's attribute is a setting, such as the adapters in use."""
    return name not in INTERNALS and is_plain(value)


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, a name, None, or a container of such."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, dict):
        return is_plain([*value, *value.values()])
    return isinstance(value, (list, tuple, set)) and all(map(is_plain, value))


def everything_is_watched() -> bool:
    """Whether there are hooks that every module calls."""
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def runs_more(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's `forward`, while nobody asks for hidden states."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in module.__dict__ or any(hook.__module__ != HARMLESS_HOOKS for hook in hooks)
