# SPDX-License-Identifier: Apache-2.0
"""Trains the byte-level byte-pair tokenizer of the novels checkpoint: `python examples/train_tokenizer.py --help`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from novels import UsageError, data_folder, read_documents, save_tokenizer, train_tokenizer, utf8_bytes


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder to write; replaced if it is there.")] = Path("tokenizer"),
    vocab_size: Annotated[int, typer.Option(help="Entries, the special token included.")] = 8192,
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds corpus/ (default: MESANET_DATA).")] = None,
) -> None:
    """Train on the training novels, save, and report the size of a token on the validation novels."""
    corpus = data_folder(data_dir) / "corpus"
    training = read_documents(corpus / "novels_train.jsonl.gz")
    validation = read_documents(corpus / "novels_valid.jsonl.gz")
    tokenizer = train_tokenizer(training, vocab_size)
    if len(tokenizer) != vocab_size:
        raise UsageError(
            f"--vocab-size is {vocab_size}, but the corpus yields only {len(tokenizer)} entries: give that or less."
        )
    save_tokenizer(tokenizer, output_dir)
    encoded = tokenizer(validation, add_special_tokens=False)["input_ids"]
    for text, ids in zip(validation, encoded, strict=True):
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise RuntimeError("a validation novel does not come back from the tokenizer as it went in")
    tokens = sum(map(len, encoded))
    print(
        f"{output_dir}: {len(tokenizer)} entries; novels_valid: {utf8_bytes(validation)} bytes in {tokens} tokens, "
        f"{utf8_bytes(validation) / tokens:.4f} bytes per token; every novel decodes to its own text"
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        sys.exit(f"error: {error}")
