"""Rewrites of traced graphs, each a pass of onnx-ir: what it needs in ``requires``, what holds after it in ``ensures``.

The modules import onnx-ir, so import them where a graph is at hand.
"""

from __future__ import annotations

import onnx_ir as ir

from dipgo_deploy.errors import OneLineError


def apply(model: ir.Model, *passes: ir.passes.InPlacePass) -> None:
    """Run passes over ``model`` in place, in order.

    Raises:
        OneLineError: of a pass as it is, without onnx-ir's wrapping. onnx_ir.passes.PassError: any other.
    """
    try:
        ir.passes.Sequential(*passes)(model)
    except (ir.passes.PassError, ir.passes.InvariantError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OneLineError):
                raise cause from error
            cause = cause.__cause__
        raise
