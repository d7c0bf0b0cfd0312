"""The order of launches and graphs, with ONNX Runtime on the CPU doing the work: the same loop, the same buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from toy_engine import LENGTH, ROUTE, WIDTH, C, H, Toy, W, build, reference

from dipgo_deploy.backends.base import ChangedWeights, Launchable, Memory
from dipgo_deploy.backends.onnxruntime import OnnxExecutable, OnnxRuntimeBackend
from dipgo_deploy.backends.tensorrt_queue import GRAPH_MODES, LaunchQueue, Run
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, TensorSpec
from dipgo_deploy.runtime.component import Component
from dipgo_deploy.runtime.loop import DenoisingLoop

TOY = Toy()


class BoundRun:
    def __init__(self, launch: Launchable, context: object) -> None:
        self.launch, self.context = launch, context

    def __call__(self) -> None:
        self.launch()


class QueuedExecutable:
    def __init__(self, executable: OnnxExecutable, backend: QueuedBackend) -> None:
        self.graph = executable.graph
        self._executable, self._backend = executable, backend

    def bind(self, tensors: Mapping[str, Memory]) -> Launchable:
        context = object() if self._backend.mode == "step" else self
        run = BoundRun(self._executable.bind(tensors), context)
        return lambda: self._backend.queue.submit(run)


class QueuedBackend(OnnxRuntimeBackend):
    """ONNX Runtime behind the queue that TensorRT's launches go through."""

    def __init__(self, mode: str) -> None:
        super().__init__("cpu", threads=1)
        self.mode = mode
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.queue = LaunchQueue(mode, self.capture)

    def capture(self, runs: Sequence[Run]) -> Callable[[], None]:
        fixed = tuple(runs)
        self.captured.append(len(fixed))

        def replay() -> None:
            self.replayed.append(len(fixed))
            for run in fixed:
                run()

        return replay

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> QueuedExecutable:
        return QueuedExecutable(super().load(engine_dir, graph, weights), self)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        self.queue.flush()
        super().upload(memory, array)

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        self.queue.flush()
        return super().download(memory, spec, copy=copy)

    def synchronize(self) -> None:
        self.queue.flush()


def inputs(seed: int):
    random = np.random.default_rng(seed)
    noise = random.normal(size=(TOY.batch, C, H, W)).astype(np.float32)
    noises = random.normal(size=(TOY.noises, TOY.batch, C, H, W)).astype(np.float32)
    states = random.normal(size=(TOY.halves * TOY.batch, LENGTH, WIDTH)).astype(np.float32)
    return noise, noises, {"encoder_hidden_states": states}


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_pictures_are_the_same_bit_for_bit_in_every_mode(tmp_path, mode):
    bundle = Bundle.open(build(tmp_path, TOY))
    plain = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1), poison=True)
    backend = QueuedBackend(mode)
    loop = DenoisingLoop(bundle, backend, poison=True)
    for seed in range(4):  # eager, captured, replayed, replayed
        noise, noises, conditions = inputs(seed)
        got = loop.run(noise, conditions, noises=noises, guidance_scale=1.0 + seed)
        np.testing.assert_array_equal(got, plain.run(noise, conditions, noises=noises, guidance_scale=1.0 + seed))
        want = reference(TOY, noise, noises, conditions["encoder_hidden_states"], 1.0 + seed)
        np.testing.assert_allclose(got, want, atol=2e-5)
    launches = len(ROUTE)
    assert backend.captured == {"off": [], "step": [1] * launches, "loop": [launches]}[mode]
    assert backend.replayed == {"off": [], "step": [1] * 3 * launches, "loop": [launches] * 3}[mode]


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_a_tensor_read_in_the_middle_is_what_was_written_so_far(tmp_path, mode):
    bundle = Bundle.open(build(tmp_path, TOY))
    results = []
    for backend in (OnnxRuntimeBackend("cpu", threads=1), QueuedBackend(mode)):
        loop = DenoisingLoop(bundle, backend, poison=True)
        noise, noises, conditions = inputs(1)
        seen: list[np.ndarray] = []

        def look(index: int, loop: DenoisingLoop = loop, seen: list[np.ndarray] = seen) -> None:
            seen.extend(loop.fetch(index, name) for name in loop.variant(index).writes)

        for _ in range(3):
            loop.run(noise, conditions, noises=noises, on_launch=look)
        results.append(seen)
    assert len(results[0]) == 3 * sum(write is not None for _, _, write in ROUTE)
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_two_loops_and_a_component_share_a_backend(tmp_path, mode):
    bundle = Bundle.open(build(tmp_path, TOY))
    backend = QueuedBackend(mode)
    first, second = DenoisingLoop(bundle, backend, poison=True), DenoisingLoop(bundle, backend, poison=True)
    vae = Component(bundle.path, bundle.manifest.components.vae_decoder, backend)
    plain = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1))
    for seed in range(4):
        noise, noises, conditions = inputs(seed)
        want = plain.run(noise, conditions, noises=noises, guidance_scale=2.0)
        for loop in (first, second):
            np.testing.assert_array_equal(loop.run(noise, conditions, noises=noises, guidance_scale=2.0), want)
        images = vae({"latents": want})["images"]
        np.testing.assert_allclose(images, 1 / (1 + np.exp(-want[:, :3].transpose(0, 2, 3, 1))), atol=1e-6)


class Traced:
    """A run that notes when it runs."""

    def __init__(self, name: str, context: object, log: list[str]) -> None:
        self.name, self.context, self._log = name, context, log

    def __call__(self) -> None:
        self._log.append(self.name)


def traced_queue(mode: str) -> tuple[LaunchQueue, list[str]]:
    log: list[str] = []

    def capture(runs: Sequence[Run]) -> Callable[[], None]:
        names = "+".join(run.name for run in runs)
        log.append(f"capture {names}")
        return lambda: log.append(f"graph {names}")

    return LaunchQueue(mode, capture), log


def go(queue: LaunchQueue, *runs: Run) -> None:
    for run in runs:
        queue.submit(run)
    queue.flush()


def test_a_sequence_is_run_captured_and_replayed():
    queue, log = traced_queue("loop")
    a, b = Traced("a", 1, log), Traced("b", 2, log)
    for _ in range(3):
        go(queue, a, b)
    assert log == ["a", "b", "capture a+b", "graph a+b", "graph a+b"]
    queue.flush()
    assert len(log) == 5


def test_nothing_runs_before_the_flush():
    queue, log = traced_queue("loop")
    queue.submit(Traced("a", 1, log))
    assert log == []
    queue.flush()
    assert log == ["a"]


def test_a_context_belongs_to_one_graph():
    """Another sequence with the context rebinds it, so the graph that was captured from it is not replayed."""
    queue, log = traced_queue("loop")
    a, b, other = Traced("a", 1, log), Traced("b", 2, log), Traced("a'", 1, log)
    for _ in range(2):
        go(queue, a, b)
    log.clear()
    go(queue, other)
    go(queue, a, b)
    assert log == ["a'", "capture a+b", "graph a+b"]


def test_graphs_of_other_contexts_stay():
    queue, log = traced_queue("loop")
    a, b = Traced("a", 1, log), Traced("b", 2, log)
    for run in (a, a, b, b):
        go(queue, run)
    log.clear()
    go(queue, a)
    go(queue, b)
    assert log == ["graph a", "graph b"]


def test_steps_with_contexts_of_their_own_keep_their_graphs():
    queue, log = traced_queue("step")
    runs = [Traced(name, name, log) for name in "abc"]
    for _ in range(2):
        go(queue, *runs)
    log.clear()
    go(queue, *runs)
    assert log == ["graph a", "graph b", "graph c"]


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_invalidated_graphs_are_warmed_up_and_captured_again(mode):
    queue, log = traced_queue(mode)
    a = Traced("a", 1, log)
    go(queue, a)
    go(queue, a)
    queue.invalidate()
    log.clear()
    for _ in range(3):
        go(queue, a)
    assert log == ["a", "capture a", "graph a", "graph a"]


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_forgotten_is_held_no_more(times):
    """Run alone (warm) or captured: the queue would keep a graph that was let go of, with its weights."""
    queue, log = traced_queue("loop")
    let_go, stays = Traced("a", object(), log), Traced("b", 2, log)
    for run in (let_go, stays):
        for _ in range(times):
            go(queue, run)
    context = weakref.ref(let_go)
    queue.forget([let_go.context])
    del run, let_go
    assert context() is None
    log.clear()
    go(queue, stays)
    assert log == (["capture b", "graph b"] if times == 1 else ["graph b"])
