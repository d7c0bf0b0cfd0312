"""What onnxscript's optimizer does, in time that grows with the graph and not with its square."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import slice_split_rule

# Of the optimizer's own default.
_ITERATIONS = 2


class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's constant folding as a pass."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        result = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        return ir.passes.PassResult(model, result.modified)


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
