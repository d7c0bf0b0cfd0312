"""The transformer of Z-Image (diffusers ``ZImageTransformer2DModel``; arXiv 2511.22699), Turbo and base.

Picture and text are refined apart and then go through the layers as one sequence. Its ``forward`` takes lists of
pictures and texts of any length; here the parts of the model are called for texts of one length with a mask, which
comes to the same: a text is filled up to a multiple of 32 tokens with one that is learned, and what is behind that is
not attended to.

Granularity ``block``: the refining blocks of picture (``noise_refiner.i``) and text (``context_refiner.i``, which no
timestep changes: what it gave once is what it gives again) and the layers (``layers.i``), 34 for Z-Image. Default
cache: ``residual``; on request ``output``.

Granularity ``layer``: ``attention`` and ``feed_forward`` of each of these, 68 for Z-Image. Cached is what these modules
return, before norm and gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.chat import MARK, around_prompt
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.guidance import Guidance, beyond_conditional
from dipgo_deploy.models.packed import check_even, set_timesteps
from dipgo_deploy.models.rotary import rotate, turns
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "ZImageTransformer2DModel"

_STATES, _MASK = "encoder_hidden_states", "encoder_attention_mask"
# The default `max_sequence_length` of the pipeline.
_TOKENS = 512
_PATCH = 2
# Sequences are filled up to multiples of so many tokens.
_MULTIPLE = 32
# Timesteps of the scheduler a unit of the model's, which counts from the noise on.
_TIMESTEPS = 1000


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The refining blocks of picture and text and then the layers, or their parts, in order of execution."""
    refiners, layers = int(config["n_refiner_layers"]), int(config["n_layers"])
    parts = (("noise_refiner", refiners), ("context_refiner", refiners), ("layers", layers))
    if granularity == "layer":
        return tuple(spec for name, count in parts for spec in sublayers(name, count, ("attention", "feed_forward")))
    return tuple(spec for name, count in parts for spec in whole_blocks(name, count, ("x",)))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent."""
    return int(config["in_channels"])


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D)
    and ``encoder_attention_mask`` int64 (batch, L) with 1 for a token.

    Raises:
        UserError: an odd height or width or one without position embeddings, other patches, or a model that sees
            pictures (Omni).
    """
    if list(config["all_patch_size"]) != [_PATCH] or list(config["all_f_patch_size"]) != [1]:
        raise UserError(
            f"{CLASS_NAME}: all_patch_size {config['all_patch_size']}, all_f_patch_size {config['all_f_patch_size']}: "
            "only models with patches of 2x2 of one frame work"
        )
    if config["siglip_feat_dim"]:
        raise UserError(f"{CLASS_NAME}: siglip_feat_dim (Z-Image-Omni) is not supported; use a model from text alone")
    check_even(CLASS_NAME, height, width)
    largest = [int(length) * _PATCH for length in config["axes_lens"][1:]]
    if height > largest[0] or width > largest[1]:
        raise UserError(
            f"{CLASS_NAME}: latent of {height}x{width}: position embeddings end at {largest}; use a smaller"
        )
    features = int(config["cap_feat_dim"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec(_STATES, (batch, text_length, features), "model", "condition", "text"),
        InputSpec(_MASK, (batch, text_length), "int64", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w): what the model gives is the picture less the noise."""
    import torch

    parts: Any = model
    batch, channels, height, width = latent.shape
    rows, columns = height // _PATCH, width // _PATCH
    moment = parts.t_embedder((_TIMESTEPS - timestep) / _TIMESTEPS * parts.t_scale).type_as(latent)

    tokens = latent.reshape(batch, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 3, 5, 1)
    picture = parts.all_x_embedder["2-1"](tokens.reshape(batch, rows * columns, channels * _PATCH**2))
    missing = -(rows * columns) % _MULTIPLE
    if missing:
        picture = torch.cat([picture, parts.x_pad_token.expand(batch, missing, -1)], dim=1)

    mask = conditions[_MASK]
    used = mask.sum(dim=1)
    filled = (used + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    seen = torch.arange(mask.shape[1], device=mask.device)[None] < filled[:, None]
    text = parts.cap_embedder(conditions[_STATES])
    text = torch.where((mask != 0)[..., None], text, parts.cap_pad_token)

    where_picture, where_text = _tables(parts, filled, rows, columns, missing, mask.shape[1])
    with _real_rotations(parts):
        for block in parts.noise_refiner:
            picture = block(picture, None, where_picture, moment)
        for block in parts.context_refiner:
            text = block(text, seen, where_text)
        whole = torch.cat([picture, text], dim=1)
        where = torch.cat([where_picture, where_text.expand(batch, -1, -1, -1)], dim=1)
        attended = torch.cat([torch.ones_like(picture[..., 0], dtype=torch.bool), seen], dim=1)
        for block in parts.layers:
            whole = block(whole, attended, where, moment)
    predicted = parts.all_final_layer["2-1"](whole, c=moment)[:, : rows * columns]
    predicted = predicted.reshape(batch, rows, columns, _PATCH, _PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    return -predicted.reshape(batch, channels, height, width)


def _tables(model: Any, filled: Tensor, rows: int, columns: int, missing: int, length: int) -> tuple[Tensor, Tensor]:
    """Rotary tables of picture (B, tokens, extent / 2, 2) and text (1, L, extent / 2, 2).

    Text is at (1 + token, 0, 0), the picture behind it at (1 + filled, row, column); what fills it up at the origin.
    """
    import torch

    extents = [int(extent) for extent in model.axes_dims]

    def along(axis: int, count: int) -> Tensor:
        """Of positions 0 to count - 1 of one axis, (count, extent / 2, 2)."""
        # An extent that a trace leaves open is no int.
        known = count if isinstance(count, int) else int(model.axes_lens[axis])
        positions = np.arange(known)[:, None]
        table = turns(positions, extents[axis : axis + 1], model.rope_theta, np.float64).to(filled.device)
        return table if known is count else table[torch.arange(count)]

    batch = filled.shape[0]
    time = along(0, _TOKENS + 2)
    still = [along(axis, 1) for axis in (1, 2)]
    picture = torch.cat(
        [
            time[filled + 1][:, None, None].expand(batch, rows, columns, -1, -1),
            along(1, rows)[None, :, None].expand(batch, rows, columns, -1, -1),
            along(2, columns)[None, None].expand(batch, rows, columns, -1, -1),
        ],
        dim=-2,
    ).flatten(1, 2)
    if missing:
        origin = torch.cat([time[:1], *still], dim=-2)
        picture = torch.cat([picture, origin[None].expand(batch, missing, -1, -1)], dim=1)
    tokens = time[1 : length + 1]
    text = torch.cat([tokens, *(table.expand(length, -1, -1) for table in still)], dim=-2)
    return picture, text[None]


@contextmanager
def _real_rotations(model: Any) -> Iterator[None]:
    """Inside the context attention turns queries and keys without complex numbers, which no graph knows."""
    attentions = [block.attention for part in _PARTS for block in getattr(model, part)]
    before = [attention.processor for attention in attentions]
    ours = _Attention()
    try:
        for attention in attentions:
            attention.processor = ours
        yield
    finally:
        for attention, theirs in zip(attentions, before, strict=True):
            attention.processor = theirs


_PARTS = ("noise_refiner", "context_refiner", "layers")


class _Attention:
    """Self-attention of normalised queries and keys that are turned by a table; mask: bool (B, tokens)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        import torch

        assert freqs_cis is not None
        heads = [layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        normalised = [
            part if norm is None else norm(part) for norm, part in zip((attn.norm_q, attn.norm_k), heads, strict=False)
        ]
        query, key = (rotate(part, freqs_cis).transpose(1, 2) for part in normalised)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        value = heads[2].transpose(1, 2)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = attn.to_out[0](found.transpose(1, 2).flatten(2))
        return result


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state but one of Qwen 3, which is asked to think, and the mask of its tokens."""
    known = pipeline is not None and getattr(pipeline, "tokenizer", None) is not None
    messages = [{"role": "user", "content": MARK}]
    around = ("", "")
    if known:
        around = around_prompt(pipeline.tokenizer, messages, add_generation_prompt=True, enable_thinking=True)

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        found = pipeline.text_encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return {_STATES: found.hidden_states[-2], _MASK: mask}

    return TextScheme(
        length=_TOKENS,
        encode=encode,
        tokenizers=(TokenizerSpec(length=_TOKENS, mask="attention_mask"),),
        around=around,
    )


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``: lists of pictures of one frame and of texts, filled up to 512 tokens."""
    import torch

    pictures, timestep, texts = args
    rows = [torch.nn.functional.pad(text, (0, 0, 0, _TOKENS - len(text))) for text in texts]
    masks = [(torch.arange(_TOKENS) < len(text)).to(torch.int64) for text in texts]
    return (
        torch.cat([p.transpose(0, 1) for p in pictures]),
        timestep,
        {_STATES: torch.stack(rows), _MASK: torch.stack(masks)},
    )


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("ZImagePipeline",),
    models="Z-Image, Z-Image-Turbo",
    refused=("Omni",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    guide=Guidance(combine=beyond_conditional, off=0.0, order="conditional first"),
    given=given,
    set_timesteps=set_timesteps,
    # Run in bfloat16 by those who run the rest in float16.
    float32_in_fp16=("text_encoder",),
    # Then no picture is filled up to a multiple of 32 tokens.
    size_multiple=lambda config: 8 * _PATCH,
)
