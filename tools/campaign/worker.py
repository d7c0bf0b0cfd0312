"""Documents are tried in forked processes of one that has imported everything: a few milliseconds each.

A process tries one after the other and reports each; one that hangs or dies is replaced, and goes on behind the
document that did it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dipgo_deploy.cli.main import main as dipgo
from dipgo_deploy.errors import UserError
from tools.campaign.verdict import Ran, Result, Verdict, refusal

PRELOADED = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "safetensors.numpy",
    "tokenizers",
    "PIL.Image",
    "rich.console",
    *(f"dipgo_deploy.cli.{verb}" for verb in ("schedule", "search", "calibrate", "export", "build", "run", "compare")),
    "dipgo_deploy.runtime.pipeline",
    "dipgo_deploy.export.exporter",
    "dipgo_deploy.models.target",
    "dipgo_deploy.lora.merge",
)
# Documents of one process: what it keeps between them stays small.
BATCH = 40
# Address space that a document may take beyond what the process has; more is a MemoryError.
ADDRESS_SPACE = 6 * 2**30


@dataclass(frozen=True)
class Trial:
    """One document, written into its folder: the commands that read it, and the verdict where all end with status 0.

    outputs: names in the folder that they may write. prepare: what comes before them and belongs to the trial. marks:
    what else is to be counted of another valid document.
    """

    label: str
    commands: Sequence[Sequence[str]]
    accepted: Callable[[Ran], tuple[Verdict, str]]
    outputs: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    marks: Callable[[Ran], tuple[str, ...]] = lambda ran: ()


class Kind(Protocol):
    """A kind of document."""

    @property
    def name(self) -> str:
        """For the table."""

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """Write one changed document into ``folder``, which is empty."""


def preload() -> None:
    """Import what the commands import, so that a forked process need not."""
    with contextlib.suppress(ModuleNotFoundError):
        for name in PRELOADED:
            importlib.import_module(name)
    # The parent's objects are not visited again: forked processes share their pages.
    gc.collect()
    gc.freeze()


def run_caught(call: Callable[[], int], folder: Path) -> Ran:
    """Call what returns an exit status, with what it prints caught; ``folder`` takes the two files that catch it."""
    out, err = folder / "stdout", folder / "stderr"
    before = _reset_peak()
    start = _processor_seconds()
    status, trace = None, ""
    with _redirected(out, err):
        try:
            status = call()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except BaseException:
            trace = traceback.format_exc(limit=-6)
    seconds = _processor_seconds() - start
    memory = max(0, _memory("VmHWM") - before)
    printed, said = (path.read_text(encoding="utf-8", errors="backslashreplace") for path in (out, err))
    return Ran(status, printed, said, traceback=trace, seconds=seconds, memory=memory)


def judge(kind: str, index: int, trial: Trial, ran: Ran) -> Result:
    """The verdict on a trial."""
    verdict, detail = trial.accepted(ran) if ran.status == 0 and not ran.traceback else refusal(ran)
    marks = trial.marks(ran) if verdict is Verdict.VALID else ()
    return Result(kind, index, trial.label, verdict, detail, ran.seconds, ran.memory, ran.left, marks)


def try_document(
    kind: Kind, seed: int, index: int, folder: Path, began: Callable[[str], None] = lambda label: None
) -> Result:
    """Make document ``index`` in a folder of its own, run its command there (``began`` is told before), and judge."""
    shutil.rmtree(folder, ignore_errors=True)
    inside = folder / "document"
    inside.mkdir(parents=True)
    trial = kind.trial(np.random.default_rng([seed, *kind.name.encode(), index]), inside)
    began(trial.label)
    os.chdir(inside)
    before = _names(inside)

    def call() -> int:
        if trial.prepare is not None:
            try:
                trial.prepare()
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        return next((status for status in map(dipgo, trial.commands) if status), 0)

    ran = run_caught(call, folder)
    expected = set(trial.outputs) if ran.status == 0 else set()
    left = tuple(sorted(_names(inside) - before - expected))
    with _redirected(folder / "stdout", folder / "stderr"):  # the stock pipeline prints as it judges
        result = judge(kind.name, index, trial, replace(ran, left=left))
    os.chdir(folder.parent)
    return result


def try_all(
    kind: Kind, count: int, *, seed: int, folder: Path, workers: int = 1, limit: float = 30.0
) -> Iterator[Result]:
    """The results of documents 0 to ``count`` - 1, in any order.

    limit: one hangs that takes so many seconds of processor time, or takes none for so many seconds: so a machine with
    other work makes no hangs.
    """
    waiting = deque(list(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH))
    selector = selectors.DefaultSelector()
    active: list[_Process] = []
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                free = next(slot for slot in range(workers) if all(slot != other.slot for other in active))
                process = _Process(kind, waiting.popleft(), seed, folder / f"worker{free}", free)
                active.append(process)
                selector.register(process.pipe, selectors.EVENT_READ, process)
            for key, _ in selector.select(timeout=0.2):
                yield from key.data.read()
            for process in list(active):
                if not process.ended and not process.hangs(limit):
                    continue
                selector.unregister(process.pipe)
                active.remove(process)
                yield from process.stop(hung=not process.ended, limit=limit)
                if process.left:
                    waiting.appendleft(process.left)
    finally:
        for process in active:
            process.stop(hung=True, limit=limit)
        selector.close()


class _Process:
    """A forked process that tries ``indices``; its pipe brings a line when one starts, and one when it is done."""

    def __init__(self, kind: Kind, indices: list[int], seed: int, folder: Path, slot: int) -> None:
        self.kind, self.slot = kind.name, slot
        self.left = list(indices)
        self.ended = False
        self._current: tuple[int, str] | None = None
        self._text = b""
        self.pipe, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self.pipe)
                _child(kind, indices, seed, folder, write)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        self._begin = self._used = 0.0
        self._moved = time.monotonic()

    def hangs(self, limit: float) -> bool:
        """Whether the document that it is at takes too long."""
        used = self._processor()
        if used != self._used:
            self._used, self._moved = used, time.monotonic()
        return used - self._begin > limit or time.monotonic() - self._moved > limit

    def _processor(self) -> float:
        """Seconds that it has used, with those of its children that have ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def read(self) -> list[Result]:
        """Results that have come."""
        data = os.read(self.pipe, 2**20)
        self.ended = not data
        *lines, self._text = (self._text + data).split(b"\n")
        found = []
        for line in lines:
            event = json.loads(line)
            self._begin = self._used = self._processor()
            if "start" in event:
                self._current = event["start"], event["label"]
                continue
            self._current = None
            self.left.remove(event["index"])
            found.append(Result.of_row(event))
        return found

    def stop(self, *, hung: bool, limit: float) -> list[Result]:
        """End it (with what it started); the document that it was at is a result."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        if self._current is None:
            if self.left and not hung:  # it could not even begin
                index = self.left.pop(0)
                return [Result(self.kind, index, "", Verdict.DIED, f"ended between documents, status {status}")]
            return []
        index, label = self._current
        self.left.remove(index)
        if hung:
            return [
                Result(
                    self.kind,
                    index,
                    label,
                    Verdict.HANG,
                    f"nothing done for, or no end within, {limit:g} s of processor time",
                    limit,
                )
            ]
        signalled = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {status >> 8}"
        return [Result(self.kind, index, label, Verdict.DIED, signalled)]


def _child(kind: Kind, indices: list[int], seed: int, folder: Path, write: int) -> None:
    os.setsid()
    size = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def send(event: dict[str, Any]) -> None:
        os.write(write, (json.dumps(event) + "\n").encode())

    def began(index: int, label: str) -> None:
        send({"start": index, "label": label})

    for index in indices:
        began(index, "its document was not made")
        try:
            result = try_document(kind, seed, index, folder, functools.partial(began, index))
        except BaseException:
            # A mistake of the campaign itself: shown, and never counted as one of the project's good ends.
            send(Result(kind.name, index, "", Verdict.DIED, "campaign: " + traceback.format_exc(limit=-4)).row())
            continue
        send(result.row())
    os.chdir("/")
    shutil.rmtree(folder, ignore_errors=True)


def _names(folder: Path) -> set[str]:
    """Files and folders directly in ``folder``, hidden ones too, and those one level below."""
    return {path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)}


@contextlib.contextmanager
def _redirected(out: Path, err: Path) -> Iterator[None]:
    """File descriptors 1 and 2 write into files: what libraries in C++ print is caught, too."""
    saved = os.dup(1), os.dup(2)
    try:
        print_into(out, err)
        with (
            open(1, "w", closefd=False) as stdout,
            open(2, "w", closefd=False) as stderr,
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            yield
    finally:
        for descriptor, number in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def print_into(out: Path, err: Path) -> None:
    """From now on this process prints into these files."""
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _processor_seconds() -> float:
    """Of this process and those it started, which other work on the machine does not change."""
    return sum(os.times()[:4])


def _reset_peak() -> int:
    """Let the peak of this process's memory begin anew; bytes that it has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field_name:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}")
