"""The torch side of a comparison: the supernet under an engine directory's schedule, and one variant of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.shape import TraceShape, condition_specs
from dipgo_deploy.reference.conditions import ReferenceInputs, label_of, reference_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from dipgo_deploy.models.family import InputSpec
    from dipgo_deploy.reference.source import Source
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.supernet.gated import Supernet
    from dipgo_deploy.supernet.loop import Evaluation


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

    def inputs(self, manifest: Manifest, **options: Any) -> ReferenceInputs:
        """Noise and conditions of the size that ``manifest`` has; ``options`` as ``reference_inputs`` takes them."""
        latent = manifest.latent
        options.setdefault("labels", (label_of(manifest),))
        return reference_inputs(
            self.source,
            self.conditions,
            (manifest.batch, *latent.shape),
            noises=manifest.plan.noises,
            guidance=manifest.guidance,
            begin=self.begin,
            **options,
        )

    def walk(
        self, inputs: ReferenceInputs, keep: Callable[[int], Collection[str]] | None = None
    ) -> Generator[Evaluation, None, Tensor]:
        """The supernet's loop under the schedule; ``keep`` as ``supernet.run_loop`` has it."""
        from dipgo_deploy.supernet.loop import walk_loop

        return walk_loop(
            self.supernet,
            self.scheduler,
            self.schedule.gates,
            inputs.latents,
            inputs.conditions,
            num_inference_steps=self.schedule.sampler.num_inference_steps,
            guidance_scale=inputs.guidance_scale,
            noises=inputs.noises,
            set_timesteps_kwargs=self.set_timesteps,
            start=inputs.start,
            keep=keep,
        )


def load_reference(bundle: Bundle, model: str | None = None, weights: str | None = None) -> Reference:
    """Load the model that an engine directory was exported from.

    model: built-in name, folder or hub id; by default the one that the manifest names. weights: where its
    denoiser is loaded from instead.

    Raises:
        UserError: no such model, another model than the exported one, or a schedule that does not fit it.
    """
    from dipgo_deploy.reference.source import load_source

    manifest = bundle.manifest
    name = manifest.model.name if model is None else model
    try:
        source = load_source(name, weights=weights)
    except UserError as error:
        hint = f" (the model that {bundle.path} names; --model gives another place)" if model is None else ""
        raise UserError(f"{error}{hint}") from None
    return reference_of(bundle, source)


def reference_of(bundle: Bundle, source: Source) -> Reference:
    """The reference of an engine directory with a model that is loaded already, in float32.

    Raises:
        UserError: another model than the exported one, or a schedule that does not fit it.
    """
    from dipgo_deploy.sampler import evaluations, scheduler_of
    from dipgo_deploy.schedule.image import run_from

    manifest = bundle.manifest
    family, name = source.family, source.name
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
    begin = manifest.sampler.begin
    run = schedule if begin is None else run_from(schedule, begin)
    supernet = source.supernet(
        schedule.model.granularity, schedule.cache_kinds, run.forecast, run.denoisers, run.guidance
    )
    return Reference(source, run, scheduler, options, supernet, _condition_specs(source, manifest), begin)


def _condition_specs(source: Source, manifest: Manifest) -> tuple[InputSpec, ...]:
    latent, scheme = manifest.latent, source.text
    shape = TraceShape(
        batch=manifest.batch,
        height=latent.height,
        width=latent.width,
        frames=latent.frames,
        text_length=0 if scheme is None else scheme.length,
        guidance=manifest.guidance,
    )
    conditions = condition_specs(source.family, source.config, shape)
    shapes = {spec.name: spec.shape for spec in manifest.conditions}
    if {spec.name: spec.shape for spec in conditions} != shapes:
        raise UserError(f"manifest: conditions {shapes} are not those of the model; export the engine directory again")
    return conditions
