"""A fitted solver with the rows of a stock sampler is that sampler, in every loop that runs one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler import evaluations, make_scheduler, sampler_matrix
from dipgo_deploy.sampler.fitted import FittedSolver
from dipgo_deploy.sampler.loop import run_loop
from dipgo_deploy.sampler.matrix import SamplerMatrix

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def solver_of(matrix: SamplerMatrix) -> dict[str, Any]:
    return {
        "timesteps": matrix.timesteps.tolist(),
        "rows": matrix.rows.tolist(),
        "final": matrix.final.tolist(),
        "noises": matrix.noises,
    }


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++2m", "euler-a", "heun", "ddpm"])
def test_it_has_the_matrix_that_it_was_made_of(name: str) -> None:
    stock = sampler_matrix(make_scheduler(name, BETAS), 5)
    fitted = sampler_matrix(FittedSolver(solver_of(stock)), 5)
    np.testing.assert_allclose(fitted.rows, stock.rows, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fitted.final, stock.final, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(fitted.timesteps, stock.timesteps, rtol=1e-6)
    assert (fitted.noises, fitted.predictions) == (stock.noises, stock.predictions)


@pytest.mark.parametrize("name", ["ddim", "euler-a"])
def test_its_loop_is_the_samplers(name: str) -> None:
    scheduler = make_scheduler(name, BETAS)
    solver = FittedSolver(solver_of(sampler_matrix(scheduler, 4)))
    initial = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(at_work: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        draw = lambda: torch.randn(initial.shape, generator=noise)  # noqa: E731
        return run_loop(at_work, 4, initial, lambda _, latent, t: torch.tanh(latent + t / 1000), draw).final

    torch.testing.assert_close(run(solver), run(scheduler), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(solver), run(solver), rtol=0, atol=0)  # no history is left from the loop before


def test_it_counts_its_own_evaluations() -> None:
    solver = FittedSolver(solver_of(sampler_matrix(make_scheduler("ddim", BETAS), 3)))
    assert evaluations(solver, 50) == 3


def test_a_picture_is_refused_where_none_was_fitted() -> None:
    solver = FittedSolver(solver_of(sampler_matrix(make_scheduler("ddim", BETAS), 3)))
    with pytest.raises(ValueError, match="not fitted to start from a picture"):
        solver.add_noise(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_a_picture_it_was_fitted_to_has_to_be_there() -> None:
    rows = {"timesteps": [500], "rows": [[0.5, 0, 0.8]], "final": [0.1, 0.2, 0.4], "picture": True}
    with pytest.raises(UserError, match="fitted to start from a picture, and there is none"):
        sampler_matrix(FittedSolver(rows), 1)


def test_a_picture_it_was_fitted_to_is_a_column() -> None:
    solver = {
        "timesteps": [500, 200],
        "rows": [[0.5, 0, 0, 0.8], [0.3, 0.2, 0, 0.6]],
        "final": [0.1, 0.2, 0.3, 0.4],
        "picture": True,
    }
    at_work = FittedSolver(solver)
    noise, picture = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    latent = at_work.add_noise(picture, noise, at_work.timesteps[:1])
    assert latent.item() == pytest.approx(0.5 * 2 + 0.8 * 3)
    first, second = torch.full_like(noise, 5.0), torch.full_like(noise, 7.0)
    (latent,) = at_work.step(first, at_work.timesteps[0], latent, return_dict=False)
    assert latent.item() == pytest.approx(0.3 * 2 + 0.2 * 5 + 0.6 * 3)
    assert at_work.step(second, at_work.timesteps[1], latent).prev_sample.item() == pytest.approx(
        0.1 * 2 + 0.2 * 5 + 0.3 * 7 + 0.4 * 3
    )
