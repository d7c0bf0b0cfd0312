"""A comparison as JUnit XML, which continuous integration shows: a test case for each thing that was compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any
from xml.etree import ElementTree as ET

from dipgo_deploy.compare.report import Outcome, Report
from dipgo_deploy.errors import one_line

_LONGEST = 1000  # characters of an attribute


def junit_xml(name: str, report: Report, properties: Mapping[str, Any], error: Exception | None = None) -> bytes:
    """The document, UTF-8.

    A suite for each of parts, variants, loop, results and pictures; a case is one of them, with its lines as failure.
    What was not compared is a skipped case; ``error``, where the comparison itself ended with one, is a case with it.

    Args:
        name: of what was compared.
        properties: of the whole, such as versions and hashes.
    """
    root = ET.Element("testsuites", name=_text(f"dipgo-compare {name}"))
    common = ET.SubElement(_suite(root, "comparison"), "properties")
    for key, value in properties.items():
        ET.SubElement(common, "property", name=_text(key), value=_text(value))
    for section, outcomes in groupby(report.outcomes(), key=lambda outcome: outcome.section):
        _cases(_suite(root, section), f"{name}.{section}", outcomes)
    first = root[0]
    for line in report.skipped:
        case = ET.SubElement(first, "testcase", classname=_text(f"{name}.comparison"), name=_text(line))
        ET.SubElement(case, "skipped", message=_text(line))
    if error is not None:
        case = ET.SubElement(first, "testcase", classname=_text(f"{name}.comparison"), name="comparison")
        ET.SubElement(case, "error", message=_text(error), type=type(error).__name__).text = _text(error)
    for suite in root:
        _count(suite)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def properties(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the JSON of a comparison says of the whole, flat: ``models.engine_dir.seal`` and so on."""
    found: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{name}.{key}" if name else key, item)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                add(f"{name}.{number}", item)
        elif value is not None:
            found[name] = str(value)

    names = ("engine_dir", "model", "dtype", "backend", "seed", "guidance_scale", "models", "versions", "tolerances")
    add("", {name: facts[name] for name in names if name in facts})
    return found


def _suite(root: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(root, "testsuite", name=name)


def _cases(suite: ET.Element, classname: str, outcomes: Iterable[Outcome]) -> None:
    seen: Counter[str] = Counter()
    for outcome in outcomes:
        seen[outcome.name] += 1
        # Readers take cases of one name for one.
        number = f" ({seen[outcome.name]})" if seen[outcome.name] > 1 else ""
        case = ET.SubElement(suite, "testcase", classname=_text(classname), name=_text(f"{outcome.name}{number}"))
        if outcome.failures:
            lines = [_text(line) for line in outcome.failures]
            ET.SubElement(case, "failure", message=lines[0], type="ToleranceError").text = "\n".join(lines)
        elif outcome.tensors:
            worst = max(outcome.tensors, key=lambda tensor: tensor.relative)
            line = f"largest error {worst.relative:.2e} of the largest value, in {worst.name}"
            ET.SubElement(case, "system-out").text = _text(line)


def _count(suite: ET.Element) -> None:
    counts = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error"}
    for name, path in (counts | {"skipped": "testcase/skipped"}).items():
        suite.set(name, str(len(suite.findall(path))))


def _text(value: object) -> str:
    """On one line, without the characters that XML cannot hold."""
    return one_line(value, _LONGEST)
