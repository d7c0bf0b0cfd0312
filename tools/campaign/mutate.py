"""Changes of bytes and of JSON documents: small functions of the document and a random generator.

Each returns what was changed, in words, and the new bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Changed = tuple[str, bytes]

# A string that stands for text which no JSON library writes; it is put in when everything else is text.
_RAW = "\ue000raw:"
DEEP = 100_000
_RAW_VALUES = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-0",
    "007",
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000\\u001b[31m"',
    "[" * DEEP + "]" * DEEP,
    '{"a":' * 5000 + "1" + "}" * 5000,
    "tru",
    "",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "NaN",
    "x",
    "x" * 100_000,
    "../../../etc/passwd",
    "/dev/zero",
    "a\nb\r\x1b[2Jc",
    "\u202eabc",
    -1,
    0,
    1,
    2,
    1.5,
    -0.5,
    10**6,
    10**9,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    1e308,
    1e-308,
    [],
    {},
    [[]],
    [None],
    [1, 2, 3],
    {"a": 1},
    ["x"] * 1000,
)


def pick(random: np.random.Generator, items: Sequence[T]) -> T:
    """One of them."""
    return items[int(random.integers(len(items)))]


def change_bytes(data: bytes, random: np.random.Generator) -> Changed:
    """One of the ways to break a file without knowing what it is."""
    return pick(random, _BYTE_CHANGES)(data, random)


def flip(data: bytes, random: np.random.Generator) -> Changed:
    """One bit is another."""
    if not data:
        return "a byte in an empty file", b"\x01"
    place, bit = int(random.integers(len(data))), int(random.integers(8))
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped", bytes(changed)


def _replace(data: bytes, random: np.random.Generator) -> Changed:
    start, length = _span(data, random)
    return f"bytes {start}+{length} random", data[:start] + random.bytes(length) + data[start + length :]


def _zero(data: bytes, random: np.random.Generator) -> Changed:
    start, length = _span(data, random)
    return f"bytes {start}+{length} zero", data[:start] + bytes(length) + data[start + length :]


def _cut(data: bytes, random: np.random.Generator) -> Changed:
    end = int(random.integers(len(data) + 1)) if random.random() < 0.9 else 0
    return f"cut off at {end}", data[:end]


def _drop(data: bytes, random: np.random.Generator) -> Changed:
    start, length = _span(data, random)
    return f"bytes {start}+{length} dropped", data[:start] + data[start + length :]


def _double(data: bytes, random: np.random.Generator) -> Changed:
    start, length = _span(data, random)
    return f"bytes {start}+{length} doubled", data[: start + length] + data[start:]


def _append(data: bytes, random: np.random.Generator) -> Changed:
    more = pick(random, (b"\0", b"\n", b"x", b"\xff" * 100, data, random.bytes(1000)))
    return f"{len(more)} bytes appended", data + more


def _prepend(data: bytes, random: np.random.Generator) -> Changed:
    more = pick(random, (b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 8, b" ", b"\x1f\x8b", b"PK\x03\x04"))
    return f"{more!r} in front", more + data


def _extreme(data: bytes, random: np.random.Generator) -> Changed:
    size = pick(random, (1, 2, 4, 8))
    value = pick(random, (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
    start = int(random.integers(max(1, len(data) - size)))
    return f"{value} in bytes {start}+{size}", data[:start] + value.to_bytes(size, "little") + data[start + size :]


def _pointer(data: bytes, random: np.random.Generator) -> Changed:
    text = f"version https://git-lfs.example/spec/v1\noid sha256:{'0' * 64}\nsize {len(data)}\n"
    return "a Git LFS pointer", text.encode()


def _span(data: bytes, random: np.random.Generator) -> tuple[int, int]:
    length = int(random.integers(1, pick(random, (2, 9, 65, 1025))))
    return int(random.integers(max(1, len(data) - length))), length


_BYTE_CHANGES: tuple[Callable[[bytes, np.random.Generator], Changed], ...] = (
    *(flip,) * 4,
    _replace,
    _zero,
    _cut,
    _cut,
    _drop,
    _double,
    _append,
    _prepend,
    _extreme,
    _extreme,
    _pointer,
)


def change_json(document: Any, random: np.random.Generator, *, bytes_share: float = 0.15) -> Changed:
    """One change of a JSON document (of its text, in ``bytes_share`` of the cases)."""
    if random.random() < bytes_share:
        return change_bytes(json.dumps(document, indent=1).encode(), random)
    changed = copy.deepcopy(document)
    places = list(_places(changed))
    parent, key, path = places[int(random.integers(len(places)))]
    how = pick(random, _JSON_CHANGES)
    label, note = how(parent, key, random), ".".join(map(str, path))
    return f"{note}: {label}", as_text(changed)


def as_text(document: Any) -> bytes:
    """JSON text, with what stands for raw text put in."""
    text = json.dumps(document, indent=1)
    for number, raw in enumerate(_RAW_VALUES):
        text = text.replace(json.dumps(f"{_RAW}{number}"), raw)
    return text.replace(json.dumps(_TWICE)[1:-1], "").encode("utf-8", "surrogatepass")


_TWICE = "\ue001"


def _places(document: Any, path: tuple[Any, ...] = ()) -> Any:
    """(container, key, path) of every value in it."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key, (*path, key)
        if isinstance(value, dict | list) and value:
            yield from _places(value, (*path, key))


def _set_value(parent: Any, key: Any, random: np.random.Generator) -> str:
    parent[key] = pick(random, _VALUES)
    return f"= {repr(parent[key])[:60]}"


def _set_raw(parent: Any, key: Any, random: np.random.Generator) -> str:
    number = int(random.integers(len(_RAW_VALUES)))
    parent[key] = f"{_RAW}{number}"
    return f"= raw {_RAW_VALUES[number][:20]!r}"


def _nudge(parent: Any, key: Any, random: np.random.Generator) -> str:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = value + pick(random, (-1, 1, 2, 4, 256, 4096, -value - 1, value))
    elif isinstance(value, float):
        parent[key] = pick(random, (-value, value * 1.001, value + 1.0, value * 1e6, value + 1e-3, 0.0))
    elif isinstance(value, str) and value:
        place = int(random.integers(len(value)))
        parent[key] = value[:place] + pick(random, ("", "x", "0", "1", "/", "\u00e9", value)) + value[place + 1 :]
    elif isinstance(value, list) and len(value) > 1:
        first, second = random.choice(len(value), 2, replace=False)
        value[first], value[second] = value[second], value[first]
        return f"items {first} and {second} exchanged"
    else:
        return _set_value(parent, key, random)
    return f"= {repr(parent[key])[:60]}"


def _delete(parent: Any, key: Any, random: np.random.Generator) -> str:
    del parent[key]
    return "removed"


def _repeat(parent: Any, key: Any, random: np.random.Generator) -> str:
    """A list item, or a list as a whole, again and again; a string longer; a key twice."""
    value = parent[key]
    if isinstance(value, list) and value:
        times = pick(random, (2, 2, 100, 20_000))
        times = min(times, 4_000_000 // len(json.dumps(value)) + 2)
        parent[key] = value * times
        return f"list times {times}"
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(value))
        return "twice in its list"
    parent[f"{key}{_TWICE}"] = pick(random, (value, value, None, 0, pick(random, _VALUES)))
    return "its key twice"


def _add(parent: Any, key: Any, random: np.random.Generator) -> str:
    if isinstance(parent, list):
        parent.append(pick(random, _VALUES))
        return f"item {repr(parent[-1])[:60]} appended to its list"
    name = pick(random, ("extra", "", "__class__", f"{key} ", str(key).upper(), "a\nb"))
    parent[name] = pick(random, _VALUES)
    return f"unknown key {name!r}"


_JSON_CHANGES = (_set_value, _set_value, _set_raw, _nudge, _nudge, _nudge, _nudge, _delete, _repeat, _add)
