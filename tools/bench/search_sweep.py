"""Every search method on one model, one sampler and several ratios, on the same images: schedules and a log.

Run from the repository's root: ``python -m tools.bench.search_sweep --model fashion-dit --steps 20 --out FOLDER``.
The shipped method (``dipgo+refine``, or ``refine`` where no pruner is trained) comes last and may start at what the
others found, as with ``dipgo-search --start``. A schedule is written as soon as it is found. Running it again with the
same folder goes on from the pruner's checkpoint and replaces the rows of the ratios that are searched again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Gates
    from dipgo_deploy.search.problem import Problem
    from dipgo_deploy.search.run import Found, SearchOptions

METHODS = ("uniform", "dp", "random", "annealing", "genetic", "dipgo", "refine", "dipgo+refine")
SHIPPED = ("refine", "dipgo+refine")
LOG = "log.json"


def stem(
    model: str, sampler: str, steps: int, method: str, ratio: float, reference: tuple[str, int] | None = None
) -> str:
    """Of a schedule's file: the full run it stands for; behind it the sampler it runs with, where that is another."""
    own = f"{sampler}{steps}"
    run, suffix = (own, "") if reference is None else (f"{reference[0]}{reference[1]}", f"-{own}")
    return f"{model}-{run}-{method.replace('dipgo+', '')}{round(ratio * 100)}{suffix}"


def sweep(
    problem: Problem,
    options: SearchOptions,
    methods: Sequence[str],
    baseline_budget: int,
    folder: Path,
    notify: Any,
) -> None:
    """Run the methods one after the other; schedules and ``log.json`` go to ``folder``."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.search import checkpoint
    from dipgo_deploy.search.run import Reporter, measured_paths, search

    paths = measured_paths(problem, options)
    log = _Log(folder / LOG)
    chosen = problem.options
    name = (Path(chosen.model).name, chosen.sampler or "", chosen.steps)
    reference = chosen.reference
    pruner = folder / "pruner"
    for method in methods:
        for ratio in options.ratios:
            starts: list[tuple[str, Gates]] = []
            if method in SHIPPED:
                for other in ("annealing", "genetic"):
                    file = folder / f"{stem(*name, other, ratio, reference)}.json"
                    starts += [(other, Schedule.load(file).gates)] if file.is_file() else []
            budget = {"random": 1}.get(method, options.budget if method in SHIPPED else baseline_budget)
            counts = _Counts()
            settings = replace(options, method=method, ratios=(ratio,), budget=budget, starts=tuple(starts))
            begin, load = time.perf_counter(), os.getloadavg()[0]
            row: dict[str, Any] = {"method": method, "ratio": ratio}
            try:
                one: Found = search(
                    problem,
                    settings,
                    folder=pruner,
                    resume=(pruner / checkpoint.NAME).is_file(),
                    reporter=Reporter(evaluation=counts),
                    paths=paths,
                )[0]
            except UserError as error:
                row["refused"] = str(error)
            else:
                file = folder / f"{stem(*name, method, ratio, reference)}.json"
                one.schedule.save(file)
                row |= {"file": file.name, "achieved": one.ratio, "loss": one.loss, "cache": problem.options.cache}
                row |= {"start_losses": one.schedule.provenance["parameters"].get("start_losses")}
            row |= {"evaluations": counts.last, "seconds": time.perf_counter() - begin, "load_average": load}
            log.put(row)
            notify(row)


class _Counts:
    """The number of the last evaluation."""

    def __init__(self) -> None:
        self.last = 0

    def __call__(self, count: int, best: float) -> None:
        self.last = count


class _Log:
    """Rows by method and ratio, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def put(self, row: dict[str, Any]) -> None:
        place = (row["method"], row["ratio"])
        self._rows = [old for old in self._rows if (old["method"], old["ratio"]) != place] + [row]
        self._path.write_text(json.dumps(self._rows, indent=1) + "\n", encoding="utf-8")


@click.command(name="search_sweep")
@click.option("--model", default="fashion-dit", show_default=True)
@click.option("--sampler", default="ddim", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--reference", help="Sampler and steps of the full run.  [default: of --sampler and --steps]")
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.4, 0.6, 0.8, 0.85), show_default=True)
@click.option(
    "--method", "methods", type=click.Choice(METHODS), multiple=True, default=[m for m in METHODS if m != "refine"]
)
@click.option("--cache", type=click.Choice(["output", "residual"]), help="[default: the one that loses least]")
@click.option("--guidance-scale", type=float, default=4.0, show_default=True)
@click.option("--images", type=click.IntRange(min=1), default=16, show_default=True, help="Images an evaluation.")
@click.option("--budget", type=click.IntRange(min=0), default=120, show_default=True, help="Of the shipped method.")
@click.option("--baseline-budget", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=60, show_default=True, help="Of the pruner.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder.")
@json_option
def command(
    model: str,
    sampler: str,
    steps: int,
    reference: str | None,
    ratios: tuple[float, ...],
    methods: tuple[str, ...],
    cache: Any,
    guidance_scale: float,
    images: int,
    budget: int,
    baseline_budget: int,
    iterations: int,
    out: Path,
    as_json: bool,
) -> None:
    """Search with every method, one thread."""
    import torch

    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import ProblemOptions, load_problem, sampler_and_steps
    from dipgo_deploy.search.run import SearchOptions, choose_cache
    from dipgo_deploy.search.train import PRESETS

    quiet_libraries()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    console = human_console(as_json)
    train = replace(PRESETS["small"], iterations=iterations, save_every=10)
    options = SearchOptions(ratios=ratios, budget=budget, images=images, image_batch=images, train=train, threads=1)
    run = None if reference is None else sampler_and_steps(reference, "--reference", steps)
    problem = load_problem(
        ProblemOptions(model, sampler, steps, guidance_scale=guidance_scale, cache=cache, reference=run)
    )
    if cache is None:
        problem = choose_cache(problem, options)
    ordered = [method for method in METHODS if method in methods]
    sweep(
        problem,
        options,
        ordered,
        baseline_budget,
        out,
        notify=lambda row: console.print(json.dumps(row), markup=False, soft_wrap=True),
    )
    emit({"log": str(out / LOG)}, as_json)


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
