"""What a bisection found, as a folder that stands by itself: the nodes with their weights, what they get, give and
ought to give, and the polygraphy command that shows it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.compare.metrics import Tolerance
from dipgo_deploy.compare.saved import polygraphy_outputs, save_polygraphy
from dipgo_deploy.difference import peak
from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx

    from dipgo_deploy.compare.bisect import Located

NODE, REFERENCE, FACTS, SCRIPT = "node.onnx", "reference.onnx", "bisect.json", "reproduce.sh"
# How polygraphy runs what is wrong in the graph itself, and what a backend makes wrong.
_PLAIN = "--onnxrt --graph-optimization-level ORT_DISABLE_ALL"
_RUNNERS = {"cpu": "--onnxrt", "cuda": "--onnxrt --providers cuda", "tensorrt": "--trt", "tensorrt-rtx": "--trt"}
# protobuf's own limit is 2 GiB.
_MOST_INLINE = 2**30


def check_folder(folder: Path, option: str, backend: str) -> None:
    """Refuse (UserError) a folder that is there already and not empty, or that cannot be made, and a backend that
    polygraphy does not run."""
    if backend not in _RUNNERS:
        raise UserError(f"{option}: not with --backend {backend}, which polygraphy does not run; leave it out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{option} {folder}: exists; give a folder that does not")
    if not folder.resolve().parent.is_dir():
        raise UserError(f"{option} {folder}: the folder {folder.parent} does not exist; make it first")


def write_folder(located: Located, folder: Path, tolerance: Tolerance, backend: str) -> str:
    """Write ``folder``, which appears whole; the command that is run in it and ends with status 1 while the fault is
    there.

    ``node.onnx``: what is wrong, weights included. ``reference.onnx``: the same of the reference, where that is another
    graph. ``inputs.json``, ``outputs.json`` (missing where nothing can be computed) and ``expected.json``: polygraphy's
    JSON. ``bisect.json``: what was found. ``reproduce.sh``: the command.

    Raises:
        UserError: the folder cannot be written.
    """
    command = _command(located, tolerance, backend)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", suffix=".partial", dir=folder.resolve().parent))
    try:
        _save(located.part, located.folder, stage / NODE)
        if located.reference is not None:
            _save(*located.reference, stage / REFERENCE)
        taken = {value.name for value in located.part.graph.input}
        feeds = {name: array for name, array in located.inputs.items() if name in taken}
        save_polygraphy([feeds], stage / "inputs.json")
        if located.actual:
            save_polygraphy(polygraphy_outputs([located.actual], "engine"), stage / "outputs.json")
        save_polygraphy(polygraphy_outputs([located.expected], "reference"), stage / "expected.json")
        (stage / FACTS).write_text(json.dumps(facts(located, tolerance, command), indent=1) + "\n", encoding="utf-8")
        (stage / SCRIPT).write_text(f'#!/bin/sh\ncd "$(dirname "$0")" && {command}\n', encoding="utf-8")
        (stage / SCRIPT).chmod(0o755)
        stage.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        stage.rename(folder)
    except OSError as error:
        raise UserError(f"--bisect {folder}: cannot be written ({error.strerror or error}); give another") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return command


def facts(located: Located, tolerance: Tolerance, command: str) -> dict[str, Any]:
    """What was found, as JSON values; an infinite error is null."""
    return {
        "evaluation": located.evaluation,
        "graph": located.graph,
        "tensor": located.tensor,
        "error": _finite(located.error),
        "inside": located.inside,
        "against": located.against,
        "value": located.value,
        "nodes": [{"name": name, "operator": operator} for name, operator in located.nodes],
        "made": _finite(located.made),
        "beyond_by_itself": located.beyond,
        "note": located.note or None,
        "tolerance": tolerance.relative,
        "inputs": _shapes(located.inputs),
        "expected": _shapes(located.expected),
        "command": command,
        "line": located.line,
    }


def _command(located: Located, tolerance: Tolerance, backend: str) -> str:
    (expected,) = located.expected.values()
    finite = expected[np.isfinite(expected)] if expected.dtype.kind == "f" else expected.astype(np.float64)
    # Where no node is beyond tolerance by itself, half of what it makes shows it.
    share = tolerance.relative if located.beyond or located.value is None else located.made / 2
    runner = _RUNNERS[backend] if located.inside == "backend" else _PLAIN
    return (
        f"polygraphy run {NODE} {runner} --load-inputs inputs.json --load-outputs expected.json "
        f"--check-error-stat max --rtol 0 --atol {share * peak(finite):.6g}"
    )


def _save(model: onnx.ModelProto, weights: Path, path: Path) -> None:
    """Write a model whose large tensors lie in the folder ``weights``, with all of them inside."""
    import onnx

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.external_data:
            # Not onnx's own reader: it refuses files with several names, and engine directories may share theirs.
            fields = {entry.key: entry.value for entry in tensor.external_data}
            with (weights / fields["location"]).open("rb") as file:
                file.seek(int(fields.get("offset", 0)))
                tensor.raw_data = file.read(int(fields["length"]))
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
    onnx.save(whole, path, save_as_external_data=whole.ByteSize() > _MOST_INLINE, location=f"{path.stem}.weights.bin")


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
