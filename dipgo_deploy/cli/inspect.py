"""``dipgo-inspect``: what is in an engine directory, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.cli.common import emit, entry_point, examples, human_console, json_option
from dipgo_deploy.cli.options import PATH, Command, of_several_options, option, version_option

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.engine.difference import Difference

# Lines of one section that are shown of a difference; --json has all.
_MOST_LINES = 30


@click.command(
    name="dipgo-inspect",
    cls=Command,
    epilog=examples(
        "dipgo-inspect engines/fashion-sd",
        "dipgo-inspect engines/fashion-sd --json",
        "dipgo-inspect --diff engines/before engines/after",
    ),
)
@click.argument("directories", nargs=-1, required=True, type=PATH, metavar="DIR [DIR]")
@of_several_options
@option("Comparison", "--diff", is_flag=True, help="Show what differs between two directories.")
@option(
    "Model",
    "--verify",
    is_flag=True,
    help="Check the hash of every file first, and that engines were built from the weights that are here.",
)
@json_option
@version_option
@click.pass_context
def command(
    ctx: click.Context,
    directories: tuple[Path, ...],
    schedule: str | None,
    launches: int | None,
    diff: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what is in an engine directory: variants and their graphs, caches, launches, memory, engines, origin.

    Nothing is run, and neither torch nor ONNX is needed. With --diff the exit status is 1 when two directories differ;
    their TensorRT engines are compared by what they were built from.
    """
    if len(directories) != (2 if diff else 1):
        raise click.UsageError(f"{len(directories)} directories given; give one, or two with --diff")
    from dipgo_deploy.bundle.directory import Bundle

    bundles = [Bundle.open(path, schedule=schedule, launches=launches, verify=verify) for path in directories]
    console = human_console(as_json)
    if not diff:
        from dipgo_deploy.engine.contents import contents

        facts = contents(bundles[0], verify=verify)
        _show(console, facts)
        emit(facts, as_json)
        return
    from dipgo_deploy.engine.difference import differences

    found = differences(bundles[0], bundles[1], verify=verify)
    _show_differences(console, found)
    names = dict(zip(("before", "after"), map(str, directories), strict=True))
    emit({**names, "differ": bool(found), "differences": [one.facts() for one in found]}, as_json)
    ctx.exit(1 if found else 0)


def _show_differences(console: Console, found: Sequence[Difference]) -> None:
    for section, group in groupby(found, key=lambda one: one.section):
        lines = [one.line() for one in group]
        for line in lines[:_MOST_LINES]:
            console.print(f"{section}: {line}", markup=False, soft_wrap=True)
        if len(lines) > _MOST_LINES:
            console.print(f"{section}: {len(lines) - _MOST_LINES} more; --json has them", markup=False)
    if not found:
        console.print("no difference")


def _show(console: Console, facts: Mapping[str, Any]) -> None:
    from dipgo_deploy.engine.budget import size
    from dipgo_deploy.engine.contents import lifetimes
    from dipgo_deploy.schedule.summary import ranges

    _print_pairs(console, _summary(facts))
    _print_table(
        console,
        "Variants",
        ("variant", "launches", "evaluations", "MACs", "reads", "writes", "predicts"),
        (
            (
                row["name"],
                row["launches"],
                ranges(row["steps"]),
                f"{row['macs']:.3g}",
                f"{len(row['reads'])} ({size(row['read_bytes'])})",
                f"{len(row['writes'])} ({size(row['write_bytes'])})",
                "yes" if row["predicts"] else "no",
            )
            for row in facts["variants"]
        ),
    )
    _print_table(
        console,
        "Graphs",
        ("graph", "file", "size", "inputs", "outputs", "weights"),
        (
            (
                row["name"],
                row["file"],
                size(row["bytes"]),
                len(row["inputs"]),
                len(row["outputs"]),
                "not known" if row["weights"] is None else f"{row['weights']} ({size(row['weight_bytes'])})",
            )
            for row in facts["graphs"]
        ),
    )
    _print_table(
        console,
        "Caches, with the launches from which to which each value is kept",
        ("cache", "shape", "dtype", "size", "kept"),
        (
            (row["name"], _shape(row["shape"]), row["dtype"], size(row["bytes"]), lifetimes(row["values"]))
            for row in facts["caches"]
        ),
    )
    several = any("denoiser" in row for row in facts["launches"])
    _print_table(
        console,
        "Launches",
        ("launch", "evaluation", "timestep", *(("denoiser",) if several else ()), "variant", "reads", "writes", "slot"),
        (
            (
                row["launch"],
                row["step"],
                f"{row['timestep']:g}",
                *((row["denoiser"],) if several else ()),
                row["variant"],
                len(row["reads"]),
                len(row["writes"]),
                "" if row["slot"] is None else row["slot"],
            )
            for row in facts["launches"]
        ),
    )
    _print_table(
        console,
        "Engines",
        ("engine", "size", "key", "state"),
        (
            (row["name"], size(row.get("bytes", 0)), row.get("key", "")[:12], row["problem"] or "fits its graph")
            for row in facts["engines"]
        ),
    )
    console.print()
    _print_pairs(console, _memory(facts["memory"]))
    console.print()
    _print_pairs(console, _origin(facts))


def _summary(facts: Mapping[str, Any]) -> dict[str, str]:
    from dipgo_deploy.bundle.manifest import QuantizationEntry
    from dipgo_deploy.bundle.shapes import BATCH, Range
    from dipgo_deploy.engine.budget import size
    from dipgo_deploy.schedule.summary import denoisers_line, guidance_line

    model, sampler, schedule = facts["model"], facts["sampler"], facts["schedule"]
    scale = facts["scale"] or 1
    height, width = (extent * scale for extent in facts["latent"][-2:])
    pixels = "" if facts["scale"] is None else f", {width}x{height} pixels"
    frames = "" if facts["video_frames"] is None else f", {facts['video_frames']} frames"
    usual = "" if facts["guidance_scale"] is None else f", scale {facts['guidance_scale']:g}"
    apart = ", its halves in launches of their own" if facts["guidance_batch"] == 1 else ""
    launches = len(facts["launches"])
    several = [f"{one['name']} ({one['launches']} launches)" for one in facts["schedules"]]
    lines = {
        **({"schedules": f"{', '.join(several)}; shown: {facts['name']}"} if several else {}),
        "model": f"{model['class_name']} ({model['name']}), {schedule['blocks']} units ({model['granularity']})",
        "latent": f"{facts['batch']} x {_shape(facts['latent'])}, {facts['dtype']}{pixels}{frames}",
        "guidance": f"yes{usual}{apart}" if facts["guidance"] else f"no{usual}",
        "sampler": f"{sampler['class_name']}, {sampler['num_inference_steps']} steps, "
        f"{facts['evaluations']} evaluations",
        **({"denoisers": denoisers_line(schedule["denoisers"])} if "denoisers" in schedule else {}),
        **({"guided": guidance_line(schedule["guidance"])} if "guidance" in schedule else {}),
        "schedule": f"{schedule['kept_gates']:.1%} of the gates kept",
        "worth": schedule["worth"]["line"].removeprefix("worth: "),
        "launches": f"{launches} of {len(facts['variants'])} graphs, layout {facts['layout']}",
    }
    if facts["sizes"] is not None:
        scales = {name: 1 if name == BATCH else scale for name in facts["sizes"]}
        ranges = [f"{name} {Range(**spec).describe(scales[name])}" for name, spec in facts["sizes"].items()]
        lines["sizes"] = f"{', '.join(ranges)}; all shapes here are the largest"
    if facts["table_classes"]:
        lines["classes"] = f"{', '.join(map(str, facts['table_classes']))} alone: their tables were made at export"
    prologue = next((graph for graph in facts["graphs"] if graph["name"] == PROLOGUE_NAME), None)
    if prologue is not None:
        made = f"{len(prologue['outputs'])} values once a run of {', '.join(i['name'] for i in prologue['inputs'])}"
        weights = prologue["weight_bytes"]
        lines["prologue"] = made if weights is None else f"{made}, by {size(weights)} of weights"
    if facts["quantization"] is not None:
        lines["weights"] = QuantizationEntry(**facts["quantization"]).line
    if facts["promoted"]:
        lines["re-enabled"] = f"{len(facts['promoted'])} gates"
    full = facts["macs"]["full"] * facts["evaluations"]
    if full:
        lines["MACs"] = f"{facts['macs']['run'] / full:.1%} of the full run's are launched"
    return lines


def _memory(memory: Mapping[str, Any]) -> dict[str, str]:
    from dipgo_deploy.engine.budget import size

    of_graphs = memory["weights_of_graphs"]
    each = "not known" if of_graphs is None else size(of_graphs)
    return {
        "weights": f"{size(memory['weights'])} stored, {each} where each graph has its own",
        "arena": f"{size(memory['arena'])}, at least {size(memory['arena_least'])} for these caches",
        "history": size(memory["history"]),
        "tables": size(memory["tables"]) if memory["tables"] else "none",
        "run rows": size(memory["run_rows"]) if memory["run_rows"] else "none",
        "other": f"{size(memory['other'])} (conditions, coefficients, what components read and write)",
    }


def _origin(facts: Mapping[str, Any]) -> dict[str, str]:
    schedule = facts["schedule"]
    made = schedule["provenance"]
    lines = {
        "made by": f"{facts['created_by']}, format {facts['format_version']}",
        "schedule": f"{made.get('method', 'not said')} {_plain(made.get('parameters') or {})}".rstrip(),
        "config": facts["model"]["config_hash"],
    }
    if schedule["solver"] is not None:
        lines["solver"] = _plain(schedule["solver"]) or "not said"
    if schedule["forecast"] is not None:
        lines["forecast"] = _plain(schedule["forecast"])
    lines["tools"] = ", ".join(f"{name} {version}" for name, version in facts["tools"].items()) or "not said"
    return lines


def _plain(values: Mapping[str, Any]) -> str:
    """The plain values of a mapping; those inside are in --json."""
    shown = {name: value for name, value in values.items() if not isinstance(value, Mapping | list)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _print_pairs(console: Console, lines: Mapping[str, str]) -> None:
    for name, value in lines.items():
        console.print(f"{name:<12}{value}", markup=False, soft_wrap=True)


def _print_table(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Nothing where there are no rows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    if table.row_count:
        console.print()
        console.print(table)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


main = entry_point(command)
