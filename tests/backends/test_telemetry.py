"""ONNX Runtime's telemetry is off: it writes no file below the home folder and makes no connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_engine import Toy, build

# ONNX Runtime stays quiet by itself where one of these is set; the caches are what it writes to.
_OURS = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
# Seconds; the first upload was seen after 9.3.
_UPLOAD = 13
_CODE = """
import sys, time
from dipgo_deploy import Pipeline
Pipeline.from_engine_dir(sys.argv[1], "cpu", threads=1)("a red boot")
time.sleep(float(sys.argv[2]))
"""


def start(engine: Path, home: Path, seconds: float, **environment: str) -> subprocess.Popen[bytes]:
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in _OURS} | {"HOME": str(home)} | environment
    return subprocess.Popen([sys.executable, "-c", _CODE, str(engine), str(seconds)], env=env, cwd=home)


def files(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_a_run_writes_nothing_below_the_home_folder(tmp_path):
    engine = build(tmp_path / "engine", Toy(batch=1))
    runs = {
        "off": start(engine, tmp_path / "off", 0),
        "on": start(engine, tmp_path / "on", 0, ORT_DISABLE_TELEMETRY="0"),
    }
    assert {name: run.wait(60) for name, run in runs.items()} == {"off": 0, "on": 0}
    assert files(tmp_path / "off") == []
    if not any(name.endswith("deviceid") for name in files(tmp_path / "on")):
        pytest.skip("this ONNX Runtime has no telemetry")


@pytest.mark.slow
def test_a_run_connects_to_nobody(tmp_path):
    engine = build(tmp_path / "engine", Toy(batch=1))
    runs, proxies = {}, {}
    for name, environment in (("off", {}), ("on", {"ORT_DISABLE_TELEMETRY": "0"})):
        # Whatever a process would send goes to a proxy, which hangs up.
        proxies[name] = proxy = socket.create_server(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        given = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"), address)
        runs[name] = start(engine, tmp_path / name, _UPLOAD, NO_PROXY="", no_proxy="", **given, **environment)
    assert {name: run.wait(60) for name, run in runs.items()} == {"off": 0, "on": 0}
    called = {}
    for name, proxy in proxies.items():
        proxy.setblocking(False)
        try:
            proxy.accept()[0].close()
            called[name] = True
        except BlockingIOError:
            called[name] = False
        proxy.close()
    assert not called["off"]
    if not called["on"]:
        pytest.skip("this ONNX Runtime sends nothing")
