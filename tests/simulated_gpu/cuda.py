"""The CUDA runtime's part: memory, streams whose work waits for a synchronisation, and captured graphs."""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

NAME, CAPABILITY = "Simulated GPU", (8, 9)
TOTAL_BYTES = 1 << 32
ALIGNMENT = 256
_SUCCESS, _INVALID_VALUE, _OUT_OF_MEMORY, _CAPTURE_UNSUPPORTED = 0, 1, 2, 900
# All bits set is NaN in every floating type: memory that nobody wrote, and memory that was freed.
_POISON = 0xFF

Work = Callable[[], None]


class MemcpyKind(IntEnum):
    """As CUDA numbers them."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(IntEnum):
    """As CUDA numbers them."""

    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


@dataclass
class Graph:
    """What was captured, in order. used: context -> how often it had run when the capture ended."""

    work: list[Work] = field(default_factory=list)
    used: dict[Any, int] = field(default_factory=dict)


@dataclass
class Stream:
    """Work that was enqueued and has not run."""

    waiting: deque[Work] = field(default_factory=deque)
    capture: Graph | None = None
    draining: bool = False


class Cudart:
    """Stands for ``cuda.bindings.runtime``: calls give (error, values...). Attributes in lower case are the tests'."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = MemcpyKind
    cudaStreamCaptureMode = CaptureMode

    def __init__(self) -> None:
        self.launched_graphs = 0
        self._lock = threading.RLock()
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, Graph] = {}
        self._blocks: dict[int, np.ndarray] = {}
        self._freed: list[np.ndarray] = []  # kept, so that no address comes twice

    # What the simulated TensorRT needs.

    def submit(self, stream: int, work: Work) -> None:
        """Enqueue, or add to the graph that is being captured."""
        with self._lock:
            found = self._streams[stream]
            (found.waiting if found.capture is None else found.capture.work).append(work)

    def capturing(self, stream: int) -> Graph | None:
        """The graph that the stream's work goes to."""
        return self._streams[stream].capture

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """Device memory as bytes.

        Raises:
            AssertionError: it was not allocated, was freed, or is too small.
        """
        with self._lock:
            starts = sorted(self._blocks)
            place = bisect_right(starts, address) - 1
            assert place >= 0, f"{address:#x} is no device memory"
            block = self._blocks[starts[place]]
            offset = address - starts[place]
            assert offset + nbytes <= block.nbytes, f"{nbytes} bytes at {address:#x} are not, or no longer, allocated"
            return block[offset : offset + nbytes]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all memory that is not freed."""
        return sum(block.nbytes for block in self._blocks.values())

    # The device.

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return _SUCCESS, 1

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:
        major, minor = CAPABILITY
        return _SUCCESS, SimpleNamespace(
            name=NAME.encode() + b"\0" * 8, major=major, minor=minor, totalGlobalMem=TOTAL_BYTES
        )

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return _SUCCESS, TOTAL_BYTES - self.allocated_bytes, TOTAL_BYTES

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return _SUCCESS, f"simulated error {error}".encode()

    # Memory.

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        with self._lock:
            if nbytes > TOTAL_BYTES - self.allocated_bytes:
                return _OUT_OF_MEMORY, 0
            whole = np.full(nbytes + ALIGNMENT, _POISON, np.uint8)
            start = -whole.ctypes.data % ALIGNMENT
            block = whole[start : start + nbytes]
            self._blocks[block.ctypes.data] = block
            return _SUCCESS, block.ctypes.data

    def cudaFree(self, address: int) -> tuple[int]:
        with self._lock:
            for stream in self._streams.values():  # as CUDA does, it waits for the device
                self._drain(stream)
            block = self._blocks.pop(address, None)
            if block is None:
                return (_INVALID_VALUE,)
            block[:] = _POISON
            self._freed.append(block)
            return (_SUCCESS,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[int]:
        self.submit(stream, lambda: self.view(address, nbytes).fill(value))
        return (_SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: MemcpyKind, stream: int) -> tuple[int]:
        if kind == MemcpyKind.cudaMemcpyDeviceToDevice:
            self.submit(stream, lambda: np.copyto(self.view(target, nbytes), self.view(source, nbytes)))
            return (_SUCCESS,)
        if self.capturing(stream) is not None:
            return (_CAPTURE_UNSUPPORTED,)  # pageable memory cannot be captured
        if kind == MemcpyKind.cudaMemcpyHostToDevice:
            data = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)  # pageable memory is read at once
            self.submit(stream, lambda: np.copyto(self.view(target, nbytes), data))
        else:
            self.submit(stream, lambda: _to_host(target, self.view(source, nbytes)))
        return (_SUCCESS,)

    # Streams.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        with self._lock:
            handle = 1 + max(self._streams, default=0)
            self._streams[handle] = Stream()
            return _SUCCESS, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        with self._lock:
            self._drain(self._streams.pop(stream))
            return (_SUCCESS,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        with self._lock:
            found = self._streams[stream]
            if found.capture is not None:
                return (_CAPTURE_UNSUPPORTED,)
            self._drain(found)
            return (_SUCCESS,)

    # Graphs.

    def cudaStreamBeginCapture(self, stream: int, mode: CaptureMode) -> tuple[int]:
        found = self._streams[stream]
        assert found.capture is None and isinstance(mode, CaptureMode)
        found.capture = Graph()
        return (_SUCCESS,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        found = self._streams[stream]
        assert found.capture is not None
        found.capture.used = {context: context.runs for context in found.capture.used}
        graph, found.capture = found.capture, None
        return _SUCCESS, self._kept(graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        assert flags == 0
        captured = self._graphs[graph]
        return _SUCCESS, self._kept(Graph(list(captured.work), dict(captured.used)))

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        graph = self._graphs[executable]
        for context, runs in graph.used.items():
            assert context.runs == runs, "a captured graph was launched whose context has run elsewhere since"
        self.launched_graphs += 1
        for work in graph.work:
            self.submit(stream, work)
        return (_SUCCESS,)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self._graphs[graph]
        return (_SUCCESS,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def _kept(self, graph: Graph) -> int:
        with self._lock:
            handle = 1 + max(self._graphs, default=0)
            self._graphs[handle] = graph
            return handle

    def _drain(self, stream: Stream) -> None:
        # Python may collect garbage in the middle of a work item, whose finalizers free memory: the item ends first.
        if stream.draining:
            return
        stream.draining = True
        try:
            while stream.waiting:
                stream.waiting.popleft()()
        finally:
            stream.draining = False


def _to_host(address: int, data: np.ndarray) -> None:
    ctypes.memmove(address, data.ctypes.data, data.nbytes)
