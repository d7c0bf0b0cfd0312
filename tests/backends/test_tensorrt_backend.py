"""Engines that run: on a simulated GPU everywhere, and on the GPU where there is one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from simulated_gpu import NAME as SIMULATED
from toy_engine import LENGTH, WIDTH, C, H, Toy, W, build, reference

from dipgo_deploy.backends.tensorrt import TensorRTBackend
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.backends.tensorrt_plans import BuildFlags
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import TensorSpec
from dipgo_deploy.engine.build import BuildOptions, build_engines
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.loop import DenoisingLoop

TOYS = {"fp32": Toy(), "fp16": Toy(dtype="fp16")}


@pytest.fixture
def name(tensorrt_backend: str) -> str:
    return tensorrt_backend


def options(name: str, **flags: object) -> BuildOptions:
    current = ("current",) if FLAVOURS[name].compute_capabilities else ()
    return BuildOptions(flags=BuildFlags(**flags), compute_capabilities=current)


def engine_dir(folder: Path, name: str, toy: Toy, **flags: object) -> Path:
    built = build(folder / "engine", toy)
    build_engines(built, name, options(name, **flags))
    return built


def inputs(toy: Toy, seed: int):
    random = np.random.default_rng(seed)
    noise = random.normal(size=(toy.batch, C, H, W)).astype(np.float32)
    noises = random.normal(size=(toy.noises, toy.batch, C, H, W)).astype(np.float32)
    states = random.normal(size=(toy.halves * toy.batch, LENGTH, WIDTH)).astype(np.float32)
    return noise, noises, {"encoder_hidden_states": states}


def run(loop: DenoisingLoop, toy: Toy, seed: int) -> np.ndarray:
    noise, noises, conditions = inputs(toy, seed)
    return loop.run(noise, conditions, noises=noises, guidance_scale=2.0)


@pytest.mark.parametrize("dtype", TOYS)
@pytest.mark.parametrize("strip", [False, True])
def test_equals_the_numpy_loop_in_every_graph_mode_bit_for_bit(tmp_path, name, dtype, strip):
    toy = TOYS[dtype]
    bundle = Bundle.open(engine_dir(tmp_path, name, toy, strip=strip))
    results = []
    for mode in ("off", "step", "loop"):
        loop = DenoisingLoop(bundle, TensorRTBackend(name, cuda_graph=mode), poison=True)
        results.append([run(loop, toy, seed) for seed in (1, 2, 3, 1)])  # eager, captured, replayed
    for seed, got in zip((1, 2, 3, 1), results[0], strict=True):
        noise, noises, conditions = inputs(toy, seed)
        want = reference(toy, noise, noises, conditions["encoder_hidden_states"], 2.0)
        np.testing.assert_allclose(got, want, atol=2e-2 if dtype == "fp16" else 2e-5)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_memory_is_copied_in_the_order_of_launches(name):
    backend = TensorRTBackend(name)
    memory = backend.allocate(1000)
    assert memory.address % 256 == 0
    spec = TensorSpec(name="x", shape=(3,), dtype="float32")
    np.testing.assert_array_equal(backend.download(memory, spec), np.zeros(3))
    backend.upload(memory.at(512, 12), np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(backend.download(memory.at(512, 12), spec), [1, 2, 3])
    with pytest.raises(ValueError, match="do not fit"):
        backend.upload(memory.at(0, 8), np.zeros(3, np.float32))


def test_scratch_is_shared_and_as_large_as_the_largest(tmp_path, name):
    bundle = Bundle.open(engine_dir(tmp_path, name, Toy()))
    backend = TensorRTBackend(name)
    sizes = []
    for variant in bundle.manifest.plan.variants:
        sizes.append(backend.load(bundle.path, variant.graph)._engine.device_memory_size_v2)
        assert backend.memory()["scratch"] == max(sizes)


def test_a_damaged_engine_is_refused(tmp_path, name):
    bundle = Bundle.open(engine_dir(tmp_path, name, Toy()))
    plan = next(bundle.path.glob("plans/*/full.plan"))
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"full\.plan: damaged"):
        TensorRTBackend(name).load(bundle.path, bundle.manifest.plan.variants[0].graph)


def test_two_pipelines_in_two_threads(tmp_path, name):
    toy = Toy()
    bundle = Bundle.open(engine_dir(tmp_path, name, toy))
    want = [run(DenoisingLoop(bundle, TensorRTBackend(name)), toy, seed) for seed in (1, 2)]
    got: dict[int, list[np.ndarray]] = {}

    def work(seed: int) -> None:
        loop = DenoisingLoop(bundle, TensorRTBackend(name, cuda_graph="loop"))
        got[seed] = [run(loop, toy, seed) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        for one in got[seed]:
            np.testing.assert_array_equal(one, want[seed - 1])


def test_more_memory_than_there_is_is_said(name):
    with pytest.raises(UserError, match=f"backend {name}: out of GPU memory"):
        TensorRTBackend(name).allocate(1 << 46)


def test_timing_cache_is_shared(tmp_path, name):
    if not FLAVOURS[name].timing_cache or TensorRTBackend(name).device.name == SIMULATED:
        pytest.skip("this TensorRT keeps no timings")
    toy_dir = build(tmp_path / "engine", Toy())
    cache = tmp_path / "timing.cache"
    base = options(name)
    build_engines(toy_dir, name, BuildOptions(flags=base.flags, timing_cache=cache))
    size = cache.stat().st_size
    assert size > 0
    build_engines(toy_dir, name, BuildOptions(flags=BuildFlags(opt_level=2), timing_cache=cache))
    assert cache.stat().st_size >= size
