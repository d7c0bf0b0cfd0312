"""The time of each launch beside what its multiply-accumulates allow."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from dipgo_deploy.bundle.manifest import PlanEntry
from dipgo_deploy.page.svg import cursor, label, line, number, rect, svg, ticks
from dipgo_deploy.report.chart import Chart
from dipgo_deploy.report.measured import Limit, Profile
from dipgo_deploy.report.words import milliseconds

_WIDE, _TALL, _AXIS = 700, 120, 20


@dataclass(frozen=True)
class Ideal:
    """What the launches would take if time went as multiply-accumulates do, in seconds.

    Attributes:
        a_mac: seconds of one multiply-accumulate in a whole evaluation.
        launches: of each.
        loop: of all, without what the host does beside them.
    """

    a_mac: float
    launches: tuple[float, ...]

    @property
    def loop(self) -> float:
        """Of all launches."""
        return sum(self.launches)


def ideal(plan: PlanEntry, profile: Profile) -> Ideal | None:
    """By the evaluations that run whole: the median of them says what a multiply-accumulate takes. None where no
    evaluation runs whole."""
    whole: dict[int, list[float]] = {}
    for launch, timed in zip(plan.launches, profile.launches, strict=True):
        macs, seconds = whole.setdefault(launch.step, [0.0, 0.0])
        whole[launch.step] = [macs + plan.variants[launch.variant].macs, seconds + timed.seconds]
    full = [seconds / macs for macs, seconds in whole.values() if plan.macs_full and macs >= plan.macs_full]
    if not full:
        return None
    a_mac = median(full)
    return Ideal(a_mac, tuple(a_mac * plan.variants[launch.variant].macs for launch in plan.launches))


def time_chart(plan: PlanEntry, profile: Profile, wanted: Ideal | None, limit: Limit | None) -> Chart:
    """A bar a launch, with a line where the ideal is, and one where the machine's own limit is."""
    least = {} if limit is None else {graph.name: graph.least_seconds for graph in limit.graphs}
    launches = profile.launches
    most = max(*(launch.seconds for launch in launches), *(() if wanted is None else wanted.launches), 1e-12)
    wide = min(_WIDE / len(launches), 48)
    drawing = svg(
        len(launches) * wide + 1, _TALL + _AXIS, f"{len(launches)} launches, the longest {milliseconds(most)}"
    )
    marks = []
    for place, launch in enumerate(launches):
        high = (_TALL - 6) * launch.seconds / most
        x = place * wide
        rect(drawing, "bar", x, _TALL - high, max(wide - 1, 0.5), high)
        text = f"launch {place}, evaluation {launch.step}, {launch.variant}\n{milliseconds(launch.seconds)}"
        if wanted is not None:
            y = _TALL - (_TALL - 6) * wanted.launches[place] / most
            line(drawing, "mark", x, y, x + max(wide - 1, 0.5), y)
            text += f", ideal {milliseconds(wanted.launches[place])}"
        if launch.variant in least:
            y = _TALL - (_TALL - 6) * least[launch.variant] / most
            line(drawing, "least", x, y, x + max(wide - 1, 0.5), y)
            text += f", the machine's limit {milliseconds(least[launch.variant])}"
        marks.append([*(float(number(one)) for one in (x, 0, wide, _TALL)), text])
    line(drawing, "axis", 0, _TALL, len(launches) * wide, _TALL)
    for place in ticks(len(launches), max(1, int(len(launches) * wide) // 42)):
        label(drawing, (place + 0.5) * wide, _TALL + 14, str(place), "middle", "quiet")
    cursor(drawing)
    return Chart(drawing, {"marks": marks})
