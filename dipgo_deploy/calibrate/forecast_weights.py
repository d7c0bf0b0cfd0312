"""Weights of what removed blocks read, by least squares, launch by launch, as the schedule itself runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dipgo_deploy.calibrate.core import Group, Launch
from dipgo_deploy.calibrate.least_squares import RIDGES, Sums, best_fit
from dipgo_deploy.calibrate.supernet_model import SupernetModel
from dipgo_deploy.schedule.forecast import AS_STORED, FittedForecast, Weights

# Stored values are not made to cancel: more of a ridge may be right than for the rows of a solver.
_RIDGES = (*RIDGES, 1e-3, 1e-2)


class ReadWeights:
    """The weights that are fitted so far; the model reads with them."""

    def __init__(self, terms: int, blocks: int) -> None:
        """terms: stored values that are read, where there are as many. blocks: how many the model has."""
        self._terms, self._blocks = terms, blocks
        self._rows: list[dict[int, Weights]] = []
        self._residuals: list[float] = []

    def weights_of(self, step: int, block: int, stored: Sequence[int]) -> Weights:
        """As ``schedule.forecast.Reads`` has it; evaluations are launches by number."""
        return self._rows[step].get(block, AS_STORED) if step < len(self._rows) else AS_STORED

    @property
    def terms(self) -> int:
        """As ``schedule.forecast.Reads`` has it."""
        return self._terms

    def fit(
        self, model: SupernetModel, place: int, launch: Launch, batches: Iterable[tuple[Group, np.ndarray]]
    ) -> None:
        """Fit what the removed blocks of launch number ``place`` read to what they would store at these latents if all
        blocks were computed: one weight a stored value, over all images, channels and places.

        batches: the images with their latents.
        """
        assert place == len(self._rows)
        self._rows.append({})
        removed = model.removed(place)
        if not removed:
            return
        sums: dict[int, tuple[Sums, Sums]] = {}
        for group, latents in batches:
            wanted, known = model.computed(place, launch, group, latents), model.stored(place, group)
            for block in removed:
                values = known[block][: self._terms]
                training, aside = sums.setdefault(block, (Sums(len(values)), Sums(len(values))))
                columns = np.stack([_flat(tensors) for tensors in values], axis=1)
                (aside if group.held_aside else training).add(columns, _flat(wanted[block]))
        for block, (training, aside) in sums.items():
            fit = best_fit(training, aside, _RIDGES)
            self._rows[-1][block] = tuple(float(weight) for weight in fit.weights)
            self._residuals.append(fit.residual)

    def forecast(self, provenance: Mapping[str, Any]) -> FittedForecast:
        """The weights as a schedule has them."""
        mean = float(np.mean(self._residuals)) if self._residuals else 0.0
        facts = {"method": "least squares", **provenance, "mean_residual": float(f"{mean:.4g}")}
        rows = [[row.get(block, ()) for block in range(self._blocks)] for row in self._rows]
        return FittedForecast.model_validate({"kind": "weights", "weights": rows, "provenance": facts})


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.float().cpu().numpy().reshape(-1) for tensor in tensors])
