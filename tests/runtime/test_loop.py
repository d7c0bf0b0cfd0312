from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_engine import LENGTH, ROUTE, WIDTH, C, H, Toy, W, build, manifest_of, reference, replace_manifest

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.history import final_latent
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.loop import DenoisingLoop


def make_loop(folder: Path, toy: Toy, *, poison: bool = True, **options: bool) -> DenoisingLoop:
    bundle = Bundle.open(build(folder, toy))
    return DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1, **options), poison=poison)


def inputs(toy: Toy, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    noise = random.normal(size=(toy.batch, C, H, W)).astype(np.float32)
    noises = random.normal(size=(toy.noises, toy.batch, C, H, W)).astype(np.float32)
    rows = toy.halves * toy.batch
    if toy.kind == "text":
        return noise, noises, {"encoder_hidden_states": random.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32)}
    return noise, noises, {"class_labels": random.integers(0, 4, rows)} if toy.kind == "class" else {}


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize(
    "toy",
    [
        Toy(),
        Toy(guidance=False, batch=1, noises=0),
        Toy(kind="class", batch=3),
        Toy(kind="none", guidance=False),
        Toy(dtype="fp16"),
    ],
    ids=lambda toy: f"{toy.kind}-{toy.dtype}-b{toy.batch}-g{toy.guidance}",
)
def test_equals_the_numpy_loop(tmp_path, toy, share_weights):
    loop = make_loop(tmp_path, toy, share_weights=share_weights)
    for seed, scale in ((1, 3.0), (2, 1.5)):  # the second image must not see the first one's caches or predictions
        noise, noises, conditions = inputs(toy, seed)
        got = loop.run(noise, conditions, noises=noises, guidance_scale=scale)
        want = reference(toy, noise, noises, next(iter(conditions.values()), None), scale)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=2e-2 if toy.dtype == "fp16" else 2e-5)


def test_poison_shows_a_read_of_a_cache_that_was_not_written(tmp_path):
    toy = Toy()
    manifest = manifest_of(toy)
    launches = list(manifest.plan.launches)
    launches[1] = launches[1].model_copy(update={"reads": (launches[2].writes[0],)})  # not written yet
    plan = manifest.plan.model_copy(update={"launches": tuple(launches)})
    bundle = Bundle(build(tmp_path, toy), replace_manifest(manifest, plan=plan.model_dump()))
    loop = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1), poison=True)
    noise, noises, conditions = inputs(toy, 1)
    assert np.isnan(loop.run(noise, conditions, noises=noises)).any()


def test_poison_shows_a_read_of_a_prediction_that_was_not_made(tmp_path):
    toy = Toy()
    manifest = manifest_of(toy)
    launches = list(manifest.plan.launches)
    row = list(launches[0].coefficients)
    row[2] = 0.1
    launches[0] = launches[0].model_copy(update={"coefficients": tuple(row)})
    plan = manifest.plan.model_copy(update={"launches": tuple(launches)})
    bundle = Bundle(build(tmp_path, toy), replace_manifest(manifest, plan=plan.model_dump()))
    loop = DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1), poison=True)
    noise, noises, conditions = inputs(toy, 1)
    assert np.abs(loop.run(noise, conditions, noises=noises)).max() > 1e20


def test_a_run_is_repeatable_and_leaves_its_inputs_alone(tmp_path):
    toy = Toy()
    loop = make_loop(tmp_path, toy, poison=False)
    noise, noises, conditions = inputs(toy, 1)
    kept = noise.copy()
    first = loop.run(noise, conditions, noises=noises, guidance_scale=2.0)
    loop.run(*inputs(toy, 2)[::2], noises=noises * np.inf, guidance_scale=2.0)  # leaves NaN predictions behind
    again = loop.run(noise, conditions, noises=noises, guidance_scale=2.0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(noise, kept)


def test_launches_are_reported_in_order_and_their_tensors_can_be_read(tmp_path):
    toy = Toy()
    loop = make_loop(tmp_path, toy)
    noise, noises, conditions = inputs(toy, 1)
    seen: list[tuple[int, str]] = []
    stored: dict[int, np.ndarray] = {}

    def look(index: int) -> None:
        seen.append((index, loop.variant(index).name))
        if "new_cache.a/out0" in loop.variant(index).writes:
            stored[index] = loop.fetch(index, "new_cache.a/out0")
        else:
            # it reads what the launch before it wrote
            np.testing.assert_array_equal(loop.fetch(index, "cache.a/out0"), stored[index - 1])

    loop.run(noise, conditions, noises=noises, on_launch=look)
    assert seen == [(index, name) for index, (name, _, _) in enumerate(ROUTE)]
    with pytest.raises(KeyError):
        loop.fetch(0, "cache.a/out0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": np.zeros((1, C, H, W), np.float32)}, r"noise: shape \(1, 4, 8, 8\), needs \(2, 4, 8, 8\)"),
        ({"noises": None}, "noises: missing"),
        ({"conditions": {}}, "encoder_hidden_states: missing"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, change, message):
    toy = Toy()
    noise, noises, conditions = inputs(toy, 1)
    given = {"noise": noise, "noises": noises, "conditions": conditions, **change}
    with pytest.raises(ValueError, match=message):
        make_loop(tmp_path, toy).run(given["noise"], given["conditions"], noises=given["noises"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("writes", (1 << 30,), r"launch 0 \(full\): bytes .* are outside"),
        ("writes", (), r"launch 0 \(full\)"),
        ("slot", 99, r"launch 0 \(full\): bytes .* are outside"),
        ("slot", None, r"launch 0 \(full\): 'noise_pred'"),
        ("coefficients", (1.0,), r"launch 0 \(full\): 1 coefficients for 7 slots"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, field, value, message):
    toy = Toy()
    manifest = manifest_of(toy)
    first = manifest.plan.launches[0].model_copy(update={field: value})
    plan = manifest.plan.model_copy(update={"launches": (first, *manifest.plan.launches[1:])})
    bundle = Bundle(build(tmp_path, toy), replace_manifest(manifest, plan=plan.model_dump()))
    with pytest.raises(UserError, match=message):
        DenoisingLoop(bundle, OnnxRuntimeBackend("cpu", threads=1))


def test_nothing_is_bound_or_allocated_between_launches(tmp_path):
    toy = Toy()
    loop = make_loop(tmp_path, toy, poison=False)
    noise, noises, conditions = inputs(toy, 1)
    launched: list[int] = []
    loop._backend.allocate = loop._backend.load = None  # type: ignore[method-assign,assignment]
    loop.run(noise, conditions, noises=noises, on_launch=launched.append)
    assert launched == list(range(len(ROUTE)))


def test_final_latent_sums_in_double_precision():
    stack = np.stack([np.full((1, 1, 2, 2), value, np.float32) for value in (1.0, 1e8, -1e8, np.nan)])
    got = final_latent(stack, (1.0, 1.0, 1.0, 0.0))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.ones((1, 1, 2, 2)))
