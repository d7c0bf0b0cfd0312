"""``dipgo-report``: an engine directory as one page to look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from dipgo_deploy.cli.common import (
    checked_outputs,
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    stage_bar,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    backend_option,
    of_several_options,
    option,
    threads_option,
    version_option,
)


@click.command(
    name="dipgo-report",
    cls=Command,
    epilog=examples(
        "dipgo-report engines/fashion-sd -o report.html",
        "dipgo-report engines/fashion-sd --bench times.json --bench quality.json --bench compare.json -o report.html",
        'dipgo-report engines/pruned --against engines/full --prompt "a sneaker" --prompt "a bag" -o report.html',
    ),
)
@click.argument("directory", type=PATH, metavar="DIR")
@of_several_options
@option(
    "Comparison",
    "--against",
    type=PATH,
    show_default="none",
    help="Another engine directory of the model, such as that of the full run, to be shown beside it.",
)
@option(
    "Measurement",
    "--bench",
    "measurements",
    type=PATH,
    multiple=True,
    show_default="none",
    help="What `dipgo-bench profile -o`, `dipgo-bench quality -o` or `dipgo-compare --json` wrote; can be given "
    "several times.",
)
@option(
    "Prompt",
    "--prompt",
    "prompts",
    multiple=True,
    show_default="none",
    help="Text prompt of pictures of both directories; can be given several times.",
)
@option(
    "Prompt",
    "--class-labels",
    "labels",
    multiple=True,
    show_default="the first four that the model names",
    help="Class names or ids of pictures of both directories, as in sneaker,bag,3.",
)
@option(
    "Prompt",
    "--num-images",
    "--num-images-per-prompt",
    type=click.IntRange(min=1),
    default=1,
    help="Pictures for each prompt or class.",
)
@option("Prompt", "--seed", type=click.IntRange(min=0), default=0, help="Seed of the pictures.")
@option("Prompt", "--guidance-scale", type=float, show_default="the engine directory's", help="Scale of the guidance.")
@option("Image", "--pictures/--no-pictures", default=True, help="Draw pictures of both directories, with --against.")
@backend_option
@threads_option("the physical cores")
@option("Output", "-o", "--output", type=PATH, default=Path("report.html"), help="The page to write.")
@json_option
@quiet_option
@version_option
@checked_outputs("output")
def command(
    directory: Path,
    schedule: str | None,
    launches: int | None,
    against: Path | None,
    measurements: tuple[Path, ...],
    prompts: tuple[str, ...],
    labels: tuple[str, ...],
    num_images: int,
    seed: int,
    guidance_scale: float | None,
    pictures: bool,
    backend: str,
    threads: int | None,
    output: Path,
    as_json: bool,
) -> None:
    """Show an engine directory as one page: schedule, sampler, memory, times, quality, pictures, drift, origin.

    The page needs nothing else: no network, no other file. What DIR does not hold comes from --against and --bench;
    what is in neither, the page says. Neither torch nor ONNX is needed.
    """
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.cli.run import parse_labels
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.files import write_atomic
    from dipgo_deploy.report.given import read_given
    from dipgo_deploy.report.page import report_page
    from dipgo_deploy.report.pictures import Wanted, draw
    from dipgo_deploy.report.subject import read_subject

    wanted = Wanted(prompts, tuple(parse_labels(labels)), num_images, seed, guidance_scale)
    if against is None and (prompts or labels):
        raise UserError("--prompt and --class-labels: are for pictures of two directories; give --against too")
    ours = Bundle.open(directory, schedule=schedule, launches=launches)
    theirs = None if against is None else Bundle.open(against)
    subject = read_subject(ours)
    given = read_given(subject, None if theirs is None else read_subject(theirs), measurements)
    console = human_console(as_json)
    if theirs is not None and not pictures:
        given = replace(given, no_pictures="No pictures were asked for (--no-pictures).")
    elif theirs is not None:
        with stage_bar(console) as progress:
            drawn = draw(
                ours,
                theirs,
                wanted,
                lambda: create_backend(backend, threads=threads),
                lambda stage: progress(stage, 0, 0),
            )
        given = replace(given, strips=drawn.strips, drift=drawn.drift, no_pictures=drawn.why_not)
    page = report_page(subject, given)
    write_atomic(output, page)
    if given.no_pictures and theirs is not None and pictures:
        console.print(given.no_pictures, markup=False, soft_wrap=True)
    console.print(f"{output}: the page, {len(page) / 2**10:.0f} KiB", markup=False, soft_wrap=True)
    emit({"engine_dir": str(directory), "page": str(output), "bytes": len(page)}, as_json)


main = entry_point(command)
