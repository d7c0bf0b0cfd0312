"""ONNX Runtime's providers; whether it can use CUDA here, and if not, why not."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.extras import install

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# TF32, on by default there, rounds fp32 products to 10 bits: beyond any fp32 tolerance.
PROVIDERS: dict[str, list[Any]] = {"cpu": [CPU], "cuda": [(CUDA, {"use_tf32": "0"}), CPU]}
_DRIVER, _PROVIDER = "libcuda.so.1", "libonnxruntime_providers_cuda.so"
FATAL = 4  # log level: what goes wrong is raised, not also printed
_WARNING = 2  # ONNX Runtime's own default


def require_cuda(ort: Any) -> None:
    """Load CUDA's libraries and allocate a byte on the device.

    Args:
        ort: the module ``onnxruntime``.

    Raises:
        UserError: this package has no CUDA provider, a library or the driver is missing, or there is no usable device.
    """
    if CUDA not in ort.get_available_providers():
        raise UserError(
            "backend cuda: this ONNX Runtime has no CUDA provider; pip uninstall -y onnxruntime, then "
            f"{install('gpu')}, or use --backend cpu"
        )
    missing = _unloadable(_DRIVER) if sys.platform == "linux" else None
    if missing is not None:  # else the libraries would be loaded for nothing: 200 MB
        raise UserError(f"backend cuda: no NVIDIA driver ({missing}); use --backend cpu")
    # CUDA's libraries that came as Python packages are on no path of the system's; the call prints what it misses.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    ort.set_default_logger_severity(FATAL)
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", 0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"backend cuda: {_reason(ort, error)}; or use --backend cpu") from None
    finally:
        ort.set_default_logger_severity(_WARNING)


def _reason(ort: Any, error: Exception) -> str:
    """What is wrong and what helps; ONNX Runtime itself only says that its provider is not available."""
    missing = _unloadable(str(Path(ort.__file__).parent / "capi" / _PROVIDER))
    if missing is not None and missing.startswith("lib"):  # not the provider itself, which is named by its path
        return f"a library of CUDA is missing ({missing}); pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return f"no usable CUDA device ({one_line(error)}); check the driver with nvidia-smi"


def _unloadable(library: str) -> str | None:
    """What the loader says, which begins with the name of what is missing; None if it can be loaded."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None
