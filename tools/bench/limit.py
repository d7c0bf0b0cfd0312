"""A loop against its limit: against bare runs of its graphs, and the graphs against what the machine can do.

    python -m tools.bench.limit fashion-dit --schedule fashion-dit-ddim50-10 --collect docs/results/limit.json
    python -m tools.bench.limit sd-1.5-512 --height 256 --steps 5 --work FOLDER --threads 2 --collect ...

Peers are in ``tools.bench.peers``.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.base import Backend, ChangedWeights, Executable, Launchable, Memory
from dipgo_deploy.bench.profile import block_modules, profile_loop
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.schedule.built_in import schedule_file
from dipgo_deploy.schedule.document import Schedule
from tools.bench.ceiling import Ceiling, Work, measured, total, work_of
from tools.bench.loops import GUIDANCE_SCALE, loop_inputs
from tools.bench.measure import TimedBackend, machine, machine_line, spread
from tools.bench.pairs import write_engine
from tools.bench.peers import contest, model_of
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

_PATH = click.Path(path_type=Path)
BACKENDS = ("cpu", "openvino")
NAMES = {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}


@click.command(name="limit")
@click.argument("model")
@click.option("--schedule", type=_PATH, help="File or built-in schedule. [default: the peers' of this model]")
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True, help="Without --schedule.")
@click.option("--interval", type=click.IntRange(min=2), default=5, show_default=True, help="Without --schedule.")
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--work", type=_PATH, help="Folder for models of tools.full_size: kept there, and used again.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=25, show_default=True, help="Rounds at most.")
@click.option("--minutes", type=float, default=6, show_default=True, help="Of all rounds, three at least.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    model: str,
    schedule: Path | None,
    steps: int,
    interval: int,
    height: int | None,
    work: Path | None,
    threads: int,
    repeats: int,
    minutes: float,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Time the loop of MODEL (built-in, a folder, or a name of tools.full_size), its graphs, and the machine."""
    quiet_libraries()
    console = human_console(as_json)
    folder = model_of(model, work, console.print)
    console.print(f"{model}: exporting", markup=False)
    name = schedule.stem if schedule else f"every {interval}"
    with tempfile.TemporaryDirectory() as temporary:
        engine_dir = Path(temporary) / "engine"
        if schedule is None:
            write_engine(contest(folder, steps, interval, height).planned, engine_dir)
        else:
            options = ExportOptions(layout="variants", components=False, check=False, height=height, width=height)
            write_engine(plan_export(folder, Schedule.load(schedule_file(schedule)), options), engine_dir)
        gc.collect()  # the model in PyTorch
        measured_facts = limit(Bundle.open(engine_dir), threads, repeats, minutes, console.print)
    facts = {"model": model, "schedule": name, **measured_facts}
    console.print(as_text([facts]), markup=False, soft_wrap=True)
    if collect is not None:
        rows = with_earlier(collect, [facts], _key)
        write_results(collect, {"rows": rows}, as_text(rows))
    emit(facts, as_json)


main = entry_point(command)


def _key(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in ("model", "schedule", "latent", "evaluations")] + [row["machine"]["threads"]]


def limit(bundle: Bundle, threads: int, repeats: int, minutes: float, notify: Callable[[str], None]) -> dict[str, Any]:
    """All that is measured of one engine directory."""
    plan = bundle.manifest.plan
    notify("the machine's own limit")
    ceiling = measured(threads)
    modules = block_modules(bundle)
    works = [work_of(bundle.path / variant.graph.file, modules) for variant in plan.variants]
    counts = [sum(launch.variant == place for launch in plan.launches) for place in range(len(plan.variants))]
    backends: dict[str, Any] = {}
    for backend in BACKENDS:
        notify(f"{NAMES[backend]}: loops and bare graphs in turn")
        try:
            created = create_backend(backend, threads=threads)
            backends[backend] = _rounds(bundle, created, counts, repeats, 60 * minutes / len(BACKENDS))
        except UserError as error:
            backends[backend] = {"missing": str(error)[:200]}
    notify("kernels by block")
    kernels = profile_loop(bundle, repeats=1, threads=threads)
    return {
        "latent": [bundle.manifest.latent.height, bundle.manifest.latent.width],
        "evaluations": plan.evaluations,
        "launches": len(plan.launches),
        "machine": machine(threads),
        "ceiling": {"macs_per_second": ceiling.macs, "bytes_per_second": ceiling.read},
        "backends": backends,
        "graphs": [
            _graph(variant.name, count, ceiling, total(work), place, backends)
            for place, (variant, count, work) in enumerate(zip(plan.variants, counts, works, strict=True))
        ],
        "blocks": _blocks(works, counts, ceiling, kernels.blocks),
        "operators": dict(list(kernels.operators.items())[:8]),
    }


def _rounds(bundle: Bundle, backend: Backend, counts: Sequence[int], repeats: int, seconds: float) -> dict[str, Any]:
    """Of each round: a whole loop, and each graph alone, twice in a row, of which the second is timed."""
    recorded = _Recorder(backend)
    start = time.perf_counter()
    loop = DenoisingLoop(bundle, recorded)
    load = time.perf_counter() - start
    noise, conditions = loop_inputs(loop.sample_shape, bundle.manifest)
    files = [variant.graph.file for variant in bundle.manifest.plan.variants]
    values: dict[str, list[Any]] = {"loop": [], "inside": [], "uploads": [], "bare": []}
    inside_loop: dict[str, dict[str, list[float]]] = {file: {"itself": [], "another": []} for file in files}
    first = 0.0
    end = time.monotonic() + seconds
    for number in range(repeats + 1):
        recorded.log.clear()
        before, uploaded = recorded.seconds, recorded.uploads
        start = time.perf_counter()
        loop.run(noise, conditions, guidance_scale=GUIDANCE_SCALE)
        whole, inside = time.perf_counter() - start, recorded.seconds - before
        uploaded = recorded.uploads - uploaded
        bare = []
        for file in files:
            for _ in range(2):
                start = time.perf_counter()
                recorded.calls[file]()
                last = time.perf_counter() - start
            bare.append(last)
        if not number:
            first = whole  # touches all memory
            continue
        for key, value in zip(values, (whole, inside, uploaded, bare), strict=True):
            values[key].append(value)
        for (file_before, _), (file, spent) in pairwise(recorded.log):
            inside_loop[file]["itself" if file == file_before else "another"].append(spent)
        if number >= 3 and time.monotonic() > end:
            break
    loops, launches, uploads, graphs = (np.array(found) for found in values.values())
    alone = graphs @ np.array(counts)
    return {
        "load_seconds": load,
        "first_loop_seconds": first,
        "rounds": len(loops),
        "loop_seconds": spread(loops),
        "loop_over_bare": spread(loops / alone),
        "inside_over_bare": spread(launches / alone),
        "loop_over_inside": spread(loops / launches),
        "upload_seconds": spread(uploads),
        "other_host_seconds": spread(loops - launches - uploads),
        "graph_seconds": [spread(one) for one in graphs.T],
        "after": [{name: spread(np.array(v)) for name, v in inside_loop[file].items() if v} for file in files],
    }


class _Recorder(TimedBackend):
    """Keeps a bound call of each graph that is loaded, by file; writes down launches (file, seconds) and uploads."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.calls: dict[str, Launchable] = {}
        self.log: list[tuple[str, float]] = []
        self.uploads = 0.0

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """As the wrapped backend, timed."""
        start = time.perf_counter()
        super().upload(memory, array)
        self.uploads += time.perf_counter() - start

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> Executable:
        """As the wrapped backend; what is bound is kept."""
        return _Recorded(super().load(engine_dir, graph, weights), self)


class _Recorded:
    def __init__(self, inner: Executable, recorder: _Recorder) -> None:
        self.graph, self.inner, self._recorder = inner.graph, inner, recorder

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        call, file, log = self.inner.bind(tensors, graph), self.graph.file, self._recorder.log
        self._recorder.calls[file] = call

        def launch() -> None:
            start = time.perf_counter()
            call()
            log.append((file, time.perf_counter() - start))

        return launch


def _graph(
    name: str, launches: int, ceiling: Ceiling, work: Work, place: int, backends: Mapping[str, Any]
) -> dict[str, Any]:
    least = ceiling.seconds(work)
    found = {backend: facts["graph_seconds"][place] for backend, facts in backends.items() if "missing" not in facts}
    return {
        "name": name,
        "launches": launches,
        "macs": work.macs,
        "bytes": work.nbytes,
        "least_seconds": least,
        "seconds": found,
        "times_least": {backend: value["median"] / least for backend, value in found.items()},
    }


def _blocks(
    works: Sequence[Mapping[str, Work]], counts: Sequence[int], ceiling: Ceiling, seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Each block over all launches of a loop, beside the profiler's seconds of its kernels."""
    asked: dict[str, Work] = defaultdict(lambda: Work(0, 0))
    for work, count in zip(works, counts, strict=True):
        for block, part in work.items():
            asked[block] += part.times(count)
    return [
        {
            "name": block,
            "macs": asked[block].macs,
            "bytes": asked[block].nbytes,
            "least_seconds": ceiling.seconds(asked[block]),
            "seconds": spent,
        }
        for block, spent in seconds.items()
    ]


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Against the limit\n",
        "fp32, one image with guidance, random weights where a model is not built in. In each round a whole loop, "
        "then each graph alone, twice in a row, of which the second is timed; median, quartiles in brackets. `loop "
        "/ bare`: of the loop's time to that of its graphs alone, each as often as it is launched. `launches / "
        "bare`: of the same launches inside the loop, which find their weights out of the processor's caches. `loop "
        "/ launches`: what the runtime adds. `least`: the longer of multiply-accumulates over the best matrix "
        "product measured here, and bytes (weights, what comes in, what goes out) over the measured speed of "
        "memory; what is in the processor's caches comes faster than that. Blocks: their kernels in a loop as ONNX "
        "Runtime's profiler has them, over their least. Where a loop's own time goes: `first` is the first one "
        "after loading, which touches all memory; `uploads` and `other host` are microseconds a loop beside its "
        "launches; `after itself` and `after another` are launches inside the loop by the graph that ran before. "
        "Threads that wake up show between runs with one and with two `--threads`. Two sessions of one graph do not "
        "take quite the same time (5 % apart where tried), so that a graph alone may seem slower than in the loop. "
        "Made by `python -m tools.bench.limit`.\n",
        "`loop / least`: of the loop's time to the least of its launches. `saved by MACs`, `by least`: how many times "
        "as much the full graph would take for every evaluation, counted in multiply-accumulates, and in the least "
        "time.\n",
        table(_SUMMARY, [_summary_cells(row) for row in rows]),
    ]
    for row in rows:
        height, width = row["latent"]
        ceiling = row["ceiling"]
        parts.append(
            f"## {row['model']}, {row['schedule']}, {height}x{width} latents, {row['launches']} launches of "
            f"{row['evaluations']}, {row['machine']['threads']} threads\n\n{machine_line(row['machine'])}.\n\n"
            f"Best product: {ceiling['macs_per_second'] / 1e9:.1f} billion multiply-accumulates a second; memory: "
            f"{ceiling['bytes_per_second'] / 1e9:.1f} GB a second.\n"
        )
        parts.append(table(_LOOP, [_loop_cells(NAMES[name], facts) for name, facts in row["backends"].items()]))
        parts.append(table(_GRAPH, [_graph_cells(graph) for graph in row["graphs"]]))
        parts.append(table(_AFTER, _after_rows(row)))
        shown = sorted(row["blocks"], key=lambda block: block["least_seconds"] - block["seconds"])[:_SHOWN]
        whole = sum(block["seconds"] for block in row["blocks"])
        parts.append(table(_BLOCK, [_block_cells(block, whole) for block in shown]))
        operators = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in row["operators"].items())
        parts.append(f"Kernels by operator: {operators}.\n")
    return "\n".join(parts)


_SUMMARY = (
    *("model, schedule", "threads", "launches", "graphs", "ONNX Runtime, s", "loop / bare", "loop / least"),
    *("OpenVINO, s", "to ONNX Runtime", "saved by MACs", "by least"),
)
_LOOP = (
    *("loop", "seconds", "first, s", "loop / bare", "launches / bare", "loop / launches", "uploads, us"),
    *("other host, us", "load, s", "rounds", "not run because"),
)
_GRAPH = (
    "graph",
    "launches",
    "GMACs",
    "MB",
    "least, ms",
    "ONNX Runtime, ms",
    "over least",
    "OpenVINO, ms",
    "over least",
)
_BLOCK = ("block (farthest first)", "GMACs", "MB", "least, ms", "kernels, ms", "over least", "share of kernels")
_AFTER = ("graph", "backend", "alone, ms", "after itself, ms", "after another, ms")
_SHOWN = 12


def _summary_cells(row: Mapping[str, Any]) -> Sequence[str]:
    graphs = row["graphs"]
    full = max(graphs, key=lambda graph: graph["macs"])
    macs, least = (sum(graph[key] * graph["launches"] for graph in graphs) for key in ("macs", "least_seconds"))
    seconds = {
        name: None if "missing" in facts else facts["loop_seconds"]["median"] for name, facts in row["backends"].items()
    }
    ours, other = (seconds[name] for name in BACKENDS)
    own = row["backends"][BACKENDS[0]]
    return (
        f"{row['model']}, {row['schedule']}",
        str(row["machine"]["threads"]),
        str(row["launches"]),
        str(len(graphs)),
        *(
            ["-"] * 3
            if ours is None
            else [f"{ours:.4f}", with_quartiles(own["loop_over_bare"], 3), f"{ours / least:.2f}"]
        ),
        *("-" if other is None else f"{other:.4f}", "-" if ours is None or other is None else f"{other / ours:.2f}"),
        f"{full['macs'] * row['evaluations'] / macs:.2f}",
        f"{full['least_seconds'] * row['evaluations'] / least:.2f}",
    )


def _loop_cells(name: str, facts: Mapping[str, Any]) -> Sequence[str]:
    if "missing" in facts:
        return (name, *["-"] * (len(_LOOP) - 2), facts["missing"])
    ratios = ("loop_over_bare", "inside_over_bare", "loop_over_inside")
    return (
        name,
        with_quartiles(facts["loop_seconds"], 4),
        f"{facts['first_loop_seconds']:.4f}",
        *(with_quartiles(facts[ratio], 3) for ratio in ratios),
        *(f"{facts[part]['median'] * 1e6:.0f}" for part in ("upload_seconds", "other_host_seconds")),
        f"{facts['load_seconds']:.2f}",
        str(facts["rounds"]),
        "",
    )


def _graph_cells(graph: Mapping[str, Any]) -> Sequence[str]:
    cells = [graph["name"], str(graph["launches"]), f"{graph['macs'] / 1e9:.3f}", f"{graph['bytes'] / 1e6:.1f}"]
    cells.append(f"{graph['least_seconds'] * 1e3:.3f}")
    for backend in BACKENDS:
        known = graph["seconds"].get(backend)
        cells += (
            ["-", "-"] if known is None else [f"{known['median'] * 1e3:.3f}", f"{graph['times_least'][backend]:.2f}"]
        )
    return cells


def _after_rows(row: Mapping[str, Any]) -> list[Sequence[str]]:
    found: list[Sequence[str]] = []
    for place, graph in enumerate(row["graphs"][:_SHOWN]):
        for name, facts in row["backends"].items():
            if "missing" not in facts:
                after = facts["after"][place]
                times = (facts["graph_seconds"][place], after.get("itself"), after.get("another"))
                cells = ("-" if time is None else f"{time['median'] * 1e3:.3f}" for time in times)
                found.append((graph["name"], NAMES[name], *cells))
    return found


def _block_cells(block: Mapping[str, Any], whole: float) -> Sequence[str]:
    return (
        block["name"],
        f"{block['macs'] / 1e9:.3f}",
        f"{block['bytes'] / 1e6:.1f}",
        f"{block['least_seconds'] * 1e3:.3f}",
        f"{block['seconds'] * 1e3:.3f}",
        f"{block['seconds'] / block['least_seconds']:.2f}" if block["least_seconds"] else "-",
        f"{block['seconds'] / whole:.1%}",
    )


if __name__ == "__main__":
    raise SystemExit(main(None))
