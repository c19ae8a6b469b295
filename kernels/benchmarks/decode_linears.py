# SPDX-License-Identifier: Apache-2.0
"""Times the projections of a decoding step: the fused kernels beside torch's operators, in CUDA graphs.

    python kernels/benchmarks/decode_linears.py
    python kernels/benchmarks/decode_linears.py --batches 1,64 --variants "table; ahead"

For each launch of a layer of the 1B preset, each batch size and each choice of blocks: microseconds, and GB/s of the
weights. A graph goes through as many layers' weights as fill the L2 cache several times, so that none is read from
there. Every result is first compared with torch's; one that differs is not timed. A variant of a batch size takes some
five seconds, nearly all to compile. Prints a table and writes nothing.
"""

import functools
import statistics
from typing import Annotated
from unittest import mock

import torch
import torch.nn.functional as F
import typer

from modeling_mesanet import MesaNetConfig
from modeling_mesanet.mesa import mesa_triton_linear as fused

EPSILON = 1e-6

# What each variant changes in every entry of the table.
VARIANTS = {
    "table": {},
    "ahead": {"ahead": True},
    "overlap": {"overlap": True},
    "overlap, ahead": {"overlap": True, "ahead": True},
    "8 rows": {"rows": 8},
    "32 rows": {"rows": 32},
    "8 warps": {"slices": 8, "warps": 8, "stages": 3},
    "registers": fused.REGISTERS._asdict(),
    "registers, 8 rows": fused.REGISTERS._replace(rows=8)._asdict(),
}

# Bytes that the weights of a graph have at least, and replays of it that are timed.
BYTES = 1 << 30
REPLAYS = 20


class Layer:
    """Random weights of one layer, and its four launches fused and in torch."""

    def __init__(self, config: MesaNetConfig):
        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5

        hidden, channels = config.hidden_size, config.num_attention_heads * config.head_dim
        self.norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.inputs = [weight(size, hidden) for size in (channels, channels, channels)]
        self.inputs += [weight(config.num_attention_heads, hidden) for _ in range(2)]
        self.output = weight(hidden, channels)
        self.gate, self.up = (weight(config.intermediate_size, hidden) for _ in range(2))
        self.down = weight(hidden, config.intermediate_size)

    def weights(self, launch: str) -> list[torch.Tensor]:
        return {
            "norm + q, k, v, gates": self.inputs,
            "output projection + residual": [self.output],
            "norm + gate, up, silu": [self.gate, self.up],
            "down projection + residual": [self.down],
        }[launch]

    def fused(self, launch: str, x: torch.Tensor, wide: torch.Tensor) -> list[torch.Tensor]:
        weights = self.weights(launch)
        if launch == "norm + q, k, v, gates":
            return fused.launch_norm_linears(x, self.norm, EPSILON, weights, 3)
        if launch == "norm + gate, up, silu":
            return [fused.launch_norm_gated_linears(x, self.norm, EPSILON, *weights)]
        return [fused.launch_add_linear(wide if launch.startswith("down") else x, weights[0], x)]

    def torch(self, launch: str, x: torch.Tensor, wide: torch.Tensor) -> list[torch.Tensor]:
        weights = self.weights(launch)
        if launch == "norm + q, k, v, gates":
            n = F.rms_norm(x, self.norm.shape, self.norm, EPSILON)
            return [F.linear(n, w) for w in weights[:3]] + [F.linear(n.float(), w.float()) for w in weights[3:]]
        if launch == "norm + gate, up, silu":
            n = F.rms_norm(x, self.norm.shape, self.norm, EPSILON)
            return [F.silu(F.linear(n, weights[0])) * F.linear(n, weights[1])]
        return [x + F.linear(wide if launch.startswith("down") else x, weights[0])]


LAUNCHES = (
    "norm + q, k, v, gates",
    "output projection + residual",
    "norm + gate, up, silu",
    "down projection + residual",
)


def microseconds(function, layers: list[Layer]) -> float:
    """Median time of `function(layer)` inside a graph that calls it once for every layer."""
    function(layers[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            function(layer)
    times = []
    for replay in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(layers)


def call(method: str, launches: tuple[str, ...], x: torch.Tensor, wide: torch.Tensor, layer: Layer) -> None:
    """The launches of a layer one after the other, "fused" or in "torch"."""
    for launch in launches:
        getattr(layer, method)(launch, x, wide)


def differs(layer: Layer, launch: str, x: torch.Tensor, wide: torch.Tensor) -> bool:
    pairs = zip(layer.fused(launch, x, wide), layer.torch(launch, x, wide), strict=True)
    return any(not (ours.float() - theirs.float()).norm() <= 1e-2 * theirs.float().norm() for ours, theirs in pairs)


def main(
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8,16,64",
    variants: Annotated[str, typer.Option(help=f"separated by ';', of: {'; '.join(VARIANTS)}")] = "table; overlap",
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; the kernels cannot be timed here.")
    chosen = [name.strip() for name in variants.split(";")]
    for name in chosen:
        if name not in VARIANTS:
            raise typer.BadParameter(f"variant {name!r} does not exist; choose from {'; '.join(VARIANTS)}.")
    config = MesaNetConfig.preset("1B")
    probe = Layer(config)
    bytes_of = {launch: sum(2 * weight.numel() for weight in probe.weights(launch)) for launch in LAUNCHES}
    layers = [probe] + [Layer(config) for _ in range(BYTES // sum(bytes_of.values()))]
    typer.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(layers)} layers, us and GB/s")
    columns = [*LAUNCHES, "all four, one layer"]
    bytes_of[columns[-1]] = sum(bytes_of.values())
    typer.echo(f"| batch | variant | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for batch in map(int, batches.split(",")):
        x = torch.randn(batch, 1, config.hidden_size, device="cuda", dtype=torch.bfloat16)
        wide = torch.randn(batch, 1, config.intermediate_size, device="cuda", dtype=torch.bfloat16)
        for name in ("torch", *chosen):
            table = {key: entry._replace(**VARIANTS.get(name, {})) for key, entry in fused.TABLE.items()}
            method, cells = ("torch" if name == "torch" else "fused"), []
            with mock.patch.object(fused, "TABLE", table):
                for column in columns:
                    launches = LAUNCHES if column == columns[-1] else (column,)
                    try:
                        if method == "fused" and any(differs(probe, launch, x, wide) for launch in launches):
                            cells.append("wrong")
                            continue
                        us = microseconds(functools.partial(call, method, launches, x, wide), layers)
                        cells.append(f"{us:.2f} us, {bytes_of[column] / us / 1e3:.0f}")
                    except Exception as error:  # a compiler or driver fails in many ways, and each is a result
                        cells.append(type(error).__name__)
            typer.echo(f"| {batch} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
