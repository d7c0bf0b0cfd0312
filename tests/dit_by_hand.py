"""DiT written out as the authors of layer caching write it, from a diffusers model's weights alone.

Learning-to-Cache's ``DiTBlock`` (SmoothCache and FORA cache the same tensors): ``att_out`` and ``mlp_out`` are computed
or taken from the last time; ``x = x + gate_msa * att_out`` and ``x = x + gate_mlp * mlp_out`` with this step's gates
in either case. Nothing of diffusers' forward and nothing of this package runs here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def forward(
    model: nn.Module, latent: Tensor, timestep: Tensor, labels: Tensor, row: Sequence[bool], stored: dict[int, Tensor]
) -> Tensor:
    """One evaluation. row: 2 * depth gates, attention and feed-forward of each block; stored: what they last gave."""
    config = model.config
    side, patch = latent.shape[-1] // config.patch_size, config.patch_size
    hidden = model.pos_embed(latent)
    for index, block in enumerate(model.transformer_blocks):
        modulation = block.norm1.linear(functional.silu(block.norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[:, None].chunk(6, dim=-1)
        if row[2 * index]:
            stored[2 * index] = _attention(block.attn1, _normed(hidden, 1e-6) * (1 + scale_msa) + shift_msa)
        hidden = hidden + gate_msa * stored[2 * index]
        if row[2 * index + 1]:
            normed = _normed(hidden, config.norm_eps) * (1 + scale_mlp) + shift_mlp
            inner = functional.gelu(block.ff.net[0].proj(normed), approximate="tanh")
            stored[2 * index + 1] = block.ff.net[2](inner)
        hidden = hidden + gate_mlp * stored[2 * index + 1]
    embedding = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(functional.silu(embedding))[:, None].chunk(2, dim=-1)
    tokens = model.proj_out_2(_normed(hidden, 1e-6) * (1 + scale) + shift)
    tokens = tokens.reshape(len(latent), side, side, patch, patch, -1)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(len(latent), -1, side * patch, side * patch)


def _normed(hidden: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(hidden, hidden.shape[-1:], eps=eps)


def _attention(module: nn.Module, hidden: Tensor) -> Tensor:
    batch, tokens, _ = hidden.shape
    query, key, value = (
        part(hidden).reshape(batch, tokens, module.heads, -1).transpose(1, 2)
        for part in (module.to_q, module.to_k, module.to_v)
    )
    weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
    return module.to_out[0]((weights @ value).transpose(1, 2).reshape(batch, tokens, -1))
