"""A search with the unconditional half as a gate, from the model to the engines."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_checks import loop_report

from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.fit import calibrate
from dipgo_deploy.calibrate.objective import calibrated_objective
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.models.target import check_schedule
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.guidance import share_of_scale
from dipgo_deploy.search import checkpoint
from dipgo_deploy.search.evaluate import full_latents, sample
from dipgo_deploy.search.halves import joined
from dipgo_deploy.search.loop_loss import LoopLoss
from dipgo_deploy.search.problem import (
    Pair,
    Problem,
    ProblemOptions,
    costs_of,
    load_problem,
    with_cache,
    with_guidance,
    with_schedule,
)
from dipgo_deploy.search.pruner import PrunerSize
from dipgo_deploy.search.run import SearchOptions, search
from dipgo_deploy.search.train import TrainOptions
from dipgo_deploy.supernet import Supernet, run_loop

PAIRS = (Pair(0, 1), Pair(1, 2))
OPTIONS = SearchOptions(
    method="dipgo",
    ratios=(0.3,),
    budget=8,
    images=2,
    size=PrunerSize(width=16, hidden=(8,)),
    train=TrainOptions(iterations=2, batch=2, optimizer="adam", lr=0.3),
    tolerance=0.1,
)


@pytest.fixture(scope="module")
def searched(problem: Problem) -> Problem:
    """The transformer, with the halves of its five evaluations as gates."""
    problem = replace(problem, options=replace(problem.options, guidance_gates=True))
    return replace(problem, costs=costs_of(problem, problem.traced.graph))


def random_gates(problem: Problem, seed: int) -> list[list[bool]]:
    source = random.Random(seed)
    gates = [[source.random() < 0.6 for _ in range(problem.costs.width)] for _ in range(problem.steps)]
    gates[seed % problem.steps][-1] = False
    return gates


@pytest.mark.parametrize("kind", ["residual", "output"])
def test_gates_do_what_the_schedule_says_they_do(searched: Problem, kind: str) -> None:
    """Latents of the plain supernet, and of the schedule by itself; costs of the plan."""
    searched = searched if kind == "residual" else with_cache(searched, kind)
    assert searched.costs.width == 4
    for seed in range(4):
        analysis = searched.costs.analyse(random_gates(searched, seed))
        found = sample(searched, analysis.gates, PAIRS)
        schedule = searched.target.schedule(analysis.kept, "by hand", {}).with_guidance(analysis.guidance)
        own = with_schedule(searched, schedule)
        assert own.costs.analyse(schedule.gates).cost == analysis.cost
        batch, net = searched.batch(PAIRS), searched.supernet
        plain = Supernet(net.model, net.specs, net.cache_kinds)
        plain.guidance = analysis.guidance
        with torch.no_grad():
            expected = run_loop(
                plain,
                searched.scheduler,
                schedule.gates,
                batch.latents,
                batch.conditions,
                num_inference_steps=searched.options.steps,
                guidance_scale=searched.guidance_scale,
            )
        for latents in (found, sample(own, schedule.gates, PAIRS)):
            assert torch.allclose(latents, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert full_latents(own, PAIRS).equal(full_latents(searched, PAIRS))


def test_a_soft_gate_is_a_share_of_the_guidance(searched: Problem) -> None:
    """Whole evaluations whose shares lie between: the loss is that of runs at these scales, and so is its gradient."""
    loss, scale = LoopLoss(searched, "latent-l2"), searched.guidance_scale
    shares = torch.tensor([1.0, 0.3, 0.0, 1.0, 0.6])
    gates = torch.ones(searched.steps, 4)
    gates[:, 3] = shares
    run = with_guidance(searched, [1e-30 if share == 0 else share for share in shares.tolist()])  # both halves
    wanted = full_latents(searched, PAIRS)
    latents = sample(run, run.costs.whole, PAIRS)
    assert scale is not None and share_of_scale(scale, 0.3, 1.0) == pytest.approx(1 + 0.3 * (scale - 1))
    leaf = gates.clone().requires_grad_()
    found = loss(leaf, PAIRS)
    assert found.item() == pytest.approx((latents - wanted).square().mean().item(), rel=1e-3)
    found.backward()
    assert leaf.grad is not None and leaf.grad[0].abs().max() == 0
    ahead, behind = gates.clone(), gates.clone()
    ahead[3, 3], behind[3, 3] = 1.01, 0.99
    with torch.no_grad():
        slope = (loss(ahead, PAIRS) - loss(behind, PAIRS)).item() / 0.02
    assert leaf.grad[3, 3].item() == pytest.approx(slope, rel=0.05)  # a gate of exactly 1 has a gradient


def test_an_evaluation_without_blocks_goes_on_as_the_one_before(searched: Problem) -> None:
    loss = LoopLoss(searched, "latent-l2")
    kept = [[True] * 3, [True] * 3, [False] * 3, [True] * 3, [False] * 3]
    gates = torch.tensor(joined(kept, [1, 1, 1, 0, 0])).float()
    assert gates[2, 3] == 0  # and yet it is guided
    wanted = (sample(searched, gates.bool().tolist(), PAIRS) - full_latents(searched, PAIRS)).square().mean().item()
    assert loss(gates, PAIRS).item() == pytest.approx(wanted, rel=1e-3)


def test_the_schedule_costs_what_the_search_says_and_runs_as_the_supernet(
    searched: Problem, problem: Problem, dit_folder: Path, tmp_path: Path
) -> None:
    """With the calibrated objective, and with the solver that is fitted to what was found."""
    starts = (("half", joined([[True] * 3] * 5, [1, 0, 1, 0, 1])),)
    train = TrainOptions(loss="latent-l2")
    options = replace(OPTIONS, method="refine", ratios=(0.2,), tolerance=0.01, train=train, starts=starts, budget=2)
    (found,) = search(
        searched, options, objective=lambda one: calibrated_objective(one, "latent-l2", tmp_path, images=2)
    )
    schedule = found.schedule
    assert set(schedule.provenance["parameters"]["start_losses"]) >= {"half", "alternating"}
    assert schedule.provenance["parameters"]["search_guidance"] is True
    check_schedule(schedule, str(dit_folder))
    assert with_schedule(problem, schedule).costs.ratio(schedule.gates) == pytest.approx(found.ratio)
    assert found.ratio == pytest.approx(0.2, abs=0.01)
    fit = CalibrationOptions(images=8, held_aside=0.25, batch=4)
    fitted = calibrate(with_guidance(searched, schedule.guidance), schedule, fit)
    assert fitted.solver is not None and fitted.guidance == schedule.guidance
    assert sum(schedule.conditional_only) == 2
    schedule.save(tmp_path / "schedule.json")
    written = Schedule.load(tmp_path / "schedule.json")
    export_bundle(str(dit_folder), written, tmp_path / "engine", ExportOptions(components=False))
    report = loop_report(tmp_path / "engine")
    assert report.first_failure() is None and report.results is not None


def test_the_pruner_learns_halves_and_goes_on_from_its_checkpoint(searched: Problem, tmp_path: Path) -> None:
    (found,) = search(searched, OPTIONS, folder=tmp_path)
    assert checkpoint.load(tmp_path).tensors["model.queries"].shape[0] == searched.steps * 4
    (again,) = search(searched, OPTIONS, folder=tmp_path, resume=True)
    assert again.schedule == found.schedule
    plain = with_guidance(searched, None)
    with pytest.raises(UserError, match="was begun with problem.guidance_gates True, now it is False"):
        search(plain, OPTIONS, folder=tmp_path, resume=True)


def test_methods_that_could_leave_out_no_half_are_refused(searched: Problem) -> None:
    for method in ("uniform", "deepcache", "annealing", "dp"):
        with pytest.raises(UserError, match=f"--search-guidance: --method {method} leaves all evaluations guided; use"):
            search(searched, replace(OPTIONS, method=method))
    with pytest.raises(UserError, match="allow --max-variants 2"):
        search(searched, replace(OPTIONS, max_variants=1))
    with pytest.raises(UserError, match="half: 5 x 3 gates, the search has 5 x 4"):
        search(searched, replace(OPTIONS, starts=(("half", ((True,) * 3,) * 5),)))


@pytest.mark.parametrize("method", ["random", "genetic"])
def test_other_methods_draw_halves(searched: Problem, method: str) -> None:
    train = replace(OPTIONS.train, loss="latent-l2")
    (found,) = search(searched, replace(OPTIONS, method=method, budget=3, train=train))
    assert found.ratio == pytest.approx(0.3, abs=0.1)


def test_a_model_without_guidance_is_refused_before_it_is_loaded(dit_folder: Path, tmp_path: Path) -> None:
    unguided = tmp_path / "unguided"
    unguided.mkdir()
    (unguided / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}', encoding="utf-8")
    options = ProblemOptions(str(unguided), "ddim", 4, guidance_gates=True)  # there are no weights to load
    with pytest.raises(UserError, match="--search-guidance: .*unguided has no unconditional half; leave it out"):
        load_problem(options, notify=fail)
    options = ProblemOptions(str(dit_folder), steps=4, guidance=False, guidance_gates=True)
    with pytest.raises(UserError, match="there is no unconditional half with --no-guidance"):
        load_problem(options, notify=fail)


def fail(stage: str) -> None:
    raise AssertionError(stage)
