# SPDX-License-Identifier: Apache-2.0
"""Prompt states as values: save and load, fork, split, merge, move, and go on from one with new text.

A state file is a safetensors file. Its tensors are, for layer i, `layers.i.conv.s` (slot s of the convolutions,
`[B, channels, conv_kernel_size - 1]`, in the dtype of the activations), `layers.i.h` `[B, H, K, K]` and `layers.i.g`
`[B, H, K, V]` (float32, or float64 of a float64 model). Its metadata say what the state belongs to: format and its
version, the fields of the config that a state depends on, dtype and SHA-256 of the weights, SHA-256 of the tokenizer,
the number of tokens consumed, and a SHA-256 of all this and the tensors.

Dimensions: B batch, T tokens, H heads, K key size, V value size.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .cache_mesanet import RECURRENT_G, RECURRENT_H, MesaNetCacheLayer, cached_length, upgrade_cache
from .configuration_mesanet import MesaNetConfig
from .files import give_usual_permissions, replacing
from .loading import one_line
from .modeling_mesanet import MesaNetModel

FORMAT = "mesanet-state"
FORMAT_VERSION = "2"

# What a state depends on beside the weights. The solver's limits are not among them: they say how well it is read.
CONFIG_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "value_head_dim",
    "conv_kernel_size",
    "conv_on_value",
    "use_output_gate",
    "hidden_act",
    "forget_gate_bound",
    "lambda_lower_bound",
    "effective_embedding_scale",
    "rms_norm_eps",
    "effective_head_norm_eps",
)


class StateError(ValueError):
    """A state or a state file that cannot be used; the message names it, the cause and the remedy."""


class StateInfo(NamedTuple):
    """What a state file says of itself.

    `config` holds the fields of `CONFIG_FIELDS`, `dtype` that of the weights (such as "float32"); `weights`,
    `tokenizer` (None where none was given) and `checksum`, of the other fields and the tensors, are SHA-256 in
    hexadecimal; `tokens` are those consumed, pads included.
    """

    config: dict
    dtype: str
    weights: str
    tokenizer: str | None
    tokens: int
    checksum: str = ""

    def checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> "StateInfo":
        """With the checksum that belongs to the other fields and these tensors."""
        content = [self._replace(checksum="")._asdict(), _fingerprint(tensors)]
        return self._replace(checksum=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


# ------------------------------------------------------------------------------------------------------------- files


def save_state(
    cache: Cache,
    path: str | os.PathLike,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    argument: str = "path",
) -> StateInfo:
    """Write the state of a cache to a file, whole or not at all.

    Args:
        cache: a used cache of `model`, of any number of sequences, on any device.
        path: the file; its folder must exist, and an older file is replaced, but keeps its permissions.
        model: what the state was made by; its weights are read once, for their fingerprint.
        tokenizer: what the tokens were made by; then `load_state` can refuse another one.
        argument: what to call `path` in messages.

    Returns:
        What was written beside the tensors.

    Raises:
        StateError: the cache is unused or not finite, or the file cannot be written.
        ValueError: the cache belongs to a model of other sizes.
    """
    backbone, path = _backbone(model), Path(path)
    _check_no_folder(path, argument)
    tensors = _tensors(_used(cache, backbone.config))
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise StateError(
            f"the cache holds NaN or infinite values ({bad}); make it again from finite inputs, by a model that "
            "`mesanet check` passes."
        )
    info = StateInfo(
        config=_config_fields(backbone.config),
        dtype=_dtype_name(backbone),
        weights=fingerprint_weights(model),
        tokenizer=None if tokenizer is None else fingerprint_tokenizer(tokenizer),
        tokens=cached_length(cache),
    ).checked(tensors.items())
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    metadata |= {name: json.dumps(value) for name, value in info._asdict().items()}
    try:
        path.parent.stat()  # a folder that is missing may be a mistake in its name, so it is not made
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            give_usual_permissions(temporary)
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{argument} is '{path}', which cannot be written ({one_line(error)}); give a file in a folder that "
            "exists and has room."
        ) from error
    return info


def read_state_info(path: str | os.PathLike, *, argument: str = "path") -> StateInfo:
    """What a state file belongs to, from its header alone.

    Raises:
        StateError: the file is missing, a folder, truncated, no state, or of another format version.
    """
    _check_no_folder(Path(path), argument)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise StateError(
            f"{argument} is '{path}', which does not exist; give a file written by `mesanet prefill` or save_state."
        ) from error
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{argument} is '{path}', which is truncated or not a safetensors file ({one_line(error)}); save the "
            "state again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise StateError(
            f"{argument} is '{path}', which is no MesaNet state; give a file written by `mesanet prefill` or "
            "save_state."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise StateError(
            f"{argument} is '{path}', of format version {metadata.get('format_version')}, but this package reads "
            f"{FORMAT_VERSION}; save the state again, or install the release that wrote it."
        )
    try:
        info = StateInfo(**{name: json.loads(metadata[name]) for name in StateInfo._fields})
        sound = isinstance(info.config, dict) and type(info.tokens) is int and 0 < info.tokens < 2**63
    except (KeyError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise StateError(f"{argument} is '{path}', whose metadata are damaged; save the state again.")
    return info


def load_state(
    path: str | os.PathLike,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    argument: str = "path",
) -> DynamicCache:
    """Read a state file into a new cache, or refuse it.

    Args:
        path: a file written by `save_state`.
        model: what will go on from the state; it must be what made it: config, weights and their dtype.
        tokenizer: what will make the new tokens; checked where the state was saved with one.
        device: where to put the state; None is where each layer of `model` is.
        argument: what to call `path` in messages.

    Returns:
        A cache, to be passed as `past_key_values`, or to `continue_from`.

    Raises:
        StateError: the file is missing, truncated, damaged, no state, or made by another model or tokenizer.
    """
    backbone = _backbone(model)
    info = read_state_info(path, argument=argument)
    _check_origin(info, path, backbone, model, tokenizer, argument)
    config, tensors = backbone.config, {}
    try:
        with safe_open(path, framework="pt") as file:
            # Shapes are read from the header, so that no tensor of a wrong size is.
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            batch = shapes.get("layers.0.h", (0,))[0]
            if batch >= 1 and shapes == _expected_shapes(config, batch):
                tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise StateError(
            f"{argument} is '{path}', which cannot be read ({one_line(error)}); save it again."
        ) from error
    if not tensors or info.checked(tensors.items()) != info:
        raise StateError(f"{argument} is '{path}', whose content is damaged; save the state again.")
    cache = upgrade_cache(DynamicCache(config=config), config)
    for index, layer in enumerate(cache.layers):
        target = _layer_device(backbone.layers[index]) if device is None else device
        names = [f"conv.{slot}" for slot in range(config.number_of_conv_states)] + ["h", "g"]
        # Copied, since what safetensors gives may be the file itself, mapped into memory.
        *conv_states, h, g = (tensors[f"layers.{index}.{name}"].to(target, copy=True) for name in names)
        layer.write(conv_states, (h, g), info.tokens)
    return cache


def _check_no_folder(path: Path, argument: str) -> None:
    if path.is_dir():
        raise StateError(f"{argument} is '{path}', a folder; give the name of a file.")


def _check_origin(
    info: StateInfo,
    path: str | os.PathLike,
    backbone: MesaNetModel,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    argument: str,
) -> None:
    for field, value in _config_fields(backbone.config).items():
        if info.config.get(field) != value:
            raise StateError(
                f"{argument} is '{path}', made by a model whose {field} is {info.config.get(field)} while this "
                f"model's is {value}; load the model that made the state."
            )
    if info.dtype != _dtype_name(backbone):
        raise StateError(
            f"{argument} is '{path}', made by weights in {info.dtype} while this model's are in "
            f"{_dtype_name(backbone)}; load the model with dtype {info.dtype}, or make the state again."
        )
    if info.weights != fingerprint_weights(model):
        raise StateError(
            f"{argument} is '{path}', made by a model with other weights; load the model that made the state, or make "
            "the state again."
        )
    if tokenizer is not None and info.tokenizer not in (None, fingerprint_tokenizer(tokenizer)):
        raise StateError(
            f"{argument} is '{path}', made with another tokenizer; load the one that belongs to the model."
        )


# ------------------------------------------------------------------------------------------------------- fingerprints


def fingerprint_weights(model: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of all weights that a state depends on (not the head's).

    Raises:
        StateError: there is no MesaNet in `model`, or weights are not in memory.
    """
    tensors = _backbone(model).state_dict()
    absent = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if absent is not None:
        raise StateError(f"the model's weights are not in memory ({absent} is offloaded); load it without offloading.")
    return _fingerprint(tensors.items())


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what determines the tokens of a text: vocabulary, rules and special tokens."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left there by the last call with such arguments.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = tokenizer.get_vocab()
    rules = [content, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        described = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(described + hashlib.sha256(content).digest()).digest()

    # Hashing lets other threads run, and reads less than a gigabyte a second on one core.
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(named)))).hexdigest()


# ---------------------------------------------------------------------------------------- forking, splitting, merging


def fork_state(cache: Cache, copies: int = 1, *, device: torch.device | str | None = None) -> Cache:
    """An independent copy of a state.

    Args:
        cache: a used cache; it stays as it is.
        copies: how often to repeat each of its sequences, side by side.
        device: where to put the copy; None is where the state is.

    Raises:
        StateError: the cache is unused or no MesaNet's, or `copies` is less than 1.
    """
    if copies < 1:
        raise StateError(f"copies is {copies}; give at least 1.")
    _used(cache)
    return _copied(cache, lambda x: x.repeat_interleave(copies, dim=0), device)


def split_state(cache: Cache) -> list[Cache]:
    """An independent state for each sequence of a batch, in order.

    Raises:
        StateError: the cache is unused or no MesaNet's.
    """
    rows = range(_used(cache).batch_size)
    return [_copied(cache, lambda x, row=row: x[row : row + 1].clone()) for row in rows]


def merge_states(caches: Sequence[Cache]) -> Cache:
    """One batch of the sequences of several states, in order; a copy.

    Sequences of different lengths may be merged: the batch counts as many tokens as the longest, as if the others had
    been padded on the left, which leaves states alone.

    Raises:
        StateError: no caches were given, one is unused or no MesaNet's, or they differ in sizes, dtypes or devices.
    """
    if not caches:
        raise StateError("caches is empty; give at least one state.")
    named = [_tensors(_used(cache)) for cache in caches]
    for index, tensors in enumerate(named[1:], start=1):
        for name in sorted(tensors.keys() | named[0].keys()):
            kinds = [
                None if x is None else (tuple(x.shape[1:]), x.dtype, x.device)
                for x in (named[0].get(name), tensors.get(name))
            ]
            if kinds[0] != kinds[1]:
                raise StateError(
                    f"caches[{index}] does not fit caches[0]: {name} is {_kind(kinds[1])} and {_kind(kinds[0])}; "
                    "merge states of one model, dtype and device (fork_state moves one)."
                )
    merged = fork_state(max(caches, key=cached_length))
    for index, layer in enumerate(merged.layers):
        others = [cache.layers[index] for cache in caches]
        for own, slots in (("conv_states", layer.conv_states), ("recurrent_states", layer.recurrent_states)):
            for slot in slots:
                if slots[slot] is not None:
                    slots[slot] = torch.cat([getattr(other, own)[slot] for other in others])
    return merged


def continue_from(
    cache: Cache, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str]
) -> dict[str, torch.Tensor | Cache]:
    """What `generate` needs to go on from a state: `model.generate(**continue_from(state, tokenizer, " The sea"))`.

    The state itself stays as it is and can be used again. The new text is tokenized by itself, without special tokens.

    Args:
        cache: a state of one sequence, which every text continues, or of as many sequences as texts.
        tokenizer: the model's.
        texts: what comes next, for all sequences or one for each; not empty.

    Returns:
        `input_ids` `[B, T]` of the new texts, padded on the left, `attention_mask` `[B, past + T]`, and the forked
        state as `past_key_values`.

    Raises:
        StateError: the cache is unused or no MesaNet's, a text has no tokens, or their numbers do not fit.
    """
    held = _used(cache).batch_size
    texts = [texts] * held if isinstance(texts, str) else list(texts)
    if held not in (1, len(texts)) or not texts:
        raise StateError(
            f"texts holds {len(texts)} texts but the state {held} sequences; give one text a sequence, or a state "
            "of one."
        )
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for index, row in enumerate(rows):
        if not row:
            raise StateError(f"texts[{index}] is {texts[index]!r}, which has no tokens; give text to go on with.")
    fork = fork_state(cache, len(texts) // held)
    past, width, device = (
        cached_length(cache),
        max(map(len, rows)),
        fork.layers[0].recurrent_states[RECURRENT_H].device,
    )
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=torch.long)
    mask = torch.ones(len(rows), past + width, dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, past : past + width - len(row)] = 0
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "past_key_values": fork}


# ------------------------------------------------------------------------------------------------------------ details


def _copied(
    cache: Cache,
    function: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device | str | None = None,
) -> Cache:
    """A cache of its own with `function`, which copies, of every state tensor; the device as in `fork_state`."""
    static = isinstance(cache, StaticCache)
    # transformers' own way to either asks for a config, and makes layers for it.
    copy = StaticCache.__new__(StaticCache) if static else DynamicCache.__new__(DynamicCache)
    Cache.__init__(copy, layers=[MesaNetCacheLayer(layer.number_of_states, static=static) for layer in cache.layers])
    for copied, layer in zip(copy.layers, cache.layers, strict=True):
        conv_states, recurrent_states = (
            [function(slots[slot]).to(device or slots[slot].device) for slot in slots if slots[slot] is not None]
            for slots in (layer.conv_states, layer.recurrent_states)
        )
        copied.write(conv_states, tuple(recurrent_states), int(layer.get_seq_length()))
    return copy


def _used(cache: Cache, config: MesaNetConfig | None = None) -> Cache:
    if config is not None and isinstance(cache, Cache):
        upgrade_cache(cache, config)
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or not all(isinstance(layer, MesaNetCacheLayer) for layer in layers):
        raise StateError(
            f"cache is a {type(cache).__name__} that no MesaNet has used; give what its forward returned."
        )
    if not layers or not all(layer.is_initialized for layer in layers):
        raise StateError("the cache has not consumed any token; feed the model first (past_key_values=cache).")
    return cache


def _tensors(cache: Cache) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, layer in enumerate(cache.layers):
        for slot, state in layer.conv_states.items():
            tensors[f"layers.{index}.conv.{slot}"] = state.contiguous()
        tensors[f"layers.{index}.h"] = layer.recurrent_states[RECURRENT_H].contiguous()
        tensors[f"layers.{index}.g"] = layer.recurrent_states[RECURRENT_G].contiguous()
    return tensors


def _expected_shapes(config: MesaNetConfig, batch: int) -> dict[str, tuple[int, ...]]:
    heads, key, value, memory = (
        config.num_attention_heads,
        config.head_dim,
        config.value_head_dim,
        config.conv_kernel_size - 1,
    )
    channels = [heads * key, heads * key, heads * value][: config.number_of_conv_states]
    shapes = {}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.conv.{slot}": (batch, size, memory) for slot, size in enumerate(channels)}
        shapes[f"layers.{index}.h"] = (batch, heads, key, key)
        shapes[f"layers.{index}.g"] = (batch, heads, key, value)
    return shapes


def _backbone(model: nn.Module) -> MesaNetModel:
    for module in model.modules():
        if isinstance(module, MesaNetModel):
            return module
    raise StateError(
        f"model is a {type(model).__name__} without a MesaNet in it; give the MesaNet that made the state."
    )


def _config_fields(config: MesaNetConfig) -> dict:
    return {field: getattr(config, field) for field in CONFIG_FIELDS}


def _dtype_name(backbone: MesaNetModel) -> str:
    return str(backbone.embed_tokens.weight.dtype).removeprefix("torch.")


def _kind(kind: tuple | None) -> str:
    return "absent" if kind is None else f"{list(kind[0])} in {str(kind[1]).removeprefix('torch.')} on {kind[2]}"


def _layer_device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


__all__ = [
    "StateError",
    "StateInfo",
    "continue_from",
    "fork_state",
    "load_state",
    "merge_states",
    "read_state_info",
    "save_state",
    "split_state",
]
