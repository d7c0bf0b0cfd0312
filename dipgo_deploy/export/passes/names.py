"""Names in a traced graph: weights get their parameter's name back, nodes their module's."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import onnx_ir as ir

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"
_PARAMETER = "dipgo_deploy.parameter"


def parameter_of(value: ir.Value) -> str | None:
    """The parameter that an initializer comes from, as ``RestoreNames`` noted it; None for a constant."""
    parameter: str | None = value.meta.get(_PARAMETER)
    return parameter


def note_parameter(value: ir.Value, parameter: str) -> None:
    """Note on an initializer which parameter it comes from."""
    value.meta[_PARAMETER] = parameter


@dataclass(frozen=True)
class RestoreNames(ir.passes.InPlacePass):
    """Initializers are named after the parameter they come from, which ``parameter_of`` then tells; nodes
    ``module.path/Op_n``, and what they compute after them. Outputs of the graph keep their names.

    The exporter's optimizer stores transposed weights as ``val_N`` and keeps the origin in metadata.

    prefix: the wrapper's attribute (``denoiser.``), which is cut off; parameters are noted without it.
    """

    prefix: str

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        self._name_initializers(model.graph)
        for index, node in enumerate(model.graph):
            scope = module_scope(node).removeprefix(self.prefix.rstrip(".")).lstrip(".")
            node.name = f"{scope}/{node.op_type}_{index}" if scope else f"{node.op_type}_{index}"
            for place, output in enumerate(node.outputs):
                # The exporter's own could be those of a variant's inputs: torch.stack gives a value named "stack".
                if output.name and not output.is_graph_output():
                    output.name = f"{node.name}:{place}"
        return ir.passes.PassResult(model, True)

    def _name_initializers(self, graph: ir.Graph) -> None:
        taken = set(graph.initializers)
        for name, value in list(graph.initializers.items()):
            origin = name if _is_parameter(name, self.prefix) else _origin(value, self.prefix)
            if origin is None:
                continue
            wanted = fresh = origin.removeprefix(self.prefix)
            note_parameter(value, wanted)
            if wanted == name:
                continue
            count = 0
            while fresh in taken:
                count += 1
                fresh = f"{wanted}.{count}"
            taken.add(fresh)
            value.name = fresh
            if value.const_value is not None:
                value.const_value.name = fresh


def module_scope(node: ir.Node) -> str:
    """Dotted path of the module that a traced node belongs to; empty for the wrapper itself."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    return scopes[-2] if len(scopes) > 1 else ""


def _origin(value: ir.Value, prefix: str) -> str | None:
    """The one parameter that an initialiser was folded from; shapes and axes may have had a part in it."""
    try:
        sources = ast.literal_eval(value.metadata_props.get(_FOLDED_FROM, "[]"))
    except (SyntaxError, ValueError):
        return None
    parameters = [source for source in sources if _is_parameter(source, prefix)]
    return parameters[0] if len(parameters) == 1 else None


def _is_parameter(name: str, prefix: str) -> bool:
    """Parameters have the path of their module in front; the exporter's own constants (``val_7``) have no dot. The
    prefix may be empty, so it does not tell them apart."""
    return name.startswith(prefix) and "." in name
