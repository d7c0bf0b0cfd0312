"""Ahead-of-time compiler and runtime for diffusion models that skip blocks on a schedule.

The names below are loaded on first use, so that ``import dipgo_deploy`` itself imports nothing heavy.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dipgo_deploy._version import __version__

if TYPE_CHECKING:
    from dipgo_deploy.integrations.pretrained import Pipeline
    from dipgo_deploy.schedule.document import Schedule

# ONNX Runtime since 1.29 writes a device id below the home folder and sends usage data, unless it is told not to before
# it is imported. Every use of this package comes through here first, and processes that it starts inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Pipeline", "Schedule", "__version__"]

_HOMES = {"Pipeline": "dipgo_deploy.integrations.pretrained", "Schedule": "dipgo_deploy.schedule.document"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
