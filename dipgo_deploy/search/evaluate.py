"""The true objective: how far the images of hard gates are from the full run's. Only what the plan launches is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.costs import Analysis, Costs
from dipgo_deploy.search.losses import IMAGE_LOSSES, LATENT_LOSSES
from dipgo_deploy.search.problem import Pair, Problem, all_guided
from dipgo_deploy.supernet import CacheState, Gate, Supernet


class LaunchedSupernet(Supernet):
    """A supernet that does at each evaluation what a plan would: an evaluation whose prediction is an earlier one gives
    that one.

    Good for one loop: it keeps that loop's predictions.
    """

    def __init__(self, supernet: Supernet, analysis: Analysis) -> None:
        super().__init__(supernet.model, supernet.specs, supernet.cache_kinds, supernet.call, supernet.guide)
        self.forecast, self.guidance = supernet.forecast, analysis.guidance
        self._analysis = analysis
        self._number = {step: number for number, step in enumerate(analysis.predicts)}
        self._made: dict[int, Tensor] = {}

    def step(
        self,
        latent: Tensor,
        timestep: Tensor,
        conditions: Mapping[str, Tensor],
        gates: Sequence[Gate] | Tensor,
        state: CacheState,
        step: int,
        keep: Collection[str] | None = None,
        *,
        conditional: bool = False,
    ) -> tuple[Tensor, CacheState]:
        """See `Supernet.step`."""
        wanted = self._analysis.prediction_slots[step]
        if step not in self._analysis.launches:
            return self._made[wanted], state
        prediction, state = super().step(
            latent, timestep, conditions, gates, state, step, keep, conditional=conditional
        )
        if step in self._number:
            self._made[self._number[step]] = prediction
        return self._made.get(wanted, prediction), state


@torch.no_grad()
def sample(problem: Problem, gates: Sequence[Sequence[bool]], pairs: Sequence[Pair]) -> Tensor:
    """Final latents (B, C, h, w) of these images under gates, `Costs.width` a row."""
    analysis = problem.costs.analyse(gates)
    return problem.run(problem.batch(pairs), analysis.kept, LaunchedSupernet(problem.supernet, analysis))


@torch.no_grad()
def images_of(problem: Problem, latents: Tensor) -> Tensor:
    """Decoded images (B, 3, [F,] H, W) in [0, 1]."""
    return problem.decode(latents).clamp(0, 1)


@torch.no_grad()
def full_latents(problem: Problem, pairs: Sequence[Pair]) -> Tensor:
    """Final latents of the full run that images are compared with."""
    problem = all_guided(problem.reference or problem)
    return sample(problem, problem.costs.whole, pairs)


@dataclass
class Objective:
    """A loss of T x N gates, with their costs: all that a search method sees. Each distinct set of gates is run once.

    Attributes:
        costs: what gates cost.
        score: loss of gates without dead ones.
        evaluations: runs so far.
        on_evaluation: told their number and the lowest loss so far after each run.
    """

    costs: Costs
    score: Callable[[Gates], float]
    evaluations: int = 0
    on_evaluation: Callable[[int, float], None] = lambda count, best: None
    _known: dict[Gates, float] = field(default_factory=dict)

    def afresh(self) -> Objective:
        """The same objective with nothing run yet, for another search."""
        return Objective(self.costs, self.score, on_evaluation=self.on_evaluation)

    def __call__(self, gates: Sequence[Sequence[bool]]) -> float:
        """The loss of ``gates`` (dead gates make no difference)."""
        cleaned = self.costs.clean(gates)
        if cleaned not in self._known:
            self._known[cleaned] = self.score(cleaned)
            self.evaluations += 1
            self.on_evaluation(self.evaluations, min(self._known.values()))
        return self._known[cleaned]


def image_objective(problem: Problem, pairs: Sequence[Pair], loss: str, batch: int = 16, **options: Any) -> Objective:
    """The mean ``loss`` to the full run over fixed images, so that two sets of gates are compared on equal terms.

    batch: how many images go through the model at a time.

    Raises:
        UserError: a loss on images for a model without a VAE.
    """
    problem.check_loss(loss)
    on_images = loss in IMAGE_LOSSES
    distance = IMAGE_LOSSES[loss] if on_images else LATENT_LOSSES[loss]
    parts = [tuple(pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    full = [full_latents(problem, part) for part in parts]
    references = [images_of(problem, latents) for latents in full] if on_images else full

    @torch.no_grad()
    def score(gates: Gates) -> float:
        total = 0.0
        for part, reference in zip(parts, references, strict=True):
            latents = sample(problem, gates, part)
            total += distance(images_of(problem, latents) if on_images else latents, reference).sum().item()
        value = total / len(pairs)
        return value if math.isfinite(value) else math.inf

    return Objective(problem.costs, score, **options)
