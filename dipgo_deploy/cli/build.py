"""``dipgo-build``: TensorRT engines for an engine directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    live,
    lora_line,
    lora_partial_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.engine.budget import MemoryNeed
    from dipgo_deploy.engine.build import EngineResult, Observer


@click.command(
    name="dipgo-build",
    epilog=examples(
        "dipgo-build --engine-dir engines/fashion-sd --backend tensorrt-rtx",
        "dipgo-build --engine-dir engines/fashion-sd --backend tensorrt-rtx --compute-capability 8.6,8.9",
        "dipgo-build --engine-dir engines/sd15 --backend tensorrt --timing-cache timing.cache --opt-level 4",
        "dipgo-build --engine-dir engines/sd15 --backend tensorrt --no-build",
    ),
)
@click.option("--engine-dir", required=True, type=click.Path(path_type=Path), help="Made by dipgo-export.")
@click.option(
    "--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), required=True, help="What the engines are for."
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    help="TensorRT-RTX: GPU generations to build for, such as 8.6,8.9, or `current`.  [default: all it supports]",
)
@click.option("--opt-level", type=click.IntRange(0, 5), help="Time spent on tactics.  [default: the builder's, 3]")
@click.option("--workspace", help="Scratch a tactic may use, such as 2GiB.  [default: the builder's]")
@click.option(
    "--max-aux-streams",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Streams beside an engine's own: more of them need more scratch.",
)
@click.option("--tf32", is_flag=True, help="Allow float32 products to be rounded to TF32.")
@click.option("--strip", is_flag=True, help="Leave the weights out of the engines; they are read at load. Needs a GPU.")
@click.option("--refit", is_flag=True, help="Let dipgo-run --lora change the weights of the engines. Needs a GPU.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="LoRA file or folder (safetensors) to build into engines of their own; can be given several times.",
)
@lora_partial_option
@click.option("--version-compatible", is_flag=True, help="TensorRT: engines run on later versions too.")
@click.option("--hardware-compatible", is_flag=True, help="TensorRT: engines run on Ampere and newer GPUs.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="TensorRT: file that builds share and extend.")
@click.option("--memory-budget", help="GPU memory a run may use, such as 8GiB.  [default: the GPU's, if one is here]")
@click.option("--no-build", is_flag=True, help="Only check: refuse what would have to be built.")
@click.option("--verify", is_flag=True, help="Check the hash of every exported file first.")
@json_option
@version_option
def command(
    engine_dir: Path,
    backend: str,
    compute_capabilities: tuple[str, ...],
    opt_level: int | None,
    workspace: str | None,
    max_aux_streams: int,
    tf32: bool,
    strip: bool,
    refit: bool,
    loras: tuple[str, ...],
    lora_partial: bool,
    version_compatible: bool,
    hardware_compatible: bool,
    timing_cache: Path | None,
    memory_budget: str | None,
    no_build: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines for every variant and component of an engine directory.

    An engine that was built from the same graph, weights and options by the same version for the same GPU is kept;
    anything else is built again. TensorRT-RTX builds without a GPU, TensorRT does not.
    """
    from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
    from dipgo_deploy.backends.tensorrt_plans import BuildFlags
    from dipgo_deploy.engine.budget import mib, parse_bytes
    from dipgo_deploy.engine.build import BuildOptions, build_engines
    from dipgo_deploy.lora.file import parse_choice

    options = BuildOptions(
        flags=BuildFlags(
            workspace=None if workspace is None else parse_bytes("--workspace", workspace),
            opt_level=opt_level,
            max_aux_streams=max_aux_streams,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            strip=strip,
            refit=refit,
            tf32=tf32,
        ),
        compute_capabilities=tuple(
            part.strip() for text in compute_capabilities for part in text.split(",") if part.strip()
        ),
        timing_cache=timing_cache,
        memory_budget=None if memory_budget is None else parse_bytes("--memory-budget", memory_budget),
        build=not no_build,
        lora=tuple(parse_choice(text) for text in loras),
        lora_partial=lora_partial,
    )
    console = human_console(as_json)
    if timing_cache is not None and not FLAVOURS[backend].timing_cache:
        console.print(f"--timing-cache: {FLAVOURS[backend].title} keeps no timings; ignored", markup=False)
    with _progress(console) as observer:
        report = build_engines(engine_dir, backend, options, observer, verify=verify)
    for lora in report.loras:
        console.print(lora_line(lora), markup=False, soft_wrap=True)
    plan_bytes = sum(engine.record.plan_bytes for engine in report.engines)
    console.print(
        f"{report.folder}: {len(report.built)} built, {len(report.engines) - len(report.built)} kept, "
        f"{mib(plan_bytes)} on disk",
        markup=False,
        soft_wrap=True,
    )
    emit(
        {
            "folder": str(report.folder),
            "backend": report.backend,
            "version": report.version,
            "target": report.target,
            "memory": {
                "weights": dict(report.need.weights),
                "arena": report.need.arena,
                "stack": report.need.stack,
                "other": report.need.other,
                "total": report.need.total,
            },
            "loras": [asdict(lora) for lora in report.loras],
            "engines": [
                {
                    "name": engine.name,
                    "status": engine.status,
                    "reason": engine.reason,
                    "key": engine.record.key,
                    "bytes": engine.record.plan_bytes,
                    "seconds": engine.record.seconds,
                }
                for engine in report.engines
            ],
        },
        as_json,
    )


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Observer]:
    """Lines about finished engines on ``console``, and a bar on stderr where that is a terminal."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from dipgo_deploy.engine.budget import mib
    from dipgo_deploy.engine.build import Observer

    stderr = RichConsole(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
    )
    task = bar.add_task("engines", total=None)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    class Shown(Observer):
        def needed(self, need: MemoryNeed) -> None:
            say(f"a run needs {need.line()}")

        def started(self, name: str, index: int, count: int, reason: str) -> None:
            self._done, self._count = index, count
            bar.update(task, description=f"{index + 1}/{count} {name} ({reason})", total=count, completed=index)

        def progressed(self, fraction: float) -> None:
            bar.update(task, completed=self._done + fraction)

        def finished(self, engine: EngineResult) -> None:
            bar.update(task, completed=self._done + 1)
            say(f"{engine.name}: {mib(engine.record.plan_bytes)} in {engine.record.seconds:.1f} s ({engine.reason})")

        def cancelling(self) -> None:
            stderr.print("stopping at TensorRT's next step; finished engines stay", markup=False)

        def warned(self, message: str) -> None:
            stderr.print(f"warning: {message}", markup=False, soft_wrap=True)

    with live(bar):
        yield Shown()


main = entry_point(command)
