"""The latent as a weighted sum of the history: initial noise, predictions, a picture's latents, noise draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class History:
    """What a graph has to know of the history.

    slots: entries of it. chain: how many of the first are the initial noise and the predictions in the order in which
    they are written; what comes behind them is there before the run begins.

    Raises:
        ValueError: the chain is empty or longer than the history.
    """

    slots: int
    chain: int

    def __post_init__(self) -> None:
        if not 1 <= self.chain <= self.slots:
            raise ValueError(f"a chain of {self.chain} in a history of {self.slots} slots")


def graph_coefficients(weights: Sequence[float], chain: int) -> np.ndarray:
    """What the graphs' input ``coefficients`` takes for the weights of the slots: float32 (slots,).

    The weights of the initial noise and of the predictions may be in the hundreds and cancel, and float32 would round
    each product. Neighbours in the chain are close to each other, so graphs sum the differences of neighbours, each
    with the sum of the weights from there on (Abel summation), which is of the size of the latent. A slot that is not
    written yet has only zeros behind it, so its difference is multiplied by zero.
    """
    row = np.array(weights, np.float64)
    row[:chain] = np.cumsum(row[:chain][::-1])[::-1]
    return row.astype(np.float32)


def graph_latent(history: np.ndarray, coefficients: np.ndarray, chain: int) -> np.ndarray:
    """The latent that a graph makes of its inputs ``stack`` (slots, B, C, h, w) and ``coefficients`` (slots,).

    In float64, as float32 (B, C, h, w).
    """
    row = np.array(coefficients, np.float64)
    row[: chain - 1] -= row[1:chain]
    return final_latent(history, row.tolist())


def final_latent(history: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of the history (slots, B, C, h, w), in float64, as float32 (B, C, h, w)."""
    total = np.zeros(history.shape[1:], np.float64)
    for slot, weight in enumerate(weights):
        if weight:
            total += weight * history[slot].astype(np.float64)
    return total.astype(np.float32)
