"""Memory of the host that backends on the CPU bind by address."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dipgo_deploy.backends.base import ALIGNMENT, Memory
from dipgo_deploy.backends.storage import as_bytes, from_storage
from dipgo_deploy.bundle.manifest import TensorSpec

_TOUCHED = 2**23  # up to here memory gets its pages when it is allocated, not in the first run


class HostBytes(NamedTuple):
    """Memory on the host, uint8, and its address, which numpy takes long to tell (40 us after a launch)."""

    array: np.ndarray
    address: int


def allocate_host(nbytes: int) -> Memory:
    """Zero-filled memory, aligned to 256 bytes."""
    owner = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    if nbytes <= _TOUCHED:
        owner.fill(0)
    base = owner.ctypes.data
    return Memory(base + -base % ALIGNMENT, nbytes, HostBytes(owner, base))


def upload_host(memory: Memory, array: np.ndarray) -> None:
    """Copy an array to the start of ``memory``. Raises ValueError where it is larger."""
    data = as_bytes(array)
    if data.nbytes > memory.nbytes:
        raise ValueError(f"{data.nbytes} bytes do not fit a memory of {memory.nbytes}")
    host_bytes(memory)[: data.nbytes] = data


def download_host(memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
    """A tensor of ``memory``, without ``copy`` the memory itself. Raises ValueError where it is larger."""
    if spec.nbytes > memory.nbytes:
        raise ValueError(f"{spec.name}: {spec.nbytes} bytes are more than the memory's {memory.nbytes}")
    return from_storage(host_bytes(memory), spec, copy=copy)


def host_bytes(memory: Memory) -> np.ndarray:
    """The memory itself, uint8."""
    start = memory.address - memory.owner.address
    found: np.ndarray = memory.owner.array[start : start + memory.nbytes]
    return found
