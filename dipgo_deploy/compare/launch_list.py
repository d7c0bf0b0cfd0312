"""The launch list against the sampler: coefficients, timesteps and final weights, computed again and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.names import FORECAST, HISTORY, parse_cache
from dipgo_deploy.compare.metrics import Tolerance, tensor_error
from dipgo_deploy.compare.report import Part
from dipgo_deploy.schedule.forecast import AS_STORED, stored_before

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import LaunchEntry, Manifest, PlanEntry
    from dipgo_deploy.reference.load import Reference
    from dipgo_deploy.schedule.document import Schedule

NAME = "launch list"
# The same float64 arithmetic made them: only another order of summation may differ.
EXACT = Tolerance(1e-12)


def check_launch_list(manifest: Manifest, reference: Reference) -> list[Part]:
    """What the manifest says of the sampler, and each launch's coefficients and timestep, against the schedule's
    sampler run again; one part for each launch that differs, or one for all."""
    from dipgo_deploy.sampler import sampler_matrix

    wrong = [Part(NAME, "", "the schedule", (), note) for note in _differences(manifest, reference)]
    if wrong:
        return wrong
    plan, schedule = manifest.plan, reference.schedule
    rows = len(schedule.gates)
    for index, launch in enumerate(plan.launches):
        if not 0 <= launch.step < rows:
            note = f"evaluation {launch.step} is none of the schedule's {rows}"
            return [Part(NAME, f"launch {index}", "the schedule", (), note)]
        if index and launch.step < plan.launches[index - 1].step:
            note = f"evaluation {launch.step} comes after evaluation {plan.launches[index - 1].step}"
            return [Part(NAME, f"launch {index}", "the schedule", (), note)]
        found, wanted = _denoiser(manifest, launch), schedule.denoisers and schedule.denoisers[launch.step]
        if found != wanted:
            note = f"is of denoiser {found}, the schedule runs {wanted} at evaluation {launch.step}"
            return [Part(NAME, f"launch {index}", "the schedule", (), note)]
        share = 1.0 if schedule.guidance is None else schedule.guidance[launch.step]
        if launch.guidance != share:
            note = f"has {launch.guidance:g} of the guidance, the schedule {share:g} at evaluation {launch.step}"
            return [Part(NAME, f"launch {index}", "the schedule", (), note)]
    source, columns = _predictions(plan, len(reference.schedule.gates))
    matrix = sampler_matrix(
        reference.scheduler,
        reference.schedule.sampler.num_inference_steps,
        source,
        set_timesteps_kwargs=reference.set_timesteps,
        begin=reference.begin,
        check=False,
    )
    for name, found, wanted in (
        # A fitted solver stands for the sampler that the manifest names.
        *_settings(manifest.sampler.config, matrix.config if schedule.solver is None else schedule.sampler.config),
        ("plan.noises", plan.noises, matrix.noises),
        ("a slot for a picture", plan.image_slot is not None, matrix.image),
    ):
        if found != wanted:
            return [Part(NAME, "", "the sampler", (), f"{name} is {found}, not {wanted}")]
    places = _places(plan, columns, matrix.predictions, matrix.noises)
    for place, note in _slots_wrong(plan, places):
        return [Part(NAME, place, "the sampler", (), note)]

    def weights(row: np.ndarray) -> np.ndarray:
        found = np.zeros(plan.slots)
        for column, slot in places.items():
            found[slot] = row[column]
        return found

    parts = []
    known = list(stored_before(schedule.gates, schedule.conditional_only))
    for index, launch in enumerate(plan.launches):
        variant = plan.variants[launch.variant]
        expected = {"timestep": np.array([matrix.timesteps[launch.step]])}
        actual = {"timestep": np.array([launch.timestep])}
        if HISTORY in {spec.name for spec in variant.graph.inputs}:
            expected["coefficients"] = weights(matrix.rows[launch.step])
            actual["coefficients"] = np.array(launch.coefficients)
        if plan.layout == "variants" and launch.forecast:
            expected[FORECAST] = np.array(_forecast(schedule, variant.reads, launch.step, known[launch.step]))
            actual[FORECAST] = np.array(launch.forecast)
        parts.append(_part(_place(plan, index), actual, expected))
    parts.append(_part("after the last launch", {"final": np.array(plan.final)}, {"final": weights(matrix.final)}))
    failed = [part for part in parts if not part.passed]
    whole = tuple(tensor for part in parts for tensor in part.tensors)
    return failed or [Part(NAME, "", "the sampler", (max(whole, key=lambda tensor: tensor.relative),))]


def _denoiser(manifest: Manifest, launch: LaunchEntry) -> str | None:
    names = manifest.model.denoisers
    return names[launch.denoiser] if names else None


def _forecast(schedule: Schedule, reads: Sequence[str], step: int, stored: Sequence[tuple[int, ...]]) -> list[float]:
    """Weights of a variant's reads that have one, at evaluation ``step``. stored: evaluations of what each block stored
    before, the latest first."""
    order = {name: place for place, name in enumerate(schedule.block_names)}
    weights = []
    for cache in filter(None, map(parse_cache, reads)):
        if cache.nth:
            block = order[cache.block]
            row = AS_STORED if schedule.forecast is None else schedule.forecast.weights_of(step, block, stored[block])
            weights.append(row[cache.nth - 1] if cache.nth <= len(row) else 0.0)
    return weights


def _part(place: str, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Part:
    return Part(NAME, place, "the sampler", tuple(tensor_error(n, actual[n], expected[n], EXACT) for n in expected))


def _differences(manifest: Manifest, reference: Reference) -> list[str]:
    """What is said of the sampler and is not so, one line each."""
    schedule, sampler = reference.schedule.sampler, manifest.sampler
    latent, source = manifest.latent, reference.source
    steps = schedule.num_inference_steps
    timesteps = source.set_timesteps(reference.scheduler, latent.extents, steps)
    facts: dict[str, tuple[Any, Any]] = {
        "sampler.class_name": (sampler.class_name, schedule.class_name),
        "sampler.num_inference_steps": (sampler.num_inference_steps, steps),
        "sampler.set_timesteps": (dict(sampler.set_timesteps), timesteps),
        "sampler.begin": (sampler.begin, _begin(manifest, reference)),
        "plan.evaluations": (manifest.plan.evaluations, len(reference.schedule.gates)),
    }
    return [f"{name} is {found}, not {wanted}" for name, (found, wanted) in facts.items() if found != wanted]


def _settings(exported: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The sampler's settings side by side; what is not finite is null in JSON."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value) or value in ("Infinity", "-Infinity"):
            return None
        return list(value) if isinstance(value, tuple) else value

    for name in sorted({*exported, *present}):
        yield f"sampler.config.{name}", finite(exported.get(name)), finite(present.get(name))


def _begin(manifest: Manifest, reference: Reference) -> int | None:
    from dipgo_deploy.sampler import begin_of

    skipped, strength = reference.source.family.image_to_image, manifest.sampler.strength
    if strength is None or skipped is None:
        return None
    steps = reference.schedule.sampler.num_inference_steps
    return begin_of(reference.scheduler, steps, strength, skipped, set_timesteps_kwargs=reference.set_timesteps)


def _predictions(plan: PlanEntry, evaluations: int) -> tuple[list[int], dict[int, int]]:
    """For each evaluation the number of the prediction that the sampler gets there, and the slot of each number that a
    launch makes. An evaluation without one has the last again; the sampler gives no weight to what nobody makes."""
    slots = {launch.step: launch.slot for launch in plan.launches if launch.slot is not None}
    source: list[int] = []
    made: dict[int, int] = {}
    number = -1
    for step in range(evaluations):
        if step in slots or not source:
            number += 1
        if step in slots:
            made[number] = slots[step]
        source.append(number)
    return source, made


def _places(plan: PlanEntry, slots: Mapping[int, int], predictions: int, noises: int) -> dict[int, int]:
    """The slot of the history of each column of the matrix."""
    places = {0: 0, **{1 + number: slot for number, slot in slots.items()}}
    if plan.image_slot is not None:
        places[1 + predictions] = plan.image_slot
    after = 1 + predictions + (plan.image_slot is not None)
    return places | {after + draw: plan.slots - noises + draw for draw in range(noises)}


def _slots_wrong(plan: PlanEntry, places: Mapping[int, int]) -> Iterator[tuple[str, str]]:
    """Where a slot of the history is filled twice or never, and what is wrong there."""
    given = {0, plan.image_slot, *range(plan.slots - plan.noises, plan.slots)}
    for index, launch in enumerate(plan.launches):
        if launch.slot is None:
            continue
        if launch.slot in given or launch.slot >= plan.slots:
            yield (
                _place(plan, index),
                f"slot {launch.slot} of {plan.slots} is not for a prediction, or is filled already",
            )
        given.add(launch.slot)
    spare = range(plan.history.chain - plan.spare, plan.history.chain)
    missing = sorted(set(range(plan.slots)) - set(places.values()) - set(spare))
    if missing:
        yield "", f"no launch makes the prediction of slot {missing[0]}"


def _place(plan: PlanEntry, index: int) -> str:
    launch = plan.launches[index]
    return f"launch {index} (evaluation {launch.step}, variant {plan.variants[launch.variant].name})"
