"""Names of a traced graph's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dipgo_deploy.errors import UserError


@dataclass(frozen=True)
class NameOutputs(ir.passes.InPlacePass):
    """The graph's outputs get ``names``, in order; ``label`` names the model in errors."""

    names: tuple[str, ...]
    label: str

    def requires(self, model: ir.Model) -> None:
        """As many outputs as names, all of them tensors of their own; UserError."""
        if len(model.graph.outputs) != len(self.names) or len({*map(id, model.graph.outputs)}) != len(self.names):
            raise UserError(
                f"{self.label}: two boundary tensors are one tensor in the exported graph; choose another granularity"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        for output, name in zip(model.graph.outputs, self.names, strict=True):
            output.name = name
        return ir.passes.PassResult(model, True)
