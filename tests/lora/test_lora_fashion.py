"""The embedded text-to-image model with a LoRA for UNet and text encoder, from the prompt to the latents.

In each run of all tests the same is seen of a small SDXL (tests/e2e/test_sdxl.py).
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from lora_files import kohya_keys, make_updates, merge_into, save_lora  # noqa: E402
from tiny_engines import schedule_for, write  # noqa: E402

from dipgo_deploy.export.exporter import ExportOptions, plan_export  # noqa: E402
from dipgo_deploy.models.location import resolve_model  # noqa: E402
from dipgo_deploy.reference.source import load_source  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.sampler import make_scheduler  # noqa: E402
from dipgo_deploy.supernet.gated import Supernet  # noqa: E402
from dipgo_deploy.supernet.loop import run_loop  # noqa: E402

torch.set_num_threads(1)
PROMPT = "a sneaker"
SCALE, GUIDANCE = 0.5, 3.0


def attention_layers(model: torch.nn.Module) -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


@pytest.mark.slow
def test_prompt_to_latents_equals_the_merged_torch_models(tmp_path):
    schedule = schedule_for(resolve_model("fashion-sd"), ratio=0.6)
    planned = plan_export("fashion-sd", schedule, ExportOptions(layout="variants"))
    engine = write(planned, tmp_path / "engine")

    source = load_source("fashion-sd")
    encoder = source.pipeline.text_encoder
    unet_updates = make_updates(source.denoiser, attention_layers(source.denoiser), 1)
    text_updates = make_updates(encoder, attention_layers(encoder), 2)
    assert unet_updates and text_updates
    # kohya's files for a text encoder have the level `text_model`, which later versions of transformers dropped
    file = save_lora(tmp_path / "unet.safetensors", unet_updates, kohya_keys("lora_unet_"))
    text_file = save_lora(
        tmp_path / "text.safetensors",
        {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in text_updates.items()},
        kohya_keys("lora_te_"),
    )

    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1)

    def draw() -> np.ndarray:
        return pipeline(PROMPT, seed=3, guidance_scale=GUIDANCE, output_type="latent").latents

    before = draw()
    for path, updates in ((file, unet_updates), (text_file, text_updates)):
        report = pipeline.load_lora(path, SCALE)
        assert [part.applied for part in report.components] == [len(updates)] == [report.applied]
    got = draw()

    merge_into(source.denoiser, unet_updates, SCALE)
    merge_into(encoder, text_updates, SCALE)
    tokenizer = source.pipeline.tokenizer
    ids = tokenizer(["", PROMPT], padding="max_length", truncation=True, return_tensors="pt").input_ids
    specs = source.specs(planned.schedule)
    supernet = Supernet(source.denoiser, specs, [planned.schedule.cache_kinds[spec.name] for spec in specs])
    shape = (1, source.family.latent_channels(source.config), got.shape[2], got.shape[3])
    with torch.no_grad():
        want = run_loop(
            supernet,
            make_scheduler(schedule.sampler.class_name, schedule.sampler.config),
            planned.schedule.gates,
            torch.randn(shape, generator=torch.Generator().manual_seed(3)),
            {"encoder_hidden_states": encoder(ids)[0]},
            num_inference_steps=schedule.sampler.num_inference_steps,
            guidance_scale=GUIDANCE,
        ).numpy()
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-4
    assert np.abs(got - before).max() / np.abs(before).max() > 1e-2
    pipeline.unload_lora()
    np.testing.assert_array_equal(draw(), before)
