# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, asked by an HTTP client."""

import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from transformers.utils.import_utils import is_serve_available

from modeling_mesanet import bundled_checkpoint
from modeling_mesanet.serving import ServingError, serve

pytestmark = pytest.mark.skipif(not is_serve_available(), reason='needs pip install "transformers[serving]"')

# A process imports torch and loads the checkpoint, on a machine that may be busy.
STARTS_WITHIN = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server of the bundled checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_mesanet.cli", "serve", str(bundled_checkpoint())]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(address, body):
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_checkpoint_is_the_only_model(server):
    with urlopen(f"{server}/v1/models", timeout=60) as answer:
        (model,) = json.load(answer)["data"]
    assert (model["id"], model["object"]) == (str(bundled_checkpoint()), "model")


def test_continuous_batching_is_refused_before_the_server_starts():
    with pytest.raises(ServingError, match="--continuous-batching keeps keys and values in pages"):
        serve(bundled_checkpoint(), ["--port", "0", "--continuous-batching"])


def test_completions(server):
    body = {"model": str(bundled_checkpoint()), "prompt": "It was a dark", "max_tokens": 4, "temperature": 0}
    (choice,) = post(f"{server}/v1/completions", body)["choices"]
    assert choice["text"].strip()


@pytest.mark.parametrize(
    ("route", "said"),
    [("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}), ("responses", {"input": "Hello"})],
)
def test_chat_without_a_template_is_refused(server, route, said):
    with pytest.raises(HTTPError) as refused:
        post(f"{server}/v1/{route}", {"model": str(bundled_checkpoint()), **said})
    assert refused.value.code == 400
    assert "has no chat template" in json.load(refused.value)["detail"]
