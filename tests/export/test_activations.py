"""Where products round what they are given, with which scales, and to which numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.backends.onnxruntime_pairs import leave_pairs
from dipgo_deploy.bundle.quantized import ACTIVATIONS, Method
from dipgo_deploy.compare.graphs import frugal_session
from dipgo_deploy.compare.inner import run_with
from dipgo_deploy.compare.runners import engine_runner
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.export.activations import activations, quantize_activations
from dipgo_deploy.export.quantized import quantize_weights
from dipgo_deploy.export.ranges import PEAKS, add_peaks
from dipgo_deploy.export.stored import StoredParameter, note_parameter
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.weights import write_graphs

CHANNELS = 32
X = np.random.default_rng(0).normal(size=(1, CHANNELS, 8, 8)).astype(np.float32)


def _model() -> ir.Model:
    """A convolution, two products of one value, each with a bias, a convolution whose values go two ways, a product of
    two axes, a product without a bias, and a convolution that few channels go into."""
    random = np.random.default_rng(1)
    weights = {
        "conv": random.normal(size=(CHANNELS, CHANNELS, 3, 3)),
        "one": random.normal(size=(CHANNELS, 64)),
        "two": random.normal(size=(CHANNELS, 64)),
        "fork": random.normal(size=(CHANNELS, CHANNELS, 1, 1)),
        "last": random.normal(size=(CHANNELS, CHANNELS, 1, 1)),
        "two_axes": random.normal(size=(8 * 8, 64)),
        "bare": random.normal(size=(CHANNELS, 64)),
        "grouped": random.normal(size=(CHANNELS, 8, 3, 3)),
    }
    biases = {"one_bias": random.normal(size=64), "two_bias": random.normal(size=64)}
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Transpose", ["r"], ["t"], "transpose", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "one"], ["m1"], "product1"),
        helper.make_node("Add", ["m1", "one_bias"], ["a1"], "add1"),
        helper.make_node("MatMul", ["t", "two"], ["m2"], "product2"),
        helper.make_node("Add", ["m2", "two_bias"], ["a2"], "add2"),
        helper.make_node("Add", ["a1", "a2"], ["y"], "sum"),
        helper.make_node("Conv", ["x", "fork"], ["f"], "fork"),
        helper.make_node("Conv", ["f", "last"], ["l"], "last"),
        helper.make_node("Add", ["l", "f"], ["z"], "both"),
        helper.make_node("Reshape", ["x", "matrix"], ["rows"], "reshape"),
        helper.make_node("Gemm", ["rows", "two_axes"], ["g"], "gemm"),
        helper.make_node("Conv", ["x", "grouped"], ["n"], "narrow", group=4),
        helper.make_node("MatMul", ["t", "bare"], ["b"], "no_bias"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8, 8, 64)),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, X.shape),
            helper.make_tensor_value_info("g", TensorProto.FLOAT, (CHANNELS, 64)),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, (1, 8, 8, 64)),
            helper.make_tensor_value_info("n", TensorProto.FLOAT, (1, CHANNELS, 6, 6)),
        ],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in {**weights, **biases}.items()],
    )
    graph.initializer.append(numpy_helper.from_array(np.array([CHANNELS, 64]), "matrix"))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for name in weights:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        note_parameter(tensor, StoredParameter(name, transposed=False))
    return model


def _run(
    model: ir.Model, folder: Path | None = None, *, pairs: bool = False, as_written: bool = False
) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    if pairs:
        leave_pairs(options)
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})


def _peaks(method: Method) -> dict[str, float]:
    watched = _model()
    names = activations(watched, method)
    add_peaks(watched, names)
    assert [value.name for value in watched.graph.outputs][-1] == PEAKS
    return dict(zip(names, _run(watched)[-1].tolist(), strict=True))


def _rounded(method: Method, peaks: dict[str, float]) -> ir.Model:
    model = _model()
    quantize_weights([model], method)
    quantize_activations(model, peaks, method)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def test_peaks_are_the_largest_values() -> None:
    peaks = _peaks("int8")
    assert list(peaks) == ["x", "c", "t", "f", "l"]
    assert peaks["x"] == np.abs(X).max() and peaks["t"] <= peaks["c"]


def test_products_run_in_8_bits_and_stay_close(tmp_path: Path) -> None:
    wanted = _run(_model())
    found = _run(_rounded("int8", _peaks("int8")), tmp_path)
    assert all(0 < relative_rms(one, other) < 0.03 for one, other in zip(found, wanted, strict=True))
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kernels["QLinearConv"] == 2 and kernels["MatMulIntegerToFloat"] == 3
    assert kernels["Conv"] == 2 and kernels["MatMul"] == 0  # what is read twice, and what the graph gives


def test_products_in_float8_take_rounded_values_and_give_what_they_make() -> None:
    """One rounding of a value for all that read it; its scale is the largest value over 448."""
    wanted = _run(_model())
    peaks = _peaks("fp8")
    assert list(peaks) == ["x", "t", "f", "rows"]
    model = _rounded("fp8", peaks)
    assert model.graph.opset_imports[""] == 21
    nodes: dict[str, Any] = {str(node.name): node for node in model.graph}
    rounded = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [node.inputs[0].name for node in rounded] == ["x", "t", "f", "rows"]  # type: ignore[union-attr]
    for node in rounded:
        value, scale = node.inputs
        assert value is not None and scale is not None and scale.const_value is not None
        assert scale.const_value.numpy() == np.float32(peaks[str(value.name)] / 448)
    assert nodes["product1"].inputs[0] is nodes["product2"].inputs[0]
    assert nodes["narrow"].inputs[0].name == "x"  # 8 channels
    for name in ("conv", "product1", "fork", "gemm", "narrow"):
        (weights,) = [value.dtype for value in nodes[name].inputs[1].producer().inputs[:1]]
        assert weights == ir.DataType.FLOAT8E4M3FN
    found = _run(model, pairs=True)
    errors = [relative_rms(one, other) for one, other in zip(found, wanted, strict=True)]
    # A number of three bits behind the first is off by 2.6 % (root mean square); y and z are sums of two products.
    assert all(0.02 < error < 0.1 for error in errors)
    *_, both, _, weights_alone = errors
    assert weights_alone < 0.8 * both


def test_onnxruntime_refuses_float8_without_the_option() -> None:
    """If it does not, ``onnxruntime_pairs`` can go."""
    with pytest.raises(Exception, match="float8e4m3fn"):
        _run(_rounded("fp8", _peaks("fp8")))


def test_every_session_of_the_project_has_the_option(tmp_path: Path) -> None:
    model = _rounded("fp8", _peaks("fp8"))
    wanted = _run(model, pairs=True)
    model.graph.name = "v00"
    write_graphs([model], tmp_path)
    graph = graph_entry(model, "v00.onnx")
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(dtype="fp32"))
    entry: Any = SimpleNamespace(graph=graph)
    backend = OnnxRuntimeBackend("cpu")
    backend.load(tmp_path, graph)
    with frugal_session(bundle, entry) as run:
        np.testing.assert_allclose(run({"x": X})["b"], wanted[-2], rtol=1e-4, atol=1e-3)
    with engine_runner(bundle, entry, backend) as runner:
        np.testing.assert_allclose(runner.infer({"x": X})["b"], wanted[-2], rtol=1e-4, atol=1e-3)
    inner = run_with(onnxruntime.SessionOptions(), ("CPUExecutionProvider",))
    found = inner(onnx.load(tmp_path / "v00.onnx", load_external_data=False), tmp_path, {"x": X})
    np.testing.assert_allclose(found["b"], wanted[-2], rtol=1e-4, atol=1e-3)


def test_onnxruntime_keeps_all_that_is_in_front_of_float8() -> None:
    """With a zero among the inputs of the rounding it drops the Relu, and no error says so."""
    model = _rounded("fp8", _peaks("fp8"))
    for one, other in zip(_run(model, pairs=True), _run(model, as_written=True), strict=True):
        assert relative_rms(one, other) < 0.01  # a value on an edge may be rounded to either side


@pytest.mark.parametrize("method", ACTIVATIONS)
def test_without_a_range_there_is_nothing_to_round_to(method: Method) -> None:
    plain = _rounded(method, {"t": 0.0, "x": float("inf")})
    assert not [node for node in plain.graph if node.op_type == "QuantizeLinear"]
