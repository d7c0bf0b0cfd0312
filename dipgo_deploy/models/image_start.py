"""How many steps a run that starts from a picture leaves out, as the ``get_timesteps`` of diffusers' pipelines."""

from __future__ import annotations


def rounded_up(steps: int, strength: float) -> int:
    """As Stable Diffusion 1.5 to XL: the run has ``strength * steps`` steps, rounded down."""
    return steps - min(int(steps * strength), steps)


def rounded_down(steps: int, strength: float) -> int:
    """As SD3 and FLUX: the run has ``strength * steps`` steps, rounded up."""
    return int(max(steps - min(steps * strength, steps), 0))
