"""The queue before an engine, with a drawer of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.serve.lane import BatchRecord, Busy, Lane


class Drawer:
    """Draws "x" as "X"; while it is closed, what it draws takes until it is opened, or until nobody wants it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)
        self.open.set()

    def __call__(self, items: Sequence[str], check: Callable[[], None]) -> list[str]:
        self.batches.append(list(items))
        self.begun.release()
        check()
        while not self.open.wait(0.002):
            check()
        if any(item.startswith("nan") for item in items):
            raise NotFiniteError("no picture")
        if "broken" in items:
            raise RuntimeError("broken")
        return [item.upper() for item in items]


@pytest.fixture
def drawer() -> Drawer:
    return Drawer()


@pytest.fixture
def records() -> list[BatchRecord]:
    return []


@pytest.fixture
def lane(drawer: Drawer, records: list[BatchRecord]) -> Iterator[Lane[str, str]]:
    made: Lane[str, str] = Lane("toy", drawer, batch=3, window=0.0, most=6, record=records.append)
    yield made
    drawer.open.set()
    made.stop()
    assert made.join(10) and made.state == "stopped"


def held(lane: Lane[str, str], drawer: Drawer) -> None:
    """Start the lane, and keep it busy with one item until the drawer is opened."""
    drawer.open.clear()
    lane.start()
    lane.submit(["first"], ["-"])
    assert drawer.begun.acquire(timeout=10)


def test_each_gets_its_own_in_full_batches(drawer: Drawer) -> None:
    lane: Lane[str, str] = Lane("toy", drawer, batch=3, window=0.0, most=100)
    held(lane, drawer)
    requests = [[f"{number}-{place}" for place in range(1 + number % 4)] for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        keys = [[number % 2] * len(items) for number, items in enumerate(requests)]
        tickets = list(pool.map(lane.submit, requests, keys))
    drawer.open.set()
    for items, ticket in zip(requests, tickets, strict=True):
        assert ticket.future.result(10) == [item.upper() for item in items]
    lane.stop()
    assert lane.join(10)
    drawn = drawer.batches[1:]
    assert sorted(item for batch in drawn for item in batch) == sorted(item for items in requests for item in items)
    assert all(len({int(item.split("-")[0]) % 2 for item in batch}) == 1 for batch in drawn)
    assert sum(len(batch) < 3 for batch in drawn) <= 2, "only the last of each key is not full"


def test_a_full_queue_is_said_and_what_was_taken_is_drawn(lane: Lane[str, str], drawer: Drawer) -> None:
    held(lane, drawer)
    tickets = [lane.submit(["a", "b"], ["k", "k"]) for _ in range(3)]
    with pytest.raises(Busy, match="6 pictures wait, and at most 6 may") as busy:
        lane.submit(["c"], ["k"])
    assert busy.value.seconds >= 1 and lane.waiting == 6
    drawer.open.set()
    assert [ticket.future.result(10) for ticket in tickets] == [["A", "B"]] * 3
    assert lane.submit(["c"], ["k"]).future.result(10) == ["C"]


def test_what_nobody_wants_is_not_drawn(lane: Lane[str, str], drawer: Drawer, records: list[BatchRecord]) -> None:
    drawer.open.clear()
    lane.start()
    running = lane.submit(["running"], ["k"])
    assert drawer.begun.acquire(timeout=10)
    waiting, kept = lane.submit(["w1", "w2"], ["k", "k"]), lane.submit(["kept"], ["k"])
    lane.cancel(waiting)
    assert lane.waiting == 1
    lane.cancel(running)  # ends at its next step, though the drawer is closed
    assert drawer.begun.acquire(timeout=10)
    assert drawer.batches == [["running"], ["kept"]]
    drawer.open.set()
    assert kept.future.result(10) == ["KEPT"]
    for ticket in (running, waiting):
        with pytest.raises(CancelledError):
            ticket.future.result(10)
    lane.cancel(kept)  # too late, which is no mistake
    assert kept.future.result() == ["KEPT"]
    lane.stop()
    assert lane.join(10)
    assert [record.outcome for record in records] == ["abandoned", "drawn"]
    assert all(len(record.waited) == 1 and record.seconds >= 0 for record in records)


def test_one_of_a_batch_that_goes_away_leaves_the_others_their_pictures(lane: Lane[str, str], drawer: Drawer) -> None:
    held(lane, drawer)
    one, other = lane.submit(["one"], ["k"]), lane.submit(["other"], ["k"])
    drawer.open.set()
    assert other.future.result(10) == ["OTHER"]
    drawer.open.clear()
    assert one.future.result(10) == ["ONE"]
    lane.submit(["first"], ["-"])
    one, other = lane.submit(["one"], ["k"]), lane.submit(["other"], ["k"])
    lane.cancel(one)
    drawer.open.set()
    assert other.future.result(10) == ["OTHER"] and drawer.batches[-1] == ["other"]


def test_a_picture_that_fails_fails_alone(lane: Lane[str, str], drawer: Drawer) -> None:
    held(lane, drawer)
    wrong, right = lane.submit(["nan1", "fine"], ["k", "k"]), lane.submit(["a"], ["k"])
    after = lane.submit(["nan2", "x"], ["l", "m"])
    drawer.open.set()
    assert right.future.result(10) == ["A"]
    for ticket in (wrong, after):
        with pytest.raises(NotFiniteError):
            ticket.future.result(10)
    assert lane.submit(["b"], ["k"]).future.result(10) == ["B"]
    assert ["x"] not in drawer.batches, "what is left of a request that failed is not drawn"


def test_a_batch_that_breaks_ends_its_requests_and_not_the_lane(
    lane: Lane[str, str], drawer: Drawer, caplog: pytest.LogCaptureFixture
) -> None:
    lane.start()
    with pytest.raises(RuntimeError, match="broken"):
        lane.submit(["broken"], ["k"]).future.result(10)
    assert "a batch of 1 failed" in caplog.text
    assert lane.submit(["a"], ["k"]).future.result(10) == ["A"] and lane.state == "ready"


def test_a_stop_draws_what_was_taken_and_takes_no_more(lane: Lane[str, str], drawer: Drawer) -> None:
    held(lane, drawer)
    tickets = [lane.submit(["a"], [key]) for key in "abc"]
    lane.stop()
    with pytest.raises(Busy, match="stopping"):
        lane.submit(["b"], ["k"])
    assert not lane.join(0.01), "what was left ends"
    drawer.open.set()
    for ticket in tickets:
        with pytest.raises(CancelledError):
            ticket.future.result(10)
    patient: Lane[str, str] = Lane("toy", Drawer(), batch=2, window=60.0, most=9)
    ticket = patient.submit(["a"], ["k"])
    patient.start()
    patient.stop()
    assert ticket.future.result(10) == ["A"], "nobody is waited for at the end"
    assert patient.join(10)


def test_what_cannot_be_loaded_ends_what_waits_for_it() -> None:
    def prepare() -> None:
        raise UserError("damaged")

    lane: Lane[str, str] = Lane("toy", Drawer(), prepare=prepare, batch=2, window=0.0, most=9)
    ticket = lane.submit(["a"], ["k"])
    assert lane.state == "loading"
    lane.start()
    with pytest.raises(UserError, match="damaged"):
        ticket.future.result(10)
    assert lane.state == "failed"
    with pytest.raises(Busy, match="failed"):
        lane.submit(["a"], ["k"])
    lane.stop()
    assert lane.join(10) and lane.state == "failed"


def test_a_lane_that_cannot_go_on_says_so(drawer: Drawer) -> None:
    def record(record: BatchRecord) -> None:
        raise OSError("disk")

    lane: Lane[str, str] = Lane("toy", drawer, batch=1, window=0.0, most=9, record=record)
    held(lane, drawer)
    waiting = lane.submit(["a"], ["k"])
    drawer.open.set()
    with pytest.raises(OSError, match="disk"):
        waiting.future.result(10)
    with pytest.raises(Busy, match="failed"):
        lane.submit(["b"], ["k"])
