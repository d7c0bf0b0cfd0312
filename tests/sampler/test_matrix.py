"""The matrix against the real schedulers' own fp32 loops, with a denoiser that is not linear."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler import (
    SAMPLERS,
    SamplerMatrix,
    check_linear,
    evaluations,
    make_scheduler,
    prediction_used,
    sampler_matrix,
)

# diffusers hands torch tensors to numpy in ways that numpy has announced to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

STABLE_DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DIT: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
}
BETAS = {"sd": STABLE_DIFFUSION, "dit": DIT}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "ddim-v": ("ddim", {"prediction_type": "v_prediction"}),
    "pndm": ("pndm", {}),
    "dpm++2m": ("dpm++2m", {}),
    "dpm++2m-karras": ("dpm++2m-karras", {}),
    "dpm++2m-sde": ("dpm++2m-sde", {}),
    "dpm++2m-sde-karras": ("dpm++2m-sde-karras", {}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "euler": ("euler", {}),
    "euler-a": ("euler-a", {}),
    "unipc": ("unipc", {}),
    "heun": ("heun", {}),
    "deis": ("deis", {}),
    "flow-euler": ("flow-euler", {"shift": 3.0}),
    "flow-heun": ("flow-heun", {"shift": 3.0}),
    "flow-unipc": ("flow-unipc", {"shift": 3.0}),
    "flow-dpm++2m": ("flow-dpm++2m", {"shift": 3.0}),
    "lcm": ("lcm", {}),
    "ddpm": ("ddpm", {}),
}
SHAPE = (2, 4, 6, 6)
SEED = 7
MIX = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 4)) / 2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def denoise(latent: torch.Tensor, timestep: float) -> torch.Tensor:
    mixed = torch.einsum("oc,bchw->bohw", MIX.to(latent.dtype), latent)
    return torch.tanh(mixed + 0.3 * latent.roll(1, -1)) + 0.2 * torch.sin(latent) + 0.1 * timestep / 1000


def one_in_five(count: int) -> tuple[int, ...]:
    return tuple(index // 5 for index in range(count))


def scheduler_loop(
    scheduler: Any, steps: int, source: tuple[int, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The loop as a diffusers pipeline writes it, in fp32, with its own noise from its own generator."""
    scheduler.set_timesteps(steps, **(kwargs or {}))
    generator = torch.Generator().manual_seed(SEED)
    latent = torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    predictions: list[torch.Tensor] = []
    inputs = []
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latent, timestep) if hasattr(scheduler, "scale_model_input") else latent
        inputs.append(scaled)
        if source[index] == len(predictions):
            predictions.append(denoise(scaled, float(timestep)))
        latent = scheduler.step(predictions[source[index]], timestep, latent, **extra).prev_sample
    assert latent.dtype == torch.float32
    return inputs, latent


def matrix_loop(
    matrix: SamplerMatrix, source: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """What the runtime does: launches only, each fed with a weighted sum of the stack."""
    generator = torch.Generator().manual_seed(SEED)
    stack = torch.zeros(1 + matrix.predictions + matrix.noises, *SHAPE, dtype=dtype)
    stack[0] = torch.randn(SHAPE, generator=generator)
    for index in range(matrix.noises):
        stack[1 + matrix.predictions + index] = torch.randn(SHAPE, generator=generator)
    inputs = {}
    for index, slot in enumerate(source):
        if slot in source[:index]:
            continue
        row = torch.from_numpy(matrix.rows[index].copy()).to(dtype)
        inputs[index] = torch.tensordot(row, stack, dims=1)
        stack[1 + slot] = denoise(inputs[index], matrix.timesteps[index])
    return inputs, torch.tensordot(torch.from_numpy(matrix.final.copy()).to(dtype), stack, dims=1)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_schedulers_own_loop(case: str, steps: int, betas: str) -> None:
    name, settings = CASES[case]
    scheduler = make_scheduler(name, {**BETAS[betas], **settings})
    count = evaluations(scheduler, steps)
    for source in (tuple(range(count)), one_in_five(count)):
        matrix = sampler_matrix(scheduler, steps, source)
        assert matrix.rows.shape == (count, 1 + source[-1] + 1 + matrix.noises)
        inputs, final = scheduler_loop(make_scheduler(name, {**BETAS[betas], **settings}), steps, source)
        for dtype in (torch.float64, torch.float32):
            launched, latent = matrix_loop(matrix, source, dtype)
            assert relative(latent, final) < 1e-5
            for index, value in launched.items():
                assert relative(value, inputs[index]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_no_latent_uses_a_prediction_or_noise_to_come(case: str) -> None:
    name, settings = CASES[case]
    scheduler = make_scheduler(name, {**STABLE_DIFFUSION, **settings})
    matrix = sampler_matrix(scheduler, 8)
    predictions = matrix.rows[:, 1 : 1 + matrix.predictions]
    assert np.array_equal(predictions, np.tril(predictions, -1))
    assert np.abs(np.diag(predictions, -1)).min() > 0
    noises = matrix.rows[:, 1 + matrix.predictions :]
    first_use = [int(np.flatnonzero(column)[0]) for column in noises.T if column.any()]
    assert first_use == sorted(first_use)
    assert all(row > index for index, row in enumerate(first_use))
    assert prediction_used(matrix) == (True,) * matrix.predictions


@pytest.mark.parametrize(
    ("name", "noises"),
    [
        ("ddim", 0),
        ("dpm++2m", 0),
        ("dpm++2m-sde", 6),
        ("dpm++2m-sde-karras", 6),
        ("euler-a", 6),
        ("lcm", 5),
        ("ddpm", 6),
        ("flow-euler", 0),
        ("flow-unipc", 0),
    ],
)
def test_noise_columns_follow_the_schedulers_draws(name: str, noises: int) -> None:
    assert sampler_matrix(make_scheduler(name, STABLE_DIFFUSION), 6).noises == noises


def test_an_unused_prediction_is_told() -> None:
    matrix = sampler_matrix(make_scheduler("ddim", STABLE_DIFFUSION), 3)
    rows, final = matrix.rows.copy(), matrix.final.copy()
    rows[:, 2], final[2] = 0, 0
    fields = {name: getattr(matrix, name) for name in ("class_name", "config", "num_inference_steps", "timesteps")}
    without = SamplerMatrix(**fields, rows=rows, final=final, noises=0, predictions=3)
    assert prediction_used(without) == (True, False, True)


def test_ddim_weights_are_the_closed_form_in_double_precision() -> None:
    scheduler = make_scheduler("ddim", STABLE_DIFFUSION)
    matrix = sampler_matrix(scheduler, 10)
    alphas = scheduler.alphas_cumprod.numpy().astype(np.float64)
    timesteps = matrix.timesteps.astype(int)
    latent = np.zeros(11)
    latent[0] = 1
    for index, timestep in enumerate(timesteps):
        np.testing.assert_allclose(matrix.rows[index], latent, rtol=1e-6, atol=1e-6)
        now, after = alphas[timestep], alphas[max(timestep - 100, 0)]
        latent *= np.sqrt(after / now)
        latent[1 + index] += np.sqrt(1 - after) - np.sqrt(after / now) * np.sqrt(1 - now)
    np.testing.assert_allclose(matrix.final, latent, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ddim", {"clip_sample": True}, ("DDIMScheduler", "clip_sample")),
        ("ddpm", {"clip_sample": True}, ("DDPMScheduler", "clip_sample")),
        ("ddim", {"thresholding": True}, ("DDIMScheduler", "thresholding")),
        ("dpm++2m", {"thresholding": True}, ("DPMSolverMultistepScheduler", "thresholding")),
        ("unipc", {"thresholding": True}, ("UniPCMultistepScheduler", "thresholding")),
        ("ddpm", {"variance_type": "learned_range"}, ("DDPMScheduler", "learned_range")),
        ("ddpm", {"variance_type": "learned"}, ("DDPMScheduler", "variance_type 'learned'")),
        ("dpm++2m", {"variance_type": "learned_range"}, ("DPMSolverMultistepScheduler", "learned_range")),
        ("pndm", {"prediction_type": "sample"}, ("PNDMScheduler", "prediction_type given as sample")),
        ("euler-a", {"prediction_type": "sample"}, ("EulerAncestralDiscreteScheduler", "not implemented yet: sample")),
        ("CMStochasticIterativeScheduler", {}, ("CMStochasticIterativeScheduler", "not linear")),
        ("RePaintScheduler", {}, ("RePaintScheduler", "cannot be run as a matrix")),
    ],
)
def test_what_is_not_linear_is_refused_by_name(name: str, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    scheduler = make_scheduler(name, {**STABLE_DIFFUSION, **settings})
    for refuse in (sampler_matrix, check_linear):
        with pytest.raises(UserError) as caught:
            refuse(scheduler, 5)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message


def test_a_setting_of_another_class_is_no_reason_to_refuse() -> None:
    # diffusers carries settings that a class does not know along in its config.
    scheduler = make_scheduler("euler", {**STABLE_DIFFUSION, "clip_sample": True, "variance_type": "learned_range"})
    assert "clip_sample" in scheduler.config
    matrix = sampler_matrix(scheduler, 5)
    assert np.array_equal(matrix.rows, sampler_matrix(make_scheduler("euler", STABLE_DIFFUSION), 5).rows)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_zero_terminal_snr_is_linear_in_spite_of_its_rounding(steps: int) -> None:
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert check_linear(make_scheduler("euler", {**STABLE_DIFFUSION, **settings}), steps) < 1e-9


# Samplers for models that predict noise. Flow matching has a prediction of its own.
EPSILON = [name for name in SAMPLERS if not name.startswith("flow-")]


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in EPSILON
        for prediction in ("v_prediction", "sample")
        if prediction == "v_prediction" or not name.startswith(("pndm", "plms", "euler-a"))  # they have no `sample`
    ],
)
def test_what_the_model_predicts_is_in_the_matrix(name: str, prediction: str) -> None:
    """Stable Diffusion 2.1 predicts v."""
    settings = {**STABLE_DIFFUSION, "prediction_type": prediction}
    scheduler = make_scheduler(name, settings)
    count = evaluations(scheduler, 10)
    source = one_in_five(count)
    matrix = sampler_matrix(scheduler, 10, source)
    _, final = scheduler_loop(make_scheduler(name, settings), 10, source)
    for dtype in (torch.float64, torch.float32):
        assert relative(matrix_loop(matrix, source, dtype)[1], final) < 1e-5
    # It is another matrix than for noise.
    other = sampler_matrix(make_scheduler(name, STABLE_DIFFUSION), 10, source)
    assert not np.allclose(matrix.final, other.final, rtol=1e-3)


@pytest.mark.parametrize("name", ["flow-unipc", "flow-dpm++2m"])
def test_flow_sigmas_take_the_shift_of_a_flow_matching_config(name: str) -> None:
    shifted = [make_scheduler(name, settings) for settings in ({"shift": 3.0}, {"flow_shift": 3.0}, {})]
    matrices = [sampler_matrix(scheduler, 6) for scheduler in shifted]
    assert np.array_equal(matrices[0].rows, matrices[1].rows)
    assert not np.allclose(matrices[0].timesteps, matrices[2].timesteps)
    # The name of the class's own setting wins.
    assert make_scheduler(name, {"shift": 3.0, "flow_shift": 2.0}).config.flow_shift == 2.0


@pytest.mark.parametrize("name", ["flow-euler", "flow-unipc", "flow-dpm++2m"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_dynamic_shifting_equals_the_pipelines_loop(name: str, steps: int) -> None:
    """FLUX's pipeline: mu from the number of tokens, sigmas of its own where the scheduler makes none from flow."""
    flux = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
    kwargs: dict[str, Any] = {"mu": calculate_shift(4096, 256, 4096, 0.5, 1.15)}
    if name == "flow-euler":
        kwargs["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    count = evaluations(make_scheduler(name, flux), steps, set_timesteps_kwargs=kwargs)
    for source in (tuple(range(count)), one_in_five(count)):
        matrix = sampler_matrix(make_scheduler(name, flux), steps, source, set_timesteps_kwargs=kwargs)
        inputs, final = scheduler_loop(make_scheduler(name, flux), steps, source, kwargs)
        launched, latent = matrix_loop(matrix, source, torch.float32)
        assert relative(latent, final) < 1e-5
        assert all(relative(value, inputs[index]) < 1e-5 for index, value in launched.items())


def test_a_list_of_sigmas_is_as_good_as_an_array() -> None:
    scheduler = make_scheduler("flow-unipc", {"use_dynamic_shifting": True})
    sigmas = np.linspace(1.0, 0.25, 4)
    matrices = [
        sampler_matrix(scheduler, 4, set_timesteps_kwargs={"mu": 0.8, "sigmas": given})
        for given in (sigmas, sigmas.tolist())
    ]
    assert np.array_equal(matrices[0].rows, matrices[1].rows)


def test_an_option_that_set_timesteps_lacks_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler: cannot do 4 inference steps.*mu"):
        sampler_matrix(make_scheduler("flow-heun", {}), 4, set_timesteps_kwargs={"mu": 0.8})


def test_check_covers_reused_predictions() -> None:
    assert check_linear(make_scheduler("unipc", STABLE_DIFFUSION), 12, one_in_five(12)) < 1e-9


def test_flow_matching_takes_its_shift_from_the_caller() -> None:
    scheduler = make_scheduler("flow-euler", {"use_dynamic_shifting": True})
    with pytest.raises(UserError, match="mu"):
        sampler_matrix(scheduler, 5)
    matrices = [sampler_matrix(scheduler, 5, set_timesteps_kwargs={"mu": mu}) for mu in (0.5, 1.5)]
    assert not np.allclose(matrices[0].timesteps[1:], matrices[1].timesteps[1:])
    source = tuple(range(5))
    reference = make_scheduler("flow-euler", {"use_dynamic_shifting": True})
    _, final = scheduler_loop(reference, 5, source, {"mu": 1.5})
    assert relative(matrix_loop(matrices[1], source, torch.float64)[1], final) < 1e-5


def test_the_scheduler_handed_in_keeps_its_state() -> None:
    scheduler = make_scheduler("dpm++2m", STABLE_DIFFUSION)
    scheduler.set_timesteps(7)
    scheduler.step(torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2))
    before = (scheduler.step_index, scheduler.timesteps.clone(), [scheduler.model_outputs[-1].clone()])
    matrix = sampler_matrix(scheduler, 12)
    assert scheduler.step_index == before[0]
    assert torch.equal(scheduler.timesteps, before[1])
    assert torch.equal(scheduler.model_outputs[-1], before[2][0])
    again = sampler_matrix(make_scheduler("dpm++2m", STABLE_DIFFUSION), 12)
    assert np.array_equal(matrix.rows, again.rows)


@pytest.mark.parametrize("case", CASES)
def test_class_and_config_make_the_same_matrix_again(case: str) -> None:
    name, settings = CASES[case]
    matrix = sampler_matrix(make_scheduler(name, {**DIT, **settings}), 6, check=False)
    config = json.loads(json.dumps(matrix.config))
    again = sampler_matrix(make_scheduler(matrix.class_name, config), matrix.num_inference_steps, check=False)
    assert again.config == matrix.config
    assert np.array_equal(again.rows, matrix.rows)
    assert np.array_equal(again.final, matrix.final)
    assert np.array_equal(again.timesteps, matrix.timesteps)


def test_arrays_are_float64_and_read_only() -> None:
    matrix = sampler_matrix(make_scheduler("pndm", STABLE_DIFFUSION), 5)
    for array in (matrix.rows, matrix.final, matrix.timesteps):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("source", [(0, 1, 2), (0, 2, 1, 3, 4), (1, 0, 0, 0, 0), (0, 0, -1, 0, 0)])
def test_a_source_that_does_not_fit_is_an_error(source: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prediction_slots"):
        sampler_matrix(make_scheduler("ddim", STABLE_DIFFUSION), 5, source)
