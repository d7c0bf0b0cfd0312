"""``dipgo-export``: a model and a schedule become an engine directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, examples, human_console, json_option, version_option

_PATH = click.Path(path_type=Path)


@click.command(
    name="export",
    epilog=examples(
        "dipgo-export --model fashion-sd --schedule schedule.json --engine-dir engines/fashion-sd",
        "dipgo-export --model fashion-sd --schedule schedule.json --plan-only",
        "dipgo-export --model ./sd15 --schedule s.json --engine-dir engines/sd15 --dtype fp16 --max-variants 4",
    ),
)
@click.option("--model", required=True, help="fashion-sd, fashion-dit, a folder in diffusers' format, or a hub id.")
@click.option("--schedule", "schedule_file", type=_PATH, required=True, help="Schedule file (see dipgo-schedule).")
@click.option("--engine-dir", type=_PATH, help="Folder to write; it appears when everything in it was checked.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per launch.")
@click.option("--height", type=click.IntRange(min=1), help="Image height in pixels. [default: the model's]")
@click.option("--width", type=click.IntRange(min=1), help="Image width in pixels. [default: the model's]")
@click.option("--max-variants", type=click.IntRange(min=1), help="Raise gates until at most so many graphs are left.")
@click.option(
    "--guidance/--no-guidance", default=True, show_default=True, help="Classifier-free guidance in the graph."
)
@click.option("--plan-only", is_flag=True, help="Show variants, launches and cache memory; write nothing.")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare each variant with the supernet.")
@click.option("--components/--no-components", default=True, show_default=True, help="Text encoder, tokenizer and VAE.")
@click.option("--allow-other-config", is_flag=True, help="Accept a schedule made for another configuration.")
@click.option("--overwrite", is_flag=True, help="Replace an engine directory that exists.")
@json_option
@version_option
def command(
    model: str, schedule_file: Path, engine_dir: Path | None, plan_only: bool, as_json: bool, **options: Any
) -> None:
    """Compile a model and a schedule: one ONNX graph for each distinct variant, one weights file, one launch list."""
    from dipgo_deploy.bundle.files import check_target
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, publish
    from dipgo_deploy.export.quiet import quiet_libraries
    from dipgo_deploy.schedule.document import Schedule

    if plan_only == (engine_dir is not None):
        raise click.UsageError("give either --engine-dir or --plan-only")
    settings = ExportOptions(**options)
    if engine_dir is not None:
        check_target(engine_dir, overwrite=settings.overwrite)
    schedule = Schedule.load(schedule_file)
    quiet_libraries()
    console = human_console(as_json)
    with console.status("starting") as status:

        def notify(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:
                console.print(stage, markup=False)

        planned = plan_export(model, schedule, settings, notify)
        if engine_dir is not None:
            publish(planned, engine_dir, notify)
    facts = _facts(planned)
    _show(console, facts)
    if engine_dir is not None:
        console.print(f"{engine_dir}: {_size(engine_dir)}, ready for dipgo-run", markup=False, soft_wrap=True)
        facts["engine_dir"] = str(engine_dir)
    emit(facts, as_json)


def _facts(planned: Any) -> dict[str, Any]:
    from dipgo_deploy.plan.explain import plan_summary

    return {"model": planned.source.name, **plan_summary(planned.plan, planned.traced.graph)}


def _show(console: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{facts['model']}: {len(facts['variants'])} variants")
    for heading in ("variant", "launches", "steps", "MMACs", "share", "reads", "writes"):
        table.add_column(heading, justify="left" if heading in ("variant", "steps") else "right")
    for row in facts["variants"]:
        table.add_row(
            row["name"],
            str(row["launches"]),
            _ranges(row["steps"]),
            f"{row['macs'] / 1e6:,.1f}",
            f"{row['macs'] / facts['macs_full']:.1%}",
            f"{row['reads']} ({_bytes(row['read_bytes'])})",
            f"{row['writes']} ({_bytes(row['write_bytes'])})",
        )
    console.print(table)
    ideal = facts["macs_full_run"] / max(facts["macs_run"], 1)
    console.print(
        f"{len(facts['launches'])} launches for {facts['steps']} evaluations "
        f"({facts['steps_without_launch']} need none); "
        f"{facts['macs_run'] / 1e9:,.2f} of {facts['macs_full_run'] / 1e9:,.2f} GMACs, ideal speed-up {ideal:.2f}x"
    )
    console.print(
        f"peak cache memory {_bytes(facts['arena_bytes'])} (no allocation needs less than "
        f"{_bytes(facts['lower_bound_bytes'])})"
    )
    if facts["promoted"]:
        console.print(f"{len(facts['promoted'])} gates raised to meet --max-variants")


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2 5``."""
    parts: list[str] = []
    start = previous = None
    for step in [*steps, None]:
        if previous is not None and (step is None or step != previous + 1):
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = step
        elif start is None:
            start = step
        previous = step
    return " ".join(parts)


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"


def _size(folder: Path) -> str:
    return _bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


main = entry_point(command)
