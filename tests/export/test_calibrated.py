"""Activations in 8 bits: where they are rounded, with which scales, and which blocks are left out for a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_engine import Toy, build

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.calibrated import (
    _within,
    activations,
    check_recordable,
    quantize_activations,
)
from dipgo_deploy.export.options import ExportOptions, check_options
from dipgo_deploy.export.quantized import quantize_weights
from dipgo_deploy.export.ranges import PEAKS, add_peaks
from dipgo_deploy.export.stored import StoredParameter, note_parameter

CHANNELS = 32
X = np.random.default_rng(0).normal(size=(1, CHANNELS, 8, 8)).astype(np.float32)


def _model() -> ir.Model:
    """A convolution, two products of one value, each with a bias, and a convolution whose values go two ways."""
    random = np.random.default_rng(1)
    weights = {
        "conv": random.normal(size=(CHANNELS, CHANNELS, 3, 3)),
        "one": random.normal(size=(CHANNELS, 64)),
        "two": random.normal(size=(CHANNELS, 64)),
        "fork": random.normal(size=(CHANNELS, CHANNELS, 1, 1)),
        "last": random.normal(size=(CHANNELS, CHANNELS, 1, 1)),
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
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8, 8, 64)),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, X.shape),
        ],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in {**weights, **biases}.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for name in weights:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        note_parameter(tensor, StoredParameter(name, transposed=False))
    return model


def _run(model: ir.Model, folder: Path | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})


def test_peaks_are_the_largest_values() -> None:
    model = _model()
    names = activations(model)
    assert names == ("x", "c", "t", "f", "l")
    add_peaks(model, names)
    assert [value.name for value in model.graph.outputs][-1] == PEAKS
    *_, peaks = _run(model)
    wanted = np.abs(X).max()
    assert peaks.shape == (5,) and peaks[0] == wanted and peaks[2] <= peaks[1]


def test_products_run_in_8_bits_and_stay_close(tmp_path: Path) -> None:
    wanted = _run(_model())
    watched = _model()
    names = activations(watched)
    add_peaks(watched, names)
    peaks = dict(zip(names, _run(watched)[-1].tolist(), strict=True))
    model = _model()
    quantize_weights([model], "int8")
    quantize_activations(model, peaks)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = _run(model, tmp_path)
    assert all(0 < relative_rms(one, other) < 0.03 for one, other in zip(found, wanted, strict=True))
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kernels["QLinearConv"] == 2 and kernels["MatMulIntegerToFloat"] == 2
    assert kernels["Conv"] == 1 and kernels["MatMul"] == 0  # what is read twice
    # Without a range there is nothing to round to.
    plain = _model()
    quantize_weights([plain], "int8")
    quantize_activations(plain, {"t": 0.0, "x": float("inf")})
    assert not [node for node in plain.graph if node.op_type == "QuantizeLinear"]


class _Trial:
    """Errors of blocks that add up as independent ones do, times ``factor``."""

    def __init__(self, sensitivity: dict[str, float], factor: float) -> None:
        self._sensitivity, self._factor = sensitivity, factor

    def error(self, file: str, stays: Callable[[str], bool]) -> float:
        return self._factor * sum(e**2 for block, e in self._sensitivity.items() if not stays(block)) ** 0.5


@pytest.mark.parametrize(
    ("factor", "budget", "kept"),
    [(1.0, 1.0, ""), (1.0, 0.06, "c"), (2.0, 0.06, "bc"), (1.0, 0.001, "abc")],
)
def test_blocks_that_lose_most_stay_until_the_budget_is_met(factor: float, budget: float, kept: str) -> None:
    sensitivity = {"a": 0.02, "b": 0.05, "c": 0.3}
    found, error = _within(sensitivity, frozenset(["g"]), _Trial(sensitivity, factor), budget)  # type: ignore[arg-type]
    assert found == frozenset(kept) and error <= budget


def test_errors_are_relative_and_never_hidden() -> None:
    zeros, ones = np.zeros(4), np.ones(4)
    assert relative_rms(ones * 1.5, ones) == pytest.approx(0.5) and relative_rms(zeros, zeros) == 0
    assert relative_rms(ones, zeros) == relative_rms(np.array([np.nan, 1, 1, 1]), ones) == np.inf


def test_what_no_loop_can_be_recorded_of_is_refused(tmp_path: Path) -> None:
    manifest = Bundle.open(build(tmp_path / "toy", Toy())).manifest
    half = manifest.model_copy(update={"dtype": "bf16"})
    with pytest.raises(UserError, match=r"bf16 graphs do not run on a CPU.*use --quantize int8-weights"):
        check_recordable(half)
    text = manifest.model_copy(update={"components": manifest.components.model_copy(update={"text_encoder": None})})
    with pytest.raises(UserError, match="there is no text to record the loop with"):
        check_recordable(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_budget": 0.1}, "--quantize-budget: goes with --quantize int8"),
        (
            {"calibration_prompts": ("a",), "quantize": "int8-weights"},
            "--calibration-prompts: goes with --quantize int8",
        ),
        ({"quantize": "int8", "quantize_budget": 0.0}, "--quantize-budget 0.0: give a number above 0"),
        ({"quantize": "int8", "calibration_samples": 0}, "calibration_samples"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(ExportOptions(**options))  # type: ignore[arg-type]
