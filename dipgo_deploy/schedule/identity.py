"""The identity of a model's configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Of a configuration whose defaults were filled in: the hash of its file as it is.
FILE_HASH = "_file_hash"


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of a model's configuration: canonical JSON, without keys that start with ``_``.

    Those keys hold the class, the version that wrote the file and where it was loaded from: none changes the model.
    The configuration of a model is hashed with its class's defaults filled in.
    """
    return _digest(_without_private(config))


def file_hash(config: Mapping[str, Any]) -> str:
    """The same of a ``config.json`` as it is: what schedules and engine directories of version 0.1 recorded."""
    return _digest({key: value for key, value in config.items() if not key.startswith("_")})


def accepted_hashes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The hash that is recorded for a configuration, then those that earlier versions recorded for it."""
    return tuple(dict.fromkeys((config_hash(config), str(config.get(FILE_HASH, config_hash(config))))))


def _without_private(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_private(item) for key, item in value.items() if not key.startswith("_")}


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
