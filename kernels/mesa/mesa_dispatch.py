# SPDX-License-Identifier: Apache-2.0
"""Which backend runs the Mesa layer: the one place where that is decided.

"torch" runs on every device. "triton" needs an NVIDIA GPU that the kernels know, and a triton that imports. "auto"
takes triton where it runs and, the first time on a device and for a head size, agrees with torch on a small problem.
"""

import functools
import os
import warnings

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Environment variable: the backend where neither an argument nor the model's config names one.
BACKEND_VARIABLE = "MESANET_BACKEND"
BACKENDS = ("auto", "triton", "torch")

# Triton has no tensor core products for older devices (such as 7.5): it multiplies there number by number, in tiles
# that do not fit the registers.
OLDEST_CAPABILITY = (8, 0)

# Largest key and value size of the kernels.
LARGEST_HEAD = 256

# Relative difference to torch that the first use on a device lets pass; both solve to a residual of 1e-6.
SELF_TEST_TOLERANCE = 1e-3


# What `kernels_are_right` has turned down: devices, head sizes, dtypes, and whether with gradients; and what
# `linears_are_right` has: its arguments.
FAULTY: set[tuple] = set()


class BackendError(ValueError):
    """A backend was asked for that does not exist, or that cannot run here."""


def requested_backend(backend: str | None = None) -> str:
    """`backend` if it is "triton" or "torch", else what the environment variable says, else "auto".

    Raises:
        BackendError: either names no backend.
    """
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, BACKENDS))}.")
    if backend in (None, "auto"):
        backend = os.environ.get(BACKEND_VARIABLE, "auto")
        if backend not in BACKENDS:
            choices = ", ".join(map(repr, BACKENDS))
            raise BackendError(f"{BACKEND_VARIABLE} is {backend!r}; set it to one of {choices}, or unset it.")
    return backend


@functools.cache
def triton_imports() -> tuple[bool, str]:
    """Whether the kernels can be imported, and why not.

    Done at first use, so that a CPU pays neither for triton nor for its faults.
    """
    try:
        from .mesa_triton import triton_chunkwise  # noqa: F401  (importing registers the operators)
    # A triton that does not fit the installation fails in many ways; torch computes then.
    except Exception as error:
        return False, f"triton cannot be imported ({type(error).__name__}: {error})"
    return True, ""


@functools.cache
def triton_runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels run on `device`, and why (not)."""
    if device.type != "cuda":
        return False, f"no Triton kernel runs on {device.type}"
    if torch.version.hip is not None:
        return False, "the Triton kernels were written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        return (
            False,
            f"the Triton kernels need compute capability {oldest}; this GPU has {capability[0]}.{capability[1]}",
        )
    imports, reason = triton_imports()
    return imports, reason or "the Triton kernels run on this GPU"


def select_backend(device: torch.device | str, backend: str | None = None) -> tuple[str, str]:
    """The backend that runs the operators on `device`, "triton" or "torch", and why.

    Raises:
        BackendError: `backend` or the environment name one that does not exist; `backend` asks for one that cannot run
            on `device`, or the environment for one that cannot run on this GPU.
    """
    requested = requested_backend(backend)
    if requested == "torch":
        return "torch", "it was asked for"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    runs, reason = triton_runs_on(device)
    if requested == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        runs, reason = triton_imports()
        reason = reason or "Triton's interpreter runs the kernels"
    # The environment speaks for a whole program, whose tensors on the CPU are none of Triton's.
    if requested == "triton" and not runs and (backend == "triton" or device.type == "cuda"):
        raise BackendError(f"the Triton backend was asked for, but {reason}; use 'auto' or 'torch'.")
    return ("triton" if runs else "torch"), reason


@torch.compiler.assume_constant_result  # a graph is traced for one device and one backend
def use_triton(
    device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    backend: str | None = None,
    differentiable: bool = False,
) -> bool:
    """Whether to run the Mesa layer on inputs of this device, dtype and head sizes in Triton.

    Raises:
        BackendError: as `select_backend`, or "triton" was asked for and the sizes or the dtype are not its.
    """
    if select_backend(device, backend)[0] == "torch":
        return False
    fits = max(key_dim, value_dim) <= LARGEST_HEAD and dtype != torch.float64
    if requested_backend(backend) == "triton":
        if not fits:
            raise BackendError(
                f"the Triton backend was asked for, but it takes neither float64 nor heads above {LARGEST_HEAD} (here "
                f"{dtype}, K {key_dim}, V {value_dim}); use 'auto' or 'torch'."
            )
        return True
    if not fits:
        return False
    case = device, key_dim, value_dim, dtype, differentiable
    # What is being captured cannot wait for a test; the eager run before it has made one.
    return case not in FAULTY if torch.cuda.is_current_stream_capturing() else kernels_are_right(*case)


@functools.cache
def kernels_are_right(
    device: torch.device, key_dim: int, value_dim: int, dtype: torch.dtype, differentiable: bool
) -> bool:
    """Whether the kernels compile for these sizes on `device` and agree with torch there.

    Tried once, on two chunks, with the gradients if `differentiable`; kernels that fail are not used, with a warning.
    """
    # Whoever traces, fakes, counts or caches operations, such as an export, must not see or answer these.
    with _disable_current_modes():
        problem = problem_of_kernels(device, key_dim, value_dim, dtype, differentiable)
    if problem is not None:
        FAULTY.add((device, key_dim, value_dim, dtype, differentiable))
        warnings.warn(
            f"The Triton kernels for heads of {key_dim} and {value_dim} do not work on {device} ({problem}); torch "
            f"computes instead, more slowly. {BACKEND_VARIABLE}=torch avoids the attempt.",
            stacklevel=2,
        )
    return problem is None


def problem_of_kernels(
    device: torch.device, key_dim: int, value_dim: int, dtype: torch.dtype, differentiable: bool
) -> str | None:
    """What is wrong with the kernels for these sizes on `device`, or None."""
    from .mesa_operator import mesa_attention, mesa_step

    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, 96, 1)
    sizes = (key_dim, key_dim, value_dim)
    # Device and dtype are named everywhere, since a program may have set others as torch's defaults.
    on_cpu, on_device = {"dtype": torch.float32, "device": "cpu"}, {"dtype": torch.float32, "device": device}
    q, k, v = (torch.randn(*shape, size, generator=generator, **on_cpu).to(device, dtype) for size in sizes)
    log_gamma = torch.full(shape, -0.05, **on_device)
    beta = torch.full(shape, 0.5, **on_device)
    inputs = (q, k, v, log_gamma, beta, torch.full((1, key_dim), 0.5, **on_device))

    def results(backend: str) -> list[torch.Tensor]:
        # Whoever saves tensors in a way of their own, such as gradient checkpointing, must not see these.
        saving = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with saving, torch.enable_grad() if differentiable else torch.no_grad():
            leaves = [tensor.detach().requires_grad_(differentiable) for tensor in inputs]
            o = mesa_attention(*leaves, max_steps=64, tolerance=1e-6, backend=backend).o
            # In bfloat16 and float16 the outputs differ by their own rounding, of up to 2^-8.
            gradients = torch.autograd.grad(o.float().square().sum(), leaves) if differentiable else ()
            if differentiable:
                return [o.detach(), *gradients]
            state = (torch.zeros(1, 1, key_dim, size, **on_device) for size in (key_dim, value_dim))
            token = (tensor[:, :1] for tensor in inputs[:5])
            step, (h, g), _ = mesa_step(*token, inputs[5], tuple(state), max_steps=64, tolerance=1e-6, backend=backend)
        return [o, step, h, g]

    rounding = 0.0 if dtype == torch.float32 else 2.0**-7
    try:
        if device.type == "cuda":
            from .mesa_triton import compile_ahead

            compile_ahead(*inputs, differentiable)
        pairs = zip(results("triton"), results("torch"), strict=True)
        errors = [(ours.double() - theirs.double()).norm() / theirs.double().norm() for ours, theirs in pairs]
        error = torch.stack(errors).max().item()  # NaN if one of them is
        problem = None if error <= SELF_TEST_TOLERANCE + rounding else f"a relative error of {error:.1e}"
    # Whatever a compiler or driver raises, such as too little shared memory: torch goes on without the kernels.
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}"
    return problem


@torch.compiler.assume_constant_result
def use_fused_linears(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    backend: str | None,
    hidden: int,
    value_channels: int,
    intermediate: int,
    *outputs: int,
) -> bool:
    """Whether to run a layer's projections in `mesa_triton_linear`.

    Args:
        rows: tokens of all sequences, rounded up to a power of two; 32 stands for 17 and more, 512 for 512 and more.
        backend: as in `mesa_attention`.
        hidden, value_channels, intermediate, outputs: as in `mesa_layers.fuses_linears`.

    Raises:
        BackendError: as `select_backend`.
    """
    if select_backend(device, backend)[0] == "torch":
        return False
    if requested_backend(backend) == "triton":
        return True
    case = device, dtype, rows, (hidden, outputs, value_channels, intermediate)
    return case not in FAULTY if torch.cuda.is_current_stream_capturing() else linears_are_right(*case)


@functools.cache
def linears_are_right(device: torch.device, dtype: torch.dtype, rows: int, sizes: tuple) -> bool:
    """Whether the kernels of a layer's projections compile for these sizes on `device` and agree with float64 there.

    Tried once, on a random layer; kernels that fail are not used, with a warning.
    """
    with _disable_current_modes(), torch.no_grad():
        problem = problem_of_linears(device, dtype, rows, sizes)
    if problem is not None:
        FAULTY.add((device, dtype, rows, sizes))
        warnings.warn(
            f"The Triton kernels for the projections of a layer do not work on {device} ({problem}); torch "
            f"computes instead, more slowly. {BACKEND_VARIABLE}=torch avoids the attempt.",
            stacklevel=2,
        )
    return problem is None


def problem_of_linears(device: torch.device, dtype: torch.dtype, rows: int, sizes: tuple) -> str | None:
    """What is wrong with the kernels of a layer's projections, or None."""
    hidden, outputs, value_channels, intermediate = sizes
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float32, device=device) * scale).to(dtype)

    def error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        return (actual.double() - expected).norm() / expected.norm()

    try:
        from .mesa_layers import FEW_ROWS
        from .mesa_triton_linear import LAUNCHES

        x, norm_weight = random(rows, 1, hidden), random(hidden)
        normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm_weight.double()
        errors = []
        weights = [random(size, hidden, scale=hidden**-0.5) for size in outputs]
        # As `mesa_layers` asks for it: another kernel than without the copy.
        copied = {"copy": torch.empty_like(x)} if rows > FEW_ROWS else {}
        found = LAUNCHES["norm_linears"](x, norm_weight, 1e-6, weights, len(outputs) - 2, **copied)
        errors += [error(ours, normed @ w.double().mT) for ours, w in zip(found, weights, strict=True)]
        errors += [error(residual, x.double()) for residual in copied.values()]
        gate, up = (random(intermediate, hidden, scale=hidden**-0.5) for _ in range(2))
        found = LAUNCHES["norm_gated_linears"](x, norm_weight, 1e-6, gate, up)
        gated = normed @ gate.double().mT
        errors.append(error(found, gated * gated.sigmoid() * (normed @ up.double().mT)))
        for size in (value_channels, intermediate):
            inputs, weight = random(rows, 1, size), random(hidden, size, scale=size**-0.5)
            expected = x.double() + inputs.double() @ weight.double().mT
            errors.append(error(LAUNCHES["add_linear"](inputs, weight, x), expected))
        worst = torch.stack(errors).max().item()  # NaN if one of them is
        # In bfloat16 and float16, the normalised input and every product are rounded.
        rounding = 0.0 if dtype == torch.float32 else 2.0**-6
        return None if worst <= SELF_TEST_TOLERANCE + rounding else f"a relative error of {worst:.1e}"
    # Whatever a compiler or driver raises, such as too little shared memory: torch goes on without the kernels.
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"
