"""A queue before one engine: requests go in from any thread, one thread of its own draws batch after batch."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from dipgo_deploy.errors import NotFiniteError
from dipgo_deploy.serve.batching import Batcher

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
State = Literal["loading", "ready", "stopping", "stopped", "failed"]


class Abandoned(Exception):
    """Nobody waits any more for what was being drawn."""


class Busy(Exception):
    """A request that is not taken now. seconds: after which to try again."""

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class BatchRecord:
    """What became of one batch. waited: seconds of each picture in the queue. seconds: of drawing."""

    waited: tuple[float, ...]
    seconds: float
    outcome: Literal["drawn", "failed", "abandoned"]


class Ticket(Generic[T, R]):
    """One request in a lane. future: its results, in the order of its items; fails with what drawing one of them
    failed with, or with CancelledError."""

    def __init__(self, items: Sequence[T]) -> None:
        self.items = tuple(items)
        self.future: Future[list[R]] = Future()
        self.future.set_running_or_notify_cancel()  # from here on only the lane ends it
        self.results: list[R | None] = [None] * len(self.items)
        self.left = len(self.items)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()


_Place = tuple[Ticket[T, R], int]  # a ticket, and which of its items


class Lane(Generic[T, R]):
    """Draws what is asked for, in batches, on a thread of its own.

    Args:
        name: for the log.
        draw: items of one key -> a result each. It calls its second argument between steps, which raises ``Abandoned``
            when all who asked are gone.
        prepare: called once on the lane's thread before anything is drawn.
        batch: items at a time.
        window: seconds that the oldest item waits for others.
        most: items that may wait; more are refused.
        record: told of each batch.
        clock: seconds, never falling.
    """

    def __init__(
        self,
        name: str,
        draw: Callable[[Sequence[T], Callable[[], None]], Sequence[R]],
        *,
        prepare: Callable[[], None] = lambda: None,
        batch: int,
        window: float,
        most: int,
        record: Callable[[BatchRecord], None] = lambda record: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.most = most
        self._draw, self._prepare, self._record, self._clock = draw, prepare, record, clock
        self._batch = batch
        self._queue: Batcher[_Place[T, R]] = Batcher(batch, window)
        self._changed = threading.Condition()
        self._state: State = "loading"
        self._running: list[_Place[T, R]] = []
        self._seconds = 0.0  # of a batch, of late
        self._thread = threading.Thread(target=self._work, name=f"lane {name}", daemon=True)

    @property
    def state(self) -> State:
        """What it is doing; a lane that is loading takes requests already."""
        return self._state

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to load, then to draw."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests; those that are there are drawn. To be followed by ``join``."""
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "stopping"
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is drawn, after ``stop``. False when ``timeout`` seconds were not enough: what is left then
        ends with CancelledError, at the next step of what is being drawn."""
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._drop({ticket for ticket, _ in (*self._all(), *self._running)}, CancelledError())
        return False

    def submit(self, items: Sequence[T], keys: Iterable[Hashable]) -> Ticket[T, R]:
        """Put a request into the queue. keys: of each item; those of one key are drawn together.

        Raises:
            Busy: the queue is full, or the lane does not take requests (any more).
        """
        ticket: Ticket[T, R] = Ticket(items)
        with self._changed:
            if self._state not in ("loading", "ready"):
                raise Busy(f"{self.name}: the server is {self._state}", 1)
            if len(self._queue) + len(items) > self.most:
                waits = f"{len(self._queue)} pictures wait, and at most {self.most} may"
                raise Busy(f"{self.name}: {waits}; try again later", self._estimate(len(items)))
            now = self._clock()
            for place, key in enumerate(keys):
                self._queue.add((ticket, place), key, now)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket[T, R]) -> None:
        """Forget a request: what waits of it leaves the queue, what is being drawn for it alone ends at its next
        step."""
        with self._changed:
            self._drop({ticket}, CancelledError())

    def _estimate(self, more: int) -> int:
        """Whole seconds, at least 1, after which so many more items may find room."""
        batches = math.ceil((more + len(self._running)) / self._batch)
        return max(1, math.ceil(batches * self._seconds))

    def _all(self) -> list[_Place[T, R]]:
        """All that waits, taken out."""
        found = []
        while batch := self._queue.take():
            found += [place for place, _ in batch]
        return found

    def _drop(self, tickets: set[Ticket[T, R]], error: BaseException) -> None:
        """End requests; the lock is held."""
        self._queue.remove(lambda place: place[0] in tickets)
        for ticket in tickets:
            if not ticket.over:
                ticket.future.set_exception(error)

    def _work(self) -> None:
        try:
            self._prepare()
            with self._changed:
                if self._state == "loading":
                    self._state = "ready"
            _log.info("%s: loaded", self.name)
            while batch := self._next():
                self._run(batch)
                del batch  # pictures are not kept while nothing is asked for
            with self._changed:
                self._state = "stopped"
        except BaseException as error:
            _log.exception("%s: cannot go on", self.name)
            with self._changed:
                self._state = "failed"
                self._drop({ticket for ticket, _ in (*self._all(), *self._running)}, error)

    def _next(self) -> list[tuple[_Place[T, R], float]]:
        """Wait for a batch and take it; empty when the lane has stopped."""
        with self._changed:
            while True:
                seconds = self._queue.due(self._clock())
                stopping = self._state == "stopping"
                if seconds == 0 or (stopping and seconds is not None):
                    batch = self._queue.take()
                    self._running = [place for place, _ in batch]
                    return batch
                if stopping:
                    return []
                self._changed.wait(seconds)

    def _run(self, batch: list[tuple[_Place[T, R], float]]) -> None:
        start = self._clock()
        places = [place for place, _ in batch]
        outcome = self._drawn(places)
        seconds = self._clock() - start
        with self._changed:
            self._running = []
            if outcome == "drawn":
                self._seconds = seconds if not self._seconds else 0.7 * self._seconds + 0.3 * seconds
        self._record(BatchRecord(tuple(max(0.0, start - since) for _, since in batch), seconds, outcome))

    def _drawn(self, places: list[_Place[T, R]]) -> Literal["drawn", "failed", "abandoned"]:
        tickets = {ticket for ticket, _ in places}

        def check() -> None:
            if all(ticket.over for ticket in tickets):
                raise Abandoned

        try:
            outcomes = draw_apart(self._draw, [ticket.items[place] for ticket, place in places], check)
        except Abandoned:
            return "abandoned"
        except Exception as error:
            _log.exception("%s: a batch of %d failed", self.name, len(places))
            outcomes = [error] * len(places)
        with self._changed:
            for (ticket, place), outcome in zip(places, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    self._drop({ticket}, outcome)
                    continue
                ticket.results[place] = outcome
                ticket.left -= 1
                if not ticket.left and not ticket.over:
                    ticket.future.set_result([one for one in ticket.results if one is not None])
        return "failed" if all(isinstance(outcome, Exception) for outcome in outcomes) else "drawn"


def draw_apart(
    draw: Callable[[Sequence[T], Callable[[], None]], Sequence[R]], items: Sequence[T], check: Callable[[], None]
) -> list[R | Exception]:
    """What ``draw`` gives for each item, or why it has no picture: where one of them has none, each is drawn alone."""
    try:
        results = draw(items, check)
    except NotFiniteError as error:
        if len(items) == 1:
            return [error]
        return [outcome for item in items for outcome in draw_apart(draw, [item], check)]
    if len(results) != len(items):
        raise RuntimeError(f"{len(results)} results for {len(items)} items")
    return list(results)
