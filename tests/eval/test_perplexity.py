# SPDX-License-Identifier: Apache-2.0
"""`mesanet perplexity`: exact against one forward pass, resumable, and clear about bad input."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib", reason="the eval extra is not installed")

from eval_inputs import save_checkpoint

from modeling_mesanet.eval import perplexity
from modeling_mesanet.eval.perplexity import EncodedDocument, PositionSums, band_edges, encode
from modeling_mesanet.eval.results import UsageError, read_named_documents, write_csv

# Losses of some 6 nats in float32, summed in another order.
ROUNDING = 1e-4


def one_forward(model, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits, ids[1:], reduction="none").numpy()


def expected_losses(checkpoint, texts) -> dict[str, np.ndarray]:
    """Every document in one forward pass each."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return {
        name: one_forward(model, [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
        for name, text in read_named_documents([texts]).items()
    }


def read(folder) -> tuple[dict, list[dict]]:
    result = json.loads((folder / "perplexity.json").read_text())
    with open(folder / "positions.csv", newline="") as stream:
        return result, list(csv.DictReader(stream))


@pytest.mark.parametrize(("chunk", "tokens_at_once"), [(7, 1), (7, 30), (1000, 1000)])
def test_equals_one_forward(mesanet, checkpoint, texts, tmp_path, chunk, tokens_at_once):
    output = tmp_path / "out"
    options = ["--chunk", chunk, "--tokens-at-once", tokens_at_once]
    printed = mesanet("perplexity", texts, "--model", checkpoint, "-o", output, *options).stdout
    result, rows = read(output)
    losses = expected_losses(checkpoint, texts)
    everything = np.concatenate(list(losses.values())).astype(np.float64)
    whole = result["lengths"]["whole"]
    assert whole["tokens"] == len(everything)
    assert whole["nll"] == pytest.approx(everything.mean(), abs=ROUNDING)
    assert f"{whole['nll']:.4f}" in printed
    assert whole["perplexity"] == pytest.approx(math.exp(everything.mean()), rel=ROUNDING)
    size = sum(len(text.encode()) for text in read_named_documents([texts]).values())
    assert whole["bits_per_byte"] == pytest.approx(everything.sum() / math.log(2) / size, rel=ROUNDING)
    for name, values in losses.items():
        assert result["documents"][name]["nll"] == pytest.approx(values.mean(), abs=ROUNDING)
    # By position: the mean over the documents that reach it, and over everything up to it.
    assert len(rows) == max(map(len, losses.values()))
    for position in (0, 20, len(rows) - 1):
        at = [values[position] for values in losses.values() if len(values) > position]
        so_far = np.concatenate([values[: position + 1] for values in losses.values()])
        assert int(rows[position]["tokens"]) == len(at)
        assert float(rows[position]["nll"]) == pytest.approx(np.mean(at), abs=ROUNDING)
        assert float(rows[position]["mean_nll_so_far"]) == pytest.approx(so_far.mean(), abs=ROUNDING)
    long = losses["texts:long"]
    beyond = result["extrapolation"]["beyond"]
    assert (result["training_length"], beyond["from"], beyond["to"]) == (16, 16, len(long))
    past = np.concatenate([values[16:] for values in losses.values()])
    assert beyond["nll"] == pytest.approx(past.mean(), abs=ROUNDING)
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_context_lengths_score_the_same_tokens(mesanet, checkpoint, texts, tmp_path):
    output = tmp_path / "out"
    mesanet("perplexity", texts, "-m", checkpoint, "-o", output, "--lengths", "32,8", "--chunk", 5)
    result, rows = read(output)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    documents = {name: np.array(tokenizer(text)["input_ids"]) for name, text in read_named_documents([texts]).items()}
    usable = {name: len(ids) // 32 * 32 for name, ids in documents.items()}
    assert result["left_out"] == [name for name in documents if not usable[name]] == ["texts:short"]
    for length in (8, 32):
        losses = [
            one_forward(model, [tokenizer.bos_token_id, *window])
            for name, ids in documents.items()
            for window in ids[: usable[name]].reshape(-1, length)
        ]
        entry = result["lengths"][str(length)]
        assert entry["tokens"] == sum(usable.values())
        assert entry["nll"] == pytest.approx(np.mean(losses), abs=ROUNDING)
    assert [float(row["nll"]) for row in rows] == pytest.approx(np.mean(losses, axis=0), abs=ROUNDING)
    bands = [(band["from"], band["to"]) for band in result["positions"]]
    assert bands == [(0, 8), (8, 16), (16, 32)]
    assert result["positions"][1]["nll"] == pytest.approx(np.mean(losses, axis=0)[8:16].mean(), abs=ROUNDING)


def test_difference_to_a_reference(mesanet, checkpoint, other_checkpoint, texts, tmp_path):
    output = tmp_path / "out"
    mesanet("perplexity", texts, "-m", checkpoint, "--reference", other_checkpoint, "-o", output)
    result, rows = read(output)
    model, other = (expected_losses(folder, texts) for folder in (checkpoint, other_checkpoint))
    difference = {name: model[name] - other[name] for name in model}
    everything = np.concatenate(list(difference.values()))
    assert abs(everything.mean()) > 10 * ROUNDING
    assert result["lengths"]["whole"]["difference"] == pytest.approx(everything.mean(), abs=ROUNDING)
    assert result["documents"]["texts:short"]["difference"] == pytest.approx(
        difference["texts:short"].mean(), abs=ROUNDING
    )
    first = np.concatenate([values[:16] for values in difference.values()])
    assert result["extrapolation"]["within"]["difference"] == pytest.approx(first.mean(), abs=ROUNDING)
    at = [values[20] for values in difference.values() if len(values) > 20]
    assert float(rows[20]["difference"]) == pytest.approx(np.mean(at), abs=ROUNDING)
    so_far = np.concatenate([values[:21] for values in difference.values()])
    assert float(rows[20]["difference_so_far"]) == pytest.approx(so_far.mean(), abs=ROUNDING)


def test_other_models_are_measured_and_compared(mesanet, checkpoint, texts, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    llama = save_checkpoint(tmp_path / "llama", LlamaForCausalLM(config), bos="<|endoftext|>")
    mesanet("perplexity", texts, "-m", llama, "--reference", checkpoint, "-o", tmp_path / "out", "--chunk", 9)
    result, _ = read(tmp_path / "out")
    losses = np.concatenate(list(expected_losses(llama, texts).values()))
    assert result["lengths"]["whole"]["nll"] == pytest.approx(losses.mean(), abs=ROUNDING)


def test_without_a_special_token_windows_follow_the_token_before(tiny_model, checkpoint, tmp_path):
    folder = save_checkpoint(tmp_path / "bare", tiny_model(vocab_size=300), bos=None)
    document = encode(AutoTokenizer.from_pretrained(folder), "d", "the captain came back at night")
    assert not document.bos
    windows = document.windows(4)
    assert np.array_equal(np.concatenate([window[1:] for window in windows]), document.tokens[1:])
    assert [window[0] for window in windows] == document.tokens[:-1][::4].tolist()


def test_special_tokens_spelled_out_are_text(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    document = encode(tokenizer, "d", "night<|endoftext|>night")
    assert (document.tokens == tokenizer.bos_token_id).sum() == 1


class TestResuming:
    def run(self, mesanet, checkpoint, texts, output, *options, **kwargs):
        return mesanet("perplexity", texts, "-m", checkpoint, "-o", output, "--tokens-at-once", 1, *options, **kwargs)

    def test_an_interrupted_run_goes_on(self, mesanet, checkpoint, texts, tmp_path, monkeypatch):
        """Two documents are finished when it stops; the resumed run reads the third only, and loses nothing."""
        self.run(mesanet, checkpoint, texts, tmp_path / "whole")
        original, seen = perplexity.iterate_losses, []

        def interrupted(model, sequences, **options):
            for count, item in enumerate(original(model, sequences, **options)):
                if count == 2:
                    raise KeyboardInterrupt
                yield item

        def counted(model, sequences, **options):
            seen.extend(sequences)
            return original(model, sequences, **options)

        output = tmp_path / "out"
        monkeypatch.setattr(perplexity, "iterate_losses", interrupted)
        self.run(mesanet, checkpoint, texts, output, code=130)
        assert not (output / "perplexity.json").exists()
        assert len(list((output / "losses").rglob("*.npy"))) == 2
        monkeypatch.setattr(perplexity, "iterate_losses", counted)
        self.run(mesanet, checkpoint, texts, output, fails="--resume")
        assert not seen
        self.run(mesanet, checkpoint, texts, output, "--resume")
        assert len(seen) == 1
        assert read(output) == read(tmp_path / "whole")

    def test_a_damaged_journal_entry_is_measured_again(self, mesanet, checkpoint, texts, tmp_path):
        self.run(mesanet, checkpoint, texts, tmp_path / "out")
        before = read(tmp_path / "out")
        entry = sorted((tmp_path / "out" / "losses").rglob("*.npy"))[0]
        entry.write_bytes(entry.read_bytes()[:-8])
        self.run(mesanet, checkpoint, texts, tmp_path / "out", "--resume")
        assert read(tmp_path / "out") == before

    def test_other_settings_are_refused(self, mesanet, checkpoint, texts, tmp_path):
        self.run(mesanet, checkpoint, texts, tmp_path / "out")
        before = (tmp_path / "out" / "perplexity.json").read_bytes()
        self.run(mesanet, checkpoint, texts, tmp_path / "out", "--resume", "--max-tokens", 9, fails="max tokens")
        texts.write_text('{"text": "something else"}\n')
        self.run(mesanet, checkpoint, texts, tmp_path / "out", "--resume", fails="differs in documents")
        assert (tmp_path / "out" / "perplexity.json").read_bytes() == before


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("missing.txt", None, "No such file"),
            ("empty.txt", "", "holds an empty document (empty)"),
            ("blank.jsonl", '{"text": "fine"}\n{"text": " \\n"}\n', "holds an empty document (blank:1)"),
            ("nothing.jsonl", "", "at least one line"),
            ("fields.jsonl", '{"body": "x"}\n', "field 'text'"),
            ("broken.jsonl", '{"text": \n', "cannot be read"),
            ("torn.jsonl.gz", "no gzip", "cannot be read"),
            ("twice.jsonl", '{"id": 1, "text": "a b"}\n{"id": 1, "text": "c d"}\n', "two rows with one 'id'"),
        ],
    )
    def test_documents(self, mesanet, checkpoint, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_text(content)
        mesanet("perplexity", tmp_path / name, "-m", checkpoint, "-o", tmp_path / "out", fails=message)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--lengths", "8,x"], "--lengths is '8,x'"),
            (["--lengths", "0"], "--lengths is '0'"),
            (["--lengths", "8,12"], "context length 8 does not divide the longest, 12"),
            (["--lengths", "4096"], "fewer than the longest context length, 4096"),
            (["--model", "no/such/folder"], "--model is 'no/such/folder'"),
            (["--reference", "no/such/folder"], "--reference is 'no/such/folder'"),
            (["--device", "warp"], "--device is 'warp'"),
        ],
    )
    def test_options(self, mesanet, checkpoint, texts, tmp_path, options, message):
        given = [] if "--model" in options else ["--model", checkpoint]
        mesanet("perplexity", texts, *given, "-o", tmp_path / "out", *options, fails=message)
        assert not (tmp_path / "out").exists()

    def test_output_that_is_a_file(self, mesanet, checkpoint, texts):
        mesanet("perplexity", texts, "-m", checkpoint, "-o", texts, fails="which is a file")

    def test_folder_of_something_else(self, mesanet, checkpoint, texts, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").write_text("mine")
        arguments = ("perplexity", texts, "-m", checkpoint, "-o", tmp_path / "out")
        mesanet(*arguments, fails="not empty")
        mesanet(*arguments, "--resume", fails="settings.json")
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes"]

    def test_reference_with_another_tokenizer(self, mesanet, tiny_model, checkpoint, texts, tmp_path):
        bare = save_checkpoint(tmp_path / "bare", tiny_model(vocab_size=300), bos=None)
        arguments = ("perplexity", texts, "-m", checkpoint, "--reference", bare, "-o", tmp_path / "out")
        mesanet(*arguments, fails="whose tokenizer splits 'texts:long' otherwise")

    def test_without_matplotlib(self, mesanet, checkpoint, texts, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        arguments = ("perplexity", texts, "-m", checkpoint, "-o", tmp_path / "out")
        mesanet(*arguments, fails="pip install 'modeling-mesanet[eval]'")
        mesanet(*arguments, "--no-plot")
        assert not (tmp_path / "out" / "perplexity.png").exists()


def test_bins_hold_their_own_tokens_only():
    sums = PositionSums.of([np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 6.0])])
    assert sums.binned([0, 1, 2]).tolist() == [2.0, 4.0]
    assert sums.binned([1, 4]).tolist() == [15 / 4]
    assert sums.mean_so_far().tolist() == [2.0, 3.0, 3.0, 19 / 6]


def test_bands_double():
    assert band_edges(100, 16) == [0, 16, 32, 64, 100]
    assert band_edges(5, 16) == [0, 5]


@pytest.mark.parametrize("log", [True, False])
def test_plotted_bins_cover_every_position(log):
    for length in (1, 2, 63, 64, 65, 32768):
        edges = perplexity.bins(length, log=log)
        assert (edges[0], edges[-1]) == (0, length)
        assert (np.diff(edges) > 0).all()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "table.csv"
    write_csv(file, ["a"], [[1.23456789]])

    def rows():
        yield [2]
        raise UsageError("stopped")

    with pytest.raises(UsageError):
        write_csv(file, ["a"], rows())
    assert file.read_text() == "a\n1.23457\n"
    assert list(tmp_path.iterdir()) == [file]


def test_windows_of_a_limited_document():
    document = EncodedDocument(np.arange(10), bos=True)
    assert [window.tolist() for window in document.windows(3, 6)] == [[0, 1, 2, 3], [0, 4, 5, 6]]


def test_the_same_tokens_in_shorter_windows():
    losses = {length: {"a": np.arange(8.0) * length, "b": np.ones(8)} for length in (2, 4, 8)}

    def shorter(lengths, training):
        return perplexity.shorter_windows(losses, {"settings": {"lengths": lengths}, "training_length": training})

    length, sums = shorter([2, 4, 8], 4)
    assert length == 4
    assert sums.nats.tolist() == [1 + 4 * position for position in range(8)]
    assert sums.tokens.tolist() == [2] * 8
    # The longest windows are no shorter ones, and a training length that was not measured tells nothing.
    assert shorter([2, 4, 8], 8)[0] == shorter([2, 4, 8], 6)[0] == shorter([2, 8], None)[0] == 2
    assert shorter([8], 4) is shorter(None, 4) is None
