"""Attention whose configuration asks for float32, kept in float32 in a half-precision export."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def keep_upcast_attention(denoiser: nn.Module) -> int:
    """Let the attentions with ``upcast_attention`` (SD-2.1) compute their scores and softmax in float32.

    diffusers' default processor ignores the setting, because the fused kernels accumulate in float32 anyway. An
    exported graph has a product, a softmax and a product instead, and scores in float16 overflow above 65504. Returns
    the number of attentions that were changed.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    changed = 0
    for module in denoiser.modules():
        if isinstance(module, Attention) and module.upcast_attention and type(module.processor) is AttnProcessor2_0:
            module.set_processor(AttnProcessor())
            # The module's own adds an uninitialised tensor times zero, which stays in the exported graph.
            module.get_attention_scores = partial(_scores, module.scale)
            changed += 1
    return changed


def _scores(scale: float, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Attention probabilities (B*heads, Lq, Lk) in the dtype of ``query`` (B*heads, Lq, d)."""
    product = (query.float() * scale) @ key.float().transpose(-1, -2)
    if attention_mask is not None:
        product = product + attention_mask
    return product.softmax(dim=-1).to(query.dtype)
