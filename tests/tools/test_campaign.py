"""The campaign counts what is planted: each kind of fault once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dipgo_deploy.schedule.document import Schedule
from tools.campaign import kills, worker
from tools.campaign.kinds import importers, safetensors
from tools.campaign.kinds.schedules import Schedules, as_written
from tools.campaign.material import Material, link_tree
from tools.campaign.mutate import as_text, change_bytes, change_json
from tools.campaign.report import Counts, line, page
from tools.campaign.verdict import MIB, Ran, Result, Verdict

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Planted:
    """Every document is the same; what the command does is planted."""

    name: str = "planted"

    def trial(self, random: np.random.Generator, folder: Path) -> worker.Trial:
        (folder / "document").write_bytes(b"")
        return worker.Trial("planted", [["x"]], lambda ran: (Verdict.SILENT, "other"), outputs=("out",))


def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Main, *, count: int = 1, limit: float = 60
) -> list[Result]:
    monkeypatch.setattr(worker, "dipgo", main)
    found = worker.try_all(Planted(), count, seed=0, folder=tmp_path, limit=limit)
    return sorted(found, key=lambda result: result.index)


def refuse(argv: Sequence[str]) -> int:
    print("error: document: no good", file=sys.stderr)
    return 2


def in_two_lines(argv: Sequence[str]) -> int:
    print("warning: look", file=sys.stderr)
    return refuse(argv)


def with_an_escape(argv: Sequence[str]) -> int:
    print("error: \x1b[31m", file=sys.stderr)
    return 2


def trip(argv: Sequence[str]) -> int:
    raise KeyError("planted")


def trip_elsewhere(argv: Sequence[str]) -> int:
    print("Traceback (most recent call last):\n  in a thread", file=sys.stderr)
    return 1


def sleep(argv: Sequence[str]) -> int:
    time.sleep(60)
    return 0


def spin(argv: Sequence[str]) -> int:
    while True:
        pass


def die(argv: Sequence[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def accept(argv: Sequence[str]) -> int:
    Path("out").touch()
    return 0


@pytest.mark.parametrize(
    ("main", "verdict"),
    [
        (refuse, Verdict.REFUSED),
        (in_two_lines, Verdict.UNTIDY),
        (with_an_escape, Verdict.UNTIDY),
        (trip, Verdict.TRACEBACK),
        (trip_elsewhere, Verdict.TRACEBACK),
        (sleep, Verdict.HANG),
        (spin, Verdict.HANG),
        (die, Verdict.DIED),
        (accept, Verdict.SILENT),
    ],
)
def test_what_is_planted_is_counted(
    main: Main, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = planted(tmp_path, monkeypatch, main, limit=1.5 if main in (sleep, spin) else 60)
    assert result.verdict is verdict, result.detail
    assert result.fault == (verdict is not Verdict.REFUSED)
    assert not result.left


def test_documents_behind_one_that_hangs_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "hung"

    def hang_once(argv: Sequence[str]) -> int:
        if not marker.exists():
            marker.touch()
            time.sleep(60)
        return refuse(argv)

    results = planted(tmp_path / "work", monkeypatch, hang_once, count=4, limit=1.5)
    assert [result.verdict for result in results] == [Verdict.HANG, *[Verdict.REFUSED] * 3]
    assert results[0].label == "planted"


def test_files_that_a_refusal_leaves_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(argv: Sequence[str]) -> int:
        Path(".out.partial").touch()
        return accept(argv) and 0 or refuse(argv)

    (result,) = planted(tmp_path, monkeypatch, leave)
    assert result.left == (".out.partial", "out") and result.fault and result.verdict is Verdict.REFUSED


def test_a_refusal_that_takes_much_memory_or_time_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swell(argv: Sequence[str]) -> int:
        np.ones(520 * MIB, np.uint8)
        return refuse(argv)

    (result,) = planted(tmp_path, monkeypatch, swell)
    assert result.heavy and result.fault and not result.slow
    assert Result("kind", 0, "", Verdict.REFUSED, seconds=5.1).slow
    assert not Result("kind", 0, "", Verdict.VALID, seconds=5.1).fault


def test_a_schedule_read_as_something_else_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "dipgo_deploy/assets/schedules/fashion-dit-uniform5.json"
    original = path.read_bytes()
    text = as_text({**json.loads(original), "provenance": {"method": "mine"}})
    assert as_written(original, original, Ran(0)) == (Verdict.SAME, "")
    assert as_written(text, original, Ran(0)) == (Verdict.VALID, "")
    assert as_written(text.replace(b"{", b'{"steps": 1, ', 1), original, Ran(0))[0] is Verdict.SILENT
    other = Schedule.load(path)
    monkeypatch.setattr(Schedule, "from_json", lambda text: other)
    assert as_written(text, original, Ran(0))[0] is Verdict.SILENT


def test_the_readers_that_judge_find_what_is_wrong() -> None:
    header, data = safetensors.parts({"a": np.ones((2, 2), np.float32), "b": np.zeros(1, np.float32)})
    content = safetensors.assemble(json.dumps(header).encode(), data)
    assert {name: array.tolist() for name, array in safetensors.read_strictly(content).items()} == {
        "a": [[1, 1], [1, 1]],
        "b": [0],
    }
    for change in ({"shape": [2]}, {"data_offsets": [12, 16]}, {"data_offsets": [16, 24]}, {"shape": [-1]}):
        wrong = json.dumps({**header, "b": {**header["b"], **change}}).encode()
        with pytest.raises(ValueError):
            safetensors.read_strictly(safetensors.assemble(wrong, data))
    with pytest.raises(ValueError):
        safetensors.read_strictly(content + b"\0")
    gates = np.ones((2, 4), int)
    assert importers.judged("csv", b"1,1,1,1\n1,1,1,1\n", gates, ["1111", "1111"])[0] is Verdict.SAME
    assert importers.judged("csv", b"1,1,1,1\n1,1,1,0\n", gates, ["1111", "1111"])[0] is Verdict.SILENT
    assert importers.judged("smoothcache", b'{"attn": [1, 2], "mlp": [1, 1]}', gates, ["1111"] * 2)[0] is Verdict.SILENT


def test_documents_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    document = {"a": [1, 2.5, {"b": "text"}], "c": None}
    for change in (lambda random: change_json(document, random), lambda random: change_bytes(b"0123456789", random)):
        found = [[change(np.random.default_rng(seed)) for seed in range(100)] for _ in range(2)]
        assert found[0] == found[1]
        assert len({content for _, content in found[0]}) > 50
    assert b'"a": [' in as_text(document)


def test_every_document_is_made(tmp_path: Path) -> None:
    material = Material(tmp_path)
    assets = Path(__file__).parents[2] / "dipgo_deploy" / "assets"
    for path in (material.class_schedule, material.fitted_schedule):
        shutil.copy(assets / "schedules" / "fashion-dit-uniform5.json", path)
    for index in range(50):
        folder = tmp_path / str(index)
        folder.mkdir()
        Schedules(material).trial(np.random.default_rng(index), folder)
        assert (folder / "schedule.json").is_file()


def test_own_files_of_a_linked_tree_are_not_the_originals(tmp_path: Path) -> None:
    (tmp_path / "source" / "graphs").mkdir(parents=True)
    for name in ("manifest.json", "graphs/a"):
        (tmp_path / "source" / name).write_text("before")
    link_tree(tmp_path / "source", tmp_path / "copy", ["graphs/a"])
    (tmp_path / "copy" / "graphs" / "a").write_text("after")
    assert (tmp_path / "source" / "graphs" / "a").read_text() == "before"
    assert (tmp_path / "copy" / "manifest.json").samefile(tmp_path / "source" / "manifest.json")


def whole(work: Path) -> None:
    if (work / "out").exists() and (work / "out").read_text() != "whole":
        raise kills.BrokenError("half")


WRITE = kills.Command("planted", (), lambda work: (work / "out").unlink(missing_ok=True), whole, ("out",))


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, main: Main, number: signal.Signals) -> Result:
    """The command is stopped while it sleeps."""
    monkeypatch.setattr(kills, "dipgo", main)
    monkeypatch.setattr(kills, "_GRACE", 0.5)
    (folder / "work").mkdir(parents=True)
    return kills.stop(WRITE, 0, number, 0.5, folder, clean=True)


def write_slowly(argv: Sequence[str]) -> int:
    Path("out").write_text("ha")
    time.sleep(60)
    return 0


def write_aside(argv: Sequence[str]) -> int:
    Path(".out.partial").write_text("ha")
    time.sleep(60)
    return 0


def ignore(argv: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return write_aside(argv)


def test_what_a_stopped_command_leaves_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = stopped(tmp_path / "slowly", monkeypatch, write_slowly, signal.SIGKILL)
    assert half.verdict is Verdict.SILENT and half.fault and "half" in half.detail
    answered = stopped(tmp_path / "aside", monkeypatch, write_aside, signal.SIGTERM)
    assert answered.verdict is Verdict.SAME and answered.left == (".out.partial",) and answered.fault
    # Nothing can clean up then; the next whole run has to.
    assert not stopped(tmp_path / "killed", monkeypatch, write_aside, signal.SIGKILL).fault
    assert stopped(tmp_path / "ignored", monkeypatch, ignore, signal.SIGTERM).verdict is Verdict.HANG


def test_a_command_is_stopped_as_often_as_asked_and_then_has_to_clean_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(argv: Sequence[str]) -> int:
        if argv:
            for part in Path().glob(".out.*"):
                part.unlink()
        aside = Path(f".out.{os.getpid()}")
        aside.write_text("whole")
        threading.Event().wait(0.5)
        aside.rename("out")
        return 0

    def until_it_writes(seconds: float) -> None:
        """In place of a random time, which may be over before a busy machine has started the command."""
        end = time.monotonic() + (10 if seconds > 0.02 else seconds)
        while time.monotonic() < end and not any(tmp_path.glob("*/work/.out.*")):
            threading.Event().wait(0.005)

    monkeypatch.setattr(kills, "dipgo", write)
    monkeypatch.setattr(kills.time, "sleep", until_it_writes)
    monkeypatch.setattr(kills, "_SIGNALS", (signal.SIGKILL,))
    monkeypatch.setattr(kills, "_CHAIN", 3)
    results = list(kills.kill(WRITE, 5, seed=0, folder=tmp_path / "never"))
    assert {result.index for result in results} == set(range(5))
    left = [result for result in results if result.fault]
    assert len(left) == 2 and all(result.label == "run to its end" and result.left for result in left)
    cleans = replace(WRITE, argv=("clean",))
    assert not any(result.fault for result in kills.kill(cleans, 5, seed=0, folder=tmp_path / "cleans"))


def test_the_counts_are_one_line_and_a_page() -> None:
    counts = Counts("kind", [Result("kind", 0, "a", Verdict.REFUSED), Result("kind", 1, "b", Verdict.HANG, "x", 30.0)])
    facts = counts.facts()
    assert facts["documents"] == 2 and facts["faults"] == 1 and [row["index"] for row in facts["shown"]] == [1]
    assert "1 refused in one line" in line(facts) and "1 hangs" in line(facts) and "\n" not in line(facts)
    machine = {"processor": "p", "cores": 1, "threads": 1, "load_average": 0.0, "system": "s", "python": "3"}
    whole = {"command": "c", "seed": 0, "seconds": 1.0, "version": "0", "machine": {**machine, "packages": {}}}
    text = page({**whole, "kinds": [facts]})
    assert "| kind | 2 |" in text and "## Faults" in text
    assert "No faults." in page({**whole, "kinds": [Counts("kind").facts()]})


def test_the_short_form_finds_no_fault(tmp_path: Path) -> None:
    """What is recorded in docs/results/reliability.md, a hundredth of it."""
    given = ["--share", "0.01", "--no-kills", "--json", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.campaign", *given],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    kinds = json.loads(done.stdout)["kinds"]
    assert sum(kind["documents"] for kind in kinds) > 100 and len(kinds) == 12
    assert [kind["shown"] for kind in kinds if kind["faults"]] == []
    assert done.returncode == 0
