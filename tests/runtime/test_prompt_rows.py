"""Files of prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.prompt_rows import PromptRow, batches, jobs_of, read_rows, shard
from dipgo_deploy.runtime.row_calls import call_arguments


def test_the_three_kinds_say_the_same(tmp_path: Path) -> None:
    contents = {
        "a.txt": "a bag\n\n a boot \n",
        "a.csv": "prompt,seed\na bag,\na boot,\n",
        "a.jsonl": '{"prompt": "a bag"}\n\n{"prompt": "a boot"}\n',
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        assert read_rows(tmp_path / name) == [PromptRow(prompt="a bag"), PromptRow(prompt="a boot")]
    (tmp_path / "b.csv").write_text('\ufeffprompt,seed,class_label\n"a, ""b""",3,\n,,boot\n', encoding="utf-8")
    assert read_rows(tmp_path / "b.csv") == [PromptRow(prompt='a, "b"', seed=3), PromptRow(class_label="boot")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "has no row"),
        ("a.txt", b"\xff", "byte 0 is not UTF-8"),
        ("a.doc", b"a", r"give a file in \.txt, \.csv, \.jsonl"),
        ("a.csv", b"prompt\na,b\n", "line 2: has more fields"),
        ("a.csv", b"prompt,seed\na,b\n", "line 2: seed"),
        ("a.csv", b'prompt\n"a', "unexpected end"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n[]', "line 2: not a JSON object"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / f"other-{name}" if name != "a.doc" else tmp_path / "other.txt")


@given(st.lists(st.integers(0, 2)), st.integers(1, 5), st.integers(1, 4))
def test_every_row_is_in_one_part_and_one_batch(scales: list[int], parts: int, most: int) -> None:
    rows = [PromptRow(prompt="a", guidance_scale=2.0 + scale) for scale in scales]
    jobs = jobs_of(rows, Path("out"), "{index:03d}-{seed}.png", 7)
    shares = [shard(jobs, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(job.index for share in shares for job in share) == list(range(len(rows)))
    for share in shares:
        calls = batches(share, most)
        assert sorted((job for call in calls for job in call), key=lambda job: job.index) == share
        assert all(len(call) <= most and len({job.row.settings for job in call}) == 1 for call in calls)
        assert len(calls) == sum(-(-count // most) for count in Counter(job.row.settings for job in share).values())
        assert [call[0].index for call in calls] == sorted(call[0].index for call in calls)
    assert [job.path.name for job in jobs] == [f"{index:03d}-{7 + index}.png" for index in range(len(rows))]


def test_what_a_row_leaves_out_no_other_row_of_its_call_gives_it() -> None:
    """A model may take zeros where there is no negative prompt, which the empty text is not."""
    rows = [PromptRow(prompt="a"), PromptRow(prompt="b", negative_prompt=""), PromptRow(prompt="c", class_label="3")]
    rows += [PromptRow(negative_prompt="d"), PromptRow(prompt="e")]
    calls = batches(jobs_of(rows, Path("out"), "{index}.png", 0), 8)
    found = [call_arguments([job.row for job in call], {"num_frames": 9}) for call in calls]
    assert [(one["prompt"], one["negative_prompt"], one["class_labels"]) for one in found] == [
        (["a", "e"], None, None),
        (["b"], [""], None),
        (["c"], None, [3]),
        (None, ["d"], None),
    ]
    assert call_arguments(rows[:1], {"negative_prompt": "f", "height": 64})["negative_prompt"] == ["f"]
    assert {one["num_frames"] for one in found} == {9}
