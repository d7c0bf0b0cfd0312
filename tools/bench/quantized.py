"""What weights and activations in fewer bits save and cost.

python -m tools.bench.quantized size dit-xl-2-256 --out DIR --collect docs/results/quantized.json
python -m tools.bench.quantized quality fashion-dit fashion-dit-ddim50-5 --out DIR --collect docs/results/quantized.json

``size``: disk, memory and time of a published full-size configuration with random weights, beside float32.
``quality``: the pictures of a built-in model beside those of its full run, with the schedule's solver as it is, and
fitted again with the quantized engines themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.bundle.quantized import ACTIVATIONS
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench import timestep_tables
from tools.bench.engine_quality import compare, conditions
from tools.bench.measure import machine, machine_line
from tools.bench.tables import table, write_results
from tools.full_size import find

MIB = 2**20
WAYS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "int8-weights": {"quantize": "int8-weights"},
    "int4-weights": {"quantize": "int4-weights"},
    "int8": {"quantize": "int8", "calibration_samples": 1},
    "fp8": {"quantize": "fp8", "calibration_samples": 1},
}
SIDES = ("fp32", "int8-weights", "int4-weights", "int8", "fp8")
_PATH = click.Path(path_type=Path)
_COLLECT = click.option("--collect", type=_PATH, help="Add the rows to this file (.json), with a page beside it.")
_OUT = click.option("--out", type=_PATH, required=True, help="Work folder.")


@click.group(name="quantized")
def command() -> None:
    """Measure engine directories in fewer bits."""


@command.command()
@click.argument("name")
@click.option("--pixels", type=click.IntRange(min=1), default=256, show_default=True, help="Width and height.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Of the sampler.")
@click.option("--sides", default=",".join(SIDES), show_default=True, help="Which ones; int8 and fp8 need classes.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each, in turn.")
@_OUT
@_COLLECT
@json_option
def size(
    name: str, pixels: int, steps: int, sides: str, repeats: int, out: Path, collect: Path | None, as_json: bool
) -> None:
    """Export configuration NAME with each side, and load and run all of them."""
    chosen = _chosen(sides)
    console = human_console(as_json)
    options = {
        "dtype": "fp32",
        "schedule": "uniform5",
        "sampler": "ddim",
        "steps": steps,
        "width": pixels,
        "height": pixels,
        "sides": chosen,
        "class_labels": None,
        "repeats": repeats,
        "check": True,
        "out": out,
    }
    row = timestep_tables.measure(find(name), {}, options, console.print, WAYS)
    console.print(table(_SIZES, size_cells(row)), markup=False, soft_wrap=True)
    _collect(collect, "sizes", row, "name")
    emit(row, as_json)


@command.command()
@click.argument("model")
@click.argument("schedule")
@click.option("--images", type=click.IntRange(min=2), default=200, show_default=True, help="Pictures of each.")
@click.option("--fitted-to", type=click.IntRange(min=2), default=40, show_default=True, help="Images of the fit.")
@click.option("--guidance-scale", type=float, default=4.0, show_default=True, help="Scale of the guidance.")
@click.option("--sides", default=",".join(SIDES), show_default=True, help="Which ones; --collect keeps the others.")
@_OUT
@_COLLECT
@json_option
def quality(
    model: str,
    schedule: str,
    images: int,
    fitted_to: int,
    guidance_scale: float,
    sides: str,
    out: Path,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Pictures of MODEL under SCHEDULE, a built-in one of DDIM with 50 steps, beside its full run in float32."""
    from dipgo_deploy.bench.metrics import PSNR, SSIM

    console = human_console(as_json)
    full, directories = export_all(model, schedule, _chosen(sides), out, console.print)
    fitted = [refitted(directory, full, fitted_to, guidance_scale, console.print) for directory in directories.values()]
    every = [*directories.values(), *fitted]
    found = compare(full, every, images, conditions(full, None), guidance_scale, 1, (SSIM, PSNR))
    row = {
        "model": model,
        "schedule": schedule,
        "images": images,
        "fitted_to": fitted_to,
        "guidance_scale": guidance_scale,
        "machine": machine(1),
        "cases": [
            {**case, "weights_bytes": (directory / "graphs/weights.bin").stat().st_size}
            for case, directory in zip(found, every, strict=True)
        ],
    }
    console.print(table(_QUALITY, quality_cells(row)), markup=False, soft_wrap=True)
    _collect(collect, "quality", row, "schedule")
    emit(row, as_json)


def _chosen(sides: str) -> tuple[str, ...]:
    """Names of sides, from an option."""
    chosen = tuple(part.strip() for part in sides.split(","))
    if unknown := [side for side in chosen if side not in WAYS]:
        raise click.UsageError(f"--sides {unknown[0]}: give some of {', '.join(WAYS)}")
    return chosen


def export_all(model: str, schedule: str, sides: Sequence[str], out: Path, say: Any) -> tuple[Path, dict[str, Path]]:
    """Engine directories of the full run and of every side, by its name."""
    from dipgo_deploy.export.exporter import ExportOptions, export_bundle
    from dipgo_deploy.models.target import schedule_target
    from dipgo_deploy.schedule import builders
    from dipgo_deploy.schedule.built_in import schedule_file
    from dipgo_deploy.search.prompts import built_in_prompts

    target = schedule_target(model, "ddim", 50, "block", None)
    given = target.schedule(target.gates(builders.full), "full", {})
    full = out / "full"
    # A fit takes the full run's timesteps, and tables have rows of the exported schedule's alone.
    common: dict[str, Any] = {"layout": "variants", "overwrite": True, "self_test": False, "timestep_tables": False}
    common["check"] = False  # which is slow, and the pictures show it
    say(f"{model}: exporting the full run")
    export_bundle(model, given, full, ExportOptions(**common))
    directories = {}
    for side in sides:
        say(f"{model}: exporting {side}")
        options = WAYS[side]
        settings = {**common, **options}
        if options.get("quantize") in ACTIVATIONS:
            settings |= {"calibration_samples": 4, "calibration_prompts": built_in_prompts(model) or ()}
        export_bundle(model, schedule_file(Path(schedule)), out / side, ExportOptions(**settings))
        directories[side] = out / side
    return full, directories


def refitted(directory: Path, full: Path, images: int, guidance_scale: float, say: Any) -> Path:
    """A copy of an engine directory whose solver was fitted with its own engines."""
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.calibrate.core import CalibrationOptions
    from dipgo_deploy.calibrate.engines import Conditions, calibrate_engines, with_solver

    copy = directory.with_name(f"{directory.name} fitted")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    bundle, reference = Bundle.open(copy), Bundle.open(full)
    each = conditions(full, None)
    shown = Conditions(
        prompts=tuple(one["prompt"] for one in each if "prompt" in one),
        class_labels=tuple(one["class_labels"] for one in each if "class_labels" in one),
    )
    say(f"{directory.name}: fitting with its engines")
    options = CalibrationOptions(images=images, guidance_scales=(guidance_scale,))
    with_solver(bundle, calibrate_engines(bundle, reference, create_backend("cpu", threads=1), shown, options))
    return copy


def _collect(collect: Path | None, kind: str, row: Mapping[str, Any], key: str) -> None:
    if collect is None:
        return
    facts = json.loads(collect.read_text(encoding="utf-8")) if collect.is_file() else {"sizes": [], "quality": []}
    others = [old for old in facts[kind] if old[key] != row[key]]
    row = next((_together(old, row) for old in facts[kind] if old[key] == row[key] and "cases" in old), row)
    facts[kind] = sorted([*others, row], key=lambda old: str(old[key]))
    write_results(collect, facts, as_text(facts))


def _together(old: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cases of two runs on one machine, settings and packages; of others those of the new one alone."""

    def of(row: Mapping[str, Any]) -> dict[str, Any]:
        apart = ("load_average", "cores")  # which change no picture
        machine = {name: value for name, value in row["machine"].items() if name not in apart}
        return {**{name: value for name, value in row.items() if name != "cases"}, "machine": machine}

    if of(old) != of(new):
        return new
    cases = {case["directory"]: case for case in (*old["cases"], *new["cases"])}
    order = [*WAYS, *(f"{side} fitted" for side in WAYS)]
    return {**old, "cases": sorted(cases.values(), key=lambda case: order.index(case["directory"]))}


_SIZES = (
    "model",
    "",
    "weights, MiB",
    "export, s",
    *timestep_tables.RUN_HEADINGS,
)
_QUALITY = ("schedule", "", "launches", "weights, MiB", "SSIM", "PSNR, dB")


def size_cells(row: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line of the table for each side."""
    lines: list[Sequence[str]] = []
    for side, found in row["sides"].items():
        lines.append(
            (
                f"{row['name']}, {row['width']}x{row['height']}",
                side,
                f"{found['weights_bytes'] / MIB:.0f}",
                f"{found['export']['seconds']:.0f}",
                *timestep_tables.run_cells(found),
            )
        )
    return lines


def quality_cells(row: Mapping[str, Any]) -> list[Sequence[str]]:
    """A line of the table for each engine directory."""

    def pair(found: Mapping[str, float], digits: int) -> str:
        return f"{found['value']:.{digits}f} +- {(found['high'] - found['low']) / 2:.{digits}f}"

    return [
        (
            row["schedule"],
            case["directory"],
            str(case["launches"]),
            f"{case['weights_bytes'] / MIB:.1f}",
            pair(case["ssim"], 4),
            pair(case["psnr"], 2),
        )
        for case in row["cases"]
    ]


def as_text(facts: Mapping[str, Any]) -> str:
    """The page."""
    rows = [*facts["sizes"], *facts["quality"]]
    machines = dict.fromkeys(machine_line(row["machine"]).partition("; load average")[0] for row in rows)
    parts = ["# Quantized weights and activations\n", *(f"{line}.\n" for line in machines), _INTRODUCTION]
    if facts["sizes"]:
        parts += [_OF_SIZES, table(_SIZES, [line for row in facts["sizes"] for line in size_cells(row)])]
    if facts["quality"]:
        parts += [_OF_QUALITY, table(_QUALITY, [line for row in facts["quality"] for line in quality_cells(row)])]
    return "\n".join(parts)


_INTRODUCTION = """\
[What is quantized, and how](../howto/quantized.md).

```bash
# takes some minutes a row
python -m tools.bench.quantized size dit-xl-2-256 --out DIR --collect docs/results/quantized.json
python -m tools.bench.quantized size sd-1.5-512 --sides fp32,int8-weights,int4-weights --out DIR \\
  --collect docs/results/quantized.json
python -m tools.bench.quantized quality fashion-dit fashion-dit-ddim50-5 --images 100 --out DIR \\
  --collect docs/results/quantized.json
python -m tools.bench.quantized quality fashion-sd fashion-sd-ddim50-5 --images 100 --out DIR \\
  --collect docs/results/quantized.json
```
"""
_OF_SIZES = """\
## Disk, memory and time

Published configurations with random weights, one image, layout `variants`, ONNX Runtime on one thread of a CPU.
*Weights* are what the denoiser takes on disk; *loading* makes and binds all sessions in a process of its own, in
turn, files in the page cache; *memory* is what that adds to the process (PSS), and after the first evaluation;
*evaluation* is the processor time of the first one, where every block runs, at the second time. *Error* is the
largest of all variants against the model in float32, relative to the largest value. Medians and quartiles. The
random SD-1.5 has no text encoder, so its loop cannot be recorded for `int8` and `fp8`.
"""
_OF_QUALITY = """\
## Pictures

Beside the full run in float32, DDIM with 50 steps, from the same seeds, which neither search nor fit has seen; 95 %
intervals. Exported without timestep tables. Schedules have a solver that was fitted to the model in float32, with
timesteps of its own; *fitted* is the same directory with a solver that was fitted again, with its own engines, on
40 images (`--fitted-to`) and at the full run's timesteps (`dipgo-calibrate --engine-dir`). What a fit takes up of
the error is seen between rows that are fitted: the distance to *fp32 fitted* beside the distance to *fp32*. Of
`int8` and `fp8` the manifest says which blocks stay as they are, within the default budget.
"""

main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
