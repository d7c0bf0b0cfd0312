"""From process start to the first denoising launch: ours, and PyTorch with diffusers up to a loaded pipeline.

Run from the repository's root: ``python -m tools.bench.cold_start --engine-dir DIR --model FOLDER``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.models.location import resolve_model
from tools.bench.measure import alternate, in_another_process, machine, machine_line, spread
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

# Each child prints seconds since the epoch at its stages; the parent knows when it started the child.
_OURS = """
import json, sys, time
stages = {"python": time.time()}
from dipgo_deploy.runtime.pipeline import Pipeline
stages["imports"] = time.time()
share = json.loads(sys.argv[2])
pipeline = Pipeline.from_engine_dir(sys.argv[1], "cpu", threads=int(sys.argv[3]), share_weights=share, load=sys.argv[4])
stages["opened"] = time.time()
class Stop(Exception): pass
def first(done, total):
    global ended
    ended = time.time(), time.process_time()
    raise Stop
manifest = pipeline.bundle.manifest
import numpy as np
texts = {s.name: np.zeros((1, *s.shape[1:]), "int64" if s.dtype == "int64" else "float32")
         for s in manifest.conditions if s.source == "text"}
given = {"prompt_embeds": texts, "negative_prompt_embeds": texts if manifest.guidance else None} if texts else {}
if any(s.source == "class" for s in manifest.conditions): given["class_labels"] = 0
if manifest.guidance and manifest.guidance_scale is None: given["guidance_scale"] = 5.0
def launch():
    begun = time.process_time()
    try:
        pipeline(**given, output_type="latent", callback=first)
    except Stop:
        pass
    return ended[1] - begun
launch()
stages["first launch"], used = ended
print(json.dumps([stages, {"processor": used, "again": launch()}]))
"""
_DIFFUSERS = """
import json, sys, time
stages = {"python": time.time()}
import pathlib, torch, diffusers
folder = pathlib.Path(sys.argv[1])
denoiser = not (folder / "model_index.json").is_file()
name = json.loads((folder / "config.json").read_text())["_class_name"] if denoiser else "DiffusionPipeline"
kind = getattr(diffusers, name)
stages["imports"] = time.time()
kind.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
stages["loaded"] = time.time()
print(json.dumps([stages, {"processor": time.process_time()}]))
"""


def stages_of(script: str, *arguments: str) -> dict[str, float]:
    """Seconds from the start of a new process to each of its stages, and ``processor``: what it used until the last;
    ours also ``again``: processor seconds of a second call up to the end of its first launch.

    Raises:
        click.ClickException: the process failed; its last line says why.
    """
    start = time.time()
    found, used = in_another_process(script, *arguments)
    return {**{name: moment - start for name, moment in found.items()}, **used}


@click.command(name="cold-start")
@click.option("--engine-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--model", help="Built-in model, or folder of a pipeline or denoiser, that diffusers loads to compare.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--leave-out", multiple=True, help="Row that is not measured (by its name in the table).")
@click.option(
    "--collect", type=click.Path(path_type=Path, dir_okay=False), help="Add to this file (.json), with .md beside it."
)
@json_option
def command(
    engine_dir: Path,
    model: str | None,
    repeats: int,
    threads: int,
    leave_out: tuple[str, ...],
    collect: Path | None,
    as_json: bool,
) -> None:
    """Time new processes up to their first denoising launch, files in the page cache."""
    console = human_console(as_json)
    scripts: dict[str, tuple[str, ...]] = {
        "ours, every graph": (_OURS, str(engine_dir), "null", str(threads), "eager"),
        "ours, every graph, shared weights": (_OURS, str(engine_dir), "true", str(threads), "eager"),
        "ours, graphs as they are launched": (_OURS, str(engine_dir), "null", str(threads), "lazy"),
        "ours, as they are launched, shared": (_OURS, str(engine_dir), "true", str(threads), "lazy"),
    }
    if model is not None:
        scripts["diffusers, loaded"] = (_DIFFUSERS, resolve_model(model))
    scripts = {name: script for name, script in scripts.items() if name not in leave_out}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}

    def run(name: str) -> float:
        stages[name].append(stages_of(*scripts[name]))
        return max(value for key, value in stages[name][-1].items() if key not in ("processor", "again"))

    seconds = alternate({name: lambda name=name: run(name) for name in scripts}, repeats, warmup=1)  # type: ignore[misc]
    weights = sum(path.stat().st_size for path in engine_dir.rglob("weights.bin"))
    manifest = Bundle.open(engine_dir).manifest
    facts = {
        "model": manifest.model.name.rsplit("/", 1)[-1],
        "graphs": len(manifest.plan.variants),
        "machine": machine(threads),
        "repeats": repeats,
        "engine_dir_weights_bytes": weights,
        "rows": {
            name: {
                "seconds": spread(values),
                "stages": {key: spread(np.array([one[key] for one in stages[name][1:]])) for key in stages[name][0]},
            }
            for name, values in seconds.items()
        },
    }
    results = [facts]
    if collect is not None:
        results = with_earlier(collect, [facts], itemgetter("model"))
        write_results(collect, results, as_text(results))
    console.print(as_text(results), markup=False, soft_wrap=True)
    emit(facts, as_json)


main = entry_point(command)


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Cold start\n",
        "Seconds from the start of a new process until the imports are done and until the first denoising launch is "
        "done (for diffusers: until `from_pretrained` returns), files in the page cache. Processor: what the process "
        "used until then, which other work on the machine does not add to. Launch alone: the processor time of the "
        "first launch of a second call. Rounds in turn; median, quartiles in brackets. Made by `python -m "
        "tools.bench.cold_start`.\n",
    ]
    for facts in results:
        parts.append(
            f"## {facts['model']}: {facts['engine_dir_weights_bytes'] / 2**20:.0f} MiB of weights, {facts['graphs']} "
            f"graphs\n\n{machine_line(facts['machine'])}. {facts['repeats']} rounds.\n"
        )
        rows = [
            (
                name,
                *(with_quartiles(row["stages"][key], 2) for key in ("imports", "processor")),
                with_quartiles(row["seconds"], 2),
                with_quartiles(row["stages"]["again"], 2) if "again" in row["stages"] else "-",
            )
            for name, row in facts["rows"].items()
        ]
        parts.append(table(("process", "imports", "processor", "ready", "launch alone"), rows))
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main(None))
