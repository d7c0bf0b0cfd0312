"""SDXL in small: two text encoders, pooled embedding and sizes, against the supernet and diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from family_checks import assert_pictures_equal_stock, build_with_tensorrt_rtx, plan_for, schedule_for, with_gates
from lora_files import diffusers_keys, kohya_keys, make_updates, merge_into, save_lora
from safetensors.torch import load_file
from sd_pipelines import (
    NEGATIVE,
    PROMPT,
    assert_equals_supernet,
    psnr,
    relative,
    save_sdxl,
    sdxl_unet,
    stock,
)

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.reference.source import load_source
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS, SCALE = 4, 5.0
SIZE = 64  # pixels, the tiny model's native size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def own(model: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)


@pytest.fixture(scope="module")
def traced(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS))


@pytest.fixture(scope="module")
def engine(traced: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(traced, tmp_path_factory.mktemp("sdxl-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=3, guidance_scale=SCALE, **call).images)


def test_the_manifest_says_where_the_conditions_come_from(engine: Path) -> None:
    manifest = Bundle.open(engine).manifest
    conditions = {spec.name: (spec.source, spec.shape, spec.dtype, spec.values) for spec in manifest.conditions}
    assert conditions == {
        "encoder_hidden_states": ("text", (2, 16, 40), "float32", ()),
        "text_embeds": ("text", (2, 20), "float32", ()),
        "time_ids": ("fixed", (2, 6), "float32", (SIZE, SIZE, 0, 0, SIZE, SIZE)),
    }
    encoder = manifest.components.text_encoder
    assert encoder is not None and encoder.zeros_without_negative
    assert [entry.file for entry in encoder.tokenizers] == ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"]
    assert encoder.tokenizers[0].pad_id != encoder.tokenizers[1].pad_id == 0
    assert manifest.guidance_scale == 5.0  # the pipeline's own default


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("output", ["latent", "np"])
def test_equals_diffusers_own_pipeline(engine: Path, own: Any, negative: str | None, output: str) -> None:
    call = {"prompt": PROMPT, "negative_prompt": negative, "output_type": output}
    want = stock(own, steps=STEPS, guidance_scale=SCALE, **call)
    assert relative(ours(engine, **call), want) <= 1e-4


def test_zeros_and_the_encoded_empty_prompt_are_told_apart(engine: Path) -> None:
    without, empty = (ours(engine, prompt=PROMPT, negative_prompt=given, output_type="latent") for given in (None, ""))
    assert relative(without, empty) > 1e-3


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddim"])
def test_equals_it_with_other_samplers(
    traced: PlannedExport, model: Path, own: Any, sampler: str, tmp_path: Path
) -> None:
    schedule = schedule_for(model, steps=STEPS, sampler=sampler)
    with_gates(traced, schedule, tmp_path / "x", components=False)
    with torch.no_grad():
        states, negative, pooled, negative_pooled = own.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    got = ours(
        tmp_path / "x",
        prompt_embeds={"encoder_hidden_states": states.numpy(), "text_embeds": pooled.numpy()},
        negative_prompt_embeds={"encoder_hidden_states": negative.numpy(), "text_embeds": negative_pooled.numpy()},
        output_type="latent",
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent", "guidance_scale": SCALE}
    assert relative(got, stock(own, sampler=sampler, steps=STEPS, **call)) <= 1e-4


def test_sizes_can_be_given(engine: Path, own: Any) -> None:
    call = {"prompt": PROMPT, "output_type": "latent"}
    want = stock(own, steps=STEPS, guidance_scale=SCALE, original_size=(256, 32), crops_coords_top_left=(8, 0), **call)
    got = ours(engine, conditions={"time_ids": np.array([[256, 32, 8, 0, SIZE, SIZE]])}, **call)
    assert relative(got, want) <= 1e-4
    assert relative(ours(engine, **call), want) > 1e-3


UNET_LAYERS = {  # diffusers' name -> that of Stability's code
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks_3_1_transformer_blocks_0_attn2_to_k",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.resnets.1.conv1": "output_blocks_1_0_in_layers_2",
    "add_embedding.linear_1": "label_emb_0_0",
}
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc2")


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_lora_of_the_unet_and_both_text_encoders(engine: Path, model: Path, spelling: str, tmp_path: Path) -> None:
    own = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    clips = (own.text_encoder, own.text_encoder_2.text_model)  # the level that not all files have
    updates = [make_updates(own.unet, list(UNET_LAYERS))]
    updates += [make_updates(clip, list(TEXT_LAYERS), seed) for seed, clip in enumerate(clips, 1)]
    if spelling == "diffusers":
        prefixes = ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model.")
        keys = [diffusers_keys(prefix) for prefix in prefixes]
    else:
        prefixes = ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")
        keys = [kohya_keys(prefix) for prefix in prefixes]
    tensors: dict[str, torch.Tensor] = {}
    for part, names in zip(updates, keys, strict=True):
        given = part
        if spelling == "kohya" and part is updates[0]:
            given = {UNET_LAYERS[name]: pair for name, pair in part.items()}
        tensors |= load_file(save_lora(tmp_path / "part.safetensors", given, names))
    file = save_lora(tmp_path / "lora.safetensors", {}, extra=tensors)

    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent"}
    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1, load="call")
    report = pipeline.load_lora(file, 0.5)
    assert (report.applied, report.left_out) == (len(UNET_LAYERS) + 2 * len(TEXT_LAYERS), ())
    assert report.graphs["components/text_encoder/model.onnx"] == 2 * len(TEXT_LAYERS)
    got = np.asarray(pipeline(seed=3, guidance_scale=SCALE, **call).images)
    before = stock(own, steps=STEPS, guidance_scale=SCALE, **call)
    for target, part in zip((own.unet, *clips), updates, strict=True):
        merge_into(target, part, 0.5)
        want = stock(own, steps=STEPS, guidance_scale=SCALE, **call)
        assert relative(want, before) > 1e-3  # each of the three matters
        before = want
    assert relative(got, want) <= 1e-4


def test_random_schedule_of_blocks(traced: PlannedExport, model: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(traced, schedule_for(model, steps=STEPS, ratio=0.5, seed=2), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


def test_tensorrt_rtx_builds_fp32(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 3


def test_fp16_is_close_and_its_vae_stays_in_float32(model: Path, own: Any, tmp_path: Path) -> None:
    # Eight bits less than float32 in each layer and in the text encoders, four steps fed back.
    schedule = schedule_for(model, steps=STEPS)
    bundle = publish(plan_for(model, schedule, dtype="fp16"), tmp_path / "x")
    import onnx

    assert bundle.manifest.components.vae_decoder is not None
    decoder = onnx.load(bundle.path / bundle.manifest.components.vae_decoder.file, load_external_data=False)
    kinds = {tensor.data_type for tensor in decoder.graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds and onnx.TensorProto.FLOAT16 not in kinds
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "np"}
    assert psnr(ours(bundle.path, **call), stock(own, steps=STEPS, guidance_scale=SCALE, **call)) > 40
    assert build_with_tensorrt_rtx(bundle.path) == 3


@pytest.mark.slow
def test_tensorrt_rtx_builds_bf16(model: Path, tmp_path: Path) -> None:
    schedule = schedule_for(model, steps=STEPS, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(model, schedule, dtype="bf16"), tmp_path / "x")
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


def test_empty_prompts_are_encoded_where_the_pipeline_says_so(tmp_path: Path) -> None:
    source = load_source(str(save_sdxl(tmp_path / "model", zeros=False)))
    assert source.text is not None and not source.text.zeros_without_negative


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: setattr(p, "vae_scale_factor", 4), "vae: its scale is 4"),
        (lambda p: p.vae.register_to_config(latents_mean=[0.0] * 4), "vae: latents_mean is not supported"),
        (lambda p: setattr(p.text_encoder_2.config, "projection_dim", 8), "text_encoder_2: projection_dim 8"),
        (lambda p: setattr(p.tokenizer_2, "model_max_length", 8), "tokenizer, tokenizer_2: 16 and 8 tokens"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(model: Path, spoil: Any, words: str) -> None:
    source = load_source(str(model))
    spoil(source.pipeline)
    with pytest.raises(UserError, match=words) as caught:
        source.trace_shape(batch=1, guidance=True, height=None, width=None)
    assert "\n" not in str(caught.value)


def test_a_size_that_the_vae_cannot_make_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="--width 60: give a multiple of 8 pixels"):
        plan_export(str(model), schedule_for(model), ExportOptions(layout="variants", width=60))


def test_random_schedule_of_layers_without_a_pipeline(tmp_path: Path) -> None:
    """A UNet alone gives a bundle that takes both embeddings, here for a picture that is no square."""
    sdxl_unet().save_pretrained(tmp_path / "unet")
    schedule = schedule_for(tmp_path / "unet", sampler="euler", steps=STEPS, ratio=0.5, seed=1, granularity="layer")
    publish(plan_for(tmp_path / "unet", schedule, height=48, width=80), tmp_path / "x")
    sizes = {spec.name: spec.values for spec in Bundle.open(tmp_path / "x").manifest.conditions}
    assert sizes["time_ids"] == (48, 80, 0, 0, 48, 80)
    assert_equals_supernet(tmp_path / "x")
