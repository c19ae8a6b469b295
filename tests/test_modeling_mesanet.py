# SPDX-License-Identifier: Apache-2.0
"""The models: their definition written out straight, initialisation, precision, loading, packing, gradients."""

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import random_ids, states
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from modeling_mesanet import (
    MesaNetConfig,
    MesaNetForCausalLM,
    MesaNetForSequenceClassification,
    MesaNetModel,
    MesaNetPreTrainedModel,
    modeling_mesanet,
)
from modeling_mesanet.mesa import mesa_reference
from modeling_mesanet.modeling_mesanet import MesaNetMixer

FP32_PARAMETERS = ("beta_bias", "gamma_bias", "lambda_param")


def is_fp32_parameter(name: str) -> bool:
    return name.endswith(FP32_PARAMETERS)


# --------------------------------------------------------------------------------- the definition, straight line


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def causal_convolution(x, weight):
    """Depthwise over time, then SiLU; `x` `[B, T, C]`, `weight` `[C, 1, W]`, whose last tap is the present token."""
    width, length = weight.shape[-1], x.shape[1]
    y = torch.zeros_like(x)
    for lag in range(min(width, length)):
        y[:, lag:] = y[:, lag:] + weight[:, 0, width - 1 - lag] * x[:, : length - lag]
    return y * torch.sigmoid(y)


def straight_line_logits(config: MesaNetConfig, weights: dict[str, torch.Tensor], input_ids: torch.Tensor):
    """The model as the paper defines it, from its weights, one line an equation, with the oracle for every layer."""
    embedding = weights["model.embed_tokens.weight"]
    scale = math.sqrt(config.hidden_size) if config.embedding_scale is None else config.embedding_scale
    activation = {"silu": F.silu, "relu": F.relu}[config.hidden_act]
    x = embedding[input_ids] * scale
    for index in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        h = rms_norm(x, layer["mixer_norm.weight"], config.rms_norm_eps)
        q, k, v = (h @ layer[f"mixer.{name}_proj.weight"].T for name in "qkv")
        q, k = (causal_convolution(y, layer[f"mixer.{name}_conv.weight"]) for name, y in (("q", q), ("k", k)))
        if config.conv_on_value:
            v = causal_convolution(v, layer["mixer.v_conv.weight"])
        beta = torch.sigmoid(h @ layer["mixer.beta_proj.weight"].T + layer["mixer.beta_bias"])
        gamma = torch.sigmoid(h @ layer["mixer.gamma_proj.weight"].T + layer["mixer.gamma_bias"])
        if config.forget_gate_bound is not None:
            gamma = gamma * (1 - (1 - config.forget_gate_bound) * beta**2)
        lam = config.lambda_lower_bound + torch.log(1 + torch.exp(layer["mixer.lambda_param"]))
        heads = [y.unflatten(-1, (config.num_attention_heads, -1)) for y in (q, k, v)]
        o, _ = mesa_reference(*heads, torch.log(gamma), beta, lam, solve=config.cg_max_steps > 0)
        head_norm_eps = config.rms_norm_eps if config.head_norm_eps is None else config.head_norm_eps
        o = rms_norm(o, layer["mixer.o_norm.weight"], head_norm_eps)
        if config.use_output_gate:
            gate = h @ layer["mixer.output_gate_proj.weight"].T
            o = o * (gate * torch.sigmoid(gate)).unflatten(-1, (config.num_attention_heads, -1))
        x = x + o.flatten(2) @ layer["mixer.o_proj.weight"].T
        h = rms_norm(x, layer["mlp_norm.weight"], config.rms_norm_eps)
        branches = activation(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + branches @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    logits = x @ (embedding if config.tie_word_embeddings else weights["lm_head.weight"]).T
    cap = config.logit_soft_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def leaf_weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


OPTIONS = {
    "defaults": {},
    "no forget bound": {"forget_gate_bound": None},
    "tight forget bound": {"forget_gate_bound": 0.5},
    "convolved values": {"conv_on_value": True},
    "output gate": {"use_output_gate": True},
    "values wider than keys": {"value_head_dim": 24},
    "no soft cap": {"logit_soft_cap": None},
    "low soft cap": {"logit_soft_cap": 0.5},
    "embedding scale": {"embedding_scale": 2},
    "untied": {"tie_word_embeddings": False},
    "narrow convolution": {"conv_kernel_size": 2},
    "other activation": {"hidden_act": "relu"},
    "other regulariser": {"lambda_lower_bound": 0.01, "lambda_init": 0.02},
    "head norm of its own": {"head_norm_eps": 1e-2},
    "no solver": {"cg_max_steps": 0, "cg_max_steps_training": 0},
    "everything": {
        "forget_gate_bound": None,
        "conv_on_value": True,
        "use_output_gate": True,
        "value_head_dim": 24,
        "logit_soft_cap": None,
        "tie_word_embeddings": False,
        "num_attention_heads": 3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients_follow_the_definition(tiny_model, options):
    model = tiny_model(dtype=torch.float64, **{"cg_max_steps_training": 64, **options})
    input_ids = random_ids(2, 19)
    weights = leaf_weights(model)
    expected = straight_line_logits(model.config, weights, input_ids)
    for training in (False, True):
        logits = model.train(training)(input_ids).logits
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        if options.get("cg_max_steps") == 0 and name.endswith("lambda_param"):
            assert wanted is None
            assert not parameter.grad.any()
            continue
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error < 1e-7, f"gradient of {name}: relative error {error:.1e}"


def test_float32_stays_close_to_the_definition(tiny_model):
    model = tiny_model()
    input_ids = random_ids(2, 33)
    expected = straight_line_logits(model.config, {n: p.double() for n, p in model.named_parameters()}, input_ids)
    torch.testing.assert_close(model(input_ids).logits.double(), expected, rtol=1e-3, atol=1e-3)


def test_each_mode_has_its_own_solver_limits(tiny_model):
    model = tiny_model(dtype=torch.float64, cg_max_steps=64, cg_max_steps_training=1)
    input_ids = random_ids(1, 15)
    converged, one_step = model(input_ids).logits, model.train()(input_ids).logits
    assert (converged - one_step).abs().max() > 1e-3
    one_step_model = tiny_model(dtype=torch.float64, cg_max_steps=1)
    torch.testing.assert_close(one_step_model(input_ids).logits, one_step)
    # A tolerance stops one mode early and leaves the other alone.
    for field, loose_in_training in (("cg_tolerance", False), ("cg_tolerance_training", True)):
        model = tiny_model(dtype=torch.float64, cg_max_steps_training=64, **{field: 1e-2})
        for training in (False, True):
            difference = (model.train(training)(input_ids).logits - converged).abs().max()
            assert (1e-6 < difference < 0.5) if training is loose_in_training else difference < 1e-9


def test_a_token_sees_only_its_past(tiny_model):
    model = tiny_model(dtype=torch.float64)
    input_ids = random_ids(1, 20)
    changed = input_ids.clone()
    changed[0, 11] = input_ids[0, 11] % 96 + 1
    difference = (model(input_ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert difference[:11].max() < 1e-10
    assert difference[11:].min() > 1e-6


def test_chunk_size_and_batch_do_not_change_results(tiny_model):
    input_ids = random_ids(3, 21)
    expected = tiny_model(dtype=torch.float64)(input_ids).logits
    for chunk_size in (1, 5, 21, 64):
        logits = tiny_model(dtype=torch.float64, chunk_size=chunk_size)(input_ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    one_by_one = torch.cat([tiny_model(dtype=torch.float64)(row[None]).logits for row in input_ids])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-9, atol=1e-9)


def test_a_backend_chosen_later_is_that_of_every_operator(tiny_model, monkeypatch):
    """So that what is wrong with the kernels can be looked for in a model that is there."""
    model, chosen = tiny_model(use_output_gate=True), {}
    for name in ("short_convolution", "gates", "head_norm", "mesa_attention"):
        operator = getattr(modeling_mesanet, name)

        def noted(*arguments, operator=operator, **options):
            given = inspect.signature(operator).bind(*arguments, **options).arguments
            chosen.setdefault(operator.__name__, set()).add(given["backend"])
            return operator(*arguments, **options)

        monkeypatch.setattr(modeling_mesanet, name, noted)
    for backend in ("auto", "torch"):
        chosen.clear()
        model.config.kernel_backend = backend
        model(random_ids(1, 5)).logits.sum().backward()
        assert len(chosen) == 4
        assert set.union(*chosen.values()) == {backend}


def test_soft_cap_bounds_the_logits(tiny_model):
    model = tiny_model(tie_word_embeddings=False, logit_soft_cap=5.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    logits = model(random_ids(1, 5)).logits
    assert 4.9 < logits.abs().max() <= 5.0


# ------------------------------------------------------------------------------------------------ initialisation


@pytest.fixture(scope="module")
def fresh_model() -> MesaNetForCausalLM:
    """Large enough that no two fan-ins agree and every spread is measured on thousands of numbers."""
    torch.manual_seed(0)
    config = MesaNetConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=5,
        head_dim=16,
        value_head_dim=20,
        intermediate_size=160,
        conv_on_value=True,
        use_output_gate=True,
        tie_word_embeddings=False,
    )
    return MesaNetForCausalLM(config)


RESIDUAL = math.sqrt(2 / 8)
INITIAL_SPREAD = {
    "mixer.q_proj": 64**-0.5,
    "mixer.k_proj": 64**-0.5,
    "mixer.v_proj": 64**-0.5,
    "mixer.output_gate_proj": 64**-0.5,
    "mixer.beta_proj": 64**-0.5,
    "mixer.gamma_proj": 64**-0.5,
    "mixer.o_proj": 100**-0.5 * RESIDUAL,
    "mixer.q_conv": 4**-0.5,
    "mixer.k_conv": 4**-0.5,
    "mixer.v_conv": 4**-0.5,
    "mlp.gate_proj": 64**-0.5,
    "mlp.up_proj": 64**-0.5,
    "mlp.down_proj": 160**-0.5 * RESIDUAL,
    "embed_tokens": 64**-0.5,
    "lm_head": 64**-0.5,
}


def weights_of(model, module: str) -> torch.Tensor:
    return torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith(f"{module}.weight")])


def assert_normal(sample: torch.Tensor, spread: float) -> None:
    """Five standard errors around mean 0 and the given standard deviation, and the tails of a normal distribution."""
    n = sample.numel()
    assert abs(sample.mean()) < 5 * spread / math.sqrt(n)
    assert abs(sample.std() / spread - 1) < 5 / math.sqrt(2 * n)
    assert (sample.abs() > 2 * spread).float().mean() == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n))


@pytest.mark.parametrize("module", INITIAL_SPREAD)
def test_matrices_start_normal_with_fan_in(fresh_model, module):
    assert_normal(weights_of(fresh_model, module), INITIAL_SPREAD[module])


def test_every_parameter_of_the_model_has_a_tested_initialisation(fresh_model):
    covered = (*(f"{module}.weight" for module in INITIAL_SPREAD), "norm.weight", *FP32_PARAMETERS)
    assert not [name for name, _ in fresh_model.named_parameters() if not name.endswith(covered)]
    assert not list(fresh_model.buffers()), "a buffer outside the checkpoint would be garbage after from_pretrained"


def test_gates_norms_and_regulariser_start_as_documented(fresh_model):
    assert (weights_of(fresh_model, "norm") == 1).all()
    for layer in fresh_model.model.layers:
        mixer = layer.mixer
        assert not mixer.beta_bias.any()
        forgetting = 1 - torch.sigmoid(mixer.gamma_bias.double())
        torch.testing.assert_close(forgetting, torch.logspace(-1, -3, 5, dtype=torch.float64), rtol=1e-4, atol=0)
        torch.testing.assert_close(mixer.regularizer(), torch.ones(5, 16))


@pytest.mark.parametrize("value", [0.2501, 0.5, 1, 1000.0])
def test_lambda_starts_at_lambda_init(tiny_config, value):
    model = MesaNetModel(tiny_config(lambda_init=value))
    regularizer = model.layers[1].mixer.regularizer()
    torch.testing.assert_close(regularizer, torch.full((2, 16), float(value)), rtol=1e-5, atol=0)


def test_same_seed_same_weights_through_every_constructor(tiny_config):
    config = tiny_config()
    states = []
    for construct in (MesaNetForCausalLM, MesaNetForCausalLM._from_config, AutoModelForCausalLM.from_config):
        torch.manual_seed(3)
        states.append(construct(config).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name])


def test_initialisation_after_the_meta_device(tiny_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(hidden_size=64))
    model.to_empty(device="cpu")
    assert not any(parameter.isfinite().any() for parameter in model.parameters()), "the poison is missing"
    model.init_weights()
    assert_normal(weights_of(model, "mlp.gate_proj"), 64**-0.5)
    assert_normal(weights_of(model, "q_conv"), 4**-0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    forgetting = 1 - torch.sigmoid(model.model.layers[1].mixer.gamma_bias)
    torch.testing.assert_close(forgetting, torch.tensor([1e-1, 1e-3]), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.model.layers[1].mixer.regularizer(), torch.ones(2, 16))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------- saving and loading


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_registration_serves_every_auto_class(tiny_model, tmp_path):
    model = tiny_model(pad_token_id=0)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MesaNetConfig
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [type(m) for m in (causal, base, classifier)] == [
        MesaNetForCausalLM,
        MesaNetModel,
        MesaNetForSequenceClassification,
    ]
    input_ids = random_ids(2, 9)
    assert torch.equal(causal(input_ids).logits, model(input_ids).logits)
    hidden = model.model(input_ids).last_hidden_state
    assert torch.equal(base(input_ids).last_hidden_state, hidden)
    assert torch.equal(classifier.model(input_ids).last_hidden_state, hidden)
    assert classifier.score.weight.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_is_not_saved_and_comes_back(tiny_model, tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert ("lm_head.weight" in saved(model, tmp_path)) is not tied
    loaded, report = MesaNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_missing_keys_are_initialised_and_present_ones_kept(tiny_model, tmp_path):
    model = tiny_model(hidden_size=64, conv_on_value=True)
    state = saved(model, tmp_path)
    mixer = "model.layers.0.mixer"
    # Each module that loses a parameter keeps another, which initialisation must not touch.
    dropped = {
        f"{mixer}.gamma_bias",
        f"{mixer}.q_conv.weight",
        f"{mixer}.q_proj.weight",
        "model.layers.1.mixer.lambda_param",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mixer_norm.weight",
    }
    save_file({name: t for name, t in state.items() if name not in dropped}, tmp_path / "model.safetensors")
    loaded, report = MesaNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == dropped
    parameters = dict(loaded.named_parameters())
    for name, tensor in state.items():
        if name not in dropped:
            assert torch.equal(parameters[name], tensor), f"{name} was overwritten"
    forgetting = 1 - torch.sigmoid(parameters[f"{mixer}.gamma_bias"])
    torch.testing.assert_close(forgetting, torch.tensor([1e-1, 1e-3]), rtol=1e-4, atol=0)
    torch.testing.assert_close(loaded.model.layers[1].mixer.regularizer(), torch.ones(2, 16))
    assert (parameters["model.layers.1.mixer_norm.weight"] == 1).all()
    assert_normal(parameters[f"{mixer}.q_proj.weight"].flatten(), 64**-0.5)
    assert_normal(parameters[f"{mixer}.q_conv.weight"].flatten(), 4**-0.5)
    assert_normal(parameters["model.layers.0.mlp.down_proj.weight"].flatten(), 64**-0.5)  # 2/N is 1 for two layers


def test_a_base_model_becomes_a_language_model(tiny_model, tmp_path):
    base = tiny_model(MesaNetModel)
    base.save_pretrained(tmp_path)
    model, report = MesaNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(model.lm_head.weight, base.embed_tokens.weight)


def test_a_checkpoint_of_other_shapes_is_refused(tiny_model, tiny_config, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MesaNetForCausalLM.from_pretrained(tmp_path, config=tiny_config(head_dim=8))


def test_vocabulary_can_grow(tiny_model, tmp_path):
    model = tiny_model()
    before = model(random_ids(1, 6)).logits
    model.resize_token_embeddings(105)
    assert model.config.vocab_size == 105
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(random_ids(1, 6)).logits
    assert logits.shape == (1, 6, 105)
    torch.testing.assert_close(logits[..., :97], before)
    model.save_pretrained(tmp_path)
    assert MesaNetForCausalLM.from_pretrained(tmp_path)(torch.tensor([[104]])).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 1), (2, 300)])
def test_gate_logits_of_16_bit_factors_are_not_rounded(dtype, shape):
    projection = modeling_mesanet.MesaNetGateProjection(1536, 12, bias=False).to("cuda", dtype)
    x = torch.randn(*shape, 1536, device="cuda", dtype=dtype)
    logits = projection(x)
    assert logits.dtype == torch.float32
    assert logits.shape == (*shape, 12)
    expected = x.double() @ projection.weight.double().mT
    assert (logits - expected).norm() <= 2e-6 * expected.norm()


class TestHead:
    """One token of several sequences goes through the head as columns."""

    @pytest.fixture(autouse=True)
    def on_any_device(self, monkeypatch):
        monkeypatch.setattr(modeling_mesanet, "FUSED_DEVICES", ("cpu",))

    @torch.no_grad()
    @pytest.mark.parametrize("batch", [1, 3])
    def test_same_logits(self, tiny_model, monkeypatch, batch):
        model = tiny_model(dtype=torch.float64, logit_soft_cap=5.0)
        prompt, token = random_ids(batch, 5), random_ids(batch, 1, seed=2)
        logits = []
        for devices in (("cpu",), ()):
            monkeypatch.setattr(modeling_mesanet, "FUSED_DEVICES", devices)
            cache = model(prompt, use_cache=True).past_key_values
            logits.append(model(token, past_key_values=cache).logits)
        assert logits[0].shape == (batch, 1, 97)
        torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)

    @torch.no_grad()
    def test_a_watched_or_replaced_head_is_called(self, tiny_model):
        model, token = tiny_model(), random_ids(3, 1)
        seen = []
        handle = model.lm_head.register_forward_hook(lambda *arguments: seen.append(1))
        model(token)
        assert len(seen) == 1
        handle.remove()
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
        assert model(token).logits.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_and_regulariser_parameters_stay_in_float32(tiny_model, tmp_path, dtype):
    original = dict(tiny_model().named_parameters())
    tiny_model().save_pretrained(tmp_path / "float32")
    first = MesaNetForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    state = saved(first, tmp_path / "half")
    second = MesaNetForCausalLM.from_pretrained(tmp_path / "half")
    for model in (first, second):
        assert model.dtype == dtype
        for name, parameter in model.named_parameters():
            strict = is_fp32_parameter(name)
            assert parameter.dtype == (torch.float32 if strict else dtype), name
            assert torch.equal(parameter, original[name] if strict else original[name].to(dtype)), name
    assert sum(map(is_fp32_parameter, state)) == 3 * 2
    assert all(t.dtype == (torch.float32 if is_fp32_parameter(n) else dtype) for n, t in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["from_pretrained", "from_config", "to"])
def test_half_precision_runs_with_float32_states(tiny_model, tmp_path, dtype, way):
    model = tiny_model()
    input_ids = random_ids(2, 40)
    expected = model(input_ids).logits
    if way == "from_pretrained":
        model.save_pretrained(tmp_path)
        half = MesaNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    elif way == "from_config":
        half = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
        half.load_state_dict(model.state_dict())
    else:
        half = model.to(dtype)
    output = half(input_ids, use_cache=True)
    step = half(input_ids[:, :1], past_key_values=output.past_key_values)
    assert output.logits.dtype == step.logits.dtype == dtype
    torch.testing.assert_close(output.logits.float(), expected, rtol=0.1, atol=0.4)
    for layer in output.past_key_values.layers:
        assert {layer.recurrent_states[0].dtype, layer.recurrent_states[1].dtype} == {torch.float32}
        assert layer.conv_states[0].dtype == dtype
    half.train()
    loss = half(input_ids, labels=input_ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [None, 0.9975])
def test_endless_repetition_without_forgetting_stays_finite(tiny_model, dtype, bound):
    model = tiny_model(dtype=dtype, forget_gate_bound=bound, lambda_lower_bound=1e-4, lambda_init=2e-4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.gamma_bias.fill_(60.0)
            layer.mixer.beta_bias.fill_(60.0)
    input_ids = torch.full((1, 700), 5)
    output = model(input_ids, use_cache=True)
    assert output.logits.isfinite().all()
    assert model(input_ids[:, :1], past_key_values=output.past_key_values).logits.isfinite().all()
    loss = model.train()(input_ids, labels=input_ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_leaves_gates_and_solver_in_float32(tiny_model, monkeypatch):
    model = tiny_model().train()
    seen = []

    def spy(q, k, v, log_gamma, beta, lam, **kwargs):
        seen.append((log_gamma, beta, lam))
        return attend(q, k, v, log_gamma, beta, lam, **kwargs)

    attend = modeling_mesanet.mesa_attention
    monkeypatch.setattr(modeling_mesanet, "mesa_attention", spy)
    input_ids = random_ids(2, 17)
    plain = model(input_ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, labels=input_ids)
    output.loss.backward()
    assert {tensor.dtype for gates in seen for tensor in gates} == {torch.float32}
    for expected, actual in zip(seen[0], seen[2], strict=True):  # the first layer reads the same float32 embeddings
        assert torch.equal(expected, actual)
    torch.testing.assert_close(output.logits.float(), plain, rtol=0.1, atol=0.4)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_leaves_the_gates_of_a_fused_step_in_float32(tiny_model, monkeypatch):
    """The kernel of a step is a stand-in that looks at the gates' logits."""
    model = tiny_model()
    seen = []

    def decode_layer(q, k, v, beta_logit, gamma_logit, *rest, output_stats):
        seen.append((beta_logit, gamma_logit))
        return torch.zeros_like(v), None, None

    monkeypatch.setattr(modeling_mesanet.MesaNetMixer, "decodes_in_one_launch", lambda *arguments: True)
    monkeypatch.setattr(modeling_mesanet, "decode_layer", decode_layer)
    mixer, hidden = model.model.layers[0].mixer, torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    solver = modeling_mesanet.Solver(max_steps=4, tolerance=None, output_stats=False)
    with torch.no_grad():
        cache = model(random_ids(2, 5), use_cache=True).past_key_values
        mixer(hidden, past_key_values=cache, solver=solver)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixer(hidden, past_key_values=cache, solver=solver)
    for expected, actual in zip(*seen, strict=True):
        assert torch.equal(expected, actual)


# --------------------------------------------------------------------------------------------- arguments, outputs


def test_outputs(tiny_model):
    model = tiny_model()
    input_ids = random_ids(2, 7)
    output = model(input_ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert {state.shape for state in output.hidden_states} == {(2, 7, 32)}
    base = model.model(input_ids)
    assert torch.equal(output.hidden_states[-1], base.last_hidden_state)
    embedding = model.get_input_embeddings()
    assert torch.equal(output.hidden_states[0], embedding(input_ids))
    torch.testing.assert_close(embedding(input_ids), embedding.weight[input_ids] * math.sqrt(32))
    assert output.attentions == ()
    assert model(input_ids).hidden_states is None
    logits, cache = model(input_ids, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert isinstance(cache, DynamicCache)
    (only,) = model(input_ids, use_cache=False, return_dict=False)
    assert torch.equal(only, output.logits)


def test_cache_is_returned_outside_training_only(tiny_model):
    model = tiny_model()
    input_ids = random_ids(1, 4)
    assert model(input_ids).past_key_values.get_seq_length() == 4
    assert model(input_ids, use_cache=False).past_key_values is None
    assert tiny_model(use_cache=False)(input_ids).past_key_values is None
    cache = DynamicCache(config=model.config)
    assert model(input_ids, past_key_values=cache, use_cache=False).past_key_values is None
    assert cache.get_seq_length() == 4, "what the caller hands over is updated all the same"
    assert model.train()(input_ids).past_key_values is None
    assert model(input_ids, use_cache=True).past_key_values is None


def test_inputs_embeds_equal_input_ids(tiny_model):
    model = tiny_model()
    input_ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)


def test_gates_are_computed_in_float32_in_a_bfloat16_model(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    mixer = model.model.layers[0].mixer
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16)
    beta, log_gamma = mixer.gates(x, None)
    exact = torch.sigmoid(x.double() @ mixer.beta_proj.weight.double().T + mixer.beta_bias.double())
    assert beta.dtype == log_gamma.dtype == torch.float32
    torch.testing.assert_close(beta.double(), exact, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(random_ids(1, 5)).logits
    assert hidden.isfinite().all()


def test_logits_to_keep(tiny_model):
    model = tiny_model()
    input_ids = random_ids(2, 9)
    full = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=0).logits, full)
    torch.testing.assert_close(model(input_ids, logits_to_keep=1).logits, full[:, -1:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=4).logits, full[:, -4:])
    kept = torch.tensor([0, 3, 5])
    torch.testing.assert_close(model(input_ids, logits_to_keep=kept).logits, full[:, kept])


class TestLastLayerOfAPrompt:
    """Of the tokens whose logits nobody asks for, the last layer only takes the states."""

    @pytest.fixture(autouse=True)
    def from_few_tokens(self, monkeypatch):
        monkeypatch.setattr(modeling_mesanet, "LEFT_OUT_ON_CPU", 4)

    @staticmethod
    def remembered(model, monkeypatch) -> list[int]:
        """Fills with the numbers of tokens that the last layer computes no outputs of."""
        found, mixer = [], model.model.layers[-1].mixer
        original = MesaNetMixer.remember

        def remember(self, hidden_states, *arguments):
            assert self is mixer
            found.append(hidden_states.shape[1])
            original(self, hidden_states, *arguments)

        monkeypatch.setattr(MesaNetMixer, "remember", remember)
        return found

    @pytest.mark.parametrize("fields", [{}, {"use_output_gate": True, "conv_on_value": False}], ids=str)
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("kept", [1, 3])
    def test_logits_and_states_are_those_of_all_tokens(self, tiny_model, monkeypatch, fields, layers, padded, kept):
        model = tiny_model(num_hidden_layers=layers, **fields).double()
        input_ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
        mask[0, :7], mask[1, 12:15], mask[1, 27] = 0, 0, 0
        mask = mask if padded else None
        found = self.remembered(model, monkeypatch)
        with torch.no_grad():
            expected = model(input_ids, mask, use_cache=True)
            pieces, cache = [], None
            for piece in (slice(0, 10), slice(10, 30)):
                piece_mask = None if mask is None else mask[:, : piece.stop]
                output = model(input_ids[:, piece], piece_mask, past_key_values=cache, logits_to_keep=kept)
                pieces.append(output.logits)
                cache = output.past_key_values
        assert found == [10 - kept, 20 - kept]
        last = torch.cat([expected.logits[:, 10 - kept : 10], expected.logits[:, -kept:]], dim=1)
        real = torch.ones_like(last[..., 0], dtype=torch.bool)
        if mask is not None:
            real = torch.cat([mask[:, 10 - kept : 10], mask[:, -kept:]], dim=1).bool()
        torch.testing.assert_close(torch.cat(pieces, dim=1)[real], last[real])
        assert cache.get_seq_length() == 30
        for found_state, state in zip(states(cache), states(expected.past_key_values), strict=True):
            torch.testing.assert_close(found_state, state)

    def test_generate_reads_a_prompt_so(self, tiny_model, monkeypatch):
        model, input_ids = tiny_model(), random_ids(2, 20)
        expected = model.generate(input_ids, max_new_tokens=8, do_sample=False, use_cache=False)
        found = self.remembered(model, monkeypatch)
        assert torch.equal(model.generate(input_ids, max_new_tokens=8, do_sample=False), expected)
        assert found == [19]

    def test_not_where_somebody_sees_the_other_outputs(self, tiny_model, monkeypatch):
        model, input_ids = tiny_model(), random_ids(1, 20)
        found = self.remembered(model, monkeypatch)
        model(input_ids, logits_to_keep=1, use_cache=True)  # autograd
        with torch.no_grad():
            output = model(input_ids, logits_to_keep=1, use_cache=True, output_solver_stats=True)
            assert all(stats.steps.shape[1] == 20 for stats in output.solver_stats)
            model(input_ids, logits_to_keep=1, use_cache=False)
            model(input_ids, logits_to_keep=torch.tensor([19]), use_cache=True)
            cache = modeling_mesanet.upgrade_cache(DynamicCache(config=model.config), model.config)
            cache.activate_past_recording()
            model(input_ids, logits_to_keep=1, past_key_values=cache)
            cache.crop(-15)
            assert cache.get_seq_length() == 5
            seen = []
            watch = model.model.layers[-1].mlp.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
            model(input_ids, logits_to_keep=1, use_cache=True)
            watch.remove()
            assert seen == [20]
            watch = torch.nn.modules.module.register_module_forward_hook(lambda *call: seen.append(1))
            model(input_ids, logits_to_keep=1, use_cache=True)
            watch.remove()
            output = model(input_ids, logits_to_keep=1, use_cache=True, output_hidden_states=True)
            assert [state.shape[1] for state in output.hidden_states] == [20] * 3
            assert found == []
            # That leaves hooks behind which do nothing more.
            model(input_ids, logits_to_keep=1, use_cache=True)
            assert found == [19]

    def test_not_where_another_module_mixes(self, tiny_model):
        class Twice(MesaNetMixer):
            def forward(self, hidden_states, *arguments, **options):
                return super().forward(2 * hidden_states, *arguments, **options)

        class Wrapper(torch.nn.Module):
            def __init__(self, mixer):
                super().__init__()
                self.wrapped = mixer

            def forward(self, *arguments, **options):
                return self.wrapped(*arguments, **options)

        for change in (lambda mixer: setattr(mixer, "__class__", Twice), None):
            model, input_ids = tiny_model(), random_ids(1, 20)
            layer = model.model.layers[-1]
            if change is None:
                layer.mixer = Wrapper(layer.mixer)
            else:
                change(layer.mixer)
            with torch.no_grad():
                expected = model(input_ids, use_cache=True)
                found = model(input_ids, use_cache=True, logits_to_keep=1)
            torch.testing.assert_close(found.logits, expected.logits[:, -1:])
            for ours, theirs in zip(states(found.past_key_values), states(expected.past_key_values), strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_not_while_training_with_checkpoints(self, tiny_model):
        model, input_ids = tiny_model(), random_ids(1, 20)
        model.gradient_checkpointing_enable()
        with torch.no_grad():
            expected = model(input_ids).logits
            found = model.train()(input_ids, use_cache=True, logits_to_keep=1).logits
        torch.testing.assert_close(found, expected[:, -1:], rtol=1e-3, atol=1e-3)

    def test_compiled_layers_stay_whole(self, tiny_model):
        model, input_ids = tiny_model(), random_ids(1, 20)
        with torch.no_grad():
            expected = model(input_ids, use_cache=True, logits_to_keep=1).logits
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="eager")
            found = model(input_ids, use_cache=True, logits_to_keep=1).logits
        torch.testing.assert_close(found, expected)

    def test_a_number_below_zero(self, tiny_model):
        model, input_ids = tiny_model(), random_ids(1, 20)
        with torch.no_grad():
            # As transformers' models take it: all but the first so many.
            torch.testing.assert_close(
                model(input_ids, use_cache=True, logits_to_keep=-3).logits, model(input_ids).logits[:, 3:]
            )
        with pytest.raises(ValueError, match="tokens_to_keep is -3; give at least 1, or 0 for all"):
            model.model(input_ids, tokens_to_keep=-3)

    def test_the_decoder_alone(self, tiny_model):
        model, input_ids = tiny_model().model, random_ids(2, 9)
        with torch.no_grad():
            whole = model(input_ids, use_cache=True).last_hidden_state
            for kept in (1, 5, 9, 12):
                found = model(input_ids, use_cache=True, tokens_to_keep=kept).last_hidden_state
                torch.testing.assert_close(found, whole[:, -kept:])


def test_labels_are_shifted_ignored_and_normalised_as_told(tiny_model):
    model = tiny_model()
    input_ids = random_ids(2, 9)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    losses = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    count = (labels[:, 1:] != -100).sum()
    assert count == 13
    torch.testing.assert_close(output.loss, losses.sum() / count)
    torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=50).loss, losses.sum() / 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 32)}, "exactly one of input_ids"),
        ({"input_ids": torch.ones(3).long()}, "input_ids has shape (3,); it must be [batch, time]"),
        ({"inputs_embeds": torch.ones(1, 3, 31)}, "inputs_embeds has shape (1, 3, 31); it must be [batch, time, 32]"),
        ({"input_ids": torch.ones(2, 0).long()}, "input_ids has no tokens"),
        ({"input_ids": torch.ones(0, 2).long()}, "input_ids has no sequences (shape (0, 2)); give at least one"),
        ({"input_ids": torch.ones(1, 2).bool()}, "input_ids is torch.bool; it must be a tensor of whole numbers"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": [[1, 1]]},
            "attention_mask is list; give a tensor [batch, time], 0 for pads and 1 for tokens",
        ),
        ({"inputs_embeds": torch.full((1, 3, 32), math.nan)}, "inputs_embeds contains NaN or infinite values"),
        ({"inputs_embeds": torch.full((1, 3, 32), -math.inf)}, "inputs_embeds contains NaN or infinite values"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)},
            "attention_mask has shape (2, 4); for these inputs it must be (2, 3)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(3)},
            "attention_mask has shape (3,); for these inputs it must be (2, 3)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)},
            "attention_mask has shape (2, 1, 3, 3); for these inputs it must be (2, 3)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": {"linear_attention": torch.ones(1, 3)}},
            "attention_mask has shape (1, 3); for these inputs it must be (2, 3)",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": {"full_attention": torch.ones(2, 3)}},
            "attention_mask has the keys ['full_attention']; it needs 'linear_attention'",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "position_ids": torch.arange(4)[None]},
            "position_ids has shape (1, 4); it must be (2, 3)",
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(tiny_model, arguments, message):
    for model in (tiny_model(), tiny_model(MesaNetModel)):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            model(**arguments)
        assert str(caught.value).count("\n") == 0


def test_pads_anywhere_leave_the_other_tokens_alone(tiny_model):
    model = tiny_model(dtype=torch.float64)
    input_ids = random_ids(1, 9)
    expected = model(input_ids).logits
    for places in ([0, 1, 2], [9, 10, 11], [0, 5, 11], [3, 4, 5, 6, 7], [1]):
        length = 9 + len(places)
        real = torch.tensor([place not in places for place in range(length)])
        padded = torch.zeros(1, length, dtype=torch.long)
        padded[0, real] = input_ids[0]
        for mask in (real[None], real[None].long(), real[None].double(), {"linear_attention": real[None]}):
            torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, real], expected)


def test_sequence_classification_ignores_padding(tiny_model):
    model = tiny_model(MesaNetForSequenceClassification, num_labels=3, pad_token_id=0, dtype=torch.float64)
    first, second = random_ids(1, 9, seed=1), random_ids(1, 5, seed=2)
    expected = torch.cat([model(first).logits, model(second).logits])
    assert expected.shape == (2, 3)
    for sides in ((0, 4), (4, 0)):
        input_ids = torch.cat([first, F.pad(second, sides)])
        output = model(input_ids, attention_mask=(input_ids != 0).long(), labels=torch.tensor([2, 0]))
        torch.testing.assert_close(output.logits, expected)
        torch.testing.assert_close(output.loss, F.cross_entropy(expected, torch.tensor([2, 0])))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------------- packing

LENGTHS = (5, 1, 9, 3)


def pack(lengths=LENGTHS) -> dict[str, torch.Tensor]:
    """The arguments that mark sequences of these lengths, packed into one row."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "cu_seq_lens_q": bounds.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


def losses_and_gradients(model, pieces: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of every piece side by side, and the gradients of one scalar that weighs them all."""
    model.zero_grad()
    logits = torch.cat([model(**piece).logits.flatten(0, 1) for piece in pieces])
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3))
    (logits * direction).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("markers", [["cu_seq_lens_q"], ["seq_idx"], ["position_ids"], list(pack())], ids="+".join)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_packed_equals_separate(tiny_model, markers, training):
    model = tiny_model(dtype=torch.float64, conv_on_value=True, cg_max_steps_training=64).train(training)
    input_ids = random_ids(1, sum(LENGTHS))
    separate = [{"input_ids": piece} for piece in input_ids.split(LENGTHS, dim=1)]
    packed = {"input_ids": input_ids, **{name: pack()[name] for name in markers}}
    logits, gradients = losses_and_gradients(model, [packed])
    wanted_logits, wanted_gradients = losses_and_gradients(model, separate)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-7, atol=1e-8)
    leaking = model(input_ids).logits.flatten(0, 1)
    assert (leaking - wanted_logits).abs().max() > 0.1, "this test could not see a leak"
    output = model(**packed, use_cache=True, output_hidden_states=True)
    assert output.past_key_values is None
    assert {state.shape for state in output.hidden_states} == {(1, sum(LENGTHS), 32)}


def test_packed_equals_separate_when_compiled(tiny_model):
    model = tiny_model(dtype=torch.float64)
    input_ids, position_ids = random_ids(1, sum(LENGTHS)), pack()["position_ids"]
    expected = torch.cat([model(piece).logits for piece in input_ids.split(LENGTHS, dim=1)], dim=1)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids, position_ids=position_ids, use_cache=False).logits, expected)
    torch._dynamo.reset()  # else the graphs of above would serve
    whole = torch.compile(model, backend="eager", fullgraph=True)
    bounds = pack()["cu_seq_lens_q"]
    for markers in ({"cu_seq_lens_q": bounds}, {"cu_seq_lens_q": bounds, "position_ids": position_ids}):
        torch.testing.assert_close(whole(input_ids, use_cache=False, **markers).logits, expected)
    with pytest.raises(Exception, match="pass cu_seq_lens_q for a full graph"):
        whole(input_ids, use_cache=False, position_ids=position_ids)


def test_packing_beside_pads_or_a_cache_is_refused(tiny_model):
    model = tiny_model()
    input_ids, position_ids = random_ids(1, 18), pack()["position_ids"]
    mask = torch.ones(1, 18).long()
    mask[0, -1] = 0
    for other in ({"attention_mask": mask}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match=r"position_ids.* were given together with pads"):
            model(input_ids, position_ids=position_ids, **other)


def test_position_ids_of_padded_rows_are_no_packing(tiny_model):
    model = tiny_model()
    input_ids = random_ids(1, 8)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]])
    expected = model(input_ids, attention_mask=mask).logits
    counted, uncounted = torch.arange(8)[None], (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    for position_ids in (counted, uncounted):
        assert torch.equal(model(input_ids, attention_mask=mask, position_ids=position_ids).logits, expected)


def test_packed_rows_and_empty_sequences(tiny_model):
    model = tiny_model(dtype=torch.float64)
    input_ids = random_ids(2, 8)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    bounds = torch.tensor([0, 3, 3, 8, 14, 16, 16])
    pieces = [input_ids[0:1, :3], input_ids[0:1, 3:], input_ids[1:2, :6], input_ids[1:2, 6:]]
    expected = torch.cat([model(piece).logits[0] for piece in pieces])
    for marker in ({"position_ids": position_ids}, {"cu_seq_lens_q": bounds}):
        output = model(input_ids, output_hidden_states=True, **marker)
        torch.testing.assert_close(output.logits.flatten(0, 1), expected)
        assert {state.shape for state in output.hidden_states} == {(2, 8, 32)}


@pytest.mark.parametrize(
    "position_ids", [torch.arange(9)[None], torch.arange(5, 14)[None], torch.arange(9).repeat(2, 1)]
)
def test_rising_position_ids_mean_nothing(tiny_model, position_ids):
    model = tiny_model()
    input_ids = random_ids(2, 9)
    assert torch.equal(model(input_ids, position_ids=position_ids).logits, model(input_ids).logits)


def test_conflicting_or_impossible_packing_raises(tiny_model):
    model = tiny_model()
    input_ids = random_ids(1, sum(LENGTHS))
    markers = pack()
    pads = torch.ones_like(input_ids)
    pads[0, 0] = 0
    cache = model(input_ids).past_key_values
    before = [layer.recurrent_states[0].clone() for layer in cache.layers]
    other = pack((4, 2, 9, 3))
    cases = [
        ({"cu_seq_lens_q": markers["cu_seq_lens_q"], "seq_idx": other["seq_idx"]}, "disagree"),
        ({"cu_seq_lens_q": markers["cu_seq_lens_q"], "position_ids": other["position_ids"]}, "disagree"),
        ({"seq_idx": markers["seq_idx"], "position_ids": other["position_ids"]}, "disagree"),
        ({"cu_seq_lens_q": markers["cu_seq_lens_q"], "attention_mask": pads}, "together with pads"),
        ({"seq_idx": markers["seq_idx"], "attention_mask": pads}, "together with pads"),
        ({"cu_seq_lens_q": markers["cu_seq_lens_q"], "past_key_values": cache}, "past_key_values"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 17])}, r"cu_seq_?lens\w* .*18"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 18])}, r"cu_seq_?lens"),
        ({"cu_seq_lens_q": torch.tensor([2, 9, 18])}, r"cu_seq_?lens"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 25])}, r"cu_seq_?lens"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 18.0])}, r"cu_seq_?lens"),
        ({"seq_idx": markers["seq_idx"][:, :7]}, "seq_idx has shape"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(input_ids, **arguments)
    assert all(torch.equal(a, layer.recurrent_states[0]) for a, layer in zip(before, cache.layers, strict=True))
    # A mask without pads and markers that agree are no conflict.
    everything = model(input_ids, attention_mask=torch.ones_like(input_ids), **markers).logits
    assert torch.equal(everything, model(input_ids, cu_seq_lens_q=markers["cu_seq_lens_q"]).logits)


# ------------------------------------------------------------------------------------------------------- training


def test_loss_falls_in_a_few_steps(tiny_config):
    torch.manual_seed(0)
    model = MesaNetForCausalLM(tiny_config()).train()
    input_ids = random_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(97)) < 1.0
    assert losses[-1] < losses[0] - 1.5
    with torch.no_grad():
        evaluated = model.eval()(input_ids, labels=input_ids).loss
    assert evaluated < losses[0] - 1.5


def enable_checkpointing(model, use_reentrant: bool) -> None:
    # Newer versions of transformers rename the method and deprecate the old name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_model, monkeypatch, use_reentrant, packed):
    model = tiny_model(dtype=torch.float64).train()
    piece = {"input_ids": random_ids(1, sum(LENGTHS)), **(pack() if packed else {})}
    calls = []
    attend = modeling_mesanet.mesa_attention
    monkeypatch.setattr(modeling_mesanet, "mesa_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    logits, gradients = losses_and_gradients(model, [piece])
    assert len(calls) == 2
    enable_checkpointing(model, use_reentrant)
    checkpointed_logits, checkpointed = losses_and_gradients(model, [piece])
    assert len(calls) == 2 + 4, "each layer must run once more in the backward pass"
    assert torch.equal(checkpointed_logits, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_and_packing_keep_solver_statistics(tiny_model, use_reentrant):
    model = tiny_model(cg_max_steps_training=5).train()
    input_ids = random_ids(2, 9)
    bounds = torch.tensor([0, 4, 18])
    arguments = {"labels": input_ids, "cu_seq_lens_q": bounds, "output_solver_stats": True, "cg_tolerance": 1e-2}
    expected = model(input_ids, **arguments)
    expected.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    output = model(input_ids, **arguments)
    output.loss.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for layer, same in zip(output.solver_stats, expected.solver_stats, strict=True):
        assert layer.steps.shape == layer.residual.shape == (2, 9, 2)
        assert torch.equal(layer.steps, same.steps)
        assert torch.equal(layer.residual, same.residual)
        assert 0 < layer.steps.max() <= 5
    assert model(input_ids).solver_stats is None


def test_gradient_checkpointing_drops_a_cache_instead_of_updating_it_twice(tiny_model):
    model = tiny_model().train()
    enable_checkpointing(model, use_reentrant=False)
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 6), past_key_values=cache, labels=random_ids(1, 6)).loss.backward()
    assert cache.get_seq_length() == 0


def test_class_attributes_that_transformers_reads():
    assert MesaNetPreTrainedModel.base_model_prefix == "model"
    assert MesaNetPreTrainedModel.supports_gradient_checkpointing
    assert not MesaNetPreTrainedModel._is_stateful, (
        "the cache takes tokens back: decoding with drafts need not be refused"
    )
    assert MesaNetPreTrainedModel._no_split_modules == ["MesaNetDecoderLayer"]
    assert MesaNetPreTrainedModel._skip_keys_device_placement == ["past_key_values"]
    assert MesaNetPreTrainedModel._can_compile_fullgraph
    parameters = inspect.signature(MesaNetForCausalLM.forward).parameters
    assert {"labels", "logits_to_keep", "kwargs"} <= set(parameters)
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD, "what lets the loss see num_items_in_batch"
