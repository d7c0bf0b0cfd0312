"""``dipgo-report``: an engine directory as one page to look at."""

from __future__ import annotations

from pathlib import Path

import click

from dipgo_deploy.cli.common import checked_outputs, emit, entry_point, examples, human_console, json_option
from dipgo_deploy.cli.options import PATH, Command, of_several_options, option, version_option


@click.command(
    name="dipgo-report",
    cls=Command,
    epilog=examples(
        "dipgo-report engines/fashion-sd -o report.html",
        "dipgo-report engines/fashion-sd --bench times.json --bench quality.json --bench compare.json -o report.html",
        "dipgo-report engines/pruned --against engines/full -o report.html",
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
@option("Output", "-o", "--output", type=PATH, default=Path("report.html"), help="The page to write.")
@json_option
@version_option
@checked_outputs("output")
def command(
    directory: Path,
    schedule: str | None,
    launches: int | None,
    against: Path | None,
    measurements: tuple[Path, ...],
    output: Path,
    as_json: bool,
) -> None:
    """Show an engine directory as one page: schedule, sampler, memory, times, quality, pictures, drift, origin.

    The page needs nothing else: no network, no other file. What DIR does not hold comes from --against and --bench;
    what is in neither, the page says. Neither torch nor ONNX is needed.
    """
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.files import write_atomic
    from dipgo_deploy.report.given import read_given
    from dipgo_deploy.report.page import report_page
    from dipgo_deploy.report.subject import read_subject

    ours = Bundle.open(directory, schedule=schedule, launches=launches)
    theirs = None if against is None else Bundle.open(against)
    subject = read_subject(ours)
    given = read_given(subject, None if theirs is None else read_subject(theirs), measurements)
    page = report_page(subject, given)
    write_atomic(output, page)
    human_console(as_json).print(f"{output}: the page, {len(page) / 2**10:.0f} KiB", markup=False, soft_wrap=True)
    emit({"engine_dir": str(directory), "page": str(output), "bytes": len(page)}, as_json)


main = entry_point(command)
