"""Names of a UNet's layers in Stability's own code, which kohya's trainer gives the layers of SDXL."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_(.+)")
_PART = re.compile(r"(\d+)_(.+)")
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}


def diffusers_module(module: str, layers_per_block: int) -> str | None:
    """The diffusers name, with underscores for dots as ``module`` has, of a layer of a UNet; None for other names.

    layers_per_block: resnets of each down block.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    block = _BLOCK.fullmatch(module)
    if block is None:
        return None
    kind, index, rest = block[1], int(block[2]), block[3]
    if kind == "middle_block":
        return f"mid_block_{_MIDDLE[index]}_{_RESNET.get(rest, rest)}" if index < len(_MIDDLE) else None
    part = _PART.fullmatch(rest)
    if part is None:
        return None
    place, layer = int(part[1]), part[2]
    each = layers_per_block + 1  # a down block ends with a downsampler, an up block has one resnet more
    if kind == "input_blocks":
        level, number = divmod(index - 1, each)
        if layer == "op":
            return f"down_blocks_{level}_downsamplers_0_conv"
        parent = f"down_blocks_{level}"
    else:
        level, number = divmod(index, each)
        if layer == "conv":
            return f"up_blocks_{level}_upsamplers_0_conv"
        parent = f"up_blocks_{level}"
    if place > 1 or index < (kind == "input_blocks"):
        return None
    return f"{parent}_{('resnets', 'attentions')[place]}_{number}_{_RESNET.get(layer, layer)}"
