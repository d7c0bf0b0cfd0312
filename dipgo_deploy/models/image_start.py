"""How many steps a run that starts from a picture leaves out, as the ``get_timesteps`` of diffusers' pipelines."""

from __future__ import annotations


def rounded_up(steps: int, strength: float) -> int:
    """Of the Stable Diffusion pipelines, 1.5 to XL: ``strength`` of the steps, without the broken one, are run."""
    return steps - min(int(steps * strength), steps)


def rounded_down(steps: int, strength: float) -> int:
    """Of the pipelines of SD3 and FLUX: a step of which ``strength`` wants a part is run."""
    return int(max(steps - min(steps * strength, steps), 0))
