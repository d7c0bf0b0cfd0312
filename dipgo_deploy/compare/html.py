"""A comparison as one page of HTML that needs nothing else: curves of the error, pictures side by side, tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree as ET

from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.compare.report import LATENT, Part, Report, collapsed
from dipgo_deploy.page.shell import (
    BEYOND,
    OK,
    difference,
    facts_table,
    folded,
    new_page,
    paragraph,
    picture_row,
    section,
    table,
    text,
    wide,
    written,
)
from dipgo_deploy.page.svg import label, line, rect, svg

if TYPE_CHECKING:
    from dipgo_deploy.compare.metrics import TensorError
    from dipgo_deploy.compare.worst import Pair

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 280, 62, 12, 12, 52
_KEY = 105  # width of an entry of the key
# Below this an error is drawn at the lower edge: float32 itself does not tell it from none.
_FLOOR = 1e-9
_COLOURS = 5
_NUMBERS = ("error", "made", "inherited")


def html_page(
    name: str,
    report: Report,
    facts: Mapping[str, Any],
    pictures: Sequence[Pair] = (),
    error: Exception | None = None,
) -> bytes:
    """The page, UTF-8.

    Args:
        name: of what was compared.
        facts: of the whole (versions, hashes, tolerances), as the JSON has them.
        pictures: shown side by side, in this order.
        error: what the comparison itself ended with.
    """
    root, body = new_page(f"dipgo-compare {name}")
    ET.SubElement(body, "h1").text = f"{name} against {report.reference}"
    _verdict(body, report, error)
    if report.loop:
        section(body, "Error at each evaluation")
        wide(body, curves(report.loop, report.tolerance.relative))
    if pictures:
        section(body, "Pictures that differ most")
        _pictures(body, pictures, report.reference)
    _parts(body, "Before the first launch", report.parts)
    if report.variants:
        section(body, "Graphs by themselves")
        rows = [_row(str(checked.step), str(checked.variant), checked.worst) for checked in report.variants]
        _verdicts(body, ("evaluation", "graph", "worst tensor", "error", "", ""), rows)
    if report.loop:
        section(body, "The whole loop")
        _loop(body, report)
    if report.results is not None:
        rows = [_row("", "", tensor)[2:] for tensor in report.results.tensors]
        section(body, "After the last evaluation")
        _verdicts(body, ("tensor", "error", "", ""), rows)
    _parts(body, "From prompt to picture", report.pictures)
    if report.skipped:
        section(body, "Not compared")
        for reason in report.skipped:
            paragraph(body, reason)
    _facts(body, facts)
    return written(root)


class LoopTensor(Protocol):
    """What curves show of a tensor; see ``TensorError``."""

    @property
    def name(self) -> str:
        """Of the tensor."""

    @property
    def relative(self) -> float:
        """Its error."""

    @property
    def made(self) -> float | None:
        """What the launch makes of it."""

    @property
    def carried(self) -> float | None:
        """What the launch inherits."""


class LoopStep(Protocol):
    """What curves show of an evaluation; see ``Checked``."""

    @property
    def step(self) -> int | None:
        """The evaluation."""

    @property
    def tensors(self) -> Sequence[LoopTensor]:
        """What was compared."""


def curves(loop: Sequence[LoopStep], limit: float) -> ET.Element:
    """An SVG of the loop: the relative error of latent, prediction and the worst cache at each evaluation, on a
    logarithmic scale; where it was looked for, what evaluations make and inherit; and the tolerance, ``limit``."""
    series = _series(loop)
    finite = [value for points in series.values() for _, value in points if math.isfinite(value)]
    low = math.floor(math.log10(max(min([*finite, limit or 1.0]), _FLOOR)))
    high = math.ceil(math.log10(max([*finite, limit, 10 * 10.0**low])))
    last = max(checked.step or 0 for checked in loop)
    across, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + across * (step / last if last else 0.5)

    def y(value: float) -> float:
        place = math.log10(min(max(value, 10.0**low), 10.0**high))
        return _TOP + tall * (high - place) / (high - low)

    chart = svg(_WIDTH, _HEIGHT, "relative error at each evaluation", wide=True)
    for power in range(low, high + 1):
        line(chart, "grid", _LEFT, y(10.0**power), _WIDTH - _RIGHT, y(10.0**power))
        label(chart, _LEFT - 6, y(10.0**power) + 4, f"1e{power}", "end")
    label(chart, _WIDTH - _RIGHT, _HEIGHT - 14, "evaluation", "end")
    for step in sorted({round(last * share / 5) for share in range(6)}):
        label(chart, x(step), _HEIGHT - _BOTTOM + 16, str(step), "middle")
    if limit:
        line(chart, "limit", _LEFT, y(limit), _WIDTH - _RIGHT, y(limit))
    for number, (name, points) in enumerate(series.items()):
        colour = f"var(--s{number % _COLOURS})"
        placed = [(x(step), y(value), step, value) for step, value in points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in placed)
        ET.SubElement(chart, "polyline", points=path, style=f"stroke: {colour}").set("class", "curve")
        for px, py, step, value in placed:
            dot = ET.SubElement(chart, "circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.6", style=f"fill: {colour}")
            ET.SubElement(dot, "title").text = f"{name}, evaluation {step}: {value:.2e}"
        left = _LEFT + number * _KEY
        rect(chart, "key", left, _HEIGHT - 20, 14, 4).set("style", f"fill: {colour}")
        label(chart, left + 19, _HEIGHT - 14, name, "start")
    return chart


def _series(loop: Iterable[LoopStep]) -> dict[str, list[tuple[int, float]]]:
    """Points (evaluation, error) of each curve that has any."""
    found: dict[str, list[tuple[int, float]]] = {}
    for checked in loop:
        step = checked.step or 0
        caches = []
        for tensor in checked.tensors:
            if tensor.name in (LATENT, PREDICTION):
                found.setdefault(tensor.name, []).append((step, tensor.relative))
            else:
                caches.append(tensor.relative)
            if tensor.name == PREDICTION and tensor.carried is not None and tensor.made is not None:
                found.setdefault("made", []).append((step, tensor.made))
                found.setdefault("inherited", []).append((step, tensor.carried))
        if caches:
            found.setdefault("worst cache", []).append((step, max(caches)))
    return found


def _verdict(body: ET.Element, report: Report, error: Exception | None) -> None:
    failures = list(report.failures())
    if error is not None:
        paragraph(body, f"not compared to the end: {error}", "bad")
    elif not failures:
        paragraph(body, f"everything is within {report.tolerance.relative:g}", "good")
    else:
        paragraph(body, f"{len(failures)} beyond tolerance; first: {failures[0]}", "bad")
        if len(failures) > 1:
            ET.SubElement(folded(body, "all of them"), "pre").text = "\n".join(map(text, failures))


def _pictures(body: ET.Element, pairs: Sequence[Pair], reference: str) -> None:
    for pair in pairs:
        caption, apart = difference(pair.actual, pair.expected)
        picture_row(body, {pair.place: pair.actual, reference: pair.expected, caption: apart})


def _parts(body: ET.Element, title: str, parts: Sequence[Part]) -> None:
    if not parts:
        return
    section(body, title)
    rows = []
    for part in parts:
        worst = max((tensor.relative for tensor in part.tensors), default=0.0)
        found = f"{worst:.2e}" if part.tensors else "equal" if part.passed else "different"
        rows.append((part.where, part.reference, found, "" if part.note is None else part.note, _mark(part.passed)))
    _verdicts(body, ("what", "compared with", "error", "", ""), rows)


def _loop(body: ET.Element, report: Report) -> None:
    crossed = any(tensor.carried is not None for checked in report.loop for tensor in checked.tensors)
    rows = []
    for run in collapsed(report.loop):
        first = run[0]
        if first.variant is None:
            steps = f"{first.step}-{run[-1].step}" if len(run) > 1 else str(first.step)
            worst = max(run, key=lambda checked: (not checked.passed, checked.worst.relative)).worst
            rows.append(_row(steps, "no launch", worst, crossed=crossed))
        else:
            rows += [_row(str(first.step), first.variant, tensor, crossed=crossed) for tensor in first.tensors]
    split = ("made", "inherited") if crossed else ()
    _verdicts(body, ("evaluation", "graph", "tensor", "error", *split, "", ""), rows)


def _row(step: str, graph: str, tensor: TensorError, *, crossed: bool = False) -> tuple[str, ...]:
    parts = (tensor.made, tensor.carried) if crossed else ()
    split = ("" if part is None else f"{part:.2e}" for part in parts)
    note = "inherited" if tensor.passed and tensor.relative > tensor.limit else ""
    return (step, graph, tensor.name, f"{tensor.relative:.2e}", *split, note, _mark(tensor.passed))


def _mark(passed: bool) -> str:
    return OK if passed else BEYOND


def _verdicts(body: ET.Element, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table(body, headings, rows, _NUMBERS, verdicts=True)


def _facts(body: ET.Element, facts: Mapping[str, Any]) -> None:
    from dipgo_deploy.compare.junit import properties

    facts_table(folded(body, "versions, hashes and tolerances"), properties(facts))
