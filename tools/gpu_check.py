"""Everything that only a GPU can show, in one command: ``python -m tools.gpu_check`` (from the repository's root).

Runs the GPU-marked tests; exports Stable Diffusion 1.5's UNet and DiT-XL/2 at full size (random weights, fp16), full
and pruned; builds and times them on every backend that is installed, with torch (eager, compiled, as captured CUDA
graphs) as peers in the same process; compares every result with one float32 reference of the same schedule; and writes
``<gpu>.json`` and a table beside it into ``docs/results``. What matters most comes first, and what ``--minutes`` leaves
no time for is listed as not run. Needs torch for CUDA and the extras ``export``, ``test`` and one or both of
``tensorrt`` and ``tensorrt-rtx``; nothing is downloaded. Exit status 2 without an NVIDIA GPU, 1 if a test or comparison
failed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError, find_device
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.errors import UserError
from tools.gpu.measure import Runner, floor, measure, measured_roof
from tools.gpu.models import GUIDANCE_SCALE, MODELS, STEPS, Inputs, Model, make_inputs, make_model
from tools.gpu.peers import torch_loop, torch_runner
from tools.gpu.report import described, save, table

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.schedule.document import Schedule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# fp16 over 50 steps against float32 over the same steps, largest absolute difference over the largest value.
TOLERANCE = 0.05
# The part of the time that the tests may take.
TESTS_SHARE = 0.4


@dataclass
class Case:
    """An exported schedule, its inputs, its entry in the report, and its reference once there is one."""

    schedule: Schedule
    bundle: Bundle
    inputs: Inputs
    entry: dict[str, Any]
    reference: np.ndarray | None = None


MakeRunner = Callable[[Case], Runner]


@dataclass
class Budget:
    """The time that is left until ``deadline`` (of ``time.monotonic``), and what each kind of work has taken."""

    deadline: float
    taken: dict[str, float] = field(default_factory=dict)

    def part(self, parts: int) -> Budget:
        """An even part of what is left."""
        now = time.monotonic()
        return Budget(now + max(self.deadline - now, 0.0) / parts)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def allows(self, what: str) -> bool:
        """Whether there is time for it, by what it took before."""
        return self.left > self.taken.get(what, 0.0)


@click.command(name="gpu_check")
@click.option("--repeats", type=click.IntRange(min=3), default=10, show_default=True, help="Timed loops of each case.")
@click.option(
    "--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS]), help="Only these."
)
@click.option("--skip-tests", is_flag=True, help="Do not run the GPU-marked tests first.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="For TensorRT's builds.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.1), default=9.5, show_default=True, help="Start nothing new after these."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the results.  [default: docs/results]"
)
def command(
    repeats: int, names: tuple[str, ...], skip_tests: bool, timing_cache: Path | None, minutes: float, out: Path
) -> None:
    """Check and time everything on this machine's GPU; see the module's text."""
    budget = Budget(time.monotonic() + 60 * minutes)
    try:
        device = find_device()
    except NoDeviceError as error:
        raise UserError(f"{error}: nothing was checked") from None
    import torch

    if not torch.cuda.is_available():
        raise UserError("this torch has no CUDA; install a torch for CUDA to have the peers and the reference")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"gpu": described(device), "tests": None, "cases": [], "failures": [], "not_run": []}

    def keep() -> None:
        save(report, device, out)  # what is known so far survives a later crash

    keep()
    if not skip_tests:
        report["tests"] = run_gpu_tests(TESTS_SHARE * budget.left)
        if report["tests"]["status"]:
            report["failures"].append(f"GPU tests: {report['tests']['summary']}")
        keep()
    report["roof"] = measured_roof()
    models = [model for model in MODELS if not names or model.name in names]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for place, model in enumerate(models):
            weights, cases = exported(model, Path(folder), report)
            runners = all_runners(weights, timing_cache)
            check_cases(weights, cases, runners, repeats, report, budget.part(len(models) - place), keep)
    keep()
    click.echo(table(report))
    if report["failures"]:
        raise SystemExit(1)


def run_gpu_tests(seconds: float) -> dict[str, Any]:
    """The tests marked ``gpu``, in a process of their own."""
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        shown = (error.stdout or b"").decode(errors="replace").splitlines()[-5:]
        return {"status": None, "summary": f"not run to their end in {seconds:.0f} s", "failed": shown}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"status": done.returncode, "summary": lines[-1] if lines else "", "failed": lines[-15:-1]}


def exported(model: Model, folder: Path, report: dict[str, Any]) -> tuple[Path, list[Case]]:
    """The model's folder, and all its cases from one trace, each with an entry in the report."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, publish, replan
    from dipgo_deploy.models.target import schedule_target

    weights = make_model(model, folder / model.name)
    target = schedule_target(str(weights), "ddim", STEPS)
    planned, cases = None, []
    for name, gates in model.cases.items():
        start = time.perf_counter()
        schedule = target.schedule(gates(target), name, {})
        # The comparison of single variants on the CPU takes minutes at this size; the loops are compared below. Frugal
        # exports are written once, and this trace serves several.
        options = ExportOptions(layout="variants", dtype="fp16", check=False, low_memory=False)
        planned = plan_export(str(weights), schedule, options) if planned is None else replan(planned, schedule)
        bundle = publish(planned, folder / f"{model.name}-{name}")
        plan = bundle.manifest.plan
        entry: dict[str, Any] = {
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
        report["cases"].append(entry)
        cases.append(Case(schedule, bundle, make_inputs(bundle), entry))
    return weights, cases


def check_cases(
    weights: Path,
    cases: Sequence[Case],
    runners: Sequence[tuple[str, MakeRunner]],
    repeats: int,
    report: dict[str, Any],
    budget: Budget,
    keep: Callable[[], None],
) -> None:
    """Every runner on every case, one runner after the other, so that a speed-up needs few runs to be known."""
    import torch

    for label, make in runners:
        for case in cases:
            what = f"{case.entry['model']} {case.entry['case']} {label}"
            if not budget.allows(label):
                report["not_run"].append(what)
                continue
            start = time.monotonic()
            if case.reference is None:
                case.reference = torch_loop(weights, case.schedule, case.inputs, torch.float32)()
                torch.cuda.empty_cache()
            run = measure(label, lambda make=make, case=case: make(case), case.reference, repeats)  # type: ignore[misc]
            torch.cuda.empty_cache()
            case.entry["runs"].append(run)
            if "error" in run or run["difference"] > TOLERANCE:
                report["failures"].append(f"{what}: {run.get('error') or run['difference']}")
            budget.taken[label] = time.monotonic() - start
            told = run.get("error") or f"{run['ms_median']:.2f} ms, difference {run['difference']:.1e}"
            click.echo(f"{what}: {told} ({budget.taken[label]:.0f} s, {max(budget.left, 0):.0f} s left)", err=True)
            keep()


def all_runners(weights: Path, timing_cache: Path | None) -> list[tuple[str, MakeRunner]]:
    """Every way to run a case, those first whose numbers are wanted most."""
    installed = [f.backend for f in FLAVOURS.values() if importlib.util.find_spec(f.module) is not None]

    def engines(mode: str) -> list[tuple[str, MakeRunner]]:
        return [(f"{backend} graph={mode}", on_backend(backend, mode, timing_cache)) for backend in installed]

    def peer(how: str) -> tuple[str, MakeRunner]:
        return f"torch {how}", lambda case: torch_runner(weights, case.schedule, case.inputs, how)

    return [
        *engines("loop"),
        peer("eager"),
        ("cuda graph=off", on_backend("cuda", "off", timing_cache)),
        *engines("off"),
        peer("compile"),
        *engines("step"),
        peer("cudagraph"),
    ]


def on_backend(backend: str, mode: Any, timing_cache: Path | None) -> MakeRunner:
    """Builds what is needed (kept between modes), loads and binds."""

    def make(case: Case) -> Runner:
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
                case.bundle.path, backend, BuildOptions(compute_capabilities=current, timing_cache=timing_cache)
            )
            facts["build_seconds"] = sum(engine.record.seconds for engine in built.engines)
            facts["plan_bytes"] = sum(engine.record.plan_bytes for engine in built.engines)
        created = create_backend(backend, cuda_graph=mode)
        loop = DenoisingLoop(case.bundle, created)
        stream = torch.cuda.current_stream()
        if isinstance(created, TensorRTBackend):
            stream = torch.cuda.ExternalStream(created.stream)
            facts["memory"] = created.memory()

        def call() -> np.ndarray:
            return loop.run(case.inputs.latents, case.inputs.conditions, guidance_scale=GUIDANCE_SCALE)

        return Runner(call, stream, facts)

    return make


def main() -> int:
    """Exit status 0, 1 (something failed) or 2 (no GPU, or a package is missing)."""
    from dipgo_deploy.cli.common import entry_point

    return entry_point(command)(None)


if __name__ == "__main__":
    sys.exit(main())
