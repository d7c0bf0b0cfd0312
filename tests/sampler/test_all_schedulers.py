"""Every scheduler class of diffusers: represented rightly, or refused by name and for its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LTXEulerAncestralRFScheduler

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler import check_linear, evaluations, make_scheduler, sampler_matrix
from dipgo_deploy.sampler.kinds import check_kind, kind_of
from dipgo_deploy.sampler.schedulers import MAX_SETTING, MAX_STEPS, fresh, plain_config

# diffusers hands torch tensors to numpy in ways that numpy has announced to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

STABLE_DIFFUSION: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SD3: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
NAMES = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and hasattr(getattr(diffusers, name), "from_config")
)
REFUSED = {
    "AmusedScheduler": "refuses this scheduler config: .*mask_token_id",
    "BlockRefinementScheduler": "cannot be run as a matrix",
    "CMStochasticIterativeScheduler": "not linear",
    "CogVideoXDPMScheduler": "cannot be run as a matrix: .*timestep_back",
    # Without torchsde they cannot be made; with it, every draw inside their Brownian tree is counted.
    "CosineDPMSolverMultistepScheduler": "needs a package|not drawn independently|not linear",
    "DPMSolverSDEScheduler": "needs a package|not drawn independently|not linear",
    "DDPMWuerstchenScheduler": "cannot be run as a matrix",
    "DiscreteDDIMScheduler": "cannot be run as a matrix",
    "EntropyBoundScheduler": "its step makes",
    "HeliosDMDScheduler": "cannot do 6 inference steps",
    "HeliosScheduler": "cannot do 6 inference steps",
    "KarrasVeScheduler": "cannot be run as a matrix: .*sample_hat",
    "PiflowScheduler": "cannot be run as a matrix",
    "RFD4ProteinaScheduler": "refuses this scheduler config",
    "RePaintScheduler": "cannot be run as a matrix: .*original_image",
    "SCMScheduler": "cannot do 6 inference steps: .*num_inference_steps != 2",
    "ScoreSdeVeScheduler": "cannot be run as a matrix: .*no attribute 'step'",
    "UnCLIPScheduler": "refuses this scheduler config|clip_sample",
    "VQDiffusionScheduler": "refuses this scheduler config: .*num_vec_classes",
}
"""Class -> why it cannot be a matrix. All others are compared with their own loop."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(verbosity)


def own_loop(scheduler: Any, steps: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The final latent of the scheduler's loop with its own draws; predictions are half the model's input."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    parameters = scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]
    extra: dict[str, Any] = {"generator": generator} if "generator" in parameters else {}
    if "eta" in parameters:
        extra["eta"] = 0.0
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latent, timestep) if hasattr(scheduler, "scale_model_input") else latent
        latent = scheduler.step(scaled / 2, timestep, latent, return_dict=False, **extra)[0]
    return latent


def by_matrix(scheduler: Any, steps: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    matrix = sampler_matrix(scheduler, steps)
    generator = torch.Generator().manual_seed(seed)
    stack = torch.zeros(len(matrix.final), *shape, dtype=torch.float64)
    stack[0] = torch.randn(shape, generator=generator)
    for index in range(matrix.noises):
        stack[1 + matrix.predictions + index] = torch.randn(shape, generator=generator)
    for index, row in enumerate(matrix.rows):
        stack[1 + index] = torch.tensordot(torch.from_numpy(row.copy()), stack, dims=1) / 2
    return torch.tensordot(torch.from_numpy(matrix.final.copy()), stack, dims=1)


@pytest.mark.parametrize("base", [STABLE_DIFFUSION, SD3], ids=["sd", "sd3"])
@pytest.mark.parametrize("name", NAMES)
def test_every_class_gives_its_own_loops_result_or_is_refused(name: str, base: dict[str, Any]) -> None:
    if name in REFUSED:
        with pytest.raises(UserError, match=f"sampler {name}: .*({REFUSED[name]})") as caught:
            sampler_matrix(make_scheduler(name, base), 6)
        assert "\n" not in str(caught.value)
        return
    # A base without this setting means clipping to these classes.
    settings = {**base, "clip_sample": False}
    shape = (1, 2, 4, 4)
    expected = own_loop(make_scheduler(name, settings), 6, 3, shape).double()
    actual = by_matrix(make_scheduler(name, settings), 6, 3, shape)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-4


def test_settings_that_a_scheduler_hands_on_are_kept() -> None:
    scheduler = make_scheduler("LTXEulerAncestralRFScheduler", SD3)
    assert isinstance(scheduler, LTXEulerAncestralRFScheduler)
    assert fresh(scheduler).config["shift"] == 3.0
    shifted = sampler_matrix(scheduler, 4)
    scheduler.set_timesteps(4)
    assert np.allclose(shifted.timesteps, scheduler.timesteps.tolist())
    assert not np.allclose(shifted.timesteps, sampler_matrix(make_scheduler(shifted.class_name, {}), 4).timesteps)
    again = sampler_matrix(make_scheduler(shifted.class_name, plain_config(scheduler)), 4)
    assert np.array_equal(again.rows, shifted.rows)


class _DrawsAgain(EulerAncestralDiscreteScheduler):
    """Draws from a generator that it seeds again at each step, as a Brownian tree does: always the same noise."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs, generator=torch.Generator().manual_seed(0))


class _Uniform(EulerAncestralDiscreteScheduler):
    """Halves its noise by drawing from what nobody takes over."""

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, **kwargs)
        return (result[0] + torch.rand(sample.shape, dtype=sample.dtype), *result[1:])


@pytest.mark.parametrize(("kind", "words"), [(_DrawsAgain, "not drawn independently"), (_Uniform, "not linear")])
def test_noise_that_is_no_column_is_refused(kind: Any, words: str) -> None:
    scheduler = kind.from_config(STABLE_DIFFUSION)
    for refuse in (sampler_matrix, check_linear):
        with pytest.raises(UserError, match=f"sampler {kind.__name__}: .*{words}"):
            refuse(scheduler, 6)


def test_the_covariance_takes_nothing_from_the_callers_generator() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sampler_matrix(make_scheduler("euler-a", STABLE_DIFFUSION), 4)
    assert torch.equal(before, torch.random.get_rng_state())


LAST_STEP_OF_NO_LENGTH = {"final_sigmas_type": "sigma_min", "solver_type": "heun", "lower_order_final": False}


@pytest.mark.parametrize(
    ("name", "settings", "helps"),
    [
        ("dpm++2m-karras", LAST_STEP_OF_NO_LENGTH, {"final_sigmas_type": "zero"}),
        (
            "DPMSolverMultistepScheduler",
            {**LAST_STEP_OF_NO_LENGTH, "algorithm_type": "dpmsolver", "use_karras_sigmas": True},
            {"lower_order_final": True},
        ),
        (
            "ddim",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"prediction_type": "v_prediction"},
        ),
    ],
)
def test_infinite_weights_name_what_helps(name: str, settings: dict[str, Any], helps: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="infinite weights at 5 steps; set ") as caught:
        sampler_matrix(make_scheduler(name, {**STABLE_DIFFUSION, **settings}), 5)
    for key, value in helps.items():
        assert f"{key} to {value}".lower() in str(caught.value)
    assert np.isfinite(sampler_matrix(make_scheduler(name, {**STABLE_DIFFUSION, **settings, **helps}), 5).rows).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_train_timesteps": 10**9}, "num_train_timesteps of the scheduler config is larger"),
        ({"num_train_timesteps": 10**400}, "num_train_timesteps of the scheduler config is larger"),
        ({"num_train_timesteps": 1e12}, "num_train_timesteps of the scheduler config is larger"),
        ({"solver_order": 10**9}, "solver_order of the scheduler config is larger"),
        ({"trained_betas": [0.1] * (MAX_SETTING + 1)}, "trained_betas of the scheduler config has more entries"),
    ],
)
def test_tables_without_bound_are_refused_before_they_are_made(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_scheduler("unipc", {**STABLE_DIFFUSION, **settings})
    assert len(str(caught.value)) < 300
    make_scheduler("unipc", {**STABLE_DIFFUSION, "noise_sampler_seed": 2**62, "sigma_max": float("inf")})


def test_steps_without_bound_are_refused() -> None:
    scheduler = make_scheduler("EDMEulerScheduler", {"num_train_timesteps": MAX_SETTING})
    with pytest.raises(UserError, match=f"{MAX_STEPS + 1} inference steps; at most {MAX_STEPS}"):
        evaluations(scheduler, MAX_STEPS + 1)


@pytest.mark.parametrize(
    ("class_name", "config", "kind"),
    [
        ("DDIMScheduler", {}, "diffusion"),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}, "diffusion"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow"),
        ("FlowMatchHeunDiscreteScheduler", {"prediction_type": "epsilon"}, "flow"),
        ("LTXEulerAncestralRFScheduler", {}, "flow"),
        ("EDMEulerScheduler", {"prediction_type": "epsilon"}, "edm"),
        ("SCMScheduler", {}, "trigflow"),
    ],
)
def test_a_sampler_of_another_kind_is_refused(class_name: str, config: dict[str, Any], kind: str) -> None:
    assert kind_of(class_name, config) == kind
    for expected, use in (("diffusion", "use ddim"), ("flow", "use flow-euler"), ("edm", "the model's own sampler")):
        if kind == expected:
            check_kind(class_name, config, expected)
            continue
        with pytest.raises(UserError, match=f"sampler {class_name}: is for .*{use}"):
            check_kind(class_name, config, expected)  # type: ignore[arg-type]
