"""Search methods to hold the pruner against, one file each, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from dipgo_deploy.search.baselines.base import Method, Task

# Name -> (module, class); imported when used.
_HOMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "random": ("random_search", "RandomSearch"),
        "uniform": ("uniform", "Uniform"),
        "deepcache": ("deepcache", "DeepCache"),
        "genetic": ("genetic", "Genetic"),
        "annealing": ("annealing", "Annealing"),
        "dp": ("dynamic", "DynamicProgramming"),
    }
)

BASELINES = tuple(_HOMES)


def baseline(name: str) -> Method:
    """The search method of this name, one of ``BASELINES``, with its default settings; KeyError for another."""
    module, kind = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), kind)()


__all__ = ["BASELINES", "Method", "Task", "baseline"]
