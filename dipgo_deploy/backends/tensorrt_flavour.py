"""TensorRT and TensorRT-RTX: one API in two modules. What differs between them stands in one table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install


@dataclass(frozen=True)
class Flavour:
    """One of the two modules, and what it can do that the other cannot.

    Attributes:
        backend: name of the backend, and of the extra that installs it.
        module: importable module.
        title: for messages.
        builds_without_device: engines can be built where no GPU is.
        compute_capabilities: one engine can be built for a choice of GPU generations, whatever the GPU at hand.
        timing_cache, version_compatible, hardware_compatible: these build options have an effect.
        validity: the runtime can tell why it refuses an engine.
        runtime_cache: kernels are compiled at run time, and can be kept.
        user_allocation: only engines that were built for it leave all memory to their caller, which captured launches
            need.
    """

    backend: str
    module: str
    title: str
    builds_without_device: bool
    compute_capabilities: bool
    timing_cache: bool
    version_compatible: bool
    hardware_compatible: bool
    validity: bool
    runtime_cache: bool
    user_allocation: bool


FLAVOURS: dict[str, Flavour] = {
    flavour.backend: flavour
    for flavour in (
        Flavour(
            backend="tensorrt",
            module="tensorrt",
            title="TensorRT",
            builds_without_device=False,
            compute_capabilities=False,
            timing_cache=True,
            version_compatible=True,
            hardware_compatible=True,
            validity=False,
            runtime_cache=False,
            user_allocation=False,
        ),
        Flavour(
            backend="tensorrt-rtx",
            module="tensorrt_rtx",
            title="TensorRT-RTX",
            builds_without_device=True,
            compute_capabilities=True,
            timing_cache=False,
            version_compatible=False,
            hardware_compatible=False,
            validity=True,
            runtime_cache=True,
            user_allocation=True,
        ),
    )
}


def flavour_of(backend: str) -> Flavour:
    """The flavour of a backend's name; otherwise a UserError that lists the names."""
    if not isinstance(backend, str) or backend not in FLAVOURS:
        raise UserError(f"--backend {backend}: has no engines to build; choose one of {', '.join(FLAVOURS)}")
    return FLAVOURS[backend]


def known_capabilities(module: Any) -> tuple[str, ...]:
    """Compute capabilities (``8.9``) that a module with a choice of them builds for, in its own order."""
    names = [name for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)


def unsuited(flavour: Flavour, module: Any, gpu: str, capability: str) -> list[str]:
    """A reason why engines may not be for this GPU: its generation is not among those that can be chosen."""
    known = known_capabilities(module) if flavour.compute_capabilities else (capability,)
    if capability in known:
        return []
    made_for = ", ".join(known)
    return [f"it is made for compute capability {made_for}, and {gpu} has {capability}; try --backend tensorrt"]


def import_flavour(flavour: Flavour) -> Any:
    """The module, imported. Importing touches no device; its Builder and Runtime do.

    Raises:
        UserError: not installed, or its libraries cannot be loaded here.
    """
    try:
        module = import_module(flavour.module)
        _ = module.Builder, module.__version__
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"backend {flavour.backend}: {flavour.title} is missing or broken ({reason}); {install(flavour.backend)}"
        ) from None
    return module
