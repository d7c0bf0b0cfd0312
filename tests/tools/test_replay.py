"""The replay: names do not count, everything that is computed does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.options import ExportOptions
from dipgo_deploy.schedule.document import Schedule
from tools.replay import cases
from tools.replay.__main__ import command, difference
from tools.replay.computation import graph_digest
from tools.replay.record import _outcome


def save(
    path: Path, prefix: str = "", operator: str = "Add", weight: float = 1.0, extent: int = 2, **changes: int
) -> Path:
    """x -> x + w -> softmax, with names that begin with ``prefix``."""
    x, w, mid, y = (prefix + name for name in "xwmy")
    nodes = [
        helper.make_node(operator, [x, w], [mid]),
        helper.make_node("Softmax", [mid], [y], axis=changes.get("axis", 1)),
    ]
    graph = helper.make_graph(
        nodes,
        prefix + "graph",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [extent, 3])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [extent, 3])],
        [numpy_helper.from_array(np.full(3, weight, np.float32), w)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_names_do_not_count(tmp_path: Path) -> None:
    assert graph_digest(save(tmp_path / "a.onnx")) == graph_digest(save(tmp_path / "b.onnx", prefix="other."))


@pytest.mark.parametrize("change", [{"operator": "Mul"}, {"weight": 2.0}, {"extent": 4}, {"axis": 0}])
def test_every_other_change_does(tmp_path: Path, change: dict[str, object]) -> None:
    assert graph_digest(save(tmp_path / "a.onnx")) != graph_digest(save(tmp_path / "b.onnx", **change))  # type: ignore[arg-type]


def test_a_difference_names_its_place() -> None:
    lines = difference("dit", "== full\nstep 0\nstep 1", "== full\nstep 0\nstep 2")
    assert lines[:2] == ["--- dit recorded", "+++ dit now"]
    assert {"-step 1", "+step 2"} <= set(lines)


def test_record_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dipgo_deploy.cli.common import entry_point

    run = entry_point(command)
    some = ["--model", "dit", "--only", "block-residual-fp32 first-step-only", str(tmp_path)]
    assert run(["check", *some]) == 2
    assert run(["record", *some]) == 0
    assert run(["check", *some]) == 0
    recorded = tmp_path / "dit-block-residual-fp32.txt"
    text = recorded.read_text()
    assert "== first-step-only, segments" in text and "graph 0 " in text and "final " in text
    recorded.write_text(text.replace("slot 1", "slot 2"))
    assert run(["check", *some]) == 1
    assert "dit-block-residual-fp32" in capsys.readouterr().err


def test_a_sampler_that_is_refused_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not end a recording: a later version may refuse what this one takes, which is a difference to show."""
    make = cases.schedule_target

    def refusing(model: str, sampler: str | None, *rest: object) -> object:
        if sampler == "pndm":
            raise UserError("sampler pndm: not with this model")
        return make(model, sampler, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cases, "schedule_target", refusing)
    found = {case.name: case for case in cases.cases_of("fashion-dit", cases.Units("block", "residual"))}
    refused = found["random-0.5-pndm"]
    assert isinstance(refused.schedule, UserError) and isinstance(found["random-0.5-heun"].schedule, Schedule)
    planned = SimpleNamespace(options=ExportOptions())
    assert list(_outcome(planned, refused, "variants")) == ["refused: sampler pndm: not with this model"]  # type: ignore[arg-type]
