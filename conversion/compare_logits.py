# SPDX-License-Identifier: Apache-2.0
"""Comparing a checkpoint in fla's format with the same one here: logits on random tokens, where fla runs."""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from transformers import PreTrainedModel

from ..loading import load_checkpoint
from ..mesa.mesa_solver import l2_normalize

# Largest relative difference of the logits, by the dtype that the models run in.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}

# What ours may err, in units of what fla errs: two roundings of one function are not equally far from it.
PEER_MARGIN = 1.1

# Steps that solve any system to the floor of float32; a token that has got there stops.
_CONVERGED_STEPS = 256


class LogitComparison(NamedTuple):
    """How far logits of random tokens are apart, and from a reference: fla in float32 with its exact solver.

    Attributes:
        dtype: what fla's config.json says, in which fla's kernels and ours run with the steps of their configs.
        tokens: their number.
        ours_float32: ours in float32, solved to the end, to the reference (`relative_difference`). This proves that
            weights and config mean the same on both sides, because rounding is too small to hide what does not.
        difference: ours to fla's, both in `dtype` (`relative_difference`).
        ours, fla: of either in `dtype` to the reference (`typical_difference`).
    """

    dtype: torch.dtype
    tokens: int
    ours_float32: float
    difference: float
    ours: float
    fla: float

    @property
    def tolerance(self) -> float:
        """What `difference` may be, unless it is due to fla."""
        return TOLERANCES[self.dtype]

    @property
    def ok(self) -> bool:
        """Whether both compute the same function, and ours in `dtype` agree with fla's or err no more than they do."""
        same = self.ours_float32 <= TOLERANCES[torch.float32]
        return same and (self.difference <= self.tolerance or self.ours <= PEER_MARGIN * self.fla)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"logits of {self.tokens} random tokens differ from those of fla with its exact solver in float32 by "
            f"{self.ours_float32:.1e} where ours are solved to the end in float32 (at most "
            f"{TOLERANCES[torch.float32]:.0e}); in {dtype}, ours differ from fla's by {self.difference:.1e} (at most "
            f"{self.tolerance:.0e}, unless fla's own error is the cause), and a typical token's from the reference by "
            f"{self.ours:.1e}, fla's by {self.fla:.1e}"
        )


def why_fla_cannot_run() -> str | None:
    """Why fla cannot compute logits here, as part of a sentence; None if it can."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if not torch.cuda.is_available():
        return "flash-linear-attention needs a GPU"
    return None


def compare_logits(
    fla_folder: Path,
    mesanet_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    batch: int = 2,
    length: int = 200,
    seed: int = 0,
    device: str = "cuda",
) -> LogitComparison:
    """Run both checkpoints on the same random tokens.

    Args:
        fla_folder, mesanet_folder: the checkpoints.
        dtype: to run in; None is that of fla's config.json, or float32.
        batch, length: sizes of the tokens.
        seed: of the tokens.
        device: one that fla's kernels run on.

    Raises:
        CheckpointError: the checkpoint in `mesanet_folder` cannot be loaded.
    """
    from fla.models.mesa_net import MesaNetForCausalLM as FlaMesaNetForCausalLM

    def fla_model(dtype: torch.dtype | str) -> PreTrainedModel:
        return FlaMesaNetForCausalLM.from_pretrained(fla_folder, dtype=dtype).eval()

    def our_model(dtype: torch.dtype) -> PreTrainedModel:
        return load_checkpoint(mesanet_folder, dtype=dtype, device=device, argument="mesanet_folder")

    # One model is there at a time. That in float32 is loaded, not made of the other: the checkpoint may hold tensors
    # in float32 that rounding to its dtype would change.
    with torch.inference_mode():
        peer = fla_model("auto" if dtype is None else dtype)
        dtype = peer.dtype if peer.dtype in TOLERANCES else torch.float32
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(peer.config.vocab_size, (batch, length), generator=generator).to(device)
        theirs = _logits(peer.to(device, dtype), tokens)
        del peer
        with exact_reference():
            reference = _logits(fla_model(torch.float32).to(device), tokens)
        ours = _logits(our_model(dtype), tokens)
        ours_float32 = _logits(our_model(torch.float32), tokens, cg_tolerance=None, cg_max_steps=_CONVERGED_STEPS)
    return LogitComparison(
        dtype,
        tokens.numel(),
        ours_float32=relative_difference(ours_float32, reference),
        difference=relative_difference(ours, theirs),
        ours=typical_difference(ours, reference),
        fla=typical_difference(theirs, reference),
    )


def _logits(model: PreTrainedModel, tokens: torch.Tensor, **solver) -> torch.Tensor:
    """float64, in the memory of the host."""
    return model(tokens, use_cache=False, **solver).logits.cpu().double()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """`||a - b|| / ||b||` over all tokens: NaN where a number is."""
    return ((a - b).norm() / b.norm()).item()


def typical_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Geometric mean over the tokens of `||a - b|| / ||b||`, `a` and `b` `[batch, length, channels]`; inf for NaN.

    Layers amplify rounding, at some tokens a hundred times more than at others. Those few decide the difference over
    all tokens, and which of two roundings they hit harder is chance. Means of logarithms leave little to it.
    """
    differences = (a - b).norm(dim=-1) / b.norm(dim=-1)
    smallest = torch.finfo(torch.float32).eps  # a token without any difference must not decide either
    return differences.nan_to_num(nan=math.inf).clamp(min=smallest).log().mean().exp().item()


@contextmanager
def exact_reference() -> Iterator[None]:
    """Let fla's layers solve exactly: by the float32 reference that fla has beside its kernels."""
    from fla.ops.mesa_net.naive import naive_mesa_net_exact

    def solve(q, k, v, g, beta, lamb, h_kk_init=None, h_kv_init=None, **options):
        # The kernels normalise q and k themselves.
        q, k = l2_normalize(q.float()), l2_normalize(k.float())
        o, h_kk, h_kv = naive_mesa_net_exact(q, k, v, g, lamb, beta, h_kk_init, h_kv_init)
        return o.to(v.dtype), h_kk, h_kv

    with mock.patch("fla.layers.mesa_net.chunk_mesa_net", solve):
        yield
