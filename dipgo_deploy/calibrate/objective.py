"""What gates lose under the solver that is fitted to them: an objective for every method of the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dipgo_deploy.calibrate.core import CalibrationOptions, grouped
from dipgo_deploy.calibrate.fit import launches_of
from dipgo_deploy.calibrate.fitted import opened_runs
from dipgo_deploy.calibrate.rows import FittedRows, fit_rows
from dipgo_deploy.calibrate.runs import Runs
from dipgo_deploy.calibrate.supernet_model import SupernetModel
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.evaluate import Objective, images_of
from dipgo_deploy.search.losses import IMAGE_LOSSES, LATENT_LOSSES
from dipgo_deploy.search.problem import Problem


def calibrated_objective(
    problem: Problem,
    loss: str,
    folder: Path,
    images: int = 16,
    on_evaluation: Callable[[int, float], None] = lambda count, best: None,
) -> Objective:
    """The mean ``loss`` to the full run when gates are run with rows that are fitted to them.

    Rows are fitted to twice as many images as judge them; both are calibration images, which no measurement uses.

    Args:
        problem: its reference's full run is fitted to and compared with, if it has one.
        loss: of images or of latents.
        folder: an empty one, for full runs and caches.
        images: that judge.
        on_evaluation: told the number of evaluations and the lowest loss so far.

    Raises:
        UserError: a loss on images for a model without a VAE, or a full run that is not finite.
    """
    problem.check_loss(loss)
    options = CalibrationOptions(images=3 * images, held_aside=1 / 3, batch=min(images, 20))
    scales: Sequence[float | None] = (problem.guidance_scale,)
    model = SupernetModel(problem, (), scales, folder)
    groups = grouped(len(problem.conditions), scales, options)
    steps = range(len((problem.reference or problem).matrix.timesteps))
    runs = opened_runs(model, groups, steps, options, 1 + model.noises + len(steps), folder=folder, settings={})
    judge = _judge(problem, runs, loss)

    def score(gates: Gates) -> float:
        steps, launches = launches_of(problem, gates)
        analysis = problem.costs.analyse(gates)
        rows = tuple(analysis.kept[step] for step in steps)
        guidance = tuple(analysis.guidance[step] for step in steps)
        return judge(fit_rows(runs, launches, model.with_gates(rows, guidance).predict))

    return Objective(problem.costs, score, on_evaluation=on_evaluation)


def _judge(problem: Problem, runs: Runs, loss: str) -> Callable[[FittedRows], float]:
    """The mean loss of the images held aside."""
    on_images = loss in IMAGE_LOSSES
    distance = IMAGE_LOSSES[loss] if on_images else LATENT_LOSSES[loss]
    aside = [group for group in runs.groups if group.held_aside]

    @torch.no_grad()
    def seen(latents: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(latents)).to(problem.device)
        return images_of(problem, tensor) if on_images else tensor

    references = [seen(runs.final[group.rows]) for group in aside]

    @torch.no_grad()
    def judge(rows: FittedRows) -> float:
        total = 0.0
        for group, reference in zip(aside, references, strict=True):
            total += distance(seen(rows.final(runs, group)), reference).sum().item()
        value = total / sum(len(group.pairs) for group in aside)
        return value if math.isfinite(value) else math.inf

    return judge
