"""Documents that would take minutes or gigabytes: run as a program, it prints for each how it ended and what it took.

No test itself: ``test_hostile.py`` runs it in a process of its own, whose memory can be measured.
"""

from __future__ import annotations

import json
import pickle
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.sublayers import sublayers
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry, Schedule
from dipgo_deploy.schedule.importers import csv, dipgo_gates, l2c_router, smoothcache
from dipgo_deploy.schedule.importers.base import Source
from dipgo_deploy.schedule.importers.registry import importer

UNET = (*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4)))
LAYERS = tuple(spec.name for spec in sublayers("transformer_blocks", 28, ("attn1", "ff")))
VALID: dict[str, Any] = {
    "format_version": 1,
    "model": {"class_name": "UNet2DConditionModel", "config_hash": "a" * 64, "granularity": "block"},
    "blocks": [{"name": "mid_block", "cache": "output"}],
    "steps": 2,
    "keep": ["1", "0"],
    "sampler": {"class_name": "DDIMScheduler", "config": {}, "num_inference_steps": 2},
    "provenance": {},
}


FOR_LAYERS = Target(
    model=ModelIdentity(class_name="DiTTransformer2DModel", config_hash="a" * 64, granularity="layer"),
    blocks=tuple(BlockEntry(name=name, cache="output") for name in LAYERS),
    sampler=SamplerEntry(class_name="DDIMScheduler", config={}, num_inference_steps=50),
    steps=50,
)


def given(kind: str, content: Any) -> Callable[[], Any]:
    """A file of one kind, as its importer reads it."""
    found = importer(kind)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    settings = {setting.name: setting.default for setting in found.settings}
    return lambda: found.read(data, Source(FOR_LAYERS), **settings)


def python(name: str, step: str = "s > 0") -> bytes:
    """A configuration of cache_diffusion with these two functions."""
    entry = f'"wildcard_or_filter_func": lambda n: {name}, "select_cache_step_func": lambda s: {step}'
    return ("x = [{" + entry + "}]").encode()


def schedule(**changes: Any) -> Callable[[], Any]:
    text = json.dumps({**VALID, **changes})
    return lambda: Schedule.from_json(text)


def nested(depth: int) -> Callable[[], Any]:
    text = json.dumps({**VALID, "provenance": "HERE"}).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    return lambda: Schedule.from_json(text)


def repeated_key(count: int) -> Callable[[], Any]:
    text = "{" + ",".join(f'"k{index}": 1' for index in [*range(count), count - 1]) + "}"
    return lambda: Schedule.from_json(text)


def one_step_many_times(steps: int) -> Callable[[], Any]:
    """A pickle of a few bytes a step, each of which would have all its tensors decoded."""
    keys = [*(("down", "block", i, 0) for i in range(4)), ("mid", "mid_block", 0, 0)]
    step = dict.fromkeys([*keys, *(("up", "block", i, 0) for i in range(4))], b"x")
    data = pickle.dumps([step] * steps, 4)
    return lambda: dipgo_gates.read_gates(data, UNET, 50)


def one_storage_many_times(steps: int) -> Callable[[], Any]:
    """150 KB in which every gate has the same storage, which has more in it than a storage has."""
    text = b"".join(b"X\x04\x00\x00\x00%04dK\x00" % index for index in range(5000))
    system = b"\x80\x02}(" + text + b"X\x0d\x00\x00\x00little_endian\x88u."
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + system
    inner += b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x001X\x03\x00\x00\x00cpuK\x02NtQ."
    inner += pickle.dumps(["1"], 2) + struct.pack("<q2f", 2, 0, 1)
    storage = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89}tRr\x00\x01\x00\x00"
    keys = [*(("down", "block", i, 0) for i in range(4)), ("mid", "mid_block", 0, 0)]
    keys += [("up", "block", i, 0) for i in range(4)]
    step = b"}(" + b"".join(pickle.dumps(key, 2)[2:-1] + b"j\x00\x01\x00\x00" for key in keys) + b"u"
    data = b"\x80\x02](" + step.replace(b"j\x00\x01\x00\x00", tensor, 1) + step * (steps - 1) + b"e."
    return lambda: dipgo_gates.read_gates(data, UNET, steps)


def equal_hashes(count: int) -> Callable[[], Any]:
    """Numbers with the hash of zero as keys."""
    numbers = [pickle.dumps(index * (2**61 - 1), 2)[2:-1] + b"N" for index in range(1, count)]
    data = b"\x80\x02](}(" + b"".join(numbers) + b"ue."
    return lambda: dipgo_gates.read_gates(data, UNET)


def pairs_of_pairs(depth: int) -> Callable[[], Any]:
    """A key of so many tuples that each have the one before twice."""
    pairs = b"".join(
        b"r" + struct.pack("<I", index) + b"j" + struct.pack("<I", index) + b"\x86" for index in range(depth)
    )
    data = b"\x80\x02](})" + pairs + b"Nse."
    return lambda: dipgo_gates.read_gates(data, UNET)


def opcodes(code: bytes, count: int) -> Callable[[], Any]:
    data = b"\x80\x02" + code * count + b"."
    return lambda: dipgo_gates.read_gates(data, UNET)


def overlapping_entries(storages: int, size: int) -> Callable[[], Any]:
    """An archive in which the content of each of many storages is all that lies behind it."""
    routers = b"".join(router(index) for index in range(storages))
    document = b"\x80\x02}X" + struct.pack("<I", 7) + b"routers}(" + routers + b"us."
    content, directory = bytes(size), []
    for name in [*(f"a/data/{index}" for index in reversed(range(storages))), "a/data.pkl"]:
        inside = document if name == "a/data.pkl" else content
        encoded = name.encode()
        fields = (0, 0, 0, 33, zlib.crc32(inside), len(inside), len(inside), len(encoded), 0)
        header = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, *fields) + encoded
        content = header + (inside + content if name == "a/data.pkl" else content)
        directory.append((encoded, fields, len(content)))
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *fields, 0, 0, 0, 0, len(content) - behind) + encoded
        for encoded, fields, behind in directory
    )
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(directory), len(directory), len(entries), len(content), 0)
    data = content + entries + end
    return lambda: l2c_router.read_routers(data, LAYERS)


def router(index: int) -> bytes:
    """One item of the routers' dictionary: a tensor of 56 numbers in a storage of its own."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu") + b"K\x38t" + b"Q"
    arguments = (
        b"(" + storage + b"K\x00" + b"K\x38\x85" + b"K\x01\x85" + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"
    )
    return text(f"{index}.prob") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    million = 1_000_000
    block = {"name": "b", "cache": "output"}
    yield "schedule nested 100", nested(100)
    yield "schedule nested 100,000", nested(100_000)
    yield "schedule of a million blocks", schedule(blocks=[block] * (million // 4))
    yield "schedule of a million wrong blocks", schedule(blocks=[0] * (million - 100))
    yield "schedule of two million wrong blocks", schedule(blocks=[0] * 2 * million)
    yield "schedule of a million rows", schedule(keep=["1"] * (million - 100), steps=million - 100)
    yield "schedule of a million unknown fields", schedule(**{f"x{index}": 0 for index in range(million // 2)})
    yield "schedule of wrong fields in a block", schedule(blocks=[{f"x{i}": 0 for i in range(million // 2)}])
    yield (
        "schedule of 9,999 rows and blocks",
        schedule(
            keep=["1" * 1000] * 9_999, blocks=[{"name": f"b{i}", "cache": "output"} for i in range(9_999)], steps=9_999
        ),
    )
    yield (
        "schedule with a solver of a million words",
        schedule(
            format_version=2,
            solver={"timesteps": [1.0], "rows": [["x"] * (million // 2)], "final": [1.0]},
        ),
    )
    yield "schedule of a repeated key among many", repeated_key(million // 2)
    yield "schedule with half a surrogate pair", schedule(sampler={**VALID["sampler"], "class_name": "\ud800"})
    yield "schedule of numbers too long", lambda: Schedule.from_json('{"steps": ' + "9" * 10**6 + "}")
    yield "CSV of many cells", lambda: csv.read_gates(b"1," * 8 * million, UNET, 50)
    yield "CSV of many lines", lambda: csv.read_gates(b"1\n" * 8 * million, UNET, 50)
    yield "CSV of empty lines", lambda: csv.read_gates(b"\n" * 16 * million, UNET, 50)
    yield "CSV of other separators of lines", lambda: csv.read_gates(b"\x1e" * 16 * million, UNET, 50)
    yield (
        "SmoothCache of many entries",
        lambda: smoothcache.read_gates(b'{"attn": [' + b"1," * (million - 10) + b"1]}", LAYERS, 50),
    )
    yield (
        "SmoothCache of many lists",
        lambda: smoothcache.read_gates(
            json.dumps({f"attn-{index}": [1] for index in range(300_000)}).encode(), LAYERS, 50
        ),
    )
    yield "SmoothCache nested", lambda: smoothcache.read_gates(b'{"attn": ' + b"[" * million, LAYERS, 50)
    yield "gates of one step many times", one_step_many_times(30_000)
    yield "pickle of empty dictionaries", opcodes(b"}", 16 * million)
    yield "pickle of nested tuples", opcodes(b"K\x00" + b"\x85" * 100, 100_000)
    yield "pickle of nested calls", opcodes(b"ccollections\nOrderedDict\n" * 100 + b")" + b"\x85R" * 100, 2_000)
    yield "pickle of keys with equal hashes", equal_hashes(12_000)
    yield "pickle of a key of pairs of pairs", pairs_of_pairs(100)
    yield "one storage for many gates", one_storage_many_times(800)
    yield "pickle of a huge memo index", opcodes(b"]r\xff\xff\xff\x7f", 1)
    yield "archive of overlapping entries", overlapping_entries(100, 8 * 2**20)
    yield "archive of many entries", lambda: l2c_router.read_routers(b"PK\x01\x02" * 4 * million, LAYERS)
    yield "step list of many steps", given("step-list", list(range(million - 10)))
    yield "step list of zeros", given("step-list", [0] * (million - 10))
    yield "MagCache of many ratios", given("magcache", {"mag_ratios": [1.0] * (million - 10)})
    yield (
        "weights of many steps",
        given("weights", {"compute_step": [0], "weights": {str(i): [1] for i in range(200_000)}}),
    )
    yield "ECAD of many steps", given("ecad", {"cache_schedule": {"schedule": {f"{i}": {} for i in range(200_000)}}})
    blocks = {str(index): {"attn1": True} for index in range(200_000)}
    yield "ECAD of many blocks", given("ecad", {"cache_schedule": {"schedule": {"000": blocks}}})
    yield "many settings", given("fora", {f"x{index}": 1 for index in range(300_000)})
    yield "YAML nested", given("cache-dit", b"a: " + b"[" * 60_000)
    yield "YAML nested by lines", given("cache-dit", b"".join(b" " * i + b"a:\n" for i in range(350)))
    yield "YAML of many lines", given("cache-dit", b"a: 1\n" * 3 * million)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (50, 999999999999), }".ljust(117) + b"\n"
    yield "array of a huge shape", given("npy", b"\x93NUMPY\x01\x00v\x00" + header)
    yield "array with a long header", given("npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x00" + b"(" * 2**24)
    yield "Python nested", given("cache-diffusion", python("(" * 30_000))
    yield "Python of many nots", given("cache-diffusion", python("not " * 15_000 + "n"))
    yield "Python of some nots", given("cache-diffusion", python("not " * 2_500 + "n"))
    yield "Python of powers", given("cache-diffusion", python("n", "9 ** 9 ** 9 ** 9"))
    yield "Python of long numbers", given("cache-diffusion", python("n", "9" * 60_000 + " > s"))
    yield "Python of products", given("cache-diffusion", python("n", "s" + " * 999999" * 4_000))
    yield "Python that repeats text", given("cache-diffusion", python("n * 999999999", "s"))
    yield "pattern without end", given("cache-diffusion", python('re.search("(.|.|.)*!", n)'))
    yield "pattern of patterns without end", given("cache-diffusion", python('re.search("(?:(?:.)*)*!", n)'))


def main() -> None:
    """Print a line of JSON for each case: name, error (None: accepted), CPU seconds, growth of the peak in MB."""
    for name, work in cases():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        try:
            work()
            error = None
        except UserError as refused:
            error = str(refused)
        except BaseException as other:  # noqa: BLE001
            error = f"NOT A USER ERROR: {other!r}"[:300]
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps([name, error, round(seconds, 2), round(grown)]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
