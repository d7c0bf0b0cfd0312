"""Stored weights against the model's parameters, value by value, through the index beside them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dipgo_deploy.bundle.quantized import NUMBER_TYPES, spacing, step_of, to_weight, unpacked
from dipgo_deploy.bundle.weights import WEIGHTS_NAME, StoredWeight, WeightsIndex
from dipgo_deploy.compare.metrics import TensorError, Tolerance, tensor_error
from dipgo_deploy.compare.report import Part
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.reference.conditions import has_text_encoder

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.reference.source import Source

NAME, MODEL = "weights", "the model"
_EXACT = Tolerance(0.0)
_TORCH = {
    "float": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}


def check_weights(bundle: Bundle, source: Source) -> list[Part]:
    """Every stored weight that is a parameter of the model has that one's values in its own type, bit for bit, or in
    fewer bits the numbers that are nearest to them, and every graph takes it from where the index says; a part for each
    that is wrong, or one for all.

    Raises:
        UserError: an index or a graph that cannot be read.
    """
    components = bundle.manifest.components
    folders: dict[str, Mapping[str, torch.Tensor]] = {"graphs": dict(source.denoiser.state_dict(keep_vars=True))}
    encoder = components.text_encoder
    if encoder is not None and source.text is not None and has_text_encoder(source):
        parts = {name: getattr(source.pipeline, name) for name in source.text.encoders}
        named = {
            (name if len(parts) == 1 else f"{part}.{name}"): tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict(keep_vars=True).items()
        }
        folders[str(Path(encoder.graph.file).parent)] = named
    vae = getattr(source.pipeline, "vae", None)
    pictures = getattr(source.pipeline, "image_encoder", None)
    # What follows in a video lies beside the first.
    pairs = ((components.vae_decoder, vae), (components.vae_encoder, vae), (components.image_encoder, pictures))
    for graph, module in pairs:
        if graph is not None and module is not None:
            folders[str(Path(graph.file).parent)] = module.state_dict(keep_vars=True)
    wrong = [part for folder, named in folders.items() for part in _folder(bundle.path / folder, folder, named)]
    return wrong or [Part(NAME, "", MODEL, ())]


def _folder(path: Path, name: str, parameters: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    import onnx_ir as ir

    index = WeightsIndex.load(path)
    used: set[str] = set()
    needed = {stored.quantized.scale for stored in index.tensors.values() if stored.quantized is not None}
    scales: dict[str, _Scale] = {}
    for graph in sorted(path.glob("*.onnx")):
        try:
            model = ir.load(graph)
        except Exception as error:  # protobuf's own, and what onnx-ir makes of a graph that is half one
            raise UserError(f"{graph}: is no ONNX graph ({one_line(error)}); export the directory again") from error
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and value.name in needed and value.name not in scales:
                dtype = _TORCH[tensor.dtype.name.lower()]
                scales[str(value.name)] = _Scale(tensor.numpy().astype(np.float32), dtype)
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            stored = index.tensors.get(tensor.name)
            used.add(tensor.name)
            place = stored and (WEIGHTS_NAME, stored.offset, stored.length)
            if place != (str(tensor.location), tensor.offset, tensor.length):
                where = f"{name}/{graph.name}, {tensor.name}"
                yield Part(NAME, where, MODEL, (), "the graph takes it from another place than weights.json says")
    if not used:
        return
    with (path / WEIGHTS_NAME).open("rb") as handle:
        data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    for tensor_name, stored in index.tensors.items():
        if tensor_name in used and stored.parameter is not None:
            found = data[stored.offset : stored.offset + stored.length]
            yield from _weight(name, found, stored, parameters, scales)


def _weight(
    folder: str,
    data: memoryview,
    stored: StoredWeight,
    parameters: Mapping[str, torch.Tensor],
    scales: Mapping[str, _Scale],
) -> Iterator[Part]:
    scale = None if stored.quantized is None else scales[stored.quantized.scale]
    dtype = _TORCH[stored.dtype] if scale is None else scale.dtype
    for name in (stored.parameter, *stored.equal):
        parameter = parameters.get(str(name))
        if parameter is None:
            yield Part(NAME, f"{folder}, {name}", MODEL, (), "the model has no parameter of this name")
            continue
        expected = parameter.detach()
        if stored.rows is not None:
            expected = expected[stored.rows[0] : stored.rows[1]]
        expected = (expected.T if stored.transposed else expected).to(dtype).contiguous()
        nbytes = expected.nbytes if scale is None else expected.numel() * NUMBER_TYPES[stored.dtype].bits // 8
        if tuple(expected.shape) != stored.shape or nbytes != len(data):
            yield Part(
                NAME, f"{folder}, {name}", MODEL, (), f"shape {stored.shape}, the model's is {tuple(expected.shape)}"
            )
            continue
        if scale is not None:
            error = _rounded(data, stored, scale.values, expected.float().numpy())
            if error is not None:
                yield Part(NAME, f"{folder}, {name}", MODEL, (error,))
            continue
        bits = expected.reshape(-1).view(torch.uint8).numpy()
        if not np.array_equal(bits, np.frombuffer(data, np.uint8)):
            found = torch.frombuffer(bytearray(data), dtype=dtype).reshape(expected.shape)
            error = tensor_error("values", found.double().numpy(), expected.double().numpy(), _EXACT)
            yield Part(NAME, f"{folder}, {name}", MODEL, (error,))


class _Scale(NamedTuple):
    """Scales of a weight in fewer bits, float32, and the type of the graphs."""

    values: np.ndarray
    dtype: torch.dtype


def _rounded(data: memoryview, stored: StoredWeight, scale: np.ndarray, expected: np.ndarray) -> TensorError | None:
    """How far a weight in fewer bits is from its parameter, where a value is off by more than half of how far numbers
    lie apart there. expected: float32, of values in the type of the graphs."""
    assert stored.quantized is not None
    axis, block = stored.quantized.axis, stored.quantized.block
    numbers = unpacked(np.frombuffer(data, np.uint8), stored.dtype, stored.shape)
    found = to_weight(numbers, scale, axis, block)
    # Float32 itself rounds the quotients, and what they are times.
    limit = step_of(scale, stored.shape, axis, block) * spacing(numbers, stored.dtype) * np.float32(0.5 + 1e-4)
    if np.all(np.abs(found - expected) <= limit):
        return None
    return tensor_error("values", found.astype(np.float64), expected.astype(np.float64), _EXACT)
