"""What schedules do to images: beside the full run over the same seeds, and beside solvers with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipgo_deploy.bench.statistics import Estimate, bootstrap, mean, share
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import CacheKind
from dipgo_deploy.models.location import BUILT_IN
from dipgo_deploy.quality.judge import CLASS_NAMES, Judge, feature_statistics, frechet_distance
from dipgo_deploy.runtime.image import to_uint8
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.search.evaluate import images_of, sample
from dipgo_deploy.search.losses import psnr, ssim
from dipgo_deploy.search.problem import Pair, Problem, sampler_and_steps, with_cache, with_sampler, with_schedule
from dipgo_deploy.search.samples import held_out

# Cases whose saved shares differ by at most this cost about the same.
SAME_RATIO = 0.03


@dataclass(frozen=True)
class Case:
    """One way to make the images: gates for the reference's sampler, or for another one.

    name: what it is called. solver: (sampler, steps), None for the reference's own. config: of that sampler, None to
    set it up from the model's. gates: T x N, None for all kept. cache: kind of all blocks, None for the reference's.
    fitted: a schedule with a solver of its own, which says all of that.
    """

    name: str
    gates: Gates | None = None
    solver: tuple[str, int] | None = None
    config: Mapping[str, Any] | None = None
    cache: CacheKind | None = None
    fitted: Schedule | None = None


@dataclass(frozen=True)
class Row:
    """What one case does.

    macs: of one image's launches. ratio: share of the full run's that is saved. launches: of the denoiser. ssim, psnr:
    to the full run, over images of the same seeds. difference: of the SSIM to the first case's, image by image; with
    ``by_ratio`` to that of the first one that saves about as much.
    accuracy: share of images recognised as what was asked for; frechet: distance to held-out images (both None for a
    model without a judge).
    """

    name: str
    macs: int
    ratio: float
    launches: int
    ssim: Estimate
    psnr: Estimate
    difference: Estimate
    accuracy: Estimate | None
    frechet: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def schedule_cases(
    schedules: Sequence[tuple[str, Schedule]], problem: Problem, *, any_sampler: bool = False, any_cache: bool = False
) -> list[Case]:
    """Schedules by name as cases. any_sampler: also those for another sampler or number of steps than the reference's.

    any_cache: also those with another kind of cache, the same one in all blocks.

    Raises:
        UserError: a schedule for another model, or for a sampler, number of steps or caches that it may not have.
    """
    target = problem.target
    cases = []
    for name, schedule in schedules:
        names = tuple(block.name for block in schedule.blocks)
        if schedule.model != target.model or names != target.block_names:
            raise UserError(
                f"{name}: was made for another model, or for other blocks of it: give schedules of one model"
            )
        if schedule.solver is not None:
            cases.append(Case(name, gates=schedule.gates, fitted=schedule))
            continue
        cache = None
        if schedule.blocks != target.blocks:
            kinds = sorted(set(schedule.cache_kinds.values()))
            if not any_cache or len(kinds) > 1:
                raise UserError(
                    f"{name}: has {' and '.join(kinds)} caches, not those of the first schedule: compare like with "
                    "like, or give --any-cache where all blocks have the same kind"
                )
            cache = kinds[0]
        sampler = schedule.sampler
        own = None
        if (sampler.class_name, sampler.num_inference_steps) != (
            target.sampler.class_name,
            target.sampler.num_inference_steps,
        ):
            own = (sampler.class_name, sampler.num_inference_steps)
        if own is not None and not any_sampler:
            raise UserError(
                f"{name}: was made for {sampler.class_name} with {sampler.num_inference_steps} steps, the reference is "
                f"{target.sampler.class_name} with {target.sampler.num_inference_steps}: compare like with like, or "
                "give --any-sampler"
            )
        config = None if own is None else sampler.config
        cases.append(Case(name, gates=schedule.gates, solver=own, config=config, cache=cache))
    return cases


def solver_case(text: str) -> Case:
    """``ddim:10`` as a case: the sampler's name and its steps.

    Raises:
        UserError: it is not written so.
    """
    name, steps = sampler_and_steps(text, "--solver")
    return Case(f"{name}, {steps} steps", solver=(name, steps))


def measure(
    problem: Problem,
    cases: Sequence[Case],
    per_condition: int,
    *,
    seed: int = 0,
    batch: int = 20,
    by_ratio: bool = False,
    notify: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Make ``per_condition`` images of every prompt or class in every case, from seeds that no search uses.

    batch: images that go through the model at a time. by_ratio: the difference is to the first case that saves about as
    much, not to the very first.

    Raises:
        UserError: a model without a VAE, or nothing to measure.
    """
    if not problem.can_decode:
        raise UserError(f"{problem.options.model}: has no VAE to make images with: give a pipeline's folder")
    if not cases:
        raise UserError("nothing to measure: give schedule files or --solver")
    if per_condition < 2:
        raise UserError("--per-condition: give at least 2, for an interval")
    pairs = held_out(len(problem.conditions), per_condition, seed)
    judge = Judge.load() if problem.options.model in BUILT_IN and len(problem.conditions) == len(CLASS_NAMES) else None
    reference = _images(problem, None, pairs, batch)
    rows: list[Row] = []
    firsts: list[tuple[float, np.ndarray]] = []
    cached: dict[CacheKind | None, Problem] = {None: problem}
    for case in cases:
        if case.cache not in cached:
            assert case.cache is not None
            cached[case.cache] = with_cache(problem, case.cache)
        at_work = cached[case.cache]
        if case.fitted is not None:
            at_work = with_schedule(at_work, case.fitted)
        elif case.solver is not None:
            at_work = with_sampler(at_work, *case.solver, case.config)
        images = _images(at_work, case.gates, pairs, batch)
        similarity = ssim(images, reference).double().numpy()
        saved = 1 - at_work.costs.analyse(_gates(at_work, case.gates)).cost / problem.costs.full
        first = next((known for ratio, known in firsts if not by_ratio or abs(ratio - saved) <= SAME_RATIO), None)
        if first is None:
            first = similarity
            firsts.append((saved, first))
        row = _row(problem, at_work, case, images, reference, similarity, first, pairs, judge)
        rows.append(row)
        notify(row)
    return rows


def _row(
    problem: Problem,
    at_work: Problem,
    case: Case,
    images: Tensor,
    reference: Tensor,
    similarity: np.ndarray,
    first: np.ndarray,
    pairs: Sequence[Pair],
    judge: Judge | None,
) -> Row:
    analysis = at_work.costs.analyse(_gates(at_work, case.gates))
    accuracy = frechet = None
    if judge is not None:
        pixels = to_uint8(images.permute(0, 2, 3, 1).numpy())
        wanted = np.array([pair.condition for pair in pairs])
        accuracy = share(int((judge.classify(pixels) == wanted).sum()), len(wanted))
        features, network = judge.features(pixels), judge
        frechet = bootstrap(
            lambda rows: frechet_distance(*feature_statistics(features[rows]), network.mean, network.covariance), wanted
        )
    return Row(
        name=case.name,
        macs=analysis.cost,
        ratio=1 - analysis.cost / problem.costs.full,
        launches=len(analysis.launches),
        ssim=mean(similarity),
        psnr=mean(psnr(images, reference).double().numpy()),
        difference=mean(similarity - first),
        accuracy=accuracy,
        frechet=frechet,
    )


def _gates(problem: Problem, gates: Gates | None) -> Gates:
    return gates if gates is not None else ((True,) * len(problem.target.blocks),) * problem.steps


def _images(problem: Problem, gates: Gates | None, pairs: Sequence[Pair], batch: int) -> Tensor:
    parts = []
    for start in range(0, len(pairs), batch):
        latents = sample(problem, _gates(problem, gates), pairs[start : start + batch])
        parts.append(images_of(problem, latents).float().cpu())
    return torch.cat(parts)
