"""Everything that only a GPU can show, in one command: ``python -m tools.gpu_check`` (from the repository's root).

Runs the GPU-marked tests; exports Stable Diffusion 1.5's UNet and DiT-XL/2 at full size (random weights, fp16), full
and pruned; builds and times them on every backend that is installed, with torch (eager, compiled, as captured CUDA
graphs) as peers in the same process; compares every result with one float32 reference of the same schedule; and writes
``docs/results/<gpu>.json`` and a table beside it. Needs torch for CUDA and the extras ``export``, ``test`` and
one or both of ``tensorrt`` and ``tensorrt-rtx``; nothing is downloaded. Exit status 2 without an NVIDIA GPU, 1 if a
test or comparison failed.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dipgo_deploy.backends.tensorrt_cuda import Device, NoDeviceError, find_device
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.errors import UserError
from tools.make_schedules import DROPPED, KEPT

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.schedule.builders import Target
    from dipgo_deploy.schedule.document import Gates, Schedule

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
STEPS = 50
GUIDANCE_SCALE = 7.5
# fp16 over 50 steps against float32 over the same steps, largest absolute difference over the largest value.
TOLERANCE = 0.05
SD15: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
DIT_XL2: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 1000,
}
# What the published checkpoints of both come with; clipping would make the sampler non-linear.
DDIM: Mapping[str, Any] = {"_class_name": "DDIMScheduler", "clip_sample": False}
SD15_DDIM = {**DDIM, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@dataclass(frozen=True)
class Model:
    """A denoiser of random weights: diffusers' class, its and the scheduler's configuration, the gates of each case."""

    name: str
    class_name: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    cases: Mapping[str, Callable[[Target], Gates]]


def released(target: Target) -> Gates:
    """The released SD-1.5 gates of ratio 0.80."""
    return tuple(
        tuple(step in KEPT and name not in DROPPED.get(step, ()) for name in target.block_names)
        for step in range(target.steps)
    )


def every(share: float) -> Callable[[Target], Gates]:
    """All blocks in this share of the steps, evenly spread, none in the others."""

    def gates(target: Target) -> Gates:
        rows = [step == 0 or int(step * share) != int((step - 1) * share) for step in range(target.steps)]
        return tuple((row,) * len(target.blocks) for row in rows)

    return gates


MODELS = (
    Model("sd15", "UNet2DConditionModel", SD15, SD15_DDIM, {"full": every(1.0), "released-0.80": released}),
    Model(
        "dit-xl2",
        "DiTTransformer2DModel",
        DIT_XL2,
        DDIM,
        {"full": every(1.0), "uniform-0.60": every(0.4), "uniform-0.75": every(0.25)},
    ),
)


@click.command(name="gpu_check")
@click.option("--repeats", type=click.IntRange(min=3), default=10, show_default=True, help="Timed loops of each case.")
@click.option(
    "--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS]), help="Only these."
)
@click.option("--skip-tests", is_flag=True, help="Do not run the GPU-marked tests first.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="For TensorRT's builds.")
def command(repeats: int, names: tuple[str, ...], skip_tests: bool, timing_cache: Path | None) -> None:
    """Check and time everything on this machine's GPU; see the module's text."""
    try:
        device = find_device()
    except NoDeviceError as error:
        raise UserError(f"{error}: nothing was checked") from None
    import torch

    if not torch.cuda.is_available():
        raise UserError("this torch has no CUDA; install a torch for CUDA to have the peers and the reference")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"gpu": described(device), "tests": None, "cases": [], "failures": []}
    if not skip_tests:
        report["tests"] = run_gpu_tests()
        if report["tests"]["status"]:
            report["failures"].append(f"GPU tests: {report['tests']['summary']}")
    report["roof"] = measured_roof()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for model in MODELS:
            if not names or model.name in names:
                check_model(model, Path(folder), repeats, timing_cache, report)
                save(report, device)  # what is known so far survives a later crash
    save(report, device)
    click.echo(table(report))
    if report["failures"]:
        raise SystemExit(1)


def described(device: Device) -> dict[str, Any]:
    """GPU, driver and package versions."""
    import importlib.metadata as metadata

    import torch

    found: dict[str, str | None] = {}
    for package in ("torch", "diffusers", "onnx", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver: str | None = None  # stays so, and is reported so, where nvidia-smi cannot tell
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return {
        "name": device.name,
        "compute_capability": device.capability,
        "memory_bytes": device.memory_bytes,
        "driver": driver,
        "cuda_of_torch": torch.version.cuda,
        "packages": found,
    }


def run_gpu_tests() -> dict[str, Any]:
    """The tests marked ``gpu``, in a process of their own."""
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=RESULTS.parent.parent)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "failed": lines[-15:-1]}


def measured_roof() -> dict[str, float]:
    """What this GPU reaches: fp16 matrix products (FLOP/s) and copies (bytes/s, read and written), by CUDA events."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    big = torch.empty(2**28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(big)
    product = min(event_times(lambda: torch.matmul(a, a), 10, torch.cuda.current_stream()))
    copy = min(event_times(lambda: target.copy_(big), 10, torch.cuda.current_stream()))
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes_per_second": 2 * big.nbytes / copy * 1e3}


def event_times(task: Callable[[], object], repeats: int, stream: Any) -> list[float]:
    """Milliseconds of each run by CUDA events on ``stream``, after two runs that do not count."""
    import torch

    for _ in range(2):
        task()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        task()
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def check_model(model: Model, folder: Path, repeats: int, timing_cache: Path | None, report: dict[str, Any]) -> None:
    """All cases of one model on all backends and peers; results and failures are added to ``report``."""
    import torch

    from dipgo_deploy.export.exporter import ExportOptions, export_bundle
    from dipgo_deploy.models.target import schedule_target

    weights = make_model(model, folder / model.name)
    for name, gates in model.cases.items():
        target = schedule_target(str(weights), "ddim", STEPS)
        schedule = target.schedule(gates(target), name, {})
        start = time.perf_counter()
        # The comparison of single variants on the CPU takes minutes at this size; the loops are compared below.
        bundle = export_bundle(
            str(weights), schedule, folder / f"{model.name}-{name}", ExportOptions(dtype="fp16", check=False)
        )
        plan = bundle.manifest.plan
        case: dict[str, Any] = {
            "model": model.name,
            "case": name,
            "launches": len(plan.launches),
            "variants": len(plan.variants),
            "macs": plan.macs_run,
            "mac_ratio": plan.evaluations * plan.macs_full / plan.macs_run,
            "cache_bytes": plan.arena_bytes,
            "export_seconds": round(time.perf_counter() - start, 1),
            "floor_ms": floor(bundle, report["roof"]),
            "runs": [],
        }
        report["cases"].append(case)
        inputs = make_inputs(bundle)
        reference = torch_loop(weights, schedule, inputs, torch.float32)()
        runners: list[tuple[str, Callable[[], Runner]]] = [
            *((f"{b} graph={m}", backend_runner(bundle, inputs, b, m, timing_cache)) for b, m in backend_modes()),
            *(
                (f"torch {how}", functools.partial(torch_runner, weights, schedule, inputs, how))
                for how in ("eager", "compile", "cudagraph")
            ),
        ]
        for label, make in runners:
            case["runs"].append(run := measure(label, make, reference, repeats))
            if "error" in run or run["difference"] > TOLERANCE:
                report["failures"].append(f"{model.name} {name} {label}: {run.get('error') or run['difference']}")
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Runner:
    """A loop that is ready: call it for the final latents (1, C, h, w), float32 on the host."""

    call: Callable[[], np.ndarray]
    stream: Any
    facts: Mapping[str, Any]


def measure(label: str, make: Callable[[], Runner], reference: np.ndarray, repeats: int) -> dict[str, Any]:
    """Milliseconds of the loop, its difference to the reference, and memory; or the error that stopped it."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    try:
        with used_memory() as used:
            start = time.perf_counter()
            runner = make()
            result = runner.call()
            ready = time.perf_counter() - start
            times = event_times(runner.call, repeats, runner.stream)
            gaps = launch_gaps(runner.call)
    except (UserError, RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return {"what": label, "error": " ".join(str(error).split())[:300]}
    scale = float(np.abs(reference).max())
    finite = bool(np.isfinite(result).all())
    return {
        "what": label,
        "ms_median": statistics.median(times),
        "ms_min": min(times),
        "ms_all": times,
        "difference": float(np.abs(result - reference).max()) / scale if finite else 1e9,
        "gaps": gaps,
        "device_bytes": used["bytes"],
        "seconds_until_first": round(ready, 2),
        **runner.facts,
    }


def launch_gaps(call: Callable[[], object]) -> dict[str, float] | None:
    """One more loop under torch's profiler, which sees every kernel and copy of the process.

    Milliseconds: ``span_ms`` from the first one's start to the last one's end, ``busy_ms`` with at least one running,
    ``gap_ms`` with none: what launching and switching graphs costs the device. None where the profiler sees nothing.
    """
    import torch
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return gaps_between([(span.start, span.end) for span in found])


def gaps_between(intervals: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Span, busy and idle milliseconds of (start, end) intervals in microseconds, which may overlap."""
    if not intervals:
        return None
    ordered = sorted(intervals)
    busy, until = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    span = until - ordered[0][0]
    return {"span_ms": span / 1e3, "busy_ms": busy / 1e3, "gap_ms": (span - busy) / 1e3}


@contextmanager
def used_memory() -> Iterator[dict[str, int]]:
    """How much the GPU's free memory shrank until the block's end."""
    import torch

    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    used = {"bytes": 0}
    yield used
    used["bytes"] = before - torch.cuda.mem_get_info()[0]


def backend_modes() -> list[tuple[str, str]]:
    """(backend, CUDA graph mode) of what is installed."""
    import importlib.util

    found = [
        (flavour.backend, mode)
        for flavour in FLAVOURS.values()
        if importlib.util.find_spec(flavour.module) is not None
        for mode in ("off", "step", "loop")
    ]
    return [*found, ("cuda", "off")]


def backend_runner(
    bundle: Bundle, inputs: Inputs, backend: str, mode: Any, timing_cache: Path | None
) -> Callable[[], Runner]:
    """Builds what is needed (kept between modes), loads and binds."""

    def make() -> Runner:
        import torch

        from dipgo_deploy.backends import create_backend
        from dipgo_deploy.backends.tensorrt import TensorRTBackend
        from dipgo_deploy.engine.build import BuildOptions, build_engines
        from dipgo_deploy.runtime.loop import DenoisingLoop

        facts: dict[str, Any] = {}
        if backend in FLAVOURS:
            # Whether TensorRT-RTX takes this GPU's generation shows here first.
            current = ("current",) if FLAVOURS[backend].compute_capabilities else ()
            built = build_engines(
                bundle.path, backend, BuildOptions(compute_capabilities=current, timing_cache=timing_cache)
            )
            facts["build_seconds"] = sum(engine.record.seconds for engine in built.engines)
            facts["plan_bytes"] = sum(engine.record.plan_bytes for engine in built.engines)
        created = create_backend(backend, cuda_graph=mode)
        loop = DenoisingLoop(bundle, created)
        stream = torch.cuda.current_stream()
        if isinstance(created, TensorRTBackend):
            stream = torch.cuda.ExternalStream(created.stream)
            facts["memory"] = created.memory()

        def call() -> np.ndarray:
            return loop.run(inputs.latents, inputs.conditions, guidance_scale=GUIDANCE_SCALE)

        return Runner(call, stream, facts)

    return make


@dataclass(frozen=True)
class Inputs:
    """One image: unit noise (1, C, h, w) float32, and the conditions of both halves, float32 or int64."""

    latents: np.ndarray
    conditions: Mapping[str, np.ndarray]


def make_inputs(bundle: Bundle) -> Inputs:
    """Seeded inputs of the manifest's shapes; the unconditional half comes first."""
    random = np.random.default_rng(0)
    manifest = bundle.manifest
    latent = manifest.latent
    conditions = {
        spec.name: np.arange(spec.shape[0], dtype=np.int64).reshape(spec.shape)
        if spec.dtype == "int64"
        else random.normal(size=spec.shape).astype(np.float32)
        for spec in manifest.conditions
    }
    shape = (manifest.batch, latent.channels, latent.height, latent.width)
    return Inputs(random.normal(size=shape).astype(np.float32), conditions)


def make_model(model: Model, folder: Path) -> Path:
    """A denoiser's folder in diffusers' format, random weights of a fixed seed, exactly representable in fp16."""
    import diffusers
    import torch

    torch.manual_seed(0)
    made = getattr(diffusers, model.class_name)(**model.config).half().float()
    made.save_pretrained(folder, safe_serialization=True)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler))
    return folder


def torch_loop(
    weights: Path,
    schedule: Schedule,
    inputs: Inputs,
    dtype: torch.dtype,
    wrap: Callable[[Any], Any] | None = None,
    device: str = "cuda",
) -> Callable[[], np.ndarray]:
    """The supernet's loop: diffusers' own forward and scheduler, with the schedule's gates."""
    import torch

    from dipgo_deploy.sampler import make_scheduler
    from dipgo_deploy.supernet.gated import Supernet
    from dipgo_deploy.supernet.load import load_denoiser
    from dipgo_deploy.supernet.loop import run_loop

    model, family, config = load_denoiser(weights, dtype)
    model.to(device).requires_grad_(False)
    if wrap is not None:
        wrap(model)
    specs = family.blocks(config, schedule.model.granularity)
    supernet = Supernet(model, specs, [schedule.cache_kinds[spec.name] for spec in specs], family.call)
    scheduler = make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
    latents = torch.from_numpy(inputs.latents).to(device)
    steps = schedule.sampler.num_inference_steps
    conditions = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in ((name, torch.from_numpy(array).to(device)) for name, array in inputs.conditions.items())
    }

    def call() -> np.ndarray:
        with torch.no_grad():
            final = run_loop(
                supernet,
                scheduler,
                schedule.gates,
                latents,
                conditions,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                set_timesteps_kwargs=family.set_timesteps(config, scheduler.config, *latents.shape[2:], steps),
            )
        result: np.ndarray = final.float().cpu().numpy()
        return result

    return call


def torch_runner(weights: Path, schedule: Schedule, inputs: Inputs, how: str) -> Runner:
    """A torch peer in fp16: ``eager``, or its blocks compiled (``cudagraph``: into captured CUDA graphs)."""
    import torch

    def compiled(model: Any) -> None:
        # Block by block: the blocks that a schedule skips are whole modules, and the model's own forward has hooks.
        mode = "reduce-overhead" if how == "cudagraph" else None
        for module in model.children():
            for block in module if isinstance(module, torch.nn.ModuleList) else [module]:
                block.compile(mode=mode)

    call = torch_loop(weights, schedule, inputs, torch.float16, None if how == "eager" else compiled)
    return Runner(call, torch.cuda.current_stream(), {"torch_peak_bytes": torch.cuda.max_memory_allocated()})


def floor(bundle: Bundle, roof: Mapping[str, float]) -> float:
    """Milliseconds below which no loop can come: its FLOPs, and its weights read once a launch, at measured rates."""
    from dipgo_deploy.backends.tensorrt_plans import WeightHashes

    hashes = WeightHashes()
    plan = bundle.manifest.plan
    sizes = [hashes.digest(bundle.path / variant.graph.file)[1] for variant in plan.variants]
    seconds = 0.0
    for launch in plan.launches:
        arithmetic = 2 * plan.variants[launch.variant].macs / roof["flops"]
        # The measured rate counts what a copy reads and what it writes.
        seconds += max(arithmetic, sizes[launch.variant] / roof["bytes_per_second"])
    return seconds * 1e3


def table(report: Mapping[str, Any]) -> str:
    """Markdown: one table a model, one row a case and runner."""
    gpu = report["gpu"]
    lines = [f"# {gpu['name']} ({gpu['compute_capability']}), driver {gpu['driver']}", ""]
    if report["tests"]:
        lines += [f"GPU tests: {report['tests']['summary']}", ""]
    head = ["model", "case", "runner", "ms/loop", "speed-up", "MAC ratio", "difference", "MiB", "floor ms", "gaps ms"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    full = {
        (case["model"], run["what"]): run.get("ms_median")
        for case in report["cases"]
        if case["case"] == "full"
        for run in case["runs"]
    }
    for case in report["cases"]:
        for run in case["runs"]:
            cells = [case["model"], case["case"], run["what"]]
            if "error" in run:
                lines.append("| " + " | ".join([*cells, run["error"], *[""] * 6]) + " |")
                continue
            base = full.get((case["model"], run["what"]))
            cells += [
                f"{run['ms_median']:.2f}",
                f"{base / run['ms_median']:.2f}" if base else "",
                f"{case['mac_ratio']:.2f}",
                f"{run['difference']:.1e}",
                f"{run['device_bytes'] / 2**20:.0f}",
                f"{case['floor_ms']:.2f}",
                f"{run['gaps']['gap_ms']:.2f}" if run["gaps"] else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if report["failures"]:
        lines += ["", "Failures:", *(f"- {failure}" for failure in report["failures"])]
    return "\n".join(lines) + "\n"


def save(report: Mapping[str, Any], device: Device) -> None:
    """Write the JSON and the table under the GPU's name."""
    from dipgo_deploy.bundle.files import write_atomic

    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f"{name}.json", json.dumps(report, indent=1).encode() + b"\n")
    write_atomic(RESULTS / f"{name}.md", table(report).encode())


def main() -> int:
    """Exit status 0, 1 (something failed) or 2 (no GPU, or a package is missing)."""
    from dipgo_deploy.cli.common import entry_point

    return entry_point(command)(None)


if __name__ == "__main__":
    sys.exit(main())
