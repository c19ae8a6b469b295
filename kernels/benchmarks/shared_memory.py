# SPDX-License-Identifier: Apache-2.0
"""Shared memory that the Triton kernels need on each kind of GPU, found by compiling them; no GPU is needed.

    python kernels/benchmarks/shared_memory.py
    python kernels/benchmarks/shared_memory.py --dtype float32 --sizes 64

Prints a markdown table, which `kernels/README.md` quotes; bold is more than the device has. The launches are those of
the code: a forward pass, a backward pass and a decoding step run on a few tokens with recorders in place of the
kernels, and what they would have launched is compiled for every device. What surrounds the operator in a layer is that
of HEADS heads, with a hidden size of HEADS * K. (For a T4, where it is never launched, triton ends the process.)
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
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
    torch.bool: "*i1",
}
HEADS, WIDTH = 12, 4


class Launch(NamedTuple):
    """A kernel and the keywords it was launched with."""

    kernel: object
    arguments: dict

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        if name.startswith("solve_chunks"):
            name += ", backward" if self.arguments["BACKWARD"] else ", forward"
        options = {"LAYER": "layer", "PACKED": "packed"}
        return ", ".join([name, *(word for option, word in options.items() if self.arguments.get(option))])


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


def record_surroundings(size: int, dtype: torch.dtype) -> list[Launch]:
    """What a layer launches around its operator, each kernel once: forward, backward, without gradients, one token."""
    from modeling_mesanet.mesa import mesa_triton, mesa_triton_decode, mesa_triton_layers, mesa_triton_linear
    from modeling_mesanet.mesa.mesa_layers import MANY_ROWS

    launches: list[Launch] = []
    hidden = HEADS * size

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def patched(module: ModuleType, gluon: Callable | None = None) -> None:
        names = [name for name in vars(module) if name.endswith("_kernel") and name != "gluon_kernel"]
        kernels = {name: Recorder(getattr(module, name), launches) for name in names}
        if module is mesa_triton_decode:
            kernels["gluon_kernel"] = lambda *arguments: gluon
        stack.enter_context(mock.patch.multiple(module, **kernels))

    x, taps, state = zeros(1, 64, hidden), zeros(hidden, WIDTH), zeros(1, hidden, WIDTH - 1)
    bounds, heads, norm = torch.tensor([0, 3, 64]), zeros(1, 64, HEADS, size), zeros(size)
    logits = [zeros(1, 64, HEADS, dtype=torch.float32) for _ in range(2)]
    biases = [zeros(HEADS, dtype=torch.float32) for _ in range(2)]
    with ExitStack() as stack:
        patched(mesa_triton_layers)
        patched(mesa_triton_linear)
        for history, packed in ((state, None), (None, bounds)):
            mesa_triton_layers.launch_short_convolution(x, taps, history, packed)
            new_state = zeros(1, hidden, 0 if packed is not None else WIDTH - 1)
            mesa_triton_layers.short_convolution_backward_op(x, new_state, x, taps, history, packed)
        mesa_triton_layers.launch_head_norm(heads, norm, 1e-6, heads)
        mesa_triton_layers.head_norm_backward_op(heads, heads, norm, 1e-6, heads)
        gates = (*logits, *biases, 0.99, torch.ones(1, 64, dtype=torch.bool))
        mesa_triton_layers.launch_gates(*gates)
        mesa_triton_layers.gates_backward_op(*logits, *gates)
        prefill = Recorder(mesa_triton.convolve_chunks_kernel, launches)
        stack.enter_context(mock.patch.object(mesa_triton, "convolve_chunks_kernel", prefill))
        layer = mesa_triton.Layer(heads, heads, None, None, None, True)
        layer.convolve([x] * 3, [taps] * 3, [state] * 3, logits, biases, 0.99)

        square, few, narrow = zeros(hidden, hidden), zeros(8, 1, hidden), [zeros(HEADS, hidden)] * 2
        projections = [square] * 4 + narrow
        mesa_triton_linear.launch_norm_linears(few, zeros(hidden), 1e-6, projections, 4)
        mesa_triton_linear.launch_add_linear(few, square, few)
        mesa_triton_linear.launch_norm_gated_linears(few, zeros(hidden), 1e-6, square, square)
        for rows in (MANY_ROWS - 1, MANY_ROWS):
            many = zeros(1, rows, hidden)
            mesa_triton_linear.launch_norm_linears(many, zeros(hidden), 1e-6, narrow, 0, copy=many.clone())
        mesa_triton_linear.gate_rows(many, many)

    gluons = [None]
    if size in mesa_triton_decode.GLUON_SIZES:
        from modeling_mesanet.mesa.mesa_gluon_decode import decode_gluon_kernel

        gluons.append(Recorder(decode_gluon_kernel, launches))
    token, states = zeros(1, 1, hidden), [zeros(1, HEADS, size, size, dtype=torch.float32) for _ in range(2)]
    for gluon in gluons:
        with ExitStack() as stack:
            patched(mesa_triton_decode, gluon)
            mesa_triton_decode.triton_decode_layer(
                *(token, token, token),
                *(each[:, :1] for each in logits),
                *(state, state, state),
                *states,
                *(taps, taps, taps),
                *biases,
                zeros(HEADS, size, dtype=torch.float32),
                norm,
                token,
                torch.ones(1, 1, dtype=torch.bool),
                *(0.99, 0.25, 1e-6, 30, None),
            )
    return list({launch.name: launch for launch in launches}.values())


def compiled_bytes(launch: Launch, capability: int) -> int:
    """Bytes of shared memory of a program, compiled for `capability`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    options = {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}
    constants, attributes = {}, {}

    def described(value: object, *place: int) -> str | tuple:
        if isinstance(value, tuple):
            return tuple(described(item, *place, index) for index, item in enumerate(value))
        if value is None:
            constants[place] = None
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    signature = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = described(value, index)
    source = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else triton.compiler.ASTSource
    source = source(launch.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def measured(capability: int, size: int, dtype: torch.dtype, around: bool) -> dict[str, int | None]:
    """Bytes by kernel, with those `around` the operator; None where it does not compile."""
    found = {}
    for launch in (*record(capability, size, dtype), *(record_surroundings(size, dtype) if around else ())):
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
    around: Annotated[str, typer.Option(help="of these, those with all of a layer")] = "80,86,89,90",
) -> None:
    capabilities = [int(device) for device in devices.split(",")]
    kinds = [f"{DEVICES[c][0]} ({c // 10}.{c % 10}), {DEVICES[c][1] // 1024} kB" for c in capabilities]
    typer.echo(f"| {dtype}, kB a program | K = V | {' | '.join(kinds)} |\n| --- | --- |{' --- |' * len(kinds)}")
    for size in map(int, sizes.split(",")):
        found = {c: measured(c, size, getattr(torch, dtype), str(c) in around.split(",")) for c in capabilities}
        for name in dict.fromkeys(name for kernels in found.values() for name in kernels):
            cells = []
            for capability, kernels in found.items():
                used = kernels.get(name, math.nan)
                cell = "does not compile" if used is None else "-" if math.isnan(used) else f"{used / 1024:.1f}"
                cells.append(f"**{cell}**" if used is not None and used > DEVICES[capability][1] else cell)
            typer.echo(f"| {name} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
