"""A comparison as one page of HTML that needs nothing else: curves of the error, pictures side by side, tables."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.compare.report import LATENT, Checked, Part, Report, collapsed
from dipgo_deploy.errors import one_line

if TYPE_CHECKING:
    from dipgo_deploy.compare.metrics import TensorError
    from dipgo_deploy.compare.worst import Pair

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #ffffff; --line: #d0d0d0; --soft: #f3f3f3; --bad: #b00020;
  --good: #00684a; --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #cc79a7; --s4: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #16181c; --line: #3c4048; --soft: #22252b;
  --bad: #ff7b86; --good: #5fd3a5; --s0: #56b4e9; --s1: #ff9a4d; --s2: #3fd0a0; --s3: #e6a3c8; --s4: #e0c040; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .5rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { background: var(--soft); } td.n, th.n { text-align: right; white-space: nowrap; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
.axis, .grid { stroke: var(--line); } .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 1.6; }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin-bottom: 1rem; }
.pictures img { width: 100%; image-rendering: pixelated; } figure { margin: 0; } figcaption { font-size: .85rem; }
details { margin: .5rem 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
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
    root = ET.Element("html", lang="en")
    head = ET.SubElement(root, "head")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    ET.SubElement(head, "title").text = f"dipgo-compare {name}"
    ET.SubElement(head, "style").text = _STYLE
    body = ET.SubElement(root, "body")
    ET.SubElement(body, "h1").text = f"{name} against {report.reference}"
    _verdict(body, report, error)
    if report.loop:
        _section(body, "Error at each evaluation")
        body.append(curves(report))
    if pictures:
        _section(body, "Pictures that differ most")
        _pictures(body, pictures, report.reference)
    _parts(body, "Before the first launch", report.parts)
    if report.variants:
        _section(body, "Graphs by themselves")
        rows = [_row(str(checked.step), str(checked.variant), checked.worst) for checked in report.variants]
        _table(body, ("evaluation", "graph", "worst tensor", "error", "", ""), rows)
    if report.loop:
        _section(body, "The whole loop")
        _loop(body, report)
    if report.results is not None:
        rows = [_row("", "", tensor)[2:] for tensor in report.results.tensors]
        _section(body, "After the last evaluation")
        _table(body, ("tensor", "error", "", ""), rows)
    _parts(body, "From prompt to picture", report.pictures)
    if report.skipped:
        _section(body, "Not compared")
        for line in report.skipped:
            ET.SubElement(body, "p").text = _text(line)
    _facts(body, facts)
    return b"<!DOCTYPE html>\n" + ET.tostring(root, encoding="utf-8", method="html")


def curves(report: Report) -> ET.Element:
    """An SVG of the loop: the relative error of latent, prediction and the worst cache at each evaluation, on a
    logarithmic scale; where it was looked for, what evaluations make and inherit; and the tolerance."""
    series = _series(report.loop)
    finite = [value for points in series.values() for _, value in points if math.isfinite(value)]
    limit = report.tolerance.relative
    low = math.floor(math.log10(max(min([*finite, limit or 1.0]), _FLOOR)))
    high = math.ceil(math.log10(max([*finite, limit, 10 * 10.0**low])))
    last = max(checked.step or 0 for checked in report.loop)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + wide * (step / last if last else 0.5)

    def y(value: float) -> float:
        place = math.log10(min(max(value, 10.0**low), 10.0**high))
        return _TOP + tall * (high - place) / (high - low)

    svg = ET.Element("svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img")
    svg.set("aria-label", "relative error at each evaluation")
    for power in range(low, high + 1):
        _line(svg, "grid", _LEFT, y(10.0**power), _WIDTH - _RIGHT, y(10.0**power))
        _label(svg, _LEFT - 6, y(10.0**power) + 4, f"1e{power}", "end")
    _label(svg, _WIDTH - _RIGHT, _HEIGHT - 14, "evaluation", "end")
    for step in sorted({round(last * share / 5) for share in range(6)}):
        _label(svg, x(step), _HEIGHT - _BOTTOM + 16, str(step), "middle")
    if limit:
        _line(svg, "limit", _LEFT, y(limit), _WIDTH - _RIGHT, y(limit))
    for number, (name, points) in enumerate(series.items()):
        colour = f"var(--s{number % _COLOURS})"
        placed = [(x(step), y(value), step, value) for step, value in points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in placed)
        ET.SubElement(svg, "polyline", points=path, style=f"stroke: {colour}").set("class", "curve")
        for px, py, step, value in placed:
            dot = ET.SubElement(svg, "circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r="2.6", style=f"fill: {colour}")
            ET.SubElement(dot, "title").text = f"{name}, evaluation {step}: {value:.2e}"
        left = _LEFT + number * _KEY
        ET.SubElement(
            svg, "rect", x=f"{left:.1f}", y=f"{_HEIGHT - 20}", width="14", height="4", style=f"fill: {colour}"
        )
        _label(svg, left + 19, _HEIGHT - 14, name, "start")
    return svg


def _series(loop: Iterable[Checked]) -> dict[str, list[tuple[int, float]]]:
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


def _line(svg: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ET.SubElement(svg, "line", {name: f"{value:.1f}" for name, value in ends.items()}).set("class", kind)


def _label(svg: ET.Element, x: float, y: float, text: str, anchor: str) -> None:
    ET.SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text


def _verdict(body: ET.Element, report: Report, error: Exception | None) -> None:
    failures = list(report.failures())
    line = ET.SubElement(body, "p")
    if error is not None:
        line.set("class", "bad")
        line.text = f"not compared to the end: {_text(error)}"
    elif not failures:
        line.set("class", "good")
        line.text = f"everything is within {report.tolerance.relative:g}"
    else:
        line.set("class", "bad")
        line.text = f"{len(failures)} beyond tolerance; first: {_text(failures[0])}"
        if len(failures) > 1:
            more = ET.SubElement(body, "details")
            ET.SubElement(more, "summary").text = "all of them"
            ET.SubElement(more, "pre").text = "\n".join(map(_text, failures))


def _pictures(body: ET.Element, pairs: Sequence[Pair], reference: str) -> None:
    for pair in pairs:
        difference = np.abs(pair.actual - pair.expected)
        peak = float(difference.max())
        grid = ET.SubElement(body, "div")
        grid.set("class", "pictures")
        for caption, picture in (
            (pair.place, pair.actual),
            (reference, pair.expected),
            (f"difference, {peak:.2e} is white", difference / peak if peak else difference),
        ):
            figure = ET.SubElement(grid, "figure")
            ET.SubElement(figure, "img", src=_data_uri(picture), alt=_text(caption))
            ET.SubElement(figure, "figcaption").text = _text(caption)


def _data_uri(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    values = np.nan_to_num(np.clip(picture, 0, 1)) * 255
    Image.fromarray(values.round().astype(np.uint8)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _parts(body: ET.Element, title: str, parts: Sequence[Part]) -> None:
    if not parts:
        return
    _section(body, title)
    rows = []
    for part in parts:
        worst = max((tensor.relative for tensor in part.tensors), default=0.0)
        found = f"{worst:.2e}" if part.tensors else "equal" if part.passed else "different"
        rows.append((part.where, part.reference, found, "" if part.note is None else part.note, _mark(part.passed)))
    _table(body, ("what", "compared with", "error", "", ""), rows)


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
    _table(body, ("evaluation", "graph", "tensor", "error", *split, "", ""), rows)


def _row(step: str, graph: str, tensor: TensorError, *, crossed: bool = False) -> tuple[str, ...]:
    parts = (tensor.made, tensor.carried) if crossed else ()
    split = ("" if part is None else f"{part:.2e}" for part in parts)
    note = "inherited" if tensor.passed and tensor.relative > tensor.limit else ""
    return (step, graph, tensor.name, f"{tensor.relative:.2e}", *split, note, _mark(tensor.passed))


def _mark(passed: bool) -> str:
    return "ok" if passed else "beyond"


def _table(body: ET.Element, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The last cell of each row is its verdict."""
    table = ET.SubElement(body, "table")
    top = ET.SubElement(ET.SubElement(table, "thead"), "tr")
    for heading in headings:
        cell = ET.SubElement(top, "th")
        cell.text = heading
        if heading in _NUMBERS:
            cell.set("class", "n")
    inside = ET.SubElement(table, "tbody")
    for row in rows:
        line = ET.SubElement(inside, "tr")
        for heading, text in zip(headings, row, strict=True):
            entry = ET.SubElement(line, "td")
            entry.text = _text(text)
            if heading in _NUMBERS:
                entry.set("class", "n")
        line[-1].set("class", "good" if row[-1] == "ok" else "bad")


def _facts(body: ET.Element, facts: Mapping[str, Any]) -> None:
    from dipgo_deploy.compare.junit import properties

    more = ET.SubElement(body, "details")
    ET.SubElement(more, "summary").text = "versions, hashes and tolerances"
    table = ET.SubElement(more, "table")
    for name, value in properties(facts).items():
        line = ET.SubElement(table, "tr")
        ET.SubElement(line, "td").text = name
        ET.SubElement(line, "td").text = _text(value)


def _section(body: ET.Element, title: str) -> None:
    ET.SubElement(body, "h2").text = title


def _text(value: object) -> str:
    """On one line, without characters that a page cannot hold."""
    return one_line(value, 2000)
