"""What takes the place of a stock pipeline's scheduler: the loop of an engine directory.

Imports torch: import it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.integrations.call import Call, Evaluation
from dipgo_deploy.sampler.schedulers import fresh, make_scheduler, set_timesteps


class CompiledSampler:
    """The interface that pipelines use of a diffusers scheduler.

    The latent that a pipeline carries is what the next launch gets, or the unit noise before the first one. A call
    begins with ``set_timesteps``, whatever became of the one before. What is not defined here is the scheduler's that
    was compiled.

    bundle: of the schedule. begin(evaluations): makes a call.
    """

    def __init__(self, bundle: Bundle, begin: Callable[[Sequence[Evaluation]], Call]) -> None:
        manifest, schedule = bundle.manifest, bundle.load_schedule()
        self._manifest, self._begin = manifest, begin
        self._offers = f"; its schedules are {', '.join(bundle.schedules)}" if bundle.schedules else ""
        self._own = make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
        self._call: Call | None = None
        whole = manifest.sampler.begin is not None
        # Image-to-image pipelines count steps from the front: they get all of them, with and without launches.
        self.order = int(getattr(self._own, "order", 1)) if whole else 1
        self.init_noise_sigma = 1.0
        self.timesteps = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_own":
            raise AttributeError(name)
        return getattr(self._own, name)

    @property
    def call(self) -> Call:
        """The call that is running.

        Raises:
            UserError: none is.
        """
        if self._call is None:
            raise UserError(
                "the denoiser of this pipeline is the compiled engines: call the pipeline that they were loaded into"
            )
        return self._call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **options: Any,
    ) -> None:
        """Begin a call.

        Raises:
            UserError: another number of steps, or other timesteps, than the engine directory was compiled for.
        """
        self._call = None
        sampler = self._manifest.sampler
        steps = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        if timesteps is not None:
            raise UserError(f"timesteps: the engine directory has its own{self._offers}; leave them out")
        if steps != sampler.num_inference_steps:
            raise UserError(
                f"num_inference_steps: {steps}, and the engine directory was compiled for "
                f"{sampler.num_inference_steps}{self._offers}; give num_inference_steps={sampler.num_inference_steps}, "
                "or export a schedule of so many"
            )
        given = {name: value for name, value in {"sigmas": sigmas, **options}.items() if value is not None}
        if self._times(given) != (own := self._times(sampler.set_timesteps)):
            raise UserError(
                "sigmas (or the size, which shifts them): lead to other timesteps than those of the engine directory; "
                "leave them out, or export it for them"
            )
        evaluations = self._evaluations(own)
        begin = sampler.begin or 0
        numbers = [*own[:begin], *evaluations.values()]
        exact = all(number == int(number) for number in numbers) and not self._own.timesteps.is_floating_point()
        self.timesteps = torch.tensor(numbers, dtype=torch.int64 if exact else torch.float32, device=device)
        told = self.timesteps[begin:].tolist()
        self._call = self._begin([Evaluation(step, time) for step, time in zip(evaluations, told, strict=True)])
        self.num_inference_steps = len(numbers)

    def _times(self, options: Any) -> tuple[float, ...]:
        """What the denoiser is told at each evaluation of the sampler that was compiled."""
        self._own = fresh(self._own)
        set_timesteps(self._own, self._manifest.sampler.num_inference_steps, options)
        return tuple(self._own.timesteps.tolist())

    def _evaluations(self, times: Sequence[float]) -> dict[int, float]:
        """Those of a call, step and timestep: the launched ones, or all where a pipeline counts them."""
        plan, begin = self._manifest.plan, self._manifest.sampler.begin
        launched = {launch.step: launch.timestep for launch in plan.launches}
        if begin is None:
            return launched
        return {step: launched.get(step, time) for step, time in enumerate(times[begin:])}

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where a call starts: only where the engine directory does.

        Raises:
            UserError: a call of another strength.
        """
        own, strength = self._manifest.sampler.begin, self._manifest.sampler.strength
        if begin_index not in (0, own or 0):
            was = "from noise alone" if strength is None else f"for strength {strength:g}"
            raise UserError(f"strength: the engine directory was compiled {was}; give that, or export another one")
        if hasattr(self._own, "set_begin_index"):
            self._own.set_begin_index(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` as it is: the engines scale it."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The first latent of a run that starts from a picture, (B, C, h, w): the noise, which the engines add.

        Raises:
            UserError: the engine directory starts from noise alone.
        """
        return self._started(original_samples, noise, lambda: self._own.add_noise(original_samples, noise, timesteps))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` of flow matching."""
        return self._started(sample, noise, lambda: self._own.scale_noise(sample, timestep, noise))

    def _started(self, picture: Tensor, noise: Tensor, itself: Callable[[], Tensor]) -> Tensor:
        if self._manifest.sampler.strength is not None:
            self.call.start = picture, noise
            return noise
        # Some pipelines add noise to a picture of which nothing is left.
        if not torch.allclose(itself(), noise.to(picture.dtype), atol=1e-6):
            raise UserError(
                "a picture to start from: the engine directory starts from noise; export it with --strength"
            )
        return noise

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        eta: float = 0.0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The latent that the next launch gets, or the final one, in the shape and dtype of ``sample``.

        Raises:
            UserError: the pipeline does something that is not in the engines.
        """
        for name, value in {"eta": eta, **others}.items():
            if value:
                raise UserError(f"{name}: {value}: is not in the compiled sampler; leave it out")
        latent = self.call.step(model_output, timestep, sample, generator)
        # Some schedulers also return a prediction of the picture, which pipelines take after the last step.
        return SimpleNamespace(prev_sample=latent, pred_original_sample=latent) if return_dict else (latent, latent)
