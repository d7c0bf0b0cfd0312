"""Numbers in words."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def macs(value: float) -> str:
    """Multiply-accumulates, such as ``3.42 GMACs``."""
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {prefix}MACs"
    return f"{value:.3g} MACs"


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def count(number: int, thing: str) -> str:
    """``1 launch``, ``2 launches``."""
    ending = "es" if thing.endswith(("ch", "s")) else "s"
    return f"{number:,} {thing if number == 1 else thing + ending}"
