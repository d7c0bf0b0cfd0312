"""Names in a traced graph: weights get their parameter's name back, nodes their module's, and local traces go."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SCOPES = "pkg.torch.onnx.name_scopes"


def restore_names(model: ir.Model, prefix: str) -> dict[str, str]:
    """Rename in place: initialisers to the parameter they come from, nodes to ``module.path/Op_n``, and what they
    compute after them.

    The exporter's optimizer stores transposed weights as ``val_N`` and keeps the origin in metadata. ``prefix``
    (``denoiser.``) is the wrapper's attribute, which is cut off. Returns the parameter (without ``prefix``) of each
    initialiser that comes from one, by its new name.
    """
    initializers = model.graph.initializers
    taken = set(initializers)
    parameters: dict[str, str] = {}
    for name in list(initializers):
        value = initializers[name]
        origin = name if _is_parameter(name, prefix) else _origin(value, prefix)
        if origin is None:
            continue
        wanted = origin.removeprefix(prefix)
        if wanted == name:
            parameters[name] = wanted
            continue
        fresh = wanted
        count = 0
        while fresh in taken:
            count += 1
            fresh = f"{wanted}.{count}"
        taken.add(fresh)
        parameters[fresh] = wanted
        value.name = fresh
        if value.const_value is not None:
            value.const_value.name = fresh
    for index, node in enumerate(model.graph):
        scope = module_scope(node).removeprefix(prefix.rstrip(".")).lstrip(".")
        node.name = f"{scope}/{node.op_type}_{index}" if scope else f"{node.op_type}_{index}"
        for place, output in enumerate(node.outputs):
            # The exporter's own names could be those of a variant's inputs: torch.stack gives a value named "stack".
            if output.name and not output.is_graph_output():
                output.name = f"{node.name}:{place}"
    return parameters


def module_scope(node: ir.Node) -> str:
    """Dotted path of the module that a traced node belongs to; empty for the wrapper itself."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    return scopes[-2] if len(scopes) > 1 else ""


def strip_metadata(model: ir.Model) -> None:
    """Drop the exporter's metadata in place: it holds stack traces and paths of the exporting machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
    model.metadata_props.clear()


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
