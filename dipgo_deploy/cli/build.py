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
    lora_line,
    lora_options,
    progress_bars,
    quiet_option,
)
from dipgo_deploy.cli.options import PATH, Command, engine_dir_option, option, version_option

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.engine.budget import MemoryNeed
    from dipgo_deploy.engine.build import EngineResult, Observer


@click.command(
    name="dipgo-build",
    cls=Command,
    epilog=examples(
        "dipgo-build --engine-dir engines/fashion-sd --backend tensorrt-rtx",
        "dipgo-build --engine-dir engines/fashion-sd --backend tensorrt-rtx --compute-capability 8.6,8.9",
        "dipgo-build --engine-dir engines/sd15 --backend tensorrt --timing-cache timing.cache --opt-level 4",
        "dipgo-build --engine-dir engines/sd15 --backend tensorrt --no-build",
    ),
)
@engine_dir_option
@option("Model", "--verify", is_flag=True, help="Check the hash of every file of the engine directory first.")
@option(
    "Engine",
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    required=True,
    help="Library that the engines are built for.",
)
@option(
    "Engine",
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    show_default="all that it supports",
    help="TensorRT-RTX: generations of GPUs to build for, such as 8.6,8.9, or `current`.",
)
@option(
    "Engine",
    "--opt-level",
    "--builder-optimization-level",
    type=click.IntRange(0, 5),
    show_default="the builder's own, 3",
    help="How much time the builder spends on choosing tactics.",
)
@option(
    "Engine",
    "--workspace",
    show_default="the builder's own",
    help="Scratch memory that a tactic may use, such as 2GiB.",
)
@option(
    "Engine",
    "--max-aux-streams",
    type=click.IntRange(min=0),
    default=0,
    help="Streams that an engine may use beside its own; more of them need more scratch memory.",
)
@option("Engine", "--tf32", is_flag=True, help="Allow float32 products to be rounded to TF32.")
@option(
    "Engine",
    "--strip",
    "--strip-plan",
    is_flag=True,
    help="Leave the weights out of the engines and read them at load. Needs a GPU.",
)
@option(
    "Engine",
    "--refit",
    "--refittable",
    is_flag=True,
    help="Let dipgo-run --lora change the weights of the engines. Needs a GPU.",
)
@option("Engine", "--version-compatible", is_flag=True, help="TensorRT: make engines that later versions run too.")
@option(
    "Engine", "--hardware-compatible", is_flag=True, help="TensorRT: make engines that run on Ampere and newer GPUs."
)
@option(
    "Engine",
    "--timing-cache",
    type=PATH,
    show_default="none",
    help="TensorRT: file of timings that builds read and extend.",
)
@option(
    "Engine",
    "--memory-budget",
    show_default="the memory of the GPU, where one is present",
    help="GPU memory that a run may use, such as 8GiB; engines that need more are refused.",
)
@option(
    "Engine", "--no-build", is_flag=True, help="Build nothing: exit with an error if an engine is missing or stale."
)
@lora_options("to build into engines of their own")
@json_option
@quiet_option
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
                "stack": report.need.history,
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

    from dipgo_deploy.engine.budget import mib
    from dipgo_deploy.engine.build import Observer

    stderr = RichConsole(stderr=True, highlight=False)

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

    with progress_bars(stderr) as bar:
        task = bar.add_task("engines", total=None)
        yield Shown()


main = entry_point(command)
