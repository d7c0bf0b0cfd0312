"""Where the time of a denoising loop goes: launches, kernels by block and by kind, and the host."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.backends.base import ChangedWeights, Launchable, Memory
from dipgo_deploy.backends.onnxruntime import OnnxExecutable, OnnxRuntimeBackend
from dipgo_deploy.bench.examples import example_input
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.runtime.loop import DenoisingLoop

OUTSIDE = "(outside the blocks)"
# What moves or converts data without computing anything; a reorder is ONNX Runtime's change of a convolution's layout.
COPIES = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Identity", "MemcpyFromHost", "MemcpyToHost", "Pad", "ReorderInput"}
    | {"ReorderOutput", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class LoopProfile:
    """Seconds of one run, the means of several.

    Attributes:
        loop: the whole, measured without the profiler.
        launches: per launch of the plan, its part of that.
        blocks, operators: of the kernels, as the profiler of ONNX Runtime measured them in runs of their own, by block
            of the schedule (``OUTSIDE``: embeddings, head, sampler and guidance) and by operator.
    """

    loop: float
    launches: tuple[float, ...]
    blocks: Mapping[str, float]
    operators: Mapping[str, float]

    @property
    def host(self) -> float:
        """Seconds beside the launches: uploads, the Python loop, the last weighted sum."""
        return self.loop - sum(self.launches)

    @property
    def kernels(self) -> float:
        """Seconds inside kernels."""
        return sum(self.blocks.values())

    @property
    def copies(self) -> float:
        """Seconds of kernels that only move or convert data."""
        return sum(seconds for name, seconds in self.operators.items() if name in COPIES)


class _Launches:
    """Adds up the seconds of each launch of a loop, in the order of binding."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def wrap(self, call: Launchable) -> Launchable:
        place = len(self.seconds)
        self.seconds.append(0.0)

        def timed() -> None:
            start = time.perf_counter()
            call()
            self.seconds[place] += time.perf_counter() - start

        return timed


class _Executable:
    def __init__(self, inner: OnnxExecutable, launches: _Launches) -> None:
        self.graph = inner.graph
        self._inner = inner
        self._launches = launches

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        return self._launches.wrap(self._inner.bind(tensors, graph))


class _TimedBackend(OnnxRuntimeBackend):
    def __init__(self, launches: _Launches, **options: Any) -> None:
        super().__init__("cpu", **options)
        self._launches = launches

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> Any:
        return _Executable(super().load(engine_dir, graph, weights), self._launches)


class _ProfilingBackend(OnnxRuntimeBackend):
    """Sessions that write what each of their kernels took."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__("cpu", **options)
        self._folder = folder
        self._executables: list[OnnxExecutable] = []

    def session_options(self) -> Any:
        options = super().session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(self._folder / f"session{len(self._executables)}")
        return options

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> OnnxExecutable:
        executable = super().load(engine_dir, graph, weights)
        self._executables.append(executable)
        return executable

    def events(self) -> Iterable[dict[str, Any]]:
        for executable in self._executables:
            yield from json.loads(Path(executable.end_profiling()).read_text(encoding="utf-8"))


def profile_loop(
    bundle: Bundle, *, repeats: int = 3, threads: int | None = None, share_weights: bool | None = None
) -> LoopProfile:
    """Run the denoising loop of an engine directory on random inputs with ONNX Runtime's CPU provider.

    Raises:
        UserError: the backend cannot run it, or the model's family is not known here.
    """
    options: dict[str, Any] = {"threads": threads, "share_weights": share_weights}
    launches = _Launches()
    loop = DenoisingLoop(bundle, _TimedBackend(launches, **options))
    _run(loop, bundle)
    launches.seconds = [0.0] * len(launches.seconds)
    start = time.perf_counter()
    for _ in range(repeats):
        _run(loop, bundle)
    total = (time.perf_counter() - start) / repeats
    del loop
    with tempfile.TemporaryDirectory() as folder:
        profiling = _ProfilingBackend(Path(folder), **options)
        loop = DenoisingLoop(bundle, profiling)
        for _ in range(repeats):
            _run(loop, bundle)
        blocks, operators = sum_kernels(profiling.events(), block_modules(bundle))
    return LoopProfile(
        loop=total,
        launches=tuple(seconds / repeats for seconds in launches.seconds[: len(bundle.manifest.plan.launches)]),
        blocks={name: seconds / repeats for name, seconds in blocks.items()},
        operators={name: seconds / repeats for name, seconds in operators.items()},
    )


def block_modules(bundle: Bundle) -> dict[str, str]:
    """Path of a module -> block that it belongs to, in the order of the blocks. A block of several modules has the
    name of one of them only.

    Raises:
        UserError: the model's family is not known here.
    """
    model = bundle.manifest.model
    blocks = family_for(model.class_name).blocks(model.config, model.granularity)
    return {module: block.name for block in blocks for module in block.modules}


def sum_kernels(
    events: Iterable[Mapping[str, Any]], modules: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the kernels in ONNX Runtime's profile, by block (in order, then ``OUTSIDE``) and by operator, the
    costliest first. modules: see ``block_modules``."""
    by_block: dict[str, float] = defaultdict(float)
    by_operator: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        seconds = event["dur"] / 1e6
        by_block[block_of(str(event["name"]), modules)] += seconds
        by_operator[event["args"]["op_name"]] += seconds
    ordered = {name: by_block[name] for name in (*modules.values(), OUTSIDE) if name in by_block}
    return ordered, dict(sorted(by_operator.items(), key=lambda item: -item[1]))


def block_of(node: str, modules: Mapping[str, str]) -> str:
    """The block that a node, or a kernel, is of, by its name; ``OUTSIDE`` for one of none. modules: see
    ``block_modules``."""
    module = node.partition("/")[0]
    within = max((path for path in modules if f"{module}.".startswith(f"{path}.")), key=len, default=None)
    return OUTSIDE if within is None else modules[within]


def _run(loop: DenoisingLoop, bundle: Bundle) -> None:
    manifest = bundle.manifest
    random = np.random.default_rng(0)
    noise = random.standard_normal(loop.sample_shape, dtype=np.float32)
    noises = random.standard_normal((manifest.plan.noises, *loop.sample_shape), dtype=np.float32)
    conditions = {spec.name: example_input(spec, random) for spec in manifest.conditions}
    scale = manifest.guidance_scale or 1.0
    loop.run(noise, conditions, noises=noises if len(noises) else None, guidance_scale=scale)
