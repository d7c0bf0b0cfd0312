"""Weights of learned judges, random ones of the real classes, in files as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from sd_pipelines import TOKENIZER
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

CONVOLUTIONS: dict[str, dict[int, tuple[int, int, int]]] = {
    "alex": {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)},
    "vgg": {
        place: (before, after, 3)
        for place, before, after in zip(
            (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
            (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512),
            (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
            strict=True,
        )
    },
}
COMPARED = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def lpips_weights(folder: Path, name: str) -> Path:
    """Files as torchvision and the package lpips have them, with weights that are the same on every machine."""

    def waves(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return (
            (torch.sin(torch.arange(size, dtype=torch.float64) * 0.7) * (2 * shape[0] / size) ** 0.5)
            .reshape(shape)
            .float()
        )

    network = {}
    for place, (before, after, side) in CONVOLUTIONS[name].items():
        network[f"features.{place}.weight"] = waves(after, before, side, side)
        network[f"features.{place}.bias"] = torch.full((after,), 0.01)
    network["classifier.6.bias"] = torch.zeros(3)  # what is not looked at may be there
    torch.save(network, folder / ("alexnet-owt-7be5be79.pth" if name == "alex" else "vgg16-397923af.pth"))
    heads = {f"lin{n}.model.1.weight": waves(1, wide, 1, 1).abs() for n, wide in enumerate(COMPARED[name])}
    torch.save(heads, folder / f"{name}.pth")
    return folder


def clip_weights(folder: Path) -> Path:
    """A CLIP model of one layer, pictures of 32x32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
