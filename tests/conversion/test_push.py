# SPDX-License-Identifier: Apache-2.0
"""Uploads to a stand-in for the Hub: what is refused before anything is sent, what arrives, and that it loads."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mesanet import load_checkpoint
from modeling_mesanet.conversion.card import CARD, card_of_folder, write_card
from modeling_mesanet.conversion.export import export
from modeling_mesanet.conversion.push import check_repo_id, files_to_push
from modeling_mesanet.loading import CheckpointError

TOKEN = "hf_" + "aB3" * 12

# Runs one command line after the other, since importing takes longer than they do. Offline mode and the Hub's address
# are read when huggingface_hub is imported, which is why this cannot happen in the process of the tests.
WORKER = """
import json, sys, traceback
from typer.testing import CliRunner
from modeling_mesanet.cli import app

for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    shown = "" if result.exception is None else "".join(traceback.format_exception(result.exception))
    print(json.dumps({
        "code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "traceback": shown
    }), flush=True)
"""


@pytest.fixture(scope="module")
def hub():
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def mesanet(hub, tmp_path_factory):
    """Run the command line against the stand-in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # The stand-in speaks LFS; Xet storage is another service.
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_TELEMETRY": "1"}
    log = tmp_path_factory.mktemp("log") / "stderr"
    with (
        open(log, "w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        ) as process,
    ):

        def run(*arguments) -> dict:
            process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, log.read_text()[-3000:]
            # What a library prints past the command's own streams counts as printed too.
            return {**json.loads(answer), "log": log.read_text()}

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def ready(checkpoint, tmp_path_factory) -> Path:
    """A folder that may go up: code, tokenizer, card, and weights large enough for LFS."""
    folder = tmp_path_factory.mktemp("ready") / "tiny"
    export(checkpoint, folder, check=False)
    write_card(card_of_folder(folder, license="apache-2.0", repo_id="me/tiny"), folder / CARD)
    assert (folder / "model.safetensors").stat().st_size > hub_server.REGULAR_LIMIT
    return folder


@pytest.fixture
def spoilt(ready, tmp_path):
    return Path(shutil.copytree(ready, tmp_path / "spoilt"))


class TestFolder:
    def test_lists_every_file_with_its_size(self, ready):
        files = files_to_push(ready)
        assert [file.path for file in files] == sorted(file.name for file in ready.iterdir())
        assert all(file.size == (ready / file.path).stat().st_size for file in files)

    def test_leaves_hidden_files_out(self, spoilt):
        (spoilt / ".cache").mkdir()
        (spoilt / ".cache" / "state.bin").write_bytes(pickle.dumps(1))
        (spoilt / ".notes").write_text("mine")
        assert not [file for file in files_to_push(spoilt) if file.path.startswith(".")]

    @staticmethod
    def _edit(name, **fields):
        def edit(folder):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, **fields}))

        return edit

    @staticmethod
    def _metadata(folder):
        weights = folder / "model.safetensors"
        save_file(load_file(weights), weights, metadata={"format": "pt", "source": "/home/me/runs/7"})

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
            (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
            (lambda folder: (folder / CARD).unlink(), "holds no card"),
            (lambda folder: (folder / CARD).write_text("# Mine\n"), "no valid card .*no block of metadata"),
            (lambda folder: (folder / "mesa_solver.py").unlink(), "refers to code but which holds no mesa_solver.py"),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(
                    (folder / "model.safetensors").read_bytes()[:-1]
                ),
                "model.safetensors is truncated",
            ),
            (
                lambda folder: save_file({"x": torch.zeros(1)}, folder / "more.safetensors"),
                "more.safetensors belongs to no part",
            ),
            (lambda folder: torch.save({"x": 1}, folder / "optimizer.pt"), "optimizer.pt is a pickle"),
            (lambda folder: torch.save({"x": 1}, folder / "state.dat"), "state.dat is a pickle"),
            (lambda folder: (folder / "state").write_bytes(pickle.dumps({"x": 1})), "state is a pickle"),
            (lambda folder: (folder / "leak.txt").write_text(f"token: {TOKEN}"), "leak.txt contains an access token"),
            (lambda folder: (folder / "log.txt").write_text("saved to /home/me/runs/1"), "'/home/me/runs/1'"),
            (lambda folder: (folder / "log.txt").write_text("saved to C:\\Users\\me\\runs"), r"C:\\Users"),
            (lambda folder: (folder / "link.txt").symlink_to("/etc/hostname"), "link to a file outside"),
            (lambda folder: (folder / "notes.json").write_text("{"), "notes.json is no JSON"),
        ],
    )
    def test_refuses_what_should_not_be_published(self, spoilt, spoil, message):
        spoil(spoilt)
        self.refuse(spoilt, message)

    def test_refuses_paths_of_this_machine_in_json_and_in_weights(self, spoilt):
        self._metadata(spoilt)
        self.refuse(spoilt, "model.safetensors contains the path '/home/me/runs/7'")
        save_file(load_file(spoilt / "model.safetensors"), spoilt / "model.safetensors", metadata={"format": "pt"})
        self._edit("tokenizer_config.json", name_or_path="/gpfs/group/model")(spoilt)
        self.refuse(spoilt, "tokenizer_config.json contains the path '/gpfs/group/model'")

    def test_lets_addresses_and_relative_paths_pass(self, spoilt):
        (spoilt / "notes.txt").write_text("https://example.org/home/page and docs/tmp/x and and/or 1/2")
        self._edit("tokenizer_config.json", note="either/or", link="https://example.org/tmp/x")(spoilt)
        assert files_to_push(spoilt)

    @staticmethod
    def refuse(folder, message):
        with pytest.raises(CheckpointError, match=message) as caught:
            files_to_push(folder)
        assert str(caught.value).startswith("FOLDER is ")
        assert str(caught.value).endswith(".")
        assert TOKEN not in str(caught.value)

    @pytest.mark.parametrize("name", ["", "a b", "a/b/c", "-x", "me/-"])
    def test_malformed_id(self, name):
        with pytest.raises(CheckpointError, match="REPO_ID is"):
            check_repo_id(name)


class TestUpload:
    def test_dry_run_sends_nothing(self, mesanet, hub, ready):
        hub.requests.clear()
        result = mesanet("push", ready, "me/dry", "--dry-run")
        assert result["code"] == 0, result
        assert hub.requests == []
        for file in ready.iterdir():
            assert f"{file.stat().st_size:,}" in result["stdout"]
            assert file.name in result["stdout"]
        assert f"bytes in {len(list(ready.iterdir()))} files, to me/dry" in result["stdout"]

    def test_what_is_refused_locally_sends_nothing(self, mesanet, hub, spoilt):
        (spoilt / "optimizer.pt").write_bytes(pickle.dumps(1))
        hub.requests.clear()
        result = mesanet("push", spoilt, "me/refused")
        assert result["code"] == 1
        assert "optimizer.pt is a pickle" in result["stderr"]
        assert hub.requests == []

    def test_everything_arrives_and_loads_from_there(self, mesanet, hub, ready, run_without_package, tmp_path):
        result = mesanet("push", ready, "me/tiny", "--private")
        assert result["code"] == 0, result
        repository = hub.repositories["me/tiny"]
        assert repository["private"] is True
        assert result["stdout"].strip().endswith(f"{hub.url}/me/tiny/commit/{repository['head']}")
        assert repository["files"] == {file.name: file.read_bytes() for file in ready.iterdir()}
        assert f"Bearer {TOKEN}" in hub.authorizations

        program = """
import json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True, dtype=torch.float32)
inputs = AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)("It was", return_tensors="pt")
save_file({"ids": inputs["input_ids"], "logits": model(**inputs).logits.detach()}, sys.argv[1])
print(json.dumps({"module": type(model).__module__}))
"""
        output = tmp_path / "found.safetensors"
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        report = run_without_package(program, output, **environment)
        assert report["module"].startswith("transformers_modules.me.tiny.")
        found = load_file(output)
        expected = load_checkpoint(ready)(found["ids"]).logits
        torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)

    def test_an_interrupted_upload_goes_on(self, mesanet, hub, ready):
        hub.objects.clear()
        hub.uploads.clear()
        hub.refusals.append((r"/commit/", 400, "the connection went away"))
        result = mesanet("push", ready, "me/again")
        assert result["code"] == 1
        assert "what has been sent is not sent again" in result["stderr"]
        assert hub.repositories["me/again"]["files"] == {}
        sent = len(hub.uploads)
        assert sent > 0
        result = mesanet("push", ready, "me/again")
        assert result["code"] == 0, result
        assert len(hub.uploads) == sent
        assert set(hub.repositories["me/again"]["files"]) == {file.name for file in ready.iterdir()}
        head = hub.repositories["me/again"]["head"]
        assert mesanet("push", ready, "me/again")["code"] == 0  # nothing has changed
        assert len(hub.uploads) == sent
        assert hub.repositories["me/again"]["head"] == head

    def test_does_not_publish_what_was_to_be_private(self, mesanet, hub, ready):
        hub.repositories["me/public"] = {"private": False, "files": {}, "head": "0" * 40}
        result = mesanet("push", ready, "me/public", "--private")
        assert result["code"] == 1
        assert "exists and is public" in result["stderr"]
        assert hub.repositories["me/public"]["files"] == {}

    @pytest.mark.parametrize("options", [(), ("--debug",)])
    @pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/"])
    def test_never_prints_the_token(self, mesanet, hub, ready, where, options):
        hub.refusals.append((where, 403, "not with {authorization}, and not today"))
        result = mesanet(*options, "push", ready, "me/forbidden")
        assert result["code"] == 1
        shown = json.dumps(result)
        assert "and not today" in shown  # the server's words are passed on
        assert "hf auth login" in shown
        assert TOKEN not in shown
        assert "<token>" in shown
