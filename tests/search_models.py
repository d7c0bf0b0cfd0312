"""Tiny models on disk and small block graphs to count by hand, for the tests of the search."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DConditionModel

from dipgo_deploy.plan.graph import Block, BlockGraph, Value

STEPS = 5
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}


def _random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Distinct values everywhere: initial zeros would hide mistakes, and a transformer's would make it do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_dit(folder: Path) -> Path:
    """Three transformer blocks, four classes (two of them named), latents of 4x8x8, a VAE to images of 16x16."""
    torch.manual_seed(1)
    transformer = _random_weights(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=4,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    pipeline = DiTPipeline(transformer=transformer, vae=_random_weights(vae), scheduler=DDIMScheduler(**BETAS))
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["id2label"] = {"0": "one", "2": "other"}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save_unet(folder: Path) -> Path:
    """SD-1.5's kinds of blocks, each once; no VAE, no text encoder."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    _random_weights(model).save_pretrained(folder)  # type: ignore[attr-defined]
    DDIMScheduler(**BETAS).save_pretrained(folder / "scheduler")
    return folder


def chain(cache: str, blocks: int = 3) -> BlockGraph:
    """An embedding (cost 1), blocks in a row (costs 10, 20, ...), and a head (cost 2) that reads the timestep."""
    values = {"embed": Value("embed", 32, frozenset({"latent"}), frozenset({0}))}
    last, made = "embed", []
    for i in range(blocks):
        name = f"b{i}/out0"
        values[name] = Value(name, 32, frozenset({last, "timestep"}), frozenset({i + 1}))
        made.append(Block(f"b{i}", (name,), cache, (last,) if cache == "residual" else ()))  # type: ignore[arg-type]
        last = name
    values["noise_pred"] = Value("noise_pred", 8, frozenset({last, "timestep"}), frozenset({blocks + 1}))
    costs = (1, *(10 * (i + 1) for i in range(blocks)), 2)
    return BlockGraph({"latent": "step", "timestep": "step"}, values, tuple(made), ("noise_pred",), costs)


def skip_graph() -> BlockGraph:
    """A UNet in small: down D0 (cost 10, a skip to U0), down D1 (20), up U1 (30), up U0 (40); the head is free."""
    values = {
        "D0/out0": Value("D0/out0", 8, frozenset({"latent", "timestep"}), frozenset({0})),
        "D1/out0": Value("D1/out0", 8, frozenset({"D0/out0", "timestep"}), frozenset({1})),
        "U1/out0": Value("U1/out0", 8, frozenset({"D1/out0", "timestep"}), frozenset({2})),
        "U0/out0": Value("U0/out0", 8, frozenset({"U1/out0", "D0/out0", "timestep"}), frozenset({3})),
        "noise_pred": Value("noise_pred", 8, frozenset({"U0/out0"}), frozenset()),
    }
    blocks = tuple(Block(name, (f"{name}/out0",)) for name in ("D0", "D1", "U1", "U0"))
    return BlockGraph({"latent": "step", "timestep": "step"}, values, blocks, ("noise_pred",), (10, 20, 30, 40))
