"""The units of a UNet of down blocks, mid block and up blocks, for every diffusers class that is built like that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity


def unet_units(
    class_name: str, config: Mapping[str, Any], attentions: Mapping[str, bool], granularity: Granularity
) -> tuple[BlockSpec, ...]:
    """The units in order of execution.

    ``block``: every down block, the mid block and every up block. ``layer``: every resnet with the attention behind it,
    every downsampler, the mid block; an upsampler belongs to the last pair of its up block.

    Args:
        class_name: for messages.
        config: with ``down_block_types``, ``up_block_types``, ``mid_block_type`` and ``layers_per_block`` there, lists
            or tuples alike.
        attentions: block types whose inside is known to ``layer``, and whether they have attentions.

    Raises:
        UserError: as many up as down blocks are not there, or (``layer``) a block type whose
            inside is not known or as many layers as blocks are not there.
    """
    downs, ups = len(config["down_block_types"]), len(config["up_block_types"])
    if downs != ups:
        raise UserError(f"{class_name}: {downs} down_block_types but {ups} up_block_types; correct the configuration")
    if granularity == "layer":
        return tuple(_chain(modules) for modules in _layers(class_name, config, attentions))
    mid = ["mid_block"] if config["mid_block_type"] is not None else []
    names = [f"down_blocks.{i}" for i in range(downs)] + mid + [f"up_blocks.{i}" for i in range(ups)]
    return tuple(_chain([name]) for name in names)


def _layers(class_name: str, config: Mapping[str, Any], attentions: Mapping[str, bool]) -> list[list[str]]:
    """Paths of the modules of each unit."""
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    levels = len(down_types)
    counts = _resnets(class_name, config["layers_per_block"], levels)

    def pair(parent: str, index: int, block_type: str) -> list[str]:
        """Resnet ``index`` of ``parent`` and the attention behind it, if it has one."""
        if block_type not in attentions:
            raise UserError(
                f"{class_name}: {parent} is a {block_type}, which granularity 'layer' does not know "
                f"({', '.join(attentions)}); use granularity 'block'"
            )
        return [f"{parent}.resnets.{index}"] + ([f"{parent}.attentions.{index}"] if attentions[block_type] else [])

    units = []
    for level, block_type in enumerate(down_types):
        parent = f"down_blocks.{level}"
        units += [pair(parent, index, block_type) for index in range(counts[level])]
        if level < levels - 1:
            units.append([f"{parent}.downsamplers.0"])
    if config["mid_block_type"] is not None:
        units.append(["mid_block"])
    for level, block_type in enumerate(up_types):
        parent = f"up_blocks.{level}"
        # An up block has one pair more than its down block: the input of the down block is a skip tensor too.
        pairs = [pair(parent, index, block_type) for index in range(counts[levels - 1 - level] + 1)]
        if level < levels - 1:
            pairs[-1].append(f"{parent}.upsamplers.0")
        units += pairs
    return units


def _resnets(class_name: str, layers: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """Resnets of each down block."""
    counts = (layers,) * levels if isinstance(layers, int) else tuple(layers)
    if len(counts) != levels:
        raise UserError(
            f"{class_name}: layers_per_block has {len(counts)} entries for {levels} down blocks; correct it"
        )
    return counts


def _chain(modules: Sequence[str]) -> BlockSpec:
    return BlockSpec(name=modules[-1], modules=tuple(modules))
