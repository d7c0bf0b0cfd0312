"""The exporter's metadata: stack traces and paths of the exporting machine."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass


class StripMetadata(ir.passes.InPlacePass):
    """All metadata that would be written goes, of the model, its nodes and its values."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        ClearMetadataAndDocStringPass()(model)
        for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
            value.metadata_props.clear()
        for node in model.graph:
            for output in node.outputs:
                output.metadata_props.clear()
        model.metadata_props.clear()
        return ir.passes.PassResult(model, True)
