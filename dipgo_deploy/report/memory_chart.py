"""What lies in the arena, and from which launch to which."""

from __future__ import annotations

from collections.abc import Sequence

from dipgo_deploy.bundle.manifest import PlanEntry
from dipgo_deploy.bundle.names import parse_cache
from dipgo_deploy.bundle.stored import StoredValue, stored_values
from dipgo_deploy.engine.budget import size
from dipgo_deploy.page.svg import cursor, label, line, number, rect, svg, ticks
from dipgo_deploy.report.chart import Chart

_WIDE, _BARS, _AXIS, _TALL = 700, 40, 18, 200
_MOST_VALUES = 3000


def alive(plan: PlanEntry) -> list[int]:
    """Bytes of the arena that are in use at each launch."""
    changes = [0] * (len(plan.launches) + 1)
    for value in stored_values(plan):
        changes[value.written] += value.spec.nbytes
        changes[value.last + 1] -= value.spec.nbytes
    found, now = [], 0
    for change in changes[:-1]:
        now += change
        found.append(now)
    return found


def drawn_values(plan: PlanEntry) -> tuple[Sequence[StoredValue], int]:
    """The values to draw, and how many are left out: where there are too many, those that one evaluation makes and
    needs."""
    values = stored_values(plan)
    if len(values) <= _MOST_VALUES:
        return values, 0
    step = [launch.step for launch in plan.launches]
    kept = [value for value in values if step[value.last] > step[value.written]][:_MOST_VALUES]
    return kept, len(values) - len(kept)


def memory_chart(plan: PlanEntry) -> Chart:
    """A rectangle a value: from the launch that writes it to the last that reads it, at its place in the arena. Above,
    how much of the arena is in use."""
    values, _ = drawn_values(plan)
    launches = len(plan.launches)
    wide = min(_WIDE / launches, 48)
    top = _BARS + _AXIS
    used = alive(plan)
    name = f"{len(values)} values in an arena of {size(plan.arena_bytes)}; at most {size(max(used))} in use"
    drawing = svg(launches * wide + 1, top + _TALL + 2, name)
    marks = []

    def mark(kind: str, place: Sequence[float], text: str) -> None:
        x, y, across, tall = place
        rect(drawing, kind, x, y, max(across - 1, 0.5), max(tall - 0.5, 0.5))
        marks.append([*(float(number(one)) for one in place), text])

    for launch, nbytes in enumerate(used):
        high = (_BARS - 4) * nbytes / plan.arena_bytes
        text = f"launch {launch}, evaluation {plan.launches[launch].step}\n{size(nbytes)} in use"
        mark("bar", (launch * wide, _BARS - high, wide, high), text)
    line(drawing, "axis", 0, _BARS, launches * wide, _BARS)
    for launch in ticks(launches, max(1, int(launches * wide) // 42)):
        label(drawing, (launch + 0.5) * wide, _BARS + 13, str(launch), "middle", "quiet")
    scale = _TALL / plan.arena_bytes
    rect(drawing, "soft", 0, top, launches * wide, _TALL)
    for value in values:
        place = (
            value.written * wide,
            top + value.offset * scale,
            (value.last - value.written + 1) * wide,
            value.spec.nbytes * scale,
        )
        mark("second" if parse_cache(value.name) else "faint", place, _words(plan, value))
    cursor(drawing)
    return Chart(drawing, {"marks": marks})


def _words(plan: PlanEntry, value: StoredValue) -> str:
    shape = "x".join(map(str, value.spec.shape))
    written = plan.launches[value.written].step
    last = plan.launches[value.last].step
    lives = f"written at evaluation {written}, " + (f"last read at {last}" if value.read else "never read")
    return f"{value.name}\n{shape} {value.spec.dtype}, {size(value.spec.nbytes)} at byte {value.offset}\n{lives}"
