"""What a machine can do at most, measured, and what graphs ask of it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.bench.profile import block_of
from dipgo_deploy.export.macs import node_macs

_SIDE = 2048  # of the product's matrices: 8.6 billion multiply-accumulates
_COPIED = 2**29  # bytes, more than the processor's caches hold


@dataclass(frozen=True)
class Ceiling:
    """macs: multiply-accumulates a second in float32. read: bytes a second that come from memory."""

    macs: float
    read: float

    def seconds(self, work: Work) -> float:
        """The least time that some work takes."""
        return max(work.macs / self.macs, work.nbytes / self.read)


@dataclass(frozen=True)
class Work:
    """macs: multiply-accumulates. nbytes: what has to be read and written at least: weights, and what comes in and
    goes out."""

    macs: int
    nbytes: int

    def times(self, count: int) -> Work:
        """The same, ``count`` times."""
        return Work(self.macs * count, self.nbytes * count)

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.nbytes + other.nbytes)


def measured(threads: int, seconds: float = 2.0) -> Ceiling:
    """The best of the products of ONNX Runtime and PyTorch on square matrices, and of sums over memory."""
    return Ceiling(max(_onnxruntime(threads, seconds), _torch(threads, seconds)), _read(threads, seconds))


def _best(call: Any, seconds: float) -> float:
    """Of the calls of some time, the shortest."""
    call()
    found = math.inf
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - start)
    return found


def _onnxruntime(threads: int, seconds: float) -> float:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((_SIDE, _SIDE), np.float32)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (_SIDE, _SIDE)) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", values[:1], values[1:], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, bind in (("x", binding.bind_ortvalue_input), ("y", binding.bind_ortvalue_output)):
        bind(name, onnxruntime.OrtValue.ortvalue_from_numpy(weights))
    return _SIDE**3 / _best(lambda: session.run_with_iobinding(binding), seconds)


def _torch(threads: int, seconds: float) -> float:
    import torch

    torch.set_num_threads(threads)
    one = torch.randn(_SIDE, _SIDE)
    out = torch.empty(_SIDE, _SIDE)
    return _SIDE**3 / _best(lambda: torch.mm(one, one, out=out), seconds)


def _read(threads: int, seconds: float) -> float:
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(_COPIED // 4)
    return _COPIED / _best(lambda: values.sum(), seconds)


def work_of(path: Path, modules: Mapping[str, str]) -> dict[str, Work]:
    """What each block of a graph (a file with static shapes) has to do, ``profile.OUTSIDE`` for the rest. modules: see
    ``profile.block_modules``."""
    import onnx_ir as ir

    graph = ir.load(path).graph
    owner = {node: block_of(str(node.name), modules) for node in graph}
    macs: dict[str, int] = defaultdict(int)
    moved: dict[str, dict[str, int]] = defaultdict(dict)
    outputs = {value.name for value in graph.outputs}
    for node, block in owner.items():
        macs[block] += node_macs(node)
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if value is not None and (producer is None or owner[producer] != block):
                moved[block][str(value.name)] = _nbytes(value)
        for value in node.outputs:
            if value.name in outputs or any(owner[use.node] != block for use in value.uses()):
                moved[block][str(value.name)] = _nbytes(value)
    return {block: Work(macs[block], sum(moved[block].values())) for block in dict.fromkeys(owner.values())}


def total(works: Mapping[str, Work]) -> Work:
    """All blocks."""
    return sum(works.values(), Work(0, 0))


def _nbytes(value: Any) -> int:
    if value.shape is None or value.dtype is None or not all(isinstance(side, int) for side in value.shape):
        raise ValueError(f"the shape of {value.name} is not static: {value.shape}")
    return int(math.prod(value.shape) * value.dtype.itemsize)
