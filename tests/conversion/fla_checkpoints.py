# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of fla's MesaNet consists of, from its names and shapes alone; and fla's layers without a GPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

FIELDS = {
    "architectures": ["MesaNetForCausalLM"],
    "model_type": "mesa_net",
    "hidden_size": 32,
    "num_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "intermediate_size": 48,
    "fuse_norm": True,
    "initializer_range": 0.02,
}


def fla_tensors(fields: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors of fla's causal model; `lm_head.weight` too unless it is tied."""
    d, heads, width = fields["hidden_size"], fields["num_heads"], fields["intermediate_size"]
    channels = heads * fields["head_dim"]
    convolution = (channels, 1, fields.get("conv_size", 4))
    layer = {
        "attn_norm.weight": (d,),
        "attn.q_proj.weight": (channels, d),
        "attn.k_proj.weight": (channels, d),
        "attn.v_proj.weight": (channels, d),
        "attn.a_proj.weight": (heads, d),
        "attn.a_proj.bias": (heads,),
        "attn.b_proj.weight": (heads, d),
        "attn.b_proj.bias": (heads,),
        "attn.lambda_params": (channels,),
        "attn.q_conv1d.weight": convolution,
        "attn.k_conv1d.weight": convolution,
        "attn.o_norm.weight": (fields["head_dim"],),
        "attn.o_proj.weight": (d, channels),
        "mlp_norm.weight": (d,),
        "mlp.gate_proj.weight": (width, d),
        "mlp.up_proj.weight": (width, d),
        "mlp.down_proj.weight": (d, width),
    }
    if fields.get("use_output_gate"):
        layer["attn.g_proj.weight"] = (channels, d)
    shapes = {"model.embeddings.weight": (fields["vocab_size"], d), "model.norm.weight": (d,)}
    for index in range(fields["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (fields["vocab_size"], d)
    generator = torch.Generator().manual_seed(0)
    return {name: (0.5 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


@contextmanager
def fla_without_triton() -> Iterator[None]:
    """Stand in for what fla has no torch form of around its solver: norms, convolutions, the product of its MLP."""
    from fla import modules

    def norm(self, x, residual=None, prenorm=False):
        x = x if residual is None else x + residual
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (y, x) if prenorm else y

    def gated_norm(self, x, gate):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) * F.silu(gate)

    def convolution(self, x, **options):
        padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
        return F.silu(F.conv1d(padded, self.weight, groups=self.groups)).transpose(1, 2), None

    def gated_linear(x, y, weight, bias):
        return F.linear(F.silu(x) * y, weight, bias)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(modules.RMSNorm, "forward", norm))
        stack.enter_context(mock.patch.object(modules.FusedRMSNormGated, "forward", gated_norm))
        stack.enter_context(mock.patch.object(modules.ShortConvolution, "forward", convolution))
        stack.enter_context(mock.patch("fla.modules.mlp.swiglu_linear", gated_linear))
        yield
