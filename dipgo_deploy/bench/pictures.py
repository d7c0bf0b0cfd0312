"""What a measurement keeps of its pictures, in files of a folder: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.documents import OTHER_FOLDER, check_same_settings, read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic

_SETTINGS = "measurement.json"


class Pictures:
    """The full run's pictures (float32, mapped), and of each case its pictures (uint8, mapped) and values.

    folder: is there already. settings: what has to be the same to go on with what is there. count, shape: of the
    pictures, (3, [F,] H, W).

    Raises:
        UserError: the folder cannot be written, or has another measurement.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], count: int, shape: tuple[int, ...], *, resume: bool = False
    ) -> None:
        self._folder, self._count, self._shape = folder, count, shape
        path = folder / _SETTINGS
        if path.is_file():
            if not resume:
                raise UserError(f"{folder}: has a measurement already; give --resume to go on with it, or another one")
            check_same_settings(path, settings, read_document(path, "settings of a measurement", OTHER_FOLDER))
        write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())

    def opened(self, name: str, dtype: Any, *, new: bool) -> np.memmap:
        """The pictures under a name, (count, 3, [F,] H, W); ``new`` ones are not filled yet."""
        path = self._folder / f"{name}.npy"
        try:
            if new:
                return np.lib.format.open_memmap(path, "w+", dtype, (self._count, *self._shape))
            return np.lib.format.open_memmap(path, "r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be used ({error}); {OTHER_FOLDER}") from None

    def values(self, name: str) -> dict[str, np.ndarray] | None:
        """What was measured under a name; None where it is not complete."""
        path = self._folder / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); {OTHER_FOLDER}") from None

    def complete(self, name: str, values: Mapping[str, np.ndarray]) -> None:
        """What is under a name is complete, and stays so if the process ends now."""
        buffer = io.BytesIO()
        np.savez(buffer, **dict(values))  # type: ignore[arg-type]
        write_atomic(self._folder / f"{name}.npz", buffer.getbuffer())


def key_of(data: Any) -> str:
    """A file name for a case, from plain data that says all of it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:20]
