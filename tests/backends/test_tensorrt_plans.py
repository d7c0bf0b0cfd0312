"""Which stored engine runs on a device, and what is said when none does. No GPU and no TensorRT needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stored_engines import L4, VERSION, store_engine
from toy_engine import Toy, build, manifest_of

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.tensorrt import compare_interface, find_plan
from dipgo_deploy.backends.tensorrt_cuda import Device, NoDeviceError, find_device
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.backends.tensorrt_plans import GpuTarget, PlanRecord, WeightHashes
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.errors import UserError


def full() -> Graph:
    return manifest_of(Toy()).plan.variants[0].graph


def store(engine_dir: Path, *args: Any, **given: Any) -> Path:
    return store_engine(engine_dir, full(), *args, **given)


def find(engine_dir: Path, backend: str = "tensorrt", device: Device = L4, version: str = VERSION) -> Path:
    return find_plan(engine_dir, full(), FLAVOURS[backend], version, device, WeightHashes())[0]


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return build(tmp_path / "engine", Toy())


def test_an_engine_of_this_gpu_and_version_is_found(engine_dir):
    path = store(engine_dir)
    store(engine_dir, version="10.16.0.1")
    store(engine_dir, target=GpuTarget(gpu="NVIDIA A100", capabilities=("8.0",)))
    assert find(engine_dir) == path


def test_an_engine_for_exactly_this_gpu_goes_first(engine_dir):
    portable = store(engine_dir, "tensorrt-rtx", target=GpuTarget())
    assert find(engine_dir, "tensorrt-rtx") == portable
    exact = store(engine_dir, "tensorrt-rtx", target=GpuTarget(gpu=L4.name, capabilities=("8.9",)))
    assert find(engine_dir, "tensorrt-rtx") == exact
    assert find(engine_dir, "tensorrt-rtx", Device("NVIDIA A10", "8.6", 1)) == portable


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"version": "11.3.0.1"}, "built with version 11.3.0.1, 11.4.0.106 is installed"),
        ({"version": "11.5.0.1", "version_compatible": True}, "built with version 11.5.0.1"),
        ({"version": "10.5.0.1", "version_compatible": True}, "built with version 10.5.0.1"),
        (
            {"target": GpuTarget(gpu="NVIDIA A100", capabilities=("8.0",))},
            r"built for NVIDIA A100, this is NVIDIA L4 \(8.9",
        ),
        ({"target": GpuTarget(capabilities=("8.0", "8.6"))}, "built for compute capability 8.0, 8.6"),
    ],
)
def test_what_does_not_fit_is_said(engine_dir, stored, message):
    store(engine_dir, **stored)
    with pytest.raises(UserError, match=message) as caught:
        find(engine_dir)
    assert f"dipgo-build --engine-dir {engine_dir} --backend tensorrt" in str(caught.value)


def test_compatible_engines_are_found(engine_dir):
    older = store(engine_dir, version="11.3.0.1", version_compatible=True)
    assert find(engine_dir) == older
    ampere = store(engine_dir, target=GpuTarget(gpu="NVIDIA A100", capabilities=("8.0",)), hardware_compatible=True)
    assert find(engine_dir, device=Device("NVIDIA A10", "8.6", 1), version=VERSION) == ampere
    with pytest.raises(UserError, match="built for NVIDIA A100, this is NVIDIA T4"):
        find(engine_dir, device=Device("NVIDIA T4", "7.5", 1))


@pytest.mark.parametrize(("what", "message"), [("graph", "another graph"), ("weights", "another weights")])
def test_an_engine_of_something_else_is_not_used(engine_dir, what, message):
    store(engine_dir)
    path = engine_dir / ("graphs/full.onnx" if what == "graph" else "graphs/weights.bin")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"toy", b"tox") if what == "graph" else b"\1" + data[1:])
    with pytest.raises(UserError, match=message):
        find(engine_dir)


def test_none_was_built(engine_dir):
    with pytest.raises(UserError, match="no TensorRT engine of full; build them first: dipgo-build"):
        find(engine_dir)
    store(engine_dir, "tensorrt-rtx", target=GpuTarget())  # TensorRT-RTX's name starts with TensorRT's
    with pytest.raises(UserError, match="no TensorRT engine of full; build them first"):
        find(engine_dir)


def test_a_changed_engine_file_shows(engine_dir):
    path = store(engine_dir)
    record = PlanRecord.load(path.with_suffix(".json"))
    assert record is not None and record.intact(path)
    path.write_bytes(b"enginf")
    assert not record.intact(path)


def test_an_interface_is_compared_by_name():
    graph = full()
    found = {spec.name: f"input {spec.dtype} {spec.shape}" for spec in graph.inputs}
    found |= {spec.name: f"output {spec.dtype} {spec.shape}" for spec in graph.outputs}
    compare_interface(Path("v.plan"), dict(reversed(found.items())), graph)
    with pytest.raises(UserError, match=r"v\.plan: tensor more is input float32 \(1,\) there, missing in the manifest"):
        compare_interface(Path("v.plan"), {**found, "more": "input float32 (1,)"}, graph)


def has_gpu() -> bool:
    try:
        find_device()
    except NoDeviceError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="a GPU is there")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_the_backend_is_refused_by_name(backend):
    with pytest.raises(UserError, match=f"backend {backend}: .*; run on a machine with one, or use --backend cpu"):
        create_backend(backend)
