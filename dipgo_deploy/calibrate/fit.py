"""A schedule's own solver, fitted with the predictions of the model in torch; see ``calibrate.core``."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy.calibrate.core import FIRST_SEED as FIRST_SEED
from dipgo_deploy.calibrate.core import CalibrationOptions as CalibrationOptions
from dipgo_deploy.calibrate.core import Group, Launch, Report, conditions_digest, fitted_solver, grouped, nearest
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.search.problem import Problem, with_guidance_scale
from dipgo_deploy.supernet import CacheState


def calibrate(
    problem: Problem,
    schedule: Schedule,
    options: CalibrationOptions | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Schedule:
    """The schedule with a solver of its own, fitted to the full run of ``problem`` (or of its reference).

    Evaluations in which no block runs are gone from it. The caches of blocks that are read later and what is kept of
    each image lie in files below ``folder`` (None: a temporary one).

    Args:
        problem: the schedule's model, sampler, number of steps and kinds of cache.
        schedule: gates for it, with a solver or without one.
        options: see there.
        folder: where a calibration that was interrupted can go on from.
        resume: go on from what is in ``folder``.
        report: told (stage, done, total).

    Raises:
        UserError: too few images, a folder that cannot be used, or a run whose latents are not finite.
    """
    options = options or CalibrationOptions()
    options.check()
    gates, launches = _launches(problem, schedule)
    scales: Sequence[float | None] = options.guidance_scales or (problem.guidance_scale,)
    facts = _facts(problem, scales)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        solver = fitted_solver(
            _Model(problem, gates, scales, folder),
            launches,
            grouped(len(problem.conditions), scales, options),
            options,
            folder=folder,
            settings={**facts, "schedule": hashlib.sha256(schedule.to_json().encode()).hexdigest()},
            provenance=facts,
            resume=resume,
            report=report,
        )
    return schedule.with_solver(solver, gates)


def _launches(problem: Problem, schedule: Schedule) -> tuple[Gates, list[Launch]]:
    """The launches with their rows of gates."""
    analysis = problem.costs.analyse(schedule.gates)
    own = problem.matrix.timesteps
    full = (problem.reference or problem).matrix.timesteps
    gates, launches = [], []
    for step in sorted(analysis.launches):
        if not any(schedule.gates[step]):
            continue  # caches alone: with the solver's own rows there is no need for such a prediction
        target = nearest(full, own[step])
        gates.append(schedule.gates[step])
        launches.append(Launch(float(full[target]), target, step in analysis.predicts))
    return tuple(gates), launches


def _facts(problem: Problem, scales: Sequence[float | None]) -> dict[str, Any]:
    """What a fit is made to, and on what, but for the images."""
    sampler = (problem.reference or problem).target.sampler
    return {
        "reference": {"sampler": sampler.class_name, "num_inference_steps": sampler.num_inference_steps},
        "conditions": len(problem.conditions),
        "conditions_sha256": conditions_digest(problem.names),
        "guidance_scales": [scale for scale in scales if scale is not None],
        "latent": list(problem.sample_shape[1:]),
        "dtype": "fp32",
        "backend": "torch",
    }


class _Model:
    """The schedule's evaluations in torch, for all groups side by side; caches that are read later lie in files."""

    def __init__(self, problem: Problem, gates: Gates, scales: Sequence[float | None], folder: Path) -> None:
        self._at = {
            scale: problem if scale in (None, problem.guidance_scale) else with_guidance_scale(problem, scale)
            for scale in dict.fromkeys(scales)
        }
        self.sample_shape = problem.sample_shape
        self.noises = (problem.reference or problem).matrix.noises
        self.kept_bytes = 0  # what caches take is not known before they are made
        self._gates = gates
        self._names = [block.name for block in problem.target.blocks]
        self._supernet = problem.source.supernet(problem.options.granularity, problem.cache_kinds)
        self._folder = folder
        self._states: dict[int, CacheState] = {}

    @torch.no_grad()
    def full_run(self, group: Group, wanted: Collection[int]) -> tuple[Mapping[int, np.ndarray], np.ndarray]:
        """See ``core.Model``."""
        problem = self._at[group.scale]
        problem = problem.reference or problem
        latents: dict[int, np.ndarray] = {}

        def record(evaluation: Any) -> None:
            if evaluation.step in wanted:
                latents[evaluation.step] = _array(evaluation.model_input)

        gates = [[True] * len(problem.target.blocks)] * problem.steps
        final = problem.run(problem.batch(group.pairs), gates, record=record, keep=lambda step: ())
        return latents, _array(final)

    @torch.no_grad()
    def predict(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> np.ndarray:
        """See ``core.Model``."""
        from dipgo_deploy.reference.mapped import MappedCaches

        if not place and not all(map(all, self._gates)):
            self._supernet.store = self._supernet.store or MappedCaches(self._folder)
        problem = self._at[group.scale]
        conditions = (problem.reference or problem).conditions_of(group.pairs)
        halves = 1 if problem.guidance_scale is None else 2
        model_input = torch.cat([torch.from_numpy(latents).to(problem.device)] * halves)
        output, after = self._supernet.step(
            model_input,
            torch.full((len(model_input),), launch.timestep, device=problem.device),
            conditions,
            self._gates[place],
            self._states.get(group.rows.start, CacheState()),
            place,
            {name for later in self._gates[place + 1 :] for name in self._removed(later)},
        )
        self._states[group.rows.start] = after
        raw = output[:, : latents.shape[1]].float()
        if problem.guidance_scale is None:
            return _array(raw)
        unconditional, conditional = raw.chunk(2)
        return _array(unconditional + problem.guidance_scale * (conditional - unconditional))

    def _removed(self, gates: Sequence[bool]) -> Iterator[str]:
        return (name for name, kept in zip(self._names, gates, strict=True) if not kept)


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array
