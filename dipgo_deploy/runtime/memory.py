"""Memory of this process and of the machine, as the kernel counts it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_ROLLUP = Path("/proc/self/smaps_rollup")
_FIELDS = {"Rss:": "rss", "Pss:": "pss"}


def process_memory(source: Path = _ROLLUP) -> dict[str, int]:
    """Bytes: ``rss``, resident memory, and ``pss``, the same with shared pages divided among those who share them.

    Empty where the kernel does not tell (not Linux).
    """
    try:
        lines = source.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[0] in _FIELDS:
            found[_FIELDS[words[0]]] = int(words[1]) * 1024
    return found


def machine_memory(limit: Path = _CGROUP_LIMIT) -> int | None:
    """Bytes of memory that this machine has, or that this container may use; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):
        found.append(int(limit.read_text(encoding="ascii")))  # "max" where there is none
    return min(found, default=None)
