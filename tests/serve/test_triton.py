"""Model repositories for NVIDIA Triton: their files, the model with a stand-in for Triton's module, and a real Triton.

DIPGO_TRITON_PYTHON names the Python of an environment with nvidia-pytriton, numpy < 2, onnxruntime and what this
package needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from toy_engine import Toy, build, build_several

from dipgo_deploy.cli.triton import main
from dipgo_deploy.errors import NotFiniteError
from dipgo_deploy.runtime.pipeline import Pipeline

TRITON_PYTHON = os.environ.get("DIPGO_TRITON_PYTHON")
ROOT = Path(__file__).resolve().parents[2]


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError:
    INTERNAL, INVALID_ARG, CANCELLED = "internal", "invalid", "cancelled"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.array for tensor in output_tensors or []}
        self.error = error


class Request:
    """Inputs as Triton gives them: (n, 1), text as bytes in an array of objects."""

    def __init__(self, cancelled: bool = False, **columns: list[Any]) -> None:
        kinds = {"seed": np.uint64, "class_label": np.int64, "guidance_scale": np.float32}
        self.inputs = {
            name: np.array([[value.encode() if isinstance(value, str) else value] for value in values]).astype(
                kinds.get(name, object)
            )
            for name, values in columns.items()
        }
        self.cancelled = cancelled

    def is_cancelled(self) -> bool:
        return self.cancelled


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton_python_backend_utils")
    found = {"Tensor": Tensor, "TritonError": TritonError, "InferenceResponse": Response}

    def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
        return Tensor(name, request.inputs[name]) if name in request.inputs else None

    vars(module).update(found, get_input_tensor_by_name=get_input_tensor_by_name)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def config_of(folder: Path) -> dict[str, Any]:
    """What Triton makes of a configuration's name and parameters."""
    text = (folder / "config.pbtxt").read_text()
    parameters = re.findall(
        r'^parameters \{ key: "(\w+)" value \{ string_value: (".*") \} \}$', text, flags=re.MULTILINE
    )
    (name,) = re.findall(r"^name: (.*)$", text, flags=re.MULTILINE)
    return {
        "name": json.loads(name),
        "parameters": {key: {"string_value": json.loads(value)} for key, value in parameters},
    }


def loaded(folder: Path, **args: str) -> Any:
    """The model of a repository, as Triton's stub starts it."""
    spec = importlib.util.spec_from_file_location("model", folder / "1/model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config_of(folder)), "model_instance_kind": "CPU", **args})
    return model


def repository(engine_dir: Path, folder: Path, *options: str) -> Path:
    """A repository's one model."""
    given = ["--engine-dir", str(engine_dir), "-o", str(folder), "--backend", "cpu", "--threads", "1"]
    assert main([*given, *options]) == 0
    (model,) = folder.iterdir()
    return model


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_several(tmp_path_factory.mktemp("triton") / "toy", Toy(batch=4))


def test_the_configuration_says_what_the_directory_takes(text_dir: Path, tmp_path: Path) -> None:
    folder = repository(text_dir, tmp_path / "repository", "--batch-window", "0.5", "--max-queue", "9")
    assert (
        (folder / "config.pbtxt").read_text()
        == f"""\
name: "toy"
backend: "python"
max_batch_size: 4
input [ {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] }} ]
input [ {{ name: "negative_prompt" data_type: TYPE_STRING dims: [ 1 ] optional: true }} ]
input [ {{ name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true }} ]
input [ {{ name: "guidance_scale" data_type: TYPE_FP32 dims: [ 1 ] optional: true }} ]
input [ {{ name: "schedule" data_type: TYPE_STRING dims: [ 1 ] optional: true }} ]
output [ {{ name: "image" data_type: TYPE_UINT8 dims: [ 8, 8, 3 ] }} ]
output [ {{ name: "used_seed" data_type: TYPE_UINT64 dims: [ 1 ] }} ]
dynamic_batching {{
  max_queue_delay_microseconds: 500000
  default_queue_policy {{ max_queue_size: 9 }}
}}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "engine_dir" value {{ string_value: "{text_dir}" }} }}
parameters {{ key: "backend" value {{ string_value: "cpu" }} }}
parameters {{ key: "threads" value {{ string_value: "1" }} }}
"""
    )
    assert sorted(path.name for path in folder.rglob("*")) == ["1", "config.pbtxt", "model.py"]


def test_a_copy_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(tmp_path / "a", Toy(kind="class", guidance=False, batch=2))
    folder = repository(engine, tmp_path / "repository", "--copy", "--name", 'clothes "x"', "--backend", "cpu")
    assert "guidance" not in (folder / "config.pbtxt").read_text() and "prompt" not in config_of(folder)
    want = [np.asarray(Pipeline.from_engine_dir(engine, "cpu")(class_labels=1, seed=seed).images[0]) for seed in (3, 4)]
    shutil.rmtree(engine)
    moved = shutil.move(folder, tmp_path / "moved")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = loaded(moved, model_instance_kind="GPU", model_instance_device_id="3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    (response,) = model.execute([Request(class_label=[1, 1], seed=[3, 4])])
    np.testing.assert_array_equal(response.outputs["image"], want)
    model.finalize()


def test_requests_of_all_kinds_get_their_own(text_dir: Path, tmp_path: Path) -> None:
    model = loaded(repository(text_dir, tmp_path / "repository"))
    pipeline = Pipeline.from_engine_dir(text_dir, "cpu", threads=1)
    requests = [
        Request(prompt=["a boot", "a bag", "a red coat"], seed=[1, 2, 3], guidance_scale=[2.0, 3.0, 2.0]),
        Request(prompt=["a bag"], seed=[2**32]),
        Request(prompt=["a bag"], seed=[7], negative_prompt=["blue"]),
        Request(prompt=["a"], seed=[1], schedule=["none"]),
        Request(prompt=["a bag"]),
        Request(prompt=["a bag", "a bag"], seed=[1, 1], schedule=["short", "whole"]),
        Request(prompt=["a bag", "a bag"], seed=[1, 2], schedule=["short", "short"]),
        Request(),
        Request(prompt=["a" * 32_001], seed=[1]),
    ]
    requests[-2].inputs["prompt"] = np.array([[b"\xff"]], object)
    responses = model.execute(requests)
    errors = [(number, response.error) for number, response in enumerate(responses) if response.error]
    assert [(number, error.code) for number, error in errors] == [(number, "invalid") for number in (1, 3, 5, 7, 8)]
    words = ("seed: ", "schedule 'none'", "several sizes or schedules", "not UTF-8", "prompt: ")
    assert all(word in error.message for word, (_, error) in zip(words, errors, strict=True))

    def serial(prompt: str, seed: int, pipeline: Pipeline = pipeline, **more: Any) -> np.ndarray:
        return np.asarray(pipeline(prompt, seed=seed, **more).images[0])

    first = [("a boot", 1, 2.0), ("a bag", 2, 3.0), ("a red coat", 3, 2.0)]
    want = [serial(prompt, seed, guidance_scale=scale) for prompt, seed, scale in first]
    np.testing.assert_array_equal(responses[0].outputs["image"], want)
    np.testing.assert_array_equal(responses[0].outputs["used_seed"], [[1], [2], [3]])
    np.testing.assert_array_equal(responses[2].outputs["image"], [serial("a bag", 7, negative_prompt="blue")])
    seed = int(responses[4].outputs["used_seed"][0, 0])
    np.testing.assert_array_equal(responses[4].outputs["image"], [serial("a bag", seed)])
    short = pipeline.with_schedule("short")
    np.testing.assert_array_equal(responses[6].outputs["image"], [serial("a bag", seed, short) for seed in (1, 2)])


def test_what_is_cancelled_or_fails(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(repository(text_dir, tmp_path / "repository"))
    cancelled, kept = Request(cancelled=True, prompt=["a"]), Request(prompt=["a"], guidance_scale=[2.0])
    codes = [response.error and response.error.code for response in model.execute([cancelled, kept])]
    assert codes == ["cancelled", None]
    draw = model._engine.draw

    def fail(batch: Any, check: Any) -> Any:
        if any(wanted.row.prompt == "nan" for wanted in batch):
            raise NotFiniteError("no picture")
        return draw(batch, check)

    monkeypatch.setattr(model._engine, "draw", fail)
    responses = model.execute([Request(prompt=["nan"]), Request(prompt=["a bag"], seed=[1])])
    assert responses[0].error.code == "internal" and responses[0].error.message == "no picture"
    assert responses[1].error is None and responses[1].outputs["image"].shape == (1, 8, 8, 3)


def test_what_is_refused_leaves_nothing(text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latent = build(tmp_path / "latent", Toy(vae=False))
    control = build(tmp_path / "control", Toy(control=True))
    (tmp_path / "file").write_text("")
    (tmp_path / "full/toy").mkdir(parents=True)
    for engine, options, message in (
        (latent, ["-o", tmp_path / "new"], "has no VAE decoder"),
        (control, ["-o", tmp_path / "new"], "draws after pictures"),
        (tmp_path / "none", ["-o", tmp_path / "new"], "none"),
        (text_dir, ["-o", tmp_path / "file"], "is a file"),
        (text_dir, ["-o", tmp_path / "full"], "exists; remove it, or give another --name"),
        (text_dir, ["-o", tmp_path / "new", "--name", "a/b"], "cannot be the name of a model"),
    ):
        assert main(["--engine-dir", str(engine), *map(str, options)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists() and not any((tmp_path / "full/toy").iterdir())


@contextmanager
def serving(models: Path, work: Path, python: str) -> Iterator[int]:
    """A real Triton on a repository; gives its port."""
    code = "import pytriton, sys; print(*pytriton.__path__, *sys.version_info[:2])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    package, version = Path(found[0]), ".".join(found[1:])
    shutil.copytree(package / "tritonserver", work / "server", ignore=shutil.ignore_patterns("python_backend_stubs"))
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, work / "server/backends/python/triton_python_backend_stub")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(package.parent / "nvidia_pytriton.libs"),
        "PYTHONPATH": str(ROOT),
    }
    options = {
        "model-repository": models,
        "backend-directory": work / "server/backends",
        "http-port": port,
        "http-address": "127.0.0.1",
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (work / "log").open("w") as log:
        process = subprocess.Popen(
            [work / "server/bin/tritonserver", *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            end = time.monotonic() + 120
            while not ready(port):
                assert process.poll() is None and time.monotonic() < end, (work / "log").read_text()[-4000:]
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (URLError, ConnectionError):
        return False


def infer(port: int, model: str, **columns: tuple[str, list[Any]]) -> dict[str, np.ndarray]:
    inputs = [
        {"name": name, "shape": [len(values), 1], "datatype": kind, "data": values}
        for name, (kind, values) in columns.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/{model}/infer", data=body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        outputs = json.load(answer)["outputs"]
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in outputs}


@pytest.mark.slow
@pytest.mark.skipif(TRITON_PYTHON is None, reason="DIPGO_TRITON_PYTHON names no Python with nvidia-pytriton")
def test_a_real_triton_serves_the_serial_pictures(text_dir: Path, tmp_path: Path) -> None:
    assert TRITON_PYTHON is not None
    models = tmp_path / "repository"
    repository(text_dir, models, "--copy")
    pipeline = Pipeline.from_engine_dir(text_dir, "cpu", threads=1)
    words = ("boot", "bag", "red coat", "small blue bag")

    def asked(number: int) -> tuple[str, int, dict[str, Any]]:
        more: dict[str, Any] = {"guidance_scale": 2.0} if number % 3 == 0 else {}
        return f"a {words[number % 4]}", number, more | ({"negative_prompt": "red"} if number % 5 == 0 else {})

    with serving(models, tmp_path, TRITON_PYTHON) as port:

        def one(number: int) -> dict[str, np.ndarray]:
            prompt, seed, more = asked(number)
            kinds = {"guidance_scale": "FP32", "negative_prompt": "BYTES"}
            columns = {name: (kinds[name], [value]) for name, value in more.items()}
            return infer(port, "toy", prompt=("BYTES", [prompt]), seed=("UINT64", [seed]), **columns)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(one, range(50)))
        with pytest.raises(HTTPError) as refused:
            infer(port, "toy", prompt=("BYTES", ["a"]), schedule=("BYTES", ["none"]))
        assert "schedule 'none'" in refused.value.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/toy/stats", timeout=5) as answer:
            (stats,) = json.load(answer)["model_stats"]
    for number, found in enumerate(answers):
        prompt, seed, more = asked(number)
        assert found["used_seed"].tolist() == [[seed]]
        np.testing.assert_array_equal(found["image"], [np.asarray(pipeline(prompt, seed=seed, **more).images[0])])
    print(f"{stats['inference_count']} pictures in {stats['execution_count']} batches")
    assert stats["execution_count"] < stats["inference_count"] in (50, 51)  # the one refused may be counted
