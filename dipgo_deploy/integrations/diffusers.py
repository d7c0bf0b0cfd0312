"""An engine directory in a stock diffusers pipeline: ``load_engines(pipeline, directory)``.

Everything around the denoiser stays the pipeline's: its prompt encoders, VAE, safety checker, callbacks, ControlNet
pictures, IP-Adapter. The denoiser's ``forward`` and the scheduler are replaced until ``unload``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.models.stock_call import StockCall
from dipgo_deploy.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from dipgo_deploy.integrations.call import Call, Evaluation
    from dipgo_deploy.runtime.loop import DenoisingLoop

# What pipelines correct in a configuration that they load.
_CORRECTED = ("sample_size",)
# Changes of the denoiser's own weights or layers, which the engines would not follow.
_CHANGES = ("load_lora_adapter", "fuse_lora", "set_adapters", "enable_freeu")


def load_engines(
    pipeline: Any,
    engine_dir: str | os.PathLike[str],
    backend: str = "auto",
    *,
    schedule: str | None = None,
    launches: int | None = None,
    **options: Any,
) -> Engines:
    """Let an engine directory do the denoising of a diffusers pipeline.

    The pipeline is called as before, with the engine directory's ``num_inference_steps``; so many of its steps are
    launches. What the engines do not do (another size or strength, latents changed by a callback, ...) is refused when
    it is met. The denoiser's own weights stay where they are, unused, for ``Engines.unload``.

    Args:
        pipeline: of the model that was exported, such as ``StableDiffusionPipeline.from_pretrained(...)``.
        engine_dir: the directory.
        backend: ``auto``, ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
        schedule, launches: which one, of a directory with several.
        options: further ones of ``Pipeline.from_engine_dir``: ``threads``, ``share_weights``, ``verify``.

    Returns:
        What unloads them again; as a context manager at its end.

    Raises:
        UserError: the directory is wrong, cannot be run here, or is of another model than the pipeline's.
    """
    ours = Pipeline.from_engine_dir(
        engine_dir, backend, schedule=schedule, launches=launches, **{"load": "call", **options}
    )
    try:
        return Engines(pipeline, ours)
    except ImportError as error:
        raise UserError(f"load_engines: needs diffusers ({error}); {install('export')}") from error


class Engines:
    """Engines in a pipeline.

    Attributes:
        pipeline: the engine directory's own, which shares their graphs; its LoRAs are theirs, too.
    """

    def __init__(self, stock: Any, ours: Pipeline) -> None:
        from dipgo_deploy.integrations.compiled_sampler import CompiledSampler

        manifest = ours.bundle.manifest
        family = family_for(manifest.model.class_name)
        self.pipeline = ours
        self._stock, self._family = stock, family
        self._loops: list[DenoisingLoop] = []
        self._running: Call | None = None
        self._changes = -1
        _check_model(stock, ours, family)
        shapes = {spec.name: spec.shape for spec in manifest.conditions}
        self._arguments = StockCall(family, shapes, manifest.components.null_class)
        sampler = CompiledSampler(ours.bundle, self._begin)
        self._sampler, self._loaded = sampler, ExitStack()
        with ExitStack() as stack:
            stack.enter_context(self._arguments.controlnets_seen(stock))
            for name in family.denoisers:
                module = getattr(stock, name or family.component)
                stack.enter_context(replaced_forward(module, self._in_place_of(name or family.component, module)))
                for change in _CHANGES:
                    module.__dict__[change] = _refused(change)
                    stack.callback(module.__dict__.pop, change, None)
            stack.callback(setattr, stock, "scheduler", stock.scheduler)
            stock.scheduler = sampler
            self._loaded = stack.pop_all()

    def _in_place_of(self, name: str, module: Any) -> Callable[..., Any]:
        forward = module.forward

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            call = self._sampler.call
            if self._running is call and self._changes != self.pipeline.changes:
                raise UserError("the engines' weights were changed, or the engines closed, during a call; call again")
            return call.evaluate(name, module, forward, args, kwargs)

        return evaluated

    def _begin(self, evaluations: Sequence[Evaluation]) -> Call:
        from dipgo_deploy.integrations.call import Call

        if getattr(self._stock, "_denoising_end", None) is not None:
            raise UserError("denoising_end: the engines run to the end of their loop; leave it out")
        manifest = self.pipeline.bundle.manifest
        return Call(
            manifest,
            self._family,
            self._arguments,
            self._loops_for,
            evaluations,
            self._scale_of,
            self.pipeline.say_what_the_fit_had_not,
        )

    def _loops_for(self, count: int) -> list[DenoisingLoop]:
        """So many loops, each with buffers of its own, of the weights that are there now."""
        if self._changes != self.pipeline.changes:
            self._loops.clear()
        while len(self._loops) < count:
            self._loops.append(self.pipeline.own_loop())
        self._running, self._changes = self._sampler.call, self.pipeline.changes
        return self._loops[:count]

    def _scale_of(self, name: str) -> float | None:
        """The guidance scale of a second denoiser."""
        scale = getattr(self._stock, "_guidance_scale_2", None)
        return None if scale is None else float(scale)

    def unload(self) -> None:
        """The pipeline is again as it was, with its own denoiser and scheduler."""
        self._loaded.close()
        self._loops.clear()
        self.pipeline.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> None:
        self.unload()

    def __repr__(self) -> str:
        return f"<Engines of {self.pipeline!r} in {type(self._stock).__name__}>"


def _refused(change: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise UserError(
            f"{change}: the pipeline's denoiser is compiled engines, which do not follow it; a LoRA is added by "
            "Engines.pipeline.load_lora"
        )

    return refused


def _check_model(stock: Any, ours: Pipeline, family: ModelFamily) -> None:
    """Refuse (UserError) a pipeline of another model, or one that has something loaded already."""
    from dipgo_deploy.integrations.compiled_sampler import CompiledSampler

    name, entry = type(stock).__name__, ours.bundle.manifest.model
    if isinstance(getattr(stock, "scheduler", None), CompiledSampler):
        raise UserError(f"{name}: has engines loaded already; unload them first")
    parts = {part or family.component: family.diffusers_class for part in family.denoisers}
    parts |= {part: "" for part in family.companions if part not in family.denoisers}
    for part, class_name in parts.items():
        module = getattr(stock, part, None)
        if module is None or class_name not in ("", type(module).__name__):
            found = "none" if module is None else type(module).__name__
            raise UserError(
                f"{name}: its {part} is {found}, {ours.bundle.path} is of {entry.class_name}; use the pipeline of the "
                "model that was exported"
            )
        if class_name and getattr(module, "peft_config", None):
            raise UserError(f"{name}: a LoRA is loaded into its {part}; unload it, and give it to the engines")
    config = json.loads(json.dumps(dict(getattr(stock, next(iter(parts))).config), default=str))
    for key, value in config.items():
        theirs = entry.config.get(key, value)
        if key[:1] != "_" and key not in _CORRECTED and theirs != value:
            raise UserError(
                f"{name}: its denoiser has {key} = {value!r}, that of {ours.bundle.path} {theirs!r}; use the pipeline "
                "of the model that was exported"
            )
