"""The schedule as a heat map: a row a block, a column an evaluation."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from dipgo_deploy.page.svg import cursor, label, line, number, rect, svg, ticks
from dipgo_deploy.report.cells import COMPUTED, DEAD, FORECAST, NAMES, NO_LAUNCH, OTHER, REUSED, STATES, Cells, Column
from dipgo_deploy.report.chart import Chart, runs
from dipgo_deploy.report.words import count, macs
from dipgo_deploy.schedule.summary import ranges

_WIDE = 700  # pixels that the evaluations share
_BARS, _AXIS = 40, 18
# Above these many, neighbours of one state are drawn as one.
_MOST_CELLS = 12_000
# A dead block is an outline, so that it is not told by its colour alone; no launch is a dot.
_INSET = {DEAD: 1.5}


def schedule_chart(cells: Cells, macs_full: int) -> Chart:
    """The heat map, under bars of each evaluation's multiply-accumulates. macs_full: of a whole evaluation."""
    rows, columns = len(cells.blocks), len(cells.columns)
    tall = 16 if rows <= 40 else 12 if rows <= 100 else 9
    wide = min(max(_WIDE // max(columns, 1), 6), 48)
    top = _BARS + _AXIS
    name = f"{rows} blocks at {columns} evaluations: {summary(cells)}"
    drawing = svg(columns * wide + 1, top + rows * tall + 1, name)
    for column in cells.columns:
        share = column.macs / macs_full if macs_full else 0
        if column.macs:
            high = max(1, (_BARS - 4) * min(share, 1))
            rect(drawing, "bar", column.step * wide + 1, _BARS - high, wide - 1, high)
    line(drawing, "axis", 0, _BARS, columns * wide, _BARS)
    for step in ticks(columns, max(1, columns * wide // 42)):
        label(drawing, (step + 0.5) * wide, _BARS + 13, str(step), "middle", "quiet")
    merged = rows * columns > _MOST_CELLS
    for state in range(len(STATES)):
        path = _path(cells, state, wide, tall, top, merged=merged)
        if path:
            ET.SubElement(drawing, "path", {"class": f"c{state}", "d": path})
    cursor(drawing)
    texts: dict[str, int] = {}
    noted = {at: [texts.setdefault(text, len(texts)) for text in found] for at, found in sorted(cells.notes.items())}
    data = {
        **{"x": 0, "y": top, "width": wide, "height": tall},
        "rows": list(cells.blocks),
        "columns": [_words(column, macs_full) for column in cells.columns],
        "states": list(STATES),
        "cells": ["".join(map(str, row)) for row in cells.states],
        "texts": list(texts),
        "notes": runs(noted),
    }
    return Chart(drawing, data, cells.blocks, tall, top)


def summary(cells: Cells) -> str:
    """How many cells are in which state."""
    found = [(state, cells.count(state)) for state in range(len(STATES))]
    return ", ".join(f"{many:,} {NAMES[state]}" for state, many in found if many)


def table_rows(cells: Cells) -> list[tuple[str, ...]]:
    """The same for those who do not see it: each block with the evaluations of each state, see ``headings``."""
    used = _states(cells)
    return [
        (block, *(ranges([step for step, found in enumerate(row) if found == state]) or "-" for state in used))
        for block, row in zip(cells.blocks, cells.states, strict=True)
    ]


def headings(cells: Cells) -> tuple[str, ...]:
    """Of that table."""
    return ("block", *(f"{NAMES[state]} at" for state in _states(cells)))


def entries(cells: Cells) -> list[tuple[str, str]]:
    """Of the chart's key, only what there is."""
    return [(f"c{state}", NAMES[state]) for state in _states(cells)]


def _states(cells: Cells) -> list[int]:
    order = (COMPUTED, REUSED, FORECAST, DEAD, NO_LAUNCH, OTHER)
    return [state for state in order if cells.count(state)]


def _words(column: Column, macs_full: int) -> str:
    at = f"evaluation {column.step}"
    if column.timestep is None:
        return at
    share = f" ({column.macs / macs_full:.1%} of a full evaluation)" if macs_full else ""
    graphs = column.graphs
    launched = graphs[0] if len(graphs) == 1 else f"{count(len(graphs), 'graph')} ({graphs[0]} to {graphs[-1]})"
    denoiser = f", {column.denoiser}" if column.denoiser else ""
    guidance = "" if column.guidance == 1 else f", {_guided(column.guidance)}"
    return f"{at}, timestep {column.timestep:g}{denoiser}{guidance}: {launched}, {macs(column.macs)}{share}"


def _guided(share: float) -> str:
    return f"{share:g} of the guidance" if share else "conditional only"


def _path(cells: Cells, state: int, wide: float, tall: float, top: float, *, merged: bool) -> str:
    inset = _INSET.get(state, 0)
    dot = state in (NO_LAUNCH, OTHER)
    size_x, size_y = (2, 2) if dot and not merged else (wide - 1 - 2 * inset, tall - 1 - 2 * inset)
    parts = []
    for row, states in enumerate(cells.states):
        step = 0
        while step < len(states):
            last = step
            while merged and last + 1 < len(states) and states[last + 1] == states[step] == state:
                last += 1
            if states[step] == state:
                x = step * wide + 1 + inset + ((wide - 3) / 2 if dot and not merged else 0)
                y = top + row * tall + 1 + inset + ((tall - 3) / 2 if dot and not merged else 0)
                if not (merged and dot):
                    across = size_x + (last - step) * wide
                    parts.append(f"M{number(x)} {number(y)}h{number(across)}v{number(size_y)}h-{number(across)}z")
            step = last + 1
    return "".join(parts)
