"""What graphs cost: measured, read from a file, and what is wrong with it in one line."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from dipgo_deploy.bench import graph_costs
from dipgo_deploy.cli.bench import command as bench
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.options import ExportOptions, check_options
from dipgo_deploy.export.weighing import read_graph_costs, weighed_plan
from dipgo_deploy.plan.weigh import GraphCosts

COSTS = {"macs_per_second": 1e9, "launch_seconds": 0.0, "load_seconds": 0.1, "load_seconds_per_byte": 0.0}
COSTS |= {"switch_seconds_per_byte": 0.0}


def test_what_is_measured_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = partial(graph_costs.measure_graph_costs, seconds=0.0)
    monkeypatch.setattr(graph_costs, "measure_graph_costs", measure)
    path = tmp_path / "costs.json"
    line = ["graph-costs", "--threads", "1", "--pictures", "100", "-o", str(path)]
    result = CliRunner().invoke(bench, line)
    assert result.exit_code == 0 and "GMACs a second" in result.output
    costs = read_graph_costs(path)
    assert costs.pictures == 100 and costs.macs_per_second > 1e8
    assert all(math.isfinite(value) and value >= 0 for value in vars(costs).values())
    assert 0 < costs.load_seconds_per_byte < 1e-6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSON"),
        ("{}", "costs"),
        (json.dumps({"costs": {**COSTS, "macs_per_second": "fast"}}), "macs_per_second"),
        (json.dumps({"costs": {**COSTS, "load_seconds": -1}}), "load_seconds is -1"),
        (json.dumps({"costs": {**COSTS, "pictures": 0}}), "pictures is 0"),
        (
            json.dumps({"costs": {name: value for name, value in COSTS.items() if name != "load_seconds"}}),
            "load_seconds",
        ),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_graph_costs(path)
    assert "\n" not in str(error.value) and "--graph-costs" in str(error.value)


def test_options_that_do_not_go_together() -> None:
    costs = GraphCosts(**COSTS)
    for change, message in (({"max_variants": 2}, "--max-variants"), ({"layout": "segments"}, "--layout segments")):
        with pytest.raises(UserError, match=f"--graph-costs: not with {message}"):
            check_options(ExportOptions(graph_costs=costs, **change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="graph_costs: macs_per_second is inf"):
        check_options(ExportOptions(graph_costs=GraphCosts(**{**COSTS, "macs_per_second": math.inf})))


def test_rows_that_were_fitted_to_the_gates_keep_them() -> None:
    asked: list[int | None] = []

    def compiled(limit: int | None) -> Any:
        asked.append(limit)
        return "plan"

    schedule: Any = SimpleNamespace(solver="fitted", forecast=None)
    plan, line = weighed_plan(schedule, None, GraphCosts(**COSTS), compiled)  # type: ignore[arg-type]
    assert plan == "plan" and asked == [None] and "stay as they are" in line
