"""Documents made to take minutes or gigabytes are refused in one line, within seconds and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = (
    "schedule nested 100",
    "schedule of a million wrong blocks",
)
"""Some that have to be among them; the others are what ``hostile.cases`` makes."""


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, str | None, float, int]]:
    """Name, error, seconds and growth of the peak memory in MB of each case."""
    made = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hostile.py"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [tuple(json.loads(line)) for line in made.stdout.splitlines()]  # type: ignore[misc]


def test_each_is_refused_in_one_line_within_bounds(outcomes: list[tuple[str, str | None, float, int]]) -> None:
    assert {name for name, *_ in outcomes} >= set(NAMES)
    assert len(outcomes) >= 45
    for name, error, seconds, grown in outcomes:
        assert error is not None, f"{name}: accepted"
        assert "NOT A USER ERROR" not in error, f"{name}: {error}"
        assert "\n" not in error and len(error) < 400, name
        assert seconds < 5, f"{name}: {seconds} s"
        assert grown < 400, f"{name}: {grown} MB"
