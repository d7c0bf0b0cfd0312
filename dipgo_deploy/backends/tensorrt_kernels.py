"""TensorRT-RTX compiles its kernels when an engine is first run: kept in a file, they need not be compiled again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic


class KernelCache:
    """The runtime cache of one engine on one GPU, in a file beside the engine.

    A file of another version or GPU, or a damaged one, is not used and replaced. A folder that cannot be written costs
    the next process the compilation again, and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Make the contexts of a runtime config use it; the first config makes the cache, the others share it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                data = self._path.read_bytes()
                if self._cache.deserialize(data):
                    self._stored = data
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled, if anything was; the file appears whole or not at all."""
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        if data == self._stored:
            return
        with contextlib.suppress(UserError):
            write_atomic(self._path, data)
            self._stored = data
