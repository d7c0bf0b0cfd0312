"""Stable Diffusion's UNet with an IP-Adapter (arXiv 2308.06721), 1.x, 2.x and XL: a picture is a prompt, too.

Each cross-attention has keys and values of its own for the embeddings of a picture, which come from a CLIP image
encoder; what it attends to there is added to what it attends to in the text, times a scale. The adapter is a file
beside the pipeline's folder (``--ip-adapter``), not a part of it; the model's configuration has its shapes under
``ip_adapter``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.bundle.safetensors_file import TensorFile
from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.models import unet2d_condition
from dipgo_deploy.models.family import InputSpec
from dipgo_deploy.models.image_encoder import side_of, states_of
from dipgo_deploy.models.joined import variant_name

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER, EMBEDS, SCALE = "ip_adapter", "image_embeds", "ip_adapter_scale"
ENCODER = "image_encoder"
_IMAGE, _LAYERS = "image_proj.", "ip_adapter."
# Tokens that the plain adapter makes of one embedding.
_TOKENS = 4


def read_adapter(file: Path, encoder: Path) -> dict[str, Any]:
    """What a configuration has of an adapter and its image encoder, from their headers and settings.

    ``embeds``: shape of what the encoder gives, (1, D) or, all its states, (1, T, D). ``states``: whether it is those.
    ``width``: of the text that the UNet takes. ``image_size``: pixels of the encoder's side.

    Raises:
        UserError: no such file, another kind of adapter, or an encoder that is not the adapter's.
    """
    try:
        tensors = {name: tensor.shape for name, tensor in TensorFile(file).tensors.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"--ip-adapter {file}: cannot be read as safetensors ({one_line(error)})") from None
    config = read_document(encoder / "config.json", "configuration of an image encoder", infinite=True)
    tokens, states_width = states_of(config)
    if f"{_IMAGE}proj.weight" in tensors:
        outputs, taken = tensors[f"{_IMAGE}proj.weight"]
        made, states, width = config.get("projection_dim", 512), False, outputs // _TOKENS
        embeds = [1, taken]
    elif f"{_IMAGE}latents" in tensors:
        taken, made, states = tensors[f"{_IMAGE}proj_in.weight"][1], states_width, True
        width = tensors[f"{_IMAGE}proj_out.weight"][0]
        embeds = [1, tokens, taken]
    else:
        raise UserError(
            f"--ip-adapter {file}: is none of the kinds that are supported, IP-Adapter and IP-Adapter Plus (FaceID and "
            "full-face adapters take other embeddings)"
        )
    if taken != made:
        raise UserError(
            f"--ip-adapter {file}: takes embeddings of {taken} numbers, {encoder} makes {made}; give the one that it "
            "was trained with (--image-encoder)"
        )
    return {"embeds": embeds, "states": states, "width": width, "image_size": side_of(config)}


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """The UNet's, ``image_embeds`` (batch, 1, [T,] D) and ``ip_adapter_scale`` float32 (batch,), 1 by default.

    Raises:
        UserError: as the UNet's; an adapter for another UNet.
    """
    own = unet2d_condition.FAMILY.inputs(config, batch, height, width, text_length)
    adapter = config[ADAPTER]
    (text,) = (spec for spec in own if spec.name == "encoder_hidden_states")
    if text.shape[2] != adapter["width"]:
        raise UserError(
            f"--ip-adapter: was made for a UNet whose text is {adapter['width']} wide, here it is {text.shape[2]}; use "
            "that one's adapter"
        )
    return (
        *own,
        InputSpec(EMBEDS, (batch, *adapter["embeds"]), "model", "condition", "image"),
        InputSpec(SCALE, (batch,), "float32", "condition", "fixed", values=(1.0,)),
    )


def attach(unet: Any, file: Path) -> None:
    """Give a UNet the adapter's layers, as ``load_ip_adapter`` of diffusers' pipelines does.

    Raises:
        UserError: an adapter whose layers are not those of this UNet.
    """
    from safetensors.torch import load_file

    parts: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(file).items():
        group, _, rest = name.partition(".")
        parts.setdefault(group, {})[rest] = tensor
    try:
        unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--ip-adapter {file}: its layers are not those of this UNet: {one_line(error)}") from error
    layers = 2 * len(list(_values(unet)))
    if layers != len(parts["ip_adapter"]):
        raise UserError(
            f"--ip-adapter {file}: has {len(parts['ip_adapter'])} matrices, this UNet has places for {layers}; use the "
            "adapter that was made for it"
        )


def _values(unet: Any) -> Iterator[nn.Module]:
    """The layers that make values of the picture's embeddings."""
    for processor in unet.attn_processors.values():
        yield from getattr(processor, "to_v_ip", ())


def scale_set(unet: Any) -> float:
    """What ``set_ip_adapter_scale`` of the pipelines has set.

    Raises:
        UserError: not the same for all layers.
    """
    scales = {
        float(scale) for processor in unet.attn_processors.values() for scale in getattr(processor, "scale", None) or ()
    }
    if len(scales) != 1:
        raise UserError("set_ip_adapter_scale: one scale for all layers is supported; give one number")
    return scales.pop()


@contextmanager
def _scaled(unet: Any, scale: Tensor) -> Iterator[None]:
    """Inside the context what is attended to in the picture is multiplied by ``scale`` (B,)."""

    def times(module: nn.Module, given: Any, values: Tensor) -> Tensor:
        # The number of pictures is folded into the batch of none: values are (B, 1, tokens, width).
        return values * scale.to(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))

    hooks = [layer.register_forward_hook(times) for layer in _values(unet)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C', h, w) under text and picture."""
    own = {name: tensor for name, tensor in conditions.items() if name not in (EMBEDS, SCALE)}
    with _scaled(model, conditions[SCALE]):
        return unet2d_condition.call(model, latent, timestep, own, [conditions[EMBEDS]])


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipelines hand to ``forward``; the scale is in the attention processors (``scale_set``)."""
    added = dict(kwargs["added_cond_kwargs"])
    (embeds,) = added.pop(EMBEDS)
    latent, timestep, seen = unet2d_condition.given(args, {**kwargs, "added_cond_kwargs": added})
    return latent, timestep, {**seen, EMBEDS: embeds}


FAMILY = replace(
    unet2d_condition.FAMILY,
    class_name=variant_name(unet2d_condition.FAMILY, "IPAdapter"),
    models="Stable Diffusion 1.x, 2.x, XL with an IP-Adapter",
    refused=("several IP-Adapters", "FaceID", "full face", "ip_adapter_masks"),
    inputs=inputs,
    call=call,
    given=given,
    pictures={EMBEDS: PictureUse(argument="ip_adapter_image", form="embeds")},
    adapter=ADAPTER,
    image_to_image=None,
)
