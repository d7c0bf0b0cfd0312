"""Results of ``dipgo-bench quality`` as tables for readers.

Run from the repository's root: ``python -m tools.bench.quality_table quality.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import entry_point
from tools.bench.tables import table

HEADINGS = ("case", "launches", "GMACs", "SSIM", "better by", "HaarPSI", "FLIP", "recognised", "Frechet")
BESIDE = ("schedule", "guidance", "launches", "SSIM", "best plain solver", "its SSIM", "better by", "images")


@click.command(name="quality_table")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--best", is_flag=True, help="One table for all: each schedule beside the best plain solver.")
def command(files: tuple[Path, ...], best: bool) -> None:
    """Print FILES, which dipgo-bench quality --output wrote, as Markdown."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if best:
        click.echo(beside_the_best(found))
        return
    for facts in found:
        click.echo(as_text(facts))


def beside_the_best(found: Sequence[Mapping[str, Any]]) -> str:
    """A row for each schedule at each guidance scale, with the plain solver of about as many launches that is best."""
    rows = []
    for facts in found:
        cases = {(row["guidance_scale"], row["name"]): row for row in facts["cases"]}
        for (scale, name), row in cases.items():
            other = None if row["baseline"] else cases.get((scale, row["against"]))
            if other is not None:
                ours = (f"`{Path(name).name}`", "-" if scale is None else f"{scale:g}", str(row["launches"]))
                likeness = (_pair(row["ssim"], 4), other["name"], _pair(other["ssim"], 4))
                rows.append((*ours, *likeness, _pair(row["difference"], 4), str(facts["images"])))
    return table(BESIDE, rows)


def as_text(facts: Mapping[str, Any]) -> str:
    """A table for each guidance scale, the full run first."""
    rows = [*facts["full_run"], *facts["cases"]]
    parts = []
    for scale in dict.fromkeys(row["guidance_scale"] for row in rows):
        at = "" if scale is None else f", guidance {scale:g}"
        parts.append(f"{facts['model']}{at}, {facts['images']} images, to the full run of {_reference(facts)}:\n")
        parts.append(table(HEADINGS, [_cells(row) for row in rows if row["guidance_scale"] == scale]))
    for found in facts.get("fewest_launches", ()):
        at = "" if found["guidance_scale"] is None else f" at guidance {found['guidance_scale']:g}"
        parts.append(
            f"- Fewest launches for SSIM {found['ssim']:g}{at}: schedules {found['ours'] or 'none'}, plain solvers "
            f"{found['baseline'] or 'none'}."
        )
    return "\n".join(parts) + "\n"


def _reference(facts: Mapping[str, Any]) -> str:
    return f"{facts['reference']['sampler'].removesuffix('Scheduler')}, {facts['reference']['steps']} steps"


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        Path(row["name"]).name,
        str(row["launches"]),
        f"{row['macs'] / 1e9:.2f}",
        _pair(row["ssim"], 4),
        _pair(row["difference"], 4),
        _pair(row.get("haarpsi"), 4),
        _pair(row.get("flip"), 4),
        _pair(row["accuracy"], 3),
        _pair(row["frechet"], 2),
    )


def _pair(estimate: Mapping[str, float] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate['value']:.{digits}f} +- {(estimate['high'] - estimate['low']) / 2:.{digits}f}"


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
