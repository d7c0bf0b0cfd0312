"""ONNX Runtime on the CPU or on CUDA: every tensor bound by address, once per launch of the plan."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy import arguments
from dipgo_deploy.backends.base import ChangedWeights, Launchable, Memory
from dipgo_deploy.backends.host import allocate_host, download_host, upload_host
from dipgo_deploy.backends.install import check_onnxruntime_installation
from dipgo_deploy.backends.onnxruntime_cuda import CPU, CUDA, FATAL, PROVIDERS, require_cuda
from dipgo_deploy.backends.onnxruntime_pairs import suit_folder
from dipgo_deploy.backends.onnxruntime_weights import SharedWeights
from dipgo_deploy.backends.storage import as_bytes, from_storage
from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, weights_of
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.extras import install

_ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
_SESSION_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
# Bytes of a graph's convolutions above which a quick start leaves their layout as it is. ONNX Runtime's own (NCHWc)
# is made anew for each session, in 3 s a GiB, and is worth 2-7 % of a launch of SD-1.5, 29 % of one of fashion-sd.
_LARGE_CONVOLUTIONS = 2**28


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime.

    Args:
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads of one launch; None: ONNX Runtime's default, the physical cores.
        share_weights: all graphs use one copy of the weights: on CUDA one in its memory (the default there), on the
            CPU the memory-mapped file itself, at the price of slower matrix products (so not the default there): ONNX
            Runtime cannot re-lay-out ("prepack") weights that it does not own.
        quick_start: on the CPU leave out what takes longer to load than it saves in a few launches: large convolutions
            keep their layout.

    Raises:
        UserError: ONNX Runtime or the provider is not there, CUDA has no usable device, or ``threads`` is below 1.
    """

    def __init__(
        self,
        provider: str = "cpu",
        *,
        threads: int | None = None,
        share_weights: bool | None = None,
        quick_start: bool = False,
    ) -> None:
        if provider not in ("cpu", "cuda"):
            raise UserError(f"backend {provider!r}: ONNX Runtime runs on cpu or cuda")
        if threads is not None:
            arguments.whole("threads", threads, least=1)
        if share_weights is not None:
            arguments.flag("share_weights", share_weights)
        self._ort = _import_onnxruntime()
        if provider == "cpu":
            _one_arena(self._ort)
        self.name = provider
        self._provider = CUDA if provider == "cuda" else CPU
        self._threads = threads
        self._quick_start = quick_start and provider == "cpu"
        self._share_weights = provider == "cuda" if share_weights is None else share_weights
        self.shared_weights = SharedWeights(self._ort, provider)
        if provider == "cuda":
            require_cuda(self._ort)

    def check(self, manifest: Manifest) -> None:
        """Refuse an engine directory that this backend cannot run, before anything is loaded.

        Raises:
            UserError: bf16 on the CPU.
        """
        if manifest.dtype == "bf16" and self.name == "cpu":
            raise UserError(
                "backend cpu: ONNX Runtime has no bf16 kernels for the CPU; use --backend cuda,"
                " or export with --dtype fp32 or fp16"
            )

    def allocate(self, nbytes: int) -> Memory:
        """Zero-filled memory, aligned to 256 bytes."""
        if self.name == "cuda":
            value = self._ort.OrtValue.ortvalue_from_shape_and_type([max(nbytes, 1)], np.uint8, "cuda", 0)
            value.update_inplace(np.zeros(max(nbytes, 1), dtype=np.uint8))
            return Memory(value.data_ptr(), nbytes, value)
        return allocate_host(nbytes)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """Copy a host array to the start of ``memory``.

        Raises:
            ValueError: the array is larger than the memory.
        """
        if self.name == "cpu":
            upload_host(memory, array)
            return
        data = as_bytes(array)
        if data.nbytes > memory.nbytes:
            raise ValueError(f"{data.nbytes} bytes do not fit a memory of {memory.nbytes}")
        # A device OrtValue can only be replaced as a whole: what surrounds a part is read back first.
        start = memory.address - memory.owner.data_ptr()
        whole = memory.owner.numpy() if data.nbytes < memory.owner.shape()[0] else np.empty(data.nbytes, np.uint8)
        whole[start : start + data.nbytes] = data
        memory.owner.update_inplace(whole)

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        """Copy a tensor to the host; bfloat16 comes as float32. On the CPU ``copy`` may be left out.

        Raises:
            ValueError: the tensor is larger than the memory.
        """
        if self.name == "cpu":
            return download_host(memory, spec, copy=copy)
        if spec.nbytes > memory.nbytes:
            raise ValueError(f"{spec.name}: {spec.nbytes} bytes are more than the memory's {memory.nbytes}")
        return from_storage(memory.owner.numpy()[memory.address - memory.owner.data_ptr() :], spec, copy=copy)

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> OnnxExecutable:
        """Make a session for one graph; its inputs and outputs must be those of the manifest.

        Of ``weights`` only those that they change are the session's own.

        Raises:
            UserError: the file is missing, refused by ONNX Runtime, does not match the manifest, or CUDA fell back.
        """
        path = engine_dir / graph.file
        if not path.is_file():
            raise UserError(f"{path}: named in the manifest but missing; export the engine directory again")
        options = self.session_options()
        if self._quick_start and _convolution_bytes(path) > _LARGE_CONVOLUTIONS:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        suit_folder(options, path.parent)
        changed = {} if weights is None else weights.of(path)
        values: list[Any] = []
        if changed:
            # Only values given in this way are seen by the graph optimisations too: a folded transpose of a weight
            # that was merely added would still be made of the file's.
            values = [self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a, _onnx_type(a)) for a in changed.values()]
            options.add_external_initializers(list(changed), values)
        if self._share_weights:
            values += self.shared_weights.add_to(options, path, weights, changed)
        try:
            session = self._ort.InferenceSession(
                str(path), options, providers=PROVIDERS[self.name], enable_fallback=False
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(f"{path}: ONNX Runtime cannot load it on {self.name}: {one_line(error)}") from None
        if self._provider not in session.get_providers():
            raise UserError(f"{path}: ONNX Runtime fell back to the CPU although cuda was asked for; use --backend cpu")
        _check_interface(path, "input", session.get_inputs(), graph.inputs)
        _check_interface(path, "output", session.get_outputs(), graph.outputs)
        return OnnxExecutable(session, graph, path, self.name, self._ort, kept=tuple(values))

    def release(self, executable: OnnxExecutable) -> None:
        """Nothing refers to it but who has it."""

    def synchronize(self) -> None:
        """Nothing to wait for: a run returns when it is done.

        Sessions have a CUDA stream each, so ONNX Runtime's own synchronisation at the end of a run is also what
        orders a launch after the one whose caches it reads.
        """

    def session_options(self) -> Any:
        """Of every graph that is loaded."""
        options = self._ort.SessionOptions()
        options.log_severity_level = FATAL
        # Each session has a thread pool of its own. The threads of the one that just ran would go on spinning on the
        # cores that the next launch, usually of another session, needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.name == "cpu":
            options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights are re-laid out by as many threads as a launch has.
        options.add_session_config_entry("session.prepack.enable_parallel", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options

    def memory(self) -> dict[str, int]:
        """Bytes of the device: ``free`` and ``total``, where cuda-python is installed to ask; empty on the CPU."""
        if self.name == "cpu":
            return {}
        from dipgo_deploy.backends.tensorrt_cuda import memory_of_device

        return memory_of_device()


class OnnxExecutable:
    """A session with the graph of the manifest that it runs."""

    def __init__(
        self, session: Any, graph: Graph, path: Path, device: str, ort: Any, *, kept: tuple[Any, ...] = ()
    ) -> None:
        self.graph = graph
        self._session = session
        self._kept = kept  # values that the session refers to
        self._path = path
        self._device = device
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = FATAL
        # Each run looks this option up; where it is not set, that raises and catches an exception: 30 us a launch.
        # -1, "no graph capture", is what happens anyway.
        self._run_options.add_run_config_entry("gpu_graph_id", "-1")

    def end_profiling(self) -> str:
        """Stop the profiling that the session was made with; the file that holds it."""
        path: str = self._session.end_profiling()
        return path

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        """Bind all inputs and outputs by address, for as many launches as wanted; see ``Executable.bind``.

        Raises:
            KeyError: a name is missing.
            ValueError: a memory is smaller than its tensor.
        """
        binding = self._session.io_binding()
        kept: list[Memory] = []
        shaped = graph or self.graph
        for bind, specs in ((binding.bind_input, shaped.inputs), (binding.bind_output, shaped.outputs)):
            for spec in specs:
                memory = tensors[spec.name]
                if memory.nbytes < spec.nbytes:
                    raise ValueError(f"{spec.name}: needs {spec.nbytes} bytes, its memory has {memory.nbytes}")
                kept.append(memory)
                bind(spec.name, self._device, 0, _ONNX_TYPES[spec.dtype], spec.shape, memory.address)
        return _BoundRun(self, binding, tuple(kept))


class _BoundRun:
    """One run of a session with fixed addresses."""

    __slots__ = ("_binding", "_executable", "_kept", "_options", "_run")

    def __init__(self, executable: OnnxExecutable, binding: Any, kept: tuple[Memory, ...]) -> None:
        self._executable = executable
        self._run = executable._session.run_with_iobinding
        self._options = executable._run_options
        self._binding = binding
        self._kept = kept  # ONNX Runtime holds bare addresses: the memory lives as long as the binding

    def __call__(self) -> None:
        try:
            self._run(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(f"{self._executable._path}: the run failed: {one_line(error)}") from None


_arena_made = False
_arena_lock = threading.Lock()


def _one_arena(ort: Any) -> None:
    """Let all sessions take their intermediate tensors from one arena.

    By default each session keeps what its largest run needed, and a bundle has many sessions, of which one runs at a
    time. The arena belongs to the process, so it is made once; growing by what is asked for, not by powers of two.
    """
    global _arena_made
    with _arena_lock:
        if not _arena_made:
            info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
            _arena_made = True


def _convolution_bytes(path: Path) -> int:
    """Of the weights of two-dimensional convolutions outside the ONNX file: what has four axes. 0 without an index."""
    if not (path.parent / WEIGHTS_INDEX).is_file():
        return 0
    return sum(stored.length for stored in weights_of(path).values() if len(stored.shape) == 4)


def _onnx_type(array: np.ndarray) -> int:
    """ONNX's number of a stored array's type; uint16 holds bfloat16."""
    return {"float32": 1, "float16": 10, "uint16": 16}[array.dtype.name]


def _import_onnxruntime() -> Any:
    check_onnxruntime_installation()
    try:
        import onnxruntime

        _ = onnxruntime.InferenceSession
    except (ImportError, AttributeError):
        raise UserError(f"ONNX Runtime is missing or broken; {install('cpu')}, or [gpu], never both") from None
    return onnxruntime


def _check_interface(path: Path, kind: str, values: Any, specs: tuple[TensorSpec, ...]) -> None:
    """Compare a session's inputs or outputs with the manifest's: bound by address, a wrong shape would be memory
    read or written out of bounds."""
    have = {value.name: f"{value.type} {tuple(value.shape)}" for value in values}
    want = {spec.name: f"tensor({_SESSION_TYPES[spec.dtype]}) {spec.declared}" for spec in specs}
    for name in [*want, *have]:
        if have.get(name) != want.get(name):
            raise UserError(
                f"{path}: {kind} {name} is {have.get(name, 'missing')} in the graph, {want.get(name, 'missing')}"
                " in the manifest; export the engine directory again"
            )
