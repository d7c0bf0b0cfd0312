"""Recordings of the supernet on disk: one process holds the torch model and writes, one runs the graphs and reads.

A folder has ``recordings.json`` (what was launched, the names of its tensors) and one ``.npy`` for each tensor, which
is mapped when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.reference.recording import Recorder, Recording
from dipgo_deploy.reference.steps import StepRecorder, StepRecording

if TYPE_CHECKING:
    from dipgo_deploy.reference.mapped import MappedCaches
    from dipgo_deploy.supernet.loop import Evaluation

_INDEX = "recordings.json"


class ToDisk:
    """A recorder whose recordings go to ``folder`` at once; in memory they stay without tensors.

    caches: where the supernet's lie.
    """

    def __init__(self, recorder: Recorder | StepRecorder, folder: Path, caches: MappedCaches) -> None:
        self._recorder = recorder
        self._folder = folder
        self._caches = caches
        self._rows: list[dict[str, Any]] = []

    @property
    def complete(self) -> bool:
        """Whether the recorder has what it wants."""
        return self._recorder.complete

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation of the loop."""
        self._recorder(evaluation)
        recordings: list[Any] = self._recorder.recordings
        for place in range(len(self._rows), len(recordings)):
            self._rows.append(self._written(place, recordings[place]))
            recordings[place] = replace(recordings[place], inputs={}, outputs={})
        for state in (evaluation.before, evaluation.after):
            for block in state.tensors:
                for tensors in state.stored(block):
                    for tensor in tensors:
                        self._caches.give_back(tensor)

    def close(self) -> None:
        """Write the index, when the loop is done."""
        (self._folder / _INDEX).write_text(json.dumps(self._rows), encoding="utf-8")

    def _written(self, place: int, recording: Recording | StepRecording) -> dict[str, Any]:
        row: dict[str, Any] = {"step": recording.step}
        if isinstance(recording, Recording):
            row["variant"] = recording.variant
        for side in ("inputs", "outputs"):
            files = row[side] = {}
            for number, (name, array) in enumerate(getattr(recording, side).items()):
                files[name] = f"{place}-{side}-{number}.npy"
                np.save(self._folder / files[name], array)
        return row


def read_recordings(folder: Path) -> Iterator[Recording]:
    """Recordings of variants, one after the other."""
    for row in _rows(folder):
        yield Recording(row["variant"], row["step"], _arrays(folder, row["inputs"]), _arrays(folder, row["outputs"]))


def read_steps(folder: Path) -> Iterator[StepRecording]:
    """Recordings of evaluations, in order."""
    for row in _rows(folder):
        yield StepRecording(row["step"], _arrays(folder, row["inputs"]), _arrays(folder, row["outputs"]))


def _rows(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / _INDEX).read_text(encoding="utf-8")))


def _arrays(folder: Path, files: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {name: np.asarray(np.load(folder / file, mmap_mode="r")) for name, file in files.items()}
