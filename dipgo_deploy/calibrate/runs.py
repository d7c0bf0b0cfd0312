"""Full runs of the calibration images, in files of a folder: memory does not grow with the images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.calibrate.core import Group, Model, Report, finite, noise_of
from dipgo_deploy.documents import OTHER_FOLDER, check_same_settings, read_document
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.files import write_atomic

_STATE = "calibration.json"
_LATENTS = "targets.npy"


class Runs:
    """The latents of full runs, image by image, and the noises that they began with.

    All arrays are float32 (images, C, h, w) and lie in files.

    groups: images that go through the model together.
    noises: the initial noise, then what the sampler draws.
    final: final latents.
    """

    def __init__(
        self,
        model: Model,
        groups: Sequence[Group],
        evaluations: Collection[int],
        folder: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        report: Report = lambda stage, done, total: None,
    ) -> None:
        """Make the full runs whose latents are not in ``folder`` yet.

        Args:
            model: what makes them.
            groups: the images.
            evaluations: of the full run; the latents that go into these are kept.
            folder: for the latents; locked by the caller.
            settings: what has to be the same to go on with what is there.
            resume: go on with it.
            report: told (stage, done, total).

        Raises:
            UserError: the folder cannot be written, or has the runs of something else; latents that are not finite.
        """
        self.groups = tuple(groups)
        self._folder = folder
        self._shape = (groups[-1].rows.stop, *model.sample_shape)
        self._places = {evaluation: place for place, evaluation in enumerate(sorted(evaluations))}
        self._settings = {**settings, "evaluations": sorted(evaluations)}
        done = self._opened(resume)
        self.final = self._targets[:, len(self._places)]
        report("full runs", done, self._shape[0])
        for group in groups:
            if group.rows.stop <= done:
                continue
            latents, final = model.full_run(group, self._places.keys())
            for evaluation, place in self._places.items():
                self._targets[group.rows, place] = finite(latents[evaluation], "the full run")
            self._targets[group.rows, len(self._places)] = finite(final, "the full run")
            self._save(group.rows.stop)
            report("full runs", group.rows.stop, self._shape[0])
        self.noises = [self.column() for _ in range(1 + model.noises)]
        for group in groups:
            for column, noise in zip(
                self.noises, noise_of(group.pairs, model.sample_shape, 1 + model.noises), strict=True
            ):
                column[group.rows] = noise

    def latents(self, evaluation: int) -> np.ndarray:
        """What goes into this evaluation of the full run."""
        return self._targets[:, self._places[evaluation]]

    def column(self) -> np.ndarray:
        """An array for a prediction of every image; its file goes when nothing refers to it any more."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return np.memmap(file, np.float32, "w+", shape=self._shape)

    def _opened(self, resume: bool) -> int:
        """Open the file of latents; the number of images in it."""
        state, path = self._folder / _STATE, self._folder / _LATENTS
        done = 0
        if resume and state.is_file():
            done = self._read(state)
        elif state.is_file():
            raise UserError(
                f"{self._folder}: has a calibration already; give --resume to go on with it, or another folder"
            )
        shape = (self._shape[0], len(self._places) + 1, *self._shape[1:])
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if done:
                self._targets = np.lib.format.open_memmap(path, "r+")
            else:
                self._targets = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._folder}: cannot be used ({error}); {OTHER_FOLDER}") from None
        if self._targets.shape != shape or self._targets.dtype != np.float32:
            raise UserError(f"{path}: does not have this calibration's latents; {OTHER_FOLDER}")
        return done

    def _save(self, done: int) -> None:
        """So many images are complete, and stay so if the process ends now."""
        self._targets.flush()
        state = {"done": done, "settings": self._settings}
        write_atomic(self._folder / _STATE, (json.dumps(state, indent=1) + "\n").encode())

    def _read(self, path: Path) -> int:
        state = read_document(path, "state of a calibration", OTHER_FOLDER)
        check_same_settings(path, self._settings, state.get("settings"))
        done = state.get("done")
        if type(done) is not int or not 0 <= done <= self._shape[0]:
            raise UserError(f"{path}: says that {one_line(repr(done), 80)} images are complete; {OTHER_FOLDER}")
        return done
