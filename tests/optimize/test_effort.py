from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.optimize.effort import (
    LEAST_IMAGES,
    LEAST_JUDGES,
    MOST_FITS,
    MOST_IMAGES,
    MOST_ITERATIONS,
    MOST_JUDGES,
    effort,
    judges_within,
)


@given(
    minutes=st.floats(0.1, 1000),
    evaluation=st.floats(1e-4, 10),
    full=st.integers(4, 100),
    launches=st.lists(st.integers(1, 25), min_size=1, max_size=13),
)
def test_what_is_chosen_takes_no_longer_than_was_given(
    minutes: float, evaluation: float, full: int, launches: list[int]
) -> None:
    try:
        chosen = effort(minutes, evaluation, full, launches, 16)
    except UserError:
        # Only where the least there is takes longer.
        least = (LEAST_IMAGES + LEAST_JUDGES * min(2, len(launches))) * (full + sum(launches))
        assert evaluation * least > 60 * minutes * 0.999
        return
    assert LEAST_IMAGES <= chosen.images <= MOST_IMAGES
    assert LEAST_JUDGES <= chosen.judges <= MOST_JUDGES
    assert 0 <= chosen.fits <= MOST_FITS and 0 <= chosen.iterations <= MOST_ITERATIONS
    assert chosen.minutes <= minutes * (1 + 1e-9)


def test_more_time_gives_no_less() -> None:
    short, long = effort(10, 0.5, 50, [7], 16), effort(100, 0.5, 50, [7], 16)
    assert (long.images, long.fits, long.iterations, long.judges) >= (
        short.images,
        short.fits,
        short.iterations,
        short.judges,
    )
    assert effort(1e6, 0.5, 50, [7], 16).images == MOST_IMAGES


def test_too_little_time_says_how_much_it_takes() -> None:
    with pytest.raises(UserError, match=r"--minutes 1: .*2 s here.*give --minutes 38 or fewer --steps"):
        effort(1, 2.0, 50, [7], 16)


def test_a_schedule_that_is_there_is_judged_within_the_time() -> None:
    assert judges_within(10, 1.0, 50, 10) == 10
    assert judges_within(1e6, 1.0, 50, 10) == MOST_JUDGES
    with pytest.raises(UserError, match=r"--minutes 1: 8 images of 60 .* about 8.0 minutes; give --minutes 8"):
        judges_within(1, 1.0, 50, 10)
