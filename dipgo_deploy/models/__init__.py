"""Model families: what dipgo_deploy knows about each denoiser class, declared without torch."""

from __future__ import annotations

from dipgo_deploy.models.family import (
    BlockSpec,
    CacheKind,
    Granularity,
    InputSpec,
    ModelFamily,
    TextScheme,
    TokenizerSpec,
)
from dipgo_deploy.models.registry import families, family_for

__all__ = [
    "BlockSpec",
    "CacheKind",
    "Granularity",
    "InputSpec",
    "ModelFamily",
    "TextScheme",
    "TokenizerSpec",
    "families",
    "family_for",
]
