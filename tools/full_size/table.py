"""Rows of full-size exports collected in a file, and as a page for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from tools.bench.measure import machine_line
from tools.bench.tables import table, write_results

GIB = 2**30
# What tells rows apart; a new run of the same replaces the old one.
_KEY = (
    "name",
    "changes",
    "dtype",
    "schedule",
    "granularity",
    "sampler",
    "steps",
    "height",
    "width",
    "batch",
    "layout",
    "max_variants",
    "low_memory",
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Collected rows, none where there is no file yet. Raises UserError for another kind of file."""
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no collected rows in it ({error}); give another file") from None


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, or replace that of the same export, and render the page beside the file."""
    rows = [old for old in read_rows(path) if any(old.get(key) != row.get(key) for key in _KEY)]
    rows.append(dict(row))
    rows.sort(key=lambda given: (given["name"], given["dtype"], given["granularity"], given["schedule"]))
    write_results(path, {"rows": rows}, as_text(rows))


def summary(row: Mapping[str, Any]) -> str:
    """One line."""
    made, export = row["weights"], row["export"]
    line = (
        f"{row['name']} {row['dtype']} {row['width']}x{row['height']}: {made['parameters'] / 1e6:.0f} M parameters, "
        f"{export['graphs']} graphs, {export['launches']} launches of {export['evaluations']} evaluations, exported in "
        f"{export['seconds']:.0f} s, peak {export['peak_rss'] / GIB:.2f} GiB, {export['engine_dir_bytes'] / GIB:.2f} "
        f"GiB on disk; checker {export['checker']}"
    )
    if "compare" in row:
        line += f"; largest error of latents, of anything on the way: {_compared(row)}"
    if "build" in row:
        line += f"; {row['build']['engines']} engines in {row['build']['seconds']:.0f} s"
    return line


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    exports = (
        "model",
        "dtype",
        "pixels",
        "schedule",
        "units",
        "launches",
        "graphs",
        "parameters, M",
        "weights, GiB",
        "directory, GiB",
        "export, s",
        "of it trace, s",
        "processor, s",
        "peak, GiB",
        "peak to weights",
        "variants against supernet",
        "loop against supernet",
    )
    engines = ("model", "dtype", "pixels", "graphs", "build, s", "engines, GiB", "largest, GiB", "peak, GiB")
    parts = ["# Exports at full size\n"]
    machines = (machine_line(row["machine"]).partition("; load average")[0] for row in rows)
    parts += [f"{line}.\n" for line in dict.fromkeys(machines)]
    parts.append(
        "Published configurations with random weights: time, memory and size do not depend on the weights' values, and "
        "agreement is that of the graphs with the torch model of the same weights; nothing here says anything about "
        "pictures. Each row is one process. Export: from the model's folder to the published engine directory of the "
        "denoiser, with ONNX's full checker on every graph. Processor: time of all its threads; the machine had other "
        "work to do. Peak: the largest resident memory, mapped weight files included. Loop: largest error of the final "
        "latents, relative to their largest value, with the engine and the supernet each going their own way, then the "
        "largest of all latents and predictions on the way. bf16 graphs have no kernels on ONNX Runtime's CPU provider "
        "and are checked only. Made by `python -m tools.full_size.export NAME --collect docs/results/full-size.json` "
        "with the options of each row.\n"
    )
    parts.append(table(exports, [_export_row(row) for row in rows]))
    built = [row for row in rows if "build" in row]
    if built:
        versions = ", ".join(sorted({row["build"]["version"] for row in built}))
        parts.append(f"TensorRT-RTX {versions}, built without a GPU; each engine has its own copy of its weights:\n")
        parts.append(table(engines, [_build_row(row) for row in built]))
    reduced = {row["name"]: row["changes"] for row in rows if row["changes"]}
    parts += [f"{name} (reduced): {_settings(changes)}, all else as published.\n" for name, changes in reduced.items()]
    return "\n".join(parts)


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}` {value}" for key, value in changes.items())


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (reduced)" if row["changes"] else str(row["name"])


def _export_row(row: Mapping[str, Any]) -> Sequence[str]:
    made, export = row["weights"], row["export"]
    schedule = f"{row['schedule']}, {row['granularity']}s, {row['sampler'].removesuffix('Scheduler')} {row['steps']}"
    schedule += ", low memory" if row.get("low_memory") else ""
    return (
        _name(row),
        row["dtype"],
        f"{row['width']}x{row['height']}",
        schedule,
        str(row["units"]),
        f"{export['launches']} of {export['evaluations']}",
        str(export["graphs"]),
        f"{made['parameters'] / 1e6:.0f}",
        f"{export['weights_bytes'] / GIB:.2f}",
        f"{export['engine_dir_bytes'] / GIB:.2f}",
        f"{export['seconds']:.0f}",
        f"{export['stages'].get('tracing the denoiser', 0):.0f}",
        f"{export['cpu_seconds']:.0f}",
        f"{export['peak_rss'] / GIB:.2f}",
        f"{export['peak_rss'] / export['weights_bytes']:.1f}",
        "passed" if export["compared_with_supernet"] else "not run",
        _compared(row) if "compare" in row else "not run",
    )


def _compared(row: Mapping[str, Any]) -> str:
    found = row["compare"]
    if found["latents_relative"] is None:
        return "not finite"
    worst = "not finite" if found["worst_relative"] is None else f"{found['worst_relative']:.1e}"
    return f"{found['latents_relative']:.1e}, {worst}"


def _build_row(row: Mapping[str, Any]) -> Sequence[str]:
    built = row["build"]
    return (
        _name(row),
        row["dtype"],
        f"{row['width']}x{row['height']}",
        str(built["engines"]),
        f"{built['seconds']:.0f}",
        f"{built['bytes'] / GIB:.2f}",
        f"{built['largest_bytes'] / GIB:.2f}",
        f"{built['peak_rss'] / GIB:.2f}",
    )
