"""TensorRT and TensorRT-RTX: engines made by ``dipgo-build``, run on one stream with one scratch memory for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from dipgo_deploy.backends.base import ALIGNMENT, ChangedWeights, Launchable, Memory
from dipgo_deploy.backends.storage import from_storage
from dipgo_deploy.backends.tensorrt_cuda import Cuda, Device, require_device
from dipgo_deploy.backends.tensorrt_flavour import Flavour, flavour_of, import_flavour, unsuited
from dipgo_deploy.backends.tensorrt_kernels import KernelCache
from dipgo_deploy.backends.tensorrt_plans import (
    GpuTarget,
    KeyInputs,
    PlanRecord,
    WeightHashes,
    plan_name,
    profile_of,
    stored_plans,
)
from dipgo_deploy.backends.tensorrt_queue import GRAPH_MODES, GraphMode, LaunchQueue, Run
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.errors import UserError, one_line

# What TensorRT calls the types of a manifest.
DTYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}


_Copy = tuple[Memory, Memory, int]


class TensorRTBackend:
    """Runs the engines of an engine directory.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        cuda_graph: ``off``, ``step`` (a graph for each launch) or ``loop`` (one for a whole run); see ``LaunchQueue``.

    Raises:
        UserError: no GPU, or the module is missing. Nothing has been created then: without a device TensorRT's own
            Runtime can crash the process.
    """

    def __init__(self, name: str = "tensorrt", *, cuda_graph: GraphMode = "off") -> None:
        if cuda_graph not in GRAPH_MODES:
            raise UserError(f"--cuda-graph {cuda_graph}: choose one of {', '.join(GRAPH_MODES)}")
        self.flavour = flavour_of(name)
        self.name = name
        self.device: Device = require_device(name)
        self.module = import_flavour(self.flavour)
        self.logger = collecting_logger(self.module)
        self._cuda = Cuda(name)
        self._runtime = self.module.Runtime(self.logger)
        self._hashes = WeightHashes()
        self._one_context = cuda_graph != "step"
        self._queue = LaunchQueue(cuda_graph, self._capture)
        self._scratch = self._cuda.allocate(0)
        self._loaded: WeakKeyDictionary[TensorRTExecutable, int] = WeakKeyDictionary()
        self._unsaved: list[KernelCache] = []

    def check(self, manifest: Manifest) -> None:
        """Every dtype runs; what is missing shows when the engines are looked up."""

    def allocate(self, nbytes: int) -> Memory:
        """Zero-filled device memory, aligned to 256 bytes."""
        return self._cuda.allocate(nbytes)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """Copy a host array to the start of ``memory``, in the order of the launches.

        Raises:
            ValueError: the array is larger than the memory.
        """
        self._queue.flush()
        self._cuda.upload(memory, array)

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        """Copy a tensor to the host after all launches; bfloat16 comes as float32.

        Raises:
            ValueError: the tensor is larger than the memory.
        """
        if spec.nbytes > memory.nbytes:
            raise ValueError(f"{spec.name}: {spec.nbytes} bytes are more than the memory's {memory.nbytes}")
        self._queue.flush()
        return from_storage(self._cuda.download(memory, spec.nbytes), spec)

    def synchronize(self) -> None:
        """Wait for all launches."""
        self._queue.flush()
        self._cuda.synchronize()
        while self._unsaved:  # what the first runs of new contexts compiled
            self._unsaved.pop().save()

    @property
    def stream(self) -> int:
        """The CUDA stream of all launches, for events."""
        return self._cuda.stream

    def memory(self) -> dict[str, int]:
        """Bytes on the device: ``weights`` of the loaded engines, ``scratch`` shared by all, ``free``, ``total``."""
        free, total = self._cuda.free_bytes()
        return {"weights": sum(self._loaded.values()), "scratch": self._scratch.nbytes, "free": free, "total": total}

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> TensorRTExecutable:
        """Load the engine of one graph; it must have been built from exactly this graph and its weights.

        Changed weights need an engine that was built with them, or with ``--refit``: they are then put into it.

        Raises:
            UserError: no engine that fits version and GPU, one of other inputs, a damaged one, or out of memory.
        """
        onnx_file = engine_dir / graph.file
        lora = () if weights is None else weights.identity_of(onnx_file)
        version = self.module.__version__
        path, record = find_plan(engine_dir, graph, self.flavour, version, self.device, self._hashes, lora=lora)
        if not record.intact(path):
            raise UserError(
                f"{path}: damaged (its sha256 is not the recorded one); "
                f"dipgo-build --engine-dir {engine_dir} --backend {self.name} builds it again"
            )
        self.logger.messages.clear()
        data = path.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(f"{path}: {self.flavour.title} refuses it: {self._why(data)}")
        changed = {} if weights is None or record.inputs.lora == lora else weights.of(onnx_file)
        if record.inputs.flags.strip or changed:
            self._refit(engine, path, onnx_file, changed)
        del data
        check_engine(path, engine, graph)
        self._grow_scratch(int(engine.device_memory_size_v2))
        kernels = None
        if self.flavour.runtime_cache:
            here = GpuTarget(gpu=self.device.name, capabilities=(self.device.capability,)).label
            kernels = KernelCache(path.with_suffix(f".{here}.kernels"))
        executable = TensorRTExecutable(self, engine, graph, path, kernels)
        self._loaded[executable] = record.weights_bytes
        return executable

    def release(self, executable: TensorRTExecutable) -> None:
        """Forget the captured launches of a loaded graph, which hold it."""
        self._queue.forget(executable.contexts)

    def copy(self, target: Memory, source: Memory, nbytes: int) -> None:
        """Enqueue a copy on the device."""
        self._cuda.copy(target, source, nbytes)

    def keep_kernels(self, kernels: KernelCache) -> None:
        """Save a cache after the next synchronisation: a new context is about to be run for the first time."""
        self._unsaved.append(kernels)

    def bound(self, run: _Run) -> Launchable:
        """A launchable that goes through the queue."""
        return _Queued(self._queue, run)

    @property
    def scratch(self) -> Memory:
        """The scratch of all contexts: launches follow each other, so they can share it."""
        return self._scratch

    @property
    def one_context(self) -> bool:
        """Whether all launches of an engine share one context (a captured launch needs one of its own)."""
        return self._one_context

    def _capture(self, runs: Sequence[Run]) -> Callable[[], None]:
        for context in {run.context for run in runs}:
            assert isinstance(context, _Context)
            context.require_capturable()
        return self._cuda.capture(runs)

    def _grow_scratch(self, nbytes: int) -> None:
        if nbytes <= self._scratch.nbytes:
            return
        self.synchronize()
        self._queue.invalidate()  # captured graphs hold the old address
        self._scratch = self._cuda.allocate(0)  # frees the old memory before the new is wanted
        self._scratch = self._cuda.allocate(nbytes)

    def _why(self, data: bytes) -> str:
        reasons = list(self.logger.messages[-2:])
        if self.flavour.validity:
            _, diagnostics = self._runtime.get_engine_validity(data)
            members = self.module.EngineInvalidityDiagnostics.__members__.items()
            reasons += [name.lower().replace("_", " ") for name, member in members if int(diagnostics) & int(member)]
        reasons += unsuited(self.flavour, self.module, self.device.name, self.device.capability)
        free, total = self._cuda.free_bytes()
        return (
            f"{'; '.join(reasons) or 'no reason given'}; it has {len(data) / 2**20:.0f} MiB, and {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB of GPU memory are free; build it on this machine"
        )

    def _refit(self, engine: Any, plan: Path, onnx_file: Path, changed: Mapping[str, np.ndarray]) -> None:
        """Put a graph's weights, with the changed ones, into an engine that can take them."""
        refitter = self.module.Refitter(engine, self.logger)
        parser = self.module.OnnxParserRefitter(refitter, self.logger)
        if not feed_model(parser, onnx_file, changed) or not refitter.refit_cuda_engine():
            raise UserError(
                f"{plan}: its weights could not be taken from {onnx_file} ({'; '.join(self.logger.messages[-2:])});"
                " build it again without --strip and --refit"
            )


class TensorRTExecutable:
    """A loaded engine with the graph of the manifest that it runs."""

    def __init__(
        self, backend: TensorRTBackend, engine: Any, graph: Graph, path: Path, kernels: KernelCache | None = None
    ) -> None:
        self.graph = graph
        self._kernels = kernels
        self._context: _Context | None = None
        self._contexts: WeakSet[_Context] = WeakSet()
        self._engine = engine
        self._backend = backend
        self._path = path

    @property
    def contexts(self) -> Collection[Hashable]:
        """Those of its launches."""
        return tuple(self._contexts)

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        """Bind all inputs and outputs by address, for as many launches as wanted; see ``Executable.bind``.

        Raises:
            KeyError: a name is missing.
            ValueError: a memory is smaller than its tensor.
            UserError: the device has no memory for another context.
        """
        kept: dict[str, Memory] = {}
        shaped = graph or self.graph
        for spec in (*shaped.inputs, *shaped.outputs):
            memory = tensors[spec.name]
            if memory.nbytes < spec.nbytes:
                raise ValueError(f"{spec.name}: needs {spec.nbytes} bytes, its memory has {memory.nbytes}")
            kept[spec.name] = memory
        context = self._context
        if context is None or not self._backend.one_context:
            self._context = context = _Context(self._backend, self._engine, self._path, self._kernels)
            self._contexts.add(context)
        # The slots of latents of odd sizes are not aligned.
        odd = {name for name, memory in kept.items() if memory.address % ALIGNMENT}
        inputs, outputs = ([s for s in specs if s.name in odd] for specs in (shaped.inputs, shaped.outputs))
        before = [(context.aligned(spec), kept[spec.name], spec.nbytes) for spec in inputs]
        after = [(kept[spec.name], context.aligned(spec), spec.nbytes) for spec in outputs]
        bound = kept | {spec.name: context.aligned(spec) for spec in (*inputs, *outputs)}
        shapes = {spec.name: spec.shape for spec in shaped.inputs if spec.dims is not None}
        return self._backend.bound(_Run(context, bound, shapes, before, after))


class _Context:
    """An execution context that knows its addresses and shapes, so that only those that differ are set again."""

    def __init__(self, backend: TensorRTBackend, engine: Any, path: Path, kernels: KernelCache | None) -> None:
        strategy = backend.module.ExecutionContextAllocationStrategy.USER_MANAGED
        # Attributes go in this order: a context before its engine, an engine before its backend's runtime.
        if kernels is None:
            self.context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # Else the first runs at open sizes use slower kernels, which a captured graph would keep, and results
            # change when the right ones have been compiled.
            config.dynamic_shapes_kernel_specialization_strategy = (
                backend.module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            kernels.attach(config)
            self.context = engine.create_execution_context(config)
            backend.keep_kernels(kernels)
        self._engine = engine
        self.backend = backend
        self.path = path
        if self.context is None:
            raise UserError(
                f"{path}: no execution context ({'; '.join(backend.logger.messages[-2:]) or 'out of GPU memory'});"
                " close other programs, or export fewer variants"
            )
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch: Memory | None = None
        self._aligned: dict[str, Memory] = {}

    def aligned(self, spec: TensorSpec) -> Memory:
        """A place for a tensor whose own is not aligned. Launches follow each other, so all can have the same one."""
        memory = self._aligned.get(spec.name)
        if memory is None or memory.nbytes < spec.nbytes:
            memory = self._aligned[spec.name] = self.backend.allocate(spec.nbytes)
        return memory

    def require_capturable(self) -> None:
        """Raise a UserError where launches of this context cannot be part of a captured graph."""
        ask = getattr(self.context, "is_stream_capturable", None)
        if ask is not None and not ask(self.backend.stream):
            raise UserError(
                f"{self.path}: its launches cannot be captured as a CUDA graph (it takes memory while it runs); use "
                "--cuda-graph off"
            )

    def enqueue(self, tensors: Mapping[str, Memory], shapes: Mapping[str, tuple[int, ...]]) -> None:
        scratch = self.backend.scratch
        if self._scratch is not scratch:
            self.context.set_device_memory(scratch.address, scratch.nbytes)
            self._scratch = scratch
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                if not self.context.set_input_shape(name, shape):
                    raise UserError(f"{self.path}: input {name} cannot have shape {shape}{self._last_message()}")
                self._shapes[name] = shape
        for name, memory in tensors.items():
            if self._addresses.get(name) != memory.address:
                if not self.context.set_tensor_address(name, memory.address):
                    raise UserError(f"{self.path}: tensor {name} cannot be bound{self._last_message()}")
                self._addresses[name] = memory.address
        if not self.context.execute_async_v3(self.backend.stream):
            raise UserError(f"{self.path}: the run failed{self._last_message()}")

    def _last_message(self) -> str:
        messages = self.backend.logger.messages
        return f" ({messages[-1]})" if messages else ""


class _Run:
    """A launch: a context, the memory of each tensor, which it keeps alive, and the shapes of open inputs.

    before, after: copies (to, from, bytes) on the device around it.
    """

    __slots__ = ("_after", "_before", "_shapes", "_tensors", "context")

    def __init__(
        self,
        context: _Context,
        tensors: Mapping[str, Memory],
        shapes: Mapping[str, tuple[int, ...]],
        before: Sequence[_Copy],
        after: Sequence[_Copy],
    ) -> None:
        self.context = context
        self._tensors = tensors
        self._shapes = shapes
        self._before, self._after = before, after

    def __call__(self) -> None:
        for copy in self._before:
            self.context.backend.copy(*copy)
        self.context.enqueue(self._tensors, self._shapes)
        for copy in self._after:
            self.context.backend.copy(*copy)


class _Queued:
    __slots__ = ("_queue", "_run")

    def __init__(self, queue: LaunchQueue, run: _Run) -> None:
        self._queue, self._run = queue, run

    def __call__(self) -> None:
        self._queue.submit(self._run)


def find_plan(
    engine_dir: Path,
    graph: Graph,
    flavour: Flavour,
    version: str,
    device: Device,
    hashes: WeightHashes,
    *,
    lora: Sequence[tuple[str, float]] = (),
) -> tuple[Path, PlanRecord]:
    """The engine of a graph that runs here: of this version and for this GPU, built from this graph and weights.

    With ``lora`` (sha256 and scale of each file) it is one built with exactly those, else one that can be refitted. An
    engine built for exactly this GPU goes before one for several.

    Raises:
        UserError: there is none; the message says what there is and why it does not fit.
    """
    name = plan_name(graph)
    remedy = f"dipgo-build --engine-dir {engine_dir} --backend {flavour.backend}"
    stored = stored_plans(engine_dir, flavour.backend, name)
    if not stored:
        raise UserError(f"{engine_dir}: no {flavour.title} engine of {name}; build them first: {remedy}")
    onnx_file = engine_dir / graph.file
    if not onnx_file.is_file():
        raise UserError(f"{onnx_file}: named in the manifest but missing; export the engine directory again")
    weights, _ = hashes.digest(onnx_file)
    current = {"graph": sha256_file(onnx_file), "weights": weights, "profile": profile_of(graph)}
    reasons = []
    wanted = tuple(lora)
    stored.sort(key=lambda item: (item[1].inputs.lora != wanted, item[1].inputs.target.gpu != device.name))
    for path, record in stored:
        reason = _misfit(record.inputs, current, version, device, wanted)
        if reason is None:
            return path, record
        reasons.append(f"{path.parent.name}: {reason}")
    raise UserError(f"{engine_dir}: no {flavour.title} engine of {name} fits ({'; '.join(reasons)}); {remedy}")


def _misfit(
    inputs: KeyInputs, current: Mapping[str, object], version: str, device: Device, lora: tuple[tuple[str, float], ...]
) -> str | None:
    for field, value in current.items():
        if getattr(inputs, field) != value:
            return f"built from another {field}"
    if inputs.lora != lora:
        if inputs.lora:
            return "built with another LoRA" if lora else "built with a LoRA"
        if not inputs.flags.refit:
            return "built without this LoRA (give it to dipgo-build with --lora) and without --refit"
    if inputs.version != version and not (inputs.flags.version_compatible and _older(inputs.version, version)):
        return f"built with version {inputs.version}, {version} is installed"
    target, here = inputs.target, f"{device.name} ({device.capability})"
    if target.gpu is not None and target.gpu != device.name:
        ampere = tuple(int(part) for part in device.capability.split(".")) >= (8, 0)
        if not (inputs.flags.hardware_compatible and ampere):
            return f"built for {target.gpu}, this is {here}"
    if target.gpu is None and target.capabilities and device.capability not in target.capabilities:
        return f"built for compute capability {', '.join(target.capabilities)}, this is {here}"
    return None


def _older(built: str, installed: str) -> bool:
    """Whether a version-compatible engine may run: the same major version, not newer than the installed one."""
    try:
        first, second = ([int(part) for part in version.split(".")] for version in (built, installed))
    except ValueError:
        return False
    return first[0] == second[0] and first <= second


def feed_model(parser: Any, onnx_file: Path, changed: Mapping[str, np.ndarray]) -> bool:
    """Give an ONNX file to an OnnxParser or an OnnxParserRefitter, with ``changed`` in the place of its weights.

    The arrays must outlive the parser and what it fills. Returns False when the file is refused; the parser's or
    logger's messages say why.

    Raises:
        UserError: this TensorRT cannot replace weights, or refuses one.
    """
    parse, whole = (
        (parser.parse_from_file, "parse_model_proto")
        if hasattr(parser, "parse_from_file")
        else (parser.refit_from_file, "refit_model_proto")
    )
    if not changed:
        return bool(parse(str(onnx_file)))
    if not hasattr(parser, "load_initializer"):
        raise UserError(f"{onnx_file}: this TensorRT's parser cannot replace weights for a LoRA; update TensorRT")
    if not parser.load_model_proto(onnx_file.read_bytes(), str(onnx_file)):
        return False
    for name, array in changed.items():
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise UserError(f"{onnx_file}: TensorRT does not take the changed weight {name}; leave the LoRA out")
    return bool(getattr(parser, whole)())


def check_engine(path: Path, engine: Any, graph: Graph) -> None:
    """Compare an engine's inputs and outputs with the manifest's: a wrong shape would be memory read out of bounds.

    Raises:
        UserError: names the first tensor that differs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: describe(engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name), engine.get_tensor_shape(name))
        for name in names
    }
    compare_interface(path, found, graph)


def describe(mode: str, dtype: Any, shape: Any) -> str:
    """``input float32 (1, 4)``, from TensorRT's own descriptions; an open extent is -1."""
    return f"{mode.lower()} {DTYPE_NAMES.get(dtype.name, dtype.name)} {tuple(shape)}"


def compare_interface(path: Path, actual: Mapping[str, str], graph: Graph) -> None:
    """Compare ``describe``d tensors by name with those of the manifest.

    Raises:
        UserError: names file, tensor, and both descriptions.
    """

    def described(mode: str, spec: TensorSpec) -> str:
        return f"{mode} {spec.dtype} {tuple(-1 if isinstance(dim, str) else dim for dim in spec.declared)}"

    declared = {spec.name: described("input", spec) for spec in graph.inputs}
    declared |= {spec.name: described("output", spec) for spec in graph.outputs}
    for name in [*declared, *actual]:
        if actual.get(name) != declared.get(name):
            raise UserError(
                f"{path}: tensor {name} is {actual.get(name, 'missing')} there, {declared.get(name, 'missing')} in the"
                " manifest; export the engine directory again"
            )


def collecting_logger(module: Any) -> Any:
    """A logger of TensorRT's that keeps errors and warnings in ``messages`` and prints nothing."""

    class Collector(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.messages.append(one_line(message, 300))

    return Collector()
