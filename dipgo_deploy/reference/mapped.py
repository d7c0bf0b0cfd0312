"""Weights that stay in their files, mapped: pages are read when they are used and can be given back at any time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Ranges = list[tuple[int, int]]

_MADV_DONTNEED = 4


def mapped_files() -> Ranges:
    """Addresses (first, past the last) at which files are mapped; none outside Linux.

    Whatever they are called: the safetensors files of a hub's cache are links to files without that name. A file of
    which a page was written to in memory (weights that were changed in place) is left out: that page would be read from
    the file again.
    """
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        return []
    ranges: Ranges = []
    inside = False
    for line in maps.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = " /" in rest  # the path, the only field with a slash
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
    from dipgo_deploy.models.location import INDEX, config_folder, pipeline_index, read_options, with_options
    from dipgo_deploy.supernet.load import stored_dtype, stored_tensors

    if stored_dtype(model) == torch.float32:
        yield model
        return
    folder, options = config_folder(model), read_options(model)
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=beside) as copy:
        if index := pipeline_index(model):
            # Of the parts only the denoiser is copied; the pipeline's class is the one that the model is read as.
            (Path(copy) / INDEX).write_text(json.dumps(index), encoding="utf-8")
        for part, weights in denoiser_weights(model).items():
            (Path(copy) / part).mkdir(exist_ok=True)
            shutil.copy(folder / part / "config.json", Path(copy) / part)
            tensors = stored_tensors(model, part, weights)
            _write_float32(tensors, Path(copy) / part / f"{STEMS['diffusers']}.safetensors")
        yield with_options(copy, ip_adapter=options.ip_adapter, image_encoder=options.image_encoder)


def _write_float32(tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    """Tensors in one file, those of floating point in float32, each page given back when it is written.

    One file, because without accelerate diffusers maps the first of several only and copies the others.
    """
    import torch

    codes = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        floating = tensor.is_floating_point()
        code, width = ("F32", 4) if floating else (codes.get(tensor.dtype, "I64"), tensor.itemsize)
        size = tensor.numel() * width
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    mapped = mapped_files()
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored in tensors.values():
            wanted = stored.float() if stored.is_floating_point() else stored
            file.write(memoryview(wanted.contiguous().view(-1).numpy()).cast("B"))  # type: ignore[arg-type]
            give_back(stored, mapped)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
