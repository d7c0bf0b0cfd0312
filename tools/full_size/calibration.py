"""Calibrations of published full-size configurations with random weights: what they take in time and memory.

Run from the repository's root: ``python -m tools.full_size.calibration sd-1.5-512 --height 256 --width 256 --out DIR``.
Random weights say nothing of quality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench.measure import machine, machine_line
from tools.bench.tables import table, write_results
from tools.full_size import find
from tools.full_size.export import changes_of, exported_pixels, model_folder
from tools.full_size.measure import run_stage
from tools.full_size.table import GIB, read_rows

_KEY = ("name", "changes", "height", "width", "steps", "interval", "images")
_HEADINGS = ("model", "pixels", "weights, GiB", "images", "launches", "evaluations", "load and trace, s")
_MEASURED = ("calibration, s", "an evaluation, s", "peak, GiB", "peak / weights")


@click.command(name="full-size-calibration")
@click.argument("name")
@click.option("--steps", type=click.IntRange(min=2), default=6, show_default=True, help="Of the full run.")
@click.option(
    "--interval", type=click.IntRange(min=2), default=2, show_default=True, help="Every how many are launched."
)
@click.option("--images", type=click.IntRange(min=2), default=3, show_default=True, help="One of them is held aside.")
@click.option("--width", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--height", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--reduced", is_flag=True, help="Fewer blocks of each kind, where the entry says how many.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Work folder for the model.")
@click.option(
    "--collect", type=click.Path(path_type=Path), help="Add the row to this file (.json), with a table beside it."
)
@json_option
def command(name: str, out: Path, collect: Path | None, as_json: bool, **options: Any) -> None:
    """Fit a solver to a few launches of configuration NAME."""
    console = human_console(as_json)
    row = measure(find(name), options, out, console.print)
    console.print(table((*_HEADINGS, *_MEASURED), [cells(row)]), markup=False, soft_wrap=True)
    if collect is not None:
        add_row(collect, row)
    emit(row, as_json)


def measure(entry: Mapping[str, Any], options: Mapping[str, Any], out: Path, say: Any) -> dict[str, Any]:
    """One row: what was fitted, and what it took. Raises UserError when a stage fails."""
    changes = changes_of(entry, options["reduced"])
    label = "-".join((entry["name"], *(["reduced"] if changes else []), "fp32"))
    folder, log = out / "models" / label, out / f"{label}.calibration.log"
    out.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    made = model_folder(entry, changes, "fp32", folder, log, say)
    height, width = (options[side] or entry["pixels"] for side in ("height", "width"))
    say(f"{label}: calibrating")
    problem = {
        "steps": options["steps"],
        "height": exported_pixels(entry, height),
        "width": exported_pixels(entry, width),
    }
    arguments = {"folder": str(folder), "problem": problem, **{key: options[key] for key in ("interval", "images")}}
    return {
        "name": entry["name"],
        "changes": dict(changes),
        "machine": machine(None),
        "height": height,
        "width": width,
        **{key: options[key] for key in ("steps", "interval", "images")},
        "weights": made,
        "calibrate": run_stage("calibrate", arguments, log),
    }


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, or replace that of the same calibration, and render the table beside the file."""
    rows = [old for old in read_rows(path) if any(old.get(key) != row.get(key) for key in _KEY)]
    rows = sorted([*rows, dict(row)], key=lambda given: given["name"])
    write_results(path, {"rows": rows}, as_text(rows))


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    machines = dict.fromkeys(machine_line(row["machine"]).partition("; load average")[0] for row in rows)
    return "\n".join(("# Calibrations at full size\n", *(f"{line}.\n" for line in machines), _INTRODUCTION)) + table(
        (*_HEADINGS, *_MEASURED), [cells(row) for row in rows]
    )


_COLLECT = "--out DIR --collect docs/results/full-size-calibration.json"
_INTRODUCTION = f"""\
Published configurations with random weights, so this is about time and memory and says nothing of quality. The model
runs in torch in float32, one image at a time, with guidance where its pipeline has it; a solver is fitted to every
second evaluation of the sampler. *Evaluations* are those of the full runs and of the launches, of all images; the fit
itself takes milliseconds. *Peak* is the largest resident memory of the process, Python and torch included. Times are of
a machine with other work. Rows that a command below has and the table has not were not measured yet.

```bash
# takes some minutes a row
python -m tools.full_size.calibration sd-1.5-512 --height 256 --width 256 {_COLLECT}
python -m tools.full_size.calibration flux.1-dev-1024 --reduced --height 256 --width 256 --steps 4 --images 2 {_COLLECT}
```

"""


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """One line of the table."""
    took, weights = row["calibrate"], row["weights"]["bytes"]
    changes = ", ".join(f"{key}={value}" for key, value in row["changes"].items())
    seconds = took["stages"]["calibrating"]
    before = sum(value for stage, value in took["stages"].items() if stage != "calibrating")
    return (
        f"{row['name']}{f' ({changes})' if changes else ''}",
        f"{row['width']}x{row['height']}",
        f"{weights / GIB:.2f}",
        str(took["images"]),
        f"{took['launches']} of {took['full']}",
        str(took["evaluations"]),
        f"{before:.0f}",
        f"{seconds:.0f}",
        f"{seconds / took['evaluations']:.2f}",
        f"{took['peak_rss'] / GIB:.2f}",
        f"{took['peak_rss'] / weights:.2f}",
    )


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
