"""``dipgo-bench``: measure schedules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import (
    checked_outputs,
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    version_option,
)

if TYPE_CHECKING:
    from dipgo_deploy.bench.quality import Row
    from dipgo_deploy.bench.statistics import Estimate

_PATH = click.Path(path_type=Path)
_FILE_WIDTH = 180


@click.group(
    name="bench", epilog=examples("dipgo-bench quality pruned.json uniform.json --model fashion-dit --solver ddim:10")
)
@version_option
def command() -> None:
    """Measure schedules."""


@command.command(
    epilog=examples(
        "dipgo-bench quality pruned.json uniform.json --model fashion-dit --solver ddim:10 --solver dpm++2m:10",
        "dipgo-bench quality s-*.json --model fashion-sd --per-condition 50 --out quality.json --plot quality.png",
    )
)
@click.argument("files", type=_PATH, nargs=-1)
@click.option("--model", required=True, help="fashion-sd, fashion-dit, a folder in diffusers' format, or a hub id.")
@click.option("--solver", "solvers", multiple=True, help="Sampler and steps beside the schedules, as in ddim:10.")
@click.option("--sampler", help="Of the full run. [default: the first schedule's, or the model's own]")
@click.option("--steps", type=click.IntRange(min=1), help="Of the full run. [default: the first schedule's, or 50]")
@click.option("--per-condition", type=click.IntRange(min=2), default=20, show_default=True, help="Images of each.")
@click.option("--batch", type=click.IntRange(min=1), default=20, show_default=True, help="Images at a time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--any-sampler", is_flag=True, help="Take schedules for other samplers and steps than the full run's too."
)
@click.option("--any-cache", is_flag=True, help="Take schedules with another kind of cache too.")
@click.option("--by-ratio", is_flag=True, help="Compare each case with the first one that saves about as much.")
@click.option("--prompts", type=_PATH, help="Text file, one prompt a line. [default: those of fashion-sd]")
@click.option("--guidance/--no-guidance", default=None, help="Classifier-free guidance. [default: the pipeline's]")
@click.option("--guidance-scale", type=float, help="[default: the pipeline's own]")
@click.option("--height", type=click.IntRange(min=1), help="Image height in pixels. [default: the model's]")
@click.option("--width", type=click.IntRange(min=1), help="Image width in pixels. [default: the model's]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's own]")
@click.option("--out", type=_PATH, help="Write the result as JSON.")
@click.option("--plot", type=_PATH, help="Write a picture; needs the extra bench.")
@json_option
@checked_outputs("out", "plot")
def quality(
    files: tuple[Path, ...],
    solvers: tuple[str, ...],
    per_condition: int,
    batch: int,
    seed: int,
    by_ratio: bool,
    any_sampler: bool,
    any_cache: bool,
    threads: int | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """SSIM and PSNR to the full run over the same seeds, and for the built-in models what a classifier says.

    FILES are schedules of one model and sampler. The first is what the others' SSIM is compared with.
    """
    from dipgo_deploy.bench.plot import check_plot, plot_quality
    from dipgo_deploy.schedule.document import Schedule

    schedules = [(str(path), Schedule.load(path)) for path in files]
    if plot is not None:
        check_plot(plot)
    import torch

    from dipgo_deploy.bench.quality import Case, measure, schedule_cases, solver_case
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import load_problem

    solver_cases: list[Case] = [solver_case(text) for text in solvers]
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)
    with console.status("starting") as status:
        problem = load_problem(_problem_options(options, [schedule for _, schedule in schedules]), status.update)
        cases = schedule_cases(schedules, problem, any_sampler=any_sampler, any_cache=any_cache)
        cases += solver_cases
        status.update("making images")
        rows = measure(
            problem,
            cases,
            per_condition,
            seed=seed,
            batch=batch,
            by_ratio=by_ratio,
            notify=lambda row: console.print(_words(row), markup=False, soft_wrap=True),
        )
    sampler = problem.target.sampler
    facts = {
        "model": problem.options.model,
        "reference": {"sampler": sampler.class_name, "steps": sampler.num_inference_steps},
        "guidance_scale": problem.guidance_scale,
        "images": per_condition * len(problem.conditions),
        "seed": seed,
        "difference_to": "the first of the same ratio" if by_ratio else "the first",
        "macs_full": problem.costs.full,
        "cases": [row.as_json() for row in rows],
    }
    _show(console, rows, facts)
    if out is not None:
        from dipgo_deploy.schedule.files import write_text

        write_text(out, json.dumps(facts, indent=2) + "\n")
    if plot is not None:
        plot_quality(rows, plot, f"{problem.options.model}, {facts['images']} images")
    emit(facts, as_json)


def _problem_options(options: dict[str, Any], schedules: Sequence[Any]) -> Any:
    """The full run's settings: what was given, else the first schedule's."""
    from dipgo_deploy.search.problem import ProblemOptions

    chosen = dict(options)
    prompts = chosen.pop("prompts")
    sampler, steps = chosen.pop("sampler"), chosen.pop("steps")
    if schedules:
        first = schedules[0]
        sampler = sampler or first.sampler.class_name
        steps = steps or first.sampler.num_inference_steps
        chosen |= {"granularity": first.model.granularity}
        kinds = {block.cache for block in first.blocks}
        chosen |= {"cache": kinds.pop()} if len(kinds) == 1 else {}
    return ProblemOptions(
        **chosen, sampler=sampler, steps=steps or 50, prompts=None if prompts is None else str(prompts)
    )


@command.command(epilog=examples("dipgo-bench profile --engine-dir engines/fashion-sd --threads 1"))
@click.option("--engine-dir", type=_PATH, required=True, help="Made by dipgo-export.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of the loop.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: ONNX Runtime's own]")
@click.option("--share-weights/--no-share-weights", default=False, show_default=True)
@json_option
def profile(engine_dir: Path, repeats: int, threads: int | None, share_weights: bool, as_json: bool) -> None:
    """Show where a denoising loop's time goes: launches, kernels by block and operator, copies, host."""
    from dipgo_deploy.bench.profile import profile_loop
    from dipgo_deploy.bundle.directory import Bundle

    bundle = Bundle.open(engine_dir)
    found = profile_loop(bundle, repeats=repeats, threads=threads, share_weights=share_weights)
    plan = bundle.manifest.plan
    facts = {
        "engine_dir": str(engine_dir),
        "loop_seconds": found.loop,
        "host_seconds": found.host,
        "launches": [
            {"step": launch.step, "variant": plan.variants[launch.variant].name, "seconds": seconds}
            for launch, seconds in zip(plan.launches, found.launches, strict=True)
        ],
        "kernel_seconds": found.kernels,
        "copy_seconds": found.copies,
        "blocks": dict(found.blocks),
        "operators": dict(found.operators),
    }
    _show_profile(human_console(as_json), facts)
    emit(facts, as_json)


def _show_profile(console: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table

    launches, kernels = facts["launches"], facts["kernel_seconds"]
    inside = sum(launch["seconds"] for launch in launches)
    console.print(
        f"{facts['loop_seconds'] * 1e3:.2f} ms a loop: {inside * 1e3:.2f} ms in {len(launches)} launches, "
        f"{facts['host_seconds'] * 1e6 / len(launches):.0f} us a launch beside them; with the profiler on, "
        f"{kernels * 1e3:.2f} ms in kernels, {facts['copy_seconds'] / kernels:.0%} of it only moves data",
        soft_wrap=True,
        markup=False,
    )
    variants: dict[str, list[float]] = {}
    for launch in launches:
        variants.setdefault(launch["variant"], []).append(launch["seconds"])
    table = Table(title="launches")
    for heading in ("variant", "launches", "ms each", "share"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, seconds in variants.items():
        mean = sum(seconds) / len(seconds)
        table.add_row(name, str(len(seconds)), f"{mean * 1e3:.3f}", f"{sum(seconds) / inside:.1%}")
    console.print(table)
    for title in ("blocks", "operators"):
        table = Table(title=f"kernels by {title[:-1]}")
        table.add_column(title[:-1])
        for heading in ("ms", "share"):
            table.add_column(heading, justify="right")
        for name, spent in facts[title].items():
            table.add_row(name, f"{spent * 1e3:.3f}", f"{spent / kernels:.1%}")
        console.print(table)


def _show(console: Any, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{facts['model']}: {facts['images']} images beside the full run's, 95% intervals")
    for heading in ("case", "GMACs", "saved", "launches", "SSIM", "to the first", "PSNR", "recognised", "Frechet"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(
            Path(row.name).name,
            f"{row.macs / 1e9:,.2f}",
            f"{row.ratio:.1%}",
            str(row.launches),
            _pair(row.ssim, 4),
            _pair(row.difference, 4),
            _pair(row.psnr, 2),
            _pair(row.accuracy, 3),
            _pair(row.frechet, 2),
        )
    # In a file a line may be as long as it needs to be.
    console.print(table, width=console.width if console.is_terminal else _FILE_WIDTH)


def _pair(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.{digits}f} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def _words(row: Row) -> str:
    return f"{row.name}: {row.ratio:.1%} saved, SSIM {_pair(row.ssim, 4)}"


main = entry_point(command)
