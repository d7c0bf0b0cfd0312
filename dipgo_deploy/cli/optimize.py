"""``dipgo-optimize``: from a model to an engine directory with few launches, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    reading_options,
    stage_bar,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    class_label_numbers,
    class_labels_option,
    device_option,
    granularity_option,
    graph_costs_options,
    guidance_option,
    guidance_scale_option,
    option,
    prompts_option,
    size_options,
    threads_option,
    version_option,
)
from dipgo_deploy.errors import UserError


@click.command(
    name="dipgo-optimize",
    cls=Command,
    epilog=examples(
        "dipgo-optimize fashion-sd --sampler ddim --launches 5 -o engines/five",
        "dipgo-optimize fashion-sd --schedule fashion-sd-ddim50-7 --minutes 1 -o engines/seven",
        "dipgo-optimize fashion-sd --schedule deepcache.json --pictures 1000 -o engines/server",
        "dipgo-optimize ./sd15 --prompts prompts.txt --quality 0.99 --minutes 120 -o engines/sd15",
        "dipgo-optimize fashion-dit --sampler ddim --speedup 7 --dtype fp16 --json -o engines/dit",
    ),
)
@click.argument("model")
@reading_options
@guidance_option
@option(
    "Schedule",
    "--schedule",
    "schedule_file",
    type=PATH,
    show_default="searched",
    help="A schedule that is there, by its file or as a built-in one by its name, in place of a search; it has its own "
    "sampler, steps and granularity.",
)
@option(
    "Schedule",
    "--sampler",
    show_default="the model's own",
    help="Sampler of the full run: ddim, pndm, dpm++2m, euler, ..., or the name of a diffusers scheduler class.",
)
@option(
    "Schedule",
    "--steps",
    "--num-inference-steps",
    type=click.IntRange(min=1),
    show_default="those of the model's pipeline",
    help="Steps of the full run.",
)
@granularity_option()
@prompts_option
@class_labels_option
@guidance_scale_option
@option(
    "Search",
    "--launches",
    type=click.IntRange(min=1),
    show_default="as many as --quality needs",
    help="Launches of the denoiser.",
)
@option(
    "Search",
    "--speedup",
    type=float,
    show_default="as --quality allows",
    help="Instead of launches: the full run's evaluations are at least this many times as many.",
)
@option(
    "Search",
    "--quality",
    type=float,
    show_default="0.99 without the other two",
    help="Instead of launches: the fewest whose SSIM to the full run's pictures is at least this, by the lower end of "
    "its 95% interval.",
)
@option(
    "Search",
    "--minutes",
    type=float,
    default=10.0,
    help="Time for search and fit, which say how many images and candidates there are; loading and export not counted.",
)
@size_options
@option("Engine", "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", help="Type of the graphs.")
@option(
    "Engine",
    "--weigh/--no-weigh",
    default=True,
    help="Compute skipped blocks after all where a further graph costs more than it saves, measured on this machine; a "
    "line says what became of the schedule. Rows that were fitted to its gates keep them.",
)
@graph_costs_options
@option("Comparison", "--check/--no-check", default=True, help="Compare the written graphs with the model in torch.")
@option(
    "Engine",
    "--build/--no-build",
    default=True,
    help="Build TensorRT engines where the package and a GPU are here.",
)
@option(
    "Runtime", "--image-batch", type=click.IntRange(min=1), default=16, help="Images that go through the model at once."
)
@device_option
@threads_option("torch's own")
@option("Output", "-o", "--engine-dir", type=PATH, required=True, help="Engine directory to write.")
@option("Output", "--overwrite", is_flag=True, help="Replace an engine directory that exists.")
@option("Output", "--report/--no-report", default=True, help="Write a page of it, report.html, into the directory.")
@json_option
@quiet_option
@version_option
@click.pass_context
def command(
    ctx: click.Context,
    engine_dir: Path,
    schedule_file: Path | None,
    steps: int | None,
    image_batch: int,
    threads: int | None,
    weigh: bool,
    graph_costs: Path | None,
    pictures: float | None,
    build: bool,
    report: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the fewest launches of MODEL that keep its pictures, fit their solver, export and judge them.

    Engines are built where a TensorRT and a GPU are, and report.html in the directory shows what came out.
    """
    from dipgo_deploy.export.weighing import read_graph_costs
    from dipgo_deploy.optimize.goal import Goal
    from dipgo_deploy.schedule.document import Schedule

    goal = Goal(**{name: given[name] for name in ("launches", "speedup", "quality", "minutes")})
    goal.check()
    for flag, value in (("--graph-costs", graph_costs), ("--pictures", pictures)):
        if value is not None and not weigh:
            raise UserError(f"{flag}: not with --no-weigh; leave one of the two out")
    costs = None if graph_costs is None else read_graph_costs(graph_costs)
    schedule = None
    if schedule_file is not None:
        _refuse_with_schedule(ctx)
        schedule = Schedule.load(schedule_file)
    import torch

    from dipgo_deploy.engine.build import build_engines
    from dipgo_deploy.export.exporter import ExportOptions
    from dipgo_deploy.models.target import default_steps
    from dipgo_deploy.optimize.after import engines_for, write_report
    from dipgo_deploy.optimize.run import facts, of_schedule, optimize
    from dipgo_deploy.optimize.weighing import Weighing
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import ProblemOptions

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    if steps is None and schedule is None:
        steps, whose = default_steps(given["model"])
        say(f"{steps} steps{f', as {whose} takes by default' if whose else ''}; --steps takes others")
    names = ("model", "sampler", "granularity", "height", "width", "num_frames", "guidance", "guidance_scale", "device")
    problem = ProblemOptions(
        **{name: given[name] for name in names},
        steps=steps or 1,  # of a schedule its own
        prompts=None if given["prompts"] is None else str(given["prompts"]),
        class_labels=class_label_numbers(given["class_labels"]),
    )
    if schedule is not None:
        problem = of_schedule(problem, schedule)
    export = ExportOptions(dtype=given["dtype"], check=given["check"], overwrite=given["overwrite"])
    with stage_bar(console) as progress:
        result = optimize(
            problem,
            engine_dir,
            goal,
            export,
            schedule=schedule,
            weighing=Weighing(costs, pictures, threads) if weigh else None,
            batch=image_batch,
            stage=lambda name: progress(name, 0, 0),
            progress=progress,
            say=say,
        )
        found = facts(result)
        if build:
            backends, why_not = engines_for(result.bundle)
            found["engines"] = []
            if why_not:
                say(why_not)
            for backend in backends:
                progress(f"building engines for {backend}", 0, 0)
                built = build_engines(engine_dir, backend)
                found["engines"].append({"backend": backend, "engines": len(built.engines)})
                say(f"{built.folder}: {len(built.engines)} engines")
        if report:
            progress("writing the report", 0, 0)
            found["report"] = str(write_report(result, given["model"]))
    say(f"{engine_dir}: {found['launches']} launches for {found['evaluations']} evaluations of the full run")
    if result.row is not None:
        ssim, psnr = result.row.ssim, result.row.psnr
        console.print(
            f"SSIM to the full run {ssim.value:.4f} ({ssim.low:.4f} to {ssim.high:.4f}), PSNR {psnr.value:.1f} dB, "
            f"{len(result.row.per_image['ssim'])} images that chose nothing",
            soft_wrap=True,
        )
    if result.met is False:
        console.print("the quality that chose the launches is not confirmed by these images; ask for a higher one")
    if report:
        say(f"{found['report']}: what came out, to look at in a browser")
    say(f"next: dipgo-run --engine-dir {engine_dir} --help")
    emit(found, as_json)


def _refuse_with_schedule(ctx: click.Context) -> None:
    """Refuse (UserError) what a given schedule decides."""
    for name in ("launches", "speedup", "quality", "sampler", "steps", "granularity"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise UserError(f"--{name}: the schedule that --schedule gives has its own; leave one of the two out")


main = entry_point(command)
