"""The main job on a built-in model: calibrated schedule -> export -> run -> a picture, the speed-up that came out, and
how close its images are to the full run's, beside plain solvers with as many launches.

``tools/demo.sh`` sets everything up and runs this; by itself: ``python -m tools.demo``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.export.exporter import ExportOptions
from dipgo_deploy.quality.judge import CLASS_NAMES
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule.document import Schedule
from tools.bench.loops import GUIDANCE_SCALE, compare_loops
from tools.bench.pairs import SCHEDULES, export_pair
from tools.bench.tables import with_quartiles

if TYPE_CHECKING:
    from PIL.Image import Image

MODELS = ("fashion-sd", "fashion-dit")
LAUNCHES = ("4", "5", "7", "10", "17")
SOLVERS = ("ddim", "dpm++2m", "deis", "unipc")
"""Plain solvers, with as many steps as the schedule has launches."""
OURS = "this schedule"
MARGIN = 4
SCALE = 2
"""The built-in models draw 32 x 32 pixels: too small to look at."""


@click.command(name="demo")
@click.option("--model", type=click.Choice(MODELS), default="fashion-sd", show_default=True)
@click.option(
    "--launches", type=click.Choice(LAUNCHES), default="5", show_default=True, help="Of the calibrated schedule."
)
@click.option(
    "--per-condition",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Images of each class that quality is measured on; 0 leaves that out.",
)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("engines/demo"), show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Timed runs of each loop.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the physical cores]")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
def command(
    model: str,
    launches: str,
    per_condition: int,
    folder: Path,
    repeats: int,
    threads: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Export a built-in model with a calibrated schedule and without one, run both, draw both, time and judge both."""
    quiet_libraries()
    console = human_console(as_json)
    start = time.perf_counter()

    def say(line: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.1f} s] {line}", markup=False, soft_wrap=True)

    path = SCHEDULES / "calibrated" / f"{model}-ddim50-{launches}.json"
    schedule = Schedule.load(path)
    say(f"{model}, schedule {path.name}: {launches} launches with their own solver, for 50 steps of DDIM")
    target = folder / model
    pair = export_pair(model, schedule, target, ExportOptions(layout="variants"), say)
    say(f"exported {pair.pruned} and, for comparison, {pair.full}")
    draws = [draw(path, threads, seed) for path in (pair.full, pair.pruned)]
    picture = target / "full-above-pruned.png"
    sheet(draws).save(picture)
    say(f"{picture}: the ten classes, seed {seed}; above the full loop, below the pruned one")
    facts = compare_loops(pair.full, pair.pruned, repeats, threads, bare=False)
    facts["quality"] = []
    if per_condition:
        say(f"making {10 * per_condition} images of each to compare with the full run's")
        facts["quality"] = quality(model, schedule, per_condition)
    for line in summary(facts, repeats):
        console.print(line, markup=False, soft_wrap=True)
    emit({"model": model, "picture": str(picture), "seconds": time.perf_counter() - start, **facts}, as_json)


main = entry_point(command)


def summary(facts: Mapping[str, Any], rounds: int) -> list[str]:
    """Times and quality as one table, and the speed-up with its spread."""
    ours, *plain = facts["quality"] or [{"name": OURS}]
    rows = [(_loop_cells("full run", facts["full"], "1 (what the others are compared with)"))]
    rows.append(_loop_cells(ours["name"], facts["pruned"], _ssim(ours)))
    rows += [(one["name"], str(facts["pruned"]["launches"]), "", _ssim(one)) for one in plain]
    heading = ("", "launches", f"ms a loop, {rounds} rounds in turn", "SSIM to the full run's images")
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heading, *rows)]
    ideal = facts["ideal_speedup"]
    quotients = {name: value / ideal for name, value in facts["speedup"].items()}
    return [
        *lines,
        f"speed-up: measured {with_quartiles(facts['speedup'], 2)}, ideal {ideal:.2f} (the ratio of the "
        f"multiply-accumulates), quotient {with_quartiles(quotients, 2)}; in brackets quartiles, of the SSIM 95%",
        "next, for a model of yours: dipgo-optimize MODEL -o engines/mine",
    ]


def _loop_cells(name: str, loop: Mapping[str, Any], likeness: str) -> tuple[str, str, str, str]:
    return name, str(loop["launches"]), with_quartiles(loop["loop_ms"], 1), likeness


def _ssim(row: Mapping[str, Any]) -> str:
    return f"{row['ssim']:.4f} ({row['low']:.4f}-{row['high']:.4f})" if "ssim" in row else "not measured"


def quality(model: str, schedule: Schedule, per_condition: int) -> list[dict[str, Any]]:
    """SSIM to the full run of the schedule, and of plain solvers with as many steps, on the same images."""
    from dipgo_deploy.bench.quality import measure, schedule_cases, solver_case
    from dipgo_deploy.search.problem import ProblemOptions, load_problem

    problem = load_problem(ProblemOptions(model=model, sampler="ddim", steps=50, guidance_scale=GUIDANCE_SCALE))
    cases = schedule_cases([(OURS, schedule)], problem)
    cases += [solver_case(f"{solver}:{schedule.steps}") for solver in SOLVERS]
    rows = measure(problem, cases, max(2, per_condition))
    return [{"name": row.name, "ssim": row.ssim.value, "low": row.ssim.low, "high": row.ssim.high} for row in rows]


def draw(engine_dir: Path, threads: int | None, seed: int) -> list[Image]:
    """One picture of each class."""
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=threads)
    result = pipeline(**conditions(pipeline, CLASS_NAMES), seed=seed, guidance_scale=GUIDANCE_SCALE)
    assert isinstance(result.images, list)  # output type pil
    return result.images


def conditions(pipeline: Pipeline, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call that asks for these classes."""
    if pipeline.bundle.manifest.components.text_encoder is None:
        return {"class_labels": list(names)}
    return {"prompt": [prompt_of(name) for name in names]}


def prompt_of(name: str) -> str:
    """The prompt that the built-in models were trained with for a class."""
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def sheet(rows: list[list[Image]]) -> Image:
    """Rows of equally large pictures on white, ``SCALE`` times as large."""
    from PIL import Image

    width, height = rows[0][0].size
    columns = max(map(len, rows))
    size = (columns * (width + MARGIN) + MARGIN, len(rows) * (height + MARGIN) + MARGIN)
    picture = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(image, (MARGIN + x * (width + MARGIN), MARGIN + y * (height + MARGIN)))
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    raise SystemExit(main(None))
