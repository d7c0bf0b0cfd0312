"""Guidance in one launch of both halves, or in two of one half: time, and the most memory.

python -m tools.bench.guidance_batch --both DIR --halves DIR --collect docs/results/guidance-batch.json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.difference import relative_error
from dipgo_deploy.errors import UserError
from tools.bench.measure import in_another_process, machine, machine_line, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

MIB = 2**20
_PATH = click.Path(path_type=Path)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@click.command(name="guidance-batch")
@click.option("--both", type=_PATH, required=True, help="Engine directory whose launches have both halves.")
@click.option("--halves", type=_PATH, required=True, help="The same model and schedule with --guidance-batch 1.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Processes of each, in turn.")
@click.option("--loops", type=click.IntRange(min=1), default=2, show_default=True, help="Loops timed in each process.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of ONNX Runtime.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    both: Path, halves: Path, rounds: int, loops: int, threads: int, collect: Path | None, as_json: bool
) -> None:
    """Run the loops of two engine directories on ONNX Runtime's CPU provider, whose weights lie in memory once."""
    console = human_console(as_json)
    given = {"both halves": both, "one half": halves}
    for (name, folder), batch in zip(given.items(), (2, 1), strict=True):
        manifest = Bundle.open(folder).manifest
        if not manifest.guidance or manifest.guidance_batch != batch:
            raise UserError(f"{folder}: no launches of {name} of guidance; export with --guidance-batch {batch}")
    manifest = Bundle.open(both).manifest
    found: dict[str, list[dict[str, float]]] = {name: [] for name in given}
    with tempfile.TemporaryDirectory() as aside:
        latents = {name: Path(aside) / f"{place}.npy" for place, name in enumerate(given)}
        for turn in range(rounds + 1):
            for name, engine_dir in given.items():
                row = in_process_of_its_own(engine_dir, loops, threads, latents[name])
                console.print(f"{name}: {row}", markup=False, soft_wrap=True)
                if turn:  # the first round brings the files into the page cache
                    found[name].append(row)
        difference = relative_error(*(np.load(path) for path in latents.values()))
    facts: dict[str, Any] = {
        "model": manifest.model.name.rsplit("/", 1)[-1],
        "latent": list(manifest.latent.shape),
        "batch": manifest.batch,
        "machine": machine(threads),
        "rounds": rounds,
        "difference": difference,
        "rows": {},
    }
    for name, engine_dir in given.items():
        plan = Bundle.open(engine_dir).manifest.plan
        facts["rows"][name] = {
            "graphs": len(plan.variants),
            "launches": len(plan.launches),
            "arena_bytes": plan.arena_bytes,
            **{key: spread(np.array([row[key] for row in found[name]])) for key in found[name][0]},
        }
    if collect is not None:
        known = with_earlier(collect, [facts], itemgetter("model", "latent"))
        write_results(collect, known, as_text(known))
    console.print(_table(facts), markup=False, soft_wrap=True)
    emit(facts, as_json)


main = entry_point(command)


def probe(engine_dir: Path, loops: int, threads: int, latents: Path) -> dict[str, float]:
    """Seconds of a loop, and the most memory of this process: while all is loaded, and while loops run. The final
    latents go to the file ``latents``."""
    from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
    from dipgo_deploy.runtime.loop import DenoisingLoop
    from tools.bench.loops import GUIDANCE_SCALE, loop_inputs

    bundle = Bundle.open(engine_dir)
    before = peak()
    loop = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=threads, share_weights=True))
    found = {"loading_bytes": float(peak() - before)}
    noise, conditions = loop_inputs(loop.sample_shape, bundle.manifest)
    noises = np.zeros((bundle.manifest.plan.noises, *noise.shape), np.float32)
    forget_peak()
    seconds, used = [], []
    for _ in range(loops + 1):
        start, at = time.perf_counter(), time.process_time()
        final = loop.run(noise, conditions, noises=noises, guidance_scale=GUIDANCE_SCALE)
        seconds.append(time.perf_counter() - start)
        used.append(time.process_time() - at)
    np.save(latents, final)
    # The first run allocates what the others use again.
    return found | {
        "running_bytes": float(peak() - before),
        "seconds": float(np.median(seconds[1:])),
        "processor_seconds": float(np.median(used[1:])),
    }


def peak() -> int:
    """The most memory that this process had, in bytes, since it began or ``forget_peak``. Raises UserError where the
    kernel does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration) as error:
        raise UserError(f"{_STATUS}: says nothing of the most memory; measure on Linux") from error


def forget_peak() -> None:
    """Count the most memory from what there is now. Raises UserError where the kernel does not."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError as error:
        raise UserError(f"{_CLEAR}: cannot be written; measure on Linux") from error


def in_process_of_its_own(engine_dir: Path, loops: int, threads: int, latents: Path) -> dict[str, float]:
    """``probe`` of a directory, in another process."""
    call = (
        "import json; from pathlib import Path; from tools.bench.guidance_batch import probe; "
        f"print(json.dumps(probe(Path({str(engine_dir)!r}), {loops}, {threads}, Path({str(latents)!r}))))"
    )
    found: dict[str, float] = in_another_process(call)
    return found


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Guidance in one launch or two\n",
        "The same model and schedule exported as usual, with both halves of guidance in a launch, and with "
        "`--guidance-batch 1`, one half after the other ([how to](../howto/guidance.md#one-half-after-the-other)). "
        "ONNX Runtime CPU, weights in memory once for all graphs; each row in processes of its own, in turn. Memory: "
        "the most that the process had beyond what it began with, while all was loaded and while loops ran. Seconds of "
        "a loop, wall time and processor time; median and quartiles. Made by `python -m tools.bench.guidance_batch`.\n",
    ]
    for facts in results:
        images = f"{facts['batch']} x {'x'.join(map(str, facts['latent']))}"
        parts.append(f"## {facts['model']}, {images}\n\n{machine_line(facts['machine'])}. {facts['rounds']} rounds.\n")
        parts.append(_table(facts))
        parts.append(f"The final latents differ by {facts['difference']:.1e} of the largest value.\n")
    return "\n".join(parts)


def _table(facts: Mapping[str, Any]) -> str:
    both = facts["rows"]["both halves"]
    lines = []
    for name, row in facts["rows"].items():
        memory, seconds = row["running_bytes"]["median"], row["processor_seconds"]["median"]
        lines.append(
            (
                name,
                str(row["graphs"]),
                str(row["launches"]),
                f"{row['arena_bytes'] / MIB:.1f}",
                f"{row['loading_bytes']['median'] / MIB:.0f}",
                f"{memory / MIB:.0f} ({memory / both['running_bytes']['median']:.2f})",
                with_quartiles(row["seconds"], 2),
                f"{with_quartiles(row['processor_seconds'], 2)} ({seconds / both['processor_seconds']['median']:.2f})",
            )
        )
    sizes = ("arena, MiB", "loading, MiB", "running, MiB")
    return table(("a launch has", "graphs", "launches", *sizes, "loop, s", "processor, s"), lines)


if __name__ == "__main__":
    raise SystemExit(main(None))
