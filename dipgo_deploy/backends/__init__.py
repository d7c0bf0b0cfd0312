"""Runtimes that run an engine directory's graphs. Each is imported only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dipgo_deploy import arguments
from dipgo_deploy.backends.tensorrt_queue import GRAPH_MODES
from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from dipgo_deploy.backends.base import Backend
    from dipgo_deploy.backends.tensorrt_queue import GraphMode

BACKENDS = ("auto", "cpu", "cuda", "openvino", "tensorrt", "tensorrt-rtx")


def create_backend(
    name: str = "auto",
    *,
    threads: int | None = None,
    share_weights: bool | None = None,
    cuda_graph: GraphMode = "off",
    quick_start: bool = False,
) -> Backend:
    """Make a backend by name.

    Args:
        name: ``cpu`` or ``cuda`` (ONNX Runtime on either), ``openvino`` (on the CPU), ``tensorrt`` or ``tensorrt-rtx``
            (engines made by ``dipgo-build``), or ``auto``: CUDA where it works, else ONNX Runtime on the CPU.
        threads: CPU threads of one launch; None leaves it to the backend.
        share_weights: one copy of the weights for all graphs; None: on CUDA only (see ``OnnxRuntimeBackend``).
        cuda_graph: ``off``, ``step`` or ``loop`` (see ``TensorRTBackend``); the others have no captured graphs.
        quick_start: on the CPU graphs are loaded fast rather than run fast (see ``OnnxRuntimeBackend``).

    Raises:
        UserError: no such backend, or it cannot run on this machine; nothing has been created then.
    """
    arguments.choice("backend", name, BACKENDS)
    if threads is not None:
        arguments.whole("threads", threads, least=1)
    if share_weights is not None:
        arguments.flag("share_weights", share_weights)
    arguments.choice("--cuda-graph", cuda_graph, GRAPH_MODES)
    if name in ("tensorrt", "tensorrt-rtx"):
        from dipgo_deploy.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(name, cuda_graph=cuda_graph)
    if cuda_graph != "off":
        raise UserError(f"--cuda-graph {cuda_graph}: only with --backend tensorrt or tensorrt-rtx, not {name}")
    if name == "openvino":
        from dipgo_deploy.backends.openvino import OpenVinoBackend

        if share_weights:
            raise UserError("--share-weights: only with --backend cpu or cuda, not openvino")
        return OpenVinoBackend(threads=threads)
    from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend

    if name == "auto":
        try:
            return OnnxRuntimeBackend("cuda", threads=threads, share_weights=share_weights)
        except UserError:  # said by name only when CUDA was asked for
            name = "cpu"
    return OnnxRuntimeBackend(name, threads=threads, share_weights=share_weights, quick_start=quick_start)
