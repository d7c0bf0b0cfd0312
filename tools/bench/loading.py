"""Loading many graphs of one model: seconds, and how much memory they take, each in a process of its own.

python -m tools.bench.loading full=DIR segments=DIR variants=DIR:shared --one full --collect docs/results/loading.json
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.prologue import usual_class
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.runtime.memory import process_memory
from tools.bench.measure import in_another_process, machine, machine_line, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

MIB = 2**20
_PATH = click.Path(path_type=Path)


@click.command(name="loading")
@click.argument("directories", nargs=-1, required=True, metavar="NAME=DIR[:shared]...")
@click.option("--one", required=True, help="NAME of the directory with one graph, which the others are held against.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Processes of each, in turn.")
@click.option("--first-step/--no-first-step", default=True, show_default=True, help="Also run the first evaluation.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    directories: tuple[str, ...], one: str, repeats: int, first_step: bool, collect: Path | None, as_json: bool
) -> None:
    """Load engine directories on ONNX Runtime's CPU provider; ``:shared``: one memory-mapped copy for all sessions."""
    console = human_console(as_json)
    given = dict(item.split("=", 1) for item in directories)
    if one not in given:
        raise click.UsageError(f"--one {one}: not among {', '.join(given)}")
    facts: dict[str, Any] = {"machine": machine(1), "repeats": repeats, "one": one, "first_step": first_step}
    facts["model"] = Bundle.open(_folder(given[one])[0]).manifest.model.name.rsplit("/", 1)[-1]
    probes: dict[str, list[dict[str, float]]] = {name: [] for name in given}
    for turn in range(repeats + 1):
        for name, value in given.items():
            found = in_process_of_its_own(*_folder(value), first_step)
            console.print(f"{name}: {found}", markup=False, soft_wrap=True)
            if turn:  # the first round brings the files into the page cache
                probes[name].append(found)
    facts["rows"] = {}
    for name, value in given.items():
        plan = Bundle.open(_folder(value)[0]).manifest.plan
        facts["rows"][name] = {
            "graphs": len(plan.variants),
            "launches": len(plan.launches),
            "weights_bytes": (_folder(value)[0] / "graphs/weights.bin").stat().st_size,
            **{key: spread(np.array([probe[key] for probe in probes[name]])) for key in probes[name][0]},
        }
    if collect is not None:
        known = with_earlier(collect, [facts], itemgetter("model"))
        write_results(collect, known, as_text(known))
    console.print(_table(facts), markup=False, soft_wrap=True)
    emit(facts, as_json)


main = entry_point(command)


def probe(engine_dir: Path, shared: bool, first_step: bool) -> dict[str, float]:
    """Seconds to load and bind everything, and what that, and then the first evaluation, adds to this process (PSS)."""
    from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
    from dipgo_deploy.runtime.loop import DenoisingLoop

    before = process_memory().get("pss", 0)
    start, used = time.perf_counter(), time.process_time()
    bundle = Bundle.open(engine_dir)
    loop = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1, share_weights=shared))
    found = {
        "load_seconds": time.perf_counter() - start,
        "load_processor_seconds": time.process_time() - used,
        "loaded_bytes": float(process_memory().get("pss", 0) - before),
    }
    if first_step:
        _first_evaluation(bundle, loop)
        used = time.thread_time()
        _first_evaluation(bundle, loop)
        found["evaluation_seconds"] = time.thread_time() - used
        found["ran_bytes"] = float(process_memory().get("pss", 0) - before)
    return found


class _Stop(Exception):
    pass


def _first_evaluation(bundle: Bundle, loop: Any) -> None:
    launches = bundle.manifest.plan.launches
    last = max(place for place, launch in enumerate(launches) if launch.step == launches[0].step)

    def stop(done: int) -> None:
        if done == last:
            raise _Stop

    label = usual_class(bundle.manifest) or 0
    conditions = {
        spec.name: np.full(spec.shape, label if spec.source == "class" else 0, spec.dtype)
        for spec in bundle.manifest.conditions
    }
    with contextlib.suppress(_Stop):
        loop.run(np.zeros(loop.sample_shape, np.float32), conditions, on_launch=stop)


def _folder(value: str) -> tuple[Path, bool]:
    return Path(value.removesuffix(":shared")), value.endswith(":shared")


def in_process_of_its_own(engine_dir: Path, shared: bool, first_step: bool) -> dict[str, float]:
    """``probe`` of a directory, in another process."""
    call = (
        "import json; from pathlib import Path; from tools.bench.loading import probe; "
        f"print(json.dumps(probe(Path({str(engine_dir)!r}), {shared}, {first_step})))"
    )
    found: dict[str, float] = in_another_process(call)
    return found


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Loading many graphs of one model\n",
        "ONNX Runtime CPU, one thread; every row in processes of its own, in turn, files in the page cache. Loading: "
        "all sessions made and bound; seconds of wall time and of processor time (the machine had other work), median "
        "and quartiles. Memory: what that adds to the process (PSS), and after the first evaluation was run, too. `to "
        "one`: over the directory with one graph. Evaluation: processor seconds of the first one, where every block is "
        "computed, run for the second time. Made by `python -m tools.bench.loading`.\n",
    ]
    for facts in results:
        parts.append(f"## {facts['model']}\n\n{machine_line(facts['machine'])}. {facts['repeats']} rounds.\n")
        parts.append(_table(facts))
    return "\n".join(parts)


def _table(facts: Mapping[str, Any]) -> str:
    one = facts["rows"][facts["one"]]
    memory = "ran_bytes" if facts["first_step"] else "loaded_bytes"
    lines = []
    for name, row in facts["rows"].items():
        in_mib = [f"{row[key]['median'] / MIB:.0f}" for key in dict.fromkeys(("loaded_bytes", memory))]
        lines.append(
            (
                name,
                str(row["graphs"]),
                f"{row['weights_bytes'] / MIB:.0f}",
                with_quartiles(row["load_seconds"], 1),
                with_quartiles(row["load_processor_seconds"], 2),
                f"{row['load_processor_seconds']['median'] - one['load_processor_seconds']['median']:+.2f}",
                " / ".join(in_mib),
                f"{row['loaded_bytes']['median'] / one['loaded_bytes']['median']:.2f}",
                with_quartiles(row["evaluation_seconds"], 2) if facts["first_step"] else "-",
            )
        )
    headings = (
        "directory",
        "graphs",
        "weights, MiB",
        "loading, s",
        "processor, s",
        "beyond one, s",
        "memory loaded / ran, MiB",
        "to one",
        "evaluation, s",
    )
    return table(headings, lines)


if __name__ == "__main__":
    raise SystemExit(main(None))
