"""A plan as plain rows, for people and for JSON. Pure Python."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.model import Cache, Plan, Variant


def plan_summary(plan: Plan, graph: BlockGraph) -> dict[str, Any]:
    """What a plan costs, as JSON-able data.

    ``variants``: one row each with its name, the evaluations it runs at, counts of values computed and caches read and
    written with their bytes, whether it predicts, and its multiply-accumulates per launch. ``launches``: one row
    each with evaluation, variant name and prediction slot. ``promoted``: evaluation and block of each re-enabled gate.
    The rest are totals; sizes are in bytes, and ``macs_full_run`` is T full evaluations.
    """

    def nbytes(caches: tuple[Cache, ...], variant: Variant) -> int:
        guided = [variant.prediction] * variant.guides  # what it reads are predictions, of its own size
        return sum(graph.values[value].nbytes for item in caches for value in guided or [item.value])

    steps = [[launch.step for launch in plan.launches if launch.variant == i] for i in range(len(plan.variants))]
    return {
        "variants": [
            {
                "name": variant.name,
                "steps": sorted(set(ran)),
                "launches": len(ran),
                "computed": len(variant.computed),
                "reads": len(variant.reads),
                "read_bytes": nbytes(variant.reads, variant),
                "writes": len(variant.writes),
                "write_bytes": nbytes(variant.writes, variant),
                "predicts": variant.predicts,
                "macs": variant.macs,
            }
            for variant, ran in zip(plan.variants, steps, strict=True)
        ],
        "launches": [
            {"step": launch.step, "variant": plan.variants[launch.variant].name, "prediction": launch.prediction}
            for launch in plan.launches
        ],
        "steps": len(plan.keep),
        "steps_without_launch": len(plan.keep) - len({launch.step for launch in plan.launches}),
        "predictions": sum(launch.prediction is not None for launch in plan.launches),
        "arena_bytes": plan.arena_bytes,
        "lower_bound_bytes": plan.lower_bound_bytes,
        "macs_full": plan.macs_full,
        "macs_full_run": plan.macs_full * len(plan.keep),
        "macs_schedule": plan.macs_schedule,
        "macs_run": plan.macs_run,
        "promoted": [{"step": step, "block": block} for step, block in plan.promoted],
    }
