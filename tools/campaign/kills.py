"""Commands stopped at random times. What they write is then whole or as it was, and in the end nothing else is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.main import main as dipgo
from dipgo_deploy.schedule.document import Schedule
from tools.campaign.material import CLASS_RUN, Material, run_arguments
from tools.campaign.mutate import pick
from tools.campaign.verdict import MAX_LINE, Result, Verdict
from tools.campaign.worker import print_into, run_caught

# Half of them cannot be answered by the process; the others can, and then have to leave nothing behind at once.
_SIGNALS = (
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
)
# Kills in one folder until a command there runs to its end.
_CHAIN = 8
_GRACE = 30.0


@dataclass(frozen=True)
class Command:
    """A command that writes into a folder. begin: makes the folder what it is before the command; check: raises for
    what is broken in it; known: names that may be there, whether it was stopped or not."""

    name: str
    argv: tuple[str, ...]
    begin: Callable[[Path], None]
    check: Callable[[Path], None]
    known: tuple[str, ...]

    @property
    def row(self) -> str:
        """For the table."""
        return f"kills: {self.name}"


class BrokenError(Exception):
    """What a stopped command left is neither whole nor as it was."""


def commands(material: Material) -> list[Command]:
    """The commands that are stopped."""
    model = ("--model", str(material.class_model))
    export = ("export", *model, "--schedule", str(material.class_schedule), "--engine-dir", "engine")
    build = ("build", "--engine-dir", "engine", "--backend", "tensorrt-rtx", "--compute-capability", "8.6")
    search: tuple[str, ...] = ("search", *model, "--steps", "4", "--prune-ratio", "0.55", "--method", "dipgo")
    search += ("--iterations", "4", "--images", "1", "--budget", "2", "--save-every", "1", "--threads", "1")
    search += ("--checkpoint", "state", "-o", "out.json")

    calibrate: tuple[str, ...] = ("calibrate", *model, "--schedule", str(material.class_schedule), "-o", "out.json")
    calibrate += ("--images", "8", "--batch", "2", "--threads", "1", "--checkpoint", "state", "--resume")

    def no_engine(folder: Path) -> None:
        shutil.rmtree(folder / "engine", ignore_errors=True)

    def an_engine(folder: Path) -> None:
        if not (folder / "engine").exists():
            shutil.copytree(material.class_engine, folder / "engine")

    def no_plans(folder: Path) -> None:
        an_engine(folder)
        shutil.rmtree(folder / "engine" / "plans", ignore_errors=True)

    def no_schedule(folder: Path) -> None:
        (folder / "out.json").unlink(missing_ok=True)

    def engine_or_none(folder: Path) -> None:
        if (folder / "engine").exists():
            engine(folder)

    def engine(folder: Path) -> None:
        Bundle.open(folder / "engine", verify=True).load_schedule()
        if dipgo(run_arguments("engine", CLASS_RUN)):
            raise BrokenError("the engine directory does not run")
        pictures = np.load(folder / "out.npy")
        (folder / "out.npy").unlink()
        if not np.array_equal(pictures, material.reference("class")):
            raise BrokenError("the engine directory draws another picture")

    def schedule_or_none(folder: Path) -> None:
        if (folder / "out.json").exists():
            Schedule.load(folder / "out.json")

    return [
        Command("export", export, no_engine, engine_or_none, ("engine",)),
        Command("export --overwrite", (*export, "--overwrite", "--no-check"), an_engine, engine, ("engine",)),
        Command("build", build, no_plans, engine, ("engine",)),
        Command("search", search, no_schedule, schedule_or_none, ("out.json", "state")),
        Command("calibrate", calibrate, no_schedule, schedule_or_none, ("out.json", "state")),
    ]


def kill(command: Command, count: int, *, seed: int, folder: Path) -> Iterator[Result]:
    """Stop the command ``count`` times, at times that are even over the time that it takes.

    A result is ``same`` where what is there is whole, or as it was; ``left`` has what should not be there: at once
    after a signal that a process can answer, and after ``kill -9`` when the command next runs to its end.
    """
    random = np.random.default_rng([seed, *command.name.encode()])
    _fresh(folder)
    first, duration = _whole(command, folder, 0)
    if first.fault:
        yield first
    for start in range(0, count, _CHAIN):
        _fresh(folder)
        hard = False
        for index in range(start, min(start + _CHAIN, count)):
            number, moment = pick(random, _SIGNALS), float(random.uniform(0, duration))
            yield stop(command, index, number, moment, folder, clean=not hard)
            hard = hard or number == signal.SIGKILL
        last, _ = _whole(command, folder, min(start + _CHAIN, count) - 1)
        if last.fault:
            yield last
    shutil.rmtree(folder, ignore_errors=True)


def _whole(command: Command, folder: Path, index: int) -> tuple[Result, float]:
    """The command run to its end, and the seconds that took."""
    command.begin(folder / "work")
    start = time.monotonic()
    status = os.waitpid(_start(command, folder), 0)[1]
    seconds = time.monotonic() - start
    verdict, detail = _state(command, folder)
    if status:
        verdict, detail = Verdict.SILENT, f"run to its end after kills: status {status}: {_printed(folder)}"
    left = _left(command, folder)
    return Result(command.row, index, "run to its end", verdict, detail, seconds, left=left), seconds


def stop(command: Command, index: int, number: signal.Signals, moment: float, folder: Path, *, clean: bool) -> Result:
    """Start the command, send it the signal after ``moment`` seconds, and look. clean: nothing was left before."""
    label = f"{number.name} after {moment:.2f} s"
    command.begin(folder / "work")
    pid = _start(command, folder)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        # As `kill` does: one process. A terminal and the kernel's last resort take all of them.
        (os.kill if number in (signal.SIGTERM, signal.SIGHUP) else os.killpg)(pid, number)
    start = time.monotonic()
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() - start > _GRACE:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Result(command.row, index, label, Verdict.HANG, f"still there after {_GRACE:g} s", _GRACE)
        time.sleep(0.02)
    os.waitpid(pid, 0)
    seconds = time.monotonic() - start
    left = () if number == signal.SIGKILL or not clean else _left(command, folder)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        if number != signal.SIGKILL:
            left = (*left, "a process")
    printed = _printed(folder)
    if "Traceback (most recent call last)" in printed:
        return Result(command.row, index, label, Verdict.TRACEBACK, printed[-MAX_LINE:], seconds, left=left)
    verdict, detail = _state(command, folder)
    return Result(command.row, index, label, verdict, detail, seconds, left=left)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)


def _start(command: Command, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(folder / "work")
        print_into(folder / "printed", folder / "printed")
        with open(1, "w", closefd=False) as stdout, open(2, "w", closefd=False) as stderr:
            sys.stdout, sys.stderr = stdout, stderr
            try:
                status = dipgo(command.argv)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def _printed(folder: Path) -> str:
    path = folder / "printed"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _state(command: Command, folder: Path) -> tuple[Verdict, str]:
    """Look in a process of its own, which may load graphs."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder / "work")

            def look() -> int:
                command.check(folder / "work")
                return 0

            ran = run_caught(look, folder)
            (folder / "state.json").write_text(json.dumps([ran.status, (ran.traceback or ran.err)[-MAX_LINE:]]))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    status, detail = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    return (Verdict.SAME, "") if status == 0 else (Verdict.SILENT, detail)


def _left(command: Command, folder: Path) -> tuple[str, ...]:
    """What is in the folder and should not be: names that nobody asked for, and parts of files at any depth."""
    work = folder / "work"
    unknown = {path.name for path in work.iterdir()} - set(command.known)
    # A lock is a file that stays, so that two processes that want it mean the same one.
    parts = {path.relative_to(work).as_posix() for path in work.rglob(".*") if not path.name.endswith("lock")}
    return tuple(sorted(unknown | parts))
