"""What a model family is, declared without torch: its blocks, inputs and tolerances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Granularity = Literal["block", "layer"]
CacheKind = Literal["output", "residual"]


@dataclass(frozen=True)
class BlockSpec:
    """One block of a family at one granularity.

    name: dotted path of the module whose output tensors are the block's cut points (the last module of the unit);
    it is also the block's name in a schedule. modules: dotted paths of all modules that belong to this block only.
    caches: the cache kinds it supports, the default first. residual_input: for a residual cache, the name of the
    forward argument of module ``name`` (also positional index 0) that its output is a residual of.
    """

    name: str
    modules: tuple[str, ...]
    caches: tuple[CacheKind, ...] = ("output",)
    residual_input: str | None = None


@dataclass(frozen=True)
class InputSpec:
    """One input of the denoiser's forward.

    name: keyword of the model's ``forward``. shape: ints, with the batch in front where there is one. dtype: ``model``
    (the export's dtype), ``float32`` or ``int64``. role: ``latent``, ``timestep`` or ``condition`` (the same in all
    steps). null: what the unconditional half of guidance gets: ``encoded`` (the encoded negative prompt) or an int.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["model", "float32", "int64"]
    role: Literal["latent", "timestep", "condition"]
    null: Literal["encoded"] | int | None = None


@dataclass(frozen=True)
class ModelFamily:
    """A family of denoisers that share a diffusers class.

    class_name: the diffusers class. pipelines: diffusers pipeline classes it is used by. component: attribute of the
    pipeline (``unet`` or ``transformer``). blocks(config, granularity): the blocks in order of execution.
    inputs(config, batch, height, width, text_length): forward inputs for latent height/width in latent pixels.
    latent_channels(config): channels of the latent; a model with more output channels (learned variance) has the rest
    dropped. tolerances: dtype -> largest allowed relative error against the fp32 supernet, with the reason in
    ``tolerance_reason``.
    """

    class_name: str
    pipelines: tuple[str, ...]
    component: str
    blocks: Callable[[Mapping[str, Any], Granularity], tuple[BlockSpec, ...]]
    inputs: Callable[..., tuple[InputSpec, ...]]
    latent_channels: Callable[[Mapping[str, Any]], int]
    granularities: tuple[Granularity, ...] = ("block",)
    tolerances: Mapping[str, float] = field(default_factory=lambda: {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1})
    tolerance_reason: str = ""
