"""Reads the data of a pickle without running it.

``pickle`` calls whatever a file names. Here the opcodes are only decoded (``pickletools``) and interpreted as data:
a named global is a ``Global``, a call of one is a ``Call``, a reference outside the pickle is a ``Persistent``.
Nothing named in the file is ever imported, looked up or called, whatever it is.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import IO, Any

from dipgo_deploy.errors import UserError

MAX_OPCODES = 500_000
"""Most opcodes of a pickle; the released schedules have twelve thousand."""

_MARK = object()

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A name the pickle refers to, e.g. ``torch._utils._rebuild_tensor_v2``."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call that the pickle asks for. It is not made."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Persistent:
    """A reference to something outside the pickle."""

    identity: Any


_EMPTY_DICT = Call("collections.OrderedDict", ())


def read_pickle(stream: IO[bytes], allowed: frozenset[str], *, objects: bool = False) -> Any:
    """The data of the next pickle in a stream, which is left behind its end.

    allowed: dotted names that the pickle may refer to. objects: also accept objects with attributes, as the ``Call`` of
    their class; the attributes are dropped. An empty ``collections.OrderedDict``, if allowed, is a dictionary. Raises
    UserError, naming the byte, for any other name, for an opcode that plain data does not need, and for a pickle that
    is cut off or malformed.
    """
    machine = _Machine(allowed, objects)
    at = stream.tell()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            at = position if position is not None else at
            if count >= MAX_OPCODES:
                raise UserError(f"more than {MAX_OPCODES:,} opcodes, which no schedule needs: refused")
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except UserError as error:
        raise UserError(f"byte {at}: {error}") from error
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"byte {at}: not a complete pickle ({_brief(error)})") from error
    raise UserError(f"byte {at}: the pickle has no end")


class _Machine:
    """The stack machine of the pickle format, for data only."""

    def __init__(self, allowed: frozenset[str], objects: bool) -> None:
        self.allowed = allowed
        self.objects = objects
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("a mark is missing")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def run(self, name: str, argument: Any) -> None:
        """Interpret one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
            self.set_items(items)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            self.push_global(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.push_global(module, attribute)
        elif name == "REDUCE" or (name == "NEWOBJ" and self.objects):
            self.push_call()
        elif name == "BUILD" and self.objects:
            self.pop()
            self.top((Call, dict))
        elif name == "BINPERSID":
            stack.append(Persistent(self.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"opcode {name} is not needed for plain data: refused")

    def top(self, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {type(self.stack[-1]).__name__} in the wrong place")
        return self.stack[-1]

    def push_call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UserError("calls something that has no name: refused")
        call = Call(function.name, arguments)
        self.stack.append({} if call == _EMPTY_DICT else call)

    def push_global(self, module: Any, attribute: Any) -> None:
        name = f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else "(no name)"
        if name not in self.allowed:
            raise UserError(f"refers to {name[:80]}, which no schedule needs: refused, nothing was run")
        self.stack.append(Global(name))

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a value is missing")
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only flat keys: hashing a tuple nested a million deep would overflow the C stack.
            if not all(isinstance(part, (str, int)) for part in (key if isinstance(key, tuple) else (key,))):
                raise UserError("a dictionary key is neither a string, a number nor a tuple of them: refused")
            target[key] = value


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__
