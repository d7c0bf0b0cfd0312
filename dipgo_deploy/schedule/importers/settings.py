"""The settings of another program, from a JSON object with its own names for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipgo_deploy.documents import json_object
from dipgo_deploy.errors import UserError

_MOST_ENTRIES = 10_000
_MISSING: Any = object()


class Settings:
    """Named values that are asked for one by one, so that an unknown one can be refused."""

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self._values, self._what = {_plain(name): value for name, value in values.items()}, what
        self._asked: set[str] = set()

    @classmethod
    def from_json(cls, data: bytes, what: str) -> Settings:
        """Of the JSON object in UTF-8 text. what: whose settings, for messages."""
        return cls(json_object(data), what)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def any_of(self, *names: str) -> str:
        """The first of these names that is given, else the first of all."""
        return next((name for name in names if name in self), names[0])

    def value(self, name: str, default: Any = _MISSING) -> Any:
        """What is given, as it is. Raises UserError where nothing is and there is no default."""
        self._asked.add(name)
        found = self._values.get(name)
        if found is None and default is _MISSING:
            raise UserError(f"{name}: is missing, which {self._what} needs")
        return default if found is None else found

    def integer(self, name: str, default: Any = _MISSING, *, least: int = 0, most: int = _MOST_ENTRIES) -> int:
        """A whole number; digits in quotes count, as command lines have them."""
        found = self.value(name, default)
        if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) < 6:
            found = int(found)
        if type(found) is not int or not least <= found <= most:
            raise UserError(f"{name}: {repr(found)[:60]} is not a whole number from {least} to {most}")
        return found

    def number(self, name: str, default: Any = _MISSING, *, least: float = -1e9, most: float = 1e9) -> float:
        """A real number."""
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not least <= found <= most:
            raise UserError(f"{name}: {repr(found)[:60]} is not a number from {least:g} to {most:g}")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        found = self.value(name, default)
        if not isinstance(found, bool):
            raise UserError(f"{name}: {repr(found)[:60]} is not true or false")
        return found

    def numbers(self, name: str, default: Any = _MISSING) -> tuple[float, ...]:
        """A list of real numbers."""
        found = self.value(name, default)
        return tuple(self._entry(name, place, entry) for place, entry in enumerate(self._list(name, found)))

    def integers(self, name: str, default: Any = _MISSING) -> tuple[int, ...]:
        """A list of whole numbers."""
        found = self._list(name, self.value(name, default))
        for place, entry in enumerate(found):
            if type(entry) is not int or abs(entry) > 1_000_000:
                raise UserError(f"{name}: entry {place} is {repr(entry)[:60]}, not a whole number")
        return tuple(found)

    def mask(self, name: str, default: Any = _MISSING) -> tuple[bool, ...]:
        """A list of 0 and 1, or of true and false, or text with commas or spaces between 0 and 1."""
        found = self.value(name, default)
        if isinstance(found, str):
            cells = found.replace(",", " ").split()
            found = [int(cell) if cell in ("0", "1") else cell for cell in (cells if len(cells) > 1 else found)]
        for place, entry in enumerate(self._list(name, found)):
            if entry not in (0, 1) or isinstance(entry, float):
                raise UserError(f"{name}: evaluation {place} is {repr(entry)[:60]}, not 0 or 1")
        return tuple(bool(entry) for entry in found)

    def ignore(self, *names: str) -> None:
        """Settings that change nothing in what is computed."""
        self._asked.update(names)

    def done(self) -> None:
        """Refuse (UserError) a setting that nobody asked for: its meaning is not known."""
        unknown = next((name for name in self._values if name not in self._asked), None)
        if unknown is not None:
            raise UserError(f"{unknown[:60]}: is no setting of {self._what} that is known; leave it out")

    def _list(self, name: str, found: Any) -> Sequence[Any]:
        if not isinstance(found, (list, tuple)):
            raise UserError(f"{name}: {repr(found)[:60]} is not a list")
        if len(found) > _MOST_ENTRIES:
            raise UserError(f"{name}: {len(found):,} entries, which no schedule needs")
        return found

    def _entry(self, name: str, place: int, entry: Any) -> float:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)) or not abs(entry) < 1e9:
            raise UserError(f"{name}: entry {place} is {repr(entry)[:60]}, not a number")
        return float(entry)


def _plain(name: str) -> str:
    """``cache-threshold`` and ``--cache_threshold`` are one name."""
    return name.lstrip("-").replace("-", "_")
