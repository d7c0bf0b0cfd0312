"""Pictures of two directories from the same seeds, and how far their latents are apart on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest, PlanEntry
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.errors import UserError
from dipgo_deploy.report.given import Strip
from dipgo_deploy.report.measured import Compared, ComparedStep

MOST_PICTURES = 16
# Classes that are drawn where none are asked for.
_CLASSES = 4
LATENT = "latent"


@dataclass(frozen=True)
class Wanted:
    """What to draw; as arguments of a pipeline."""

    prompts: tuple[str, ...] = ()
    class_labels: tuple[int | str, ...] = ()
    num_images: int = 1
    seed: int = 0
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        strips: a picture of both, each.
        drift: at evaluations that both launch, how far the latents are apart.
        why_not: one line where nothing was drawn.
    """

    strips: tuple[Strip, ...] = ()
    drift: tuple[ComparedStep, ...] = ()
    why_not: str = ""


@dataclass
class _Recorded:
    """The latents that a run gives to each launched evaluation but the first, and its final one, by the launched
    evaluation before it; of several batches one behind the other."""

    latents: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def __call__(self, pipeline: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        self.latents.setdefault(step, []).append(np.array(tensors["latents"]))


def check_wanted(ours: Manifest, theirs: Manifest, wanted: Wanted) -> str:
    """Why nothing can be drawn, in one line; empty where it can.

    Raises:
        UserError: something was asked for that does not fit the model, or too many pictures.
    """
    kinds = {spec.source for spec in ours.conditions}
    for asked, kind, name in ((wanted.prompts, "text", "--prompt"), (wanted.class_labels, "class", "--class-labels")):
        if asked and kind not in kinds:
            raise UserError(f"{name}: {ours.model.name} takes none; leave it out")
    count = wanted.num_images * max(1, len(wanted.prompts), len(wanted.class_labels))
    if count > MOST_PICTURES:
        raise UserError(f"--num-images: {count} pictures in all, a page has at most {MOST_PICTURES}; give fewer")
    if None in (ours.components.vae_decoder, theirs.components.vae_decoder):
        return "No pictures: one of the directories has no VAE."
    if (ours.latent.shape, ours.batch) != (theirs.latent.shape, theirs.batch) or ours.sizes or theirs.sizes:
        return "No pictures: the directories are not of one size and batch."
    if "image" in kinds or ours.plan.image_slot is not None:
        return "No pictures: the model draws after a picture, which a report does not take."
    if "text" in kinds and not wanted.prompts:
        return "No pictures: give --prompt."
    return ""


def draw(
    ours: Bundle, theirs: Bundle, wanted: Wanted, backend: Callable[[], Backend], stage: Callable[[str], None]
) -> Drawn:
    """Draw the same in both.

    Args:
        ours: the pruned directory. theirs: the full one.
        backend: makes one for each.
        stage: told each directory.

    Raises:
        UserError: see ``check_wanted``; or a directory cannot be run.
    """
    if why_not := check_wanted(ours.manifest, theirs.manifest, wanted):
        return Drawn(why_not=why_not)
    if not wanted.class_labels and any(spec.source == "class" for spec in ours.manifest.conditions):
        named = tuple(ours.manifest.components.class_labels or ())[:_CLASSES]
        wanted = Wanted((), named or (0,), wanted.num_images, wanted.seed, wanted.guidance_scale)
    full, full_latents = _run(theirs, wanted, backend, stage)
    pruned, pruned_latents = _run(ours, wanted, backend, stage)
    strips = tuple(
        Strip(caption, before, after) for caption, before, after in zip(_captions(wanted), full, pruned, strict=True)
    )
    return Drawn(strips, tuple(_drift(ours.manifest.plan, pruned_latents, theirs.manifest.plan, full_latents)))


def _run(
    bundle: Bundle, wanted: Wanted, backend: Callable[[], Backend], stage: Callable[[str], None]
) -> tuple[list[np.ndarray], _Recorded]:
    """Pictures (H, W, 3) in [0, 1], of a video the frame in its middle; and the latents on the way."""
    from dipgo_deploy.runtime.pipeline import Pipeline

    stage(f"drawing with {bundle.path}")
    made = backend()
    made.check(bundle.manifest)
    recorded = _Recorded()
    result = Pipeline(bundle, made)(
        list(wanted.prompts) or None,
        class_labels=list(wanted.class_labels) or None,
        num_images_per_prompt=wanted.num_images,
        seed=wanted.seed,
        guidance_scale=wanted.guidance_scale,
        output_type="np",
        callback_on_step_end=recorded,
    )
    pictures = np.asarray(result.images)
    return list(pictures if result.frames is None else pictures[:, result.frames // 2]), recorded


def _captions(wanted: Wanted) -> list[str]:
    of = [f"{prompt}, " for prompt in wanted.prompts] or [f"class {label}, " for label in wanted.class_labels] or [""]
    many = wanted.num_images > 1
    return [
        f"{name}seed {wanted.seed}" + (f", picture {number + 1}" if many else "")
        for name in of
        for number in range(wanted.num_images)
    ]


def _drift(ours: PlanEntry, pruned: _Recorded, theirs: PlanEntry, full: _Recorded) -> list[ComparedStep]:
    """At the latents that both have: those of evaluations that both launch, and the final ones."""
    given, wanted = _received(ours, pruned), _received(theirs, full)
    pairs = [(step, other) for step, other in matched(ours, theirs).items() if step in given and other in wanted]
    found = [_at(other, given[step], wanted[other]) for step, other in pairs]
    return [*found, _at(theirs.evaluations, given[None], wanted[None])]


def _at(step: int, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> ComparedStep:
    """How far the latents of all pictures are apart at an evaluation."""
    apart = relative_rms(np.concatenate(list(ours)), np.concatenate(list(theirs)))
    return ComparedStep(step=step, variant=None, tensors=(Compared(name=LATENT, relative=apart),))


def matched(ours: PlanEntry, theirs: PlanEntry) -> dict[int, int]:
    """Evaluations that both launch, ours to theirs: the same ones where all of ours are among theirs with the same
    timestep, else (a solver of its own) those at a timestep that theirs has once."""
    ours_at, theirs_at = ({launch.step: launch.timestep for launch in plan.launches} for plan in (ours, theirs))
    if ours.evaluations == theirs.evaluations and ours_at.items() <= theirs_at.items():
        return {step: step for step in ours_at}
    every = list(theirs_at.values())
    once = {timestep: step for step, timestep in theirs_at.items() if every.count(timestep) == 1}
    return {step: once[timestep] for step, timestep in ours_at.items() if timestep in once}


def _received(plan: PlanEntry, recorded: _Recorded) -> dict[int | None, Sequence[np.ndarray]]:
    """Latents by the launched evaluation that gets them; None: the final ones."""
    launched = plan.launched
    return {to: recorded.latents[step] for step, to in zip(launched, (*launched[1:], None), strict=True)}
