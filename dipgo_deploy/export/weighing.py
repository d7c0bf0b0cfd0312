"""A schedule's plan with the graphs that are worth what they cost on the machine that will run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pydantic

from dipgo_deploy import documents
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.plan.layouts import variant_weight_bytes
from dipgo_deploy.plan.model import Plan
from dipgo_deploy.plan.pieces import PieceGraph
from dipgo_deploy.plan.weigh import GraphCosts, weigh
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import FittedForecast
from dipgo_deploy.schedule.validation import one_line


def read_graph_costs(path: Path, option: str = "--graph-costs") -> GraphCosts:
    """The costs that ``dipgo-bench graph-costs`` measured.

    Raises:
        UserError: the file cannot be read, or is no such record.
    """
    data = read_bytes(path, what="record of graph costs")
    try:
        record = documents.json_object(data.decode("utf-8"))
        costs = pydantic.TypeAdapter(GraphCosts).validate_python(record.get("costs"))
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: byte {error.start} is not UTF-8 text") from None
    except UserError as error:
        raise UserError(f"{option} {path}: {error}") from None
    except pydantic.ValidationError as error:
        raise UserError(f"{option} {path}: {one_line(error)}; measure with dipgo-bench graph-costs") from None
    check_graph_costs(costs, f"{option} {path}")
    return costs


def check_graph_costs(costs: GraphCosts, what: str) -> None:
    """Refuse (UserError) costs that cannot be: below zero, infinite, or less than one where it is a divisor."""
    for name, value in vars(costs).items():
        least = 1.0 if name in ("macs_per_second", "pictures") else 0.0
        if not least <= value < float("inf"):
            raise UserError(f"{what}: {name} is {value}; give a finite number of at least {least:g}")


def weighed_plan(
    schedule: Schedule, pieces: PieceGraph, costs: GraphCosts, compiled: Callable[[int | None], Plan]
) -> tuple[Plan, str]:
    """The plan, and a line that says what became of the schedule. compiled: see ``weigh``."""
    if schedule.solver is not None or isinstance(schedule.forecast, FittedForecast):
        return compiled(None), "--graph-costs: the schedule's rows were fitted to its gates, so these stay as they are"
    found = weigh(compiled, lambda variant: variant_weight_bytes(variant, pieces), costs)
    if found.plan is found.written:
        return found.plan, f"--graph-costs: {len(found.plan.variants)} graphs are worth what they cost; as written"
    fewer, more = len(found.plan.variants), len(found.written.variants)
    return found.plan, (
        f"--graph-costs: {len(found.plan.promoted)} skipped blocks are computed after all: {fewer} graphs in the place "
        f"of {more}, which by these costs takes {found.seconds:.3g} s a picture instead of {found.written_seconds:.3g}"
    )
