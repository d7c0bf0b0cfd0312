"""What tables and the prologue save of a published full-size configuration with random weights: disk, memory, time.

python -m tools.bench.timestep_tables dit-xl-2-256 --dtype fp32 --out DIR --collect docs/results/timestep-tables.json
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bundle.tables import TABLES_NAME
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.cli.options import class_label_numbers
from tools.bench.loading import in_process_of_its_own
from tools.bench.measure import machine, machine_line, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results
from tools.full_size import find
from tools.full_size.export import exported_pixels, make_schedule, model_folder
from tools.full_size.measure import run_stage

MIB = 2**20
# What is exported, and how.
SIDES: Mapping[str, Mapping[str, Any]] = {
    "no tables": {"timestep_tables": False},
    "tables": {"timestep_tables": True, "prologue": False},
    "prologue": {"prologue": True},
    "classes": {"prologue": False},
}
_PATH = click.Path(path_type=Path)


@click.command(name="timestep-tables")
@click.argument("name")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--schedule", default="uniform5", show_default=True, help="As tools.full_size.export has it.")
@click.option("--sampler", help="As dipgo-schedule's. [default: the model's own]")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Of the sampler.")
@click.option("--width", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--height", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--set", "changes", multiple=True, help="Change of the configuration, as in num_layers=4.")
@click.option("--sides", default="tables,no tables", show_default=True, help=f"Of {', '.join(SIDES)}.")
@click.option("--class-labels", help="Of the side `classes`, as in 207,360.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each, in turn.")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare the graphs with the supernet.")
@click.option("--out", type=_PATH, required=True, help="Work folder.")
@click.option("--collect", type=_PATH, help="Add the row to this file (.json), with a table beside it.")
@json_option
def command(
    name: str, changes: tuple[str, ...], sides: str, collect: Path | None, as_json: bool, **options: Any
) -> None:
    """Export configuration NAME with and without timestep tables (and a prologue), and load and run all of them."""
    options["sides"] = tuple(part.strip() for part in sides.split(","))
    unknown = [side for side in options["sides"] if side not in SIDES]
    if unknown or ("classes" in options["sides"]) != (options["class_labels"] is not None):
        raise click.UsageError(f"--sides {sides}: give some of {', '.join(SIDES)}; `classes` with --class-labels")
    console = human_console(as_json)
    given = {key: int(value) for key, _, value in (change.partition("=") for change in changes)}
    row = measure(find(name), given, options, console.print, SIDES)
    console.print(table(_HEADINGS, cells(row)), markup=False, soft_wrap=True)
    if collect is not None:
        rows = sorted(with_earlier(collect, [row], itemgetter("name", "dtype")), key=itemgetter("name"))
        write_results(collect, {"rows": rows}, as_text(rows))
    emit(row, as_json)


def measure(
    entry: Mapping[str, Any],
    changes: Mapping[str, Any],
    options: Mapping[str, Any],
    say: Any,
    ways: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """One row. ways: name of a side -> options of its export. Raises UserError when a stage fails."""
    out, dtype = options["out"], options["dtype"]
    label = "-".join((entry["name"], *(f"{key}{value}" for key, value in changes.items()), dtype))
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{label}.tables.log"
    log.unlink(missing_ok=True)
    folder = out / "models" / label
    made = model_folder(entry, changes, dtype, folder, log, say)
    file = out / f"{label}.schedule.json"
    make_schedule(entry, folder, {**options, "granularity": "block"}).save(file)
    sides = {side: exported_pixels(entry, options[side] or entry["pixels"]) for side in ("height", "width")}
    row: dict[str, Any] = {
        "name": entry["name"],
        "changes": dict(changes),
        "machine": machine(1),
        **{key: options[key] for key in ("dtype", "schedule", "steps")},
        **{side: options[side] or entry["pixels"] for side in sides},
        "weights": made,
        "sides": {},
    }
    probes: dict[str, list[dict[str, float]]] = {name: [] for name in options["sides"]}
    directories = {name: out / f"{label}.{name.replace(' ', '-')}.engine" for name in probes}
    try:
        for name, directory in directories.items():
            shutil.rmtree(directory, ignore_errors=True)
            say(f"{label}: exporting, {name}")
            settings = {
                "dtype": dtype,
                "layout": "variants",
                "check": options["check"],
                **ways[name],
            }
            if name == "classes":
                settings["class_labels"] = class_label_numbers(options["class_labels"])
            exported = {"folder": str(folder), "schedule": str(file), "engine_dir": str(directory)}
            row["sides"][name] = {
                "export": run_stage("export", {**exported, "options": {**settings, **sides}}, log),
                "tables_bytes": _size(directory / "graphs" / TABLES_NAME),
                "weights_bytes": _size(directory / "graphs/weights.bin"),
            }
        for turn in range(options["repeats"] + 1):
            for name, directory in directories.items():
                found = in_process_of_its_own(directory, False, True)
                say(f"{name}: {found}")
                if turn:  # the first round brings the files into the page cache
                    probes[name].append(found)
    finally:
        for directory in directories.values():
            shutil.rmtree(directory, ignore_errors=True)
    for name, rounds in probes.items():
        row["sides"][name] |= {key: spread(np.array([one[key] for one in rounds])) for key in rounds[0]}
    return row


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


# Of ``run_cells``.
RUN_HEADINGS = ("loading, s", "memory loaded / ran, MiB", "an evaluation, s", "error of the variants")
_HEADINGS = (
    "model",
    "dtype",
    "",
    "weights, MiB",
    "tables, MiB",
    "export, s",
    "export's peak, MiB",
    *RUN_HEADINGS,
)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    machines = dict.fromkeys(machine_line(row["machine"]).partition("; load average")[0] for row in rows)
    lines = [line for row in rows for line in cells(row)]
    return "\n".join(("# Timestep tables\n", *(f"{line}.\n" for line in machines), _INTRODUCTION)) + table(
        _HEADINGS, lines
    )


_COLLECT = "--out DIR --collect docs/results/timestep-tables.json"
_SMALL = f'--sides "no tables,tables,prologue" --height 256 --width 256 \\\n  {_COLLECT}'
_INTRODUCTION = f"""\
What is known before the first launch leaves the graphs ([how](../architecture.md)). *tables*: what depends on the
timestep alone, computed at export. *prologue*: also what depends on a class or a text, computed once a run; its weights
are in memory until it has run for the first time. *classes*: tables for the classes 207, 360 and none, and no other
class can be drawn. Published configurations with random weights, cut in depth where the row says so, one image, layout
`variants`, ONNX Runtime on one thread of a CPU. *Weights* and *tables* are what the denoiser takes on disk; *loading*
makes and binds all sessions in a process of its own, in turn, files in the page cache; *memory* is what that adds to
the process (PSS), and after the first evaluation; *evaluation* is the processor time of the first one, where every
block runs, at the second time. *Error* is the largest of all variants against the model in torch, relative to the
largest value. Medians and quartiles, alone on a core with other work on the second one; DiT-XL/2 in an earlier run on a
quiet machine, AuraFlow beside other work, so that its seconds are no more than a hint.

```bash
# takes some minutes a row
python -m tools.bench.timestep_tables dit-xl-2-256 --sampler ddim --steps 50 \\
  --sides "no tables,tables,prologue,classes" --class-labels 207,360 {_COLLECT}
python -m tools.bench.timestep_tables sd-1.5-512 {_SMALL}
python -m tools.bench.timestep_tables pixart-sigma-xl-2-1024 {_SMALL}
python -m tools.bench.timestep_tables sd3-medium-1024 --set num_layers=12 {_SMALL}
python -m tools.bench.timestep_tables flux.1-dev-1024 --set num_layers=1 --set num_single_layers=2 --repeats 1 {_SMALL}
python -m tools.bench.timestep_tables qwen-image-1328 --set num_layers=2 {_SMALL}
python -m tools.bench.timestep_tables auraflow-1024 --set num_mmdit_layers=1 --set num_single_dit_layers=4 \\
  --height 256 --width 256 {_COLLECT}
```

"""


def cells(row: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line of the table for each side."""
    changes = ", ".join(f"{key}={value}" for key, value in row["changes"].items())
    name = f"{row['name']}{f' ({changes})' if changes else ''}, {row['width']}x{row['height']}, {row['steps']} steps"
    lines: list[Sequence[str]] = []
    for side, found in row["sides"].items():
        lines.append(
            (
                name,
                row["dtype"],
                side,
                f"{found['weights_bytes'] / MIB:.0f}",
                f"{found['tables_bytes'] / MIB:.1f}",
                f"{found['export']['seconds']:.0f}",
                f"{found['export']['peak_rss'] / MIB:.0f}",
                *run_cells(found),
            )
        )
    return lines


def run_cells(found: Mapping[str, Any]) -> Sequence[str]:
    """What loading and running one side took, and how far its graphs are from the supernet."""
    agreed = found["export"]["variants"]
    return (
        with_quartiles(found["load_seconds"], 1),
        f"{found['loaded_bytes']['median'] / MIB:.0f} / {found['ran_bytes']['median'] / MIB:.0f}",
        with_quartiles(found["evaluation_seconds"], 2),
        "-" if agreed is None else f"{agreed['relative']:.1e}",
    )


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
