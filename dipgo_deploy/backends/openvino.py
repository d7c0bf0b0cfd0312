"""OpenVINO on the CPU: every tensor bound by address, once per launch of the plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy import arguments
from dipgo_deploy.backends.base import ChangedWeights, Launchable, Memory
from dipgo_deploy.backends.host import allocate_host, download_host, host_bytes, upload_host
from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.extras import install

_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The package, imported without the module that would write files below the home folder and send usage data.

    Raises:
        UserError: it is not installed.
    """
    loaded = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import openvino
    except ImportError:
        raise UserError(f"backend openvino: OpenVINO is not installed; {install('openvino')}") from None
    finally:
        del sys.modules[_TELEMETRY]
        if loaded is not None:
            sys.modules[_TELEMETRY] = loaded
    return openvino


class OpenVinoBackend:
    """Runs graphs with OpenVINO's CPU plugin, in float32 where they are in float32.

    threads: CPU threads of one launch; None: OpenVINO's default, the physical cores.

    Raises:
        UserError: OpenVINO is not there, or ``threads`` is below 1.
    """

    name = "openvino"

    def __init__(self, *, threads: int | None = None) -> None:
        if threads is not None:
            arguments.whole("threads", threads, least=1)
        self._ov = import_openvino()
        self._core = self._ov.Core()
        self._config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Its default is bfloat16 where the processor has it.
            "INFERENCE_PRECISION_HINT": "f32",
            # Its default makes what quantised weights are multiplied with whole numbers, too.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # The thread that asks also works, and none is bound to a core that another process may have.
            "ENABLE_CPU_PINNING": False,
            **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
        }

    def check(self, manifest: Manifest) -> None:
        """Refuse (UserError) an engine directory that this backend cannot run, before anything is loaded."""
        if manifest.dtype != "fp32":
            raise UserError(
                f"backend openvino: runs fp32 only, and this directory is {manifest.dtype}; export with --dtype fp32"
            )

    def allocate(self, nbytes: int) -> Memory:
        """Zero-filled memory, aligned to 256 bytes."""
        return allocate_host(nbytes)

    def upload(self, memory: Memory, array: np.ndarray) -> None:
        """Copy a host array to the start of ``memory``. Raises ValueError where it is larger."""
        upload_host(memory, array)

    def download(self, memory: Memory, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
        """A tensor, without ``copy`` the memory itself. Raises ValueError where it is larger than the memory."""
        return download_host(memory, spec, copy=copy)

    def load(self, engine_dir: Path, graph: Graph, weights: ChangedWeights | None = None) -> OpenVinoExecutable:
        """Compile one graph, with ``weights`` in the place of those that they change.

        Raises:
            UserError: the file is missing, refused by OpenVINO, or does not match the manifest.
        """
        path = engine_dir / graph.file
        if not path.is_file():
            raise UserError(f"{path}: named in the manifest but missing; export the engine directory again")
        changed = {} if weights is None else weights.of(path)
        try:
            model = self._core.read_model(path)
            _check_interface(path, "input", model.inputs, graph.inputs)
            _check_interface(path, "output", model.outputs, graph.outputs)
            self._replace(model, path, changed)
            self._hold_single_pixels(model)
            compiled = self._core.compile_model(model, "CPU", self._config)
        except UserError:
            raise
        except Exception as error:  # OpenVINO's exceptions share no base class
            raise UserError(f"{path}: OpenVINO cannot load it: {one_line(error)}") from None
        return OpenVinoExecutable(compiled, graph, path, self._ov)

    def _replace(self, model: Any, path: Path, changed: Mapping[str, np.ndarray]) -> None:
        """Put changed weights, by initializer, in the place of the model's."""
        left = set(changed)
        for node in model.get_ops() if changed else ():
            name = node.friendly_name
            if node.get_type_name() == "Constant" and name in left:
                other = self._ov.opset13.constant(changed[name])
                for target in node.output(0).get_target_inputs():
                    target.replace_source_output(other.output(0))
                left.discard(name)
        if left:
            raise UserError(f"{path}: OpenVINO does not find the weight {min(left)}, which a LoRA changes")

    def _hold_single_pixels(self, model: Any) -> None:
        """Keep OpenVINO 2026.4 from refusing an output of one pixel that nodes of another memory layout read, too: an
        operation that changes no value stands before it."""
        infinity = np.array([np.inf], np.float32)
        for result in model.get_results():
            shape = result.output(0).get_partial_shape()
            if len(shape) == 4 and all(side.is_static and side.get_length() == 1 for side in list(shape)[2:]):
                held = self._ov.opset13.minimum(result.input(0).get_source_output(), infinity)
                names = result.output(0).get_names()
                result.input(0).replace_source_output(held.output(0))
                held.output(0).set_names(names)

    def release(self, executable: OpenVinoExecutable) -> None:
        """Nothing refers to it but who has it."""

    def synchronize(self) -> None:
        """Nothing to wait for: a run returns when it is done."""

    def memory(self) -> dict[str, int]:
        """Empty: the CPU's."""
        return {}


def _check_interface(path: Path, kind: str, ports: Any, specs: tuple[TensorSpec, ...]) -> None:
    """Compare a model's inputs or outputs with the manifest's: a wrong one would be memory read out of bounds."""
    types = {"float32": "f32", "int64": "i64"}
    have = {name: port for port in ports for name in port.names}
    for spec in specs:
        port = have.get(spec.name)
        if port is None or not (
            port.get_element_type().get_type_name() == types.get(spec.dtype)
            and len(port.get_partial_shape()) == len(spec.declared)
            and all(
                side.is_dynamic if isinstance(declared, str) else side.is_static and side.get_length() == declared
                for side, declared in zip(port.get_partial_shape(), spec.declared, strict=True)
            )
        ):
            found = "missing" if port is None else f"{port.get_element_type()} {port.get_partial_shape()}"
            raise UserError(
                f"{path}: {kind} {spec.name} is {found} in the graph, {spec.dtype} {spec.declared} in the manifest; "
                "export the engine directory again"
            )


class OpenVinoExecutable:
    """A compiled graph."""

    def __init__(self, compiled: Any, graph: Graph, path: Path, ov: Any) -> None:
        self.graph = graph
        self._compiled = compiled
        self._path = path
        self._ov = ov

    def bind(self, tensors: Mapping[str, Memory], graph: Graph | None = None) -> Launchable:
        """Bind all inputs and outputs by address; see ``Executable.bind``.

        Raises:
            KeyError: a name is missing.
            ValueError: a memory is smaller than its tensor.
        """
        request = self._compiled.create_infer_request()
        shaped = graph or self.graph
        kept = []
        for spec in (*shaped.inputs, *shaped.outputs):
            memory = tensors[spec.name]
            if memory.nbytes < spec.nbytes:
                raise ValueError(f"{spec.name}: needs {spec.nbytes} bytes, its memory has {memory.nbytes}")
            array = host_bytes(memory)[: spec.nbytes].view(spec.dtype).reshape(spec.shape)
            request.set_tensor(spec.name, self._ov.Tensor(array, shared_memory=True))
            kept.append(memory)
        return _BoundRequest(request, tuple(kept), self._path)


class _BoundRequest:
    """One run of a compiled graph with fixed addresses."""

    __slots__ = ("_kept", "_path", "_request")

    def __init__(self, request: Any, kept: tuple[Memory, ...], path: Path) -> None:
        self._request = request
        self._kept = kept  # OpenVINO holds bare addresses
        self._path = path

    def __call__(self) -> None:
        try:
            self._request.start_async()
            self._request.wait()
        except Exception as error:  # OpenVINO's exceptions share no base class
            raise UserError(f"{self._path}: the run failed: {one_line(error)}") from None
