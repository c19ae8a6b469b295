# SPDX-License-Identifier: Apache-2.0
"""What the tests share: small models, and memory that is never silently zero."""

import pytest
import torch
from hypothesis import settings

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM

# Threads would only wait for one another over tensors this small.
torch.set_num_threads(1)

# The same examples in every run: a failure here is a failure everywhere.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None, max_examples=20)
settings.load_profile("reproducible")

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


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory (`torch.empty`, `new_empty`, ...) reads as NaN, or as the largest integer."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling belongs to the deterministic mode; only the filling is wanted, so operators without it must not fail.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


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


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**overrides)` makes a small config."""
    return make_config


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(cls, seed=, dtype=, **overrides)` makes a small model in evaluation mode."""
    return make_model


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers with a fixed seed."""
    return torch.Generator().manual_seed(0)
