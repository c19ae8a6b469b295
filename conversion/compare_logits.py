# SPDX-License-Identifier: Apache-2.0
"""Comparing a checkpoint in fla's format with the same one here: logits on random tokens, where fla runs."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from ..loading import load_checkpoint
from ..mesa.mesa_solver import l2_normalize

# Largest relative difference of the logits, by the dtype that the model runs in.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class LogitComparison(NamedTuple):
    """Differences of logits, relative to their root mean square: `||a - b|| / ||b||` over all tokens.

    `difference`: ours to fla's. `ours`, `fla`: of either to fla with its exact float32 reference for its kernels.
    """

    dtype: torch.dtype
    tokens: int
    difference: float
    ours: float
    fla: float

    @property
    def tolerance(self) -> float:
        """What the difference may be."""
        return TOLERANCES[self.dtype]

    @property
    def ok(self) -> bool:
        """Whether ours agree with fla's, or else with its own reference, so that the difference is fla's own error."""
        return min(self.difference, self.ours) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} random tokens in {str(self.dtype).removeprefix('torch.')} differ by "
            f"{self.difference:.1e} (tolerance {self.tolerance:.0e}); from fla with its exact reference ours differ "
            f"by {self.ours:.1e}, fla's by {self.fla:.1e}"
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

    peer = FlaMesaNetForCausalLM.from_pretrained(fla_folder, dtype="auto" if dtype is None else dtype)
    dtype = peer.dtype if peer.dtype in TOLERANCES else torch.float32
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(peer.config.vocab_size, (batch, length), generator=generator).to(device)
    with torch.inference_mode():
        peer = peer.to(device=device, dtype=dtype).eval()
        theirs = peer(tokens, use_cache=False).logits.double()
        with exact_reference():
            exact = peer(tokens, use_cache=False).logits.double()
        del peer
        ours = load_checkpoint(mesanet_folder, dtype=dtype, device=device, argument="destination")
        logits = ours(tokens, use_cache=False).logits.double()
    return LogitComparison(
        dtype,
        tokens.numel(),
        relative_difference(logits, theirs),
        relative_difference(logits, exact),
        relative_difference(theirs, exact),
    )


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """`||a - b|| / ||b||`."""
    return ((a - b).norm() / b.norm()).item()


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
