"""What graphs cost on this machine: the record that ``dipgo-export --graph-costs`` weighs them with."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.plan.weigh import PICTURES, GraphCosts

if TYPE_CHECKING:
    from dipgo_deploy.export.trace import TracedModel

_SIDE = 1024  # of a weight, 4 MiB
_ROWS = 128
_SMALL, _LARGE = 1, 16  # weights of a chain: where a difference is taken, what both have is out of it
# Weights of the parts of a model that it is measured with; they are in memory three times, and laid out anew twice.
_SAMPLE_BYTES = 2**28


def measure_graph_costs(
    threads: int | None = None,
    *,
    pictures: float = PICTURES,
    seconds: float = 2.0,
    model: TracedModel | None = None,
) -> GraphCosts:
    """Times graphs on ONNX Runtime's CPU provider, each kind for so many ``seconds``; medians.

    All but a launch and a graph by themselves is measured with the model, of a large one with some of its parts, and
    without one with chains of matrix products, which convolutions and small blocks fall short of by a multiple.

    threads: None: the physical cores. pictures: see ``GraphCosts``.

    Raises:
        UserError: ONNX Runtime is not there, or refuses a part of the model.
    """
    options = OnnxRuntimeBackend("cpu", threads=threads).session_options()
    trifle = _chain(1, side=8)
    launch = _median(_Session(trifle, options, side=8), seconds)
    load = _median(partial(_Session, trifle, options, side=8), seconds)
    parts = [] if model is None else _sample(model)
    if model is None or not parts:
        rate, per_byte, switch = _rates_of_chains(options, seconds)
    else:
        rate, per_byte, switch = _rates_of_parts(model, parts, options, seconds, launch=launch, load=load)
    return GraphCosts(
        macs_per_second=rate,
        launch_seconds=launch,
        load_seconds=load,
        load_seconds_per_byte=per_byte,
        switch_seconds_per_byte=switch,
        pictures=pictures,
    )


def _rates_of_chains(options: Any, seconds: float) -> tuple[float, float, float]:
    """Multiply-accumulates a second, seconds of loading a byte, and of launching a byte after another graph."""
    small, large = _chain(_SMALL), _chain(_LARGE)
    each = 4 * _SIDE * _SIDE
    loads = [_median(partial(_Session, chain, options), seconds) for chain in (small, large)]
    per_byte = max(0.0, loads[1] - loads[0]) / (each * (_LARGE - _SMALL))
    alone, switched = _alone_and_switched(_Session(large, options), _Session(large, options), seconds)
    per_product = max(1e-9, (alone - _median(_Session(small, options), seconds)) / (_LARGE - _SMALL))
    return _ROWS * _SIDE * _SIDE / per_product, per_byte, switched / (each * _LARGE)


def _alone_and_switched(one: Callable[[], Any], other: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Seconds of a run after itself, and how many more it takes after the other."""

    def both() -> None:
        one()
        other()

    alone = _median(one, seconds)
    return alone, max(0.0, _median(both, seconds) / 2 - alone)


def _rates_of_parts(
    model: TracedModel, names: list[str], options: Any, seconds: float, *, launch: float, load: float
) -> tuple[float, float, float]:
    """The same of these parts of a model, which run in turn as the blocks of a graph do; of all of them, as the one
    graph that they are: ONNX Runtime optimises it in more time than its parts. launch, load: of a graph."""
    import onnxruntime

    from dipgo_deploy.search.latency import example, part, serialised

    graph = model.graph
    work = frozenset().union(*(graph.values[name].work for name in names))
    macs = sum(graph.costs[node] for node in work)
    if len(names) == len(graph.values):
        data, nbytes = [serialised(model.model)], model.pieces.weight_bytes(range(len(model.pieces.pieces)))
    else:
        data, nbytes = [part(model, name) for name in names], sum(_weight_bytes(model, name) for name in names)

    def sessions() -> list[Any]:
        return [onnxruntime.InferenceSession(one, options, providers=["CPUExecutionProvider"]) for one in data]

    def bound() -> Callable[[], Any]:
        rng = np.random.default_rng(0)
        fed = [(one.run, {spec.name: example(spec, rng) for spec in one.get_inputs()}) for one in sessions()]
        return lambda: [run(None, feeds) for run, feeds in fed]

    try:
        loading = _median(sessions, seconds)
        alone, switched = _alone_and_switched(bound(), bound(), seconds)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"what graphs cost cannot be measured: {one_line(error)}") from None
    rate = max(macs, 1) / max(alone - len(data) * launch, 1e-9)
    nbytes = max(nbytes, 1)
    return max(rate, 1.0), max(0.0, loading - len(data) * load) / nbytes, switched / nbytes


def _sample(model: TracedModel) -> list[str]:
    """Named values whose parts are measured: all, or of a large model some that are evenly spread."""
    names = [name for name in model.graph.values if name not in model.graph.halves]
    sizes = {name: _weight_bytes(model, name) for name in names}
    every = -(-sum(sizes.values()) // _SAMPLE_BYTES) or 1
    chosen, total = [], 0
    for name in names[::every]:
        if total + sizes[name] <= _SAMPLE_BYTES:
            chosen.append(name)
            total += sizes[name]
    return chosen if any(model.graph.values[name].work for name in chosen) else []


def _weight_bytes(model: TracedModel, name: str) -> int:
    pieces = model.pieces
    return pieces.weight_bytes([place for place, piece in enumerate(pieces.pieces) if name in piece.owners])


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Of the seconds of calls in turn, three at least, after one that does not count; once is enough where that alone
    takes longer."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
        if found[0] > seconds > 0:
            return found[0]
    return median(found[1:])


class _Session:
    """A chain that is loaded and bound."""

    def __init__(self, model: bytes, options: Any, side: int = _SIDE) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        values = np.ones((_ROWS, side), np.float32)
        self._binding.bind_ortvalue_input("x0", onnxruntime.OrtValue.ortvalue_from_numpy(values))
        name = self._session.get_outputs()[0].name
        self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(values))

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)


def _chain(products: int, side: int = _SIDE) -> bytes:
    """As many products as weights, each with the one before."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((side, side), np.float32) / side**0.5
    weights = [numpy_helper.from_array(weight + place, f"w{place}") for place in range(products)]
    nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(products)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (_ROWS, side)) for name in ("x0", f"x{products}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data
