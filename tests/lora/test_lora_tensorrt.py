"""Refitted engines and kept kernels, on a simulated GPU and on a real one; shared weights on CUDA there only."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from devices import no_gpu  # noqa: E402
from lora_files import make_updates, save_lora  # noqa: E402

from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS  # noqa: E402
from dipgo_deploy.backends.tensorrt_plans import BuildFlags  # noqa: E402
from dipgo_deploy.engine.build import BuildOptions, build_engines  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402


@pytest.fixture
def name(tensorrt_backend: str) -> str:
    return tensorrt_backend


@pytest.fixture
def lora(dit, tmp_path):
    updates = make_updates(
        load_denoiser(dit.model)[0], ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"]
    )
    return save_lora(tmp_path / "a.safetensors", updates)


def draw(pipeline: Pipeline) -> np.ndarray:
    return pipeline(class_labels=1, seed=1, guidance_scale=3.0, output_type="latent").latents


def build(dit, name: str, **options: object) -> None:
    current = ("current",) if FLAVOURS[name].compute_capabilities else ()
    build_engines(dit.path, name, BuildOptions(compute_capabilities=current, **options))


@pytest.mark.parametrize("strip", [False, True])
def test_refitted_engines_are_the_merged_model_and_can_be_undone(dit, lora, name, strip):
    build(dit, name, flags=BuildFlags(refit=True, strip=strip))
    want = draw(Pipeline.from_engine_dir(dit.path, "cpu", lora=[(lora, 1.0)]))
    pipeline = Pipeline.from_engine_dir(dit.path, name)
    before = draw(pipeline)
    pipeline.load_lora(lora)
    np.testing.assert_allclose(draw(pipeline), want, atol=1e-3 * np.abs(want).max())
    pipeline.unload_lora()
    np.testing.assert_array_equal(draw(pipeline), before)


def test_engines_built_with_the_lora_are_the_merged_model(dit, lora, name):
    build(dit, name, lora=((lora, 1.0),))
    want = draw(Pipeline.from_engine_dir(dit.path, "cpu", lora=[(lora, 1.0)]))
    got = draw(Pipeline.from_engine_dir(dit.path, name, lora=[(lora, 1.0)]))
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_compiled_kernels_are_kept_and_used(dit, name):
    if not FLAVOURS[name].runtime_cache:
        pytest.skip("this TensorRT compiles when it builds")
    build(dit, name)
    first = draw(Pipeline.from_engine_dir(dit.path, name))
    kept = {path: path.stat().st_mtime_ns for path in dit.path.glob("plans/*/*.kernels")}
    assert kept
    np.testing.assert_array_equal(draw(Pipeline.from_engine_dir(dit.path, name)), first)
    assert kept == {path: path.stat().st_mtime_ns for path in dit.path.glob("plans/*/*.kernels")}


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu(), reason="no GPU")
def test_onnx_runtimes_sessions_share_one_device_copy(dit, lora):
    try:
        pipeline = Pipeline.from_engine_dir(dit.path, "cuda", lora=[(lora, 1.0)])
    except UserError as error:
        pytest.skip(str(error))
    assert pipeline.backend.shared_weights.values  # by default
    assert all(value.device_name() == "cuda" for value in pipeline.backend.shared_weights.values)
    want = draw(Pipeline.from_engine_dir(dit.path, "cpu", lora=[(lora, 1.0)]))
    np.testing.assert_allclose(draw(pipeline), want, atol=1e-3 * np.abs(want).max())
    assert pipeline.memory()["device"]["total"] > 0
