# SPDX-License-Identifier: Apache-2.0
"""A pass as a CUDA graph: the decoding steps of `generate()`, drafts read at once, and a long text's chunks, on a GPU.

transformers has `torch.compile` make such a graph, for static caches only. A recurrent state is static in any cache,
the kernels of a step are written already, so there is nothing to compile, and replaying a graph spares the processor
the guards and wrappers of a compiled step.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .cache_mesanet import MesaNetCacheLayer
from .mesa import select_backend
from .rollback_mesanet import StateTape

T = TypeVar("T")

# What a step may be called with: tensors (a recurrent state does not read positions), and what a graph is made for.
TENSORS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
CONSTANTS = ("use_cache", "return_dict", "logits_to_keep", "cg_tolerance", "cg_max_steps")

# Hooks of this module do nothing unless a call asks for hidden states, which no graph is made for.
HARMLESS_HOOKS = "transformers.utils.output_capturing"

# What any module has, whatever it computes.
INTERNALS = vars(nn.Module()).keys() - {"training"}

# Graphs of drafts that are kept: each holds a snapshot of the states.
MOST_DRAFT_GRAPHS = 4

RECORDING = threading.Lock()


class Case(NamedTuple):
    """What a graph depends on besides its inputs' values: the kind of pass, and where the states lie."""

    kind: tuple
    addresses: tuple


class Rewind:
    """Takes drafted tokens back that a graph has read: a graph, too, for all layers and any number of tokens.

    Args:
        graph: rewinds the states to what they were after the first `left` tokens.
        left: a zero-dimensional tensor that `graph` reads.
        tokens: that were read, what filled the drafts up included.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, left: torch.Tensor, tokens: int):
        self.graph, self.left, self.tokens = graph, left, tokens
        self.is_due = False

    def __call__(self, left: int) -> None:
        """Keep the first `left` tokens; asked by every layer, done when the first one asks."""
        if self.is_due and left < self.tokens:
            self.left.fill_(left)
            self.graph.replay()
        self.is_due = False


class Recorded(NamedTuple):
    """A graph, the case it was recorded for, and the tensors that it reads and writes.

    While the cache is recording, too, these include a tape for each layer, with which `rewind` takes tokens back.
    """

    case: Case
    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor
    mask: torch.Tensor | None
    output: ModelOutput
    tapes: list[StateTape]
    rewind: Rewind | None


class DecodeGraph:
    """Calls a model, by a CUDA graph where as many tokens go to the same batch, cache and solver as before.

    The first pass of a kind runs as it is, which compiles its kernels; the next is recorded, and from then on
    replayed. Recording does not execute: states change only when the graph is replayed. Whatever else is called runs
    as it is.

    Args:
        model: any that takes the arguments of `MesaNetForCausalLM`; not kept alive.
        made_of: its `composition`.
        tokens: new tokens of each sequence in the passes to record; several only without pads.
        drafts: the passes to record read drafts, of which the cache keeps what it takes to take them back; the model
            is called again only after `cache.crop`.
        kinds: kinds of passes that have run; added to.
    """

    def __init__(
        self, model: nn.Module, made_of: tuple, tokens: int = 1, drafts: bool = False, kinds: set | None = None
    ):
        self.model, self.made_of, self.tokens, self.drafts = weakref.ref(model), made_of, tokens, drafts
        self.kinds: set[tuple] = set() if kinds is None else kinds
        self.recorded: Recorded | None = None
        self.failed = False

    @cached_property
    def draft_graphs(self) -> "DraftGraphs":
        """Those of the same model for drafts."""
        return DraftGraphs(self.model(), self.made_of, self.kinds)

    def case(self, inputs: dict) -> Case | None:
        """The case of a pass; None where none is to be recorded for it."""
        return None if self.failed else case_of(self.model(), inputs, self.tokens, self.drafts)

    def __call__(self, **inputs: Any) -> ModelOutput:
        case = self.case(inputs)
        return self.model()(**inputs) if case is None else self.run(case, inputs)

    def run(self, case: Case, inputs: dict) -> ModelOutput:
        """`model(**inputs)`, of which `case` is the case."""
        model = self.model()
        if self.recorded is None or case != self.recorded.case:
            if case.kind not in self.kinds:
                self.kinds.add(case.kind)
                return model(**inputs)
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
        cache = inputs["past_key_values"]
        if recorded.rewind is not None:
            recorded.rewind.is_due = True
            for layer, tape in zip(cache.layers, recorded.tapes, strict=True):
                layer.tape, layer.past = tape, None
        # A copy of the logits, since the next pass writes over them.
        return type(recorded.output)(logits=recorded.output.logits.clone(), past_key_values=cache)


class DraftGraphs:
    """What drafts for a model are read with: CUDA graphs for few lengths, and the states that these read and write.

    Both stay from text to text, since a graph takes as long to record as ten steps. The states of a text are moved
    there while it is written.

    Args:
        model, made_of, kinds: as `DecodeGraph` takes them.
    """

    def __init__(self, model: nn.Module, made_of: tuple, kinds: set):
        self.new_graph = partial(DecodeGraph, made_of=made_of, drafts=True, kinds=kinds)
        self.model = weakref.ref(model)
        self.graphs: dict[int, DecodeGraph] = {}  # the last used comes last
        self.states: list[torch.Tensor] = []
        self.is_lent = False

    def graph(self, tokens: int) -> DecodeGraph:
        """The graph for so many tokens; of others, those stay that were used last."""
        self.graphs[tokens] = self.graphs.pop(tokens, None) or self.new_graph(self.model(), tokens=tokens)
        if len(self.graphs) > MOST_DRAFT_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return self.graphs[tokens]

    def move_in(self, cache: Cache) -> None:
        """Let the states of `cache` lie here."""
        if self.states and self.states[0].is_inference() != torch.is_inference_mode_enabled():
            self.states.clear()
        if not self.states:
            move_states(cache, lambda state: self.states.append(torch.empty_like(state)) or state)
        places = iter(self.states)
        move_states(cache, lambda state: next(places).copy_(state))


def move_states(cache: Cache, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every tensor of `cache` by what `move` makes of it."""
    for layer in cache.layers:
        layer.move(move)


class DraftReader:
    """Stands for a model in transformers' loop over drafts, which calls it with a prompt, then with drafts.

    Drafts are read by CUDA graphs: shorter ones are filled up, and what fills them is taken back with what is
    rejected. All else asked of it is the model's own.
    """

    def __init__(self, model: nn.Module, graphs: DraftGraphs):
        self.model, self.graphs = model, graphs
        self.has_read_prompt = False
        self.moved_in: Cache | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> ModelOutput:
        if not self.has_read_prompt:
            self.has_read_prompt = True
            return self.model(**inputs)
        tokens, cache = inputs["input_ids"].shape[1], inputs["past_key_values"]
        graph = self.graphs.graph(filled_length(tokens))
        filled = inputs | {
            "input_ids": nn.functional.pad(inputs["input_ids"], (0, graph.tokens - tokens)),
            # A draft has no pads, and a recurrent state needs no mask of what it has read.
            "attention_mask": None,
            "position_ids": None,
            "logits_to_keep": 0,
        }
        case = graph.case(filled)
        if case is None:
            return self.model(**inputs)
        if self.moved_in is None:
            self.graphs.move_in(cache)
            self.moved_in, case = cache, graph.case(filled)
        output = graph.run(case, filled)
        output.logits = output.logits[:, :tokens]
        if cache.layers[0].tape.take_back is not None:
            for layer in cache.layers:
                layer.tape.tokens = tokens
        elif tokens < graph.tokens:  # no graph yet
            cache.crop(tokens - graph.tokens)
        return output


@contextmanager
def draft_reader(model: nn.Module) -> Iterator[nn.Module | DraftReader]:
    """What reads drafts for `model`: its `DraftReader`, or itself where there are no graphs or they are in use."""
    steps = decode_graph(model)
    graphs = None if steps is None else steps.draft_graphs
    if graphs is None or graphs.is_lent:
        yield model
        return
    reader = DraftReader(model, graphs)
    graphs.is_lent = True
    try:
        yield reader
    finally:
        if reader.moved_in is not None:
            move_states(reader.moved_in, torch.clone)
        graphs.is_lent = False


def filled_length(tokens: int) -> int:
    """One token, and as many drafts as `tokens` has room for: none, 5, 10, 20, 40, ..."""
    drafts = 0 if tokens == 1 else 5
    while drafts + 1 < tokens:
        drafts *= 2
    return drafts + 1


def record(model: nn.Module, case: Case, inputs: dict) -> Recorded:
    """Record `model(**inputs)`, without executing it, for tensors of its own in place of ids and mask."""
    input_ids, mask = inputs["input_ids"].clone(), last_column(inputs.get("attention_mask"))
    mask = None if mask is None else mask.clone()
    constants = {name: inputs[name] for name in CONSTANTS if name in inputs}
    cache, tokens = inputs["past_key_values"], input_ids.shape[1]

    def read() -> tuple[ModelOutput, list[StateTape]]:
        try:
            with counted_at_once(cache, tokens):
                output = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **constants)
            # The cache is the caller's; the graph does not keep it alive.
            return type(output)(logits=output.logits), [layer.tape for layer in cache.layers if layer.tape is not None]
        finally:
            for layer in cache.layers:
                layer.tape = None

    graph, (output, tapes) = capture(read, input_ids.device)
    rewind = record_rewind(cache, tapes) if tapes else None
    return Recorded(case, graph, input_ids, mask, output, tapes, rewind)


def record_rewind(cache: Cache, tapes: list[StateTape]) -> Rewind:
    """Record, without executing it, that the layers of `cache` take back what is on their tapes."""
    tokens = tapes[0].tokens
    left = torch.zeros((), dtype=torch.long, device=tapes[0].conv_states[0].device)
    tapes[0].states_after(left)  # compiles its kernel, which nothing has run yet

    def rewind() -> None:
        with counted_at_once(cache, left - tokens):
            for layer, tape in zip(cache.layers, tapes, strict=True):
                layer.write(*tape.states_after(left), 0)

    recorded = Rewind(capture(rewind, left.device)[0], left, tokens)
    for tape in tapes:
        tape.take_back = recorded
    return recorded


def capture(function: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `function` launches, and what it returns; nothing is executed."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the GPU meanwhile, but only one at a time may wait for it and begin a graph.
    with RECORDING, torch.cuda.device(device):
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                return graph, function()
        except Exception as error:
            # The generator of random numbers would go on waiting for the end, which it learns of from another graph.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros((), device=device)
            raise error.__context__ or error from None  # what went wrong first


@contextmanager
def counted_at_once(cache: Cache, tokens: int | torch.Tensor) -> Iterator[None]:
    """Lets the layers leave the counting of `tokens`, which would be a launch each, to the end of the block."""
    for layer in cache.layers:
        layer.is_counting = False
    try:
        yield
        counters = [layer.seen_tokens for layer in cache.layers]
        # A list, since the value of a single tensor would be waited for.
        torch._foreach_add_(counters, [tokens] * len(counters) if torch.is_tensor(tokens) else tokens)
    finally:
        for layer in cache.layers:
            layer.is_counting = True


def case_of(model: nn.Module, inputs: dict, tokens: int, drafts: bool) -> Case | None:
    """The case of a graph of so many tokens, drafts or not; None where none is to be made."""
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
    addresses = state_addresses(cache, drafts)
    if addresses is None:
        return None
    kind = (
        tuple(input_ids.shape),
        padded,
        drafts,
        tuple((name, given[name]) for name in CONSTANTS if name in given),
        tuple(sorted(model.base_model.solver_limits.items())),
        torch.is_inference_mode_enabled(),
    )
    return Case(kind, addresses)


def last_column(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | None:
    """The mask of the new token `[B, 1]`, from what `generate()` passes; None where no token is a pad."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("linear_attention")
    return None if attention_mask is None else attention_mask[:, -1:]


def state_addresses(cache: Cache, drafts: bool) -> tuple | None:
    """Where the states of a cache lie; None for one that holds no tokens yet, or whose states are going to move.

    Also for one that remembers what may be taken back, except where `drafts` are read, and nothing waits for that.
    """
    addresses = []
    for layer in cache.layers:
        if not isinstance(layer, MesaNetCacheLayer) or not all(layer.has_previous_state.values()):
            return None
        if layer.record_past != drafts or layer.tape is not None:
            return None
        tensors = (layer.seen_tokens, *layer.conv_states.values(), *layer.recurrent_states.values())
        if not torch.is_inference_mode_enabled() and any(x is not None and x.is_inference() for x in tensors):
            return None  # they are copied when first written to
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
    return name not in INTERNALS and is_literal(value)


def is_literal(value: Any) -> bool:
    """Whether `value` is a number, a name, None, or a container of such."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, dict):
        return is_literal([*value, *value.values()])
    return isinstance(value, (list, tuple, set)) and all(map(is_literal, value))


def everything_is_watched() -> bool:
    """Whether there are hooks that every module calls."""
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def runs_more(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its class's `forward`, while nobody asks for hidden states."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in module.__dict__ or any(hook.__module__ != HARMLESS_HOOKS for hook in hooks)
