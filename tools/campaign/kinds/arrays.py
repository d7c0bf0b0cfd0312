"""Arrays: ``--latents`` (.npy) and ``--prompt-embeds`` (.npy, .npz, .safetensors) of ``dipgo-run``."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dipgo_deploy.bundle.manifest import ConditionSpec, Manifest
from tools.campaign.kinds import safetensors
from tools.campaign.kinds.engines import same_pictures
from tools.campaign.material import CLASS_RUN, TEXT_RUN, Material, run_arguments
from tools.campaign.mutate import Changed, change_bytes, pick
from tools.campaign.verdict import MIB, Ran, Verdict
from tools.campaign.worker import Trial

_DTYPES = (
    "<f4",
    ">f4",
    "<f2",
    "<f8",
    "<i8",
    "<u1",
    "|b1",
    "<c8",
    "<U4",
    "|S4",
    "|O",
    "|V16",
    "<M8[s]",
    "<f16",
    "f4,i4",
    "x",
)
_SHAPES: tuple[str, ...] = (
    *("()", "(0,)", "(1,)", "(-1,)", "(1,4,8,8)", "(1000000000,)", "(2**40,)", "(18446744073709551616,)", "(1.0,)"),
    *("[1,4,8,8]", "None", "(4,8,8)", "(1,4,8,0)", "(1,)*100", "(65536,65536,65536)"),
)


@dataclass(frozen=True)
class Latents:
    """``--latents`` of the class model: initial noise (1, 4, 8, 8)."""

    material: Material
    name: str = "arrays (.npy)"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """Header, values or bytes changed."""
        array = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
        label, content = change_npy(array, random)
        (folder / "given.npy").write_bytes(content)
        argv = run_arguments(self.material.class_engine, (*CLASS_RUN, "--latents", "given.npy"))

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            if not np.isfinite(np.load(folder / "out.npy")).all():
                return Verdict.SILENT, "pictures that are not finite"
            read = _as_written(content)
            if read is None or read.shape != array.shape or read.dtype.kind != "f":
                return (
                    Verdict.SILENT,
                    f"accepted, but the file holds {None if read is None else (read.dtype, read.shape)}",
                )
            return (Verdict.SAME if read.tobytes() == array.tobytes() else Verdict.VALID), ""

        return Trial(label, [argv], accepted, outputs=("out.npy",))


@dataclass(frozen=True)
class Embeddings:
    """``--prompt-embeds`` of the text model, as .npz or .safetensors."""

    material: Material
    name: str = "arrays (.npz, .safetensors)"

    def __post_init__(self) -> None:
        bomb(self._condition.name)  # in the process that forks: made once

    @property
    def _condition(self) -> ConditionSpec:
        return next(spec for spec in Manifest.load(self.material.text_engine).conditions if spec.source == "text")

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """The archive, one of its members, or its header changed."""
        spec = self._condition
        array = np.random.default_rng(0).standard_normal((1, *spec.shape[1:])).astype(np.float32)
        suffix = pick(random, (".npz", ".npz", ".safetensors"))
        if suffix == ".npz":
            label, content = change_npz(spec.name, array, random)
        else:
            label, content = safetensors.change(*safetensors.parts({spec.name: array}), random)
        (folder / f"given{suffix}").write_bytes(content)
        (folder / "picture.png").hardlink_to(self.material.picture)
        argv = run_arguments(self.material.text_engine, ("--prompt-embeds", f"given{suffix}", *TEXT_RUN[2:]))

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            if suffix == ".safetensors":
                try:
                    safetensors.read_strictly(content)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    return Verdict.SILENT, f"accepted, but not a right file: {error!r}"
            verdict, detail = same_pictures(self.material, "text", folder / "out.npy", ran, resealed=True)
            return (Verdict.VALID, "") if verdict is Verdict.SAID else (verdict, detail)

        return Trial(f"{suffix}: {label}", [argv], accepted, outputs=("out.npy",))


def change_npy(array: np.ndarray, random: np.random.Generator) -> Changed:
    """A .npy file whose header lies, whose values are absurd, or with any bytes changed."""
    dice = random.random()
    if dice < 0.3:
        stream = io.BytesIO()
        np.save(stream, array)
        return change_bytes(stream.getvalue(), random)
    if dice < 0.5:
        value = pick(random, (np.nan, np.inf, -np.inf, 1e38, 3e38, 1e-45, 0.0))
        changed = array.copy()
        changed.flat[int(random.integers(array.size))] = value
        stream = io.BytesIO()
        np.save(stream, changed)
        return f"one value {value}", stream.getvalue()
    dtype, shape, order = array.dtype.str, repr(array.shape), "False"
    what = pick(random, ("descr", "shape", "order", "text", "version", "length"))
    if what == "descr":
        dtype = pick(random, _DTYPES)
    elif what == "shape":
        shape = pick(random, _SHAPES)
    elif what == "order":
        order = pick(random, ("True", "None", "1", "__import__('os')"))
    header = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if what == "text":
        header = pick(random, ("", "{}", "[" * 10_000, header + " " * 200_000, header[:-1], "1", "{'descr': '<f4'}"))
    version = pick(random, (b"\2\0", b"\3\0", b"\0\0", b"\xff\xff")) if what == "version" else b"\1\0"
    length = pick(random, (0, 1, 65535, len(header) + 1)) if what == "length" else min(len(header) + 1, 65535)
    size = struct.pack("<H" if version == b"\1\0" else "<I", length)
    label = f"{what}: {dtype} {shape} {order} version {version!r}"
    return label, b"\x93NUMPY" + version + size + header.encode() + b"\n" + array.tobytes()


def change_npz(name: str, array: np.ndarray, random: np.random.Generator) -> Changed:
    """An archive with a changed member, other names, a bomb, members that overlap, or any bytes changed."""
    what = pick(random, ("member", "member", "names", "bomb", "overlap", "sizes", "bytes", "bytes", "method"))
    stream = io.BytesIO()
    np.save(stream, array)
    good = stream.getvalue()
    if what == "member":
        label, member = change_npy(array, random)
        return f"member: {label}", _archive({f"{name}.npy": member})
    if what == "names":
        other = pick(random, ("../../x.npy", "/x.npy", f"{name}.txt", f"{name}", "x.npy", "a\nb.npy", f"{name}.npy/"))
        both = random.random() < 0.5
        return f"names: {other!r}", _archive({other: good, **({f"{name}.npy": good} if both else {})})
    if what == "bomb":
        return "bomb: 600 MiB of zeros", bomb(name)
    archive = _archive({f"{name}.npy": good}, pick(random, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    if what == "bytes":
        return change_bytes(archive, random)
    start = archive.rindex(b"PK\1\2")
    end = archive.rindex(b"PK\5\6")
    entry = bytearray(archive[start:end])
    if what == "sizes":
        size = pick(random, (0, 1, 2**31, 2**32 - 2, 2**32 - 1))
        field = pick(random, (16, 20, 24, 42))  # checksum, packed size, size, place
        entry[field : field + 4] = struct.pack("<I", size)
        return f"directory: {size} at {field}", archive[:start] + bytes(entry) + archive[end:]
    if what == "method":
        method, flag = pick(random, ((99, 0), (12, 0), (14, 0), (8, 0), (0, 1)))
        entry[8:10], entry[10:12] = struct.pack("<H", flag), struct.pack("<H", method)
        return f"method {method}, flags {flag}", archive[:start] + bytes(entry) + archive[end:]
    count = 2000
    entries = b"".join(_renamed(bytes(entry), number) for number in range(count))
    tail = bytearray(archive[end:])
    tail[8:12] = struct.pack("<HH", count, count)
    tail[12:16] = struct.pack("<I", len(entries))
    return f"{count} entries over one member", archive[:start] + entries + bytes(tail)


@functools.cache
def bomb(name: str) -> bytes:
    """An archive of 600 KB whose one array is 600 MiB."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({150 * MIB},), }}\n".encode()
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{name}.npy", "w") as member,
    ):
        member.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
        for _ in range(600):
            member.write(bytes(MIB))
    return stream.getvalue()


def _renamed(entry: bytes, number: int) -> bytes:
    """A directory entry under another name of the same length."""
    length = struct.unpack("<H", entry[28:30])[0]
    return entry[:46] + f"{number:0{length}d}"[:length].encode() + entry[46 + length :]


def _archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _as_written(content: bytes) -> np.ndarray | None:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:
        return None
    return array if isinstance(array, np.ndarray) else None
