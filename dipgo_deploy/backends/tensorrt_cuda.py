"""The few calls of the CUDA runtime that a TensorRT backend needs, with errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo_deploy.backends.base import Memory
from dipgo_deploy.backends.storage import as_bytes
from dipgo_deploy.errors import UserError

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@dataclass(frozen=True)
class Device:
    """A GPU: name, compute capability ("8.9"), memory in bytes."""

    name: str
    capability: str
    memory_bytes: int


class NoDeviceError(UserError):
    """No GPU can be used here; the message says why, without naming a backend."""


def find_device(index: int = 0) -> Device:
    """The GPU that a backend would use. Creates nothing on it.

    Raises:
        NoDeviceError: no driver, no GPU, or the package cuda-python is missing.
    """
    cudart = _cudart()
    error, count = cudart.cudaGetDeviceCount()
    if int(error) or not count:
        reason = _error_text(cudart, error) if int(error) else "no GPU is visible"
        raise NoDeviceError(f"no NVIDIA GPU with a working driver ({reason})")
    error, properties = cudart.cudaGetDeviceProperties(index)
    if int(error):
        raise NoDeviceError(f"GPU {index} cannot be used ({_error_text(cudart, error)})")
    name = properties.name
    return Device(
        name=(name.decode() if isinstance(name, bytes) else str(name)).strip("\0 "),
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
    )


def memory_of_device() -> dict[str, int]:
    """Bytes of the current GPU that are ``free`` and in ``total``; empty where there is none to ask."""
    try:
        error, free, total = _cudart().cudaMemGetInfo()
    except NoDeviceError:
        return {}
    return {} if int(error) else {"free": int(free), "total": int(total)}


def require_device(backend: str) -> Device:
    """The GPU, or a UserError that names the backend and what to do."""
    try:
        return find_device()
    except NoDeviceError as error:
        raise UserError(f"backend {backend}: {error}; run on a machine with one, or use --backend cpu") from None


class Cuda:
    """One non-blocking stream on one GPU: memory, copies and graph capture in its order.

    Construct only after ``require_device``. Every method raises UserError with CUDA's own reason when a call fails.
    """

    def __init__(self, backend: str) -> None:
        self._cudart = _cudart()
        self._backend = backend
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._cudart.cudaStreamDestroy(self.stream)

    def allocate(self, nbytes: int) -> Memory:
        """Zero-filled device memory (CUDA aligns it to 256 bytes); freed with the last ``Memory`` that refers to it."""
        size = max(nbytes, 1)
        address = int(self._call("cudaMalloc", size, what=f"{size / 2**20:.1f} MiB"))
        owner = _Allocation(self._cudart, address)
        self._call("cudaMemsetAsync", address, 0, size, self.stream)
        return Memory(address, nbytes, owner)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """Copy a host array to the start of ``memory``, after everything enqueued before it."""
        data = as_bytes(array)
        if data.nbytes > memory.nbytes:
            raise ValueError(f"{data.nbytes} bytes do not fit a memory of {memory.nbytes}")
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        # From pageable memory the call returns once the source has been read, so the array may go.
        self._call("cudaMemcpyAsync", memory.address, data.ctypes.data, data.nbytes, kind, self.stream)

    def download(self, memory: Memory, nbytes: int) -> np.ndarray:
        """The first bytes of ``memory``, uint8, after everything enqueued before."""
        data = np.empty(nbytes, np.uint8)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", data.ctypes.data, memory.address, nbytes, kind, self.stream)
        self.synchronize()
        return data

    def copy(self, target: Memory, source: Memory, nbytes: int) -> None:
        """Copy bytes on the device, after everything that was enqueued before; a graph can capture it."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target.address, source.address, nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        self._call("cudaStreamSynchronize", self.stream)

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        error, free, total = self._cudart.cudaMemGetInfo()
        return (0, 0) if int(error) else (int(free), int(total))

    def capture(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """What ``runs`` enqueue on the stream, as one CUDA graph; nothing of it runs yet. Calling it launches it."""
        # Relaxed: Python may free memory at any time, which the other modes forbid while capturing.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            for run in runs:
                run()
        except BaseException:
            self._cudart.cudaStreamEndCapture(self.stream)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream, what="capturing a CUDA graph; use --cuda-graph off")
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0, what="instantiating a CUDA graph")
        finally:
            self._cudart.cudaGraphDestroy(graph)
        return _GraphLaunch(self, executable)

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        result = getattr(self._cudart, name)(*arguments)
        error, values = result[0], result[1:]
        if int(error) == _OUT_OF_MEMORY:
            free, total = self.free_bytes()
            raise UserError(
                f"backend {self._backend}: out of GPU memory{f' ({what} wanted)' if what else ''}: {free / 2**20:.0f} "
                f"of {total / 2**20:.0f} MiB are free; close other programs, or export fewer variants or a smaller size"
            )
        if int(error):
            raise UserError(
                f"backend {self._backend}: {name} failed: {_error_text(self._cudart, error)}"
                f"{f' ({what})' if what else ''}"
            )
        return values[0] if len(values) == 1 else values


class _Allocation:
    def __init__(self, cudart: Any, address: int) -> None:
        self._cudart, self._address = cudart, address

    def __del__(self) -> None:
        # cudaFree waits for the device, so nothing enqueued still uses the memory. At exit the driver may be gone.
        with contextlib.suppress(Exception):
            self._cudart.cudaFree(self._address)


class _GraphLaunch:
    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable

    def __call__(self) -> None:
        self._cuda._call("cudaGraphLaunch", self._executable, self._cuda.stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._cuda._cudart.cudaGraphExecDestroy(self._executable)


def _cudart() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise NoDeviceError("the package cuda-python is missing, without which no GPU can be used") from None
    return runtime


def _error_text(cudart: Any, error: Any) -> str:
    _, text = cudart.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
