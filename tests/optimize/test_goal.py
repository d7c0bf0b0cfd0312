from __future__ import annotations

from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.optimize.goal import COUNTS, Goal


@pytest.mark.parametrize(
    ("goal", "full", "counts"),
    [
        ({"launches": 5}, 50, (5,)),
        ({"speedup": 5}, 50, (10,)),
        ({"speedup": 7}, 50, (7,)),  # 7.14 times as many: at least what was asked for
        ({"quality": 0.9}, 6, (2, 3, 4, 5)),
        ({}, 50, COUNTS),
    ],
)
def test_numbers_of_launches(goal: dict[str, Any], full: int, counts: tuple[int, ...]) -> None:
    chosen = Goal(**goal)
    chosen.check()
    assert chosen.counts(full) == counts


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"launches": 5, "quality": 0.9}, "--launches and --quality: give one of"),
        ({"speedup": 1.0}, "--speedup 1: give a number above 1"),
        ({"speedup": float("nan")}, "--speedup nan"),
        ({"quality": 1.0}, "--quality 1: is an SSIM"),
        ({"minutes": 0.0}, "--minutes 0: give a number above 0"),
        ({"launches": 0}, "launches"),
    ],
)
def test_goals_that_cannot_be(goal: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Goal(**goal).check()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"launches": 8}, "--launches 8: not of a full run of 8 evaluations"),
        ({"speedup": 9.0}, "--speedup 9: not of a full run of 8 evaluations"),
    ],
)
def test_more_launches_than_the_full_run_has(goal: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Goal(**goal).counts(8)


def test_nothing_to_save() -> None:
    with pytest.raises(UserError, match="a full run of 2 evaluations leaves nothing to save"):
        Goal().counts(2)
