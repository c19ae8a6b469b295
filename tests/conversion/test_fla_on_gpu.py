# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that fla itself wrote, converted, run beside fla, and converted back; needs fla and a GPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_mesanet.conversion import convert_from_fla, convert_to_fla
from modeling_mesanet.conversion.compare_logits import LogitComparison, compare_logits, why_fla_cannot_run

obstacle = why_fla_cannot_run()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(obstacle is not None, reason=f"not compared with fla: {obstacle}")]

# The published 140M model, with what the peer has: heads of its own and no gate, or a tied one and a gate.
SIZES = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 14,
    "num_heads": 6,
    "head_dim": 128,
    "intermediate_size": 2304,
}
VARIANTS = {
    "untied": {"tie_word_embeddings": False},
    "tied, output gate": {"tie_word_embeddings": True, "use_output_gate": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request, tmp_path_factory):
    """fla's own random weights, in shards of either dtype; vectors are moved away from where they start."""
    from fla.models.mesa_net import MesaNetConfig, MesaNetForCausalLM

    torch.manual_seed(0)
    model = MesaNetForCausalLM(MesaNetConfig(**SIZES, **VARIANTS[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("fla")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(folder / str(dtype).removeprefix("torch."), max_shard_size="100MB")
    return folder


def read(folder) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_agree_and_the_round_trip_is_bitwise(checkpoint, tmp_path, dtype):
    source = checkpoint / dtype
    assert (source / "model.safetensors.index.json").is_file()
    there = convert_from_fla(source, tmp_path / "ours", max_shard_size="100MB")
    print(there.compared)
    assert len(there.shards) > 1
    assert_agreement(there.logits, dtype)
    back = convert_to_fla(tmp_path / "ours", tmp_path / "back", max_shard_size="100MB")
    assert_agreement(back.logits, dtype)
    original, returned = read(source), read(tmp_path / "back")
    assert original.keys() == returned.keys()
    for name, tensor in original.items():
        assert tensor.dtype == returned[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), returned[name].reshape(-1).view(torch.uint8)), name


def assert_agreement(logits: LogitComparison, dtype: str) -> None:
    assert logits.dtype == getattr(torch, dtype)
    assert logits.ok, logits
    assert logits.ours_float32 < 1e-3
    if dtype == "float32":  # fla's kernels round q, k and the solver's directions to float16 all the same
        assert logits.ours < 1e-3
        assert logits.difference < 1e-3 or logits.ours < 0.1 * logits.fla
    else:  # bfloat16's rounding, which random weights amplify in fla's layers as in ours
        assert logits.ours < 1.1 * logits.fla


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_conversion_is_found(checkpoint, tmp_path, dtype):
    """The comparison can fail: with a bound on forgetting that fla does not have, logits differ by far more."""
    convert_from_fla(checkpoint / dtype, tmp_path / "ours", compare=False)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "forget_gate_bound": 0.5}))
    comparison = compare_logits(checkpoint / dtype, tmp_path / "ours")
    print(comparison)
    assert not comparison.ok
    assert comparison.ours_float32 > 3e-3
