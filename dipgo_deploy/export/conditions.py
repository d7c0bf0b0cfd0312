"""The denoiser's conditions for the manifest, with what they become at other sizes where those are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import ConditionSpec
from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.bundle.shapes import BATCH, HEIGHT, WIDTH, Dim, Sizes, corners
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import InputSpec, ModelFamily
from dipgo_deploy.models.shape import TraceShape, condition_specs
from dipgo_deploy.reference.vae import scaling_and_shift

if TYPE_CHECKING:
    from dipgo_deploy.reference.source import Source

_TENSOR_DTYPES: Mapping[str, Any] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def open_conditions(source: Source, shape: TraceShape, dtype: str) -> tuple[ConditionSpec, ...]:
    """The conditions at ``shape``; with open sizes also the expressions of their shapes and values.

    Raises:
        UserError: a condition that depends on the sizes in another way than by a whole multiple of one of them.
    """
    specs = condition_specs(source.family, source.config, shape)
    probes, elsewhere = _at_corners(source.family, source.config, shape)
    shapes = open_shapes(source.family, source.config, shape)
    conditions = []
    for place, spec in enumerate(specs):
        assert spec.source is not None  # every condition of a family has one
        values = _fit(probes, [there[place].values for there in elsewhere], f"the values of {spec.name}")
        conditions.append(
            ConditionSpec(
                name=spec.name,
                shape=spec.shape,
                dtype=_TENSOR_DTYPES[dtype] if spec.dtype == "model" else spec.dtype,
                source=spec.source,
                picture=_use(source, spec),
                values=spec.values,
                null_values=spec.null_values,
                dims=_only_open(shapes[place]),
                expressions=_only_open(values),
            )
        )
    return tuple(conditions)


def open_shapes(family: ModelFamily, config: Mapping[str, Any], shape: TraceShape) -> list[list[Dim | float]]:
    """The shape of each condition in numbers and whole multiples of the open sizes; empty ones where none is open.

    Raises as ``open_conditions`` does.
    """
    probes, elsewhere = _at_corners(family, config, shape)
    return [
        _fit(probes, [there[place].shape for there in elsewhere], f"the shape of {spec.name}")
        for place, spec in enumerate(condition_specs(family, config, shape))
    ]


def _at_corners(
    family: ModelFamily, config: Mapping[str, Any], shape: TraceShape
) -> tuple[Sequence[Sizes], list[tuple[InputSpec, ...]]]:
    """The least and largest open sizes, and the conditions there."""
    probes = () if shape.sizes is None else corners(shape.sizes)
    return probes, [condition_specs(family, config, shape.at(sizes)) for sizes in probes]


def _use(source: Source, spec: InputSpec) -> PictureUse:
    """What a condition has of a picture; of latents without the VAE's shift also what that is."""
    if spec.source != "image":
        return PictureUse()
    use = source.family.pictures[spec.name]
    vae = getattr(source.pipeline, "vae", None)
    if use.shifted or vae is None:
        return use
    factor, shift = scaling_and_shift(vae)
    return use.model_copy(update={"offset": float(factor * shift)})


def _only_open(entries: Sequence[Any]) -> tuple[Any, ...] | None:
    return tuple(entries) if any(isinstance(entry, str) for entry in entries) else None


def _fit(probes: Sequence[Sizes], rows: Sequence[Sequence[float]], what: str) -> list[Dim | float]:
    """Per place of the rows, one a probe, its value: a number, or a whole multiple of one of the sizes."""
    fitted: list[Dim | float] = []
    for column in zip(*rows, strict=True):
        if len(set(column)) == 1:
            fitted.append(column[0])
            continue
        factors = {
            name: {value / getattr(at, name) for value, at in zip(column, probes, strict=True)}
            for name in (BATCH, HEIGHT, WIDTH)
        }
        name = next((name for name in (BATCH, HEIGHT, WIDTH) if len(factors[name]) == 1), None)
        factor = factors[name].pop() if name is not None else 0.5
        if factor != int(factor):
            raise UserError(f"{what} depends on the size in a way that is not supported; give plain numbers")
        fitted.append(str(name) if factor == 1 else f"{int(factor)}*{name}")
    return fitted
