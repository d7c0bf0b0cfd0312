"""The tensors at which a model can be cut: a block's outputs, and its input where a residual needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dipgo_deploy.models.family import BlockSpec

# What a module returned, with each tensor replaced by its index in the flat list: an int, None or a nested tuple.
Structure = Any


@dataclass
class Cuts:
    """What one block handled in the model's last forward.

    outputs: its output tensors in the order of `flatten`, each once. inputs: for a block with residual inputs one
    tensor an output, else nothing. Both are empty while the block has not run.
    """

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


def model_dtype(model: nn.Module) -> torch.dtype:
    """What a denoiser computes in: that of its parameters but for those that its class keeps in float32."""
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else next(model.parameters()).dtype


def flatten(output: object) -> tuple[list[Tensor], Structure]:
    """The tensors of a module's output depth first, each once (by identity), and the structure to rebuild it.

    A UNet down block returns its last skip tensor twice, as ``(hidden, (skip, ..., hidden))``: one tensor, one index.

    Raises:
        TypeError: the output holds something that is no tensor, tuple or None.
    """
    tensors: list[Tensor] = []
    structure = _indexed(output, tensors)
    return tensors, structure


def _indexed(item: object, tensors: list[Tensor]) -> Structure:
    """The structure of ``item``, whose tensors join ``tensors``."""
    # Not a closure that calls itself: such a cycle holds the tensors until the garbage collector comes.
    if item is None:
        return None
    if isinstance(item, Tensor):
        for position, seen in enumerate(tensors):
            if seen is item:
                return position
        tensors.append(item)
        return len(tensors) - 1
    if type(item) is tuple:
        return tuple([_indexed(part, tensors) for part in item])
    raise TypeError(f"a block returned a {type(item).__name__}; only tensors, tuples and None can be cut")


def unflatten(tensors: Sequence[Tensor], structure: Structure) -> Any:
    """The module output of ``structure`` with ``tensors`` in place: the inverse of `flatten`."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return tensors[structure]
    return tuple([unflatten(tensors, part) for part in structure])


def residual_inputs(spec: BlockSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the outputs of ``spec`` are residuals of, from the arguments of its module's call."""
    positional = iter(args)
    return [kwargs[name] if name in kwargs else next(positional) for name in spec.residual_inputs]


@contextmanager
def collect(model: nn.Module, specs: Sequence[BlockSpec]) -> Iterator[dict[str, Cuts]]:
    """Record each block's cuts in every forward of ``model`` inside the context; a later forward replaces an earlier.

    Forward hooks that only append to lists, so the context can also be entered inside a forward that torch traces.

    Yields:
        Block name -> `Cuts`, in the order of ``specs``; tensors as the model made them (attached, not copied).
    """
    cuts = {spec.name: Cuts() for spec in specs}
    with ExitStack() as stack:
        for spec in specs:
            handle = model.get_submodule(spec.name).register_forward_hook(
                _recorder(spec, cuts[spec.name]), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield cuts


def _recorder(spec: BlockSpec, cuts: Cuts) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        cuts.outputs.clear()
        cuts.inputs.clear()
        for tensor in flatten(output)[0]:
            cuts.outputs.append(tensor)
        cuts.inputs.extend(residual_inputs(spec, args, kwargs))

    return record
