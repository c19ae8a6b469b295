# SPDX-License-Identifier: Apache-2.0
"""MesaNetConfig: published defaults, messages for bad values, and the round trip through a file."""

import json
import math
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM

# Every field with a value that is not its default.
OTHER_VALUES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 12,
    "value_head_dim": 20,
    "intermediate_size": 80,
    "hidden_act": "gelu",
    "conv_kernel_size": 3,
    "conv_on_value": True,
    "forget_gate_bound": None,
    "lambda_lower_bound": 0.5,
    "lambda_init": 2,
    "cg_max_steps_training": 12,
    "cg_tolerance_training": 1e-3,
    "cg_max_steps": 20,
    "cg_tolerance": None,
    "chunk_size": 16,
    "kernel_backend": "torch",
    "use_output_gate": True,
    "embedding_scale": 3.5,
    "logit_soft_cap": None,
    "rms_norm_eps": 1e-5,
    "head_norm_eps": 1e-3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "use_cache": False,
    "layer_types": ["linear_attention"] * 3,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}


def message_of(kwargs: dict) -> str:
    with pytest.raises(StrictDataclassError) as caught:
        MesaNetConfig(**kwargs)
    return str(caught.value)


def test_defaults_are_the_published_140m_model():
    config = MesaNetConfig()
    expected = {
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "head_dim": 128,
        "value_head_dim": 128,
        "intermediate_size": 2304,
        "hidden_act": "silu",
        "conv_kernel_size": 4,
        "conv_on_value": False,
        "forget_gate_bound": 0.9975,
        "lambda_lower_bound": 0.25,
        "lambda_init": 1.0,
        "cg_max_steps_training": 30,
        "cg_tolerance_training": None,
        "cg_max_steps": 64,
        "cg_tolerance": 1e-4,
        "use_output_gate": False,
        "logit_soft_cap": 30.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "layer_types": ["linear_attention"] * 14,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.effective_embedding_scale == math.sqrt(768)
    assert config.to_dict() == MesaNetConfig.preset("140M").to_dict()


@pytest.mark.parametrize(("name", "millions"), [("140M", 146), ("440M", 433), ("1B", 936)])
def test_preset_has_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = MesaNetForCausalLM(MesaNetConfig.preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_preset_takes_overrides_and_refuses_other_names():
    config = MesaNetConfig.preset("440M", vocab_size=8000, num_hidden_layers=2)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (1024, 8000, 2)
    assert config.layer_types == ["linear_attention"] * 2
    with pytest.raises(ValueError, match=r"preset is '2B'; choose one of 140M, 440M, 1B"):
        MesaNetConfig.preset("2B")


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        *((name, value, "at least 1") for name in ("head_dim", "value_head_dim", "vocab_size") for value in (0, -3)),
        ("hidden_size", 0, "at least 1"),
        ("num_hidden_layers", 0, "at least 1"),
        ("num_attention_heads", 0, "at least 1"),
        ("intermediate_size", -1, "at least 1"),
        ("chunk_size", 0, "at least 1"),
        ("max_position_embeddings", 0, "at least 1"),
        ("conv_kernel_size", 1, "at least 2"),
        ("conv_kernel_size", 0, "at least 2"),
        ("forget_gate_bound", 0, "in (0, 1], or None"),
        ("forget_gate_bound", 1.5, "in (0, 1], or None"),
        ("forget_gate_bound", math.nan, "in (0, 1], or None"),
        ("lambda_lower_bound", 0.0, "greater than 0"),
        ("lambda_lower_bound", -1, "greater than 0"),
        ("lambda_init", 0.25, "greater than lambda_lower_bound (0.25)"),
        ("lambda_init", 0.1, "greater than lambda_lower_bound (0.25)"),
        ("lambda_init", math.inf, "finite and greater than lambda_lower_bound"),
        ("lambda_init", math.nan, "finite and greater than lambda_lower_bound"),
        ("cg_max_steps", -1, "at least 0"),
        ("cg_max_steps_training", -5, "at least 0"),
        ("cg_tolerance", 1.0, "between 0 and 1, or None"),
        ("cg_tolerance", 0.0, "between 0 and 1, or None"),
        ("cg_tolerance", math.nan, "between 0 and 1, or None"),
        ("cg_tolerance_training", -1e-4, "between 0 and 1, or None"),
        ("rms_norm_eps", 0.0, "greater than 0"),
        ("rms_norm_eps", math.inf, "finite"),
        ("head_norm_eps", 0.0, "finite and greater than 0, or None"),
        ("head_norm_eps", -1e-3, "finite and greater than 0, or None"),
        ("head_norm_eps", math.inf, "finite and greater than 0, or None"),
        ("head_norm_eps", math.nan, "finite and greater than 0, or None"),
        ("logit_soft_cap", 0, "greater than 0, or None"),
        ("logit_soft_cap", math.inf, "finite"),
        ("embedding_scale", -1.0, "greater than 0, or None"),
        ("embedding_scale", math.nan, "finite"),
        ("hidden_act", "sillu", "silu"),
        ("kernel_backend", "cuda", "'auto', 'triton' or 'torch'"),
    ],
)
def test_bad_value_is_named_with_its_remedy(field, value, remedy):
    message = message_of({field: value})
    assert f"{field} is {value!r}" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", 32.0, "int"),
        ("num_hidden_layers", "2", "int"),
        ("head_dim", True, "int"),
        ("cg_max_steps", 3.5, "int"),
        ("chunk_size", None, "int"),
        ("conv_on_value", 1, "bool"),
        ("forget_gate_bound", "off", "float"),
        ("cg_tolerance", "1e-4", "float"),
        ("head_norm_eps", "1e-3", "float"),
        ("hidden_act", None, "str"),
        ("kernel_backend", None, "str"),
        ("layer_types", "linear_attention", "list"),
    ],
)
def test_wrong_type_is_named_with_the_right_one(field, value, expected):
    message = message_of({field: value})
    assert field in message
    assert repr(value).strip("'") in message
    assert re.search(rf"expected an? {expected}|expected {expected}|<class '{expected}'>", message)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])  # the second stands in older files
@pytest.mark.parametrize("value", ["float99", "softmax", "int8", torch.int8, 5])
def test_dtype_is_one_of_weights(field, value):
    assert (
        MesaNetConfig(**{field: "bfloat16"}).dtype == MesaNetConfig(**{field: torch.bfloat16}).dtype == torch.bfloat16
    )
    with pytest.raises((ValueError, StrictDataclassError), match=f"dtype.*{value}"):
        MesaNetConfig(**{field: value})


@pytest.mark.parametrize(
    ("layer_types", "fault"),
    [
        (["mesa", "linear_attention"], "layer_types contains ['mesa']; every layer must be 'linear_attention'"),
        (["linear_attention", "full_attention"], "layer_types contains ['full_attention']"),
        (["linear_attention"], "layer_types is ['linear_attention']; it must be a list of num_hidden_layers (2)"),
        ([], "layer_types is []; it must be a list of num_hidden_layers (2)"),
    ],
)
def test_wrong_layer_types(layer_types, fault):
    assert fault in message_of({"num_hidden_layers": 2, "layer_types": layer_types})


def test_assignment_checks_types_and_validate_checks_ranges(tiny_config):
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="head_dim"):
        config.head_dim = "16"
    config.head_dim = 0
    with pytest.raises(StrictDataclassError, match="head_dim is 0"):
        config.validate()


def test_round_trip_keeps_every_field(tmp_path):
    own = set(MesaNetConfig.__annotations__)
    assert own == set(OTHER_VALUES), "OTHER_VALUES must cover every field"
    default = MesaNetConfig()
    assert not [name for name in own - {"layer_types"} if getattr(default, name) == OTHER_VALUES[name]]
    config = MesaNetConfig(**OTHER_VALUES)
    config.save_pretrained(tmp_path)
    for loaded in (MesaNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MesaNetConfig)
        assert {name: getattr(loaded, name) for name in own} == OTHER_VALUES


def test_a_bad_value_in_a_file_is_refused(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "value_head_dim": 0}))
    with pytest.raises(StrictDataclassError, match="value_head_dim is 0; it must be a whole number of at least 1"):
        MesaNetConfig.from_pretrained(tmp_path)


def test_num_heads_is_another_name(tmp_path):
    config = MesaNetConfig(num_heads=3)
    assert (config.num_heads, config.num_attention_heads) == (3, 3)
    config.num_heads = 5
    assert config.num_attention_heads == 5
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_attention_heads"] == 5
    assert "num_heads" not in saved


def test_only_keyword_arguments():
    with pytest.raises(ValueError, match="only keyword arguments"):
        MesaNetConfig(97)


def test_unknown_arguments_are_kept_as_transformers_does(tmp_path):
    config = MesaNetConfig(experiment="a", num_hidden_layers=1)
    assert config.experiment == "a"
    config.save_pretrained(tmp_path)
    assert MesaNetConfig.from_pretrained(tmp_path).experiment == "a"
    assert not hasattr(MesaNetConfig(temperature=0.3), "temperature"), "sampling belongs to the generation config"
    config.temperature = 0.3
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(("conv_on_value", "slots"), [(False, 2), (True, 3)])
def test_transformers_caches_read_their_slots_from_the_config(tiny_config, conv_on_value, slots):
    config = tiny_config(conv_on_value=conv_on_value)
    cache = DynamicCache(config=config)
    assert [type(layer) for layer in cache.layers] == [LinearAttentionLayer] * 2
    assert [layer.number_of_states for layer in cache.layers] == [slots] * 2


def test_embedding_scale_defaults_to_the_root_of_the_width(tiny_config):
    assert tiny_config().effective_embedding_scale == pytest.approx(math.sqrt(32))
    assert tiny_config(embedding_scale=2).effective_embedding_scale == 2.0


def test_the_head_norm_s_epsilon_defaults_to_that_of_all_norms(tiny_config):
    assert tiny_config(rms_norm_eps=1e-5).effective_head_norm_eps == 1e-5
    assert tiny_config(rms_norm_eps=1e-5, head_norm_eps=1e-3).effective_head_norm_eps == 1e-3


def test_every_field_is_documented():
    assert not [name for name in MesaNetConfig.__annotations__ if name not in MesaNetConfig.__doc__]
