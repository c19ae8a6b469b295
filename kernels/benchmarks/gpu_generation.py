# SPDX-License-Identifier: Apache-2.0
"""Text generation on a GPU: milliseconds a step through `generate()`, prefill, first token, memory.

    python kernels/benchmarks/gpu_generation.py [--only steps,prefill] [--revision REVISION]
    python kernels/benchmarks/gpu_generation.py --device cpu --smoke

Random bfloat16 models of the published 1B size, beside flash-linear-attention's MesaNet (`pip install
flash-linear-attention`; without it, it is left out) and transformers' Llama of the same sizes. Sections:

- steps: a step of greedy decoding, as `generate()` runs it, and with what makes a difference: ours without the CUDA
  graph, Llama's compiled for a static cache; after a short prompt and with thousands of tokens of context;
- cold: the first token of a fresh process, nothing compiled;
- prompt: a short prompt, whose pass the processor bounds;
- prefill: a long prompt, at once and in chunks;
- chunks: the same prompt in small chunks, as a text of any length is read;
- memory: the peak while a smaller model reads up to a million tokens and writes tens of thousands, and whether its
  states are then still what float64 makes of the last tokens.

What is timed is checked first: the logits that `generate()` saw against those of the whole sequence in one uncached
pass. Results go to `results/gpu_generation_<GPU>.json` after each section, a figure beside them at the end; the README
quotes them. A later run with the same versions, GPU and sizes replaces only the sections that it measures; each names
the revision that measured it.
"""

import copy
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import transformers
import typer
from gpu_operators import (
    CONSOLE,
    SAME_FUNCTION,
    Clock,
    Skip,
    explain,
    relative_error,
    require,
    run_sections,
)
from plot_generation import draw
from rich.box import SIMPLE
from rich.progress import track
from rich.table import Table
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, read_tokens
from modeling_mesanet.decode_graph import GRAPHS
from modeling_mesanet.mesa import short_convolution
from modeling_mesanet.mesa.mesa_solver import l2_normalize

# Relative difference of logits, of bfloat16 models of random weights that compute in another order; wrong ones would
# be off by their own size.
ALLOWED = {"mesa": 0.1, "llama": 0.1}
# The peer is only made sure to be called rightly. Its rounding errors grow so much from layer to layer that what
# can be asked of it has to be measured; it is never more than this, half of what other logits would differ by.
ALLOWED_PEER = 0.7
# Of states after rounded projections, against float64.
ALLOWED_STATE = 1e-2
# Heads that have forgotten all but this share of what came before the tokens that float64 reads again.
FORGOTTEN = 1e-4
# Parts of the names of kernels, by what they work at.
KERNELS = {
    "the solver": ("solve_chunks",),
    "states": ("prepare_chunks", "carry_states"),
    "convolutions": ("short_convolution", "convolve_chunks"),
    "norms, gates and SiLU": ("head_norm", "norm_row", "norm_tile", "gate_rows", "gates_kernel", "elementwise"),
    "matrix products": ("nvjet", "gemm", "gemv", "cutlass", "splitKreduce"),
}
# Times that every operator reads a short prompt again.
PROMPT_ROUNDS = 7
# Seconds that compiling a step takes, and that the peer takes to tune itself at first.
COMPILING, TUNING = 30, 60


@dataclass(frozen=True)
class Plan:
    """The sizes that are measured. Models: a preset, or the fields of a configuration."""

    model: str | dict = "1B"
    small_model: str | dict = "140M"
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 64
    new_tokens: int = 128
    eager_tokens: int = 40  # of what is neither recorded nor compiled, whose steps are slow
    settling: int = 8  # steps before those that are timed
    contexts: tuple[int, ...] = (8192, 32768)
    context_batches: tuple[int, ...] = (1, 8)
    checked_tokens: int = 8
    prefill: int = 32768
    prefill_chunk: int = 8192
    stream_chunk: int = 1024
    streamed: tuple[int, ...] = (1024, 8192, 65536, 262144, 1048576)
    reread: int = 4096
    written: tuple[int, ...] = (1024, 4096, 16384, 50000)


TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY |= {"head_dim": 16, "value_head_dim": 16}
SMOKE = Plan(
    model=TINY,
    small_model=TINY,
    dtype="float32",
    batches=(2,),
    prompt=5,
    new_tokens=8,
    eager_tokens=6,
    settling=2,
    contexts=(24,),
    context_batches=(2,),
    checked_tokens=3,
    prefill=144,
    prefill_chunk=48,
    stream_chunk=32,
    streamed=(64, 512),
    reread=256,
    written=(4, 12),
)


class Case(NamedTuple):
    """A row of "steps".

    `mesa`, `llama` or `peer`; cache `dynamic` or `static`; sequences; tokens before, or 0 for a short prompt; whether
    what would be recorded or compiled is to run as it is.
    """

    operator: str
    cache: str
    batch: int
    context: int
    plain: bool = False

    @property
    def quick(self) -> bool:
        """Whether steps are a CUDA graph, or compiled."""
        return not self.plain and (self.operator == "mesa" or self.cache == "static")


def mesa_config(sizes: str | dict, **fields) -> MesaNetConfig:
    # An end token, as models have, but one that is never written.
    fields |= {"bos_token_id": None, "pad_token_id": 0}
    return MesaNetConfig.preset(sizes, **fields) if isinstance(sizes, str) else MesaNetConfig(**sizes | fields)


def build(operator: str, sizes: str | dict, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A random model of one of the kinds; `sizes` are ours, the others take them over."""
    config = mesa_config(sizes)
    shared = {
        name: getattr(config, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings")
    }
    longest = {"max_position_embeddings": 2**17, "pad_token_id": 0}
    torch.manual_seed(0)
    with device:
        if operator == "mesa":
            model = MesaNetForCausalLM(config)
        elif operator == "llama":
            heads = {"num_attention_heads": config.num_attention_heads, "head_dim": config.head_dim}
            model = LlamaForCausalLM(LlamaConfig(**shared, **heads, **longest))
        else:
            from fla.models.mesa_net import MesaNetConfig as PeerConfig
            from fla.models.mesa_net import MesaNetForCausalLM as PeerForCausalLM

            heads = {"num_heads": config.num_attention_heads, "head_dim": config.head_dim}
            heads |= {"use_output_gate": config.use_output_gate, "conv_size": config.conv_kernel_size}
            model = PeerForCausalLM(PeerConfig(**shared, **heads, **longest))
    model = model.to(device, dtype).eval()
    if operator == "mesa":
        # As `from_pretrained` leaves them.
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in model._keep_in_fp32_modules_strict and dtype != torch.float64:
                parameter.data = parameter.data.float()
    model.generation_config.eos_token_id = config.vocab_size
    return model


def random_ids(config, batch: int, length: int, device: torch.device, seed: int = 1) -> torch.Tensor:
    source = torch.Generator(device).manual_seed(seed)
    return torch.randint(1, config.vocab_size, (batch, length), generator=source, device=device)


class StepClock(LogitsProcessor):
    """Notes when each step has been given to the device, and the memory in use after `marks` of them.

    `generate()` waits for every step's end before the next, so that the distances are whole steps.
    """

    def __init__(self, marks: tuple[int, ...] = (), peak: Callable[[], float | None] = lambda: None):
        self.marks, self.peak = marks, peak
        self.times: list[float] = []
        self.peaks: list[float | None] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.times.append(time.perf_counter())
        if len(self.times) in self.marks:
            self.peaks.append(self.peak())
        return scores


def forget_compiled(model: PreTrainedModel) -> None:
    """As if nothing had been compiled or recorded yet, and no static cache made."""
    torch._dynamo.reset()
    GRAPHS.of.pop(model, None)
    for name in ("_compiled_call", "_previous_max_cache_length"):
        if hasattr(model, name):
            delattr(model, name)


def kernel_group(name: str) -> str:
    """What a kernel of a pass through our model works at, by its name."""
    return next((group for group, parts in KERNELS.items() if any(part in name for part in parts)), "other")


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that the GPU spends in each group of kernels during one call, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    groups: dict[str, float] = {}
    for event in profiler.key_averages():
        group = kernel_group(event.key)
        groups[group] = groups.get(group, 0.0) + event.self_device_time_total / 1e3
    return dict(sorted(groups.items(), key=lambda item: -item[1]))


class Bench:
    """One run: its sections, each a list of rows as they stand in the results file."""

    def __init__(self, clock: Clock, plan: Plan, peer_version: str | None):
        self.clock, self.plan, self.with_peer = clock, plan, peer_version is not None
        self.device, self.dtype = clock.device, getattr(torch, plan.dtype)
        self.models: dict[str, PreTrainedModel] = {}
        self.compiled: tuple | None = None

    def model(self, operator: str) -> PreTrainedModel:
        if operator not in self.models:
            self.models[operator] = build(operator, self.plan.model, self.dtype, self.device)
        return self.models[operator]

    def wait(self) -> float:
        if self.clock.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_mib(self) -> float | None:
        """The largest memory in use since `start_peak`."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.clock.cuda else None

    def start_peak(self) -> None:
        if self.clock.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def row(self, **fields) -> Iterator[dict]:
        """A result row; what goes wrong inside is written into it, and the other rows go on."""
        row = dict(fields)
        try:
            yield row
        except Skip as reason:
            row["skipped"] = str(reason)
        # Out of memory, a compiler's failure, a wrong result.
        except Exception as error:
            row["failed"] = explain(error)
        if self.clock.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------------- steps

    def cases(self) -> list[Case]:
        """In this order: what the goals are about first. Cases that share a compiled step stand together."""
        plan = self.plan
        near = [(batch, 0) for batch in plan.batches]
        far = [(batch, context) for context in plan.contexts for batch in plan.context_batches]
        cases = [Case("mesa", "dynamic", *each) for each in sorted(near + far)]  # by batch
        cases += [Case("llama", "static", *each) for each in near]
        cases += [Case("mesa", "dynamic", *each, plain=True) for each in near]
        cases += [Case(operator, "dynamic", *each) for operator in self.operators()[1:] for each in near]
        cases += [Case("llama", "static", *each) for each in far]
        cases += [Case("llama", "dynamic", *each) for each in far]
        return cases + [Case("mesa", "dynamic", *each, plain=True) for each in far]

    def operators(self) -> list[str]:
        return ["mesa", *(["peer"] if self.with_peer else []), "llama"]

    def steps(self) -> list[dict]:
        rows = []
        for case in track(self.cases(), "steps", console=CONSOLE):
            with self.row(**case._asdict()) as row:
                rows.append(row)
                self.measure_steps(case, row)
        self.models.clear()
        return rows

    def measure_steps(self, case: Case, row: dict) -> None:
        """Fill `row` with warm-up seconds, error of the logits, and milliseconds a step."""
        # Llama's graph is one for each length of cache, ours for all.
        compiled = (case.operator, case.cache, case.batch, case.context if case.operator == "llama" else 0)
        new = case.quick and compiled != self.compiled
        compiles = new and case.operator != "mesa"
        self.clock.check_time(COMPILING if compiles else TUNING if case.operator == "peer" and case.batch == 1 else 5)
        model = self.model(case.operator)
        if new:
            forget_compiled(model)
            self.compiled = compiled
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        count = self.plan.new_tokens if case.quick else self.plan.eager_tokens
        prepare = self.prepare(case, model, count)
        counters.clear()

        row["warmup_s"] = self.generate(model, prepare, count if case.quick else 4)[0]
        if (error := self.error(case, model, prepare)) is not None:
            row["error"] = error
            require("logits", error, self.allowed(case.operator, model, row))
        graphs = counters["stats"]["unique_graphs"]
        whole, clock = self.generate(model, prepare, count)
        times = clock.times[self.plan.settling :]
        distances = sorted(after - before for before, after in pairwise(times))
        row["ms"] = 1e3 * (times[-1] - times[0]) / len(distances)
        row["spread_ms"] = [1e3 * distances[len(distances) // 5], 1e3 * distances[-1 - len(distances) // 5]]
        row["tokens_per_second"] = 1e3 * case.batch / row["ms"]
        # Prefill, caches, and a CUDA graph recorded for new addresses.
        row["besides_s"] = whole - count * row["ms"] / 1e3
        if case.quick:
            if case.operator == "mesa" and not case.context:
                self.vary(case, model)
            row["recompiled"] = counters["stats"]["unique_graphs"] - graphs
            row["graph_breaks"] = sum(counters["graph_break"].values())
            row["without_cuda_graph"] = counters["inductor"]["cudagraph_skips"]

    def prepare(self, case: Case, model: PreTrainedModel, count: int) -> Callable[[], dict]:
        """A function that gives the arguments of `generate()`: prompt, mask, and a cache ready to go on from."""
        static = case.cache == "static"
        length = case.context + 1 if case.context else self.plan.prompt
        ids = random_ids(model.config, case.batch, length, self.device)
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if case.plain:
            arguments["disable_compile"] = True
        if static and not self.clock.cuda:
            arguments["compile_config"] = CompileConfig(backend="eager", mode=None)
            arguments["compile_config"]._compile_all_devices = True
        if not case.context:
            return lambda: arguments | ({"cache_implementation": "static"} if static else {})

        def empty() -> Cache:
            if static:
                return StaticCache(config=model.config, max_cache_len=case.context + count + 1)
            return DynamicCache(config=model.config)

        if case.operator == "mesa":
            read = self.read(model, ids[:, :-1], self.plan.prefill_chunk, empty())
            return lambda: arguments | {"past_key_values": copy.deepcopy(read)}

        def filled() -> Cache:
            """The cost of a step does not depend on what the keys are."""
            cache = empty()
            with torch.no_grad():
                model(ids[:, :1], past_key_values=cache)
            for layer in cache.layers:
                if static:
                    layer.keys.normal_()
                    layer.values.normal_()
                    layer.cumulative_length.fill_(case.context)
                else:
                    layer.keys, layer.values = (
                        torch.randn(case.batch, held.shape[1], case.context, held.shape[3], out=held.new_empty(0))
                        for held in (layer.keys, layer.values)
                    )
            return cache

        return lambda: arguments | {"past_key_values": filled()}

    def generate(self, model: PreTrainedModel, prepare: Callable[[], dict], count: int, **options):
        """Seconds, and the clock or, with options, the output of one greedy `generate()`."""
        arguments, clock = prepare(), StepClock()
        began = self.wait()
        output = model.generate(
            **arguments,
            **options,
            do_sample=False,
            max_new_tokens=count,
            logits_processor=LogitsProcessorList([clock]),
        )
        return self.wait() - began, output if options else clock

    def error(self, case: Case, model: PreTrainedModel, prepare: Callable[[], dict]) -> float | None:
        """Of the first sequence's logits, against one uncached pass; None where the cache holds random numbers."""
        if case.context and case.operator != "mesa":
            return None
        options = {"output_logits": True, "return_dict_in_generate": True}
        count = self.plan.checked_tokens
        _, output = self.generate(model, prepare, count, **options)
        with torch.no_grad():
            expected = model(output.sequences[:1, :-1], use_cache=False).logits[:, -count:]
        return relative_error(torch.stack(output.logits, dim=1)[:1], expected.double())

    def allowed(self, operator: str, model: PreTrainedModel, row: dict) -> float:
        """The largest relative error of logits to be called rounding; notes in `row` what it was made from."""
        if operator != "peer":
            return ALLOWED[operator]
        row["sensitivity"] = self.sensitivity(model)
        return min(max(SAME_FUNCTION, row["sensitivity"]), ALLOWED_PEER)

    @torch.no_grad()
    def sensitivity(self, model: PreTrainedModel) -> float:
        """Relative change of a prompt's last logits when its embeddings are off by about their rounding errors."""
        ids = random_ids(model.config, 1, self.plan.prompt, self.device)
        embeddings = model.get_input_embeddings()(ids)
        source = torch.Generator(self.device).manual_seed(0)
        noise = torch.randn(embeddings.shape, generator=source, device=self.device) * torch.finfo(self.dtype).eps / 4
        inputs = embeddings, (embeddings * (1 + noise)).to(self.dtype)
        before, after = (model(inputs_embeds=rows, use_cache=False).logits[:, -1] for rows in inputs)
        return relative_error(after, before.double())

    def vary(self, case: Case, model: PreTrainedModel) -> None:
        """Generate after another length and, in a batch, behind pads: none of it may compile anything anew."""
        ids = random_ids(model.config, case.batch, self.plan.prompt + 3, self.device, seed=2)
        mask = torch.ones_like(ids)
        mask[0, : 2 if case.batch > 1 else 0] = 0
        arguments = self.prepare(case, model, 4)() | {"input_ids": ids, "attention_mask": mask}
        self.generate(model, lambda: arguments, 4)

    # ----------------------------------------------------------------------------------------------------- prefill

    @torch.no_grad()
    def read(self, model: PreTrainedModel, ids: torch.Tensor, chunk: int, cache: Cache | None = None) -> Cache:
        for piece in ids.split(chunk, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        return cache

    def read_stream(self, model: PreTrainedModel, ids: torch.Tensor, chunk: int) -> Cache:
        """As `read`; ours as a text of any length is read."""
        if isinstance(model, MesaNetForCausalLM):
            return read_tokens(model, ids, chunk_tokens=chunk)
        return self.read(model, ids, chunk)

    @torch.no_grad()
    def check_reading(
        self, operator: str, ids: torch.Tensor, chunk: int, row: dict, read: Callable[..., Cache] | None = None
    ) -> None:
        """The logits of the last token after the others in chunks, against all tokens at once."""
        model = self.model(operator)
        cache = (read or self.read)(model, ids[:, :-1], chunk)
        last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        row["error"] = relative_error(last, model(ids, logits_to_keep=1).logits[:, -1].double())
        require("logits", row["error"], self.allowed(operator, model, row))

    def reading(self, operator: str, tokens: int, chunk: int) -> Callable[[], Cache]:
        model = self.model(operator)
        return partial(self.read, model, random_ids(model.config, 1, tokens, self.device), chunk)

    def prompt(self) -> list[dict]:
        rows, tokens, rounds = [], self.plan.prompt, {}
        for operator in track(self.operators(), "prompt: check", console=CONSOLE):
            with self.row(operator=operator, tokens=tokens) as row:
                rows.append(row)
                self.clock.check_time(TUNING if operator == "peer" else 5)
                ids = random_ids(self.model(operator).config, 1, tokens, self.device)
                self.check_reading(operator, ids, tokens // 2, row)
                rounds[operator] = row, []
        # In turns, because the speed of a processor that others share changes from second to second.
        for _ in track(range(PROMPT_ROUNDS), "prompt", console=CONSOLE):
            for operator, (_, times) in rounds.items():
                times.append(self.clock.time(self.reading(operator, tokens, tokens)))
        for row, times in rounds.values():
            medians = sorted(time["ms"] for time in times)
            row |= {"ms": statistics.median(medians), "spread_ms": [medians[0], medians[-1]]}
            row["repetitions"] = sum(time["repetitions"] for time in times)
        # Last, because a profiler leaves launches slower than it found them.
        if self.clock.cuda and "mesa" in rounds:
            rounds["mesa"][0]["kernels_ms"] = kernel_times(self.reading("mesa", tokens, tokens))
        self.models.clear()
        return rows

    def prefill(self) -> list[dict]:
        plan, rows = self.plan, []
        jobs = [(operator, chunk) for operator in self.operators() for chunk in (plan.prefill, plan.prefill_chunk)]
        for operator, chunk in track(jobs, "prefill", console=CONSOLE):
            with self.row(operator=operator, tokens=plan.prefill, chunk=chunk) as row:
                rows.append(row)
                self.clock.check_time(TUNING if operator == "peer" else 5)
                if chunk < plan.prefill:
                    ids = random_ids(self.model(operator).config, 1, plan.prefill, self.device)
                    self.check_reading(operator, ids, chunk, row)
                run = self.reading(operator, plan.prefill, chunk)
                row["peak_mib"] = self.clock.peak_mib(run)
                row |= self.clock.time(run)
        # Last, as above.
        for row in rows:
            if self.clock.cuda and row["operator"] == "mesa" and "ms" in row:
                row["kernels_ms"] = kernel_times(self.reading("mesa", plan.prefill, row["chunk"]))
        self.models.clear()
        return rows

    def chunks(self) -> list[dict]:
        plan, rows = self.plan, []
        for operator in track(self.operators(), "chunks", console=CONSOLE):
            with self.row(operator=operator, tokens=plan.prefill, chunk=plan.stream_chunk) as row:
                rows.append(row)
                self.clock.check_time(TUNING if operator == "peer" else 5)
                model = self.model(operator)
                ids = random_ids(model.config, 1, plan.prefill, self.device)
                self.check_reading(operator, ids, plan.stream_chunk, row, self.read_stream)
                row |= self.clock.time(torch.no_grad()(partial(self.read_stream, model, ids, plan.stream_chunk)))
        self.models.clear()
        return rows

    # -------------------------------------------------------------------------------------------------------- cold

    def cold(self) -> list[dict]:
        with self.row(operator="mesa") as row, tempfile.TemporaryDirectory() as folder:
            self.clock.check_time(COMPILING)
            caches = {name: os.path.join(folder, name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
            paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
            arguments = [sys.executable, "-c", COLD_START, str(self.device), json.dumps(asdict(self.plan))]
            with CONSOLE.status("cold start"):
                run = subprocess.run(
                    arguments, env=os.environ | caches | {"PYTHONPATH": paths}, capture_output=True, text=True
                )
            if run.returncode:
                raise RuntimeError((run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1])
            row |= json.loads(run.stdout.splitlines()[-1])
        return [row]

    # ------------------------------------------------------------------------------------------------------ memory

    def memory(self) -> list[dict]:
        """Peaks while a smaller model reads and writes more and more, and its states after the last token read."""
        plan = self.plan
        model = build("mesa", plan.small_model, self.dtype, self.device)
        rows = []
        with self.row(operator="mesa", what="read", tokens=plan.streamed) as row:
            rows.append(row)
            self.clock.check_time(20)
            with self.row(operator="mesa", what="states", tokens=plan.streamed[-1], reread=plan.reread) as state_row:
                rows.append(state_row)
                row["peak_mib"], cache, inputs = self.stream(model)
                state_row |= compare_states(model, cache, inputs)
                require("states", state_row["error"], ALLOWED_STATE)
            if "failed" in state_row and "peak_mib" not in row:
                row["failed"] = state_row["failed"]
            row |= growth(row["peak_mib"])
        with self.row(operator="mesa", what="written", tokens=plan.written) as row:
            rows.append(row)
            self.clock.check_time(COMPILING + 1e-3 * plan.written[-1])
            forget_compiled(model)
            prepare = self.prepare(Case("mesa", "dynamic", 1, 0), model, plan.written[-1])
            self.start_peak()
            clock = StepClock(plan.written, self.peak_mib)
            arguments = prepare() | {"logits_processor": LogitsProcessorList([clock])}
            # Random weights settle on one token after a while: its steps cost what others do.
            output = model.generate(**arguments, do_sample=False, max_new_tokens=plan.written[-1])
            row["new_tokens"] = output.shape[1] - plan.prompt
            row["peak_mib"] = clock.peaks
            row["ms"] = 1e3 * (clock.times[-1] - clock.times[plan.settling]) / (len(clock.times) - 1 - plan.settling)
            row |= growth(row["peak_mib"])
        return rows

    @torch.no_grad()
    def stream(self, model: MesaNetForCausalLM):
        """Read the plan's tokens in chunks: peaks at each of its lengths, the cache, and what the mixers read last.

        The latter are, for each layer, its inputs `[1, reread, d]`.
        """
        plan, kept, peaks, cache = self.plan, [], [], None
        total, chunk = plan.streamed[-1], plan.stream_chunk
        inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

        def keep(index: int):
            return lambda module, arguments: inputs[index].append(arguments[0].cpu())

        self.start_peak()
        for start in range(0, total, chunk):
            if start == total - plan.reread:
                kept = [
                    layer.mixer.register_forward_pre_hook(keep(index))
                    for index, layer in enumerate(model.model.layers)
                ]
            ids = random_ids(model.config, 1, chunk, self.device, seed=start)
            cache = self.read(model, ids, chunk, cache)
            if start + chunk in plan.streamed:
                peaks.append(self.peak_mib())
        for hook in kept:
            hook.remove()
        return peaks, cache, [torch.cat(pieces, dim=1).to(self.device) for pieces in inputs]


def growth(peaks: list[float | None]) -> dict:
    """How much the last peak exceeds the first, relatively; nothing where memory is not counted."""
    return {} if None in peaks else {"growth": peaks[-1] / peaks[0] - 1}


@torch.no_grad()
def compare_states(model: MesaNetForCausalLM, cache: Cache, inputs: list[torch.Tensor]) -> dict:
    """Every layer's states against float64's after its last inputs alone, in the heads that have forgotten the rest.

    Args:
        model, cache: after any number of tokens.
        inputs: what each layer's mixer has read last, `[1, T, d]`.

    Returns:
        whether all states are finite, the number of heads compared, and their largest relative error.
    """
    errors, finite = [], True
    for layer, held, x in zip(model.model.layers, cache.layers, inputs, strict=True):
        mixer, states = layer.mixer, held.recurrent_state()
        finite = finite and all(bool(state.isfinite().all()) for state in states)
        beta, log_gamma = (gate.double() for gate in mixer.gates(x, None))
        k, v = mixer.k_proj(x).double(), mixer.v_proj(x).double()
        k = short_convolution(k, mixer.k_conv.weight.double().squeeze(1))[0]
        if mixer.v_conv is not None:
            v = short_convolution(v, mixer.v_conv.weight.double().squeeze(1))[0]
        k, v = (tensor.unflatten(-1, (mixer.num_heads, -1)) for tensor in (k, v))
        k = l2_normalize(k)
        decay = log_gamma.cumsum(1)
        weighted = ((decay[:, -1:] - decay).exp() * beta).unsqueeze(-1) * k
        expected = torch.einsum("bthi,bthj->bhij", weighted, k), torch.einsum("bthi,bthj->bhij", weighted, v)
        for head in (decay[0, -1].exp() < FORGOTTEN).nonzero().flatten().tolist():
            errors += [relative_error(a[:, head], b[:, head]) for a, b in zip(states, expected, strict=True)]
    if not errors:
        raise ArithmeticError("no head has forgotten enough for its states to be compared")
    return {"finite": finite, "heads": len(errors) // 2, "error": max(errors) if finite else math.nan}


# A process of its own: imports, makes its model and generates. torch itself is not counted.
COLD_START = """
import json, sys, time
import torch
device, plan = torch.device(sys.argv[1]), json.loads(sys.argv[2])
if device.type == "cuda":
    torch.zeros((), device=device)

def now():
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

times = [now()]
import modeling_mesanet
times.append(now())
from gpu_generation import build, random_ids
before = now()
model = build("mesa", plan["model"], getattr(torch, plan["dtype"]), device)
built = now() - before
ids = random_ids(model.config, 1, plan["prompt"], device)
arguments = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
found = {"import_s": times[1] - times[0], "model_s": built}
for name, count in (("first_token_s", 1), ("first_steps_s", 8), ("again_s", 8)):
    before = now()
    model.generate(ids, max_new_tokens=count, **arguments)
    found[name] = now() - before
print(json.dumps(found))
"""

# In this order: what the goals are about first.
SECTIONS = {
    "steps": Bench.steps,
    "cold": Bench.cold,
    "prompt": Bench.prompt,
    "prefill": Bench.prefill,
    "chunks": Bench.chunks,
    "memory": Bench.memory,
}


def table_of(section: str, rows: list[dict]) -> Table:
    """What a section found, for the terminal."""
    columns = {
        "steps": ("operator", "cache", "batch", "context", "ms", "warmup_s", "besides_s", "error", "recompiled"),
        "cold": ("import_s", "model_s", "first_token_s", "first_steps_s", "again_s"),
        "prompt": ("operator", "tokens", "ms", "spread_ms", "error"),
        "prefill": ("operator", "tokens", "chunk", "ms", "peak_mib", "error"),
        "chunks": ("operator", "tokens", "chunk", "ms", "error"),
        "memory": ("what", "tokens", "peak_mib", "growth", "finite", "heads", "error", "ms"),
    }[section]
    table = Table(*columns, "", box=SIMPLE, title=section)

    def cell(value) -> str:
        if isinstance(value, list | tuple):
            return " ".join(cell(each) for each in value)
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns), row.get("failed") or row.get("skipped"))
    return table


def main(
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1, or cpu with --smoke.")] = "cuda",
    only: Annotated[str, typer.Option(help=f"Sections, with commas: {', '.join(SECTIONS)}. All by default.")] = "",
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to instead of results/.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="No row is begun that would end later than this.")] = 480,
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, to try the program; written to outputs/.")] = False,
) -> None:
    """Measure generation by MesaNet and its neighbours."""
    run_sections(
        "gpu_generation",
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
        libraries={"transformers": transformers.__version__},
    )


if __name__ == "__main__":
    typer.run(main)
