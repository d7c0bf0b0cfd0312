"""What graphs ask of a machine, and the loop, its graphs and peers in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_engine import Toy, build

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bench.profile import OUTSIDE, block_of
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.report.measured import Limit, read_measured
from tools.bench import limit, peers
from tools.bench.ceiling import Ceiling, Work, total, work_of


def test_a_node_is_of_the_longest_block_that_it_lies_in() -> None:
    modules = {path: path for path in ("a.1", "a.1.b", "a.11")}
    nodes = ("a.1.b.c/MatMul", "a.11/Add", "a.1.c/Add", "other/Add", "a/Add")
    assert [block_of(node, modules) for node in nodes] == ["a.1.b", "a.11", "a.1", OUTSIDE, OUTSIDE]


def test_work_counts_weights_and_what_crosses_between_blocks_once(tmp_path: Path) -> None:
    shapes = {"x": (4, 8), "h": (4, 16), "y": (4, 2)}
    weights = [
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("v", (8, 16)), ("w", (16, 2)))
    ]
    made = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    inner = helper.make_tensor_value_info("g", TensorProto.FLOAT, shapes["h"])
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["g"], name="one/MatMul"),
        helper.make_node("Relu", ["g"], ["h"], name="one/Relu"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="two/MatMul"),
    ]
    graph = helper.make_graph(nodes, "g", [made["x"]], [made["y"]], weights, value_info=[made["h"], inner])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    works = work_of(tmp_path / "g.onnx", {"one": "one", "two": "two"})
    assert works == {"one": Work(4 * 8 * 16, 4 * (32 + 128 + 64)), "two": Work(4 * 16 * 2, 4 * (64 + 32 + 8))}
    assert total(works).macs == 640
    assert Ceiling(macs=64.0, read=1e9).seconds(works["one"]) == 8.0
    assert Ceiling(macs=1e9, read=112.0).seconds(works["one"].times(2)) == 16.0


def test_rounds_time_loop_and_graphs(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", Toy(noises=0)))
    plan = bundle.manifest.plan
    counts = [sum(launch.variant == place for launch in plan.launches) for place in range(len(plan.variants))]
    facts = limit._rounds(bundle, create_backend("cpu", threads=1), counts, repeats=3, seconds=0)
    assert facts["rounds"] == 3 and len(facts["graph_seconds"]) == len(plan.variants)
    assert all(value["median"] > 0 for value in facts["graph_seconds"])
    assert facts["loop_over_inside"]["median"] > 1 and facts["first_loop_seconds"] > 0
    host = facts["upload_seconds"]["median"] + facts["other_host_seconds"]["median"]
    assert 0 < host < facts["loop_seconds"]["median"]
    ran = [plan.variants[launch.variant].name for launch in plan.launches]
    again = [name for before, name in zip(ran, ran[1:], strict=False) if name == before]
    for variant, after in zip(plan.variants, facts["after"], strict=True):
        assert ("itself" in after) == (variant.name in again)
    row = {
        "model": "toy",
        "schedule": "by hand",
        "latent": [8, 8],
        "launches": 6,
        "evaluations": 6,
        "machine": {"processor": "x", "cores": 1, "threads": 1, "system": "x", "python": "3", "packages": {}}
        | {"load_average": 0.0},
        "ceiling": {"macs_per_second": 1e9, "bytes_per_second": 1e9},
        "backends": {"cpu": facts, "openvino": {"missing": "not installed"}},
        "graphs": [limit._graph("v00", 1, Ceiling(1.0, 1.0), Work(1000, 10), 0, {"cpu": facts})],
        "blocks": limit._blocks([{"a": Work(5, 1)}], [2], Ceiling(1.0, 1.0), {"a": 20.0}),
        "operators": {"MatMul": 20.0},
    }
    text = limit.as_text([row])
    assert "not installed" in text and "| a | 0.000 | 0.0 | 10000.000 | 20000.000 | 2.00 | 100.0% |" in text
    assert "MatMul 100%" in text and "| v00 | ONNX Runtime |" in text
    written = tmp_path / "limit.json"
    written.write_text(json.dumps(row))
    read = read_measured(written)  # as dipgo-report does
    assert isinstance(read, Limit) and read.graphs[0].least_seconds == row["graphs"][0]["least_seconds"]


def test_peers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant that fails has its reason in the table; groups share the first; no time left is a reason, too."""
    from types import SimpleNamespace

    def fails() -> Any:
        raise ImportError("no such package")

    def answer(value: float) -> Any:
        return lambda: lambda: np.full((1, 2), value)

    groups = [
        {"ours": answer(1.0), "DeepCache": fails, "PyTorch, full": answer(2.0), "ONNX Runtime, full": answer(4.0)},
        {"ours": answer(1.0), "OpenVINO, full": answer(4.0), "cache-dit": answer(1.0)},
    ]
    monkeypatch.setattr(peers, "rivals", lambda *_: groups)
    plan = SimpleNamespace(variants=(1, 2), macs_full=10, macs_run=20)
    shape = SimpleNamespace(height=8, width=8)
    given: Any = SimpleNamespace(
        model="m", steps=4, interval=2, planned=SimpleNamespace(plan=plan, traced=SimpleNamespace(shape=shape))
    )
    result = peers.race(given, 2, 1, ("cache-dit",), lambda line: None)
    rows = result["rows"]
    assert rows["DeepCache"] == {"missing": "no such package"} and rows["cache-dit"] == {"missing": "left out"}
    assert rows["OpenVINO, full"]["relative_error"] == 0 and rows["PyTorch, full"]["relative_error"] == 0.5
    assert rows["ours"]["times_ours"]["median"] == 1 and rows["ours"]["rounds"] == 2
    text = peers.as_text([result])
    assert "| DeepCache | - | - | - | - | no such package |" in text
    rows = peers.race(given, 2, 1, (), lambda line: None, minutes=0)["rows"]
    assert rows["OpenVINO, full"] == {"missing": "no time left of 0 minutes"} and rows["ours"]["rounds"] == 1
    with pytest.raises(UserError, match="is made with random weights; give --work"):
        peers.model_of("dit-xl-2-256", None, print)
    assert peers.model_of("fashion-dit", None, print) == "fashion-dit"
