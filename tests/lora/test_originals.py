"""Layers of FLUX's and Stable Diffusion 3's own code against diffusers' converters of whole checkpoints.

A converter moves, splits and reorders weights, which is linear: what it makes of a change is a change as well.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from dipgo_deploy.lora.originals import kind_of_model, original_layer

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from flow_pipelines import flux_transformer, sd35_transformer  # noqa: E402

WIDTH = 16
FLUX_BLOCK = {
    **{f"{side}_mod.lin": (6 * WIDTH, WIDTH) for side in ("img", "txt")},
    **{f"{side}_attn.qkv": (3 * WIDTH, WIDTH) for side in ("img", "txt")},
    **{f"{side}_attn.proj": (WIDTH, WIDTH) for side in ("img", "txt")},
    **{f"{side}_mlp.0": (4 * WIDTH, WIDTH) for side in ("img", "txt")},
    **{f"{side}_mlp.2": (WIDTH, 4 * WIDTH) for side in ("img", "txt")},
}
FLUX_SINGLE = {
    "linear1": (7 * WIDTH, WIDTH),
    "linear2": (WIDTH, 5 * WIDTH),
    "modulation.lin": (3 * WIDTH, WIDTH),
}
EMBEDDERS = ("time_in", "vector_in", "guidance_in")


def flux_layers():
    layers = {"img_in": (WIDTH, 16), "txt_in": (WIDTH, 24), "final_layer.linear": (16, WIDTH)}
    layers["final_layer.adaLN_modulation.1"] = (2 * WIDTH, WIDTH)
    for embedder in EMBEDDERS:
        layers |= {f"{embedder}.in_layer": (WIDTH, 8), f"{embedder}.out_layer": (WIDTH, WIDTH)}
    for block in range(19):  # as many as the converter wants
        layers |= {f"double_blocks.{block}.{name}": shape for name, shape in FLUX_BLOCK.items()}
    for block in range(38):
        layers |= {f"single_blocks.{block}.{name}": shape for name, shape in FLUX_SINGLE.items()}
    return layers


def sd3_layers():
    layers = {"x_embedder.proj": (WIDTH, 4, 2, 2), "context_embedder": (WIDTH, 24), "final_layer.linear": (16, WIDTH)}
    layers["final_layer.adaLN_modulation.1"] = (2 * WIDTH, WIDTH)
    for embedder in ("t_embedder", "y_embedder"):
        layers |= {f"{embedder}.mlp.0": (WIDTH, 8), f"{embedder}.mlp.2": (WIDTH, WIDTH)}
    for block in range(3):
        last = block == 2
        for side in ("x_block", "context_block"):
            short = last and side == "context_block"
            names = {"attn.qkv": (3 * WIDTH, WIDTH)}
            if not short:
                names |= {"attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
            dual = side == "x_block" and block < 2
            if dual:
                names |= {"attn2.qkv": (3 * WIDTH, WIDTH), "attn2.proj": (WIDTH, WIDTH)}
            rows = 9 if dual else 2 if short else 6
            names["adaLN_modulation.1"] = (rows * WIDTH, WIDTH)
            layers |= {f"joint_blocks.{block}.{side}.{name}": shape for name, shape in names.items()}
    return layers


def mine(weights):
    """What this package's table makes of the weights of the authors' layers."""
    found = {}
    for layer, weight in weights.items():
        original = original_layer(layer.replace(".", "_"))
        if layer == "context_embedder":  # the same in both
            assert original is None
            found["context_embedder.weight"] = weight
            continue
        assert original is not None, layer
        count = len(original.modules)
        if layer.endswith("linear1"):
            parts = np.split(weight, [WIDTH, 2 * WIDTH, 3 * WIDTH])
        else:
            parts = np.split(weight, count)
        assert len(parts) == count
        for module, part in zip(original.modules, parts, strict=True):
            if original.modulation and part.shape[0] == 2 * part.shape[1]:
                part = np.roll(part, part.shape[1], axis=0)
            found[f"{module}.weight"] = part
    return found


def checkpoint(layers):
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in layers.items()}


def tensors(weights, norms):
    """With the biases and norms that a converter looks for."""
    both = {
        f"{name}.{kind}": torch.tensor(w if kind == "weight" else w.reshape(len(w), -1)[:, 0])
        for name, w in weights.items()
        for kind in ("weight", "bias")
    }
    return both | {name: torch.zeros(4) for name in norms}


def compare(got, want, model):
    want = {name: tensor.numpy() for name, tensor in want.items() if name in got}
    assert got.keys() == want.keys()
    for name, weight in got.items():
        np.testing.assert_array_equal(weight, want[name], name)
    # Every linear layer and convolution of the model has a name there.
    paths = {
        re.sub(r"\d+", "0", name)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert paths == {re.sub(r"\d+", "0", name.removesuffix(".weight")) for name in got}


def test_flux():
    weights = checkpoint(flux_layers())
    scales = [
        f"double_blocks.{n}.{side}_attn.norm.{kind}_norm.scale"
        for n in range(19)
        for side in ("img", "txt")
        for kind in ("query", "key")
    ]
    scales += [f"single_blocks.{n}.norm.{kind}_norm.scale" for n in range(38) for kind in ("query", "key")]
    convert = convert_flux_transformer_checkpoint_to_diffusers
    source = tensors(weights, scales)
    # It splits the rows of `linear1` at the published width.
    split = torch.split
    torch.split = lambda t, sizes, dim: split(t, (WIDTH, WIDTH, WIDTH, 4 * WIDTH), dim=dim)
    try:
        want = convert(source)
    finally:
        torch.split = split
    compare(mine(weights), want, flux_transformer())
    for scale in scales:
        (module,) = original_layer(scale.removesuffix(".scale").replace(".", "_")).modules
        assert f"{module}.weight" in want


def test_stable_diffusion_3():
    weights = checkpoint(sd3_layers())
    norms = [
        f"joint_blocks.{n}.{side}.{attention}.ln_{kind}.weight"
        for n in range(3)
        for kind in ("q", "k")
        for side, attention in (("x_block", "attn"), ("context_block", "attn"), ("x_block", "attn2"))
        if attention == "attn" or n < 2
    ]
    want = convert_sd3_transformer_checkpoint_to_diffusers(tensors(weights, norms) | {"pos_embed": torch.zeros(1)})
    compare(mine(weights), want, sd35_transformer())
    for norm in norms:
        (module,) = original_layer(norm.removesuffix(".weight").replace(".", "_")).modules
        assert f"{module}.weight" in want


def test_other_names():
    for name in ("double_blocks_0_other", "transformer_blocks_0_attn_to_q", "joint_blocks_x_block_attn_qkv", "linear1"):
        assert original_layer(name) is None
    assert kind_of_model("single_transformer_blocks_0_attn_to_q") == "FLUX"
    assert kind_of_model("joint_blocks_0_x_block_attn_qkv") == "Stable Diffusion 3"
    assert kind_of_model("input_blocks_4_1_proj_in") == "a UNet"
    assert kind_of_model("transformer_blocks_0_attn_to_q") is None
