"""What engine directories do to pictures: each beside the full run's directory, from the same seeds.

Run from the repository's root: ``python -m tools.bench.engine_quality engines/full engines/five ... --images 200``.
Unlike ``dipgo-bench quality`` it runs graphs, in the dtype they have, not the model in torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dipgo_deploy.cli.common import entry_point
from dipgo_deploy.errors import UserError
from tools.bench.tables import table

if TYPE_CHECKING:
    from dipgo_deploy.bench.metrics import Metric


@click.command(name="engine_quality")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("directories", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--images", type=click.IntRange(min=2), default=200, show_default=True, help="Pictures of each.")
@click.option("--prompts", type=click.Path(path_type=Path, exists=True), help="Text file with one prompt a line.")
@click.option("--guidance-scale", type=float, default=4.0, show_default=True, help="Scale of the guidance.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
def command(
    reference: Path,
    directories: tuple[Path, ...],
    images: int,
    prompts: Path | None,
    guidance_scale: float,
    threads: int,
    as_json: bool,
) -> None:
    """Print how close the pictures of DIRECTORIES come to those of REFERENCE."""
    from dipgo_deploy.bench.metrics import PSNR, SSIM

    each = conditions(reference, prompts)
    rows = compare(reference, directories, images, each, guidance_scale, threads, (SSIM, PSNR))
    if as_json:
        click.echo(json.dumps({"images": images, "guidance_scale": guidance_scale, "cases": rows}, indent=1))
        return
    click.echo(table(("directory", "dtype", "launches", "SSIM", "PSNR, dB"), [_cells(row) for row in rows]))


def compare(
    reference: Path,
    directories: Sequence[Path],
    images: int,
    conditions: Sequence[dict[str, Any]],
    guidance_scale: float,
    threads: int,
    metrics: Sequence[Metric],
) -> list[dict[str, Any]]:
    """A row for each directory: the metrics to the reference's pictures, with 95% intervals."""
    import torch

    from dipgo_deploy.bench.statistics import mean

    def pictures(directory: Path) -> tuple[torch.Tensor, dict[str, Any]]:
        made, facts = _pictures(directory, images, conditions, guidance_scale, threads)
        return torch.from_numpy(np.moveaxis(made, -1, 1).copy()), facts

    full, _ = pictures(reference)
    rows = []
    for directory in directories:
        made, facts = pictures(directory)
        for metric in metrics:
            facts[metric.name] = vars(mean(metric.measure(made, full, ()).double().numpy()))
        rows.append(facts)
    return rows


def conditions(reference: Path, prompts: Path | None) -> list[dict[str, Any]]:
    """What the pictures take in turn: prompts, or every class."""
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.search.prompts import built_in_prompts, read_prompts

    manifest = Bundle.open(reference).manifest
    if manifest.components.class_labels:
        return [{"class_labels": number} for number in manifest.components.class_labels.values()]
    texts = built_in_prompts(manifest.model.name) if prompts is None else read_prompts(prompts)
    if texts is None:
        raise UserError(f"{reference}: is of a text model; give --prompts")
    return [{"prompt": text} for text in texts]


def _pictures(
    directory: Path, images: int, conditions: Sequence[dict[str, Any]], guidance_scale: float, threads: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Pictures float32 (n, H, W, 3) of seeds that neither searches nor calibrations use."""
    from dipgo_deploy.runtime.pipeline import Pipeline
    from dipgo_deploy.search.samples import HELD_OUT

    pipeline = Pipeline.from_engine_dir(directory, "cpu", threads=threads)
    made = []
    launches = 0
    for place in range(images):
        condition = conditions[place % len(conditions)]
        output = pipeline(**condition, seed=HELD_OUT + place, guidance_scale=guidance_scale, output_type="np")
        made.append(np.asarray(output.images)[:1])
        launches = output.launches
    facts = {"directory": directory.name, "dtype": pipeline.bundle.manifest.dtype, "launches": launches}
    return np.concatenate(made), facts


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def pair(name: str, digits: int) -> str:
        found = row[name]
        return f"{found['value']:.{digits}f} +- {(found['high'] - found['low']) / 2:.{digits}f}"

    return (row["directory"], row["dtype"], str(row["launches"]), pair("ssim", 4), pair("psnr", 2))


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
