"""A page of HTML, read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Tags that are open at the end, links to elsewhere, text of each row of tables, of each paragraph and of each
    element with a role, and the data of charts by the id of their element."""

    EMPTY = frozenset({"meta", "img"})

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.paragraphs: list[str] = []
        self.named: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.charts: dict[str, Any] = {}
        self.figures: list[str] = []
        self._chart: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.sources += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self._chart = given.get("data-chart")
        if "role" in given:
            self.named.append((given["role"], given.get("aria-label", "")))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.paragraphs.append("")
        elif tag == "dd":
            self.figures.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] == "script" and self._chart is not None:
            self.charts[self._chart] = json.loads(data)
        elif self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        elif "p" in self.open:
            self.paragraphs[-1] += data
        elif "dd" in self.open:
            self.figures[-1] += data

    def said(self, text: str) -> bool:
        """Whether a paragraph has this text in it."""
        return any(text in paragraph for paragraph in self.paragraphs)
