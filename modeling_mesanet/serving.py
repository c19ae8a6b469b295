# SPDX-License-Identifier: Apache-2.0
"""`mesanet serve`: transformers' own server, `transformers serve`, with MesaNet registered."""

from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.utils import import_utils

from .modeling_mesanet import MesaNetForCausalLM


class ServingError(RuntimeError):
    """The server cannot run here; the message says what to install."""


def serve(folder: Path, options: Sequence[str] = ()) -> None:
    """Serve a checkpoint over HTTP (OpenAI's completions, and chat where its tokenizer has a template), until stopped.

    Args:
        folder: the checkpoint, which becomes the only model of the server, under this name.
        options: those of `transformers serve`, such as `("--device", "cuda", "--port", "8000")`.

    Raises:
        ServingError: what transformers' server needs is not installed.
    """
    available = getattr(import_utils, "is_serve_available", None)
    if available is None or not available():
        raise ServingError(
            "transformers' server needs packages that are not installed; pip install 'transformers[serving]'."
        )
    from transformers.cli.transformers import app

    # The server looks a checkpoint's class up by its name in transformers, not through the Auto classes.
    transformers.MesaNetForCausalLM = MesaNetForCausalLM
    app(["serve", str(folder), *options])


__all__ = ["ServingError", "serve"]
