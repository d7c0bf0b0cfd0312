"""The kinds of files that can be imported, by name. A kind's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Importer, import_with
from dipgo_deploy.schedule.importers.refused import REFUSED, refusal

if TYPE_CHECKING:
    from dipgo_deploy.schedule.builders import PendingTarget, Target
    from dipgo_deploy.schedule.document import Schedule

# Kind -> module of this package that has its ``IMPORTER``.
_HOMES: Mapping[str, str] = {
    "csv": "csv",
    "dipgo-gates": "dipgo_gates",
    "smoothcache": "smoothcache",
    "l2c-router": "l2c_router",
    "npy": "npy",
    "ecad": "ecad",
    "fora": "fora",
    "step-list": "step_list",
    "magcache": "magcache",
    "teacache-wan": "teacache_wan",
    "taylorseer": "taylorseer",
    "openvino-taylorseer": "openvino_taylorseer",
    "meancache": "meancache",
    "spectrum": "spectrum",
    "spectrum-features": "spectrum_features",
    "weights": "weights",
    "cache-dit": "cache_dit",
    "deepcache": "deepcache",
    "cache-diffusion": "cache_diffusion",
    "pab": "pab",
    "tgate": "tgate",
    "delta-dit": "delta_dit",
}

KINDS: tuple[str, ...] = tuple(_HOMES)
WRITTEN = ("smoothcache", "cache-dit")
"""Kinds whose files can be written too."""


def importer(kind: str) -> Importer:
    """The importer of one kind. Raises UserError for a name that is none, and for a method that decides on data."""
    if kind in REFUSED:
        raise UserError(refusal(kind))
    if kind not in _HOMES:
        raise UserError(f"{kind}: no kind of file; give one of {', '.join(KINDS)}")
    found: Importer = import_module(f"dipgo_deploy.schedule.importers.{_HOMES[kind]}").IMPORTER
    return found


def import_schedule(kind: str, path: str | Path, target: Target | PendingTarget, **settings: Any) -> Schedule:
    """The schedule that a file of another program (at most 16 MiB) makes for ``target``; nothing in it is executed.

    kind: one of ``KINDS``. settings: those of that kind, as its command has them as options. Raises UserError, with the
    file's name, for a file that is not of that kind or not for that model.
    """
    return import_with(importer(kind), path, target, **settings)[0]
