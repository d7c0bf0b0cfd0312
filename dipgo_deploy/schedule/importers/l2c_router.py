"""The router checkpoints of Learning-to-Cache (arXiv 2406.01733) and HarmoniCa (arXiv 2410.01723) for DiT.

A file of ``torch.save``: ``routers`` holds a tensor ``{index}.prob`` of 2 * depth numbers for each of T evaluations,
column 2i for the attention and 2i + 1 for the feed-forward of block i. As the authors' ``load_ranking`` and
``forward`` read them: routers count the timesteps upwards, so router T - 1 is the first evaluation; a layer is
computed where its ``sigmoid(prob)`` is above a threshold, and its last output is reused where not.

- Learning-to-Cache samples in pairs: the first evaluation of a pair (odd index) computes every layer, whatever its
  router says; only the routers with an even index are trained. The threshold is 0.1 in the authors' commands (0.9 for
  their 512-pixel model); at 0.1 the router for DDIM-50 is the schedule that SmoothCache's authors released as
  Learning-to-Cache's, cell by cell.
- HarmoniCa (which began as a copy of that code) uses every router but the last, index T - 1, whose scores are fixed
  at 5: the first evaluation computes every layer. The threshold is 0.1 in the authors' command.

Routers for U-ViT are a file of another layout (the routers alone), and are refused by name: no family fits.

Which one a file is shows in its keys: the optimizer has a state for the even routers of the one, for all but the last
of the other; without an optimizer, in the last router, which is random in the one and 5 throughout in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.importers.base import Imported, Importer, Setting, Source, check_rows
from dipgo_deploy.schedule.importers.layers import numbered_units
from dipgo_deploy.schedule.importers.torch_storage import TorchArchive

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates

DEFAULT_THRESHOLD = 0.1
Rule = Literal["l2c", "harmonica"]

_FIXED_SCORE = 5.0  # of HarmoniCa's last router

# The optimizer's state and the command line are in the file too; they are passed over.
_ALLOWED = frozenset({"argparse.Namespace"})


def read_routers(
    data: bytes,
    names: tuple[str, ...],
    threshold: float = DEFAULT_THRESHOLD,
    rule: Rule | None = None,
    most: int = validation.MAX_EVALUATIONS,
) -> tuple[Gates, Rule]:
    """T x N gates from the bytes of a checkpoint, T at most ``most``, and whose it is; ``names``: the model's N units,
    in order."""
    attentions, mlps = (numbered_units(kind, names) for kind in ("attn", "mlp"))
    if attentions.keys() != mlps.keys():
        raise UserError("this model has blocks with only an attention or only a feed-forward: routers are for both")
    layers = [units[number] for number in sorted(attentions) for units in (attentions, mlps)]
    archive = TorchArchive.read(data, _ALLOWED)
    routers = _routers(archive.document, most)
    scores = [_scores(archive, index, router, len(layers)) for index, router in enumerate(routers)]
    rule = rule or _rule_of(archive.document, scores)
    steps = len(routers)
    if rule == "l2c" and steps % 2:
        raise UserError(f"{steps} routers: evaluations go in pairs, so their number must be even")
    least = math.log(threshold / (1 - threshold))  # sigmoid(prob) > threshold
    rows = []
    for index in reversed(range(steps)):
        computed = set(names)
        if index % 2 == 0 if rule == "l2c" else index < steps - 1:
            computed -= {layer for layer, score in zip(layers, scores[index], strict=True) if not score > least}
        rows.append(tuple(name in computed for name in names))
    return tuple(rows), rule


def _rule_of(document: Mapping[str, Any], scores: Sequence[Sequence[float]]) -> Rule:
    """Whose checkpoint it is."""
    fixed = all(score == _FIXED_SCORE for score in scores[-1])
    optimizer = document.get("opt")
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(state, dict) or not state:
        return "harmonica" if fixed else "l2c"
    trained = set(state)
    # Adam has a state for what was trained: a short run may not have come to each of them.
    if fixed and len(scores) - 1 not in trained:
        return "harmonica"
    if not fixed and all(isinstance(index, int) and index % 2 == 0 for index in trained):
        return "l2c"
    raise UserError(
        f"cannot tell whether it is Learning-to-Cache's or HarmoniCa's ({len(trained)} of {len(scores)} routers were "
        f"trained, the last one {'is' if fixed else 'is not'} fixed); say --rule l2c or --rule harmonica"
    )


def _scores(archive: TorchArchive, index: int, router: Any, layers: int) -> tuple[float, ...]:
    try:
        scores = archive.vector(router, layers)
    except UserError as error:
        raise UserError(f"router {index}: {error}") from error
    if not all(math.isfinite(score) for score in scores):
        raise UserError(f"router {index}: not all scores are finite")
    return scores


def _routers(document: Any, most: int) -> list[Any]:
    """The routers' tensors by index."""
    if isinstance(document, dict) and "0.prob" in document:  # the routers themselves, without what trained them
        raise UserError(
            "is a router of Learning-to-Cache for U-ViT: diffusers has no such model, so its layers have no names; "
            "give one for DiT, or the same decisions as a mask (npy) for a family of your own"
        )
    routers = document.get("routers") if isinstance(document, dict) else None
    if not isinstance(routers, dict) or not routers:
        raise UserError("has no 'routers': not a router checkpoint of Learning-to-Cache or HarmoniCa")
    check_rows(len(routers), most)
    expected = [f"{index}.prob" for index in range(len(routers))]
    for name in expected:
        if name not in routers:
            raise UserError(f"routers: {name} is missing, there are {len(routers)}")
    return [routers[name] for name in expected]


def _read(data: bytes, source: Source, threshold: float, rule: Rule | None) -> Imported:
    gates, found = read_routers(data, source.names, threshold, rule, source.most)
    whose = {"l2c": "Learning-to-Cache", "harmonica": "HarmoniCa"}[found]
    return Imported(gates, settings={"rule": found}, notes=(f"read as routers of {whose}",))


IMPORTER = Importer(
    kind="l2c-router",
    title="Read routers of Learning-to-Cache or HarmoniCa for DiT.",
    file="a checkpoint of theirs, which is read as data: nothing in it is executed",
    read=_read,
    example="DDIM50_router.pt --model DiT-XL-2-256 --sampler ddim --steps 50 -o l2c.json",
    granularity="layer",
    settings=(
        Setting(
            "threshold",
            float,
            "A layer is computed when its score is above this (0.1 in the authors' commands, 0.9 for L2C at 512 "
            "pixels).",
            DEFAULT_THRESHOLD,
            least=0,
            most=1,
        ),
        Setting(
            "rule",
            str,
            "Whose routers they are: those of L2C compute everything at every second evaluation.",
            choices=("l2c", "harmonica"),
        ),
    ),
)
