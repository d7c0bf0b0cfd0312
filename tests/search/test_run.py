from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dipgo_deploy import __version__
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.target import check_sampler, check_schedule
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.baselines.uniform import uniform_gates
from dipgo_deploy.search.evaluate import Objective, full_latents, image_objective, sample
from dipgo_deploy.search.loop_loss import LoopLoss
from dipgo_deploy.search.losses import LATENT_LOSSES
from dipgo_deploy.search.problem import (
    Pair,
    Problem,
    ProblemOptions,
    load_problem,
    with_cache,
    with_reference,
    with_sampler,
)
from dipgo_deploy.search.pruner import PrunerSize
from dipgo_deploy.search.run import Reporter, SearchOptions, choose_cache, judged, search
from dipgo_deploy.search.train import TrainOptions

TRAIN = TrainOptions(iterations=2, batch=2, optimizer="adam", lr=0.3)
OPTIONS = SearchOptions(
    method="dipgo",
    ratios=(0.3, 0.6),
    budget=6,
    images=2,
    size=PrunerSize(width=16, hidden=(8,)),
    train=TRAIN,
    tolerance=0.09,
)


def test_several_ratios_come_from_one_pruner_as_valid_schedules(
    problem: Problem, dit_folder: Path, tmp_path: Path
) -> None:
    iterations = []
    found = search(problem, OPTIONS, reporter=Reporter(iteration=iterations.append))
    assert len(iterations) == TRAIN.iterations
    assert [one.target for one in found] == [0.3, 0.6]
    for one in found:
        one.schedule.save(tmp_path / "schedule.json")
        schedule = Schedule.load(tmp_path / "schedule.json")
        check_schedule(schedule, str(dit_folder))
        check_sampler(schedule)
        assert all(schedule.gates[0])
        assert problem.costs.clean(schedule.gates) == schedule.gates
        assert problem.costs.ratio(schedule.gates) == pytest.approx(one.ratio)
        assert abs(one.ratio - one.target) <= OPTIONS.tolerance
        made = schedule.provenance
        assert made["method"] == "dipgo"
        assert made["tool_version"] == __version__
        assert made["parameters"]["achieved_ratio"] == pytest.approx(one.ratio)
        assert made["parameters"]["seed"] == 0
        assert made["parameters"]["train"]["iterations"] == 2


def test_the_same_seed_gives_the_same_schedules(problem: Problem) -> None:
    first, again = (search(problem, replace(OPTIONS, ratios=(0.6,))) for _ in range(2))
    assert first[0].schedule == again[0].schedule


def test_refinement_is_at_least_as_good_as_its_starts(problem: Problem) -> None:
    options = replace(OPTIONS, method="dipgo+refine", ratios=(0.6,), tolerance=0.1)
    counts: list[int] = []
    found = search(problem, options, reporter=Reporter(evaluation=lambda count, best: counts.append(count)))[0]
    assert abs(found.ratio - 0.6) <= options.tolerance
    assert counts[-1] <= OPTIONS.budget + 6  # the starts, before and after they are brought to the ratio
    parameters = found.schedule.provenance["parameters"]
    assert found.loss is not None
    assert found.loss <= min(parameters["start_losses"].values())
    assert parameters["objective"] == found.loss


@pytest.mark.parametrize("method", ["uniform", "dp", "annealing", "random"])
def test_baselines_need_no_pruner(problem: Problem, method: str) -> None:
    found = search(
        problem, replace(OPTIONS, method=method, ratios=(0.57,), tolerance=0.1), reporter=Reporter(iteration=fail)
    )
    assert found[0].schedule.provenance["method"] == method


def fail(progress: object) -> None:
    raise AssertionError("a baseline trained the pruner")


def test_text_models_search_on_latents(unet_problem: Problem) -> None:
    train = replace(TRAIN, loss="latent-l2", iterations=1)
    found = search(unet_problem, replace(OPTIONS, train=train, ratios=(0.4,), tolerance=0.15))
    assert found[0].ratio == pytest.approx(0.4, abs=0.15)


def test_pruning_by_latency_measures_every_part(problem: Problem) -> None:
    stages: list[str] = []
    options = replace(OPTIONS, method="uniform", ratios=(0.6,), prune_by="latency", tolerance=0.1)
    found = search(problem, options, reporter=Reporter(stage=stages.append))
    assert any("latency" in stage for stage in stages)
    assert found[0].schedule.provenance["parameters"]["prune_by"] == "latency"
    assert found[0].ratio == pytest.approx(0.6, abs=0.1)


def test_few_variants(problem: Problem) -> None:
    options = replace(OPTIONS, max_variants=2, ratios=(0.4,), tolerance=0.25)
    found = search(problem, options)
    assert problem.costs.variants(found[0].schedule.gates) <= 2


def test_what_cannot_be_is_refused_before_the_search(problem: Problem, unet_problem: Problem) -> None:
    never = Reporter(iteration=fail)
    with pytest.raises(UserError, match=r"--prune-ratio 0\.95: .*closest reachable ratio is 0\.7474"):
        search(problem, replace(OPTIONS, ratios=(0.3, 0.95)), reporter=never)
    with pytest.raises(UserError, match="--method nothing: is unknown"):
        search(problem, replace(OPTIONS, method="nothing"), reporter=never)
    with pytest.raises(UserError, match="has no VAE"):
        search(unet_problem, OPTIONS, reporter=never)
    with pytest.raises(UserError, match="--warm-start: 2 x 3 gates"):
        search(problem, replace(OPTIONS, warm_start=((True,) * 3,) * 2), reporter=never)


def test_models_and_prompts_must_fit(dit_folder: Path, unet_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat", encoding="utf-8")
    with pytest.raises(UserError, match="give --prompts"):
        load_problem(ProblemOptions(str(unet_folder), "ddim", 5))
    with pytest.raises(UserError, match="--prompts: .* guided by class labels"):
        load_problem(ProblemOptions(str(dit_folder), steps=5, prompts=str(prompts)))
    with pytest.raises(UserError, match="--class-labels: .* guided by text"):
        load_problem(ProblemOptions(str(unet_folder), "ddim", 5, prompts=str(prompts), class_labels=(1,)))
    with pytest.raises(UserError, match="9 is no class of this model"):
        load_problem(ProblemOptions(str(dit_folder), steps=5, class_labels=(1, 9)))
    with pytest.raises(UserError, match="--device cuda.*no CUDA|--device warp"):
        load_problem(ProblemOptions(str(dit_folder), steps=5, device="warp"))


def test_a_uniform_start_trains_a_pruner_for_each_ratio(problem: Problem, tmp_path: Path) -> None:
    iterations: list[int] = []
    reporter = Reporter(iteration=lambda progress: iterations.append(progress.iteration))
    options = replace(OPTIONS, warm_start="uniform")
    found = search(problem, options, folder=tmp_path, reporter=reporter)
    assert iterations == [1, 2, 1, 2]
    assert found[0].schedule.provenance["parameters"]["warm_start"] == "uniform"
    (tmp_path / "0.6" / "checkpoint.safetensors").unlink()  # as if interrupted after the first ratio
    again = search(problem, options, folder=tmp_path, resume=True, reporter=reporter)
    assert iterations == [1, 2, 1, 2, 1, 2]
    assert [one.schedule for one in again] == [one.schedule for one in found]


def test_refinement_without_a_pruner_is_no_worse_than_any_start(problem: Problem) -> None:
    options = replace(OPTIONS, method="annealing", ratios=(0.57,), tolerance=0.1)
    annealed = search(problem, options)[0]
    starts = (("annealed", annealed.schedule.gates), ("at another ratio", ((True,) * 3,) * 5))
    refined = search(problem, replace(options, method="refine", starts=starts), reporter=Reporter(iteration=fail))[0]
    losses = refined.schedule.provenance["parameters"]["start_losses"]
    assert losses["annealed"] == annealed.loss
    assert "uniform" in losses
    assert "at another ratio" not in losses
    assert refined.loss is not None
    assert refined.loss <= min(losses.values())
    with pytest.raises(UserError, match="short: 2 x 3 gates"):
        search(problem, replace(options, method="refine", starts=(("short", ((True,) * 3,) * 2),)))


def test_each_schedule_is_reported_and_one_out_of_reach_does_not_stop_the_others(problem: Problem) -> None:
    found: list[float] = []
    options = replace(OPTIONS, method="uniform", ratios=(0.3, 0.57), tolerance=0.03)
    with pytest.raises(UserError, match=r"--prune-ratio 0\.3: cannot be reached"):
        search(problem, options, reporter=Reporter(found=lambda one: found.append(one.target)))
    assert found == [0.57]


def test_the_cache_that_loses_least_is_chosen(problem: Problem, unet_problem: Problem) -> None:
    options = replace(OPTIONS, method="refine", ratios=(0.57,))
    losses = {}
    for kind in ("residual", "output"):
        candidate = with_cache(problem, kind)
        assert candidate.costs.blocks == problem.costs.blocks
        objective = image_objective(candidate, judged(problem, options), "ssim")
        losses[kind] = objective(uniform_gates(candidate.costs, 0.57))
    assert losses["residual"] != losses["output"]
    chosen = choose_cache(problem, options)
    kinds = {block.cache for block in search(chosen, replace(options, tolerance=0.1))[0].schedule.blocks}
    assert kinds == {min(losses, key=losses.__getitem__)}
    assert choose_cache(unet_problem, options) is unet_problem


@pytest.mark.parametrize("best", ["residual", "output"])
def test_the_cache_is_chosen_by_the_objective_of_the_search(problem: Problem, best: str) -> None:
    def objective(searched: Problem) -> Objective:
        loses = searched.target.blocks[0].cache != best
        return Objective(searched.costs, lambda gates: float(loses))

    chosen = choose_cache(problem, replace(OPTIONS, method="refine", ratios=(0.57,)), objective=objective)
    assert chosen.target.blocks[0].cache == best


def test_the_full_run_of_another_sampler_may_be_the_reference(problem: Problem) -> None:
    """Images are compared with its images, ratios are shares of its cost, and the schedule says so."""
    pairs = (Pair(0, 1), Pair(1, 2))
    given = with_reference(with_sampler(problem, "dpm++2m", 4), "ddim", 8)
    whole, wanted = ((True,) * 3,) * 4, full_latents(with_sampler(problem, "ddim", 8), pairs)
    assert full_latents(given, pairs).equal(wanted)
    loss = float(LATENT_LOSSES["latent-l2"](sample(given, whole, pairs), wanted).mean())
    assert image_objective(given, pairs, "latent-l2")(whole) == pytest.approx(loss)
    assert loss > 1e-3
    gates = torch.ones(4, 3)
    assert LoopLoss(given, "latent-l2")(gates, pairs).item() == pytest.approx(loss, rel=1e-4)
    assert given.costs.ratio(whole) == pytest.approx(0.5)
    for changed in (with_cache(given, "output"), given):
        found = search(changed, replace(OPTIONS, method="refine", ratios=(0.7,), tolerance=0.1))[0]
        parameters = found.schedule.provenance["parameters"]
        assert parameters["reference"] == {"sampler": "DDIMScheduler", "steps": 8}
        assert found.ratio == changed.costs.ratio(found.schedule.gates)
        assert abs(found.ratio - 0.7) <= 0.1
        assert found.schedule.sampler.class_name == "DPMSolverMultistepScheduler"
        check_sampler(found.schedule)
    with pytest.raises(UserError, match="--prune-ratio 0.3: cannot be reached .* 0.5000"):
        search(given, replace(OPTIONS, method="uniform", ratios=(0.3,)))


def test_a_reference_is_loaded_with_the_problem(dit_folder: Path, problem: Problem) -> None:
    options = ProblemOptions(str(dit_folder), "deis", 3, guidance_scale=3.0, reference=("ddim", problem.steps))
    loaded = load_problem(options)
    assert full_latents(loaded, (Pair(0, 1),)).equal(full_latents(problem, (Pair(0, 1),)))
    assert loaded.costs.ratio([[True] * 3] * 3) == pytest.approx(1 - 3 / problem.steps)
    assert "reference" not in search(problem, replace(OPTIONS, ratios=(0.6,)))[0].schedule.provenance["parameters"]
