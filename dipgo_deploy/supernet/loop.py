"""The denoising loop over a supernet with a real diffusers scheduler: the reference that every bundle is held to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler.loop import GivenNoise
from dipgo_deploy.sampler.schedulers import fresh, set_timesteps
from dipgo_deploy.sampler.start import ImageStart, first_latent
from dipgo_deploy.supernet.cuts import model_dtype
from dipgo_deploy.supernet.gated import CacheState, Gate, Supernet, half_of


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser in a loop; all tensors detached.

    Attributes:
        step: index of the evaluation.
        model_input: (B, C, h, w), the latent after ``scale_model_input``, before the batch is doubled for guidance, in
            the loop's dtype.
        timestep: 0-d, as the scheduler gives it.
        conditions: forward inputs by keyword, (G*B, ...), G = 2 with guidance, the unconditional half first; also where
            the evaluation is conditional only.
        before, after: the caches.
        raw: (G*B, C, h, w) the model's prediction, learned variance dropped; G = 1 where it is conditional only.
        prediction: (B, C, h, w) after guidance.
        guidance_scale: its own; a tensor of one element where it is a soft gate's, None without guidance.
    """

    step: int
    model_input: Tensor
    timestep: Tensor
    conditions: Mapping[str, Tensor]
    before: CacheState
    after: CacheState
    raw: Tensor
    prediction: Tensor
    guidance_scale: float | Tensor | None = None


def run_loop(
    supernet: Supernet,
    scheduler: Any,
    gates: Sequence[Sequence[Gate]] | Tensor,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    start: ImageStart | None = None,
    record: Callable[[Evaluation], None] | None = None,
    keep: Callable[[int], Collection[str]] | None = None,
) -> Tensor:
    """Denoise ``latents`` with one row of gates an evaluation.

    Gradients flow through all evaluations where they are enabled; call it under ``torch.no_grad()`` to only sample.

    Args:
        supernet: the gated denoiser.
        scheduler: a diffusers scheduler; only its class and configuration are used, its state is left alone.
        gates: T rows of N gates (see `Supernet.step`), T the number of evaluations.
        latents: (B, C, h, w) unit noise; it is scaled by the scheduler's ``init_noise_sigma`` here.
        conditions: forward inputs by keyword, (G*B, ...) with G = 2 if there is guidance, unconditional half first.
        num_inference_steps: what the scheduler's ``set_timesteps`` is given.
        guidance_scale: None for no guidance (a batch of one half).
        generator: source of a stochastic scheduler's noise. noises: or its draws in order, each (B, C, h, w).
        set_timesteps_kwargs: what the scheduler's ``set_timesteps`` is given besides the number of steps.
        start: begin later, from a picture that ``latents`` are added to as noise.
        record: called with each `Evaluation`.
        keep: evaluation -> blocks whose caches are kept after it, see `Supernet.step`; all by default. What is still
            read, by an evaluation or by ``record``, must be kept.

    Returns:
        The final latents, (B, C, h, w), dtype of ``latents``.

    Raises:
        UserError: T differs from the scheduler's number of evaluations, a gate is wrong (see `Supernet.step`),
            ``noises`` are not what the scheduler draws, or conditions have the wrong batch.
    """
    loop = walk_loop(
        supernet,
        scheduler,
        gates,
        latents,
        conditions,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generator,
        noises=noises,
        set_timesteps_kwargs=set_timesteps_kwargs,
        start=start,
        keep=keep,
    )
    while True:
        try:
            evaluation = next(loop)
        except StopIteration as end:
            return cast(Tensor, end.value)
        if record is not None:
            record(evaluation)
        del evaluation  # its caches may go before the next ones are made


def walk_loop(
    supernet: Supernet,
    scheduler: Any,
    gates: Sequence[Sequence[Gate]] | Tensor,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    start: ImageStart | None = None,
    keep: Callable[[int], Collection[str]] | None = None,
) -> Generator[Evaluation, None, Tensor]:
    """The loop of ``run_loop`` for a caller that goes along: each evaluation is made when it is asked for, and the
    generator's value is the final latents. The caller's gradient mode counts, at every evaluation."""
    sampler = fresh(scheduler)
    set_timesteps(sampler, num_inference_steps, set_timesteps_kwargs)
    sample, timesteps = first_latent(sampler, latents, start)
    timesteps = timesteps.to(latents.device)
    if len(gates) != len(timesteps):
        raise UserError(
            f"{len(gates)} rows of gates, but {type(sampler).__name__} evaluates the denoiser {len(timesteps)} times "
            f"in {num_inference_steps} steps; give one row an evaluation"
        )
    _check_batches(conditions, (1 if guidance_scale is None else 2) * len(latents))
    scale_input = getattr(sampler, "scale_model_input", lambda sample, _: sample)
    takes = inspect.signature(sampler.step).parameters
    extra: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
    if "eta" in takes:
        extra["eta"] = 0.0  # as diffusers' pipelines do; TCD's own default is another

    state = CacheState()
    recorded = None if noises is None else _Given(sampler, latents.shape, noises)
    for step, timestep in enumerate(timesteps):
        model_input = scale_input(sample, timestep)
        kept = None if keep is None else keep(step)
        raw, prediction, after = guided_step(
            supernet, model_input, timestep, conditions, gates[step], state, step, guidance_scale, kept
        )
        scale = supernet.scale_at(step, guidance_scale)
        yield _evaluation(step, model_input, timestep, conditions, state, after, raw, prediction, scale)
        with nullcontext() if recorded is None else GivenNoise(latents.shape, recorded.draw):
            sample = sampler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
        state = after
    if recorded is not None:
        recorded.check_all_used()
    return sample


def guided_step(
    supernet: Supernet,
    model_input: Tensor,
    timestep: Tensor,
    conditions: Mapping[str, Tensor],
    gates: Sequence[Gate] | Tensor,
    state: CacheState,
    step: int,
    guidance_scale: float | None,
    keep: Collection[str] | None = None,
) -> tuple[Tensor, Tensor, CacheState]:
    """One evaluation of a loop; with guidance it has as much of it as ``supernet.guidance`` says.

    Args:
        supernet: the gated denoiser.
        model_input: (B, C, h, w), as the scheduler scales it.
        timestep: () or (1,).
        conditions: forward inputs by keyword, (G*B, ...).
        gates: see `Supernet.step`; so are ``state``, ``step`` and ``keep``.
        state: caches after the evaluation before.
        step: index of the evaluation, for messages.
        guidance_scale: None for no guidance.
        keep: blocks whose caches are kept.

    Returns:
        What the denoiser gives (G*B, C, h, w), without a learned variance; the guided prediction (B, C, h, w); the
        caches. The first two have the dtype of ``model_input``. G is 1 where the evaluation is conditional only.
    """
    conditional_only = guidance_scale is not None and supernet.conditional_only(step)
    batch = torch.cat([model_input] * (1 if guidance_scale is None or conditional_only else 2))
    if conditional_only:
        conditions = {name: half_of(rows, "conditional") for name, rows in conditions.items()}
    dtype = model_dtype(supernet.model)
    output, after = supernet.step(
        batch.to(dtype),
        timestep.expand(len(batch)),
        conditions,
        gates,
        state,
        step,
        keep,
        conditional=conditional_only,
    )
    raw = output[:, : model_input.shape[1]].to(model_input.dtype)
    if guidance_scale is None or conditional_only:
        return raw, raw, after
    unconditional, conditional = raw.chunk(2)
    scale = supernet.scale_at(step, guidance_scale)
    assert scale is not None
    return raw, supernet.guide.combine(unconditional, conditional, scale), after


def _check_batches(conditions: Mapping[str, Tensor], rows: int) -> None:
    for name, tensor in conditions.items():
        if len(tensor) != rows:
            raise UserError(f"condition {name}: {len(tensor)} rows for a model batch of {rows}; give one row an entry")


def _evaluation(
    step: int,
    model_input: Tensor,
    timestep: Tensor,
    conditions: Mapping[str, Tensor],
    before: CacheState,
    after: CacheState,
    raw: Tensor,
    prediction: Tensor,
    scale: float | Tensor | None,
) -> Evaluation:
    return Evaluation(
        step=step,
        model_input=model_input.detach(),
        timestep=timestep,
        conditions={name: tensor.detach() for name, tensor in conditions.items()},
        before=_detached(before),
        after=_detached(after),
        raw=raw.detach(),
        prediction=prediction.detach(),
        guidance_scale=scale.detach() if isinstance(scale, Tensor) else scale,
    )


def _detached(state: CacheState) -> CacheState:
    tensors = {name: [tensor.detach() for tensor in values] for name, values in state.tensors.items()}
    earlier = {
        name: tuple([tensor.detach() for tensor in values] for values in several)
        for name, several in state.earlier.items()
    }
    return CacheState(tensors, state.structures, earlier, state.stored_at, state.halved)


class _Given:
    """The noises of a loop, handed out in order as what the scheduler draws."""

    def __init__(self, scheduler: Any, shape: torch.Size, noises: Sequence[Tensor]) -> None:
        self._name, self._shape, self._noises = type(scheduler).__name__, shape, noises
        self._used = 0

    def draw(self) -> Tensor:
        noise = self._noises[self._used] if self._used < len(self._noises) else None
        if noise is None or noise.shape != self._shape:
            got = "no more" if noise is None else f"one of {tuple(noise.shape)}"
            raise UserError(
                f"{self._name} draws noise of {tuple(self._shape)}, but `noises` has {got}; "
                "give every draw of the loop in order"
            )
        self._used += 1
        return noise

    def check_all_used(self) -> None:
        if self._used != len(self._noises):
            raise UserError(
                f"{self._name} draws noise {self._used} times in this loop, but `noises` has {len(self._noises)}; "
                "give that many"
            )
