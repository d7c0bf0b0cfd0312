"""Engine directories behind HTTP: ``dipgo-serve``, and ``app`` for Ray Serve (``serve run dipgo_deploy.serve:app``)."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dipgo_deploy.serve.ray_serve import application

    return application()
