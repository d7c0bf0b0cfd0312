"""Exports that hold the weights once: in the export's dtype, or not at all where the file has it, mapped.

diffusers maps safetensors files into memory, so that a model in the files' own dtype costs nothing until its weights
are read, and a mapped page can be given back at any time. What costs memory is another dtype (a copy of each weight)
and the comparison with the supernet, which is then done in processes of its own (``compare.processes``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dipgo_deploy.reference.mapped import give_back, mapped_files

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dipgo_deploy.reference.source import Source

# Of the exported weights; smaller ones are not worth a process.
LARGE_BYTES = 256 * 2**20


def is_large(model: str, dtype: torch.dtype) -> bool:
    """Whether the denoiser takes more than ``LARGE_BYTES`` in ``dtype``; False where its files are not here."""
    from dipgo_deploy.models.files import denoiser_weights
    from dipgo_deploy.supernet.load import stored_dtype

    files = [file for weights in denoiser_weights(model).values() for file in weights.files]
    stored = sum(path.stat().st_size for path in files)
    return stored * dtype.itemsize / stored_dtype(model).itemsize > LARGE_BYTES


def load_frugally(model: str, dtype: torch.dtype) -> Source:
    """A model for an export in ``dtype``: mapped where its files are in it or in float32, else converted once."""
    import torch

    from dipgo_deploy.reference.source import load_source
    from dipgo_deploy.supernet.load import stored_dtype

    return load_source(model, torch.float32 if stored_dtype(model) == torch.float32 else dtype)


def convert_in_place(module: nn.Module, dtype: torch.dtype) -> bool:
    """Convert a module whose weights are mapped from a file, one at a time, giving back the pages of each.

    Returns False, and does nothing, for a model that keeps some of its weights in float32.
    """
    if any(getattr(part, "_keep_in_fp32_modules", None) for part in module.modules()):
        return False
    mapped = mapped_files()
    for parameter in module.parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        old = parameter.data
        parameter.data = old.to(dtype)
        give_back(old, mapped)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            # Loading in another dtype leaves what is not in the file (tables of positions) as it was made.
            stored = name not in part._non_persistent_buffers_set
            if stored and buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return True
