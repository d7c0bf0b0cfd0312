"""The identity of a model's configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of a model's ``config.json``: canonical JSON, without keys that start with ``_``.

    Those keys hold the class, the version that wrote the file and where it was loaded from: none changes the model.
    """
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
