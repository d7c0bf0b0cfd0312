"""Images per second when several prompts share launches: batch 1, 4, 16.

python -m tools.bench.batching --model fashion-sd --schedule FILE --collect docs/results/batching.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.schedule.document import Schedule
from tools.bench.loops import MeasuredLoop
from tools.bench.measure import alternate, machine, machine_line, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

_PATH = click.Path(path_type=Path)


@click.command(name="batching")
@click.option("--model", required=True, help="Built-in model or folder.")
@click.option("--schedule", type=_PATH, required=True)
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4, 16), show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=15, show_default=True, help="Rounds that count.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    model: str,
    schedule: Path,
    height: int | None,
    batches: tuple[int, ...],
    repeats: int,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Time the denoising loop of one schedule, exported for several batches, in turn, on one thread."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export
    from dipgo_deploy.reference.quiet import quiet_libraries
    from tools.bench.pairs import full_schedule, write_engine

    quiet_libraries()
    console = human_console(as_json)
    given = Schedule.load(schedule)
    documents = {"full": full_schedule(given), schedule.stem: given}
    loops: dict[tuple[str, int], MeasuredLoop] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            for name, document in documents.items():
                options = ExportOptions(
                    layout="variants", components=False, check=False, batch=batch, height=height, width=height
                )
                path = Path(folder) / f"{name}-{batch}"
                write_engine(plan_export(model, document, options), path)
                loops[name, batch] = MeasuredLoop(path, 1, clock=time.thread_time)
                console.print(f"{model}, {name}, batch {batch}: ready", markup=False)
        calls = {json.dumps(key): loop.run for key, loop in loops.items()}
        seconds = {tuple(json.loads(key)): values for key, values in alternate(calls, repeats).items()}
    rows = [
        {
            "loop": name,
            "batch": batch,
            "images_per_second": spread(batch / seconds[name, batch]),
            "to_first": spread((batch / seconds[name, batch]) / (batches[0] / seconds[name, batches[0]])),
        }
        for name, batch in loops
    ]
    latent = next(iter(loops.values())).manifest.latent
    facts = {
        "model": Path(model).name,
        "schedule": schedule.stem,
        "latent": [latent.height, latent.width],
        "machine": machine(1),
        "repeats": repeats,
        "rows": rows,
    }
    if collect is not None:
        rows = with_earlier(collect, [facts], itemgetter("model", "schedule"))
        write_results(collect, rows, as_text(rows))
    console.print(_table(facts), markup=False, soft_wrap=True)
    emit(facts, as_json)


main = entry_point(command)


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Several images per launch\n",
        "ONNX Runtime CPU, fp32, one thread, guidance (so twice the batch inside), the denoising loop alone; images a "
        "second of processor time (the machine had other work), loops in turn, median and quartiles. Made by "
        "`python -m tools.bench.batching`.\n",
    ]
    for facts in results:
        height, width = facts["latent"]
        parts.append(
            f"## {facts['model']}, {height}x{width} latents, {facts['schedule']}\n\n"
            f"{machine_line(facts['machine'])}. {facts['repeats']} rounds.\n"
        )
        parts.append(_table(facts))
    return "\n".join(parts)


def _table(facts: Mapping[str, Any]) -> str:
    return table(
        ("loop", "batch", "images a second", "to the smallest batch"),
        [
            (row["loop"], str(row["batch"]), _digits(row["images_per_second"]), with_quartiles(row["to_first"], 2))
            for row in facts["rows"]
        ],
    )


def _digits(values: Mapping[str, float]) -> str:
    return with_quartiles(values, 1 if values["median"] >= 1 else 4)


if __name__ == "__main__":
    raise SystemExit(main(None))
