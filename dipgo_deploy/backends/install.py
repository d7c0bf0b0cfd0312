"""Which ONNX Runtime is installed: two of its packages at once break each other."""

from __future__ import annotations

from importlib import metadata

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install

# All of these install the one importable module ``onnxruntime``.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def check_onnxruntime_installation() -> str | None:
    """The name of the installed ONNX Runtime package, None when there is none (or one built by hand).

    Raises UserError when two are installed: the second overwrote the first's files, and removing either breaks both.
    """
    found = [name for name in _DISTRIBUTIONS if _installed(name)]
    if len(found) > 1:
        extra = "gpu" if "onnxruntime-gpu" in found else "cpu"
        raise UserError(
            f"{' and '.join(found)} are both installed and overwrite each other's files; "
            f"pip uninstall -y {' '.join(found)}, then {install(extra)}"
        )
    return found[0] if found else None


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
