"""What schedules do to images, or to videos frame by frame: beside the full run over the same seeds, and beside solvers
with fewer steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipgo_deploy._version import __version__
from dipgo_deploy.bench.frames import Frames, measured
from dipgo_deploy.bench.metrics import PSNR, SSIM, Metric
from dipgo_deploy.bench.pictures import Pictures, key_of
from dipgo_deploy.bench.statistics import Estimate, bootstrap, mean, share
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user
from dipgo_deploy.models.family import CacheKind
from dipgo_deploy.models.location import BUILT_IN
from dipgo_deploy.quality.judge import CLASS_NAMES, Judge, feature_statistics, frechet_distance
from dipgo_deploy.runtime.image import to_uint8
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.search.evaluate import images_of, sample
from dipgo_deploy.search.problem import Problem, sampler_and_steps, with_cache, with_sampler, with_schedule
from dipgo_deploy.search.samples import Pair, held_out

# Cases whose saved shares differ by at most this cost about the same.
SAME_RATIO = 0.03
REFERENCE = "reference"  # the name of its pictures


@dataclass(frozen=True)
class Case:
    """One way to make the images: gates for the reference's sampler, or for another one.

    Attributes:
        name: what it is called.
        solver: (sampler, steps), None for the reference's own.
        config: of that sampler, None to set it up from the model's.
        gates: T x N, None for all kept.
        cache: kind of all blocks, None for the reference's.
        fitted: a schedule with a solver of its own, or with a forecast, which says all of that.
        group: of a plain solver that others are compared with, how many evaluations those are worth.
    """

    name: str
    gates: Gates | None = None
    solver: tuple[str, int] | None = None
    config: Mapping[str, Any] | None = None
    cache: CacheKind | None = None
    fitted: Schedule | None = None
    group: int | None = None

    @property
    def key(self) -> str:
        """Of everything but its name."""
        gates = None if self.gates is None else ["".join("01"[cell] for cell in row) for row in self.gates]
        fitted = None if self.fitted is None else self.fitted.to_json()
        return key_of([gates, self.solver, to_json(self.config), self.cache, fitted])


FULL_RUN = Case("full run")


@dataclass(frozen=True)
class Row:
    """What one case does.

    Attributes:
        macs: of one image's launches.
        ratio: share of the full run's that is saved.
        launches: of the denoiser.
        milliseconds: of one image's loop in torch, as it was measured, in batches.
        metrics: by name, over images.
        differences: of the metrics to those of the case ``against``, image by image: the first one; with ``by_ratio``
            the first that saves about as much; where there are plain solvers to compare with, the best of those (by
            SSIM) that cost about as much.
        baseline: whether it is one of these.
        accuracy: share of images recognised as what was asked for.
        frechet: distance to held-out images (both None for a model without a judge).
        guidance_scale: None without guidance.
        per_image: the metrics of each image, (n,); of a video the mean of its frames.
        frames: of videos, the metrics of each frame; empty for pictures.
    """

    name: str
    macs: int
    ratio: float
    launches: int
    milliseconds: float
    metrics: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    against: str | None
    accuracy: Estimate | None
    frechet: Estimate | None
    guidance_scale: float | None = None
    baseline: bool = False
    per_image: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    frames: Mapping[str, Frames] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ssim(self) -> Estimate:
        """To the full run."""
        return self.metrics["ssim"]

    @property
    def psnr(self) -> Estimate:
        """To the full run, in decibels."""
        return self.metrics["psnr"]

    @property
    def difference(self) -> Estimate:
        """Of the SSIM."""
        return self.differences["ssim"]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {name: getattr(self, name) for name in ("name", "guidance_scale", "baseline", "macs", "ratio")}
        plain |= {name: getattr(self, name) for name in ("launches", "milliseconds")}
        plain |= {name: vars(value) for name, value in self.metrics.items()}
        plain |= {"against": self.against, "difference": vars(self.difference) if self.differences else None}
        plain |= {"differences": {name: vars(value) for name, value in self.differences.items()}}
        for name in ("accuracy", "frechet"):
            value = getattr(self, name)
            plain[name] = None if value is None else vars(value)
        if self.frames:
            plain["frames"] = {name: found.as_json() for name, found in self.frames.items()}
        return plain


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
                f"{name}: was made for another model, or for other blocks of it; give schedules of one model"
            )
        if schedule.solver is not None:
            cases.append(Case(name, gates=schedule.gates, fitted=schedule))
            continue
        cache = None
        if schedule.blocks != target.blocks:
            kinds = sorted(set(schedule.cache_kinds.values()))
            if not any_cache or len(kinds) > 1:
                raise UserError(
                    f"{name}: has {' and '.join(kinds)} caches, not those of the first schedule; compare like with "
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
                f"{target.sampler.class_name} with {target.sampler.num_inference_steps}; compare like with like, or "
                "give --any-sampler"
            )
        config = None if own is None else sampler.config
        if schedule.forecast is not None or schedule.guidance is not None:
            cases.append(Case(name, gates=schedule.gates, fitted=schedule))
            continue
        cases.append(Case(name, gates=schedule.gates, solver=own, config=config, cache=cache))
    return cases


def evaluations_worth(problem: Problem, case: Case) -> int:
    """Of how many whole evaluations of the denoiser a case of a schedule has the multiply-accumulates."""
    at_work = problem
    if case.fitted is not None:
        at_work = with_schedule(problem, case.fitted)
    elif case.solver is not None:
        at_work = with_sampler(problem, *case.solver, case.config)
    return _worth(problem, at_work.costs.analyse(_gates(at_work, case.gates)).cost)


def _worth(problem: Problem, macs: int) -> int:
    return max(1, round(macs * problem.steps / problem.costs.full))


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
    metrics: Sequence[Metric] = (SSIM, PSNR),
    folder: Path | None = None,
    resume: bool = False,
    with_full: bool = False,
    notify: Callable[[Row], None] = lambda row: None,
    strip: Callable[[Sequence[Row], Mapping[str, np.ndarray], Sequence[Pair]], None] | None = None,
) -> list[Row]:
    """Make ``per_condition`` images of every prompt or class in every case, from seeds that no search uses.

    The full run is made once, for all cases. Images and what was measured of them lie in ``folder`` (None: a temporary
    one); with ``resume`` what is complete there is not made again.

    Args:
        batch: images that go through the model at a time.
        by_ratio: the difference is to the first case that saves about as much, not to the very first.
        metrics: SSIM at least.
        notify: told each row when it is measured, before it is known what the case is compared with.
        strip: shown the rows and, by name and ``REFERENCE``, pictures uint8 (n, 3, [F,] H, W) before they go.

    Returns:
        A row a case, in their order.

    Raises:
        UserError: a model without a VAE, nothing to measure, or a folder that cannot be used.
    """
    if not problem.can_decode:
        raise UserError(f"{problem.options.model}: has no VAE to make images with; give a pipeline's folder")
    if not cases:
        raise UserError("nothing to measure; give schedule files or --solver")
    if per_condition < 2:
        raise UserError("--per-condition: give at least 2, for an interval")
    pairs = held_out(len(problem.conditions), per_condition, seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        with sole_user(work, "--checkpoint"):
            at_work = _Measurement(problem, pairs, batch, metrics, work, resume)
            full = [at_work.row(FULL_RUN)] if with_full else []
            rows = []
            for case in cases:
                rows.append(at_work.row(case))
                notify(rows[-1])
            rows = _compared(problem, cases, rows, by_ratio)
            if strip is not None:
                pictures = {row.name: at_work.pictures_of(case) for case, row in zip(cases, rows, strict=True)}
                strip(rows, {REFERENCE: at_work.reference, **pictures}, pairs)
    return [*full, *rows]


# Rows of the pairs, their images (B, 3, [F,] H, W) float32 on the host, and the seconds of their loop.
Made = tuple[slice, Tensor, float]


class _Measurement:
    """One problem's full run and the cases that are measured beside it."""

    def __init__(
        self,
        problem: Problem,
        pairs: Sequence[Pair],
        batch: int,
        metrics: Sequence[Metric],
        folder: Path,
        resume: bool,
    ) -> None:
        self._problem, self._pairs, self._batch, self._metrics = problem, pairs, batch, metrics
        self._cached: dict[CacheKind | None, Problem] = {None: problem}
        labels = judged_labels(problem)
        self._judge = None if labels is None else Judge.load()
        self._wanted = np.array([0 if labels is None else labels[pair.condition] for pair in pairs])
        shape = tuple(images_of(problem, torch.zeros(1, *problem.sample_shape, device=problem.device)).shape[1:])
        self._work = Pictures(folder, self._settings(), len(pairs), shape, resume=resume)
        if self._work.values(REFERENCE) is None:
            pictures = self._work.opened(REFERENCE, np.float32, new=True)
            seconds = 0.0
            for rows, images, took in self._made(problem, None):
                pictures[rows] = images.numpy()
                seconds += took
            pictures.flush()
            self._work.complete(REFERENCE, {"seconds": np.array(seconds)})
        self._reference = self._work.opened(REFERENCE, np.float32, new=False)

    def _settings(self) -> dict[str, Any]:
        problem = self._problem
        sampler = problem.target.sampler
        return {
            "model": [problem.options.model, problem.target.model.config_hash],
            "reference": [sampler.class_name, sampler.num_inference_steps, to_json(sampler.config)],
            "guidance_scale": problem.guidance_scale,
            "conditions": list(problem.names),
            "seeds": [self._pairs[0].seed, self._pairs[-1].seed],
            "batch": self._batch,
            "metrics": [metric.name for metric in self._metrics],
            "tool_version": __version__,
        }

    @property
    def reference(self) -> np.ndarray:
        """The full run's pictures, uint8."""
        return to_uint8(np.asarray(self._reference))

    def pictures_of(self, case: Case) -> np.ndarray:
        """Pictures uint8 of a case that was measured."""
        return self._work.opened(case.key, np.uint8, new=False)

    def row(self, case: Case) -> Row:
        """Measure one case, or take what was measured of it."""
        problem = self._problem_of(case)
        values = self._work.values(case.key)
        if values is None:
            values = self._measured(problem, case)
            self._work.complete(case.key, values)
        analysis = problem.costs.analyse(_gates(problem, case.gates))
        accuracy = frechet = None
        if self._judge is not None:
            right = values["recognised"] == self._wanted
            accuracy = share(int(right.sum()), len(right))
            frechet = _frechet(self._judge, values["features"], self._wanted)
        per_image = {metric.name: values[metric.name] for metric in self._metrics}
        frames = {
            metric.name: Frames(values[metric.name], metric.higher)
            for metric in self._metrics
            if values[metric.name].ndim == 2
        }
        per_image |= {name: found.per_video for name, found in frames.items()}
        return Row(
            name=case.name,
            macs=analysis.cost,
            ratio=1 - analysis.cost / self._problem.costs.full,
            launches=len(analysis.launches),
            milliseconds=float(values["milliseconds"]),
            metrics={name: mean(found) for name, found in per_image.items()},
            differences={},
            against=None,
            accuracy=accuracy,
            frechet=frechet,
            guidance_scale=problem.guidance_scale,
            baseline=case.group is not None,
            per_image=per_image,
            frames=frames,
        )

    def _problem_of(self, case: Case) -> Problem:
        if case.cache not in self._cached:
            assert case.cache is not None
            self._cached[case.cache] = with_cache(self._problem, case.cache)
        problem = self._cached[case.cache]
        if case.fitted is not None:
            return with_schedule(problem, case.fitted)
        return problem if case.solver is None else with_sampler(problem, *case.solver, case.config)

    def _measured(self, problem: Problem, case: Case) -> dict[str, np.ndarray]:
        pictures = self._work.opened(case.key, np.uint8, new=True)
        parts: dict[str, list[np.ndarray]] = {metric.name: [] for metric in self._metrics}
        parts |= {} if self._judge is None else {"recognised": [], "features": []}
        seconds = 0.0
        for rows, images, took in self._full() if case is FULL_RUN else self._made(problem, case.gates):
            seconds += took
            full = torch.from_numpy(np.array(self._reference[rows]))
            prompts = [self._problem.names[pair.condition] for pair in self._pairs[rows]]
            for metric in self._metrics:
                parts[metric.name].append(measured(metric, images, full, prompts))
            pixels = to_uint8(images.numpy())
            pictures[rows] = pixels
            if self._judge is not None:
                features, recognised = self._judge.look(np.moveaxis(pixels, 1, -1))
                parts["features"].append(features)
                parts["recognised"].append(recognised)
        values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        return {**values, "milliseconds": np.array(1e3 * seconds / len(self._pairs))}

    def _full(self) -> Iterator[Made]:
        """The full run's, which are there already."""
        there = self._work.values(REFERENCE)
        assert there is not None
        for start in range(0, len(self._pairs), self._batch):
            rows = slice(start, min(start + self._batch, len(self._pairs)))
            share_of = (rows.stop - rows.start) / len(self._pairs)
            yield rows, torch.from_numpy(np.array(self._reference[rows])), share_of * float(there["seconds"])

    def _made(self, problem: Problem, gates: Gates | None) -> Iterator[Made]:
        for start in range(0, len(self._pairs), self._batch):
            rows = slice(start, min(start + self._batch, len(self._pairs)))
            begun = time.perf_counter()
            latents = sample(problem, _gates(problem, gates), self._pairs[rows])
            took = time.perf_counter() - begun
            yield rows, images_of(problem, latents).float().cpu(), took


def judged_labels(problem: Problem) -> list[int] | None:
    """The class that the built-in judge should see in each condition's images; None where it cannot judge."""
    if problem.options.model not in BUILT_IN:
        return None
    labels = []
    for name in problem.names:
        words = [place for place, known in enumerate(CLASS_NAMES) if name == str(place) or name.endswith(f" {known}")]
        if not words:
            return None
        labels.append(max(words, key=lambda place: len(CLASS_NAMES[place])))
    return labels


def _frechet(judge: Judge, features: np.ndarray, classes: np.ndarray) -> Estimate | None:
    """To all held-out images, so only where all their classes were asked for."""
    if len(np.unique(classes)) < len(CLASS_NAMES):
        return None
    return bootstrap(
        lambda rows: frechet_distance(*feature_statistics(features[rows]), judge.mean, judge.covariance), classes
    )


def _compared(problem: Problem, cases: Sequence[Case], rows: Sequence[Row], by_ratio: bool) -> list[Row]:
    """The rows with their differences to what each is compared with."""
    best: dict[int, Row] = {}
    for case, row in zip(cases, rows, strict=True):
        if case.group is not None and (case.group not in best or row.ssim.value > best[case.group].ssim.value):
            best[case.group] = row
    found = []
    firsts: list[Row] = []
    for case, row in zip(cases, rows, strict=True):
        if best:
            other = best.get(_worth(problem, row.macs) if case.group is None else case.group)
        else:
            other = next((one for one in firsts if not by_ratio or abs(one.ratio - row.ratio) <= SAME_RATIO), row)
            firsts += [row] if other is row else []
        found.append(row if other is None else replace(row, against=other.name, differences=_differences(row, other)))
    return found


def _differences(row: Row, other: Row) -> dict[str, Estimate]:
    return {name: mean(values - other.per_image[name]) for name, values in row.per_image.items()}


def fewest_launches(rows: Sequence[Row], least: float) -> list[dict[str, Any]]:
    """At each guidance scale the fewest launches with which a plain solver (``baseline``) and anything else (``ours``)
    reach an SSIM of ``least``, None where nothing does."""
    found = []
    for scale in dict.fromkeys(row.guidance_scale for row in rows):
        enough = [row for row in rows if row.guidance_scale == scale and row.ssim.value >= least]
        fewest = {
            kind: min((row.launches for row in enough if row.baseline == plain), default=None)
            for kind, plain in (("ours", False), ("baseline", True))
        }
        found.append({"guidance_scale": scale, "ssim": least, **fewest})
    return found


def _gates(problem: Problem, gates: Gates | None) -> Gates:
    return gates if gates is not None else ((True,) * len(problem.target.blocks),) * problem.steps
