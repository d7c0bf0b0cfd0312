"""What is made at the start of a run: the rows that graphs take of it, as the manifest has them."""

from __future__ import annotations

from dipgo_deploy.bundle.manifest import Manifest, PlanEntry, TensorSpec, VariantEntry
from dipgo_deploy.bundle.names import is_run_row

PROLOGUE_NAME = "prologue"


def run_specs(plan: PlanEntry) -> dict[str, TensorSpec]:
    """The inputs of all graphs that are rows of what is made at the start of a run, by name."""
    return {spec.name: spec for entry in plan.variants for spec in entry.graph.inputs if is_run_row(spec.name)}


def made_by_prologue(plan: PlanEntry) -> dict[str, TensorSpec]:
    """The outputs of the prologue's graph, by name."""
    return {} if plan.prologue is None else {spec.name: spec for spec in plan.prologue.outputs}


def prologue_entry(plan: PlanEntry) -> VariantEntry:
    """The prologue's graph as that of a variant, to be run by itself.

    Raises:
        ValueError: there is none.
    """
    if plan.prologue is None:
        raise ValueError("there is no prologue")
    return VariantEntry(name=PROLOGUE_NAME, graph=plan.prologue, reads=(), writes=(), predicts=False, macs=0)


def class_name(manifest: Manifest) -> str | None:
    """The condition that is class ids; None where there is none."""
    return next((spec.name for spec in manifest.conditions if spec.source == "class"), None)


def usual_class(manifest: Manifest) -> int | None:
    """A class that an engine directory can draw, of one that was exported for some only; else None."""
    null = manifest.components.null_class
    classes = manifest.plan.table_classes
    return next((label for label in classes if label != null), next(iter(classes), None))


def run_row_bytes(plan: PlanEntry) -> int:
    """Memory of the rows that are made at the start of a run."""
    made = made_by_prologue(plan)
    of_classes = [spec for name, spec in run_specs(plan).items() if name not in made]
    each = sum(spec.nbytes for spec in made.values()) + len(plan.table_timesteps) * sum(s.nbytes for s in of_classes)
    return len(plan.halves) * each
