"""One trace for all that the commands in a test file make of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dipgo_deploy.export import planning
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
