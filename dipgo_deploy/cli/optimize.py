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
    reading_options,
    stage_bar,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    class_label_numbers,
    class_labels_option,
    device_option,
    guidance_option,
    guidance_scale_option,
    option,
    prompts_option,
    sampler_options,
    size_options,
    threads_option,
    version_option,
)


@click.command(
    name="dipgo-optimize",
    cls=Command,
    epilog=examples(
        "dipgo-optimize fashion-sd --sampler ddim --launches 5 -o engines/five",
        "dipgo-optimize ./sd15 --prompts prompts.txt --quality 0.99 --minutes 120 -o engines/sd15",
        "dipgo-optimize fashion-dit --sampler ddim --speedup 7 --dtype fp16 --json -o engines/dit",
    ),
)
@click.argument("model")
@reading_options
@guidance_option
@sampler_options
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
@option("Comparison", "--check/--no-check", default=True, help="Compare the written graphs with the model in torch.")
@option(
    "Runtime", "--image-batch", type=click.IntRange(min=1), default=16, help="Images that go through the model at once."
)
@device_option
@threads_option("torch's own")
@option("Output", "-o", "--engine-dir", type=PATH, required=True, help="Engine directory to write.")
@option("Output", "--overwrite", is_flag=True, help="Replace an engine directory that exists.")
@json_option
@version_option
def command(
    engine_dir: Path,
    image_batch: int,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the fewest launches of MODEL that keep its pictures, fit their solver, export and judge them."""
    from dipgo_deploy.optimize.goal import Goal

    goal = Goal(**{name: given[name] for name in ("launches", "speedup", "quality", "minutes")})
    goal.check()
    import torch

    from dipgo_deploy.export.exporter import ExportOptions
    from dipgo_deploy.optimize.run import facts, optimize
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import ProblemOptions

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)
    names = ("model", "sampler", "steps", "height", "width", "num_frames", "guidance", "guidance_scale", "device")
    problem = ProblemOptions(
        **{name: given[name] for name in names},
        prompts=None if given["prompts"] is None else str(given["prompts"]),
        class_labels=class_label_numbers(given["class_labels"]),
    )
    export = ExportOptions(dtype=given["dtype"], check=given["check"], overwrite=given["overwrite"])
    with stage_bar(console) as progress:
        result = optimize(
            problem,
            engine_dir,
            goal,
            export,
            batch=image_batch,
            stage=lambda name: progress(name, 0, 0),
            progress=progress,
            say=lambda line: console.print(line, markup=False, soft_wrap=True),
        )
    found = facts(result)
    console.print(f"{engine_dir}: {found['launches']} launches for {found['evaluations']} evaluations of the full run")
    if result.row is not None:
        ssim, psnr = result.row.ssim, result.row.psnr
        console.print(
            f"SSIM to the full run {ssim.value:.4f} ({ssim.low:.4f} to {ssim.high:.4f}), PSNR {psnr.value:.1f} dB, "
            f"{result.effort.judges} images that chose nothing",
            soft_wrap=True,
        )
    if result.met is False:
        console.print("the quality that chose the launches is not confirmed by these images; ask for a higher one")
    console.print(f"next: dipgo-run --engine-dir {engine_dir} --help", markup=False, soft_wrap=True)
    emit(found, as_json)


main = entry_point(command)
