"""The solver that a schedule may carry: rows of a sampler matrix that were fitted to the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.frozen import freeze

# No sampler's weights come near it, and float32 has no digits left for the latent beyond it.
MOST_WEIGHT = 1e5
MOST_TIMESTEP = 1e6


def _only_numbers(values: Any) -> Any:
    """Stop at the first value that is no number: the library would make an error of its own for each of them."""
    for place, value in enumerate(values if isinstance(values, (list, tuple)) else ()):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"entry {place} is {repr(value)[:60]}, not a number")
        if isinstance(value, int) and abs(value) > MOST_TIMESTEP:
            raise ValueError(f"entry {place} is beyond {MOST_TIMESTEP:g}")
    return values


Number = Annotated[StrictFloat | StrictInt, AfterValidator(float)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_only_numbers)]


def _numbers(value: Any) -> tuple[float, ...]:
    """The value where it is a row of numbers, else none."""
    right = isinstance(value, tuple) and all(type(entry) in (int, float) for entry in value)
    return tuple(value) if right else ()


FrozenJson = Annotated[dict[str, Any], BeforeValidator(freeze), AfterValidator(freeze)]


@dataclass(frozen=True)
class FittedTo:
    """What a solver was fitted to, as far as its provenance says.

    guidance_scales: all of them, empty where there was no guidance or nothing is said.
    latent: height and width, None where nothing is said.
    """

    guidance_scales: tuple[float, ...] = ()
    latent: tuple[int, int] | None = None

    def beyond(self, guidance_scale: float | None, latent: tuple[int, int], *, lora: bool, scale: int = 1) -> str:
        """What a run has that the fit had not, in words; empty where there is nothing.

        Args:
            guidance_scale: None without guidance.
            latent: height and width.
            scale: pixels of a latent pixel.
        """
        known, new = [], []
        scales = self.guidance_scales
        if scales:
            least, most = min(scales), max(scales)
            known.append(f"guidance {least:g}" + (f" to {most:g}" if most > least else ""))
            if guidance_scale is not None and not least <= guidance_scale <= most:
                new.append(f"guidance {guidance_scale:g}")
        if self.latent is not None:
            known.append(_size(self.latent, scale))
            if latent != self.latent:
                new.append(_size(latent, scale))
        if lora:
            known.append("no LoRA")
            new.append("a LoRA")
        return f"was fitted to {', '.join(known)}; this run has {' and '.join(new)}" if new else ""


def _size(latent: tuple[int, int], scale: int) -> str:
    return f"{latent[1] * scale}x{latent[0] * scale} pixels"


class Solver(BaseModel):
    """A fitted solver: the latent of evaluation j is ``rows[j]`` times the history, the final one ``final`` times it.

    The history has 1 + L columns and those of the picture and the noises: unit initial noise, the L evaluations'
    predictions (guided), the picture's latents where ``picture`` says so, and ``noises`` draws in the order in which
    the sampler that it stands for draws them.

    Attributes:
        timesteps: what the denoiser is told at each of the L evaluations, any real numbers.
        rows: L rows of weights; a row has zeros for the predictions from its own on.
        final: weights of the final latent.
        noises: how many noise draws there are.
        picture: whether the loop starts from a picture.
        provenance: what it was fitted to, and on what.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: Numbers
    rows: tuple[Numbers, ...]
    final: Numbers
    noises: Annotated[StrictInt, Field(ge=0)] = 0
    picture: bool = False
    provenance: FrozenJson = Field(default_factory=dict, validate_default=True)

    @property
    def columns(self) -> int:
        """Columns of the history."""
        return 1 + len(self.timesteps) + self.picture + self.noises

    @property
    def fitted_to(self) -> FittedTo:
        """What its provenance says. Provenance is free: what is not as ``dipgo-calibrate`` writes it says nothing."""
        scales, latent = (_numbers(self.provenance.get(name)) for name in ("guidance_scales", "latent"))
        return FittedTo(scales, (int(latent[0]), int(latent[1])) if len(latent) == 2 else None)

    @property
    def imported(self) -> str:
        """The kind of file that its weights were imported from; empty for weights that were fitted."""
        method = self.provenance.get("method")
        return method.removeprefix("import ") if isinstance(method, str) and method.startswith("import ") else ""

    @property
    def summary(self) -> str:
        """One line on what its provenance says."""
        known = self.provenance
        reference = known.get("reference")
        words = [f"{len(self.timesteps)} launches {f'as by {self.imported}' if self.imported else 'fitted'}"]
        if isinstance(reference, Mapping):
            words.append(f"to {reference.get('sampler')}, {reference.get('num_inference_steps')} steps")
        if "images" in known:
            words.append(f"on {known['images']} images")
        if scales := self.fitted_to.guidance_scales:
            words.append(f"at guidance {', '.join(f'{scale:g}' for scale in scales)}")
        if residuals := _numbers(known.get("residuals")):
            words.append(f"(relative error of the final latent {residuals[-1]:.4g} on images held aside)")
        return " ".join(words)

    def check(self, evaluations: int) -> None:
        """Refuse (UserError) a solver that does not fit a schedule of so many evaluations, or that cannot be run."""
        if len(self.timesteps) != evaluations:
            raise UserError(
                f"solver.timesteps: {len(self.timesteps)} for {evaluations} evaluations; give one for each row of keep"
            )
        if len(self.rows) != evaluations:
            raise UserError(f"solver.rows: {len(self.rows)} rows for {evaluations} evaluations; give one for each")
        for place, timestep in enumerate(self.timesteps):
            if not (math.isfinite(timestep) and 0 <= timestep <= MOST_TIMESTEP):
                raise UserError(f"solver.timesteps: {timestep:g} at evaluation {place} is no timestep; fit it again")
        for place, row in enumerate(self.rows):
            self._check_weights(f"solver.rows: evaluation {place}", row)
            early = next((later for later in range(place, evaluations) if row[1 + later]), None)
            if early is not None:
                raise UserError(
                    f"solver.rows: evaluation {place} reads the prediction of evaluation {early}, which does not exist "
                    "yet; fit it again"
                )
        self._check_weights("solver.final", self.final)
        if not self.rows[0][0]:
            raise UserError("solver.rows: evaluation 0 has no weight for the initial noise; fit it again")

    def _check_weights(self, where: str, weights: Sequence[float]) -> None:
        if len(weights) != self.columns:
            raise UserError(f"{where}: {len(weights)} weights for {self.columns} columns of the history; fit it again")
        absurd = next((weight for weight in weights if not abs(weight) <= MOST_WEIGHT), None)
        if absurd is not None:
            raise UserError(f"{where}: the weight {absurd:g} is not finite or beyond {MOST_WEIGHT:g}; fit it again")


class Rows(Protocol):
    """A sampler's matrix (``dipgo_deploy.sampler.matrix``), each evaluation with a prediction of its own."""

    @property
    def timesteps(self) -> Any:
        """(T,)."""

    @property
    def rows(self) -> Any:
        """(T, 1 + T + noises)."""

    @property
    def final(self) -> Any:
        """(1 + T + noises,)."""

    @property
    def noises(self) -> int:
        """Draws."""


def extrapolated(
    matrix: Rows,
    launched: Sequence[int],
    weights: Sequence[Sequence[float]],
    provenance: Mapping[str, Any],
    sigmas: Sequence[float] | None = None,
) -> Solver:
    """A sampler some of whose predictions are weighted sums of launched ones, as a solver of the launches alone.

    As the sampler is linear in its predictions, so is this.

    Args:
        matrix: the sampler's, each evaluation with a prediction of its own.
        launched: the L evaluations that are launched, rising from 0.
        weights: for each of the T evaluations those of the launched predictions; only of launches up to itself.
        provenance: of the solver.
        sigmas: T noise levels, where the sums are of denoised latents x - sigma v, v the prediction, in place of
            predictions.

    Raises:
        ValueError: what does not fit.
    """
    import numpy as np

    at, steps, noises = list(launched), len(matrix.timesteps), matrix.noises
    if at != sorted(set(at)) or at[:1] != [0] or at[-1] >= steps or len(weights) != steps:
        raise ValueError(f"launches {at} and {len(weights)} rows of weights do not fit {steps} evaluations")
    columns = 1 + len(at) + noises
    rows, final = np.asarray(matrix.rows), np.asarray(matrix.final)
    # What each column of the matrix is made of, of those of the solver.
    made = np.zeros((1 + steps + noises, columns))
    made[0, 0] = 1
    made[1 + steps :, 1 + len(at) :] = np.eye(noises)
    denoised = np.zeros((len(at), columns))
    for step in range(steps):
        row = np.zeros(len(at))
        row[: len(weights[step])] = weights[step]
        if row[[launch > step for launch in at]].any():
            raise ValueError(f"the prediction of evaluation {step} is made of one that is launched later")
        latent = rows[step] @ made
        if step in at:
            made[1 + step, 1 + at.index(step)] = 1
            if sigmas is not None:
                denoised[at.index(step)] = latent - sigmas[step] * made[1 + step]
        elif sigmas is None:
            made[1 + step, 1 : 1 + len(at)] = row
        else:
            made[1 + step] = (latent - row @ denoised) / sigmas[step]
    return Solver(
        timesteps=tuple(float(matrix.timesteps[place]) for place in at),
        rows=tuple(tuple(map(float, row)) for row in rows[at] @ made),
        final=tuple(map(float, final @ made)),
        noises=noises,
        provenance=dict(provenance),
    )
