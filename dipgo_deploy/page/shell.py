"""What every page shares: its head and style, sections, tables, pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from dipgo_deploy.errors import one_line
from dipgo_deploy.page.maker import MAKER

OK, BEYOND = "ok", "beyond"
"""Verdicts of a table's rows."""


def new_page(title: str) -> tuple[ET.Element, ET.Element]:
    """An empty page: its root and its body."""
    root = ET.Element("html", lang="en")
    head = ET.SubElement(root, "head")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    ET.SubElement(head, "meta", name="generator", content=MAKER)
    ET.SubElement(head, "title").text = text(title)
    ET.SubElement(head, "style").text = _own("page.css")
    return root, ET.SubElement(root, "body")


def written(root: ET.Element) -> bytes:
    """The page, UTF-8."""
    return b"<!DOCTYPE html>\n" + ET.tostring(root, encoding="utf-8", method="html")


@cache
def _own(name: str) -> str:
    """A file of this package."""
    return "\n" + (files("dipgo_deploy.page") / name).read_text(encoding="utf-8")


def add_script(body: ET.Element) -> None:
    """What makes charts answer pointer and keys, behind the charts."""
    ET.SubElement(body, "script").text = _own("charts.js")


def add_data(body: ET.Element, chart: str, data: Mapping[str, Any]) -> None:
    """What the script says of the chart in the element with this id."""
    script = ET.SubElement(body, "script", {"type": "application/json", "data-chart": chart})
    # Inside a script nothing is escaped: no text of the data may look like a tag.
    script.text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def section(body: ET.Element, title: str, name: str | None = None) -> ET.Element:
    """A heading and what follows. name: of the link to it; None: the heading stands in the body itself."""
    within = body if name is None else ET.SubElement(body, "section", id=name)
    ET.SubElement(within, "h2").text = text(title)
    return within


def paragraph(body: ET.Element, line: object, kind: str | None = None) -> ET.Element:
    """A line of text. kind: class of its style."""
    element = ET.SubElement(body, "p", {} if kind is None else {"class": kind})
    element.text = text(line)
    return element


def folded(body: ET.Element, summary: str) -> ET.Element:
    """What is shown when it is asked for."""
    more = ET.SubElement(body, "details")
    ET.SubElement(more, "summary").text = text(summary)
    return more


def table(
    body: ET.Element,
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Collection[str] = (),
    *,
    verdicts: bool = False,
) -> ET.Element:
    """A table. numbers: headings of columns that are aligned right. verdicts: the last cell of each row is ``OK``, or
    it is shown as wrong."""
    element = ET.SubElement(body, "table")
    top = ET.SubElement(ET.SubElement(element, "thead"), "tr")
    for heading in headings:
        cell = ET.SubElement(top, "th", scope="col")
        cell.text = heading
        if heading in numbers:
            cell.set("class", "n")
    inside = ET.SubElement(element, "tbody")
    for row in rows:
        line = ET.SubElement(inside, "tr")
        for heading, value in zip(headings, row, strict=True):
            entry = ET.SubElement(line, "td")
            entry.text = text(value)
            if heading in numbers:
                entry.set("class", "n")
        if verdicts:
            line[-1].set("class", "good" if row[-1] == OK else "bad")
    return element


def facts_table(body: ET.Element, facts: Mapping[str, object]) -> None:
    """Name and value, a row each."""
    element = ET.SubElement(body, "table")
    for name, value in facts.items():
        line = ET.SubElement(element, "tr")
        ET.SubElement(line, "th", scope="row").text = text(name)
        ET.SubElement(line, "td").text = text(value)


def wide(body: ET.Element, drawing: ET.Element) -> None:
    """A drawing as wide as the page; on a narrow one it is moved under the window, and stays legible."""
    label = drawing.get("aria-label") or ""
    ET.SubElement(body, "div", {"class": "scroll", "tabindex": "0", "role": "group", "aria-label": label}).append(
        drawing
    )


def picture_row(body: ET.Element, pictures: Mapping[str, np.ndarray]) -> None:
    """Pictures (H, W, 3) in [0, 1] by caption, side by side."""
    grid = ET.SubElement(body, "div", {"class": "pictures"})
    for caption, picture in pictures.items():
        figure = ET.SubElement(grid, "figure")
        ET.SubElement(figure, "img", src=data_uri(picture), alt=text(caption))
        ET.SubElement(figure, "figcaption").text = text(caption)


def difference(actual: np.ndarray, expected: np.ndarray) -> tuple[str, np.ndarray]:
    """How two pictures differ, as a picture whose largest difference is white, and its caption."""
    apart = np.abs(actual - expected)
    peak = float(apart.max())
    return f"difference, {peak:.2e} is white", apart / peak if peak else apart


def data_uri(picture: np.ndarray) -> str:
    """A picture (H, W, 3) in [0, 1] as a PNG inside the page."""
    from PIL import Image

    buffer = io.BytesIO()
    values = np.nan_to_num(np.clip(picture, 0, 1)) * 255
    Image.fromarray(values.round().astype(np.uint8)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def text(value: object) -> str:
    """On one line, without characters that a page cannot hold."""
    return one_line(value, 2000)
