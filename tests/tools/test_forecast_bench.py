"""Which launches are compared at equal cost, and how the page shows them."""

from __future__ import annotations

import pytest

from tools.bench.forecast import STEPS, Pattern, as_text, gates_of, partial_steps


@pytest.mark.parametrize(("whole", "partial"), [(7, 0), (5, 5), (5, 15), (6, 4), (3, 22), (10, 30)])
def test_launches_are_spread_evenly(whole: int, partial: int) -> None:
    gates = gates_of(Pattern("", whole, partial, frozenset({"b"})), ("a", "b"))
    assert len(gates) == STEPS and all(gates[0])
    full = [step for step, row in enumerate(gates) if all(row)]
    part = [step for step, row in enumerate(gates) if row == (False, True)]
    assert (len(full), len(part)) == (whole, partial)
    gaps = [after - before for before, after in zip(full, [*full[1:], STEPS], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    # Of no block: the same evaluations.
    assert partial_steps(Pattern("", whole, partial, frozenset())) == part


def test_the_tables() -> None:
    def row(pattern: str, reads: str, value: float) -> dict:
        estimate = {"value": value, "low": value - 0.001, "high": value + 0.001}
        return {"pattern": pattern, "reads": reads, "evaluations": 5.0, "ssim": estimate, "difference": estimate}

    rows = [
        row("5 whole", "-", 0.97),
        row("5 whole, searched and refined", "-", 0.02),
        row("4 whole, 4 of x", "plain caches", -0.02),
        row("4 whole, 4 of x", "Taylor, order 1", -0.01),
    ]
    text = as_text({"parts": [{"model": "m", "granularity": "block", "test_images": 20, "rows": rows}]})
    assert "m, granularity block, 20 images; 5 whole: SSIM 0.9700 +- 0.0010" in text
    assert "| 5 whole, searched and refined | 5.00 | 0.0200 +- 0.0010 | - | - | - | - |" in text
    assert "| 4 whole, 4 of x | 5.00 | -0.0200 +- 0.0010 | -0.0100 +- 0.0010 | - | - | - |" in text
