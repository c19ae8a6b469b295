# SPDX-License-Identifier: Apache-2.0
"""The Mesa layer's operators: `mesa_attention` (sequences), `mesa_step` (one token), `mesa_reference` (the oracle)."""

from .mesa_dispatch import BackendError, requested_backend, select_backend
from .mesa_layers import (
    PadOrder,
    add_linear,
    decode_layer,
    decodes_layer,
    fuses_linears,
    gates,
    head_norm,
    norm_gated_linears,
    norm_linears,
    prefill_layer,
    prefills_layer,
    short_convolution,
    short_convolutions,
)
from .mesa_operator import (
    MesaOutput,
    MesaState,
    SolverStats,
    check_solver,
    mesa_attention,
    mesa_states,
    mesa_step,
)
from .mesa_reference import mesa_reference

__all__ = [
    "BackendError",
    "MesaOutput",
    "MesaState",
    "PadOrder",
    "SolverStats",
    "add_linear",
    "check_solver",
    "decode_layer",
    "decodes_layer",
    "fuses_linears",
    "gates",
    "head_norm",
    "mesa_attention",
    "mesa_reference",
    "mesa_states",
    "mesa_step",
    "norm_gated_linears",
    "norm_linears",
    "prefill_layer",
    "prefills_layer",
    "requested_backend",
    "select_backend",
    "short_convolution",
    "short_convolutions",
]
