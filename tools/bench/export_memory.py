"""Peak memory of one export, and of the process that compares it: ``python -m tools.bench.export_memory ARGUMENTS``,
with the arguments of ``dipgo-export``. Linux only."""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path

_INTERVAL = 0.02  # seconds


def _status() -> dict[str, int]:
    """KiB by name, from the kernel."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon", "VmRSS")}


def main() -> None:
    """Run the export and print MiB as JSON: the libraries alone, the peaks, and the largest child process."""
    import diffusers  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    from dipgo_deploy.cli.export import command

    before = _status()
    peak = before["RssAnon"]
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_INTERVAL):
            peak = max(peak, _status()["RssAnon"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    command(sys.argv[1:], standalone_mode=False)
    done.set()
    watcher.join()
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    kib = {
        "libraries": before["VmRSS"],
        "peak": _status()["VmHWM"],
        "anonymous": peak - before["RssAnon"],
        "child": child,
    }
    print(json.dumps({name: value // 1024 for name, value in kib.items()}))


if __name__ == "__main__":
    main()
