"""One trace for all that tests make of a model, or of parts that its models share."""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dipgo_deploy.export import components, planning
from dipgo_deploy.export.trace import TracedModel, trace
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.search import problem

_MOST = 16
_made: OrderedDict[str, tuple[torch.nn.Module, TracedModel]] = OrderedDict()
"""The traces of this process that were asked for last, with the denoisers whose weights they hold."""


@contextmanager
def shared_traces() -> Iterator[None]:
    """Exports and searches of the same weights, configuration, units, sizes and dtype share a trace, the dearest part.

    Not for tests that plant a fault in a trace, or hold two traces against each other.
    """

    def once(denoiser: torch.nn.Module, family: ModelFamily, *arguments: Any, **settings: Any) -> TracedModel:
        weights = _weights(denoiser)
        if weights is None:
            return trace(denoiser, family, *arguments, **settings)
        key = repr((family.class_name, weights, *arguments, settings))
        found = _made.pop(key, None)
        # The trace holds those of the denoiser that it was made of, which may have been changed, or let go, since.
        if found is None or _weights(found[0]) != weights:
            found = denoiser, trace(denoiser, family, *arguments, **settings)
        _made[key] = found
        while len(_made) > _MOST:
            _made.popitem(last=False)
        return found[1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (planning, problem):
            patch.setattr(module, "trace", once)
        yield


def _weights(module: torch.nn.Module) -> str | None:
    """A digest of all weights with their names and types; None of weights that are not in memory."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
