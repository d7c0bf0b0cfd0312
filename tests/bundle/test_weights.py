from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_deploy.bundle.weights import StoredWeight, WeightsIndex, weights_of
from dipgo_deploy.errors import UserError

onnx = pytest.importorskip("onnx")

STORED = StoredWeight(parameter=None, shape=(1,), dtype="float", offset=0, length=4)


@pytest.mark.parametrize("longest", [100, 200])
def test_a_graph_has_its_own_weights_in_its_order(tmp_path: Path, longest: int) -> None:
    """Not those that are only the beginning of a name in it, nor inputs of nodes, nor what the index does not have."""
    long = "B" * longest
    names = ["w2", "blocks.1.weight", long, "w", "inline", "v\u00e4"]
    tensors = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [0.0]) for name in names]
    nodes = [onnx.helper.make_node("Identity", [name], [f"y_{name}"]) for name in (*names, "other")]
    graph = onnx.helper.make_graph(nodes, "blocks", [], [], tensors)
    path = tmp_path / "g.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    stored = ["w", "w2", "blocks.1", "blocks.1.weight", "other", long, long[:-1], "v\u00e4"]
    index = WeightsIndex(tensors=dict.fromkeys(stored, STORED))
    assert list(weights_of(path, index)) == ["w2", "blocks.1.weight", long, "w", "v\u00e4"]
    (tmp_path / "weights.json").write_text(index.model_dump_json())
    assert weights_of(path) == dict.fromkeys(weights_of(path, index), STORED)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights\.json: missing"):
        weights_of(tmp_path / "g.onnx")
    with pytest.raises(UserError, match=r"g\.onnx: cannot be read"):
        weights_of(tmp_path / "g.onnx", WeightsIndex(tensors={}))
