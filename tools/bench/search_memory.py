"""Peak memory and time of one search iteration over T, with and without checkpointing of the steps.

Run from the repository's root: ``python -m tools.bench.search_memory --model fashion-dit --steps 10 --steps 50``.
``--random sd15`` takes the published architecture of Stable Diffusion 1.5 with random weights instead (3.4 GB).
Each measurement runs in a process of its own: a peak cannot be reset. The peak of the process before the iteration
(model, trace and libraries) is subtracted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from tools.bench.measure import machine
from tools.bench.tables import write_results
from tools.gpu.models import MODELS, make_model

MIB = 2**20


def iteration(
    model: str, steps: int, batch: int, *, checkpointed: bool, pixels: int | None, prompts: str | None
) -> Any:
    """One forward and backward pass through a loop: peak bytes, seconds, and bytes that a step has to leave behind."""
    import torch

    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import ProblemOptions, load_problem
    from dipgo_deploy.search.pruner import Pruner
    from dipgo_deploy.search.samples import SampleStream
    from dipgo_deploy.search.train import Trainer, TrainOptions

    quiet_libraries()
    torch.set_num_threads(1)
    problem = load_problem(ProblemOptions(model, "ddim", steps, height=pixels, width=pixels, prompts=prompts))
    loss = "ssim" if problem.can_decode else "latent-l2"
    options = TrainOptions(batch=batch, loss=loss, checkpoint_steps=checkpointed)
    trainer = Trainer(
        problem,
        Pruner(problem.steps, len(problem.target.blocks)),
        options,
        SampleStream(len(problem.conditions), pool=1),
    )
    trainer._loss.reference(trainer.samples.pairs(0, batch))
    load = os.getloadavg()[0]
    before = _resident()
    peak_before = _peak()
    start = time.perf_counter()
    trainer.iterate()
    seconds = time.perf_counter() - start
    graph = problem.traced.graph
    cuts = {name for block in graph.blocks for name in block.outputs}
    caches = batch * sum(graph.values[name].nbytes for name in cuts)
    return {
        "steps": steps,
        "checkpointed": checkpointed,
        "resident_before": before,
        "peak": _peak(),
        "peak_before": peak_before,
        "added": max(0, _peak() - before),
        "seconds": seconds,
        "load_average": load,
        "cache_bytes_a_step": caches,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command(name="search_memory")
@click.option("--model", default="fashion-dit", show_default=True)
@click.option("--random", "random_model", type=click.Choice([model.name for model in MODELS]), help="Random weights.")
@click.option("--steps", type=click.IntRange(min=1), multiple=True, default=(10, 50), show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--pixels", type=click.IntRange(min=1), help="Height and width of the images. [default: the model's]")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False), help="For a text model without its own.")
@click.option("--plain/--no-plain", default=True, show_default=True, help="Also without checkpointing.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Results (.json, and .md beside it).")
@click.option("--one", hidden=True, help="STEPS,CHECKPOINTED: measure this in the present process.")
@json_option
def command(
    model: str,
    random_model: str | None,
    steps: tuple[int, ...],
    batch: int,
    pixels: int | None,
    prompts: str | None,
    plain: bool,
    out: Path | None,
    one: str | None,
    as_json: bool,
) -> None:
    """Measure one iteration of the pruner's training."""
    if one is not None:
        alone, kind = one.split(",")
        row = iteration(model, int(alone), batch, checkpointed=kind == "True", pixels=pixels, prompts=prompts)
        print(json.dumps(row))
        return
    console = human_console(as_json)
    rows = []
    facts = {"machine": machine(1), "model": random_model or model, "batch": batch, "pixels": pixels}
    with ExitStack() as stack:
        if random_model is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            made = next(known for known in MODELS if known.name == random_model)
            model = str(make_model(made, folder / "model"))
            if made.class_name == "UNet2DConditionModel":
                (folder / "prompts.txt").write_text("a photo\n", encoding="utf-8")
                prompts = prompts or str(folder / "prompts.txt")
        for checkpointed in (True, False) if plain else (True,):
            for count in steps:
                row = _in_process(model, count, batch, checkpointed, pixels, prompts)
                rows.append(row)
                console.print(_words(row), markup=False, soft_wrap=True)
    facts["rows"] = rows
    if out is not None:
        write_results(out, facts, _as_text(facts))
    emit(facts, as_json)


def _in_process(
    model: str, steps: int, batch: int, checkpointed: bool, pixels: int | None, prompts: str | None
) -> dict[str, Any]:
    line = [sys.executable, "-m", "tools.bench.search_memory", "--model", model, "--batch", str(batch)]
    line += ["--one", f"{steps},{checkpointed}"]
    line += ["--pixels", str(pixels)] if pixels is not None else []
    line += ["--prompts", prompts] if prompts is not None else []
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _words(row: dict[str, Any]) -> str:
    how = "checkpointed" if row["checkpointed"] else "plain"
    return (
        f"T = {row['steps']}, {how}: {row['added'] / MIB:,.0f} MiB beyond the loaded model "
        f"({row['resident_before'] / MIB:,.0f} MiB), {row['seconds']:.1f} s an iteration at load average "
        f"{row['load_average']:.1f}; caches of one step {row['cache_bytes_a_step'] / MIB:.2f} MiB"
    )


def _as_text(facts: dict[str, Any]) -> str:
    lines = [
        f"# One search iteration of {facts['model']}, batch {facts['batch']}\n",
        *(_words(row) for row in facts["rows"]),
    ]
    return "\n\n".join(lines) + "\n"


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
