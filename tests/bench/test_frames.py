from __future__ import annotations

import numpy as np
import pytest
import torch

from dipgo_deploy.bench.frames import Frames, at_frames, measured
from dipgo_deploy.bench.metrics import GMSD, SSIM, Metric


def test_the_worst_frame_is_the_lowest_or_the_highest() -> None:
    values = np.array([[0.9, 0.5, 0.7], [0.8, 0.9, 0.6]])
    likeness, distance = Frames(values, higher=True), Frames(values, higher=False)
    assert likeness.worst.tolist() == [1, 2] and distance.worst.tolist() == [0, 1]
    assert likeness.per_video.tolist() == pytest.approx([0.7, 2.3 / 3])
    plain = likeness.as_json()
    assert plain["means"] == pytest.approx([0.85, 0.7, 0.65])
    assert plain["worst"]["value"] == pytest.approx(0.55)
    assert plain["worst_of_all"] == {"value": 0.5, "video": 0, "frame": 1}
    assert distance.as_json()["worst_of_all"] == {"value": 0.9, "video": 0, "frame": 0}


def test_a_metric_of_pictures_is_taken_at_each_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    videos, full = (torch.rand(2, 3, 4, 16, 16, generator=generator) for _ in range(2))
    for metric in (SSIM, GMSD):
        found = measured(metric, videos, full, ["a", "b"])
        assert found.shape == (2, 4)
        for frame in range(4):
            alone = measured(metric, videos[:, :, frame], full[:, :, frame], ["a", "b"])
            np.testing.assert_array_equal(found[:, frame], alone)
    seen: list[tuple[str, ...]] = []
    judge = Metric("judge", True, 1, lambda one, other, prompts: seen.append(tuple(prompts)) or one.mean((1, 2, 3)))
    assert measured(judge, videos, full, ["a", "b"]).shape == (2, 4) and set(seen) == {("a", "b")}


def test_frames_are_chosen_of_each_video() -> None:
    videos = np.arange(2 * 3 * 4).reshape(2, 3, 4, 1, 1)
    np.testing.assert_array_equal(at_frames(videos, [3, 0])[:, :, 0, 0], [[3, 7, 11], [12, 16, 20]])
