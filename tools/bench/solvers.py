"""The honest baseline: schedules beside solvers that evaluate the denoiser as often, with both judges.

Run from the repository's root:
``python -m tools.bench.solvers --model fashion-sd --out docs/results/solvers-fashion-sd.json``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bench.statistics import share
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.quality.judge import CLASS_NAMES, Judge, feature_statistics, frechet_distance
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.runtime.image import to_uint8
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Schedule
from tools.bench.loops import GUIDANCE_SCALE
from tools.bench.measure import denoiser_hash, machine, machine_line
from tools.bench.pairs import SCHEDULES, write_engine
from tools.bench.tables import table, write_results
from tools.demo import conditions
from tools.make_schedules import KEPT, released

BATCH = 10
BOOTSTRAPS = 200
CONFIDENCE = 1.96
"""Standard errors of a 95% interval."""


@dataclass(frozen=True)
class Case:
    """One way to make an image."""

    name: str
    schedule: Callable[[], Schedule]


def plain(model: str, sampler: str, steps: int) -> Callable[[], Schedule]:
    """Every block at every step of a sampler."""

    def make() -> Schedule:
        target = schedule_target(model, sampler, steps)
        return target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})

    return make


def same_grid() -> Schedule:
    """All blocks at the ten evaluations that the released pattern keeps.

    With DDIM a repeated prediction moves the latent along the same straight line (in x / sqrt(alpha)) that one long
    step takes: this is DDIM on the ten timesteps kept, no more and no less.
    """
    schedule = released("ddim")
    width = len(schedule.blocks)
    return schedule.with_gates([[step in KEPT] * width for step in range(schedule.steps)], provenance={})


def shipped(name: str) -> Callable[[], Schedule]:
    """A schedule of the package."""
    return lambda: Schedule.load(SCHEDULES / f"{name}.json")


CASES: Mapping[str, Sequence[Case]] = {
    "fashion-sd": (
        Case("DDIM, 50 steps", plain("fashion-sd", "ddim", 50)),
        Case("DDIM, 50 steps, released pattern", shipped("fashion-sd-ddim50")),
        Case("DDIM on the ten timesteps of the released pattern", same_grid),
        Case("DDIM, 10 steps", plain("fashion-sd", "ddim", 10)),
        Case("DPM-Solver++ 2M, 10 steps", plain("fashion-sd", "dpm++2m", 10)),
        Case("PNDM, 50 steps", plain("fashion-sd", "pndm", 50)),
        Case("PNDM, 50 steps, released pattern", shipped("fashion-sd-pndm50")),
        Case("PNDM, 9 steps", plain("fashion-sd", "pndm", 9)),
    ),
    "fashion-dit": (
        Case("DDIM, 50 steps", plain("fashion-dit", "ddim", 50)),
        Case("DDIM, 50 steps, uniform 1 in 5", shipped("fashion-dit-uniform5")),
        Case("DDIM, 50 steps, random half", shipped("fashion-dit-random50")),
        Case("DDIM, 25 steps", plain("fashion-dit", "ddim", 25)),
        Case("DDIM, 10 steps", plain("fashion-dit", "ddim", 10)),
        Case("DPM-Solver++ 2M, 10 steps", plain("fashion-dit", "dpm++2m", 10)),
    ),
}


@click.command(name="solvers")
@click.option("--model", type=click.Choice(list(CASES)), required=True)
@click.option("--per-class", type=click.IntRange(min=1), default=100, show_default=True, help="Images of each class.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same initial noise for every case.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Results (.json, and .md beside it).")
@json_option
def command(model: str, per_class: int, seed: int, threads: int, out: Path | None, as_json: bool) -> None:
    """Generate with each schedule and solver through the runtime, and have both judges look at the images."""
    quiet_libraries()
    console = human_console(as_json)
    judge = Judge.load()
    facts: dict[str, Any] = {
        "model": model,
        "weights_sha256": denoiser_hash(model),
        "machine": machine(threads),
        "images": per_class * len(CLASS_NAMES),
        "seed": seed,
        "guidance_scale": GUIDANCE_SCALE,
        "batch": BATCH,
        "cases": [],
    }
    traced: PlannedExport | None = None
    for case in CASES[model]:
        schedule = case.schedule()
        traced = traced or plan_export(model, schedule, ExportOptions(layout="variants", batch=BATCH, check=False))
        row = _measure(case.name, replan(traced, schedule), judge, per_class, seed, threads)
        console.print(f"{model}, {case.name}: {_words(row)}", markup=False, soft_wrap=True)
        facts["cases"].append(row)
        if out is not None:
            write_results(out, facts, as_text(facts))
    emit(facts, as_json)


main = entry_point(command)


def _measure(
    name: str, planned: PlannedExport, judge: Judge, per_class: int, seed: int, threads: int
) -> dict[str, Any]:
    plan = planned.plan
    with tempfile.TemporaryDirectory() as folder:
        engine_dir = Path(folder) / "engine"
        write_engine(planned, engine_dir)
        pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=threads)
        result = pipeline(
            **conditions(pipeline, CLASS_NAMES),
            num_images_per_prompt=per_class,
            seed=seed,
            guidance_scale=GUIDANCE_SCALE,
            output_type="np",
        )
    images = to_uint8(np.asarray(result.images))
    right = judge.classify(images) == np.repeat(np.arange(len(CLASS_NAMES)), per_class)
    distance, error = frechet_with_error(judge, judge.features(images), per_class)
    return {
        "case": name,
        "evaluations": len(plan.keep),
        "launches": len(plan.launches),
        "macs": plan.macs_run // BATCH,
        "accuracy": float(right.mean()),
        "accuracy_interval": wilson(int(right.sum()), len(right)),
        "frechet": distance,
        "frechet_standard_error": error,
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval)."""
    estimate = share(successes, trials)
    return estimate.low, estimate.high


def frechet_with_error(judge: Judge, features: np.ndarray, per_class: int) -> tuple[float, float]:
    """Frechet distance to the held-out images, and its standard error over bootstraps within each class."""

    def distance(rows: np.ndarray) -> float:
        return frechet_distance(*feature_statistics(features[rows]), judge.mean, judge.covariance)

    rng = np.random.default_rng(0)
    first = np.repeat(np.arange(len(CLASS_NAMES)) * per_class, per_class)
    draws = [distance(first + rng.integers(per_class, size=len(first))) for _ in range(BOOTSTRAPS)]
    return distance(np.arange(len(features))), float(np.std(draws, ddof=1))


def _words(row: Mapping[str, Any]) -> str:
    return (
        f"{row['launches']} launches, {row['accuracy']:.1%} recognised, distance {row['frechet']:.2f} "
        f"+- {CONFIDENCE * row['frechet_standard_error']:.2f}"
    )


def as_text(facts: Mapping[str, Any]) -> str:
    """The results for readers."""
    model = facts["model"]
    headings = ("sampler", "evaluations", "launches", "GMACs", "recognised", "distance")
    return "\n".join(
        (
            f"# {model}: schedules beside solvers with as few evaluations\n",
            f"{machine_line(facts['machine'])}. Weights of the denoiser: sha256 {facts['weights_sha256'][:16]}.\n",
            f"{facts['images']} images a row, {facts['images'] // len(CLASS_NAMES)} of each class, guidance scale "
            f"{facts['guidance_scale']:g}, the same initial noise (seed {facts['seed']}) in every row, fp32, all "
            "through this project's runtime. Recognised: share that the classifier takes for the class asked for, 95% "
            "Wilson interval. Distance: Frechet distance of the classifier's features to the held-out images (less is "
            f"better), plus or minus {CONFIDENCE} standard errors of a bootstrap within classes; an estimate from few "
            "images is biased upwards, equally in all rows. GMACs: of one image, both halves of guidance, text encoder "
            f"and VAE not counted. Made by `python -m tools.bench.solvers --model {model} "
            f"--per-class {facts['images'] // len(CLASS_NAMES)} --seed {facts['seed']} "
            f"--threads {facts['machine']['threads']} --out docs/results/solvers-{model}.json`.\n",
            table(headings, [_row(row) for row in facts["cases"]]),
        )
    )


def _row(row: Mapping[str, Any]) -> Sequence[str]:
    low, high = row["accuracy_interval"]
    return (
        row["case"],
        str(row["evaluations"]),
        str(row["launches"]),
        f"{row['macs'] / 1e9:.2f}",
        f"{row['accuracy']:.1%} ({low:.1%}-{high:.1%})",
        f"{row['frechet']:.2f} +- {CONFIDENCE * row['frechet_standard_error']:.2f}",
    )


if __name__ == "__main__":
    raise SystemExit(main(None))
