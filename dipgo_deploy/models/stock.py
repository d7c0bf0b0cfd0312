"""What the stock pipeline makes of a model's configuration when it loads it: its scheduler and its sizes.

The pipelines correct old configurations as they are made (``steps_offset``, ``clip_sample``, ``sample_size`` of Stable
Diffusion's; the class of DDIM's scheduler). Here the pipeline's own class is made without weights, so that its rules,
and no copy of them, decide.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.location import (
    component_config,
    config_folder,
    denoiser_config,
    native_size,
    pipeline_index,
    scheduler_config,
)
from dipgo_deploy.schedule.document import SamplerEntry

_log = logging.getLogger(__name__)

# Arguments of a pipeline's class that are no components.
_WITHOUT = {"requires_safety_checker": False, "add_watermarker": False}


@dataclass(frozen=True)
class Stock:
    """What a model's stock pipeline runs. scheduler: None where the folder has none; corrected: its settings that are
    not those of its file. native: [frames,] height and width in latent pixels, None where nothing says. scale: pixels
    of the picture to one of the latent. time_scale: frames of the video to one of the latent, None for pictures."""

    scheduler: Any | None
    corrected: Mapping[str, Any]
    native: tuple[int, ...] | None
    scale: int
    time_scale: int | None = None

    def check(self, sampler: SamplerEntry) -> None:
        """Say in the log where a schedule's sampler is the model's own without what its pipeline corrects."""
        if self.scheduler is None or sampler.class_name != type(self.scheduler).__name__:
            return
        for key, value in self.corrected.items():
            if key in sampler.config and sampler.config[key] != value:
                _log.warning(
                    "the schedule's %s has %s = %r; the model's own pipeline runs with %r: make the schedule again for "
                    "the pictures that diffusers draws",
                    sampler.class_name,
                    key,
                    sampler.config[key],
                    value,
                )


def stock_configuration(model: str) -> Stock:
    """Scheduler and sizes of a model as its stock pipeline runs them; what it corrects goes to the log, a line each.

    Needs the extra ``export``.

    Raises:
        UserError: a model, pipeline or scheduler that is not supported or cannot be read.
    """
    from dipgo_deploy.sampler import make_scheduler

    family, config = denoiser_config(model)
    folder = config_folder(model)
    base = scheduler_config(folder)
    scheduler = None if base is None else make_scheduler(str(base.get("_class_name")), base)
    index = pipeline_index(model)
    if not index:
        return Stock(scheduler, {}, native_size(config), scale_of(None, family), time_scale_of(None, family))
    name = str(index["_class_name"])
    before = ("", {}) if scheduler is None else (type(scheduler).__name__, dict(scheduler.config))
    pipeline = _without_weights(name, scheduler, {family.component: _configured(config), "vae": _vae(folder, index)})
    scheduler = pipeline.scheduler
    corrected: dict[str, Any] = {}
    if scheduler is not None and type(scheduler).__name__ != before[0]:
        _log.warning("%s: %s runs %s instead of %s", model, name, type(scheduler).__name__, before[0])
    elif scheduler is not None:
        corrected = _changes(before[1], scheduler.config)
    native = native_of(pipeline, family)
    found = {**corrected, **_changes(config, getattr(pipeline, family.component).config)}
    for key, value in found.items():
        _log.warning("%s: %s corrects %s to %r", model, name, key, value)
    return Stock(scheduler, corrected, native, scale_of(pipeline, family), time_scale_of(pipeline, family))


def native_of(pipeline: Any, family: ModelFamily) -> tuple[int, ...] | None:
    """[Frames,] height and width of the latent that a loaded stock pipeline draws when it is asked for none."""
    own = native_size(getattr(pipeline, family.component).config)
    # Some transformers do not say for what size they were trained, but their pipelines do.
    time_scale = time_scale_of(pipeline, family)
    if own is None and (whole := native_size({"sample_size": getattr(pipeline, "default_sample_size", None)})):
        own = whole[0] // family.packing, whole[1] // family.packing
    if own is not None and time_scale is None:
        return own
    parameters = inspect.signature(type(pipeline).__call__).parameters
    defaults = [getattr(parameters.get(name), "default", None) for name in ("num_frames", "height", "width")]
    numbers = [value for value in defaults if isinstance(value, int)]
    if time_scale is None or len(numbers) < len(defaults):
        return None
    scale = scale_of(pipeline, family)
    return ((numbers[0] - 1) // time_scale + 1, *(extent // scale for extent in numbers[1:]))


def starts_from_pictures(pipeline_class: type) -> bool:
    """Whether the pipeline itself takes a strength, so that no other one of its parts is needed for it."""
    return "strength" in inspect.signature(pipeline_class.__call__).parameters


def scale_of(pipeline: Any | None, family: ModelFamily) -> int:
    """Pixels of the picture to one of the latent, of each side."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    return 1 if family.pixels else (_first(pipeline, names) or family.pixels_per_latent) * family.packing


def time_scale_of(pipeline: Any | None, family: ModelFamily) -> int | None:
    """Frames of the video to one of the latent, None for a model of pictures."""
    if family.frames_per_latent is None:
        return None
    return _first(pipeline, ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")) or family.frames_per_latent


def _first(pipeline: Any | None, names: tuple[str, ...]) -> int:
    """The first of these attributes that a pipeline has, 0 where it has none."""
    return next((int(value) for name in names if (value := getattr(pipeline, name, 0))), 0)


def _without_weights(name: str, scheduler: Any, models: Mapping[str, Any]) -> Any:
    """The stock pipeline around ``scheduler``, with ``models`` that have a configuration only."""
    import diffusers

    with _quiet():
        pipeline_class = getattr(diffusers, name)
    parameters = inspect.signature(pipeline_class.__init__).parameters
    given = {key: model for key, model in models.items() if key in parameters}
    arguments: dict[str, Any] = {
        key: _WITHOUT.get(key)
        for key, parameter in parameters.items()
        if key != "self" and (parameter.default is inspect.Parameter.empty or key in _WITHOUT)
    }
    with _quiet():
        try:
            return pipeline_class(**{**arguments, **given, "scheduler": scheduler})
        except Exception as error:  # a pipeline's class may refuse a configuration with any kind of error
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name}: cannot be made of this model's configuration: {reason}") from error


def _configured(config: Mapping[str, Any]) -> Any:
    """What stands in the place of a model whose configuration is known."""
    from diffusers.configuration_utils import ConfigMixin, FrozenDict

    class Configured(ConfigMixin):
        config_name = "config.json"

    configured = Configured()
    try:
        configured._internal_dict = FrozenDict(config)
    except Exception as error:  # of settings that cannot be attributes
        raise UserError(f"{config.get('_class_name')}: its configuration cannot be taken: {error}") from error
    return configured


def _vae(folder: Path, index: Mapping[str, Any]) -> Any | None:
    """The VAE of a folder, without memory for its weights: its class may put more into its configuration."""
    import diffusers
    import torch

    config = component_config(folder, "vae")
    match index.get("vae"):
        case ["diffusers", str(class_name)] if config is not None:
            try:
                with _quiet(), torch.device("meta"):
                    return getattr(diffusers, class_name).from_config(config)
            except Exception as error:  # of a configuration that its class does not take: any kind
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"{folder / 'vae'}: cannot be made by {class_name}: {reason}") from error
    return None


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {key: after[key] for key in before if key[:1] != "_" and key in after and after[key] != before[key]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own lines about what they correct and would like: one of ours is shorter."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(theirs, theirs.get_verbosity()) for theirs in (of_diffusers, of_transformers)]
    for theirs, _ in levels:
        theirs.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for theirs, level in levels:
            theirs.set_verbosity(level)
