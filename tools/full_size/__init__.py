"""Published configurations at full size, and exports of them with random weights under the clock.

Each module with a ``MODELS`` tuple is one family. An entry has ``name``, ``class_name`` and ``config`` of the denoiser,
``scheduler`` (diffusers class) and ``scheduler_config``, ``pixels`` and ``text_length`` of the published model, and
where it applies: ``depth`` (changes of ``config`` that leave few enough parameters for a small machine, all kinds of
blocks kept), ``pipeline`` (of a model with several denoisers of that ``config``: their names in ``denoisers``, and what
``model_index.json`` says beside them in ``index``), ``latent_scale`` (pixels a latent pixel, 8 where not said),
``frames`` (of a video) and ``published`` (a shipped schedule with the gates that a paper's authors released for this
model, or a published ``rule`` that makes gates: ``deepcache`` with ``interval`` and ``branch``, or ``interval``, every
unit at every so many steps only, as FORA and SmoothCache's static schedules do).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from dipgo_deploy.errors import UserError

_COMMANDS = frozenset({"all", "calibration", "export", "measure", "stages", "table", "weights"})


def models() -> dict[str, dict[str, Any]]:
    """All entries by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _COMMANDS)
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {entry["name"]: entry for module in modules for entry in module.MODELS}


def find(name: str) -> dict[str, Any]:
    """The entry of that name, or the only one whose name begins like that. Raises UserError for any other name."""
    known = models()
    if name in known:
        return known[name]
    found = [entry for key, entry in known.items() if key.startswith(name)]
    if len(found) != 1:
        raise UserError(f"{name}: {'several' if found else 'no'} models of that name: use one of {', '.join(known)}")
    return found[0]
