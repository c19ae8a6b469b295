# SPDX-License-Identifier: Apache-2.0
"""`mesanet serve`: transformers' own server, `transformers serve`, with MesaNet registered."""

import functools
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers.utils import import_utils

from .modeling_mesanet import MesaNetForCausalLM


class ServingError(RuntimeError):
    """The server cannot run so; the message says what to install or to leave out."""


def serve(folder: Path, options: Sequence[str] = ()) -> None:
    """Serve a checkpoint over HTTP (OpenAI's completions, and chat where its tokenizer has a template), until stopped.

    Args:
        folder: the checkpoint, which becomes the only model of the server, under this name.
        options: those of `transformers serve`, such as `("--device", "cuda", "--port", "8000")`.

    Raises:
        ServingError: what transformers' server needs is not installed, or an option asks for what MesaNet has not.
    """
    if any(option.split("=")[0] == "--continuous-batching" for option in options):
        raise ServingError(
            "--continuous-batching keeps keys and values in pages, which a recurrent state has not; leave it out."
        )
    available = getattr(import_utils, "is_serve_available", None)
    if available is None or not available():
        raise ServingError(
            "transformers' server needs packages that are not installed; pip install 'transformers[serving]'."
        )
    from transformers.cli.transformers import app

    # The server looks a checkpoint's class up by its name in transformers, not through the Auto classes.
    transformers.MesaNetForCausalLM = MesaNetForCausalLM
    refuse_chat_without_template()
    list_only(folder)
    app(["serve", str(folder), *options])


def list_only(folder: Path) -> None:
    """Let `/v1/models` name the checkpoint that is served, not what lies in the Hub's cache, and may not be there."""
    from transformers.cli.serving.model_manager import ModelManager

    created = int((folder / "config.json").stat().st_mtime)
    entry = {"id": str(folder), "object": "model", "created": created, "owned_by": ""}
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [entry])


def refuse_chat_without_template() -> None:
    """Let the server answer 400 and one sentence, not 500, to a chat with a tokenizer that has no chat template."""
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    def refusing(handle):
        @functools.wraps(handle)
        async def handle_request(self, body, request_id):
            try:
                return await handle(self, body, request_id)
            except ValueError as error:
                if "chat_template is not set" not in str(error):
                    raise
                message = (
                    "the tokenizer of this checkpoint has no chat template, so that it cannot tell who speaks; send "
                    'the text itself as "prompt" to /v1/completions.'
                )
                raise HTTPException(status_code=400, detail=message) from error

        return handle_request

    for handler in (ChatCompletionHandler, ResponseHandler):
        handler.handle_request = refusing(handler.handle_request)


__all__ = ["ServingError", "serve"]
