"""Layer names of Stability's code against diffusers' own converter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dipgo_deploy.lora.sgm import diffusers_module

RESNET = ("in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection")
ATTENTION = ("proj_in", "transformer_blocks_1_attn2_to_out_0", "transformer_blocks_0_ff_net_0_proj")
# SDXL's UNet, two resnets a down block: where its code has resnets, attentions, and what changes the size.
RESNETS = [f"input_blocks_{i}_0" for i in (1, 2, 4, 5, 7, 8)] + [f"output_blocks_{i}_0" for i in range(9)]
RESNETS += ["middle_block_0", "middle_block_2"]
ATTENTIONS = [f"input_blocks_{i}_1" for i in (4, 5, 7, 8)] + [f"output_blocks_{i}_1" for i in range(6)]
ATTENTIONS += ["middle_block_1"]
LAYERS = [f"{path}_{layer}" for path in RESNETS for layer in RESNET]
LAYERS += [f"{path}_{layer}" for path in ATTENTIONS for layer in ATTENTION]
LAYERS += [f"input_blocks_{i}_0_op" for i in (3, 6)] + [f"output_blocks_{i}_2_conv" for i in (2, 5)]
LAYERS += ["time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "input_blocks_0_0", "out_2"]


def test_every_layer_of_sdxl_is_named_as_diffusers_names_it() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils as theirs

    files = {f"lora_unet_{layer}.lora_down.weight": layer for layer in LAYERS}
    # Their converter keeps the order of a block's keys and the tensors, so a tensor tells which key it was.
    marked = {key: torch.tensor(float(number)) for number, key in enumerate(files)}
    renamed = theirs._maybe_map_sgm_blocks_to_diffusers(dict(marked), SimpleNamespace(layers_per_block=2))
    names = {int(value): theirs._convert_unet_lora_key(key) for key, value in renamed.items()}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )
    modules = {name.replace(".", "_") for name, _ in unet.named_modules()}
    missing = {f"{path}_skip_connection" for path in RESNETS}
    for number, layer in enumerate(LAYERS):
        mine = diffusers_module(layer, 2)
        assert mine is not None and (mine in modules or layer in missing), layer
        path, _, rest = names[number].removesuffix(".down.weight").partition(".processor.")
        flat = (f"{path}.{rest}" if rest else path).replace(".", "_").removesuffix("_lora")
        assert mine.removesuffix("_0") == flat.removesuffix("_0"), layer  # theirs: `to_out_lora` of a processor


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),  # SD-1.5: no attention in that block
        ("down_blocks_0_attentions_0_proj_in", None),
        ("input_blocks_4_3_proj_in", None),
        ("middle_block_3_proj_in", None),
        ("input_blocks_4", None),
    ],
)
def test_others(layer: str, name: str | None) -> None:
    assert diffusers_module(layer, 2) == name
