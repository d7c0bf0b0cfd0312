"""A launch whose model answers a small change of the latent with a large one is judged by what it makes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dipgo_deploy.bundle.names import PREDICTION, cache_input, cache_output
from dipgo_deploy.compare.loop import _judged_alone, _key, _Step
from dipgo_deploy.compare.metrics import Tolerance, tensor_error
from dipgo_deploy.supernet.gated import CacheState

TOLERANCE = Tolerance(1e-4)
LATENT = np.ones((1, 4, 2, 2), np.float32)
CACHE = cache_output("output", "mid/out0")


class Steep:
    """A model that makes a thousand times what its latent is."""

    asked = 0

    def on_latent(self, latent: np.ndarray) -> tuple[torch.Tensor, CacheState]:
        self.asked += 1
        made = torch.from_numpy((latent - 1) * 1000 + 1)
        return made, CacheState({"mid": [made]})


def step(engine: np.ndarray, latent: np.ndarray) -> _Step:
    """An evaluation of the steep model in which the engine's latent is a little off and it made ``engine``."""
    at = _Step(["v00"], [tensor_error("latent", latent, LATENT, TOLERANCE)], [], latent)
    for name in (CACHE, PREDICTION):
        at.made.append(tensor_error(name, engine, LATENT, TOLERANCE))
        if not at.made[-1].passed:
            at.beyond[name] = engine
    return at


def test_what_a_launch_inherits_is_not_its_error() -> None:
    latent = LATENT + 5e-6
    at = step((latent - 1) * 1000 + 1 + 1e-6, latent)
    assert not any(error.passed for error in at.made)
    carried: dict[object, np.ndarray] = {}
    judged = _judged_alone(at, Steep(), carried, TOLERANCE)  # type: ignore[arg-type]
    assert all(error.passed and error.made is not None and error.made < 1e-5 for error in judged)
    assert all(error.relative > 1e-3 for error in judged)  # what was found is still said
    # Whoever reads the cache at a later evaluation gets what was written.
    assert _key(cache_input("output", "mid/out0")) in carried


@pytest.mark.parametrize("made", [0.0, 3e-4])
def test_an_error_of_its_own_stays_one(made: float) -> None:
    latent = LATENT + 5e-6
    at = step(((latent - 1) * 1000 + 1) * np.float32(1 + made) if made else LATENT * 2, latent)
    judged = _judged_alone(at, Steep(), {}, TOLERANCE)  # type: ignore[arg-type]
    assert not any(error.passed for error in judged)


def test_a_latent_beyond_tolerance_is_named_and_nothing_excused() -> None:
    model = Steep()
    latent = LATENT + 5e-4
    at = step((latent - 1) * 1000 + 1, latent)
    judged = _judged_alone(at, model, {}, TOLERANCE)  # type: ignore[arg-type]
    assert not any(error.passed for error in judged) and not model.asked
