"""The router checkpoints that the Learning-to-Cache authors released for DiT (arXiv 2406.01733).

A file of ``torch.save``: ``routers`` holds a tensor ``{index}.prob`` of 2 * depth numbers for each of T steps, column
2i for the attention and 2i + 1 for the feed-forward of block i. As the authors' ``load_ranking`` and ``forward`` read
them: routers count the timesteps upwards, so router T - 1 is the first evaluation; sampling goes in pairs, of which the
first (odd index) computes every layer and the second (even index) computes the layers whose ``sigmoid(prob)`` is above
a threshold and reuses the outputs of the first for the others. Routers with an odd index are not used. The threshold is
0.1 in the authors' commands (0.9 for their 512-pixel model); at 0.1 the router for DDIM-50 is the schedule that
SmoothCache's authors released as Learning-to-Cache's, cell by cell.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.importers.layers import numbered_units
from dipgo_deploy.schedule.importers.rows import import_file
from dipgo_deploy.schedule.importers.torch_storage import TorchArchive

DEFAULT_THRESHOLD = 0.1

# The optimiser's state and the command line are in the file too; they are passed over.
_ALLOWED = frozenset({"argparse.Namespace"})


def import_l2c_router(path: str | Path, target: Target, threshold: float = DEFAULT_THRESHOLD) -> Schedule:
    """The schedule of a router checkpoint (at most 16 MiB) for ``target``; nothing in the file is executed.

    threshold: a layer of the second evaluation of a pair is computed when its score is above it, 0 < threshold < 1.
    Raises UserError, with the file's name, for a file that is no such checkpoint, and for routers of another number of
    layers than the model has.
    """
    if not 0 < threshold < 1:
        raise UserError(f"threshold: {threshold:g} is not between 0 and 1")
    read = partial(read_gates, threshold=threshold)
    return import_file(path, target, "import l2c-router", read, {"threshold": threshold})


def read_gates(data: bytes, names: tuple[str, ...], threshold: float = DEFAULT_THRESHOLD) -> Gates:
    """T x N gates from the bytes of a checkpoint; ``names``: the model's N units, in order."""
    attentions, mlps = (numbered_units(kind, names) for kind in ("attn", "mlp"))
    if attentions.keys() != mlps.keys():
        raise UserError("this model has blocks with only an attention or only a feed-forward: routers are for both")
    layers = [units[number] for number in sorted(attentions) for units in (attentions, mlps)]
    archive = TorchArchive.read(data, _ALLOWED)
    routers = _routers(archive.document)
    steps = len(routers)
    if steps % 2:
        raise UserError(f"{steps} routers: evaluations go in pairs, so their number must be even")
    least = math.log(threshold / (1 - threshold))  # sigmoid(prob) > threshold
    rows = []
    for evaluation in range(steps):
        index = steps - 1 - evaluation
        if index % 2:
            computed = set(names)
        else:
            computed = set(names) - set(layers)
            try:
                scores = archive.vector(routers[index], len(layers))
            except UserError as error:
                raise UserError(f"router {index}: {error}") from error
            computed.update(layer for layer, score in zip(layers, scores, strict=True) if score > least)
        rows.append(tuple(name in computed for name in names))
    return tuple(rows)


def _routers(document: Any) -> list[Any]:
    """The routers' tensors by index."""
    routers = document.get("routers") if isinstance(document, dict) else None
    if not isinstance(routers, dict) or not routers:
        raise UserError("has no 'routers': not a router checkpoint of Learning-to-Cache")
    expected = [f"{index}.prob" for index in range(len(routers))]
    for name in expected:
        if name not in routers:
            raise UserError(f"routers: {name} is missing, there are {len(routers)}")
    return [routers[name] for name in expected]
