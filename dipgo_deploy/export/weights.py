"""One external-data file for all graphs: every weight stored once, aligned for memory mapping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, WEIGHTS_NAME, StoredWeight, WeightsIndex
from dipgo_deploy.export.quantized import Source
from dipgo_deploy.export.stored import stored_parameter
from dipgo_deploy.reference.mapped import give_back, mapped_files

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 256
PAGE = 4096


def write_weights(graphs: Sequence[ir.Model], folder: Path, tabled: Sequence[str] = ()) -> int:
    """Write the weights of ``graphs`` to ``folder/weights.bin``, each name once, and refer the graphs to them.

    All are put in the order of their names first: cutting a graph leaves them in any, and one export is to be like the
    other to the byte.

    The graphs are cut from one model: equal names are equal tensors. Tensors up to 256 bytes (shapes, scalars) stay
    inline. Larger ones start at page boundaries; small ones follow, widest items first, so that each stays aligned to
    its own item size. The data are streamed, one tensor in memory at a time. ``weights.json`` beside it says which
    parameter each tensor is, and that ``tabled`` became tables. Returns the size of the weights file in bytes.
    """
    import onnx_ir as ir

    for graph in graphs:
        initializers = graph.graph.initializers
        ordered = sorted(initializers.items())
        initializers.clear()
        initializers.update(ordered)
    tensors = {
        name: value.const_value
        for graph in graphs
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES
    }
    names = sorted(tensors, key=lambda name: _order(tensors[name]))
    external = dict(
        zip(
            names,
            ir.external_data.convert_tensors_to_external(
                [tensors[name] for name in names],
                folder,
                WEIGHTS_NAME,
                callback=_GiveBack(),
                alignment=PAGE,
                align_threshold=PAGE,
            ),
            strict=True,
        )
    )
    index = WeightsIndex(tensors={name: _stored(tensors[name], external[name]) for name in names}, tabled=tuple(tabled))
    (folder / WEIGHTS_INDEX).write_text(index.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for graph in graphs:
        for name, value in graph.graph.initializers.items():
            if name in external:
                value.const_value = external[name]
    return (folder / WEIGHTS_NAME).stat().st_size


class _GiveBack:
    """Called before each tensor is written; gives back the pages of the one before, if it is mapped."""

    def __init__(self) -> None:
        self._mapped = mapped_files()
        self._last: Any = None

    def __call__(self, tensor: ir.TensorProtocol, _info: Any) -> None:
        import torch

        if isinstance(self._last, torch.Tensor):
            give_back(self._last, self._mapped)
        raw = tensor.raw
        self._last = raw.weight.raw if isinstance(raw, Source) else raw


def write_graphs(graphs: Sequence[ir.Model], folder: Path, tabled: Sequence[str] = ()) -> None:
    """Write graphs, under their names, beside their one weights file; full checker and shape inference. tabled: as
    ``write_weights`` has it."""
    import onnx

    folder.mkdir(exist_ok=True)
    write_weights(graphs, folder, tabled)
    for graph in graphs:
        path = folder / f"{graph.graph.name}.onnx"
        save_graph(graph, path)
        onnx.checker.check_model(str(path), full_check=True)


def save_graph(model: ir.Model, path: Path) -> None:
    """Save one graph whose large initialisers are external already; nothing but the protobuf is written."""
    import onnx_ir as ir

    ir.save(model, path)


def _stored(tensor: ir.TensorProtocol, external: ir.ExternalTensor) -> StoredWeight:
    layout = stored_parameter(tensor)
    return StoredWeight(
        parameter=None if layout is None else layout.parameter,
        transposed=layout is not None and layout.transposed,
        equal=() if layout is None else layout.equal,
        rows=None if layout is None else layout.rows,
        quantized=None if layout is None else layout.quantized,
        shape=tuple(int(extent) for extent in tensor.shape),
        dtype=tensor.dtype.name.lower(),
        offset=int(external.offset or 0),
        length=int(external.length or 0),
    )


def _order(tensor: ir.TensorProtocol) -> tuple[bool, int]:
    small = tensor.nbytes <= PAGE
    return small, -int(tensor.dtype.itemsize) if small else 0
