"""What is measured of videos: a metric of pictures at each frame, its mean over a video, and its worst frame.

Imports torch: import it inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dipgo_deploy.bench.metrics import Metric
from dipgo_deploy.bench.statistics import Estimate, mean


@dataclass(frozen=True)
class Frames:
    """One metric of n videos of F frames each.

    Attributes:
        values: (n, F).
        higher: whether more is better.
    """

    values: np.ndarray
    higher: bool

    @property
    def per_video(self) -> np.ndarray:
        """The mean over the frames of each video, (n,)."""
        means: np.ndarray = self.values.mean(axis=1)
        return means

    @property
    def worst(self) -> np.ndarray:
        """Which frame of each video is the worst, (n,)."""
        places: np.ndarray = (self.values.argmin if self.higher else self.values.argmax)(axis=1)
        return places

    @property
    def of_worst(self) -> np.ndarray:
        """The value of each video's worst frame, (n,)."""
        values: np.ndarray = self.values[np.arange(len(self.values)), self.worst]
        return values

    @property
    def estimate(self) -> Estimate:
        """The value of the worst frame, over videos."""
        return mean(self.of_worst)

    def as_json(self) -> dict[str, Any]:
        """The mean of each frame over all videos, the worst frame over videos, and the worst of all."""
        video = int(self.of_worst.argmin() if self.higher else self.of_worst.argmax())
        frame = int(self.worst[video])
        least = {"value": float(self.values[video, frame]), "video": video, "frame": frame}
        return {"means": self.values.mean(axis=0).tolist(), "worst": vars(self.estimate), "worst_of_all": least}


def measured(metric: Metric, pictures: Tensor, full: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """A metric of pictures (B, 3, H, W), (B,), or of each frame of videos (B, 3, F, H, W), (B, F); one frame at a time.

    full: the full run's of the same seeds.
    """
    if pictures.ndim == 4:
        found = metric.measure(pictures, full, prompts)
        return np.asarray(found.double().numpy())
    frames = zip(pictures.unbind(2), full.unbind(2), strict=True)
    return np.stack([metric.measure(one, other, prompts).double().numpy() for one, other in frames], axis=1)


def at_frames(videos: np.ndarray, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """One frame of each video, (n, 3, H, W) of (n, 3, F, H, W)."""
    return np.stack([video[:, place] for video, place in zip(videos, places, strict=True)])
