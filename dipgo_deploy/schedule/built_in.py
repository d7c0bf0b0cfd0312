"""The schedules that come with the package, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SCHEDULES = Path(__file__).resolve().parents[1] / "assets" / "schedules"


@cache
def built_in_schedules() -> Mapping[str, Path]:
    """Name (that of the file, without its suffix) -> file, in order of name."""
    return {path.stem: path for path in sorted(SCHEDULES.rglob("*.json"), key=lambda path: path.stem)}


def schedule_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """``path``, or the built-in schedule of this name where there is no such file."""
    built_in = built_in_schedules().get(os.fspath(path)) if isinstance(path, str | os.PathLike) else None
    return path if built_in is None or os.path.exists(path) else built_in
