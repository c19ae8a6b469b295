# SPDX-License-Identifier: Apache-2.0
"""Small models for tests."""

import torch
from transformers.cache_utils import Cache

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "value_head_dim": 8,
    "intermediate_size": 64,
    # Not a divisor of the lengths below, so that sequences end inside a chunk.
    "chunk_size": 8,
}


def make_config(**overrides) -> MesaNetConfig:
    return MesaNetConfig(**{**SMALL, **overrides})


def make_model(cls=MesaNetForCausalLM, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A small model in evaluation mode, every parameter of it moved away from its initial value.

    Fresh weights would hide mistakes: norms of one, biases of zero and equal regularisers drop out of the formulas.
    The solver runs to convergence, so that two ways to the same token agree to rounding.
    """
    torch.manual_seed(seed)
    model = cls(make_config(**{"cg_tolerance": None, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model.to(dtype)


def random_ids(batch: int, length: int, seed: int = 1, vocab_size: int = SMALL["vocab_size"]) -> torch.Tensor:
    """Tokens `[batch, length]`, none of them 0, which is often a pad."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def states(cache: Cache) -> list[torch.Tensor]:
    """Every state tensor of the cache, in order."""
    return [
        state
        for layer in cache.layers
        for slots in (layer.conv_states, layer.recurrent_states)
        for state in slots.values()
        if state is not None
    ]
