"""``dipgo-calibrate``: give a schedule a solver of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    live,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    checkpoint_options,
    class_labels_option,
    device_option,
    guidance_option,
    model_option,
    option,
    prompts_option,
    size_options,
    threads_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.schedule.document import Schedule


@click.command(
    name="dipgo-calibrate",
    cls=Command,
    epilog=examples(
        "dipgo-calibrate --model fashion-sd --schedule uniform.json --images 200 --guidance-scale 4 -o fitted.json",
        "dipgo-calibrate --model ./sd15 --schedule s.json --prompts prompts.txt --reference ddim:200 -o fitted.json",
    ),
)
@model_option
@guidance_option
@option("Schedule", "--schedule", "schedule_file", type=PATH, required=True, help="Schedule file to fit a solver to.")
@option(
    "Schedule",
    "--reference",
    show_default="the schedule's own",
    help="Sampler and steps of the full run to come close to, as in ddim:200.",
)
@prompts_option
@class_labels_option
@option(
    "Prompt",
    "--guidance-scale",
    "guidance_scales",
    type=float,
    multiple=True,
    show_default="the pipeline's own",
    help="Scale of the guidance; given several times, the images take them in turn.",
)
@option("Calibration", "--images", type=click.IntRange(min=2), default=200, help="Number of calibration images.")
@option(
    "Calibration",
    "--held-aside",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the images that choose the ridge and give the residuals.",
)
@option("Calibration", "--seed", type=click.IntRange(min=0), default=0, help="Seed of the first image.")
@size_options
@option("Runtime", "--batch", type=click.IntRange(min=1), default=20, help="Images in one evaluation.")
@device_option
@threads_option("torch's own")
@option("Output", "-o", "--output", type=PATH, required=True, help="File for the schedule with its solver.")
@checkpoint_options("calibration")
@json_option
@version_option
@checked_outputs("output")
def command(
    model: str,
    schedule_file: Path,
    output: Path,
    images: int,
    held_aside: float,
    reference: str | None,
    prompts: Path | None,
    class_labels: str | None,
    guidance_scales: tuple[float, ...],
    batch: int,
    seed: int,
    threads: int | None,
    checkpoint: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit the sampler's weights to a schedule, so that its few launches come closest to the full run."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.document import Schedule

    schedule = Schedule.load(schedule_file)
    if resume and checkpoint is None:
        raise UserError("--resume: needs --checkpoint, the folder to go on from")
    import torch

    from dipgo_deploy.calibrate.fit import CalibrationOptions, calibrate
    from dipgo_deploy.cli.search import class_label_numbers
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import (
        ProblemOptions,
        load_problem,
        sampler_and_steps,
        with_reference,
        with_schedule,
    )

    full_run = None if reference is None else sampler_and_steps(reference, "--reference")
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)
    with _progress(console) as report:
        problem = load_problem(
            ProblemOptions(
                model=model,
                sampler=schedule.sampler.class_name,
                steps=schedule.sampler.num_inference_steps,
                granularity=schedule.model.granularity,
                guidance_scale=guidance_scales[0] if guidance_scales else None,
                prompts=None if prompts is None else str(prompts),
                class_labels=class_label_numbers(class_labels),
                **options,
            ),
            lambda stage: report(stage, 0, 0),
        )
        problem.source.check(schedule)
        fit_to = full_run or (schedule.sampler.class_name, schedule.sampler.num_inference_steps)
        if full_run is not None or schedule.solver is not None:
            problem = with_reference(with_schedule(problem, schedule), *fit_to)
        else:
            problem = with_schedule(problem, schedule)
        fitted = calibrate(
            problem,
            schedule,
            CalibrationOptions(
                images=images, guidance_scales=guidance_scales, held_aside=held_aside, batch=batch, seed=seed
            ),
            folder=checkpoint,
            resume=resume,
            report=report,
        )
    fitted.save(output)
    facts = _facts(output, fitted)
    console.print(
        f"{output}: {fitted.steps} launches fitted to {facts['reference']}; relative error of the final latent "
        f"{facts['residuals'][-1]:.4g} on images held aside",
        markup=False,
        soft_wrap=True,
    )
    emit(facts, as_json)


def _facts(output: Path, fitted: Schedule) -> dict[str, Any]:
    assert fitted.solver is not None
    known = fitted.solver.provenance
    reference = known["reference"]
    return {
        "file": str(output),
        "launches": fitted.steps,
        "reference": f"{reference['sampler']}, {reference['num_inference_steps']} steps",
        "images": known["images"],
        "guidance_scales": list(known["guidance_scales"]),
        "ridges": list(known["ridges"]),
        "residuals": list(known["residuals"]),
    }


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with elapsed and remaining time; a plain line for each stage where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with live(Progress(*columns, TimeRemainingColumn(), console=console, transient=True)) as bars:
        task = bars.add_task("starting", total=None)
        current = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                current = stage
                bars.reset(task, description=stage, total=total or None)
                if not console.is_terminal:
                    console.print(stage, markup=False)
            bars.update(task, completed=done, total=total or None)

        yield report


main = entry_point(command)
