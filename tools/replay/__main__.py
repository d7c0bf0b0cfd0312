"""``python -m tools.replay record|check DIR``: does another version of the code compile everything to the same?"""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.progress import Progress

from dipgo_deploy.cli.common import entry_point, examples, human_console
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.models.location import BUILT_IN

MOST_LINES = 40
# Half precision differs in weights and casts only.
FP16_CASES = ("full", "random-0.5")


@click.group(
    epilog=examples(
        "python -m tools.replay record /tmp/replay    (on the commit to compare with)",
        "python -m tools.replay check /tmp/replay     (on the changed code)",
    )
)
def command() -> None:
    """Compile many schedules for tiny models of every family, and compare the outcome with a recording.

    Launches, coefficients, offsets, and what each graph computes are compared; names are not. A recording is for the
    machine and the package versions that it was made with.
    """


def _options(function: click.decorators.FC) -> click.decorators.FC:
    folder = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
    model = click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
    only = click.option("--only", default="", help='Only cases that contain this, as in "dit-block-output random-0.5".')
    return folder(model(only(function)))


@command.command()
@_options
def record(folder: Path, models: tuple[str, ...], only: str) -> None:
    """Write one text file for each model, granularity and kind of cache into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _replayed(models, only):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@command.command()
@_options
def check(folder: Path, models: tuple[str, ...], only: str) -> None:
    """Compare with the recording in FOLDER; exit status 1 where something differs."""
    if not any(folder.glob("*.txt")):
        raise UserError(f"{folder}: no recording there; make one with: python -m tools.replay record {folder}")
    differing = []
    count = 0
    for name, text in _replayed(models, only):
        count += 1
        path = folder / f"{name}.txt"
        recorded = path.read_text(encoding="utf-8") if path.is_file() else ""
        if recorded != text:
            differing.append(name)
            print("\n".join(difference(name, recorded, text)), flush=True)
    if differing:
        raise ToleranceError(f"{len(differing)} of {count} differ from the recording: {', '.join(differing)}")
    print(f"{count} of {count} are as recorded")


def difference(name: str, recorded: str, text: str) -> list[str]:
    """The first lines that differ, each hunk under its case."""
    before, after = recorded.splitlines(), text.splitlines()
    lines = list(difflib.unified_diff(before, after, f"{name} recorded", f"{name} now", n=2, lineterm=""))
    more = len(lines) - MOST_LINES
    return [line[:200] for line in lines[:MOST_LINES]] + ([f"... {more} more lines"] if more > 0 else [])


def _replayed(models: tuple[str, ...], only: str) -> Iterator[tuple[str, str]]:
    """Label and text of each trace of which some case is asked for."""
    import torch

    from dipgo_deploy.reference.quiet import quiet_libraries
    from tools.replay.cases import cases_of, units_of
    from tools.replay.models import SIZES, makers
    from tools.replay.record import replay

    quiet_libraries()
    made = makers()
    for name in models:
        if name not in made and name not in BUILT_IN:
            raise UserError(f"--model {name}: choose among {', '.join((*made, *BUILT_IN))}")
    names = list(models or (*made, *BUILT_IN))
    with tempfile.TemporaryDirectory() as work, Progress(console=human_console(True)) as progress:
        task = progress.add_task("replay", total=len(names))
        for name in names:
            model = name
            if name in made:
                (Path(work) / name).mkdir()
                torch.manual_seed(0)  # whatever was made before it
                model = str(made[name](Path(work) / name))
            for place, units in enumerate(units_of(model)):
                for dtype in ("fp32", "fp16") if place == 0 else ("fp32",):
                    label = f"{name}-{units.granularity}-{units.cache or 'mixed'}-{dtype}"
                    progress.update(task, description=label)
                    cases = [case for case in cases_of(model, units) if only in f"{label} {case.name}"]
                    if dtype == "fp16":
                        cases = [case for case in cases if case.name in FP16_CASES]
                    if cases:
                        yield label, replay(model, units, cases, dtype, SIZES.get(name))
            progress.advance(task)


if __name__ == "__main__":
    sys.exit(entry_point(command)(None))
