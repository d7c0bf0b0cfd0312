"""The declared blocks and inputs against the published configurations and the real models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import family_for

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
DIT_XL = {
    "_class_name": "DiTTransformer2DModel",
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}
SHORT = {
    "block_out_channels": [8, 8],
    "cross_attention_dim": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": (1, 3),
    "mid_block_type": None,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET, DIT = "UNet2DConditionModel", "DiTTransformer2DModel"
CASES = [
    (UNET, SD15, "block", 9),
    (UNET, SD15, "layer", 24),
    (UNET, SD21, "block", 9),
    (UNET, SD21, "layer", 24),
    (UNET, SDXL, "block", 7),
    (UNET, SDXL, "layer", 18),
    (UNET, SHORT, "block", 4),
    (UNET, SHORT, "layer", 1 + 1 + 3 + 4 + 2),
    (DIT, DIT_XL, "block", 28),
    (DIT, DIT_XL, "layer", 56),
]


def test_sd15_whole_blocks_are_the_published_nine() -> None:
    names = [spec.name for spec in family_for(UNET).blocks(SD15, "block")]
    downs, ups = [f"down_blocks.{i}" for i in range(4)], [f"up_blocks.{i}" for i in range(4)]
    assert names == [*downs, "mid_block", *ups]


def test_sd15_layers_are_named_after_their_last_module() -> None:
    specs = family_for(UNET).blocks(SD15, "layer")
    names = [spec.name for spec in specs]
    assert names[:3] == ["down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "down_blocks.0.downsamplers.0"]
    assert names[9:12] == ["down_blocks.3.resnets.0", "down_blocks.3.resnets.1", "mid_block"]
    assert names[12:15] == ["up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0"]
    assert names[21:] == ["up_blocks.3.attentions.0", "up_blocks.3.attentions.1", "up_blocks.3.attentions.2"]
    last_of_up_1 = {spec.name: spec.modules for spec in specs}["up_blocks.1.upsamplers.0"]
    assert last_of_up_1 == ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0")


@pytest.mark.parametrize(("class_name", "config", "granularity", "count"), CASES)
def test_blocks_are_disjoint_modules_of_the_real_model(class_name, config, granularity, count) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**settings)
    family = family_for(class_name)
    specs = family.blocks(config, granularity)
    assert len(specs) == count
    # The complete configuration, with tuples and defaults filled in, names the same blocks as the sparse file.
    assert specs == family.blocks(dict(model.config), granularity)
    assert specs == family.blocks(json.loads(json.dumps(config)), granularity)
    modules = dict(model.named_modules())
    owners: dict[int, str] = {}
    for spec in specs:
        assert spec.name in modules
        assert spec.name == spec.modules[-1] or spec.name.startswith("transformer_blocks.")
        for path in spec.modules:
            for parameter in modules[path].parameters():
                assert owners.setdefault(id(parameter), spec.name) == spec.name
    free = {name for name, parameter in model.named_parameters() if id(parameter) not in owners}
    # Outside of all blocks there is only the stem, the head and what embeds time and conditions.
    head = ["conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_out"]
    head += ["pos_embed", "proj_out_1", "proj_out_2", "transformer_blocks.0.norm1.emb"]
    if granularity == "layer":  # shift, scale and gate of a transformer's layers are computed whenever they are used
        head += [f"transformer_blocks.{index}.norm1" for index in range(config.get("num_layers", 0))]
    assert [name for name in free if not name.startswith(tuple(f"{path}." for path in head))] == []


def test_first_dit_block_leaves_the_shared_embedding_to_the_head() -> None:
    first, second, *_ = family_for(DIT).blocks(DIT_XL, "block")
    assert "transformer_blocks.0" not in first.modules
    assert not any("emb" in path for path in first.modules)
    assert second.modules == ("transformer_blocks.1",)
    assert (first.caches, first.residual_inputs) == (("residual", "output"), ("hidden_states",))


def test_unet_inputs() -> None:
    sample, timestep, text = family_for(UNET).inputs(SD15, 2, 64, 32, 77)
    assert (sample.name, sample.shape, sample.dtype, sample.role) == ("sample", (2, 4, 64, 32), "model", "latent")
    assert (timestep.name, timestep.shape, timestep.dtype) == ("timestep", (1,), "float32")
    assert (text.name, text.shape, text.role, text.source) == (
        "encoder_hidden_states",
        (2, 77, 768),
        "condition",
        "text",
    )


def test_sdxl_inputs_have_a_pooled_embedding_and_sizes_in_pixels() -> None:
    *_, states, pooled, sizes = family_for(UNET).inputs(SDXL, 2, 128, 96, 77)
    assert (states.name, states.shape) == ("encoder_hidden_states", (2, 77, 2048))
    assert (pooled.name, pooled.shape, pooled.source) == ("text_embeds", (2, 1280), "text")
    assert (sizes.name, sizes.shape, sizes.dtype, sizes.source) == ("time_ids", (2, 6), "float32", "fixed")
    assert sizes.values == (1024, 768, 0, 0, 1024, 768)


def test_dit_inputs_use_the_last_embedding_as_null_class() -> None:
    sample, timestep, labels = family_for(DIT).inputs(DIT_XL, 4, 32, 32, None)
    assert (sample.name, sample.shape, timestep.shape) == ("hidden_states", (4, 4, 32, 32), (1,))
    assert (labels.name, labels.shape, labels.dtype, labels.source, labels.null) == (
        "class_labels",
        (4,),
        "int64",
        "class",
        1000,
    )
    assert family_for(DIT).latent_channels(DIT_XL) == 4


@pytest.mark.parametrize(
    ("class_name", "change", "call", "words"),
    [
        (UNET, {}, lambda f, c: f.blocks(c, "node"), "granularity 'node'"),
        (DIT, {}, lambda f, c: f.blocks(c, "node"), "granularity 'node'"),
        (UNET, {"up_block_types": ["UpBlock2D"]}, lambda f, c: f.blocks(c, "block"), "4 down_block_types but 1"),
        (UNET, {"layers_per_block": [2]}, lambda f, c: f.blocks(c, "layer"), "layers_per_block has 1"),
        (
            UNET,
            {"down_block_types": ["KDownBlock2D"] * 4},
            lambda f, c: f.blocks(c, "layer"),
            "down_blocks.0 is a KDownBlock2D",
        ),
        (UNET, {"addition_embed_type": "text"}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "addition_embed_type = 'text'"),
        (UNET, {"addition_embed_type": "text_time"}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "no room for a text"),
        (UNET, {**SDXL, "class_embed_type": "timestep"}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "class_embed_type"),
        (UNET, {**SDXL, "encoder_hid_dim_type": "text_proj"}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "encoder_hid_dim"),
        (UNET, {"in_channels": 9}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "in_channels 9, out_channels 4"),
        (UNET, {"cross_attention_dim": [8, 16]}, lambda f, c: f.inputs(c, 1, 8, 8, 4), "cross_attention_dim"),
        (UNET, {}, lambda f, c: f.inputs(c, 1, 8, 8), "text_length"),
        (DIT, {}, lambda f, c: f.inputs(c, 1, 8, 16), "8x16"),
        (DIT, {}, lambda f, c: f.inputs(c, 1, 7, 7), "multiple of 2"),
    ],
)
def test_refusals_are_one_line(class_name, change, call, words) -> None:
    config = {**(SD15 if class_name == UNET else DIT_XL), **change}
    with pytest.raises(UserError) as error:
        call(family_for(class_name), config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_class_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'NoSuchModel'.*DiTTransformer2DModel.*UNet2DConditionModel"):
        family_for("NoSuchModel")


def test_declared_without_torch() -> None:
    code = (
        "import sys, dipgo_deploy.models; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
