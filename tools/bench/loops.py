"""A denoising loop under the clock: as a whole, inside its graphs, and as bare ONNX Runtime runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.bench.examples import example_input
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.runtime.loop import DenoisingLoop
from tools.bench.measure import TimedBackend, alternate, spread

GUIDANCE_SCALE = 4.0


def loop_inputs(shape: tuple[int, ...], manifest: Manifest) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Noise of a shape and the conditions of a run that nobody looks at, always the same."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape, dtype=np.float32)
    return noise, {spec.name: example_input(spec, rng) for spec in manifest.conditions}


class MeasuredLoop:
    """The loop of an engine directory on ONNX Runtime's CPU provider, with fixed inputs.

    share_weights: see ``OnnxRuntimeBackend``. load_seconds: making and binding all sessions. inside: of each run, the
    seconds spent in its launches. clock: what runs are timed with; on one thread ``time.thread_time`` leaves out what
    other processes take.
    """

    def __init__(
        self,
        engine_dir: Path,
        threads: int | None,
        share_weights: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        start = time.perf_counter()
        bundle = Bundle.open(engine_dir)
        self._clock = clock
        self._backend = TimedBackend(OnnxRuntimeBackend("cpu", threads=threads, share_weights=share_weights), clock)
        self._loop = DenoisingLoop(bundle, self._backend)
        self.load_seconds = time.perf_counter() - start
        self.manifest = bundle.manifest
        self.inside: list[float] = []
        self._noise, self._conditions = loop_inputs(self._loop.sample_shape, self.manifest)

    def run(self) -> float:
        """Denoise once; seconds of the whole loop."""
        before = self._backend.seconds
        start = self._clock()
        self._loop.run(self._noise, self._conditions, guidance_scale=GUIDANCE_SCALE)
        seconds = self._clock() - start
        self.inside.append(self._backend.seconds - before)
        return seconds


class BareLaunches:
    """The same launches in the same order as bare ``run_with_iobinding`` calls on sessions of their own."""

    def __init__(self, engine_dir: Path, threads: int | None) -> None:
        import onnxruntime

        plan = Bundle.open(engine_dir).manifest.plan
        rng = np.random.default_rng(0)
        options = onnxruntime.SessionOptions()
        # As the runtime does: threads that spin on after a run would take the cores from the next session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        self._run_options = onnxruntime.RunOptions()
        # As the runtime does: without it each run raises and catches an exception inside ONNX Runtime (30 us).
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")
        runs = []
        for variant in plan.variants:
            session = onnxruntime.InferenceSession(
                str(engine_dir / variant.graph.file), options, providers=["CPUExecutionProvider"]
            )
            binding = session.io_binding()
            for spec in variant.graph.inputs:
                values = example_input(spec, rng).astype(spec.dtype)
                binding.bind_ortvalue_input(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
            for spec in variant.graph.outputs:
                empty = np.zeros(spec.shape, spec.dtype)
                binding.bind_ortvalue_output(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(empty))
            runs.append((session, binding))
        self._launches: list[tuple[Any, Any]] = [runs[launch.variant] for launch in plan.launches]

    def run(self) -> float:
        """All launches once; the sum of their seconds."""
        total = 0.0
        for session, binding in self._launches:
            start = time.perf_counter()
            session.run_with_iobinding(binding, self._run_options)
            total += time.perf_counter() - start
        return total


def compare_loops(full: Path, pruned: Path, repeats: int, threads: int | None, *, bare: bool = True) -> dict[str, Any]:
    """Full and pruned loop in turn with each other and, if ``bare``, with bare runs of their launches.

    Per loop: launches, load seconds, loop milliseconds, and microseconds per launch that the loop takes beyond
    ``inside`` its own launches and beyond the ``bare`` runs (noisy: two sets of sessions). ``speedup``: of the loops,
    round by round. ``ideal_speedup``: ratio of the multiply-accumulates launched. ``quotient``: of the two.
    """
    loops = {"full": MeasuredLoop(full, threads), "pruned": MeasuredLoop(pruned, threads)}
    calls: dict[str, Callable[[], float]] = {name: loop.run for name, loop in loops.items()}
    if bare:
        calls |= {
            f"bare {name}": BareLaunches(path, threads).run for name, path in (("full", full), ("pruned", pruned))
        }
    seconds = alternate(calls, repeats)
    facts: dict[str, Any] = {}
    for name, loop in loops.items():
        facts[name] = _loop_facts(loop, seconds[name], seconds.get(f"bare {name}"))
    ratios = spread(seconds["full"] / seconds["pruned"])
    ideal = macs(loops["full"].manifest) / macs(loops["pruned"].manifest)
    facts["speedup"] = ratios
    facts["ideal_speedup"] = ideal
    facts["quotient"] = ratios["median"] / ideal
    return facts


def macs(manifest: Manifest) -> int:
    """Multiply-accumulates of all launches of a loop."""
    return manifest.plan.macs_run


def _loop_facts(loop: MeasuredLoop, seconds: np.ndarray, bare: np.ndarray | None) -> dict[str, Any]:
    plan = loop.manifest.plan
    launches = len(plan.launches)
    inside = np.array(loop.inside[-len(seconds) :])
    facts: dict[str, Any] = {
        "evaluations": plan.evaluations,
        "layout": plan.layout,
        "launches": launches,
        "variants": len(plan.variants),
        "macs": macs(loop.manifest),
        "load_seconds": loop.load_seconds,
        "loop_ms": spread(seconds * 1e3),
        "overhead_us": spread((seconds - inside) / launches * 1e6),
    }
    if bare is not None:
        facts["bare_ms"] = spread(bare * 1e3)
        facts["overhead_to_bare_us"] = spread((seconds - bare) / launches * 1e6)
    return facts
