"""What a server is told: by options of ``dipgo-serve``, or by variables of the environment (DIPGO_SERVE_...)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.schedule.validation import one_line

PREFIX = "DIPGO_SERVE_"
API_KEY = f"{PREFIX}API_KEY"


class Drawing(pydantic.BaseModel):
    """How requests are drawn, by whatever serves them.

    Attributes:
        backend, threads: as ``Pipeline.from_engine_dir``.
        window: seconds that a picture waits for others of its batch.
        max_queue: pictures that may wait, of each directory.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    backend: str = "auto"
    threads: int | None = pydantic.Field(default=None, ge=1)
    window: float = pydantic.Field(default=0.02, ge=0, le=60, allow_inf_nan=False)
    max_queue: int = pydantic.Field(default=64, ge=1, le=100_000)


class Settings(Drawing):
    """Of one server.

    Attributes:
        directories: engine directories, each as DIR or NAME=DIR.
        verify: as ``Pipeline.from_engine_dir``.
        max_images: ``n`` of one request.
        max_body: bytes of a request.
        timeout: seconds after which a request that is not drawn ends with 504.
        api_key: bearer token that requests have to carry; None: none.
    """

    directories: tuple[str, ...] = pydantic.Field(min_length=1)
    verify: bool = False
    max_images: int = pydantic.Field(default=10, ge=1, le=1000)
    max_body: int = pydantic.Field(default=2**20, ge=1024)
    timeout: float = pydantic.Field(default=600.0, gt=0, allow_inf_nan=False)
    api_key: str | None = pydantic.Field(default=None, repr=False)


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from DIPGO_SERVE_DIRECTORIES (with colons between), DIPGO_SERVE_BACKEND and so on.

    Raises:
        UserError: a variable that is wrong, unknown, or missing.
    """
    given: dict[str, Any] = {
        name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
    }
    if "directories" in given:
        given["directories"] = tuple(given["directories"].split(os.pathsep))
    key = read_key(given.pop("api_key_file", None), given.pop("api_key", None))
    try:
        return Settings(**given, api_key=key)
    except pydantic.ValidationError as error:
        raise UserError(f"environment, {PREFIX}*: {one_line(error)}") from None


def read_key(file: str | os.PathLike[str] | None, value: str | None) -> str | None:
    """The token: what a file holds, without the white space around it, or the text itself; None without either.

    Raises:
        UserError: both are given, the file cannot be read, or it is no token.
    """
    if file is not None and value is not None:
        raise UserError(f"--api-key-file and {API_KEY}: give one of the two")
    if file is None and value is None:
        return None
    where = API_KEY if file is None else f"--api-key-file {file}"
    key = (value or "") if file is None else read_bytes(Path(file), 65536, "file of a token").decode("latin-1")
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{where}: is no token; it needs printable ASCII characters without spaces")
    return key
