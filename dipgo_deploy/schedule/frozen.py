"""JSON data that cannot be changed: read-only dictionaries and tuples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

_INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}


class FrozenDict(dict[str, Any]):
    """A dictionary that refuses to be changed; ``dict(x)`` gives a shallow copy that can be."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("this dictionary is read-only: copy it with dict(...) to change it")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self  # the values are frozen too


def freeze(value: Any) -> Any:
    """A read-only copy of JSON-like data: mappings become ``FrozenDict``, sequences tuples.

    Raises ValueError for what has no form in a document (arrays, objects, keys that are not strings, NaN).
    """
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("NaN cannot be stored")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is not a string")
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    raise ValueError(f"a value of type {type(value).__name__} has no form in JSON")


def to_json(value: Any) -> Any:
    """Plain lists and dictionaries; infinite floats, which JSON has none of, become "Infinity" or "-Infinity"."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def freeze_config(value: Any) -> Any:
    """``freeze``, with the strings "Infinity" and "-Infinity" read back as the floats that ``to_json`` made them of."""
    if isinstance(value, str):
        return _INFINITE.get(value, value)
    if isinstance(value, Mapping):
        return freeze({key: freeze_config(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze_config(item) for item in value)
    return freeze(value)
