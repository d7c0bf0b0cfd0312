"""How close pictures are to the full run's: a value a case, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from dipgo_deploy.page.svg import cursor, label, line, number, svg
from dipgo_deploy.report.chart import Chart
from dipgo_deploy.report.measured import Case, Interval

_WIDE, _ROW, _HEAD, _SIDE = 520, 22, 24, 14
_TICKS = 5
# Differences below this are not worth a scale.
_LEAST = 1e-4


def quality_chart(cases: Sequence[Case]) -> Chart:
    """The SSIM of each case; schedules filled, plain solvers hollow."""
    low = min(max(min(case.ssim.low for case in cases), 0), 1 - _LEAST)
    step = _step(1 - low)
    low = math.floor(low / step + 1e-9) * step
    name = f"SSIM of {len(cases)} cases to the full run's pictures, {low:.4g} to 1"
    drawing = svg(_WIDE, _HEAD + len(cases) * _ROW + 2, name)
    digits = max(1, math.ceil(-math.log10(step)))

    def x(value: float) -> float:
        return _SIDE + (_WIDE - 2 * _SIDE) * (min(max(value, low), 1) - low) / (1 - low)

    for place in range(round((1 - low) / step) + 1):
        at = x(low + place * step)
        line(drawing, "grid", at, _HEAD - 4, at, _HEAD + len(cases) * _ROW)
        label(drawing, at, 14, f"{low + place * step:.{digits}f}", "middle", "quiet")
    marks, named = [], names(cases)
    for place, case in enumerate(cases):
        y = _HEAD + (place + 0.5) * _ROW
        line(drawing, "span", x(case.ssim.low), y, x(case.ssim.high), y)
        dot = {"cx": number(x(case.ssim.value)), "cy": number(y), "r": "5"}
        ET.SubElement(drawing, "circle", {"class": "hollow" if case.baseline else "dot", **dot})
        text = f"{named[place]}\nSSIM {interval(case.ssim, 4)}, {case.launches} launches"
        marks.append([0, y - _ROW / 2, _WIDE, _ROW, text])
    cursor(drawing)
    return Chart(drawing, {"marks": marks}, named, _ROW, _HEAD)


def names(cases: Sequence[Case]) -> tuple[str, ...]:
    """Their names without folders, with the guidance where it is not the same for all."""
    several = len({case.guidance_scale for case in cases}) > 1
    return tuple(
        (Path(case.name).stem if case.name.endswith(".json") else case.name)
        + (f", guidance {case.guidance_scale:g}" if several and case.guidance_scale is not None else "")
        for case in cases
    )


def interval(value: Interval | None, digits: int) -> str:
    """``0.9908 (0.9824 to 0.9991)``."""
    if value is None:
        return "-"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _step(width: float) -> float:
    """1, 2 or 5 times a power of ten, about a fifth of a width."""
    power = 10.0 ** math.floor(math.log10(width / _TICKS))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power * _TICKS >= width * 0.999)
