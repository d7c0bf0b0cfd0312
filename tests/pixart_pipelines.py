"""Tiny PixArt-alpha and PixArt-Sigma pipelines with random weights: a T5 encoder and its kind of tokenizer."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from family_checks import random_weights
from sd_pipelines import vae
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 24  # features of the text and of the transformer


def t5_tokenizer() -> T5Tokenizer:
    """T5's own class with a small vocabulary: `</s>` behind the text, `<pad>` after it, unknown characters."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(word, -1.0) for word in ("▁a", "▁red", "▁shoe", "▁and", "es")]
    vocabulary += [(letter, -3.0) for letter in string.ascii_lowercase]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    """T5 1.1's gated feed-forward, two layers of two heads."""
    config = T5Config(
        vocab_size=48,
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return random_weights(T5EncoderModel(config))


def transformer(**changes: Any) -> PixArtTransformer2DModel:
    """Two blocks with learned variance, as PixArt-XL/2 has 28."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": WIDTH // 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "sample_size": 128,
    }
    return random_weights(PixArtTransformer2DModel(**{**settings, **changes}))


def save_alpha(folder: Path) -> Path:
    """PixArt-alpha at 1024 pixels: told the picture's size."""
    torch.manual_seed(0)
    _save(PixArtAlphaPipeline, folder, transformer())
    # The published folder is older than the class.
    for file in ("model_index.json", "transformer/config.json"):
        text = (folder / file).read_text()
        assert "PixArtTransformer2DModel" in text
        (folder / file).write_text(text.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    return folder


def save_sigma(folder: Path, **changes: Any) -> Path:
    """PixArt-Sigma at 1024 pixels: not told."""
    torch.manual_seed(1)
    denoiser = transformer(use_additional_conditions=False, interpolation_scale=2, **changes)
    return _save(PixArtSigmaPipeline, folder, denoiser)


def _save(pipeline: Any, folder: Path, denoiser: PixArtTransformer2DModel) -> Path:
    pipeline(
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder
