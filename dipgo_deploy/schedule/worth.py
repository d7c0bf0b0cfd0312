"""What a schedule is worth: how many plain steps of its sampler, run in full, are the same or cost as much."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dipgo_deploy.schedule.document import Schedule

# Samplers whose step is the last prediction times a number: with that prediction again, two steps are one longer step.
_FIRST_ORDER = frozenset({"DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"})


@dataclass(frozen=True)
class Worth:
    """What a schedule is worth.

    Attributes:
        plain_steps: the number of plain steps of the same sampler that give the same result, None where there is none.
        evaluations: the evaluations of the full model that have as many gates.
        line: one line for a reader.
    """

    plain_steps: int | None
    evaluations: float
    line: str

    def facts(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"plain_steps": self.plain_steps, "evaluations": self.evaluations, "line": self.line}


def worth_of(schedule: Schedule, without_launch: Collection[int] | None = None) -> Worth:
    """What ``schedule`` is worth.

    without_launch: the evaluations whose prediction is the last one, unchanged, where a plan tells; None: those of a
    UNet that run no block (what a transformer's head makes of cached blocks changes with the timestep).
    """
    steps, sampler = schedule.steps, schedule.sampler.class_name.removesuffix("Scheduler")
    # Conditional only, an evaluation has half the batch.
    halves = sum(sum(row) for row, half in zip(schedule.gates, schedule.conditional_only, strict=True) if half)
    evaluations = (sum(map(sum, schedule.gates)) - halves / 2) / sum(map(sum, schedule.runs)) * steps
    if without_launch is None:
        # A forecast block gives something else at each evaluation.
        plain = set(schedule.cache_kinds.values()) == {"output"} and schedule.forecast is None
        unet = schedule.model.class_name.startswith("UNet2D") and plain and schedule.guidance is None
        without_launch = [step for step, row in enumerate(schedule.gates) if unet and not any(row)]
    repeated = set(without_launch)
    whole = all(row == schedule.runs[step] for step, row in enumerate(schedule.gates) if step not in repeated)
    run = steps - len(repeated)
    if schedule.solver is not None:
        plain_cost = whole and run == steps and schedule.guidance is None
        cost = f"{steps}" if plain_cost else f"about {evaluations:.1f}"
        own = "of its own" if schedule.solver.imported else "fitted to a full run"
        line = (
            f"worth: costs what {cost} plain evaluations cost, with weights {own} in place of those of {sampler}; "
            f"compare pictures with plain solvers of as many"
        )
        return Worth(None, evaluations, line)
    if schedule.guidance is not None:
        line = (
            f"worth: costs what about {evaluations:.1f} of {steps} plain evaluations cost, with a guidance of its own; "
            "compare pictures with as many plain ones"
        )
        return Worth(None, evaluations, line)
    if whole and run == steps:
        return Worth(None, evaluations, "worth: the full run, nothing is saved")
    if whole and _is_first_order(schedule):
        plural = "step" if run == 1 else "steps"
        line = (
            f"worth: equals {run} plain {sampler} {plural} on {run} of these {steps} timesteps; "
            f"the other {steps - run} evaluations repeat the last prediction"
        )
        return Worth(run, evaluations, line)
    cost = f"{run}" if whole else f"about {evaluations:.1f}"
    why = f" ({sampler} makes something else of repeated predictions than of fewer steps)" if whole else ""
    line = f"worth: costs what {cost} of {steps} plain evaluations cost{why}; compare pictures with as many plain ones"
    return Worth(None, evaluations, line)


def _is_first_order(schedule: Schedule) -> bool:
    """Whether a step adds a multiple of the prediction to a multiple of the latent, and so do two with the same one."""
    config = schedule.sampler.config
    return (
        schedule.sampler.class_name in _FIRST_ORDER
        and config.get("prediction_type", "epsilon") == "epsilon"
        and not config.get("stochastic_sampling")
    )
