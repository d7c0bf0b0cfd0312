"""One trace for all that a test file makes of a model, or of parts that its models share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.export import components, planning
from dipgo_deploy.export.trace import TracedModel, trace
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.search import problem


@contextmanager
def shared_traces() -> Iterator[None]:
    """Exports and searches of the same configuration, units, sizes and dtype share a trace, their dearest part.

    For files in which one configuration has the same weights everywhere.
    """
    made: dict[str, TracedModel] = {}

    def once(denoiser: Any, family: ModelFamily, *arguments: Any, **settings: Any) -> TracedModel:
        key = repr((family.class_name, *arguments, settings))
        if key not in made:
            made[key] = trace(denoiser, family, *arguments, **settings)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (planning, problem):
            patch.setattr(module, "trace", once)
        yield


@contextmanager
def shared_parts(folder: Path) -> Iterator[None]:
    """Exports of pipelines that have the same text encoder and VAE share their graphs, at one size and dtype.

    folder: where they are kept.
    """
    made: dict[str, Any] = {}

    def once(name: str) -> Any:
        export = getattr(components, name)

        def shared(*arguments: Any) -> Any:
            stage = next(argument for argument in arguments if isinstance(argument, Path))
            if name not in made:
                before = {path for path in stage.rglob("*") if path.is_file()}
                made[name] = export(*arguments)
                new = [path for path in stage.rglob("*") if path.is_file() and path not in before]
                for path in new:
                    kept = folder / name / path.relative_to(stage)
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, kept)
            else:
                shutil.copytree(folder / name, stage, dirs_exist_ok=True)
            return made[name]

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_text_encoder", "_vae_decoder", "_decoder_in_chunks"):
            patch.setattr(components, name, once(name))
        yield
