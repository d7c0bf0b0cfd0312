"""JSON text of others as data, strict and bounded: every reader of this project sees the same document, or none."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.files import MAX_BYTES, read_bytes, unfit_file

MAX_DEPTH = 64
"""Of lists and objects inside each other."""
MAX_VALUES = 1_000_000
OTHER_FOLDER = "give another --checkpoint folder"
_TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep"


def read_document(
    path: str | os.PathLike[str],
    what: str,
    remedy: str = "correct it or give another file",
    *,
    limit: int = MAX_BYTES,
    most: int = MAX_VALUES,
    infinite: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: it should hold, for messages.
        remedy: what to do about one that is no JSON object.
        limit: bytes.
        most: see ``parse``.
        infinite: see ``parse``.

    Raises:
        UserError: it cannot be read, is larger than ``limit`` or ``most``, or is no strict JSON object.
    """
    data = read_bytes(path, limit, what)
    try:
        return json_object(data, most=most, infinite=infinite)
    except UserError as error:
        raise UserError(f"{path}: {unfit_file(Path(path)) or f'{error}; {remedy}'}") from error


def json_object(data: bytes | str, *, most: int = MAX_VALUES, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in UTF-8 text. Raises UserError where ``parse`` raises ValueError, and for anything else."""
    try:
        document = parse(data, most=most, infinite=infinite)
    except ValueError as error:
        raise UserError(f"not JSON ({one_line(error)})") from error
    if not isinstance(document, dict):
        raise UserError(f"not a JSON object but {'a list' if isinstance(document, list) else 'a single value'}")
    return document


def parse(data: bytes | str, *, most: int = MAX_VALUES, infinite: bool = False) -> Any:
    """The document in UTF-8 text, as plain data.

    Args:
        most: values of all lists and objects together; checked on the text before anything is made of it.
        infinite: take ``Infinity`` and ``-Infinity``, which Python's libraries write into the configurations of
            models.

    Raises:
        ValueError: one line that says what is wrong: no UTF-8, no JSON (with line and column), a key that stands twice
            in one object, a number that is not finite, half of a surrogate pair, or too many or too deep values.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error
    # Each value but the first of a list or object has a comma before it; those inside strings are counted too. Lists,
    # objects and keys take many times the memory of a number.
    containers = text.count("[") + text.count("{")
    if text.count(",") + containers > most or containers + text.count(":") > MAX_VALUES:
        raise ValueError(f"more than {most:,} values")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_infinity if infinite else _refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        content = text.rstrip()
        cut_off = error.pos >= len(content) or (content[:1] == "{" and content[-1] != "}")
        reason = f"the file is cut off ({error.msg})" if cut_off else error.msg
        raise ValueError(f"line {error.lineno}, column {error.colno}: {reason}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_values(document)
    return document


def check_same_settings(path: Path, settings: Mapping[str, Any], known: Any) -> None:
    """Refuse (UserError) to go on with work that was begun with other settings.

    Args:
        path: the file that says what it was begun with.
        settings: what it would be now, as JSON holds it.
        known: what the file says.
    """
    if not isinstance(known, dict):
        raise UserError(f"{path}: does not say what it was begun with; {OTHER_FOLDER}")
    before = _flat(known)
    for name, now in _flat(json.loads(json.dumps(settings))).items():
        if before.get(name) != now:
            raise UserError(
                f"{path}: was begun with {name} {one_line(repr(before.get(name)), 80)}, now it is "
                f"{one_line(repr(now), 80)}; give the same, or another --checkpoint folder"
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by dotted names, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def digest(document: Any) -> str:
    """Hex sha256 of a document's content, whatever the order of its keys and its white space."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_values(document: Any) -> None:
    layer = [document]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in layer:
            if isinstance(value, dict):
                below.extend(value.values())
                below.extend(value)
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str) and not value.isascii():
                _check_text(value)
        if not below:
            return
        layer = below
    raise ValueError(_TOO_DEEP)


def _check_text(value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{value[:40]!r} has half of a surrogate pair, which is no text") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"the key {name[:60]!r} stands twice in one object")
        document[name] = value
    return document


def _finite(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise ValueError(f"{token[:60]} is too large a number")
    return value


def _refuse_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON number")


def _infinity(token: str) -> float:
    return float(token) if token != "NaN" else _refuse_constant(token)
