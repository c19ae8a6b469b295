# SPDX-License-Identifier: Apache-2.0
"""`mesanet doctor`: what is installed, what will run where, and whether it computes the right thing.

Dimensions as in `mesa`: B batch, T tokens, H heads, K key size, V value size.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from .loading import CheckpointError, find_checkpoint, load_checkpoint, load_tokenizer
from .mesa import mesa_attention, mesa_reference, mesa_step, select_backend

# Relative error that float32 keeps on well-conditioned inputs, in outputs, states and every gradient.
FLOAT32_TOLERANCE = 1e-4

_PACKAGES = ("modeling-mesanet", "torch", "transformers", "tokenizers", "safetensors")
_OPTIONAL_PACKAGES = ("triton", "accelerate", "peft", "lm-eval")
_SOLVER = {"max_steps": 100, "tolerance": 1e-6}


def diagnose() -> dict:
    """Everything that `mesanet doctor` prints, as JSON types.

    Returns:
        `versions` (name to version, None where not installed), `devices` (a list of dicts with `device`, `name`,
        `backend` and `reason`, and a `self_test` with the `errors` found), `checkpoint`, and `ok`.
    """
    devices = _devices()
    for entry in devices:
        entry["backend"], entry["reason"] = select_backend(entry["device"])
        entry["self_test"] = self_test(entry["device"])
    checkpoint = _check_bundled_checkpoint()
    return {
        "ok": checkpoint["ok"] and all(entry["self_test"]["ok"] for entry in devices),
        "versions": installed_versions(),
        "devices": devices,
        "checkpoint": checkpoint,
    }


def self_test(device: torch.device | str = "cpu") -> dict:
    """Compare the operators on `device`, in float32, with the float64 oracle on the CPU.

    Returns:
        `ok`, `tolerance`, `errors` (relative error by quantity: outputs, final states, gradients, and the output of
        single steps), and `failure` (the exception where one was raised, else None).
    """
    try:
        errors = _relative_errors(torch.device(device))
    # Whatever a broken driver, compiler or build raises is what this test is there to report.
    except Exception as error:
        return {
            "ok": False,
            "tolerance": FLOAT32_TOLERANCE,
            "errors": {},
            "failure": f"{type(error).__name__}: {error}",
        }
    # Written so that NaN fails.
    ok = all(error <= FLOAT32_TOLERANCE for error in errors.values())
    return {"ok": ok, "tolerance": FLOAT32_TOLERANCE, "errors": errors, "failure": None}


def _relative_errors(device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    # Two chunks and a rest, and V other than K: the cases in which shapes get confused.
    batch, length, heads, key_dim, value_dim = 2, 150, 2, 32, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "q": normal(batch, length, heads, key_dim),
        "k": normal(batch, length, heads, key_dim),
        "v": normal(batch, length, heads, value_dim),
        "log_gamma": torch.nn.functional.logsigmoid(normal(batch, length, heads) + 4),
        "beta": torch.sigmoid(normal(batch, length, heads)),
        "lam": torch.nn.functional.softplus(normal(heads, key_dim)) + 0.25,
    }
    weights = [
        normal(batch, length, heads, value_dim),
        normal(batch, heads, key_dim, key_dim),
        normal(batch, heads, key_dim, value_dim),
    ]

    def run(dtype: torch.dtype, where: torch.device, operator) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.to(dtype).to(where).detach().requires_grad_() for name, tensor in inputs.items()}
        o, (h, g) = operator(**leaves)
        outputs = (o, h, g)
        loss = sum((out * weight.to(out)).sum() for out, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results = dict(zip(("o", "H", "G"), outputs, strict=True))
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {name: tensor.detach().cpu().double() for name, tensor in results.items()}

    def attention(**leaves):
        result = mesa_attention(**leaves, output_final_state=True, **_SOLVER)
        return result.o, result.final_state

    expected = run(torch.float64, torch.device("cpu"), mesa_reference)
    computed = run(torch.float32, device, attention)
    computed["o of steps"] = _run_steps({name: tensor.to(device) for name, tensor in inputs.items()}).cpu().double()
    expected["o of steps"] = expected["o"]
    return {name: ((computed[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items()}


@torch.no_grad()
def _run_steps(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output `[B, T, H, V]` of `mesa_step` called for one token after the other."""
    batch, length, heads, key_dim = inputs["k"].shape
    state = (
        inputs["k"].new_zeros(batch, heads, key_dim, key_dim),
        inputs["k"].new_zeros(batch, heads, key_dim, inputs["v"].shape[-1]),
    )
    sequences = ("q", "k", "v", "log_gamma", "beta")
    outputs = []
    for t in range(length):
        token = {name: inputs[name][:, t : t + 1] for name in sequences}
        outputs.append(mesa_step(**token, lam=inputs["lam"], state=state, **_SOLVER).o)
    return torch.cat(outputs, dim=1)


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter here, None for those that are not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_OPTIONAL_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _devices() -> list[dict]:
    cpu = platform.processor() or platform.machine()
    devices = [{"device": "cpu", "name": f"{cpu}, {torch.get_num_threads()} threads, {sys.platform}"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices.append({"device": f"cuda:{index}", "name": f"{properties.name}, {memory:.0f} GiB"})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return devices


def _check_bundled_checkpoint() -> dict:
    try:
        folder = find_checkpoint(argument="the bundled checkpoint")
        model = load_checkpoint(argument="the bundled checkpoint")
        tokenizer = load_tokenizer(argument="the bundled checkpoint")
    except CheckpointError as error:
        return {"ok": False, "path": None, "parameters": None, "failure": str(error)}
    tokens = tokenizer("It was a dark night", return_tensors="pt")
    with torch.no_grad():
        finite = bool(model(input_ids=tokens["input_ids"]).logits.isfinite().all())
    return {
        "ok": finite,
        "path": str(folder),
        "parameters": model.num_parameters(),
        "failure": None if finite else "its logits are not finite; reinstall modeling-mesanet",
    }
