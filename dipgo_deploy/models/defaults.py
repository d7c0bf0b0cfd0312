"""What diffusers' classes take for settings that a configuration file leaves out.

The table is a file of this project (diffusers 0.42), so that a configuration has the same meaning and the same hash
without torch and beside any version of diffusers; a test compares it with the installed one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TABLE = Path(__file__).with_name("defaults.json")


def class_defaults(class_name: str) -> Mapping[str, Any]:
    """Setting -> value of a diffusers class that a model family uses; empty for any other class."""
    return _table().get(class_name, MappingProxyType({}))


def with_defaults(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every setting of its class; one that the class does not know and that is null is dropped.

    A value equal to the default is written as that is (1 and 1.0 are the same setting).
    """
    given = {key: value for key, value in config.items() if value is not None or key in defaults or key[:1] == "_"}
    return {**given, **{key: value for key, value in defaults.items() if given.get(key, value) == value}}


@functools.cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return MappingProxyType({name: MappingProxyType(values) for name, values in table.items()})
