# SPDX-License-Identifier: Apache-2.0
"""`mesanet perplexity`: the loss of every token of some documents, by its position and by the length of its context.

Every document is read from its first token to its last with one recurrent state (or key-value cache), or, with context
lengths, in consecutive windows of each length that start with an empty state and all score the same tokens.

Dimensions: N sequences, T tokens of a sequence.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mesanet import MesaNetConfig
from modeling_mesanet.files import fingerprint, replacing, write_json
from modeling_mesanet.loading import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    load_tokenizer,
    weights_sha256,
)

from .results import (
    UsageError,
    environment,
    open_results,
    output_console,
    parse_numbers,
    progress_bar,
    read_named_documents,
    require,
    save_figure,
    write_csv,
)

# Tokens in one forward pass over all sequences, where nothing else is asked for: logits take vocabulary times 4 bytes
# of each.
TOKENS_AT_ONCE = {"cuda": 65536, "cpu": 8192}

# The first band of positions in the summary; each further band is twice as wide.
FIRST_BAND = 128

WHOLE = "whole"


# ---------------------------------------------------------------------------------------------------- losses


def iterate_losses(
    model: PreTrainedModel,
    sequences: list[np.ndarray],
    *,
    chunk: int = 2048,
    tokens_at_once: int = 16384,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """The loss of every token but the first of each sequence, given all tokens before it, in nats.

    Sequences are read side by side in chunks, each continuing from the cache of the one before: the result is that of
    one long forward pass, and with a recurrent state memory does not grow with the length.

    Args:
        model: in evaluation mode, with a cache.
        sequences: arrays of tokens, of at least 2 each.
        chunk: tokens read at a time.
        tokens_at_once: as many sequences are read side by side as stay within so many tokens a chunk.
        advance: called with the number of tokens scored since the last call.

    Yields:
        The index of a sequence of n tokens and its losses `[n - 1]`, float32; longest sequences first.
    """
    device = model.device
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
    first = 0
    while first < len(by_length):
        longest = len(sequences[by_length[first]]) - 1
        group = by_length[first : first + max(1, tokens_at_once // min(chunk, longest))]
        first += len(group)
        losses = [np.empty(len(sequences[index]) - 1, np.float32) for index in group]
        # Shorter sequences are filled up at the end, after everything that is scored.
        tokens = np.zeros((len(group), longest + 1), np.int64)
        for row, index in enumerate(group):
            tokens[row, : len(sequences[index])] = sequences[index]
        cache, cache_rows = None, len(group)
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            # Longest first: the sequences that reach this chunk are the first rows.
            rows = sum(len(values) > start for values in losses)
            with torch.inference_mode():
                if rows < cache_rows:
                    cache.batch_select_indices(torch.arange(rows, device=device))
                part = torch.from_numpy(tokens[:rows, start : stop + 1]).to(device)
                output = model(input_ids=part[:, :-1], past_key_values=cache, use_cache=True)
                cache, cache_rows = output.past_key_values, rows
                nats = F.cross_entropy(output.logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
                nats = nats.view(rows, -1).cpu().numpy()
            for row, values in enumerate(losses[:rows]):
                scored = values[start:stop]
                scored[:] = nats[row, : len(scored)]
                if advance is not None:
                    advance(len(scored))
        yield from zip(group, losses, strict=True)


def token_losses(model: PreTrainedModel, sequences: list[np.ndarray], **options) -> list[np.ndarray]:
    """`iterate_losses` as a list in the order of `sequences`."""
    losses = dict(iterate_losses(model, sequences, **options))
    return [losses[index] for index in range(len(sequences))]


class EncodedDocument(NamedTuple):
    """Tokens `[1 + n]` of a document of which the last n are scored; `bos`: the first is the special token."""

    tokens: np.ndarray
    bos: bool

    @property
    def scored(self) -> int:
        return len(self.tokens) - 1

    def windows(self, length: int | None, usable: int | None = None) -> list[np.ndarray]:
        """The scored tokens (the first `usable` of them) in consecutive windows of `length`, each after one token:
        the special token, or, where the tokenizer has none, the token before the window. None is a single window.
        """
        usable = self.scored if usable is None else usable
        length = usable if length is None else length
        pieces = (self.tokens[start + 1 : start + 1 + length] for start in range(0, usable, length))
        lead = self.tokens[:1] if self.bos else None
        return [
            np.concatenate([self.tokens[index * length][None] if lead is None else lead, piece])
            for index, piece in enumerate(pieces)
        ]


def encode(tokenizer: PreTrainedTokenizerBase, name: str, text: str, limit: int | None = None) -> EncodedDocument:
    """The document as tokens, its special tokens spelled out taken for text; only the first `limit` are scored.

    Raises:
        UsageError: nothing is left to score.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id is not None
    tokens = np.array(([tokenizer.bos_token_id] if bos else []) + ids, np.int64)
    if len(tokens) < 2:
        raise UsageError(f"the document '{name}' has no token to score; give it more text or leave it out.")
    return EncodedDocument(tokens if limit is None else tokens[: limit + 1], bos)


# ---------------------------------------------------------------------------------------------------- summaries


def perplexity(losses: np.ndarray) -> float:
    return math.exp(losses.mean(dtype=np.float64))


def band_edges(length: int, first: int) -> list[int]:
    """Bounds of position bands that double in width from `first` tokens on, from 0 to `length`."""
    edges, stop = [0], first
    while edges[-1] < length:
        edges.append(min(stop, length))
        stop *= 2
    return edges


class PositionSums(NamedTuple):
    """Sum of losses and number of tokens at each position, `[T]` each; position 0 is the first scored token."""

    nats: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, losses: Iterable[np.ndarray]) -> "PositionSums":
        losses = list(losses)
        longest = max(map(len, losses))
        nats, tokens = np.zeros(longest), np.zeros(longest, np.int64)
        for values in losses:
            nats[: len(values)] += values
            tokens[: len(values)] += 1
        return cls(nats, tokens)

    def mean(self) -> np.ndarray:
        return self.nats / self.tokens

    def mean_so_far(self) -> np.ndarray:
        """The mean over all tokens up to and with each position."""
        return self.nats.cumsum() / self.tokens.cumsum()

    def binned(self, edges: np.ndarray | list[int]) -> np.ndarray:
        """The mean within each bin, over its tokens."""
        return self._between(self.nats, edges) / self._between(self.tokens, edges)

    @staticmethod
    def _between(values: np.ndarray, edges: np.ndarray | list[int]) -> np.ndarray:
        total = np.concatenate([[0], values.cumsum()])[edges]
        return total[1:] - total[:-1]


def figures(nats: float, tokens: int, size: int | None = None) -> dict:
    """Loss in nats a token, perplexity, and bits a byte where the size of the text is known."""
    result = {"tokens": tokens, "nll": nats / tokens, "perplexity": math.exp(nats / tokens)}
    if size is not None:
        result |= {"bytes": size, "bits_per_byte": nats / math.log(2) / size}
    return result


def compare(result: dict, reference: float | None) -> dict:
    """`result` beside the reference model's loss on the same tokens."""
    if reference is None:
        return result
    return {**result, "reference_nll": reference, "difference": result["nll"] - reference}


# ---------------------------------------------------------------------------------------------------- models


class LoadedModel(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: dict


def load_model(path: str | os.PathLike | None, *, device: str, dtype: str, argument: str) -> LoadedModel:
    """Any causal language model with its tokenizer, in evaluation mode; a MesaNet whole or not at all.

    Args:
        path: folder or Hub id; None is the bundled checkpoint.
        dtype: "float32", "bfloat16", "float16" or "auto".
        argument: what to call `path` in messages.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    folder = find_checkpoint(path, argument=argument)
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    except Exception:  # whatever it is, the checked loading below says it in one sentence
        kind = MesaNetConfig.model_type
    if kind == MesaNetConfig.model_type:
        tokenizer = load_tokenizer(folder, argument=argument)
        model = load_checkpoint(folder, dtype=dtype, device=device, argument=argument)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True
            )
        # transformers raises errors of many kinds, all of which mean the same here; the cause is kept.
        except Exception as error:
            raise CheckpointError(
                f"{argument} is '{folder}', a '{kind}' that transformers cannot load "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}); give a causal language model with its "
                "tokenizer."
            ) from error
        model = model.to(device).eval()
    # All that determines the result: config, weights, tokenizer.
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256("".join(file.name + fingerprint(file) for file in files).encode()).hexdigest()
    downloaded = path is not None and not Path(path).expanduser().is_dir()
    weights = weights_sha256(folder, argument=argument) if kind == MesaNetConfig.model_type else None
    name = str(path) if downloaded else folder.resolve().name
    description = {"name": name, "sha256": digest, "weights": weights}
    return LoadedModel(model, tokenizer, description)


# ---------------------------------------------------------------------------------------------------- measurement


def measure(
    model: PreTrainedModel,
    documents: dict[str, EncodedDocument],
    length: int | None,
    usable: dict[str, int],
    journal: Path,
    *,
    label: str,
    **options,
) -> dict[str, np.ndarray]:
    """The losses of every document, `[n]` each, in windows of `length` (None: whole).

    A document's losses are written into the folder `journal` as soon as its last token is scored, and are read from
    there by the next run.

    Args:
        usable: scored tokens to read of each document.
        label: of the progress bar.
        options: for `iterate_losses`.
    """
    losses, sequences, owners = {}, [], []
    for index, (name, document) in enumerate(documents.items()):
        known = read_losses(journal / f"{index:05d}.npy", usable[name])
        if known is not None:
            losses[name] = known
            continue
        windows = document.windows(length, usable[name])
        sequences += windows
        owners += [(name, part, len(windows), index) for part in range(len(windows))]
    parts: dict[str, dict[int, np.ndarray]] = {}
    with progress_bar() as bar:
        task = bar.add_task(label, total=sum(usable.values()), completed=sum(map(len, losses.values())))
        for sequence, values in iterate_losses(model, sequences, advance=lambda n: bar.advance(task, n), **options):
            name, part, count, index = owners[sequence]
            held = parts.setdefault(name, {})
            held[part] = values
            if len(held) == count:
                losses[name] = np.concatenate([held[part] for part in range(count)])
                del parts[name]
                with replacing(journal / f"{index:05d}.npy") as temporary:
                    np.save(temporary, losses[name])
    return {name: losses[name] for name in documents}


def read_losses(path: Path, tokens: int) -> np.ndarray | None:
    """What the journal holds of a document, or None."""
    try:
        losses = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return losses if losses.shape == (tokens,) and losses.dtype == np.float32 else None


def usable_tokens(documents: dict[str, EncodedDocument], lengths: list[int] | None) -> dict[str, int]:
    """How many tokens of each document are scored: all, or whole windows of the longest context length.

    Raises:
        UsageError: a length does not divide the longest, or no document is that long.
    """
    if lengths is None:
        return {name: document.scored for name, document in documents.items()}
    longest = max(lengths)
    uneven = [length for length in lengths if longest % length]
    if uneven:
        raise UsageError(f"context length {uneven[0]} does not divide the longest, {longest}: choose lengths that do.")
    usable = {name: document.scored // longest * longest for name, document in documents.items()}
    if not any(usable.values()):
        most = max(document.scored for document in documents.values())
        raise UsageError(
            f"the longest document has {most} tokens (--max-tokens applied), fewer than the longest context length, "
            f"{longest}: choose shorter lengths or longer texts."
        )
    return {name: tokens for name, tokens in usable.items() if tokens}


def default_tokens_at_once(device: str | torch.device) -> int:
    return TOKENS_AT_ONCE.get(torch.device(device).type, TOKENS_AT_ONCE["cpu"])


def run(
    texts: list[Path],
    *,
    output: Path,
    model: str | None = None,
    reference: str | None = None,
    lengths: str | None = None,
    max_tokens: int | None = None,
    chunk: int = 2048,
    tokens_at_once: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    resume: bool = False,
    plot: bool = True,
) -> dict:
    """Measure a model on documents; writes `perplexity.json`, `positions.csv` and `perplexity.png` into `output`.

    Args:
        texts: files as `read_named_documents` takes them.
        model: folder or Hub id; None is the bundled checkpoint.
        reference: a second model with the same tokenizer, whose loss is compared by position.
        lengths: context lengths with commas; None reads every document whole.
        max_tokens: score at most so many tokens of each document.
        chunk, tokens_at_once: as in `iterate_losses`; they change speed and memory, not results.
        resume: go on with an interrupted run in `output`.

    Returns:
        The content of `perplexity.json`: `lengths`, `documents`, `positions` (bands of the longest context),
        `training_length`, `extrapolation` (within it and beyond), all in nats a token.

    Raises:
        UsageError: a file, an option or the folder does not fit.
        CheckpointError: a model cannot be loaded.
    """
    if plot:
        require("matplotlib", "the figure (--no-plot leaves it out)")
    context = None if lengths is None else parse_numbers(lengths, "--lengths")
    named = read_named_documents(texts)
    loaded = load_model(model, device=device, dtype=dtype, argument="--model")
    other = None if reference is None else load_model(reference, device=device, dtype=dtype, argument="--reference")
    documents = {name: encode(loaded.tokenizer, name, text, max_tokens) for name, text in named.items()}
    if other is not None:
        check_same_tokens(documents, other, named, max_tokens)
    usable = usable_tokens(documents, context)
    scored = {name: documents[name] for name in usable}
    settings = {
        "command": "perplexity",
        "model": loaded.description,
        "reference": None if other is None else other.description,
        "documents": {name: hashlib.sha256(named[name].encode()).hexdigest() for name in named},
        "lengths": context,
        "max_tokens": max_tokens,
        "dtype": dtype,
    }
    folder = open_results(output, settings, resume=resume)

    options = {"chunk": chunk, "tokens_at_once": tokens_at_once or default_tokens_at_once(device)}
    losses: dict[str, dict] = {"model": {}, "reference": {}}
    for role, entry in (("model", loaded), ("reference", other)):
        for length in (context or [None]) if entry is not None else []:
            key = WHOLE if length is None else length
            losses[role][key] = measure(
                entry.model,
                scored,
                length,
                usable,
                folder / "losses" / f"{role}-{key}",
                label=f"{role}, {key}",
                **options,
            )
    sizes = {
        # Only a document that is read to its end has as many bytes as its text.
        name: len(named[name].encode())
        if max_tokens is None and documents[name].bos and usable[name] == documents[name].scored
        else None
        for name in usable
    }
    result = {
        "settings": settings,
        "environment": environment(device),
        "left_out": sorted(named.keys() - usable.keys()),
        **summarize(losses, context, sizes, getattr(loaded.model.config, "max_position_embeddings", None)),
    }
    longest = context[-1] if context else WHOLE
    sums = {role: by_position(held[longest], context) for role, held in losses.items() if held}
    write_positions(folder / "positions.csv", sums)
    if plot:
        plot_positions(folder / "perplexity.png", sums, result, shorter_windows(losses["model"], result))
    write_json(folder / "perplexity.json", result)
    return result


def check_same_tokens(
    documents: dict[str, EncodedDocument], other: LoadedModel, named: dict[str, str], limit: int | None
) -> None:
    """Refuse a reference model that reads other tokens: positions could not be compared."""
    for name, document in documents.items():
        tokens = encode(other.tokenizer, name, named[name], limit).tokens
        if not np.array_equal(tokens, document.tokens):
            raise UsageError(
                f"--reference is '{other.description['name']}', whose tokenizer splits '{name}' otherwise than "
                "--model's; give a model with the same tokenizer."
            )


def by_position(losses: dict[str, np.ndarray], lengths: list[int] | None) -> PositionSums:
    """Losses of the longest context summed over all its windows."""
    if lengths is None:
        return PositionSums.of(losses.values())
    return PositionSums.of(window for values in losses.values() for window in values.reshape(-1, max(lengths)))


def shorter_windows(losses: dict, result: dict) -> tuple[int, PositionSums] | None:
    """The losses, by position in the longest windows, of the same tokens in windows of the training length, or else in
    the shortest; None where there is one length only.
    """
    lengths = result["settings"]["lengths"]
    if not lengths or len(lengths) == 1:
        return None
    length = result["training_length"] if result["training_length"] in lengths[:-1] else lengths[0]
    return length, by_position(losses[length], lengths)


def summarize(losses: dict, lengths: list[int] | None, sizes: dict[str, int | None], training: int | None) -> dict:
    """The figures of a run; `losses` by role, context length and document, `sizes` in bytes."""

    def total(held: dict[str, np.ndarray]) -> float:
        return sum(float(values.sum(dtype=np.float64)) for values in held.values())

    keys = lengths or [WHOLE]
    tokens = sum(map(len, losses["model"][keys[0]].values()))
    size = sum(sizes.values()) if None not in sizes.values() else None

    def other(key) -> float | None:
        return total(losses["reference"][key]) / tokens if losses["reference"] else None

    by_length = {str(key): compare(figures(total(losses["model"][key]), tokens, size), other(key)) for key in keys}
    longest = keys[-1]
    by_document = {}
    for name, values in losses["model"][longest].items():
        reference = losses["reference"][longest][name] if losses["reference"] else None
        entry = figures(float(values.sum(dtype=np.float64)), len(values), sizes[name])
        by_document[name] = compare(entry, None if reference is None else float(reference.mean(dtype=np.float64)))

    sums = {role: by_position(held[longest], lengths) for role, held in losses.items() if held}
    length = len(sums["model"].nats)

    def between(start: int, stop: int) -> dict:
        entry = figures(float(sums["model"].nats[start:stop].sum()), int(sums["model"].tokens[start:stop].sum()))
        reference = sums.get("reference")
        entry = compare(entry, None if reference is None else float(reference.binned([start, stop])[0]))
        return {"from": start, "to": stop, **entry}

    edges = band_edges(length, min(lengths) if lengths and len(lengths) > 1 else FIRST_BAND)
    summary = {
        "lengths": by_length,
        "documents": by_document,
        "positions": [between(start, stop) for start, stop in pairwise(edges)],
        "training_length": training,
        "extrapolation": None,
    }
    if training is not None and length > training:
        summary["extrapolation"] = {"within": between(0, training), "beyond": between(training, length)}
    return summary


# ---------------------------------------------------------------------------------------------------- output


def write_positions(path: Path, sums: dict[str, PositionSums]) -> None:
    """One row a position (1 is the first scored token): losses, means so far, differences to the reference."""
    model, reference = sums["model"], sums.get("reference")
    so_far = model.mean_so_far()
    columns = {
        "position": np.arange(1, len(so_far) + 1),
        "tokens": model.tokens,
        "nll": model.mean(),
        "mean_nll_so_far": so_far,
        "perplexity_so_far": np.exp(so_far),
    }
    if reference is not None:
        columns |= {
            "reference_nll": reference.mean(),
            "reference_mean_nll_so_far": reference.mean_so_far(),
            "difference": model.mean() - reference.mean(),
            "difference_so_far": so_far - reference.mean_so_far(),
        }
    write_csv(path, list(columns), zip(*(values.tolist() for values in columns.values()), strict=True))


def bins(length: int, *, log: bool, count: int = 64) -> np.ndarray:
    """Bounds of at most `count` bins over the positions, of equal width or of equal width in the logarithm."""
    edges = np.geomspace(1, length + 1, count + 1) - 1 if log else np.linspace(0, length, count + 1)
    return np.unique(edges.round().astype(int))


def plot_positions(
    path: Path, sums: dict[str, PositionSums], result: dict, shorter: tuple[int, PositionSums] | None
) -> None:
    """Loss by position, mean so far and differences to the reference and to shorter windows, each on a log and on a
    linear axis.
    """
    from matplotlib.figure import Figure

    names = {role: result["settings"][role]["name"] for role in sums}
    length = len(sums["model"].nats)
    several = len(result["lengths"]) > 1
    others = {"the reference": sums["reference"]} if "reference" in sums else {}
    if shorter is not None:
        others[f"windows of {shorter[0]:,} tokens"] = shorter[1]
    rows = 2 + len(others) + several
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for column, log in enumerate((True, False)):
        edges = bins(length, log=log)
        # Positions are counted from 1 on the axes, so that the first has a logarithm.
        centres = (edges[:-1] + edges[1:] + 1) / 2
        panels = [grid[row][column] for row in range(rows)]
        for role, held in sums.items():
            panels[0].plot(centres, held.binned(edges), label=names[role])
            panels[1].plot(centres, held.mean_so_far()[edges[1:] - 1], label=names[role])
        panels[0].set_ylabel("loss by position, nats")
        panels[1].set_ylabel("mean loss so far, nats")
        for axes, (name, other) in zip(panels[2:], others.items(), strict=False):
            axes.plot(centres, sums["model"].binned(edges) - other.binned(edges), label="by position")
            so_far = sums["model"].mean_so_far() - other.mean_so_far()
            axes.plot(centres, so_far[edges[1:] - 1], label="of the means so far")
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_ylabel(f"difference to\n{name}, nats")
        for axes in panels[: rows - several]:
            if log:
                axes.set_xscale("log", base=2)
            if result["training_length"] and result["training_length"] < length:
                axes.axvline(result["training_length"], color="grey", linestyle=":", label="training length")
            axes.set_xlabel("position, tokens")
            axes.grid(alpha=0.3)
            axes.legend()
        if several:
            axes = panels[-1]
            lengths = [int(key) for key in result["lengths"]]
            for role, key in (("model", "nll"), ("reference", "reference_nll")):
                if role in sums:
                    values = [math.exp(entry[key]) for entry in result["lengths"].values()]
                    axes.plot(lengths, values, "o-", label=names[role])
            if log:
                axes.set_xscale("log", base=2)
            axes.set(xlabel="context length, tokens", ylabel="perplexity, the same tokens")
            axes.grid(alpha=0.3)
            axes.legend()
    save_figure(figure, path)


def print_result(result: dict) -> None:
    """The figures as tables on standard output."""
    console = output_console()
    compared = result["settings"]["reference"] is not None
    parts = (
        ("context length", result["lengths"]),
        ("document", result["documents"]),
        ("position", {f"{band['from'] + 1:,} to {band['to']:,}": band for band in result["positions"]}),
    )
    if result["extrapolation"]:
        training = f"{result['training_length']:,}"
        within, beyond = result["extrapolation"].values()
        parts += (("training length", {f"up to {training}": within, f"beyond {training}": beyond}),)
    for title, entries in parts:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column(title)
        for heading in ("tokens", "nats a token", "perplexity", "bits a byte", *(["difference"] if compared else [])):
            table.add_column(heading, justify="right")
        for name, entry in entries.items():
            bits = f"{entry['bits_per_byte']:.4f}" if "bits_per_byte" in entry else "-"
            cells = [f"{entry['tokens']:,}", f"{entry['nll']:.4f}", f"{entry['perplexity']:.2f}", bits]
            table.add_row(name, *cells, *([f"{entry['difference']:+.4f}"] if compared else []))
        console.print(table)
    if result["left_out"]:
        console.print(f"shorter than the longest context length, left out: {', '.join(result['left_out'])}")
