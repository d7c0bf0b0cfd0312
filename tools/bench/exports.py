"""What further graphs cost an export: one trace, then the full loop and each case written from it, under the clock.

    python -m tools.bench.exports --model FOLDER --granularity layer --case random:30:0.5 --case l2c=FILE \\
        --segments l2c --folder WORK --collect docs/results/exports.json
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench.launches import read_case
from tools.bench.measure import machine, machine_line
from tools.bench.tables import table, with_earlier, write_results

WEIGHTS = Path("graphs/weights.bin")
_PATH = click.Path(path_type=Path)


@click.command(name="exports")
@click.option("--model", required=True, help="Built-in model or folder.")
@click.option("--case", "cases", multiple=True, required=True, help="NAME=FILE, or random:STEPS:RATIO.")
@click.option("--segments", "in_parts", multiple=True, help="Name of a case that is written in segments, too.")
@click.option("--granularity", type=click.Choice(["block", "layer"]), default="layer", show_default=True)
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per launch.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Writes of each that count.")
@click.option("--folder", type=_PATH, required=True, help="For the engine directories.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    model: str,
    cases: tuple[str, ...],
    in_parts: tuple[str, ...],
    granularity: Any,
    height: int | None,
    batch: int,
    repeats: int,
    folder: Path,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Time trace, planning and writing, without the comparison with the supernet; the directories stay."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, replan
    from dipgo_deploy.export.planning import in_segments
    from dipgo_deploy.reference.quiet import quiet_libraries
    from tools.bench.pairs import full_schedule, write_engine

    quiet_libraries()
    console = human_console(as_json)
    schedules = dict(read_case(case, model, granularity) for case in cases)
    options = ExportOptions(layout="variants", components=False, check=False, height=height, width=height, batch=batch)
    full, trace = _clocked(lambda: plan_export(model, full_schedule(next(iter(schedules.values()))), options))
    written: dict[str, Any] = {"full": (full, [0.0, 0.0])}
    for name, schedule in schedules.items():
        planned, seconds = _clocked(lambda schedule=schedule: replan(full, schedule))  # type: ignore[misc]
        written[name] = (planned, seconds)
        if name in in_parts:
            parts, more = _clocked(lambda planned=planned: in_segments(planned))  # type: ignore[misc]
            layout = replace(planned, segments=parts)
            written[f"{name}, segments"] = (layout, [a + b for a, b in zip(seconds, more, strict=True)])
    rows: dict[str, Any] = {}
    for turn in range(repeats + 1):  # the first one reads the model's file
        for name, (planned, planning) in written.items():
            if turn == 0 and name != "full":
                continue
            path = folder / name.replace(", ", "-")
            _, seconds = _clocked(lambda planned=planned, path=path: write_engine(planned, path))  # type: ignore[misc]
            _link(folder / "full" / WEIGHTS, path / WEIGHTS)
            if turn == 0:
                continue
            row = rows.setdefault(name, {"planning": planning, "writing": [], "bytes": _bytes(path)})
            laid_out = planned.segments.segments if planned.segments else planned.plan.variants
            row |= {"graphs": len(laid_out), "launches": len((planned.segments or planned.plan).launches)}
            row["writing"].append(seconds)
            console.print(f"{name}: {row['graphs']} graphs, {seconds}", markup=False)
    shape = full.traced.shape
    found = {
        "model": Path(model).name,
        "granularity": granularity,
        "latent": [shape.height, shape.width],
        "batch": batch,
        "machine": machine(None),
        "trace": trace,
        "rows": rows,
    }
    if collect is not None:
        known = with_earlier(collect, [found], itemgetter("model", "latent"))
        write_results(collect, known, as_text(known))
    console.print(_table(found), markup=False, soft_wrap=True)
    emit(found, as_json)


main = entry_point(command)


def _clocked(call: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What the call returns, with its seconds of wall time and of this process's processor time."""
    start, used = time.perf_counter(), time.process_time()
    value = call()
    return value, [time.perf_counter() - start, time.process_time() - used]


def _bytes(folder: Path) -> dict[str, int]:
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {"all": sum(files.values()), "weights": files[folder / WEIGHTS]}


def _link(weights: Path, other: Path) -> None:
    """Let equal weights files of two directories be one, so that they are in the page cache once."""
    if weights == other or not weights.is_file() or weights.stat().st_size != other.stat().st_size:
        return
    recorded = [json.loads((path.parents[1] / "manifest.json").read_text())["files"] for path in (weights, other)]
    if recorded[0][str(WEIGHTS)] != recorded[1][str(WEIGHTS)]:
        return
    linked = other.with_suffix(".linked")
    shutil.rmtree(linked, ignore_errors=True)
    os.link(weights, linked)
    linked.replace(other)


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# What further graphs cost an export\n",
        "From a model's folder to an engine directory of the denoiser: one trace, then planning and writing of each "
        "row from it, ONNX's full checker on every graph and the sha256 of every file included, the comparison with "
        "the supernet not. Seconds of processor time (all threads), wall time in brackets; the machine had other work. "
        "`to full`: trace + row over trace + full, in processor time. Disk: the directory over the weights of the full "
        "model. Made by `python -m tools.bench.exports`.\n",
    ]
    for result in results:
        height, width = result["latent"]
        parts.append(
            f"## {result['model']}, {8 * height}x{8 * width} pixels, {result['granularity']} granularity\n\n"
            f"{machine_line(result['machine'])}. Loading and trace: {_seconds(result['trace'])}.\n"
        )
        parts.append(_table(result))
    return "\n".join(parts)


def _table(result: Mapping[str, Any]) -> str:
    trace, rows = result["trace"], result["rows"]
    full = min(rows["full"]["writing"], key=lambda pair: pair[1])
    lines = []
    for name, row in rows.items():
        best = min(row["writing"], key=lambda pair: pair[1])
        ratio = (trace[1] + row["planning"][1] + best[1]) / (trace[1] + full[1])
        lines.append(
            (
                name,
                str(row["graphs"]),
                str(row["launches"]),
                _seconds(row["planning"]),
                _seconds(best),
                f"{ratio:.2f}",
                f"{row['bytes']['all'] / rows['full']['bytes']['weights']:.4f}",
            )
        )
    return table(("export", "graphs", "launches", "planning, s", "writing, s", "to full", "disk"), lines)


def _seconds(pair: Sequence[float]) -> str:
    return f"{pair[1]:.1f} ({pair[0]:.1f})"


if __name__ == "__main__":
    raise SystemExit(main(None))
