"""Which waiting pictures are drawn together, and when. Pure: no thread, and the time is told."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    item: T
    key: Hashable
    since: float


class Batcher(Generic[T]):
    """A queue that gives batches of items with the same key.

    The oldest item leads: a batch is it and those of its key that came next, at most ``most``. It is due when it is
    full, or when the leader has waited ``window`` seconds. So no item is passed by one of its own key, and none waits
    for more than the batches of those before it.

    most: items of a batch. window: seconds, 0: nobody is waited for.
    """

    def __init__(self, most: int, window: float) -> None:
        self._most, self._window = most, window
        self._entries: list[_Entry[T]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: T, key: Hashable, now: float) -> None:
        """Put an item behind all others. now: seconds, never less than before."""
        self._entries.append(_Entry(item, key, now))

    def remove(self, unwanted: Callable[[T], bool]) -> None:
        """Take items out, wherever they stand."""
        self._entries = [entry for entry in self._entries if not unwanted(entry.item)]

    def due(self, now: float) -> float | None:
        """Seconds until a batch is due, 0 where one is; None of an empty queue."""
        if not self._entries:
            return None
        if len(self._next()) == self._most:
            return 0.0
        return max(0.0, self._entries[0].since + self._window - now)

    def take(self) -> list[tuple[T, float]]:
        """The next batch, due or not, in order of arrival, each with the time that it came; empty of an empty queue."""
        taken = self._next()
        places = {id(entry) for entry in taken}
        self._entries = [entry for entry in self._entries if id(entry) not in places]
        return [(entry.item, entry.since) for entry in taken]

    def _next(self) -> list[_Entry[T]]:
        found: list[_Entry[T]] = []
        for entry in self._entries:
            if entry.key == self._entries[0].key:
                found.append(entry)
                if len(found) == self._most:
                    break
        return found
