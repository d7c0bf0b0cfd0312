from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_engine import CLASSES, NULL_CLASS, ROUTE, C, H, Toy, W, build, embed, reference

from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.runtime.image import grid, to_pictures, to_pil, to_uint8
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.runtime.pipeline import Pipeline


def make(folder: Path, toy: Toy) -> Pipeline:
    return Pipeline.from_engine_dir(build(folder, toy), "cpu", threads=1)


def whole(
    toy: Toy, condition: np.ndarray | None, negative: np.ndarray | None, seed: int, scale: float, n: int
) -> np.ndarray:
    """The reference on all images at once, image by image (the toy treats images independently)."""
    stream = TorchNoise(seed)
    noise = stream.randn((n, C, H, W))
    noises = np.stack([stream.randn((n, C, H, W)) for _ in range(toy.noises)])
    single = Toy(**{**vars(toy), "batch": 1})
    results = []
    for i in range(n):
        rows = [half[i : i + 1] for half in (negative, condition) if half is not None]
        given = np.concatenate(rows) if rows else None
        results.append(reference(single, noise[i : i + 1], noises[:, i : i + 1], given, scale))
    return np.concatenate(results)


def test_prompts_and_images_in_batches_with_a_padded_last_one(tmp_path):
    toy = Toy(batch=2)
    pipeline = make(tmp_path, toy)
    steps: list[tuple[int, int]] = []
    got = pipeline(
        ["a red boot", "a bag"],
        negative_prompt="small",
        num_images_per_prompt=3,
        seed=11,
        guidance_scale=2.5,
        output_type="latent",
        callback=lambda done, total: steps.append((done, total)),
    )
    prompts = np.concatenate([embed("a red boot")] * 3 + [embed("a bag")] * 3)
    want = whole(toy, prompts, np.repeat(embed("small"), 6, axis=0), 11, 2.5, 6)
    np.testing.assert_allclose(got.latents, want, atol=2e-5)
    assert got.images is got.latents
    total = 3 * len(ROUTE)
    assert got.launches == total
    assert steps == [(done, total) for done in range(1, total + 1)]

    odd = pipeline("a coat", num_images_per_prompt=3, seed=1, output_type="latent")
    want = whole(toy, np.repeat(embed("a coat"), 3, axis=0), np.repeat(embed(""), 3, axis=0), 1, 3.0, 3)
    np.testing.assert_allclose(odd.latents, want, atol=2e-5)


def test_a_seed_for_each_image(tmp_path):
    pipeline = make(tmp_path, Toy(batch=2))
    several = pipeline(["a boot", "a bag", "a coat"], seed=[4, 9, 4], output_type="latent").latents
    for prompt, seed, got in zip(("a boot", "a bag", "a coat"), (4, 9, 4), several, strict=True):
        np.testing.assert_allclose(pipeline(prompt, seed=seed, output_type="latent").latents[0], got, atol=1e-6)
    with pytest.raises(UserError, match="seed: 2 given for 1 images"):
        pipeline("a bag", seed=(1, 2))


def test_a_callback_at_the_end_of_each_evaluation_as_diffusers_has_it(tmp_path):
    pipeline = make(tmp_path, Toy(batch=1))
    seen = []

    def ended(given, step, timestep, tensors):
        assert given is pipeline
        seen.append((step, timestep, tensors.get("latents")))

    result = pipeline("a bag", seed=3, callback_on_step_end=ended)
    plan = pipeline.bundle.manifest.plan
    assert [step for step, *_ in seen] == list(plan.launched)
    assert [timestep for _, timestep, _ in seen] == [launch.timestep for launch in plan.launches]
    np.testing.assert_array_equal(seen[-1][2], result.latents)
    assert len({latents.tobytes() for *_, latents in seen}) == len(seen)
    seen.clear()
    pipeline("a bag", seed=3, callback_on_step_end=ended, callback_on_step_end_tensor_inputs=())
    assert [latents for *_, latents in seen] == [None] * len(plan.launched)
    with pytest.raises(UserError, match="'prompt_embeds', there is 'latents' alone"):
        pipeline("a bag", callback_on_step_end=ended, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_it_is_closed_and_used_again(tmp_path):
    with make(tmp_path, Toy(batch=1)) as pipeline:
        before = pipeline("a bag", seed=3).latents
        assert repr(pipeline) == f"<Pipeline {pipeline.bundle.path}: toy on cpu, 6 launches>"
        assert pipeline.memory()["graphs_loaded"]
    assert not pipeline.memory()["graphs_loaded"]
    np.testing.assert_array_equal(pipeline("a bag", seed=3).latents, before)
    steps = pipeline.bundle.manifest.sampler.num_inference_steps
    np.testing.assert_array_equal(pipeline("a bag", seed=3, num_inference_steps=steps).latents, before)
    with pytest.raises(UserError, match=f"num_inference_steps: 99, and the engine directory was compiled for {steps}"):
        pipeline("a bag", num_inference_steps=99)


def test_a_prompt_that_is_too_long_keeps_its_end_token_and_is_logged(tmp_path, caplog):
    toy = Toy()
    pipeline = make(tmp_path, toy)
    prompt = "a small red boot big blue bag"
    got = pipeline(prompt, output_type="latent")
    want = whole(toy, embed(prompt), embed(""), 0, 3.0, 1)
    np.testing.assert_allclose(got.latents, want, atol=2e-5)
    assert "cut from 9 to 6 tokens" in caplog.text


def test_embeddings_stand_in_for_prompts(tmp_path):
    pipeline = make(tmp_path, Toy())
    by_prompt = pipeline(["a boot", "a bag"], negative_prompt="red", seed=4, output_type="latent").latents
    by_embeds = pipeline(
        prompt_embeds=np.concatenate([embed("a boot"), embed("a bag")]),
        negative_prompt_embeds=embed("red"),
        seed=4,
        output_type="latent",
    ).latents
    np.testing.assert_array_equal(by_prompt, by_embeds)


def test_given_latents_replace_the_first_draw_as_in_diffusers(tmp_path):
    toy = Toy(noises=1)
    pipeline = make(tmp_path, toy)
    latents = np.random.default_rng(0).normal(size=(1, C, H, W))
    got = pipeline("a bag", latents=latents, seed=3, output_type="latent").latents
    noises = TorchNoise(3).randn((1, C, H, W))[None]  # the sampler's noise is then the stream's first draw
    single = Toy(batch=1)
    want = reference(single, latents, noises, np.concatenate([embed(""), embed("a bag")]), 3.0)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_class_labels_by_name_and_id(tmp_path):
    toy = Toy(kind="class", batch=2)
    pipeline = make(tmp_path, toy)
    got = pipeline(class_labels=["Boot", 2, np.int64(1)], seed=2, output_type="latent").latents
    want = whole(toy, np.array([0, 2, 1]), np.full(3, NULL_CLASS), 2, 3.0, 3)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert CLASSES == {"boot": 0, "bag": 1, "coat": 2}


def test_no_condition_and_no_guidance(tmp_path):
    toy = Toy(kind="none", guidance=False, batch=2)
    got = make(tmp_path, toy)(num_images_per_prompt=3, seed=5, output_type="latent").latents
    np.testing.assert_allclose(got, whole(toy, None, None, 5, 1.0, 3), atol=2e-5)


def test_images_are_the_decoded_latents(tmp_path):
    pipeline = make(tmp_path, Toy(batch=2))
    arrays = pipeline("a bag", num_images_per_prompt=3, output_type="np")
    want = 1 / (1 + np.exp(-arrays.latents[:, :3].transpose(0, 2, 3, 1)))
    assert arrays.images.dtype == np.float32
    np.testing.assert_allclose(arrays.images, want, atol=1e-6)
    pictures = pipeline("a bag", num_images_per_prompt=3).images
    assert [picture.mode for picture in pictures] == ["RGB"] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), to_uint8(arrays.images))
    timings = arrays.timings
    assert timings.total >= timings.loop > 0
    assert pipeline("a bag").timings.load < 0.1


def test_fp16_conditions_are_converted(tmp_path):
    toy = Toy(dtype="fp16", batch=1)
    got = make(tmp_path, toy)("a boot", seed=1, output_type="latent").latents
    np.testing.assert_allclose(got, whole(toy, embed("a boot"), embed(""), 1, 3.0, 1), atol=2e-2)


def test_pixels_and_grid():
    images = np.zeros((3, 2, 4, 3), np.float32)
    images[1], images[2] = 0.5, [2.0, -1.0, 0.0]
    np.testing.assert_array_equal(to_uint8(images)[:, 0, 0], [[0, 0, 0], [128, 128, 128], [255, 0, 0]])
    sheet = grid(to_pil(images))
    assert sheet.size == (8, 4)
    assert sheet.getpixel((4, 0)) == (128, 128, 128)
    assert sheet.getpixel((0, 2)) == (255, 0, 0)
    assert sheet.getpixel((4, 2)) == (0, 0, 0)
    assert grid(to_pil(images[:1])).size == (4, 2)
    with pytest.raises(NotFiniteError, match="not finite"):
        to_uint8(np.array([0.5, np.nan]))


def test_pictures_of_16_bits_and_of_floats():
    grey = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)
    found = to_pictures(Image.fromarray(grey), 8, 8)
    np.testing.assert_allclose(found[0, ..., 0], grey / 65535, atol=0.002)
    with pytest.raises(UserError, match="image: a picture of 32-bit floats"):
        to_pictures(Image.fromarray(grey.astype(np.float32)), 8, 8)
    for values in (grey.astype(np.float32), np.full((8, 8, 3), np.nan, np.float32), grey):
        with pytest.raises(UserError, match="image: "):
            to_pictures(np.broadcast_to(values[..., :1, None] if values.ndim == 2 else values, (8, 8, 3)), 8, 8)


TEXT, CLASS = Toy(batch=1), Toy(kind="class", batch=1)
EMBEDS = embed("a bag")
NOISE = np.zeros((1, C, H, W), np.float32)
ERRORS = [
    (TEXT, {}, "prompt: missing"),
    (TEXT, {"prompt": []}, "prompt: an empty list"),
    (TEXT, {"prompt": ["a", 3]}, "prompt: 3 of type int, needs text"),
    (TEXT, {"prompt": "a", "class_labels": 1}, "takes no class labels"),
    (TEXT, {"prompt": "a", "prompt_embeds": EMBEDS}, "not both"),
    (TEXT, {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": EMBEDS}, "not both"),
    (TEXT, {"prompt": "a", "negative_prompt": ["b", "c"]}, "negative_prompt: 2 given for 1 prompts"),
    (TEXT, {"prompt": "a", "num_images_per_prompt": 0}, "number of images 0"),
    (TEXT, {"prompt": "a", "num_images_per_prompt": -3}, "number of images -3"),
    (TEXT, {"prompt": "a", "output_type": "gif"}, "output type 'gif'"),
    (TEXT, {"prompt": "a", "guidance_scale": 0.5}, "guidance_scale: 0.5"),
    (TEXT, {"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale: nan"),
    (TEXT, {"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale: inf"),
    (TEXT, {"prompt": "a", "guidance_scale": 1e39}, "guidance_scale: 1e.39, must be .* float32 can hold"),
    (TEXT, {"prompt": "un caf\udce9"}, "prompt: not UTF-8 text .byte 0xe9 at character 6"),
    (TEXT, {"prompt": "a", "negative_prompt": "\ud800"}, "negative_prompt: not UTF-8 text"),
    (TEXT, {"prompt": "x" * 10_000_000}, "prompt: 10000000 characters; give at most"),
    (TEXT, {"prompt": "a", "num_images_per_prompt": 10**9}, "number of images 1000000000: .* GiB .* ask for fewer"),
    (TEXT, {"prompt": "a", "latents": NOISE.astype(np.float64) + 1e300}, "latents: the largest value, 1e.300"),
    (TEXT, {"prompt_embeds": EMBEDS + np.inf}, "prompt_embeds: holds NaN or infinity"),
    (Toy(dtype="fp16"), {"prompt_embeds": EMBEDS + 1e5}, "prompt_embeds: the largest value, 1e.05, is beyond float16"),
    (CLASS, {"class_labels": "x" * 10_000_000}, "class_labels: no class is named 'xxx.* the names are boot"),
    (CLASS, {"class_labels": "\x1b[31mred\n"}, r"no class is named '\\x1b\[31mred"),
    (TEXT, {"prompt": "a", "seed": 2**64}, "seed"),
    (TEXT, {"prompt": "a", "latents": NOISE[0]}, r"latents: shape \(4, 8, 8\), needs \(1, 4, 8, 8\)"),
    (TEXT, {"prompt": "a", "latents": NOISE, "num_images_per_prompt": 2}, r"needs \(2, 4, 8, 8\)"),
    (TEXT, {"prompt": "a", "latents": NOISE.astype(np.int64)}, "latents: int64"),
    (TEXT, {"prompt": "a", "latents": NOISE + np.nan}, "latents: holds NaN"),
    (TEXT, {"prompt": "a", "latents": [1.0]}, "latents: list"),
    (TEXT, {"prompt_embeds": EMBEDS[:, :3]}, r"prompt_embeds: shape \(1, 3, 5\), needs \(prompts, 6, 5\)"),
    (TEXT, {"prompt_embeds": EMBEDS[0]}, "prompt_embeds: shape"),
    (TEXT, {"prompt_embeds": EMBEDS[:0]}, "prompt_embeds: shape"),
    (TEXT, {"prompt": "a", "negative_prompt_embeds": np.repeat(EMBEDS, 2, axis=0)}, "2 given for 1 prompts"),
    (CLASS, {}, "class_labels: missing; .*boot, bag, coat"),
    (CLASS, {"class_labels": []}, "an empty list"),
    (CLASS, {"class_labels": "hat"}, "no class is named 'hat'; the names are boot, bag, coat"),
    (CLASS, {"class_labels": [0, 9]}, "no class has id 9"),
    (CLASS, {"class_labels": -1}, "no class has id -1"),
    (CLASS, {"class_labels": 1.5}, "1.5 of type float, needs a class id or a name"),
    (CLASS, {"class_labels": [1.5]}, "1.5 of type float, needs a class id or a name"),
    (CLASS, {"class_labels": 1, "prompt": "a bag"}, "prompt: this engine directory takes class labels"),
    (
        CLASS,
        {"class_labels": 1, "negative_prompt": "a bag"},
        "negative_prompt: this engine directory takes class labels",
    ),
    (Toy(kind="none", guidance=False), {"prompt": "a"}, "takes no condition"),
    (Toy(guidance=False), {"prompt": "a", "guidance_scale": 2.0}, "exported without guidance"),
    (Toy(guidance=False), {"prompt": "a", "negative_prompt": "b"}, "exported without guidance"),
    (Toy(guidance_scale=None), {"prompt": "a"}, "guidance_scale: missing"),
    (Toy(text_encoder=False), {"prompt": "a"}, "no text encoder; give prompt_embeds and negative_prompt_embeds"),
    (Toy(text_encoder=False), {"prompt_embeds": EMBEDS}, "no text encoder"),
    (Toy(vae=False), {"prompt": "a"}, "no VAE decoder; use output type 'latent'"),
]


@pytest.mark.parametrize(("toy", "arguments", "message"), ERRORS)
def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path, toy, arguments, message):
    pipeline = Pipeline.from_engine_dir(build(tmp_path, toy), "cpu", threads=1, load="call")
    pipeline._loaded.all_of = None  # type: ignore[method-assign,assignment]  # running would fail on this
    with pytest.raises(UserError, match=message) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"), "tokenizer.json: its sha256 differs"),
        (lambda folder: (folder / "graphs/mixed.onnx").unlink(), "mixed.onnx: missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, spoil, message):
    spoil(build(tmp_path, TEXT))
    with pytest.raises(UserError, match=message):
        Pipeline.from_engine_dir(tmp_path, "cpu", threads=1)


def test_verify_finds_a_changed_byte(tmp_path):
    folder = build(tmp_path, TEXT)
    weights = bytearray((folder / "graphs/weights.bin").read_bytes())
    weights[5] ^= 1
    (folder / "graphs/weights.bin").write_bytes(weights)
    for verify in (False, True):  # a small directory is hashed at every load
        with pytest.raises(UserError, match=r"weights\.bin: its sha256"):
            Pipeline.from_engine_dir(folder, "cpu", verify=verify, load="call")


def test_two_pipelines_run_in_two_threads(tmp_path):
    folder = build(tmp_path, TEXT)
    alone = {seed: Pipeline.from_engine_dir(folder, "cpu", threads=1)("a bag", seed=seed).latents for seed in (1, 2)}

    def draw(seed: int) -> bool:
        pipeline = Pipeline.from_engine_dir(folder, "cpu", threads=1)
        return all((pipeline("a bag", seed=seed).latents == alone[seed]).all() for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(draw, (1, 2))) == [True, True]


def test_running_imports_no_torch_diffusers_or_onnx(tmp_path):
    build(tmp_path / "engine", Toy(batch=1))
    code = """
import sys
from dipgo_deploy import Pipeline
output = Pipeline.from_engine_dir(sys.argv[1], threads=1)("a red boot", seed=0)
output.images[0].save(sys.argv[2])
heavy = {name.partition(".")[0] for name in sys.modules}
print(sorted(heavy & {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy"}))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "engine"), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "x.png").stat().st_size > 0


def test_threads_share_a_pipeline_one_call_at_a_time(tmp_path):
    """Bit for bit what the same calls give one after the other."""
    toy = Toy(batch=2)
    folder = build(tmp_path, toy)
    serial, shared = (Pipeline.from_engine_dir(folder, "cpu", threads=1, load="lazy") for _ in range(2))
    calls = [(thread, call) for thread in range(8) for call in range(20)]

    def draw(pipeline: Pipeline, thread: int, call: int) -> np.ndarray:
        prompt = ["a boot", "a bag", "a red coat", "big"][thread % 4]
        images = pipeline(prompt, seed=100 * thread + call, num_images_per_prompt=1 + call % 3, output_type="np")
        return np.concatenate([images.latents.ravel(), images.images.ravel()])

    alone = {pair: draw(serial, *pair) for pair in calls}
    with ThreadPoolExecutor(8) as pool:
        together = {
            thread: pool.submit(lambda t: [draw(shared, t, c) for c in range(20)], thread) for thread in range(8)
        }
        for thread, found in together.items():
            for call, drawn in enumerate(found.result()):
                np.testing.assert_array_equal(drawn, alone[thread, call])


def test_a_callback_cannot_call_its_own_pipeline(tmp_path):
    pipeline = make(tmp_path, Toy(batch=1))
    want = pipeline("a bag", seed=1).latents
    for inner in (lambda: pipeline("a boot"), pipeline.load, pipeline.unload_lora):
        with pytest.raises(UserError, match="called by the callback"):
            pipeline("a bag", callback=lambda done, total, inner=inner: inner())
    np.testing.assert_array_equal(pipeline("a bag", seed=1).latents, want)


def test_a_prediction_that_is_not_finite_is_named(tmp_path, recwarn):
    pipeline = make(tmp_path, Toy(batch=2))
    want = pipeline("a bag", seed=1).latents
    with pytest.raises(
        NotFiniteError, match=r"launch 1 of 6 \(evaluation 0, graph full\): .* a smaller guidance scale"
    ):
        pipeline(prompt_embeds=embed("") + 9, negative_prompt_embeds=embed("") - 9, guidance_scale=3.3e38)
    assert not recwarn.list
    # What one run leaves behind is not seen by the next.
    np.testing.assert_array_equal(pipeline("a bag", seed=1).latents, want)


def test_a_later_launch_that_is_not_finite_is_named(tmp_path):
    pipeline = make(tmp_path, Toy(batch=1))
    loop = pipeline._loaded.loop(pipeline.bundle)
    inner = loop.run

    def run(*args, **options):
        result = inner(*args, **options)
        stack = loop._backend.download(loop._history, loop._view.history)
        stack[loop.launches[2].slot, 0, 1, 2, 3] = np.inf
        loop._backend.upload(loop._history, stack)
        return result * np.nan

    loop.run = run  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match=r"launch 3 of 6 \(evaluation 2, graph mixed\)"):
        pipeline("a bag")


@pytest.mark.parametrize(
    ("dtype", "value", "refused"), [("fp32", 1e5, False), ("fp32", np.nan, True), ("fp16", 1e5, True)]
)
def test_a_text_encoder_that_gives_what_the_denoiser_cannot_take_is_named(tmp_path, dtype, value, refused):
    pipeline = make(tmp_path, Toy(batch=1, dtype=dtype))
    pipeline._loaded._text = lambda prompts, negative: {"encoder_hidden_states": embed("a bag") + value}  # type: ignore
    if not refused:
        assert pipeline("a bag").launches == len(ROUTE)
        return
    with pytest.raises(NotFiniteError, match="text encoder, output encoder_hidden_states"):
        pipeline("a bag")


def test_a_picture_that_is_not_finite_is_no_picture(tmp_path):
    pipeline = make(tmp_path, Toy(batch=1))
    pipeline._loaded._decoder = lambda latents: np.full((1, H, W, 3), np.nan, np.float32)  # type: ignore
    for output_type in ("pil", "np"):
        with pytest.raises(NotFiniteError, match="VAE decoder: the first output that is not finite"):
            pipeline("a bag", output_type=output_type)
    assert np.isfinite(pipeline("a bag", output_type="latent").images).all()


def test_tensors_and_tuples_as_diffusers_gives_them(tmp_path, monkeypatch):
    pipeline = make(tmp_path, Toy())
    wanted = pipeline("a boot", seed=2, output_type="np").images
    torch = pytest.importorskip("torch")
    tensors = pipeline("a boot", seed=2, output_type="pt").images
    assert isinstance(tensors, torch.Tensor) and np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), wanted)
    (images,) = pipeline("a boot", seed=2, output_type="np", return_dict=False)
    assert np.array_equal(images, wanted)
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(UserError, match="output type 'pt': gives tensors of torch, which is not imported"):
        pipeline("a boot", output_type="pt")
