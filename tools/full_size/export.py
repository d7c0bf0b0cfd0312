"""Export a published full-size configuration with random weights, each stage in a process of its own, measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import Gates, Schedule
from tools.bench.measure import machine
from tools.full_size import find, models
from tools.full_size.measure import run_stage
from tools.full_size.table import add_row, as_text, read_rows, summary

SCHEDULES = Path(__file__).resolve().parents[2] / "dipgo_deploy/assets/schedules"
_PATH = click.Path(path_type=Path)


@click.command(name="full-size")
@click.argument("name", required=False)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option(
    "--schedule", default="random50", show_default=True, help="full, randomNN (% removed), uniformN, published."
)
@click.option("--granularity", type=click.Choice(["block", "layer"]), default="block", show_default=True)
@click.option("--sampler", help="As dipgo-schedule's. [default: the model's own]")
@click.option("--steps", type=click.IntRange(min=1), default=4, show_default=True, help="Of the sampler.")
@click.option("--width", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--height", type=click.IntRange(min=1), help="Pixels. [default: the published model's]")
@click.option("--num-frames", type=click.IntRange(min=1), help="Of a video. [default: the published model's]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per launch.")
@click.option("--layout", type=click.Choice(["variants", "segments"]), default="variants", show_default=True)
@click.option("--max-variants", type=click.IntRange(min=1), help="As dipgo-export's.")
@click.option("--reduced", is_flag=True, help="Fewer blocks of each kind, where the entry says how many.")
@click.option("--out", type=_PATH, help="Work folder: model (made once for each dtype), schedule, engine directory.")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare each graph with the supernet.")
@click.option("--low-memory/--no-low-memory", default=None, help="As dipgo-export's.")
@click.option("--compare", is_flag=True, help="The whole loop against the supernet.")
@click.option("--build", is_flag=True, help="TensorRT-RTX engines of all graphs.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the comparison.")
@click.option("--keep", is_flag=True, help="Leave the engine directory in the work folder.")
@click.option("--collect", type=_PATH, help="Add the row to this file (.json), with a table for readers beside it.")
@click.option("--table", "table_file", type=_PATH, help="Only render the table of a collected file again.")
@click.option("--list", "list_only", is_flag=True, help="Only list the models.")
@json_option
def command(
    name: str | None, table_file: Path | None, list_only: bool, as_json: bool, collect: Path | None, **options: Any
) -> None:
    """Random weights of configuration NAME on disk, a schedule for it, and its export: time, memory, size."""
    console = human_console(as_json)
    if table_file is not None:
        table_file.with_suffix(".md").write_text(as_text(read_rows(table_file)), encoding="utf-8")
        return
    if list_only or name is None:
        for entry in models().values():
            console.print(f"{entry['name']}: {entry['class_name']}, {entry['pixels']} pixels", markup=False)
        return
    if options["out"] is None:
        raise click.UsageError("give --out, a folder for the model and the engine directory")
    row = measure(find(name), options, console.print)
    console.print(summary(row), markup=False, soft_wrap=True)
    if collect is not None:
        add_row(collect, row)
    emit(row, as_json)


main = entry_point(command)


def measure(entry: Mapping[str, Any], options: Mapping[str, Any], say: Any) -> dict[str, Any]:
    """One row: what was exported, and what each stage took. Raises UserError when a stage fails."""
    out, dtype = options["out"], options["dtype"]
    out.mkdir(parents=True, exist_ok=True)
    changes = changes_of(entry, options["reduced"])
    label = "-".join((entry["name"], *(["reduced"] if changes else []), dtype))
    log = out / f"{label}.log"
    log.unlink(missing_ok=True)
    row: dict[str, Any] = {
        "name": entry["name"],
        "class_name": entry["class_name"],
        "changes": dict(changes),
        "machine": machine(options["threads"]),
        **{key: options[key] for key in ("dtype", "schedule", "granularity", "batch", "layout", "max_variants")},
        **({} if options["low_memory"] is None else {"low_memory": options["low_memory"]}),
    }
    row["weights"] = model_folder(entry, changes, dtype, out / "models" / label, log, say)
    folder = out / "models" / label
    schedule = make_schedule(entry, folder, options)
    schedule_file = out / f"{label}.schedule.json"
    schedule.save(schedule_file)
    height, width = (options[side] or entry["pixels"] for side in ("height", "width"))
    frames = options.get("num_frames") or entry.get("frames")
    row |= {
        "height": height,
        "width": width,
        **({} if frames is None else {"num_frames": frames}),
        "sampler": schedule.sampler.class_name,
        "steps": schedule.sampler.num_inference_steps,
        "granularity": schedule.model.granularity,
        "units": len(schedule.blocks),
        "kept": schedule.kept_share,
    }
    engine_dir = out / f"{label}.engine"
    shutil.rmtree(engine_dir, ignore_errors=True)
    say(f"{label}: exporting")
    arguments = {
        "folder": str(folder),
        "schedule": str(schedule_file),
        "engine_dir": str(engine_dir),
        "options": {
            **{key: options[key] for key in ("dtype", "batch", "layout", "max_variants", "check", "low_memory")},
            "height": exported_pixels(entry, height),
            "width": exported_pixels(entry, width),
            **({} if frames is None else {"num_frames": frames}),
        },
    }
    try:
        row["export"] = run_stage("export", arguments, log)
        if options["compare"]:
            say(f"{label}: comparing the loop with the supernet")
            row["compare"] = run_stage("compare", {**arguments, "threads": options["threads"]}, log)
        if options["build"]:
            say(f"{label}: building engines")
            row["build"] = run_stage("build", arguments, log)
    finally:
        if not options["keep"]:
            shutil.rmtree(engine_dir, ignore_errors=True)
    return row


def make_schedule(entry: Mapping[str, Any], folder: Path, options: Mapping[str, Any]) -> Schedule:
    """The schedule that ``--schedule`` names, for the model in ``folder``.

    Raises:
        UserError: an unknown name, or no gates were published for this model.
    """
    name = options["schedule"]
    if name == "published":
        return _published(entry, folder, options["steps"])
    target = schedule_target(str(folder), options["sampler"], options["steps"], options["granularity"])
    return target.schedule(_gates(name, target), name, {})


def _gates(name: str, target: Target) -> Gates:
    if name == "full":
        return target.gates(builders.full)
    match = re.fullmatch(r"(random|uniform)(\d+)", name)
    if match is None:
        raise UserError(f"--schedule {name}: give full, randomNN, uniformN or published")
    number = int(match[2])
    if match[1] == "uniform":
        return target.gates(lambda steps, units: builders.uniform(steps, units, number))
    return target.gates(lambda steps, units: builders.random(steps, units, number / 100, seed=0))


def _published(entry: Mapping[str, Any], folder: Path, steps: int) -> Schedule:
    """The gates that were published for the model, or those of the rule that was: DeepCache or a static interval."""
    found = entry.get("published")
    if found is None:
        raise UserError(f"--schedule published: nobody published gates for {entry['name']}: give random50")
    if "file" not in found:
        target = schedule_target(str(folder), None, steps, found["granularity"])
        if found["rule"] == "deepcache":
            gates = builders.deepcache(target.steps, target.block_names, found["interval"], found["branch"])
        else:
            gates = target.gates(lambda steps, units: builders.uniform(steps, units, found["interval"]))
        return target.schedule(gates, found["rule"], {key: found[key] for key in found if key != "rule"})
    given = Schedule.load(SCHEDULES / found["file"])
    target = schedule_target(str(folder), found["sampler"], found["steps"], found["granularity"])
    if target.block_names != tuple(block.name for block in given.blocks) or target.steps != given.steps:
        raise UserError(f"{found['file']}: its blocks or steps are not those of {entry['name']}")
    return target.schedule(given.gates, "published", dict(given.provenance))


def changes_of(entry: Mapping[str, Any], reduced: bool) -> Mapping[str, Any]:
    """What ``--reduced`` changes in the configuration; raises UserError where the entry does not say."""
    if not reduced:
        return {}
    if not entry.get("depth"):
        raise UserError(f"--reduced: {entry['name']} is small enough or has no reduced depth: leave it out")
    return dict(entry["depth"])


def model_folder(
    entry: Mapping[str, Any], changes: Mapping[str, Any], dtype: str, folder: Path, log: Path, say: Any
) -> dict[str, Any]:
    """Make the model's folder, unless an earlier run did; it appears when it is complete."""
    record = folder / "made.json"
    if record.is_file():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    say(f"{folder.name}: drawing random weights")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    arguments = {"entry": dict(entry), "changes": dict(changes), "dtype": dtype, "folder": str(partial)}
    made = run_stage("weights", arguments, log)
    (partial / record.name).write_text(json.dumps(made), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return made


def exported_pixels(entry: Mapping[str, Any], pixels: int) -> int:
    """What the exporter is told for a picture's height or width.

    Without a pipeline it counts eight pixels a latent pixel, or one where the family works on pixels.
    """
    scale = entry.get("latent_scale", 8)
    if pixels % scale:
        raise UserError(f"{pixels} pixels: give a multiple of {scale}")
    return pixels // scale * (1 if family_for(entry["class_name"]).pixels else 8)


if __name__ == "__main__":
    raise SystemExit(main(None))
