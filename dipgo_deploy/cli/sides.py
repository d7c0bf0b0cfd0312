"""``dipgo-compare --against``: an engine directory beside another side than the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.backends import BACKENDS
from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from dipgo_deploy.backends.base import Backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.compare.worst import WorstPictures

MODEL, STOCK = "model", "stock"


def check_against(against: str | None) -> Path | None:
    """The folder that ``--against`` names, None where it names a side.

    Raises:
        UserError: neither a side nor a folder.
    """
    if against is None or against in (MODEL, STOCK) or against in BACKENDS and against != "auto":
        return None
    if not Path(against).is_dir():
        sides = ", ".join([MODEL, STOCK, *(name for name in BACKENDS if name != "auto")])
        raise UserError(f"--against {against}: no such folder; give {sides} or an engine directory")
    return Path(against)


def against_side(
    bundle: Bundle,
    backend: Backend,
    against: str,
    *,
    model: str | None,
    prompts: Sequence[str],
    labels: Sequence[int],
    guidance_scale: float | None,
    seed: int,
    tolerance: float | None,
    absolute: float,
    cross: bool,
    threads: int | None,
    pictures: WorstPictures,
    notify: Callable[[str], None],
) -> tuple[Report, dict[str, Any]]:
    """What ``compare_sides`` finds, and for the JSON what the sides are.

    bundle: at the sizes that are compared. against: ``model``, ``stock``, a backend or a folder. pictures: takes the
    final ones.

    Raises:
        UserError: a side that cannot do it.
    """
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.cross import compare_sides
    from dipgo_deploy.compare.metrics import Tolerance
    from dipgo_deploy.compare.provenance import engine_facts, side_tolerances, versions
    from dipgo_deploy.compare.sides import EngineSide, Side, given_to
    from dipgo_deploy.models.registry import family_for

    manifest = bundle.manifest
    manifests, other = [manifest], None
    folder = check_against(against)
    if folder is not None:
        other = Bundle.open(folder).at(manifest.usual_sizes)
    elif against in BACKENDS:
        other = bundle
    if other is not None:
        manifests.append(other.manifest)
        _check_same(bundle, other)
        beside = backend if folder is not None else create_backend(against, threads=threads)
        beside.check(other.manifest)
    family = family_for(manifest.model.class_name)
    limit = max(family.tolerance(one.dtype, one.quantized) for one in manifests) if tolerance is None else tolerance
    notify("encoding")
    given = given_to(bundle, backend, prompts=prompts, labels=labels, guidance_scale=guidance_scale, seed=seed)
    facts: dict[str, Any] = {"models": {"engine_dir": engine_facts(bundle)}, "guidance_scale": given.guidance_scale}
    notify("loading")
    reference: Side
    if other is not None:
        reference = EngineSide(other, beside)
        facts["models"]["against"] = engine_facts(other)
    else:
        reference = _in_torch(bundle, against, model, given.guidance_scale, prompts, labels, seed, threads)
    facts |= {
        "against": reference.name,
        "versions": versions(bundle),
        "tolerances": side_tolerances(family, manifests, Tolerance(limit, absolute), asked=tolerance is not None),
    }
    side = EngineSide(bundle, backend)
    limits = Tolerance(limit, absolute)
    report = compare_sides(side, reference, given, limits, cross=cross, seen=pictures.take, notify=notify)
    return report, facts


def _check_same(bundle: Bundle, other: Bundle) -> None:
    """Refuse (UserError) engine directories that cannot be given the same noise and conditions."""
    ours, theirs = bundle.manifest, other.manifest
    for name, one, two in (
        ("model", ours.model.class_name, theirs.model.class_name),
        ("latent", (ours.batch, ours.latent.shape), (theirs.batch, theirs.latent.shape)),
        ("guidance", ours.guidance, theirs.guidance),
        ("conditions", _shapes(ours.conditions), _shapes(theirs.conditions)),
        ("draws of noise", ours.plan.noises, theirs.plan.noises),
    ):
        if one != two:
            raise UserError(f"--against {other.path}: its {name} is {two}, that of {bundle.path} is {one}")


def _shapes(conditions: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in conditions}


def _in_torch(
    bundle: Bundle,
    against: str,
    model: str | None,
    guidance_scale: float,
    prompts: Sequence[str],
    labels: Sequence[int],
    seed: int,
    threads: int | None,
) -> Any:
    from dipgo_deploy.compare.stock import Case
    from dipgo_deploy.compare.torch_sides import ModelSide, StockSide
    from dipgo_deploy.reference.conditions import LABEL, PROMPT
    from dipgo_deploy.reference.load import load_reference
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.runtime.requests import class_condition, text_conditions

    quiet_libraries()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    reference = load_reference(bundle, model)
    if against == MODEL:
        return ModelSide(reference)
    manifest = bundle.manifest
    guided = manifest.guidance or any(spec.source == "guidance" for spec in manifest.conditions)

    def each(given: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(given) * (manifest.batch if len(given) == 1 else 1)

    case = Case(
        "the prompt",
        each(prompts or (PROMPT,)) if text_conditions(manifest) else None,
        None,
        each(labels or (LABEL,)) if class_condition(manifest) is not None else None,
        guidance_scale if guided else None,
        seed,
    )
    return StockSide(manifest, reference, case)
