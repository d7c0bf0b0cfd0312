"""Every row of ``docs/results/full-size.md``, one after the other: ``python -m tools.full_size.all --out DIR``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import entry_point, human_console
from dipgo_deploy.errors import UserError
from tools.full_size import find
from tools.full_size.export import command as export
from tools.full_size.export import measure
from tools.full_size.table import add_row, summary

# Name, dtype, whether reduced, pixels, and what differs from `_SAME`. fp16 but for the smallest of each kind, whose
# agreement in fp32 is one of rounding only.
_ROWS: tuple[tuple[str, str, int, Mapping[str, Any]], ...] = tuple(
    (name, dtype, pixels, {"schedule": schedule, **options})
    for name, dtype, pixels, options in (
        ("dit-xl-2-256", "fp32", 256, {}),
        ("dit-xl-2-256", "fp16", 256, {}),
        ("ddpm-celebahq-256", "fp32", 256, {"steps": 4}),
        ("pixart-alpha-xl-2-1024", "fp16", 256, {}),
        ("sd-1.5-512", "fp16", 256, {}),
        ("sd-1.5-512", "fp32", 256, {}),
        ("sd-2.1-768", "fp16", 256, {}),
        ("sana-1600m-1024", "fp16", 256, {}),
        ("sd3-medium-1024", "fp16", 256, {}),
        ("sd3.5-medium-1024", "fp16", 256, {}),
        ("sdxl-base-1024", "fp16", 256, {}),
        ("flux.1-dev-1024", "fp16", 256, {"reduced": True}),
        ("wan-2.1-t2v-1.3b", "fp16", 256, {"num_frames": 17}),
        # Enough steps that both experts have some to leave out.
        ("wan-2.2-t2v-a14b", "fp16", 256, {"num_frames": 17, "reduced": True, "steps": 5}),
        ("ltx-video-2b", "fp16", 256, {"num_frames": 17}),
        ("hunyuan-video", "fp16", 256, {"num_frames": 17, "reduced": True}),
        ("pixart-sigma-xl-2-1024", "fp16", 256, {}),
        ("flux.2-klein-4b-1024", "fp16", 256, {}),
        ("chroma1-1024", "fp16", 256, {"reduced": True}),
        ("auraflow-1024", "fp16", 256, {"reduced": True}),
        ("qwen-image-1328", "fp16", 256, {"reduced": True}),
        ("z-image-turbo-1024", "fp16", 256, {"reduced": True}),
    )
    for schedule in ("random50", "published")
)
_SAME: Mapping[str, Any] = {"steps": 3, "compare": True, "build": True}
_DEFAULTS: Mapping[str, Any] = export.make_context("full-size", [], resilient_parsing=True).params


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of the model and all options of ``tools.full_size.export`` by the name of the row."""
    return {
        f"{name}:{dtype}:{options['schedule']}": (
            name,
            {**_DEFAULTS, **_SAME, "dtype": dtype, "height": pixels, "width": pixels, **options},
        )
        for name, dtype, pixels, options in _ROWS
    }


@click.command(name="full-size-all")
@click.option("--out", type=click.Path(path_type=Path), help="Work folder; a model goes after its last row.")
@click.option("--collect", type=click.Path(path_type=Path), default=Path("docs/results/full-size.json"))
@click.option("--only", multiple=True, help="Rows whose name begins like that.")
@click.option("--keep-models", is_flag=True, help="Leave the models in the work folder.")
@click.option("--list", "list_only", is_flag=True, help="Only list the rows.")
def command(out: Path | None, collect: Path, only: tuple[str, ...], keep_models: bool, list_only: bool) -> None:
    """Make every row, go on after one that fails, and fail at the end if any did."""
    console = human_console(False)
    wanted = {name: row for name, row in rows().items() if not only or name.startswith(only)}
    if list_only:
        for name in wanted:
            click.echo(name)
        return
    if out is None:
        raise click.UsageError("give --out, a folder for the models and the engine directories")
    failed: dict[str, str] = {}
    for number, (name, (model, options)) in enumerate(wanted.items(), 1):
        try:
            row = measure(find(model), {**options, "out": out}, console.print)
        except UserError as error:
            failed[name] = str(error)
            console.print(f"{name}: {error}", markup=False, soft_wrap=True)
        else:
            add_row(collect, row)
            console.print(summary(row), markup=False, soft_wrap=True)
        later = list(wanted.values())[number:]
        if not keep_models and all((model, options["dtype"]) != (other, kept["dtype"]) for other, kept in later):
            shutil.rmtree(out / "models", ignore_errors=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} rows failed: {', '.join(failed)}")


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
