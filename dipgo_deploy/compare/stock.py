"""diffusers' own pipeline, from prompt to picture, with the supernet under the schedule in place of its denoiser.

Everything around the denoiser is the stock code: how prompts are prepared and encoded, negative prompts, guidance and
its default scale, the scheduler, the VAE, what a seed draws. The pipeline's denoiser keeps its class and weights; only
its ``forward`` is replaced while the pipeline runs, by one that follows the evaluations.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.packed import pack
from dipgo_deploy.models.stock import starts_from_pictures
from dipgo_deploy.models.stock_call import StockCall
from dipgo_deploy.reference.conditions import host
from dipgo_deploy.reference.vae import from_vae
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.sampler.schedulers import fresh
from dipgo_deploy.supernet.gated import CacheState, Supernet

if TYPE_CHECKING:
    from PIL.Image import Image

    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.reference.load import Reference


@dataclass(frozen=True)
class Case:
    """One call of a pipeline, as a user would make it.

    Attributes:
        prompts, negatives, labels: None where they are not given.
        guidance_scale: None for the pipeline's default.
    """

    name: str
    prompts: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    seed: int = 0

    @property
    def places(self) -> tuple[str, ...]:
        """What each picture is of, for messages."""
        if self.prompts is not None:
            return tuple(f"prompt {_short(prompt)}" for prompt in self.prompts)
        return tuple(f"class {label}" for label in self.labels or ()) or ("no prompt",)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:37]}...")


@dataclass
class StockRun:
    """What a stock pipeline did.

    Attributes:
        tokens: by text encoder, the ids (n, L) of each call in order.
        conditions: by keyword, what the denoiser was given at its first evaluation, (G*n, ...).
        latents: (n, C, h, w) before the VAE, None without one.
        images: float32 (n, H, W, 3) in [0, 1], None for a pipeline that was stopped, or has no VAE.
        steps: of a plain call, what its scheduler was given at each evaluation: timestep, the latent as the denoiser
            gets it, and the prediction after guidance, as the pipeline has them.
    """

    tokens: dict[str, list[np.ndarray]] = field(default_factory=dict)
    conditions: dict[str, np.ndarray] = field(default_factory=dict)
    latents: np.ndarray | None = None
    images: np.ndarray | None = None
    steps: list[tuple[float, np.ndarray, np.ndarray]] = field(default_factory=list)


class StockFailure(UserError):
    """The stock pipeline itself fails, so that there is nothing to compare with."""


class _Reached(Exception):
    """The first evaluation: all that comes before the denoiser was seen."""


class StockPipeline:
    """The stock pipeline of a model, ``pipeline``.

    Raises:
        UserError: it cannot do what the engine directory does; the message says what.
    """

    def __init__(self, manifest: Manifest, reference: Reference) -> None:
        self._manifest, self._reference = manifest, reference
        self.pipeline = _prepared(manifest, reference)
        self._takes = inspect.signature(type(self.pipeline).__call__).parameters
        self.conditional_first = reference.source.family.guide.order != "unconditional first"
        native = reference.source.config.get("sample_size")
        size = [manifest.latent.height, manifest.latent.width]
        if "height" not in self._takes and size != ([native, native] if isinstance(native, int) else native):
            raise UserError(f"{type(self.pipeline).__name__} draws at the model's native size only")

    def picture(self, seed: int = 0) -> Image:
        """A picture of the size that the pipeline makes, for runs that start from one or follow one."""
        from PIL import Image

        latent, scale = self._manifest.latent, self._reference.source.scale
        small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        size = (latent.width * scale, latent.height * scale)
        return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)

    def pictures(self) -> dict[str, Any]:
        """The pictures of a call, by our arguments: one for all (a list of one for each ControlNet where there are
        several), and a mask of its lower right part."""
        manifest = self._manifest
        uses = [spec.picture for spec in picture_conditions(manifest)]
        wanted = {use.argument for use in uses} | {"mask_image" for use in uses if use.masked}
        wanted |= {"image"} if manifest.sampler.strength is not None else set()
        found: dict[str, Any] = {argument: self.picture() for argument in sorted(wanted)}
        for argument in found:
            count = 1 + max((use.place for use in uses if use.argument == argument), default=0)
            if count > 1:
                found[argument] = [self.picture(seed) for seed in range(count)]
        if "mask_image" in found:
            found["mask_image"] = _mask(found["mask_image"].size)
        return found

    def possible(self, case: Case) -> Case:
        """The case without what the pipeline takes no argument for (FLUX.2-klein: a negative prompt)."""
        return case if "negative_prompt" in self._takes else replace(case, negatives=None)

    def conditions(self, case: Case) -> StockRun:
        """What comes before the first evaluation: tokens and conditions. Nothing is denoised."""
        return self._call(case, stop=True)

    def __call__(self, case: Case) -> StockRun:
        """The whole call.

        Raises:
            StockFailure: the pipeline fails.
        UserError: it evaluates its denoiser more or less often than the schedule has rows.
        """
        return self._call(case, stop=False)

    def plain(self, case: Case) -> StockRun:
        """The whole call with the pipeline's own denoiser and no schedule; ``steps`` has its evaluations.

        Raises:
            StockFailure: the pipeline fails.
        """
        return self._call(case, stop=False, plain=True)

    def as_it_is(self, case: Case) -> StockRun:
        """The whole call with whatever denoiser and scheduler ``pipeline`` has.

        Raises:
            StockFailure: the pipeline fails.
        """
        return self._call(case, stop=False, replaced=False)

    def _call(self, case: Case, *, stop: bool, plain: bool = False, replaced: bool = True) -> StockRun:
        pipeline, run = self.pipeline, StockRun()
        if replaced:
            pipeline.scheduler = fresh(self._reference.scheduler)
        pixels = self._reference.source.family.pixels
        decoded = pixels or getattr(pipeline, "vae", None) is not None
        arguments = self._arguments(case, decoded)
        guidance = self._reference.source.family.guide
        separate = self._manifest.guidance and guidance.order == "separate"
        denoiser = _Denoiser(self._reference, run, stop, calls=2 if separate else 1)
        try:
            with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(case.seed)  # what a pipeline draws without its generator
                stack.enter_context(prompts_as_they_are(pipeline))
                if replaced:
                    stack.enter_context(denoiser.itself(pipeline, run) if plain else denoiser.in_place(pipeline))
                stack.enter_context(_tokens_seen(pipeline, self._encoders(), run))
                if decoded and not pixels:
                    stack.enter_context(_latents_seen(pipeline.vae, run))
                images = pipeline(**arguments)[0]
        except _Reached:
            return run
        except UserError:
            raise
        except Exception as error:  # stock pipelines fail in their own ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StockFailure(f"{type(pipeline).__name__} itself fails on {case.name}: {reason}") from error
        if replaced and not plain:
            denoiser.check_all_done(type(pipeline).__name__)
        if decoded:
            pictures = np.asarray(images, np.float32)
            run.images = np.ascontiguousarray(np.broadcast_to(pictures, (*pictures.shape[:-1], 3)))
        else:
            run.latents = host(images)
        return run

    def _encoders(self) -> tuple[str, ...]:
        scheme = self._reference.source.text
        return () if scheme is None else scheme.encoders

    def _arguments(self, case: Case, decoded: bool) -> dict[str, Any]:
        manifest, latent = self._manifest, self._manifest.latent
        pixels = self._reference.source.scale
        distilled = any(spec.source == "guidance" for spec in manifest.conditions)
        guide = self._reference.source.family.guide
        arguments: dict[str, Any] = {
            "num_inference_steps": self._reference.schedule.sampler.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(case.seed),
            "output_type": "np" if decoded else "latent",
        }
        optional: dict[str, Any] = {
            "num_frames": latent.video_frames,
            "height": latent.height * pixels,
            "width": latent.width * pixels,
            # Sizes are those of the engine directory; captions are cleaned by packages that need not be there.
            "use_resolution_binning": False,
            "_auto_resize": False,
            "max_area": latent.height * latent.width * pixels**2,
            "clean_caption": False,
        }
        arguments |= {name: value for name, value in optional.items() if name in self._takes}
        if case.prompts is not None:
            arguments["prompt"] = list(case.prompts)
            negatives = case.negatives
            if negatives is None and manifest.guidance and guide.only_with_negative:
                negatives = ("",) * len(case.prompts)
            if negatives is not None:
                arguments["negative_prompt"] = list(negatives)
        if case.labels is not None:
            arguments["class_labels"] = list(case.labels)
        scale = "guidance_scale" if distilled else guide.argument
        if scale in self._takes and not (manifest.guidance or distilled):
            arguments[scale] = guide.off
        elif case.guidance_scale is not None and scale in self._takes:
            arguments[scale] = case.guidance_scale
        for argument, picture in self.pictures().items():
            arguments[argument if argument in self._takes else "image"] = picture
        if "strength" in self._takes:
            strength = manifest.sampler.strength
            arguments["strength"] = 1.0 if strength is None else strength
        return arguments


def _mask(size: tuple[int, int]) -> Image:
    """White in the lower right part."""
    from PIL import Image

    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 3, size[1] // 2, *size))
    return mask


def _prepared(manifest: Manifest, reference: Reference) -> Any:
    """A pipeline of its own with the model's modules, without what is not exported."""
    import diffusers

    source = reference.source
    pipeline = source.pipeline
    if pipeline is None:
        raise UserError(f"{source.name} is a denoiser without a pipeline")
    if source.family.pixels:
        if any(spec.source == "class" for spec in manifest.conditions):
            raise UserError(f"{type(pipeline).__name__} takes no classes")
        scheduler = fresh(reference.scheduler)
        if "generator" not in inspect.signature(scheduler.step).parameters or hasattr(scheduler, "sigmas"):
            raise UserError(f"{type(pipeline).__name__} cannot be run with {type(scheduler).__name__}")
        found: Any = diffusers.DDPMPipeline(source.denoiser, scheduler)
    elif manifest.sampler.strength is not None and not starts_from_pictures(type(pipeline)):
        found = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    else:
        found = type(pipeline)(**pipeline.components, **_settings(pipeline))
    for name in ("safety_checker", "watermark"):
        if getattr(found, name, None) is not None:
            setattr(found, name, None)
    found.set_progress_bar_config(disable=True)
    return found


def _settings(pipeline: Any) -> dict[str, Any]:
    """What the pipeline was made with besides its components."""
    taken = inspect.signature(type(pipeline).__init__).parameters
    settings = {name: value for name, value in pipeline.config.items() if name in taken and name[0] != "_"}
    return {name: value for name, value in settings.items() if name not in pipeline.components}


class _Denoiser:
    """Follows the evaluations of a pipeline: so many calls of its denoisers are the supernet's next one."""

    def __init__(self, reference: Reference, run: StockRun, stop: bool, calls: int) -> None:
        self._reference, self._run, self._stop = reference, run, stop
        self._gates = reference.schedule.gates
        self._states = [CacheState() for _ in range(calls)]
        self._calls = 0
        self._order = reference.source.family.guide.order
        self._conditional: Any = None
        null = next((spec.null for spec in reference.conditions if spec.source == "class"), None)
        shapes = {spec.name: spec.shape for spec in reference.conditions}
        self._given = StockCall(reference.source.family, shapes, null)

    @contextmanager
    def in_place(self, pipeline: Any) -> Iterator[None]:
        """While this lasts, ``pipeline`` evaluates the supernet."""
        family = self._reference.source.family
        with ExitStack() as stack:
            # Their outputs are made where the denoiser's own are: both are gated.
            stack.enter_context(self._given.controlnets_seen(pipeline))
            for name in family.denoisers:
                module = getattr(pipeline, name or family.component)
                stack.enter_context(replaced_forward(module, self._in_place_of(name, module)))
            yield

    @contextmanager
    def itself(self, pipeline: Any, run: StockRun) -> Iterator[None]:
        """While this lasts, ``pipeline`` evaluates its own denoisers, and what its scheduler is given is recorded."""
        family = self._reference.source.family
        with ExitStack() as stack:
            for name in family.denoisers:
                module = getattr(pipeline, name or family.component)
                stack.enter_context(replaced_forward(module, self._own(module.forward)))
            stack.enter_context(_steps_seen(pipeline.scheduler, run))
            yield

    def _own(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A denoiser's own ``forward``."""
        return lambda *args, **kwargs: original(*args, **self._given.with_null(kwargs))

    def _in_place_of(self, name: str, module: Any) -> Callable[..., Any]:
        """The ``forward`` of a denoiser of this name."""
        original = module.forward
        return lambda *args, **kwargs: self._evaluate(name, module, original, args, kwargs)

    def check_all_done(self, name: str) -> None:
        """Refuse a pipeline that stopped early."""
        steps = self._calls / len(self._states)
        if steps != len(self._gates):
            raise UserError(f"{name} evaluates its denoiser {steps:g} times, the schedule has {len(self._gates)}")

    def _evaluate(self, name: str, module: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = self._given.with_null(kwargs)
        source = self._reference.source
        latent, timestep, conditions = self._given(module, original, args, kwargs)
        step, half = divmod(self._calls, len(self._states))
        if step == 0:
            seen = {name: host(tensor) for name, tensor in conditions.items()}
            before = self._run.conditions
            self._run.conditions = {name: np.concatenate([*_rows(before, name), seen[name]]) for name in seen}
        if self._stop:
            if half == len(self._states) - 1:
                raise _Reached
            self._calls += 1
            return (torch.zeros_like(kwargs.get("hidden_states", latent)),)  # the other half is still to come
        if step >= len(self._gates):
            raise UserError(
                f"the stock pipeline evaluates its denoiser more often than the schedule's {len(self._gates)} times"
            )
        ours = self._reference.supernet
        if ours.denoisers is not None and name != ours.denoisers[step]:
            raise StockFailure(
                f"the stock pipeline runs {name} at evaluation {step}, the schedule {ours.denoisers[step]}: with this "
                "schedule there is no stock picture to compare with"
            )

        def call(model: Any, *_: Any) -> Any:
            if not self._given.beside:
                return original(*args, **kwargs)
            with replaced_forward(module, original):  # the family's own call ends in the denoiser's
                prediction = source.family.call(model, latent, timestep, conditions)
            given = args[0] if args else kwargs.get("hidden_states", latent)
            return (pack(prediction) if given.ndim == 3 else prediction,)

        supernet = Supernet(ours.model, ours.specs, ours.cache_kinds, call)
        supernet.forecast, supernet.denoisers = ours.forecast, ours.denoisers
        # Both halves are always evaluated, as the pipeline does: the conditional one is what it would be alone, and no
        # guided evaluation reads an unconditional cache of a conditional-only one.
        result, self._states[half] = supernet.step(latent, timestep, {}, self._gates[step], self._states[half], step)
        self._calls += 1
        share = 1.0 if ours.guidance is None else ours.guidance[step]
        return result if share == 1 else self._with_share(result, share, half)

    def _with_share(self, result: Any, share: float, half: int) -> Any:
        """What the denoiser gives, with an unconditional half that makes the pipeline guide by this share."""
        if self._order == "separate":
            if half == 0:
                self._conditional = result
                return result
            return _mapped(
                lambda made, conditional: conditional - share * (conditional - made), result, self._conditional
            )

        def joined(made: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            first, second = made.chunk(2)
            unconditional_first = self._order == "unconditional first"
            conditional, unconditional = (second, first) if unconditional_first else (first, second)
            unconditional = conditional - share * (conditional - unconditional)
            return torch.cat([unconditional, conditional] if unconditional_first else [conditional, unconditional])

        return _mapped(joined, result, result)


def _mapped(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], result: Any, other: Any) -> Any:
    """A denoiser's output with its tensors changed; a list has one for each row of the batch. other: one of the same
    structure, whose tensors are given too."""
    if isinstance(result, torch.Tensor):
        return change(result, other)
    if isinstance(result, tuple):
        return tuple(_mapped(change, *pair) for pair in zip(result, other, strict=True))
    if isinstance(result, list):
        return list(change(torch.stack(result), torch.stack(other)).unbind())
    if isinstance(result, Mapping):
        return type(result)(**{name: _mapped(change, value, other[name]) for name, value in result.items()})
    return result


def _rows(conditions: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    """Those of the half that was evaluated before, where there was one."""
    return (conditions[name],) if name in conditions else ()


@contextmanager
def prompts_as_they_are(pipeline: Any) -> Iterator[None]:
    """While this lasts, a pipeline that cannot run without the package ftfy, which repairs prompts, runs where that is
    not installed, and leaves them alone, as an engine directory does."""
    module = sys.modules[type(pipeline).__module__]
    if not hasattr(module, "is_ftfy_available") or hasattr(module, "ftfy"):
        yield
        return
    with mock.patch.object(module, "ftfy", SimpleNamespace(fix_text=lambda text: text), create=True):
        yield


@contextmanager
def _tokens_seen(pipeline: Any, encoders: tuple[str, ...], run: StockRun) -> Iterator[None]:
    def seen(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        run.tokens.setdefault(name, []).append(host(ids))

    with ExitStack() as stack:
        for name in encoders:
            module = getattr(pipeline, name, None)
            if module is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: seen(name, args, kwargs), with_kwargs=True
                )
                stack.callback(handle.remove)
        yield


@contextmanager
def _steps_seen(scheduler: Any, run: StockRun) -> Iterator[None]:
    """Takes what a pipeline gives its scheduler; ``scale_model_input`` makes the latent that the denoiser gets."""
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)
    latest: dict[str, torch.Tensor] = {}

    def scaled(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        latest["latent"] = scale(sample, *args, **kwargs)  # type: ignore[misc]
        return latest["latent"]

    @functools.wraps(step)  # pipelines look at its parameters to see whether it takes their generator
    def stepped(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = latest.pop("latent", sample)
        given = given[-len(sample) :]  # some pipelines scale what they have doubled for guidance
        run.steps.append((float(timestep), host(given), host(model_output)))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.__dict__["step"] = stepped
    if scale is not None:
        scheduler.__dict__["scale_model_input"] = scaled
    try:
        yield
    finally:
        for name in ("step", "scale_model_input"):
            scheduler.__dict__.pop(name, None)


@contextmanager
def _latents_seen(vae: Any, run: StockRun) -> Iterator[None]:
    """Takes the latents as the pipeline gives them to its VAE, with the scaling undone."""
    decode = vae.decode

    def seen(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run.latents = host(from_vae(vae, latents))
        return decode(latents, *args, **kwargs)

    vae.__dict__["decode"] = seen
    try:
        yield
    finally:
        del vae.__dict__["decode"]
