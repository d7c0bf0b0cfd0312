"""Where a denoising loop starts: from noise alone, or from a picture that noise is added to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler.schedulers import fresh, set_timesteps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageStart:
    """A loop that starts from a picture, as diffusers' image-to-image pipelines do.

    begin: the evaluation of the full run that is the first one here. latents: (B, C, h, w) of the picture, as the VAE's
    encoder gives them, times its scaling factor.
    """

    begin: int
    latents: Tensor


def first_latent(scheduler: Any, noise: Tensor, start: ImageStart | None) -> tuple[Tensor, Tensor]:
    """The latent before the first evaluation and the timesteps of the loop, after the scheduler's ``set_timesteps``.

    noise: unit noise (B, C, h, w); alone it is scaled by ``init_noise_sigma``, with a picture it is added to that one
    by the scheduler's own ``add_noise`` or ``scale_noise``.
    """
    timesteps: Tensor = scheduler.timesteps
    if start is None:
        return noise * getattr(scheduler, "init_noise_sigma", 1.0), timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start.begin)
    timesteps = timesteps[start.begin :]
    at = timesteps[:1].repeat(len(noise))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        latent: Tensor = scheduler.scale_noise(start.latents, at, noise)
    else:
        latent = scheduler.add_noise(start.latents, noise, at)
    return latent, timesteps


def begin_of(
    scheduler: Any,
    num_inference_steps: int,
    strength: float,
    skipped: Callable[[int, float], int],
    *,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """The first evaluation of an image-to-image run.

    The scheduler is left as it was.

    Args:
        strength: share of the steps that are run, in (0, 1].
        skipped(steps, strength): how many steps that leaves out (see ``ModelFamily.image_to_image``).

    Raises:
        UserError: a strength out of range or too small for any step, or a scheduler that cannot add noise to a picture.
    """
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise UserError(f"--strength {strength:g}: give a number above 0 and up to 1")
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        raise UserError(
            f"sampler {name}: cannot start from a picture (it has no add_noise or scale_noise); use another sampler"
        )
    copy = fresh(scheduler)
    set_timesteps(copy, num_inference_steps, set_timesteps_kwargs)
    left_out = skipped(num_inference_steps, strength)
    begin = left_out * int(getattr(copy, "order", 1))
    if left_out >= num_inference_steps or begin >= len(copy.timesteps):
        raise UserError(
            f"--strength {strength:g}: leaves none of {num_inference_steps} steps; "
            f"give at least {math.ceil(1000 / num_inference_steps) / 1000:g}"
        )
    return begin
