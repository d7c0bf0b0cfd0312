"""``dipgo-serve`` as a process of its own, over loopback."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_engine import Toy, build

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from dipgo_deploy.cli.serve import main  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402

URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("serve") / "toy", Toy(batch=8))


class Server:
    """A process, and what it listens on."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def get(self, path: str) -> tuple[int, str]:
        return self.ask("GET", path)[:2]

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
        """Status, body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name) and all(f'{label}="{value}"' in line for label, value in labels.items()):
                return float(line.split()[-1])
        return 0.0

    @property
    def resident(self) -> int:
        """MiB."""
        (size,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(size) >> 10


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    code = "import sys; from dipgo_deploy.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    given = [*map(str, arguments), "--port", "0", "--backend", "cpu", "--threads", "1"]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # so that threads that come and go do not look like a leak
    process = subprocess.Popen([sys.executable, "-c", code, *given], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+): ", first)
        assert found, first + process.stderr.read()
        log: list[str] = []
        threading.Thread(target=lambda: log.extend(process.stderr), daemon=True).start()  # type: ignore[arg-type]
        server = Server(process, int(found[1]))
        until(lambda: server.get("/readyz")[0] == 200)
        yield server
    finally:
        process.kill()
        process.wait(30)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def asked_of_toy(number: int) -> dict[str, Any]:
    words = ("boot", "bag", "coat", "red bag", "small red coat")
    more: dict[str, Any] = {"guidance_scale": 2.0} if number % 3 == 0 else {}
    more |= {"negative_prompt": "blue"} if number % 7 == 0 else {}
    return {"prompt": f"a {words[number % 5]}", "seed": number, **more}


def load(server: Server, requests: Sequence[dict[str, Any]], pipeline: Pipeline) -> None:
    """Send all requests, 32 at a time; each picture is the serial one of its own request."""

    def one(request: dict[str, Any]) -> np.ndarray:
        status, body, _ = server.ask("POST", URL, request)
        assert status == 200, body
        (entry,) = json.loads(body)["data"]
        assert entry["seed"] == request["seed"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))

    with ThreadPoolExecutor(32) as pool:
        pictures = list(pool.map(one, requests))
    serial: dict[str, np.ndarray] = {}
    for request, picture in zip(requests, pictures, strict=True):
        key = json.dumps(request)
        if key not in serial:
            given = {"class_labels" if name == "class_label" else name: value for name, value in request.items()}
            serial[key] = np.asarray(pipeline(**given).images[0])
        assert (picture == serial[key]).all(), request
    assert len({value.tobytes() for value in serial.values()}) == len(serial), (
        "all differ, so none can be taken for another"
    )


def test_sixty_requests(folder: Path) -> None:
    with serving(folder) as server:
        load(server, [asked_of_toy(number) for number in range(60)], Pipeline.from_engine_dir(folder, "cpu", threads=1))
        assert server.metric("dipgo_pictures_total", model="toy") == 60
        assert server.metric("dipgo_batches_total", model="toy", outcome="drawn") < 60
        assert server.metric("dipgo_waiting_pictures", model="toy") == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "fashion-dit"])
def test_a_thousand_requests_in_flat_memory(folder: Path, tmp_path: Path, model: str) -> None:
    def asked(number: int) -> dict[str, Any]:
        if model == "toy":
            return asked_of_toy(number)
        return {"class_label": number % 10, "seed": number % 200, "guidance_scale": 2.0 + number % 2}

    if model != "toy":
        from dipgo_deploy.cli.export import main as export

        folder = tmp_path / model
        # A prologue's rows are kept for many conditions, up to a limit that a thousand requests do not reach.
        options = ["--model", model, "--schedule", "fashion-dit-ddim50-4", "--batch", "4", "--no-prologue"]
        assert export([*options, "--engine-dir", str(folder)]) == 0
    pipeline = Pipeline.from_engine_dir(folder, "cpu", threads=1)
    with serving(folder) as server:
        load(server, [asked(number) for number in range(200)], pipeline)
        warm = server.resident
        load(server, [asked(number) for number in range(200, 1000)], pipeline)
        end = server.resident
        print(f"{model}: resident {warm} MiB after 200 requests, {end} MiB after 1,000")
        assert end <= warm + 8
        assert server.metric("dipgo_pictures_total", model=model) == 1000


def test_a_client_that_goes_away_is_forgotten(folder: Path) -> None:
    with serving(folder, "--batch-window", "1.5") as server:
        body = json.dumps(asked_of_toy(1))
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {URL} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            connection.sendall(head.encode())
            until(lambda: server.metric("dipgo_waiting_pictures", model="toy") == 1)
        until(lambda: server.metric("dipgo_waiting_pictures", model="toy") == 0)
        until(lambda: server.metric("dipgo_requests_total", model="toy", status="499") == 1)
        assert server.metric("dipgo_batches_total", model="toy") == 0

        # A stop: what was taken is drawn, nothing new is.
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(server.ask, "POST", URL, asked_of_toy(2))
            until(lambda: server.metric("dipgo_waiting_pictures", model="toy") == 1)
            server.process.send_signal(signal.SIGTERM)
            assert taken.result(30)[0] == 200
        assert server.process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            server.get("/healthz")


def test_what_cannot_be_served_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPGO_SERVE_API_KEY", "token")
    (tmp_path / "key").write_text("token")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([tmp_path / "none", "--port", "0"], "none"),
            ([folder, folder, "--port", "0"], "another directory is 'toy' already"),
            ([folder, "--port", port], "cannot be listened on (Address already in use"),
            ([folder, "--host", "no.such.host.invalid"], "cannot be listened on"),
            ([folder, "--api-key-file", tmp_path / "key"], "give one of the two"),
            ([folder, "--threads", "0"], "--threads"),
            ([], "Missing argument"),
        ):
            assert main([*map(str, arguments)]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
