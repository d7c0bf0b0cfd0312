"""A schedule in one line, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.schedule.worth import worth_of

T = TypeVar("T")


def schedule_facts(schedule: Schedule) -> dict[str, Any]:
    """What a schedule is for, how much of it runs, and how it was made."""
    return {
        "worth": worth_of(schedule).facts(),
        "model": schedule.model.model_dump(),
        "blocks": len(schedule.blocks),
        "steps": schedule.steps,
        **({} if schedule.denoisers is None else {"denoisers": list(schedule.denoisers)}),
        **({} if schedule.guidance is None else {"guidance": list(schedule.guidance)}),
        "kept_gates": schedule.kept_share,
        "sampler": schedule.sampler.class_name,
        "num_inference_steps": schedule.sampler.num_inference_steps,
        "solver": None if schedule.solver is None else to_json(schedule.solver.provenance),
        "forecast": None
        if schedule.forecast is None
        else schedule.forecast.facts(schedule.gates, schedule.conditional_only),
        "provenance": to_json(schedule.provenance),
    }


def denoisers_line(denoisers: Sequence[str]) -> str:
    """Which denoiser runs at which evaluations: ``transformer 0-12, transformer_2 13-39``."""
    return _by_value(denoisers, str)


def guidance_line(shares: Sequence[float]) -> str:
    """How much guidance which evaluations have: ``all 0-24, 0.5 25-29, conditional only 30-49``."""
    names = {0.0: "conditional only", 1.0: "all"}
    return _by_value(shares, lambda share: names.get(share, f"{share:g}"))


def _by_value(values: Sequence[T], name: Callable[[T], str]) -> str:
    """The value of each evaluation, those in a row of the same one together."""
    groups = groupby(enumerate(values), key=lambda pair: pair[1])
    return ", ".join(f"{name(value)} {ranges([step for step, _ in group])}" for value, group in groups)


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, as ``0-4, 6``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(span(first, last) for first, last in spans)


def span(first: int, last: int) -> str:
    """``0-4``, or ``0`` for one alone."""
    return str(first) if first == last else f"{first}-{last}"


def schedule_line(schedule: Schedule) -> str:
    """Model, evaluations, blocks, sampler, and the share of the gates that is kept."""
    sampler = schedule.sampler
    return (
        f"{schedule.model.class_name}, {schedule.steps} evaluations x {len(schedule.blocks)} blocks, "
        f"{sampler.class_name} with {sampler.num_inference_steps} steps, {schedule.kept_share:.1%} of the gates kept"
    )
