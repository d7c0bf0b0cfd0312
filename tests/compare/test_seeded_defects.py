"""Defects planted in engine directories and in the package: all found, and named by launch, step and tensor.

The quick ones run always; all of them with ``-m slow``, which ``docs/results/comparison.md`` counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sd_pipelines import save_sdxl
from seeded_defects import DEFECTS, Defect, replaced
from tiny_engines import save_dit_pipeline, schedule_for, write

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.pictures import cases
from dipgo_deploy.compare.stock import Case, StockPipeline, StockRun
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.reference.conditions import ReferenceInputs
from dipgo_deploy.reference.load import Reference, load_reference

assert len(DEFECTS) >= 85


@dataclass(frozen=True)
class Sound:
    """An engine directory without a defect, and the model."""

    bundle: Bundle
    reference: Reference
    inputs: ReferenceInputs
    cases: tuple[Case, ...]


def _sound(engine_dir: Path) -> Sound:
    bundle = Bundle.open(engine_dir)
    reference = load_reference(bundle)
    return Sound(bundle, reference, reference.inputs(bundle.manifest), tuple(cases(bundle.manifest)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sound]:
    """Each kind of engine directory, made when it is first asked for."""
    made: dict[str, Sound] = {}
    folder = tmp_path_factory.mktemp("sound")

    def get(name: str) -> Sound:
        if name not in made:
            model = save_sdxl(folder / name) if name == "text" else save_dit_pipeline(folder / name)
            schedule = schedule_for(model, sampler="euler-a" if name == "text" else "ddim", ratio=0.4, seed=3)
            options = ExportOptions(timestep_tables=False, layout="segments" if name == "segments" else "variants")
            made[name] = _sound(write(plan_export(str(model), schedule, options), folder / f"{name}-engine"))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def stock_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipeline is sound in all of these: each of its calls is made once."""
    original = StockPipeline._call

    def call(self: StockPipeline, case: Case, *, stop: bool) -> StockRun:
        key = (self._manifest.model.name, case, stop)
        if key not in _RUNS:
            _RUNS[key] = original(self, case, stop=stop)
        return _RUNS[key]

    monkeypatch.setattr(StockPipeline, "_call", call)


_RUNS: dict[Any, StockRun] = {}


def _failure(sound: Sound, backend: Backend, defect: Defect | None, folder: Path, monkeypatch: Any) -> str | None:
    """The first thing that is wrong with a copy of ``sound`` that has the defect."""
    path, manifest = sound.bundle.path, sound.bundle.manifest
    if defect is not None and defect.edit is not None:
        document = json.loads(manifest.dumps())
        defect.edit(document)
        manifest = Manifest.model_validate(document)
    if defect is not None and defect.change is not None:
        path = replaced(folder, path)
        defect.change(path)
    if defect is not None and defect.patch is not None:
        defect.patch(monkeypatch)
    reference = replace(sound.reference, set_timesteps=manifest.sampler.set_timesteps)
    options = Options(cases=sound.cases, pictures=defect is None or defect.pictures)
    try:
        return compare_engine(Bundle(path, manifest), reference, sound.inputs, backend, options).first_failure()
    except UserError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("name", ["text", "classes", "segments"])
def test_without_a_defect_nothing_is_wrong(
    name: str, sound: Callable[[str], Sound], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _failure(sound(name), backend, None, tmp_path / "x", monkeypatch) is None


@pytest.mark.parametrize(
    "defect",
    [pytest.param(defect, id=defect.name, marks=() if defect.quick else pytest.mark.slow) for defect in DEFECTS],
)
def test_a_defect_is_found_and_named(
    defect: Defect, sound: Callable[[str], Sound], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = _failure(sound(defect.engine), backend, defect, tmp_path / "x", monkeypatch)
    assert failure is not None, "not found"
    print(failure)  # with -rP, what is said of each
    assert re.search(defect.says, failure), failure
