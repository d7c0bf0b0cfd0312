"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from dipgo_deploy.files import remove_unfinished, written_whole


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path: Path) -> None:
    """Of the names that are given alone: another process may be writing the others, and a long name is cut."""
    long = "a" * 60 + ".png"
    for name in ("1.png", "2.png", "clip", long):
        with written_whole(tmp_path / name):
            (found,) = tmp_path.glob(f".{name[:40]}.*.partial")
        (tmp_path / name).rename(found)
    (tmp_path / ".clip.abcd_123.partial").mkdir()
    (tmp_path / ".clip.abcd_123.partial" / "0.png").touch()
    (tmp_path / "1.png").touch()
    remove_unfinished(tmp_path, {"1.png", "clip", long, "a" * 40})
    left = sorted(path.name[:6] for path in tmp_path.iterdir())
    assert left == [".2.png", ".aaaaa", "1.png"]
