"""Memory of this process, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

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
