"""ONNX Runtime with a CUDA provider whose device memory is the host's, where only ONNX Runtime may touch it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

_CPU = "CPUExecutionProvider"


class OrtValue:
    """A value on the simulated device; what comes from it is a copy, as from a real one."""

    def __init__(self, value: onnxruntime.OrtValue) -> None:
        self.value = value

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: list[int], dtype: Any, device: str, index: int) -> OrtValue:
        assert (device, index) == ("cuda", 0)
        made = cls(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0))
        made.update_inplace(np.full(shape, 0xFF, dtype))
        return made

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, index: int) -> OrtValue:
        assert (device, index) == ("cuda", 0)
        # A value on the host would refer to the array.
        made = cls(onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, "cpu", 0))
        made.update_inplace(np.array(array))
        return made

    @staticmethod
    def ortvalue_from_numpy_with_onnx_type(array: np.ndarray, onnx_type: int) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, onnx_type)

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def shape(self) -> list[int]:
        return self.value.shape()

    def device_name(self) -> str:
        return "cuda"

    def numpy(self) -> np.ndarray:
        return np.array(self.value.numpy())

    def update_inplace(self, array: np.ndarray) -> None:
        assert list(array.shape) == list(self.shape()), "a value can only be replaced as a whole"
        self.value.update_inplace(array)


class SessionOptions(onnxruntime.SessionOptions):
    """Takes values of the device as initializers."""

    def add_initializer(self, name: str, value: OrtValue) -> None:
        super().add_initializer(name, value.value)


class Binding:
    """Takes addresses on the device only."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.binding = session.io_binding()

    def get_outputs(self) -> list[OrtValue]:
        return [OrtValue(value) for value in self.binding.get_outputs()]

    def bind_input(self, name: str, device: str, index: int, kind: int, shape: Any, address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.binding.bind_input(name, "cpu", 0, kind, shape, address)

    def bind_output(self, name: str, device: str, index: int, kind: int, shape: Any, address: int) -> None:
        assert (device, index) == ("cuda", 0)
        self.binding.bind_output(name, "cpu", 0, kind, shape, address)


class InferenceSession:
    """On the CPU provider, under CUDA's name."""

    def __init__(
        self,
        model: str | bytes,
        options: SessionOptions | None = None,
        *,
        providers: list[Any],
        enable_fallback: bool = True,
    ) -> None:
        self._providers = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        options = options or SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=[_CPU])

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self._session)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self._session.run_with_iobinding(binding.binding, options)


class Module:
    """Stands for the module of onnxruntime-gpu."""

    OrtValue = OrtValue
    SessionOptions = SessionOptions
    InferenceSession = InferenceSession

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)
