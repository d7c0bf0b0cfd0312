"""PEFT's patterns of module names: regular expressions out of a file, matched in bounded time.

A pattern KEY means the expression ``(.*\\.)?(KEY)$`` from the start of a name. Python's ``re`` may take for ever on
one that was made for it; here all positions that a part of the pattern can end at are followed together. Known are
characters, ``.``, ``[...]``, ``\\d \\w \\s``, escaped characters, ``^``, ``$``, groups, ``|`` and repetition, but not
of what has a repetition in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_LENGTH = 512
_REPEATS = 64
_STEPS = 3_000_000
_PLAIN = re.compile(r"[\w\-.]*")
_DEPTH = 32
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda letter: letter.isalnum() or letter == "_",
    "s": str.isspace,
}

_Positions = set[int]
# From the positions that a part can start at to those that it can end at.
_Part = Callable[[str, _Positions], _Positions]


class PatternError(ValueError):
    """A pattern that is no regular expression, that has more in it than is known here, or that takes too long."""


@dataclass(frozen=True)
class _Node:
    ends: _Part
    repeats: bool = False


class Patterns:
    """Patterns with their values; ``find`` gives the value of the first that matches."""

    def __init__(self, values: Iterable[tuple[str, float]]) -> None:
        """Parse the patterns.

        Raises:
            PatternError: see there; it names the pattern.
        """
        self._steps = 0
        self._patterns = [(text, None if _PLAIN.fullmatch(text) else self._parsed(text), v) for text, v in values]

    def find(self, name: str) -> float | None:
        """The value of the first pattern that matches a module's name; None where there is none.

        Raises:
            PatternError: all names together took too long.
        """
        starts = {0, *(at + 1 for at, letter in enumerate(name) if letter == ".")}
        for text, node, value in self._patterns:
            self._budget(text, 1)
            if node is None:
                first = len(name) - len(text)
                found = first in starts and all(a in (".", b) for a, b in zip(text, name[first:], strict=True))
            else:
                found = len(name) in node.ends(name, starts)
            if found:
                return value
        return None

    def _budget(self, text: str, steps: int) -> None:
        self._steps += steps
        if self._steps > _STEPS:
            raise PatternError(f"{text[:80]!a} takes too long to match")

    def _parsed(self, text: str) -> _Node:
        if len(text) > _LENGTH:
            raise PatternError(f"{text[:80]!a}... is longer than {_LENGTH} characters")
        parser = _Parser(text, lambda steps: self._budget(text, steps))
        node = parser.alternatives()
        if parser.at != len(text):
            raise parser.error("unbalanced parenthesis")
        return node


class _Parser:
    def __init__(self, text: str, spend: Callable[[int], None]) -> None:
        self.text, self.at, self._depth, self._spend = text, 0, 0, spend

    def error(self, reason: str) -> PatternError:
        return PatternError(f"{self.text[:80]!a}: {reason} at {self.at}")

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        letter = self._peek()
        if not letter:
            raise self.error("it ends too early")
        self.at += 1
        return letter

    def alternatives(self) -> _Node:
        nodes = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            nodes.append(self._sequence())
        if len(nodes) == 1:
            return nodes[0]

        def ends(name: str, starts: _Positions) -> _Positions:
            return set().union(*(node.ends(name, starts) for node in nodes))

        return _Node(ends, any(node.repeats for node in nodes))

    def _sequence(self) -> _Node:
        nodes = []
        while self._peek() not in ("", "|", ")"):
            nodes.append(self._repeated())

        def ends(name: str, starts: _Positions) -> _Positions:
            for node in nodes:
                if not starts:
                    break
                starts = node.ends(name, starts)
            return starts

        return _Node(ends, any(node.repeats for node in nodes))

    def _repeated(self) -> _Node:
        node = self._atom()
        least, most = self._count()
        if (least, most) == (1, 1):
            return node
        if node.repeats:
            raise self.error("a repetition in what is repeated is not supported")
        if self._peek() == "?":  # a lazy one matches the same names
            self.at += 1
        elif self._peek() in ("*", "+", "{"):
            raise self.error("a repetition of a repetition is not supported")

        def ends(name: str, starts: _Positions) -> _Positions:
            for _ in range(least):
                starts = node.ends(name, starts)
            found, new, count = set(starts), starts, least
            while new and (most is None or count < most):
                new = node.ends(name, new) - found
                found |= new
                count += 1
            return found

        return _Node(ends, True)

    def _count(self) -> tuple[int, int | None]:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple:
            return simple[self._next()]
        match = _COUNT.match(self.text, self.at)
        if match is None:
            return 1, 1
        self.at = match.end()
        least = int(match[1] or "0")
        most = least if not match[2] else int(match[3]) if match[3] else None
        if not match[1] or max(least, most or 0) > _REPEATS or (most is not None and most < least):
            raise self.error(f"a count that is not supported (at most {_REPEATS})")
        return least, most

    def _atom(self) -> _Node:
        letter = self._next()
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._one(self._set())
        if letter == ".":
            return self._one(lambda _: True)
        if letter == "^":
            return _Node(lambda _, starts: starts & {0})
        if letter == "$":
            return _Node(lambda name, starts: starts & {len(name)})
        if letter in "*+?":
            raise self.error("nothing to repeat")
        if letter == "\\":
            return self._one(self._escape())
        return self._one(lambda other: other == letter)

    def _one(self, accepts: Callable[[str], bool]) -> _Node:
        def ends(name: str, starts: _Positions) -> _Positions:
            self._spend(3 * (1 + len(starts)))
            return {at + 1 for at in starts if at < len(name) and accepts(name[at])}

        return _Node(ends)

    def _group(self) -> _Node:
        if self._peek() == "?":
            self.at += 1
            if self._next() != ":":
                raise self.error("only plain groups are supported")
        self._depth += 1
        if self._depth > _DEPTH:
            raise self.error(f"more than {_DEPTH} groups in each other")
        node = self.alternatives()
        if self._peek() != ")":
            raise self.error("missing )")
        self.at += 1
        self._depth -= 1
        return node

    def _escape(self) -> Callable[[str], bool]:
        letter = self._next()
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter.lower() in _CLASSES:
            accepts = _CLASSES[letter.lower()]
            return lambda other: not accepts(other)
        if letter.isalnum():
            raise self.error(f"\\{letter} is not supported")
        return lambda other: other == letter

    def _set(self) -> Callable[[str], bool]:
        negative = self._peek() == "^"
        self.at += negative
        accepted: list[Callable[[str], bool]] = []
        while not accepted or self._peek() != "]":
            letter = self._next()
            if letter == "\\":
                accepted.append(self._escape())
            elif self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                last = self._next()
                if last == "\\" or last < letter:
                    raise self.error("a range that is not supported")
                accepted.append(lambda other, low=letter, high=last: low <= other <= high)  # type: ignore[misc]
            else:
                accepted.append(lambda other, one=letter: other == one)  # type: ignore[misc]
        self.at += 1
        return lambda other: any(accepts(other) for accepts in accepted) != negative
