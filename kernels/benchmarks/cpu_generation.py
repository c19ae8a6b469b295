# SPDX-License-Identifier: Apache-2.0
"""Speed of the bundled checkpoint on a CPU, beside a plain per-token loop over the oracle's formula.

    python kernels/benchmarks/cpu_generation.py

Prints a table and writes it, with versions and revision, to `kernels/benchmarks/results/cpu_generation.json`; the
README quotes it from there. The loop is the same model read one token at a time, with every Mesa layer computed as it
is defined (a state update and a dense solve a token, in float32); for the prompt also with the other layers reading
all tokens at once. It gets the number of threads that suits it better. Its outputs are compared with ours before
anything is timed.
"""

import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from modeling_mesanet import MesaNetForCausalLM, bundled_checkpoint, modeling_mesanet
from modeling_mesanet.files import write_json
from modeling_mesanet.mesa import MesaOutput, mesa_reference

RESULTS = Path(__file__).parent / "results" / "cpu_generation.json"
# Logits of the two implementations differ by the solver's tolerance and float32 rounding.
AGREEMENT = 5e-3
LOOP_TOKENS = 256
TEXT = Path(__file__).parents[2] / "LICENSE"


def attention_by_loop(*tensors, initial_state=None, output_final_state=False, **options) -> MesaOutput:
    """`mesa_attention` as the definition reads: token by token, one dense solve each, in float32."""
    o, state = mesa_reference(*tensors, initial_state=initial_state, dtype=torch.float32)
    return MesaOutput(o, state if output_final_state else None, None)


def step_by_loop(*tensors, state, **options) -> MesaOutput:
    """`mesa_step` by the same formula; the state is overwritten as there."""
    output = attention_by_loop(*tensors, initial_state=state, output_final_state=True)
    for stored, new in zip(state, output.final_state, strict=True):
        stored.copy_(new)
    return MesaOutput(output.o, state, None)


class LoopMesaLayers:
    """While active, every Mesa layer runs the per-token loop."""

    def __enter__(self):
        self.saved = modeling_mesanet.mesa_attention, modeling_mesanet.mesa_step, modeling_mesanet.decodes_layer
        modeling_mesanet.mesa_attention = attention_by_loop
        modeling_mesanet.decodes_layer = lambda *args: False
        modeling_mesanet.mesa_step = lambda *args, **options: step_by_loop(*args[:-1], state=args[-1])

    def __exit__(self, *exception):
        modeling_mesanet.mesa_attention, modeling_mesanet.mesa_step, modeling_mesanet.decodes_layer = self.saved


def english(batch: int, tokens: int) -> torch.Tensor:
    """Prompts of real text, `[batch, tokens]`: on random tokens the solver would take more steps than a user sees."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    return torch.stack([ids[start : start + tokens] for start in range(0, batch * 200, 200)])


def prefill_rate(model: MesaNetForCausalLM, tokens: int, repeats: int, piece: int | None = None) -> float:
    """Median tokens per second of reading a prompt as `generate` does, in pieces of `piece` tokens (None: at once)."""
    ids = english(1, tokens)
    seconds = []
    for _ in range(repeats):
        state = None
        began = time.perf_counter()
        for part in ids.split(piece or tokens, dim=1):
            state = model(part, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
        seconds.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds)


def decode_rate(model: MesaNetForCausalLM, batch: int, tokens: int, repeats: int) -> float:
    """Median tokens per second, all sequences together, of greedy generation after a prompt of 64 tokens."""
    ids = english(batch, 64)
    seconds = []
    for _ in range(repeats):
        state = model(ids, use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(tokens):
            last = state.logits[:, -1].argmax(-1, keepdim=True)
            state = model(last, past_key_values=state.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - began)
    return batch * tokens / statistics.median(seconds)


def revision() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@torch.inference_mode()
def main(
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 5,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS,
) -> None:
    """Time prefill and decode of the bundled checkpoint."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MesaNetForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()
    ids = english(1, 100)
    ours = model(ids).logits
    with LoopMesaLayers():
        error = ((model(ids).logits - ours).norm() / ours.norm()).item()
    if not error <= AGREEMENT:
        raise RuntimeError(f"the loop's logits differ by {error:.1e} (relative); timing them would mean nothing")

    # (ours, the loop's); the loop reads a shorter prompt, since its rate does not depend on the length.
    jobs = {
        "prefill, 2048 tokens; loop: whole model, token by token": (
            lambda n: prefill_rate(model, 2048, n),
            lambda n: prefill_rate(model, LOOP_TOKENS, n, piece=1),
        ),
        "prefill, 2048 tokens; loop: in the Mesa layers only": (
            lambda n: prefill_rate(model, 2048, n),
            lambda n: prefill_rate(model, LOOP_TOKENS, n),
        ),
        "decode, batch 1": (lambda n: decode_rate(model, 1, 64, n),) * 2,
        "decode, batch 8": (lambda n: decode_rate(model, 8, 64, n),) * 2,
    }
    rows = {}
    for name, (ours, loop) in tqdm(jobs.items(), desc="timing"):
        ours(1)  # first calls allocate
        rate, loop_rate = ours(repeats), 0.0
        for count in {1, threads}:
            torch.set_num_threads(count)
            with LoopMesaLayers():
                loop_rate = max(loop_rate, loop(repeats))
        torch.set_num_threads(threads)
        rows[name] = {"tokens_per_second": rate, "loop_tokens_per_second": loop_rate, "ratio": rate / loop_rate}

    table = Table("", "tokens/s", "per-token loop", "ratio", title=f"bundled checkpoint, float32, {threads} threads")
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[key]:.0f}" for key in ("tokens_per_second", "loop_tokens_per_second")),
            f"{row['ratio']:.1f}",
        )
    Console().print(table)
    content = {
        "rows": rows,
        "relative_error_to_loop": error,
        "threads": threads,
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "revision": revision(),
    }
    write_json(output, content)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
