"""What all measurements share: alternating timing, launches timed inside the loop, and the machine's description."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dipgo_deploy.backends.base import Backend, ChangedWeights, Executable, Launchable, Memory
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.models.location import denoiser_config, resolve_model

PACKAGES = ("numpy", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "torch", "diffusers", "transformers")


class TimedBackend:
    """A backend that adds up the seconds its launches take (``seconds``, by ``clock``); for backends whose launches
    block."""

    def __init__(self, inner: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = inner.name
        self.clock = clock
        self.seconds = 0.0
        self._inner = inner

    def check(self, manifest: Manifest) -> None:
        """As the wrapped backend."""
        self._inner.check(manifest)

    def allocate(self, nbytes: int) -> Memory:
        """As the wrapped backend."""
        return self._inner.allocate(nbytes)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """As the wrapped backend."""
        self._inner.upload(memory, array)

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        """As the wrapped backend."""
        return self._inner.download(memory, spec, copy=copy)

    def synchronize(self) -> None:
        """As the wrapped backend."""
        self._inner.synchronize()

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> Executable:
        """As the wrapped backend; launches of the graph are timed."""
        return _TimedExecutable(self._inner.load(engine_dir, graph, weights), self)

    def release(self, executable: Any) -> None:
        """As the wrapped backend."""
        self._inner.release(executable.inner)

    def memory(self) -> dict[str, int]:
        """As the wrapped backend."""
        return self._inner.memory()


class _TimedExecutable:
    def __init__(self, inner: Executable, backend: TimedBackend) -> None:
        self.graph = inner.graph
        self.inner = inner
        self._backend = backend

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        call, backend, clock = self.inner.bind(tensors, graph), self._backend, self._backend.clock

        def timed() -> None:
            start = clock()
            call()
            backend.seconds += clock() - start

        return timed


def alternate(calls: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Run all calls in turn, ``repeats`` rounds after ``warmup`` unrecorded ones; what they return, by name.

    Taking turns exposes all of them to the same drift of the machine (clock speed, other work).
    """
    rounds = [{name: call() for name, call in calls.items()} for _ in range(warmup + repeats)][warmup:]
    return {name: np.array([values[name] for values in rounds]) for name in calls}


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """The call, returning the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q1": float(low), "q3": float(high)}


def denoiser_hash(model: str) -> str:
    """sha256 of a built-in model's denoiser weights: results are those of these weights."""
    family, _ = denoiser_config(resolve_model(model))
    return sha256_file(Path(resolve_model(model)) / family.component / "diffusion_pytorch_model.safetensors")


def machine(threads: int | None) -> dict[str, Any]:
    """Processor, cores, threads (None: several), Python, packages, and the load average when it was asked."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The same as one line for a reader."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    threads = f"{facts['threads']} threads, " if facts["threads"] else ""
    return (
        f"{facts['processor']}, {facts['cores']} cores, {threads}{facts['system']}, "
        f"Python {facts['python']}, {packages}; load average at the start {facts['load_average']}"
    )


def machine_lines(rows: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A line for each machine of rows, without the load; all but the one of most rows say which are theirs."""
    machines: dict[str, list[str]] = {}
    for row in rows:
        machines.setdefault(machine_line(row["machine"]).partition("; load average")[0], []).append(name(row))
    most = max((len(names) for names in machines.values()), default=0)
    return [
        line + ("" if len(names) == most else f" ({', '.join(dict.fromkeys(names))} only)") + ".\n"
        for line, names in machines.items()
    ]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_another_process(script: str, *arguments: str) -> Any:
    """What Python prints last when it runs ``script`` in a process of its own, as JSON.

    Raises:
        click.ClickException: the process failed; its last line says why.
    """
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])
