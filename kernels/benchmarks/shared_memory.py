# SPDX-License-Identifier: Apache-2.0
"""Shared memory that the Triton kernels need on each kind of GPU, found by compiling them; no GPU is needed.

    python kernels/benchmarks/shared_memory.py
    python kernels/benchmarks/shared_memory.py --dtype float32 --sizes 64

Prints a markdown table, which `kernels/README.md` quotes; bold is more than the device has. The launches are those of
the code: a forward pass, a backward pass and a decoding step run on a few tokens with recorders in place of the
kernels, and what they would have launched is compiled for every device.
"""

import math
from typing import Annotated, NamedTuple
from unittest import mock

import torch
import typer

# Compute capability, an example, and the shared memory in bytes that a program may have there.
DEVICES = {
    75: ("T4", 65536),
    80: ("A100", 166912),
    86: ("RTX 3090", 101376),
    89: ("RTX 4090", 101376),
    90: ("H100", 232448),
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """A kernel and the keywords it was launched with."""

    kernel: object
    arguments: dict

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        if name.startswith("solve_chunks"):
            name += ", backward" if self.arguments["BACKWARD"] else ", forward"
        return name


class Recorder:
    """Takes the place of a kernel: notes its launches and does nothing."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments))


def record(capability: int, size: int, dtype: torch.dtype) -> list[Launch]:
    """What a layer with heads of K = V = `size` launches, each kernel once (the solve twice)."""
    from modeling_mesanet.mesa import mesa_triton, mesa_triton_decode

    launches: list[Launch] = []
    hopper = None
    if capability == 90:
        from modeling_mesanet.mesa.mesa_hopper_solver import solve_chunks_hopper_kernel

        hopper = Recorder(solve_chunks_hopper_kernel, launches)
    qkv = [torch.zeros(1, 64, 2, size, dtype=dtype) for _ in range(3)]
    gates = [torch.zeros(1, 64, 2) for _ in range(2)]
    lam = torch.ones(2, size)
    names = [name for name in vars(mesa_triton) if name.endswith("_kernel") and name != "hopper_kernel"]
    kernels = {name: Recorder(getattr(mesa_triton, name), launches) for name in names}
    device = {"hopper_kernel": lambda device: hopper, "shared_memory_of": lambda device: DEVICES[capability][1]}
    with mock.patch.multiple(mesa_triton, **kernels, **device, is_hopper=lambda device: capability == 90):
        *_, x, x_rest, x_unit = mesa_triton.triton_chunkwise(
            *qkv, *gates, lam, None, None, None, 30, None, 30, None, True, True, False
        )
        mesa_triton.triton_chunkwise_backward(
            qkv[2], None, None, x, x_rest, x_unit, *qkv, *gates, lam, None, None, None, 30, None, True
        )
    token = [tensor[:, 0] for tensor in (*qkv, *gates)]
    states = [torch.zeros(1, 2, size, size) for _ in range(2)]
    decoder, gluon = Recorder(mesa_triton_decode.decode_kernel, launches), None
    if capability >= 80 and size in mesa_triton_decode.GLUON_SIZES:
        from modeling_mesanet.mesa.mesa_gluon_decode import decode_gluon_kernel

        gluon = Recorder(decode_gluon_kernel, launches)
    for kernel in (None, gluon):
        chosen = {"decode_kernel": decoder, "gluon_kernel": lambda *arguments, kernel=kernel: kernel}
        with mock.patch.multiple(mesa_triton_decode, **chosen):
            mesa_triton_decode.triton_decode_step(*token, lam, *states, 30, None)
    return list({launch.name: launch for launch in launches}.values())


def compiled_bytes(launch: Launch, capability: int) -> int:
    """Bytes of shared memory of a program, compiled for `capability`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    source = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else triton.compiler.ASTSource
    source = source(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def measured(capability: int, size: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Bytes by kernel; None where it does not compile."""
    found = {}
    for launch in record(capability, size, dtype):
        try:
            found[launch.name] = compiled_bytes(launch, capability)
        except Exception as error:  # a compiler fails in many ways, and each is a result
            typer.echo(f"{launch.name}, {size}, {capability}: {type(error).__name__}: {error}", err=True)
            found[launch.name] = None
    return found


def main(
    dtype: Annotated[str, typer.Option(help="of q, k and v: float16, bfloat16 or float32")] = "float16",
    sizes: Annotated[str, typer.Option(help="K = V, separated by commas")] = "64,128",
    devices: Annotated[str, typer.Option(help="compute capabilities, without the dot")] = "75,80,86,89,90",
) -> None:
    capabilities = [int(device) for device in devices.split(",")]
    kinds = [f"{DEVICES[c][0]} ({c // 10}.{c % 10}), {DEVICES[c][1] // 1024} kB" for c in capabilities]
    typer.echo(f"| {dtype}, kB a program | K = V | {' | '.join(kinds)} |\n| --- | --- |{' --- |' * len(kinds)}")
    for size in map(int, sizes.split(",")):
        found = {c: measured(c, size, getattr(torch, dtype)) for c in capabilities}
        for name in dict.fromkeys(name for kernels in found.values() for name in kernels):
            cells = []
            for capability, kernels in found.items():
                used = kernels.get(name, math.nan)
                cell = "does not compile" if used is None else "-" if math.isnan(used) else f"{used / 1024:.1f}"
                cells.append(f"**{cell}**" if used is not None and used > DEVICES[capability][1] else cell)
            typer.echo(f"| {name} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
