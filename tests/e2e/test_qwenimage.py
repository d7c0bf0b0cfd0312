"""Qwen-Image in small: guidance that keeps norms, a language model for the text, a VAE of videos, against the supernet
and diffusers' own pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from family_checks import (
    assert_pictures_equal_stock,
    borrow_components,
    build_with_tensorrt_rtx,
    check_guidance,
    loop_report,
    plan_for,
    random_weights,
    schedule_for,
    with_gates,
)
from language_models import WIDTH, qwen25_vl, qwen_tokenizer
from lora_files import assert_lora_is_merged
from PIL import Image
from sd_pipelines import PROMPT, assert_equals_supernet, relative, stock
from shared_traces import shared_parts
from tiny_denoisers import qwenimage_transformer as transformer
from video_checks import Exported, exported

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.models.packed import pack
from dipgo_deploy.models.qwenimage import CLASS_NAME, _real_rotations, filled
from dipgo_deploy.models.rotary import rotate
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.qwenimage import MODELS

FAMILY = family_for(CLASS_NAME)
STEPS, SCALE = 3, 2.5
SIZE = {"height": 16, "width": 24}  # pixels: 4 x 6 tokens of the tiny VAE's scale 2
NEGATIVE = "a coat"
# The scheduler of the published folder.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


@pytest.fixture(scope="module", autouse=True)
def one_export_of_each_part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_parts(tmp_path_factory.mktemp("qwenimage-parts")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwenimage") / "model"
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.2],
        latents_std=[2.8, 1.4],
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=random_weights(vae),
        text_encoder=qwen25_vl(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def planned(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(planned, tmp_path_factory.mktemp("qwenimage-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, scale: float | None = None, **call: Any) -> np.ndarray:
    """The stock pipeline's pictures, or its latents unpacked."""
    given = {} if scale is None else {"true_cfg_scale": scale}
    found = stock(pipeline, sampler=sampler, steps=STEPS, **SIZE, **call, **given)
    if call["output_type"] != "latent":
        return found
    return np.asarray(pipeline._unpack_latents(torch.from_numpy(found), *SIZE.values(), 2)[:, :, 0])


def test_it_draws_what_diffusers_draws(engine: Path, own: Any) -> None:
    manifest = Bundle.open(engine).manifest
    assert manifest.guidance and manifest.guidance_scale == 4.0  # the default of `true_cfg_scale`
    entry = manifest.components.text_encoder
    assert entry is not None
    assert entry.around[0].startswith("<|im_start|>system\nDescribe the image") and "assistant" in entry.around[1]
    call: dict[str, Any] = {"prompt": [PROMPT, "shoes"], "negative_prompt": NEGATIVE, "output_type": "np"}
    want = theirs(own, scale=SCALE, **{**call, "negative_prompt": [NEGATIVE] * 2})
    assert relative(ours(engine, guidance_scale=SCALE, **call), want) <= 1e-4
    assert relative(ours(engine, guidance_scale=SCALE, **{**call, "prompt": ["boots", "shoe"]}), want) > 1e-3
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent"}
    assert relative(ours(engine, **call), theirs(own, **call)) <= 1e-4


def test_it_does_so_with_another_sampler(
    planned: PlannedExport, model: Path, engine: Path, own: Any, tmp_path: Path
) -> None:
    """The other ones that its pipeline takes draw noise, for tokens in their order."""
    sampler = "flow-unipc"
    with_gates(planned, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    borrow_components(engine, tmp_path / "x")
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent"}
    got = ours(tmp_path / "x", guidance_scale=SCALE, **call)
    assert relative(got, theirs(own, sampler=sampler, scale=SCALE, **call)) <= 1e-4


def test_a_lora_is_merged(engine: Path, own: Any, tmp_path: Path) -> None:
    modules = ["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.img_mlp.net.2", "proj_out"]
    call = {"prompt": PROMPT, "output_type": "latent", "negative_prompt": NEGATIVE}
    assert_lora_is_merged(engine, own.transformer, modules, lambda: theirs(own, **call), tmp_path, **call)


def test_random_schedule_of_blocks(planned: PlannedExport, model: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(planned, schedule_for(model, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


@pytest.mark.parametrize(
    ("granularity", "cache", "layout"),
    [("layer", None, "segments"), pytest.param("block", "output", "variants", marks=pytest.mark.slow)],
)
def test_random_schedules_are_the_supernet(tmp_path: Path, granularity: Any, cache: Any, layout: Any) -> None:
    """With a sampler that the pipeline does not take: it has no ``sigmas``."""
    transformer(layers=1 if layout == "segments" else 2).save_pretrained(tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(tmp_path / "model" / "scheduler")
    schedule = schedule_for(tmp_path / "model", ratio=0.5, sampler="flow-dpm++2m", granularity=granularity, cache=cache)
    size = {"height": 64, "width": 32}
    bundle = publish(plan_for(tmp_path / "model", schedule, components=False, layout=layout, **size), tmp_path / "x")
    assert bundle.manifest.plan.layout == layout
    assert_equals_supernet(tmp_path / "x")
    if layout == "variants":
        assert build_with_tensorrt_rtx(tmp_path / "x") == len(bundle.manifest.plan.variants)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_close(model: Path, dtype: str, tmp_path: Path) -> None:
    schedule = schedule_for(model, steps=STEPS, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(model, schedule, dtype=dtype, **SIZE), tmp_path / "x")
    if dtype == "fp16":  # the CPU has no kernels for bf16
        report = loop_report(bundle.path, pictures=True)
        assert report.first_failure() is None and report.pictures
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


@pytest.fixture(scope="module")
def edit(own: Any, engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """engine: made first, so that its VAE's decoder is shared."""
    folder = tmp_path_factory.mktemp("edit")
    editing(QwenImageEditPipeline, own).save_pretrained(folder / "model")
    return exported(folder / "model", folder / "x", SIZE, steps=STEPS)


def editing(kind: Any, own: Any) -> Any:
    """With the VAE and the denoiser of text to picture, and without what sees the picture."""
    parts = {name: getattr(own, name) for name in ("scheduler", "vae", "transformer")}
    return kind(**parts, text_encoder=None, tokenizer=None, processor=None)


@pytest.mark.parametrize("kind", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
def test_edit_follows_a_picture_as_diffusers(
    edit: Exported,
    own: Any,
    kind: Any,
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its prompt encoder would give is noise; diffusers makes pictures of a mebipixel."""
    size = (SIZE["width"], SIZE["height"])
    whole = (*size, None) if kind is QwenImageEditPipeline else size
    monkeypatch.setattr(sys.modules[kind.__module__], "calculate_dimensions", lambda area, ratio: whole)
    states, nothing = torch.randn(2, 1, 9, WIDTH, generator=torch.Generator().manual_seed(0)).unbind(0)
    masks = {
        name: torch.ones(1, 9, dtype=torch.int64) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    }
    given = {"prompt_embeds": states, "negative_prompt_embeds": nothing, **masks}
    want = theirs(editing(kind, own), image=picture, output_type="np", scale=SCALE, **given)

    def drawn(shown: Image.Image) -> np.ndarray:
        embeds = {
            name: {key: tensor.numpy() for key, tensor in filled(as_given, 2048).items()}
            for name, as_given in (
                (name, {"encoder_hidden_states": given[name], "encoder_hidden_states_mask": None})
                for name in ("prompt_embeds", "negative_prompt_embeds")
            )
        }
        return ours(edit.engine, image=shown, output_type="np", guidance_scale=SCALE, **embeds)

    assert relative(drawn(picture), want) <= 1e-4
    assert relative(drawn(picture.rotate(90)), want) > 1e-3
    with pytest.raises(UserError, match="prompt: this engine directory has no text encoder; give prompt_embeds"):
        ours(edit.engine, image=picture, prompt="make it winter")


def test_a_random_schedule_of_edit_is_the_supernet(edit: Exported, tmp_path: Path) -> None:
    with_gates(edit.planned, schedule_for(edit.model, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")


@pytest.mark.slow  # a trace of its own
@pytest.mark.parametrize("guidance_batch", [2, 1])
def test_renormalised_guidance_that_changes_over_the_run(model: Path, tmp_path: Path, guidance_batch: int) -> None:
    check_guidance(model, tmp_path, guidance_batch=guidance_batch, pictures=True, **SIZE)


def test_rotations_are_the_models_own() -> None:
    """Against its complex numbers, at the published extents and sides of which one is odd."""
    denoiser = transformer(attention_head_dim=128, axes_dims_rope=(16, 56, 56), num_attention_heads=1)
    rows, columns, length = 83, 60, 512
    picture, text = denoiser.pos_embed([[(1, rows, columns)]], max_txt_seq_len=length, device=torch.device("cpu"))
    features = torch.randn(1, rows * columns, 1, 128)
    turned = torch.view_as_real(torch.view_as_complex(features.unflatten(-1, (-1, 2))) * picture[:, None]).flatten(3)
    with _real_rotations(denoiser, length, rows, columns):
        found, behind = denoiser.pos_embed([[(1, rows, columns)]], max_txt_seq_len=length)
    with _real_rotations(denoiser, length, rows, columns, pictures=2):
        both, _ = denoiser.pos_embed([[(1, rows, columns)] * 2], max_txt_seq_len=length)
    torch.testing.assert_close(rotate(features, found), turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(behind, torch.view_as_real(text), rtol=0, atol=1e-4)
    assert "forward" not in vars(denoiser.pos_embed)
    # A second picture is at position 1 of the axis of frames.
    followed, _ = denoiser.pos_embed([[(1, rows, columns)] * 2], max_txt_seq_len=length, device=torch.device("cpu"))
    torch.testing.assert_close(both, torch.view_as_real(followed), rtol=0, atol=1e-5)


def test_renormalised_guidance_keeps_the_norm_of_tokens() -> None:
    away, towards = torch.randn(2, 2, 3, 4, 6).unbind(0)
    guided = FAMILY.guide.combine(away, towards, torch.tensor([3.0]))
    torch.testing.assert_close(pack(guided).norm(dim=-1), pack(towards).norm(dim=-1))
    plain = pack(away + 3 * (towards - away))
    torch.testing.assert_close(pack(guided) / plain, (pack(guided) / plain)[..., :1].expand(plain.shape))
    torch.testing.assert_close(FAMILY.guide.combine(away, towards, 1.0), towards)


def test_units_of_the_published_size() -> None:
    (entry,) = MODELS
    config = entry["config"]
    with torch.device("meta"):
        denoiser = QwenImageTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    for granularity, count in (("block", 60), ("layer", 180)):
        specs = FAMILY.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    latent, _, states, mask = FAMILY.inputs(config, 2, 166, 166, 512)
    assert latent.shape == (2, 16, 166, 166)
    assert (states.shape, mask.shape, mask.dtype) == ((2, 512, 3584), (2, 512), "int64")


def test_refusals_are_one_line() -> None:
    for config, height, words in (
        ({"in_channels": 128}, 8, "in_channels 128"),
        ({"zero_cond_t": True}, 8, "zero_cond_t = True is not supported"),
        ({}, 9, "9x8; give"),
    ):
        with pytest.raises(UserError) as error:
            FAMILY.inputs(config, 2, height, 8, 512)
        assert words in str(error.value) and "\n" not in str(error.value)
