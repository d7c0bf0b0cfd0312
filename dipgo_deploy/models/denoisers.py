"""A family whose pipeline has a second denoiser that takes over at the lower timesteps, such as Wan 2.2's two experts.

Both are one module with the paths that the pipeline has for them, ``transformer`` and ``transformer_2``, and so are the
names of their blocks. A schedule names the denoiser of each evaluation; at export every evaluation's graphs hold that
one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily

if TYPE_CHECKING:
    from torch import nn

BOUNDARY = "boundary_ratio"


def with_second(family: ModelFamily, **changes: Any) -> ModelFamily:
    """The variant of a family with a second denoiser of the same class, ``transformer_2`` beside ``transformer``.

    The first one runs where the timestep is at least ``boundary_ratio`` (of ``model_index.json``) times the scheduler's
    ``num_train_timesteps``, everywhere where there is none, as the pipeline has it.

    changes: fields of the family.
    """
    names = (family.component, second := f"{family.component}_2")

    def configs(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return config, config.get(second, {})

    def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
        return tuple(
            replace(spec, name=f"{name}.{spec.name}", modules=tuple(f"{name}.{path}" for path in spec.modules))
            for name, own in zip(names, configs(config), strict=True)
            for spec in family.blocks(own, granularity)
        )

    def inputs(config: Mapping[str, Any], batch: int, *size: int) -> tuple[InputSpec, ...]:
        first, other = (family.inputs(own, batch, *size) for own in configs(config))
        if first != other:
            raise UserError(f"{family.diffusers_class}: {names[0]} and {names[1]} take inputs of different shapes")
        return first

    def latent_channels(config: Mapping[str, Any]) -> int:
        return min(map(family.latent_channels, configs(config)))

    return replace(
        family,
        class_name=f"{family.class_name}+{family.diffusers_class}",
        companions={second: family.diffusers_class},
        join=lambda denoiser, others: join({names[0]: denoiser, **others}),
        denoisers=names,
        denoiser_at=lambda index, scheduler, timesteps: tuple(
            names[lower] for lower in below_boundary(index.get(BOUNDARY), scheduler, timesteps)
        ),
        blocks=blocks,
        inputs=inputs,
        latent_channels=latent_channels,
        time_embeddings=None,
        size_multiple=None,
        **changes,
    )


def below_boundary(ratio: Any, scheduler: Mapping[str, Any], timesteps: Sequence[float]) -> list[bool]:
    """Per timestep whether the second denoiser runs; none does where there is no ratio.

    Raises:
        UserError: a ratio that is no number from 0 to 1.
    """
    if ratio is None:
        return [False] * len(timesteps)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise UserError(f"{BOUNDARY} {ratio!r}: is no number from 0 to 1; correct model_index.json")
    # In the pipeline the timestep is a tensor of torch, so the comparison is one of float32.
    boundary = np.float32(ratio * scheduler["num_train_timesteps"])
    return [bool(np.float32(timestep) < boundary) for timestep in timesteps]


def join(parts: Mapping[str, nn.Module]) -> nn.Module:
    """One module of denoisers that take turns, each under its name; it is never called itself."""
    from torch import nn

    class Denoisers(nn.Module):
        @property
        def dtype(self) -> Any:
            """What all of them compute in."""
            return next(self.children()).dtype

    joined = Denoisers()
    for name, part in parts.items():
        joined.add_module(name, part)
    return joined
