"""One whole loop of two engine directories of a full-size model, and what the runtime takes beside its graphs.

python -m tools.bench.whole --full DIR --pruned DIR --collect docs/results/whole.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench.loops import MeasuredLoop
from tools.bench.measure import machine, machine_line
from tools.bench.tables import table, with_earlier, write_results

_PATH = click.Path(path_type=Path)


@click.command(name="whole")
@click.option("--full", type=_PATH, required=True, help="Engine directory of the full schedule.")
@click.option("--pruned", type=_PATH, required=True, help="Engine directory of a schedule.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Loops of each, in turn.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(full: Path, pruned: Path, repeats: int, collect: Path | None, as_json: bool) -> None:
    """Run both loops in turn on one thread, the pruned one first."""
    console = human_console(as_json)
    loops = {
        "pruned": MeasuredLoop(pruned, 1, clock=time.thread_time),
        "full": MeasuredLoop(full, 1, clock=time.thread_time),
    }
    manifest = Bundle.open(full).manifest
    facts: dict[str, Any] = {
        "model": manifest.model.name.rsplit("/", 1)[-1],
        "latent": [manifest.latent.height, manifest.latent.width],
        "machine": machine(1),
        "loops": {},
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            start = time.perf_counter()
            used = loop.run()
            runs[name].append(
                {
                    "seconds": time.perf_counter() - start,
                    "processor_seconds": used,
                    "beside_us": (used - loop.inside[-1]) / len(loop.manifest.plan.launches) * 1e6,
                }
            )
            console.print(f"{name}: {runs[name][-1]}", markup=False)
    for name, loop in loops.items():
        plan = loop.manifest.plan
        facts["loops"][name] = {
            "launches": len(plan.launches),
            "evaluations": plan.evaluations,
            "macs_run": plan.macs_run,
            **min(runs[name], key=lambda run: run["processor_seconds"]),
        }
    one, other = facts["loops"]["full"], facts["loops"]["pruned"]
    facts["speedup"] = one["processor_seconds"] / other["processor_seconds"]
    facts["ideal_speedup"] = one["macs_run"] / other["macs_run"]
    if collect is not None:
        known = with_earlier(collect, [facts], itemgetter("model", "latent"))
        write_results(collect, known, as_text(known))
    emit(facts, as_json)


main = entry_point(command)


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Whole loops at full size\n",
        "ONNX Runtime CPU, fp32, one thread, one image with guidance, random weights. Seconds of processor time, wall "
        "time in brackets (the machine had other work). Beside: microseconds of processor time a launch takes beyond "
        "its bare run: uploads, the Python loop, the last weighted sum. Made by `python -m tools.bench.whole`.\n",
    ]
    for facts in results:
        height, width = facts["latent"]
        parts.append(f"## {facts['model']}, {8 * height}x{8 * width}\n\n{machine_line(facts['machine'])}.\n")
        parts.append(
            table(
                ("loop", "launches", "GMACs", "seconds", "beside, us"),
                [
                    (
                        name,
                        f"{loop['launches']} of {loop['evaluations']}",
                        f"{loop['macs_run'] / 1e9:.0f}",
                        f"{loop['processor_seconds']:.1f} ({loop['seconds']:.1f})",
                        f"{loop['beside_us']:.0f}",
                    )
                    for name, loop in facts["loops"].items()
                ],
            )
        )
        quotient = facts["speedup"] / facts["ideal_speedup"]
        parts.append(f"Speed-up {facts['speedup']:.2f}, ideal {facts['ideal_speedup']:.2f}, quotient {quotient:.3f}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main(None))
