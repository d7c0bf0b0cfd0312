"""What differs between two engine directories."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.engine.contents import contents
from dipgo_deploy.schedule.frozen import to_json

# The schedule is compared by itself, gate by gate; how long a build took is no difference.
_APART = ("engine_dir", "schedule")
_NOT_COMPARED = ("seconds",)
_MISSING: Any = object()


@dataclass(frozen=True)
class Difference:
    """A value that differs.

    Attributes:
        section: the part of ``contents`` that it is in, or ``schedule``.
        place: where in it, from the outside in; empty for the section itself.
        before, after: the values, plain; of something that only one directory has, None for the other.
        only: ``before`` or ``after`` where only that directory has it.
    """

    section: str
    place: tuple[str, ...]
    before: Any
    after: Any
    only: str | None = None

    def line(self) -> str:
        """One line, without the section."""
        where = ", ".join(self.place)
        if self.only is not None:
            return f"{where}: only in the {'first' if self.only == 'before' else 'second'}"
        return f"{where}: {_change(self.before, self.after)}" if where else _change(self.before, self.after)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "section": self.section,
            "place": list(self.place),
            "before": self.before,
            "after": self.after,
            "only": self.only,
        }


def differences(before: Bundle, after: Bundle, *, verify: bool = False) -> list[Difference]:
    """All of them, section by section in the order of ``contents``, the schedule last; verify: as there.

    Raises:
        UserError: as ``contents``.
    """
    one, other = contents(before, verify=verify), contents(after, verify=verify)
    found = [
        difference
        for section in one
        if section not in _APART
        for difference in _of(section, (), _tree(one[section]), _tree(other[section]))
    ]
    schedules = before.load_schedule().diff(after.load_schedule())
    for name, (old, new) in schedules.fields.items():
        found.append(Difference("schedule", (name,), to_json(old), to_json(new)))
    for gate in schedules.gates:
        place = (f"evaluation {gate.step}", f"block {gate.block}")
        words = {True: "kept", False: "removed"}
        found.append(Difference("schedule", place, words[gate.before], words[gate.after]))
    return found


def _tree(value: Any) -> Any:
    """Rows as dictionaries by their names, or by their numbers."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        named = [str(row.get("name", number)) for number, row in enumerate(value)]
        if len(set(named)) == len(named):
            rows = zip(named, value, strict=True)
            return {name: _tree({key: item for key, item in row.items() if key != "name"}) for name, row in rows}
    if isinstance(value, Mapping):
        return {str(name): _tree(item) for name, item in value.items() if name not in _NOT_COMPARED}
    return value


def _of(section: str, place: tuple[str, ...], before: Any, after: Any) -> Iterator[Difference]:
    rows = [value if isinstance(value, Mapping) else {} if value == [] else None for value in (before, after)]
    if rows[0] is not None and rows[1] is not None:
        for name in dict.fromkeys((*rows[0], *rows[1])):
            inner = (*place, name)
            old, new = (row.get(name, _MISSING) for row in (rows[0], rows[1]))
            if new is _MISSING:
                yield Difference(section, inner, old, None, "before")
            elif old is _MISSING:
                yield Difference(section, inner, None, new, "after")
            else:
                yield from _of(section, inner, old, new)
    elif before != after:
        yield Difference(section, place, before, after)


def _change(before: Any, after: Any) -> str:
    numbers = [value for value in (before, after) if isinstance(value, list) and all(map(_is_number, value))]
    if len(numbers) == 2 and len(before) == len(after):
        apart = [abs(old - new) for old, new in zip(before, after, strict=True) if old != new]
        if len(before) > 4 or not all(isinstance(value, int) for value in (*before, *after)):
            return f"{len(apart)} of {len(before)} numbers, by up to {max(apart):.3g}"
    return f"{_short(before)} -> {_short(after)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
