"""What all importers share: from the gates of a foreign file to a schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.builders import PendingTarget, Target
from dipgo_deploy.schedule.document import Gates, Schedule

Reader = Callable[[bytes, tuple[str, ...], int], Gates]


def import_file(
    path: str | Path,
    target: Target | PendingTarget,
    method: str,
    read: Reader,
    settings: Mapping[str, Any] | None = None,
) -> Schedule:
    """Read a file's gates with ``read(data, block names, most rows)`` and make them a schedule for ``target``.

    A schedule exactly one row short of the sampler's evaluations (one made per step for PNDM, which evaluates its
    first step twice) has its last row repeated. The provenance names the file, its SHA-256, the reader's ``settings``
    and the repeated row. Raises UserError with the file's name in front.
    """
    data = read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    try:
        if isinstance(target, Target):
            gates = read(data, target.block_names, target.steps + 1)  # one too many is told with the right number
        else:
            gates = read(data, target.block_names, target.most_steps)
            target = target.complete()
        # After the reader, which may add to them.
        parameters: Mapping[str, Any] = {"file": Path(path).name, "sha256": digest, **(settings or {})}
        if len(gates) == target.steps - 1 and gates:
            parameters = {**parameters, "last_row_repeated": 1}
            gates = (*gates, gates[-1])
        sampler = target.sampler
        validation.check_steps(len(gates), target.steps, sampler.class_name, sampler.num_inference_steps)
        return target.schedule(gates, method, parameters)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_rows(rows: int, most: int) -> None:
    """Refuse (UserError) more than ``most`` rows before they are read one by one."""
    if rows > most:
        raise UserError(f"steps: {rows:,} rows or more, but the sampler evaluates the denoiser fewer times")
