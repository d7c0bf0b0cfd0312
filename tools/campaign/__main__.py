"""``python -m tools.campaign``, from the repository's root; needs the extras ``cpu``, ``export``, ``tensorrt-rtx``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy import __version__
from dipgo_deploy.cli.common import emit, entry_point, examples, human_console, json_option
from tools.bench.measure import machine
from tools.bench.tables import write_results
from tools.campaign import kills
from tools.campaign.kinds.arrays import Embeddings, Latents
from tools.campaign.kinds.engines import Broken, Flips, Resealed, Sealed
from tools.campaign.kinds.folders import Configurations, Folders
from tools.campaign.kinds.importers import Importers
from tools.campaign.kinds.loras import Loras
from tools.campaign.kinds.pictures import Pictures
from tools.campaign.kinds.schedules import Schedules
from tools.campaign.material import Material, make
from tools.campaign.report import Counts, line, page
from tools.campaign.verdict import Result
from tools.campaign.worker import Kind, preload, try_all

# Documents of a full run.
FULL: dict[Callable[[Material], Kind], int] = {
    Schedules: 2800,
    Sealed: 1800,
    Resealed: 1200,
    Flips: 1200,
    Broken: 500,
    Latents: 700,
    Embeddings: 300,
    Pictures: 300,
    Loras: 400,
    Importers: 1300,
    Configurations: 500,
    Folders: 24,
}
KILLS = {"export": 14, "export --overwrite": 14, "build": 48, "search": 10, "calibrate": 16}
LIMIT = 30.0


@click.command(
    name="campaign",
    epilog=examples(
        "python -m tools.campaign --collect docs/results/reliability.json",
        "python -m tools.campaign --share 0.02 --no-kills",
        'python -m tools.campaign --only "LoRA files" --share 0.2 --seed 5',
    ),
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--share", type=click.FloatRange(0, 100, min_open=True), default=1.0, show_default=True, help="Of a full run."
)
@click.option("--only", multiple=True, help="Names of kinds, as in the table; can be given several times.")
@click.option("--kills/--no-kills", "with_kills", default=True, show_default=True, help="Stop commands, too.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes beside the kills.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for what is broken; kept.  [default: one of its own]"
)
@click.option("--collect", type=click.Path(path_type=Path), help="Write results (.json), with a page beside it (.md).")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    seed: int,
    share: float,
    only: tuple[str, ...],
    with_kills: bool,
    workers: int,
    work: Path | None,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Break documents by the thousand and see what becomes of them. Exit status 1 where anything is a fault."""
    console = human_console(as_json)

    def show(counts: Counts) -> None:
        facts["kinds"].append(counts.facts())
        console.print(line(facts["kinds"][-1]), markup=False, soft_wrap=True)

    facts: dict[str, Any] = {
        "command": f"python -m tools.campaign --share {share:g}",
        "seed": seed,
        "version": __version__,
        "machine": machine(1),
        "kinds": [],
    }
    start = time.monotonic()
    # Everything is forked from here, where nothing has started a thread.
    preload()
    with _folder(work) as folder:
        material = make(folder / "material")
        commands = [each for each in kills.commands(material) if with_kills and (not only or each.row in only)]
        with Beside(lambda: killed(commands, folder / "kills", seed, share), folder / "kills.jsonl") as beside:
            for make_kind, full in FULL.items():
                kind = make_kind(material)
                if only and kind.name not in only:
                    continue
                count, place = max(1, round(full * share)), folder / "documents"
                results = try_all(kind, count, seed=seed, folder=place, workers=workers, limit=LIMIT)
                show(Counts(kind.name, results))
            stopped = list(beside.results())
        for each in commands:
            show(Counts(each.row, (result for result in stopped if result.kind == each.row)))
    facts["seconds"] = round(time.monotonic() - start, 1)
    if collect is not None:
        write_results(collect, facts, page(facts))
    emit(facts, as_json)
    ctx.exit(1 if any(kind["faults"] for kind in facts["kinds"]) else 0)


def killed(commands: Sequence[kills.Command], folder: Path, seed: int, share: float) -> Iterator[Result]:
    """Results of all kills."""
    for each in commands:
        yield from kills.kill(each, max(1, round(KILLS[each.name] * share)), seed=seed, folder=folder)


class Beside:
    """Results that a forked process makes meanwhile; they go through a file."""

    def __init__(self, make_results: Callable[[], Iterator[Result]], path: Path) -> None:
        self._make, self._path = make_results, path
        self._pid: int | None = None

    def __enter__(self) -> Beside:
        self._path.write_bytes(b"")
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                with self._path.open("w") as file:
                    for result in self._make():
                        file.write(json.dumps(result.row()) + "\n")
                status = 0
            finally:
                os._exit(status)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def results(self) -> Iterator[Result]:
        """Wait for all of them.

        Raises:
            RuntimeError: the process failed, its own message is on stderr.
        """
        assert self._pid is not None  # entered
        status = os.waitpid(self._pid, 0)[1]
        self._pid = None
        if status:
            raise RuntimeError("the kills did not run to their end: see above")
        for text in self._path.read_text().splitlines():
            yield Result.of_row(json.loads(text))


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))
