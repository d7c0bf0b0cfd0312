"""Loops that start from a picture: the matrix against the scheduler's own loop, and where they begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler import ImageStart, begin_of, check_linear, make_scheduler, sampler_matrix
from dipgo_deploy.sampler.start import first_latent

CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    "sampler", ["ddim", "pndm", "dpm++2m", "dpm++2m-karras", "euler", "heun", "unipc", "ddpm", "lcm"]
)
def test_the_matrix_is_the_schedulers_loop(sampler: str, strength: float) -> None:
    scheduler = make_scheduler(sampler, CONFIG)
    begin = begin_of(scheduler, 10, strength)
    assert check_linear(scheduler, 10, begin=begin) <= 1e-6
    matrix, full = sampler_matrix(scheduler, 10, begin=begin), sampler_matrix(scheduler, 10)
    assert matrix.image and not full.image
    assert np.array_equal(matrix.timesteps, full.timesteps[begin:])
    # The picture's column is used from the first row on, and all of it is there.
    assert matrix.rows.shape == (len(matrix.timesteps), 1 + matrix.predictions + 1 + matrix.noises)
    assert matrix.rows[0, 0] > 0 and matrix.rows[0, 1 + matrix.predictions] > 0


@pytest.mark.parametrize("launched", [(0, 0, 1, 1, 1, 2), (0, 1, 2, 3, 4, 5)])
def test_reused_predictions(launched: tuple[int, ...]) -> None:
    scheduler = make_scheduler("ddim", CONFIG)
    assert check_linear(scheduler, 10, launched, begin=4) <= 1e-6
    assert sampler_matrix(scheduler, 10, launched, begin=4).predictions == launched[-1] + 1


@pytest.mark.parametrize(("sampler", "begins"), [("ddim", (7, 4, 0)), ("pndm", (7, 4, 0)), ("heun", (14, 8, 0))])
def test_begin_is_that_of_diffusers(sampler: str, begins: tuple[int, ...]) -> None:
    """``get_timesteps`` of the pipeline: whole steps, times the scheduler's order."""
    scheduler = make_scheduler(sampler, CONFIG)
    before = scheduler.timesteps  # None for PNDM, before its steps are set
    assert tuple(begin_of(scheduler, 10, strength) for strength in (0.3, 0.6, 1.0)) == begins
    assert begin_of(scheduler, 10, 0.69) == begins[1]
    assert scheduler.timesteps is before


def test_the_first_latent_is_the_picture_with_noise() -> None:
    scheduler = make_scheduler("euler", CONFIG)
    scheduler.set_timesteps(10)
    noise, picture = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    latent, timesteps = first_latent(scheduler, noise, ImageStart(4, picture))
    assert torch.allclose(latent, picture + scheduler.sigmas[4] * noise)
    assert torch.equal(timesteps, scheduler.timesteps[4:])


def test_a_scheduler_that_adds_no_noise_is_refused() -> None:
    class Odd:
        config: dict[str, Any] = {}

    with pytest.raises(UserError, match="sampler Odd: cannot start from a picture"):
        begin_of(Odd(), 10, 0.5)
