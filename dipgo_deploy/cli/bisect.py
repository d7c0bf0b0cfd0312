"""``dipgo-compare --bisect``: the first node that is wrong, and a folder with it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo_deploy.backends.base import Backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.engine import Options
    from dipgo_deploy.compare.metrics import Tolerance
    from dipgo_deploy.reference.conditions import ReferenceInputs
    from dipgo_deploy.reference.load import Reference

NOTHING = (
    "every graph of the denoiser is within tolerance by itself: what is wrong is elsewhere (see the first line above)"
)


def bisected(
    bundle: Bundle,
    reference: Reference,
    inputs: ReferenceInputs,
    backend: Backend,
    options: Options,
    tolerance: Tolerance,
    folder: Path,
    *,
    whole: Bundle,
    model: str | None,
    against: Path | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Find the first node that is wrong and write ``folder``; what was found as JSON values, ``line`` for people.

    whole: the engine directory with its ranges. against: an engine directory to hold it against; None for the model
    exported again.

    Raises:
        UserError: it cannot be bisected, or the folder cannot be written.
    """
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.bisect import locate
    from dipgo_deploy.compare.bisect_folder import facts, write_folder
    from dipgo_deploy.compare.torch_modules import module_outputs
    from dipgo_deploy.export.again import exported_again
    from dipgo_deploy.reference.recording import run_until_complete
    from dipgo_deploy.reference.steps import recorder_for

    notify("bisecting: running the supernet's loop")
    recorder = recorder_for(bundle, reference.schedule)
    run_until_complete(recorder, reference, inputs)
    notify("bisecting")
    with tempfile.TemporaryDirectory(prefix=".bisect-", dir=folder.resolve().parent) as scratch:

        @functools.cache
        def sound(dtype: str) -> Bundle:
            if against is not None:
                return Bundle.open(against)
            return exported_again(
                whole, Path(scratch) / dtype, model, dtype, lambda stage: notify(f"bisecting: {stage}")
            )

        located = locate(
            bundle,
            recorder.recordings,
            options.open_graph,
            sound,
            tolerance,
            on_backend=_inner_on(backend.name),
            modules=lambda step: module_outputs(reference, inputs, step),
            against="the same graph exported again" if against is None else str(against),
        )
        if located is None:
            return {"line": NOTHING}
        command = write_folder(located, folder, tolerance, backend.name)
        return {"folder": str(folder), **facts(located, tolerance, command)}


def _inner_on(backend: str) -> Any:
    """How a backend runs a graph with inner values as outputs; None for engines that are built."""
    import onnxruntime

    from dipgo_deploy.backends.onnxruntime_cuda import PROVIDERS
    from dipgo_deploy.compare.inner import run_with

    return run_with(onnxruntime.SessionOptions(), PROVIDERS[backend]) if backend in PROVIDERS else None
