from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.video import check_video_output, write_video

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def frames(width: int = 32, height: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), colour) for colour in COLOURS]


@pytest.mark.parametrize("width", [32, 33])  # an odd side has no colour at half the size
def test_mp4(tmp_path: Path, width: int) -> None:
    path = tmp_path / "clip.mp4"
    check_video_output(path)
    write_video(path, frames(width), 8)
    with av.open(str(path)) as clip:
        stream = clip.streams.video[0]
        assert (stream.codec.name, stream.width, stream.height, stream.average_rate) == ("h264", width, 16, 8)
        found = [frame.to_ndarray(format="rgb24").mean(axis=(0, 1)) for frame in clip.decode(stream)]
    np.testing.assert_allclose(found, COLOURS, atol=12)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    check_video_output(path)
    write_video(path, frames(), 8)
    with Image.open(path) as clip:
        assert (clip.n_frames, clip.size) == (3, (32, 16))
        for place, colour in enumerate(COLOURS):
            clip.seek(place)
            np.testing.assert_allclose(np.array(clip.convert("RGB")).mean(axis=(0, 1)), colour, atol=2)


def test_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip"
    check_video_output(path)
    write_video(path, frames(), 8)
    assert sorted(entry.name for entry in path.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert Image.open(path / "00001.png").getpixel((0, 0)) == COLOURS[1]
    with pytest.raises(OSError):  # a folder that is there stays as it is
        write_video(path, frames()[:1], 8)
    assert len(list(path.iterdir())) == 3 and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--output clip.png: a video is written to .mp4, .webp, .gif, or as PNG"):
        check_video_output(Path("clip.png"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"--output clip.mp4: .mp4 needs PyAV; pip install .*\[video\]"):
        check_video_output(Path("clip.mp4"))
    check_video_output(Path("clip.webp"))
