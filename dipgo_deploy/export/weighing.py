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
from dipgo_deploy.plan.segments import SegmentPlan
from dipgo_deploy.plan.weigh import GraphCosts, seconds_of, weigh
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.forecast import FittedForecast
from dipgo_deploy.schedule.validation import one_line

FITTED = "the schedule's rows were fitted to its gates, so these stay as they are"


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


def fitted_to_its_gates(schedule: Schedule) -> bool:
    """Whether rows were fitted that other gates would make wrong."""
    return schedule.solver is not None or isinstance(schedule.forecast, FittedForecast)


def weighed_plan(
    schedule: Schedule,
    pieces: PieceGraph,
    costs: GraphCosts,
    compiled: Callable[[int | None], Plan],
    segments: Callable[[Plan], SegmentPlan | None] = lambda plan: None,
) -> tuple[Plan, str]:
    """The plan, and a line that says what became of the schedule.

    Args:
        compiled: see ``weigh``.
        segments: what a plan becomes where it is launched in the layout ``segments``; None: it is launched as it is.
    """
    if fitted_to_its_gates(schedule):
        return compiled(None), FITTED
    graphs: dict[Gates, int] = {}

    def seconds(plan: Plan) -> float:
        cut = segments(plan)
        if cut is None:
            nbytes = [variant_weight_bytes(variant, pieces) for variant in plan.variants]
        else:
            nbytes = [segment.weight_bytes for segment in cut.segments]
        graphs[plan.keep] = len(nbytes)
        made = cut or plan
        return seconds_of(nbytes, [launch.variant for launch in made.launches], made.macs_run, costs)

    found = weigh(compiled, seconds)
    count = graphs[found.plan.keep]
    if found.plan is found.written:
        each = "1 graph is worth what it costs" if count == 1 else f"{count} graphs are worth what they cost"
        return found.plan, f"{each}; as written"
    both = zip(found.plan.keep, found.written.keep, strict=True)
    again = sum(now != before for rows in both for now, before in zip(*rows, strict=True))
    blocks = "1 skipped block is" if again == 1 else f"{again} skipped blocks are"
    return found.plan, (
        f"{blocks} computed after all: {count} graph{'s' * (count > 1)} in the "
        f"place of {graphs[found.written.keep]}, which by these costs takes {found.seconds:.3g} s a picture instead of "
        f"{found.written_seconds:.3g}"
    )
