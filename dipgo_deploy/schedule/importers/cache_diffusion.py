"""NVIDIA's cache_diffusion (Model Optimizer): lists of ``wildcard_or_filter_func`` and ``select_cache_step_func``.

Such a list stands in Python, with a pattern or a lambda of the block's name and a lambda of the step's number. It is
not run: its syntax tree is read, and only what such functions need is understood: ``in``, comparisons, ``not``,
``and``, ``or``, ``+ - * // %`` on whole numbers, lists and ranges of numbers, ``re.search`` and ``name.startswith``
with a constant. A block's output is kept where its name passes and the step's function says so; of several entries
for a block the last counts.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.schedule.importers.base import Imported, Importer, Setting, Source

_NAMES = ("wildcard_or_filter_func", "select_cache_step_func")
_MOST_TEXT = 64 * 1024
_MOST_PATTERN = 200
_MOST_REPEATS = 3
_MOST_NUMBER = 10**6

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression with these names. Raises UserError for anything that no such function needs."""
    match node:
        case ast.Constant(value=bool() | int() | str() as constant):
            return constant
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not value(operand, names)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(value(operand, names), node)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(value(each, names) for each in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(value(each, names) for each in values)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATIONS:
            a, b = (_number(value(side, names), node) for side in (left, right))
            if not b and type(operator) in (ast.FloorDiv, ast.Mod):
                raise UserError(f"line {node.lineno}: divides by zero")
            return _OPERATIONS[type(operator)](a, b)
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in _COMPARISONS:
            try:
                return _COMPARISONS[type(operator)](value(left, names), value(right, names))
            except TypeError as error:
                raise UserError(f"line {node.lineno}: compares what cannot be compared") from error
        case ast.List(elts=entries) | ast.Tuple(elts=entries) | ast.Set(elts=entries):
            return [value(entry, names) for entry in entries]
        case ast.Call(func=ast.Name(id="range"), args=args, keywords=[]) if 1 <= len(args) <= 3:
            ends = [_number(value(each, names), node) for each in args]
            return range(*ends) if len(ends) < 3 or ends[2] else range(0)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr="search"), args=[pattern, text], keywords=[]):
            return re.search(_pattern(value(pattern, names), node), str(value(text, names))) is not None
        case ast.Call(func=ast.Attribute(value=text, attr="startswith"), args=[ast.Constant(value=str(start))]):
            return str(value(text, names)).startswith(start)
    raise UserError(f"line {node.lineno}: {_text(node)!r} is not understood, and nothing in a file is run")


def _text(node: ast.expr) -> str:
    """The beginning of an expression, for a message."""
    try:
        return ast.unparse(node)[:60]
    except RecursionError:
        return "..."


def _number(found: Any, node: ast.expr) -> int:
    if type(found) is not int or abs(found) > _MOST_NUMBER:
        raise UserError(f"line {node.lineno}: {repr(found)[:40]} is no whole number up to {_MOST_NUMBER}")
    return found


def _pattern(found: Any, node: ast.expr) -> re.Pattern[str]:
    """A pattern that cannot take time without end."""
    if not isinstance(found, str) or len(found) > _MOST_PATTERN:
        raise UserError(f"line {node.lineno}: {repr(found)[:60]} is no pattern that is understood")
    try:
        tree = re._parser.parse(found)  # type: ignore[attr-defined]
        pattern = re.compile(found)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"line {node.lineno}: {repr(found)[:60]} is no pattern ({one_line(error, 60)})") from error
    repeats = list(_repeats(tree))
    if len(repeats) > _MOST_REPEATS or not all(map(_is_one_character, repeats)):
        raise UserError(f"line {node.lineno}: {repr(found)[:60]} repeats more than one character, which may not end")
    return pattern


def _repeats(tree: Any) -> Iterator[Any]:
    """What is repeated in a parsed pattern, at any depth."""
    for operation, argument in tree:
        if str(operation).endswith("REPEAT"):
            yield argument[2]
        for part in _parts(str(operation), argument):
            yield from _repeats(part)


def _parts(operation: str, argument: Any) -> Sequence[Any]:
    match operation:
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return [argument[2]]
        case "SUBPATTERN":
            return [argument[3]]
        case "BRANCH":
            return list(argument[1])
        case "ASSERT" | "ASSERT_NOT":
            return [argument[1]]
        case "ATOMIC_GROUP":
            return [argument]
    return []


def _is_one_character(tree: Any) -> bool:
    """Whether a parsed pattern takes one character, with nothing but conditions before it."""
    if len(tree) == 1 and str(tree[0][0]) == "SUBPATTERN":
        return _is_one_character(tree[0][1][3])
    *before, last = [(str(operation), argument) for operation, argument in tree] or [("", None)]
    conditions = all(name in ("ASSERT", "ASSERT_NOT") and not list(_repeats(part[1])) for name, part in before)
    return conditions and last[0] in ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def read_entries(data: bytes, name: str | None) -> list[dict[str, ast.expr]]:
    """The entries of the list called ``name``, or of the only one."""
    if len(data) > _MOST_TEXT:
        raise UserError(f"{len(data):,} bytes, more than any such list needs")
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError("is no Python, or nested too deep") from error
    lists = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if name is None and len(lists) == 1:
        name = next(iter(lists))
    if name is None or name not in lists:
        what = "has several lists" if name is None else f"has no list {name}"
        raise UserError(f"{what} ({', '.join(lists) or 'none'}); say which with --name")
    entries = []
    for entry in lists[name].elts:
        if not isinstance(entry, ast.Dict) or not all(isinstance(key, ast.Constant) for key in entry.keys):
            raise UserError(f"line {entry.lineno}: is no entry with {' and '.join(_NAMES)}")
        named = {key.value: part for key, part in zip(entry.keys, entry.values, strict=True)}  # type: ignore[union-attr]
        if set(named) != set(_NAMES):
            raise UserError(f"line {entry.lineno}: is no entry with {' and '.join(_NAMES)}")
        entries.append(named)
    return entries


def _applied(node: ast.expr, argument: Any, what: str) -> bool:
    """What the function of an entry says of a name or a step."""
    match node:
        case ast.Constant(value=str(pattern)) if what == "name":
            return fnmatch.fnmatchcase(str(argument), pattern)
        case ast.Lambda(args=ast.arguments(args=[ast.arg(arg=name)]), body=body):
            try:
                return bool(value(body, {name: argument}))
            except RecursionError as error:
                raise UserError(f"line {node.lineno}: is nested too deep") from error
    raise UserError(f"line {node.lineno}: {_text(node)!r} is no lambda of one {what}")


def _read(data: bytes, source: Source, name: str | None) -> Imported:
    entries = read_entries(data, name)
    steps = source.steps
    columns: list[list[bool]] = []
    for block in source.names:
        selects = [entry[_NAMES[1]] for entry in entries if _applied(entry[_NAMES[0]], block, "name")]
        select = selects[-1] if selects else None
        columns.append([select is None or not _applied(select, step, "step") for step in range(steps)])
    return Imported(tuple(zip(*columns, strict=True)))


IMPORTER = Importer(
    kind="cache-diffusion",
    title="Read a configuration of NVIDIA's cache_diffusion.",
    file="Python with such a list, of which the syntax is read: nothing in it is executed",
    read=_read,
    example="utils.py --name SDXL_DEFAULT_CONFIG --model ./sdxl --sampler ddim --steps 30 -o schedule.json",
    cache="output",
    settings=(Setting("name", str, "Which list of the file, where it has several.", default_text="the only one"),),
)
