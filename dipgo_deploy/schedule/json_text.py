"""JSON text of a user as data: strict, and bounded in depth and number of values."""

from __future__ import annotations

import json
from typing import Any

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.schedule.files import strict_json

MAX_DEPTH = 64
MAX_VALUES = 1_000_000


def parse_json(data: bytes | str, what: str, *, most: int = MAX_VALUES, depth: int = MAX_DEPTH) -> Any:
    """The document in UTF-8 text.

    what: names the kind of document in errors ("a schedule"). most: values of all lists and objects together; checked
    on the text before anything is made of it. depth: of lists and objects inside each other.

    Raises:
        UserError: text that is no such JSON; says line and column where there is one.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start} is not UTF-8 text: not {what}") from error
    # Each value but the first of a list or object has a comma before it; those inside strings are counted too.
    if text.count(",") + text.count("[") + text.count("{") > most:
        raise UserError(f"more than {most:,} values, which is not {what}")
    try:
        document = strict_json(text)
    except json.JSONDecodeError as error:
        content = text.rstrip()
        cut_off = error.pos >= len(content) or (content[:1] == "{" and content[-1] != "}")
        reason = "the file is cut off" if cut_off else "not JSON"
        raise UserError(f"line {error.lineno}, column {error.colno}: {reason} ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"not {what}: lists and objects are nested more than {depth} deep") from error
    except ValueError as error:
        raise UserError(f"not {what}: {one_line(error)}") from error
    _check_depth(document, what, depth)
    return document


def _check_depth(document: Any, what: str, depth: int) -> None:
    layer = [document]
    for _ in range(depth + 1):
        below: list[Any] = []
        for value in layer:
            if isinstance(value, dict):
                below.extend(value.values())
                below.extend(value)
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str) and not value.isascii():
                _check_text(value, what)
        if not below:
            return
        layer = below
    raise UserError(f"not {what}: lists and objects are nested more than {depth} deep")


def _check_text(value: str, what: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"not {what}: {value[:40]!r} has half of a surrogate pair, which is no text") from error
