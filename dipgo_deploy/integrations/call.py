"""One call of a stock pipeline whose denoiser and scheduler are the engines'.

Imports torch: import it inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dipgo_deploy.bundle.manifest import ConditionSpec, Manifest
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.integrations.probes import check_unguided, probe, scale_in
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.packed import PACK, as_latent, as_tokens
from dipgo_deploy.models.stock_call import StockCall
from dipgo_deploy.reference.conditions import host
from dipgo_deploy.runtime.image import batch_for, pad_batch
from dipgo_deploy.runtime.loop import DenoisingLoop

# Arguments of a denoiser that are positions or extents, which follow from the size, or another form of a condition.
_FOLLOWING = {
    *("hidden_states", "sample", "timestep", "timestep_cond", "return_dict", "txt_ids", "img_ids", "img_shapes"),
    *("num_frames", "height", "width", "rope_interpolation_scale", "resolution", "aspect_ratio"),
}


@dataclass(frozen=True)
class Evaluation:
    """One iteration of the pipeline's loop. step: evaluation of the engine directory; timestep: what it is told."""

    step: int
    timestep: float


@dataclass(frozen=True)
class _Half:
    """One call of a denoiser. name: as the pipeline has it. latent: (rows, C, [f,] h, w). returned: the probes."""

    name: str
    latent: Tensor
    conditions: Mapping[str, Tensor]
    returned: Tensor

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.latent)


class Call:
    """Follows the evaluations of one call.

    manifest: of the schedule. arguments: read what the denoisers are handed. loops(count): as many loops with buffers
    of their own. evaluations: in order. scale_of(name): the guidance scale of a further denoiser, None where the
    pipeline does not say. began(guidance scale, extents of the latent): told once.
    """

    def __init__(
        self,
        manifest: Manifest,
        family: ModelFamily,
        arguments: StockCall,
        loops: Callable[[int], Sequence[DenoisingLoop]],
        evaluations: Sequence[Evaluation],
        scale_of: Callable[[str], float | None],
        began: Callable[[float, Sequence[int]], None],
    ) -> None:
        self._manifest, self._family, self._arguments = manifest, family, arguments
        self._make_loops, self._evaluations, self._scale_of = loops, list(evaluations), scale_of
        self._began = began
        self._launched = set(manifest.plan.launched)
        self._done = 0
        self._halves: list[_Half] = []
        self._loops: Sequence[DenoisingLoop] = ()
        self._walks: list[Iterator[int]] = []
        self._first: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}
        self._returned: Tensor | None = None
        self._latents = np.empty(0)
        self.start: tuple[Tensor, Tensor] | None = None

    def evaluate(
        self, name: str, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the denoiser of this name returns: a probe. forward: its own."""
        kwargs = self._arguments.with_null(kwargs)
        if self._done >= len(self._evaluations):
            raise UserError(
                f"{name}: is called more often than the {len(self._evaluations)} times of the engine directory, or by "
                "another pipeline than the engines were loaded into"
            )
        latent, _, conditions = self._arguments(module, forward, args, kwargs)
        self._refuse_others(kwargs, conditions)
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample", latent))
        extents = self._extents(latent, kwargs)
        if latent.ndim == 3:
            latent = as_latent(latent, extents)
        separate = self._family.guide.order == "separate"
        if len(self._halves) >= (2 if separate else 1):
            raise UserError(
                f"{name}: the pipeline calls it {len(self._halves) + 1} times a step (skip-layer or other guidance, or "
                "true_cfg_scale), the engine directory does not; leave that out"
            )
        probes = self._probes(latent, module, separate)
        self._halves.append(_Half(name, latent, conditions, probes[:, : latent.shape[1]]))
        return _output(probes, given, kwargs.get("return_dict", True))

    def _extents(self, latent: Tensor, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """Of the latent; raises UserError where the engines do not take it."""
        own, ranges = self._manifest.latent, self._manifest.sizes
        extents, said = tuple(latent.shape[2:]), _times(latent.shape[2:])
        if latent.ndim == 3:
            extents, said = own.extents, f"{latent.shape[1]} tokens"
            if ranges is not None and kwargs.get("img_ids") is not None:
                extents = tuple((int(last) + 1) * PACK for last in kwargs["img_ids"].amax(dim=0)[1:])
            fits = latent.shape[1] in (math.prod(extents), math.prod(extents) // PACK**2)
        else:
            fits = extents[:-2] == own.extents[:-2] and (ranges is not None or extents == own.extents)
        if not fits:
            raise UserError(
                f"a latent of {said}: this engine directory draws {_times(own.extents)}{self._in_pixels()}; "
                "give that height and width (and num_frames), or export another one"
            )
        if ranges is not None:
            ranges.check(Sizes(ranges.batch.opt, *extents[-2:]))
        return extents

    def _in_pixels(self) -> str:
        own = self._manifest.latent
        if own.scale is None:
            return ""
        frames = f"{own.video_frames} frames of " if own.frames is not None else ""
        return f", which is {frames}{own.height * own.scale}x{own.width * own.scale} pixels (height x width)"

    def _probes(self, latent: Tensor, module: Any, separate: bool) -> Tensor:
        """In the place of a prediction (rows, C', [f,] h, w): C' with a learned variance is what the model has."""
        out = module.config.get("out_channels")
        channels = out if latent.ndim == 4 and isinstance(out, int) and out == 2 * latent.shape[1] else latent.shape[1]
        rows, *rest = (len(latent), channels, *latent.shape[2:])
        if separate:
            return probe((rows, *rest), conditional=not self._halves)
        first = self._family.guide.order == "conditional first"
        # Of an odd batch, which is not guided, the first half is the larger one.
        both = [probe(((rows + 1 - place) // 2, *rest), conditional=first ^ bool(place)) for place in (0, 1)]
        return torch.cat(both)

    def _refuse_others(self, kwargs: Mapping[str, Any], conditions: Mapping[str, Tensor]) -> None:
        """Refuse what a pipeline hands over and no engine takes."""
        known = {*_FOLLOWING, *(spec.name for spec in self._manifest.conditions)}
        if self._family.given is not None:
            known |= conditions.keys()  # what it knows of, and a model without it leaves alone
        for name, value in kwargs.items():
            nothing = value is None or value is False or (isinstance(value, tuple | list | dict) and not len(value))
            if nothing or name in known:
                continue
            if isinstance(value, Mapping) and all(key in known or inner is None for key, inner in value.items()):
                continue
            raise UserError(f"{name}: is given to the denoiser, and this engine directory takes none; leave it out")

    def step(self, prediction: Tensor, timestep: Any, sample: Tensor, generator: Any) -> Tensor:
        """The latent of the next evaluation, or the final one, in the form and dtype of ``sample``."""
        if not self._halves or self._done >= len(self._evaluations):
            raise UserError("the compiled sampler follows the denoiser of its own pipeline: call that pipeline")
        halves, self._halves = self._halves, []
        evaluation = self._evaluations[self._done]
        self._check_evaluation(evaluation, halves, float(timestep), sample)
        images, guided = self._images(halves, sample)
        in_form = as_latent(prediction, halves[0].latent.shape[2:]) if prediction.ndim == 3 else prediction
        if guided:
            self._check_scale(halves[0].name, scale_in(in_form, self._family.guide))
        else:
            check_unguided(in_form, torch.cat([half.returned for half in halves]))
        conditions = self._in_order(halves, images, guided)
        if self._done == 0:
            self._begin(halves[0], images, conditions, sample, generator)
        else:
            self._check_conditions(conditions)
        self._advance(evaluation, images)
        self._done += 1
        self._returned = self._as_sample(self._latents, sample)
        return self._returned

    def _check_evaluation(
        self, evaluation: Evaluation, halves: Sequence[_Half], timestep: float, sample: Tensor
    ) -> None:
        if timestep != evaluation.timestep:
            strength = self._manifest.sampler.strength
            help_ = "its own timesteps" if strength is None else f"strength={strength:g}, which it was exported with"
            raise UserError(
                f"timestep {timestep:g} where the engine directory has {evaluation.timestep:g}; give {help_}"
            )
        names = self._manifest.model.denoisers
        launches = (launch for launch in self._manifest.plan.launches if launch.step == evaluation.step)
        wanted = {names[launch.denoiser] for launch in launches if names}
        for half in halves:
            if wanted and half.name not in wanted:
                raise UserError(f"{half.name} runs at timestep {timestep:g}, in the engines {wanted.pop()} does")
        if self._returned is not None and not (
            sample is self._returned or (sample.shape == self._returned.shape and torch.equal(sample, self._returned))
        ):
            raise UserError(
                "the latents were changed between two steps (by callback_on_step_end, or a pipeline that draws into a "
                "picture by mixing): the compiled sampler sums its own predictions; leave that out"
            )

    def _images(self, halves: Sequence[_Half], sample: Tensor) -> tuple[int, bool]:
        """How many images there are, and whether they are guided."""
        rows, count = sum(half.rows for half in halves), len(sample)
        null = self._manifest.components.null_class
        labels = halves[0].conditions.get("class_labels")
        if labels is not None and null is not None and rows == count and bool((labels == null).any()):
            return rows // 2, True  # DiTPipeline gives its scheduler both halves
        if rows not in (count, 2 * count):
            raise UserError(f"the denoiser is given a batch of {rows} for {count} latents: other guidance than here")
        guided = rows == 2 * count
        if guided and not self._manifest.guidance:
            argument = self._family.guide.argument
            raise UserError(
                f"{argument}: this engine directory was exported without guidance; give {argument}="
                f"{self._family.guide.off:g}, or export it with --guidance"
            )
        return count, guided

    def _check_scale(self, name: str, scale: float) -> None:
        known = self._scales.setdefault(name, scale)
        if abs(known - scale) > 1e-3 * max(1.0, abs(known)):
            raise UserError(f"{self._family.guide.argument}: goes from {known:g} to {scale:g}; the engines have one")

    def _in_order(self, halves: Sequence[_Half], images: int, guided: bool) -> dict[str, Tensor]:
        """Every condition of the engines, (G * images, ...), the unconditional half first."""
        found = {}
        first = self._family.guide.order != "unconditional first"
        for spec in self._manifest.conditions:
            parts = [half.conditions[spec.name] for half in halves if spec.name in half.conditions]
            if not parts:
                raise UserError(f"{spec.name}: the pipeline gives its denoiser none, this engine directory takes it")
            parts = list(parts[0].chunk(2)) if guided and len(halves) == 1 else parts
            if self._manifest.guidance:
                parts = parts * 2 if len(parts) == 1 else parts[::-1] if first else parts
            found[spec.name] = torch.cat([part.expand(images, *part.shape[1:]) for part in parts])
        return found

    def _check_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        for name, tensor in conditions.items():
            if not torch.equal(tensor, self._first[name]):
                raise UserError(
                    f"{name}: changes during the call (control_guidance_start or _end, or a callback); the engines "
                    "take what the first step has"
                )

    def _begin(self, half: _Half, images: int, conditions: dict[str, Tensor], sample: Tensor, generator: Any) -> None:
        """Start the loops, with all that the call draws."""
        manifest = self._manifest
        noise = host(half.latent[-images:].detach().cpu())
        picture = None
        if manifest.sampler.strength is not None:
            if self.start is None:
                raise UserError(
                    "this engine directory starts from a picture: use the image-to-image pipeline of the model"
                )
            pictures, noises = (host(tensor.detach().cpu()) for tensor in self.start)
            picture = np.broadcast_to(pictures, (images, *pictures.shape[1:]))
            noise = np.broadcast_to(noises, (images, *noises.shape[1:]))
        sizes = Sizes(manifest.batch, *noise.shape[-2:])
        specs = manifest.conditions if manifest.sizes is None else manifest.at(sizes).conditions
        arrays = {spec.name: _array(spec, conditions[spec.name]) for spec in specs}
        draws = [self._drawn(sample, generator, images, noise.shape[2:]) for _ in range(manifest.plan.noises)]
        starts = range(0, images, manifest.batch)
        self._loops = self._make_loops(len(starts))
        scales = self._all_scales(half.name)
        groups = 2 if manifest.guidance else 1
        self._walks = []
        for loop, start in zip(self._loops, starts, strict=True):
            rows = slice(start, start + manifest.batch)
            batch = batch_for(min(manifest.batch, images - start), manifest.batch, manifest.sizes)
            self._walks.append(
                loop.start(
                    pad_batch(noise[rows], batch),
                    {
                        name: np.concatenate([pad_batch(part[rows], batch) for part in np.split(array, groups)])
                        for name, array in arrays.items()
                    },
                    noises=np.stack([pad_batch(draw[rows], batch) for draw in draws]) if draws else None,
                    image=None if picture is None else pad_batch(picture[rows], batch),
                    guidance_scale=scales,
                )
            )
        self._first = conditions
        self._latents = noise
        distilled = next((arrays[spec.name] for spec in specs if spec.source == "guidance"), None)
        self._began(scales[0] if distilled is None else float(distilled.flat[0]), noise.shape[2:])

    def _all_scales(self, name: str) -> tuple[float, ...]:
        """The guidance scale of each denoiser; those of the further ones are checked when they run."""
        names = self._manifest.model.denoisers or (name,)
        own = self._scales.get(name, self._family.guide.off)
        for other in names if name in self._scales else ():
            self._scales.setdefault(other, own if (scale := self._scale_of(other)) is None else scale)
        return tuple(self._scales.get(each, own) for each in names)

    def _drawn(self, sample: Tensor, generator: Any, images: int, extents: Sequence[int]) -> np.ndarray:
        """Noise of the sampler, drawn in the form that the pipeline's latents have."""
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return host((as_latent(noise, extents) if noise.ndim == 3 else noise)[:images].cpu())

    def _advance(self, evaluation: Evaluation, images: int) -> None:
        """Run the launches of an evaluation, where it has any."""
        if evaluation.step not in self._launched:
            return
        parts = []
        for loop, walk in zip(self._loops, self._walks, strict=True):
            last = max(index for index, launch in enumerate(loop.launches) if launch.step == evaluation.step)
            for index in walk:
                if index == last:
                    break
            with np.errstate(over="ignore", invalid="ignore"):  # said below
                parts.append(loop.latents_after(last))
            if not np.isfinite(parts[-1]).all():
                first = loop.not_finite() or "the sum of all predictions"
                raise NotFiniteError(f"{loop.bundle.path}: {first}: the first output that is not finite")
        self._latents = np.concatenate(parts)[:images]

    def _as_sample(self, latents: np.ndarray, sample: Tensor) -> Tensor:
        """Latents in form, rows and dtype of a pipeline's."""
        tensor = torch.from_numpy(np.ascontiguousarray(latents))
        if len(sample) == 2 * len(tensor):
            tensor = torch.cat([tensor, tensor])
        if sample.ndim == 3:
            tensor = as_tokens(tensor, sample.shape[2])
        elif sample.ndim == 5:
            tensor = tensor[:, :, tensor.shape[2] - sample.shape[2] :]  # without a first frame that is given
        return tensor.to(device=sample.device, dtype=sample.dtype)


def _times(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))


def _array(spec: ConditionSpec, tensor: Tensor) -> np.ndarray:
    """A condition as the engines take it; raises UserError for another shape."""
    if tuple(tensor.shape[1:]) != tuple(spec.shape[1:]):
        raise UserError(
            f"{spec.name}: the pipeline gives rows of {tuple(tensor.shape[1:])}, this engine directory takes "
            f"{tuple(spec.shape[1:])}; leave out max_sequence_length and other sizes, or export it for them"
        )
    tensor = tensor.detach().cpu()
    return host(tensor.to(torch.int64) if spec.dtype == "int64" else tensor.float())


def _output(prediction: Tensor, given: Any, return_dict: bool) -> Any:
    """A prediction (rows, C', [f,] h, w) as a denoiser returns it for the input ``given``."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    if isinstance(given, list | tuple):  # Z-Image: one tensor (C, 1, h, w) for each picture
        return ([row[:, None] for row in prediction],)
    if given.ndim == 3:
        prediction = as_tokens(prediction, given.shape[2])
    prediction = prediction.to(given.device)  # in float32, so that little is lost of the scale
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)
