"""The two layouts of one schedule side by side: graphs, launches, weights and memory. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dipgo_deploy.plan.model import Plan, Variant
from dipgo_deploy.plan.pieces import PieceGraph
from dipgo_deploy.plan.segments import SegmentPlan

MANY_COPIES = 4.0
"""Copies of the weights in the graphs of ``variants`` above which ``segments`` is the better layout on a CPU."""


@dataclass(frozen=True)
class LayoutNeed:
    """What a layout takes. weight_bytes: summed over the graphs, as engines that share nothing hold them. arena_bytes:
    of tensors in the arena. history_bytes: of latents and predictions. beside_bytes: of tables, and of the prologue
    with the rows that it makes. macs_run: of all launches."""

    layout: str
    graphs: int
    launches: int
    weight_bytes: int
    arena_bytes: int
    history_bytes: int
    beside_bytes: int
    macs_run: int

    @property
    def total_bytes(self) -> int:
        """Of the denoiser, without the scratch of its engines."""
        return self.weight_bytes + self.arena_bytes + self.history_bytes + self.beside_bytes

    def row(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def compare_layouts(
    plan: Plan, segments: SegmentPlan, pieces: PieceGraph, history_bytes: int, beside_bytes: int = 0
) -> tuple[tuple[LayoutNeed, LayoutNeed], int]:
    """The needs of ``variants`` and ``segments``, and the bytes of one copy of all weights that are used."""
    graphs = _pieces_of_variants(plan, pieces)
    needs = (
        LayoutNeed(
            layout="variants",
            graphs=len(plan.variants),
            launches=len(plan.launches),
            weight_bytes=sum(map(pieces.weight_bytes, graphs)),
            arena_bytes=plan.arena_bytes,
            history_bytes=history_bytes,
            beside_bytes=beside_bytes,
            macs_run=plan.macs_run,
        ),
        LayoutNeed(
            layout="segments",
            graphs=len(segments.segments),
            launches=len(segments.launches),
            weight_bytes=segments.weight_bytes,
            arena_bytes=segments.arena_bytes,
            history_bytes=history_bytes,
            beside_bytes=beside_bytes,
            macs_run=segments.macs_run,
        ),
    )
    return needs, _one_copy(graphs, pieces)


def copies_in_variants(plan: Plan, pieces: PieceGraph) -> float:
    """How many times the graphs of ``variants`` hold the weights that are used; 1 for a model without weights."""
    graphs = _pieces_of_variants(plan, pieces)
    one = _one_copy(graphs, pieces)
    return sum(map(pieces.weight_bytes, graphs)) / one if one else 1.0


def variant_weight_bytes(variant: Variant, pieces: PieceGraph) -> int:
    """Weights of one graph of ``variants``."""
    return pieces.weight_bytes(_pieces_of(variant, pieces))


def _pieces_of_variants(plan: Plan, pieces: PieceGraph) -> list[list[int]]:
    return [_pieces_of(variant, pieces) for variant in plan.variants]


def _pieces_of(variant: Variant, pieces: PieceGraph) -> list[int]:
    return [place for place, piece in enumerate(pieces.pieces) if piece.owners & variant.computed]


def _one_copy(graphs: Sequence[Sequence[int]], pieces: PieceGraph) -> int:
    return pieces.weight_bytes(sorted({place for graph in graphs for place in graph}))


def segments_summary(segments: SegmentPlan, plan: Plan, pieces: PieceGraph) -> dict[str, Any]:
    """What the layout ``segments`` costs, with the keys of ``explain.plan_summary``; ``variants`` are segments."""

    def nbytes(names: Sequence[str], tensor: str) -> int:
        if tensor:
            one = next(item.nbytes for item in pieces.tensors.values() if item.kind == tensor)
            return one * len(names)
        return sum(pieces.tensors[name].nbytes for name in names)

    rows = []
    for number, segment in enumerate(segments.segments):
        ran = [launch.step for launch in segments.launches if launch.variant == number]
        made = [name for piece in segment.pieces for name in pieces.pieces[piece].makes]
        rows.append(
            {
                "name": segment.name,
                "steps": sorted(set(ran)),
                "launches": len(ran),
                "computed": len(made),
                "reads": len(segment.reads),
                "read_bytes": nbytes(segment.reads, segment.tensor),
                "writes": len(segment.writes),
                "write_bytes": nbytes([cache.value for cache in segment.writes], segment.tensor),
                "predicts": segment.predicts,
                "macs": segment.macs,
            }
        )
    return {
        "variants": rows,
        "launches": [
            {
                "step": launch.step,
                "variant": segments.segments[launch.variant].name,
                "prediction": launch.prediction,
            }
            for launch in segments.launches
        ],
        "steps": len(plan.keep),
        "steps_without_launch": len(plan.keep) - len({launch.step for launch in segments.launches}),
        "predictions": sum(launch.prediction is not None for launch in segments.launches),
        "arena_bytes": segments.arena_bytes,
        "lower_bound_bytes": segments.lower_bound_bytes,
        "macs_full": plan.macs_full,
        "macs_full_run": plan.macs_full * len(plan.keep),
        "macs_schedule": plan.macs_schedule,
        "macs_run": segments.macs_run,
        "promoted": [],
    }
