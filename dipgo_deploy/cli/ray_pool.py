"""``dipgo-run --prompts FILE --ray``: the rows of a file drawn by workers on one machine or many, with Ray Data.

A worker is an actor that opens the engine directory once. What is drawn together is one task. A task whose worker ends
is given to another, which writes what is still missing. A file appears whole or not at all: nothing is lost, and what
is there is not drawn again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from dipgo_deploy._version import __version__
from dipgo_deploy.bundle.files import hash_tree, sha256_file
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.cli.many import Drawing, Plan, check_rows, draw_call, missing
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.files import remove_unfinished
from dipgo_deploy.runtime.prompt_rows import Job

if TYPE_CHECKING:
    from dipgo_deploy.runtime.pipeline import Pipeline

TRIES = 4
"""How often a task whose worker ends is begun before it is put aside."""
_MOST_TASKS = 10_000  # Ray holds all of them at once
_STORE_BYTES = 256 * 2**20  # of Ray's object store on this machine; rows go through it, pictures do not


@dataclass(frozen=True)
class Pool:
    """Which workers are asked for.

    Attributes:
        address: ``local``, ``auto`` or that of a cluster, as Ray has it.
        concurrency: number of workers; None: as many as the machines have room for.
        num_cpus: of each; None: all of a machine's.
        num_gpus: of each, also a part of one; None: one where there are any and the backend may use them.
    """

    address: str
    concurrency: int | None = None
    num_cpus: int | None = None
    num_gpus: float | None = None


@dataclass(frozen=True)
class Opening:
    """What is opened: the arguments of ``Pipeline.from_engine_dir``."""

    engine_dir: Path
    options: Mapping[str, Any]

    def absolute(self) -> Opening:
        """With paths that hold wherever a process works."""
        loras = [(Path(file).absolute(), *rest) for file, *rest in self.options["lora"]]
        return Opening(self.engine_dir.absolute(), {**self.options, "lora": loras})

    def digest(self, manifest: Manifest) -> str:
        """Of all that decides a picture and is read from files: this program, the engine directory and the LoRAs.

        Raises:
            UserError: a LoRA cannot be read.
        """
        parts = [__version__, manifest.dumps()]
        for choice in self.options["lora"]:
            path = Path(choice[0])
            try:
                parts.append(str(sorted(hash_tree(path).items())) if path.is_dir() else sha256_file(path))
            except OSError as error:
                raise UserError(f"--lora {path}: cannot be read ({error.strerror or error})") from None
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What came of a run. failed: what was wrong, by the row's index. workers: how many were asked for."""

    failed: Mapping[int, str]
    workers: int


@dataclass(frozen=True)
class _Work:
    """What all workers are given. mark: a file in the folder of the pictures, by which they know it."""

    opening: Opening
    drawing: Drawing
    digest: str
    mark: Path


class _Worker:
    """Draws the rows of one task after another. What is wrong with a row is told, not raised: Ray would try again."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._wrong = ""
        try:
            self._pipeline = _opened(work)
        except Exception as error:  # whatever it is, it is the same for every row
            self._wrong = f"--ray: worker on {os.uname().nodename}: {_said(error)}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        calls: list[tuple[Job, ...]] = [pickle.loads(data) for data in batch["call"]]
        rows = [row for call in calls for row in self._draw(call)]
        return {
            "index": np.array([index for index, _ in rows]),
            "error": np.array([error for _, error in rows], object),
            "wrong": np.array([self._wrong] * len(rows), object),
        }

    def _draw(self, call: tuple[Job, ...]) -> list[tuple[int, str]]:
        """Index of each row, and what was wrong with it. Where a call fails, its rows are drawn one by one."""
        if self._wrong:
            return [(job.index, "") for job in call]
        try:
            draw_call(self._pipeline, call, self._work.drawing)
        except Exception as error:
            if len(call) == 1:
                return [(call[0].index, _said(error))]
            return [row for job in call for row in self._draw((job,))]
        return [(job.index, "") for job in call]


def _opened(work: _Work) -> Pipeline:
    """The pipeline of a worker; raises UserError where it would draw something else, or into another folder."""
    from dipgo_deploy.runtime.pipeline import Pipeline

    if not work.mark.exists():
        raise UserError(f"{work.mark.parent} is another folder there; give --output on storage that all machines share")
    pipeline = Pipeline.from_engine_dir(work.opening.engine_dir, **work.opening.options)
    if work.opening.digest(pipeline.bundle.manifest) != work.digest:
        raise UserError(
            f"{work.opening.engine_dir}, a LoRA or the version of dipgo_deploy is another there; copy them everywhere"
        )
    return pipeline


def _said(error: Exception) -> str:
    return one_line(error if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def draw(
    pool: Pool,
    opening: Opening,
    manifest: Manifest,
    plan: Plan,
    drawing: Drawing,
    *,
    started: Callable[[str], None],
    done: Callable[[int], None],
) -> Outcome:
    """Draw every row into its file, as ``many.draw`` does, on Ray's workers.

    started: told the workers in one line before the first row. done: told the number of rows after each task.

    Raises:
        UserError: a row that the engine directory does not take, found before anything is started; no Ray at the
            address, no room for a worker, or a worker that cannot open the engine directory.
    """
    check_rows(manifest, plan, drawing)
    opening = opening.absolute()
    digest = opening.digest(manifest)
    if not plan.calls:
        return Outcome({}, 0)
    with _quiet_core(), _connected(pool.address) as machines:
        cpus, gpus, workers = _sized(pool, machines, str(opening.options["backend"]), len(plan.calls))
        if opening.options["threads"] is None and pool.num_cpus is not None:
            opening = replace(opening, options={**opening.options, "threads": cpus})
        share = f"{cpus} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
        started(f"{workers} worker(s) with {share} each, on {len(machines)} machine(s)")
        plan.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=plan.folder.absolute(), prefix=".dipgo-run-") as mark:
            work = _Work(opening, drawing, digest, Path(mark.name))
            failed = _run_on(work, plan, cpus, gpus, workers, done)
        remove_unfinished(plan.folder, {job.path.name for call in plan.calls for job in call})
        return Outcome(dict(sorted(failed.items())), workers)


def _run_on(
    work: _Work, plan: Plan, cpus: int, gpus: float, workers: int, done: Callable[[int], None]
) -> dict[int, str]:
    """Draw until nothing is left or no worker lives to finish any of it; what was wrong, by the row's index."""
    calls = [tuple(replace(job, path=job.path.absolute()) for job in call) for call in plan.calls]
    errors: dict[int, str] = {}
    left = {job.index for call in calls for job in missing(call, overwrite=plan.overwrite)}
    while left:
        found, lost = _run(work, calls, left, cpus, gpus, min(workers, len(calls)), done)
        errors |= found
        if len(lost) == len(left):
            return errors | dict.fromkeys(lost, f"{TRIES} workers and more ended over it (killed, or out of memory?)")
        left = lost
        calls = [call for call in calls if any(job.index in left for job in call)]
    return errors


def _run(
    work: _Work,
    calls: Sequence[tuple[Job, ...]],
    left: Collection[int],
    cpus: int,
    gpus: float,
    workers: int,
    done: Callable[[int], None],
) -> tuple[dict[int, str], set[int]]:
    """Draw with workers of a size: of the rows that are left, what was wrong and those whose workers ended."""
    import ray.data
    import ray.exceptions

    _settle()
    rows = ray.data.from_items(
        [{"call": pickle.dumps(call)} for call in calls], override_num_blocks=min(len(calls), _MOST_TASKS)
    )
    with warnings.catch_warnings():
        # The retries are said to become no argument in 2.64, which the extra excludes.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        drawn = rows.map_batches(
            _Worker,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="numpy",
            # One task at a time: what a worker holds is begun again when it ends.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
        )
    errors: dict[int, str] = {}
    lost = set(left)
    try:
        # Closed, Ray Data ends what is under way.
        with closing(iter(drawn.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))) as results:
            for result in results:
                for index, error, wrong in zip(result["index"].tolist(), result["error"], result["wrong"], strict=True):
                    if wrong:
                        raise UserError(wrong)
                    if index not in lost:  # there before, and only drawn with another
                        continue
                    lost.remove(index)
                    if error:
                        errors[index] = error
                    done(1)
    except ray.exceptions.RayError as error:
        raise UserError(f"--ray: {error}") from None
    return errors, lost


@contextmanager
def _connected(address: str) -> Iterator[list[dict[str, float]]]:
    """Ray's machines, each with what it has of ``CPU`` and ``GPU``; a Ray that is started here ends with the block.

    Raises:
        UserError: no Ray at the address.
    """
    if address.startswith("ray://"):
        raise UserError(f"--ray {address}: run the command on a machine of the cluster, with --ray auto")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ours = not ray.is_initialized()
    if ours:
        _reached(address)
        local = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address == "auto" and isinstance(error, ConnectionError):
                raise UserError("--ray auto: no Ray is running here; start one with `ray start`") from None
            raise UserError(f"--ray {address}: {error}{_why(error)}") from None
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    finally:
        if ours:
            ray.shutdown()


def _why(error: BaseException) -> str:
    """What an error of Ray's comes from, which it often does not say, in brackets; without tracebacks in it."""
    first = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    lines = str(first).splitlines()
    behind = max((place for place, text in enumerate(lines, 1) if text.startswith(" ")), default=0)
    return "" if first is error else f" ({' '.join(lines[behind:])})"


def _reached(address: str) -> None:
    """Refuse (UserError) an address at which nothing answers: Ray tries for minutes."""
    if address in ("local", "auto"):
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and len(port) < 6):
        raise UserError(f"--ray {address}: give local, auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray {address}: cannot be reached ({error})") from None


@contextmanager
def _quiet_core() -> Iterator[None]:
    """Ray's core writes to descriptor 2 what its log has too; what Python writes to stderr still gets there."""
    python, kept = sys.stderr, os.dup(2)
    try:
        if _descriptor(python) == 2:
            sys.stderr = os.fdopen(kept, "w", 1, encoding=python.encoding, errors=python.errors, closefd=False)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        sys.stderr = python
        os.close(kept)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file
        return None


def _sized(pool: Pool, machines: list[dict[str, float]], backend: str, tasks: int) -> tuple[int, float, int]:
    """CPUs and GPUs of a worker, and the number of workers; raises UserError where not one has room."""
    some = any(machine.get("GPU") for machine in machines)
    gpus = pool.num_gpus
    if gpus is None:
        gpus = float(backend in ("cuda", "tensorrt", "tensorrt-rtx") or (backend == "auto" and some))
    cpus = pool.num_cpus
    if cpus is None:
        cpus = 1 if gpus else int(min((machine["CPU"] for machine in machines), default=1))
    room = 0
    for machine in machines:
        fits = machine["CPU"] // cpus
        room += int(min(fits, math.floor(machine.get("GPU", 0) / gpus)) if gpus else fits)
    if not room:
        wanted = f"{cpus} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
        raise UserError(f"--ray {pool.address}: no machine has {wanted}; give --ray-num-cpus or --ray-num-gpus")
    return cpus, gpus, min(pool.concurrency or room, tasks)


def _settle() -> None:
    """Settings of Ray Data: what goes wrong is told by the command."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A task that is put aside is left out; its rows are then missing.
    context.max_errored_blocks = -1
