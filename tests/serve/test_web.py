"""The HTTP side in process, on toy engines."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_engine import Toy, build, build_several

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from starlette.testclient import TestClient  # noqa: E402

from dipgo_deploy.errors import NotFiniteError, UserError  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.serve.engine import Engine, open_engines  # noqa: E402
from dipgo_deploy.serve.schemas import GenerationRequest  # noqa: E402
from dipgo_deploy.serve.service import Service  # noqa: E402
from dipgo_deploy.serve.settings import Settings  # noqa: E402
from dipgo_deploy.serve.web import create_app  # noqa: E402

URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("serve")
    return {
        "text": build(folder / "text", Toy(batch=4)),
        "class": build(folder / "class", Toy(kind="class", batch=2)),
        "latent": build(folder / "latent", Toy(vae=False)),
    }


@pytest.fixture(scope="module")
def serial(folders: dict[str, Path]) -> dict[str, Pipeline]:
    return {name: Pipeline.from_engine_dir(folders[name], "cpu", threads=1) for name in ("text", "class")}


def settings(*directories: str | Path, **more: Any) -> Settings:
    return Settings(directories=tuple(map(str, directories)), backend="cpu", threads=1, **more)


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    given = settings(folders["text"], f"clothes={folders['class']}", window=0.05, max_images=8)
    service = Service(open_engines(given), given)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def pictures(answer: Any) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer.json()["data"]]


def one(result: Any) -> np.ndarray:
    (image,) = result.images
    return np.asarray(image)


def refused(answer: Any, status: int, *words: str) -> None:
    error = answer.json()["error"]
    assert answer.status_code == status and all(word in error["message"] for word in words), answer.text
    assert "\n" not in error["message"] and "/" not in error["message"].replace("/v1/models", "")


def test_pictures_are_the_serial_ones(client: TestClient, serial: dict[str, Pipeline]) -> None:
    asked = {"model": "text", "prompt": "a red boot", "n": 6, "seed": 2**32 - 2, "negative_prompt": "blue"}
    answer = client.post(URL, json={**asked, "guidance_scale": 2, "size": "auto", "user": "me"})
    seeds = [2**32 - 2, 2**32 - 1, 0, 1, 2, 3]
    body = answer.json()
    assert [one["seed"] for one in body["data"]] == seeds
    assert (body["model"], body["size"], body["output_format"]) == ("text", "8x8", "png")
    for seed, picture in zip(seeds, pictures(answer), strict=True):
        alone = serial["text"]("a red boot", negative_prompt="blue", guidance_scale=2.0, seed=seed)
        assert (picture == one(alone)).all()
    file = Image.open(io.BytesIO(base64.b64decode(body["data"][1]["b64_json"])))
    assert file.text["parameters"].startswith("a red boot\nNegative prompt: blue\n")  # type: ignore[attr-defined]
    assert "CFG scale: 2, Seed: 4294967295, Size: 8x8" in file.text["parameters"]  # type: ignore[attr-defined]


def test_a_seed_that_is_told_draws_the_picture_again(client: TestClient) -> None:
    first = client.post(URL, json={"model": "clothes", "class_label": "boot", "n": 2})
    seeds = [one["seed"] for one in first.json()["data"]]
    again = [client.post(URL, json={"model": "clothes", "class_label": 0, "seed": seed}) for seed in seeds]
    assert [pictures(answer)[0].tolist() for answer in again] == [picture.tolist() for picture in pictures(first)]
    assert seeds[0] != client.post(URL, json={"model": "clothes", "class_label": 0}).json()["data"][0]["seed"]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(client: TestClient, kind: str) -> None:
    answer = client.post(URL, json={"model": "text", "prompt": "a", "output_format": kind})
    file = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert file.format == kind.upper() and file.getexif().get_ifd(0x8769)


def test_what_comes_together_is_drawn_together_and_not_mixed(client: TestClient, serial: dict[str, Pipeline]) -> None:
    def count(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{") and 'model="text"' in line)

    names = ("dipgo_batches_total", "dipgo_pictures_total", "dipgo_batch_pictures_count", "dipgo_waited_seconds_count")
    before = [count(name) for name in names]
    asked = [{"prompt": f"a {word}", "seed": seed} for word in ("boot", "bag", "red coat") for seed in range(4)]
    asked += [{**request, "guidance_scale": 2.0} for request in asked] + [
        {**request, "negative_prompt": "red"} for request in asked
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda request: client.post(URL, json={"model": "text", **request}), asked))
    for request, answer in zip(asked, answers, strict=True):
        prompt, more = request["prompt"], {key: value for key, value in request.items() if key != "prompt"}
        assert (pictures(answer)[0] == one(serial["text"](prompt, **more))).all()
    batches, drawn, filled, waited = [count(name) - was for name, was in zip(names, before, strict=True)]
    assert drawn == waited == len(asked) and batches == filled < len(asked) / 2


@pytest.mark.parametrize(
    ("asked", "status", "words", "param"),
    [
        ({}, 400, ("model: missing", "text, clothes"), "model"),
        ({"model": "none"}, 404, ("no 'none' here", "text, clothes"), "model"),
        ({"model": "text:none", "prompt": "a"}, 404, ("no 'text:none' here",), "model"),
        ({"model": "text"}, 400, ("prompt: missing",), "prompt"),
        ({"model": "text", "prompt": "a" * 32_001}, 400, ("prompt: String should have at most 32000",), "prompt"),
        ({"model": "text", "prompt": "a", "class_label": "boot"}, 400, ("takes no class labels",), "class_label"),
        ({"model": "clothes", "prompt": "a"}, 400, ("takes class labels, not text",), "prompt"),
        ({"model": "clothes", "class_label": "hat"}, 400, ("no class is named 'hat'",), "class_label"),
        ({"model": "clothes", "class_label": "a" * 301}, 400, ("class_label", "300"), "class_label"),
        ({"model": "clothes", "class_label": True}, 400, ("class_label",), "class_label"),
        ({"model": "text", "prompt": "a", "n": 0}, 400, ("n: ",), "n"),
        ({"model": "text", "prompt": "a", "n": 9}, 400, ("n: 9, and this server draws at most 8",), "n"),
        ({"model": "text", "prompt": "a", "n": "2"}, 400, ("n: ",), "n"),
        ({"model": "text", "prompt": "a", "seed": -1}, 400, ("seed: ",), "seed"),
        ({"model": "text", "prompt": "a", "seed": 2**32}, 400, ("seed: ",), "seed"),
        ({"model": "text", "prompt": "a", "size": "8 x 8"}, 400, ("size: ",), "size"),
        ({"model": "text", "prompt": "a", "size": "64x64"}, 400, ("one size only",), "size"),
        ({"model": "text", "prompt": "a", "guidance_scale": 0.5}, 400, ("must be 1",), "guidance_scale"),
        ({"model": "text", "prompt": "a", "guidance_scale": 1e9}, 400, ("guidance_scale: ",), "guidance_scale"),
        ({"model": "text", "prompt": "a", "guidance_scale_2": 2}, 400, ("one denoiser",), "guidance_scale_2"),
        ({"model": "text", "prompt": "a", "num_inference_steps": 5}, 400, ("compiled for 6",), "num_inference_steps"),
        ({"model": "text", "prompt": "a", "schedule": "x"}, 400, ("schedule 'x'", "6 launches"), "schedule"),
        ({"model": "text", "prompt": "a", "launches": 3}, 400, ("launches 3", "6 launches"), "launches"),
        ({"model": "text", "prompt": "a", "schedule": "x", "launches": 3}, 400, ("give one of the two",), "schedule"),
        ({"model": "text", "prompt": "a", "response_format": "url"}, 400, ("b64_json",), "response_format"),
        ({"model": "text", "prompt": "a", "quality": "hd"}, 400, ("quality: ",), "quality"),
    ],
)
def test_what_does_not_fit_is_said(
    client: TestClient, asked: dict[str, Any], status: int, words: tuple[str, ...], param: str
) -> None:
    answer = client.post(URL, json=asked)
    refused(answer, status, *words)
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "prompt"),
        (b'{"guidance_scale": NaN}', 400, "body"),
        (b'{"prompt": "\xff"}', 400, "UTF-8"),
        (b"[" * 100_000, 400, "body"),
        (b" " * (2**20 + 1), 413, "1048576 bytes"),
    ],
)
def test_wrong_bodies(client: TestClient, body: bytes, status: int, word: str) -> None:
    refused(client.post(URL, content=body), status, word)


def test_other_ways(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert [entry["id"] for entry in models["data"]] == ["text", "clothes"] and models["object"] == "list"
    assert client.get("/v1/models/clothes").json() == models["data"][1]
    assert models["data"][0].items() >= {"num_inference_steps": 6, "launches": 6, "batch": 4, "object": "model"}.items()
    refused(client.get("/v1/models/none"), 404, "no 'none' here")
    refused(client.get("/none"), 404, "Not Found")
    refused(client.get(URL), 405, "Method Not Allowed")
    assert client.get("/healthz").json() == {"status": "ready"}
    assert client.get("/readyz").json()["models"] == {"text": "ready", "clothes": "ready"}
    schema = client.get("/openapi.json").json()
    body = schema["paths"][URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["n"]["maximum"] == 1000 and not body["additionalProperties"]


def test_several_schedules_of_one_directory(tmp_path: Path) -> None:
    given = settings(build_several(tmp_path / "toy", Toy(batch=2)), window=0.02)
    service = Service(open_engines(given), given)
    serial = {name: Pipeline.from_engine_dir(tmp_path / "toy", "cpu", schedule=name) for name in ("whole", "short")}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("whole", {}),
        ("whole", {"model": "toy:whole"}),
        ("short", {"model": "toy:short"}),
        ("short", {"schedule": "short"}),
        ("short", {"launches": 5}),
        ("whole", {"model": "toy", "launches": 6}),
    ]
    with TestClient(create_app(service)) as client:
        with ThreadPoolExecutor(len(ways)) as pool:
            asked = [{"prompt": "a bag", "seed": 3, **more} for _, more in ways]
            answers = list(pool.map(lambda body: client.post(URL, json=body), asked))
        for (name, _), answer in zip(ways, answers, strict=True):
            assert (pictures(answer)[0] == one(serial[name]("a bag", seed=3))).all()
        assert (pictures(answers[0])[0] != pictures(answers[2])[0]).any()
        entries = client.get("/v1/models").json()["data"]
        assert [(entry["id"], entry["launches"]) for entry in entries] == [
            ("toy", 6),
            ("toy:whole", 6),
            ("toy:short", 5),
        ]
        refused(client.post(URL, json={"model": "toy:short", "launches": 5, "prompt": "a"}), 400, "names a schedule")
        refused(client.post(URL, json={"launches": 4, "prompt": "a"}), 400, "launches 4", "short (5 launches)")


def test_pictures_that_are_given(tmp_path: Path) -> None:
    given = settings(build(tmp_path / "toy", Toy(batch=2, control=True)), window=0.05)
    service = Service(open_engines(given), given)
    pipeline = Pipeline.from_engine_dir(tmp_path / "toy", "cpu", threads=1)
    shown = [Image.new("RGB", (20, 10), (level, 40, 200)) for level in (10, 240)]

    def file(picture: Image.Image) -> str:
        data = io.BytesIO()
        picture.save(data, "PNG")
        return base64.b64encode(data.getvalue()).decode()

    with TestClient(create_app(service)) as client:
        with ThreadPoolExecutor(2) as pool:
            asked = [{"prompt": "a bag", "seed": 5, "n": 3, "control_image": file(picture)} for picture in shown]
            answers = list(pool.map(lambda body: client.post(URL, json=body), asked))
        for picture, answer in zip(shown, answers, strict=True):
            for place, drawn in enumerate(pictures(answer)):
                assert (drawn == one(pipeline("a bag", seed=5 + place, control_image=picture))).all()
        assert (pictures(answers[0])[0] != pictures(answers[1])[0]).any()
        for more, message in (
            ({}, "control_image: missing"),
            ({"control_image": "a picture"}, "control_image: not base64"),
            ({"control_image": base64.b64encode(b"GIF89a").decode()}, "control_image: not a picture"),
            ({"control_image": file(Image.new("1", (4096, 4096)))}, "control_image: 4096 x 4096 pixels, more than"),
            ({"control_image": [file(shown[0])] * 9}, "control_image: "),
            ({"control_image": file(shown[0]), "image": file(shown[0])}, "image: "),
            ({"control_image": file(shown[0]), "strength": 0.5}, "strength: "),
            ({"control_image": file(shown[0]), "control_scale": 0.5}, "control_scale: "),
            ({"control_image": file(shown[0]), "ip_adapter_scale": 0.5}, "ip_adapter_scale: "),
        ):
            answer = client.post(URL, json={"prompt": "a", **more})
            refused(answer, 400, message)
            assert answer.json()["error"]["param"] == message.split(":")[0]


def test_the_token(folders: dict[str, Path]) -> None:
    given = settings(folders["class"], api_key="s3cret")
    service = Service(open_engines(given), given)
    assert "s3cret" not in repr(given)
    with TestClient(create_app(service)) as client:
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "é"},
        ):
            for path in (URL, "/v1/models", "/metrics"):
                raw = {name: value.encode("latin-1") for name, value in headers.items()}
                answer = client.request("POST" if path == URL else "GET", path, headers=raw)  # type: ignore[arg-type]
                refused(answer, 401, "bearer token")
                assert answer.headers["www-authenticate"] == "Bearer"
        allowed = {"Authorization": "bearer s3cret"}
        assert client.post(URL, json={"class_label": "bag"}, headers=allowed).status_code == 200
        assert client.get("/metrics", headers=allowed).status_code == client.get("/healthz").status_code == 200


class Slow(Engine):
    """Draws when it is told to, and looks every now and then whether it is still wanted."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.name, engine._first)
        self.go, self.begun = threading.Event(), threading.Semaphore(0)

    def draw(self, batch: Any, check: Callable[[], None]) -> Any:
        self.begun.release()
        while not self.go.wait(0.002):
            check()
        return super().draw(batch, check)


@pytest.fixture
def slow(folders: dict[str, Path]) -> Iterator[tuple[Slow, TestClient]]:
    given = settings(folders["class"], window=0.0, max_queue=2, timeout=5)
    (opened,) = open_engines(given)
    engine = Slow(opened)
    with TestClient(create_app(Service([engine], given)), raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        try:
            yield engine, client
        finally:
            engine.go.set()


def test_a_full_queue_is_503_and_says_when_to_come_back(slow: tuple[Slow, TestClient]) -> None:
    engine, client = slow
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.post, URL, json={"class_label": 0})
        assert engine.begun.acquire(timeout=10)
        waiting = pool.submit(client.post, URL, json={"class_label": 1, "n": 2})
        until(lambda: 'dipgo_waiting_pictures{model="class"} 2.0' in client.get("/metrics").text)
        answer = client.post(URL, json={"class_label": 2})
        refused(answer, 503, "2 pictures wait, and at most 2 may")
        refused(client.post(URL, json={"class_label": 2, "n": 3}), 400, "draws at most 2")
        assert int(answer.headers["retry-after"]) >= 1
        engine.go.set()
        assert len(pictures(running.result())) == 1 and len(pictures(waiting.result())) == 2
    lines = client.get("/metrics").text
    assert 'dipgo_requests_total{model="",status="503"} 1.0' in lines
    assert 'dipgo_requests_total{model="class",status="200"} 2.0' in lines


def test_a_picture_that_cannot_be_drawn_is_said(slow: tuple[Slow, TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, client = slow
    for error, status, word in (
        (NotFiniteError(f"{engine._first.bundle.path}: launch 3 of 6: no picture"), 422, "launch 3 of 6: no picture"),
        (RuntimeError("secret"), 500, "could not be drawn; the server's log says why"),
    ):

        def fail(self: Pipeline, error: Exception = error, **given: Any) -> None:
            raise error

        monkeypatch.setattr(Pipeline, "__call__", fail)
        engine.go.set()
        answer = client.post(URL, json={"class_label": 0})
        refused(answer, status, word)
        assert "secret" not in answer.text


def test_what_takes_too_long_is_forgotten(folders: dict[str, Path]) -> None:
    given = settings(folders["class"], timeout=0.05)
    (opened,) = open_engines(given)
    engine = Slow(opened)
    with TestClient(create_app(Service([engine], given))) as client:
        refused(client.post(URL, json={"class_label": 0}), 504, "not drawn within 0.05 s")
        until(lambda: 'dipgo_batches_total{model="class",outcome="abandoned"} 1.0' in client.get("/metrics").text)


def test_directories_that_cannot_be_served(folders: dict[str, Path], tmp_path: Path) -> None:
    for directories, message in (
        ([folders["latent"]], "has no VAE decoder"),
        ([folders["text"], f"text={folders['class']}"], "another directory is 'text' already"),
        ([f"a:b={folders['text']}"], "cannot be the name of a model"),
        ([f"a/b={folders['text']}"], "cannot be the name of a model"),
        ([tmp_path / "none"], "none"),
    ):
        with pytest.raises(UserError, match=message):
            open_engines(settings(*directories))


def test_a_directory_that_cannot_be_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    given = settings(build(tmp_path / "toy", Toy(batch=1)))
    engines = open_engines(given)
    graph = tmp_path / "toy/graphs/full.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with TestClient(create_app(Service(engines, given))) as client:
        until(lambda: client.get("/healthz").status_code == 500)
        assert client.get("/readyz").status_code == 503
        assert client.get("/readyz").json()["models"] == {"toy": "failed"}
        refused(client.post(URL, json={"prompt": "a"}), 503, "the server is failed")


def test_the_page_says_what_there_is(client: TestClient) -> None:
    page = (Path(__file__).parents[2] / "docs/howto/serving.md").read_text(encoding="utf-8")
    table = page.partition("## What a request says")[2].partition("## Batches")[0]
    fields = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert fields | {"user"} == set(GenerationRequest.model_fields)
    ways = set(re.findall(r"^\| `(/\S+)` \|", page, flags=re.MULTILINE))
    assert all(client.get(way).status_code == 200 for way in ways) and len(ways) == 4
    shown = client.get("/metrics").text
    named = set(re.findall(r"`(dipgo_\w+)`", page))
    assert len(named) == 4 and all(f"# HELP {name.removesuffix('_total')}" in shown for name in named)
    variables = {f"DIPGO_SERVE_{name.upper()}" for name in (*Settings.model_fields, "api_key_file")}
    assert set(re.findall(r"DIPGO_SERVE_[A-Z_]+", page)) <= variables
