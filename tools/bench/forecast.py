"""Whether partial launches pay at equal multiply-accumulates: with plain caches, and with forecasts of them.

Run from the repository's root: ``python -m tools.bench.forecast --model fashion-sd --granularity block --launches 7
--out forecasts.json``. Every case has rows that are fitted to it, on the same images; what is measured are others. A
run adds its rows to the file, and prints all that are there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench.measure import machine
from tools.bench.tables import table

if TYPE_CHECKING:
    from dipgo_deploy.calibrate.core import CalibrationOptions
    from dipgo_deploy.calibrate.fit import Launched
    from dipgo_deploy.schedule.document import Gates, Schedule
    from dipgo_deploy.search.problem import Problem

STEPS = 50
GUIDANCE_SCALE = 4.0
Order = Literal[1, 2]
# Name, order of the forecast (None: plain caches), and whether its weights are fitted.
READS: tuple[tuple[str, Order | None, bool], ...] = (
    ("plain caches", None, False),
    ("Taylor, order 1", 1, False),
    ("Taylor, order 2", 2, False),
    ("least squares, 2 values", 1, True),
    ("least squares, 3 values", 2, True),
)
HEADINGS = ("launched", "evaluations", *(name for name, _, _ in READS))


@dataclass(frozen=True)
class Pattern:
    """Launches of a kind: whole ones, and between them some that compute ``kept`` blocks only."""

    name: str
    whole: int
    partial: int
    kept: frozenset[str]


def patterns(problem: Problem, launches: int) -> Iterator[Pattern]:
    """What is measured for a budget of so many whole launches."""
    from dipgo_deploy.schedule import builders

    names = problem.target.block_names
    yield Pattern(f"{launches} whole", launches, 0, frozenset())
    for count in (launches, 3 * launches):
        yield Pattern(f"{launches} whole, {count} of no block", launches, count, frozenset())
    if problem.target.model.class_name.startswith("UNet"):
        row = builders.deepcache(2, names, 2, 0)[1]
        kept = [("the shallowest branch", frozenset(name for name, on in zip(names, row, strict=True) if on))]
    elif problem.options.granularity == "block":
        kept = [("the first and the last block", frozenset({names[0], names[-1]}))]
    else:
        kept = [
            ("every second attention and MLP", frozenset(name for place, name in enumerate(names) if place % 4 < 2)),
            ("the MLPs", frozenset(name for name in names if not name.endswith("attn1"))),
        ]
    for what, blocks in kept:
        share = _share(problem, blocks)
        for whole in (launches - 1, launches - 2):
            count = round((launches - whole) / share)
            if whole > 1 and count:
                yield Pattern(f"{whole} whole, {count} of {what}", whole, count, blocks)


def _share(problem: Problem, kept: frozenset[str]) -> float:
    """Of one whole evaluation, what an evaluation of these blocks costs."""
    names = problem.target.block_names
    two = [(True,) * len(names), tuple(name in kept for name in names)]
    gates = [*two, *[two[0]] * (problem.steps - 2)]
    costs = problem.costs
    return (costs.analyse(gates).cost - (problem.steps - 1) * costs.step_cost) / costs.step_cost


def gates_of(pattern: Pattern, names: Sequence[str]) -> Gates:
    """T x N gates: whole launches evenly from the first evaluation on, the partial ones evenly in their gaps."""
    whole = [place * STEPS // pattern.whole for place in range(pattern.whole)]
    ends = [*whole[1:], STEPS]
    rows = [(False,) * len(names)] * STEPS
    for step in whole:
        rows[step] = (True,) * len(names)
    for gap, (start, end) in enumerate(zip(whole, ends, strict=True)):
        count = (gap + 1) * pattern.partial // pattern.whole - gap * pattern.partial // pattern.whole
        count = min(count, end - start - 1)
        for place in range(count):
            rows[start + (place + 1) * (end - start) // (count + 1)] = tuple(name in pattern.kept for name in names)
    return tuple(rows)


def partial_steps(pattern: Pattern) -> list[int]:
    """Evaluations at which a partial launch is meant, also one of no block."""
    marked = gates_of(Pattern("", pattern.whole, pattern.partial, frozenset({"x"})), ("x", "y"))
    return [step for step, row in enumerate(marked) if row == (True, False)]


def schedules(
    problem: Problem, launches: int, options: CalibrationOptions, folder: Path
) -> Iterator[tuple[str, str, Schedule]]:
    """Every case: its launches and reads in words, and the schedule with what was fitted to it."""
    from dipgo_deploy.calibrate.core import grouped
    from dipgo_deploy.calibrate.fit import launched
    from dipgo_deploy.calibrate.fitted import fitted_to, opened_runs
    from dipgo_deploy.calibrate.supernet_model import SupernetModel
    from dipgo_deploy.schedule.forecast import RuleForecast
    from dipgo_deploy.search.problem import with_schedule

    names = problem.target.block_names
    scales = (GUIDANCE_SCALE,)
    groups = grouped(len(problem.conditions), scales, options)
    first = SupernetModel(problem, ((True,) * len(names),) * STEPS, scales, folder)
    runs = opened_runs(first, groups, range(STEPS), options, 1 + first.noises + STEPS, folder=folder, settings={})
    for pattern in patterns(problem, launches):
        gates = gates_of(pattern, names)
        for reads, order, fit in READS:
            if (order is None) != (pattern.partial == 0) and (order is not None or not pattern.kept):
                continue  # whole launches read nothing; one of no block gives the last prediction again, or nearly
            schedule = problem.target.schedule(gates, "forecast bench", {})
            if order is not None:
                schedule = schedule.with_forecast(RuleForecast(kind="taylor", order=order))
            at_work = with_schedule(problem, schedule)
            case = _of_pattern(launched(at_work, schedule, fit_forecast=fit), pattern)
            model = SupernetModel(at_work, case.gates, scales, folder, case.reads)
            solver = fitted_to(runs, model, case.launches, options, {}, prepare=case.prepare(model))
            yield pattern.name, reads if pattern.partial else "-", case.fitted(schedule, solver, options)


def _of_pattern(case: Launched, pattern: Pattern) -> Launched:
    """Without the evaluations of no block that a forecast makes something of, and the pattern does not mean."""
    from dipgo_deploy.calibrate.forecast_weights import ReadWeights

    meant = set(partial_steps(pattern))
    places = [place for place, launch in enumerate(case.launches) if any(case.gates[place]) or launch.target in meant]
    reads = case.reads if case.reads is None or isinstance(case.reads, ReadWeights) else case.reads.at(places)
    gates = tuple(case.gates[place] for place in places)
    return replace(case, gates=gates, launches=tuple(case.launches[place] for place in places), reads=reads)


def shipped(model: str, launches: int) -> Schedule | None:
    """The package's schedule of so many whole launches, searched and refined; None where there is none."""
    from dipgo_deploy.schedule.document import Schedule
    from tools.bench.solvers import SCHEDULES

    path = SCHEDULES / "calibrated" / f"{model}-ddim{STEPS}-{launches}.json"
    return Schedule.load(path) if path.is_file() else None


@click.command(name="forecast")
@click.option("--model", type=click.Choice(["fashion-sd", "fashion-dit"]), required=True)
@click.option("--granularity", type=click.Choice(["block", "layer"]), default="block", show_default=True)
@click.option("--launches", type=click.IntRange(min=3), default=7, show_default=True, help="Whole ones: the budget.")
@click.option("--images", type=click.IntRange(min=10), default=100, show_default=True, help="Of the calibration.")
@click.option("--per-condition", type=click.IntRange(min=2), default=20, show_default=True, help="Test images of each.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Results, JSON.")
@json_option
def command(
    model: str, granularity: Any, launches: int, images: int, per_condition: int, out: Path, as_json: bool
) -> None:
    """Fit every case of a budget, draw test images with it, and add the rows to OUT; one thread."""
    import torch

    from dipgo_deploy.bench.quality import Case, measure
    from dipgo_deploy.bench.statistics import mean
    from dipgo_deploy.calibrate.core import CalibrationOptions
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import ProblemOptions, load_problem

    quiet_libraries()
    torch.set_num_threads(1)
    console = human_console(as_json)
    problem = load_problem(
        ProblemOptions(model=model, sampler="ddim", steps=STEPS, granularity=granularity, guidance_scale=GUIDANCE_SCALE)
    )
    found: list[tuple[str, str, Schedule]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in schedules(problem, launches, CalibrationOptions(images=images), Path(folder)):
            console.print(f"fitted: {case[0]}, {case[1]}", markup=False, soft_wrap=True)
            found.append(case)
    best = shipped(model, launches) if granularity == "block" else None
    if best is not None:
        found.insert(1, (f"{launches} whole, searched and refined", "-", best))
    cases = [Case(f"{name}; {reads}", gates=one.gates, fitted=one) for name, reads, one in found]
    rows = measure(problem, cases, per_condition)
    facts: dict[str, Any] = {"steps": STEPS, "parts": []}
    if out.is_file():
        facts = json.loads(out.read_text(encoding="utf-8"))
    part = {
        "model": model,
        "granularity": granularity,
        "launches": launches,
        "calibration_images": images,
        "test_images": per_condition * len(problem.conditions),
        "guidance_scale": GUIDANCE_SCALE,
        "machine": machine(1),
        "rows": [
            {
                "pattern": name,
                "reads": reads,
                "launches": row.launches,
                "evaluations": row.macs / problem.costs.step_cost,
                "ssim": vars(row.ssim),
                "difference": vars(mean(row.per_image["ssim"] - rows[0].per_image["ssim"])),
            }
            for (name, reads, _), row in zip(found, rows, strict=True)
        ],
    }
    key = ("model", "granularity", "launches")
    others = [other for other in facts["parts"] if [other[name] for name in key] != [part[name] for name in key]]
    facts["parts"] = sorted([*others, part], key=lambda one: [one["model"], one["granularity"], one["launches"]])
    out.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.print(as_text(facts), markup=False, soft_wrap=True)
    emit(part, as_json)


def as_text(facts: Mapping[str, Any]) -> str:
    """A table for each model, granularity and budget: what each case is better by than whole launches."""
    texts = []
    for part in facts["parts"]:
        whole = part["rows"][0]
        by_pattern: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in part["rows"][1:]:
            by_pattern.setdefault(row["pattern"], {})[row["reads"]] = row
        what = f"{part['model']}, granularity {part['granularity']}, {part['test_images']} images"
        texts.append(f"{what}; {whole['pattern']}: SSIM {_pair(whole['ssim'])}. Better by:\n")
        texts.append(table(HEADINGS, [_cells(name, rows) for name, rows in by_pattern.items()]))
    return "\n".join(texts)


def _cells(name: str, rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    found = [rows.get(reads) for reads, _, _ in READS]
    if "-" in rows:  # whole launches read nothing
        found[0] = rows["-"]
    evaluations = next(iter(rows.values()))["evaluations"]
    return (name, f"{evaluations:.2f}", *("-" if row is None else _pair(row["difference"]) for row in found))


def _pair(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.4f} +- {(estimate['high'] - estimate['low']) / 2:.4f}"


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
