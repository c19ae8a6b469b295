# SPDX-License-Identifier: Apache-2.0
"""Print the precision table of kernels/README.md: `python tests/mesa/measure_precision.py`.

One head in float32 against the oracle, for every family of inputs.
"""

from typing import Annotated

import torch
import typer
from mesa_inputs import (
    FAMILIES,
    REPEAT,
    Inputs,
    chunkwise,
    errors,
    evaluate,
    make_inputs,
    oracle,
    relative_error,
    token_by_token,
)
from rich.progress import track

from modeling_mesanet.mesa import mesa_attention

HEADER = (
    "| inputs | condition | o, 200 steps | gradients, 200 steps | o, 30 steps | step, 200 steps "
    "| o, tolerance 1e-4 | gradients, 1e-4 | steps, mean/max |"
)


def row(family: str, length: int, size: int, device: str) -> str:
    inputs = make_inputs(family, 1, length, 1, size, size, dtype=torch.float32)
    expected = oracle(inputs)
    condition = torch.linalg.cond(expected["final_h"] + torch.diag_embed(inputs.lam.double())).max().item()
    inputs = Inputs(*(tensor.to(device) for tensor in inputs))

    def measure(**solver) -> tuple[str, str]:
        actual = evaluate(chunkwise, inputs, **solver)
        found = errors({name: tensor.cpu() for name, tensor in actual.items()}, expected)
        return f"{found['o']:.0e}", f"{max(error for name, error in found.items() if name.startswith('d_')):.0e}"

    converged, published, adaptive = ({"max_steps": 200}, {"max_steps": 30}, {"max_steps": 64, "tolerance": 1e-4})
    steps = mesa_attention(*inputs, **adaptive, output_stats=True).stats.steps
    step = relative_error(token_by_token(inputs, **converged)[0].cpu(), expected["o"])
    cells = [family, f"{condition:.0f}", *measure(**converged), measure(**published)[0], f"{step:.0e}"]
    cells += [*measure(**adaptive), f"{steps.float().mean():.0f}/{steps.max()}"]
    return f"| {' | '.join(cells)} |"


def main(
    length: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    size: Annotated[int, typer.Option(help="Key and value size.")] = 128,
    device: Annotated[str, typer.Option(help="Where the operator runs; the oracle runs on the CPU.")] = "cpu",
) -> None:
    rows = [row(family, length, size, device) for family in track((*FAMILIES, REPEAT), "Measuring")]
    print("\n".join([HEADER, "|" + " --- |" * 9, *rows]))


if __name__ == "__main__":
    typer.run(main)
