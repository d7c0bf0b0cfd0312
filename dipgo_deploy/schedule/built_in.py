"""The schedules that come with the package, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

SCHEDULES = Path(__file__).resolve().parents[1] / "assets" / "schedules"


@cache
def built_in_schedules() -> Mapping[str, Path]:
    """Name (that of the file, without its suffix) -> file, in order of name."""
    return {path.stem: path for path in sorted(SCHEDULES.rglob("*.json"), key=lambda path: path.stem)}


def schedule_file(path: Path) -> Path:
    """``path``, or the built-in schedule of this name where there is no such file."""
    return path if path.exists() else built_in_schedules().get(str(path), path)
