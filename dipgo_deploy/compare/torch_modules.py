"""What each module of the model in torch gives at one evaluation, under the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dipgo_deploy.reference.conditions import ReferenceInputs, host

if TYPE_CHECKING:
    from dipgo_deploy.reference.load import Reference


def module_outputs(reference: Reference, inputs: ReferenceInputs, step: int) -> dict[str, np.ndarray]:
    """By the module's dotted path, float32 or int64; of modules that run once at evaluation ``step`` and give one
    tensor. A removed block gives what it reads, and what is in it does not run."""
    found: dict[str, np.ndarray | None] = {}

    def take(name: str, output: Any) -> None:
        once = name not in found and isinstance(output, torch.Tensor)
        found[name] = host(output.detach()) if once else None

    handles: list[Any] = []
    loop = reference.walk(inputs)
    try:
        with torch.no_grad():
            for _ in range(step):
                next(loop)
            for name, module in reference.source.denoiser.named_modules():
                if name:
                    handles.append(module.register_forward_hook(lambda _, __, output, name=name: take(name, output)))
            next(loop)
    finally:
        for handle in handles:
            handle.remove()
    return {name: array for name, array in found.items() if array is not None}
