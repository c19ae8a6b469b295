# SPDX-License-Identifier: Apache-2.0
"""Cases for the chunkwise Triton kernels, and a program that runs them in Triton's interpreter on a CPU.

`python interpreted_triton.py NAME ...` prints a JSON object: for each case the relative errors against the oracle. It
is a process of its own because Triton reads TRITON_INTERPRET when the kernels are defined.
"""

import contextlib
import json
import sys
import warnings
from typing import NamedTuple
from unittest import mock

import torch
from mesa_inputs import Inputs, chunkwise, cu_seqlens_of, errors, evaluate, make_inputs, make_state, oracle

from modeling_mesanet.mesa import mesa_states

CONVERGED = {"max_steps": 96, "tolerance": None}


class Case(NamedTuple):
    """One call: the family and sizes of its inputs (batch 2, or the packed `lengths`), and how it is called."""

    family: str = "silu"
    length: int = 100
    key_dim: int = 16
    value_dim: int = 16
    lengths: tuple[int, ...] | None = None
    has_state: bool = False
    segmented: bool = False
    dtype: torch.dtype = torch.float32
    options: dict = {}
    key_scale: float = 1.0


CASES = {
    "initial_state": Case("mixed", 100, has_state=True),
    "packed": Case("silu", 150, 32, 16, lengths=(10, 0, 1, 100, 39)),
    "packed_with_states": Case("mixed", 75, lengths=(0, 70, 5), has_state=True),
    "segments": Case("mixed", 450, segmented=True),
    "continued_segments": Case("mixed", 450, has_state=True, segmented=True),
    "packed_segments": Case("mixed", 400, lengths=(10, 1, 0, 330, 59), has_state=True, segmented=True),
    "wide_keys": Case("silu", 40, 136, 16),
    "wide_values": Case("silu", 40, 16, 200),
    "padded_sizes": Case("rank8", 70, 48, 24),
    "one_token": Case("normal", 1, has_state=True),
    "without_solver": Case("silu", 80, options={"max_steps": 0}),
    "unnormalized": Case("normal", 70, options={"normalize_qk": False}, key_scale=0.3),
    # Products beyond float16, and more steps than there are channels.
    "unnormalized_long_keys": Case("normal", 70, options={"normalize_qk": False, "max_steps": 150}, key_scale=20.0),
    "nearly_constant_keys": Case("scream", 100, 32, 32),
    "large_values": Case("large_values", 70),
    "strong_forgetting": Case("strong", 70),
    "float16": Case("silu", 70, 32, 16, dtype=torch.float16),
    "bfloat16": Case("rank8", 130, 32, 16, dtype=torch.bfloat16),
}


def compare(case: Case, device: str = "cpu", backend: str = "triton") -> dict[str, float]:
    """Relative errors of outputs, final states and gradients against the oracle, which gets the rounded inputs.

    `states_h` and `states_g` are the final states by themselves, of `mesa_states`, which takes no packed sequences.
    """
    batch = 2 if case.lengths is None else 1
    inputs = make_inputs(case.family, batch, case.length, 2, case.key_dim, case.value_dim, dtype=torch.float32)
    inputs = Inputs(*(tensor.to(case.dtype) for tensor in inputs[:3]), *inputs[3:])
    inputs = inputs._replace(k=inputs.k * case.key_scale)
    sequences = batch if case.lengths is None else len(case.lengths)
    sizes = (sequences, 2, case.key_dim, case.value_dim)
    state = make_state(*sizes, dtype=torch.float32) if case.has_state else None
    packed = {} if case.lengths is None else {"cu_seqlens": cu_seqlens_of(list(case.lengths))}
    options = {**CONVERGED, **case.options}
    exact = {"solve": options["max_steps"] > 0, "normalize_qk": options.get("normalize_qk", True)}
    expected = oracle(inputs, state, **packed, **exact)
    on_device = Inputs(*(tensor.to(device) for tensor in inputs))
    state = None if state is None else type(state)(*(tensor.to(device) for tensor in state))
    packed = {name: tensor.to(device) for name, tensor in packed.items()}
    with small_segments() if case.segmented else contextlib.nullcontext():
        actual = evaluate(chunkwise, on_device, state, backend=backend, **packed, **options)
        if case.lengths is None:
            normalize_k = options.get("normalize_qk", True)
            alone = mesa_states(*on_device[1:5], initial_state=state, normalize_k=normalize_k, backend=backend)
            actual |= {"states_h": alone.h, "states_g": alone.g}
            expected |= {"states_h": expected["final_h"], "states_g": expected["final_g"]}
    return errors({name: tensor.cpu() for name, tensor in actual.items()}, expected)


@contextlib.contextmanager
def small_segments():
    """Cut sequences into segments of two or three chunks."""
    from modeling_mesanet.mesa import mesa_triton

    wishes = {name: getattr(mesa_triton, name)._replace(programs=1 << 20) for name in ("CARRY", "HOPPER_CARRY")}
    with mock.patch.multiple(mesa_triton, MIN_SEGMENT_CHUNKS=2, **wishes):
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Uninitialised memory reads as NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")  # the interpreter divides zeros of rows that have converged
    print(json.dumps({name: compare(CASES[name]) for name in sys.argv[1:]}))
