"""How much of a search fits into a number of minutes. Pure functions of the time that an evaluation takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipgo_deploy.errors import UserError

# Shares of the time beyond the least: images to fit to, candidates for the launches, gradients, images that judge.
_FIT, _SEARCH, _REFINE, _JUDGE = 0.4, 0.25, 0.15, 0.2
# Images: fewer do not determine the weights of some launches; more change nothing that can be seen.
LEAST_IMAGES, MOST_IMAGES = 12, 200
LEAST_JUDGES, MOST_JUDGES = 8, 200
MOST_FITS, MOST_ITERATIONS = 120, 60
# Of the calibration's, what candidates are fitted to and judged by.
SEARCH_IMAGES = 40
# A gradient of an evaluation takes about three of them: forward, again for the checkpoint, backward.
_GRADIENT = 3


@dataclass(frozen=True)
class Effort:
    """What a time allows.

    Attributes:
        images: of the calibration.
        fits: for each number of launches.
        iterations: of the refinement by gradients.
        judges: images that judge the result.
        minutes: what it is expected to take.
    """

    images: int
    fits: int
    iterations: int
    judges: int
    minutes: float


def judges_within(minutes: float, evaluation: float, full: int, launches: int) -> int:
    """Images that judge one schedule of so many launches within ``minutes``, beside the full run's.

    Raises:
        UserError: the fewest take longer; the line says how long.
    """
    each = evaluation * (full + launches)
    if LEAST_JUDGES * each > 60 * minutes:
        raise UserError(
            f"--minutes {minutes:g}: {LEAST_JUDGES} images of {full + launches} evaluations, the fewest that judge, "
            f"take about {LEAST_JUDGES * each / 60:.1f} minutes; give --minutes {-(-LEAST_JUDGES * each // 60):.0f}"
        )
    return min(MOST_JUDGES, int(60 * minutes / max(each, 1e-9)))


def effort(minutes: float, evaluation: float, full: int, launches: Sequence[int], batch: int) -> Effort:
    """What fits into ``minutes``.

    Args:
        minutes: for everything but loading and exporting.
        evaluation: seconds of the denoiser for one image.
        full: evaluations of the full run.
        launches: the numbers of launches that are searched; of several, each is judged by images that choose.
        batch: images that a step of the refinement takes.

    Raises:
        UserError: the least that gives a solver takes longer; the line says how long.
    """
    tried = sum(launches)
    judged = (full + tried) * (1 if len(launches) == 1 else 2)

    def seconds(images: int, fits: int, iterations: int, judges: int) -> float:
        search = fits * min(images, SEARCH_IMAGES) + _GRADIENT * iterations * batch
        return evaluation * (images * (full + tried) + search * tried + judges * judged)

    least = seconds(LEAST_IMAGES, 0, 0, LEAST_JUDGES)
    if least > 60 * minutes:
        raise UserError(
            f"--minutes {minutes:g}: an evaluation of the denoiser takes {evaluation:.2g} s here, so the least, "
            f"{LEAST_IMAGES} images of {full} evaluations, takes about {least / 60:.1f} minutes; give --minutes "
            f"{-(-least // 60):.0f} or fewer --steps"
        )
    spare = (60 * minutes - least) / max(evaluation, 1e-9)
    images = min(MOST_IMAGES, LEAST_IMAGES + int(_FIT * spare / (full + tried)))
    fits = min(MOST_FITS, int(_SEARCH * spare / (min(images, SEARCH_IMAGES) * tried)))
    iterations = min(MOST_ITERATIONS, int(_REFINE * spare / (_GRADIENT * batch * tried)))
    judges = min(MOST_JUDGES, LEAST_JUDGES + int(_JUDGE * spare / judged))
    return Effort(images, fits, iterations, judges, seconds(images, fits, iterations, judges) / 60)
