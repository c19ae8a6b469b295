# SPDX-License-Identifier: Apache-2.0
"""The command line: text on standard output, sentences on standard error, exit codes; and the checked loading."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import modeling_mesanet
from modeling_mesanet import (
    MesaNetConfig,
    MesaNetForCausalLM,
    MesaNetForSequenceClassification,
    cli,
    doctor,
    loading,
    prefill,
)
from modeling_mesanet.cli import DEFAULT_PROMPT, app
from modeling_mesanet.loading import CheckpointError, load_checkpoint, load_tokenizer

SENTENCE = "It was a dark night and the rain fell in torrents."
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "value_head_dim": 8,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model and a byte-pair tokenizer, saved in one folder. Without an end token, so lengths are exact."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator([SENTENCE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=pairs).save_pretrained(folder)
    torch.manual_seed(0)
    config = MesaNetConfig(vocab_size=pairs.get_vocab_size(), **SMALL)
    MesaNetForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def restore_transformers_logging():
    """The command line silences transformers for its own process, which here is every test's."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def bundled() -> str:
    try:
        return modeling_mesanet.bundled_checkpoint()
    except FileNotFoundError:
        pytest.skip("the bundled checkpoint is not part of this installation")


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def generate(folder, *arguments, stdin=None) -> str:
    result = invoke("generate", "--model", folder, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refuse(*arguments, code=1, stdin=None) -> str:
    """Invoke, expecting exit code 1 with nothing on standard output and one sentence on standard error."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.removesuffix("\n")
    assert message.startswith("mesanet: error: ")
    assert "\n" not in message
    assert message.endswith(".")
    return message


def command(*arguments, **options) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "modeling_mesanet.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


class TestGenerate:
    def test_greedy_continues_the_prompt_as_the_model_does(self, checkpoint):
        text = generate(checkpoint, "--prompt", SENTENCE, "--temperature", 0, "--max-new-tokens", 12)
        model, tokenizer = MesaNetForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        ids = model.generate(**tokenizer(SENTENCE, return_tensors="pt"), do_sample=False, max_new_tokens=12)
        assert ids.shape[1] == tokenizer(SENTENCE, return_tensors="pt")["input_ids"].shape[1] + 12
        assert text == tokenizer.decode(ids[0]) + "\n"
        assert text.startswith(SENTENCE)

    def test_greedy_ignores_the_seed(self, checkpoint):
        texts = {generate(checkpoint, "--temperature", 0, "--seed", seed, "--max-new-tokens", 8) for seed in (1, 2)}
        assert len(texts) == 1

    def test_seed_makes_sampling_repeatable(self, checkpoint):
        first, second, other = (generate(checkpoint, "--seed", seed, "--max-new-tokens", 16) for seed in (3, 3, 4))
        assert first == second != other
        assert first.startswith(DEFAULT_PROMPT)

    @pytest.mark.parametrize(("option", "value"), [("--top-k", 1), ("--top-p", 1e-6)])
    def test_sampling_options_reach_the_sampler(self, checkpoint, option, value):
        greedy = generate(checkpoint, "--temperature", 0, "--max-new-tokens", 8)
        assert generate(checkpoint, option, value, "--max-new-tokens", 8) == greedy
        assert generate(checkpoint, "--seed", 0, "--max-new-tokens", 8) != greedy

    def test_streamed_text_is_the_text(self, checkpoint):
        options = ("--seed", 5, "--max-new-tokens", 40)
        assert generate(checkpoint, "--stream", *options) == generate(checkpoint, "--no-stream", *options)

    @pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
    def test_continuation_alone(self, checkpoint, stream):
        options = (stream, "--prompt", SENTENCE, "--temperature", 0, "--max-new-tokens", 8)
        assert SENTENCE + generate(checkpoint, "--no-echo", *options) == generate(checkpoint, *options)

    @pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
    def test_prompt_from_a_file_and_from_standard_input(self, checkpoint, tmp_path, ending):
        (tmp_path / "prompt.txt").write_bytes((SENTENCE + ending).encode())
        options = ("--temperature", 0, "--max-new-tokens", 4)
        expected = generate(checkpoint, "--prompt", SENTENCE, *options)
        assert generate(checkpoint, "--prompt-file", tmp_path / "prompt.txt", *options) == expected
        assert generate(checkpoint, "--prompt-file", "-", *options, stdin=SENTENCE + ending) == expected

    @pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
    def test_dtype(self, checkpoint, dtype):
        assert generate(checkpoint, "--dtype", dtype, "--max-new-tokens", 4).startswith(DEFAULT_PROMPT)

    def test_hub_id_is_downloaded(self, checkpoint, monkeypatch):
        monkeypatch.setattr(loading, "snapshot_download", lambda name, **_: {"owner/name": str(checkpoint)}[name])
        assert generate("owner/name", "--max-new-tokens", 4).startswith(DEFAULT_PROMPT)

    def test_sharded_checkpoint(self, checkpoint, copy):
        (copy / "model.safetensors").unlink()
        MesaNetForCausalLM.from_pretrained(checkpoint).save_pretrained(copy, max_shard_size="40KB")
        shards = sorted(copy.glob("*.safetensors"))
        assert len(shards) > 1
        options = ("--temperature", 0, "--max-new-tokens", 4)
        assert generate(copy, *options) == generate(checkpoint, *options)
        shards[-1].unlink()
        assert shards[-1].name in refuse("generate", "--model", copy)

    def test_bundled_checkpoint_writes_words(self, bundled):
        result = invoke("generate", "--seed", 0, "--max-new-tokens", 60)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(DEFAULT_PROMPT)
        words = result.stdout.lower().split()
        assert len(words) > 30
        # Any English text of this length repeats some of the commonest words.
        assert sum(word in {"the", "and", "of", "to", "a", "in", "was", "it", "that", "he"} for word in words) > 6


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("./missing", "no such folder"),
            ("/nowhere/missing", "no such folder"),
            ("a/b/c", "no such folder"),
            ("", "no such folder"),
        ],
    )
    def test_missing_folder(self, name, words):
        message = refuse("generate", "--model", name)
        assert f"--model is '{name}'" in message
        assert words in message

    @pytest.mark.parametrize("name", ["missing", "owner/missing"])
    def test_id_that_the_hub_does_not_provide(self, name, monkeypatch):
        def unreachable(*_, **__):
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(loading, "snapshot_download", unreachable)
        message = refuse("generate", "--model", name)
        assert f"--model is '{name}'" in message
        assert "Hub" in message

    def test_file_instead_of_folder(self, checkpoint):
        assert "is a file" in refuse("generate", "--model", checkpoint / "config.json")

    @pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
    @pytest.mark.parametrize("subcommand", [("generate", "--model"), ("info",)])
    def test_truncated_weights(self, copy, kept, subcommand):
        file = copy / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
        message = refuse(*subcommand, copy)
        assert "model.safetensors is truncated or not a safetensors file" in message
        assert str(copy) in message

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda weights: weights.update({"model.norm.weight": torch.ones(7)}), "shape (7,) instead of (32,)"),
            (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight is missing"),
            (lambda weights: weights.clear(), "more such tensors"),
            (lambda weights: weights.update({"model.odd": torch.ones(1)}), "model.odd is not part of the model"),
        ],
    )
    def test_weights_that_do_not_fit_the_config(self, copy, change, words):
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        message = refuse("generate", "--model", copy)
        assert "do not fit its config.json" in message
        assert words in message
        if "not part" not in words:
            assert "do not fit its config.json" in refuse("info", copy)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "holds no config.json"),
            ("{", "cannot be read"),
            ("[]", "cannot be read"),
            ("{}", "has model_type None"),
            ('{"model_type": "gpt2"}', "has model_type 'gpt2'"),
            ('{"model_type": "mesanet", "head_dim": 0}', "head_dim is 0; it must be"),
            ('{"model_type": "mesanet", "head_dim": "wide"}', "head_dim"),
            ('{"model_type": "mesanet", "layer_types": ["mesa"]}', "layer_types"),
        ],
    )
    @pytest.mark.parametrize("subcommand", [("generate", "--model"), ("info",)])
    def test_bad_config(self, copy, content, words, subcommand):
        if content is None:
            (copy / "config.json").unlink()
        else:
            (copy / "config.json").write_text(content)
        assert words in refuse(*subcommand, copy)

    def test_no_weights(self, copy):
        (copy / "model.safetensors").unlink()
        assert "holds no model.safetensors" in refuse("generate", "--model", copy)
        (copy / "model.safetensors.index.json").write_text("{}")
        assert "model.safetensors.index.json cannot be read" in refuse("generate", "--model", copy)

    @pytest.mark.parametrize("name", ["../weights.safetensors", "/weights.safetensors", "..", "a\\b.safetensors"])
    def test_index_that_leaves_the_folder(self, copy, name):
        (copy / "model.safetensors").rename(copy.parent / "weights.safetensors")
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert f"names '{name}', which is not a file of that folder" in refuse("info", copy)

    @pytest.mark.parametrize(("content", "words"), [(None, "holds no tokenizer.json"), ("{}", "cannot be read")])
    def test_bad_tokenizer(self, copy, content, words):
        if content is None:
            (copy / "tokenizer.json").unlink()
        else:
            (copy / "tokenizer.json").write_text(content)
        assert words in refuse("generate", "--model", copy)

    def test_tokenizer_of_another_model(self, copy):
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.add_tokens(["<one more>"])
        tokenizer.save_pretrained(copy)
        assert f"tokenizer has {len(tokenizer)} entries" in refuse("generate", "--model", copy)

    @pytest.mark.parametrize("text", ["", " \n"])
    def test_empty_prompt(self, checkpoint, tmp_path, text):
        assert "--prompt holds no text" in refuse("generate", "--model", checkpoint, "--prompt", text)
        (tmp_path / "prompt.txt").write_text(text)
        assert "prompt.txt' holds no text" in refuse(
            "generate", "--model", checkpoint, "--prompt-file", tmp_path / "prompt.txt"
        )
        assert "--prompt-file '-' holds no text" in refuse(
            "generate", "--model", checkpoint, "--prompt-file", "-", stdin=text
        )

    def test_unreadable_prompt_files(self, checkpoint, tmp_path):
        (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
        for file, words in (("missing.txt", "does not exist"), (".", "cannot be read"), ("latin.txt", "not UTF-8")):
            message = refuse("generate", "--model", checkpoint, "--prompt-file", tmp_path / file)
            assert words in message
            assert str(tmp_path) in message

    @pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99", "meta", ""])
    def test_missing_device(self, checkpoint, device):
        assert f"--device is '{device}'" in refuse("generate", "--model", checkpoint, "--device", device)

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["sing"],
            ["generate", "--loud"],
            ["generate", "--prompt", "a", "--prompt-file", "b"],
            ["generate", "--dtype", "int8"],
            ["generate", "--temperature", "-1"],
            ["generate", "--temperature", "nan"],
            ["generate", "--temperature", "inf"],
            ["generate", "--top-p", "1.5"],
            ["generate", "--top-p", "nan"],
            ["generate", "--top-k", "-1"],
            ["generate", "--max-new-tokens", "0"],
            ["generate", "--seed", "x"],
            ["generate", "--seed", "-1"],
        ],
    )
    def test_wrong_usage(self, arguments):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output

    @pytest.mark.parametrize("by", ["option", "environment"])
    def test_debug_shows_the_cause(self, by, monkeypatch):
        if by == "environment":
            monkeypatch.setenv("MESANET_DEBUG", "1")
        result = invoke(*(["--debug"] if by == "option" else []), "generate", "--model", "./missing")
        assert result.exit_code == 1
        assert isinstance(result.exception, CheckpointError)


class TestProcess:
    """What only a process of its own shows: its streams, signals and exit code."""

    def test_standard_output_carries_only_the_text(self, checkpoint):
        options = ("--temperature", 0, "--max-new-tokens", 8)
        with command("generate", "--model", checkpoint, *options) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert out.decode() == generate(checkpoint, *options)
        assert err == b""

    def test_offline_hub_gives_one_sentence(self, tmp_path):
        with command("generate", "--model", "owner/missing", cwd=tmp_path) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (1, b"")
        assert err.startswith(b"mesanet: error: --model is 'owner/missing'")
        assert err.count(b"\n") == 1

    def test_interrupt(self, checkpoint):
        def listen():  # a parent that runs in the background may have left its children deaf to interrupts
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with command("generate", "--model", checkpoint, "--max-new-tokens", 1_000_000, preexec_fn=listen) as process:
            process.stdout.read(len(DEFAULT_PROMPT))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        assert process.returncode == 130
        assert err.strip() == b""

    def test_reader_goes_away(self, checkpoint):
        with command("generate", "--model", checkpoint, "--max-new-tokens", 1_000_000) as process:
            process.stdout.read(len(DEFAULT_PROMPT))
            process.stdout.close()
            err = process.stderr.read()
            process.wait(timeout=120)
        assert process.returncode == 141
        assert err == b""


class TestDoctor:
    @pytest.fixture
    def installed(self, checkpoint, monkeypatch):
        monkeypatch.setattr(modeling_mesanet, "bundled_checkpoint", lambda: str(checkpoint))

    def test_all_well(self, installed, checkpoint):
        result = invoke("doctor", "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["ok"]
        assert report["versions"]["torch"] == torch.__version__
        assert report["checkpoint"] == {
            "ok": True,
            "path": str(checkpoint),
            "parameters": MesaNetForCausalLM.from_pretrained(checkpoint).num_parameters(),
            "failure": None,
        }
        cpu = report["devices"][0]
        assert cpu["device"] == "cpu"
        assert cpu["backend"]
        assert cpu["reason"]
        errors = cpu["self_test"]["errors"]
        gradients = {"dq", "dk", "dv", "dlog_gamma", "dbeta", "dlam"}
        assert set(errors) == {"o", "H", "G", "o of steps"} | gradients
        assert all(0 < error <= doctor.FLOAT32_TOLERANCE for error in errors.values())

    def test_the_same_as_text(self, installed):
        result = invoke("doctor")
        assert result.exit_code == 0, result.output
        for words in (
            torch.__version__,
            "device cpu",
            "self-test",
            "dlog_gamma",
            "bundled checkpoint",
            "everything works",
        ):
            assert words in result.stdout

    @pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
    def test_broken_operator(self, installed, monkeypatch, fault):
        right = doctor.mesa_attention

        def broken(*, q, **options):
            if fault == "raises":
                raise RuntimeError("no kernel image")
            return right(q=q * 1.01 if fault == "wrong" else q * float("nan"), **options, normalize_qk=False)

        monkeypatch.setattr(doctor, "mesa_attention", broken)
        result = invoke("doctor", "--json")
        assert result.exit_code == 1
        test = json.loads(result.stdout)["devices"][0]["self_test"]
        assert not test["ok"]
        if fault == "raises":
            assert "no kernel image" in test["failure"]
        text = invoke("doctor")
        assert text.exit_code == 1
        assert "FAILED" in text.stdout

    def test_broken_checkpoint(self, copy, monkeypatch):
        (copy / "model.safetensors").write_bytes(b"")
        monkeypatch.setattr(modeling_mesanet, "bundled_checkpoint", lambda: str(copy))
        result = invoke("doctor", "--json")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert report["devices"][0]["self_test"]["ok"]
        assert not report["ok"]
        assert "truncated" in report["checkpoint"]["failure"]

    def test_no_checkpoint(self, monkeypatch):
        def missing():
            raise FileNotFoundError("The bundled checkpoint is missing.")

        monkeypatch.setattr(modeling_mesanet, "bundled_checkpoint", missing)
        assert invoke("doctor", "--json").exit_code == 1
        assert "The bundled checkpoint is missing." in refuse("generate")

    def test_this_installation(self, bundled):
        result = invoke("doctor")
        assert result.exit_code == 0, result.output


class TestInfo:
    def test_numbers(self, checkpoint, monkeypatch):
        model = MesaNetForCausalLM.from_pretrained(checkpoint)
        tokens = torch.randint(model.config.vocab_size, (1, 100))
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens, past_key_values=cache)
        held = sum(
            state.nbytes
            for layer in cache.layers
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
        )

        def loaded(*_, **__):
            raise AssertionError("info loads no weights")

        monkeypatch.setattr(MesaNetForCausalLM, "from_pretrained", loaded)
        result = invoke("info", checkpoint, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["architecture"] == "MesaNetForCausalLM"
        assert report["state_bytes"] == held
        parameters = report["parameters"]
        assert parameters["total"] == model.num_parameters() == sum(parameters["by_part"].values())
        assert parameters["by_dtype"] == {"F32": model.num_parameters()}
        assert parameters["by_part"]["embedding"] == model.model.embed_tokens.weight.numel()
        assert parameters["by_part"]["MLPs"] == sum(
            weight.numel() for layer in model.model.layers for weight in layer.mlp.parameters()
        )
        assert parameters["by_part"]["Mesa layers"] == sum(
            weight.numel() for layer in model.model.layers for weight in layer.mixer.parameters()
        )
        assert report["layers"] == {"total": 2, "linear_attention": 2}
        assert report["solver"]["max_steps"] == model.config.cg_max_steps
        assert report["model"]["value_size"] == 8

    def test_the_same_as_text(self, checkpoint):
        result = invoke("info", checkpoint)
        assert result.exit_code == 0, result.output
        report = json.loads(invoke("info", checkpoint, "--json").stdout)
        assert str(checkpoint) in result.stdout
        assert f"{report['parameters']['total']:,}" in result.stdout
        assert f"{report['state_bytes']:,} bytes" in result.stdout

    def test_bundled_checkpoint(self, bundled):
        report = json.loads(invoke("info", "--json").stdout)
        assert report["path"] == bundled
        assert 5e6 <= report["parameters"]["total"] <= 9e6


class TestLoading:
    def test_in_evaluation_mode_with_the_precision_asked_for(self, checkpoint):
        model = load_checkpoint(checkpoint)
        assert not model.training
        assert model.dtype == torch.float32
        assert load_checkpoint(checkpoint, dtype=torch.bfloat16).model.embed_tokens.weight.dtype == torch.bfloat16

    def test_refuses_to_make_up_a_head(self, checkpoint):
        with pytest.raises(CheckpointError, match=r"^path is .*score\.weight is missing"):
            load_checkpoint(checkpoint, model_class=MesaNetForSequenceClassification)

    def test_restores_the_verbosity_of_transformers(self, checkpoint):
        transformers_logging.set_verbosity_info()
        load_checkpoint(checkpoint)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO

    def test_default_is_the_bundled_checkpoint(self, bundled):
        model, tokenizer = load_checkpoint(), load_tokenizer()
        assert model.config.vocab_size >= len(tokenizer)


class TestPrefill:
    TEXT = (SENTENCE + "\n") * 40

    @pytest.fixture
    def file(self, tmp_path) -> Path:
        path = tmp_path / "long.txt"
        path.write_text(self.TEXT, encoding="utf-8")
        return path

    def prefill(self, folder, *arguments, stdin=None) -> str:
        result = invoke("prefill", "--model", folder, *arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        return result.stderr

    def test_going_on_from_a_state_equals_going_on_from_the_text(self, checkpoint, file, tmp_path):
        state, options = tmp_path / "state", ("--temperature", 0, "--max-new-tokens", 12, "--no-echo")
        message = self.prefill(checkpoint, file, "-o", state, "--chunk-tokens", 100)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokens = len(tokenizer(self.TEXT.removesuffix("\n"))["input_ids"])
        assert message == f"{state}: the state after {tokens:,} tokens, {state.stat().st_size:,} bytes\n"
        more = tmp_path / "more.txt"
        for new in (" and so on", "\n" + SENTENCE):
            more.write_text(self.TEXT.removesuffix("\n") + new, encoding="utf-8")
            expected = generate(checkpoint, "--prompt-file", more, *options)
            assert generate(checkpoint, "--state", state, "--prompt", new, *options) == expected
        more.write_text(self.TEXT + "\n", encoding="utf-8")  # of which generate drops the last newline
        expected = generate(checkpoint, "--prompt-file", more, *options)
        assert generate(checkpoint, "--state", state, *options) == expected

    def test_standard_input(self, checkpoint, file, tmp_path):
        self.prefill(checkpoint, file, "--output", tmp_path / "a")
        script = f"{sys.executable} -m modeling_mesanet.cli prefill - -o {tmp_path / 'b'} -m {checkpoint} < {file}"
        subprocess.run(script, shell=True, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_mistakes_get_one_sentence(self, checkpoint, file, tmp_path):
        broken, empty = tmp_path / "broken.txt", tmp_path / "empty.txt"
        broken.write_bytes(b"abc \xff\xfe def" * 10)
        empty.write_text("\n")
        output = tmp_path / "state"
        for source, target, message in (
            (tmp_path / "absent.txt", output, "does not exist; give the path of a text file"),
            (tmp_path, output, "cannot be read"),
            (broken, output, "is not UTF-8 text"),
            (empty, output, "holds no text"),
            (file, tmp_path, "which is no file in a folder that can be written to"),
            (file, tmp_path / "absent" / "state", "which is no file in a folder that can be written to"),
        ):
            assert message in refuse("prefill", source, "-o", target, "-m", checkpoint)
        assert not output.exists()

    def test_a_folder_that_cannot_be_written_to_is_found_out_first(self, checkpoint, file, tmp_path, monkeypatch):
        monkeypatch.setattr(cli.os, "access", lambda path, mode: Path(path) != tmp_path)
        monkeypatch.setattr(prefill, "prefill", None)  # nothing is read
        message = refuse("prefill", file, "-o", tmp_path / "state", "-m", checkpoint)
        assert "which is no file in a folder that can be written to" in message

    def test_the_text_itself_is_not_replaced(self, checkpoint, file, tmp_path):
        link, twin = tmp_path / "link", tmp_path / "twin"
        link.symlink_to(file)
        twin.hardlink_to(file)
        for target in (file, link, twin):
            assert "the text itself" in refuse("prefill", file, "-o", target, "-m", checkpoint)
        assert file.read_text(encoding="utf-8") == self.TEXT

    def test_a_state_that_does_not_fit_is_refused(self, checkpoint, copy, file, tmp_path):
        state = tmp_path / "state"
        self.prefill(checkpoint, file, "-o", state)
        weights = load_file(copy / "model.safetensors")
        next(iter(weights.values())).add_(1)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        for arguments, message in (
            (("--state", tmp_path / "absent"), "--state is '"),
            (("--state", file), "not a safetensors file"),
            (("--state", state, "--dtype", "bfloat16"), "load the model with dtype float32"),
        ):
            assert message in refuse("generate", *arguments, "-m", checkpoint)
        assert "a model with other weights" in refuse("generate", "--state", state, "-m", copy)

    def test_weights_that_are_no_numbers(self, copy, file, tmp_path):
        weights = load_file(copy / "model.safetensors")
        next(weight for name, weight in weights.items() if "k_proj" in name).fill_(torch.nan)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        for temperature in (0, 1):
            message = refuse("generate", "-m", copy, "--no-echo", "--temperature", temperature)
            assert "logits are not numbers (NaN); `mesanet check`" in message
        assert "by a model that `mesanet check` passes" in refuse(
            "prefill", file, "-o", tmp_path / "state", "-m", copy
        )

    def test_logits_that_are_no_numbers_later(self, copy):
        config = MesaNetConfig(**MesaNetConfig.from_pretrained(copy).to_dict() | {"tie_word_embeddings": False})
        tokenizer = load_tokenizer(copy, argument="copy")
        torch.manual_seed(0)
        model = MesaNetForCausalLM(config)
        inputs = tokenizer("The", return_tensors="pt")
        first = model(input_ids=inputs["input_ids"]).logits[0, -1].argmax()
        assert first not in inputs["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[first] = torch.nan
        model.save_pretrained(copy)
        options = ("generate", "-m", copy, "--no-echo", "--no-stream", "--prompt", "The")
        assert invoke(*options, "--max-new-tokens", 1, "--temperature", 0).exit_code == 0
        for sampling in (("--temperature", 0), ("--temperature", 1, "--top-k", 1)):
            assert "logits are not numbers (NaN)" in refuse(*options, "--max-new-tokens", 3, *sampling)


def test_version_is_the_one_in_pyproject():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    version = tomllib.loads(pyproject.read_text())["project"]["version"]
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"mesanet {version}\n")


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    commands = ("generate", "prefill", "doctor", "info", "convert", "export", "card", "push")
    commands += ("eval", "perplexity", "compute-sweep", "synthetic")
    assert all(name in result.stdout for name in commands)


def test_a_temperature_too_small_for_float32_is_a_usage_error():
    result = invoke("generate", "--temperature", "1e-38")
    assert result.exit_code == 2
    assert "too small" in result.output


def test_a_prompt_that_is_no_utf8_is_refused(capsys):
    result = invoke("generate", "--prompt", "caf\udce9")
    assert result.exit_code == 1
    assert "--prompt is not UTF-8 text" in result.output


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("MESANET_BACKEND", "tritn")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "MESANET_BACKEND is 'tritn'" in result.output
    assert "Traceback" not in result.output
