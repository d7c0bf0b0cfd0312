"""Recorded inputs and the model's outputs of each graph, as polygraphy's JSON: ``polygraphy run --load-inputs
--load-outputs`` replays them without this package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.recording import Recording

# Name of the model among polygraphy's runners.
_RUNNER = "model"


def save_inputs(bundle: Bundle, recordings: Iterable[Recording], folder: Path) -> None:
    """Write each variant's inputs as ``folder/VARIANT.json``, for polygraphy's ``--load-inputs``: one set for each of
    the launches that were recorded.

    Raises:
        UserError: the folder cannot be written.
    """
    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    for recording in recordings:
        entry = bundle.manifest.plan.variants[recording.variant]
        # Half-precision inputs are cast by the runner.
        given = {spec.name: recording.inputs[spec.name] for spec in entry.graph.inputs}
        feeds.setdefault(entry.name, []).append(given)
    _save(feeds, folder, "--save-inputs")


def save_outputs(bundle: Bundle, recordings: Iterable[Recording], folder: Path) -> list[str]:
    """Write the model's float32 outputs of the same launches as ``folder/VARIANT.json``, for ``--load-outputs``.

    Returns a line for each graph of which the model has none: a segment may write what the model has no name for.

    Raises:
        UserError: the folder cannot be written.
    """
    found: dict[str, list[Mapping[str, np.ndarray]]] = {}
    for recording in recordings:
        found.setdefault(bundle.manifest.plan.variants[recording.variant].name, []).append(recording.outputs)
    results = {name: polygraphy_outputs(outputs, _RUNNER) for name, outputs in found.items() if all(outputs)}
    _save(results, folder, "--save-outputs")
    return [f"--save-outputs: the model has no outputs of {name}" for name in found if name not in results]


def polygraphy_outputs(outputs: Iterable[Mapping[str, np.ndarray]], runner: str) -> Any:
    """Outputs of one or several runs as polygraphy has them; runner: what made them."""
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add(list(outputs), runtime=0.0, runner_name=runner)
    return results


def save_polygraphy(document: Any, path: Path) -> None:
    """Write inputs (a list of arrays by name) or outputs as polygraphy's JSON. Raises OSError."""
    from polygraphy.json import save_json

    from dipgo_deploy.compare.runners import silenced

    with silenced():
        save_json(document, str(path))


def _save(documents: Mapping[str, Any], folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, document in documents.items():
            partial = folder / f".{name}.json.partial"
            try:
                save_polygraphy(document, partial)
                os.replace(partial, folder / f"{name}.json")
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: cannot be written ({error.strerror}); give another folder") from None
