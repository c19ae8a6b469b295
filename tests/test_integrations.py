# SPDX-License-Identifier: Apache-2.0
"""With what surrounds transformers: pipelines, Trainer, PEFT, offloading, tensor and pipeline parallelism, export."""

import copy
import math
import os
import subprocess
import sys
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_models import random_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_mesanet import MesaNetForCausalLM, MesaNetForSequenceClassification, bundled_checkpoint
from modeling_mesanet.configuration_mesanet import LORA_TARGET_MODULES

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model(tiny_model) -> MesaNetForCausalLM:
    """Untied, because an untrained tied head repeats its input."""
    return tiny_model(tie_word_embeddings=False, pad_token_id=0, bos_token_id=1)


# ------------------------------------------------------------------------------------------------------ pipelines


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: `<pad>`, `<s>`, then w2 to w96."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{index}": index for index in range(2, 97)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", padding_side="left")


def test_text_generation_pipeline(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generate.model) is MesaNetForCausalLM
    prompts = ["w5 w7 w11 w13", "w2", "w40 w41"]
    options = {"return_full_text": False, **GREEDY}
    texts = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        input_ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert text == tokenizer.decode(model.generate(input_ids, **GREEDY)[0, input_ids.shape[1] :])
    batched = generate(prompts, batch_size=3, **options)
    assert [item[0]["generated_text"] for item in batched] == texts


def test_streamed_text(model, tokenizer):
    input_ids = random_ids(1, 5)
    expected = tokenizer.decode(model.generate(input_ids, **GREEDY)[0, 5:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={"input_ids": input_ids, "streamer": streamer, **GREEDY})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_stop_strings_in_a_batch():
    """A row that has stopped is filled with pads and does not disturb the other."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_checkpoint())  # transformers wants one of bytes or words
    model = MesaNetForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32)
    texts = ["The old captain", "She opened the letter and read it aloud to"]
    rows = [model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0, -6:] for text in texts]
    stop = tokenizer.decode(rows[0][1])
    assert stop not in tokenizer.decode(rows[0][0])
    assert stop not in tokenizer.decode(rows[1])
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)[:, -6:]
    assert torch.equal(output[1], rows[1])
    assert torch.equal(output[0, :2], rows[0][:2])
    assert (output[0, 2:] == tokenizer.pad_token_id).all()


def test_guidance_keeps_a_state_of_its_own(model):
    """Classifier-free guidance runs the model a second time, on a cache that transformers hands on."""
    options = {"guidance_scale": 2.0, "negative_prompt_ids": random_ids(1, 3, seed=4), **GREEDY}
    expected = model.generate(random_ids(1, 5), use_cache=False, **options)
    assert not torch.equal(expected, model.generate(random_ids(1, 5), **GREEDY))
    for way in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        assert torch.equal(model.generate(random_ids(1, 5), **way, **options), expected)


def test_text_classification_pipeline(tiny_model, tokenizer, tmp_path):
    classifier = tiny_model(MesaNetForSequenceClassification, num_labels=3, pad_token_id=0)
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    texts = ["w5 w7 w11 w13", "w2"]
    for batch_size in (1, 2):
        for text, scores in zip(texts, classify(texts, batch_size=batch_size), strict=True):
            logits = classifier(tokenizer(text, return_tensors="pt").input_ids).logits[0]
            expected = {f"LABEL_{index}": value for index, value in enumerate(logits.softmax(-1).tolist())}
            assert {score["label"]: score["score"] for score in scores} == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------------- Trainer


def samples(count: int = 8) -> list[dict[str, list[int]]]:
    """Sequences of different lengths whose loss covers different numbers of tokens."""
    rows = [random_ids(1, 5 + 2 * index, seed=index)[0].tolist() for index in range(count)]
    return [{"input_ids": row, "labels": [-100] * index + row[index:]} for index, row in enumerate(rows)]


def pad_right(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

    input_ids = column("input_ids", 0)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long(), "labels": column("labels", -100)}


def train(model, tmp_path, collator, **arguments) -> tuple[MesaNetForCausalLM, Trainer]:
    """A copy of `model` after a few steps of plain SGD, so that equal gradients and only they give equal weights."""
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    trained = copy.deepcopy(model)
    trainer = Trainer(
        trained, TrainingArguments(**{**defaults, **arguments}), train_dataset=samples(), data_collator=collator
    )
    trainer.train()
    return trained, trainer


def assert_same_weights(one, other, start, atol: float = 2e-6) -> None:
    for (name, a), b, before in zip(one.named_parameters(), other.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert (a - before).abs().max() > 10 * atol, f"{name} did not move"


@pytest.mark.parametrize("steps", [2, 4])
def test_gradient_accumulation_equals_the_whole_batch(model, tmp_path, steps):
    """Only true if the loss is divided by the number of labels in all accumulated batches."""
    whole, _ = train(model, tmp_path, pad_right)
    pieces, _ = train(
        model, tmp_path, pad_right, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps
    )
    assert_same_weights(whole, pieces, model)


@pytest.mark.parametrize(
    "options",
    [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_position_ids": False}],
    ids=str,
)
def test_flattened_batches_train_like_padded_ones(model, tmp_path, options):
    padded, _ = train(model, tmp_path, pad_right)
    try:
        collator = DataCollatorWithFlattening(**options)
    except TypeError as error:  # an argument this transformers does not have
        pytest.skip(str(error))
    flattened, _ = train(model, tmp_path, collator)
    assert_same_weights(padded, flattened, model)


def test_trainer_with_bf16_checkpointing_and_accumulation(model, tmp_path):
    name = "activation_checkpointing" if has_argument("activation_checkpointing") else "gradient_checkpointing"
    trained, trainer = train(
        model,
        tmp_path,
        pad_right,
        optim="adamw_torch",
        learning_rate=1e-2,
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        bf16=True,
        **{name: True},
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.5
    assert all(parameter.isfinite().all() for parameter in trained.parameters())
    assert math.isfinite(trainer.evaluate(samples(4))["eval_loss"])


def test_trainer_predicts_logits_and_no_cache(model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model, arguments, data_collator=pad_right)
    predictions = trainer.predict(samples(3)).predictions
    assert isinstance(predictions, np.ndarray)
    batch = pad_right(samples(3))
    np.testing.assert_allclose(predictions, model(**batch).logits.detach().numpy(), rtol=1e-4, atol=1e-4)


def has_argument(name: str) -> bool:
    return name in TrainingArguments.__dataclass_fields__


# ----------------------------------------------------------------------------------------------------------- PEFT

LINEAR_MODULES = [
    *("q_proj", "k_proj", "v_proj", "beta_proj", "gamma_proj", "output_gate_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"),
]


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("target", LINEAR_MODULES)
def test_lora_reaches_the_computation_of_every_module(tiny_model, peft, target):
    """Code that reads `proj.weight` past the module would train an adapter that changes nothing."""
    base = tiny_model(use_output_gate=True, tie_word_embeddings=False)
    input_ids = random_ids(2, 9)
    before = base(input_ids).logits
    config = peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "lora" in name
                parameter.sub_(0.005 * parameter.grad / parameter.grad.norm().clamp_min(1e-12))
    model.eval()
    after = model(input_ids=input_ids).logits
    assert (after - before).abs().max() > 1e-4
    assert model(input_ids=input_ids, labels=input_ids).loss < loss
    cached = model(input_ids=input_ids[:, :8]).past_key_values
    step = model(input_ids=input_ids[:, 8:], past_key_values=cached).logits
    torch.testing.assert_close(step, after[:, 8:], rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids).logits, after, rtol=1e-3, atol=1e-3)


def test_lora_knows_its_default_targets(model, peft, monkeypatch):
    mapping = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # As if peft had been imported just now, after everything else.
    monkeypatch.delitem(mapping, "mesanet", raising=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM"))
    targets = {name.rpartition(".")[2] for name in adapted.base_model.targeted_module_names}
    assert targets == set(LORA_TARGET_MODULES)
    assert len(adapted.base_model.targeted_module_names) == 2 * len(targets)
    # A choice the user made before is respected.
    monkeypatch.setitem(mapping, "mesanet", ["v_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert {name.rpartition(".")[2] for name in adapted.base_model.targeted_module_names} == {"v_proj"}


def test_adapters_through_transformers_itself(model, peft, tmp_path):
    adapted = copy.deepcopy(model)
    adapted.add_adapter(peft.LoraConfig(init_lora_weights=False))
    input_ids = random_ids(1, 7)
    logits = adapted(input_ids).logits
    assert (logits - model(input_ids).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(input_ids).logits, logits)


def test_prompt_tuning_generates_and_prefix_tuning_is_refused(model, peft):
    input_ids = random_ids(2, 6)
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **GREEDY}
    tuned = peft.get_peft_model(
        copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    tokens = tuned.eval().generate(**arguments)
    assert torch.equal(tokens, tuned.generate(use_cache=False, **arguments))
    assert not torch.equal(tokens, model.generate(**arguments))
    prefixed = peft.get_peft_model(
        copy.deepcopy(model), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"a DynamicLayer at layer 0\).* Instead of prefix tuning, use LoRA"):
        prefixed(input_ids=input_ids)


def test_importing_the_package_imports_no_optional_library():
    # (torch itself imports triton where it is installed.)
    code = "import sys, modeling_mesanet; print(*{'peft', 'matplotlib', 'lm_eval'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == ""


# ----------------------------------------------------------------------------------------------------- offloading


def test_cpu_offload(tiny_model):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(conv_on_value=True, use_output_gate=True, tie_word_embeddings=False, pad_token_id=0)
    input_ids = random_ids(2, 9)
    logits, tokens = model(input_ids).logits, model.generate(input_ids, **GREEDY)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    torch.testing.assert_close(offloaded(input_ids).logits, logits)
    assert torch.equal(offloaded.generate(input_ids, **GREEDY), tokens)


def test_disk_offload_of_a_layer(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    ).eval()
    assert {parameter.device.type for parameter in loaded.model.layers[1].parameters()} == {"meta"}
    input_ids = random_ids(2, 9)
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)
    assert torch.equal(loaded.generate(input_ids, **GREEDY), model.generate(input_ids, **GREEDY))


# ---------------------------------------------------------------------------------------------------- parallelism


def test_parallel_plans_name_what_exists(tiny_model):
    model = tiny_model(use_output_gate=True)
    modules = dict(model.model.named_modules())
    # transformers itself adds the embedding.
    plan = {pattern for pattern in model.config.base_model_tp_plan if pattern != "embed_tokens"}
    for pattern in plan:
        for index in range(model.config.num_hidden_layers):
            assert isinstance(modules[pattern.replace("*", str(index))], torch.nn.Linear)
    linear = {name.replace("layers.0.", "layers.*.") for name, m in modules.items() if type(m) is torch.nn.Linear}
    linear = {name for name in linear if "*" in name} - {"layers.*.mixer.beta_proj", "layers.*.mixer.gamma_proj"}
    assert linear == plan, "a matrix is missing from the plan"
    children = [name for name, _ in model.model.named_children()]
    assert list(model.config.base_model_pp_plan) == children, "the pipeline runs them in this order"
    assert "lm_head" in MesaNetForCausalLM._pp_plan
    assert "lm_head" in MesaNetForCausalLM._tp_plan


WORKER = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_mesanet

folder, inputs, results = sys.argv[1:]
torch.set_num_threads(1)
inputs = torch.load(inputs)
found = {}
for name, options in {"tensor": {"tp_plan": "auto", "tp_size": 2}, "pipeline": {"pp_size": 2}}.items():
    config = DistributedConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    with torch.no_grad():
        found[name, "logits"] = model(**inputs).logits
        found[name, "tokens"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    if name == "tensor":
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found["sharded"] = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
        for parameter_name, parameter in model.named_parameters():
            gradient = parameter.grad
            found["gradient", parameter_name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
if dist.get_rank() == 0:
    torch.save(found, results)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tiny_model, tmp_path_factory):
    """What two processes compute together, and the model and inputs to compare with."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo, the backend for collectives on CPU")
    folder = tmp_path_factory.mktemp("ranks")
    # Sizes that two ranks divide: older versions of transformers insist on it.
    model = tiny_model(vocab_size=96, num_hidden_layers=3, use_output_gate=True, pad_token_id=0)
    model.save_pretrained(folder / "model")
    input_ids = random_ids(2, 9).clamp(max=95)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    torch.save(inputs, folder / "inputs.pt")
    (folder / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    files = [str(folder / name) for name in ("worker.py", "model", "inputs.pt", "results.pt")]
    result = subprocess.run(
        [*launcher, *files],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / "results.pt"), model, inputs


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_ranks_equal_one(two_ranks, kind):
    found, model, inputs = two_ranks
    torch.testing.assert_close(found[kind, "logits"], model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[kind, "tokens"], model.generate(**inputs, **GREEDY))


def test_tensor_parallel_gradients_equal_those_of_one_rank(two_ranks):
    found, model, inputs = two_ranks
    assert len([name for name in found["sharded"] if "layers" in name]) == 3 * 8, "eight matrices a layer"
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradient", name], parameter.grad, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("arguments", [{}, {"use_cache": True, "logits_to_keep": 1}], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_dynamo_exporter(model, dynamic, arguments):
    exporters = pytest.importorskip("transformers.exporters")
    inputs = {"input_ids": random_ids(2, 9), **arguments}
    exported = exporters.DynamoExporter().export(copy.deepcopy(model), inputs, exporters.DynamoConfig(dynamic=dynamic))
    program = getattr(exported, "program", exported).module()
    for length in (9, 100) if dynamic else (9,):
        inputs["input_ids"] = random_ids(2, length, seed=length)
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
