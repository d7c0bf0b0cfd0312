"""What the machine that runs the tests has."""

from __future__ import annotations

from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError, find_device


def no_gpu() -> bool:
    """Whether no NVIDIA GPU can be used here."""
    try:
        find_device()
    except NoDeviceError:
        return True
    return False
