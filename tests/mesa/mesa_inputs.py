# SPDX-License-Identifier: Apache-2.0
"""Inputs, and the comparison with the oracle, that the tests of the Mesa operator share.

Dimensions: B batch, S sequences (S = B unless packed), T tokens, H heads, K key size, V value size, C chunk size.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize, silu

from modeling_mesanet.mesa import MesaState, mesa_attention, mesa_reference, mesa_step

# Runs the solver until it cannot improve: every family is at its residual floor long before.
CONVERGED = {"max_steps": 500, "tolerance": None}

# What the operator promises against the oracle, as the larger of the two errors of `relative_error`.
FLOAT64_BOUND = 1e-8
FLOAT32_BOUND = 1e-5  # WELL_CONDITIONED families
FLOAT32_HARD_BOUND = 1e-4  # HARD families: condition numbers of fifty to some thousands

# Condition numbers of H + Lambda in the tens at most.
WELL_CONDITIONED = ("normal", "silu", "query_is_key", "strong", "mixed", "large_values")
HARD = ("scream", "scream_query", "rank8", "cluster4", "power")
FAMILIES = WELL_CONDITIONED + HARD
# One token over and over, under the bound on the forget gate: over hundreds of tokens, float32 exceeds both bounds.
REPEAT = "repeat"


class Inputs(NamedTuple):
    """Arguments of the operators: q, k `[B, T, H, K]`, v `[B, T, H, V]`, gates `[B, T, H]`, lam `[H, K]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_gamma: torch.Tensor
    beta: torch.Tensor
    lam: torch.Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(tensor.to(dtype) for tensor in self))

    def tokens(self, start: int | None, end: int | None) -> "Inputs":
        """The tokens from `start` up to `end`."""
        return Inputs(*(tensor[:, start:end] for tensor in self[:5]), self.lam)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(
    family: str = "mixed",
    batch: int = 2,
    length: int = 150,
    heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 12,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs of one of `FAMILIES`, or `REPEAT`; the values do not depend on `dtype` but for rounding."""
    source = generator(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=source, dtype=torch.float64)

    gates = (batch, length, heads)
    q, k, v = normal(*gates, key_dim), normal(*gates, key_dim), normal(*gates, value_dim)
    gamma, beta, lam = uniform(0.9, 0.999, *gates), normal(*gates).sigmoid(), uniform(0.5, 1.5, heads, key_dim)
    if family in (*HARD, REPEAT):  # strong inputs, weak regularisation
        beta, lam = uniform(0.95, 1.0, *gates), torch.full_like(lam, 0.25)
    match family:
        case "normal":
            pass
        case "silu":  # what the convolution's SiLU makes of keys: they share a mean direction
            q, k = silu(q + 0.5), silu(k + 0.5)
        case "query_is_key":
            q = k.clone()
        case "strong":
            gamma = uniform(0.05, 0.5, *gates)
        case "mixed":  # strong and weak forgetting, resets, pads (beta = 0 and gamma = 1)
            gamma = torch.where(uniform(0, 1, *gates) < 0.5, gamma, uniform(0.05, 1.0, *gates))
            gamma[uniform(0, 1, *gates) < 0.05] = 0
            pad = uniform(0, 1, *gates) < 0.1
            gamma[pad], beta[pad] = 1, 0
        case "large_values":
            v = 1000 * v
        case "scream" | "scream_query":  # one token repeated, nothing forgotten
            center = normal(1, 1, heads, key_dim)
            gamma, k = torch.ones_like(gamma), center + 0.03 * k
            if family == "scream_query":
                q = center + 0.3 * q
        case "repeat":  # a long run of spaces
            q, k, v, beta = (tensor[:, :1].expand_as(tensor).clone() for tensor in (q, k, v, beta))
            gamma = 1 - 0.0025 * beta**2
        case "rank8":
            basis = normal(heads, 8, key_dim)
            gamma, k = uniform(0.99, 1.0, *gates), torch.einsum("bthr,hrk->bthk", normal(*gates, 8), basis)
        case "cluster4":
            centers = normal(4, key_dim)
            choice = torch.randint(0, 4, gates, generator=source)
            gamma, k = uniform(0.99, 1.0, *gates), centers[choice] + 0.05 * k
        case "power":
            gamma, k = torch.ones_like(gamma), k / torch.arange(1, key_dim + 1)
        case _:
            raise ValueError(f"there is no family {family!r}; take one of {FAMILIES}.")
    return Inputs(*(tensor.to(dtype) for tensor in (q, k, v, gamma.log(), beta, lam)))


def make_state(
    sequences: int, heads: int, key_dim: int, value_dim: int, *, seed: int = 1, dtype: torch.dtype = torch.float64
) -> MesaState:
    """A state as some thirty normal keys leave it: `H` symmetric positive semi-definite."""
    source = generator(seed)
    k = normalize(torch.randn(sequences, heads, 30, key_dim, generator=source, dtype=torch.float64), dim=-1)
    v = torch.randn(sequences, heads, 30, value_dim, generator=source, dtype=torch.float64)
    return MesaState((k.mT @ k).to(dtype), (k.mT @ v).to(dtype))


def cu_seqlens_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


OUTPUTS = ("o", "final_h", "final_g")


def evaluate(
    operator,
    inputs: Inputs,
    initial_state: MesaState | None = None,
    differentiated: tuple[str, ...] = OUTPUTS,
    **options,
) -> dict[str, torch.Tensor]:
    """Output, final states and every gradient of `operator(*inputs, ...) -> (o, (H, G))`, by name.

    The gradients are those of a random weighted sum of the outputs named in `differentiated`.
    """
    leaves = dict(zip(Inputs._fields, inputs, strict=True))
    if initial_state is not None:
        leaves |= {"initial_h": initial_state[0], "initial_g": initial_state[1]}
        options["initial_state"] = None
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    if initial_state is not None:
        options["initial_state"] = (leaves["initial_h"], leaves["initial_g"])
    o, (h, g) = operator(*(leaves[name] for name in Inputs._fields), **options)
    outputs = dict(zip(OUTPUTS, (o, h, g), strict=True))
    source = generator(2)
    weights = {name: torch.randn(t.shape, generator=source, dtype=torch.float64).to(t) for name, t in outputs.items()}
    # An input that the output does not depend on (lam without the solver) has a gradient of zero.
    grads = torch.autograd.grad(
        [outputs[name] for name in differentiated],
        list(leaves.values()),
        [weights[name] for name in differentiated],
        materialize_grads=True,
    )
    outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    return outputs | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def chunkwise(*inputs: torch.Tensor, **options) -> tuple[torch.Tensor, MesaState]:
    """`mesa_attention` as `evaluate` calls it."""
    output = mesa_attention(*inputs, output_final_state=True, **options)
    return output.o, output.final_state


def token_by_token(
    inputs: Inputs, initial_state: MesaState | None = None, **options
) -> tuple[torch.Tensor, MesaState]:
    """`mesa_step` on one token after the other, from zeros or from a copy of `initial_state`."""
    if initial_state is None:
        (batch, _, heads, key_dim), value_dim = inputs.k.shape, inputs.v.shape[-1]
        dtype = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
        initial_state = MesaState(
            torch.zeros(batch, heads, key_dim, key_dim, dtype=dtype, device=inputs.q.device),
            torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=inputs.q.device),
        )
    state = MesaState(*(tensor.clone() for tensor in initial_state))
    steps = (mesa_step(*inputs.tokens(t, t + 1), state, **options).o for t in range(inputs.q.shape[1]))
    return torch.cat(list(steps), dim=1), state


def oracle(inputs: Inputs, initial_state: MesaState | None = None, **options) -> dict[str, torch.Tensor]:
    """What `evaluate` should have found for the same inputs and options, by the oracle in float64."""
    state = None if initial_state is None else MesaState(*(tensor.double() for tensor in initial_state))
    return evaluate(mesa_reference, inputs.to(torch.float64), state, **options)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger of the relative errors in the Euclidean and in the maximum norm; 0 for 0 against 0, NaN for a NaN."""
    actual, expected = actual.double().flatten(), expected.double().flatten()
    if not expected.numel() or torch.equal(actual, expected):
        return 0.0
    orders = torch.tensor([2.0, torch.inf])
    errors = [(actual - expected).norm(order) / expected.norm(order) for order in orders.tolist()]
    return torch.stack(errors).max().item()


def float32_bound(family: str) -> float:
    return FLOAT32_HARD_BOUND if family in HARD else FLOAT32_BOUND


def errors(actual: dict, expected: dict) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape, name
    return {name: relative_error(tensor, expected[name]) for name, tensor in actual.items()}


def assert_close(actual: dict, expected: dict, bound: float) -> None:
    """Every tensor of `actual` is within `bound` of its namesake; names the ones that are not."""
    # Written so that NaN, which compares false, fails.
    bad = {name: error for name, error in errors(actual, expected).items() if not error <= bound}
    assert not bad, f"relative errors above {bound}: {bad}"
