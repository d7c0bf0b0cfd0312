"""The denoiser's conditions for the manifest, with what they become at other sizes where those are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import ConditionSpec
from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.bundle.shapes import BATCH, HEIGHT, WIDTH, Dim, Sizes, corners
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import InputSpec
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
    probes = () if shape.sizes is None else corners(shape.sizes)
    elsewhere = [condition_specs(source.family, source.config, shape.at(sizes)) for sizes in probes]
    conditions = []
    for place, spec in enumerate(specs):
        assert spec.source is not None  # every condition of a family has one
        others = [specs_there[place] for specs_there in elsewhere]
        dims = _fit(probes, [other.shape for other in others], f"the shape of {spec.name}")
        values = _fit(probes, [other.values for other in others], f"the values of {spec.name}")
        conditions.append(
            ConditionSpec(
                name=spec.name,
                shape=spec.shape,
                dtype=_TENSOR_DTYPES[dtype] if spec.dtype == "model" else spec.dtype,
                source=spec.source,
                picture=_use(source, spec),
                values=spec.values,
                null_values=spec.null_values,
                dims=_only_open(dims),
                expressions=_only_open(values),
            )
        )
    return tuple(conditions)


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
