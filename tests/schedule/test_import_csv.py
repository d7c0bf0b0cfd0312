from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.csv import read_gates
from dipgo_deploy.schedule.importers.registry import import_schedule

NAMES = ("a", "b", "c")


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1), st.booleans())
def test_written_gates_are_read_back(gates: list[tuple[bool, bool, bool]], header: bool) -> None:
    lines = [",".join(NAMES)] if header else []
    lines += [", ".join("01"[kept] for kept in row) for row in gates]
    assert read_gates("\r\n".join(lines).encode(), NAMES) == tuple(gates)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,1,1\n1,2,0", "evaluation 1, block b: '2' is not 0 or 1"),
        ("1,1,1\n1,,0", "evaluation 1, block b: '' is not 0 or 1"),
        ("1,1,1\n1,0.5,0", "evaluation 1, block b: '0.5' is not 0 or 1"),
        ("1,1,1\n1,True,0", "evaluation 1, block b: 'True' is not 0 or 1"),
        ("1,1,1\n1", "evaluation 1 has 1 cells, block b is the first without one"),
        ("1,1,1\n1,1,1,1", "evaluation 1 has 4 cells, but the model has 3 blocks"),
        ("a,c,b\n1,1,1", "blocks: c stands at position 1, where the model runs b"),
        ("a,b\n1,1,1", "blocks: c of this model is missing"),
        ("a,b,x\n1,1,1", "blocks: x is no block of this model"),
        ("a,b,c\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_mistakes_name_step_and_block(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_gates(text.encode(), NAMES)
    assert words in str(caught.value)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UserError, match="byte 1 is not UTF-8"):
        read_gates(b"1\xff", NAMES)


def test_the_file_becomes_a_schedule(tmp_path: Path, unet_target) -> None:
    path = tmp_path / "keep.csv"
    path.write_text("1,1,1\n0,0,0\n1,0,1\n")
    schedule = import_schedule("csv", path, unet_target(3, NAMES))
    assert schedule.keep == ("111", "000", "101")
    assert schedule.provenance["method"] == "import csv"
    assert schedule.provenance["parameters"]["file"] == "keep.csv"
    assert "last_row_repeated" not in schedule.provenance["parameters"]


def test_one_row_short_repeats_the_last_and_says_so(tmp_path: Path, unet_target) -> None:
    path = tmp_path / "keep.csv"
    path.write_text("1,1,1\n0,0,0\n1,0,1\n")
    schedule = import_schedule("csv", path, unet_target(4, NAMES))
    assert schedule.keep == ("111", "000", "101", "101")
    assert schedule.provenance["parameters"]["last_row_repeated"] == 1


@pytest.mark.parametrize("steps", [2, 5])
def test_other_lengths_are_refused(tmp_path: Path, unet_target, steps: int) -> None:
    path = tmp_path / "keep.csv"
    path.write_text("1,1,1\n0,0,0\n1,0,1\n")
    with pytest.raises(UserError) as caught:
        import_schedule("csv", path, unet_target(steps, NAMES))
    assert str(caught.value).startswith(f"{path}: steps: 3 rows")
    assert f"evaluates the denoiser {steps} times" in str(caught.value)


def test_a_cache_read_before_it_was_written_is_refused(tmp_path: Path, unet_target) -> None:
    path = tmp_path / "keep.csv"
    path.write_text("1,0,1\n1,1,1\n")
    with pytest.raises(UserError) as caught:
        import_schedule("csv", path, unet_target(2, NAMES))
    assert f"{path}: keep: evaluation 0, block b: its cache is read before" in str(caught.value)
