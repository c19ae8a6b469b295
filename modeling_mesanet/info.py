# SPDX-License-Identifier: Apache-2.0
"""`mesanet info`: what a checkpoint is, from its config and its safetensors headers. No weights are read."""

import math
import os
from collections import Counter

import torch

from .cache_mesanet import state_bytes
from .configuration_mesanet import MesaNetConfig
from .loading import CheckpointError, TensorHeader, find_checkpoint, read_config, read_headers
from .modeling_mesanet import MesaNetForCausalLM

# Parts of the parameter count, by the first of these that occurs in a tensor's name.
_PARTS = (("embed_tokens", "embedding"), ("lm_head", "output head"), (".mlp.", "MLPs"), (".mixer.", "Mesa layers"))
_REST = "norms and others"


def describe(path: str | os.PathLike | None = None, *, argument: str = "path") -> dict:
    """Describe a checkpoint; `path` as in `loading.load_checkpoint`.

    Returns:
        JSON types: `path`, `architecture`, `parameters` (`total`, `by_part`, `by_dtype`), `layers`, `state_bytes` (of
        one sequence, float32, whatever its length), `solver`, and the sizes under `model`.

    Raises:
        CheckpointError: the checkpoint is missing or broken, or its tensors are not those that its config describes.
    """
    folder = find_checkpoint(path, argument=argument)
    config = read_config(folder, argument=argument)
    headers = read_headers(folder, argument=argument)
    _check_against_config(headers, config, f"{argument} is '{folder}'")
    return {
        "path": str(folder),
        "architecture": (config.architectures or ["unknown"])[0],
        "parameters": {
            "total": sum(math.prod(header.shape) for header in headers.values()),
            "by_part": dict(_count(headers, _part)),
            "by_dtype": dict(_count(headers, lambda name: headers[name].dtype)),
        },
        "layers": {"total": config.num_hidden_layers, **Counter(config.layer_types)},
        "state_bytes": state_bytes(config, batch_size=1),
        "solver": {
            "max_steps": config.cg_max_steps,
            "tolerance": config.cg_tolerance,
            "training_max_steps": config.cg_max_steps_training,
            "training_tolerance": config.cg_tolerance_training,
            "chunk_size": config.chunk_size,
        },
        "model": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "key_size": config.head_dim,
            "value_size": config.value_head_dim,
            "intermediate_size": config.intermediate_size,
            "conv_kernel_size": config.conv_kernel_size,
            "forget_gate_bound": config.forget_gate_bound,
            "lambda_lower_bound": config.lambda_lower_bound,
            "tied_embeddings": config.tie_word_embeddings,
        },
    }


def _count(headers: dict[str, TensorHeader], group) -> Counter:
    counts = Counter()
    for name, header in headers.items():
        counts[group(name)] += math.prod(header.shape)
    return counts


def _part(name: str) -> str:
    return next((part for piece, part in _PARTS if piece in name), _REST)


def _check_against_config(headers: dict[str, TensorHeader], config: MesaNetConfig, where: str) -> None:
    """Refuse tensors that are not the causal model's, whose parameters cost nothing on the meta device.

    Other architectures (a classifier, a quantised model) are described as they are.
    """
    if config.architectures not in (None, [MesaNetForCausalLM.__name__]) or hasattr(config, "quantization_config"):
        return
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in MesaNetForCausalLM(config).named_parameters()}
    for name, shape in expected.items():
        stored = headers[name].shape if name in headers else None
        if stored != shape:
            found = "is missing" if stored is None else f"has shape {stored} instead of {shape}"
            raise CheckpointError(
                f"{where}, whose weights do not fit its config.json: {name} {found}; use the two files that were "
                "saved together."
            )
    # A tied head may have been saved beside the embedding.
    extra = sorted(set(headers) - set(expected) - ({"lm_head.weight"} if config.tie_word_embeddings else set()))
    if extra:
        raise CheckpointError(
            f"{where}, whose weights do not fit its config.json: {extra[0]} is not part of the model; use the two "
            "files that were saved together."
        )
