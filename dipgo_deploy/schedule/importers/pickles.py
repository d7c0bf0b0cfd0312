"""The data of a pickle, with nothing in it executed.

``pickle`` calls whatever a file names. Here a name has to be an allowed one and becomes a `Global`, a call of it a
`Call`, and a reference outside the pickle a `Persistent`: nothing that a file names is imported or called.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from dipgo_deploy.errors import UserError, one_line

MAX_OPCODES = 500_000
"""Most opcodes of a pickle; the released schedules have twelve thousand."""

_DATA = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE
BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BINPERSID
"""
_OPCODES = frozenset(_DATA.split())
_OBJECTS = _OPCODES | {"NEWOBJ", "BUILD"}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
# Keys of a dictionary: equal hashes of other ones can be made at will, and a nested tuple is hashed in full each time.
_MOST_PARTS = 4
_MOST_NUMBER = 2**16


@dataclass(frozen=True, eq=False)
class Call:
    """A call that the pickle asks for. It is not made."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Global:
    """A name that the pickle refers to, e.g. ``torch._utils._rebuild_tensor_v2``."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        """The call as data; of an empty ``collections.OrderedDict`` a dictionary."""
        empty = self.name == "collections.OrderedDict" and not arguments
        return {} if empty else Call(self.name, arguments)


@dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to something outside the pickle."""

    identity: Any


def read_pickle(
    stream: IO[bytes], allowed: frozenset[str] = frozenset(), *, objects: bool = False, most: int = MAX_OPCODES
) -> Any:
    """The data of the next pickle in a stream, which is left behind its end.

    Args:
        stream: where it begins.
        allowed: dotted names that it may refer to.
        objects: also take objects with attributes, as the `Call` of their class; the attributes are dropped.
        most: opcodes that it may have.

    Raises:
        UserError: it refers to any other name, has an opcode that plain data does not need, a dictionary key that is
            neither a string, a number below 65536 nor a short tuple of them, is too long, cut off or malformed.
    """
    reader = _Reader(stream, allowed, _OBJECTS if objects else _OPCODES, most)
    try:
        return reader.load()
    except Exception as error:  # of a malformed one the standard library raises many kinds
        reason = error if isinstance(error, UserError) else f"not a complete pickle ({one_line(error, 80)})"
        raise UserError(f"opcode {reader.count}: {reason}") from error


# The one in Python: the one in C hashes keys before anything can look at them, and takes what memory a file asks for.
class _Reader(pickle._Unpickler):
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes], allowed: frozenset[str], opcodes: frozenset[str], most: int) -> None:
        super().__init__(stream)
        self._allowed, self._opcodes, self._most = allowed, opcodes, most
        self.count = 0

    @property
    def dispatch(self) -> Any:  # type: ignore[override]
        """Where ``load`` looks up what an opcode does: ``self[opcode]``."""
        return self

    def __getitem__(self, code: int) -> Callable[[_Reader], None]:
        name = _NAMES.get(code, f"{code:#x}")
        if name not in self._opcodes:
            raise UserError(f"{name} is not needed for plain data: refused")
        self.count += 1
        if self.count > self._most:
            raise UserError(f"more than {self._most:,} opcodes, which no schedule needs: refused")
        return _CHANGED.get(name) or pickle._Unpickler.dispatch[code]  # type: ignore[return-value]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._allowed:
            raise UserError(f"refers to {f'{module}.{name}'[:80]}, which no schedule needs: refused, nothing was run")
        return Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return Persistent(pid)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UserError("calls something that has no name: refused")
        self.stack.append(function(*arguments))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise UserError("a value is missing")
        for key, value in zip(items[::2], items[1::2], strict=True):
            parts = key if isinstance(key, tuple) else (key,)
            if len(parts) > _MOST_PARTS or not all(map(_is_plain, parts)):
                raise UserError("a dictionary key is neither a string, a small number nor a tuple of a few: refused")
            target[key] = value


def _is_plain(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, int) and 0 <= part < _MOST_NUMBER)


_CHANGED: dict[str, Callable[[_Reader], None]] = {
    "REDUCE": _Reader.call,
    "NEWOBJ": _Reader.call,
    "BUILD": lambda reader: reader.stack.pop(),
    "SETITEM": lambda reader: reader.set_items([reader.stack.pop(), reader.stack.pop()][::-1]),
    "SETITEMS": lambda reader: reader.set_items(reader.pop_mark()),
}
