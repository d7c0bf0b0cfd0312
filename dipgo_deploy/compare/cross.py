"""Two sides beside each other, evaluation by evaluation; and crosswise: one side's evaluation on the other's state, so
that the error which an evaluation makes is told from the one that it inherits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.compare.metrics import TensorError, Tolerance, image_errors, tensor_error
from dipgo_deploy.compare.report import IMAGES, LATENT, LATENTS, Checked, Report
from dipgo_deploy.compare.sides import Crossed, Given, Side, State
from dipgo_deploy.compare.worst import Seen, nobody
from dipgo_deploy.errors import UserError

Notify = Callable[[str], None]


def compare_sides(
    side: Side,
    reference: Side,
    given: Given,
    tolerance: Tolerance,
    *,
    cross: bool = False,
    seen: Seen = nobody,
    notify: Notify = lambda stage: None,
) -> Report:
    """Run both loops from the same noise, each on its own way, and compare latents, stored values and predictions.

    cross: at each evaluation the reference also runs on the side's latent and stored values. What the side differs by
    from *that* is made by the evaluation (``made``), and judged; what the reference's own two results differ by is
    inherited (``carried``), all of a latent. The results are judged by the whole error.
    seen: is shown the final images.

    Raises:
        UserError: the sides have other numbers of evaluations, or a graph cannot be run.
    """
    if side.rows != reference.rows:
        raise UserError(
            f"--against {reference.name}: has {reference.rows} evaluations, {side.name} has {side.rows}; give sides of "
            "the same sampler and steps"
        )
    checked = []
    for ours, theirs in zip(side.walk(given), reference.walk(given), strict=True):
        notify(f"evaluation {ours.step + 1} of {side.rows}")
        crossed = reference.on(ours) if cross else None
        tensors = _evaluation(ours, theirs, crossed, tolerance)
        if tensors:
            checked.append(Checked(ours.step, ours.launched, tensors))
    results = [tensor_error(LATENTS, side.final(), reference.final(), tolerance)]
    images = side.decode(side.final()), reference.decode(reference.final())
    if images[0] is not None and images[1] is not None:
        results += image_errors(IMAGES, images[0], images[1], tolerance)
        seen("after the last evaluation", images[0], images[1])
    return Report(tolerance, loop=tuple(checked), results=Checked(None, None, tuple(results)), reference=reference.name)


def _evaluation(ours: State, theirs: State, crossed: Crossed | None, tolerance: Tolerance) -> tuple[TensorError, ...]:
    tensors = []

    def add(name: str, found: np.ndarray | None, wanted: np.ndarray | None, alone: np.ndarray | None) -> None:
        if found is None or wanted is None:
            return
        error = tensor_error(name, found, wanted, tolerance)
        if alone is not None:
            made = tensor_error(name, found, alone, tolerance)
            carried = tensor_error(name, alone, wanted, tolerance).relative
            error = replace(error, passed=made.passed, made=made.relative, carried=carried)
        tensors.append(error)

    add(LATENT, ours.latent, theirs.latent, None if crossed is None else ours.latent)
    for cache in ours.written:
        if cache in theirs.written:
            step = ours.step
            alone = None if crossed is None else crossed.after.get(cache, step)
            add(cache.name, ours.after.get(cache, step), theirs.after.get(cache, step), alone)
    add(PREDICTION, ours.prediction, theirs.prediction, None if crossed is None else crossed.prediction)
    return tuple(tensors)
