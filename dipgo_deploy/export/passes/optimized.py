"""What onnxscript's optimizer does, in time that grows with the graph and not with its square."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

# Of the optimizer's own default.
_ITERATIONS = 2


class FoldConstants(ir.passes.InPlacePass):
    """onnxscript's constant folding as a pass."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        result = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        return ir.passes.PassResult(model, result.modified)


class Optimized(ir.passes.InPlacePass):
    """``onnxscript.optimizer.optimize_ir`` but for one rule, which makes one Split of two Slices.

    That rule has two outputs, so its matcher lists all nodes of the graph once for each node. torch splits with Split
    itself; without the rule the graph of every family is the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        rules = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule)
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
