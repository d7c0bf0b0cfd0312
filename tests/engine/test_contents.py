"""What ``dipgo-inspect`` reads off a stored directory, whose graphs and files are known. No torch, no ONNX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored_engines import store_engine

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import seal_of
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.engine.contents import contents
from dipgo_deploy.engine.difference import differences

STORED = Path(__file__).parents[1] / "bundle" / "format-4" / "engine"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "engine"))


def edited(engine: Path, edit: Edit) -> Path:
    path = engine / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps({**document, "seal": seal_of(document)}))
    return engine


def of(engine: Path, **options: Any) -> dict[str, Any]:
    return contents(Bundle.open(engine), **options)


def test_variants_graphs_caches_and_launches() -> None:
    facts = of(STORED)
    assert json.loads(json.dumps(facts)) == facts
    full, cached = facts["variants"]
    assert (full["name"], full["steps"], full["launches"], full["predicts"]) == ("v00", [0, 2], 2, True)
    assert full["writes"] == [f"new_{name}" for name in cached["reads"]]
    assert full["write_bytes"] == cached["read_bytes"] == 4 * 2048
    assert [graph["file"] for graph in facts["graphs"]] == ["graphs/v00.onnx", "graphs/v01.onnx"]
    assert {cache["name"] for cache in facts["caches"]} == set(cached["reads"])
    for cache in facts["caches"]:
        assert (cache["shape"], cache["dtype"], cache["bytes"]) == ([2, 16, 16], "float32", 2048)
        assert [(value["written"], value["read"]) for value in cache["values"]] == [(0, [1]), (2, [3])]
    assert [launch["variant"] for launch in facts["launches"]] == ["v00", "v01", "v00", "v01"]
    assert [launch["slot"] for launch in facts["launches"]] == [1, 2, 3, 4]
    assert sorted(facts["launches"][1]["reads"].values()) == [0, 2048, 4096, 6144]


def test_memory_is_what_the_files_take() -> None:
    facts = of(STORED)
    memory, index = facts["memory"], json.loads((STORED / "graphs/weights.json").read_text())["tensors"]
    assert memory["weights"] == (STORED / "graphs/weights.bin").stat().st_size
    assert max(graph["weights"] for graph in facts["graphs"]) == len(index)
    assert memory["weights_of_graphs"] == sum(graph["weight_bytes"] for graph in facts["graphs"])
    assert memory["arena"] == memory["arena_least"] == 8192
    assert memory["history"] == 5 * 4 * 8 * 8 * 4
    assert memory["tables"] == 0


def test_origin_is_what_manifest_and_schedule_say() -> None:
    facts = of(STORED)
    assert facts["model"]["class_name"] == "DiTTransformer2DModel"
    assert facts["sampler"]["class_name"] == facts["schedule"]["sampler"] == "DDIMScheduler"
    assert facts["schedule"]["provenance"]["method"] == "uniform"
    assert (
        facts["tools"]["torch"]
        and facts["files"].keys() == json.loads((STORED / "manifest.json").read_text())["files"].keys()
    )


def test_a_directory_without_an_index_of_weights_says_that_they_are_not_known(engine: Path) -> None:
    (engine / "graphs/weights.json").unlink()
    edited(engine, lambda document: document["files"].pop("graphs/weights.json"))
    facts = of(engine)
    assert {graph["weight_bytes"] for graph in facts["graphs"]} == {None}
    assert facts["memory"]["weights_of_graphs"] is None and facts["memory"]["weights"] > 0


def flipped(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_engines_are_listed_with_what_keeps_them_from_use(engine: Path) -> None:
    first, second = (variant.graph for variant in Bundle.open(engine).manifest.plan.variants)
    path = store_engine(engine, first)
    store_engine(engine, second)
    path.with_name("other.plan").write_bytes(b"")
    shutil.copy(path, path.with_name("v07.plan"))
    shutil.copy(path.with_suffix(".json"), path.with_name("v07.json"))
    found = {one["name"].rpartition("/")[2]: one for one in of(engine)["engines"]}
    assert {name: one["problem"] for name, one in found.items()} == {
        "other": "has no record that can be read",
        "v00": None,
        "v01": None,
        "v07": "no graph has its name",
    }
    assert found["v00"]["name"].startswith("tensorrt-11.4.0.106-nvidia-l4-sm89/")
    assert len(found["v00"]["key"]) == 64 and found["v00"]["built_from"]["backend"] == "tensorrt"

    def problems(**options: bool) -> list[str | None]:
        return [one["problem"] for one in of(engine, **options)["engines"] if one["name"].endswith(("v00", "v01"))]

    flipped(path)
    assert problems() == [None, None]
    assert problems(verify=True) == ["is damaged: its content is not the recorded one", None]
    path.write_bytes(b"longer than it was")
    assert problems()[0] == "is damaged: its content is not the recorded one"
    path.unlink()
    assert problems()[0] == "the engine itself is missing"
    used = next(iter(weights_of(engine / second.file).values()))
    flipped(engine / "graphs/weights.bin", used.offset)
    reseal(engine)
    assert problems()[1] is None
    assert problems(verify=True)[1] == "was built from other weights"
    shutil.copy(engine / "graphs/v00.onnx", engine / "graphs/v01.onnx")
    reseal(engine)
    assert problems()[1] == "was built from another graph"


def lines(before: Path, after: Path) -> list[str]:
    return [f"{one.section}: {one.line()}" for one in differences(Bundle.open(before), Bundle.open(after))]


def test_equal_directories_do_not_differ(engine: Path) -> None:
    assert lines(STORED, engine) == []


def test_what_differs_is_named_where_it_is(engine: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["dtype"] = "fp16"
        document["tools"]["torch"] = "0.1"
        document["tools"]["new"] = "1"
        launch = document["plan"]["launches"][1]
        launch["coefficients"][1] += 0.25
        document["files"].pop("graphs/weights.bin")

    assert lines(STORED, edited(engine, edit)) == [
        "dtype: fp32 -> fp16",
        "launches: 1, coefficients: 1 of 5 numbers, by up to 0.25",
        f"tools: torch: {of(STORED)['tools']['torch']} -> 0.1",
        "tools: new: only in the second",
        "files: graphs/weights.bin: only in the first",
    ]


def test_schedules_differ_gate_by_gate(engine: Path) -> None:
    path = engine / "schedule.json"
    path.write_text(path.read_text().replace('"1111"', '"1101"', 2).replace('"1101"', '"1111"', 1))
    reseal(engine)
    found = lines(STORED, engine)
    assert found[-1].startswith("schedule: evaluation 2, block ") and found[-1].endswith("kept -> removed")
    assert any(line.startswith("files: schedule.json: ") for line in found)


def test_engines_differ_by_what_they_were_built_from(engine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(engine, tmp_path / "other"))
    for folder, flags in ((engine, {}), (other, {"tf32": True})):
        store_engine(folder, Bundle.open(folder).manifest.plan.variants[0].graph, **flags)
    found = lines(engine, other)
    assert found[1:] == ["engines: tensorrt-11.4.0.106-nvidia-l4-sm89/v00, built_from, flags, tf32: False -> True"]
    assert found[0].startswith("engines: tensorrt-11.4.0.106-nvidia-l4-sm89/v00, key: ")
