"""Rows of a file drawn by workers of Ray. Ray takes seconds to start: one start serves the quick tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_engine import Toy, build

from dipgo_deploy.cli import ray_pool
from dipgo_deploy.cli.common import missing_extra
from dipgo_deploy.cli.run import main
from dipgo_deploy.errors import UserError

GPUS, NONE = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}


def command(engine_dir: Path, *more: object) -> list[str]:
    return ["--engine-dir", str(engine_dir), "--threads", "1", "--backend", "cpu", *map(str, more)]


def rows_file(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def timeless(printed: str, folder: Path = Path("/data/pictures")) -> str:
    """What was printed of a folder, without its place and how long it took."""
    return re.sub(r"in [0-9.]+ s", "in a moment", printed.replace(str(folder.parent), "/data"))


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ray") / "toy", Toy(batch=2))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def test_workers_draw_what_one_process_draws(ray_here, toy_dir, tmp_path, capsys):
    """Byte for byte, also where a run goes on; what cannot be drawn is named at the end, and the rest is there."""
    rows = [{"prompt": "a bag", "guidance_scale": 2.0 + index % 2, "seed": index} for index in range(7)]
    given = command(toy_dir, "--prompts", rows_file(tmp_path / "rows.jsonl", *rows), "-o")
    assert main([*given, str(tmp_path / "serial")]) == 0
    folder = tmp_path / "pictures"
    (folder / "00005.png").mkdir(parents=True)  # cannot be replaced by a file; 1 and 3 are drawn with it
    kept = contents(tmp_path / "serial")
    capsys.readouterr()
    more = ["--ray", "--ray-num-cpus", "1", "--json"]
    assert main([*given, str(folder), *more, "--overwrite"]) == 1
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert (facts["drawn"], facts["skipped"], facts["workers"]) == (6, 0, 2)
    first = printed.err
    (fault,) = facts["failed"]
    assert fault["row"] == 5 and "00005.png: cannot be written (Is a directory)" in fault["error"]
    assert f"error: --prompts: row 5: {fault['error']}" in printed.err
    (folder / "00005.png").rmdir()
    (folder / "00002.png").unlink()
    (folder / ".00002.png.0123abcd.partial").write_bytes(b"of a worker that was killed")
    assert main([*given, str(folder), *more]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert (facts["drawn"], facts["skipped"], facts["failed"]) == (2, 5, [])
    page = (Path(__file__).parents[2] / "docs" / "howto" / "scale.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert [timeless(block) for block in shown] == [timeless(text, folder) for text in (first, printed.err)]
    assert contents(folder) == kept
    assert main([*given, str(folder), *more]) == 0
    assert json.loads(capsys.readouterr().out)["workers"] == 0


def test_a_worker_that_cannot_open_the_directory_ends_the_run(ray_here, toy_dir, tmp_path, capsys, monkeypatch):
    """One line, whatever the number of rows: here another program, as on a machine that was not brought up to date."""
    monkeypatch.setattr(ray_pool, "__version__", "0")
    file = rows_file(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert main(command(toy_dir, "--prompts", file, "-o", tmp_path / "many", "--ray")) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --ray: worker on ") and printed.count("\n") == 1
    assert "the version of dipgo_deploy is another there" in printed
    assert list((tmp_path / "many").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--ray"], "--ray: means nothing without --prompts"),
        (["--prompts", "{file}", "--ray-num-cpus", "1"], "--ray-num-cpus: means nothing without --ray"),
        (["--prompts", "{file}", "--ray", "ray://a:1"], "run the command on a machine of the cluster"),
        (["--prompts", "{file}", "--ray", "somewhere"], "--ray somewhere: give local, auto or HOST:PORT"),
        (["--prompts", "{file}", "--ray", "127.0.0.1:9"], "--ray 127.0.0.1:9: cannot be reached"),
        (["--prompts", "{file}", "--ray", "--guidance-scale", "0.5"], "row 0 (or one drawn with it): guidance_scale"),
    ],
)
def test_mistakes_start_nothing(toy_dir, tmp_path, capsys, monkeypatch, options, message):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("started"))
    file = rows_file(tmp_path / "rows.jsonl", {"prompt": "a"})
    folder = tmp_path / "many"
    words = [word.replace("{file}", str(file)) for word in options]
    assert main(command(toy_dir, *words, "-o", folder)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("pool", "machines", "backend", "size"),
    [
        (ray_pool.Pool("auto"), [NONE, NONE], "cpu", (8, 0.0, 2)),
        (ray_pool.Pool("auto", num_cpus=3), [NONE, GPUS], "cpu", (3, 0.0, 7)),
        (ray_pool.Pool("auto", num_cpus=3, concurrency=2), [NONE, GPUS], "cpu", (3, 0.0, 2)),
        (ray_pool.Pool("auto"), [NONE, GPUS], "auto", (1, 1.0, 4)),
        (ray_pool.Pool("auto", num_gpus=0.5), [GPUS], "tensorrt", (1, 0.5, 8)),
        (ray_pool.Pool("auto", num_cpus=8), [GPUS], "cuda", (8, 1.0, 2)),
        (ray_pool.Pool("auto"), [NONE], "auto", (8, 0.0, 1)),
    ],
)
def test_a_worker_has_a_gpu_or_a_machines_cores(pool, machines, backend, size):
    assert ray_pool._sized(pool, machines, backend, 100) == size
    assert ray_pool._sized(pool, machines, backend, 1)[2] == 1


def test_without_room_nothing_waits_forever():
    with pytest.raises(UserError, match="no machine has 9 CPU"):
        ray_pool._sized(ray_pool.Pool("local", num_cpus=9), [NONE], "cpu", 1)
    with pytest.raises(UserError, match=r"no machine has 1 CPU\(s\) and 1 GPU"):
        ray_pool._sized(ray_pool.Pool("local"), [NONE], "cuda", 1)


def test_why_ray_cannot_be_reached_is_said():
    error = ConnectionError("failed to connect")
    assert ray_pool._why(error) == ""
    error.__cause__ = RuntimeError('no client: Traceback:\n  File "x"\n    y()\nAuthenticationError: token missing\n')
    assert ray_pool._why(error) == " (AuthenticationError: token missing)"


def test_without_ray_the_extra_is_named():
    for module in ("ray", "pyarrow", "pandas"):
        assert "[ray]" in (missing_extra(ModuleNotFoundError("", name=module)) or "")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, whose pictures take long enough to be interrupted."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from dipgo_deploy.cli.export import main as export

    folder = tmp_path_factory.mktemp("model") / "dit"
    assert export(["--model", "fashion-dit", "--schedule", "fashion-dit-uniform5", "--engine-dir", str(folder)]) == 0
    return folder


def workers_of(process: int) -> list[int]:
    """Ids of the processes that are drawing, among those that a process has started."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
    known = {process}
    for _ in range(4):
        known |= {child for child, parent in parents.items() if parent in known}
    # Ray says in the title what a worker does.
    return [child for child in known if names.get(child, b"").startswith(b"ray::MapWorker(MapBatches(_Worker)).submit")]


def run_and_kill(words: list[str], kill: Callable[[list[int]], int]) -> tuple[int, str, int]:
    """Run the command while ``kill`` may end workers; its status, what it printed, and the number that was killed."""
    killed = 0
    process = subprocess.Popen(
        [sys.executable, "-m", "dipgo_deploy", "run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None:
        killed += kill(workers_of(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    return process.returncode, process.stdout.read(), killed


@pytest.mark.slow
def test_workers_may_be_killed_at_any_time(model_dir, tmp_path):
    """200 pictures on two workers, of which one is killed after every few: each picture is there once, and right."""
    rows = [{"class_label": index % 10, "seed": index} for index in range(200)]
    given = command(model_dir, "--prompts", rows_file(tmp_path / "rows.jsonl", *rows), "-o")
    assert main([*given, str(tmp_path / "serial")]) == 0
    chance, due = random.Random(0), 5

    def kill(workers: list[int]) -> int:
        nonlocal due
        there = len(list((tmp_path / "many").glob("*.png")))
        if not workers or there < due:
            return 0
        due = there + chance.randint(1, 25)
        os.kill(chance.choice(workers), signal.SIGKILL)
        return 1

    words = [*given, str(tmp_path / "many"), "--ray", "--ray-num-cpus", "1", "--json"]
    status, printed, killed = run_and_kill(words, kill)
    print(f"{killed} workers were killed")
    assert status == 0, printed
    assert killed >= 8 and '"drawn": 200' in printed
    assert contents(tmp_path / "many") == contents(tmp_path / "serial")


@pytest.mark.slow
def test_a_row_that_ends_every_worker_is_given_up(model_dir, tmp_path):
    """Whoever begins it is killed."""
    file = rows_file(tmp_path / "rows.jsonl", {"class_label": 1})

    def kill(workers: list[int]) -> int:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        return len(workers)

    words = command(model_dir, "--prompts", file, "-o", tmp_path / "many", "--ray", "--ray-num-cpus", "1")
    status, printed, killed = run_and_kill(words, kill)
    assert status == 1, printed
    assert killed >= ray_pool.TRIES
    assert f"error: --prompts: row 0: {ray_pool.TRIES} workers and more ended over it" in printed
    assert list((tmp_path / "many").iterdir()) == []
