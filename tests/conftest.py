# SPDX-License-Identifier: Apache-2.0
"""What the tests share: fixtures for small models, and memory that is never silently zero."""

import pytest
import torch
from hypothesis import settings
from small_models import make_config, make_model

# Threads would only wait for one another over tensors this small.
torch.set_num_threads(1)

# The same examples in every run: a failure here is a failure everywhere.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None, max_examples=20)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory (`torch.empty`, `new_empty`, ...) reads as NaN, or as the largest integer."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Filling belongs to the deterministic mode; only the filling is wanted, so operators without it must not fail.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


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
