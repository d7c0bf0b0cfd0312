"""``dipgo-triton``: an engine directory in a model repository for NVIDIA Triton."""

from __future__ import annotations

from pathlib import Path

import click

from dipgo_deploy.cli.common import emit, entry_point, examples, human_console, json_option
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    backend_option,
    batch_window_option,
    engine_dir_option,
    max_queue_option,
    option,
    threads_option,
    version_option,
)


@click.command(
    name="dipgo-triton",
    cls=Command,
    epilog=examples(
        "dipgo-triton --engine-dir engines/fashion-sd -o repository",
        "dipgo-triton --engine-dir engines/fashion-sd -o repository --name clothes --copy --backend cuda",
    ),
)
@engine_dir_option
@backend_option
@threads_option("the physical cores")
@batch_window_option
@max_queue_option("Requests that may wait; Triton refuses more.")
@option("Output", "-o", "--repository", type=PATH, required=True, help="Folder of the model repository.")
@option("Output", "--name", show_default="the engine directory's", help="Name of the model.")
@option(
    "Output",
    "--copy",
    is_flag=True,
    help="Put a copy of the engine directory into the repository, which can be moved then; else its path is written "
    "down.",
)
@json_option
@version_option
def command(
    engine_dir: Path,
    backend: str,
    threads: int | None,
    batch_window: float,
    max_queue: int,
    repository: Path,
    name: str | None,
    copy: bool,
    as_json: bool,
) -> None:
    """Put an engine directory into a model repository for NVIDIA Triton. Needs no torch.

    The model runs in Triton's Python backend, whose Python has to have this package. Its inputs and outputs are those
    of the engine directory, and Triton batches requests up to the directory's batch.
    """
    from dipgo_deploy.serve.settings import Drawing
    from dipgo_deploy.serve.triton import write_repository

    drawing = Drawing(backend=backend, threads=threads, window=batch_window, max_queue=max_queue)
    target = write_repository(repository, engine_dir, name=name, copy=copy, drawing=drawing)
    human_console(as_json).print(f"{target}: model {target.name}", markup=False, soft_wrap=True)
    emit({"model": target.name, "folder": str(target)}, as_json)


main = entry_point(command)
