"""How a page says that this package made it."""

from __future__ import annotations

from pathlib import Path

MAKER = "dipgo_deploy"
# Of a file: the mark is in its head.
_START = 4096


def is_own_page(path: Path) -> bool:
    """Whether a file is a page that this package made; raises OSError where it cannot be read."""
    if path.suffix != ".html" or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return f'<meta name="generator" content="{MAKER}">'.encode() in file.read(_START)
