"""Models as their authors' single files: the layouts of their makers, made of diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def renamed(name: str, pairs: Mapping[str, str]) -> str:
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}


def ldm_unet(tensors: Tensors, layers: int) -> Tensors:
    """CompVis' and SDXL's UNet; layers: per block."""
    outside = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }

    def place(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "down_blocks":
            number = int(parts[1]) * (layers + 1) + 1
            if parts[2] == "downsamplers":
                return f"input_blocks.{number + layers}.0.op.{parts[-1]}"
            where = f"input_blocks.{number + int(parts[3])}.{0 if parts[2] == 'resnets' else 1}."
        elif parts[0] == "up_blocks":
            number = int(parts[1]) * (layers + 1)
            if parts[2] == "upsamplers":
                attention = any(key.startswith(f"up_blocks.{parts[1]}.attentions.") for key in tensors)
                return f"output_blocks.{number + layers}.{1 + attention}.conv.{parts[-1]}"
            where = f"output_blocks.{number + int(parts[3])}.{0 if parts[2] == 'resnets' else 1}."
        elif parts[0] == "mid_block":
            where = f"middle_block.{2 * int(parts[2]) if parts[1] == 'resnets' else 1}."
            parts = ["", *parts]
        else:
            return renamed(name, outside)
        rest = ".".join(parts[4:])
        return where + (renamed(rest, _RESNET) if parts[2] == "resnets" else rest)

    return {f"model.diffusion_model.{place(name)}": tensor for name, tensor in tensors.items()}


def ldm_vae(tensors: Tensors, levels: int) -> Tensors:
    """CompVis' VAE, whose attention is made of 1x1 convolutions."""
    attention = {
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    }
    plain = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "downsamplers.0.conv": "downsample.conv",
        "upsamplers.0.conv": "upsample.conv",
        "resnets": "block",
        "down_blocks": "down",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        **{f"up_blocks.{place}.": f"up.{levels - 1 - place}." for place in range(levels)},
    }
    placed = {}
    for name, tensor in tensors.items():
        convolution = "attentions" in name and "group_norm" not in name and tensor.ndim == 2
        theirs = f"first_stage_model.{renamed(name, {**attention, **plain})}"
        placed[theirs] = tensor[..., None, None] if convolution else tensor
    return placed


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    """OpenCLIP's text encoder, queries, keys and values in one."""
    plain = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    placed = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            placed["text_projection"] = tensor.T.contiguous()
        elif ".q_proj." in name:
            whole = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            placed[renamed(name, {**plain, ".q_proj.": ".in_proj_"})] = whole
        elif not any(part in name for part in (".k_proj.", ".v_proj.")):
            placed[renamed(name, plain)] = tensor
    placed["logit_scale"] = torch.tensor(4.6)
    return {prefix + name: tensor for name, tensor in placed.items()}


def sd3_transformer(tensors: Tensors, layers: int) -> Tensors:
    """Stability AI's MMDiT: queries, keys and values in one, shift before scale where diffusers has it behind."""
    plain = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "transformer_blocks": "joint_blocks",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "attn.to_q": "x_block.attn.qkv",
        "attn.add_q_proj": "context_block.attn.qkv",
    }
    placed = {}
    for name, tensor in tensors.items():
        if ".attn.to_q." in name or ".attn.add_q_proj." in name:
            tensor = torch.cat([tensors[name.replace("_q", f"_{part}")] for part in "qkv"])
        elif any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        elif name.startswith(("norm_out.", f"transformer_blocks.{layers - 1}.norm1_context.")):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        placed[renamed(name, plain)] = tensor
    return placed


def flux_transformer(tensors: Tensors) -> Tensors:
    """Black Forest Labs' names: queries, keys and values in one, of a single block with its feed-forward too."""
    plain = {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    double = {
        "transformer_blocks.": "double_blocks.",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_q": "img_attn.qkv",
        "attn.add_q_proj": "txt_attn.qkv",
        "ff.net.": "img_mlp.",
        "ff_context.net.": "txt_mlp.",
        ".0.proj.": ".0.",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
    }
    single = {
        "single_transformer_blocks.": "single_blocks.",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
        "attn.to_q": "linear1",
        "proj_out": "linear2",
        "norm.linear": "modulation.lin",
    }
    placed = {}
    for name, tensor in tensors.items():
        if name.startswith("single"):
            if any(part in name for part in (".to_k.", ".to_v.", ".proj_mlp.")):
                continue
            if ".to_q." in name:
                parts = [name.replace("to_q", f"to_{part}") for part in "qkv"]
                tensor = torch.cat([tensors[part] for part in (*parts, name.replace("attn.to_q", "proj_mlp"))])
            placed[renamed(name, single)] = tensor
        elif name.startswith("transformer_blocks."):
            if any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
                continue
            if ".to_q." in name or ".add_q_proj." in name:
                tensor = torch.cat([tensors[name.replace("_q", f"_{part}")] for part in "qkv"])
            placed[renamed(name, double)] = tensor
        else:
            swapped = torch.cat(tensor.chunk(2)[::-1]) if name.startswith("norm_out.") else tensor
            placed[renamed(name, plain).replace("proj_out", "final_layer.linear")] = swapped
    return placed


def wan_transformer(tensors: Tensors) -> Tensors:
    """Wan's own names."""
    plain = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        ".to_out.0.": ".o.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "proj_out": "head.head",
        "norm2": "other norm",
        "norm3": "norm2",
        "other norm": "norm3",
    }
    placed = {renamed(name, plain): tensor for name, tensor in tensors.items()}
    placed["head.modulation"] = placed.pop("scale_shift_table")
    return {name.replace("scale_shift_table", "modulation"): tensor for name, tensor in placed.items()}


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}
