"""What onnxscript's optimizer does, in time that grows with the graph and not with its square."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import slice_split_rule

# Of the optimizer's own default.
_ITERATIONS = 2


# Functions whose last bit differs between numpy, with which onnxscript folds, and torch. In a frequency it is the whole
# of an angle's error: of timesteps up to 1000 that makes up to 6e-5 in the embedding.
_OF_TORCH = {"Exp": "exp", "Log": "log", "Pow": "pow", "Sin": "sin", "Cos": "cos", "Tanh": "tanh", "Sigmoid": "sigmoid"}
_MOST_ELEMENTS = 8192  # onnxscript's own limit for what it folds


class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's constant folding as a pass, with the numbers that torch gives."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        made: list[ir.Node] = []

        def left_to_numpy(node: ir.Node) -> bool | None:
            """None where numpy folds a node; else its value is known from here on, and its consumers fold."""
            value = _by_torch(node)
            if value is None:
                return None
            node.outputs[0].const_value = value
            made.append(node)
            return False

        result = optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=left_to_numpy)
        for node in made:
            _become_constant(node)
        return ir.passes.PassResult(model, result.modified or bool(made))


def _by_torch(node: ir.Node) -> ir.Tensor | None:
    """What torch gives for a node whose inputs are constants; None where numpy's numbers are the same, or too many."""
    import torch

    name = _OF_TORCH.get(node.op_type) if node.domain == "" else None
    if name is None or node.outputs[0].is_graph_output():
        return None
    arrays = [value.const_value.numpy() for value in node.inputs if value is not None and value.const_value is not None]
    if any(array.dtype not in (np.float32, np.float64) or array.size > _MOST_ELEMENTS for array in arrays):
        return None
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    found = getattr(torch, name)(*tensors).to(tensors[0].dtype)
    return ir.tensor(found.numpy(), name=node.outputs[0].name)


def _become_constant(node: ir.Node) -> None:
    """Put the known value of a node in its place."""
    graph, output = node.graph, node.outputs[0]
    if graph is None or not output.uses():
        return
    constant = output.const_value
    assert constant is not None and isinstance(graph, ir.Graph)
    value = ir.Value(
        name=output.name, type=ir.TensorType(constant.dtype), shape=ir.Shape(constant.shape), const_value=constant
    )
    graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], [output], [value])


class RuleOfOperator(pattern.RewriteRule):
    """A rule that is tried only on nodes of the operator that its pattern ends in, if it names one.

    Of the 45 rules at most five end in the same operator.
    """

    def __init__(self, rule: pattern.RewriteRule) -> None:
        self.__dict__.update(rule.__dict__)
        (end,) = rule._target_pattern.output_nodes
        operator = end.op_identifier()
        self._end = operator and operator[:2]

    def try_rewrite(
        self, model: ir.Model, graph_or_function: ir.Graph | ir.Function, node: ir.Node, **options: Any
    ) -> Any:
        """See the class."""
        if self._end is not None and (node.domain, node.op_type) != self._end:
            return None
        return super().try_rewrite(model, graph_or_function, node, **options)


class Optimized(ir.passes.InPlacePass):
    """``onnxscript.optimizer.optimize_ir`` but for one rule, which makes one Split of two Slices.

    That rule has two outputs, so its matcher lists all nodes of the graph once for each node. torch splits with Split
    itself; without the rule the graph of every family is the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        rules = [RuleOfOperator(rule) for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
        tidy = (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass())
        return ir.passes.Sequential(
            common.InlinePass(),
            ir.passes.PassManager(
                [FoldConstants(), rewriter.RewritePass(rules), *tidy], steps=_ITERATIONS, early_stop=True
            ),
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)
