from __future__ import annotations

import json
import math
import time
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest

from tools.bench import arena, launches
from tools.bench.measure import TimedBackend, alternate, in_another_process, machine, machine_line, spread
from tools.bench.solvers import frechet_with_error, wilson
from tools.bench.tables import table, with_earlier, with_quartiles, write_results


def test_alternate_takes_turns_and_drops_the_warm_up() -> None:
    order: list[str] = []
    counts = {"a": 0, "b": 0}

    def call(name: str) -> float:
        order.append(name)
        counts[name] += 1
        return float(counts[name])

    got = alternate({"a": lambda: call("a"), "b": lambda: call("b")}, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert got["a"].tolist() == got["b"].tolist() == [3.0, 4.0, 5.0]


def test_timed_backend_counts_what_launches_take() -> None:
    class Inner:
        name = "inner"

        def load(self, *_: Any) -> Any:
            return SimpleNamespace(graph="graph", bind=lambda tensors, graph=None: lambda: time.sleep(0.01))

    backend = TimedBackend(Inner())  # type: ignore[arg-type]
    call = backend.load(Path(), None).bind({})  # type: ignore[arg-type]
    assert backend.seconds == 0
    call()
    call()
    assert 0.02 <= backend.seconds < 1


def test_spread_is_median_and_quartiles() -> None:
    assert spread(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert with_quartiles({"median": 3.0, "q1": 2.0, "q3": 4.0}, 1) == "3.0 (2.0-4.0)"


def test_machine_is_said_in_one_line() -> None:
    line = machine_line(machine(2))
    assert "2 threads" in line and "\n" not in line and "numpy" in line
    assert "threads" not in machine_line(machine(None))


def test_wilson_interval() -> None:
    low, high = wilson(90, 100)
    assert math.isclose(low, 0.8256, abs_tol=1e-4) and math.isclose(high, 0.9448, abs_tol=1e-4)
    assert wilson(100, 100)[1] == pytest.approx(1)


def test_frechet_error_shrinks_with_more_images() -> None:
    rng = np.random.default_rng(1)
    judge = SimpleNamespace(mean=np.zeros(4), covariance=np.eye(4))
    few = frechet_with_error(judge, rng.standard_normal((200, 4)), 20)  # type: ignore[arg-type]
    many = frechet_with_error(judge, rng.standard_normal((20000, 4)), 2000)  # type: ignore[arg-type]
    assert 0 < many[1] < few[1]
    assert many[0] < few[0] < 1


def test_results_are_written_as_json_and_table(tmp_path: Path) -> None:
    write_results(tmp_path / "new" / "x.json", {"a": 1}, table(("a", "b"), [("x", "1")]))
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "x.md").read_text() == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


def test_launches_are_summed_by_how_often_they_run() -> None:
    """Two graphs of half and a fifth of the multiply-accumulates, launched 3 and 1 times, as fast as these say."""
    case = {
        "evaluations": 8,
        "macs_run": 3 * 50 + 20,
        "variants": 2,
        "launches": 4,
        "cut": {"a": {"launches": 3, "macs": 50}, "b": {"launches": 1, "macs": 20}},
    }
    found = launches.summary(case, 100, {"a": np.full(3, 0.5), "b": np.full(3, 0.2)}, np.full(3, 2.0))
    assert found["quotient"] == pytest.approx({"median": 1.0, "q1": 1.0, "q3": 1.0})
    assert found["speedup"] == pytest.approx(800 / 170) == found["ideal_speedup"]
    slower = launches.summary(case, 100, {"a": np.full(3, 0.6), "b": np.full(3, 0.2)}, np.full(3, 2.0))
    assert slower["quotient"]["median"] == pytest.approx((3 * 0.5 + 0.2) / (3 * 0.6 + 0.2))
    assert slower["speedup"] == pytest.approx(8 / (3 * 0.6 + 0.2))
    # One of more graphs: the rest is as slow for its multiply-accumulates.
    part = case | {"variants": 3, "launches": 6, "macs_run": 300}
    sampled = launches.summary(part, 100, {"a": np.full(3, 0.6), "b": np.full(3, 0.2)}, np.full(3, 2.0))
    assert sampled["speedup"] == pytest.approx(8 / 3 * slower["quotient"]["median"])


def test_an_even_choice_of_graphs_leaves_the_full_one_out() -> None:
    assert launches.sample([9, 5], 2) == [0, 1]
    assert launches.sample([9, 5, 1, 7, 3, 9], 3) == [1, 2, 3]
    assert launches.sample([9, 5, 1, 7, 3, 9], 1) == [2]


def test_plans_above_the_bound_are_named() -> None:
    row = {"model": "m", "granularity": "block", "layout": "variants"}
    rows = [row | {"schedule": "good", "arena_bytes": 104, "lower_bound_bytes": 100}]
    assert "0 of 1 plans" in arena.as_text(rows)
    rows.append(row | {"schedule": "bad", "arena_bytes": 2048, "lower_bound_bytes": 1024})
    text = arena.as_text(rows)
    assert "1 of 2 plans" in text and "| m, block, variants | bad | 2 | 1 |" in text
    assert "1.5200 | 2.0000 |" in text


@pytest.mark.parametrize("wrapped", [False, True])
def test_rows_of_earlier_runs_stay_but_for_those_that_were_measured_again(tmp_path: Path, wrapped: bool) -> None:
    path, key = tmp_path / "rows.json", itemgetter("model", "latent")
    old = [{"model": "a", "latent": [8, 8], "ms": 1}, {"model": "b", "latent": [8, 8], "ms": 2}]
    assert with_earlier(path, old, key) == old
    write_results(path, {"rows": old} if wrapped else old, "")
    again = {"model": "a", "latent": [8, 8], "ms": 3}
    assert with_earlier(path, [again], key) == [old[1], again]


def test_another_process_gives_what_it_prints_last_or_says_why_not() -> None:
    script = "import json, sys; print('first'); print(json.dumps(sys.argv[1:]))"
    assert in_another_process(script, "x") == ["x"]
    with pytest.raises(click.ClickException, match="ValueError: why"):
        in_another_process("raise ValueError('why')")
