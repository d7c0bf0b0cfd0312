"""Whole engine directories on a simulated GPU: what is called, when, and at which addresses; and the simulation."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import simulated_gpu.cuda
import simulated_gpu.tensorrt as simulated_tensorrt
from simulated_gpu import install, install_onnxruntime
from simulated_gpu.cuda import CaptureMode, Cudart, MemcpyKind

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers import DiTTransformer2DModel  # noqa: E402
from family_checks import random_weights  # noqa: E402
from lora_files import make_updates, save_lora  # noqa: E402
from tiny_engines import corrupted, save_dit_pipeline, save_unet, schedule_for, write  # noqa: E402

from dipgo_deploy.backends.base import Backend  # noqa: E402
from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402
from dipgo_deploy.backends.tensorrt import TensorRTBackend  # noqa: E402
from dipgo_deploy.backends.tensorrt_cuda import Cuda  # noqa: E402
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS  # noqa: E402
from dipgo_deploy.backends.tensorrt_plans import BuildFlags  # noqa: E402
from dipgo_deploy.backends.tensorrt_queue import GRAPH_MODES  # noqa: E402
from dipgo_deploy.bundle.directory import Bundle  # noqa: E402
from dipgo_deploy.bundle.shapes import Range  # noqa: E402
from dipgo_deploy.cli.compare import main as compare  # noqa: E402
from dipgo_deploy.engine.build import BuildOptions, build_engines  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.export.exporter import (  # noqa: E402
    ExportOptions,
    PlannedExport,
    in_layout,
    plan_export,
    publish,
    replan,
)
from dipgo_deploy.export.several import joined  # noqa: E402
from dipgo_deploy.runtime.loop import DenoisingLoop  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402

torch.set_num_threads(1)
RTX = "tensorrt-rtx"


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("dit") / "model")


def engine_dir(planned: PlannedExport, folder: Path, **flags: Any) -> Path:
    """Written, and with engines for the simulated GPU."""
    written = write(planned, folder)
    build_engines(written, RTX, BuildOptions(flags=BuildFlags(**flags)))
    return written


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_export(str(model), schedule_for(model), ExportOptions(layout="variants"))


@pytest.fixture(scope="module")
def bare(planned: PlannedExport) -> PlannedExport:
    """Without components."""
    return replace(planned, options=replace(planned.options, components=False))


def as_segments(planned: PlannedExport) -> PlannedExport:
    return in_layout(planned, "segments")


@pytest.fixture
def lora(model: Path, tmp_path: Path) -> Path:
    updates = make_updates(load_denoiser(model)[0], ["transformer_blocks.0.attn1.to_q"])
    return save_lora(tmp_path / "a.safetensors", updates)


@pytest.fixture(scope="module")
def dit(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return engine_dir(planned, tmp_path_factory.mktemp("dit") / "engine")


@pytest.fixture(scope="module")
def open_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 1 or 2 images, 64 to 128 pixels high."""
    model = save_unet(tmp_path_factory.mktemp("unet") / "model")
    options = ExportOptions(layout="variants", batch=Range(min=1, opt=1, max=2), height=Range(min=64, opt=64, max=128))
    planned = plan_export(str(model), schedule_for(model), options)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return engine_dir(planned, tmp_path_factory.mktemp("unet") / "engine")


def draw(pipeline: Pipeline, seed: int = 1, **options: Any) -> np.ndarray:
    return pipeline(class_labels=1, seed=seed, guidance_scale=3.0, output_type="latent", **options).latents


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


class Calls:
    """What is called from now on, by name; copies by their direction."""

    def __init__(self, cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        for name in dir(cudart):
            call = getattr(cudart, name)
            if name.startswith("cuda") and callable(call) and not isinstance(call, type):
                monkeypatch.setattr(cudart, name, self._counting(name, call))

    def _counting(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            kind = next((argument for argument in arguments if isinstance(argument, MemcpyKind)), None)
            self.counts[name if kind is None else kind.name] += 1
            return call(*arguments)

        return counted


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_the_weights_of_the_prologue_leave_the_device(dit, cudart, mode):
    """After its first run; captured launches hold its engine no more."""
    prologue = json.loads(next(dit.glob("plans/*/prologue.json")).read_text())["weights_bytes"]
    pipeline = Pipeline.from_engine_dir(dit, RTX, cuda_graph=mode)
    loaded = pipeline.memory()["device"]["weights"]
    first = draw(pipeline)
    gc.collect()
    assert prologue and pipeline.memory()["device"]["weights"] == loaded - prologue
    other = pipeline(class_labels=2, seed=1, guidance_scale=3.0, output_type="latent").latents
    assert pipeline.memory()["device"]["weights"] == loaded  # there are several conditions: it stays
    assert np.abs(other - first).max() > 1e-3
    for _ in range(3):  # runs, is captured, and is replayed
        np.testing.assert_array_equal(draw(pipeline), first)
        assert_close(pipeline(class_labels=2, seed=1, guidance_scale=3.0, output_type="latent").latents, other)


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_a_loop_uploads_launches_and_downloads_once(dit, cudart, monkeypatch, mode):
    """Nothing is allocated or copied between launches, and the host waits once, for the result."""
    calls = Calls(cudart, monkeypatch)
    pipeline = Pipeline.from_engine_dir(dit, RTX, cuda_graph=mode)
    for _ in range(3):
        draw(pipeline)
    bundle = Bundle.open(dit)
    launches = len(bundle.manifest.plan.launches)
    before, counts = cudart.launched_graphs, calls.counts
    counts.clear()
    draw(pipeline)
    conditions = len(bundle.manifest.conditions)
    assert counts.pop("cudaMemcpyHostToDevice") == 2 + conditions  # stack, guidance scale
    assert counts.pop("cudaMemcpyDeviceToHost") == 1
    assert counts.pop("cudaStreamSynchronize") == 2  # of the launches, and of the copy to the host
    graphs = {"off": 0, "step": launches, "loop": 1}[mode]
    assert counts.pop("cudaGraphLaunch", 0) == graphs == cudart.launched_graphs - before
    assert not counts


@pytest.mark.parametrize("load", ["eager", "call", "lazy"])
@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_pictures_are_those_of_the_cpu_and_the_same_in_every_mode(dit, cudart, mode, load):
    wanted = [draw(Pipeline.from_engine_dir(dit, "cpu", threads=1), seed) for seed in (1, 2)]
    plain = [draw(Pipeline.from_engine_dir(dit, RTX), seed) for seed in (1, 2)]
    pipeline = Pipeline.from_engine_dir(dit, RTX, cuda_graph=mode, load=load)
    for seed in (1, 2, 1, 2):
        found = draw(pipeline, seed)
        np.testing.assert_array_equal(found, plain[seed - 1])
        assert_close(found, wanted[seed - 1])
    images = pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="np").images
    assert np.shape(images)[-1] == 3 and np.isfinite(images).all()


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_segments_and_two_pipelines_on_one_directory(bare, cudart, tmp_path, mode):
    folder = engine_dir(as_segments(bare), tmp_path / "engine")
    wanted = [draw(Pipeline.from_engine_dir(folder, "cpu", threads=1), seed) for seed in (1, 2)]
    first, second = (Pipeline.from_engine_dir(folder, RTX, cuda_graph=mode) for _ in range(2))
    for _ in range(3):
        assert_close(draw(first, 1), wanted[0])
        assert_close(draw(second, 2), wanted[1])


def compared(
    bundle: Bundle, backend: Backend, sizes: Sequence[tuple[int, int]], reference: Backend | None = None
) -> None:
    """Runs of (batch, latent height) in one loop, on poisoned buffers, equal those of ``reference``, by default ONNX
    Runtime's on the CPU."""
    latent = bundle.manifest.latent
    random = np.random.default_rng(0)
    both = (backend, reference or OnnxRuntimeBackend("cpu", threads=1))
    loops = [DenoisingLoop(bundle, one, poison=True) for one in both]
    for batch, height in sizes:
        noise = random.normal(size=(batch, latent.channels, height, latent.width)).astype(np.float32)
        conditions = {
            spec.name: np.full(2 * batch, 3)
            if spec.dtype == "int64"
            else random.normal(size=(2 * batch, *spec.shape[1:])).astype(np.float32)
            for spec in bundle.manifest.conditions
        }
        found, wanted = (loop.run(noise, conditions, guidance_scale=2.0) for loop in loops)
        assert_close(found, wanted)


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_latents_whose_slots_are_not_aligned(cudart, tmp_path, monkeypatch, mode):
    """Of 4 x 6 x 6 floats: every slot but the first is off TensorRT's alignment, and so is what comes before it."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(2, 8, 4, 8, num_layers=3, sample_size=6, patch_size=2, num_embeds_ada_norm=10)
    random_weights(model).save_pretrained(tmp_path / "model")
    options = ExportOptions(layout="variants", components=False, guidance=True)
    planned = plan_export(str(tmp_path / "model"), schedule_for(tmp_path / "model"), options)
    bundle = Bundle.open(engine_dir(planned, tmp_path / "engine"))
    assert bundle.manifest.latent.height * bundle.manifest.latent.width * 4 * 4 % 256
    calls = Calls(cudart, monkeypatch)
    compared(bundle, TensorRTBackend(RTX, cuda_graph=mode), [(1, 6)] * 4)
    assert calls.counts["cudaMemcpyDeviceToDevice"] > 0


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_open_sizes_are_bound_anew(open_unet, cudart, mode):
    sizes = [(1, 8), (2, 16), (1, 8), (1, 8), (2, 16), (2, 16), (1, 16)]
    compared(Bundle.open(open_unet), TensorRTBackend(RTX, cuda_graph=mode), sizes)


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_a_lora_comes_and_goes_between_captured_runs(bare, lora, cudart, tmp_path, mode):
    folder = engine_dir(bare, tmp_path / "engine", refit=True)
    wanted = draw(Pipeline.from_engine_dir(folder, "cpu", threads=1, lora=[(lora, 1.0)]))
    pipeline = Pipeline.from_engine_dir(folder, RTX, cuda_graph=mode)
    before = [draw(pipeline) for _ in range(3)]
    pipeline.load_lora(lora)
    for _ in range(3):
        assert_close(draw(pipeline), wanted)
    pipeline.unload_lora()
    for _ in range(3):
        np.testing.assert_array_equal(draw(pipeline), before[0])
    assert np.abs(before[0] - wanted).max() > 1e-3


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("load", ["eager", "lazy"])
def test_onnx_runtime_on_cuda_draws_the_same(dit, monkeypatch, share, load):
    wanted = [draw(Pipeline.from_engine_dir(dit, "cpu", threads=1), seed) for seed in (1, 2)]
    install_onnxruntime(monkeypatch)
    pipeline = Pipeline.from_engine_dir(dit, "cuda", share_weights=share, load=load)
    for seed in (1, 2, 1):
        assert_close(draw(pipeline, seed), wanted[seed - 1])
    images = pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="np").images
    assert np.isfinite(images).all()
    assert bool(pipeline.backend.shared_weights.values) == share


def test_open_sizes_on_onnx_runtime_on_cuda(open_unet, monkeypatch):
    bundle = Bundle.open(open_unet)
    reference = OnnxRuntimeBackend("cpu", threads=1)
    install_onnxruntime(monkeypatch)
    compared(bundle, OnnxRuntimeBackend("cuda"), [(1, 8), (2, 16), (1, 8), (2, 16), (1, 16)], reference)


def test_a_lora_on_onnx_runtime_on_cuda(bare, lora, monkeypatch, tmp_path):
    folder = write(bare, tmp_path / "engine")
    wanted = draw(Pipeline.from_engine_dir(folder, "cpu", threads=1, lora=[(lora, 1.0)]))
    install_onnxruntime(monkeypatch)
    pipeline = Pipeline.from_engine_dir(folder, "cuda")
    before = draw(pipeline)
    pipeline.load_lora(lora)
    assert_close(draw(pipeline), wanted)
    pipeline.unload_lora()
    np.testing.assert_array_equal(draw(pipeline), before)


@pytest.mark.parametrize("layout", ["variants", "segments"])
@pytest.mark.parametrize("backend", FLAVOURS)
def test_engines_are_compared_with_the_supernet(planned, cudart, tmp_path, capsys, backend, layout):
    folder = write(as_segments(planned) if layout == "segments" else planned, tmp_path / "engine")
    arguments = ["--threads", "1", "--backend", backend, "--json", "--engine-dir"]
    assert compare([*arguments, str(folder)]) == 2
    assert "build them first" in capsys.readouterr().err
    build_engines(folder, backend)
    assert compare([*arguments, str(folder)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["backend"] == backend and report["variants"] and report["loop"]
    # Beside ONNX Runtime, without the model.
    assert compare([*arguments, str(folder), "--against", "cpu", "--cross"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["against"] == f"{folder} on cpu" and report["backend"] == backend
    assert all(tensor["made"] is not None for checked in report["loop"] for tensor in checked["tensors"])
    file = Bundle.open(folder).manifest.plan.variants[0].graph.file
    stored = onnx.load(folder / file, load_external_data=False).graph.initializer
    weight = next(tensor.name for tensor in stored if tensor.external_data and tensor.name.endswith("weight"))
    wrong = corrupted(folder, tmp_path / "wrong", Path(file).name, weight)
    build_engines(wrong, backend)
    assert compare([*arguments, str(wrong)]) == 1
    assert "weights, graphs, " in capsys.readouterr().err
    bisect = ["--variants-only", "--bisect", str(tmp_path / "found"), "--against", str(folder)]
    assert compare([*arguments, str(wrong), *bisect]) == 1
    (node,) = json.loads(capsys.readouterr().out)["bisect"]["nodes"]
    assert node["name"].startswith(weight.rpartition(".")[0])


def test_engines_that_take_memory_while_they_run_are_not_captured(bare, cudart, tmp_path):
    folder = engine_dir(bare, tmp_path / "engine", user_allocation=False)
    draw(Pipeline.from_engine_dir(folder, RTX))
    pipeline = Pipeline.from_engine_dir(folder, RTX, cuda_graph="loop")
    draw(pipeline)  # the first run is not captured
    with pytest.raises(UserError, match=r"cannot be captured as a CUDA graph .*; use --cuda-graph off"):
        draw(pipeline)


def test_memory_goes_with_the_pipeline(dit, cudart):
    at_rest = cudart.allocated_bytes
    pipeline = Pipeline.from_engine_dir(dit, RTX, cuda_graph="loop")
    for _ in range(3):
        draw(pipeline)
    device = pipeline.memory()["device"]
    assert device["total"] - device["free"] == cudart.allocated_bytes > device["scratch"] > 0
    del pipeline
    gc.collect()
    assert cudart.allocated_bytes == at_rest


def test_an_engine_that_does_not_deserialize_says_why(dit, cudart, tmp_path, monkeypatch):
    monkeypatch.setattr(simulated_tensorrt.zlib, "crc32", lambda data: 0)
    with pytest.raises(
        UserError, match=r"TensorRT-RTX refuses it: the magic tag does not match; malformed engine; it has"
    ):
        Pipeline.from_engine_dir(dit, RTX)


def test_a_gpu_that_tensorrt_rtx_is_not_made_for_is_named(dit, cudart, monkeypatch):
    monkeypatch.setattr(simulated_gpu.cuda, "CAPABILITY", (9, 0))
    monkeypatch.setattr(simulated_tensorrt.Runtime, "deserialize_cuda_engine", lambda *arguments: None)
    message = r"made for compute capability 8\.6, 8\.9, and Simulated GPU has 9\.0; try --backend tensorrt"
    with pytest.raises(UserError, match=message):
        Pipeline.from_engine_dir(dit, RTX)


# The simulation: it must be able to fail, and must not offer what is not there.


def test_work_in_which_memory_is_freed_ends_before_the_next(cudart):
    _, stream = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)
    _, block = cudart.cudaMalloc(256)
    order = []
    cudart.submit(stream, lambda: (cudart.cudaFree(block), order.append("first")))
    cudart.submit(stream, lambda: order.append("second"))
    cudart.cudaStreamSynchronize(stream)
    assert order == ["first", "second"]


def test_freed_memory_is_no_memory(cudart):
    cuda = Cuda(RTX)
    memory = cuda.allocate(1000)
    address = memory.address
    del memory
    with pytest.raises(AssertionError, match="not, or no longer, allocated|no device memory"):
        cudart.view(address, 4)


def test_work_waits_for_the_synchronisation(cudart):
    cuda = Cuda(RTX)
    memory = cuda.allocate(4)
    cuda.upload(memory, np.array([7], np.int32))
    assert cudart.view(memory.address, 4).view(np.int32)[0] != 7
    cuda.synchronize()
    assert cudart.view(memory.address, 4).view(np.int32)[0] == 7


def test_copies_from_the_host_cannot_be_captured(cudart):
    cuda = Cuda(RTX)
    memory = cuda.allocate(4)
    with pytest.raises(UserError, match="cudaMemcpyAsync failed: simulated error 900"):
        cuda.capture([lambda: cuda.upload(memory, np.zeros(1, np.float32))])
    cuda.synchronize()  # the capture has ended


def test_graphs_of_contexts_that_ran_elsewhere_are_noticed(dit, cudart):
    backend = TensorRTBackend(RTX)
    bundle = Bundle.open(dit)
    launch = bundle.manifest.plan.launches[0]
    executable = backend.load(bundle.path, bundle.manifest.plan.variants[launch.variant].graph)
    memory = {
        spec.name: backend.allocate(spec.nbytes) for spec in (*executable.graph.inputs, *executable.graph.outputs)
    }
    run = executable.bind(memory)
    with pytest.raises(AssertionError, match="first run of a context"):
        backend._cuda.capture([run])
    run()
    graph = backend._cuda.capture([run])
    graph()
    run()
    with pytest.raises(AssertionError, match="has run elsewhere since"):
        graph()


@pytest.mark.parametrize("mode", GRAPH_MODES)
def test_schedules_of_one_directory_share_engines(bare, cudart, tmp_path, mode):
    """Calls of two schedules in turn: captured graphs of one must not hold what the other runs."""
    unchecked = replace(bare, options=replace(bare.options, check=False))
    full, pruned = (
        replan(unchecked, bare.schedule.with_gates([[step % every == 0] * 4 for step in range(bare.schedule.steps)]))
        for every in (1, 2)
    )
    folder = publish(joined({"full": full, "pruned": pruned}), tmp_path / "engine").path
    report = build_engines(folder, RTX, BuildOptions())
    assert sorted(engine.name for engine in report.engines)[:2] == ["prologue", "pruned.v01"]
    first = Pipeline.from_engine_dir(folder, RTX, cuda_graph=mode)
    second = first.with_schedule("pruned")
    wanted = [draw(Pipeline.from_engine_dir(folder, "cpu", schedule=name)) for name in ("full", "pruned")]
    for _ in range(3):
        for pipeline, expected in zip((first, second), wanted, strict=True):
            for _ in range(2):
                assert_close(draw(pipeline), expected)
    assert first.memory()["graphs_loaded"] == 1 and second.memory()["graphs_loaded"] == 2


def test_a_stripped_engine_does_not_run_unrefitted(bare, cudart, tmp_path, monkeypatch):
    folder = engine_dir(bare, tmp_path / "engine", strip=True)
    monkeypatch.setattr(TensorRTBackend, "_refit", lambda *arguments: None)
    with pytest.raises(AssertionError, match="before it was refitted"):
        draw(Pipeline.from_engine_dir(folder, RTX))


def test_the_cuda_runtime_has_what_is_simulated():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in dir(Cudart):
        assert not name.startswith("cuda") or hasattr(runtime, name), name
    for simulated, real in ((MemcpyKind, runtime.cudaMemcpyKind), (CaptureMode, runtime.cudaStreamCaptureMode)):
        for member in simulated:
            assert int(getattr(real, member.name)) == member.value, member
    assert runtime.cudaStreamNonBlocking == Cudart.cudaStreamNonBlocking


REAL_NAMES = {
    "Runtime": "Runtime",
    "CudaEngine": "ICudaEngine",
    "RuntimeConfig": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
    "ExecutionContext": "IExecutionContext",
    "Refitter": "Refitter",
    "OnnxParserRefitter": "OnnxParserRefitter",
    "ILogger": "ILogger",
}
OURS = {
    "cudart",
    "file",
    "inputs",
    "outputs",
    "session",
    "refittable",
    "capturable",
    "take_weights",
    "runs",
    "engine",
    "changed",
}


def test_tensorrt_has_what_is_simulated():
    real = pytest.importorskip("tensorrt_rtx")
    for name, theirs in REAL_NAMES.items():
        for member in vars(getattr(simulated_tensorrt, name)):
            if not member.startswith("_") and member not in OURS:
                assert hasattr(getattr(real, theirs), member), (name, member)
    for enum in (
        "ExecutionContextAllocationStrategy",
        "EngineInvalidityDiagnostics",
        "DynamicShapesKernelSpecializationStrategy",
        "DataType",
        "TensorIOMode",
    ):
        for member in getattr(simulated_tensorrt, enum).__members__:
            assert hasattr(getattr(real, enum), member), (enum, member)
