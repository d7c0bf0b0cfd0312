"""Results as files: JSON, and beside it a table for readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def with_earlier(
    path: Path, rows: Sequence[dict[str, Any]], key: Callable[[Mapping[str, Any]], Any]
) -> list[dict[str, Any]]:
    """The rows that ``write_results`` wrote to ``path`` earlier, those of another ``key`` than any of ``rows``, then
    these."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = [key(row) for row in rows]
    return [row for row in (known["rows"] if isinstance(known, dict) else known) if key(row) not in new] + [*rows]


def write_results(path: Path, facts: Mapping[str, Any] | Sequence[Any], text: str) -> None:
    """Write ``facts`` to ``path`` (.json) and ``text`` to the file of the same stem with .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ruler, *rows)) + "\n"


def with_quartiles(values: Mapping[str, float], digits: int) -> str:
    """``median (q1-q3)``."""
    return f"{values['median']:.{digits}f} ({values['q1']:.{digits}f}-{values['q3']:.{digits}f})"
