# SPDX-License-Identifier: Apache-2.0
"""Initialisation from softmax transformers: what is taken over, where the layer starts, and that it is worth it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM, load_checkpoint
from modeling_mesanet.cli import app
from modeling_mesanet.conversion import initialize_from_transformer
from modeling_mesanet.conversion.transformer_format import CONVOLUTION_TAP

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SOURCES = {
    "llama": (LlamaForCausalLM, LlamaConfig, "llama", {}),
    "biased": (
        LlamaForCausalLM,
        LlamaConfig,
        "llama",
        {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, "mistral", {"sliding_window": 32}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "qwen", {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, "qwen", {}),
}


def make_source(name: str, **overrides) -> PreTrainedModel:
    """A random transformer, every parameter moved away from its initial value."""
    model_class, config_class, _, fields = SOURCES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **fields, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def initialize(tmp_path):
    """`initialize(model, family)` saves it and returns the MesaNet initialised from it, and the report."""

    def run(source: PreTrainedModel, family: str, **options):
        source.save_pretrained(tmp_path / "source")
        report = initialize_from_transformer(tmp_path / "source", tmp_path / "ours", family=family, **options)
        return load_checkpoint(tmp_path / "ours"), report

    return run


class TestWhatIsTakenOver:
    @pytest.mark.parametrize("name", SOURCES)
    def test_tensors(self, initialize, name):
        source = make_source(name)
        model, report = initialize(source, SOURCES[name][2], max_shard_size="100KB")
        theirs, ours = source.state_dict(), model.state_dict()
        same = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        pairs = [(tensor, tensor) for tensor in same]
        for layer in ("model.layers.0.", "model.layers.1."):
            pairs += [(layer + f"mlp.{part}_proj.weight",) * 2 for part in ("gate", "up", "down")]
            pairs += [(layer + "input_layernorm.weight", layer + "mixer_norm.weight")]
            pairs += [(layer + "post_attention_layernorm.weight", layer + "mlp_norm.weight")]
            # Each head of keys and values serves two queries.
            heads = ours[layer + "mixer.v_proj.weight"].unflatten(0, (4, 16))
            expected = theirs[layer + "self_attn.v_proj.weight"].unflatten(0, (2, 16))
            for head in range(4):
                assert torch.equal(heads[head], expected[head // 2])
        for their_name, our_name in pairs:
            assert torch.equal(theirs[their_name], ours[our_name]), our_name
        biases = [tensor for tensor in theirs if tensor.endswith("_proj.bias")]
        assert report.left_out == sorted(biases)
        assert bool(biases) == (name in ("biased", "qwen2"))
        assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
        assert model(torch.arange(50)[None]).logits.isfinite().all()

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_queries_and_keys_point_where_the_source_s_do(self, initialize, name):
        """Before rotation, after the source's norm: up to what the SiLU bends and the source's biases."""
        source = make_source(name)
        model, _ = initialize(source, SOURCES[name][2])
        attention, mixer = source.model.layers[0].self_attn, model.model.layers[0].mixer
        x = torch.randn(1, 9, 64)
        for letter, groups in (("q", 4), ("k", 2)):
            theirs = getattr(attention, f"{letter}_proj")(x).unflatten(-1, (groups, 16))
            theirs = getattr(attention, f"{letter}_norm", torch.nn.Identity())(theirs)
            theirs = theirs.repeat_interleave(4 // groups, dim=2)
            ours, _ = getattr(mixer, f"{letter}_conv")(getattr(mixer, f"{letter}_proj")(x))
            cosine = torch.cosine_similarity(theirs, ours.unflatten(-1, (4, 16)), dim=-1)
            assert cosine.min() > 0.99

    def test_output_scale(self, initialize):
        """A head's columns carry half the RMS that its values have on white inputs."""
        source = make_source("llama")
        with torch.no_grad():
            source.model.layers[0].self_attn.v_proj.weight[:16] *= 3
        model, _ = initialize(source, "llama")
        x = torch.randn(20_000, 64) * source.model.layers[0].input_layernorm.weight
        values = source.model.layers[0].self_attn.v_proj(x).unflatten(-1, (2, 16))
        rms = values.square().mean((0, 2)).sqrt().repeat_interleave(2)
        theirs, ours = source.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mixer.o_proj.weight
        ratio = (ours / theirs).unflatten(1, (4, 16))
        torch.testing.assert_close(ratio.mean((0, 2)), 0.5 * rms, rtol=0.02, atol=0)
        assert ratio.std((0, 2)).max() < 1e-5

    def test_storage(self, initialize, tmp_path):
        """Matrices keep the source's dtype; what must be float32 is."""
        _, report = initialize(make_source("qwen3").to(torch.bfloat16), "qwen")
        tensors = load_file(tmp_path / "ours" / "model.safetensors")
        assert len(tensors) == report.tensors
        for name, tensor in tensors.items():
            kept = name.endswith(("_bias", "lambda_param"))
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
        assert load_checkpoint(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16

    def test_heads_of_the_default_size(self, initialize):
        """Configs may leave the size of heads to the width."""
        model, _ = initialize(make_source("qwen2"), "qwen")
        assert (model.config.head_dim, model.config.value_head_dim) == (16, 16)


class TestWhereItStarts:
    def test_near_gated_linear_attention(self, initialize):
        model, _ = initialize(make_source("llama"), "llama")
        ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
        logits = model(ids).logits
        model.config.cg_max_steps = 0  # the solver left out
        linear = model(ids).logits
        assert (logits - linear).norm() < 0.1 * linear.norm()
        model.config.cg_max_steps = 64
        for layer in model.model.layers:
            layer.mixer.beta_bias.data.fill_(10.0)
            layer.mixer.lambda_param.data.fill_(-10.0)
        far = model(ids).logits
        assert (far - linear).norm() > 3 * (logits - linear).norm()

    def test_gates_and_convolutions(self, initialize):
        model, _ = initialize(make_source("mistral"), "mistral")
        fresh = MesaNetForCausalLM(model.config).model.layers[0].mixer
        mixer = model.model.layers[0].mixer
        x = torch.randn(1, 5, 64)
        beta, log_gamma = mixer.gates(x, None)
        torch.testing.assert_close(beta, torch.full_like(beta, 0.1))
        assert torch.equal(mixer.gamma_bias, fresh.gamma_bias)
        assert log_gamma.exp().min() > 0.89
        torch.testing.assert_close(mixer.regularizer(), torch.full((4, 16), 4.0))
        y, _ = mixer.q_conv(x)
        torch.testing.assert_close(y, torch.nn.functional.silu(CONVOLUTION_TAP * x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "patterns"),
        [
            ({"mlp_bias": True}, ["mlp_bias"]),
            ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
            ({"model_type": "mixtral"}, ["'mixtral'"]),
            ({"model_type": "mistral"}, ["'mistral'", "--from mistral"]),
            ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
            ({"hidden_act": "none"}, ["hidden_act"]),
            ({"intermediate_size": 96}, ["shape"]),
            ({"hidden_size": "wide"}, ["hidden_size"]),
        ],
    )
    def test_configs(self, tmp_path, refuse, fields, patterns):
        make_source("llama").save_pretrained(tmp_path / "source")
        config = json.loads((tmp_path / "source" / "config.json").read_text())
        (tmp_path / "source" / "config.json").write_text(json.dumps({**config, **fields}))
        with refuse("source is", *patterns):
            initialize_from_transformer(tmp_path / "source", tmp_path / "ours", family="llama")

    def test_families(self, tmp_path, refuse):
        make_source("llama").save_pretrained(tmp_path / "source")
        with refuse("family is 'gpt2'", "llama, mistral, qwen"):
            initialize_from_transformer(tmp_path / "source", tmp_path / "ours", family="gpt2")

    def test_tables_of_old_checkpoints_are_passed_over(self, tmp_path):
        model = make_source("llama")
        model.save_pretrained(
            tmp_path / "source",
            state_dict={**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        )
        names = load_file(tmp_path / "source" / "model.safetensors").keys()
        assert "model.layers.0.self_attn.rotary_emb.inv_freq" in names
        assert initialize_from_transformer(tmp_path / "source", tmp_path / "ours", family="llama").left_out == []


def test_command(tmp_path):
    make_source("qwen2").save_pretrained(tmp_path / "source")
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "ours"), "--from", "qwen"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "self_attn.k_proj.bias" in result.stdout
    assert "Logits were not compared" in result.stdout


def training_text() -> torch.Tensor:
    """The corpus where there is one, else this repository's own words, as bytes."""
    corpus = Path(os.environ.get("MESANET_DATA", "")) / "corpus" / "tinyshakespeare.txt"
    files = [corpus] if corpus.is_file() else [ROOT / name for name in ("LICENSE", "README.md", "kernels/README.md")]
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def batches(text: torch.Tensor, seed: int, size: int = 8, length: int = 64):
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (size,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts])


def train(model: PreTrainedModel, text: torch.Tensor, steps: int, peak: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10))
    model.train()
    for _, ids in zip(range(steps), batches(text, seed=1), strict=False):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, text: torch.Tensor) -> float:
    losses = [
        model(input_ids=ids, labels=ids, use_cache=False).loss
        for _, ids in zip(range(4), batches(text, seed=2, size=16), strict=False)
    ]
    return torch.stack(losses).mean().item()


def test_short_training_beats_training_from_scratch(initialize):
    """30 steps after 200 of a Llama: a byte's loss is far below that of 30 steps from random weights."""
    text = training_text()
    training, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**SIZES))
    train(source, training, 200, 5e-3)
    initialized, _ = initialize(source, "llama")
    losses = {"source": mean_loss(source, validation), "initialised": mean_loss(initialized, validation)}
    train(initialized, training, 30, 3e-3)
    losses["trained"] = mean_loss(initialized, validation)
    own = {"num_hidden_layers", "head_dim", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"}
    published = MesaNetConfig(**{name: getattr(initialized.config, name) for name in own}, value_head_dim=16)
    for name, config in (("scratch", initialized.config), ("scratch, published scales", published)):
        torch.manual_seed(0)
        scratch = MesaNetForCausalLM(config)
        train(scratch, training, 30, 3e-3)
        losses[name] = mean_loss(scratch, validation)
    assert losses["trained"] < min(losses["scratch"], losses["scratch, published scales"]) - 0.3, losses
    # Not poorer than a model that knows nothing, before any training.
    assert losses["initialised"] < torch.tensor(256.0).log(), losses
