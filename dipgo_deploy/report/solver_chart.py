"""The sampler's rows: what each launch makes its latent of."""

from __future__ import annotations

from dipgo_deploy.bundle.manifest import PlanEntry
from dipgo_deploy.page.svg import cursor, label, line, number, rect, svg
from dipgo_deploy.report.chart import Chart, runs

MOST_WEIGHTS = 2500
"""That are drawn; above these a page says how many there are."""
_WIDE, _TALL, _HEAD = 700, 18, 22
_WRITTEN = 36  # pixels of a cell from which its weight is written into it
_ZERO, _PLUS, _MINUS = range(3)


def rows_of(plan: PlanEntry) -> list[tuple[str, tuple[float, ...]]]:
    """Name and weights of the latent of each evaluation that is launched, and of the final one."""
    found: dict[int, tuple[str, tuple[float, ...]]] = {}
    for launch in plan.launches:
        if launch.coefficients:
            found.setdefault(launch.step, (f"{launch.step}, t {launch.timestep:g}", launch.coefficients))
    return [*found.values(), ("final latent", plan.final)]


def columns_of(plan: PlanEntry) -> list[tuple[int, str]]:
    """Slot and name of all that is ever given a weight."""
    names = {slot: f"prediction {slot}" for slot in range(1, plan.history.chain)}
    names[0] = "initial noise"
    if plan.image_slot is not None:
        names[plan.image_slot] = "the picture"
    first = plan.slots - plan.noises
    names |= {first + draw: f"noise drawn {draw + 1}" for draw in range(plan.noises)}
    used = {slot for _, row in rows_of(plan) for slot, weight in enumerate(row) if weight}
    return [(slot, names[slot]) for slot in sorted(used)]


def weights_count(plan: PlanEntry) -> int:
    """Weights that are not zero."""
    return sum(sum(map(bool, row)) for _, row in rows_of(plan))


def solver_chart(plan: PlanEntry) -> Chart:
    """A row a latent, a column a value of the history; the stronger the colour, the larger the weight."""
    rows, columns = rows_of(plan), columns_of(plan)
    wide = min(max(_WIDE // max(len(columns), 1), 8), 64)
    drawing = svg(len(columns) * wide + 1, _HEAD + len(rows) * _TALL + 1, f"weights of {len(rows)} latents")
    for place, (slot, name) in enumerate(columns):
        short = "noise" if slot == 0 else str(slot) if name.startswith("prediction") else name[0]
        if wide >= 22 or place % (22 // wide + 1) == 0:
            label(drawing, (place + 0.5) * wide, 14, short, "middle", "quiet")
    most = max((abs(weight) for _, row in rows for weight in row), default=0.0)
    cells: list[str] = []
    texts: dict[str, int] = {}
    notes: dict[tuple[int, int], list[int]] = {}
    for down, (_, row) in enumerate(rows):
        states = ""
        for across, (slot, _) in enumerate(columns):
            weight = row[slot]
            states += str(_PLUS if weight > 0 else _MINUS if weight < 0 else _ZERO)
            if weight:
                y = _HEAD + down * _TALL
                cell = rect(drawing, "plus" if weight > 0 else "minus", across * wide + 1, y + 1, wide - 1, _TALL - 1)
                cell.set("fill-opacity", f"{0.12 + 0.5 * (abs(weight) / most) ** 0.5:.2f}")
                if wide >= _WRITTEN:
                    label(drawing, (across + 0.5) * wide, y + 13, f"{weight:.3g}", "middle")
                notes[down, across] = [texts.setdefault(f"weight {weight:.6g}", len(texts))]
        cells.append(states)
    cursor(drawing)
    data = {
        **{"x": 0, "y": _HEAD, "width": wide, "height": _TALL},
        "rows": [f"evaluation {name}" if name[0].isdigit() else name for name, _ in rows],
        "columns": [name for _, name in columns],
        "states": ["not read", "", ""],
        "cells": cells,
        "texts": list(texts),
        "notes": runs(notes),
    }
    return Chart(drawing, data, tuple(name for name, _ in rows), _TALL, _HEAD)


def timestep_chart(plan: PlanEntry) -> Chart:
    """The timesteps of the launches on a line, from the noise on the left to the picture on the right."""
    first = {launch.step: launch.timestep for launch in reversed(plan.launches)}
    most = max(first.values(), default=0.0) or 1.0
    left, right, y = 8, _WIDE - 8, 16
    name = f"timesteps of {len(first)} evaluations that are launched, from {most:g} on"
    drawing = svg(_WIDE, 42, name, wide=True)
    line(drawing, "axis", left, y, right, y)

    def x(timestep: float) -> float:
        return left + (right - left) * (1 - timestep / most)

    marks = []
    for step, timestep in sorted(first.items()):
        rect(drawing, "bar", x(timestep) - 1, y - 7, 2, 14)
        text = f"evaluation {step}, timestep {timestep:g}"
        marks.append([*(float(number(value)) for value in (x(timestep) - 4, y - 9, 8, 18)), text])
    for quarter in range(5):
        anchor = {0: "end", 4: "start"}.get(quarter, "middle")
        label(drawing, x(most * quarter / 4), 38, f"{most * quarter / 4:.0f}", anchor, "quiet")
    cursor(drawing)
    return Chart(drawing, {"marks": marks})
