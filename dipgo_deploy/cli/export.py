"""``dipgo-export``: a model and a schedule become an engine directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.quantized import ACTIVATIONS, METHODS
from dipgo_deploy.bundle.shapes import Range, parse_range
from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    reading_options,
    stages,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    allow_other_config_option,
    class_label_numbers,
    guidance_option,
    model_option,
    option,
    version_option,
)
from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dipgo_deploy.compare.metrics import Agreement
    from dipgo_deploy.export.exporter import PlannedExport

SIZES = "N|MIN:MAX|MIN:OPT:MAX"


@click.command(
    name="dipgo-export",
    cls=Command,
    epilog=examples(
        "dipgo-export --model fashion-sd --schedule schedule.json --engine-dir engines/fashion-sd",
        "dipgo-export --model fashion-sd --schedule schedule.json --plan-only --memory-budget 8GiB",
        "dipgo-export --model ./sd15 --schedule s.json --engine-dir engines/sd15 --dtype fp16 --max-variants 4",
        "dipgo-export --model ./sd15 --schedule s.json --engine-dir sd15 --batch 1:4 --height 512:768 --width 512:768",
        "dipgo-export --model ./sd15 --schedule s.json --engine-dir engines/sd15-img2img --strength 0.6",
        "dipgo-export --model ./sd15 --schedule five.json --schedule ten.json --engine-dir engines/sd15",
    ),
)
@model_option
@reading_options
@guidance_option
@option(
    "Model",
    "--guidance-batch",
    type=click.IntRange(1, 2),
    default=2,
    help="With guidance: 2 runs the model on both halves of the batch at once, 1 on one half after the other, by the "
    "same graph in half the memory of activations.",
)
@option(
    "Model",
    "--components/--no-components",
    default=True,
    help="Export the text encoders, the tokenizers and the VAE too, or the denoiser only.",
)
@option(
    "Schedule",
    "--schedule",
    "schedule_files",
    type=PATH,
    required=True,
    multiple=True,
    help="Schedule file; see dipgo-schedule. Given several times, the directory offers all of them by the names of the "
    "files, the first where none is chosen, and they share graphs and weights.",
)
@allow_other_config_option
@option(
    "Schedule",
    "--strength",
    type=float,
    show_default="start from noise",
    help="Start from a picture (dipgo-run --image) and run this share of the steps, above 0 and up to 1.",
)
@option(
    "Schedule",
    "--max-variants",
    type=click.IntRange(min=1),
    show_default="as many as the schedule needs",
    help="Merge graphs until at most this many are left, by computing the cheapest skipped blocks after all.",
)
@option(
    "Schedule",
    "--graph-costs",
    type=PATH,
    show_default="the schedule as written",
    help="What dipgo-bench graph-costs measured on the machine that will run it: skipped blocks are computed after all "
    "where a graph costs more than it saves there, and what becomes of the schedule is said.",
)
@option("Shape", "--batch", default="1", metavar=SIZES, help="Images in one launch.")
@option("Shape", "--height", metavar=SIZES, show_default="the model's own", help="Image height in pixels.")
@option("Shape", "--width", metavar=SIZES, show_default="the model's own", help="Image width in pixels.")
@option(
    "Shape",
    "--num-frames",
    type=click.IntRange(min=1),
    show_default="as its pipeline",
    help="Frames of the video, of a model that makes videos.",
)
@option("Engine", "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", help="Type of the graphs.")
@option(
    "Engine",
    "--layout",
    type=click.Choice(["auto", "variants", "segments"]),
    default="auto",
    help="variants: one graph for each kind of evaluation. segments: the model cut so that each weight is in one "
    "graph. auto: segments in fp32 where variants would hold the weights more than four times.",
)
@option(
    "Engine",
    "--low-memory/--no-low-memory",
    default=None,
    show_default="for more than 256 MiB of weights",
    help="Hold the weights once while exporting, and compare in processes of their own.",
)
@option(
    "Engine",
    "--timestep-tables/--no-timestep-tables",
    default=None,
    show_default="where they save 5 % of the weights",
    help="Compute what depends on the timestep alone now, and leave out its weights; a LoRA cannot change them then.",
)
@option(
    "Engine",
    "--prologue/--no-prologue",
    default=None,
    show_default="where it takes 5 % of the weights out of the graphs",
    help="Compute what depends on a class or a text, and not on the latent, once a run in a graph of its own.",
)
@option(
    "Engine",
    "--class-labels",
    show_default="any class",
    help="Class ids, with commas between them, that alone can be drawn: what depends on the class becomes tables too, "
    "and its weights are left out.",
)
@option(
    "Engine",
    "--quantize",
    type=click.Choice(METHODS),
    show_default="as --dtype",
    help="Weights of products in fewer bits, for memory and disk: a scale for each output channel (int8-weights), or "
    "in matrix products for each 64 inputs (int4-weights). int8, and fp8 (float8 e4m3fn, for GPUs of compute "
    "capability 8.9 or newer): what they are times too, with scales recorded while the loop runs. A LoRA cannot "
    "change them then.",
)
@option(
    "Engine",
    "--quantize-budget",
    type=float,
    show_default="0.05",
    help="With --quantize int8 or fp8: the largest error of a launch, root mean square of the difference over that of "
    "the value; blocks that lose most stay as they are until it is met.",
)
@option(
    "Engine",
    "--calibration-samples",
    type=click.IntRange(min=1),
    default=4,
    help="With --quantize int8 or fp8: how many runs are recorded.",
)
@option(
    "Engine",
    "--calibration-prompts",
    type=PATH,
    show_default="a built-in model's own, or a few everyday ones",
    help="With --quantize int8 or fp8: file of prompts, one a line, that the recorded runs show in turn.",
)
@option("Comparison", "--check/--no-check", default=True, help="Compare the written graphs with the model in torch.")
@option(
    "Comparison",
    "--self-test/--no-self-test",
    default=None,
    show_default="where it fits 1 MiB",
    help="Record a loop of the model (at most 64 MiB), which dipgo-run --self-test compares with on any machine.",
)
@option(
    "Output",
    "--engine-dir",
    type=PATH,
    show_default="required without --plan-only",
    help="Engine directory to write; it appears when everything in it was checked.",
)
@option(
    "Output",
    "--plan-only",
    is_flag=True,
    help="Show the graphs, launches and memory of both layouts, and write nothing.",
)
@option(
    "Output",
    "--memory-budget",
    show_default="none",
    help="With --plan-only: say which layout's engines fit into this much memory, such as 8GiB.",
)
@option("Output", "--overwrite", is_flag=True, help="Replace an engine directory that exists.")
@option(
    "Output",
    "--add",
    is_flag=True,
    help="Add the schedules to an engine directory that exists; what it was exported with stays.",
)
@option(
    "Output",
    "--triton",
    type=PATH,
    metavar="REPOSITORY",
    show_default="none",
    help="Put it into a model repository for NVIDIA Triton, too, as dipgo-triton does.",
)
@json_option
@quiet_option
@version_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    schedule_files: tuple[Path, ...],
    engine_dir: Path | None,
    plan_only: bool,
    memory_budget: str | None,
    add: bool,
    triton: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile a model and a schedule into an engine directory: graphs, one file of weights, a list of launches."""
    from dipgo_deploy.engine.budget import parse_bytes
    from dipgo_deploy.export.added import add_schedules
    from dipgo_deploy.export.exporter import ExportOptions, export_bundle, plan_exports
    from dipgo_deploy.export.several import read_schedules, shared_graphs
    from dipgo_deploy.export.weighing import read_graph_costs
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.prompts import built_in_prompts, read_prompts

    if plan_only == (engine_dir is not None):
        raise click.UsageError("give either --engine-dir or --plan-only")
    if memory_budget is not None and not plan_only:
        raise click.UsageError("--memory-budget goes with --plan-only; dipgo-build --memory-budget refuses engines")
    budget = None if memory_budget is None else parse_bytes("--memory-budget", memory_budget)
    for name in ("batch", "height", "width"):
        if options[name] is not None:
            options[name] = size(f"--{name}", options[name])
    prompts = options["calibration_prompts"]
    if prompts is not None:
        options["calibration_prompts"] = read_prompts(prompts)
    else:
        rounds = options["quantize"] in ACTIVATIONS
        options["calibration_prompts"] = (built_in_prompts(model) or ()) if rounds else ()
    options["class_labels"] = class_label_numbers(options["class_labels"]) or ()
    if add:
        _refuse_with_add(ctx)
    if triton is not None:
        _check_triton(triton, engine_dir, options)
    if options["graph_costs"] is not None:
        options["graph_costs"] = read_graph_costs(options["graph_costs"])
    settings = ExportOptions(**options)
    schedules = by_name(schedule_files)
    if budget is not None and any(isinstance(options[name], Range) for name in ("batch", "height", "width")):
        raise UserError("--memory-budget: not with ranges of sizes; give plain numbers for --batch, --height, --width")
    quiet_libraries()
    console = human_console(as_json)
    exports: list[PlannedExport] = []
    rows: list[dict[str, Any]] = []
    agreed: list[Agreement] = []
    notes: list[str] = []
    with stages(console, "starting", lines=True) as notify:

        def planned(export: PlannedExport) -> None:
            exports.append(export)
            rows.append(_facts(export, both_layouts=plan_only))

        if engine_dir is None:
            for export in plan_exports(model, read_schedules(schedules), settings, notify):
                planned(export)
        elif add:
            add_schedules(
                engine_dir,
                {file.stem: file for file in schedule_files} if isinstance(schedules, Path) else schedules,
                model=model,
                layout=settings.layout,
                check=settings.check,
                notify=notify,
                planned=planned,
                agreed=agreed.append,
                note=notes.append,
            )
        else:
            export_bundle(
                model,
                schedules,
                engine_dir,
                settings,
                notify,
                planned=planned,
                agreed=agreed.append,
                note=notes.append,
            )
    for place, (export, row) in enumerate(zip(exports, rows, strict=True)):
        _show(console, row)
        if "layouts" in row:
            row["advice"] = _show_layouts(console, row, budget)
        for agreement in agreed[place : place + 1]:
            console.print(f"{export.layout} against the supernet: {agreement}", soft_wrap=True)
            row["agreement"] = {key: _finite(value) for key, value in agreement._asdict().items()}
    facts: dict[str, Any] = rows[0] if len(rows) == 1 else {"model": rows[0]["model"], "schedules": rows}
    if len(exports) > 1:
        facts["shared_graphs"] = shared_graphs(exports)
        units = sum(len(row["variants"]) for row in rows)
        console.print(
            f"{len(exports)} schedules in {units - facts['shared_graphs']} graphs, {facts['shared_graphs']} fewer than "
            "one by one"
        )
    notes = list(dict.fromkeys(notes))  # what is so of every schedule, once
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if notes:
        facts["not_compared"] = notes
    export = exports[0]
    if export.options.low_memory and settings.low_memory is None:
        console.print("large weights: held once, compared in processes of their own; --no-low-memory goes without")
    if engine_dir is not None:
        entry = Manifest.load(engine_dir).quantization
        if entry is not None:
            facts["quantization"] = entry.model_dump(mode="json")
            console.print(f"{entry.line}; a LoRA cannot change these", soft_wrap=True)
        console.print(f"{engine_dir}: {_size(engine_dir)}, ready for dipgo-run", markup=False, soft_wrap=True)
        facts["engine_dir"] = str(engine_dir)
        if triton is not None:
            from dipgo_deploy.serve.triton import write_repository

            target = write_repository(triton, engine_dir)
            console.print(f"{target}: model {target.name}", markup=False, soft_wrap=True)
            facts["triton"] = str(target)
    emit(facts, as_json)


_OF_ADD = {"model", "schedule_files", "engine_dir", "add", "layout", "check", "triton", "as_json"}


def _check_triton(repository: Path, engine_dir: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse (UserError) a repository that cannot get the directory, before that is made."""
    from dipgo_deploy.serve.triton import check_repository

    if engine_dir is None:
        raise UserError("--triton: nothing is written with --plan-only; leave one of them out")
    if options["strength"] is not None or not options["components"]:
        wrong = "--no-components" if options["strength"] is None else "--strength"
        raise UserError(f"--triton: not with {wrong}, as the model draws pictures from its inputs alone")
    check_repository(repository, engine_dir.resolve().name)


def _refuse_with_add(ctx: click.Context) -> None:
    """Refuse (UserError) options that a directory has decided already."""
    for param in ctx.command.params:
        name = param.name or ""
        if name not in _OF_ADD and ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise UserError(f"{param.opts[0]}: with --add it is as the engine directory was exported; leave it out")


def by_name(files: Sequence[Path]) -> Path | dict[str, Path]:
    """One file as it is; several by their names without the suffix. Raises UserError for a name that comes twice."""
    if len(files) == 1:
        return files[0]
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise UserError(f"--schedule {file}: a schedule named {file.stem} is there already; rename the file")
        found[file.stem] = file
    return found


def size(option: str, text: str) -> int | Range:
    """A number, or a range of numbers; raises UserError for anything else."""
    given = parse_range(option, text)
    return given if ":" in text else given.opt


def _facts(planned: PlannedExport, *, both_layouts: bool) -> dict[str, Any]:
    from dipgo_deploy.export.planning import in_segments
    from dipgo_deploy.plan.explain import plan_summary
    from dipgo_deploy.plan.layouts import compare_layouts, segments_summary
    from dipgo_deploy.schedule.worth import worth_of

    launched = {launch.step for launch in planned.plan.launches}
    repeated = [step for step in range(planned.schedule.steps) if step not in launched]
    facts: dict[str, Any] = {"model": planned.source.name, "layout": planned.layout}
    if planned.name:
        facts["schedule"] = planned.name
    facts["worth"] = worth_of(planned.schedule, repeated).facts()
    if planned.image is not None:
        start = planned.image
        facts["image"] = {
            "strength": start.strength,
            "begin": start.begin,
            "raised": [name for _, name in start.raised],
        }
    facts |= _beforehand_facts(planned)
    if planned.copies is not None:
        facts["weight_copies"] = planned.copies
    both_layouts = both_layouts and planned.traced.shape.sizes is None  # segments are of one size
    if planned.segments is None and not both_layouts:
        return facts | plan_summary(planned.plan, planned.traced.graph)
    pieces = planned.traced.pieces
    segments = planned.segments or in_segments(planned)
    if both_layouts:
        shape = planned.traced.shape
        channels = planned.source.family.latent_channels(planned.source.config)
        history_bytes = 4 * planned.history.slots * shape.batch * channels * math.prod(shape.extents)
        needs, one_copy = compare_layouts(planned.plan, segments, pieces, history_bytes, _beside_bytes(planned))
        facts["layouts"] = {need.layout: need.row() for need in needs}
        facts["weight_bytes"] = one_copy
    if planned.segments is None:
        return facts | plan_summary(planned.plan, planned.traced.graph)
    return facts | segments_summary(segments, planned.plan, pieces)


def _beforehand_facts(planned: PlannedExport) -> dict[str, Any]:
    """What is made before the launches, and the weights that leave the graphs for it."""
    traced, timesteps = planned.traced, len(planned.table_timesteps)
    found: dict[str, Any] = {}
    for name, made in (
        ("timestep_tables", traced.tables),
        ("class_tables", traced.classes),
        ("prologue", traced.prologue),
    ):
        if made is not None:
            part = made.part
            twice = name == "prologue" and traced.shape.apart  # for each half
            found[name] = {
                "values" if name == "prologue" else "tables": len(part.names),
                "rows": timesteps,
                "bytes": part.row_bytes(timesteps, traced.shape.sizes) * (1 + twice),
                "weight_bytes_saved": part.nbytes,
                "share_of_weights": part.share,
            }
    if traced.classes is not None:
        classes = traced.classes.classes
        found["class_tables"] |= {"classes": list(classes), "bytes": found["class_tables"]["bytes"] * len(classes)}
    return found


def _beside_bytes(planned: PlannedExport) -> int:
    """Memory of tables, and of the prologue with the rows that it makes."""
    traced, timesteps = planned.traced, len(planned.table_timesteps)
    found = sum(part.row_bytes(timesteps) for part in traced.parts)
    if traced.classes is not None:  # whose rows are of one image
        found += traced.classes.part.row_bytes(timesteps) * (traced.shape.model_batch - 1)
    if traced.shape.apart:  # what is made at the start of a run is there for each half
        found += 0 if traced.classes is None else traced.classes.part.row_bytes(timesteps) * traced.shape.model_batch
        found += 0 if traced.prologue is None else traced.prologue.part.row_bytes(timesteps)
    return found + (0 if traced.prologue is None else traced.prologue.part.nbytes)


def _show_layouts(console: Any, facts: dict[str, Any], budget: int | None) -> str | None:
    """A table of both layouts; with a budget the layout to take, None where neither fits."""
    from rich.table import Table

    table = Table(title="Layouts: what engines of the denoiser hold, scratch not counted")
    for heading in ("layout", "graphs", "launches", "GMACs", "weights", "arena", "beside", "in all"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for row in facts["layouts"].values():
        table.add_row(
            row["layout"],
            str(row["graphs"]),
            str(row["launches"]),
            f"{row['macs_run'] / 1e9:,.2f}",
            _bytes(row["weight_bytes"]),
            _bytes(row["arena_bytes"]),
            _bytes(row["beside_bytes"]),
            _bytes(row["total_bytes"]),
        )
    console.print(table)
    console.print(f"one copy of the weights is {_bytes(facts['weight_bytes'])}")
    if budget is None:
        return None
    fitting = [layout for layout, row in facts["layouts"].items() if row["total_bytes"] <= budget]
    if not fitting:
        console.print(f"neither fits {_bytes(budget)}: a smaller dtype, batch or size is needed")
        return None
    console.print(f"for {_bytes(budget)}: --layout {fitting[0]}")
    return fitting[0]


def _show(console: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table

    named = f", schedule {facts['schedule']}" if "schedule" in facts else ""
    table = Table(title=f"{facts['model']}{named}: {len(facts['variants'])} {facts['layout']}")
    for heading in (facts["layout"].removesuffix("s"), "launches", "steps", "MMACs", "share", "reads", "writes"):
        table.add_column(heading, justify="left" if heading in ("variant", "segment", "steps") else "right")
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
    if tables := facts.get("timestep_tables"):
        console.print(
            f"timestep tables: {tables['tables']} of {tables['rows']} rows, {_bytes(tables['bytes'])}, in the place of "
            f"{_bytes(tables['weight_bytes_saved'])} of weights ({tables['share_of_weights']:.0%}); a LoRA cannot "
            "change what they are made of, --no-timestep-tables goes without"
        )
    if tables := facts.get("class_tables"):
        console.print(
            f"class tables: {tables['tables']} of {tables['rows']} timesteps and {len(tables['classes'])} classes, "
            f"{_bytes(tables['bytes'])}, in the place of {_bytes(tables['weight_bytes_saved'])} of weights "
            f"({tables['share_of_weights']:.0%}); no other class can be drawn"
        )
    if made := facts.get("prologue"):
        console.print(
            f"prologue: {made['values']} values for {made['rows']} timesteps, {_bytes(made['bytes'])}, made once a run "
            f"by {_bytes(made['weight_bytes_saved'])} of weights ({made['share_of_weights']:.0%}) that no launch then "
            "needs; --no-prologue goes without"
        )
    console.print(facts["worth"]["line"], markup=False, soft_wrap=True)
    console.print(
        f"peak arena memory {_bytes(facts['arena_bytes'])} (no allocation needs less than "
        f"{_bytes(facts['lower_bound_bytes'])})"
    )
    if facts.get("weight_copies") is not None:
        why = f"the graphs of variants hold the weights {facts['weight_copies']:.1f} times"
        limit = "above four it is segments, which ONNX Runtime loads faster, in the memory of one model"
        console.print(f"--layout auto is {facts['layout']}: {why}; {limit}")
    if facts["promoted"]:
        console.print(f"{len(facts['promoted'])} skipped blocks computed after all, to need fewer graphs")
    if facts.get("image") is not None:
        image = facts["image"]
        console.print(
            f"starts from a picture at evaluation {image['begin']} of the schedule (strength {image['strength']:g}), "
            f"where {len(image['raised'])} skipped blocks are computed: nothing is cached yet"
        )


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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _size(folder: Path) -> str:
    return _bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


main = entry_point(command)
