"""``compare.written`` for models of which only one copy fits into memory: in two processes, one after the other.

The first runs the supernet, whose weights are mapped, from a float32 copy on disk where the files have another dtype,
and which holds the pages of one layer at a time; the second runs the graphs, with ONNX Runtime's own weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.directory import chosen_manifest
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.self_test import SELF_TEST_NAME, self_test_file
from dipgo_deploy.compare.metrics import Agreement, worst
from dipgo_deploy.errors import ToleranceError, UserError

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import PlanEntry
    from dipgo_deploy.compare.self_test import SelfTestRecorder
    from dipgo_deploy.reference.recorded import ToDisk
    from dipgo_deploy.reference.recording import Recorder
    from dipgo_deploy.reference.steps import StepRecorder
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.supernet.loop import Evaluation

# Exit status of a comparison beyond tolerance; 1 is that of any Python that ends in a traceback.
_BEYOND = 3
_PR_SET_PDEATHSIG = 1


def verify_in_processes(
    engine_dir: Path, model: str, self_test: int | None = None, schedule: str | None = None
) -> Agreement:
    """Compare manifest, launch list and graphs of a written engine directory with the model, in two processes; how far
    the graphs agree.

    The first runs the supernet and records, the second runs the graphs: it has neither torch nor the torch model, the
    first no graph. The recordings are files in a folder of ``engine_dir`` meanwhile.
    self_test: bytes of the test that the directory is to carry, as far as the first process runs the model's loop; it
    is written where everything agrees, and not in the manifest yet. schedule: name of one of several.

    Raises:
        ToleranceError: as ``verify_written``. UserError: a process failed.
    """
    with _recorded(engine_dir, model, self_test, schedule) as folder:
        compared = _run("compare", str(engine_dir), str(folder), *_chosen(schedule))
        _take_self_test(folder, engine_dir, self_test, schedule)
        return Agreement(*json.loads(compared.splitlines()[-1]))


def record_in_process(engine_dir: Path, model: str, self_test: int, schedule: str | None = None) -> None:
    """Record the test that a directory is to carry where its graphs are not compared; as ``verify_in_processes``."""
    with _recorded(engine_dir, model, self_test, schedule) as folder:
        _take_self_test(folder, engine_dir, self_test, schedule)


def _chosen(schedule: str | None) -> tuple[str, ...]:
    return () if schedule is None else (schedule,)


@contextlib.contextmanager
def _recorded(engine_dir: Path, model: str, self_test: int | None, schedule: str | None) -> Iterator[Path]:
    """The folder that the first process has written; gone when the context ends."""
    if not engine_dir.is_dir():
        raise UserError(f"{engine_dir}: no such folder; give an engine directory")
    with tempfile.TemporaryDirectory(prefix=".recorded-", dir=engine_dir) as folder:
        _run("record", str(engine_dir), model, folder, str(self_test or 0), *_chosen(schedule))
        yield Path(folder)


def _take_self_test(folder: Path, engine_dir: Path, self_test: int | None, schedule: str | None) -> None:
    if self_test is not None:
        manifest = chosen_manifest(engine_dir, Manifest.load(engine_dir), schedule)
        os.replace(folder / SELF_TEST_NAME, engine_dir / self_test_file(manifest))


def _run(*arguments: str) -> str:
    """This module as a command in a process; what it prints."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    # Else glibc keeps what large layers took, for layers to come.
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", __name__, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == _BEYOND:
        raise ToleranceError(last)
    if done.returncode:
        raise UserError(f"the comparison with the supernet ended with status {done.returncode}: {last}")
    return done.stdout


def _record(engine_dir: Path, model: str, folder: Path, self_test: int = 0, schedule: str | None = None) -> None:
    """What the first process does: recordings in ``folder/0`` and, of open sizes, further folders, one for each of the
    sizes that are compared; and where ``self_test`` says of how many bytes, a test for the directory in ``folder``."""
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.self_test import write_self_test
    from dipgo_deploy.compare.facts import check_facts
    from dipgo_deploy.compare.launch_list import check_launch_list
    from dipgo_deploy.compare.self_test import SelfTestRecorder
    from dipgo_deploy.compare.written import sizes_compared
    from dipgo_deploy.reference.load import load_reference
    from dipgo_deploy.reference.mapped import MappedCaches, float32_files, give_back_after_use
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.reference.recorded import ToDisk, read_recordings
    from dipgo_deploy.reference.recording import run_until_complete
    from dipgo_deploy.reference.steps import recorder_for

    quiet_libraries()
    for place, (bundle, where) in enumerate(sizes_compared(Bundle.open(engine_dir, schedule=schedule))):
        manifest, plan = bundle.manifest, bundle.manifest.plan
        with float32_files(model, engine_dir) as weights:
            reference = load_reference(bundle, model, weights)
            for part in (*check_facts(manifest, reference), *check_launch_list(manifest, reference)):
                for failure in part.failures():
                    raise ToleranceError(f"{where}{failure}; nothing was written")
            give_back_after_use(reference.source.denoiser)
            caches = reference.supernet.store = MappedCaches(folder)
            inputs = reference.inputs(manifest)
            recorder = recorder_for(bundle, reference.schedule, again=False)
            (folder / str(place)).mkdir()
            written = ToDisk(recorder, folder / str(place), caches)
            test = SelfTestRecorder(bundle, self_test, whole=False) if self_test and not place else None
            keep = _caches_kept(reference.schedule, plan, recorder)
            run_until_complete(_With(written, test), reference, inputs, keep)
            written.close()
            if test is not None:
                alone = read_recordings(folder / str(place)) if plan.one_launch_each else ()
                test.finish(inputs, alone, None, reference.source.family.tolerance(manifest.dtype, manifest.quantized))
                assert test.test is not None
                write_self_test(folder / SELF_TEST_NAME, test.test)
            del reference
            gc.collect()  # a model's hooks refer to it


class _With:
    """A recorder, and beside it one that takes what the loop runs for the first."""

    def __init__(self, recorder: ToDisk, beside: SelfTestRecorder | None) -> None:
        self._recorder, self._beside = recorder, beside

    @property
    def complete(self) -> bool:
        """Whether the first has what it wants."""
        return self._recorder.complete

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation of the loop."""
        if self._beside is not None:
            self._beside(evaluation)
        self._recorder(evaluation)


def _caches_kept(schedule: Schedule, plan: PlanEntry, recorder: Recorder | StepRecorder) -> Callable[[int], set[str]]:
    """The blocks whose caches have to outlive an evaluation, by evaluation.

    They are recorded, or the next evaluation reads them: its removed blocks, and kept ones whose value would be the
    same again, so that its launch does not compute them. All other caches are written before they are read.
    """
    from dipgo_deploy.reference.recording import cache_block

    names = [block.name for block in schedule.blocks]
    reads: dict[int, set[str]] = {}
    if plan.one_launch_each:
        for launch in plan.launches:
            entry = plan.variants[launch.variant]
            reads.setdefault(launch.step, set()).update(cache_block(name) for name in entry.reads)

    def keep(step: int) -> set[str]:
        following = step + 1
        if following == len(schedule.gates):
            return recorder.stored(step)
        # Of a forecast block earlier values are read, too, so what is stored meanwhile has to be kept.
        until = following + 1 if schedule.forecast is None else len(schedule.gates)
        rows = schedule.gates[following:until]
        removed = {name for row in rows for name, kept in zip(names, row, strict=True) if not kept}
        return removed | reads.get(following, set()) | recorder.stored(step)

    return keep


def _compare(engine_dir: Path, folder: Path, schedule: str | None = None) -> Agreement:
    """What the second process does. It must not load torch."""
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.graphs import compare_segments, compare_variants, frugal_session
    from dipgo_deploy.compare.metrics import Tolerance
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.compare.rows import with_rows
    from dipgo_deploy.compare.written import passed, sizes_compared
    from dipgo_deploy.models.registry import family_for
    from dipgo_deploy.reference.recorded import read_recordings, read_steps

    whole = Bundle.open(engine_dir, schedule=schedule)
    manifest = whole.manifest
    tolerance = Tolerance(family_for(manifest.model.class_name).tolerance(manifest.dtype, manifest.quantized))
    agreements = []
    for place, (bundle, where) in enumerate(sizes_compared(whole)):
        if not manifest.plan.one_launch_each:
            steps = with_rows(bundle, read_steps(folder / str(place)), frugal_session)
            checked, _ = compare_segments(bundle, steps, frugal_session, tolerance, keep_open=False)
        else:
            recordings = with_rows(bundle, read_recordings(folder / str(place)), frugal_session)
            checked = tuple(compare_variants(bundle, recordings, frugal_session, tolerance))
        agreements.append(passed(Report(tolerance, variants=checked), where))
    return worst(agreements)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is killed: what that one left is then nobody's."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _main() -> int:
    end_with_parent()
    stage, engine_dir, *rest = sys.argv[1:]
    try:
        if stage == "record":
            _record(Path(engine_dir), rest[0], Path(rest[1]), int(rest[2]), *rest[3:])
        else:
            print(json.dumps(_compare(Path(engine_dir), Path(rest[0]), *rest[1:])))
    except ToleranceError as error:
        print(error, file=sys.stderr)
        return _BEYOND
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())
