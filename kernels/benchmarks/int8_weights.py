# SPDX-License-Identifier: Apache-2.0
"""What weights in eight bits save and cost on a CPU: bytes of all tensors, loss, and speed of decoding.

    pip install ".[int8]"
    python kernels/benchmarks/int8_weights.py

Prints a table and writes it, with versions and revision, to `results/int8_weights.json`; the README quotes it. The
bundled checkpoint, in float32 and in bfloat16, is measured beside itself with `int8_weights()`: its loss on the text
of LICENSE and its greedy decoding, the two in turns. The sizes named by `--presets` have random weights and are only
weighed.
"""

import importlib.metadata
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from cpu_generation import TEXT, cpu_name, decode_rate
from gpu_operators import CONSOLE, RESULTS, read_revision, versions
from readme_tables import int8_weights as markdown_table
from rich.markdown import Markdown
from rich.progress import track
from transformers import AutoTokenizer

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, bundled_checkpoint, int8_weights, load_checkpoint
from modeling_mesanet.files import write_json

DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)


def load_pair(path: str | Path | None, dtype: str) -> dict[str, MesaNetForCausalLM]:
    """A checkpoint as it is ("plain") and with weights in eight bits ("int8"); `dtype` is of all other tensors."""
    return {
        name: load_checkpoint(path, dtype=getattr(torch, dtype), quantization_config=quantization)
        for name, quantization in (("plain", None), ("int8", int8_weights()))
    }


def tensor_bytes(model: MesaNetForCausalLM) -> int:
    """Bytes of all parameters and buffers, scales of quantised ones included; a tied head counts once."""
    from torchao.utils import get_model_size_in_bytes

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return get_model_size_in_bytes(model) - (head.nbytes if head is embedding else 0)


def preset_bytes(name: str) -> dict[str, dict[str, int]]:
    """Bytes of a published size, by dtype and by what `load_pair` calls the two."""
    with tempfile.TemporaryDirectory() as folder:
        MesaNetForCausalLM(MesaNetConfig.preset(name)).save_pretrained(folder)
        return {
            dtype: {kind: tensor_bytes(model) for kind, model in load_pair(folder, dtype).items()} for dtype in DTYPES
        }


def text_loss(model: MesaNetForCausalLM, ids: torch.Tensor) -> float:
    """Cross-entropy of `ids` `[1, T]`, nats per token."""
    return model(ids, labels=ids, use_cache=False).loss.item()


@torch.inference_mode()
def main(
    presets: Annotated[str, typer.Option(help="Published sizes to weigh, with commas.")] = "140M",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the fastest counts.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate in a run.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Git revision of this code, where it is no checkout.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Weigh, score and time models with weights in eight bits."""
    try:
        int8_weights()
    except ImportError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    measured = {}
    for dtype in track(DTYPES, "bundled checkpoint", console=CONSOLE):
        models = load_pair(None, dtype)
        rates = {kind: {batch: [] for batch in BATCHES} for kind in models}
        for batch in BATCHES:
            for repeat in range(repeats + 1):
                # In turns, and the fastest counts: what else the machine does can only slow one of them down.
                for kind, model in models.items():
                    rate = decode_rate(model, batch, new_tokens, 1)
                    if repeat:  # first calls allocate
                        rates[kind][batch].append(rate)
        measured[dtype] = {
            kind: {
                "loss": text_loss(model, ids),
                "bytes": tensor_bytes(model),
                "tokens_per_second": {str(batch): max(found) for batch, found in rates[kind].items()},
            }
            for kind, model in models.items()
        }
    names = [name.strip() for name in presets.split(",") if name.strip()]
    results = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": threads,
        "versions": versions(None)
        | {"transformers": transformers.__version__, "torchao": importlib.metadata.version("torchao")},
        "revision": revision or read_revision(),
        "text": {"file": TEXT.name, "tokens": ids.shape[1]},
        "bundled": measured,
        "preset_bytes": {name: preset_bytes(name) for name in track(names, "presets", console=CONSOLE)},
    }
    write_json(output / "int8_weights.json", results)
    CONSOLE.print(Markdown(markdown_table(results)))


if __name__ == "__main__":
    typer.run(main)
