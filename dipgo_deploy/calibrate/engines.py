"""A schedule's own solver, fitted with the predictions of the engines that will run it; see ``calibrate.fitted``.

Nothing is exported again and nothing of torch is needed: a solver is the timesteps and coefficients of a launch list,
which stand in the manifest alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.history import final_latent
from dipgo_deploy.bundle.manifest import LaunchEntry, Manifest, PlanEntry, SamplerEntry
from dipgo_deploy.bundle.self_test import has_self_test, self_test_file
from dipgo_deploy.bundle.staging import replaced
from dipgo_deploy.calibrate.core import (
    CalibrationOptions,
    Group,
    Launch,
    Report,
    conditions_digest,
    grouped,
    nearest,
    noise_of,
)
from dipgo_deploy.calibrate.fitted import fitted_solver
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.image import batch_for, pad_batch
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.requests import Asked, check_request
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.schedule.solver import Solver

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """What the calibration images show: prompts, or class labels; neither for a model without conditions."""

    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One a condition, as ``search.problem`` names them."""
        return self.prompts or tuple(map(str, self.class_labels)) or ("",)

    def asked(self, guidance_scale: float | None) -> Asked:
        """All of them, once."""
        return Asked(
            prompt=self.prompts or None,
            class_labels=self.class_labels or None,
            guidance_scale=guidance_scale,
            output_type="latent",
        )


def calibrate_engines(
    bundle: Bundle,
    reference: Bundle,
    backend: Backend,
    conditions: Conditions,
    options: CalibrationOptions | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Schedule:
    """The schedule of ``bundle`` with a solver of its own, fitted to the runs of ``reference``, all on ``backend``.

    Only launched evaluations are left in it. What is kept of each image, and the arena between two evaluations, lie in
    files below ``folder`` (None: a temporary one).

    Raises:
        UserError: directories that do not go together, images or conditions that they do not take, a folder that cannot
            be used, or a run whose latents are not finite.
    """
    options = options or CalibrationOptions()
    options.check()
    check_pair(bundle, reference)
    for one in (bundle, reference):
        backend.check(one.manifest)
    scales = _scales(bundle.manifest, options)
    for one in (bundle, reference):
        for scale in scales:
            check_request(one.manifest, conditions.asked(scale))
    launches = launches_of(bundle.manifest.plan, reference.manifest.plan)
    facts = _facts(bundle, reference, backend, conditions, scales)
    with TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        solver = fitted_solver(
            _Engines(bundle, reference, backend, conditions, work),
            launches,
            grouped(len(conditions.names), scales, options),
            options,
            folder=work,
            settings={**facts, "engines": [bundle.manifest.seal, reference.manifest.seal]},
            provenance=facts,
            resume=resume,
            report=report,
        )
    part = bundle.load_schedule().at(bundle.manifest.plan.launched)
    return part.with_solver(solver)


def with_solver(bundle: Bundle, fitted: Schedule) -> Bundle:
    """Give an engine directory the solver that was fitted to it: its manifest and its schedule change, at once.

    The self-test that it may carry goes: it is of the loop without the solver.

    fitted: what ``calibrate_engines`` made of this directory's schedule.

    Raises:
        UserError: it is of another launch list, or the directory cannot be written.
    """
    solver, manifest = fitted.solver, bundle.manifest
    assert solver is not None
    steps = manifest.plan.launched
    before = bundle.load_schedule()
    if fitted.gates != tuple(before.gates[step] for step in steps) or solver.noises != manifest.plan.noises:
        raise UserError(f"{bundle.path}: the solver was fitted to another launch list; fit it to this one")
    text = fitted.to_json().encode()
    old_test = self_test_file(manifest)
    kept = {name: digest for name, digest in manifest.files.items() if name != old_test}
    if has_self_test(manifest):
        _log.warning("%s: its self-test is of the loop without the solver, so it carries none now", bundle.path)
    sampler = fitted.sampler
    changed = manifest.model_copy(
        update={
            "plan": plan_with(manifest.plan, solver, steps, dropped=len(before.gates) - len(steps)),
            "promoted": (),
            "sampler": SamplerEntry(
                class_name=sampler.class_name,
                config=to_json(sampler.config),
                num_inference_steps=sampler.num_inference_steps,
            ),
            "files": {**kept, manifest.schedule: hashlib.sha256(text).hexdigest()},
        }
    )
    bundle.check_unchanged()
    replaced(bundle.path, changed, {manifest.schedule: text}, gone=(old_test,))
    return Bundle.open(bundle.path)


def check_pair(bundle: Bundle, reference: Bundle) -> None:
    """Refuse (UserError) engine directories of which one cannot be fitted to the other's runs; loads no graph."""
    own, full = bundle.manifest, reference.manifest
    if bundle.schedules:
        raise UserError(
            f"--engine-dir {bundle.path}: has several schedules ({', '.join(bundle.schedules)}), whose graphs belong "
            "together; fit each in a directory of its own, then export the fitted schedules together"
        )
    for one, option in ((bundle, "--engine-dir"), (reference, "--reference-engine-dir")):
        if one.manifest.plan.image_slot is not None:
            raise UserError(
                f"{option} {one.path}: was exported with --strength, and solvers are fitted to runs from noise alone; "
                "export it without"
            )
    differ = (
        ("model", (own.model.class_name, own.model.config_hash), (full.model.class_name, full.model.config_hash)),
        ("guidance", own.guidance, full.guidance),
        ("size", _sample_shape(own), _sample_shape(full)),
        ("noise draws", own.plan.noises, full.plan.noises),
    )
    for what, here, there in differ:
        if here != there:
            raise UserError(
                f"--reference-engine-dir {reference.path}: another {what} ({there}) than {bundle.path} ({here}); "
                "export the full run of the same model for the same size, with the same guidance"
            )
    schedule = reference.load_schedule()
    if schedule.solver is not None or not all(map(all, schedule.gates)):
        raise UserError(
            f"--reference-engine-dir {reference.path}: its schedule leaves blocks out; export a full one "
            "(dipgo-schedule full)"
        )
    if schedule.guidance is not None:
        raise UserError(
            f"--reference-engine-dir {reference.path}: its schedule has a guidance of its own; export a full one "
            "(dipgo-schedule full)"
        )


def launches_of(plan: PlanEntry, full: PlanEntry) -> list[Launch]:
    """What is fitted: for each launched evaluation the one of the full run at the nearest timestep."""
    times = {launch.step: launch.timestep for launch in full.launches}
    steps = list(times)
    found = []
    for step in plan.launched:
        own = [launch for launch in plan.launches if launch.step == step]
        target = steps[nearest(list(times.values()), own[0].timestep)]
        predicts = any(launch.slot is not None for launch in own)
        found.append(Launch(times[target], target, predicts))
    return found


def plan_with(plan: PlanEntry, solver: Solver, steps: Sequence[int], dropped: int) -> PlanEntry:
    """The launch list with the solver's rows and timesteps. dropped: evaluations that are not in it any more."""
    place_of = {step: place for place, step in enumerate(steps)}
    made = sorted({place_of[launch.step] for launch in plan.launches if launch.slot is not None})
    columns = [0, *(1 + place for place in made), *range(1 + len(steps), solver.columns)]

    def weights(row: Sequence[float]) -> tuple[float, ...]:
        return tuple(row[column] for column in columns)

    def changed(launch: LaunchEntry) -> LaunchEntry:
        place = place_of[launch.step]
        row = weights(solver.rows[place]) if launch.coefficients else ()
        return launch.model_copy(
            update={"step": place, "timestep": float(np.float32(solver.timesteps[place])), "coefficients": row}
        )

    return plan.model_copy(
        update={
            "launches": tuple(map(changed, plan.launches)),
            "final": weights(solver.final),
            "evaluations": len(steps),
            # Every evaluation that is left is launched: what the gates ask for is what is run.
            "macs_schedule": plan.macs_run if dropped else plan.macs_schedule,
        }
    )


def _sample_shape(manifest: Manifest) -> tuple[int, ...]:
    return manifest.at(manifest.usual_sizes).latent.shape


def _scales(manifest: Manifest, options: CalibrationOptions) -> tuple[float | None, ...]:
    scaled = manifest.guidance or any(spec.source == "guidance" for spec in manifest.conditions)
    if options.guidance_scales and not scaled:
        raise UserError("--guidance-scale: the engine directory was exported without guidance; leave it out")
    return options.guidance_scales or ((manifest.guidance_scale,) if scaled else (None,))


def _facts(
    bundle: Bundle, reference: Bundle, backend: Backend, conditions: Conditions, scales: Sequence[float | None]
) -> dict[str, Any]:
    full = reference.manifest
    return {
        "reference": {
            "sampler": full.sampler.class_name,
            "num_inference_steps": full.sampler.num_inference_steps,
            "dtype": full.dtype,
        },
        "conditions": len(conditions.names),
        "conditions_sha256": conditions_digest(conditions.names),
        "guidance_scales": [scale for scale in scales if scale is not None],
        "latent": list(_sample_shape(bundle.manifest)[-2:]),
        "dtype": bundle.manifest.dtype,
        "backend": backend.name,
    }


class _Engines:
    """Two engine directories, one loaded at a time: first all full runs, then all launches."""

    def __init__(
        self, bundle: Bundle, reference: Bundle, backend: Backend, conditions: Conditions, folder: Path
    ) -> None:
        self.sample_shape = _sample_shape(bundle.manifest)
        self.noises = bundle.manifest.plan.noises
        self.kept_bytes = -(-bundle.manifest.plan.arena_bytes // bundle.manifest.batch)
        self._bundle, self._reference, self._backend = bundle, reference, backend
        self._conditions, self._folder = conditions, folder
        self._steps = bundle.manifest.plan.launched
        self._loaded: _Loaded | None = None

    def _at(self, bundle: Bundle) -> _Loaded:
        if self._loaded is None or self._loaded.bundle is not bundle:
            self._loaded = None  # before the other one: both at once would take twice the memory
            self._loaded = _Loaded(bundle, self._backend, self._conditions, self._folder)
        return self._loaded

    def full_run(self, group: Group, wanted: Collection[int]) -> tuple[Mapping[int, np.ndarray], np.ndarray]:
        """See ``core.Model``."""
        at_work = self._at(self._reference)
        plan = self._reference.manifest.plan
        rows = {launch.step: launch.coefficients for launch in plan.launches if launch.coefficients}
        noise = noise_of(group.pairs, self.sample_shape, 1 + self.noises)
        latents: dict[int, list[np.ndarray]] = {step: [] for step in wanted}
        finals = []
        for part, batch in at_work.parts(len(group.pairs)):
            final = at_work.loop.run(
                pad_batch(noise[0][part], batch),
                at_work.inputs(group, part, batch),
                noises=np.stack([pad_batch(draw[part], batch) for draw in noise[1:]]) if self.noises else None,
                guidance_scale=1.0 if group.scale is None else group.scale,
            )
            history = at_work.loop.history()
            for step, found in latents.items():
                found.append(final_latent(history, rows[step])[: part.stop - part.start])
            finals.append(final[: part.stop - part.start])
        return {step: np.concatenate(found) for step, found in latents.items()}, np.concatenate(finals)

    def predict(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> np.ndarray:
        """See ``core.Model``."""
        at_work = self._at(self._bundle)
        found = {}
        parts = [*at_work.parts(len(group.pairs))]
        # To and fro: the conditions of the last evaluation come first, whose rows are kept (``runtime.run_rows``).
        for part, batch in parts[:: -1 if place % 2 else 1]:
            key = group.rows.start + part.start
            prediction, arena = at_work.loop.evaluate(
                self._steps[place],
                pad_batch(latents[part], batch),
                at_work.inputs(group, part, batch),
                timestep=launch.timestep,
                guidance_scale=1.0 if group.scale is None else group.scale,
                arena=at_work.arena(key) if place else None,
            )
            at_work.keep(key, arena)
            found[part.start] = latents[part] if prediction is None else prediction[: part.stop - part.start]
        return np.concatenate([found[start] for start in sorted(found)])


class _Loaded:
    """A loaded engine directory and its conditions at each guidance scale; arenas between evaluations are files."""

    def __init__(self, bundle: Bundle, backend: Backend, conditions: Conditions, folder: Path) -> None:
        self.bundle = bundle
        self._conditions = conditions
        self._pipeline = Pipeline(bundle, backend)
        self._rows: dict[float | None, dict[str, tuple[np.ndarray | None, np.ndarray]]] = {}
        self._folder = folder
        self.loop = DenoisingLoop(bundle, backend)

    def parts(self, images: int) -> Iterator[tuple[slice, int]]:
        """The images of a group as batches that the directory takes: rows and batch."""
        manifest = self.bundle.manifest
        for start in range(0, images, manifest.batch):
            stop = min(start + manifest.batch, images)
            yield slice(start, stop), batch_for(stop - start, manifest.batch, manifest.sizes)

    def inputs(self, group: Group, part: slice, batch: int) -> dict[str, np.ndarray]:
        """The denoiser's conditions of these images, the unconditional half first."""
        if group.scale not in self._rows:
            request = check_request(self.bundle.manifest, self._conditions.asked(group.scale))
            self._rows[group.scale] = self._pipeline.conditions(request)
        places = [pair.condition for pair in group.pairs[part]]
        return {
            name: np.concatenate([pad_batch(half[places], batch) for half in halves if half is not None])
            for name, halves in self._rows[group.scale].items()
        }

    def arena(self, key: int) -> np.ndarray | None:
        """The arena that was kept under a key."""
        return np.load(self._file(key), allow_pickle=False) if self.bundle.manifest.plan.arena_bytes else None

    def keep(self, key: int, arena: np.ndarray) -> None:
        """Keep an arena under a key."""
        if len(arena):
            np.save(self._file(key), arena)

    def _file(self, key: int) -> Path:
        return self._folder / f"arena-{key}.npy"
