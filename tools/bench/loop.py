"""Full loop and pruned loop in one run: measured speed-up beside the ideal one, and what the runtime itself costs.

Run from the repository's root: ``python -m tools.bench.loop --out docs/results/loop.json``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.export.exporter import ExportOptions
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.schedule.document import Schedule
from tools.bench.loops import compare_loops
from tools.bench.measure import denoiser_hash, machine, machine_line
from tools.bench.pairs import SCHEDULES, export_pair
from tools.bench.tables import table, with_quartiles, write_results

CASES = {
    "fashion-sd-ddim50": "fashion-sd",
    "fashion-sd-pndm50": "fashion-sd",
    "fashion-dit-uniform5": "fashion-dit",
    "fashion-dit-random50": "fashion-dit",
}
_LAYOUTS = ("auto", "variants", "segments")


@click.command(name="loop")
@click.option(
    "--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Shipped schedule.  [default: all]"
)
@click.option("--layout", type=click.Choice(_LAYOUTS), default="auto", show_default=True, help="As dipgo-export's.")
@click.option("--repeats", type=click.IntRange(min=3), default=25, show_default=True, help="Rounds that count.")
@click.option("--threads", type=click.IntRange(min=1), multiple=True, help="CPU threads.  [default: 1, and 2]")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Results (.json, and .md beside it).")
@json_option
def command(
    cases: tuple[str, ...], layout: Any, repeats: int, threads: tuple[int, ...], out: Path | None, as_json: bool
) -> None:
    """Time full and pruned loops of the built-in models in turn with each other and with bare session runs."""
    quiet_libraries()
    console = human_console(as_json)
    facts: dict[str, Any] = {"machine": machine(None), "repeats": repeats, "cases": {}}
    for name in cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            console.print(f"{name}: exporting", markup=False)
            schedule = Schedule.load(SCHEDULES / f"{name}.json")
            pair = export_pair(CASES[name], schedule, Path(folder), ExportOptions(layout=layout))
            case: dict[str, Any] = {
                "model": CASES[name],
                "weights_sha256": denoiser_hash(CASES[name]),
                "trace_seconds": pair.trace_seconds,
                "full_export_seconds": pair.full_seconds,
                "pruned_export_seconds": pair.pruned_seconds,
                "threads": {},
            }
            for count in threads or (1, 2):
                result = compare_loops(pair.full, pair.pruned, repeats, count)
                case["threads"][str(count)] = result
                console.print(f"{name}, {count} threads: {_line(result)}", markup=False, soft_wrap=True)
        facts["cases"][name] = case
    if out is not None:
        write_results(out, facts, as_text(facts))
    emit(facts, as_json)


main = entry_point(command)


def _line(result: Mapping[str, Any]) -> str:
    return (
        f"{with_quartiles(result['full']['loop_ms'], 1)} ms -> {with_quartiles(result['pruned']['loop_ms'], 1)} ms, "
        f"speed-up {result['speedup']['median']:.2f}, ideal {result['ideal_speedup']:.2f}, "
        f"quotient {result['quotient']:.3f}"
    )


def as_text(facts: Mapping[str, Any]) -> str:
    """The results for readers."""
    runs = [(name, count, result) for name, case in facts["cases"].items() for count, result in case["threads"].items()]
    return "\n".join(
        (
            "# Full loop and pruned loop\n",
            f"{machine_line(facts['machine'])}.\n",
            f"ONNX Runtime CPU, fp32, one image with guidance, {facts['repeats']} rounds: in each round every loop and "
            "every set of bare runs once, in turn. Median, quartiles in brackets. Speed-up: full loop / pruned loop, "
            "round by round; ideal: the same ratio of the multiply-accumulates. Layout: of the pruned loop, as "
            "`dipgo-export --layout auto` chooses it. Made by `python -m tools.bench.loop "
            "--out docs/results/loop.json`.\n",
            table(
                ("schedule", "layout", "threads", "full, ms", "pruned, ms", "speed-up", "ideal", "quotient"),
                [_speed_row(name, count, result) for name, count, result in runs],
            ),
            "## What the runtime costs\n",
            "Microseconds per launch that a loop takes beyond its graphs. `inside`: against the time its own launches "
            "took in the same run (uploads, the last weighted sum and the Python loop are what remains). `bare`: "
            "against bare `run_with_iobinding` calls on sessions of their own in the same round; two sets of sessions "
            "never take quite the same time, so that this one can be negative. Load: all sessions of the denoiser.\n",
            table(
                ("schedule", "threads", "loop", "launches", "graphs", "load, s", "inside, us", "bare, us"),
                [
                    _cost_row(name, count, kind, result[kind])
                    for name, count, result in runs
                    for kind in ("full", "pruned")
                ],
            ),
            "## Export\n",
            "Seconds. Trace: loading, tracing and planning, once for both. Full, pruned: cutting, checking against the "
            "supernet, text encoder and VAE, writing.\n",
            table(
                ("schedule", "trace", "full", "pruned"),
                [_export_row(name, case) for name, case in facts["cases"].items()],
            ),
        )
    )


def _speed_row(name: str, threads: str, result: Mapping[str, Any]) -> Sequence[str]:
    return (
        name,
        result["pruned"]["layout"],
        threads,
        with_quartiles(result["full"]["loop_ms"], 1),
        with_quartiles(result["pruned"]["loop_ms"], 1),
        with_quartiles(result["speedup"], 2),
        f"{result['ideal_speedup']:.2f}",
        f"{result['quotient']:.3f}",
    )


def _cost_row(name: str, threads: str, kind: str, loop: Mapping[str, Any]) -> Sequence[str]:
    return (
        name,
        threads,
        kind,
        str(loop["launches"]),
        str(loop["variants"]),
        f"{loop['load_seconds']:.2f}",
        with_quartiles(loop["overhead_us"], 0),
        with_quartiles(loop["overhead_to_bare_us"], 0),
    )


def _export_row(name: str, case: Mapping[str, Any]) -> Sequence[str]:
    keys = ("trace_seconds", "full_export_seconds", "pruned_export_seconds")
    return (name, *(f"{case[key]:.1f}" for key in keys))


if __name__ == "__main__":
    raise SystemExit(main(None))
