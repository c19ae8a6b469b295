# SPDX-License-Identifier: Apache-2.0
"""The Mesa operator on a GPU, side by side with flash-linear-attention's: speed, memory, first call, accuracy.

    python kernels/benchmarks/gpu_operators.py [--only forward,decode] [--revision REVISION]
    python kernels/benchmarks/gpu_operators.py --device cpu --smoke

The peer is `fla.ops.mesa_net` (`pip install flash-linear-attention`); without it our columns alone are measured.
Sections:

- cold: the first forward + backward in a fresh process whose Triton cache is empty;
- forward, backward: times and peak memory over the number of tokens, solver settings and hard inputs;
- decode: one token, called one by one and replayed as a CUDA graph;
- errors: the output against a dense float64 solve, by family of inputs;
- neighbours: Gated DeltaNet, gated linear attention and flash attention on the same inputs;
- sizes: other head sizes and batches.

Every call of ours is compared with float64 before it is timed, and not timed where it differs by more than is
promised; the peer is only made sure to compute the same function. Results go to `results/gpu_operators_<GPU>.json`
after each section, a figure beside them at the end; the README quotes them. A later run with the same versions, GPU
and sizes replaces only the sections that it measures; each names the revision that measured it.

Dimensions: B batch, T tokens, H heads, K key size, V value size (= K), C chunk size.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from plot_operators import draw
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from modeling_mesanet.files import write_json
from modeling_mesanet.mesa import mesa_attention, mesa_reference, mesa_step, select_backend
from modeling_mesanet.mesa.mesa_solver import l2_normalize

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
# Terminals wrap by themselves; a log is wide enough for every table.
CONSOLE = Console(width=None if sys.stdout.isatty() else 120)

# Our solver, by the name that a result carries. A tolerance takes as many steps as it needs: of the families
# of inputs, `power` needs more than the 64 that models allow.
SETTINGS = {
    "tolerance 1e-3": {"max_steps": 128, "tolerance": 1e-3},
    "tolerance 1e-4": {"max_steps": 128, "tolerance": 1e-4},
    "30 steps": {"max_steps": 30},
    "10 steps": {"max_steps": 10},
    "5 steps": {"max_steps": 5},
}
# The largest relative error of an output that kernels/README.md allows, before it is rounded to 16 bits; fewer steps
# promise nothing.
PROMISED = {"tolerance 1e-3": 1e-3, "tolerance 1e-4": 2e-4, "30 steps": 2e-4}
PROMISED_GRADIENT = 3e-3
ROUNDING = 2.0**-9  # of a bfloat16 number, relative
# Outputs are compared in one head, and in as many sequences as these tokens fill: what float64 takes a moment for.
CHECKED_TOKENS = 8192
# Below this, an operator computes the same function; called wrongly, it would be off by its own size.
SAME_FUNCTION = 0.3

PEER_STEPS = 30  # as it ships
PEER_MAX_SIZE = 128
# Seconds that a first use may take to autotune: what does not fit into the time left is not begun. The peer tunes anew
# for other head sizes, most of all its backward pass, and for other numbers of rows.
NEIGHBOUR_TUNING = 30
PEER_TUNING = {"rows": 12, "rows, backward": 24, "size": 12, "size, backward": 60}


class Case(NamedTuple):
    """Inputs `[batch, length, heads, size]`, of a kind that `timed_inputs` knows."""

    kind: str
    batch: int
    length: int
    heads: int
    size: int


@dataclass(frozen=True)
class Plan:
    """The sizes that are measured; `tokens` a call, as `tokens / T` sequences of T, for each T of `lengths`."""

    tokens: int = 32768
    length: int = 2048
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    backward_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    heads: int = 12
    size: int = 128
    sizes: tuple[int, ...] = (64, 256)
    batches: tuple[int, ...] = (1, 4, 64)
    decode_batches: tuple[int, ...] = (1, 8, 64, 256)

    def case(self, kind: str = "easy", **changes: int) -> Case:
        sizes = {"length": self.length, "heads": self.heads, "size": self.size} | changes
        return Case(kind, **{"batch": self.tokens // sizes["length"]} | sizes)


SMOKE = Plan(64, 32, (32, 64), (32,), heads=2, size=16, sizes=(32,), batches=(1,), decode_batches=(1, 3))


@dataclass(frozen=True)
class Contestant:
    """An operator at one setting: `run(q, k, v, log_gamma, beta, lam)` gives `o`.

    `allowed` is the largest relative error of the output before rounding, `allowed_gradient` that of a gradient; None
    where the operator is another layer, which is only required to be finite. It may need `tuning` seconds at first.
    """

    operator: str
    setting: str
    run: Callable[..., torch.Tensor]
    allowed: float | None = None
    allowed_gradient: float | None = None
    tuning: int = 0


def mesa(setting: str) -> Contestant:
    """Our operator at one of `SETTINGS`."""
    promised = PROMISED.get(setting)
    return Contestant(
        "mesa",
        setting,
        lambda *inputs: mesa_attention(*inputs, **SETTINGS[setting]).o,
        promised or SAME_FUNCTION,
        PROMISED_GRADIENT if setting in ("tolerance 1e-4", "30 steps") else SAME_FUNCTION,
    )


def peer(steps: int = PEER_STEPS, tuning: int = 0) -> Contestant:
    """flash-linear-attention's operator, called as its layer calls it."""
    from fla.ops.mesa_net import chunk_mesa_net

    def run(q, k, v, log_gamma, beta, lam):
        o, _, _ = chunk_mesa_net(
            q=q,
            k=k,
            v=v,
            g=log_gamma,
            beta=beta,
            lamb=lam,
            max_CG_iteration=steps,
            use_qk_l2norm_in_kernel=True,
        )
        return o

    return Contestant("peer", f"{steps} steps", run, SAME_FUNCTION, SAME_FUNCTION, tuning)


def neighbours(with_fla: bool) -> list[Contestant]:
    """Other sequence layers, on q and k as they are (normalised)."""

    def sdpa(q, k, v, log_gamma, beta, lam):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(
                1, 2
            )

    contestants = [Contestant("sdpa", "", sdpa)]
    if with_fla:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla

        def gla(q, k, v, log_gamma, beta, lam):
            return chunk_simple_gla(q=q, k=k, v=v, g=log_gamma)[0]

        def gdn(q, k, v, log_gamma, beta, lam):
            return chunk_gated_delta_rule(q=q, k=k, v=v, g=log_gamma, beta=beta)[0]

        contestants.append(Contestant("gla", "", gla, tuning=NEIGHBOUR_TUNING))
        contestants.append(Contestant("gdn", "", gdn, tuning=NEIGHBOUR_TUNING))
    return contestants


def timed_inputs(case: Case, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """`(q, k, v, log_gamma, beta, lam)` as the operators take them; q, k, v bfloat16, the rest float32.

    q is normal and k the SiLU of normal numbers, both L2-normalised, v normal. "easy": beta the sigmoid of normal
    numbers, gamma in .9-.999, lam 1. "hard": beta in .95-1, nothing forgotten, lam .25.
    """
    source = torch.Generator(device).manual_seed(seed)
    gates = case.batch, case.length, case.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source, device=device)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(*gates, generator=source, device=device)

    q, k, v = (normal(*gates, case.size) for _ in range(3))
    q, k, v = (tensor.bfloat16() for tensor in (normalize(q, dim=-1), normalize(silu(k), dim=-1), v))
    if case.kind == "easy":
        gamma, beta, lam = uniform(0.9, 0.999), normal(*gates).sigmoid(), 1.0
    else:
        gamma, beta, lam = torch.ones(gates, device=device), uniform(0.95, 1.0), 0.25
    return q, k, v, gamma.log(), beta, torch.full((case.heads, case.size), lam, device=device)


def dense_solve(q, k, v, log_gamma, beta, lam) -> torch.Tensor:
    """The output of `mesa_reference` in float64, a chunk of tokens at once; differentiable."""
    q, k, v, log_gamma, beta, lam = (tensor.double() for tensor in (q, k, v, log_gamma, beta, lam))
    batch, length, heads, key_dim = k.shape
    h, g = k.new_zeros(batch, heads, key_dim, key_dim), k.new_zeros(batch, heads, key_dim, v.shape[-1])
    # A reset as a number: 0 once it is an exponent, and small enough that differences of sums keep their digits.
    tokens = (l2_normalize(q), l2_normalize(k), v, log_gamma.clamp_min(-1e4), beta)
    outputs = []
    for start in range(0, length, 64):
        part = (tensor[:, start : start + 64] for tensor in tokens)
        # The states of all tokens of a chunk are large; the backward pass makes them again.
        o, h, g = checkpoint(_dense_chunk, h, g, *part, lam, use_reentrant=False)
        outputs.append(o)
    return torch.cat(outputs, dim=1)


def _dense_chunk(h, g, q, k, v, log_gamma, beta, lam):
    q, k, v, log_gamma, beta = (tensor.transpose(1, 2) for tensor in (q, k, v, log_gamma, beta))  # [B, H, C, ...]
    decay = log_gamma.cumsum(-1)
    later = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).triu(1)
    zeta = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    weights, from_start = zeta * beta.unsqueeze(-2), decay.exp().unsqueeze(-1)
    outer = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
    states = from_start.unsqueeze(-1) * h.unsqueeze(2) + (weights @ outer).unflatten(-1, h.shape[-2:])
    matrices = states + torch.diag_embed(lam).unsqueeze(1)
    x = torch.linalg.solve_ex(matrices, q.unsqueeze(-1)).result.squeeze(-1)
    o = from_start * (x @ g) + ((x @ k.mT) * weights) @ v
    g = from_start[:, :, -1:] * g + (weights[:, :, -1].unsqueeze(-1) * k).mT @ v
    return o.transpose(1, 2), states[:, :, -1], g


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`||actual - expected|| / ||expected||`; NaN where `actual` has one."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def worst(errors: Iterable[float]) -> float:
    """The largest; a NaN is larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def checked_part(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The first head of the first sequences: `[:n, :, :1]` of all but lam, `[:1]` of that."""
    *tensors, lam = inputs
    return (*(tensor[: checked_sequences(tensor.shape[1]), :, :1] for tensor in tensors), lam[:1])


def checked_sequences(length: int) -> int:
    return max(1, CHECKED_TOKENS // length)


def upstream(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The gradient of the output that the backward passes start from: numbers like v, but not the same token's."""
    return inputs[2].flip(1)


class Skip(Exception):
    """A row is not measured; the message says why."""


class Clock:
    """Times calls on one device, and knows how much time is left."""

    def __init__(self, device: torch.device, seconds: float):
        self.device = device
        self.end = time.monotonic() + seconds
        self.cuda = device.type == "cuda"
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        # Written before each repetition, so that no call finds its inputs in the cache.
        self.flushed = torch.empty(max(4 * self.l2_bytes, 1), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        self.flushed.zero_()

    def check_time(self, needed: float) -> None:
        if time.monotonic() + needed > self.end:
            raise Skip("no time left; --seconds gives more, --only fewer sections")

    def time(self, run: Callable[[], object], before: Callable[[], object] | None = None, calls: int = 1) -> dict:
        """Median milliseconds of one of the `calls` calls that `run` makes, after `before`, which is not timed."""
        before = before or self.flush
        if not self.cuda:
            count, milliseconds = 2, []
            for _ in range(count):
                before()
                began = time.perf_counter()
                run()
                milliseconds.append(1e3 * (time.perf_counter() - began))
        else:
            # The first calls bring the clocks up.
            warm, began = 0, time.perf_counter()
            while warm < 3 or time.perf_counter() - began < 0.05:
                before()
                run()
                torch.cuda.synchronize()
                warm += 1
            each = (time.perf_counter() - began) / warm
            count = min(max(int(0.25 / each), 5), 50)
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, stop in events:
                before()
                start.record()
                run()
                stop.record()
            torch.cuda.synchronize()
            milliseconds = [start.elapsed_time(stop) for start, stop in events]
        milliseconds = sorted(each / calls for each in milliseconds)
        return {
            "ms": statistics.median(milliseconds),
            "spread_ms": [milliseconds[count // 5], milliseconds[-1 - count // 5]],
            "repetitions": count,
        }

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """Memory that `run` needs at its peak, beyond what is allocated before; its results count."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def require(name: str, error: float, allowed: float) -> None:
    """Refuse to time what is wrong. Written so that NaN, which compares false, fails."""
    if not error <= allowed:
        raise ArithmeticError(f"relative error of {name} {error:.1e}, allowed {allowed:.1e}")


def check_finite(*tensors: torch.Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ArithmeticError("a result is not finite")


def explain(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


class Bench:
    """One run: its sections, each a list of rows as they stand in the results file."""

    def __init__(self, clock: Clock, plan: Plan, peer_version: str | None):
        self.clock, self.plan, self.with_peer = clock, plan, peer_version is not None
        self.tuned: set[tuple] = set()
        self.kernels = tempfile.TemporaryDirectory(prefix="gpu_operators_")

    def rows(self, jobs: list[tuple[Case, list[Contestant]]], backward: bool, name: str) -> list[dict]:
        """Check and time contestants on cases, as result rows; a failed one says why and has no time."""
        found = []
        for case, contestants in track(jobs, name, console=CONSOLE):
            inputs = expected = None
            for contestant in contestants:
                row = {"operator": contestant.operator, "setting": contestant.setting, "backward": backward}
                row |= case._asdict()
                found.append(row)
                key = contestant.operator, case.size, case.batch * case.length, backward
                try:
                    self.clock.check_time(0 if key in self.tuned else contestant.tuning)
                    if inputs is None:
                        inputs = timed_inputs(case, self.clock.device)
                    if expected is None and contestant.allowed is not None:
                        expected = self.expected(inputs, backward)
                    measure = self.measure_backward if backward else self.measure_forward
                    measure(contestant, inputs, expected, row)
                    self.tuned.add(key)
                except Skip as reason:
                    row["skipped"] = str(reason)
                # Out of memory, a compiler's failure, a wrong result: the other rows do not depend on it.
                except Exception as error:
                    row["failed"] = explain(error)
        return found

    def expected(self, inputs: tuple[torch.Tensor, ...], backward: bool) -> tuple[torch.Tensor, ...]:
        """The float64 output of the checked part, or its gradients in the inputs from `upstream`."""
        part = checked_part(inputs)
        leaves = [tensor.double().requires_grad_(backward) for tensor in part]
        o = dense_solve(*leaves)
        return torch.autograd.grad(o, leaves, upstream(part).double()) if backward else (o,)

    def measure_forward(self, contestant: Contestant, inputs, expected, row: dict) -> None:
        """Fill `row` with error, solver steps, peak memory and time of a forward pass."""

        def run():
            with torch.no_grad():
                return contestant.run(*inputs)

        o = run()
        if contestant.allowed is None:
            check_finite(o)
        else:
            row["error"] = relative_error(o[: checked_sequences(o.shape[1]), :, :1], *expected)
            require("o", row["error"], contestant.allowed + ROUNDING)
        del o
        if contestant.operator == "mesa":
            row["steps"] = solver_steps(inputs, contestant.setting)
        row["peak_mib"] = self.clock.peak_mib(run)
        row |= self.clock.time(run)

    def measure_backward(self, contestant: Contestant, inputs, expected, row: dict) -> None:
        """Fill `row` with errors of the gradients, peak memory and time of a forward and backward pass."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]

        gradient_of_o = upstream(inputs)

        def run(gradient_of_o=gradient_of_o):
            # Not every neighbour has gates.
            return torch.autograd.grad(contestant.run(*leaves), leaves, gradient_of_o, allow_unused=True)

        # Sequences that are not checked must not enter the gradient of lam, which all share.
        of_checked = gradient_of_o.clone()
        of_checked[checked_sequences(of_checked.shape[1]) :] = 0
        gradients = run(of_checked)
        if contestant.allowed is None:
            check_finite(*(gradient for gradient in gradients if gradient is not None))
        else:
            names = ("dq", "dk", "dv", "dlog_gamma", "dbeta", "dlam")
            pairs = zip(checked_part(gradients), expected, strict=True)
            row["errors"] = dict(zip(names, (relative_error(*pair) for pair in pairs), strict=True))
            row["error"] = worst(row["errors"].values())
            for name, error in row["errors"].items():
                require(name, error, contestant.allowed_gradient + ROUNDING)
        del gradients
        row["peak_mib"] = self.clock.peak_mib(run)
        row |= self.clock.time(run)

    def forward(self) -> list[dict]:
        """Solver settings and hard inputs at one size, then the number of tokens."""
        settings = [mesa(setting) for setting in SETTINGS] + [peer(steps) for steps in (30, 10, 5) if self.with_peer]
        hard = [mesa(setting) for setting in ("tolerance 1e-4", "tolerance 1e-3", "30 steps")]
        case = self.plan.case
        jobs = [(case(), settings), (case("hard"), hard + self.peers())]
        others = sorted(set(self.plan.lengths) - {self.plan.length}, reverse=True)
        jobs += [(case(length=length), [mesa("tolerance 1e-4"), *self.peers()]) for length in others]
        return self.rows(jobs, backward=False, name="forward")

    def backward(self) -> list[dict]:
        settings = [mesa(setting) for setting in ("tolerance 1e-4", "30 steps", "10 steps")]
        settings += [peer(steps) for steps in (30, 10) if self.with_peer]
        case = self.plan.case
        others = sorted(set(self.plan.backward_lengths) - {self.plan.length}, reverse=True)
        jobs = [(case(), settings), (case("hard"), [mesa("tolerance 1e-4"), *self.peers()])]
        jobs += [(case(length=length), [mesa("tolerance 1e-4"), *self.peers()]) for length in others]
        return self.rows(jobs, backward=True, name="forward + backward")

    def neighbours(self) -> list[dict]:
        contestants = neighbours(self.with_peer)
        # The usual length first, for which they tune; they keep to it at the others.
        lengths = sorted(self.plan.lengths, key=lambda length: (length != self.plan.length, length))
        forward = [(self.plan.case(length=length), contestants) for length in lengths]
        sdpa = [contestant for contestant in contestants if contestant.operator == "sdpa"]
        backward = [(self.plan.case(length=length), sdpa) for length in self.plan.backward_lengths]
        return [
            *self.rows(backward, backward=True, name="neighbours, forward + backward"),
            *self.rows(forward, backward=False, name="neighbours, forward"),
        ]

    def sizes(self) -> list[dict]:
        ours = mesa("tolerance 1e-4")
        cases = [self.plan.case(size=size) for size in self.plan.sizes]
        cases += [self.plan.case(batch=batch) for batch in self.plan.batches]
        rows = self.rows([(case, [ours]) for case in cases], backward=False, name="sizes, forward")
        rows += self.rows([(case, [ours]) for case in cases], backward=True, name="sizes, forward + backward")
        for backward in (False, True) if self.with_peer else ():
            jobs = []
            for case in (case for case in cases if case.size <= PEER_MAX_SIZE):
                changed = "rows" if case.size == self.plan.size else "size"
                jobs.append((case, [peer(tuning=PEER_TUNING[changed + ", backward" * backward])]))
            rows += self.rows(jobs, backward, f"sizes, peer{', forward + backward' * backward}")
        return rows

    def peers(self) -> list[Contestant]:
        return [peer()] if self.with_peer else []

    def cold(self) -> list[dict]:
        """First and second forward + backward of fresh processes with an empty Triton cache.

        The rest of this run reads what they compiled and tuned, which saves it from doing so again.
        """
        case = self.plan.case()
        rows = []
        for operator in ("mesa", *(["peer"] if self.with_peer else [])):
            row = {"operator": operator, "setting": COLD_SETTING[operator], **case._asdict()}
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
                arguments = [sys.executable, "-c", COLD_START.format(operator=FIRST_CALL[operator])]
                arguments += [str(self.clock.device), *map(str, case[1:])]
                with CONSOLE.status(f"cold start: {operator}"):
                    run = subprocess.run(arguments, env=environment, capture_output=True, text=True)
                if run.returncode:
                    row["failed"] = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1][:200]
                else:
                    row |= json.loads(run.stdout.splitlines()[-1])
                shutil.copytree(cache, self.kernels.name, dirs_exist_ok=True)
            rows.append(row)
        os.environ["TRITON_CACHE_DIR"] = self.kernels.name
        return rows

    def decode(self) -> list[dict]:
        steps = [decode_ours("tolerance 1e-4"), decode_ours("30 steps")] + [decode_peer() for _ in self.peers()]
        rows = []
        for batch in track(self.plan.decode_batches, "decode", console=CONSOLE):
            case, states = self.plan.case(batch=batch, length=1), None
            for step in steps:
                row = {"operator": step.operator, "setting": step.setting, **case._asdict()}
                rows.append(row)
                try:
                    self.clock.check_time(0)
                    states = states or DecodeStates(case, self.clock)
                    row |= {"state_sets": len(states.tokens), "state_bytes": states.bytes}
                    row["error"] = states.error(step)
                    require("o", row["error"], step.allowed + ROUNDING)
                    row |= states.time(step)
                except Skip as reason:
                    row["skipped"] = str(reason)
                except Exception as error:
                    row["failed"] = explain(error)
        return rows

    def errors(self) -> list[dict]:
        """Errors of float32 outputs by family of inputs, each family a head of its own in one call."""
        families, inputs = family_inputs(self.plan.length, self.plan.size, self.clock.device)
        long = timed_inputs(self.plan.case("hard", length=self.plan.tokens, heads=1), self.clock.device)
        rows = []
        for names, tensors in ((families, inputs), (["hard"], long)):
            rows += self.family_errors(names, tensors)
        return rows

    def family_errors(self, families: list[str], inputs: tuple[torch.Tensor, ...]) -> list[dict]:
        q, k, v, *rest = inputs
        exact = (q, k, v.float(), *rest)
        rows = [{"family": family, "length": q.shape[1], "errors": {}, "steps": {}} for family in families]
        with torch.no_grad():
            expected = dense_solve(*exact)
            calls = {f"mesa, {setting}": (mesa(setting).run, exact) for setting in PROMISED}
            for contestant in self.peers():
                # It ships with outputs in the dtype of 16-bit values; float32 values take the rounding away.
                calls[f"peer, {contestant.setting}"] = contestant.run, inputs
                calls[f"peer, {contestant.setting}, float32 values"] = contestant.run, exact
            for name, (run, tensors) in track(calls.items(), f"errors, {q.shape[1]} tokens", console=CONSOLE):
                try:
                    o = run(*tensors)
                    steps = solver_steps_by_head(exact, name.removeprefix("mesa, ")) if "mesa" in name else None
                except Exception as error:
                    for row in rows:
                        row.setdefault("failures", {})[name] = explain(error)
                    continue
                for head, row in enumerate(rows):
                    row["errors"][name] = relative_error(o[:, :, head], expected[:, :, head])
                    if steps:
                        row["steps"][name] = steps[head]
        return rows


def solver_steps_by_head(inputs: tuple[torch.Tensor, ...], setting: str) -> list[list[float]]:
    """Mean and largest number of solver steps of each head."""
    with torch.no_grad():
        steps = mesa_attention(*inputs, **SETTINGS[setting], output_stats=True).stats.steps
    return torch.stack([steps.float().mean((0, 1)), steps.amax((0, 1))], dim=1).tolist()


def solver_steps(inputs: tuple[torch.Tensor, ...], setting: str) -> list[float]:
    """Mean and largest number of solver steps of all heads."""
    means, largest = zip(*solver_steps_by_head(inputs, setting), strict=True)
    return [statistics.mean(means), max(largest)]


def family_inputs(length: int, size: int, device: torch.device) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    """Every family of the tests and the two timed ones, one a head: names, and inputs with bfloat16 q, k, v."""
    if (folder := str(ROOT / "tests" / "mesa")) not in sys.path:
        sys.path.append(folder)
    from mesa_inputs import FAMILIES, REPEAT, make_inputs

    heads = {kind: timed_inputs(Case(kind, 1, length, 1, size), torch.device("cpu")) for kind in ("easy", "hard")}
    for family in (*FAMILIES, REPEAT):
        q, k, v, *rest = make_inputs(family, 1, length, 1, size, size, dtype=torch.float32)
        heads[family] = (q.bfloat16(), k.bfloat16(), v.bfloat16(), *rest)
    columns = list(zip(*heads.values(), strict=True))
    inputs = [torch.cat(column, dim=2) for column in columns[:5]] + [torch.cat(columns[5])]
    return list(heads), tuple(tensor.to(device) for tensor in inputs)


class DecodeStep(NamedTuple):
    """`run(prepare(inputs), h, g)` gives `(o, h, g)` after one token; `prepare` is not timed."""

    operator: str
    setting: str
    prepare: Callable[[tuple[torch.Tensor, ...]], object]
    run: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    allowed: float


def decode_ours(setting: str) -> DecodeStep:
    def run(inputs, h, g):
        return mesa_step(*inputs, (h, g), **SETTINGS[setting]).o, h, g

    return DecodeStep("mesa", setting, tuple, run, PROMISED[setting])


def decode_peer() -> DecodeStep:
    """The peer's step, which writes new states. Its layer normalises q and k before; here they come normalised."""
    from fla.ops.mesa_net import mesa_net_decoding_one_step

    def prepare(inputs):
        q, k, v, log_gamma, beta, lam = inputs
        arguments = {"q": q, "k": k, "v": v, "g": log_gamma, "beta": beta}
        return {name: tensor.squeeze(1) for name, tensor in arguments.items()} | {"lamb": lam}

    def run(arguments, h, g):
        return mesa_net_decoding_one_step(**arguments, prev_h_kk=h, prev_h_kv=g, max_CG_iteration=PEER_STEPS)

    return DecodeStep("peer", f"{PEER_STEPS} steps", prepare, run, SAME_FUNCTION)


class DecodeStates:
    """Sets of states, and a token for each, that together exceed the L2 cache several times.

    Decoding goes round them, so that every step reads its states from memory, as it does in a model of many layers.
    Before each repetition they are put back: reading the same token again and again would make the systems easier.
    """

    PAST = 192  # tokens read before; at gamma .9-.999 few others would count

    def __init__(self, case: Case, clock: Clock):
        self.clock = clock
        self.bytes = 4 * 2 * case.batch * case.heads * case.size**2
        count = max(2, math.ceil(4 * clock.l2_bytes / self.bytes))
        self.tokens = [timed_inputs(case, clock.device, seed=1 + index) for index in range(count)]
        past = [timed_inputs(case._replace(length=self.PAST), clock.device, seed=1000 + i) for i in range(count)]
        self.fresh = [self.after(*tensors) for tensors in past]
        self.used = [(h.clone(), g.clone()) for h, g in self.fresh]

    @staticmethod
    def after(q, k, v, log_gamma, beta, lam) -> tuple[torch.Tensor, torch.Tensor]:
        """`(H, G)` after the given tokens, float32."""
        k, v, log_gamma, beta = (tensor.transpose(1, 2).float() for tensor in (k, v, log_gamma, beta))
        decay = log_gamma.cumsum(-1)
        weighted = ((decay[..., -1:] - decay).exp() * beta).unsqueeze(-1) * k
        h = weighted.mT @ k
        return (h + h.mT) / 2, weighted.mT @ v

    def restore(self) -> None:
        for used, fresh in zip(self.used, self.fresh, strict=True):
            for target, source in zip(used, fresh, strict=True):
                target.copy_(source)

    def error(self, step: DecodeStep) -> float:
        """The larger of the relative errors of output and new states against float64, in the first eight sequences."""
        self.restore()
        computed = step.run(step.prepare(self.tokens[0]), *self.used[0])
        *tensors, lam = self.tokens[0]
        inputs = (*(tensor[:8] for tensor in tensors), lam)
        o, states = mesa_reference(*inputs, initial_state=tuple(state[:8] for state in self.fresh[0]))
        pairs = zip(computed, (o, *states), strict=True)
        return worst(relative_error(actual[:8].reshape(exact.shape), exact) for actual, exact in pairs)

    def time(self, step: DecodeStep) -> dict:
        """Microseconds a step, called from Python and replayed as one CUDA graph of a step a set."""
        arguments = [(step.prepare(tokens), *state) for tokens, state in zip(self.tokens, self.used, strict=True)]

        def run():
            with torch.no_grad():
                # The results are kept until the end: no step may write where the one before has just written.
                return [step.run(*each) for each in arguments]

        def microseconds(call: Callable) -> dict:
            found = self.clock.time(call, before=self.restore, calls=len(arguments))
            return {"us": 1e3 * found["ms"], "spread_us": [1e3 * x for x in found["spread_ms"]]}

        found = {"eager": microseconds(run)}
        if self.clock.cuda:
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    run()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    kept = run()
                found["graph"] = microseconds(graph.replay)
                del kept
            # Whatever an operator does that cannot be captured; its time from Python stands.
            except Exception as error:
                found["graph_failed"] = explain(error)
        return found


# A process of its own: imports, compiles and tunes as a user's first call does. torch itself is not counted.
COLD_START = """
import json, sys, time
import torch
device, (batch, length, heads, size) = sys.argv[1], map(int, sys.argv[2:])
shape = batch, length, heads
q, k, v = (torch.randn(*shape, size, device=device).bfloat16() for _ in range(3))
gates = [torch.rand(*shape, device=device) for _ in range(2)]
leaves = [t.requires_grad_() for t in (q, k, v, -0.1 * gates[0], gates[1], torch.ones(heads, size, device=device))]

def wait():
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

began = wait()
{operator}
seconds = [wait()]
for _ in range(2):
    o = operator(*leaves)
    torch.autograd.grad(o, leaves, torch.ones_like(o))
    seconds.append(wait())
print(json.dumps({{
    "import_s": seconds[0] - began, "first_call_s": seconds[1] - seconds[0], "second_call_s": seconds[2] - seconds[1]
}}))
"""
COLD_SETTING = {"mesa": "tolerance 1e-4", "peer": f"{PEER_STEPS} steps"}
FIRST_CALL = {
    "mesa": f"""
from modeling_mesanet.mesa import mesa_attention
def operator(*inputs):
    return mesa_attention(*inputs, **{SETTINGS[COLD_SETTING["mesa"]]!r}).o
""",
    "peer": f"""
from fla.ops.mesa_net import chunk_mesa_net
def operator(q, k, v, g, beta, lamb):
    return chunk_mesa_net(
        q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, max_CG_iteration={PEER_STEPS}, use_qk_l2norm_in_kernel=True
    )[0]
""",
}
# In this order: what the goals are about first, what takes long to tune last.
SECTIONS = {
    "cold": Bench.cold,
    "forward": Bench.forward,
    "backward": Bench.backward,
    "decode": Bench.decode,
    "errors": Bench.errors,
    "neighbours": Bench.neighbours,
    "sizes": Bench.sizes,
}


def table_of(section: str, rows: list[dict]) -> Table:
    """What a section found, for the terminal."""

    def cell(value, form: str) -> str:
        return "" if value is None else format(value, form)

    match section:
        case "errors":
            names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
            table = Table(
                "family", "tokens", *names, box=SIMPLE, title="relative errors of o (float32) against float64"
            )
            for row in rows:
                errors = [cell(row["errors"].get(name), ".1e") for name in names]
                table.add_row(row["family"], str(row["length"]), *errors)
            problems = {f"{name}: {why}" for row in rows for name, why in row.get("failures", {}).items()}
            table.caption = "; ".join(sorted(problems)) or None
        case "cold":
            table = Table("operator", "import, s", "first call, s", "second call, s", "", box=SIMPLE, title=section)
            for row in rows:
                seconds = [cell(row.get(key), ".2f") for key in ("import_s", "first_call_s", "second_call_s")]
                table.add_row(row["operator"], *seconds, row.get("failed"))
        case "decode":
            table = Table(
                "operator", "setting", "batch", "graph, us", "eager, us", "error", "", box=SIMPLE, title=section
            )
            for row in rows:
                times = [cell(row.get(key, {}).get("us"), ".1f") for key in ("graph", "eager")]
                note = row.get("failed") or row.get("skipped") or row.get("graph_failed")
                error = cell(row.get("error"), ".1e")
                table.add_row(row["operator"], row["setting"], str(row["batch"]), *times, error, note)
        case _:
            columns = ("operator", "setting", "inputs", "pass", "B x T", "K", "ms", "peak, MiB", "error", "steps", "")
            table = Table(*columns, box=SIMPLE, title=section)
            for row in rows:
                steps = "/".join(f"{x:.0f}" for x in row.get("steps", []))
                table.add_row(
                    row["operator"],
                    row["setting"],
                    row["kind"],
                    "f+b" if row["backward"] else "f",
                    f"{row['batch']} x {row['length']}",
                    str(row["size"]),
                    cell(row.get("ms"), ".3f"),
                    cell(row.get("peak_mib"), ".0f"),
                    cell(row.get("error"), ".1e"),
                    steps,
                    row.get("failed") or row.get("skipped"),
                )
    return table


def find_peer(device: torch.device) -> str | None:
    """The version of flash-linear-attention, or None and a sentence why it does not take part."""
    if device.type != "cuda":
        return None
    try:
        import fla
        import fla.ops.mesa_net
    # An installation that does not fit torch or triton fails in many ways.
    except Exception as error:
        CONSOLE.print(
            f"flash-linear-attention cannot be imported ({explain(error)}), so only our columns are measured; "
            "`pip install flash-linear-attention` brings the peer."
        )
        return None
    return fla.__version__


def read_revision() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions(peer_version: str | None) -> dict[str, str | None]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "flash-linear-attention": peer_version,
    }


def start_results(path: Path, about: dict, sections: Iterable[str]) -> dict:
    """`about`, with those `sections` of `path` that committed code measured in the same circumstances."""
    results = about | {"measured": {}}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return results
    if any(before.get(key) != about[key] for key in ("gpu", "driver", "versions", "plan")):
        return results
    for name in (name for name in sections if name in before.get("measured", {})):
        revision = before["measured"][name]["revision"]
        if revision is not None and not revision.endswith("-dirty"):
            results[name] = before[name]
            results["measured"][name] = before["measured"][name]
    return results


def record(results: dict, section: str, rows: object, revision: str | None, path: Path) -> None:
    """Put what a section measured into the results and the file, with the day and the code that measured it."""
    results[section] = rows
    results["measured"][section] = {"date": date.today().isoformat(), "revision": revision}
    write_json(path, results)


def run_sections(
    program: str,
    sections: dict[str, Callable],
    make_bench: Callable[[Clock, object, str | None], object],
    plan: object,
    table_of: Callable[[str, list[dict]], Table],
    draw: Callable[[dict, Path], None],
    *,
    device: str,
    only: str,
    revision: str | None,
    output: Path | None,
    seconds: float,
    smoke: bool,
    libraries: dict[str, str] | None = None,
) -> None:
    """What a benchmark of several sections does: check its options, measure, write after each section, draw.

    Args:
        program: name of the results file, to which that of the GPU is added.
        sections: by name, what measures a section with the bench and returns its rows.
        plan: a dataclass of the sizes, for `make_bench` and the results.
        libraries: versions to record beside those of `versions`.
        device, only, revision, output, seconds, smoke: the options of `main`.

    Raises:
        typer.BadParameter: an option cannot be followed here.
        typer.Exit: a row of our own failed.
    """
    began = time.monotonic()
    selected = [name.strip() for name in only.split(",") if name.strip()] or list(sections)
    if unknown := set(selected) - set(sections):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: take some of {', '.join(sections)}.")
    place = torch.device(device)
    if place.type != "cuda" and not smoke:
        raise typer.BadParameter(f"On {device} the full sizes would take hours; add --smoke.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device; --device cpu --smoke tries the program without one.")

    peer_version = find_peer(place)
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    name = f"{program}_" + re.sub(r"[^A-Za-z0-9]+", "_", gpu.removeprefix("NVIDIA ")).strip("_")
    path = (output or (ROOT / "outputs" if smoke else RESULTS)) / f"{name}.json"
    revision = revision or read_revision()
    about = {
        "gpu": gpu,
        "driver": read_driver(),
        "versions": versions(peer_version) | (libraries or {}),
        "backend": list(select_backend(place)),
        "plan": json.loads(json.dumps(asdict(plan))),
        "figure": None,
    }
    if revision is None:
        CONSOLE.print(
            "The git revision cannot be read here, and the README takes no figures without: give --revision."
        )
    results = start_results(path, about, sections)
    failures = 0
    with ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(torch.cuda.device(place))
        bench = make_bench(Clock(place, seconds - (time.monotonic() - began)), plan, peer_version)
        for section in (name for name in sections if name in selected):
            rows = sections[section](bench)
            record(results, section, rows, revision, path)
            CONSOLE.print(table_of(section, rows))
            failures += sum("failed" in row and row["operator"] == "mesa" for row in rows)
            failures += sum(name.startswith("mesa") for row in rows for name in row.get("failures", {}))
    try:
        draw(results, path.with_suffix(".png"))
        write_json(path, results | {"figure": f"{name}.png"})
    except ImportError:
        CONSOLE.print(
            f"matplotlib is not installed, so there is no figure; {draw.__module__}.py draws it from the results."
        )
    CONSOLE.print(f"{path}, after {time.monotonic() - began:.0f} s")
    if failures:
        CONSOLE.print(f"{failures} of our own rows failed; the tables say why.")
        raise typer.Exit(1)


def main(
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1, or cpu with --smoke.")] = "cuda",
    only: Annotated[str, typer.Option(help=f"Sections, with commas: {', '.join(SECTIONS)}. All by default.")] = "",
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to instead of results/.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="No row is begun that would end later than this.")] = 480,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the program; written to outputs/.")] = False,
) -> None:
    """Measure the Mesa operator and its peer."""
    run_sections(
        "gpu_operators",
        SECTIONS,
        Bench,
        SMOKE if smoke else Plan(),
        table_of,
        draw,
        device=device,
        only=only,
        revision=revision,
        output=output,
        seconds=seconds,
        smoke=smoke,
    )


if __name__ == "__main__":
    typer.run(main)
