from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dipgo_deploy.search.pruner import SIZES, Pruner, PrunerSize, straight_through


@pytest.mark.parametrize("encoder", ["attention", "linear"])
@pytest.mark.parametrize("heads", ["per-gate", "shared"])
def test_it_starts_at_keep_all(encoder: str, heads: str) -> None:
    size = PrunerSize(width=16, encoder=encoder, hidden=(8,), heads=heads, layers=2)  # type: ignore[arg-type]
    pruner = Pruner(4, 3, size)
    gates, probabilities = pruner()
    assert gates.shape == (4, 3)
    assert torch.equal(gates, torch.ones(4, 3))
    assert torch.allclose(probabilities, torch.sigmoid(torch.ones(4, 3)))


def test_the_encoder_feeds_the_heads() -> None:
    """A change of one query reaches every gate, and the encoder learns."""
    pruner = Pruner(2, 2, PrunerSize(width=16, hidden=(8,)))
    last = pruner.heads[-1]
    with torch.no_grad():
        last.weight.normal_()  # type: ignore[union-attr, operator]
    before = pruner.logits()
    with torch.no_grad():
        pruner.queries[0].normal_()
    assert ((pruner.logits() - before).abs().amax(dim=-1) > 1e-6).all()
    pruner.logits().square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in pruner.encoder.parameters()
    )


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    probabilities = torch.tensor([0.1, 0.4999, 0.5, 0.93], requires_grad=True)
    gates = straight_through(probabilities)
    assert gates.tolist() == [0.0, 0.0, 1.0, 1.0]
    (gates * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert probabilities.grad is not None
    assert probabilities.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_temperature_sharpens() -> None:
    pruner = Pruner(2, 2)
    assert (pruner(0.5)[1] > pruner(1.0)[1]).all()


def test_warm_start_is_the_given_gates() -> None:
    wanted = [[True, True], [False, True], [True, False]]
    pruner = Pruner(3, 2)
    pruner.warm_start(wanted)
    assert pruner()[0].bool().tolist() == wanted
    with pytest.raises(ValueError, match="shared heads"):
        Pruner(3, 2, replace(SIZES["small"], heads="shared")).warm_start(wanted)


def test_the_paper_size_is_that_of_the_paper() -> None:
    pruner = Pruner(50, 9, SIZES["paper"])
    heads = sum(parameter.numel() for parameter in pruner.heads.parameters())
    assert heads == 450 * (512 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2)
    assert 37e6 < sum(parameter.numel() for parameter in pruner.parameters()) < 40e6
