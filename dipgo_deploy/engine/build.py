"""Engines of an engine directory: what is up to date, what must be built, and building it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dipgo_deploy.backends.tensorrt_cuda import Device, NoDeviceError, find_device, require_device
from dipgo_deploy.backends.tensorrt_flavour import Flavour, flavour_of, import_flavour, known_capabilities
from dipgo_deploy.backends.tensorrt_plans import (
    RECORD_SUFFIX,
    BuildFlags,
    GpuTarget,
    KeyInputs,
    PlanRecord,
    WeightHashes,
    plan_file,
    plan_name,
    plans_folder,
    profile_of,
)
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Graph, Manifest
from dipgo_deploy.bundle.quantized import MATRIX_TYPES, NUMBER_TYPES
from dipgo_deploy.engine.budget import MemoryNeed, check_budget, memory_need
from dipgo_deploy.engine.network import CURRENT, Work, build_plan
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user, write_atomic
from dipgo_deploy.lora.file import Given, LoraChoice
from dipgo_deploy.lora.merge import LoraReport, MergedWeights, merge_loras

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        flags: what changes the engines.
        compute_capabilities: ``8.6``, ``8.9`` ... or ``current`` alone, for TensorRT-RTX; none builds for all that it
            supports by default.
        timing_cache: a file shared by builds.
        memory_budget: bytes that a run may use, the GPU's memory where None.
        build: whether missing engines are built, or refused.
        lora: LoRA files merged into the weights, as (file, scale); engines with them lie beside those without.
        lora_partial: leave out what cannot be applied of them.
    """

    flags: BuildFlags = field(default_factory=BuildFlags)
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    memory_budget: int | None = None
    build: bool = True
    lora: tuple[Given, ...] = ()
    lora_partial: bool = False


class Observer:
    """What a build tells while it runs. All methods do nothing here; calls come from any thread."""

    def needed(self, need: MemoryNeed) -> None:
        """Before anything is built: what a run will need."""

    def started(self, name: str, index: int, count: int, reason: str) -> None:
        """Engine ``index`` of ``count`` is being built, and why."""

    def progressed(self, fraction: float) -> None:
        """How far that engine is, 0 to 1."""

    def finished(self, engine: EngineResult) -> None:
        """An engine is there."""

    def cancelling(self) -> None:
        """Ctrl-C was seen; the build stops at TensorRT's next step."""

    def warned(self, message: str) -> None:
        """Something the user should know, which stops nothing."""


@dataclass(frozen=True)
class EngineResult:
    """One engine: ``built`` or ``kept`` (its key was the right one), where, why, and its record."""

    name: str
    status: Literal["built", "kept"]
    reason: str
    path: Path
    record: PlanRecord


@dataclass(frozen=True)
class BuildReport:
    """All engines of a directory, in the order of its variants, then components."""

    folder: Path
    backend: str
    version: str
    target: str
    need: MemoryNeed
    engines: tuple[EngineResult, ...]
    loras: tuple[LoraReport, ...] = ()

    @property
    def built(self) -> tuple[EngineResult, ...]:
        """Those that were not there yet."""
        return tuple(engine for engine in self.engines if engine.status == "built")


@dataclass(frozen=True)
class _Job:
    name: str
    work: Work
    weights_bytes: int
    path: Path
    stale: str | None  # why it must be built; None: the stored engine is the right one
    record: PlanRecord | None


def build_engines(
    engine_dir: str | os.PathLike[str],
    backend: str,
    options: BuildOptions | None = None,
    observer: Observer | None = None,
    *,
    verify: bool = False,
) -> BuildReport:
    """Build the engines of all variants, of all schedules, and of all components that are not there yet.

    A stored engine is kept when its key is that of the graph, weights and options, and its file is whole. Each engine
    appears when it is complete, so a build that was stopped goes on where it was.

    Args:
        engine_dir: made by ``dipgo-export``.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        options: see ``BuildOptions``.
        observer: told how far it is.
        verify: check the hash of every exported file first.

    Raises:
        UserError: bad options for this backend or machine, a need above the memory budget, an engine that may not be
            built (``build`` off), or a graph that TensorRT refuses.
        KeyboardInterrupt: Ctrl-C; finished engines stay.
    """
    options, observer = options or BuildOptions(), observer or Observer()
    flavour = flavour_of(backend)
    _check_options(flavour, options)
    device = _device(flavour, options)
    module = import_flavour(flavour)
    _check_capabilities(module, flavour, options)
    bundle = Bundle.open(engine_dir, verify=verify)
    target = _target(flavour, options, device)
    _check_numbers(bundle, target, observer)
    folder = plans_folder(bundle.path, backend, module.__version__, target)
    choices = [
        LoraChoice(one[0], one[1], options.lora_partial, one[2] if len(one) == 3 else "") for one in options.lora
    ]
    merged = merge_loras(bundle, choices) if choices else None
    jobs = _jobs(bundle, flavour, module.__version__, target, folder, options, merged)
    need = memory_need(bundle.manifest, {job.name: job.weights_bytes for job in jobs})
    observer.needed(need)
    if options.memory_budget is not None:
        check_budget(need, options.memory_budget, "--memory-budget")
    elif device is not None:
        check_budget(need, device.memory_bytes, f"the memory of {device.name}")
    stale = [job for job in jobs if job.stale is not None]
    if stale and not options.build:
        listed = ", ".join(f"{job.name} ({job.stale})" for job in stale)
        raise UserError(f"{folder}: no engine with the right key of {listed}; build without --no-build")
    engines = []
    with sole_user(folder, "--engine-dir") if stale else contextlib.nullcontext():
        for left in folder.glob(".*.partial") if stale else ():  # of a build that was killed
            left.unlink(missing_ok=True)
        for job in jobs:
            if job.stale is None:
                assert job.record is not None  # what makes it up to date
                engines.append(EngineResult(job.name, "kept", "up to date", job.path, job.record))
                continue
            observer.started(job.name, stale.index(job), len(stale), job.stale)
            record = _build(flavour, module, job, observer)
            engines.append(EngineResult(job.name, "built", job.stale, job.path, record))
            observer.finished(engines[-1])
    return BuildReport(
        folder, backend, module.__version__, target.label, need, tuple(engines), merged.reports if merged else ()
    )


def graphs_of(*manifests: Manifest) -> list[Graph]:
    """Graphs of all variants of the manifests of a directory, each once, the prologue's, then of the components."""
    graphs = [variant.graph for manifest in manifests for variant in manifest.plan.variants]
    graphs += [manifest.plan.prologue for manifest in manifests if manifest.plan.prologue is not None]
    graphs += [graph for manifest in manifests for graph in manifest.components.graphs]
    return list({graph.file: graph for graph in graphs}.values())


def _check_options(flavour: Flavour, options: BuildOptions) -> None:
    refused = {
        "--version-compatible": options.flags.version_compatible and not flavour.version_compatible,
        "--hardware-compatible": options.flags.hardware_compatible and not flavour.hardware_compatible,
        "--compute-capability": bool(options.compute_capabilities) and not flavour.compute_capabilities,
    }
    instead = (
        "TensorRT-RTX's engines run on several GPU generations anyway; choose them with --compute-capability"
        if flavour.compute_capabilities
        else "TensorRT builds for the GPU at hand; use --hardware-compatible for Ampere and newer"
    )
    for option, wrong in refused.items():
        if wrong:
            raise UserError(f"{option}: not with --backend {flavour.backend}; {instead}")
    if CURRENT in options.compute_capabilities and len(options.compute_capabilities) > 1:
        raise UserError(f"--compute-capability: {CURRENT} stands alone; leave the others out")
    if options.flags.strip and options.lora:
        raise UserError("--strip with --lora: stripped weights are read at load; build with --strip --refit alone")
    if options.flags.opt_level is not None and not 0 <= options.flags.opt_level <= 5:
        raise UserError(f"--opt-level {options.flags.opt_level}: give 0 to 5")
    if options.flags.max_aux_streams < 0:
        raise UserError(f"--max-aux-streams {options.flags.max_aux_streams}: give 0 or more")


def _device(flavour: Flavour, options: BuildOptions) -> Device | None:
    """The GPU at hand; None where none is needed."""
    for option, wanted in (("--strip", options.flags.strip), ("--refit", options.flags.refit)):
        if not wanted:
            continue
        try:
            return find_device()
        except NoDeviceError as error:
            raise UserError(f"{option}: refittable engines are built with a GPU only: {error}; leave it out") from None
    if CURRENT in options.compute_capabilities:
        try:
            return find_device()
        except NoDeviceError as error:
            raise UserError(f"--compute-capability {CURRENT}: {error}; name one, for example 8.9") from None
    if not flavour.builds_without_device:
        try:
            return find_device()
        except NoDeviceError as error:
            raise UserError(
                f"backend {flavour.backend}: {flavour.title} builds on a GPU only: {error}; "
                "use --backend tensorrt-rtx here, or build on the machine that runs it"
            ) from None
    with contextlib.suppress(NoDeviceError):
        return find_device()
    return None


def _check_capabilities(module: Any, flavour: Flavour, options: BuildOptions) -> None:
    if not flavour.compute_capabilities:
        return
    known = known_capabilities(module)
    for wanted in options.compute_capabilities:
        if wanted != CURRENT and wanted not in known:
            raise UserError(
                f"--compute-capability {wanted}: {flavour.title} {module.__version__} knows {', '.join(known)}, "
                f"and {CURRENT} for the GPU at hand"
            )


def _check_numbers(bundle: Bundle, target: GpuTarget, observer: Observer) -> None:
    """Refuse GPUs without products of the graphs' numbers; TensorRT says so in words of its own, after minutes."""
    method = bundle.manifest.quantized
    least = (0, 0) if method is None else NUMBER_TYPES[MATRIX_TYPES[method]].capability
    if least > (0, 0) and not target.capabilities:
        observer.warned(f"products in {method} need compute capability {least[0]}.{least[1]} or newer to run")
    for capability in target.capabilities:
        major, minor = map(int, capability.split("."))
        if (major, minor) < least:
            which = f"--compute-capability {capability}" if target.gpu is None else f"{target.gpu} ({capability})"
            raise UserError(
                f"{which}: has no products in {method}, which {bundle.path} was exported with; they need compute "
                f"capability {least[0]}.{least[1]} or newer, or export with --quantize int8"
            )


def _target(flavour: Flavour, options: BuildOptions, device: Device | None) -> GpuTarget:
    if not flavour.compute_capabilities or options.compute_capabilities == (CURRENT,):
        device = device or require_device(flavour.backend)
        return GpuTarget(gpu=device.name, capabilities=(device.capability,))
    numbers = {tuple(int(part) for part in text.split(".")) for text in options.compute_capabilities}
    return GpuTarget(capabilities=tuple(".".join(map(str, number)) for number in sorted(numbers)))


def _jobs(
    bundle: Bundle,
    flavour: Flavour,
    version: str,
    target: GpuTarget,
    folder: Path,
    options: BuildOptions,
    merged: MergedWeights | None,
) -> list[_Job]:
    hashes = WeightHashes()
    jobs: list[_Job] = []
    for graph in graphs_of(*(one.manifest for one in bundle.with_each())):
        name = plan_name(graph)
        onnx_file = bundle.path / graph.file
        weights, weights_bytes = hashes.digest(onnx_file)
        inputs = KeyInputs(
            graph=sha256_file(onnx_file),
            weights=weights,
            profile=profile_of(graph),
            flags=options.flags,
            backend=flavour.backend,
            version=version,
            target=target,
            lora=() if merged is None else merged.identity_of(onnx_file),
        )
        path = folder / plan_file(name, inputs.lora)
        record = PlanRecord.load(path.with_suffix(RECORD_SUFFIX))
        work = Work(
            onnx_file,
            graph,
            inputs,
            timing_cache=options.timing_cache if flavour.timing_cache else None,
            for_device=flavour.compute_capabilities and target.gpu is not None,
            weights=merged if inputs.lora else None,
        )
        jobs.append(_Job(name, work, weights_bytes, path, _stale(path, record, inputs), record))
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{bundle.path}: two graphs are named {name}; export the engine directory again")
    return jobs


def _stale(path: Path, record: PlanRecord | None, inputs: KeyInputs) -> str | None:
    """Why the stored engine cannot be used, None if it can."""
    if record is None:
        return "not built yet"
    if record.key != inputs.key:
        return f"changed: {', '.join(inputs.differences(record.inputs))}"
    if not record.intact(path):
        return "damaged: its sha256 is not the recorded one"
    return None


def _build(flavour: Flavour, module: Any, job: _Job, observer: Observer) -> PlanRecord:
    start = time.perf_counter()
    plan = _interruptible(
        lambda cancelled: build_plan(
            flavour,
            module,
            job.work,
            cancelled=cancelled,
            on_progress=observer.progressed,
            warn=observer.warned,
        ),
        observer,
    )
    data = memoryview(plan)
    record = PlanRecord(
        key=job.work.inputs.key,
        inputs=job.work.inputs,
        plan_sha256=hashlib.sha256(data).hexdigest(),
        plan_bytes=data.nbytes,
        weights_bytes=job.weights_bytes,
        seconds=round(time.perf_counter() - start, 3),
    )
    # The record last: until it is there, the engine beside it does not count.
    write_atomic(job.path, data)
    write_atomic(job.path.with_suffix(RECORD_SUFFIX), record.model_dump_json(indent=1).encode() + b"\n")
    return record


def _interruptible(task: Callable[[threading.Event], Any], observer: Observer) -> Any:
    """Run ``task`` in a thread of its own, so that Ctrl-C is seen here while TensorRT works; it then asks the task to
    stop and waits for it, because the process must not end under TensorRT's feet."""
    cancelled, finished = threading.Event(), threading.Event()
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(task(cancelled))
        except BaseException as error:  # handed to the caller's thread
            errors.append(error)
        finally:
            finished.set()

    told = False
    with _sigint_sets(cancelled):
        threading.Thread(target=run, name="dipgo-build", daemon=True).start()
        while not finished.wait(_POLL_SECONDS):
            if cancelled.is_set() and not told:
                told = True
                observer.cancelling()
    if cancelled.is_set():
        if not told:
            observer.cancelling()
        raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _sigint_sets(event: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set ``event`` instead of raising KeyboardInterrupt, however often it comes.

    An exception in the middle of ``Thread.start`` or ``Thread.join`` can leave a thread's bookkeeping wrong: a running
    one then counts as ended. Where signals go elsewhere (not the main thread, or SIGINT ignored) nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
