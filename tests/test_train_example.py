# SPDX-License-Identifier: Apache-2.0
"""The example programs: tokenizer, packing, recipe, resuming, evaluation. The text is made up here, no data needed."""

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("accelerate", reason="the train extra is not installed")
pytest.importorskip("matplotlib", reason="the train extra is not installed")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import evaluate_novels  # noqa: E402
import novels  # noqa: E402
import train_novels  # noqa: E402
import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import modeling_mesanet  # noqa: E402

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "sea",
    "ship",
    "captain",
    "said",
    "old",
    "man",
    "never",
    "night",
    "don't",
]
AWKWARD = (
    "",
    " ",
    "\n",
    'It was  the best\n\n of times,"\n\n"I don\'t  know - naïve 漢字 😀\r\n\tend  ',
    "<|endoftext|> is only text here 1234.5\x00\x7f",
    " '\"' ... --\n--\n\"'Tis\" \u00a0\u2028\u2029 \ufeff",
)


def make_text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    drawn = [WORDS[i] for i in rng.integers(len(WORDS), size=words)]
    lines = [" ".join(drawn[i : i + 9]) for i in range(0, words, 9)]
    return "\n".join(f'"{line},"\n' if i % 3 == 0 else f"{line}." for i, line in enumerate(lines)) + "\n"


def write_corpus(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for index, text in enumerate(texts):
            stream.write(json.dumps({"id": f"novel {index}", "text": text}) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder in the layout of the real one."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    (folder / "perplexity" / "books").mkdir(parents=True)
    write_corpus(folder / "corpus" / "novels_train.jsonl.gz", [make_text(seed, 250 + seed) for seed in range(3)])
    write_corpus(folder / "corpus" / "novels_valid.jsonl.gz", [make_text(9, 150), make_text(10, 60) + "naïve\n"])
    (folder / "perplexity" / "books" / "tiny.txt").write_text(make_text(11, 200), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    texts = novels.read_documents(data / "corpus" / "novels_train.jsonl.gz")
    folder = tmp_path_factory.mktemp("made") / "tokenizer"
    novels.save_tokenizer(novels.train_tokenizer(texts, 300, progress=False), folder)
    return AutoTokenizer.from_pretrained(folder)


def make_recipe(**changes) -> train_novels.Recipe:
    return train_novels.Recipe(
        **{
            "vocab_size": 300,
            "hidden_size": 16,
            "layers": 1,
            "heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "sequence_length": 48,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "steps": 6,
            "warmup_steps": 2,
        }
        | changes
    )


def make_model(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return train_novels.build_model(make_recipe(**changes), special_token=0).eval()


def run(data, tokenizer, output, recipe=None, **options) -> dict:
    options = {"use_cpu": True, "progress": False, "log_every": 1, "eval_every": 3} | options
    return train_novels.train(recipe or make_recipe(), tokenizer, data / "corpus", output, **options)


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", AWKWARD)
def test_tokenizer_gives_text_back(tokenizer, text):
    ids = novels.encode_documents(tokenizer, [text])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids[1:].tolist()) == text
    assert novels.token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_documents_are_encoded_whole_after_a_padded_batch(tokenizer):
    texts = ["the", "the old man said"]
    expected = [*tokenizer.encode(texts[0]), *tokenizer.encode(texts[1])]
    tokenizer(texts, padding=True, truncation=True, max_length=3)
    assert novels.encode_documents(tokenizer, texts).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_tokenizer_gives_any_text_back(tokenizer, text):
    ids = novels.encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids[1:].tolist()) == text
    assert novels.token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_tokenizer_begins_prompts_as_documents_begin(tokenizer):
    text = "the old man said"
    assert tokenizer(text).input_ids == novels.encode_documents(tokenizer, [text]).tolist()
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert len(tokenizer) == 300
    assert tokenizer.model_max_length > 10**9
    batch = tokenizer(["the", "the old man"], padding=True)
    assert batch.attention_mask[0][0] == 0, "pads go to the left, where generation continues"


def test_tokenizer_refuses_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(novels.UsageError, match="vocab_size is 100"):
        novels.train_tokenizer(["text"], 100)


def test_tokens_are_cached_until_the_source_changes(tokenizer, tmp_path, monkeypatch):
    source, target = tmp_path / "text.jsonl.gz", tmp_path / "tokens.npy"
    write_corpus(source, ["the sea", "the ship"])
    first, description = novels.cached_tokens(tokenizer, source, target)
    assert description["documents"] == 2
    assert description["bytes"] == len("the sea") + len("the ship")
    with monkeypatch.context() as patch:
        patch.setattr(novels, "encode_documents", lambda *_: pytest.fail("tokenised again"))
        again, _ = novels.cached_tokens(tokenizer, source, target)
    assert np.array_equal(first, again)
    write_corpus(source, ["the whale"])
    changed, _ = novels.cached_tokens(tokenizer, source, target)
    assert np.array_equal(changed, novels.encode_documents(tokenizer, ["the whale"]))


# ---------------------------------------------------------------------------------------------------- packing


def test_pack_resets_positions_and_masks_labels():
    batch = novels.pack([np.array([5, 6, 0, 7, 8, 9]), np.array([0, 1, 2, 3, 4, 0])], bos=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7, 8, 9], [0, 1, 2, 3, 4, 0]]
    assert batch["labels"].tolist() == [[5, 6, -100, 7, 8, 9], [-100, 1, 2, 3, 4, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 6, 11, 12]


def test_pack_leaves_whole_blocks_plain():
    batch = novels.pack([np.array([5, 6, 7]), np.array([0, 8, 9])], bos=0)
    assert set(batch) == {"input_ids", "labels"}


@pytest.mark.parametrize("key", ["position_ids", "cu_seq_lens_q"])
def test_state_never_leaks_between_documents(key):
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[0], rng.integers(1, 300, size=n)]) for n in (20, 1, 42)]
    tokens = np.concatenate(documents)
    batch = novels.pack([tokens[:33], tokens[33:]], bos=0)
    model = make_model(layers=2)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], use_cache=False, **{key: batch[key]}).logits.flatten(0, 1)
        # The third document is cut between the blocks, each of which starts with an empty state.
        pieces = [documents[0], documents[1], tokens[23:33], tokens[33:]]
        apart = [model(input_ids=torch.from_numpy(p)[None], use_cache=False).logits[0] for p in pieces]
        leaking = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(packed, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert (leaking - packed).abs().max() > 1e-2, "the comparison could not fail"


def test_blocks_differ_by_epoch_and_repeat_by_seed():
    tokens, length = np.arange(1000), 64
    blocks = novels.TrainingBlocks(tokens, length, count=40, seed=1)
    longer = novels.TrainingBlocks(tokens, length, count=60, seed=1)
    assert len(blocks) == 40
    assert all(np.array_equal(blocks[i], longer[i]) for i in range(40))
    assert all(len(blocks[i]) == length for i in range(40))
    assert not np.array_equal(blocks.starts, novels.TrainingBlocks(tokens, length, count=40, seed=2).starts)
    first, second = blocks.starts[:15], blocks.starts[15:30]
    for epoch in (first, second):
        assert (np.diff(np.sort(epoch)) == length).all(), "an epoch reads no token twice"
        assert not (np.diff(epoch) == length).all(), "an epoch is shuffled"
    assert first.min() % length != second.min() % length, "epochs cut at different places"


def test_blocks_refuse_a_corpus_shorter_than_a_block():
    with pytest.raises(novels.UsageError, match="sequence_length is 64"):
        novels.TrainingBlocks(np.arange(10), 64, count=1, seed=0)


@pytest.mark.parametrize("limit", [None, 32])
def test_validation_windows_score_each_token_once(limit):
    tokens = np.arange(1, 100)
    windows = train_novels.ValidationWindows(tokens, 16, special_token=0, limit=limit)
    inputs = [t for i in range(len(windows)) for t in windows[i][:-1] if t]
    targets = [t for i in range(len(windows)) for t in windows[i][1:] if t]
    if limit is None:
        assert targets == list(range(2, 100))
        assert [t - 1 for t in targets] == inputs[: len(targets)]
    else:
        assert len(windows) == 2
        assert windows[0][0] == 1
        assert len(set(targets)) == len(targets) == 32


# ---------------------------------------------------------------------------------------------------- recipe


def test_weight_decay_spares_embeddings_norms_biases_and_lambda():
    model = make_model(layers=2)
    decayed = set(train_novels.decay_parameter_names(model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert "model.layers.0.mixer.q_proj.weight" in decayed
    assert "model.layers.1.mlp.down_proj.weight" in decayed
    assert {name.rsplit(".", 1)[0] for name in decayed if "conv" in name}, "convolutions decay"
    kinds = ("embed_tokens.weight", "norm.weight", "bias", "lambda_param", "lm_head.weight")
    assert all(name.endswith(kinds) for name in spared), spared
    assert not any(name.endswith(kinds) for name in decayed), decayed
    assert sum(name.endswith("lambda_param") for name in spared) == 2


@pytest.fixture(scope="module")
def whole_run(data, tokenizer, tmp_path_factory):
    """An uninterrupted run: its folder, its trainer, what it returned."""
    output, kept = tmp_path_factory.mktemp("whole"), []

    class Spy(train_novels.NovelsTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_novels, "NovelsTrainer", Spy)
        content = run(data, tokenizer, output)
    return output, kept[0], content


def read_log(output: Path, key: str) -> dict[int, float]:
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def test_training_follows_the_recipe(whole_run):
    output, trainer, _ = whole_run
    recipe = make_recipe()
    decayed, spared = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == spared["betas"] == (0.9, 0.98)
    assert decayed["eps"] == 1e-8
    sizes = {id(p) for p in decayed["params"]}
    expected = train_novels.decay_parameter_names(trainer.model)
    assert sizes == {id(p) for name, p in trainer.model.named_parameters() if name in set(expected)}
    assert len(spared["params"]) + len(decayed["params"]) == len(list(trainer.model.parameters()))
    assert trainer.args.max_grad_norm == 1.0

    def rate(step: int) -> float:  # of the update that follows `step` updates
        if step < recipe.warmup_steps:
            return recipe.learning_rate * step / recipe.warmup_steps
        done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
        return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    logged = read_log(output, "learning_rate")
    assert logged == pytest.approx({step: rate(step - 1) for step in range(1, recipe.steps + 1)})
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.1 * recipe.learning_rate)


def test_training_writes_what_a_card_needs(whole_run, data, tokenizer):
    output, _, content = whole_run
    assert content == json.loads((output / "training_log.json").read_text())
    assert content["status"] == "complete"
    assert content["tokens_seen"] == 6 * 2 * 48
    assert content["epochs"] == pytest.approx(content["tokens_seen"] / content["data"]["train"]["tokens"])
    assert content["data"]["valid"]["bytes"] == novels.utf8_bytes(
        novels.read_documents(data / "corpus" / "novels_valid.jsonl.gz")
    )
    assert content["runs"][0]["versions"]["torch"] == torch.__version__
    losses = read_log(output, "loss")
    assert set(losses) == set(range(1, 7))
    assert losses[1] == pytest.approx(math.log(300), abs=1.0)
    assert losses[6] < losses[1]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in output.rglob("*") if "tmp" in p.name], "no temporary file stays"


def test_final_checkpoint_loads_in_bfloat16(whole_run):
    output, _, content = whole_run
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("lambda_param")} == {torch.float32}
    assert model.config.use_cache is True
    assert sum(p.numel() for p in model.parameters()) == content["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    prompt = tokenizer("the old man", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, prompt.input_ids.shape[1] + 3)


def test_validation_is_the_mean_over_all_tokens(whole_run, tokenizer, data):
    output, trainer, content = whole_run
    tokens = np.load(output / "tokens_valid.npy").astype(np.int64)
    length, nats, scored = 48, 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        bounds = [0, *(np.flatnonzero(window[:-1] == 0)[1:] if window[0] == 0 else np.flatnonzero(window[:-1] == 0))]
        for first, stop in zip(bounds, [*bounds[1:], len(window) - 1], strict=True):
            inputs, targets = torch.from_numpy(window[first:stop]), torch.from_numpy(window[first + 1 : stop + 1])
            with torch.no_grad():
                losses = F.cross_entropy(trainer.model(inputs[None]).logits[0], targets, reduction="none")
            nats += losses[targets != 0].sum().item()
            scored += int((targets != 0).sum())
    assert scored == len(tokens) - 2, "every token but the two that begin a document"
    assert content["validation"]["eval_loss"] == pytest.approx(nats / scored, rel=1e-4)
    size = content["data"]["valid"]["bytes"]
    assert content["validation"]["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- resuming


def assert_same_result(output: Path, reference: Path) -> None:
    assert read_log(output, "loss") == read_log(reference, "loss")
    assert read_log(output, "eval_loss") == read_log(reference, "eval_loss")
    one, other = (AutoModelForCausalLM.from_pretrained(f / "final").state_dict() for f in (output, reference))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resuming_after_the_time_is_up_changes_nothing(whole_run, data, tokenizer, tmp_path):
    stopped = run(data, tokenizer, tmp_path, max_minutes=0.0, dataloader_workers=1)
    assert stopped["status"] == "stopped at step 1 of 6"
    assert stopped["validation"] is None
    assert not (tmp_path / "final").exists()
    content = run(data, tokenizer, tmp_path, resume=True, max_minutes=60.0)
    assert content["status"] == "complete"
    assert [(r["from_step"], r["to_step"]) for r in content["runs"]] == [(0, 1), (1, 6)]
    assert_same_result(tmp_path, whole_run[0])


def test_resuming_skips_a_checkpoint_cut_short(whole_run, data, tokenizer, tmp_path):
    run(data, tokenizer, tmp_path)
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, "epo')
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    assert train_novels.last_checkpoint(tmp_path).name == "checkpoint-3"
    content = run(data, tokenizer, tmp_path, resume=True)
    assert content["status"] == "complete"
    assert_same_result(tmp_path, whole_run[0])


def test_a_used_folder_is_not_touched_without_resume(whole_run, data, tokenizer):
    with pytest.raises(novels.UsageError, match="give --resume"):
        run(data, tokenizer, whole_run[0])
    with pytest.raises(novels.UsageError, match=r"learning_rate was 0.01, is now 0.02"):
        run(data, tokenizer, whole_run[0], make_recipe(learning_rate=0.02), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"warmup_steps": 7}, "warmup_steps is 7"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"head_norm_eps": 0.0}, "head_norm_eps is 0.0"),
        ({"batch_size": 3}, "batch_size is 3"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(data, tokenizer, tmp_path, changes, message):
    with pytest.raises(novels.UsageError, match=message):
        run(data, tokenizer, tmp_path, make_recipe(**changes), accumulate=2)
    assert not list(tmp_path.iterdir())


def test_training_stops_at_a_loss_that_is_not_finite(data, tokenizer, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        run(data, tokenizer, tmp_path, make_recipe(learning_rate=math.inf, warmup_steps=0), eval_every=100)
    assert train_novels.last_checkpoint(tmp_path) is None


# ---------------------------------------------------------------------------------------------------- evaluation


def one_forward(model, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits, ids[1:], reduction="none").numpy()


@pytest.mark.parametrize(("chunk", "tokens_at_once"), [(7, 1), (7, 21), (64, 1000), (1000, 1000)])
def test_chunks_equal_one_forward(chunk, tokens_at_once):
    rng = np.random.default_rng(3)
    sequences = [np.concatenate([[0], rng.integers(1, 300, size=n)]) for n in (40, 1, 100, 99, 14)]
    model = make_model(layers=2)
    losses = evaluate_novels.token_losses(model, sequences, chunk=chunk, tokens_at_once=tokens_at_once)
    for values, sequence in zip(losses, sequences, strict=True):
        np.testing.assert_allclose(values, one_forward(model, sequence), atol=2e-4)


def test_bits_per_byte_counts_every_token_and_byte(tokenizer, data):
    texts = {"one": make_text(9, 40), "two": "naïve 漢字\n"}
    model = make_model()
    result = evaluate_novels.bits_per_byte(model, tokenizer, texts, None, chunk=16)
    losses = {name: one_forward(model, novels.encode_documents(tokenizer, [text])) for name, text in texts.items()}
    size = {name: len(text.encode()) for name, text in texts.items()}
    total = sum(values.sum() for values in losses.values())
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(size.values()), rel=1e-4)
    assert result["tokens"] == sum(len(values) for values in losses.values())
    assert result["documents"]["two"]["bytes"] == size["two"]
    limited = evaluate_novels.bits_per_byte(model, tokenizer, texts, 5, chunk=16)
    assert limited["tokens"] == 10
    assert limited["documents"]["one"]["bits_per_byte"] == pytest.approx(
        losses["one"][:5].sum()
        / math.log(2)
        / len(tokenizer.decode(novels.encode_documents(tokenizer, [texts["one"]])[1:6])),
        rel=1e-4,
    )


def test_context_perplexity_scores_the_same_tokens_at_every_length(tokenizer):
    model, text = make_model(), make_text(11, 100)
    tokens = novels.encode_documents(tokenizer, [text])[1:]
    usable = len(tokens) // 64 * 64
    result = evaluate_novels.context_perplexity(model, tokenizer, text, [16, 64], None, chunk=10)
    assert result["tokens"] == usable
    losses = {}
    for length in (16, 64):
        windows = [np.concatenate([[0], w]) for w in tokens[:usable].reshape(-1, length)]
        losses[length] = np.concatenate([one_forward(model, w) for w in windows])
        assert result["perplexity"][length] == pytest.approx(math.exp(losses[length].mean()), rel=1e-4)
    curve = result["positions"]
    assert [(band["from"], band["to"]) for band in curve] == [(0, 16), (16, 32), (32, 64)]
    assert curve[0]["perplexity"] == pytest.approx(curve[0]["perplexity_with_short_context"], rel=1e-5)
    for key, length in (("perplexity", 64), ("perplexity_with_short_context", 16)):
        expected = math.exp(losses[length].reshape(-1, 64)[:, 32:].mean())
        assert curve[2][key] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("lengths", "message"), [([16, 60], "context length 16"), ([1 << 20], "fewer than")])
def test_context_lengths_that_do_not_fit_are_refused(tokenizer, lengths, message):
    with pytest.raises(novels.UsageError, match=message):
        evaluate_novels.context_perplexity(make_model(), tokenizer, make_text(11, 100), lengths, None)


# ---------------------------------------------------------------------------------------------------- command lines


def invoke(program, *arguments) -> str:
    app = typer.Typer()
    app.command()(program.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_command_lines_from_text_to_figures(data, tmp_path):
    output = tmp_path / "model"
    sizes = ["--hidden-size", 16, "--layers", 1, "--heads", 2, "--head-dim", 8, "--intermediate-size", 32]
    common = ["--cpu", "--data-dir", data, "--output-dir", output, "--vocab-size", 300, *sizes]
    common += ["--head-norm-eps", 1e-3]
    printed = invoke(train_novels, *common, "--sequence-length", 48, "--batch-size", 2, "--epochs", 0.1)
    assert "bits per byte" in printed
    recipe = json.loads((output / "recipe.json").read_text())
    train_tokens = len(np.load(output / "tokens_train.npy"))
    assert recipe["steps"] == math.ceil(0.1 * train_tokens / 96)
    assert recipe["vocab_size"] == len(AutoTokenizer.from_pretrained(output / "tokenizer")) == 300
    trained = AutoModelForCausalLM.from_pretrained(output / "final")
    assert trained.config.head_norm_eps == recipe["head_norm_eps"] == 1e-3
    assert {layer.mixer.o_norm.eps for layer in trained.model.layers} == {1e-3}
    assert {layer.mixer_norm.eps for layer in trained.model.layers} == {1e-6}

    result_file = tmp_path / "result.json"
    arguments = ["--data-dir", data, "--book", "tiny", "--lengths", "16,64", "--chunk", 32, "--device", "cpu"]
    printed = invoke(evaluate_novels, output / "final", *arguments, "--output", result_file)
    result = json.loads(result_file.read_text())
    assert set(result["book"]["perplexity"]) == {"16", "64"}
    assert f"{result['novels_valid']['bits_per_byte']:.4f} bits per byte" in printed
    assert (
        result["novels_valid"]["bytes"]
        == json.loads((output / "training_log.json").read_text())["data"]["valid"]["bytes"]
    )
    assert result_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (train_novels, ["--preset", "huge"], "--preset is 'huge'"),
        (train_novels, ["--steps", 3, "--epochs", 1], "give one of them"),
        (train_novels, ["--data-dir", "nowhere"], "--data-dir is nowhere"),
        (train_novels, ["--tokenizer", "nowhere"], "--tokenizer is nowhere"),
        (evaluate_novels, ["nowhere"], "nowhere has no config.json"),
        (evaluate_novels, ["nowhere", "--lengths", "many"], "--lengths is 'many'"),
        (evaluate_novels, ["nowhere", "--book", "unwritten"], "unwritten.txt"),
    ],
)
def test_mistakes_get_one_sentence(data, tmp_path, monkeypatch, program, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MESANET_DATA", str(data))
    if program is evaluate_novels and "--book" not in arguments:
        arguments = [*arguments, "--book", "tiny"]
    with pytest.raises(novels.UsageError, match=message.replace(".", r"\.")):
        invoke(program, *arguments)


@pytest.fixture
def chosen(data, tmp_path, monkeypatch):
    """Calls the command line up to the training; gives the recipe and the other settings that it would train with."""
    monkeypatch.setattr(train_novels, "train", lambda recipe, *_, **settings: calls.append((recipe, settings)))
    calls = []

    def call(*arguments) -> tuple[dict, dict]:
        common = ["--data-dir", data, "--output-dir", tmp_path, "--tokenizer", modeling_mesanet.bundled_checkpoint()]
        invoke(train_novels, *common, *arguments)
        recipe, settings = calls.pop()
        return train_novels.dataclasses.asdict(recipe), settings

    return call


def test_the_preset_is_the_recipe_of_the_bundled_checkpoint(chosen):
    records = Path(__file__).parents[1] / "model_cards" / "novels"
    recipe, settings = chosen("--preset", "checkpoint")
    assert recipe == json.loads((records / "training_log.json").read_text(encoding="utf-8"))["recipe"]
    lines = map(json.loads, (records / "log.jsonl").read_text(encoding="utf-8").splitlines())
    validated = {line["step"] for line in lines if "eval_loss" in line}
    assert validated == set(range(settings["eval_every"], recipe["steps"] + 1, settings["eval_every"]))


def test_options_go_before_the_preset_and_it_before_the_defaults(chosen):
    recipe, settings = chosen(
        "--preset", "checkpoint", "--weight-decay", 0, "--steps", 40, "--seed", 3, "--eval-every", 7
    )
    assert (recipe["weight_decay"], recipe["head_norm_eps"]) == (0, 1e-3)
    assert (recipe["steps"], recipe["warmup_steps"], recipe["seed"], settings["eval_every"]) == (40, 2, 3, 7)
    assert settings["eval_tokens"] == train_novels.PRESETS["checkpoint"]["eval_tokens"]
    recipe, _ = chosen("--warmup-steps", 9)
    assert (recipe["weight_decay"], recipe["head_norm_eps"], recipe["warmup_steps"]) == (0.1, None, 9)


def test_the_bundled_checkpoint_was_made_by_the_recorded_recipe():
    log = Path(__file__).parents[1] / "model_cards" / "novels" / "training_log.json"
    recipe = train_novels.Recipe(**json.loads(log.read_text(encoding="utf-8"))["recipe"])
    expected = train_novels.build_model(recipe, special_token=0).config.to_diff_dict()
    actual = modeling_mesanet.load_checkpoint().config.to_diff_dict()
    for name in ("dtype", "architectures", "transformers_version"):  # what saving adds
        expected.pop(name, None), actual.pop(name, None)
    assert actual == expected


def test_figures_of_weight_decay_in_the_readme_are_recorded():
    records = Path(__file__).parents[1] / "model_cards" / "novels"
    logs = [
        json.loads((records / name).read_text(encoding="utf-8"))
        for name in ("training_log_weight_decay_0.1.json", "training_log.json")
    ]
    assert {name for name, value in logs[0]["recipe"].items() if logs[1]["recipe"][name] != value} == {"weight_decay"}
    assert [log["recipe"]["weight_decay"] for log in logs] == [0.1, 0.5]
    decayed, bundled = (f"{log['validation']['eval_bits_per_byte']:.4f}" for log in logs)
    text = " ".join((EXAMPLES / "README.md").read_text(encoding="utf-8").split())
    assert f"it ends at {decayed} bits per byte of the validation novels, the bundled one at {bundled}." in text
