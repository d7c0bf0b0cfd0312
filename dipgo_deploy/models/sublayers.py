"""The units of a transformer: its whole blocks, or the parts of them whose output is added to the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

from dipgo_deploy.models.family import BlockSpec


def whole_blocks(
    container: str, count: int, residual_inputs: tuple[str, ...] = ("hidden_states",)
) -> tuple[BlockSpec, ...]:
    """Granularity ``block``: each of ``count`` blocks, with a residual cache as the default. container: as below."""
    return tuple(
        BlockSpec(name=path, modules=(path,), caches=("residual", "output"), residual_inputs=residual_inputs)
        for path in (f"{container}.{index}" for index in range(count))
    )


def sublayers(container: str, count: int, parts: Sequence[str]) -> tuple[BlockSpec, ...]:
    """Granularity ``layer``: one unit for each of ``parts`` of each of ``count`` blocks, in order of execution.

    container: dotted path of the list of blocks. parts: names of submodules of a block, in the order in which it runs
    them, such as ``("attn1", "ff")``. A unit ``container.i.part`` is that module alone: what normalises its input and
    the gate its output is multiplied by belong to no unit, so they are computed at every evaluation that needs them.
    The only cache is ``output``, the tensors that the module returns (two for a joint attention): its input is the
    normalised hidden state, so "input + last change" would not be what the block adds up.

    The units of SmoothCache (arXiv 2411.10510), FORA (2407.01425) and Learning-to-Cache (2406.01733).
    """
    paths = (f"{container}.{index}.{part}" for index in range(count) for part in parts)
    return tuple(BlockSpec(name=path, modules=(path,)) for path in paths)
