"""The pruner network of DiP-GO (arXiv 2410.16942): a learned query a gate, an encoder, and keep/remove logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Encoder = Literal["attention", "linear"]
Heads = Literal["per-gate", "shared"]


@dataclass(frozen=True)
class PrunerSize:
    """How large the pruner is.

    Attributes:
        width: of a query.
        encoder: self-attention over all gates, or stacked linear layers.
        layers: of the encoder.
        attention_heads: of self-attention.
        hidden: widths inside a head's MLP.
        heads: one MLP a gate, or one for all.
    """

    width: int = 64
    encoder: Encoder = "attention"
    layers: int = 1
    attention_heads: int = 4
    hidden: tuple[int, ...] = (32,)
    heads: Heads = "per-gate"


SIZES = {"small": PrunerSize(), "paper": PrunerSize(width=512, attention_heads=8, hidden=(128, 128))}
"""``paper``: that of the paper and its code (37 M parameters for 450 gates). ``small``: for small models."""


class Pruner(nn.Module):
    """T x N keep probabilities from nothing but learned queries.

    Starts at keep-all: the last layer has weight 0 and bias (0, 1), so every gate's keep probability is 0.73.
    """

    def __init__(self, steps: int, blocks: int, size: PrunerSize | None = None) -> None:
        """Build for T evaluations and N blocks.

        Raises:
            ValueError: the width is not a multiple of the attention heads.
        """
        super().__init__()
        size = size or SIZES["small"]
        self.steps, self.blocks = steps, blocks
        count = steps * blocks
        self.queries = nn.Parameter(torch.randn(count, size.width))
        self.encoder = nn.Sequential(*(_encoder_layer(size) for _ in range(size.layers)))
        self.normalise = nn.LayerNorm(size.width)
        widths = (size.width, *size.hidden, 2)
        gates = count if size.heads == "per-gate" else 1
        self.heads = nn.ModuleList(
            _Linear(gates, before, after) for before, after in zip(widths, widths[1:], strict=False)
        )
        last = self._last
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.0, 1.0]).expand_as(last.bias))

    @property
    def _last(self) -> _Linear:
        layer = self.heads[-1]
        assert isinstance(layer, _Linear)
        return layer

    def warm_start(self, gates: Sequence[Sequence[bool]]) -> None:
        """Start at these T x N gates instead of keep-all, with the same confidence. Needs heads of their own per gate.

        Raises:
            ValueError: the heads are shared.
        """
        bias = self._last.bias
        if bias.shape[0] != self.steps * self.blocks:
            raise ValueError("shared heads cannot start at given gates")
        kept = torch.tensor(gates, dtype=bias.dtype).reshape(-1, 1)
        with torch.no_grad():
            bias.copy_(torch.cat([1 - kept, kept], dim=1))

    def logits(self) -> Tensor:
        """(T, N, 2): remove, keep."""
        hidden = self.normalise(self.encoder(self.queries[None])[0])
        for place, layer in enumerate(self.heads):
            hidden = layer(hidden if place == 0 else torch.relu(hidden))
        return hidden.reshape(self.steps, self.blocks, 2)

    def scores(self) -> Tensor:
        """Keep probabilities (T, N)."""
        return torch.softmax(self.logits(), dim=-1)[..., 1]

    def forward(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Gates (T, N), exactly 0 or 1, whose gradient is that of the keep probabilities (T, N), also returned."""
        probabilities = torch.softmax(self.logits() / temperature, dim=-1)[..., 1]
        return straight_through(probabilities), probabilities


def straight_through(probabilities: Tensor) -> Tensor:
    """1 where a probability is at least a half, else 0, exactly; the gradient passes through unchanged."""
    hard = (probabilities >= 0.5).to(probabilities.dtype)
    return hard + (probabilities - probabilities.detach())


class _Linear(nn.Module):
    """A linear layer (count, in) -> (count, out), with weights for each row or for all (``gates`` = 1)."""

    def __init__(self, gates: int, before: int, after: int) -> None:
        super().__init__()
        bound = before**-0.5
        self.weight = nn.Parameter(torch.empty(gates, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(gates, after).uniform_(-bound, bound))

    def forward(self, rows: Tensor) -> Tensor:
        if len(self.weight) == 1:
            return rows @ self.weight[0] + self.bias
        return torch.bmm(rows[:, None], self.weight)[:, 0] + self.bias


class _Stacked(nn.Module):
    """A residual linear layer: the encoder without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalise, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Any:
        return rows + torch.relu(self.linear(self.normalise(rows)))


def _encoder_layer(size: PrunerSize) -> nn.Module:
    if size.encoder == "linear":
        return _Stacked(size.width)
    if size.width % size.attention_heads:
        raise ValueError(f"a width of {size.width} is no multiple of {size.attention_heads} attention heads")
    # Evaluated in training mode for gradients, so no dropout: the same queries give the same gates.
    return nn.TransformerEncoderLayer(
        size.width, size.attention_heads, 2 * size.width, dropout=0.0, batch_first=True, norm_first=True
    )
