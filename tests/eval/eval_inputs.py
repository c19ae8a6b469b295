# SPDX-License-Identifier: Apache-2.0
"""Text and checkpoints that the tests of the evaluations make."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCE = "It was a dark night and the rain fell in torrents, and the old captain never came back. "


def save_checkpoint(folder: Path, model, *, bos: str | None) -> Path:
    """`model` (of 300 entries) with a byte-pair tokenizer in `folder`."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"]
    )
    pairs.train_from_iterator([SENTENCE], trainer)
    PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=bos).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
