"""Names of samplers, and the diffusers schedulers they stand for."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.extras import install
from dipgo_deploy.schedule.document import Schedule

MAX_STEPS = 2000
"""Most inference steps of a run: the matrix grows with their square."""
MAX_SETTING = 100_000
"""Largest number in a scheduler's configuration: tables as long as ``num_train_timesteps`` and others are made."""

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        # Without skip_prk_steps the class starts with Runge-Kutta steps, which no Stable Diffusion folder uses.
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
        "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
        "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        "dpm++2m": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
        ),
        "dpm++2m-karras": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
        ),
        "dpm++2m-trailing": (
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "use_karras_sigmas": False,
                "timestep_spacing": "trailing",
            },
        ),
        "dpm++2m-sde": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
        ),
        "dpm++2m-sde-karras": (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
        ),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler-a": ("EulerAncestralDiscreteScheduler", {}),
        "unipc": ("UniPCMultistepScheduler", {}),
        "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        "euler-a-trailing": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        "heun": ("HeunDiscreteScheduler", {}),
        # The algorithm and solver of a DPM-Solver or UniPC config mean nothing to DEIS.
        "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
        "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "flow-unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        "flow-dpm++2m": (
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            },
        ),
        "lcm": ("LCMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
    }
)
"""Sampler name -> (diffusers class, settings that the name stands for)."""


def make_scheduler(name: str, base_config: Mapping[str, Any]) -> Any:
    """The scheduler ``name`` set up from another scheduler's config, as diffusers users swap schedulers.

    name: a key of ``SAMPLERS`` (any case) or a diffusers scheduler class, taken with no settings of its own.
    base_config: the model folder's scheduler config, or the ``config`` of a ``SamplerMatrix`` with its ``class_name``.
    Equals ``Class.from_config(base_config, **settings)``: what the new class does not know has no effect, unless it
    hands its whole configuration on (LTXEulerAncestralRFScheduler does). A sampler with flow sigmas takes the static
    ``shift`` of a flow-matching config, which diffusers names ``flow_shift`` there. Raises UserError for an unknown
    name, a missing package, a config the class refuses, or one that asks for tables beyond ``MAX_SETTING``.
    """
    class_name, settings = SAMPLERS.get(name.lower(), (name, {}))
    _check_sizes(name, base_config)
    scheduler_class = _scheduler_class(class_name)
    base = dict(base_config)
    if settings.get("use_flow_sigmas") and "shift" in base:
        base.setdefault("flow_shift", base["shift"])
    try:
        return scheduler_class.from_config(base, **settings)
    except ImportError as error:
        raise UserError(
            f"sampler {name}: {class_name} needs a package that is not installed: {_line(error)}"
        ) from error
    except Exception as error:  # diffusers raises anything from ValueError to NotImplementedError here
        raise UserError(f"sampler {name}: {class_name} refuses this scheduler config: {_line(error)}") from error


def scheduler_of(schedule: Schedule) -> Any:
    """The fitted solver of a schedule that carries one, else its sampler; raises UserError as ``make_scheduler``."""
    if schedule.solver is None:
        return make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
    from dipgo_deploy.sampler.fitted import FittedSolver

    return FittedSolver(schedule.solver.model_dump())


def check_sampler_name(name: str) -> None:
    """Refuse (UserError) what is neither a sampler's name nor looks like a scheduler class; imports nothing."""
    if name.lower() not in SAMPLERS and not name.endswith("Scheduler"):
        raise UserError(f"sampler {name!r} is unknown; use {', '.join(SAMPLERS)} or a diffusers scheduler class")


def scheduler_from_folder(folder: str | Path) -> Any:
    """The scheduler a diffusers model folder was saved with.

    folder: a pipeline's folder (with ``scheduler/scheduler_config.json``) or the scheduler's own. Raises UserError if
    there is no readable config or it names no scheduler class.
    """
    folder = Path(folder)
    paths = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no scheduler/scheduler_config.json; point at a diffusers model folder")
    config = read_document(path, "configuration of a scheduler")
    if not isinstance(config.get("_class_name"), str):
        raise UserError(f"{path}: has no _class_name; save the scheduler with diffusers' save_pretrained")
    return make_scheduler(config["_class_name"], config)


def fresh(scheduler: Any) -> Any:
    """A new scheduler with the same config and none of the history that schedulers keep between evaluations."""
    own = own_config(scheduler)
    copy = type(scheduler).from_config(own)
    # The other settings are there for schedulers that hand them on; given to from_config, they are warned of each time.
    if others := {key: value for key, value in whole_config(scheduler).items() if key not in own}:
        copy.register_to_config(**others)
    return copy


def own_config(scheduler: Any) -> dict[str, Any]:
    """The settings of the scheduler's own class: ``config`` also carries those of the config it was made from."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in parameters}


def whole_config(scheduler: Any) -> dict[str, Any]:
    """All settings, those of the config it was made from included, without diffusers' own ``_`` keys."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def plain_config(scheduler: Any) -> dict[str, Any]:
    """``whole_config`` as JSON values, arrays as lists; UserError for a setting that has no such form."""
    try:
        text = json.dumps(whole_config(scheduler), default=lambda value: value.tolist())
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"sampler {type(scheduler).__name__}: its config holds more than plain values: {one_line(error)}"
        ) from error
    plain: dict[str, Any] = json.loads(text)
    return plain


def set_timesteps(scheduler: Any, num_inference_steps: int, kwargs: Mapping[str, Any] | None = None) -> None:
    """Call the scheduler's ``set_timesteps``; what it refuses becomes a UserError that names the scheduler."""
    name = type(scheduler).__name__
    check_steps(name, num_inference_steps)
    trained = scheduler.config.get("num_train_timesteps")
    if isinstance(trained, int) and num_inference_steps > trained:
        # Left alone, some classes fail much later and PNDM stays at one timestep.
        raise UserError(
            f"sampler {name}: {num_inference_steps} inference steps, but only {trained} timesteps; use fewer"
        )
    options = dict(kwargs or {})
    if options.get("sigmas") is not None:
        # Some classes do arithmetic on it as it comes; pipelines pass an array.
        options["sigmas"] = np.asarray(options["sigmas"], dtype=np.float64)
    try:
        scheduler.set_timesteps(num_inference_steps, **options)
    except Exception as error:  # each class has its own kinds of refusal
        raise UserError(f"sampler {name}: cannot do {num_inference_steps} inference steps: {_line(error)}") from error


def check_steps(name: str, num_inference_steps: int) -> None:
    """Refuse (UserError) a number of steps out of range for any sampler; to be asked before anything of that length."""
    if num_inference_steps < 1:
        raise UserError(f"sampler {name}: {num_inference_steps} inference steps; at least 1 is needed")
    if num_inference_steps > MAX_STEPS:
        raise UserError(f"sampler {name}: {num_inference_steps} inference steps; at most {MAX_STEPS} are supported")


def evaluations(
    scheduler: Any, num_inference_steps: int, *, set_timesteps_kwargs: Mapping[str, Any] | None = None
) -> int:
    """How often the denoiser is evaluated for ``num_inference_steps``: PNDM's 50 steps take 51, Heun's 99.

    set_timesteps_kwargs: what the pipeline would pass to ``set_timesteps`` besides, such as ``mu`` for flow matching
    with dynamic shifting. The scheduler is left as it was. Raises UserError for a number of steps it cannot do.
    """
    return len(timesteps_of(scheduler, num_inference_steps, set_timesteps_kwargs=set_timesteps_kwargs))


def timesteps_of(
    scheduler: Any, num_inference_steps: int, *, set_timesteps_kwargs: Mapping[str, Any] | None = None
) -> tuple[float, ...]:
    """What the denoiser is told at each evaluation. Arguments and errors as ``evaluations``."""
    copy = fresh(scheduler)
    set_timesteps(copy, num_inference_steps, set_timesteps_kwargs)
    return tuple(copy.timesteps.tolist())


def step_positions(
    scheduler: Any, num_inference_steps: int, *, set_timesteps_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """For each evaluation, the first evaluation at the same timestep: PNDM's go 0, 1, 1, 3, 4, ...

    Caching methods that find out the evaluation from the timestep count like this. Arguments and errors as
    ``evaluations``.
    """
    timesteps = timesteps_of(scheduler, num_inference_steps, set_timesteps_kwargs=set_timesteps_kwargs)
    return tuple(timesteps.index(timestep) for timestep in timesteps)


def _scheduler_class(class_name: str) -> Any:
    check_sampler_name(class_name)
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"samplers are built with diffusers; {install('export')}") from error
    found = getattr(diffusers, class_name, None)
    # Classes whose packages are missing are placeholders without SchedulerMixin; from_config then says what is missing.
    if not isinstance(found, type) or not hasattr(found, "from_config"):
        raise UserError(f"sampler {class_name!r} is unknown; use {', '.join(SAMPLERS)} or a diffusers scheduler class")
    return found


def _check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Refuse settings that would make a scheduler allocate without bound, before it is made."""
    for key, value in config.items():
        listed = isinstance(value, (list, tuple))
        number = len(value) if listed else value
        if not isinstance(number, (int, float)) or number in (math.inf, -math.inf) or "seed" in key:
            continue
        if abs(number) > MAX_SETTING:
            what = "has more entries than" if listed else "is larger than"
            raise UserError(f"sampler {name}: {key[:60]} of the scheduler config {what} the supported {MAX_SETTING}")


def _line(error: Exception) -> str:
    return one_line(error) or type(error).__name__
