"""A small Fashion-MNIST classifier that judges generated images.

The judge answers two questions about a batch of images: which of the ten classes each one is recognised as, and how
far (Frechet distance) the classifier's features of the batch lie from those of 10,000 held-out images. Weights and
statistics are committed under ``dipgo_deploy/assets/judge``; ``tools/train_fashion.py`` makes them.

Importing this module does not import torch: it is loaded by the first call that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

CLASS_NAMES: tuple[str, ...] = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The ten class names; a name's position is its label."""

IMAGE_SIZE = 32
"""Height and width, in pixels, of the images that the network sees."""

FEATURE_DIM = 64
"""Length of one image's feature vector."""

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "judge"
"""The folder of the committed classifier and statistics."""

WEIGHTS_NAME = "classifier.safetensors"
STATS_NAME = "heldout_stats.npz"


def build_network() -> nn.Sequential:
    """Build the untrained classifier.

    Returns:
        A module from float32 ``(N, 1, 32, 32)`` in [-1, 1] to float32 logits ``(N, 10)``. All but its last two
        layers (dropout, linear) give the ``(N, 64)`` features.
    """
    from torch import nn

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 24),
        nn.MaxPool2d(2),
        *block(24, 48),
        *block(48, 64),
        nn.MaxPool2d(2),
        *block(64, 96),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96 * 16, FEATURE_DIM),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(FEATURE_DIM, len(CLASS_NAMES)),
    )


def to_input(images: NDArray[np.uint8]) -> Tensor:
    """Turn images into the network's input: grey, padded to 32x32 with black, scaled to [-1, 1].

    Args:
        images: uint8 ``(N, H, W, 3)``, values 0 to 255, with H = W = 28 or 32. The three channels are averaged.

    Returns:
        float32 ``(N, 1, 32, 32)`` on the CPU.

    Raises:
        TypeError: ``images`` is not a uint8 array.
        ValueError: ``images`` has another shape.
    """
    import torch

    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise TypeError(f"images must be a uint8 numpy array, not {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.shape[1:] not in ((28, 28, 3), (IMAGE_SIZE, IMAGE_SIZE, 3)):
        raise ValueError(f"images must be (N, 28, 28, 3) or (N, 32, 32, 3), not {images.shape}")
    grey = images.astype(np.float32).mean(axis=3) / 127.5 - 1.0
    margin = (IMAGE_SIZE - images.shape[1]) // 2
    grey = np.pad(grey, ((0, 0), (margin, margin), (margin, margin)), constant_values=-1.0)
    return torch.from_numpy(np.ascontiguousarray(grey[:, None]))


def feature_statistics(features: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of a set of feature vectors.

    Args:
        features: any float dtype, ``(N, D)`` with N >= 2.

    Returns:
        float64 mean ``(D,)`` and float64 sample covariance ``(D, D)``.

    Raises:
        ValueError: ``features`` is not two-dimensional, or has fewer than two rows.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(f"features must be (N, D) with N >= 2, not {rows.shape}")
    return rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet_distance(
    mean_a: NDArray[np.float64], cov_a: NDArray[np.float64], mean_b: NDArray[np.float64], cov_b: NDArray[np.float64]
) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians; 0 when they are equal.

    Args:
        mean_a: ``(D,)`` mean of the first.
        cov_a: ``(D, D)`` covariance of the first, symmetric and positive semi-definite.
        mean_b: ``(D,)`` mean of the second.
        cov_b: ``(D, D)`` covariance of the second.

    Returns:
        The distance, in squared units of the features, never negative.

    Raises:
        ValueError: the shapes do not match.
    """
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape or cov_a.shape != (mean_a.size, mean_a.size):
        raise ValueError(f"shapes differ: {mean_a.shape}, {cov_a.shape}, {mean_b.shape}, {cov_b.shape}")
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    trace_cross = np.sqrt(np.clip(cross, 0.0, None)).sum()
    gap = mean_a - mean_b
    return max(0.0, float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * trace_cross))


class Judge:
    """The trained classifier with the held-out images' feature statistics. Make one with :meth:`load`."""

    def __init__(self, network: nn.Sequential, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> None:
        """Wrap a trained network.

        Args:
            network: what :func:`build_network` builds, trained; it is put into evaluation mode.
            mean: float64 ``(64,)``, mean of the held-out images' features.
            covariance: float64 ``(64, 64)``, their covariance.
        """
        self.network = network.eval()
        self.mean = mean
        self.covariance = covariance

    @classmethod
    def load(cls, folder: str | Path = DEFAULT_FOLDER) -> Judge:
        """Load the committed judge, on the CPU.

        Args:
            folder: holds ``classifier.safetensors`` and ``heldout_stats.npz``.

        Returns:
            The judge.

        Raises:
            FileNotFoundError: one of the two files is missing.
            RuntimeError: the weights are not those of :func:`build_network`.
        """
        from safetensors.torch import load_file

        weights, stats = Path(folder) / WEIGHTS_NAME, Path(folder) / STATS_NAME
        for path in (weights, stats):
            if not path.is_file():
                raise FileNotFoundError(f"the judge needs {path}")
        network = build_network()
        network.load_state_dict(load_file(weights))
        with np.load(stats, allow_pickle=False) as arrays:
            return cls(network, arrays["mean"].astype(np.float64), arrays["covariance"].astype(np.float64))

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Say which class each image is recognised as.

        Args:
            images: as for :func:`to_input`.

        Returns:
            int64 ``(N,)``, indices into :data:`CLASS_NAMES`.

        Raises:
            TypeError: see :func:`to_input`.
            ValueError: see :func:`to_input`.
        """
        return self.look(images)[1]

    def look(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What ``features`` and ``classify`` give, in one go."""
        features, logits = self._run(images)
        return features, logits.argmax(axis=1)

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Give each image's feature vector (the classifier's last hidden layer, after its ReLU).

        Args:
            images: as for :func:`to_input`.

        Returns:
            float32 ``(N, 64)``, not negative.

        Raises:
            TypeError: see :func:`to_input`.
            ValueError: see :func:`to_input`.
        """
        return self._run(images)[0]

    def frechet(self, images: NDArray[np.uint8]) -> float:
        """Frechet distance from the images to the 10,000 held-out images (1,000 a class).

        The estimate is biased upwards for few images: compare sets of one size only.

        Args:
            images: as for :func:`to_input`, N >= 2, in equal parts of every class to compare with the statistics.

        Returns:
            The squared distance between the two Gaussians fitted to the features.

        Raises:
            TypeError: see :func:`to_input`.
            ValueError: see :func:`to_input`; or fewer than two images.
        """
        mean, covariance = feature_statistics(self.features(images))
        return frechet_distance(mean, covariance, self.mean, self.covariance)

    def _run(self, images: NDArray[np.uint8], batch: int = 500) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        import torch

        data = to_input(images)
        features, logits = [np.zeros((0, FEATURE_DIM), np.float32)], [np.zeros((0, len(CLASS_NAMES)), np.float32)]
        with torch.no_grad():
            for part in data.split(batch) if len(data) else ():
                hidden = self.network[:-2](part)
                features.append(hidden.numpy())
                logits.append(self.network[-2:](hidden).numpy())
        return np.concatenate(features), np.concatenate(logits)
