"""A scheduler as a matrix: every latent as a weighted sum of the initial noise, the predictions and the drawn noises.

A scheduler's step is linear in the latent and the predictions unless it clips or thresholds. So the real scheduler is
run once on coefficient vectors in place of images, and out come the weights: no sampler is written again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.sampler.schedulers import evaluations, own_config, plain_config
from dipgo_deploy.sampler.start import ImageStart

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Largest relative disagreement between matrix and scheduler on random data; a linear scheduler stays far below."""

_CHECK_SHAPE = (2, 3, 8, 8)
# Real draws for the covariance: its estimate from n values is off by sqrt(2 / n) of itself (one standard deviation).
_DRAWN_SHAPE = (2, 4, 64, 64)
_DRAWN_SHAPE_OF_MANY_STEPS = (1, 1, 64, 64)
_MANY_STEPS = 100
_DEVIATIONS = 7.0
# Settings that make a step depend on its data other than linearly, for the message of a refusal.
_SUSPECTS = ("clip_sample", "thresholding")
# Settings that may help a scheduler that divides by zero, and what has to be so for each.
_REMEDIES: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"final_sigmas_type": "zero"}, ""),
    ({"final_sigmas_type": "sigma_min"}, ""),
    ({"lower_order_final": True}, ""),
    ({"prediction_type": "v_prediction"}, " if the model predicts v"),
    ({"rescale_betas_zero_snr": False}, ""),
)


@dataclass(frozen=True, eq=False)
class SamplerMatrix:
    """The weights of a sampler's latents over the history [x_T, prediction 0 .. P-1, picture, noise 0 .. M-1].

    Arrays are read-only.

    Attributes:
        class_name, config (JSON values, those of the config it was made from included), num_inference_steps: the
            diffusers scheduler.
        timesteps (T,) float64: one for each evaluation of the denoiser.
        rows (T, columns) float64: the model input of each evaluation, after ``scale_model_input``.
        final (columns,) float64: the latent after the last step.
        predictions: P.
        image: whether the loop starts from a picture; without one there is no column for it.
        noises: M, in the order the scheduler draws them, each as large as the latent; a drawn but unused one has its
            column of zeros, so that a seed's later draws stay in place. The x_T column is for unit noise: it has
            ``init_noise_sigma`` in it.
    """

    class_name: str
    config: Mapping[str, Any]
    num_inference_steps: int
    timesteps: NDArray[np.float64]
    rows: NDArray[np.float64]
    final: NDArray[np.float64]
    noises: int
    predictions: int
    image: bool = False

    def __post_init__(self) -> None:
        """Check the shapes against each other and make the arrays read-only."""
        columns = 1 + self.predictions + self.image + self.noises
        if self.rows.shape != (len(self.timesteps), columns) or self.final.shape != (columns,):
            raise ValueError(f"rows {self.rows.shape} and final {self.final.shape} do not fit {columns} columns")
        for array in (self.timesteps, self.rows, self.final):
            array.setflags(write=False)


def sampler_matrix(
    scheduler: Any,
    num_inference_steps: int,
    prediction_slots: Sequence[int] | None = None,
    *,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    begin: int | None = None,
    check: bool = True,
) -> SamplerMatrix:
    """The matrix of a diffusers scheduler.

    The scheduler is left as it was. Predictions are those that a pipeline hands to ``step``: guided, and without a
    learned variance.

    Args:
        prediction_slots: for each evaluation, the prediction slot it hands to the scheduler; slots are numbered in the
            order of their first use, and a repeated one is an evaluation without a launch. None: each evaluation has
            its own.
        set_timesteps_kwargs: passed on, such as ``mu`` for flow matching with dynamic shifting.
        begin: start at this evaluation, from a picture that the initial noise is added to (see ``begin_of``).
        check: also run ``check_linear``.

    Raises UserError naming the scheduler if it is not linear or cannot be run this way; ValueError for a
    ``prediction_slots`` that does not fit the evaluations.
    """
    _refuse_learned_variance(scheduler)
    matrix, slots = _walked(scheduler, num_inference_steps, prediction_slots, set_timesteps_kwargs, begin)
    if not _is_finite(matrix):
        helps = _against_infinity(scheduler, num_inference_steps, prediction_slots, set_timesteps_kwargs, begin)
        raise UserError(f"sampler {matrix.class_name}: infinite weights at {num_inference_steps} steps; {helps}")
    if check:
        _check(matrix, scheduler, slots, set_timesteps_kwargs, begin)
    return matrix


def check_linear(
    scheduler: Any,
    num_inference_steps: int,
    prediction_slots: Sequence[int] | None = None,
    *,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    begin: int | None = None,
) -> float:
    """Compare the matrix with the scheduler's own loop on random latents, predictions and noises.

    Arguments as for ``sampler_matrix``. Returns the largest relative error (Euclidean norm) over all model inputs and
    the final latent. Several images of several pixels are used, so a step that looks at other pixels or images is found
    too. In float64, so that a scheduler's rounding (1e-4 in float32 with zero terminal SNR) is not taken for a bend.
    Where the scheduler draws noise, also the covariance of all model inputs and the final latent over draws of its own:
    draws that are not independent (a Brownian tree's) are no columns of the matrix. Raises UserError naming the
    scheduler, and the setting to blame where one is known, beyond ``TOLERANCE`` or the statistical one.
    """
    matrix = sampler_matrix(
        scheduler,
        num_inference_steps,
        prediction_slots,
        set_timesteps_kwargs=set_timesteps_kwargs,
        begin=begin,
        check=False,
    )
    return _check(matrix, scheduler, _slots(prediction_slots, len(matrix.timesteps)), set_timesteps_kwargs, begin)


def prediction_used(matrix: SamplerMatrix) -> tuple[bool, ...]:
    """For each prediction slot, whether any model input or the final latent has a weight for it."""
    weights = np.vstack([matrix.rows, matrix.final])[:, 1 : 1 + matrix.predictions]
    return tuple(bool(used) for used in (weights != 0).any(axis=0))


def _walked(
    scheduler: Any,
    num_inference_steps: int,
    prediction_slots: Sequence[int] | None,
    set_timesteps_kwargs: Mapping[str, Any] | None,
    begin: int | None,
) -> tuple[SamplerMatrix, tuple[int, ...]]:
    """The matrix, finite or not, and the prediction slot of each evaluation."""
    import torch

    from dipgo_deploy.sampler.loop import run_loop

    count = evaluations(scheduler, num_inference_steps, set_timesteps_kwargs=set_timesteps_kwargs) - (begin or 0)
    slots = _slots(prediction_slots, count)
    predictions = max(slots) + 1
    image = begin is not None

    def walk(noises: int) -> tuple[Any, int]:
        columns = 1 + predictions + image + noises
        units = torch.eye(columns, dtype=torch.float64)
        drawn = 0

        def unit(column: int) -> torch.Tensor:
            return units[column].reshape(1, columns, 1, 1).clone()

        def draw() -> torch.Tensor:
            nonlocal drawn
            drawn += 1
            # The first walk only counts draws: it has no columns for them.
            return unit(predictions + image + drawn) if noises else torch.zeros(1, columns, 1, 1, dtype=torch.float64)

        result = _scheduler_at_work(
            scheduler,
            lambda: run_loop(
                scheduler,
                num_inference_steps,
                unit(0),
                lambda index, _input, _timestep: unit(1 + slots[index]),
                draw,
                set_timesteps_kwargs=set_timesteps_kwargs,
                start=None if begin is None else ImageStart(begin, unit(1 + predictions)),
                keep_double=True,
            ),
        )
        return result, drawn

    result, noises = walk(0)
    if noises:
        result, _ = walk(noises)
    rows = torch.stack([row.reshape(-1) for row in result.inputs]).numpy()
    matrix = SamplerMatrix(
        class_name=type(scheduler).__name__,
        config=plain_config(scheduler),
        num_inference_steps=num_inference_steps,
        timesteps=np.asarray(result.timesteps, dtype=np.float64),
        rows=np.ascontiguousarray(rows, dtype=np.float64),
        final=result.final.reshape(-1).numpy().astype(np.float64),
        noises=noises,
        predictions=predictions,
        image=image,
    )
    return matrix, slots


def _is_finite(matrix: SamplerMatrix) -> bool:
    return bool(np.isfinite(matrix.rows).all() and np.isfinite(matrix.final).all())


def _check(
    matrix: SamplerMatrix,
    scheduler: Any,
    slots: Sequence[int],
    set_timesteps_kwargs: Mapping[str, Any] | None,
    begin: int | None,
) -> float:
    import torch

    from dipgo_deploy.sampler.loop import run_loop

    columns = len(matrix.final)
    history = np.random.default_rng(0).standard_normal((columns, *_CHECK_SHAPE))
    parts = torch.from_numpy(history)
    noise = iter(parts[columns - matrix.noises :])
    result = _scheduler_at_work(
        scheduler,
        lambda: run_loop(
            scheduler,
            matrix.num_inference_steps,
            parts[0].clone(),
            lambda index, _input, _timestep: parts[1 + slots[index]].clone(),
            lambda: next(noise).clone(),
            set_timesteps_kwargs=set_timesteps_kwargs,
            start=None if begin is None else ImageStart(begin, parts[1 + matrix.predictions].clone()),
            keep_double=True,
        ),
    )
    weights = np.vstack([matrix.rows, matrix.final])
    expected = np.stack([part.numpy() for part in (*result.inputs, result.final)])
    actual = np.tensordot(weights, history, axes=1)
    axes = tuple(range(1, expected.ndim))
    difference = np.sqrt(np.square(actual - expected).sum(axes))
    error = float((difference / np.maximum(np.sqrt(np.square(expected).sum(axes)), 1e-12)).max())
    if not error <= TOLERANCE:
        reason = _reason(own_config(scheduler))
        raise UserError(f"sampler {matrix.class_name}: {reason} (relative error {error:.2g})")
    if matrix.noises:
        _check_draws(matrix, scheduler, set_timesteps_kwargs, begin)
    return error


def _check_draws(
    matrix: SamplerMatrix, scheduler: Any, set_timesteps_kwargs: Mapping[str, Any] | None, begin: int | None
) -> None:
    """Refuse noise whose covariance over the loop is not that of independent draws."""
    import torch

    from dipgo_deploy.sampler.loop import run_loop

    shape = _DRAWN_SHAPE if len(matrix.timesteps) <= _MANY_STEPS else _DRAWN_SHAPE_OF_MANY_STEPS
    nothing = torch.zeros(shape, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = _scheduler_at_work(
            scheduler,
            lambda: run_loop(
                scheduler,
                matrix.num_inference_steps,
                nothing,
                lambda index, _input, _timestep: nothing,
                None,
                set_timesteps_kwargs=set_timesteps_kwargs,
                start=None if begin is None else ImageStart(begin, nothing),
            ),
        )
    drawn = torch.stack([part.reshape(-1).double() for part in (*result.inputs, result.final)]).numpy()
    weights = np.vstack([matrix.rows, matrix.final])[:, len(matrix.final) - matrix.noises :]
    expected, actual = weights @ weights.T, drawn @ drawn.T / drawn.shape[1]
    spread = np.sqrt(np.diag(expected))
    allowed = _DEVIATIONS * np.sqrt(2 / drawn.shape[1]) * np.outer(spread, spread)
    # What has no noise in it must have none: rounding of the schedulers' float32 is far below this.
    if not (np.abs(actual - expected) <= allowed + 1e-8 * max(float(expected.max()), 1.0)).all():
        deviation = np.sqrt(np.diag(actual))[-1]
        raise UserError(
            f"sampler {matrix.class_name}: its noise is not drawn independently (the final latent's standard deviation "
            f"is {deviation:.4g}, not {spread[-1]:.4g}); use another sampler (dpm++2m-sde, euler-a)"
        )


def _against_infinity(
    scheduler: Any,
    num_inference_steps: int,
    prediction_slots: Sequence[int] | None,
    set_timesteps_kwargs: Mapping[str, Any] | None,
    begin: int | None,
) -> str:
    """What helps where a scheduler divides by zero: the first change that was tried and gives finite weights."""
    own = own_config(scheduler)
    for change, meaning in _REMEDIES:
        if any(key not in own or own[key] == value for key, value in change.items()):
            continue
        try:
            changed = type(scheduler).from_config({**own, **change})
            helped = _is_finite(_walked(changed, num_inference_steps, prediction_slots, set_timesteps_kwargs, begin)[0])
        except Exception:  # a class refuses in its own way; then this is no help
            continue
        if not helped:
            continue
        settings = " and ".join(f"{key} to {str(value).lower()}" for key, value in change.items())
        return f"set {settings} in the model's scheduler/scheduler_config.json{meaning}, or use another sampler"
    return "use another sampler, or check betas and sigmas in the model's scheduler/scheduler_config.json"


def _reason(config: Mapping[str, Any]) -> str:
    blamed = [key for key in _SUSPECTS if config.get(key)]
    if not blamed:
        return "its steps are not linear in latent, predictions and noise; use another sampler"
    settings = " and ".join(blamed)
    return (
        f"{settings} makes its steps non-linear; set {settings} to false in the model's "
        "scheduler/scheduler_config.json and make the schedule again, or use a sampler without it (dpm++2m, euler)"
    )


def _refuse_learned_variance(scheduler: Any) -> None:
    variance = own_config(scheduler).get("variance_type")
    if isinstance(variance, str) and variance.startswith("learned"):
        raise UserError(
            f"sampler {type(scheduler).__name__}: variance_type {variance!r} needs the model's learned variance, which "
            "is not exported; set variance_type to 'fixed_small' in the scheduler config or use ddim"
        )


def _scheduler_at_work(scheduler: Any, work: Any) -> Any:
    try:
        return work()
    except UserError:
        raise
    except Exception as error:  # schedulers outside the usual interface fail in their own ways
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"sampler {type(scheduler).__name__}: its loop cannot be run as a matrix: {reason}; use another sampler"
        ) from error


def _slots(prediction_slots: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if prediction_slots is None:
        return tuple(range(count))
    slots = tuple(int(slot) for slot in prediction_slots)
    if len(slots) != count:
        raise ValueError(f"prediction_slots has {len(slots)} entries for {count} evaluations")
    filled = 0
    for index, slot in enumerate(slots):
        if not 0 <= slot <= filled:
            raise ValueError(
                f"prediction_slots[{index}] is {slot}, but only slots 0 to {filled - 1} are filled by then"
            )
        filled = max(filled, slot + 1)
    return slots
