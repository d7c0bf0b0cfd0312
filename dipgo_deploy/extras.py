"""How an extra of this package is installed: from where the package itself came."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

_NAME = "dipgo-deploy"


def install(*extras: str) -> str:
    """The commands that install one of these extras, joined by "or": from the clone, the wheel or the index."""
    return " or ".join(f"pip install {_requirement(extra)}" for extra in extras)


def _requirement(extra: str) -> str:
    try:
        text = metadata.distribution(_NAME).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # a clone that is only on Python's path
        return f"-e {shlex.quote(f'{Path(__file__).resolve().parents[1]}[{extra}]')}"
    origin: dict[str, Any] = json.loads(text) if text else {}
    if not origin:
        return shlex.quote(f"{_NAME}[{extra}]")
    if "dir_info" not in origin:  # PEP 610
        kind = origin.get("vcs_info", {}).get("vcs")
        return shlex.quote(f"{_NAME}[{extra}] @ {f'{kind}+' if kind else ''}{origin['url']}")
    folder = shlex.quote(f"{url2pathname(urlparse(origin['url']).path)}[{extra}]")
    return f"-e {folder}" if origin["dir_info"].get("editable") else folder
