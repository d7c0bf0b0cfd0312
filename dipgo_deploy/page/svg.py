"""The few shapes that charts are made of. Lengths are in pixels, y goes downwards."""

from __future__ import annotations

from xml.etree import ElementTree as ET


def svg(width: float, height: float, name: str, *, wide: bool = False) -> ET.Element:
    """A drawing with a name for those who do not see it. wide: as wide as the page, whatever its own size."""
    size = {} if wide else {"width": number(width), "height": number(height)}
    kind = {"class": "wide"} if wide else {}
    box = f"0 0 {number(width)} {number(height)}"
    return ET.Element("svg", {"viewBox": box, "role": "img", "aria-label": name, **size, **kind})


def number(value: float) -> str:
    """With one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")


def line(within: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    """A straight line of a style."""
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    ET.SubElement(within, "line", {"class": kind, **{name: number(value) for name, value in ends.items()}})


def label(within: ET.Element, x: float, y: float, text: str, anchor: str, kind: str | None = None) -> None:
    """Text on the base line y. anchor: start, middle or end."""
    place = {"x": number(x), "y": number(y), "text-anchor": anchor, **({} if kind is None else {"class": kind})}
    ET.SubElement(within, "text", place).text = text


def rect(within: ET.Element, kind: str, x: float, y: float, width: float, height: float) -> ET.Element:
    """A filled rectangle of a style."""
    size = {"x": x, "y": y, "width": width, "height": height}
    return ET.SubElement(within, "rect", {"class": kind, **{name: number(value) for name, value in size.items()}})


def cursor(within: ET.Element) -> None:
    """What the script puts around the thing it speaks of."""
    rect(within, "cursor", 0, 0, 0, 0)


def ticks(count: int, most: int) -> list[int]:
    """At most about ``most`` of the numbers 0 to count - 1, at even distances of 1, 2 or 5 times a power of ten."""
    step = 1
    while -(-count // step) > most:
        step = {"1": step * 2, "2": step // 2 * 5, "5": step * 2}[str(step)[0]]
    return list(range(0, count, step))
