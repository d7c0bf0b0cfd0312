"""Names of the layers of FLUX and Stable Diffusion 3 in their authors' own code, which LoRA files have too.

One layer there may be several in diffusers: its rows are theirs, one after the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """What a layer of the authors' code is in diffusers.

    modules: dotted paths; the layer's rows are those of the first, then the second, and so on. modulation: its rows are
    (shift, scale) where diffusers has (scale, shift), if it has no others.
    """

    modules: tuple[str, ...]
    modulation: bool = False


_FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_attn_norm_query_norm": ("attn.norm_q",),
    "img_attn_norm_key_norm": ("attn.norm_k",),
    "txt_attn_norm_query_norm": ("attn.norm_added_q",),
    "txt_attn_norm_key_norm": ("attn.norm_added_k",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    # XLabs' attention processors
    "processor_qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor_qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor_proj_lora1": ("attn.to_out.0",),
    "processor_proj_lora2": ("attn.to_add_out",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "norm_query_norm": ("attn.norm_q",),
    "norm_key_norm": ("attn.norm_k",),
    "processor_qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor_proj_lora": ("proj_out",),
}
_SD3_JOINT = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn_ln_q": ("attn.norm_q",),
    "x_block_attn_ln_k": ("attn.norm_k",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_attn2_ln_q": ("attn2.norm_q",),
    "x_block_attn2_ln_k": ("attn2.norm_k",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_attn_ln_q": ("attn.norm_added_q",),
    "context_block_attn_ln_k": ("attn.norm_added_k",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _FLUX_DOUBLE),
    "single_blocks": ("single_transformer_blocks", _FLUX_SINGLE),
    "joint_blocks": ("transformer_blocks", _SD3_JOINT),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_MODULATION = ("context_block_adaLN_modulation_1", "final_layer_adaLN_modulation_1")
_BLOCK = re.compile(r"(double_blocks|single_blocks|joint_blocks)_(\d+)_(\w+)")
# Beginnings of names that only models of one kind have, in diffusers' spelling or their authors'.
_KINDS = {
    "FLUX": ("double_blocks_", "single_blocks_", "single_transformer_blocks_"),
    "Stable Diffusion 3": ("joint_blocks_",),
    "a UNet": ("down_blocks_", "mid_block_", "up_blocks_", "input_blocks_", "middle_block_", "output_blocks_"),
}


def original_layer(module: str) -> Original | None:
    """What a layer, named with underscores for dots, is in diffusers; None for names of no such model."""
    modulation = module.endswith(_MODULATION)
    if module in _OUTSIDE:
        return Original((_OUTSIDE[module],), modulation)
    match = _BLOCK.fullmatch(module)
    if match is None:
        return None
    blocks, layers = _BLOCKS[match[1]]
    if match[3] not in layers:
        return None
    return Original(tuple(f"{blocks}.{match[2]}.{path}" for path in layers[match[3]]), modulation)


def kind_of_model(module: str) -> str | None:
    """The kind of model that a layer, named with underscores for dots, can only be of; None where several have it."""
    return next((kind for kind, beginnings in _KINDS.items() if module.startswith(beginnings)), None)
