"""A page in headless Chromium: opened, pointed at, asked. Where there is no Chromium its tests are skipped."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
_BEGIN, _END = '<pre id="answer">', "</pre>"


def ask(page: bytes, folder: Path, script: str, *, width: int, dark: bool = False) -> Any:
    """What a function body in JavaScript returns, as JSON, when the page is open in a window of this width."""
    asked = (
        "<script>{const errors = []; addEventListener('error', (event) => errors.push(event.message));"
        "const answer = document.createElement('pre'); answer.id = 'answer';"
        "addEventListener('load', () => {let said; try {said = (() => {" + script + "})();} catch (error) "
        "{errors.push(String(error));} answer.textContent = JSON.stringify({said, errors});"
        "document.body.append(answer);});}</script>"
    )
    path = folder / "asked.html"
    # In front of the page's own scripts, whose errors are told too.
    path.write_bytes(page.replace(b"<body>", b"<body>" + asked.encode(), 1))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        + [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        + ["--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert _BEGIN in done.stdout, done.stderr[-2000:]
    found = json.loads(unescape(done.stdout.partition(_BEGIN)[2].partition(_END)[0]))
    assert found["errors"] == []
    return found["said"]
