"""The layouts ``variants`` and ``segments`` of one random schedule: time, loading, memory and weights.

Run from the repository's root: ``python -m tools.bench.layouts --out docs/results/layouts.json``.
Loading and memory are measured in a process of its own for each layout: memory that was given back is not seen again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, weights_of
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.runtime.memory import process_memory
from tools.bench.loops import MeasuredLoop
from tools.bench.measure import alternate, denoiser_hash, in_another_process, machine, machine_line, spread
from tools.bench.tables import table, with_quartiles, write_results

MIB = 2**20
MODELS = ("fashion-sd", "fashion-dit")
# name: (layout, whether all sessions use the memory-mapped file, which ONNX Runtime then does not prepack)
KINDS = {"variants": ("variants", False), "variants, shared": ("variants", True), "segments": ("segments", False)}


@click.command(name="layouts")
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, help="Built-in model.  [default: both]")
@click.option("--steps", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--ratio", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share of gates removed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random schedule.")
@click.option("--repeats", type=click.IntRange(min=3), default=15, show_default=True, help="Rounds that count.")
@click.option("--loads", type=click.IntRange(min=1), default=3, show_default=True, help="Processes that load.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of a launch.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Results (.json, and .md beside it).")
@json_option
def command(
    models: tuple[str, ...],
    steps: int,
    ratio: float,
    seed: int,
    repeats: int,
    loads: int,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time both layouts of a random schedule in turn; load each in processes of their own."""
    from dipgo_deploy.reference.quiet import quiet_libraries

    quiet_libraries()
    console = human_console(as_json)
    facts: dict[str, Any] = {
        "machine": machine(threads),
        "steps": steps,
        "ratio": ratio,
        "seed": seed,
        "repeats": repeats,
        "loads": loads,
        "models": {},
    }
    for model in models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            console.print(f"{model}: exporting", markup=False)
            paths = export_both(model, steps, ratio, seed, Path(folder))
            console.print(f"{model}: measuring", markup=False)
            facts["models"][model] = {"weights_sha256": denoiser_hash(model), **measure(paths, repeats, loads, threads)}
    if out is not None:
        write_results(out, facts, as_text(facts))
    emit(facts, as_json)


def export_both(model: str, steps: int, ratio: float, seed: int, folder: Path) -> dict[str, Path]:
    """Engine directories of both layouts from one trace, the denoiser only."""
    from dipgo_deploy.export.exporter import ExportOptions, in_layout, plan_export
    from dipgo_deploy.models.target import schedule_target
    from dipgo_deploy.schedule import builders
    from tools.bench.pairs import write_engine

    target = schedule_target(model, "ddim", steps, "block", None)
    gates = builders.random(target.steps, len(target.blocks), ratio, seed)
    schedule = target.schedule(gates, "random", {"ratio": ratio, "seed": seed})
    planned = plan_export(model, schedule, ExportOptions(layout="variants", components=False))
    segments = in_layout(planned, "segments")
    paths = {"variants": folder / "variants", "segments": folder / "segments"}
    write_engine(planned, paths["variants"])
    write_engine(segments, paths["segments"])
    return paths


def measure(paths: Mapping[str, Path], repeats: int, loads: int, threads: int) -> dict[str, Any]:
    """Per kind: what its directory holds, loop milliseconds, load seconds and memory."""
    probes = {
        kind: [_in_process_of_its_own(paths[layout], threads, shared) for _ in range(loads)]
        for kind, (layout, shared) in KINDS.items()
    }
    loops = {kind: MeasuredLoop(paths[layout], threads, shared) for kind, (layout, shared) in KINDS.items()}
    seconds = alternate({kind: loop.run for kind, loop in loops.items()}, repeats)
    facts: dict[str, Any] = {}
    for kind, (layout, _) in KINDS.items():
        plan = loops[kind].manifest.plan
        inside = np.array(loops[kind].inside[-repeats:])
        launches = len(plan.launches)
        facts[kind] = {
            **bytes_of_weights(paths[layout]),
            "graphs": len(plan.variants),
            "launches": launches,
            "steps_with_launches": len({launch.step for launch in plan.launches}),
            "macs": plan.macs_run,
            "arena_bytes": plan.arena_bytes,
            "loop_ms": spread(seconds[kind] * 1e3),
            "step_ms": spread(seconds[kind] * 1e3 / plan.evaluations),
            "to_variants": spread(seconds[kind] / seconds["variants"]),
            "overhead_us": spread((seconds[kind] - inside) / launches * 1e6),
            "load_seconds": spread(np.array([probe["load_seconds"] for probe in probes[kind]])),
            "memory_bytes": spread(np.array([probe["memory_bytes"] for probe in probes[kind]])),
        }
    return facts


def bytes_of_weights(engine_dir: Path) -> dict[str, int]:
    """Bytes of the external weights, once in the file, and summed over the graphs that refer to them."""
    variants = Bundle.open(engine_dir).manifest.plan.variants
    index = json.loads((engine_dir / "graphs" / WEIGHTS_INDEX).read_text())["tensors"]
    return {
        "weights_bytes": sum(tensor["length"] for tensor in index.values()),
        "summed_weights_bytes": sum(
            stored.length for variant in variants for stored in weights_of(engine_dir / variant.graph.file).values()
        ),
    }


def probe(engine_dir: Path, threads: int, shared: bool) -> dict[str, float]:
    """Seconds to load the loop, and what it and one run add to this process's memory (PSS)."""
    before = process_memory().get("pss", 0)
    start = time.perf_counter()
    loop = MeasuredLoop(engine_dir, threads, shared)
    seconds = time.perf_counter() - start
    loop.run()
    return {"load_seconds": seconds, "memory_bytes": process_memory().get("pss", 0) - before}


def _in_process_of_its_own(engine_dir: Path, threads: int, shared: bool) -> dict[str, float]:
    call = (
        "import json; from pathlib import Path; from tools.bench.layouts import probe; "
        f"print(json.dumps(probe(Path({str(engine_dir)!r}), {threads}, {shared})))"
    )
    found: dict[str, float] = in_another_process(call)
    return found


def as_text(facts: Mapping[str, Any]) -> str:
    """The results for readers."""
    rows = [(model, kind, row) for model, case in facts["models"].items() for kind, row in _kinds(case)]
    return "\n".join(
        (
            "# Layouts: variants and segments\n",
            f"{machine_line(facts['machine'])}.\n",
            f"ONNX Runtime CPU, fp32, one image with guidance, DDIM with {facts['steps']} steps, a random schedule "
            f"that removes {facts['ratio']:.0%} of the gates (seed {facts['seed']}): the case with the most variants. "
            f"{facts['repeats']} rounds, in each of which every loop runs once, in turn; median, quartiles in "
            "brackets. The machine had other work (see its load), so times across tables do not compare; the ratio "
            "is taken round by round. `shared`: all sessions use the memory-mapped weights (`--share-weights`), which "
            "ONNX Runtime then cannot re-lay-out. Made by `python -m tools.bench.layouts --out "
            "docs/results/layouts.json`.\n",
            table(
                ("model, layout", "graphs", "launches", "GMACs", "step, ms", "to variants", "beside its graphs, us"),
                [_time_row(*row) for row in rows],
            ),
            "Step: the loop divided by the steps of the sampler. Beside its graphs: what the loop takes per launch "
            "beyond the launch itself.\n",
            f"Loading and memory, in {facts['loads']} fresh processes each: seconds until all sessions are bound, and "
            "what they and one run add to the process's memory (PSS). Weights: one copy, as on disk, and summed over "
            "the graphs, which is what engines that share nothing hold.\n",
            table(
                ("model, layout", "load, s", "memory, MiB", "arena, KiB", "weights, MiB", "summed weights, MiB"),
                [_memory_row(*row) for row in rows],
            ),
        )
    )


def _kinds(case: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(kind, case[kind]) for kind in KINDS]


def _time_row(model: str, kind: str, row: Mapping[str, Any]) -> Sequence[str]:
    return (
        f"{model}, {kind}",
        str(row["graphs"]),
        str(row["launches"]),
        f"{row['macs'] / 1e9:.3f}",
        with_quartiles(row["step_ms"], 2),
        with_quartiles(row["to_variants"], 2),
        with_quartiles(row["overhead_us"], 0),
    )


def _memory_row(model: str, kind: str, row: Mapping[str, Any]) -> Sequence[str]:
    memory = {name: value / MIB for name, value in row["memory_bytes"].items()}
    return (
        f"{model}, {kind}",
        with_quartiles(row["load_seconds"], 2),
        with_quartiles(memory, 0),
        f"{row['arena_bytes'] / 1024:.0f}",
        f"{row['weights_bytes'] / MIB:.1f}",
        f"{row['summed_weights_bytes'] / MIB:.1f}",
    )


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
