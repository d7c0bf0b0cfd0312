"""What a calibration keeps of each image, in files of a folder: memory does not grow with the images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic

_STATE = "calibration.json"


class Store:
    """Per image the history (columns, C, h, w) of the schedule's run and the targets (rows, C, h, w), float32, mapped.

    settings: what has to be the same to go on with what is in the folder. done: images whose targets are complete.

    Raises:
        UserError: the folder cannot be written, or has the calibration of something else.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        images: int,
        columns: int,
        rows: int,
        sample_shape: tuple[int, ...],
        *,
        resume: bool = False,
    ) -> None:
        self._folder, self._settings = folder, dict(settings)
        self.done = 0
        path = folder / _STATE
        if resume and path.is_file():
            self.done = self._read(path)
        elif path.is_file():
            raise UserError(f"{folder}: has a calibration already; give --resume to go on with it, or another folder")
        mode = "r+" if self.done else "w+"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.history = np.lib.format.open_memmap(
                folder / "history.npy", mode, np.float32, (images, columns, *sample_shape)
            )
            self.targets = np.lib.format.open_memmap(
                folder / "targets.npy", mode, np.float32, (images, rows, *sample_shape)
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be used ({error}); give another --checkpoint folder") from None

    def targets_done(self, images: int) -> None:
        """The targets of so many images are complete, and stay so if the process ends now."""
        self.done = images
        self.targets.flush()
        self.history.flush()
        state = {"done": images, "settings": self._settings}
        write_atomic(self._folder / _STATE, (json.dumps(state, indent=1) + "\n").encode())

    def _read(self, path: Path) -> int:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            done, settings = int(state["done"]), dict(state["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no calibration ({error}); give another --checkpoint folder") from None
        for name, value in json.loads(json.dumps(self._settings)).items():
            if settings.get(name) != value:
                raise UserError(
                    f"{path}: was begun with {name} {settings.get(name)!r}, now it is {value!r}; give the same, or "
                    "another --checkpoint folder"
                )
        return done
