"""Weights that stay in their files, mapped: pages are read when they are used and can be given back at any time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Ranges = list[tuple[int, int]]

_MADV_DONTNEED = 4
_SUFFIX = ".safetensors"
# Types of safetensors that are not floating point, with their bytes.
_WHOLE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}


def mapped_files() -> Ranges:
    """Addresses (first, past the last) at which safetensors files are mapped; none outside Linux.

    A file of which a page was written to in memory (weights that were changed in place) is left out: that page would
    be read from the file again.
    """
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        return []
    ranges: Ranges = []
    inside = False
    for line in maps.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = line.endswith(_SUFFIX)
            if inside:
                start, _, end = first.partition("-")
                ranges.append((int(start, 16), int(end, 16)))
        elif inside and first == "Anonymous:" and rest.split()[0] != "0":
            ranges.pop()
            inside = False
    return ranges


def give_back(tensor: torch.Tensor, mapped: Ranges) -> None:
    """Drop the whole pages of a tensor that lies in a mapped file; they would be read again if they were needed."""
    start = tensor.data_ptr()
    end = start + tensor.nbytes
    if not any(first <= start and end <= last for first, last in mapped):
        return
    page = mmap.PAGESIZE
    start, end = -(-start // page) * page, end // page * page
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def give_back_after_use(module: nn.Module) -> None:
    """Let every submodule give back the pages of its own mapped parameters when its ``forward`` is done."""
    mapped = mapped_files()

    def done(part: nn.Module, _inputs: Any, _output: Any) -> None:
        for parameter in part._parameters.values():
            if parameter is not None:
                give_back(parameter.data, mapped)

    for part in module.modules():
        if part._parameters:
            part.register_forward_hook(done)


class MappedCaches:
    """A supernet's caches in files in ``folder``, mapped, so that they take memory only while they are read.

    A ``supernet.gated.CacheStore``; tensors that need gradients do not go into it. The files have no names: they are
    gone with the tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write ``tensor``; the mapped copy of it."""
        import numpy as np
        import torch

        with tempfile.TemporaryFile(dir=self._folder) as file:
            array = tensor.contiguous().numpy()
            file.write(array.data)
            file.flush()
            return torch.from_numpy(np.memmap(file, array.dtype, "c", shape=array.shape))

    def get(self, held: torch.Tensor) -> torch.Tensor:
        """A copy in memory of what ``put`` gave."""
        copy = held.clone()
        self.give_back(held)
        return copy

    @staticmethod
    def give_back(held: torch.Tensor) -> None:
        """Drop the pages of what ``put`` gave; they are read again if they are needed."""
        give_back(held, [(held.data_ptr(), held.data_ptr() + held.nbytes)])


@contextlib.contextmanager
def float32_files(model: str, beside: Path) -> Iterator[str]:
    """A folder with the denoiser of ``model`` in float32, which loads mapped; gone when the context ends.

    It is ``model`` itself where nothing has to be converted. Else the copy is made in a temporary folder in ``beside``,
    one tensor in memory at a time; it takes 4 bytes a parameter of disk.
    """
    import torch

    from dipgo_deploy.models.files import STEMS, denoiser_weights
    from dipgo_deploy.models.location import INDEX, config_folder, pipeline_index
    from dipgo_deploy.supernet.load import stored_dtype

    if stored_dtype(model) == torch.float32:
        yield model
        return
    folder = config_folder(model)
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=beside) as copy:
        if index := pipeline_index(model):
            # Of the parts only the denoiser is copied; the pipeline's class is the one that the model is read as.
            (Path(copy) / INDEX).write_text(json.dumps(index), encoding="utf-8")
        for part, weights in denoiser_weights(model).items():
            (Path(copy) / part).mkdir(exist_ok=True)
            shutil.copy(folder / part / "config.json", Path(copy) / part)
            _write_float32(weights.files, Path(copy) / part / f"{STEMS['diffusers']}.safetensors")
        yield copy


def _write_float32(sources: Sequence[Path], target: Path) -> None:
    """All tensors of safetensors files in one file, those of floating point in float32.

    One file, because without accelerate diffusers maps the first of several only and copies the others.
    """
    from safetensors import safe_open

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in sources:
        with safe_open(source, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                code = part.get_dtype()
                code = code if code in _WHOLE_BYTES else "F32"
                size = math.prod(part.get_shape()) * _WHOLE_BYTES.get(code, 4)
                header[name] = {"dtype": code, "shape": part.get_shape(), "data_offsets": [offset, offset + size]}
                offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            with safe_open(source, "pt") as weights:
                mapped = mapped_files()
                for name in weights.keys():  # noqa: SIM118
                    stored = weights.get_tensor(name)
                    wanted = stored.float() if stored.is_floating_point() else stored
                    file.write(memoryview(wanted.contiguous().view(-1).numpy()).cast("B"))
                    give_back(stored, mapped)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
