"""Graphs whose numbers ONNX Runtime has no products of: their pairs of QuantizeLinear and DequantizeLinear stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dipgo_deploy.bundle.weights import holds_type

UNFUSED = ("float8e4m3fn",)
"""Types of which ONNX Runtime 1.31 makes 8-bit integer products nevertheless, and then refuses the graph."""


def leave_pairs(options: Any) -> None:
    """Let a session compute as the graph says: rounded values as floats, weights made floats when it is loaded."""
    options.add_session_config_entry("session.disable_quant_qdq", "1")


def suit_folder(options: Any, folder: Path) -> None:
    """Set what a session of a graph in this folder needs, told by the weights beside it."""
    if any(holds_type(folder, dtype) for dtype in UNFUSED):
        leave_pairs(options)
