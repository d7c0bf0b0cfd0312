"""One copy of the weights for all sessions: mapped from its file on the CPU, in device memory on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from dipgo_deploy.backends.base import ChangedWeights
from dipgo_deploy.backends.onnxruntime_cuda import PROVIDERS
from dipgo_deploy.bundle.weights import ONNX_TYPES, WEIGHTS_INDEX, WEIGHTS_NAME, StoredWeight, weights_of
from dipgo_deploy.errors import UserError

_SMALLEST = 1024  # bytes; small constants (shapes, axes) are read by ONNX Runtime itself, on the host
# numpy has no bfloat16, so that is bits.
_STORED_AS = {
    "float": np.float32,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
    "float16": np.float16,
    "double": np.float64,
    "bfloat16": np.uint16,
}
# A value on the host is of its array's type; integers may feed nodes that ONNX Runtime leaves on the host.
_SHARED = {
    "cpu": ("float", "int32", "int64", "bool", "float16", "double"),
    "cuda": ("float", "float16", "double", "bfloat16"),
}
# An ONNX model, the identity of one float ``x`` as ``y``: a session whose output can be bound to any memory.
_IDENTITY = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a00100d"
)


class Shared(NamedTuple):
    """An OrtValue that refers to memory which is not its own, and what keeps that memory."""

    value: Any
    owner: Any


class SharedWeights:
    """The external initializers of graphs as values that all sessions share.

    Args:
        ort: the module ``onnxruntime``.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, ort: Any, device: str) -> None:
        self._ort = ort
        self._device = device
        self._identity: Any = None
        self._stored: dict[tuple[Path, str], Shared] = {}
        # Of changed weights too, for as long as somebody has them: initializer of a folder -> value.
        self._changed: WeakKeyDictionary[ChangedWeights, dict[tuple[Path, str], Shared]] = WeakKeyDictionary()

    @property
    def values(self) -> tuple[Any, ...]:
        """The values made of files so far."""
        return tuple(shared.value for shared in self._stored.values())

    def add_to(
        self, options: Any, path: Path, weights: ChangedWeights | None, changed: Mapping[str, np.ndarray]
    ) -> list[Shared]:
        """Hand in the initializers of the graph ``path``; those of ``changed`` are returned, for the session to keep.

        Without prepacking and without the NCHWc layout pass (above EXTENDED) sessions make no copies of their own.
        Nothing is shared where no index says what there is (a directory older than LoRA).

        Raises:
            UserError: a weights file is missing or cut short.
        """
        if not (path.parent / WEIGHTS_INDEX).is_file():
            return []
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # The default order may convert the half-precision weights of many layers to float32 before it uses any.
        options.execution_order = self._ort.ExecutionOrder.PRIORITY_BASED
        own = {} if weights is None else self._changed.setdefault(weights, {})
        used = []
        for name, stored in weights_of(path).items():
            if stored.length < _SMALLEST or stored.dtype not in _SHARED[self._device]:
                continue
            place = (path.parent.resolve(), name)
            if name in changed:
                if place not in own:
                    own[place] = self._share(changed[name], stored.dtype)
                used.append(own[place])
                options.add_initializer(name, own[place].value)
                continue
            if place not in self._stored:
                self._stored[place] = self._share(_mapped(path.parent / WEIGHTS_NAME, name, stored), stored.dtype)
            options.add_initializer(name, self._stored[place].value)
        return used

    def _share(self, array: np.ndarray, dtype: str) -> Shared:
        """The value of ``array``, which holds a type of that name in the index."""
        if self._device == "cpu":
            return Shared(self._ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0), array)
        # ONNX Runtime refuses initializers whose memory is a value's own, as it is of all that it puts on a device. Its
        # public way to a value of memory that is there already is the output of a binding.
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        owner = self._ort.OrtValue.ortvalue_from_numpy(flat, self._device, 0)
        if self._identity is None:
            self._identity = self._ort.InferenceSession(_IDENTITY, providers=PROVIDERS["cpu"])
        binding = self._identity.io_binding()
        binding.bind_output("y", self._device, 0, ONNX_TYPES[dtype], array.shape, owner.data_ptr())
        return Shared(binding.get_outputs()[0], owner)


def _mapped(file: Path, name: str, stored: StoredWeight) -> np.ndarray:
    """The tensor in its file."""
    try:
        return np.memmap(file, dtype=_STORED_AS[stored.dtype], mode="c", offset=stored.offset, shape=stored.shape)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {name} cannot be read ({error}); export the engine directory again") from None
