"""Rows of full-size exports collected in a file, and as a page for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from tools.bench.measure import machine_lines
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
    "num_frames",
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
        f"{row['name']} {row['dtype']} {_size(row)}: {made['parameters'] / 1e6:.0f} M parameters, "
        f"{export['graphs']} graphs, {export['launches']} launches of {export['evaluations']} evaluations, exported in "
        f"{export['seconds']:.0f} s, peak {export['peak_rss'] / GIB:.2f} GiB, {export['engine_dir_bytes'] / GIB:.2f} "
        f"GiB on disk; checker {export['checker']}"
    )
    if export["variants"] is not None:
        line += f"; largest error of variants {_number(export['variants']['relative'], '.1e')}"
    if "compare" in row:
        compared = row["compare"]
        errors = (_number(compared[part]["relative"], ".1e") for part in ("loop", "latents"))
        line += f"; of loop, latents {', '.join(errors)}, {'within' if compared['passed'] else 'BEYOND'} tolerance"
    if "build" in row:
        line += f"; {row['build']['engines']} engines in {row['build']['seconds']:.0f} s"
    return line


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    parts = ["# Exports at full size\n", *machine_lines(rows, _name)]
    parts.append(_INTRODUCTION)
    parts.append(_needs(rows))
    parts.append(table(_EXPORTS, [_export_row(row) for row in rows]))
    compared = [row for row in rows if "compare" in row or row["export"]["variants"] is not None]
    if compared:
        parts += ["## Agreement with the supernet\n", _AGREEMENT]
        parts.append(table(_COMPARISONS, [_compare_row(row) for row in compared]))
    built = [row for row in rows if "build" in row]
    if built:
        versions = ", ".join(sorted({row["build"]["version"] for row in built}))
        parts.append("## Engines\n")
        parts.append(f"TensorRT-RTX {versions}, built without a GPU; each engine has its own copy of its weights.\n")
        parts.append(table(_ENGINES, [_build_row(row) for row in built]))
    reduced = {row["name"]: row["changes"] for row in rows if row["changes"]}
    parts += [f"{name} (reduced): {_settings(changes)}, all else as published.\n" for name, changes in reduced.items()]
    return "\n".join(parts)


def _needs(rows: Sequence[Mapping[str, Any]]) -> str:
    """What making the rows again takes."""
    stages = [row[stage] for row in rows for stage in ("weights", "export", "compare", "build") if stage in row]
    seconds = sum(stage["seconds"] for stage in stages)
    # A comparison has a float32 copy of the model on disk, beside the model and the engine directory.
    disk = max(
        2 * row["export"]["engine_dir_bytes"]
        + max(0 if row["dtype"] == "fp32" else 4 * row["weights"]["parameters"], row.get("build", {}).get("bytes", 0))
        for row in rows
    )
    memory = max(stage["peak_rss"] for stage in stages)
    return (
        f"These {len(rows)} rows took {seconds / 3600:.1f} hours, up to {memory / GIB:.1f} GiB of memory and "
        f"{disk / GIB:.0f} GiB of disk.\n"
    )


_INTRODUCTION = (
    "Published configurations with random weights: time, memory and size do not depend on the weights' values, and "
    "agreement is that of the graphs with the torch model of the same weights; nothing here says anything about "
    "pictures. All rows: `python -m tools.full_size.all --out DIR`; one: `python -m tools.full_size.export NAME "
    "--collect docs/results/full-size.json` with the options of the row.\n\n"
    "Export: from the model's folder, whose files have the row's dtype, to the published engine directory of the "
    "denoiser, with ONNX's full checker on every graph, which all passed, and the comparison of every graph with the "
    "supernet unless the row says otherwise. Each stage is one process; an export's comparison is two more, one after "
    "the other, while the first holds no weights. Processor: time of all threads; the machine had other work to do. "
    "Peak: the largest resident memory of any process, mapped weight files included; above Python: without what Python "
    "holds with all libraries loaded and no model.\n\n"
    "Schedules: random50 removes half of the gates; published is the kind that was published for the model: DiP-GO's "
    "own gates (sd-1.5), DeepCache with its most shallow branch at every third step (other UNets), or attention and "
    "feed-forward at every second step, as FORA does (transformers).\n"
)
_AGREEMENT = (
    "Engine directory on ONNX Runtime's CPU provider against the torch supernet in float32: the largest error, "
    "relative to the reference's largest value, the smallest PSNR in dB, the smallest cosine. Variants: each by "
    "itself at export, on inputs recorded from the supernet's loop, all its outputs. Loop: all latents and "
    "predictions on the way, with both sides going their own way from the same noise. Latents: the final ones. "
    "Tolerance: of the model family, for the largest error. bf16 graphs have no kernels on that provider.\n"
)
_EXPORTS = (
    "model",
    "dtype",
    "pixels (x frames)",
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
    "above Python to weights",
)
_COMPARISONS = (
    "model",
    "dtype",
    "schedule",
    "variants",
    "PSNR, cosine",
    "loop",
    "PSNR, cosine",
    "latents",
    "PSNR, cosine",
    "tolerance",
    "loop passed",
    "loop, s",
    "loop's peak, GiB",
)
_ENGINES = (
    "model",
    "dtype",
    "pixels (x frames)",
    "schedule",
    "graphs",
    "engines",
    "build, s",
    "engines, GiB",
    "largest, GiB",
    "peak, GiB",
)


def _settings(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}` {value}" for key, value in changes.items())


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (reduced)" if row["changes"] else str(row["name"])


def _size(row: Mapping[str, Any]) -> str:
    """Pixels, and of a video the frames behind them."""
    frames = row.get("num_frames")
    return f"{row['width']}x{row['height']}" + ("" if frames is None else f"x{frames}")


def _schedule(row: Mapping[str, Any]) -> str:
    text = f"{row['schedule']}, {row['granularity']}s, {row['sampler'].removesuffix('Scheduler')} {row['steps']}"
    forced = row.get("low_memory")
    return text if forced is None else f"{text}, {'low memory' if forced else 'not low memory'}"


def _export_row(row: Mapping[str, Any]) -> Sequence[str]:
    made, export = row["weights"], row["export"]
    weights = export["weights_bytes"]
    return (
        _name(row),
        row["dtype"],
        _size(row),
        _schedule(row) + ("" if export["variants"] is not None else ", not compared"),
        str(row["units"]),
        f"{export['launches']} of {export['evaluations']}",
        str(export["graphs"]),
        f"{made['parameters'] / 1e6:.0f}",
        f"{weights / GIB:.2f}",
        f"{export['engine_dir_bytes'] / GIB:.2f}",
        f"{export['seconds']:.0f}",
        f"{export['stages'].get('tracing the denoiser', 0):.0f}",
        f"{export['cpu_seconds']:.0f}",
        f"{export['peak_rss'] / GIB:.2f}",
        f"{export['peak_rss'] / weights:.2f}",
        f"{(export['peak_rss'] - export['libraries_rss']) / weights:.2f}",
    )


def _number(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)


def _compare_row(row: Mapping[str, Any]) -> Sequence[str]:
    export, compared = row["export"], row.get("compare")
    cells = []
    for found in (export["variants"], *((compared["loop"], compared["latents"]) if compared else (None, None))):
        if found is None:
            cells += ["not run", ""]
        else:
            numbers = f"{_number(found['psnr'], '.0f')}, {_number(found['cosine'], '.7f')}"
            cells += [_number(found["relative"], ".1e"), numbers]
    return (
        _name(row),
        row["dtype"],
        _schedule(row),
        *cells,
        f"{export['tolerance']:g}",
        *(("yes" if compared["passed"] else "no", f"{compared['seconds']:.0f}") if compared else ("", "")),
        f"{compared['peak_rss'] / GIB:.2f}" if compared else "",
    )


def _build_row(row: Mapping[str, Any]) -> Sequence[str]:
    built = row["build"]
    return (
        _name(row),
        row["dtype"],
        _size(row),
        _schedule(row),
        str(row["export"]["graphs"]),
        str(built["engines"]),
        f"{built['seconds']:.0f}",
        f"{built['bytes'] / GIB:.2f}",
        f"{built['largest_bytes'] / GIB:.2f}",
        f"{built['peak_rss'] / GIB:.2f}",
    )
