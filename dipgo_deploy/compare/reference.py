"""The torch side of a comparison: the supernet under an engine directory's schedule, and one variant of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest, VariantEntry
from dipgo_deploy.bundle.stack import graph_latent
from dipgo_deploy.compare.conditions import host
from dipgo_deploy.compare.recording import cache_place, cache_tensor
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.loop import COEFFICIENTS, GUIDANCE_SCALE, PREDICTION, STACK, TIMESTEP
from dipgo_deploy.supernet.gated import CacheState

if TYPE_CHECKING:
    from dipgo_deploy.export.source import Source
    from dipgo_deploy.models.family import InputSpec
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.supernet.gated import Supernet


@dataclass(frozen=True)
class Reference:
    """A model in torch, float32, and the schedule (after promotion) that an engine directory was made from.

    set_timesteps: what the scheduler's ``set_timesteps`` is given besides the number of steps. begin: of a run that
    starts from a picture, whose ``schedule`` has the rows that are run only.
    """

    source: Source
    schedule: Schedule
    scheduler: Any
    set_timesteps: Mapping[str, Any]
    supernet: Supernet
    conditions: tuple[InputSpec, ...]
    begin: int | None = None


def load_reference(bundle: Bundle, model: str | None = None, weights: str | None = None) -> Reference:
    """Load the model that an engine directory was exported from.

    model: built-in name, folder or hub id; by default the one that the manifest names. weights: where its
    denoiser is loaded from instead.

    Raises:
        UserError: no such model, another model than the exported one, or a schedule that does not fit it.
    """
    from dipgo_deploy.export.image import run_from
    from dipgo_deploy.export.source import load_source
    from dipgo_deploy.sampler import evaluations, scheduler_of

    manifest = bundle.manifest
    name = manifest.model.name if model is None else model
    try:
        source = load_source(name, weights=weights)
    except UserError as error:
        hint = f" (the model that {bundle.path} names; --model gives another place)" if model is None else ""
        raise UserError(f"{error}{hint}") from None
    family = source.family
    if family.class_name != manifest.model.class_name or manifest.model.config_hash not in source.config_hashes:
        raise UserError(
            f"{name}: {family.class_name} with configuration {source.config_hash[:12]}, but {bundle.path} was exported "
            f"from {manifest.model.class_name} with {manifest.model.config_hash[:12]}; give that model with --model"
        )
    schedule = bundle.load_schedule()
    source.check(schedule, allow_other_config=True)  # the manifest's configuration was checked above
    scheduler = scheduler_of(schedule)
    steps, options = schedule.sampler.num_inference_steps, manifest.sampler.set_timesteps
    schedule.check_evaluations(evaluations(scheduler, steps, set_timesteps_kwargs=options))
    supernet = source.supernet(schedule.model.granularity, schedule.cache_kinds)
    begin = manifest.sampler.begin
    run = schedule if begin is None else run_from(schedule, begin)
    return Reference(source, run, scheduler, options, supernet, _condition_specs(source, manifest), begin)


def _condition_specs(source: Source, manifest: Manifest) -> tuple[InputSpec, ...]:
    shapes = {spec.name: spec.shape for spec in manifest.conditions}
    scheme = source.text
    specs = source.family.inputs(
        source.config,
        batch=manifest.batch * (2 if manifest.guidance else 1),
        height=manifest.latent.height,
        width=manifest.latent.width,
        text_length=0 if scheme is None else scheme.length,
    )
    conditions = tuple(spec for spec in specs if spec.role == "condition")
    if {spec.name: spec.shape for spec in conditions} != shapes:
        raise UserError(f"manifest: conditions {shapes} are not those of the model; export the engine directory again")
    return conditions


class VariantReference:
    """A variant evaluated by the supernet, from the inputs of the variant's graph.

    A block is removed where the variant reads its cache. What the graph does not get is NaN here: if its result
    depended on it, that would show.
    """

    def __init__(self, reference: Reference, manifest: Manifest) -> None:
        self._supernet = reference.supernet
        self._conditions = reference.conditions
        self._manifest = manifest
        latent = manifest.latent
        self._sample_shape = (manifest.batch, latent.channels, latent.height, latent.width)

    def __call__(self, entry: VariantEntry, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs, float32, by the variant's graph output names; ``inputs`` by its graph input names."""
        latent = np.full(self._sample_shape, np.nan, np.float32)
        if STACK in inputs:
            latent = graph_latent(inputs[STACK], inputs[COEFFICIENTS], self._manifest.plan.stack.chain)
        timestep = float(inputs[TIMESTEP][0]) if TIMESTEP in inputs else float("nan")
        state = self._caches(entry, inputs)
        gates = [spec.name not in state.tensors for spec in self._supernet.specs]
        conditions = {name: torch.from_numpy(inputs[name]) for name in self._zeros if name in inputs}
        output, after = self._evaluate(latent, timestep, {**self._zeros, **conditions}, gates, state)
        prediction = output[:, : latent.shape[1]]
        if self._manifest.guidance and entry.predicts:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + float(inputs[GUIDANCE_SCALE][0]) * (conditional - unconditional)
        outputs = {PREDICTION: host(prediction)} if entry.predicts else {}
        return outputs | {name: cache_tensor(name, after) for name in entry.writes}

    def _evaluate(
        self, latent: np.ndarray, timestep: float, conditions: dict[str, torch.Tensor], gates: Any, state: CacheState
    ) -> tuple[torch.Tensor, CacheState]:
        batch = torch.from_numpy(np.concatenate([latent] * (2 if self._manifest.guidance else 1)))
        times = torch.full((len(batch),), timestep, dtype=torch.float32)
        with torch.no_grad():
            return self._supernet.step(batch, times, conditions, gates, state, 0)

    @cached_property
    def _zeros(self) -> dict[str, torch.Tensor]:
        return {
            # Ones where there are whole numbers: a mask that hides everything would make NaN.
            spec.name: torch.ones(spec.shape, dtype=torch.int64) if spec.dtype == "int64" else torch.zeros(spec.shape)
            for spec in self._conditions
        }

    @cached_property
    def _full(self) -> CacheState:
        """Caches after an evaluation with every block: what shapes and structures they have."""
        gates = [True] * len(self._supernet.specs)
        return self._evaluate(np.zeros(self._sample_shape, np.float32), 0.0, self._zeros, gates, CacheState())[1]

    def _caches(self, entry: VariantEntry, inputs: Mapping[str, np.ndarray]) -> CacheState:
        tensors: dict[str, list[torch.Tensor]] = {}
        for name in entry.reads:
            block, index = cache_place(name)
            if block not in tensors:
                tensors[block] = [torch.full_like(tensor, float("nan")) for tensor in self._full.tensors[block]]
            tensors[block][index] = torch.from_numpy(inputs[name])
        return CacheState(tensors, {block: self._full.structures[block] for block in tensors})
