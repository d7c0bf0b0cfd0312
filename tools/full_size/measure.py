"""A child process under the clock: wall time, processor time and peak memory of it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError


def run_stage(stage: str, arguments: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Run ``tools.full_size.stages`` in a process of its own; what it reports, with what it took.

    ``seconds`` of wall time, ``cpu_seconds`` of all its threads, ``peak_rss`` in bytes (mapped files included, as the
    system counts them). What it prints besides goes to ``log``.

    Raises:
        UserError: it failed; the message has its last line.
    """
    command: Sequence[str] = (sys.executable, "-m", "tools.full_size.stages", stage)
    start = time.perf_counter()
    with log.open("ab") as messages:
        # Else glibc keeps what large layers took in one comparison, for layers to come.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)} if stage == "compare" else None
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, env=env)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(arguments).encode())
        child.stdin.close()
        printed = child.stdout.read()
        # Its own usage; RUSAGE_CHILDREN would be the largest of all children so far.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        how = "was killed (out of memory?)" if child.returncode < 0 else "failed"
        raise UserError(f"{stage} {how}: {lines[-1]} (all of it: {log})")
    return {
        **json.loads(printed.splitlines()[-1]),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss": usage.ru_maxrss * 1024,
    }
