"""torch module -> onnx-ir model, for the denoiser and for the components alike."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.einsum import einsums_to_transposes
from dipgo_deploy.export.layout import note_layouts
from dipgo_deploy.export.names import restore_names, strip_metadata

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

# bf16 needs the InstanceNormalization of opset 22; TensorRT-RTX has no kernel for opset 23's Attention in fp32.
OPSET = {"fp32": 20, "fp16": 20, "bf16": 22}


def torch_dtype(dtype: str) -> torch.dtype:
    """torch dtype of an export dtype (``fp32``, ``fp16``, ``bf16``)."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def to_onnx(
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    input_names: Sequence[str],
    output_names: Callable[[], Sequence[str]],
    *,
    dtype: str,
    prefix: str,
    label: str,
) -> ir.Model:
    """Export ``module`` with static shapes.

    ``output_names`` is called after the module was traced. ``prefix`` is cut off parameter names. ``label`` names the
    model in errors. Initialisers stay in memory, shared with the module where the exporter does not fold them.

    Raises:
        UserError: the exporter refuses the module, or two outputs are one tensor in the exported graph.
    """
    import torch

    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(module, tuple(arguments), strict=False)
            names = list(output_names())
            exported = torch.onnx.export(
                program,
                tuple(arguments),
                dynamo=True,
                optimize=True,
                opset_version=OPSET[dtype],
                input_names=list(input_names),
                output_names=names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{label}: torch.onnx.export failed: {first}") from error
    assert exported is not None
    model = exported.model
    einsums_to_transposes(model)
    origins = restore_names(model, prefix)
    strip_metadata(model)
    note_layouts(model, module, origins, prefix)
    outputs = list(model.graph.outputs)
    if len(outputs) != len(names) or len(set(map(id, outputs))) != len(outputs):
        raise UserError(f"{label}: two cut points are one tensor in the exported graph; choose another granularity")
    for output, name in zip(outputs, names, strict=True):
        output.name = name
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter (missing torchvision, progress lines); errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
