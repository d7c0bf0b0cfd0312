"""Loops that start from a picture: the matrix against the scheduler's own loop, and where they begin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.image_start import rounded_down, rounded_up
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
    begin = begin_of(scheduler, 10, strength, rounded_up)
    assert check_linear(scheduler, 10, begin=begin) <= 1e-6
    matrix, full = sampler_matrix(scheduler, 10, begin=begin), sampler_matrix(scheduler, 10)
    assert matrix.image and not full.image
    assert np.array_equal(matrix.timesteps, full.timesteps[begin:])
    # The picture's column is used from the first row on, and all of it is there.
    assert matrix.rows.shape == (len(matrix.timesteps), 1 + matrix.predictions + 1 + matrix.noises)
    assert matrix.rows[0, 0] > 0 and matrix.rows[0, 1 + matrix.predictions] > 0


@pytest.mark.parametrize("strength", [0.05, 0.55, 1.0])
@pytest.mark.parametrize("sampler", ["flow-euler", "flow-heun", "flow-unipc", "flow-dpm++2m"])
def test_flow_matching(sampler: str, strength: float) -> None:
    scheduler = make_scheduler(sampler, {"shift": 3.0})
    begin = begin_of(scheduler, 10, strength, rounded_down)
    assert check_linear(scheduler, 10, begin=begin) <= 1e-6
    matrix = sampler_matrix(scheduler, 10, begin=begin)
    # Of the first latent: the noise's share and what is left of the picture.
    noise, picture = matrix.rows[0, 0], matrix.rows[0, 1 + matrix.predictions]
    assert noise == pytest.approx(1 - picture, abs=1e-6) and 0 <= picture < 1
    assert (strength == 1.0) == (begin == 0) and (picture < 1e-3) == (begin == 0)


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
    assert tuple(begin_of(scheduler, 10, strength, rounded_up) for strength in (0.3, 0.6, 1.0)) == begins
    assert begin_of(scheduler, 10, 0.69, rounded_up) == begins[1]
    assert scheduler.timesteps is before


@pytest.mark.parametrize("pipeline", [StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline])
def test_steps_left_out_by_stable_diffusion(pipeline: Any) -> None:
    assert_left_out(rounded_up, pipeline)


@pytest.mark.parametrize("pipeline", [StableDiffusion3Img2ImgPipeline, FluxImg2ImgPipeline])
def test_steps_left_out_by_flow_pipelines(pipeline: Any) -> None:
    assert_left_out(rounded_down, pipeline)


def assert_left_out(skipped: Callable[[int, float], int], pipeline: Any) -> None:
    """Every strength in steps of 0.01, against the pipeline's own ``get_timesteps``."""
    for steps in (1, 4, 10, 28, 50):
        scheduler = SimpleNamespace(timesteps=np.arange(steps), order=1, config={})
        for strength in np.arange(1, 101) / 100:
            owner = SimpleNamespace(scheduler=scheduler)
            left, _ = pipeline.get_timesteps(owner, steps, float(strength), device="cpu")
            assert skipped(steps, float(strength)) == steps - len(left), (steps, strength)


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
        begin_of(Odd(), 10, 0.5, rounded_up)
