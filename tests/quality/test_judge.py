"""The judge of generated Fashion-MNIST pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dipgo_deploy.quality.judge import CLASS_NAMES, FEATURE_DIM, Judge, feature_statistics, frechet_distance


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, dipgo_deploy.quality.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shapes_and_padding(judge: Judge) -> None:
    small = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)
    padded = np.pad(small, ((0, 0), (2, 2), (2, 2), (0, 0)))
    labels, features = judge.classify(small), judge.features(small)
    assert labels.shape == (5,) and set(labels) <= set(range(len(CLASS_NAMES)))
    assert features.shape == (5, FEATURE_DIM)
    np.testing.assert_array_equal(judge.features(padded), features)


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (np.zeros((1, 28, 28, 3), np.float32), TypeError),
        (np.zeros((1, 28, 28), np.uint8), ValueError),
        (np.zeros((1, 64, 64, 3), np.uint8), ValueError),
    ],
)
def test_other_images_are_refused(judge: Judge, images: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        judge.classify(images)


def test_frechet_distance_of_known_gaussians() -> None:
    mean, covariance = np.zeros(3), np.diag([1.0, 4.0, 9.0])
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    # |shift|^2 + sum of squared differences of the standard deviations (commuting covariances)
    other = np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(mean, covariance, mean + 2, other) == pytest.approx(12 + 1 + 0 + 4)


def test_noise_is_far_from_the_held_out_images(judge: Judge) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 28, 28, 3), dtype=np.uint8)
    mean, covariance = feature_statistics(judge.features(noise))
    assert frechet_distance(mean, covariance, judge.mean, judge.covariance) > 50


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"classifier\.safetensors"):
        Judge.load(tmp_path)
