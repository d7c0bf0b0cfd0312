"""How messages are worded: ``where: what; do this``, about nothing that an installed package does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dipgo_deploy

PACKAGE = Path(dipgo_deploy.__file__).parent
# What begins a remedy.
ADVICE = re.compile(
    r": (?=(?:give|use|make|keep|leave|list|name|choose|fetch|correct|fit|write|install|try|look|measure|say|compare|"
    r"remove|allow|pip|export|ask|save|train|update|build|take|set|start|run|convert|merge|copy|wait|close|move)\b)"
)
# A message may go from the place right to the remedy: "--strength 0: give a number above 0".
STATES = re.compile(r"\b(?:is|are|was|has|have|needs|not|no|does|cannot|unknown|missing)\b")
# A clone of the repository has these, a wheel has not.
ELSEWHERE = re.compile(r"\btools[/.]|\bdocs/|\.md\b|README|CONTRIBUTING|constraints\.txt|\bclone\b|\bcheckout\b")


def literal(node: ast.expr) -> str:
    """The text of a string expression with ``{}`` for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Call):
        return "install {}" if getattr(node.value.func, "id", "") == "install" else "{}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return "{}"


def messages() -> Iterator[tuple[str, str]]:
    """Place and text of every message of an error of ours, and of every help text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("UserError", "ToleranceError", "NotFiniteError", "UsageError") and node.args:
                yield where, literal(node.args[0])
            yield from ((where, literal(keyword.value)) for keyword in node.keywords if keyword.arg == "help")


MESSAGES = list(messages())


def misplaced(text: str) -> bool:
    """Whether a remedy follows a colon where something was said before it."""
    return any(":" in text[: found.start()] or STATES.search(text[: found.start()]) for found in ADVICE.finditer(text))


def test_a_remedy_stands_behind_a_semicolon() -> None:
    assert len(MESSAGES) > 600
    assert not [f"{where}: {text}" for where, text in MESSAGES if misplaced(text)]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{}: is a folder: give a file name", True),
        ("sampler {} is unknown: use {}", True),
        ("{}: is a folder; give a file name", False),
        ("--strength {}: give a number above 0", False),
    ],
)
def test_the_rule_itself(text: str, wrong: bool) -> None:
    assert misplaced(text) is wrong


def test_messages_speak_of_nothing_that_a_wheel_has_not() -> None:
    assert not [f"{where}: {text}" for where, text in MESSAGES if ELSEWHERE.search(text)]
    assert ELSEWHERE.search("see docs/limits.md") and ELSEWHERE.search("run tools/demo.sh")
