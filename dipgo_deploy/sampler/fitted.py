"""A fitted solver as a diffusers scheduler, so that every loop that runs a scheduler runs it too.

Imports torch: import it inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dipgo_deploy.schedule.solver import Solver


class FittedSolver:
    """The interface that pipelines use of a diffusers scheduler, for the rows of a ``Solver``.

    The latent that a loop carries is the model input of the next evaluation, so ``scale_model_input`` changes nothing.
    All noise is drawn in the first ``step``, in the order in which the sampler that the rows stand for draws it.
    ``set_timesteps`` ignores the number of steps: the solver has its own evaluations.
    """

    order = 1

    def __init__(self, solver: Mapping[str, Any]) -> None:
        self.config: Mapping[str, Any] = {"solver": solver}
        self._solver = Solver.model_validate(solver)
        self.timesteps = torch.tensor(self._solver.timesteps, dtype=torch.float32)
        self.init_noise_sigma = self._solver.rows[0][0]
        self._predictions: list[Tensor] = []
        self._draws: list[Tensor] = []
        self._noise: Tensor | None = None
        self._picture: Tensor | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A new one from another's ``config``, with no history."""
        return cls(config["solver"])

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        """Begin a new loop."""
        self.timesteps = torch.tensor(self._solver.timesteps, dtype=torch.float32, device=device)
        self.num_inference_steps = len(self._solver.timesteps)
        self._clear()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The first latent of a loop that starts from a picture, (B, C, h, w)."""
        if not self._solver.picture:
            raise ValueError("it was not fitted to start from a picture")
        self._noise, self._picture = noise, original_samples
        row = self._solver.rows[0]
        return row[0] * noise + row[1 + len(self._solver.timesteps)] * original_samples

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """The latent of the next evaluation, or the final one, (B, C, h, w) in the dtype of ``sample``."""
        solver = self._solver
        if not self._predictions:
            if solver.picture and self._picture is None:
                raise ValueError("it was fitted to start from a picture, and there is none")
            if self._noise is None:
                self._noise = sample / solver.rows[0][0]
            self._draws = [
                randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                for _ in range(solver.noises)
            ]
        self._predictions.append(model_output)
        done = len(self._predictions)
        row = solver.rows[done] if done < len(solver.rows) else solver.final
        chain = 1 + len(solver.timesteps)
        assert self._noise is not None  # the first step of this loop set it
        history = [(row[0], self._noise), *zip(row[1:chain], self._predictions, strict=False)]
        if self._picture is not None:
            history.append((row[chain], self._picture))
        history += zip(row[len(row) - solver.noises :], self._draws, strict=True)
        total = torch.zeros_like(sample, dtype=torch.float64)
        for weight, tensor in history:
            if weight:
                total = total + weight * tensor.double()
        latent = total.to(sample.dtype)
        return SimpleNamespace(prev_sample=latent) if return_dict else (latent,)

    def _clear(self) -> None:
        self._predictions, self._draws = [], []
        self._noise = self._picture = None
