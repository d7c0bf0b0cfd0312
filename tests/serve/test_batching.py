"""Which waiting pictures are drawn together, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.serve.batching import Batcher

ADD = st.tuples(st.just("add"), st.sampled_from("abc"))
WAIT = st.tuples(st.just("wait"), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
REMOVE = st.tuples(st.just("remove"), st.integers(0, 30))
EVENTS = st.lists(st.one_of(ADD, ADD, WAIT, REMOVE), max_size=40)


@given(EVENTS, st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.5]))
def test_none_is_lost_doubled_mixed_or_passed(events: list[tuple[str, object]], most: int, window: float) -> None:
    batcher: Batcher[tuple[str, int]] = Batcher(most, window)
    now, came, waiting, gone = 0.0, {}, [], []

    def take_what_is_due() -> None:
        while batcher.due(now) == 0:
            leader = waiting[0]
            batch = batcher.take()
            items = [item for item, _ in batch]
            assert items == [item for item in waiting if item[0] == leader[0]][: len(items)], "the oldest, in order"
            assert len(items) == most or now - came[leader] >= window, "full, or its leader waited long enough"
            assert all(since == came[item] for item, since in batch) and len(items) <= most
            for item in items:
                waiting.remove(item)
            gone.extend(items)

    for number, (kind, value) in enumerate(events):
        if kind == "add":
            item = (str(value), number)
            batcher.add(item, value, now)
            came[item] = now
            waiting.append(item)
        elif kind == "remove":
            batcher.remove(lambda item: item[1] == value)  # noqa: B023
            gone += [item for item in waiting if item[1] == value]
            waiting = [item for item in waiting if item[1] != value]
        else:
            # A worker that sleeps until it is due, and takes it then.
            end = now + float(value)  # type: ignore[arg-type]
            while (seconds := batcher.due(now)) is not None and now + seconds <= end:
                now += seconds
                take_what_is_due()
            now = end
        assert len(batcher) == len(waiting)
        assert all(now - came[item] <= window for item in waiting), "none waits beyond the window"
    now += window
    take_what_is_due()
    assert not len(batcher) and batcher.due(now) is None and batcher.take() == []
    assert sorted(gone) == sorted(came), "each left once"


def test_a_full_batch_waits_for_nobody_and_later_ones_of_another_key_do_not_pass() -> None:
    batcher: Batcher[str] = Batcher(2, 10.0)
    batcher.add("a1", "a", 0.0)
    batcher.add("b1", "b", 1.0)
    batcher.add("b2", "b", 1.0)
    assert batcher.due(4.0) == 6.0
    batcher.add("a2", "a", 5.0)
    assert batcher.due(5.0) == 0.0
    assert batcher.take() == [("a1", 0.0), ("a2", 5.0)]
    assert batcher.due(5.0) == 0.0
    assert batcher.take() == [("b1", 1.0), ("b2", 1.0)]
