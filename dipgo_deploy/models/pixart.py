"""PixArt-alpha and PixArt-Sigma (diffusers ``PixArtTransformer2DModel``; arXiv 2310.00426 and 2403.04692).

Granularity ``block``: one transformer block is one unit, 28 for PixArt-XL/2. Default cache: ``residual`` (a removed
block adds its last computed change to its current input); on request ``output``.

Granularity ``layer``: self-attention (``attn1``), cross-attention (``attn2``) and feed-forward (``ff``) of a block are
a unit each, 84 for PixArt-XL/2. A block is diffusers' ``BasicTransformerBlock`` with ``ada_norm_single``:
``x += gate_msa * attn1(modulate(norm1(x)))``, ``x += attn2(x, text)``, ``x += gate_mlp * ff(modulate(norm2(x)))``. What
is cached is what the three modules return, before the gate, which is always that of the current evaluation.
SmoothCache's diffusers helper (arXiv 2411.10510) replaces the forward of such a block's ``attn1``, in one version
``ff`` too; FORA (2407.01425) caches attention and feed-forward of PixArt-alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "PixArtTransformer2DModel"

# The default `max_sequence_length` of PixArtAlphaPipeline and PixArtSigmaPipeline.
_ALPHA_LENGTH, _SIGMA_LENGTH = 120, 300

# Pixels of a picture for one of its latent's: both models use Stable Diffusion's VAEs.
_VAE_SCALE = 8


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    count = int(config["num_layers"])
    if granularity == "layer":
        return sublayers("transformer_blocks", count, ("attn1", "attn2", "ff"))
    return whole_blocks("transformer_blocks", count)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent; what the model returns beyond them is a learned variance."""
    return int(config["in_channels"])


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Forward inputs, with C latent channels, L text tokens of D features:

    ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D),
    ``encoder_attention_mask`` int64 (batch, L) with 1 for a token, and for a model with additional conditions
    ``resolution`` (batch, 2), height and width in pixels. ``batch`` counts both halves of guidance.

    Raises:
        UserError: height or width is no multiple of the patch size.
    """
    patch = int(config["patch_size"])
    if height % patch or width % patch:
        raise UserError(f"{CLASS_NAME}: latent of {height}x{width}; give multiples of {patch}")
    inner = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    features = int(config["caption_channels"] or inner)
    specs = [
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, features), "model", "condition", "text"),
        InputSpec("encoder_attention_mask", (batch, text_length), "int64", "condition", "text"),
    ]
    if _sized(config):
        pixels = (float(height * _VAE_SCALE), float(width * _VAE_SCALE))
        specs.append(InputSpec("resolution", (batch, 2), "float32", "condition", "fixed", values=pixels))
    return tuple(specs)


def _sized(config: Mapping[str, Any]) -> bool:
    """Whether the model is told the picture's size: by diffusers' rule the one that was trained at 1024 pixels."""
    given = config["use_additional_conditions"]
    return bool(config["sample_size"] == 128 if given is None else given)


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, 2C, h, w), the learned variance behind the noise; the aspect ratio is height over width."""
    size = conditions.get("resolution")
    added = {"resolution": size, "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:]}
    prediction: Tensor = model(
        latent,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        encoder_attention_mask=conditions["encoder_attention_mask"],
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return prediction


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """T5's last hidden state and its mask; prompts are lowered and stripped, as the pipelines do without
    ``clean_caption``.

    Without a pipeline its kind is told by the configuration: those of Sigma say ``use_additional_conditions: false``.
    """
    if pipeline is None:
        sigma = config["use_additional_conditions"] is False
    else:
        sigma = type(pipeline).__name__.startswith("PixArtSigma")
    length = _SIGMA_LENGTH if sigma else _ALPHA_LENGTH

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        mask = tokens["attention_mask"]
        states = pipeline.text_encoder(tokens["input_ids"], attention_mask=mask)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    return TextScheme(
        length=length,
        encode=encode,
        tokenizers=(TokenizerSpec(length=length, mask="attention_mask"),),
        lowercase=True,
    )


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    models="PixArt-alpha, PixArt-Sigma",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    call=call,
    text=text,
    size_multiple=lambda config: int(config["patch_size"]),
)
