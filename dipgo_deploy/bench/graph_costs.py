"""What graphs cost on this machine: the record that ``dipgo-export --graph-costs`` weighs them with."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.plan.weigh import GraphCosts

_SIDE = 1024  # of a weight, 4 MiB
_ROWS = 128


def measure_graph_costs(threads: int | None = None, *, pictures: float = 1.0, seconds: float = 2.0) -> GraphCosts:
    """Times chains of matrix products on ONNX Runtime's CPU provider, each part for so many ``seconds``; medians.

    threads: None: the physical cores. pictures: see ``GraphCosts``.

    Raises:
        UserError: ONNX Runtime is not there.
    """
    options = OnnxRuntimeBackend("cpu", threads=threads).session_options()
    small, large = 1, 16  # weights of a chain: where a difference is taken, what both have is out of it
    sizes = {count: 4 * _SIDE * _SIDE * count for count in (small, large)}
    models = {count: _chain(count) for count in (small, large)}
    trifle = _chain(1, side=8)
    loads = {count: _median(partial(_Session, models[count], options), seconds) for count in models}
    per_byte = max(0.0, loads[large] - loads[small]) / (sizes[large] - sizes[small])
    one, other = (_Session(models[large], options) for _ in range(2))
    tiny = _Session(models[small], options)
    alone = _median(one, seconds)

    def both() -> None:
        one()
        other()

    in_turn = _median(both, seconds) / 2
    macs = _ROWS * _SIDE * _SIDE
    per_product = max(1e-9, (alone - _median(tiny, seconds)) / (large - small))
    return GraphCosts(
        macs_per_second=macs / per_product,
        launch_seconds=_median(_Session(trifle, options, side=8), seconds),
        load_seconds=_median(partial(_Session, trifle, options, side=8), seconds),
        load_seconds_per_byte=per_byte,
        switch_seconds_per_byte=max(0.0, in_turn - alone) / sizes[large],
        pictures=pictures,
    )


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Of the seconds of calls in turn, three at least, after one that does not count."""
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


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
