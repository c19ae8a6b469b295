# SPDX-License-Identifier: Apache-2.0
"""What the example programs share: finding and reading the novels, the tokenizer, packed blocks of tokens.

Dimension legend: N tokens in the corpus, L tokens in a block, B blocks in a batch.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_mesanet.eval.results import UsageError, read_documents, utf8_bytes
from modeling_mesanet.files import fingerprint, replacing, replacing_folder, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
SPECIAL_TOKEN = "<|endoftext|>"

# Alternatives in order; every character of any text falls into exactly one piece, so decoding gives the text back.
#   1. a word with the space before it and its contraction ("don't", "master's"): one form of a word whatever quotation
#      mark or dash stands before it, where GPT-4's expression would spend entries on '"I' and "(I" beside " I";
#   2. digits one by one;
#   3. punctuation with the line breaks after it and the quotation mark that opens the next line: '."\n\n"' is the most
#      frequent event of dialogue, one token here, five without;
#   4. line breaks; many of these novels are wrapped at some 70 columns, and a line break of its own keeps the first
#      word of a line the same as anywhere else;
#   5. other runs of white space, the last space left to the word that follows.
PIECES = (
    r" ?\p{L}+(?:'\p{L}+)?"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+(?:[\"'](?=\p{L}))?)?"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


# ---------------------------------------------------------------------------------------------------- files


def data_folder(given: Path | None) -> Path:
    """The folder that holds `corpus/` and `perplexity/`: as given, else the environment variable `MESANET_DATA`."""
    if given is not None:
        origin, folder = "--data-dir", Path(given)
    elif os.environ.get("MESANET_DATA"):
        origin, folder = "MESANET_DATA", Path(os.environ["MESANET_DATA"])
    else:
        raise UsageError(
            "--data-dir is missing: give it (or set MESANET_DATA to) the folder that holds "
            "corpus/novels_train.jsonl.gz."
        )
    if not (folder / "corpus").is_dir():
        raise UsageError(
            f"{origin} is {folder}, which has no folder 'corpus': give --data-dir (or set MESANET_DATA) to the folder "
            "that holds corpus/novels_train.jsonl.gz."
        )
    return folder


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, progress: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer of `vocab_size` entries, `<|endoftext|>` (id 0) among them.

    Encoding puts `<|endoftext|>` in front, as each training document begins; decoding gives back any text exactly.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size is {vocab_size}; the 256 bytes and the special token need at least {smallest}: give more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKEN} $A",
        pair=f"{SPECIAL_TOKEN} $A $B:1",
        special_tokens=[(SPECIAL_TOKEN, tokenizer.token_to_id(SPECIAL_TOKEN))],
    )
    # No model_max_length: the state has a fixed size, so no length is too long. Padding goes to the left, where
    # generation continues from the last token of every row.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKEN,
        eos_token=SPECIAL_TOKEN,
        pad_token=SPECIAL_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's core that encodes whole documents and takes everything in them for text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Encoding a padded or truncated batch leaves that switched on in the core.
    backend.no_padding()
    backend.no_truncation()
    # "<|endoftext|>" spelled out in a document is no end of it.
    backend.encode_special_tokens = True
    return backend


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], progress: str | None = None
) -> np.ndarray:
    """All documents as one array of tokens `[N]`, each with the special token in front.

    Args:
        progress: label of the progress bar; None shows none.
    """
    backend = plain_backend(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts, group, size = [], [], 0
    with tqdm(total=utf8_bytes(documents), unit="B", unit_scale=True, desc=progress, disable=progress is None) as bar:
        for index, text in enumerate(documents):
            group.append(text)
            size += len(text)
            # Groups of some 8 million characters keep every core busy and memory bounded.
            if size >= 8_000_000 or index == len(documents) - 1:
                parts += [np.array(encoding.ids, dtype) for encoding in backend.encode_batch_fast(group)]
                bar.update(utf8_bytes(group))
                group, size = [], 0
    return np.concatenate(parts)


def cached_tokens(
    tokenizer: PreTrainedTokenizerFast, source: Path, target: Path, progress: str | None = None
) -> tuple[np.ndarray, dict]:
    """The tokens of `source` from `target` (`.npy`, memory-mapped), tokenised and written there first if need be.

    Returns:
        The array `[N]` and a description: name, SHA-256, documents, bytes and tokens of the source.
    """
    if not Path(source).is_file():
        raise UsageError(f"No such file: {source}. Give --data-dir the folder that holds corpus/{Path(source).name}.")
    key = {
        "file": Path(source).name,
        "sha256": fingerprint(source),
        "tokenizer_sha256": hashlib.sha256(plain_backend(tokenizer).to_str().encode()).hexdigest(),
    }
    description = Path(target).with_suffix(".json")
    try:
        known = json.loads(description.read_text(encoding="utf-8"))
        if key.items() <= known.items():
            tokens = np.load(target, mmap_mode="r")
            if len(tokens) == known["tokens"]:
                return tokens, known
    except (OSError, ValueError):
        pass  # not there yet, or cut short: made anew
    documents = read_documents(source)
    tokens = encode_documents(tokenizer, documents, progress)
    with replacing(target) as temporary:
        np.save(temporary, tokens)
    known = {**key, "documents": len(documents), "bytes": utf8_bytes(documents), "tokens": len(tokens)}
    write_json(description, known)
    return np.load(target, mmap_mode="r"), known


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes that each token stands for, `[vocabulary]`; 0 for special tokens.

    In a byte-level vocabulary each character of an entry stands for one byte.
    """
    lengths = np.zeros(len(tokenizer), np.int64)
    for entry, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in tokenizer.all_special_ids else len(entry)
    return lengths


# ---------------------------------------------------------------------------------------------------- packed blocks


class TrainingBlocks(torch.utils.data.Dataset):
    """All blocks of a training run in the order in which it sees them.

    Every epoch cuts the corpus at another offset and shuffles the blocks anew, both drawn from (seed, epoch) alone.
    Item i therefore is the same block in every run, which makes a resumed run see what an uninterrupted one sees.

    Args:
        tokens: the corpus `[N]`, may be memory-mapped.
        length: L, tokens a block.
        count: blocks in the whole run.
        seed: of the order.
    """

    def __init__(self, tokens: np.ndarray, length: int, count: int, seed: int):
        if len(tokens) < length:
            raise UsageError(
                f"sequence_length is {length}, but the corpus has only {len(tokens)} tokens: make it shorter."
            )
        self.tokens, self.length = tokens, length
        epochs, total, epoch = [], 0, 0
        while total < count:
            rng = np.random.default_rng([seed, epoch])
            offset = rng.integers(min(length, len(tokens) - length + 1))
            starts = offset + length * rng.permutation((len(tokens) - offset) // length)
            epochs.append(starts)
            total, epoch = total + len(starts), epoch + 1
        self.starts = np.concatenate(epochs)[:count] if epochs else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.starts[index]
        return self.tokens[start : start + self.length]


def pack(blocks: list[np.ndarray], bos: int) -> dict[str, torch.Tensor]:
    """A batch of blocks as model inputs.

    Returns:
        `input_ids` `[B, L]`; `labels` `[B, L]`, -100 where the label would be `bos`: where a document starts is not to
        be learnt. Where a document starts inside a block also `position_ids` `[B, L]`, which start again at 0 there,
        and the same as `cu_seq_lens_q` (int32, bounds of the documents in the flattened batch): the model starts those
        documents with an empty state. A batch without such a place needs neither, and the plain path is faster.
    """
    input_ids = torch.from_numpy(np.stack(blocks).astype(np.int64))
    starts = input_ids == bos
    batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(starts, -100)}
    if starts[:, 1:].any():
        starts[:, 0] = True
        index = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        batch["position_ids"] = index - torch.where(starts, index, 0).cummax(dim=1).values
        bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([input_ids.numel()])])
        batch["cu_seq_lens_q"] = bounds.to(torch.int32)
    return batch
