"""Rows and timesteps of a fitted solver, refined together by gradients of the final latent's error.

Least squares fits each row to the full run's latent at that launch; what counts is the final latent. A few steps of
Adam through the whole loop take rows and timesteps to where that is closest to the full run's. The columns of a row
nearly cancel, so the steps are taken in coordinates in which the columns are orthonormal. The idea of learning a
solver's weights and timesteps from a finer run is that of S4S (arXiv 2502.17423) and LD3 (2405.15506).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dipgo_deploy.calibrate.core import Group, Report
from dipgo_deploy.calibrate.fitted import Refined
from dipgo_deploy.calibrate.least_squares import Sums
from dipgo_deploy.calibrate.rows import FittedRows
from dipgo_deploy.calibrate.runs import Runs
from dipgo_deploy.calibrate.supernet_model import SupernetModel
from dipgo_deploy.supernet import CacheState

# So small a share of the columns' size that is not in the images themselves is noise of the fit.
_FLOOR = 1e-10
_CHECKS = 6


@dataclass(frozen=True)
class RefineOptions:
    """How rows and timesteps are refined.

    iterations: steps of Adam, each on one group of images.
    lr: of rows, relative to the size of the latent; of timesteps, relative to the span of the full run's. It ends at 0
        along a cosine.
    """

    iterations: int = 60
    lr: float = 3e-3


def refined(
    model: SupernetModel,
    runs: Runs,
    rows: FittedRows,
    options: RefineOptions,
    report: Report = lambda stage, done, total: None,
) -> Refined | None:
    """Better rows and timesteps, or None where nothing was better on the images held aside."""
    loop = _Loop(model, runs, rows)
    training = [group for group in runs.groups if not group.held_aside]
    aside = [group for group in runs.groups if group.held_aside]
    optimizer = torch.optim.Adam([*loop.moves, loop.shifts], lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations)
    best, found = rows.residual, None
    every = max(1, options.iterations // _CHECKS)
    for iteration in range(options.iterations):
        report("refining", iteration, options.iterations)
        group = training[iteration % len(training)]
        error, size = loop.error(group)
        optimizer.zero_grad()
        (error / size).backward()
        optimizer.step()
        schedule.step()
        if (iteration + 1) % every and iteration + 1 < options.iterations:
            continue
        residual = loop.residual(aside)
        if residual < best:
            best, found = residual, loop.values()
    report("refining", options.iterations, options.iterations)
    if found is None:
        return None
    weights, timesteps = found
    launches = tuple(
        replace(launch, timestep=timestep) for launch, timestep in zip(rows.launches, timesteps, strict=True)
    )
    facts = {"iterations": options.iterations, "lr": options.lr}
    return Refined(launches, weights, best, facts)


class _Loop:
    """The fitted loop, differentiable.

    moves: what is added to each row, in coordinates in which its columns are orthonormal.
    shifts: what is added to the timesteps, as shares of the full run's span.
    """

    def __init__(self, model: SupernetModel, runs: Runs, rows: FittedRows) -> None:
        self._model, self._runs, self._launches = model, runs, rows.launches
        self._weights = [torch.from_numpy(fit.weights) for fit in rows.fits]
        self._bases = [_orthonormal(sums) for sums in rows.sums]
        self.moves = [torch.zeros_like(weights, requires_grad=True) for weights in self._weights]
        self._timesteps = torch.tensor([launch.timestep for launch in rows.launches], dtype=torch.float64)
        self._first, self._last = float(max(model.timesteps)), float(min(model.timesteps))
        self.shifts = torch.zeros_like(self._timesteps, requires_grad=True)

    def error(self, group: Group) -> tuple[Tensor, float]:
        """Squared error of the final latent of these images, and the squared size of the full run's."""
        target = torch.from_numpy(np.asarray(self._runs.final[group.rows])).to(self._model.device)
        return (self._final(group) - target).square().sum(), float(target.square().sum())

    @torch.no_grad()
    def residual(self, groups: Sequence[Group]) -> float:
        """Relative error of the final latent."""
        errors = [self.error(group) for group in groups]
        return float(np.sqrt(sum(float(error) for error, _ in errors) / sum(size for _, size in errors)))

    @torch.no_grad()
    def values(self) -> tuple[tuple[np.ndarray, ...], list[float]]:
        """Weights of each row, and timesteps, as they are now."""
        return tuple(row.numpy().copy() for row in self._rows()), [float(value) for value in self._now()]

    def _rows(self) -> list[Tensor]:
        return [
            weights + basis @ move for weights, basis, move in zip(self._weights, self._bases, self.moves, strict=True)
        ]

    def _now(self) -> Tensor:
        return (self._timesteps + (self._first - self._last) * self.shifts).clamp(self._last, self._first)

    def _final(self, group: Group) -> Tensor:
        device = self._model.device
        noise, *draws = (torch.from_numpy(np.asarray(column[group.rows])).to(device) for column in self._runs.noises)
        predictions: list[Tensor] = []
        rows, timesteps, state = self._rows(), self._now().float().to(device), CacheState()
        for place, launch in enumerate(self._launches):
            latents = _weighted(rows[place], [noise, *predictions, *draws])
            # The launch is run again on the way back: only latents, predictions and caches stay in memory.
            prediction, state = checkpoint(
                self._model.step, place, group, latents, timesteps[place : place + 1], state, use_reentrant=False
            )
            if launch.predicts:
                predictions.append(prediction)
        return _weighted(rows[-1], [noise, *predictions, *draws])


def _weighted(weights: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the columns, made in float64 because they nearly cancel, as float32."""
    total = torch.tensordot(weights.to(columns[0].device), torch.stack(list(columns)).double(), dims=1)
    return total.float()


def _orthonormal(sums: Sums) -> Tensor:
    """(c, c): steps of length 1 in its columns change the latent by its own root mean square."""
    count = len(sums.moments)
    gram = sums.gram / sums.square
    eased = gram + _FLOOR * np.trace(gram) / count * np.eye(count)
    return torch.from_numpy(np.linalg.inv(np.linalg.cholesky(eased).T))
