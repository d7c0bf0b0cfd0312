"""The largest values of activations, recorded while an engine directory runs its own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.backends.base import ChangedWeights, Executable, Launchable, Memory
from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.bundle.manifest import Graph, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

PEAKS = "activation_peaks"


@dataclass
class Recorded:
    """Of one graph: the largest absolute value of each activation by name, and its first and its last launch.

    A launch is inputs and outputs by name, as ``Backend.download`` gives them.
    """

    peaks: dict[str, float] = field(default_factory=dict)
    launches: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = field(default_factory=dict)


class RangeRecorder(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU that records what passes through graphs.

    Args:
        watched: file of a graph -> names of values, of which a copy of the graph tells the largest.
        kept: files of graphs whose first and last launch are kept.
    """

    def __init__(self, watched: Mapping[str, tuple[str, ...]], kept: frozenset[str] = frozenset()) -> None:
        super().__init__("cpu", share_weights=True)
        self._watched, self._kept = watched, kept
        self.recorded: dict[str, Recorded] = {}

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> Any:
        """As any backend; the graph is a copy with one more output."""
        names = self._watched.get(graph.file, ())
        keeps = graph.file in self._kept
        if not names and not keeps:
            return super().load(engine_dir, graph, weights)
        recorded = self.recorded.setdefault(graph.file, Recorded())
        if not names:
            return _Recording(self, super().load(engine_dir, graph, weights), (), recorded, keeps)
        with _with_peaks(engine_dir, graph, names) as changed:
            return _Recording(self, super().load(engine_dir, changed, weights), names, recorded, keeps)


class _Recording:
    """A graph that looks like the one that was asked for."""

    def __init__(
        self, backend: RangeRecorder, inner: Executable, names: tuple[str, ...], recorded: Recorded, keeps: bool
    ) -> None:
        outputs = tuple(spec for spec in inner.graph.outputs if spec.name != PEAKS)
        self.graph = inner.graph.model_copy(update={"outputs": outputs})
        self._backend, self._inner, self._names, self._recorded, self._keeps = backend, inner, names, recorded, keeps

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        """Bind what was asked for, and the values that are recorded."""
        shaped = graph or self.graph
        backend, recorded = self._backend, self._recorded
        if not self._names:
            peaks, run = None, self._inner.bind(tensors, graph)
        else:
            spec = _peaks_spec(len(self._names))
            peaks = backend.allocate(spec.nbytes)
            whole = shaped.model_copy(update={"outputs": (*shaped.outputs, spec)})
            run = self._inner.bind({**tensors, PEAKS: peaks}, whole)

        def fetched(specs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
            return {spec.name: backend.download(tensors[spec.name], spec) for spec in specs}

        def launch() -> None:
            inputs = fetched(shaped.inputs) if self._keeps else {}
            run()
            if peaks is not None:
                found = backend.download(peaks, _peaks_spec(len(self._names)))
                for name, value in zip(self._names, found.tolist(), strict=True):
                    recorded.peaks[name] = max(value, recorded.peaks.get(name, 0.0))
            if self._keeps:
                recorded.launches["last" if recorded.launches else "first"] = (inputs, fetched(shaped.outputs))

        return launch


def _peaks_spec(count: int) -> TensorSpec:
    return TensorSpec(name=PEAKS, shape=(count,), dtype="float32")


@contextlib.contextmanager
def _with_peaks(engine_dir: Path, graph: Graph, names: tuple[str, ...]) -> Iterator[Graph]:
    """A copy of a graph, beside it, whose last output is the largest absolute value of each named one."""
    import onnx_ir as ir

    model = ir.load(engine_dir / graph.file)
    add_peaks(model, names)
    place = PurePosixPath(graph.file)
    copy = place.with_name(f".{place.stem}.peaks.onnx").as_posix()
    try:
        ir.save(model, engine_dir / copy)
        outputs = (*graph.outputs, _peaks_spec(len(names)))
        yield graph.model_copy(update={"file": copy, "outputs": outputs})
    finally:
        (engine_dir / copy).unlink(missing_ok=True)


def add_peaks(model: ir.Model, names: tuple[str, ...]) -> None:
    """Give a graph one more output: float32 (n,), the largest absolute value of each named value."""
    import onnx_ir as ir

    graph = model.graph
    values = ir.convenience.create_value_mapping(graph)
    parts: list[ir.Value] = []

    def add(op: str, inputs: list[ir.Value], shape: list[int] | None = None, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{PEAKS}/{op}{len(parts)}")
        made = node.outputs[0]
        made.name, made.dtype = f"{node.name}:0", ir.DataType.FLOAT
        made.shape = None if shape is None else ir.Shape(shape)
        graph.append(node)
        return made

    for name in names:
        value = values[name]
        whole = value if value.dtype == ir.DataType.FLOAT else add("Cast", [value], to=ir.DataType.FLOAT.value)
        largest = add("ReduceMax", [add("Abs", [whole])], [], keepdims=0)
        axes = ir.Value(name=f"{PEAKS}/axes{len(parts)}", const_value=ir.tensor(np.array([0], np.int64)))
        axes.dtype, axes.shape = ir.DataType.INT64, ir.Shape([1])
        graph.register_initializer(axes)
        parts.append(add("Unsqueeze", [largest, axes], [1]))
    whole = add("Concat", parts, [len(parts)], axis=0)
    whole.name = PEAKS
    graph.outputs.append(whole)
