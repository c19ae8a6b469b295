# SPDX-License-Identifier: Apache-2.0
"""Speed of `generate()` with drafted tokens, beside plain greedy decoding, which it must equal token by token.

    python kernels/benchmarks/speculative_decoding.py                                     # bundled checkpoint, CPU
    python kernels/benchmarks/speculative_decoding.py --device cuda --models bundled,440M

Prints tables and writes them, with versions and revision, to `results/speculative_decoding.json`, on a GPU to
`results/speculative_decoding_<GPU>.json`. Two things are measured. First `generate()` itself: plain, with prompt
lookup (drafts copied from what stands before) and with early exit (drafts by the first layers); on a GPU, which reads
by CUDA graphs, also without these. Where the tokens are not the greedy ones, which may happen below float32, it tells
how close the two tokens' logits were, in steps of their dtype. Second what a step costs: a token read alone, and
drafts of several lengths read at once with all but one taken back. That tells what other drafts would bring: a step
that reads n tokens and keeps m of them gains m times the first cost over the second, if drafts and transformers' loop
over them cost nothing.

The bundled checkpoint's drafts are as good as they are in use: greedily it soon repeats itself, which prompt lookup
finds; its early layers were not trained to write. A model of random weights repeats one token, so that its rows show
the most that drafts can gain, when all are right; only the cost of a step is that of a trained model.
"""

import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import transformers
import typer
from cpu_generation import cpu_name
from gpu_operators import read_driver, read_revision, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, DynamicCache

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint
from modeling_mesanet.decode_graph import DecodeGraph, decode_graph
from modeling_mesanet.files import write_json

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
DRAFTS = (1, 5, 11, 21)  # tokens a step: the last accepted one, and drafts
PROMPTS = ("It was a dark night", "The old captain", "She opened the letter and", "Mr. Holmes looked up")


def load(name: str, device: torch.device, dtype: torch.dtype) -> MesaNetForCausalLM:
    """The bundled checkpoint, or a preset with random weights."""
    if name == "bundled":
        model = MesaNetForCausalLM.from_pretrained(bundled_checkpoint(), dtype=dtype)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            model = MesaNetForCausalLM(MesaNetConfig.preset(name)).to(dtype)
    # The model then drafts as many tokens as it is told, however unsure it is.
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.num_assistant_tokens = 4
    return model.to(device).eval()


def methods(model: MesaNetForCausalLM) -> dict[str, dict]:
    """Arguments of `generate` by name; first what the others are compared with."""
    layers = model.config.num_hidden_layers
    first = max(1, layers // 4)
    options = {
        "greedy": {},
        "prompt lookup, 4 tokens": {"prompt_lookup_num_tokens": 4},
        "prompt lookup, 10 tokens": {"prompt_lookup_num_tokens": 10},
        f"early exit after {first} of {layers} layers": {"assistant_early_exit": first},
    }
    if decode_graph(model) is not None:
        for name in ("greedy", "prompt lookup, 10 tokens"):
            options[f"{name}, without CUDA graphs"] = options[name] | {"disable_compile": True}
    return options


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that a call takes, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@torch.no_grad()
def distance(model: MesaNetForCausalLM, tokens: torch.Tensor, others: torch.Tensor) -> float:
    """How far apart the logits of two next tokens are, in steps of their dtype; `others` are the same up to the last.

    Args:
        tokens, others: `[1, T]`.
    """
    logits = model(tokens[:, :-1], logits_to_keep=1).logits[0, -1]
    pair = logits[[int(tokens[0, -1]), int(others[0, -1])]].double()
    step = torch.finfo(logits.dtype).eps * 2 ** pair.abs().max().log2().floor()
    return float((pair[0] - pair[1]).abs() / step)


def generation_rows(model: MesaNetForCausalLM, prompts: list[torch.Tensor], new_tokens: int) -> list[dict]:
    """Each method on all prompts: tokens a second, tokens a step of the model, and how many are the greedy ones."""
    rows, greedy, layers = [], [], model.config.num_hidden_layers
    for name, options in track(methods(model).items(), description="generate"):
        steps, spent, same, distances = 0, 0.0, 0, []

        def count(*_):
            nonlocal steps
            steps += model.config.num_hidden_layers == layers  # drafting with some of the layers is no step

        arguments = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, **options}
        hook = model.model.register_forward_pre_hook(count)
        for prompt in prompts:
            model.generate(prompt, **arguments)
        hook.remove()  # since a model with hooks has no CUDA graph
        model.generate(prompts[0], **arguments)  # which compiles and allocates
        for index, prompt in enumerate(prompts):
            elapsed, output = timed(partial(model.generate, prompt, **arguments), prompt.device)
            spent += elapsed
            if len(greedy) == index:
                greedy.append(output)
            differ = (output != greedy[index])[0].nonzero()
            if differ.numel():
                first = int(differ[0])
                distances.append(distance(model, greedy[index][:, : first + 1], output[:, : first + 1]))
            same += (first if differ.numel() else output.shape[1]) - prompt.shape[1]
        total = new_tokens * len(prompts)
        rows.append(
            {
                "method": name,
                "tokens_per_second": total / spent,
                "tokens_per_step": total / steps,
                "same_tokens": same,
                "logit_steps_apart": max(distances, default=None),
                "tokens": total,
            }
        )
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


@torch.no_grad()
def step_rows(model: MesaNetForCausalLM, prompt: torch.Tensor, repeats: int) -> list[dict]:
    """What it costs to read n tokens at once, and n tokens of which all but one are taken back; medians."""
    rows, device, steps = [], prompt.device, decode_graph(model)
    for length in DRAFTS:
        tokens = prompt[:, :1].repeat(1, length)
        row = {"tokens": length}
        for name, record in (("plain_ms", False), ("rollback_ms", True)):
            cache, spent = DynamicCache(config=model.config), []
            model(prompt, past_key_values=cache)
            if record:
                cache.activate_past_recording()
            read = model if steps is None else DecodeGraph(model, steps.made_of, length, drafts=record)

            def step(read=read, cache=cache, record=record, tokens=tokens):
                read(input_ids=tokens, past_key_values=cache)
                if record:
                    cache.crop(1 - tokens.shape[1])

            for _ in range(repeats + 3):
                spent.append(timed(step, device)[0] * 1e3)
            row[name] = statistics.median(spent[3:])
        rows.append(row)
    return rows


def main(
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    models: Annotated[str, typer.Option(help="With commas: bundled, or a preset (140M, 440M, 1B).")] = "bundled",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 192,
    prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="Prompts.")] = len(PROMPTS),
    repeats: Annotated[int, typer.Option(min=1, help="Steps of which the median counts.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Time generation with drafted tokens; status 1 where float32 tokens differ from the greedy ones."""
    torch.set_num_threads(threads)
    place, precision = torch.device(device), getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
    texts = [tokenizer(text, return_tensors="pt")["input_ids"].to(place) for text in PROMPTS[:prompts]]
    machine = torch.cuda.get_device_name(place) if place.type == "cuda" else cpu_name()
    results = {
        "date": date.today().isoformat(),
        "machine": machine,
        "threads": threads,
        "driver": read_driver() if place.type == "cuda" else None,
        "versions": versions(None) | {"transformers": transformers.__version__},
        "revision": revision or read_revision(),
        "dtype": dtype,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "models": {},
    }
    console, wrong = Console(), False
    for name in models.split(","):
        model = load(name, place, precision)
        rows = generation_rows(model, texts, new_tokens)
        steps = step_rows(model, texts[0], repeats)
        results["models"][name] = {"generation": rows, "steps": steps}
        table = Table("", "tokens/s", "ratio", "tokens a step", "as greedy", title=f"{name}, {dtype}, {machine}")
        for row in rows:
            wrong |= dtype == "float32" and row["same_tokens"] != row["tokens"]
            figures = (f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}", f"{row['tokens_per_step']:.2f}")
            table.add_row(row["method"], *figures, f"{row['same_tokens']} of {row['tokens']}")
        console.print(table)
        table = Table("tokens a step", "ms", "ms, all but one taken back", title=name)
        for row in steps:
            table.add_row(str(row["tokens"]), f"{row['plain_ms']:.2f}", f"{row['rollback_ms']:.2f}")
        console.print(table)
    gpu = "_" + re.sub(r"[^A-Za-z0-9]+", "_", machine.removeprefix("NVIDIA ")) if place.type == "cuda" else ""
    write_json(output / f"speculative_decoding{gpu}.json", results)
    if wrong:
        console.print("tokens differ from the greedy ones in float32: something is broken, or two logits tied")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
