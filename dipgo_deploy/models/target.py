"""From a model and a sampler to what a schedule is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, CacheKind, Granularity, ModelFamily
from dipgo_deploy.models.files import denoiser_weights
from dipgo_deploy.models.location import (
    config_folder,
    denoiser_config,
    native_size,
    pipeline_index,
    scheduler_config,
)
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.sampler.kinds import check_kind, kind_of
from dipgo_deploy.schedule.builders import PendingTarget, Target
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry, Schedule
from dipgo_deploy.schedule.identity import accepted_hashes, config_hash

# Latent pixels of a model whose configuration does not say its size; the number of evaluations does not depend on it.
NOMINAL_SIZE = 128
NOMINAL_FRAMES = 1
# Of an evaluation; Runge-Kutta steps make as many.
_MOST_EVALUATIONS = 4


def schedule_target(
    model: str,
    sampler: str | None = None,
    num_inference_steps: int = 50,
    granularity: Granularity = "block",
    cache: CacheKind | None = None,
) -> Target:
    """What a schedule for this model and sampler needs to say, T included. Needs the extra ``export``.

    See `pending_target`.
    """
    return pending_target(model, sampler, num_inference_steps, granularity, cache).complete()


def pending_target(
    model: str,
    sampler: str | None = None,
    num_inference_steps: int = 50,
    granularity: Granularity = "block",
    cache: CacheKind | None = None,
) -> PendingTarget:
    """What of a target the model's configuration decides; completing it needs the extra ``export`` (diffusers).

    Args:
        model: built-in name, folder or hub id.
        sampler: a name of ``dipgo_deploy.sampler`` or a diffusers scheduler class; None takes the model folder's own.
        cache: kind for every block, None the family's default. T is the sampler's number of evaluations of the
            denoiser.

    Raises UserError for an unknown model, sampler or granularity, and a cache kind that a block does not support.
    """
    if sampler is not None:
        from dipgo_deploy.sampler.schedulers import SAMPLERS, check_sampler_name

        check_sampler_name(sampler)
    family, config = denoiser_config(model)
    if sampler is None and scheduler_config(config_folder(model)) is None:
        raise UserError(f"{model}: has no scheduler/scheduler_config.json; name a sampler")
    if granularity not in family.granularities:
        raise UserError(
            f"granularity: {family.class_name} has {' and '.join(family.granularities)}, not {granularity!r}"
        )
    if sampler is not None:
        class_name, settings = SAMPLERS.get(sampler.lower(), (sampler, {}))
        check_sampler_kind(model, class_name, {**(scheduler_config(config_folder(model)) or {}), **settings})
    blocks = tuple(_entry(spec, cache) for spec in family.blocks(config, granularity))

    def complete() -> Target:
        from dipgo_deploy.models.stock import stock_configuration
        from dipgo_deploy.sampler import make_scheduler, plain_config, sampler_matrix
        from dipgo_deploy.sampler.schedulers import timesteps_of

        scheduler = stock_configuration(model).scheduler
        if sampler is not None:
            scheduler = make_scheduler(sampler, {} if scheduler is None else scheduler.config)
        assert scheduler is not None  # without a sampler the model has one
        options = nominal_set_timesteps(family, config, scheduler, num_inference_steps)
        timesteps = timesteps_of(scheduler, num_inference_steps, set_timesteps_kwargs=options)
        denoisers = family.denoisers_of(pipeline_index(model), scheduler.config, timesteps)
        return Target(
            model=ModelIdentity(class_name=family.class_name, config_hash=config_hash(config), granularity=granularity),
            blocks=blocks,
            sampler=SamplerEntry(
                class_name=type(scheduler).__name__,
                config=plain_config(scheduler),
                num_inference_steps=num_inference_steps,
            ),
            steps=len(timesteps),
            timesteps=timesteps,
            denoisers=denoisers,
            embeddings=None if family.time_embeddings is None else lambda: _embeddings(model, timesteps),
            size=(native_size(config) or nominal_size(family)) if "mu" in options else None,
            matrix=lambda: sampler_matrix(scheduler, num_inference_steps, set_timesteps_kwargs=options),
        )

    return PendingTarget(tuple(block.name for block in blocks), _MOST_EVALUATIONS * num_inference_steps, complete)


def _embeddings(model: str, timesteps: tuple[float, ...]) -> tuple[Any, Any]:
    """What a model's denoiser makes of timesteps alone. Raises UserError where its weights are not here."""
    family, config = denoiser_config(model)
    parts = denoiser_weights(model)
    weights = parts.get(family.component, parts.get("."))
    if weights is None or weights.prefix is not None or family.time_embeddings is None:
        raise UserError(f"{model}: the weights of the timestep's embedding are needed; give a folder that has them")
    return family.time_embeddings(weights.files, config, timesteps)


def default_steps(model: str) -> tuple[int, str]:
    """Steps that the model's pipeline takes where its caller names none, and the pipeline's class; 50 and no class
    where that is not known. Imports diffusers, and loads no weights."""
    import inspect

    import diffusers

    name = pipeline_index(model).get("_class_name", "")
    pipeline = getattr(diffusers, str(name), None)
    parameters = {} if pipeline is None else inspect.signature(pipeline.__call__).parameters
    steps = parameters.get("num_inference_steps")
    return (steps.default, name) if steps is not None and type(steps.default) is int else (50, "")


def nominal_set_timesteps(family: ModelFamily, config: Mapping[str, Any], scheduler: Any, steps: int) -> dict[str, Any]:
    """What a pipeline gives ``set_timesteps`` besides the number of steps, at the model's native size.

    Raises UserError for a number of steps that no sampler can do.
    """
    from dipgo_deploy.sampler.schedulers import check_steps

    check_steps(type(scheduler).__name__, steps)  # FLUX makes a list of that length
    size = native_size(config) or nominal_size(family)
    return dict(family.set_timesteps(config, scheduler.config, *size, steps))


def nominal_size(family: ModelFamily) -> tuple[int, ...]:
    """The latent's extents where nothing says them."""
    return (*(NOMINAL_FRAMES,) * (family.axes - 2), NOMINAL_SIZE, NOMINAL_SIZE)


def check_sampler_kind(model: str, class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse (UserError) a diffusers scheduler of another kind than the model's: flow matching for a diffusion model.

    The model's kind is that of the scheduler in its folder, or its family's where the folder has none.
    """
    family, _ = denoiser_config(model)
    own = scheduler_config(config_folder(model))
    expected = family.kind if own is None else kind_of(str(own.get("_class_name")), own)
    check_kind(class_name, config, expected)


def check_schedule(schedule: Schedule, model: str, *, allow_other_config: bool = False) -> None:
    """Refuse (UserError) a schedule that was not made for this model: class, blocks, cache kinds, configuration."""
    family, config = denoiser_config(model)
    granularity = schedule.model.granularity
    caches: dict[str, tuple[str, ...]] = {}
    if schedule.model.class_name == family.class_name:
        caches = {spec.name: spec.caches for spec in family.blocks(config, granularity)}
    schedule.check_model(
        family.class_name,
        accepted_hashes(config),
        caches,
        denoisers=family.denoisers,
        allow_other_config=allow_other_config,
    )
    check_sampler_kind(model, schedule.sampler.class_name, schedule.sampler.config)


def pipelines_denoisers(schedule: Schedule, model: str, timesteps: Sequence[float]) -> tuple[str, ...]:
    """Which denoiser the model's own pipeline runs at these timesteps; nothing where it has one."""
    family, _ = denoiser_config(model)
    return family.denoisers_of(pipeline_index(model), schedule.sampler.config, timesteps)


def check_sampler(schedule: Schedule) -> None:
    """Refuse (UserError) a schedule whose T is not its sampler's number of evaluations. Needs the extra ``export``."""
    from dipgo_deploy.sampler import evaluations, scheduler_of

    scheduler = scheduler_of(schedule)
    steps = schedule.sampler.num_inference_steps
    options = nominal_set_timesteps(family_for(schedule.model.class_name), {}, scheduler, steps)
    schedule.check_evaluations(evaluations(scheduler, steps, set_timesteps_kwargs=options))


def _entry(spec: BlockSpec, cache: CacheKind | None) -> BlockEntry:
    if cache is not None and cache not in spec.caches:
        raise UserError(f"cache: {spec.name} cannot have a cache of kind {cache!r}, only {' or '.join(spec.caches)}")
    return BlockEntry(name=spec.name, cache=cache or spec.caches[0])
