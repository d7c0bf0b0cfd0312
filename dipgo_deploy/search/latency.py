"""What each block takes on the target backend, measured: the costs behind pruning by latency."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.trace import TracedModel
from dipgo_deploy.extras import install

if TYPE_CHECKING:
    import onnx_ir as ir


def measure_latency(traced: TracedModel, *, threads: int | None = None, repeats: int = 20) -> dict[str, float]:
    """Seconds of each named value's own part of the model on ONNX Runtime's CPU provider: the median of ``repeats``.

    Each part is cut out of the trace at the named values and run by itself. Nodes shared by several parts (such as the
    time embedding) count in each. A part includes one session's call, as a launch does.

    Raises:
        UserError: ONNX Runtime is missing, or refuses a part.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"--prune-by latency: needs ONNX Runtime; {install('cpu')}") from error
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.log_severity_level = 3
    rng = np.random.default_rng(0)
    table = {}
    for name in traced.graph.values:
        try:
            session = onnxruntime.InferenceSession(part(traced, name), options, providers=["CPUExecutionProvider"])
            feeds = {spec.name: example(spec, rng) for spec in session.get_inputs()}
            table[name] = _median_seconds(session, feeds, repeats)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--prune-by latency: {name} cannot be measured: {reason}; use --prune-by macs") from error
    return table


def part(traced: TracedModel, name: str) -> bytes:
    """The nodes of one named value as a serialised model."""
    import onnx_ir as ir

    model = traced.model
    reads = traced.graph.values[name].reads
    named: dict[str, ir.Value] = {str(value.name): value for value in [*model.graph.inputs, *model.graph.outputs]}
    graph = ir.convenience.extract(model.graph, [named[read] for read in sorted(reads)], [named[name]])
    return serialised(ir.Model(graph, ir_version=model.ir_version))


def serialised(model: ir.Model) -> bytes:
    """A model of at most 2 GiB, weights included."""
    import onnx_ir as ir

    return ir.serde.serialize_model(model).SerializeToString()


def _median_seconds(session: Any, feeds: dict[str, np.ndarray], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def example(spec: Any, rng: np.random.Generator) -> np.ndarray:
    """Values for an input of a session."""
    if spec.type == "tensor(int64)":
        return np.zeros(spec.shape, np.int64)
    return rng.standard_normal(spec.shape, dtype=np.float32)
