from __future__ import annotations

import random

import pytest
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.search.evaluate import Objective, full_latents, image_objective, sample
from dipgo_deploy.search.problem import Pair, Problem
from dipgo_deploy.supernet import Supernet, run_loop

PAIRS = (Pair(0, 1), Pair(1, 2), Pair(1, 3))


def reference(problem: Problem, gates: list[list[bool]]) -> torch.Tensor:
    """The plain supernet: every evaluation is run, dead gates and all."""
    net, batch = problem.supernet, problem.batch(PAIRS)
    with torch.no_grad():
        return run_loop(
            Supernet(net.model, net.specs, net.cache_kinds),
            problem.scheduler,
            gates,
            batch.latents,
            batch.conditions,
            num_inference_steps=problem.options.steps,
            guidance_scale=problem.guidance_scale,
        )


@pytest.mark.parametrize("which", ["problem", "unet_problem"])
@pytest.mark.parametrize("seed", range(4))
def test_what_the_plan_leaves_out_changes_nothing(which: str, seed: int, request: pytest.FixtureRequest) -> None:
    problem: Problem = request.getfixturevalue(which)
    source = random.Random(seed)
    count = len(problem.target.blocks)
    gates = [[True] * count, *([source.random() < 0.5 for _ in range(count)] for _ in range(problem.steps - 1))]
    gates[2] = [False] * count
    expected = reference(problem, gates)
    assert torch.allclose(sample(problem, gates, PAIRS), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_each_image_is_its_own(problem: Problem) -> None:
    """A batch gives what its images give one by one."""
    together = full_latents(problem, PAIRS)
    for row, pair in zip(together, PAIRS, strict=True):
        assert torch.allclose(row, full_latents(problem, [pair])[0], rtol=1e-4, atol=1e-4 * row.abs().max().item())
    assert not torch.allclose(together[1], together[2], atol=1e-2)


def test_the_objective_runs_equal_gates_once(problem: Problem) -> None:
    told = []
    objective = image_objective(problem, PAIRS, "ssim", on_evaluation=lambda count, best: told.append((count, best)))
    count = len(problem.target.blocks)
    full, first_only = [[True] * count] * problem.steps, [[True] * count, *[[False] * count] * (problem.steps - 1)]
    assert objective(full) == pytest.approx(0, abs=1e-5)
    assert objective(first_only) > 1e-4
    assert objective(full) == objective([[False] * count, *full[1:]])
    assert objective.evaluations == 2
    assert [count for count, _ in told] == [1, 2]


def test_losses_on_images_need_images(unet_problem: Problem) -> None:
    with pytest.raises(UserError, match="--loss ssim: .* has no VAE.*latent-l2"):
        image_objective(unet_problem, PAIRS, "ssim")
    full = [[True] * len(unet_problem.target.blocks)] * unet_problem.steps
    assert image_objective(unet_problem, PAIRS, "latent-l2")(full) == pytest.approx(0)


def test_a_loss_that_is_no_number_is_never_chosen(problem: Problem) -> None:
    objective = image_objective(problem, PAIRS, "latent-l2")
    assert isinstance(objective, Objective)
    with torch.no_grad():
        weight = problem.supernet.model.proj_out_2.weight
        saved = weight.clone()
        weight.fill_(float("nan"))
        try:
            assert objective([[True] * 3] * problem.steps) == float("inf")
        finally:
            weight.copy_(saved)
