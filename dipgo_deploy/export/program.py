"""torch module -> onnx-ir model, for the denoiser and for the components alike."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.addends import keep_tiny_addends
from dipgo_deploy.export.interleaved import stack_interleaved

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

_OBJECTS_BETWEEN_COLLECTIONS = 50_000
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
    dynamic_shapes: Sequence[Any] | None = None,
) -> ir.Model:
    """Export ``module``, with static shapes where ``dynamic_shapes`` (as ``torch.export`` takes them) says nothing.

    ``output_names`` is called after the module was traced. ``prefix`` is cut off parameter names. ``label`` names the
    model in errors. Initialisers stay in memory, shared with the module where the exporter does not fold them.

    Raises:
        UserError: the module does not fit its inputs, torch cannot trace or export it, or two outputs are one tensor in
            the exported graph.
    """
    import torch

    from dipgo_deploy.export.passes import apply
    from dipgo_deploy.export.passes.booleans import BooleanChoices
    from dipgo_deploy.export.passes.einsum import PermutingEinsums
    from dipgo_deploy.export.passes.layouts import NoteLayouts
    from dipgo_deploy.export.passes.masked import EmptyAttention
    from dipgo_deploy.export.passes.metadata import StripMetadata
    from dipgo_deploy.export.passes.names import RestoreNames
    from dipgo_deploy.export.passes.optimized import Optimized
    from dipgo_deploy.export.passes.outputs import NameOutputs
    from dipgo_deploy.export.passes.squeeze import IdleSqueezes

    with torch.no_grad(), _quiet(), _few_collections():
        try:
            shapes = None if dynamic_shapes is None else tuple(dynamic_shapes)
            program = torch.export.export(module, tuple(arguments), strict=False, dynamic_shapes=shapes)
            keep_tiny_addends(program)
            stack_interleaved(program)
            names = list(output_names())
            exported = torch.onnx.export(
                program,
                tuple(arguments),
                dynamo=True,
                optimize=False,
                opset_version=OPSET[dtype],
                input_names=list(input_names),
                output_names=names,
                verbose=False,
            )
            assert exported is not None
            model = exported.model
            apply(model, Optimized())
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"{label}: torch.onnx.export failed: {_first_line(error)}") from error
        except MemoryError:
            raise
        except Exception as error:  # a module that does not fit its inputs, or that torch cannot trace: any kind
            if dynamic_shapes is not None and isinstance(error, _dynamic_errors()):
                raise UserError(f"{label}: {_why_static(error)}; give plain numbers for these sizes") from error
            raise UserError(f"{label}: torch.export cannot trace it: {_first_line(error)}") from error
    apply(
        model,
        PermutingEinsums(),
        IdleSqueezes(),
        BooleanChoices(),
        EmptyAttention(),
        RestoreNames(prefix),
        StripMetadata(),
        NoteLayouts(module, prefix),
        NameOutputs(tuple(names), label),
    )
    return model


def _dynamic_errors() -> tuple[type[Exception], ...]:
    """What torch raises when a model does not allow a dimension to vary."""
    import torch

    symbolic = torch.fx.experimental.symbolic_shapes
    return torch._dynamo.exc.UserError, symbolic.ConstraintViolationError, symbolic.GuardOnDataDependentSymNode


def _why_static(error: Exception) -> str:
    """What is fixed, in one line."""
    text = str(error)
    found = sorted(set(re.findall(r"Constraints violated \(([^)]*)\)", text)))
    if found:
        return f"the model does not work for every {' and '.join(found).replace(', ', ' and ')} of the range"
    return f"cannot be traced with open sizes: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Python's collector at work less often: a trace makes millions of objects that live on."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
