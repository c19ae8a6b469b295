# SPDX-License-Identifier: Apache-2.0
"""The Mesa layer's operators: `mesa_attention` (sequences), `mesa_step` (one token), `mesa_reference` (the oracle)."""

from .mesa_operator import (
    MesaOutput,
    MesaState,
    SolverStats,
    check_solver,
    mesa_attention,
    mesa_step,
    select_backend,
)
from .mesa_reference import mesa_reference
from .mesa_triton_solve import BackendError

__all__ = [
    "BackendError",
    "MesaOutput",
    "MesaState",
    "SolverStats",
    "check_solver",
    "mesa_attention",
    "mesa_reference",
    "mesa_step",
    "select_backend",
]
