"""A chart on a page: its drawing, what the script says of it, and how it is put in; tables with bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from dipgo_deploy.page.shell import add_data, table, text
from dipgo_deploy.page.svg import rect, svg


@dataclass(frozen=True)
class Chart:
    """A drawing that can be pointed at.

    Attributes:
        drawing: the SVG, with a cursor (``page.svg.cursor``).
        data: for ``page/charts.js``, of a grid or of marks.
        names: of rows, beside the drawing; with the height of a row and of what is above the first, in pixels.
    """

    drawing: ET.Element
    data: Mapping[str, Any]
    names: tuple[str, ...] = ()
    row: float = 0
    above: float = 0


def put(body: ET.Element, name: str, chart: Chart) -> None:
    """Add a chart. name: of its element, once a page."""
    whole = ET.SubElement(body, "div", {"class": "chart"})
    if chart.names:
        names = ET.SubElement(whole, "div", {"class": "names", "aria-hidden": "true"})
        names.set("style", f"padding-top: {chart.above:g}px; font-size: {min(chart.row - 3, 13):g}px")
        for row in chart.names:
            line = ET.SubElement(
                names, "div", {"title": text(row), "style": f"height:{chart.row:g}px;line-height:{chart.row:g}px"}
            )
            ET.SubElement(line, "bdi").text = text(row)
    label = f"{chart.drawing.get('aria-label')}; arrow keys go through it"
    holder = ET.SubElement(
        whole, "div", {"class": "scroll", "id": name, "tabindex": "0", "role": "group", "aria-label": label}
    )
    holder.append(chart.drawing)
    add_data(body, name, chart.data)


def runs(notes: Mapping[tuple[int, int], Sequence[int]]) -> dict[int, list[list[int]]]:
    """Notes of cells as a grid's data has them: by row, runs of columns that have the same, (first, last, *notes).

    notes: numbers of texts by (row, column), in order.
    """
    found: dict[int, list[list[int]]] = {}
    for (row, column), texts in notes.items():
        of_row = found.setdefault(row, [])
        if of_row and of_row[-1][1] == column - 1 and of_row[-1][2:] == list(texts):
            of_row[-1][1] = column
        else:
            of_row.append([column, column, *texts])
    return found


def key(body: ET.Element, entries: Sequence[tuple[str, str]]) -> None:
    """What each style of a chart means: (class, meaning)."""
    line = ET.SubElement(body, "ul", {"class": "key"})
    for kind, meaning in entries:
        entry = ET.SubElement(line, "li")
        swatch = svg(14, 14, "")
        del swatch.attrib["aria-label"], swatch.attrib["role"]
        swatch.set("aria-hidden", "true")
        rect(swatch, kind, 1.5, 1.5, 11, 11)
        entry.append(swatch)
        ET.SubElement(entry, "span").text = meaning


def shares(body: ET.Element, headings: Sequence[str], parts: Mapping[str, float], words: Any) -> None:
    """A table of parts with bars; the largest is the whole width."""
    if not parts:
        return
    most = max(parts.values()) or 1
    rows = [(name, words(value), "") for name, value in parts.items()]
    element = table(body, headings, rows, (headings[1],))
    inside = element.find("tbody")
    assert inside is not None
    for line, value in zip(inside, parts.values(), strict=True):
        line[-1].set("style", "width: 40%")
        line[-1].set("aria-hidden", "true")
        ET.SubElement(line[-1], "span", {"class": "share", "style": f"width: {100 * value / most:.2f}%"})
