# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of fla's MesaNet consists of, from its names and shapes alone."""

import torch

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
