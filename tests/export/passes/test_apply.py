from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.passes import apply


@dataclass
class Named(ir.passes.InPlacePass):
    """Adds its name to the graph's; raises ``error`` at ``place``."""

    name: str
    error: Exception | None = None
    place: str = "call"

    def _at(self, place: str) -> None:
        if self.error is not None and place == self.place:
            raise self.error

    def requires(self, model: ir.Model) -> None:
        self._at("requires")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self._at("call")
        model.graph.name = f"{model.graph.name}{self.name}"
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        self._at("ensures")


@pytest.fixture
def model() -> ir.Model:
    return ir.Model(ir.Graph([], [], nodes=[], name=""), ir_version=10)


def test_passes_run_in_order(model: ir.Model) -> None:
    apply(model, Named("a"), Named("b"))
    assert model.graph.name == "ab"


@pytest.mark.parametrize("place", ["requires", "call", "ensures"])
def test_what_is_wrong_with_a_model_is_said_in_its_own_words(model: ir.Model, place: str) -> None:
    with pytest.raises(UserError, match="^dit: no such layer$"):
        apply(model, Named("a"), Named("b", UserError("dit: no such layer"), place), Named("c"))
    assert model.graph.name == ("ab" if place == "ensures" else "a")


def test_a_fault_of_a_pass_names_it(model: ir.Model) -> None:
    with pytest.raises(ir.passes.PassError, match=r"Named\(name='b'"):
        apply(model, Named("a"), Named("b", KeyError("x")))
