"""The model in torch, as a calibration runs it: full runs, and launches with gates from latents of any origin."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipgo_deploy.calibrate.core import Group, Launch
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.schedule.forecast import Reads
from dipgo_deploy.search.problem import Problem, all_guided, with_guidance_scale
from dipgo_deploy.supernet import CacheState, Supernet
from dipgo_deploy.supernet.loop import guided_step


class SupernetModel:
    """A ``core.Model``: the launches of gates, for all groups side by side; caches that are read later lie in files."""

    def __init__(
        self,
        problem: Problem,
        gates: Gates,
        scales: Sequence[float | None],
        folder: Path,
        forecast: Reads | None = None,
        guidance: Sequence[float] | None = None,
    ) -> None:
        """gates: one row a launch. scales: guidance scales of the groups. folder: for caches. forecast: what removed
        blocks read, by number of the launch. guidance: of each launch, as a schedule has it."""
        self._at = {
            scale: problem if scale in (None, problem.guidance_scale) else with_guidance_scale(problem, scale)
            for scale in dict.fromkeys(scales)
        }
        self.sample_shape = problem.sample_shape
        self.noises = (problem.reference or problem).matrix.noises
        self.kept_bytes = 0  # what caches take is not known before they are made
        self.device = problem.device
        self.timesteps = (problem.reference or problem).matrix.timesteps
        self._gates = gates
        self._names = [block.name for block in problem.target.blocks]
        self._supernet = problem.source.supernet(problem.options.granularity, problem.cache_kinds)
        self._with_files = problem.source.supernet(problem.options.granularity, problem.cache_kinds)
        self._supernet.forecast = self._with_files.forecast = forecast
        self._supernet.guidance = self._with_files.guidance = guidance
        self._folder = folder
        self._states: dict[int, CacheState] = {}

    def with_gates(self, gates: Gates, guidance: Sequence[float]) -> SupernetModel:
        """The same model with other rows of gates and guidance, and no caches yet."""
        other = copy.copy(self)
        other._gates, other._states = gates, {}
        other._supernet, other._with_files = copy.copy(self._supernet), copy.copy(self._with_files)
        other._supernet.guidance = other._with_files.guidance = guidance
        return other

    @torch.no_grad()
    def full_run(self, group: Group, wanted: Collection[int]) -> tuple[Mapping[int, np.ndarray], np.ndarray]:
        """See ``core.Model``."""
        problem = self._at[group.scale]
        problem = all_guided(problem.reference or problem)
        latents: dict[int, np.ndarray] = {}

        def record(evaluation: Any) -> None:
            if evaluation.step in wanted:
                latents[evaluation.step] = _array(evaluation.model_input)

        whole = [[True] * len(problem.target.blocks)] * problem.steps
        final = problem.run(problem.batch(group.pairs), whole, record=record, keep=lambda step: ())
        return latents, _array(final)

    @torch.no_grad()
    def predict(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> np.ndarray:
        """See ``core.Model``."""
        from dipgo_deploy.reference.mapped import MappedCaches

        if not place and not all(map(all, self._gates)):
            self._with_files.store = self._with_files.store or MappedCaches(self._folder)
        before = self._states.get(group.rows.start, CacheState()) if place else CacheState()
        timestep = torch.tensor([launch.timestep], device=self.device)
        model_input = torch.from_numpy(latents).to(self.device)
        prediction, after = self._step(self._with_files, place, group, model_input, timestep, before)
        self._states[group.rows.start] = after
        return _array(prediction)

    def removed(self, place: int) -> list[int]:
        """Numbers of the blocks that launch number ``place`` does not compute."""
        return [block for block, kept in enumerate(self._gates[place]) if not kept]

    @torch.no_grad()
    def stored(self, place: int, group: Group) -> Mapping[int, list[list[Tensor]]]:
        """What the removed blocks of launch number ``place`` can read, the latest first."""
        state, store = self._states[group.rows.start], self._with_files.store
        return {
            block: [
                [tensor if store is None else store.get(tensor) for tensor in tensors]
                for tensors in state.stored(self._names[block])
            ]
            for block in self.removed(place)
        }

    @torch.no_grad()
    def computed(self, place: int, launch: Launch, group: Group, latents: np.ndarray) -> Mapping[int, list[Tensor]]:
        """What the removed blocks of launch number ``place`` would store if all blocks were computed."""
        timestep = torch.tensor([launch.timestep], device=self.device)
        problem = self._at[group.scale]
        _, _, after = guided_step(
            self._supernet,
            torch.from_numpy(latents).to(self.device),
            timestep,
            (problem.reference or problem).conditions_of(group.pairs),
            [True] * len(self._names),
            CacheState(),
            place,
            problem.guidance_scale,
            {self._names[block] for block in self.removed(place)},
        )
        return {block: after.tensors[self._names[block]] for block in self.removed(place)}

    def step(
        self, place: int, group: Group, latents: Tensor, timestep: Tensor, state: CacheState
    ) -> tuple[Tensor, CacheState]:
        """The guided prediction of launch number ``place``, and the caches after it; differentiable.

        latents: float32 (images, C, h, w). timestep: float32 (1,). state: caches after the launch before.
        """
        return self._step(self._supernet, place, group, latents, timestep, state)

    def _step(
        self, supernet: Supernet, place: int, group: Group, latents: Tensor, timestep: Tensor, state: CacheState
    ) -> tuple[Tensor, CacheState]:
        problem = self._at[group.scale]
        conditions = (problem.reference or problem).conditions_of(group.pairs)
        _, prediction, after = guided_step(
            supernet,
            latents,
            timestep,
            conditions,
            self._gates[place],
            state,
            place,
            problem.guidance_scale,
            {name for later in self._gates[place + 1 :] for name in self._removed(later)},
        )
        return prediction, after

    def _removed(self, gates: Sequence[bool]) -> Iterator[str]:
        return (name for name, kept in zip(self._names, gates, strict=True) if not kept)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().cpu().numpy()
    return array
