"""Memory and time of guidance in one launch or two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from toy_engine import Toy, build

from dipgo_deploy.errors import UserError
from tools.bench import guidance_batch


def test_the_most_memory_is_that_since_it_was_forgotten() -> None:
    guidance_batch.forget_peak()
    before = guidance_batch.peak()
    held = np.ones(2**23)  # 64 MiB
    assert guidance_batch.peak() - before > 0.9 * held.nbytes
    del held
    guidance_batch.forget_peak()
    assert guidance_batch.peak() - before < 2**25


def test_a_directory_is_measured(tmp_path: Path) -> None:
    found = guidance_batch.probe(build(tmp_path / "engine", Toy()), 1, 1, tmp_path / "final.npy")
    assert found["seconds"] > 0 and found["running_bytes"] >= 0
    assert np.isfinite(np.load(tmp_path / "final.npy")).all()


def test_what_was_not_exported_so_is_refused(tmp_path: Path) -> None:
    engine = str(build(tmp_path / "engine", Toy()))
    result = CliRunner().invoke(guidance_batch.command, ["--both", engine, "--halves", engine])
    assert isinstance(result.exception, UserError)
    assert "export with --guidance-batch 1" in str(result.exception)


def test_the_table_has_quotients() -> None:
    def row(seconds: float, nbytes: float) -> dict[str, object]:
        values = {"loading_bytes": nbytes, "running_bytes": nbytes, "seconds": seconds, "processor_seconds": seconds}
        spread = {key: {"median": value, "q1": value, "q3": value} for key, value in values.items()}
        return {"graphs": 1, "launches": 4, "arena_bytes": 2**20, **spread}

    text = guidance_batch._table({"rows": {"both halves": row(2.0, 2**21), "one half": row(2.2, 2**20)}})
    assert "1 (0.50)" in text and "(1.10)" in text
