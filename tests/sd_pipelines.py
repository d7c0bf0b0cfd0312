"""Tiny Stable Diffusion pipelines with random weights (1.5, 2.1, XL), and their stock pipelines' own results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from family_checks import loop_report, random_weights
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import dipgo_deploy
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.sampler import make_scheduler

TOKENIZER = Path(dipgo_deploy.__file__).parent / "assets/fashion-sd/tokenizer"
SAMPLE = 8  # latent pixels; the tiny VAE makes 64 pictures' pixels of them, as the real ones' scale is 8 too
PROMPT, NEGATIVE = "a red shoe, and a BAG", "a coat"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# The schedulers of the published folders.
PNDM = {**BETAS, "clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
DDIM_V = {
    **BETAS,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
EULER = {
    **BETAS,
    "clip_sample": False,
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

# Two levels: each kind of block once, with and without resampling.
_SD = {
    "sample_size": SAMPLE,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def text_config(width: int, **changes: Any) -> CLIPTextConfig:
    """A small CLIP text encoder for the built-in model's tokenizer."""
    settings = {
        "vocab_size": 679,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 677,
        "eos_token_id": 678,
        "pad_token_id": 678,
        "projection_dim": width,
    }
    return CLIPTextConfig(**{**settings, **changes})


def vae(**changes: Any) -> AutoencoderKL:
    """A VAE of four levels: scale 8."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8 * SAMPLE,
        **changes,
    )
    return random_weights(model)


def _sd(folder: Path, unet: UNet2DConditionModel, text: CLIPTextConfig, scheduler: Any, **tokenizer: Any) -> Path:
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=random_weights(CLIPTextModel(text)),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER, **tokenizer),
        unet=random_weights(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sd15(folder: Path) -> Path:
    """SD-1.5's kinds of blocks, text encoder and scheduler."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_SD, cross_attention_dim=16, attention_head_dim=2)
    return _sd(folder, unet, text_config(16, hidden_act="quick_gelu"), PNDMScheduler.from_config(PNDM))


def save_sd21(folder: Path, *, sharp: float = 1.0) -> Path:
    """SD-2.1 (768): linear projections, heads by width, upcast attention, OpenCLIP's activation and padding, a
    v-prediction. sharp: factor of the weights of queries and keys."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **_SD,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
    )
    random_weights(unet)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(sharp)
    text = text_config(16, hidden_act="gelu", projection_dim=8, pad_token_id=0)
    return _sd(folder, unet, text, DDIMScheduler(**DDIM_V), pad_token="!")


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL's kinds of blocks: no attention in the first, several transformer layers in the other."""
    settings: dict[str, Any] = dict(
        sample_size=SAMPLE,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 4),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    return random_weights(UNet2DConditionModel(**{**settings, **changes}))


def save_sdxl(folder: Path, *, zeros: bool = True, **vae_changes: Any) -> Path:
    """SDXL: two text encoders of different widths, the second with a projection and another padding."""
    torch.manual_seed(2)
    StableDiffusionXLPipeline(
        vae=vae(**vae_changes),
        text_encoder=random_weights(CLIPTextModel(text_config(16, hidden_act="quick_gelu"))),
        text_encoder_2=random_weights(
            CLIPTextModelWithProjection(text_config(24, hidden_act="gelu", projection_dim=20, pad_token_id=0))
        ),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=AutoTokenizer.from_pretrained(TOKENIZER, pad_token="!"),
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler.from_config(EULER),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def save_refiner(folder: Path, plain: Path) -> Path:
    """The refiner with the second text encoder of SDXL's pipeline in ``plain``."""
    parts = StableDiffusionXLPipeline.from_pretrained(plain).components
    parts |= {"text_encoder": None, "tokenizer": None}
    unet = sdxl_unet(cross_attention_dim=24, projection_class_embeddings_input_dim=5 * 8 + 20)
    StableDiffusionXLImg2ImgPipeline(
        **{**parts, "unet": unet}, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
    ).save_pretrained(folder)
    return folder


def with_controlnet(
    folder: Path,
    plain: Any = StableDiffusionPipeline,
    pipeline: Any = StableDiffusionControlNetPipeline,
    *,
    count: int = 1,
    **changes: Any,
) -> Path:
    """The pipeline in ``folder`` with ControlNets for its UNet, whose zero convolutions are not zero."""
    loaded = plain.from_pretrained(folder)
    torch.manual_seed(7)
    net = ControlNetModel.from_unet(loaded.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for key, value in changes.items():
        net.register_to_config(**{key: value})
    parts = {name: part for name, part in loaded.components.items()}
    random_weights(net, scale=0.3)
    others = [random_weights(copy.deepcopy(net), scale=0.3, seed=seed) for seed in range(1, count)]
    pipeline(**parts, controlnet=[net, *others] if others else net).save_pretrained(folder)
    return folder


def save_ip_adapter(folder: Path, unet: UNet2DConditionModel, *, plus: bool = False) -> Path:
    """An adapter's file for a UNet, with its image encoder beside it; returns the file. plus: the kind that sees all
    states of the encoder, in the names of its authors."""
    generator = torch.Generator().manual_seed(13)

    def weight(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    torch.manual_seed(13)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    random_weights(CLIPVisionModelWithProjection(vision)).save_pretrained(folder / "image_encoder")
    width = unet.config.cross_attention_dim
    tensors = {"proj.weight": weight(4 * width, 12), "proj.bias": weight(4 * width)}
    tensors |= {"norm.weight": 1 + weight(width), "norm.bias": weight(width)}
    if plus:
        tensors = {"latents": weight(1, 3, 8), "proj_in.weight": weight(8, 8), "proj_in.bias": weight(8)}
        tensors |= {"proj_out.weight": weight(width, 8), "proj_out.bias": weight(width)}
        tensors |= {"norm_out.weight": 1 + weight(width), "norm_out.bias": weight(width)}
        shapes = {"0.to_q": (64, 8), "0.to_kv": (128, 8), "0.to_out": (8, 64), "1.1": (32, 8), "1.3": (8, 32)}
        for layer in range(4):
            tensors |= {f"layers.{layer}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
            for name in ("0.norm1", "0.norm2", "1.0"):
                tensors |= {f"layers.{layer}.{name}.weight": 1 + weight(8), f"layers.{layer}.{name}.bias": weight(8)}
    tensors = {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
    layers = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for place, name in enumerate(layers):
        rows = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * place + 1}.{part}.weight"] = weight(rows, width)
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def save_inpainting(folder: Path, plain: Path, owner: Any, pipeline: Any, unet: UNet2DConditionModel) -> Path:
    """The pipeline of class ``owner`` in ``plain`` as one for inpainting, with a UNet of 9 channels."""
    parts = owner.from_pretrained(plain).components
    torch.manual_seed(11)
    wider = random_weights(UNet2DConditionModel.from_config(unet.config, in_channels=9))
    pipeline(**{**parts, "unet": wider}).save_pretrained(folder)
    return folder


def stock(pipeline: Any, *, sampler: str | None = None, steps: int, seed: int = 3, **call: Any) -> np.ndarray:
    """What diffusers' own pipeline makes (``output_type`` latent or np); ``sampler`` as users swap schedulers."""
    own = pipeline.scheduler
    if sampler is not None:
        pipeline.scheduler = make_scheduler(sampler, own.config)
    try:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        images = pipeline(num_inference_steps=steps, generator=generator, **call).images
    finally:
        pipeline.scheduler = own
    return images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def psnr(got: np.ndarray, want: np.ndarray) -> float:
    """Of pictures in [0, 1], in dB."""
    return float(-10 * np.log10(np.mean((got - want) ** 2)))


def assert_equals_supernet(engine_dir: Path, tolerance: float = 1e-4, sizes: Sizes | None = None) -> None:
    """Every variant and the whole loop, caches fed forward, within ``tolerance`` of the supernet.

    The schedule has to skip something that a later step reads.
    """
    assert any(variant.reads for variant in Bundle.open(engine_dir).manifest.plan.variants)
    report = loop_report(engine_dir, sizes=sizes)
    assert report.first_failure() is None
    assert report.results is not None
    for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
        assert tensor.relative <= tolerance, f"{tensor.name}: {tensor.relative}"
