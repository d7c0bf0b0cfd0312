"""Every public call refuses an argument of the wrong type by its name, and takes ``str`` and paths alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_engine import Toy, build

import dipgo_deploy
from dipgo_deploy import Pipeline, Schedule, arguments
from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError

SCHEDULE = Path(dipgo_deploy.__file__).parent / "assets/schedules/fashion-sd-ddim50.json"
NOT_PATHS: list[Any] = [None, 3, b"engine", ["engine"], object(), "a\0b"]
NOT_WHOLE: list[Any] = ["4", 1.5, None, [1], True, object()]
NOT_NUMBERS: list[Any] = ["4", [1.0], {}, True, 1j, float("nan"), 10**400, np.ones(2)]
NOT_FLAGS: list[Any] = ["yes", 1, [True]]
NOT_TEXT: list[Any] = [3, b"a boot", {"a": 1}, {"a"}, [b"a"], [None], object(), np.ones((2, 2))]
NOT_CHOICES: list[Any] = [3, b"cpu", ["cpu"], "none", np.ones(2)]
NOT_ARRAYS: list[Any] = ["a", [[1.0]], 3, {"a": 1}, object(), np.array([{}]), np.array(["a"]), np.ones(3, complex)]
NOT_SIZES: list[Any] = ["8", 8.0, [8], True]


class Thing:
    """Has a ``repr`` that fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("types") / "engine", Toy(batch=1))


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_engine_dir(build(tmp_path_factory.mktemp("types") / "classes", Toy(kind="class")), "cpu")


@pytest.fixture(scope="module")
def pipeline(engine: Path) -> Pipeline:
    return Pipeline.from_engine_dir(engine, "cpu", load="call")


def refused(call: Callable[..., object], name: str, wrong: list[Any], as_argument: str | None = None) -> None:
    """Each of the values, given as one argument, is a UserError whose message has the argument's name."""
    for value in [*wrong, Thing()]:
        with pytest.raises(UserError) as caught:
            call(**{as_argument or name: value})
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("engine_dir", NOT_PATHS),
        ("backend", NOT_CHOICES),
        ("threads", ["4", 1.5, [1], True, 0, -1]),
        ("share_weights", NOT_FLAGS),
        ("cuda_graph", NOT_CHOICES),
        ("verify", [*NOT_FLAGS, None]),
        ("load", NOT_CHOICES),
        ("lora", [3, "a.safetensors", ["a.safetensors"], [("a", "1")], [(3, 1.0)], [("a", float("nan"))], [("a",)]]),
    ],
)
def test_opening(engine: Path, name: str, wrong: list[Any]) -> None:
    given = {"engine_dir": engine, "backend": "cpu"}
    shown = {"cuda_graph": "cuda-graph"}.get(name, name)
    refused(lambda **one: Pipeline.from_engine_dir(**{**given, **one}), shown, wrong, name)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("prompt", NOT_TEXT),
        ("negative_prompt", NOT_TEXT),
        ("class_labels", [3]),
        ("number of images", NOT_WHOLE),
        ("seed", ["4", 1.5, None, ["1"], [1.5], [True], {1}, True, object()]),
        ("guidance_scale", NOT_NUMBERS),
        ("latents", NOT_ARRAYS),
        ("prompt_embeds", NOT_ARRAYS),
        ("negative_prompt_embeds", NOT_ARRAYS),
        ("conditions", [3, "a", [1], {3: 1}, {"unknown": np.ones(1)}]),
        ("image", [3, "a.png", [None]]),
        ("image_latents", [3, "a"]),
        ("strength", ["0.5", 0.5]),
        ("control_image", [3, "a.png"]),
        ("control_scale", ["1", 1.0]),
        ("height", NOT_SIZES),
        ("width", NOT_SIZES),
        ("output type", NOT_CHOICES),
        ("callback", [3, "f", [print]]),
    ],
)
def test_drawing(pipeline: Pipeline, name: str, wrong: list[Any]) -> None:
    argument = {"number of images": "num_images_per_prompt", "output type": "output_type"}.get(name, name)
    given = {} if name.startswith("prompt") else {"prompt": "a boot"}
    refused(lambda **one: pipeline(**given, **one), name, wrong, argument)


def test_class_labels(of_classes: Pipeline) -> None:
    wrong = [1.5, b"boot", {"boot": 1}, [b"boot"], [None], {0}, np.ones((2, 2), int), True]
    refused(of_classes, "class_labels", wrong)


def test_loras(pipeline: Pipeline) -> None:
    refused(pipeline.load_lora, "lora file", NOT_PATHS, "file")
    refused(lambda scale: pipeline.load_lora("a.safetensors", scale), "lora scale", NOT_NUMBERS, "scale")


def test_documents(tmp_path: Path) -> None:
    schedule = Schedule.load(SCHEDULE)
    refused(Schedule.load, "path", NOT_PATHS)
    refused(schedule.save, "path", NOT_PATHS)
    refused(Schedule.from_json, "text", [None, 3, ["{}"]])
    refused(schedule.diff, "other", [None, "s.json", {}])
    refused(Bundle.open, "engine_dir", NOT_PATHS)
    refused(create_backend, "backend", NOT_CHOICES, "name")


def test_str_and_paths_are_alike(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copy(SCHEDULE, tmp_path / "s.json")
    assert Schedule.load(str(copy)) == Schedule.load(Path(copy))
    Schedule.load(copy).save(str(tmp_path / "t.json"))
    assert Schedule.load(tmp_path / "t.json") == Schedule.load(copy)
    assert Bundle.open(str(engine)) == Bundle.open(engine)
    assert Pipeline.from_engine_dir(str(engine), "cpu", load="call").bundle == Bundle.open(engine)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("model", NOT_PATHS),
        ("schedule", [None, 3, {}]),
        ("engine_dir", NOT_PATHS),
        ("options", [3, "fp16", {"dtype": "fp16"}]),
    ],
)
def test_exporting(tmp_path: Path, name: str, wrong: list[Any]) -> None:
    pytest.importorskip("torch")
    from dipgo_deploy.export.exporter import export_bundle

    given = {"model": "fashion-sd", "schedule": Schedule.load(SCHEDULE), "engine_dir": str(tmp_path / "engine")}
    refused(lambda **one: export_bundle(**{**given, **one}), name, wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dtype", [None, 16, "float16"]),
        ("batch", [None, "1", 1.5, True, 0]),
        ("guidance", ["yes", 1]),
        ("height", ["64", 64.0]),
        ("width", ["64", 64.0]),
        ("max_variants", ["4", 0]),
        ("graph_costs", ["costs.json", {}]),
        ("layout", [None, "fast"]),
        ("strength", ["0.5"]),
        ("check", [None, 1]),
        ("components", [1]),
        ("overwrite", ["no"]),
        ("low_memory", [1]),
        ("allow_other_config", [1]),
    ],
)
def test_options_of_an_export(tmp_path: Path, name: str, wrong: list[Any]) -> None:
    pytest.importorskip("torch")
    from dipgo_deploy.export.exporter import ExportOptions, export_bundle

    schedule = Schedule.load(SCHEDULE)

    def export(**one: Any) -> object:
        return export_bundle("fashion-sd", schedule, tmp_path / "engine", ExportOptions(**one))

    refused(export, name, wrong)


def test_numpy_numbers_are_numbers() -> None:
    assert arguments.whole("n", np.int64(3)) == 3 and type(arguments.whole("n", np.uint8(3))) is int
    assert arguments.number("x", np.float32(0.5)) == 0.5
    assert arguments.items("x", np.array(["a", "b"]), "text") == ["a", "b"]
    assert arguments.items("x", ("a", "b"), "text") == ["a", "b"] and arguments.items("x", "ab", "text") == ["ab"]
