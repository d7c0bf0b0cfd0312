"""Speed-up over the ratio of multiply-accumulates at full size, from the launches of each graph instead of whole loops.

A loop of fifty evaluations of a full-size model takes minutes on a processor; its launches take the same time whatever
they follow. So each graph of a schedule is timed in turn with the full graph, and the loop's time is their sum.

    python -m tools.bench.launches make --model FOLDER --case published=FILE --case random:50:0.5 --graphs FOLDER
    python -m tools.bench.launches time --graphs FOLDER --collect docs/results/launches.json
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.backends.base import Launchable
from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.bundle.manifest import Graph, TensorSpec
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.schedule.document import Schedule
from tools.bench.measure import alternate, machine, machine_lines, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

FULL = "full"
CASES = "cases.json"
_PATH = click.Path(path_type=Path)


@click.group(name="launches")
def command() -> None:
    """Time the graphs of schedules of a full-size model one by one."""


@command.command()
@click.option("--model", required=True, help="Built-in model or folder.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    required=True,
    help="NAME=FILE, or random:STEPS:RATIO. All must have the same units and cache kinds.",
)
@click.option("--granularity", type=click.Choice(["block", "layer"]), default="layer", show_default=True)
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per launch.")
@click.option("--most", type=click.IntRange(min=1), default=6, show_default=True, help="Graphs of a case that are cut.")
@click.option("--graphs", type=_PATH, required=True, help="New folder for graphs and weights.")
def make(
    model: str, cases: tuple[str, ...], granularity: Any, height: int | None, batch: int, most: int, graphs: Path
) -> None:
    """Trace once, plan every case, and export it and the full schedule; up to ``--most`` graphs of each are timed."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, publish, replan
    from dipgo_deploy.reference.quiet import quiet_libraries
    from tools.bench.pairs import full_schedule

    quiet_libraries()
    schedules = dict(read_case(case, model, granularity) for case in cases)
    first = next(iter(schedules.values()))
    # With low memory a trace could be exported once only.
    given: dict[str, Any] = {"height": height, "width": height, "batch": batch, "low_memory": False}
    options = ExportOptions(layout="variants", components=False, check=False, **given)
    full = plan_export(model, full_schedule(first), options)
    entries = {FULL: _entry(FULL, publish(full, graphs / FULL).manifest.plan.variants[0].graph)}
    rows: dict[str, Any] = {}
    for name, schedule in schedules.items():
        planned = replan(full, schedule)
        plan = planned.plan
        variants = publish(planned, graphs / name).manifest.plan.variants
        launched = [sum(launch.variant == place for launch in plan.launches) for place in range(len(plan.variants))]
        chosen = sample([variant.macs for variant in plan.variants], most)
        entries |= {f"{name}.{plan.variants[place].name}": _entry(name, variants[place].graph) for place in chosen}
        rows[name] = {
            "evaluations": len(plan.keep),
            "macs_run": plan.macs_run,
            "variants": len(plan.variants),
            "launches": len(plan.launches),
            "cut": {
                f"{name}.{plan.variants[place].name}": {
                    "launches": launched[place],
                    "macs": plan.variants[place].macs,
                }
                for place in chosen
            },
        }
    shape = full.traced.shape
    document = {
        "model": Path(model).name,
        "granularity": granularity,
        "latent": [shape.height, shape.width],
        "batch": batch,
        "tables": True,
        "macs_full": full.plan.macs_full,
        "cases": rows,
        "graphs": entries,
    }
    (graphs / CASES).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _entry(directory: str, graph: Graph) -> dict[str, Any]:
    return {"directory": directory, "graph": graph.model_dump(mode="json")}


def sample(macs: Sequence[int], most: int) -> list[int]:
    """Places of up to ``most`` graphs: all, or of those smaller than the largest an even choice by their costs."""
    if len(macs) <= most:
        return list(range(len(macs)))
    smaller = sorted((place for place, cost in enumerate(macs) if cost < max(macs)), key=macs.__getitem__)
    return sorted({smaller[round(place * (len(smaller) - 1) / max(most - 1, 1))] for place in range(most)})


def read_case(case: str, model: str, granularity: Any) -> tuple[str, Schedule]:
    """Name and schedule of a ``--case``: ``NAME=FILE``, or ``random:STEPS:RATIO`` (of DDIM, seed 0)."""
    from dipgo_deploy.models.target import schedule_target
    from dipgo_deploy.schedule import builders

    if case.startswith("random:"):
        _, steps, ratio = case.split(":")
        target = schedule_target(model, "ddim", int(steps), granularity)
        gates = builders.random(target.steps, len(target.blocks), float(ratio), 0)
        return f"random{round(100 * float(ratio))}", target.schedule(gates, "random", {"ratio": float(ratio)})
    name, _, file = case.partition("=")
    return name, Schedule.load(Path(file))


@command.command(name="time")
@click.option("--graphs", type=_PATH, required=True, help="What `make` wrote.")
@click.option("--case", "cases", multiple=True, help="Only these.  [default: all]")
@click.option("--rounds", type=click.IntRange(min=2), default=5, show_default=True, help="Rounds that count.")
@click.option("--group", type=click.IntRange(min=1), default=3, show_default=True, help="Graphs beside the full one.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def time_(graphs: Path, cases: tuple[str, ...], rounds: int, group: int, collect: Path | None, as_json: bool) -> None:
    """Time each graph in turn with the full one, ``--group`` at a time, which is what must fit into memory."""
    console = human_console(as_json)
    document = json.loads((graphs / CASES).read_text(encoding="utf-8"))
    about = {key: document[key] for key in ("model", "granularity", "latent", "batch", "tables", "macs_full")}
    results = []
    for name, case in document["cases"].items():
        if cases and name not in cases:
            continue
        facts: dict[str, Any] = {**about, "case": name, "machine": machine(1), "rounds": rounds}
        names = list(case["cut"])
        ratios: dict[str, np.ndarray] = {}
        full: list[float] = []
        for start in range(0, len(names), group):
            together = [FULL, *names[start : start + group]]
            seconds = time_graphs(graphs, document["graphs"], together, rounds)
            full += list(seconds[FULL])
            ratios |= {one: seconds[one] / seconds[FULL] for one in together[1:]}
        facts |= summary(case, document["macs_full"], ratios, np.array(full))
        console.print(
            f"{about['model']} {name}: quotient {with_quartiles(facts['quotient'], 3)}", markup=False, soft_wrap=True
        )
        results.append(facts)
        if collect is not None:
            _add(collect, facts)
    emit({"rows": results}, as_json)


main = entry_point(command)


def _add(collect: Path, facts: dict[str, Any]) -> None:
    rows = sorted(with_earlier(collect, [facts], _key), key=lambda row: json.dumps(_key(row)))
    write_results(collect, rows, as_text(rows))


def _key(row: Mapping[str, Any]) -> list[Any]:
    return [row[key] for key in ("model", "latent", "batch", "granularity", "case")]


def time_graphs(folder: Path, graphs: Mapping[str, Any], names: Sequence[str], rounds: int) -> dict[str, np.ndarray]:
    """Processor seconds of one launch of each graph on one thread, (rounds,) each, in turn."""
    backend = OnnxRuntimeBackend("cpu", threads=1)
    calls: dict[str, Callable[[], float]] = {}
    for name in names:
        graph = Graph.model_validate(graphs[name]["graph"])
        calls[name] = _processor_time(_bound(backend, folder / graphs[name]["directory"], graph))
    seconds = alternate(calls, rounds, warmup=1)
    calls.clear()
    gc.collect()
    return seconds


def _bound(backend: OnnxRuntimeBackend, folder: Path, graph: Graph) -> Launchable:
    rng = np.random.default_rng(0)
    tensors = {spec.name: backend.allocate(spec.nbytes) for spec in (*graph.inputs, *graph.outputs)}
    for spec in graph.inputs:
        backend.upload(tensors[spec.name], _example(spec, rng))
    return backend.load(folder, graph).bind(tensors)


def _processor_time(call: Launchable) -> Callable[[], float]:
    """The call, returning the seconds of processor time of this thread, which other processes do not add to."""

    def run() -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return run


def _example(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    if spec.dtype == "int64":
        return np.zeros(spec.shape, np.int64)
    return rng.standard_normal(spec.shape, dtype=np.float32).astype(spec.dtype)


def summary(
    case: Mapping[str, Any], macs_full: int, ratios: Mapping[str, np.ndarray], full: np.ndarray
) -> dict[str, Any]:
    """What one case comes to.

    ratios: per graph, its seconds over the full graph's, round by round. Where only some graphs of the case were timed,
    their launches stand for all: both sums are over the timed ones.

    launch_share, macs_share: mean over the launches of a launch's time and multiply-accumulates, the full graph's
    being 1. quotient: macs_share / launch_share, which is the measured speed-up over the ideal one.
    """
    cut = case["cut"]
    launches = sum(row["launches"] for row in cut.values())
    macs = sum(row["launches"] * row["macs"] for row in cut.values()) / macs_full / launches
    per_round = sum(cut[name]["launches"] * values for name, values in ratios.items()) / launches
    share = spread(np.asarray(per_round))
    whole = len(cut) == case["variants"]
    result = {
        "evaluations": case["evaluations"],
        "launches": case["launches"],
        "variants": case["variants"],
        "timed": len(cut),
        "full_seconds": spread(full),
        "launch_share": share,
        "macs_share": macs,
        "quotient": spread(macs / np.asarray(per_round)),
        "graphs": {
            name: {**cut[name], "macs_share": cut[name]["macs"] / macs_full, "share": spread(values)}
            for name, values in ratios.items()
        },
    }
    ideal = case["evaluations"] * macs_full / case["macs_run"]
    result["ideal_speedup"] = ideal
    # Of a sample of the graphs: their time for a multiply-accumulate stands for the others'.
    result["speedup"] = (
        case["evaluations"] / (case["launches"] * share["median"]) if whole else ideal * result["quotient"]["median"]
    )
    return result


def _name(row: Mapping[str, Any]) -> str:
    height, width = row["latent"]
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    tables = "" if row.get("tables") else ", without tables"
    return f"{row['model']}, {8 * height}x{8 * width}, {row['granularity']}, {row['case']}{batch}{tables}"


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Speed-up and multiply-accumulates at full size\n",
        *machine_lines(rows, _name),
        "ONNX Runtime CPU, fp32, one image with guidance, random weights (time does not depend on them), exported as "
        "`dipgo-export` does by default, with tables of timesteps and a prologue, unless the row says "
        "`without tables`: it is from before there were any. Each graph of "
        "a schedule is launched in turn with the full graph; `share` is its time in the full graph's, round by round, "
        "median and quartiles; time is processor time of the one thread, because other processes share the machine. "
        "Speed-up: evaluations x full graph / all launches of the schedule. Ideal: the same of "
        "the multiply-accumulates in the plan. Quotient: of the two. Where a schedule has more graphs than were timed "
        "(`timed`), an even sample of them stands for all. Made by `python -m tools.bench.launches`.\n",
    ]
    lines, details = [], []
    for row in rows:
        case = _name(row)
        lines.append(
            (
                case,
                f"{row['launches']} of {row['evaluations']}",
                f"{row['timed']} of {row['variants']}",
                f"{row['macs_full'] / 1e9:.1f}",
                with_quartiles(row["full_seconds"], 2),
                f"{row['ideal_speedup']:.2f}",
                f"{row['speedup']:.2f}",
                with_quartiles(row["quotient"], 3),
                f"{row['rounds']}, {row['machine']['load_average']}",
            )
        )
        details += [
            (case, name.rpartition(".")[2], str(graph["launches"]), f"{graph['macs_share']:.3f}")
            + (with_quartiles(graph["share"], 3),)
            for name, graph in row["graphs"].items()
        ]
    headings = ("schedule", "launches", "graphs timed", "full, GMACs", "full, s", "ideal", "speed-up", "quotient")
    parts.append(table((*headings, "rounds, load"), lines))
    parts.append("## The graphs\n")
    parts.append(table(("schedule", "graph", "launches", "share of MACs", "share of time"), details))
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main(None))
