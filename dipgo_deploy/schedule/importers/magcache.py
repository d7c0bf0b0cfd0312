"""MagCache (arXiv 2506.09045): its decision is made of calibrated ratios alone, so it is known before a run.

Settings are those of diffusers' ``MagCacheConfig``: ``mag_ratios`` (one for each step; nearest ones are taken for
another number), ``threshold`` (0.06), ``max_skip_steps`` (3), ``retention_ratio`` (0.2) and ``num_inference_steps``
(28); or the names of the authors' code, ``magcache_thresh`` and ``magcache_K``. ``always`` lists steps that run in any
case: for FLUX the authors' code has one, step 11 of 28. With ratios for both halves of the guidance in turn, as for
Wan, each half decides for itself, and has to decide the same. A step that does not run adds what all blocks together
added at the last one that did.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.settings import Settings


def computed(
    ratios: Sequence[float],
    threshold: float,
    most_skipped: int,
    first: int,
    always: Collection[int] = (),
    strict: bool = False,
) -> tuple[bool, ...]:
    """Which of the T evaluations run.

    ratios: T. threshold: of the summed error, which may reach it unless ``strict``. most_skipped: in a row. first: the
    first that may be left out. always: those that run in any case.
    """
    runs: list[bool] = []
    ratio, error, skipped = 1.0, 0.0, 0
    for step, factor in enumerate(ratios):
        run = True
        if step >= first:
            ratio, skipped = ratio * factor, skipped + 1
            error += abs(1 - ratio)
            run = (
                not runs
                or error > threshold
                or (strict and error == threshold)
                or skipped > most_skipped
                or step in always
            )
            if run:
                ratio, error, skipped = 1.0, 0.0, 0
        runs.append(run)
    return tuple(runs)


def of_length(ratios: Sequence[float], steps: int) -> list[float]:
    """The nearest ratio for each of ``steps`` steps."""
    if len(ratios) == steps:
        return list(ratios)
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings.from_json(data, "MagCache")
    ratios = settings.numbers("mag_ratios")
    if not ratios:
        raise UserError("mag_ratios: is empty; give one for each step")
    own = "magcache_thresh" in settings
    threshold = settings.number("magcache_thresh" if own else "threshold", 0.06, least=0)
    skipped = settings.integer(settings.any_of("max_skip_steps", "magcache_K"), 3)
    retained = settings.number("retention_ratio", 0.2, least=0, most=1)
    always = settings.integers("always", [])
    check_steps_of(settings, "num_inference_steps", source)
    if settings.flag("calibrate", False):
        raise UserError("calibrate: is true, which only measures mag_ratios; give the ratios that it prints")
    settings.done()
    steps = source.steps
    if own and len(ratios) == 2 * steps:
        runs = _of_both(ratios, steps, threshold, skipped, retained)
    else:
        runs = computed(of_length(ratios, steps), threshold, skipped, int(retained * steps + 0.5), always)
    return Imported(whole_steps(runs, len(source.names)))


def _of_both(ratios: Sequence[float], steps: int, threshold: float, skipped: int, retained: float) -> tuple[bool, ...]:
    """The authors' code for Wan calls the denoiser twice a step, and each half decides by its own ratios."""
    first = int(2 * steps * retained)
    halves = [computed(ratios[half::2], threshold, skipped, (first + 1 - half) // 2, strict=True) for half in (0, 1)]
    other = next((step for step in range(steps) if halves[0][step] != halves[1][step]), None)
    if other is not None:
        raise UserError(
            f"mag_ratios: step {other} runs for one half of the guidance and not for the other, which one launch "
            "cannot do; give the ratios of one half"
        )
    return halves[0]


IMPORTER = Importer(
    kind="magcache",
    title="Read MagCache's ratios and threshold, which decide by themselves what runs.",
    file="JSON with the settings of diffusers' MagCacheConfig",
    read=_read,
    example="magcache.json --model ./flux --steps 28 -o schedule.json",
    cache="residual",
)
