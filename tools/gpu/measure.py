"""Times by CUDA events, gaps between kernels, memory, and the floor that no loop can come below."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle


@dataclass(frozen=True)
class Runner:
    """A loop that is ready: call it for the final latents (1, C, h, w), float32 on the host."""

    call: Callable[[], np.ndarray]
    stream: Any
    facts: Mapping[str, Any]


def measure(label: str, make: Callable[[], Runner], reference: np.ndarray, repeats: int) -> dict[str, Any]:
    """Milliseconds of the loop, its difference to the reference, and memory; or the error that stopped it."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    try:
        with used_memory() as used:
            start = time.perf_counter()
            runner = make()
            result = runner.call()
            ready = time.perf_counter() - start
            times = event_times(runner.call, repeats, runner.stream)
            gaps = launch_gaps(runner.call)
    except (UserError, RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return {"what": label, "error": " ".join(str(error).split())[:300]}
    scale = float(np.abs(reference).max())
    finite = bool(np.isfinite(result).all())
    return {
        "what": label,
        "ms_median": statistics.median(times),
        "ms_min": min(times),
        "ms_all": times,
        "difference": float(np.abs(result - reference).max()) / scale if finite else 1e9,
        "gaps": gaps,
        "device_bytes": used["bytes"],
        "seconds_until_first": round(ready, 2),
        **runner.facts,
    }


def event_times(task: Callable[[], object], repeats: int, stream: Any) -> list[float]:
    """Milliseconds of each run by CUDA events on ``stream``, after two runs that do not count."""
    import torch

    for _ in range(2):
        task()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        task()
        end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def launch_gaps(call: Callable[[], object]) -> dict[str, float] | None:
    """One more loop under torch's profiler, which sees every kernel and copy of the process.

    Milliseconds: ``span_ms`` from the first one's start to the last one's end, ``busy_ms`` with at least one running,
    ``gap_ms`` with none: what launching and switching graphs costs the device. None where the profiler sees nothing.
    """
    import torch
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found = [event.time_range for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return gaps_between([(span.start, span.end) for span in found])


def gaps_between(intervals: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Span, busy and idle milliseconds of (start, end) intervals in microseconds, which may overlap."""
    if not intervals:
        return None
    ordered = sorted(intervals)
    busy, until = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    span = until - ordered[0][0]
    return {"span_ms": span / 1e3, "busy_ms": busy / 1e3, "gap_ms": (span - busy) / 1e3}


@contextmanager
def used_memory() -> Iterator[dict[str, int]]:
    """How much the GPU's free memory shrank until the block's end."""
    import torch

    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    used = {"bytes": 0}
    yield used
    used["bytes"] = before - torch.cuda.mem_get_info()[0]


def measured_roof() -> dict[str, float]:
    """What this GPU reaches: fp16 matrix products (FLOP/s) and copies (bytes/s, read and written), by CUDA events."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    big = torch.empty(2**28, device="cuda", dtype=torch.float32)
    target = torch.empty_like(big)
    product = min(event_times(lambda: torch.matmul(a, a), 10, torch.cuda.current_stream()))
    copy = min(event_times(lambda: target.copy_(big), 10, torch.cuda.current_stream()))
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes_per_second": 2 * big.nbytes / copy * 1e3}


def floor(bundle: Bundle, roof: Mapping[str, float]) -> float:
    """Milliseconds below which no loop can come: its FLOPs, and its weights read once a launch, at measured rates."""
    from dipgo_deploy.backends.tensorrt_plans import WeightHashes

    hashes = WeightHashes()
    plan = bundle.manifest.plan
    sizes = [hashes.digest(bundle.path / variant.graph.file)[1] for variant in plan.variants]
    seconds = 0.0
    for launch in plan.launches:
        arithmetic = 2 * plan.variants[launch.variant].macs / roof["flops"]
        # The measured rate counts what a copy reads and what it writes.
        seconds += max(arithmetic, sizes[launch.variant] / roof["bytes_per_second"])
    return seconds * 1e3
