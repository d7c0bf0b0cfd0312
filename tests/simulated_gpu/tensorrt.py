"""TensorRT's part: engines that are JSON about an ONNX file, run by ONNX Runtime when the stream comes to them."""

from __future__ import annotations

import base64
import ctypes
import json
import zlib
from collections.abc import Mapping
from enum import Enum, IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from simulated_gpu.cuda import ALIGNMENT, Cudart

VERSION = "1.2.3"
_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
_NAMES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
DataType = Enum("DataType", [*_DTYPES, "BF16"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])


class ILogger:
    """Takes messages; a subclass keeps them."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class ExecutionContextAllocationStrategy(Enum):
    """As TensorRT names them."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class EngineInvalidityDiagnostics(IntFlag):
    """As TensorRT-RTX names them."""

    VERSION_MISMATCH = 1
    MALFORMED_ENGINE = 32


class ComputeCapability(Enum):
    """As TensorRT-RTX names them."""

    CURRENT = 0
    SM86 = 86
    SM89 = 89


class DynamicShapesKernelSpecializationStrategy(Enum):
    """As TensorRT-RTX names them."""

    LAZY = 0
    EAGER = 1
    NONE = 2


class Module:
    """Stands for ``tensorrt`` and ``tensorrt_rtx``."""

    __version__ = VERSION
    ILogger = ILogger
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    ComputeCapability = ComputeCapability
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __init__(self, cudart: Cudart) -> None:
        self.cudart = cudart

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self.cudart, logger)

    def Refitter(self, engine: CudaEngine, logger: ILogger) -> Refitter:
        return Refitter(engine, logger)

    def OnnxParserRefitter(self, refitter: Refitter, logger: ILogger) -> OnnxParserRefitter:
        return OnnxParserRefitter(refitter, logger)


def build_plan(flavour: Any, module: Module, work: Any, **_: Any) -> bytes:
    """In the place of ``engine.network.build_plan``: the engine has no weights but those that replace the file's."""
    changed = {} if work.weights is None else work.weights.of(work.onnx_file)
    flags = work.inputs.flags
    document = {
        "onnx": str(work.onnx_file),
        "changed": {name: _packed(array) for name, array in changed.items()},
        "strip": flags.strip,
        "refit": flags.refit or flags.strip,
        "capturable": flags.user_allocation or not flavour.user_allocation,
    }
    data = json.dumps(document).encode()
    return data + zlib.crc32(data).to_bytes(4, "big")


class Runtime:
    """Makes engines of what ``build_plan`` wrote."""

    def __init__(self, cudart: Cudart, logger: ILogger) -> None:
        assert logger.ready, "ILogger.__init__ was not called"
        self._cudart, self._logger = cudart, logger

    def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
        if zlib.crc32(data[:-4]).to_bytes(4, "big") != data[-4:]:
            self._logger.log(ILogger.ERROR, "the magic tag does not match")
            return None
        return CudaEngine(self._cudart, json.loads(data[:-4]))

    def get_engine_validity(self, data: bytes) -> tuple[int, int]:
        return 2, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)


class CudaEngine:
    """A graph with its weights, which a stripped one gets by refitting."""

    def __init__(self, cudart: Cudart, document: Mapping[str, Any]) -> None:
        self.cudart = cudart
        self.refittable = bool(document["refit"])
        self.capturable = bool(document["capturable"])
        self.file = Path(document["onnx"])
        model = onnx.load(self.file, load_external_data=False)
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self.outputs = {value.name: value.type.tensor_type for value in model.graph.output}
        self.device_memory_size_v2 = 256 * len(model.graph.node)
        self.session: onnxruntime.InferenceSession | None = None
        if not document["strip"]:
            self.take_weights({name: _unpacked(packed) for name, packed in document["changed"].items()})

    def take_weights(self, changed: Mapping[str, np.ndarray]) -> None:
        """The file's weights, but for those that are ``changed``."""
        model = onnx.load(self.file)
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode["INPUT" if name in self.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[_NAMES[self._type(name).elem_type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in self._type(name).shape.dim)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self)

    def create_execution_context(self, how: Any) -> ExecutionContext:
        cache = None
        if isinstance(how, RuntimeConfig):
            eager = DynamicShapesKernelSpecializationStrategy.EAGER
            assert how.dynamic_shapes_kernel_specialization_strategy is eager, "kernels change after some runs"
            how, cache = how.strategy, how.cache
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return ExecutionContext(self, cache)

    def _type(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]


class RuntimeConfig:
    """What a context is made with."""

    def __init__(self, engine: CudaEngine) -> None:
        self.strategy: ExecutionContextAllocationStrategy | None = None
        self.cache: RuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """The kernels that were compiled: names of the engines that have run."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, data: bytes) -> bool:
        try:
            self.kernels = set(json.loads(data))
        except ValueError:
            return False
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


class ExecutionContext:
    """Addresses and shapes; ``runs`` counts the launches that were enqueued or captured."""

    def __init__(self, engine: CudaEngine, cache: RuntimeCache | None) -> None:
        self.runs = 0
        self._engine, self._cache = engine, cache
        self._scratch: tuple[int, int] | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self._engine.device_memory_size_v2 and address % ALIGNMENT == 0
        self._scratch = (address, nbytes)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self._engine.get_tensor_shape(name)
        fits = len(declared) == len(shape) and all(d in (-1, n) for d, n in zip(declared, shape, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = name in self._engine.inputs or name in self._engine.outputs
        assert address % ALIGNMENT == 0, f"{name} is at {address:#x}, which is not aligned"
        if known:
            self._addresses[name] = address
        return known

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine, cudart = self._engine, self._engine.cudart
        shapes = {name: self._shapes.get(name, engine.get_tensor_shape(name)) for name in engine.inputs}
        assert all(-1 not in shape for shape in shapes.values()), "an open input has no shape"
        assert self._scratch is not None, "no scratch memory was given"
        addresses, scratch = dict(self._addresses), self._scratch
        assert addresses.keys() == engine.inputs.keys() | engine.outputs.keys(), "a tensor has no address"
        graph = cudart.capturing(stream)
        if graph is not None:
            assert engine.capturable, "the engine takes memory while it runs, which must not be captured"
            assert self.runs, "the first run of a context may allocate, which must not be captured"
            graph.used[self] = 0
        self.runs += 1
        if self._cache is not None:
            self._cache.kernels.add(engine.file.as_posix())
        cudart.submit(stream, lambda: self._run(addresses, shapes, scratch))
        return True

    def _run(
        self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], scratch: tuple[int, int]
    ) -> None:
        engine, cudart = self._engine, self._engine.cudart
        assert engine.session is not None, "a stripped engine ran before it was refitted"
        cudart.view(*scratch)[:] = self.runs % 256  # nobody may count on what he left there
        views = {}
        for name, shape in shapes.items():
            dtype = np.dtype(_DTYPES[engine.get_tensor_dtype(name).name])
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            views[name] = cudart.view(addresses[name], nbytes).view(dtype).reshape(shape)
        results = dict(zip(engine.outputs, engine.session.run(list(engine.outputs), views), strict=True))
        targets = {name: cudart.view(addresses[name], array.nbytes) for name, array in results.items()}
        for name, target in targets.items():
            target[:] = np.ascontiguousarray(results[name]).reshape(-1).view(np.uint8)
        # A kernel may write its output before another has read its input: the slot of a prediction lies in the stack.
        if any(np.may_share_memory(target, view) for target in targets.values() for view in views.values()):
            for name, again in zip(engine.outputs, engine.session.run(list(engine.outputs), views), strict=True):
                assert np.array_equal(again, results[name], equal_nan=True), f"{name} depends on what is written"


class Refitter:
    """Puts weights into an engine."""

    def __init__(self, engine: CudaEngine, logger: ILogger) -> None:
        self.engine, self._logger = engine, logger
        self.changed: dict[str, tuple[int, int]] | None = None

    def refit_cuda_engine(self) -> bool:
        if not self.engine.refittable:
            self._logger.log(ILogger.ERROR, "the engine cannot be refitted")
            return False
        assert self.changed is not None, "no weights were given"
        weights = {}
        for tensor in onnx.load(self.engine.file, load_external_data=False).graph.initializer:
            if tensor.name in self.changed:
                data = ctypes.string_at(*self.changed[tensor.name])
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                weights[tensor.name] = np.frombuffer(data, dtype).reshape(tensor.dims)
        assert weights.keys() == self.changed.keys(), "weights were given that the graph does not have"
        self.engine.take_weights(weights)
        return True


class OnnxParserRefitter:
    """Tells a refitter the weights of an ONNX file; arrays are read when it refits."""

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter
        self._changed: dict[str, tuple[int, int]] = {}

    def refit_from_file(self, file: str) -> bool:
        return self.load_model_proto(Path(file).read_bytes(), file) and self.refit_model_proto()

    def load_model_proto(self, data: bytes, path: str) -> bool:
        return Path(path) == self._refitter.engine.file

    def load_initializer(self, name: str, address: int, nbytes: int) -> bool:
        self._changed[name] = (address, nbytes)
        return True

    def refit_model_proto(self) -> bool:
        self._refitter.changed = self._changed
        return True


def _packed(array: np.ndarray) -> list[Any]:
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def _unpacked(packed: list[Any]) -> np.ndarray:
    dtype, shape, data = packed
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
