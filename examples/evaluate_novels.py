# SPDX-License-Identifier: Apache-2.0
"""Evaluates a language model on novels it never saw: `python examples/evaluate_novels.py CHECKPOINT`.

Two figures, both with every token of the text predicted exactly once:

* bits per byte on novels_valid: each novel is read from its first token to its last with one recurrent state, in
  chunks; total bits over total UTF-8 bytes.
* perplexity of a book at several context lengths n: the book is cut into consecutive windows of n tokens, each read
  after the special token with an empty state; exp of the mean loss. All lengths score the same tokens (the first so
  many that every n divides their number), so that figures differ by context alone.
"""

import itertools
import math
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from novels import UsageError, data_folder, encode_documents, token_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modeling_mesanet  # noqa: F401  (registers MesaNet with the Auto classes)
from modeling_mesanet.eval.perplexity import (
    EncodedDocument,
    band_edges,
    default_tokens_at_once,
    perplexity,
    token_losses,
)
from modeling_mesanet.eval.results import progress_bar, read_documents, read_rows, save_figure, utf8_bytes
from modeling_mesanet.files import fingerprint, write_json


def losses_with_bar(model, sequences: list[np.ndarray], label: str | None, **options) -> list[np.ndarray]:
    """`token_losses` under a progress bar named `label`; None shows none."""
    if label is None:
        return token_losses(model, sequences, **options)
    with progress_bar() as bar:
        task = bar.add_task(label, total=sum(len(sequence) - 1 for sequence in sequences))
        return token_losses(model, sequences, advance=lambda count: bar.advance(task, count), **options)


def bits_per_byte(
    model, tokenizer, documents: dict[str, str], limit: int | None, progress: str | None = None, **options
) -> dict:
    """Bits per byte over whole documents, each read with one recurrent state.

    Args:
        documents: text by name.
        limit: only the first so many tokens of each document; None takes all.
        progress: label of the progress bar; None shows none.
        options: for `token_losses`.
    """
    sizes = token_bytes(tokenizer)
    stop = None if limit is None else limit + 1
    sequences = [encode_documents(tokenizer, [text])[:stop] for text in documents.values()]
    losses = losses_with_bar(model, sequences, progress, **options)
    # The special token in front is never scored; all other tokens are, with all bytes of the text.
    counted = [int(sizes[sequence[1:].astype(np.int64)].sum()) for sequence in sequences]
    if limit is None and sum(counted) != utf8_bytes(documents.values()):
        raise RuntimeError(f"the tokens hold {sum(counted)} bytes, the text {utf8_bytes(documents.values())}")
    nats = [float(values.sum(dtype=np.float64)) for values in losses]
    tokens = sum(map(len, losses))
    return {
        "bits_per_byte": sum(nats) / math.log(2) / sum(counted),
        "nats_per_token": sum(nats) / tokens,
        "tokens": tokens,
        "bytes": sum(counted),
        "tokens_of_each_document_limited_to": limit,
        "documents": {
            name: {"bits_per_byte": total / math.log(2) / size, "tokens": len(values), "bytes": size}
            for name, total, size, values in zip(documents, nats, counted, losses, strict=True)
        },
    }


def context_perplexity(
    model, tokenizer, text: str, lengths: list[int], limit: int | None, progress: str | None = None, **options
) -> dict:
    """Perplexity of one text in windows of each length, and by position in the longest windows.

    Args:
        lengths: context lengths in tokens; each must divide the longest.
        limit: use at most so many tokens; None uses all.
        progress: label of the progress bars; None shows none.
        options: for `token_losses`.
    """
    shortest, longest = min(lengths), max(lengths)
    uneven = [n for n in lengths if n < 1 or longest % n]
    if uneven:
        raise UsageError(f"context length {uneven[0]} does not divide the longest, {longest}: choose lengths that do.")
    document = EncodedDocument(encode_documents(tokenizer, [text]), bos=True)
    tokens = document.scored
    usable = min(tokens, tokens if limit is None else limit) // longest * longest
    if usable == 0:
        raise UsageError(
            f"the book has {tokens} tokens{'' if limit is None else f' (limited to {limit})'}, fewer than the "
            f"longest context length, {longest}: choose shorter lengths or another book."
        )
    losses = {}
    for length in sorted(lengths):
        label = None if progress is None else f"{progress}, {length}"
        windows = losses_with_bar(model, document.windows(length, usable), label, **options)
        losses[length] = np.stack(windows).reshape(-1, longest)
    return {
        "perplexity": {length: perplexity(values) for length, values in losses.items()},
        "tokens": usable,
        "tokens_of_book": tokens,
        "positions": position_curve(losses[longest], losses[shortest], shortest),
    }


def position_curve(losses: np.ndarray, with_short_context: np.ndarray, first: int) -> list[dict]:
    """Perplexity by position in the window, in bands that double in width from `first` tokens on.

    Each band holds other text, harder or easier. The same tokens' perplexity with a short context is given beside it:
    the difference is what the longer context is worth.

    Args:
        losses: `[windows, tokens]`.
        with_short_context: the losses of the same tokens, `[windows, tokens]`.
    """
    return [
        {
            "from": a,
            "to": b,
            "perplexity": perplexity(losses[:, a:b]),
            "perplexity_with_short_context": perplexity(with_short_context[:, a:b]),
        }
        for a, b in itertools.pairwise(band_edges(losses.shape[1], first))
    ]


def plot_perplexity(book: str, by_length: dict[int, float], curve: list[dict], path: Path) -> None:
    """Perplexity against context length, and by position in the longest windows, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{book}, a book the model never saw")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="context length, tokens", ylabel="perplexity, the same tokens at every length")
    left.set_xscale("log", base=2)
    left.plot(list(by_length), list(by_length.values()), "o-")
    for length, value in by_length.items():
        left.annotate(f"{value:.2f}", (length, value), textcoords="offset points", xytext=(0, 8), ha="center")
    left.margins(0.15)
    right.set(xlabel="position in the window, tokens", ylabel="perplexity")
    right.set_xscale("log", base=2)
    edges = [curve[0]["to"] / 2] + [band["to"] for band in curve]  # the first band begins at 0, which has no logarithm
    for key, label in (
        ("perplexity", f"with up to {max(by_length)} tokens of context"),
        ("perplexity_with_short_context", f"the same tokens with up to {min(by_length)}"),
    ):
        right.stairs([band[key] for band in curve], edges, baseline=None, label=label, linewidth=1.5)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def load(checkpoint: Path, device: str, dtype: str) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer; float32 by default, in which chunked and one-pass reading agree best."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UsageError(f"--dtype is {dtype!r}; choose {' or '.join(dtypes)}.")
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint} has no config.json: give the folder of a saved checkpoint.")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtypes[dtype])
    try:
        return model.to(device).eval(), tokenizer
    except RuntimeError as error:
        raise UsageError(f"--device is {device!r}, which torch cannot use here: {error}".splitlines()[0]) from error


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with model and tokenizer, as save_pretrained writes it.")],
    output: Annotated[
        Path | None, typer.Option(help="JSON to write; the figure goes beside it (default: evaluation.json there).")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds corpus/ and perplexity/ (default: MESANET_DATA).")
    ] = None,
    book: Annotated[str, typer.Option(help="Name of a book in perplexity/books/.")] = "jack_sheppard",
    lengths: Annotated[str, typer.Option(help="Context lengths, with commas.")] = "512,2048,8192,32768",
    chunk: Annotated[int, typer.Option(help="Tokens read at a time.", min=1)] = 2048,
    tokens_at_once: Annotated[
        int | None, typer.Option(help="Tokens in one forward pass, over all windows (default: 65536 on a GPU).", min=1)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Read at most so much of each text: a quick look, not the figure.", min=2)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
) -> None:
    """Measure a checkpoint on novels_valid and on a book, and write the result as JSON and PNG."""
    transformers.utils.logging.disable_progress_bar()
    data = data_folder(data_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        context_lengths = sorted({int(n) for n in lengths.split(",")})
    except ValueError as error:
        raise UsageError(f"--lengths is {lengths!r}; give whole numbers with commas, such as 512,2048.") from error
    corpus_file, book_file = data / "corpus" / "novels_valid.jsonl.gz", data / "perplexity" / "books" / f"{book}.txt"
    rows, (text,) = read_rows(corpus_file), read_documents(book_file)
    novels = {str(row.get("id", index)): row["text"] for index, row in enumerate(rows)}
    model, tokenizer = load(checkpoint, device, dtype)
    options = {
        "chunk": chunk,
        "tokens_at_once": tokens_at_once or default_tokens_at_once(device),
    }

    began = time.monotonic()
    valid = bits_per_byte(model, tokenizer, novels, max_tokens, progress="novels_valid", **options)
    valid |= {"file": corpus_file.name, "sha256": fingerprint(corpus_file), "chunk": chunk}
    valid["seconds"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    unseen = context_perplexity(model, tokenizer, text, context_lengths, max_tokens, progress=book, **options)
    unseen |= {"file": book_file.name, "sha256": fingerprint(book_file)}
    unseen["seconds"] = round(time.monotonic() - began, 1)

    weights = checkpoint / "model.safetensors"
    output = output if output is not None else checkpoint / "evaluation.json"
    result = {
        "checkpoint": {
            "name": checkpoint.resolve().name,
            "sha256": fingerprint(weights) if weights.is_file() else None,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "novels_valid": valid,
        "book": unseen,
        "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(output, result)
    figure = output.with_suffix(".png")
    plot_perplexity(book, unseen["perplexity"], unseen["positions"], figure)
    print(
        f"novels_valid: {valid['bits_per_byte']:.4f} bits per byte ({valid['tokens']} tokens, {valid['bytes']} bytes)"
    )
    for length, value in unseen["perplexity"].items():
        print(f"{book}: perplexity {value:.2f} at {length} tokens")
    print(f"written: {output} and {figure}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        sys.exit(f"error: {error}")
