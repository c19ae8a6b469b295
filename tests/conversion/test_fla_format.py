# SPDX-License-Identifier: Apache-2.0
"""fla's format: names, shapes, config fields and meaning, against its definition in plain torch and against fla."""

import math

import pytest
import torch
import torch.nn.functional as F
from fla_checkpoints import FIELDS, fla_tensors, fla_without_triton

from modeling_mesanet import MesaNetConfig, MesaNetForCausalLM
from modeling_mesanet.conversion import (
    ConversionError,
    config_from_fla,
    config_to_fla,
    state_dict_from_fla,
    state_dict_to_fla,
)
from modeling_mesanet.conversion.compare_logits import exact_reference

VARIANTS = {
    "plain": {},
    "output gate, tied": {"use_output_gate": True, "tie_word_embeddings": True},
    "another bound and width": {"lambda_lower_bound": 0.5, "conv_size": 3, "norm_eps": 1e-3},
}
CONVERTIBLE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "head_dim": 16,
    "value_head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "intermediate_size": 48,
    "forget_gate_bound": None,
    "embedding_scale": 1.0,
    "logit_soft_cap": None,
    "cg_tolerance": None,
    "cg_max_steps": 30,
}


def fla_logits(tensors: dict, fields: dict, ids: torch.Tensor) -> torch.Tensor:
    """fla's model as its layer is defined, one token after the other, solved exactly, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    heads, head_dim, eps = fields["num_heads"], fields["head_dim"], fields.get("norm_eps", 1e-6)

    def norm(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)

    def convolve(x, weight):
        padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
        x = F.silu(F.conv1d(padded, weight, groups=weight.shape[0])).transpose(1, 2).unflatten(-1, (heads, -1))
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    x = tensors["model.embeddings.weight"][ids]
    for index in range(fields["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{index}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{index}.")
        }
        h = norm(x, layer["attn_norm.weight"])
        q = convolve(h @ layer["attn.q_proj.weight"].T, layer["attn.q_conv1d.weight"])
        k = convolve(h @ layer["attn.k_proj.weight"].T, layer["attn.k_conv1d.weight"])
        v = (h @ layer["attn.v_proj.weight"].T).unflatten(-1, (heads, -1))
        forget = torch.sigmoid(h @ layer["attn.a_proj.weight"].T + layer["attn.a_proj.bias"])
        write = torch.sigmoid(h @ layer["attn.b_proj.weight"].T + layer["attn.b_proj.bias"])
        lam = fields.get("lambda_lower_bound", 0.25) + F.softplus(layer["attn.lambda_params"])
        lam = torch.diag_embed(lam.reshape(heads, head_dim))
        keys = values = torch.zeros(ids.shape[0], heads, head_dim, head_dim, dtype=torch.float64)
        outputs = []
        for t in range(ids.shape[1]):
            strong, old = write[:, t, :, None, None], forget[:, t, :, None, None]
            keys = old * keys + strong * k[:, t, :, :, None] * k[:, t, :, None, :]
            values = old * values + strong * k[:, t, :, :, None] * v[:, t, :, None, :]
            solved = torch.linalg.solve(keys + lam, q[:, t, :, :, None])
            outputs.append((values.mT @ solved).squeeze(-1))
        o = norm(torch.stack(outputs, 1), layer["attn.o_norm.weight"])
        if fields.get("use_output_gate"):
            o = o * F.silu(h @ layer["attn.g_proj.weight"].T).unflatten(-1, (heads, -1))
        x = x + o.flatten(2) @ layer["attn.o_proj.weight"].T
        h = norm(x, layer["mlp_norm.weight"])
        gate = F.silu(h @ layer["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    head = tensors.get("lm_head.weight", tensors["model.embeddings.weight"])
    return norm(x, tensors["model.norm.weight"]) @ head.T


def load(fields: dict, tensors: dict, dtype: torch.dtype = torch.float64) -> MesaNetForCausalLM:
    config = config_from_fla(fields)
    model = MesaNetForCausalLM(config)
    missing, unexpected = model.load_state_dict(state_dict_from_fla(tensors, config), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model.to(dtype).eval()


class TestMeaning:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_computes_what_fla_defines(self, variant):
        fields = {**FIELDS, **VARIANTS[variant]}
        tensors = fla_tensors(fields)
        ids = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(1))
        expected = fla_logits(tensors, fields, ids)
        logits = load(fields, tensors)(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)

    def test_computes_what_fla_computes(self):
        """Its own layers and its own exact reference; only its Triton kernels, which need a GPU, are stood in for."""
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
        from fla.models.mesa_net import MesaNetConfig as FlaConfig
        from fla.models.mesa_net import MesaNetForCausalLM as FlaModel

        ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
        for variant in VARIANTS.values():
            fields = {**FIELDS, **variant}
            tensors = fla_tensors(fields)
            peer = FlaModel(FlaConfig(**fields)).eval()
            missing, unexpected = peer.load_state_dict(tensors, strict=False)
            assert unexpected == []
            assert missing == (["lm_head.weight"] if fields.get("tie_word_embeddings") else [])
            back = FlaConfig(**config_to_fla(config_from_fla(fields))).to_dict()
            del back["hidden_ratio"]  # the width is given instead
            assert back.items() <= {**peer.config.to_dict(), "architectures": ["MesaNetForCausalLM"]}.items()
            with torch.no_grad(), exact_reference(), fla_without_triton():
                expected = peer(ids, use_cache=False).logits
                logits = load(fields, tensors, torch.float32)(ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def test_solver_settings_are_fla_s(self):
        config = config_from_fla({**FIELDS, "max_cg_step_training": 7, "max_cg_step_decoding": 7})
        assert (config.cg_max_steps, config.cg_tolerance) == (7, None)
        assert (config.cg_max_steps_training, config.cg_tolerance_training) == (7, None)


class TestConfig:
    def test_silent_fields_take_fla_s_defaults(self):
        config = config_from_fla({"model_type": "mesa_net"})
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (32000, 2048, 24)
        assert (config.num_attention_heads, config.head_dim, config.value_head_dim) == (16, 128, 128)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
        assert not config.tie_word_embeddings
        assert (config.rms_norm_eps, config.head_norm_eps) == (1e-6, None)

    @pytest.mark.parametrize(
        ("fields", "width"),
        [
            ({"hidden_size": 2048}, 5632),
            ({"hidden_size": 768, "hidden_ratio": None}, 2048),
            ({"hidden_size": 768, "hidden_ratio": 4.5}, 2304),
            ({"hidden_size": 96, "hidden_ratio": 1}, 256),
            ({"hidden_size": 96, "hidden_ratio": 1, "intermediate_size": 40}, 40),
        ],
    )
    def test_width_of_the_mlp(self, fields, width):
        assert config_from_fla(fields).intermediate_size == width

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("attn", {"layers": [1], "num_heads": 2}),
            ("attnres_block_size", 4),
            ("hidden_act", "powlu"),
            ("use_short_conv", False),
            ("conv_bias", True),
            ("use_l2warp", True),
            ("expand_v", 2),
            ("quantization_config", {"bits": 4}),
            ("max_cg_step_decoding", 10),
            ("max_cg_step_training", 0),
            ("lambda_lower_bound", 0.0),
            ("lambda_lower_bound", 1.5),
            ("head_dim", "large"),
            ("hidden_ratio", "4"),
            ("hidden_ratio", 0),
            ("hidden_ratio", float("inf")),
            ("hidden_size", "32"),
            ("dtype", "float99"),
            ("torch_dtype", 5),
        ],
    )
    def test_fields_without_counterpart_are_refused_by_name(self, field, value):
        fields = {**FIELDS, field: value}
        if field == "hidden_ratio":
            fields["intermediate_size"] = None
        if field == "max_cg_step_training":
            fields["max_cg_step_decoding"] = 0
        with pytest.raises(ConversionError, match=rf"\b{field.removeprefix('torch_')}\b") as refusal:
            config_from_fla(fields)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("forget_gate_bound", 0.9975),
            ("embedding_scale", None),
            ("logit_soft_cap", 30.0),
            ("conv_on_value", True),
            ("hidden_act", "gelu"),
            ("cg_tolerance", 1e-4),
            ("cg_tolerance_training", 1e-4),
            ("cg_max_steps", 64),
            ("value_head_dim", 8),
            ("head_norm_eps", 1e-3),
            ("head_dim", 256),
        ],
    )
    def test_our_fields_without_counterpart_are_refused_by_name(self, field, value):
        fields = {**CONVERTIBLE, field: value}
        if field == "head_dim":
            fields["value_head_dim"] = value
        with pytest.raises(ConversionError, match=rf"\b{field}\b"):
            config_to_fla(MesaNetConfig(**fields))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_round_trip(self, variant):
        fields = {**FIELDS, "dtype": "bfloat16", "pad_token_id": 3, **VARIANTS[variant]}
        config = config_from_fla(fields)
        back = config_to_fla(config)
        for name in fields.keys() - {"fuse_norm", "initializer_range"}:
            assert back[name] == fields[name]
        assert config_from_fla(back).to_dict() == config.to_dict()

    def test_dtype_of_older_configs(self):
        assert config_from_fla({**FIELDS, "torch_dtype": "bfloat16"}).to_dict()["dtype"] == "bfloat16"

    def test_a_bound_of_one_is_no_bound(self):
        assert "forget_gate_bound" not in config_to_fla(MesaNetConfig(**{**CONVERTIBLE, "forget_gate_bound": 1.0}))

    def test_one_epsilon_for_all_norms_is_fla_s(self):
        config = MesaNetConfig(**CONVERTIBLE, rms_norm_eps=1e-5, head_norm_eps=1e-5)
        assert config_to_fla(config)["norm_eps"] == 1e-5
        assert config_from_fla(config_to_fla(config)).effective_head_norm_eps == 1e-5


class TestStateDict:
    def test_round_trip_shares_memory(self):
        tensors = fla_tensors({**FIELDS, "use_output_gate": True})
        ours = state_dict_from_fla(tensors, config_from_fla(FIELDS))
        back = state_dict_to_fla(ours)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].shape == tensor.shape
            assert back[name].data_ptr() == tensor.data_ptr()
        assert ours["model.layers.1.mixer.lambda_param"].shape == (2, 16)

    @pytest.mark.parametrize("name", ["model.layers.0.attn.q_conv1d.bias", "model.layers.0.attn_res_proj.weight", "x"])
    def test_unknown_names_are_refused(self, name):
        with pytest.raises(ConversionError, match=name):
            state_dict_from_fla({name: torch.zeros(1)}, config_from_fla(FIELDS))


def test_initial_regulariser_is_the_same():
    """fla fixes it at 1, so that a converted config that is trained from new weights starts alike."""
    config = config_from_fla(FIELDS)
    parameter = MesaNetForCausalLM(config).model.layers[0].mixer.lambda_param
    assert parameter[0, 0].item() == pytest.approx(math.log(math.exp(0.75) - 1))
