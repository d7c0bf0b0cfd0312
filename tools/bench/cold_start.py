"""From process start to the first denoising launch: ours, and PyTorch with diffusers up to a loaded pipeline.

Run from the repository's root: ``python -m tools.bench.cold_start --engine-dir DIR --model FOLDER``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.models.location import resolve_model
from tools.bench.measure import alternate, machine, machine_line, spread
from tools.bench.tables import table, with_quartiles, write_results

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
    stages["first launch"] = time.time()
    raise Stop
manifest = pipeline.bundle.manifest
import numpy as np
texts = {s.name: np.zeros((1, *s.shape[1:]), "int64" if s.dtype == "int64" else "float32")
         for s in manifest.conditions if s.source == "text"}
given = {"prompt_embeds": texts, "negative_prompt_embeds": texts if manifest.guidance else None} if texts else {}
if any(s.source == "class" for s in manifest.conditions): given["class_labels"] = 0
try:
    pipeline(**given, output_type="latent", callback=first)
except Stop:
    pass
print(json.dumps(stages))
"""
_DIFFUSERS = """
import json, sys, time
stages = {"python": time.time()}
import torch
from diffusers import DiffusionPipeline
stages["imports"] = time.time()
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True, low_cpu_mem_usage=False)
stages["loaded"] = time.time()
print(json.dumps(stages))
"""


def stages_of(script: str, *arguments: str) -> dict[str, float]:
    """Seconds from the start of a new process to each of its stages.

    Raises:
        click.ClickException: the process failed; its last line says why.
    """
    start = time.time()
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException((done.stderr.strip().splitlines() or ["the process failed"])[-1])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: moment - start for name, moment in found.items()}


@click.command(name="cold-start")
@click.option("--engine-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--model", help="Built-in model or folder that diffusers loads, for comparison.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Results (.json, and .md beside it).")
@json_option
def command(engine_dir: Path, model: str | None, repeats: int, threads: int, out: Path | None, as_json: bool) -> None:
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
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}

    def run(name: str) -> float:
        stages[name].append(stages_of(*scripts[name]))
        return max(stages[name][-1].values())

    seconds = alternate({name: lambda name=name: run(name) for name in scripts}, repeats, warmup=1)  # type: ignore[misc]
    weights = sum(path.stat().st_size for path in engine_dir.rglob("weights.bin"))
    facts = {
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
    text = as_text(facts)
    console.print(text, markup=False, soft_wrap=True)
    if out is not None:
        write_results(out, facts, text)
    emit(facts, as_json)


main = entry_point(command)


def as_text(facts: Mapping[str, Any]) -> str:
    """The results for readers."""
    rows = [
        (name, with_quartiles(row["stages"]["imports"], 2), with_quartiles(row["seconds"], 2))
        for name, row in facts["rows"].items()
    ]
    return (
        "# Cold start\n\n"
        f"{machine_line(facts['machine'])}.\n\n"
        f"{facts['engine_dir_weights_bytes'] / 2**20:.0f} MiB of weights, files in the page cache. Seconds from the "
        "start of the process until the imports are done and until the first denoising launch is done (for diffusers: "
        f"until `from_pretrained` returns); {facts['repeats']} rounds, in turn; median, quartiles in brackets. Made by "
        "`python -m tools.bench.cold_start`.\n\n" + table(("process", "imports", "ready"), rows)
    )


if __name__ == "__main__":
    raise SystemExit(main(None))
