# SPDX-License-Identifier: Apache-2.0
"""Conversions of whole folders: bitwise, resumable, bounded in memory, whole or not at all."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from modeling_mesanet import bundled_checkpoint, load_checkpoint
from modeling_mesanet.cli import app
from modeling_mesanet.conversion import checkpoint_reader, convert, convert_from_fla, convert_to_fla, state_dict_to_fla
from modeling_mesanet.conversion.checkpoint_reader import CheckpointReader
from modeling_mesanet.conversion.checkpoint_writer import CheckpointWriter, PlannedTensor
from modeling_mesanet.conversion.compare_logits import LogitComparison
from modeling_mesanet.loading import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00006.safetensors", "model-00002-of-00006.safetensors"


def read(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bitwise, so that NaN and the sign of zero count."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dtype": torch.bfloat16, "use_output_gate": True},
            {"dtype": torch.float16, "shard": "5GB", "tie_word_embeddings": True},
        ],
        ids=["float32", "bfloat16, output gate", "float16, one file, tied"],
    )
    def test_is_bitwise(self, fla_checkpoint, tmp_path, options):
        source, fields, tensors = fla_checkpoint(**options)
        tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
        for file in source.glob("*.safetensors"):
            save_file({name: tensors[name] for name in load_file(file)}, file)
        there = convert_from_fla(source, tmp_path / "there", max_shard_size="30KB")
        back = convert_to_fla(tmp_path / "there", tmp_path / "back", max_shard_size=20_000)
        assert_same(read(tmp_path / "back"), tensors)
        assert_same(state_dict_to_fla(read(tmp_path / "there")), tensors)
        assert there.bytes == back.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert there.tensors == back.tensors == len(tensors)
        assert len(there.shards) > 1
        assert "byte for byte" in there.compared
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        for name in fields.keys() & config.keys():
            assert config[name] == fields[name]

    def test_files_are_whole_checkpoints(self, fla_checkpoint, tmp_path):
        source, _, _ = fla_checkpoint(dtype=torch.bfloat16)
        carried = {
            "generation_config.json": '{"eos_token_id": 5}',
            "tokenizer.json": "{}",
            "tokenizer_config.json": "{}",
            "chat_template.jinja": "{{ messages }}",
        }
        for name, text in {**carried, "README.md": "of another model", "optimizer.pt": "no"}.items():
            (source / name).write_text(text)
        report = convert_from_fla(source, tmp_path / "ours", max_shard_size="30KB")
        assert sorted(report.carried) == sorted(carried)
        for name, text in carried.items():
            assert (tmp_path / "ours" / name).read_text() == text
        expected = {*carried, *report.shards, "config.json", INDEX}
        assert {file.name for file in (tmp_path / "ours").iterdir()} == expected
        assert {file.name for file in tmp_path.iterdir()} == {"fla", "ours"}
        assert all((tmp_path / "ours" / name).stat().st_size < 40_000 for name in report.shards)
        model = load_checkpoint(tmp_path / "ours", dtype="auto")
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == 5
        assert model(torch.arange(9)[None]).logits.isfinite().all()

    def test_our_own_mixture_of_dtypes_survives(self, tiny_model, tmp_path):
        """The gates' biases and the regulariser stay float32 in a bfloat16 checkpoint."""
        model = tiny_model(
            value_head_dim=16,
            forget_gate_bound=None,
            embedding_scale=1.0,
            logit_soft_cap=None,
            cg_max_steps=30,
        )
        model.save_pretrained(tmp_path / "float32")
        load_checkpoint(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "ours")
        tensors = read(tmp_path / "ours")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}
        convert_to_fla(tmp_path / "ours", tmp_path / "fla")
        convert_from_fla(tmp_path / "fla", tmp_path / "again")
        assert_same(read(tmp_path / "again"), tensors)

    def test_an_empty_destination_is_taken(self, fla_checkpoint, tmp_path):
        (tmp_path / "ours").mkdir()
        convert_from_fla(fla_checkpoint()[0], tmp_path / "ours")
        assert (tmp_path / "ours" / "config.json").is_file()

    def test_alignment(self, fla_checkpoint, tmp_path):
        """Tensors begin at multiples of their element's size, as readers that map files expect."""
        source, _, tensors = fla_checkpoint(dtype=torch.bfloat16, vocab_size=63, hidden_size=31)
        tensors["model.layers.0.attn.lambda_params"] = tensors["model.layers.0.attn.lambda_params"].float()
        for file in source.glob("*.safetensors"):
            save_file({name: tensors[name] for name in load_file(file)}, file)
        convert_from_fla(source, tmp_path / "ours")
        reader = CheckpointReader(tmp_path / "ours")
        for name, header in reader.headers.items():
            assert reader._extent(name).start % (4 if header.dtype == "F32" else 2) == 0


class TestPickledFiles:
    @pytest.fixture
    def pickled(self, fla_checkpoint):
        folder, _, tensors = fla_checkpoint()
        for file in folder.glob("model*"):
            file.unlink()
        names = sorted(tensors)
        files = {"pytorch_model-1.bin": names[:20], "pytorch_model-2.bin": names[20:]}
        for file, members in files.items():
            torch.save({name: tensors[name] for name in members}, folder / file)
        weight_map = {name: file for file, members in files.items() for name in members}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder, tensors

    def test_are_read_only_on_demand(self, pickled, tmp_path, refuse):
        folder, tensors = pickled
        with refuse("pickled", "--allow-pickle"):
            convert_from_fla(folder, tmp_path / "ours")
        convert_from_fla(folder, tmp_path / "ours", allow_pickle=True)
        assert_same(state_dict_to_fla(read(tmp_path / "ours")), tensors)

    def test_never_run_code(self, pickled, tmp_path, refuse):
        folder, _ = pickled
        touched = tmp_path / "touched"

        class Malicious:
            def __reduce__(self):
                return (Path.touch, (touched,))

        torch.save({"model.norm.weight": Malicious()}, folder / "pytorch_model-1.bin")
        with refuse("pytorch_model-1.bin"):
            convert_from_fla(folder, tmp_path / "ours", allow_pickle=True)
        assert not touched.exists()

    @pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off", b"junk"])
    def test_broken_files(self, pickled, tmp_path, refuse, content):
        file = pickled[0] / "pytorch_model-2.bin"
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with refuse("pytorch_model-2.bin"):
            convert_from_fla(pickled[0], tmp_path / "ours", allow_pickle=True)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def edit_shard(folder: Path, change) -> None:
    tensors = load_file(folder / FIRST)
    change(tensors)
    save_file(tensors, folder / FIRST)


def truncate(folder: Path) -> None:
    size = (folder / SECOND).stat().st_size
    os.truncate(folder / SECOND, size - 7)


def duplicate(folder: Path) -> None:
    name, tensor = next(iter(load_file(folder / SECOND).items()))
    edit_shard(folder, lambda tensors: tensors.update({name: tensor}))


def add_tensor(folder: Path) -> None:
    edit_shard(folder, lambda tensors: tensors.update({"model.layers.0.attn.q_conv1d.bias": torch.zeros(32)}))
    edit_index(folder, lambda files: files.update({"model.layers.0.attn.q_conv1d.bias": FIRST}))


def repeat_in_header(folder: Path) -> None:
    """The same name twice in one header, the second time for other bytes."""
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (folder / FIRST).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


BROKEN = {
    "missing shard": (lambda folder: (folder / SECOND).unlink(), SECOND, "missing"),
    "truncated shard": (truncate, SECOND, "truncated"),
    "shard of another format": (lambda folder: (folder / SECOND).write_bytes(b"junk" * 99), SECOND, "safetensors"),
    "integers": (
        lambda folder: edit_shard(folder, lambda t: t.update({"model.embeddings.weight": torch.zeros(64, 32).int()})),
        "model.embeddings.weight has dtype I32",
    ),
    "float8": (
        lambda folder: edit_shard(
            folder,
            lambda t: t.update({"model.embeddings.weight": torch.zeros(64, 32).to(torch.float8_e4m3fn)}),
        ),
        "model.embeddings.weight has dtype F8_E4M3",
    ),
    "matrices of two dtypes": (
        lambda folder: edit_shard(folder, lambda t: t.update({"model.embeddings.weight": torch.zeros(64, 32).half()})),
        "has dtype F32 where model.embeddings.weight has F16",
    ),
    "duplicate tensor": (duplicate, "both hold", FIRST, SECOND),
    "tensor twice in a header": (repeat_in_header, FIRST),
    "extra tensor": (add_tensor, r"q_conv1d\.bias"),
    "tensor that the index does not list": (
        lambda folder: edit_shard(folder, lambda t: t.update({"surplus": torch.zeros(1)})),
        "surplus",
        "not list",
    ),
    "tensor missing everywhere": (
        lambda folder: (
            edit_shard(folder, lambda t: t.pop("model.embeddings.weight")),
            edit_index(folder, lambda files: files.pop("model.embeddings.weight")),
        ),
        "model.embeddings.weight",
        "lack",
    ),
    "tensor missing from its shard": (
        lambda folder: edit_shard(folder, lambda t: t.pop("model.embeddings.weight")),
        "model.embeddings.weight",
        FIRST,
    ),
    "misshapen tensor": (
        lambda folder: edit_shard(folder, lambda t: t.update({"model.embeddings.weight": torch.zeros(32, 64)})),
        r"model.embeddings.weight has shape \(32, 64\)",
    ),
    "path traversal": (
        lambda folder: edit_index(folder, lambda files: files.update({"model.norm.weight": "../secret.safetensors"})),
        r"\.\./secret",
        "not a file of that folder",
    ),
    "absolute path": (
        lambda folder: edit_index(folder, lambda files: files.update({"model.norm.weight": "/etc/passwd"})),
        "/etc/passwd",
    ),
    "index of another form": (lambda folder: (folder / INDEX).write_text('{"weight_map": [1]}'), INDEX),
    "no weights": (lambda folder: (folder / INDEX).unlink(), "no model.safetensors"),
    "config of another model": (lambda folder: edit_config(folder, model_type="gla"), "'gla'", "mesa_net"),
    "config of ours": (lambda folder: edit_config(folder, model_type="mesanet"), "--to fla"),
    "config of a transformer": (lambda folder: edit_config(folder, model_type="qwen2"), "--from qwen"),
    "config of other sizes": (lambda folder: edit_config(folder, hidden_size=48), "shape", "config.json"),
    "config of more layers": (lambda folder: edit_config(folder, num_hidden_layers=3), r"layers\.2", "lack"),
    "hybrid config": (lambda folder: edit_config(folder, attn={"layers": [0], "num_heads": 2}), r"\battn\b"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config that is no object": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BROKEN)
    def test_broken_source(self, fla_checkpoint, tmp_path, refuse, case):
        source, _, _ = fla_checkpoint()
        assert len(list(source.glob("*.safetensors"))) == 6
        assert "model.embeddings.weight" in load_file(source / FIRST)
        destroy, *patterns = BROKEN[case]
        destroy(source)
        with refuse("source is ", *patterns):
            convert_from_fla(source, tmp_path / "ours")

    def test_no_source(self, tmp_path, refuse):
        with refuse("source is './nothing'"):
            convert_from_fla("./nothing", tmp_path / "ours")

    def test_our_own_checkpoint_that_fla_cannot_express(self, tmp_path, refuse):
        with refuse("forget_gate_bound", "0.9975"):
            convert_to_fla(bundled_checkpoint(), tmp_path / "fla")
        (tmp_path / "config.json").write_text('{"model_type": "mesa_net"}')
        with refuse("model_type 'mesa_net'"):
            convert_to_fla(tmp_path, tmp_path / "fla")

    def test_destination(self, fla_checkpoint, tmp_path, refuse):
        source, _, _ = fla_checkpoint()
        with refuse("destination is", "exists"):
            convert_from_fla(source, source)
        (tmp_path / "file").write_text("")
        with refuse("destination is", "exists"):
            convert_from_fla(source, tmp_path / "file")
        with refuse("destination is", "is a file"):
            convert_from_fla(source, tmp_path / "file" / "below")

    @pytest.mark.parametrize("size", ["large", 0, -1, "5XB"])
    def test_shard_size(self, fla_checkpoint, tmp_path, refuse, size):
        source, _, _ = fla_checkpoint()
        with refuse("max_shard_size is"):
            convert_from_fla(source, tmp_path / "ours", max_shard_size=size)

    def test_disk_that_is_too_small(self, fla_checkpoint, tmp_path, refuse, monkeypatch):
        source, _, tensors = fla_checkpoint()
        size = sum(tensor.nbytes for tensor in tensors.values())
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
        with refuse("destination is", "bytes free"):
            convert_from_fla(source, tmp_path / "ours")

    def test_logits_that_differ(self, fla_checkpoint, tmp_path, refuse, monkeypatch):
        source, _, _ = fla_checkpoint()
        monkeypatch.setattr(convert, "why_fla_cannot_run", lambda: None)
        outcome = LogitComparison(torch.float32, 400, 2e-2, 3e-2, 2e-2, 1e-2)
        monkeypatch.setattr(convert, "compare_logits", lambda *folders: outcome)
        with refuse("logits of 400 random tokens", "3.0e-02"):
            convert_from_fla(source, tmp_path / "ours")
        outcome = LogitComparison(torch.float32, 400, 5e-4, 3e-3, 5e-4, 3e-3)
        report = convert_from_fla(source, tmp_path / "ours")
        assert report.logits is outcome
        assert report.as_json()["logits"] == {**outcome._asdict(), "dtype": "float32"}
        unlimited = dataclasses.replace(report, logits=outcome._replace(fla=float("inf")))
        assert json.loads(json.dumps(unlimited.as_json(), allow_nan=False))["logits"]["fla"] is None
        assert convert_from_fla(source, tmp_path / "unchecked", compare=False).logits is None

    def test_a_comparison_that_fails(self, fla_checkpoint, tmp_path, monkeypatch):
        """fla's kernels ask for more shared memory than the GPU has, say; the conversion is not lost."""
        source, _, tensors = fla_checkpoint()

        def fail(*folders):
            raise RuntimeError("out of resource:\nshared memory")

        monkeypatch.setattr(convert, "why_fla_cannot_run", lambda: None)
        monkeypatch.setattr(convert, "compare_logits", fail)
        with pytest.raises(CheckpointError, match=r"could not be compared \(RuntimeError: .*--no-compare") as refusal:
            convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "ours").exists()
        report = convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB", compare=False)
        assert report.resumed == len(report.shards)
        assert_same(state_dict_to_fla(read(tmp_path / "ours")), tensors)

    def test_a_home_in_the_destination(self, fla_checkpoint, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        source, _, _ = fla_checkpoint()
        convert_from_fla(source, "~/ours")
        assert (tmp_path / "ours" / "config.json").is_file()


class TestInterruption:
    @pytest.fixture
    def interrupted(self, fla_checkpoint, tmp_path, monkeypatch):
        """A conversion that was interrupted in its fourth file of weights."""
        source, _, tensors = fla_checkpoint()
        read_pieces = CheckpointReader.pieces
        count = 0

        def pieces(self, name):
            nonlocal count
            count += 1
            if count == 25:
                raise KeyboardInterrupt
            yield from read_pieces(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "pieces", pieces)
            with pytest.raises(KeyboardInterrupt):
                convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        return source, tensors, tmp_path / ".ours.partial" / "checkpoint"

    def test_leaves_complete_files_and_no_destination(self, interrupted, tmp_path):
        _, _, folder = interrupted
        assert not (tmp_path / "ours").exists()
        files = sorted(file.name for file in folder.iterdir())
        assert len(files) == 3
        assert all(name.startswith("model-0000") and name.endswith(".safetensors") for name in files)
        for name in files:
            load_file(folder / name)

    def test_is_resumed(self, interrupted, tmp_path):
        source, tensors, folder = interrupted
        made = {file.name: file.stat().st_ino for file in folder.iterdir()}
        report = convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        assert report.resumed == 3
        assert {name: (tmp_path / "ours" / name).stat().st_ino for name in made} == made
        assert_same(state_dict_to_fla(read(tmp_path / "ours")), tensors)
        assert {file.name for file in tmp_path.iterdir()} == {"fla", "ours"}

    @pytest.mark.parametrize("change", ["source", "config", "size", "journal"])
    def test_is_begun_anew_where_anything_changed(self, interrupted, tmp_path, change):
        source, tensors, folder = interrupted
        if change == "source":
            tensors["model.embeddings.weight"] += 1
            edit_shard(source, lambda t: t.update({"model.embeddings.weight": tensors["model.embeddings.weight"]}))
        elif change == "config":
            edit_config(source, bos_token_id=7)
        elif change == "journal":
            (folder.parent / "journal.json").write_text("{")
        size = "30KB" if change == "size" else "20KB"
        report = convert_from_fla(source, tmp_path / "ours", max_shard_size=size)
        assert report.resumed == 0
        assert_same(state_dict_to_fla(read(tmp_path / "ours")), tensors)
        assert len(list((tmp_path / "ours").glob("*.safetensors"))) == len(report.shards)

    def test_a_source_that_vanishes(self, fla_checkpoint, tmp_path, monkeypatch):
        source, _, _ = fla_checkpoint()
        write_text = CheckpointWriter.write_text

        def remove(self, name, text):
            (source / SECOND).unlink(missing_ok=True)
            write_text(self, name, text)

        monkeypatch.setattr(CheckpointWriter, "write_text", remove)
        with pytest.raises(CheckpointError, match=f"{SECOND} cannot be read"):
            convert_from_fla(source, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_a_spoiled_file_is_found(self, interrupted, tmp_path):
        source, _, folder = interrupted
        with open(sorted(folder.iterdir())[1], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with pytest.raises(CheckpointError, match="gave back something else"):
            convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        assert {file.name for file in tmp_path.iterdir()} == {"fla"}

    def test_a_file_that_grows_too_large_for_its_disk(self, fla_checkpoint, tmp_path):
        """The operating system refuses the write half-way through a file of weights."""
        source, _, tensors = fla_checkpoint()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limit[1]))
            with pytest.raises(CheckpointError, match="could not be written") as refusal:
                convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "ours").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        assert_same(state_dict_to_fla(read(tmp_path / "ours")), tensors)

    def test_a_disk_that_fills_up(self, fla_checkpoint, tmp_path, monkeypatch):
        source, _, _ = fla_checkpoint()
        flushed = 0

        def flush(descriptor):
            nonlocal flushed
            flushed += 1
            if flushed == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", flush)
            with pytest.raises(CheckpointError, match=r"No space left on device.*run the same again"):
                convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB")
        assert not (tmp_path / "ours").exists()
        assert not list(tmp_path.rglob("*.tmp"))
        assert convert_from_fla(source, tmp_path / "ours", max_shard_size="20KB").resumed == 2


MEASURE = """
import resource, sys
from modeling_mesanet.conversion import convert_from_fla
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
convert_from_fla(sys.argv[1] + "/fla", sys.argv[1] + "/warm")
before = peak()
convert_from_fla(sys.argv[1] + "/large", sys.argv[1] + "/ours", max_shard_size="80MB")
print(peak() - before)
"""


def test_memory_stays_bounded(fla_checkpoint, tmp_path):
    """200 MB in two files, in a process of its own: what is resident grows by a few pieces."""
    fla_checkpoint()
    large, _, tensors = fla_checkpoint("large", shard="100MB", vocab_size=768_000)
    assert sum(file.stat().st_size for file in large.glob("*.safetensors")) > 190e6
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 4 * checkpoint_reader.PIECE_BYTES


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["convert", *map(str, arguments)])

    def test_there_and_back(self, fla_checkpoint, tmp_path):
        source, _, tensors = fla_checkpoint()
        there = self.run(source, tmp_path / "ours", "--max-shard-size", "30KB")
        assert there.exit_code == 0, there.output
        assert "byte for byte" in there.stdout
        assert there.stderr == ""
        back = self.run(tmp_path / "ours", tmp_path / "back", "--to", "fla", "--json", "--no-compare")
        report = json.loads(back.stdout)
        assert report["tensors"] == len(tensors)
        assert report["logits"] is None
        assert_same(read(tmp_path / "back"), tensors)

    def test_refusals(self, fla_checkpoint, tmp_path):
        source, _, _ = fla_checkpoint(use_l2warp=True)
        refused = self.run(source, tmp_path / "ours")
        assert refused.exit_code == 1
        assert refused.stdout == ""
        assert refused.stderr.startswith(
            f"mesanet: error: source is '{source}', whose config field use_l2warp is True"
        )
        assert self.run(source, tmp_path / "ours", "--to", "fla", "--from", "llama").exit_code == 2
        assert not (tmp_path / "ours").exists()


def test_every_byte_is_counted(fla_checkpoint, tmp_path):
    """What the progress bar is told adds up to its total, also over what an earlier run did."""
    source, _, _ = fla_checkpoint()
    reader = CheckpointReader(source)
    plan = {
        name: PlannedTensor(header, lambda name=name: reader.pieces(name)) for name, header in reader.headers.items()
    }
    for _ in range(2):
        writer = CheckpointWriter(plan, tmp_path / "ours", "same", max_shard_size="20KB")
        counts = []
        writer.write(counts.append)
        assert sum(counts) == writer.total_bytes
