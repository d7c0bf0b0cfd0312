"""The manifest and the opened engine directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import Manifest, TensorSpec, json_schema, seal_of
from dipgo_deploy.errors import UserError

PACKAGE = Path(__file__).parents[2] / "dipgo_deploy"


def _document() -> dict[str, Any]:
    stack = {"name": "stack", "shape": [2, 1, 4, 8, 8], "dtype": "float32"}
    row = {"name": "coefficients", "shape": [2], "dtype": "float32"}
    prediction = {"name": "noise_pred", "shape": [1, 4, 8, 8], "dtype": "float32"}
    return {
        "format_version": 4,
        "created_by": "test",
        "model": {"class_name": "M", "name": "m", "config_hash": "0" * 64, "granularity": "block", "config": {}},
        "sampler": {"class_name": "DDIMScheduler", "config": {}, "num_inference_steps": 1},
        "dtype": "fp32",
        "batch": 1,
        "guidance": False,
        "latent": {"channels": 4, "height": 8, "width": 8},
        "conditions": [],
        "plan": {
            "variants": [
                {
                    "name": "v00",
                    "graph": {"file": "graphs/v00.onnx", "inputs": [stack, row], "outputs": [prediction]},
                    "reads": [],
                    "writes": [],
                    "predicts": True,
                    "macs": 1,
                }
            ],
            "launches": [
                {
                    "step": 0,
                    "variant": 0,
                    "timestep": 1.0,
                    "coefficients": [1.0, 0.0],
                    "reads": [],
                    "writes": [],
                    "slot": 1,
                }
            ],
            "final": [0.5, 0.5],
            "slots": 2,
            "noises": 0,
            "arena_bytes": 0,
            "lower_bound_bytes": 0,
            "macs_full": 1,
            "macs_schedule": 1,
            "macs_run": 1,
            "evaluations": 1,
        },
        "components": {},
        "tools": {},
        "files": {
            "schedule.json": "315f5bdb76d078c43b8ac0064e4a0164612b1fce77c869345bfc94c75894edd3",
            "graphs/v00.onnx": "315f5bdb76d078c43b8ac0064e4a0164612b1fce77c869345bfc94c75894edd3",
        },
    }


def _write(folder: Path, document: Any) -> Path:
    (folder / "graphs").mkdir(exist_ok=True)
    (folder / "graphs" / "v00.onnx").write_bytes(b"Hello, world!")
    (folder / "schedule.json").write_bytes(b"Hello, world!")
    sealed = {**document, "seal": seal_of(document)} if isinstance(document, dict) else document
    (folder / "manifest.json").write_text(sealed if isinstance(sealed, str) else json.dumps(sealed))
    return folder


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest.load(_write(tmp_path, _document()))
    (tmp_path / "manifest.json").write_text(manifest.dumps())
    again = Manifest.load(tmp_path)
    assert again.model_copy(update={"seal": ""}) == manifest.model_copy(update={"seal": ""})
    assert again.dumps() == manifest.dumps()
    assert manifest.plan.variants[0].graph.inputs[0].nbytes == 2 * 4 * 64 * 4


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8)])
def test_sizes_in_bytes(dtype: Any, size: int) -> None:
    assert TensorSpec(name="x", shape=(2, 3), dtype=dtype).nbytes == 6 * size


def test_the_shipped_schema_is_the_models(tmp_path: Path) -> None:
    import jsonschema

    shipped = json.loads((PACKAGE / "bundle" / "manifest.schema.json").read_text())
    assert shipped == json_schema()
    jsonschema.validate(_document(), shipped)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**_document(), "batch": "one"}, shipped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: "{", "not JSON .*; export the engine directory again"),
        (lambda document: [], "not a JSON object but a list"),
        (lambda document: {**document, "format_version": 2}, "format_version 2, this version reads 3 to 12"),
        (lambda document: {**document, "batch": "many"}, "batch: .*integer"),
        (lambda document: {**document, "surprise": 1}, "surprise"),
        (lambda document: {key: value for key, value in document.items() if key != "plan"}, "plan: Field required"),
    ],
)
def test_wrong_manifests_are_refused_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    _write(tmp_path, change(_document()))
    with pytest.raises(UserError, match=message) as caught:
        Bundle.open(tmp_path)
    assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)


def test_missing_and_changed_files(tmp_path: Path) -> None:
    folder = _write(tmp_path, _document())
    Bundle.open(folder, verify=True)
    (folder / "graphs" / "v00.onnx").write_bytes(b"Hello, World!")
    for verify in (False, True):  # a small directory is hashed at every load
        with pytest.raises(UserError, match=r"v00\.onnx: its sha256 differs"):
            Bundle.open(folder, verify=verify)
    (folder / "graphs" / "v00.onnx").unlink()
    with pytest.raises(UserError, match=r"v00\.onnx: missing"):
        Bundle.open(folder)
    with pytest.raises(UserError, match=r"no manifest\.json there"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "graphs/../../secret"])
def test_paths_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    document = _document()
    document["files"][name] = "0" * 64
    with pytest.raises(UserError, match="outside the engine directory"):
        Bundle.open(_write(tmp_path, document))


def test_graphs_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    document = _document()
    document["plan"]["variants"][0]["graph"]["file"] = "../v00.onnx"
    with pytest.raises(UserError, match=r"'\.\./v00\.onnx' is not among the manifest's files"):
        Bundle.open(_write(tmp_path, document))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["plan"]["launches"][0].update(timestep=2.0),
        lambda document: document["plan"].update(final=[0.5, 0.4]),
        lambda document: document["model"].update(name="other"),
        lambda document: document.pop("seal"),
        lambda document: document.update(seal="0" * 64),
    ],
)
def test_a_manifest_that_was_changed_is_refused_until_it_is_sealed_again(tmp_path: Path, change: Any) -> None:
    path = _write(tmp_path, _document()) / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="was changed after the export.*reseal"):
        Bundle.open(tmp_path)
    assert reseal(tmp_path) == Bundle.open(tmp_path)


def test_sealing_takes_changed_files_in_and_refuses_missing_ones(tmp_path: Path) -> None:
    folder = _write(tmp_path, _document())
    (folder / "graphs" / "v00.onnx").write_bytes(b"other")
    assert reseal(folder).manifest.files != _document()["files"]
    (folder / "graphs" / "v00.onnx").unlink()
    with pytest.raises(UserError, match="missing; the directory cannot be sealed"):
        reseal(folder)


def test_the_seal_is_of_the_content_not_of_the_text(tmp_path: Path) -> None:
    path = _write(tmp_path, _document()) / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(document.items())), indent=3))
    Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": NaN}', "NaN is no JSON number"),
        ('{"format_version": 4, "format_version": 4}', "stands twice"),
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than"),
        ('{"plan": [' + "0," * 6_000_000 + "0]}", "more than 5,000,000 values"),
        ('{"plan": [' + "[]," * 1_000_001 + "0]}", "more than 5,000,000 values"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_hostile_documents_are_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Bundle.open(tmp_path)


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path, _document())
    (folder / "graphs" / "v00.onnx").unlink()
    os.mkfifo(folder / "graphs" / "v00.onnx")
    with pytest.raises(UserError, match="not a regular file"):
        Bundle.open(folder)


def test_links_are_followed(tmp_path: Path) -> None:
    folder = _write(tmp_path, _document())
    linked = tmp_path / "linked"
    (linked / "graphs").mkdir(parents=True)
    for name in ("manifest.json", "schedule.json", "graphs/v00.onnx"):
        (linked / name).symlink_to(folder / name)
    Bundle.open(linked)


def test_a_thousand_launches_with_as_many_noises_are_read(tmp_path: Path) -> None:
    document = _document()
    plan, launch = document["plan"], document["plan"]["launches"][0]
    steps = 1000
    slots = 1 + steps + steps - 1
    row = [0.123456789012345] + [0.0] * (slots - 1)
    plan["launches"] = [{**launch, "step": step, "slot": step + 1, "coefficients": row} for step in range(steps)]
    plan |= {"slots": slots, "noises": steps - 1, "evaluations": steps, "final": row}
    stack, coefficients = plan["variants"][0]["graph"]["inputs"]
    stack["shape"][0] = coefficients["shape"][0] = slots
    assert len(Bundle.open(_write(tmp_path, document)).manifest.plan.launches) == steps
