"""A scheduler's own denoising loop, with its noise draws taken over. Imports torch: import it inside functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dipgo_deploy.sampler.schedulers import fresh, set_timesteps
from dipgo_deploy.sampler.start import ImageStart, first_latent

_CASTS = frozenset(
    {
        torch.Tensor.to,
        torch.Tensor.float,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.type,
        torch.Tensor.type_as,
    }
)


@dataclass(frozen=True)
class LoopResult:
    """What a loop went through: the model inputs in order, the timesteps they belong to, and the final latent."""

    inputs: tuple[torch.Tensor, ...]
    timesteps: tuple[float, ...]
    final: torch.Tensor


class GivenNoise(TorchFunctionMode):
    """Hands out given noise for ``torch.randn`` and ``torch.randn_like`` (which diffusers' ``randn_tensor`` calls too).

    shape: of every draw. draw() -> the next one; it gets the device and dtype that were asked for.
    keep_double: let no float64 tensor of the latent's shape be cast down: several schedulers cast the sample to
    float32, which would round the coefficients. Their scalars (sigmas, alphas) stay in the precision the scheduler
    gives them, so that the coefficients are those that its loop uses.
    """

    def __init__(self, shape: torch.Size, draw: Callable[[], torch.Tensor], keep_double: bool = False) -> None:
        super().__init__()
        self._shape, self._draw, self._keep_double = shape, draw, keep_double

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn or func is torch.randn_like:
            return self._noise(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._keep_double and func in _CASTS and args[0].dtype == torch.float64 and args[0].shape == self._shape:
            return args[0]
        return result

    def _noise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if func is torch.randn_like:
            shape = args[0].shape
        else:
            size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            shape = torch.Size(size)
        if shape != self._shape:
            raise ValueError(f"it draws noise of shape {tuple(shape)}, not of the latent's {tuple(self._shape)}")
        noise = self._draw()
        return noise if self._keep_double else noise.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))


def run_loop(
    scheduler: Any,
    num_inference_steps: int,
    initial: torch.Tensor,
    predict: Callable[[int, torch.Tensor, float], torch.Tensor],
    draw: Callable[[], torch.Tensor] | None,
    *,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    start: ImageStart | None = None,
    keep_double: bool = False,
) -> LoopResult:
    """Run a fresh copy of the scheduler as a diffusers pipeline does.

    ``eta`` is 0 where the scheduler's ``step`` takes it, the default of diffusers' pipelines.

    Args:
        initial: unit noise (B, C, h, w), multiplied by ``init_noise_sigma`` here where the scheduler has one.
        predict: called with (index, model input, timestep); gives a prediction of the same shape and dtype.
        draw: gives the noise of the next draw, of the same shape; None leaves drawing to the scheduler, from torch's
            default generator.
        start: begin with a picture that the initial noise is added to.
        keep_double: for float64 input, keep it all the way (with ``draw`` only).

    Exceptions of the scheduler pass through, except that a refusal by ``set_timesteps`` is a UserError.
    """
    scheduler = fresh(scheduler)
    set_timesteps(scheduler, num_inference_steps, set_timesteps_kwargs)
    step_kwargs = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    inputs: list[torch.Tensor] = []
    noise = nullcontext() if draw is None else GivenNoise(initial.shape, draw, keep_double)
    with noise, torch.no_grad():
        latent, timesteps = first_latent(scheduler, initial, start)
        for index, timestep in enumerate(timesteps):
            # FlowMatchEuler and its kin have no scale_model_input: they take the latent as it is.
            scale = getattr(scheduler, "scale_model_input", None)
            model_input = latent if scale is None else scale(latent, timestep)
            inputs.append(model_input.clone())
            prediction = predict(index, model_input, float(timestep))
            latent = scheduler.step(prediction, timestep, latent, return_dict=False, **step_kwargs)[0]
            if latent.shape != initial.shape:
                raise ValueError(f"its step makes {tuple(latent.shape)} of a latent of {tuple(initial.shape)}")
    return LoopResult(tuple(inputs), tuple(float(timestep) for timestep in timesteps), latent)
