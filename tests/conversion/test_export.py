# SPDX-License-Identifier: Apache-2.0
"""Folders that bring their code: what is in them, and that they load where the package is not."""

import errno
import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from modeling_mesanet import (
    MesaNetConfig,
    MesaNetForCausalLM,
    MesaNetForSequenceClassification,
    bundled_checkpoint,
    load_checkpoint,
    self_contained,
)
from modeling_mesanet.conversion import export as export_module
from modeling_mesanet.conversion.card import card_of_folder
from modeling_mesanet.conversion.export import compare_without_package, export
from modeling_mesanet.loading import CheckpointError
from modeling_mesanet.self_contained import AUTO_MAP, code_files, required_versions

PROMPT = "It was a dark"

# Everything a user may do with an exported folder, in one process; the second folder is written by it.
PROGRAM = """
import json
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)

folder, saved, tensors, prompt = sys.argv[1:]
options = {"trust_remote_code": True, "dtype": torch.float32}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
inputs = tokenizer(prompt, return_tensors="pt")
found = {"logits": model(**inputs).logits}
length = {"max_new_tokens": 8, "do_sample": False}
found["greedy"] = model.generate(**inputs, **length)
found["beams"] = model.generate(**inputs, **length, num_beams=3)
text = pipeline("text-generation", model=folder, **options)(prompt, **length)[0]["generated_text"]
found["hidden"] = AutoModel.from_pretrained(folder, **options)(**inputs).last_hidden_state
torch.manual_seed(0)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
model(**inputs, labels=inputs["input_ids"]).loss.backward()
found["gradient"] = model.model.embed_tokens.weight.grad

# Saved again and loaded: a second copy of the code in this process.
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, **options)
found["logits again"] = again(**inputs).logits
found["logits after that"] = model(**inputs).logits
save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, tensors)
print(json.dumps({
    "text": text,
    "modules": sorted({type(one).__module__ for one in (model, model.config, again)}),
    "labels": classifier.score.weight.shape[0],
    "namespaces": sorted({
        name.split("::")[0] for name in torch._C._dispatch_get_all_op_names() if name.endswith("::chunkwise")
    }),
}))
"""


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "my-tiny.model"
    difference = export(checkpoint, folder)
    assert difference <= export_module.TOLERANCE
    return folder


@pytest.fixture(scope="module")
def elsewhere(exported, run_without_package, tmp_path_factory):
    """What a process without the package made of the exported folder: report, tensors, and the folder it saved."""
    place = tmp_path_factory.mktemp("elsewhere")
    report = run_without_package(PROGRAM, exported, place / "saved", place / "found.safetensors", PROMPT)
    return report, load_file(place / "found.safetensors"), place / "saved"


class TestFolder:
    def test_holds_the_code_byte_for_byte(self, exported):
        files = code_files()
        assert {"configuration_mesanet.py", "modeling_mesanet.py", "cache_mesanet.py", "mesa.py"} <= set(files)
        assert {name for name in files if name.startswith("mesa_triton")}
        for name, source in files.items():
            assert (exported / name).read_bytes() == source.read_bytes(), name
        assert {file.name for file in exported.glob("*.py")} == set(files)

    def test_holds_the_checkpoint_byte_for_byte(self, exported, checkpoint):
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (exported / name).read_bytes() == (checkpoint / name).read_bytes(), name
        ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (exported, checkpoint))
        assert ours.pop("auto_map") == AUTO_MAP
        assert ours == theirs
        assert "auto_map" not in theirs

    def test_auto_map_names_classes_that_are_there(self, exported):
        for reference in AUTO_MAP.values():
            module, name = reference.split(".")
            assert re.search(rf"^class {name}\(", (exported / f"{module}.py").read_text(), re.MULTILINE)

    def test_code_imports_its_siblings_and_what_every_user_has(self, exported):
        allowed = set(sys.stdlib_module_names) | {"numpy", "torch", "transformers", "huggingface_hub"}
        for file in exported.glob("*.py"):
            # transformers reads imports from the text: a line of a docstring, and modules in modules, count too.
            for sibling in get_relative_imports(file):
                assert (exported / f"{sibling}.py").is_file(), f"{file.name} imports .{sibling}"
            assert set(get_imports(file)) <= allowed, file.name

    def test_records_the_versions_that_the_code_needs(self, exported):
        lines = (exported / "requirements.txt").read_text().splitlines()
        assert lines == required_versions()
        names = {re.match(r"[\w-]+", line)[0] for line in lines}
        assert names == {"huggingface-hub", "numpy", "torch", "transformers"}
        assert any("transformers" in line and "5.17" in line for line in lines)


class TestElsewhere:
    def test_runs_the_code_of_the_folder(self, elsewhere):
        modules = elsewhere[0]["modules"]
        assert len(modules) == 3
        assert all(name.startswith("transformers_modules.") for name in modules)

    def test_outputs_are_those_of_the_package(self, elsewhere, checkpoint):
        found = elsewhere[1]
        model, tokenizer = load_checkpoint(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        logits = model(**inputs).logits
        for name in ("logits", "logits again", "logits after that"):
            torch.testing.assert_close(found[name], logits, rtol=1e-5, atol=1e-5)
        length = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(found["greedy"], model.generate(**inputs, **length))
        assert torch.equal(found["beams"], model.generate(**inputs, **length, num_beams=3))
        assert (
            elsewhere[0]["text"]
            == pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, **length)[0]["generated_text"]
        )
        torch.testing.assert_close(found["hidden"], model.model(**inputs).last_hidden_state, rtol=1e-5, atol=1e-5)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        torch.testing.assert_close(found["gradient"], model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)

    def test_classifier(self, elsewhere):
        assert elsewhere[0]["labels"] == 3

    def test_copies_of_the_code_have_operators_of_their_own(self, elsewhere):
        # A name that is registered twice crashes whoever still uses the first.
        assert len(elsewhere[0]["namespaces"]) == 2

    def test_what_it_saved_is_complete(self, elsewhere):
        saved = elsewhere[2]
        assert {file.name for file in saved.glob("*.py")} == set(code_files())
        assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert (saved / "model.safetensors").is_file()


# The bundled checkpoint as a reader of its card would use it, and lm-eval on it.
READER = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, tasks, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
inputs = tokenizer(prompt, return_tensors="pt")
length = {"max_new_tokens": 20, "do_sample": False}
results = simple_evaluate(
    model="hf",
    model_args={"pretrained": folder, "trust_remote_code": True, "dtype": "float32"},
    tasks=["loss"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    device="cpu",
    bootstrap_iters=0,
)
print(json.dumps({
    "texts": tokenizer.batch_decode(model.generate(**inputs, **length)),
    "pipeline": pipeline("text-generation", folder, trust_remote_code=True, dtype="float32")(prompt, **length),
    "lm-eval": results["results"]["loss"]["perplexity,none"],
}))
"""
TASK = """
task: loss
custom_dataset: !function texts.load
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{rest}}"
metric_list:
  - metric: perplexity
"""
TEXTS = """
from datasets import Dataset

def load(**options):
    return {"test": Dataset.from_list([{"text": "It was a dark night", "rest": " and the rain fell in torrents."}])}
"""


def test_the_bundled_checkpoint_elsewhere(run_without_package, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modeling-mesanet[eval]'")
    export(None, tmp_path / "novels", check=False)
    assert not (tmp_path / "novels" / "README.md").exists()  # its examples would need the package
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "loss.yaml").write_text(TASK)
    (tmp_path / "tasks" / "texts.py").write_text(TEXTS)
    found = run_without_package(READER, tmp_path / "novels", tmp_path / "tasks", PROMPT)

    model, tokenizer = load_checkpoint(), AutoTokenizer.from_pretrained(bundled_checkpoint())
    length = {"max_new_tokens": 20, "do_sample": False}
    assert found["texts"] == tokenizer.batch_decode(model.generate(**tokenizer(PROMPT, return_tensors="pt"), **length))
    assert found["pipeline"] == pipeline("text-generation", model, tokenizer=tokenizer)(PROMPT, **length)
    context = tokenizer("It was a dark night")["input_ids"]
    ids = tokenizer("It was a dark night and the rain fell in torrents.", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(context)] = -100
    nats = model(ids, labels=labels).loss.item() * (ids.shape[1] - len(context))
    assert found["lm-eval"] == pytest.approx(math.exp(nats), rel=1e-3)


# Which backend the code of the folder takes, and what it computes.
ON_DEVICE = """
import json
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, device, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).to(device)
ids = (torch.arange(300, device=device) % 256)[None]
length = {"max_new_tokens": 8, "do_sample": False}
with torch.no_grad():
    save_file({"logits": model(ids).logits.cpu(), "tokens": model.generate(ids[:, :50], **length).cpu()}, output)
package = type(model).__module__.rpartition(".")[0]
backend = sys.modules[package + ".mesa_dispatch"].select_backend(torch.device(device), model.config.kernel_backend)[0]
print(json.dumps({"backend": backend, "triton": package + ".mesa_triton" in sys.modules}))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_devices(exported, checkpoint, run_without_package, tmp_path, device):
    """On a GPU the folder's own Triton kernels run, and give what the package gives on a CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else ""
    report = run_without_package(
        ON_DEVICE, exported, device, tmp_path / "found.safetensors", CUDA_VISIBLE_DEVICES=visible
    )
    assert report == {"backend": "triton" if device == "cuda" else "torch", "triton": device == "cuda"}
    found = load_file(tmp_path / "found.safetensors")
    model = load_checkpoint(checkpoint)
    ids = (torch.arange(300) % 256)[None]
    expected = model(ids).logits
    assert (found["logits"] - expected).norm() < 1e-3 * expected.norm()
    assert torch.equal(found["tokens"], model.generate(ids[:, :50], max_new_tokens=8, do_sample=False))


class TestSaving:
    def test_a_plain_model_brings_no_code(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        assert "auto_map" not in (tmp_path / "config.json").read_text()

    @pytest.mark.parametrize("cls", [MesaNetForCausalLM, MesaNetForSequenceClassification])
    def test_self_contained_model_brings_it(self, tiny_model, tmp_path, cls):
        model = tiny_model(cls)
        assert self_contained(model) is model
        model.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.glob("*.py")} == set(code_files())
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP

    def test_the_package_keeps_an_exported_folder_whole(self, exported, tmp_path):
        model = load_checkpoint(exported)
        assert type(model) is MesaNetForCausalLM  # the package's own class goes before the folder's
        model.save_pretrained(tmp_path)
        for name in [*code_files(), "requirements.txt"]:
            assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP

    def test_a_reference_to_another_repository_becomes_one_to_the_folder(self, tiny_config, tmp_path):
        config = tiny_config()
        config.auto_map = {"AutoConfig": "someone/else--configuration_mesanet.MesaNetConfig"}
        config.save_pretrained(tmp_path)
        assert MesaNetConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
        assert (tmp_path / "modeling_mesanet.py").is_file()


class TestRefusals:
    def refuse(self, source, destination, message, **options):
        with pytest.raises(CheckpointError, match=message) as caught:
            export(source, destination, **options)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)

    def test_a_destination_that_holds_something(self, checkpoint, tmp_path):
        (tmp_path / "note").write_text("mine")
        self.refuse(checkpoint, tmp_path, "DST is .*exists and is not empty")
        assert [file.name for file in tmp_path.iterdir()] == ["note"]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
            (
                lambda folder: (folder / "config.json").write_text(
                    (folder / "config.json").read_text().replace('"MesaNetForCausalLM"', '"MesaNetForDancing"')
                ),
                "SRC is '.*copy', whose config.json names the architecture 'MesaNetForDancing'",
            ),
            (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "model_type 'gpt2'"),
            (
                lambda folder: (folder / "model.safetensors").write_bytes(
                    (folder / "model.safetensors").read_bytes()[:-8]
                ),
                "truncated",
            ),
            (
                lambda folder: (
                    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors"),
                    (folder / "model.safetensors.index.json").write_text(
                        json.dumps({"weight_map": {"a": "../secret.safetensors"}})
                    ),
                ),
                "not a file of that folder",
            ),
        ],
    )
    def test_a_broken_source(self, copy, tmp_path, fault, message):
        fault(copy)
        self.refuse(copy, tmp_path / "new", message)
        assert not (tmp_path / "new").exists()

    def test_a_full_disk_leaves_nothing(self, checkpoint, tmp_path, monkeypatch):
        copied = []

        def copyfile(source, target):
            if len(copied) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            copied.append(target)
            return target.write_bytes(source.read_bytes())

        monkeypatch.setattr(shutil, "copyfile", copyfile)
        self.refuse(checkpoint, tmp_path / "new", "No space left on device", check=False)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda folder: (folder / "mesa_solver.py").unlink(), r"does not load.*mesa_solver"),
            (
                lambda folder: (folder / "modeling_mesanet.py").write_text(
                    (folder / "modeling_mesanet.py").read_text().replace("cap * torch.tanh", "2 * cap * torch.tanh")
                ),
                "gives other outputs",
            ),
        ],
    )
    def test_code_that_does_not_do_the_same(self, exported, tmp_path, change, message):
        changed = shutil.copytree(exported, tmp_path / "changed")
        change(changed)
        with pytest.raises(CheckpointError, match=message):
            compare_without_package(exported, changed)


def test_what_goes_along(copy, exported, tmp_path):
    """Tokenizers of every kind, chat templates, licences; a card with its pictures where it fits; nothing else."""
    (copy / "additional_chat_templates").mkdir()
    templates = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    carried = {"vocab.txt", "tokenizer.model", "LICENSE", *templates}
    for name in carried:
        (copy / name).write_text(name)
    for name in ("loss.png", "optimizer.pt", "notes.txt"):
        (copy / name).write_text(name)
    fits = card_of_folder(exported, license="mit")
    for number, card in enumerate((fits, card_of_folder(copy, license="mit"))):
        (copy / "README.md").write_text(card)
        export(copy, tmp_path / str(number), check=False)
        files = {file.relative_to(tmp_path / str(number)).as_posix() for file in (tmp_path / str(number)).rglob("*")}
        pictured = {"README.md", "loss.png"} if card == fits else set()
        code = {*code_files(), "requirements.txt", "additional_chat_templates"}
        own = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert files == own | carried | code | pictured


def test_sharded_checkpoint(checkpoint, tmp_path):
    load_checkpoint(checkpoint).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    shards = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert export(tmp_path / "sharded", tmp_path / "new", check=False) is None
    for name in [*shards, "model.safetensors.index.json"]:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
    expected = load_checkpoint(checkpoint).state_dict()
    for name, tensor in load_checkpoint(tmp_path / "new").state_dict().items():
        assert torch.equal(tensor, expected[name])
