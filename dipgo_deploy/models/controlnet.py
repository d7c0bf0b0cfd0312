"""Stable Diffusion's UNet with a ControlNet beside it (arXiv 2302.05543): ``UNet2DConditionModel`` and
``ControlNetModel`` of a pipeline that has both, 1.x, 2.x and XL.

The ControlNet sees the current latent, so it runs at every evaluation as the UNet does: it is traced together with it,
as one more unit ``controlnet`` in front of the UNet's own, at both granularities (10 and 25 units for SD-1.5). Its
cached outputs are the tensors that it adds to the UNet's skips and to the mid block's output, times the conditioning
scale.

As the model of a schedule it has a name of its own, and a configuration that is the UNet's with the ControlNet's in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models import unet2d_condition
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.models.unet_text import VAE_SCALE

if TYPE_CHECKING:
    from torch import Tensor, nn

COMPONENT = "controlnet"
CONTROLNET = "ControlNetModel"
CLASS_NAME = f"{unet2d_condition.CLASS_NAME}+{CONTROLNET}"
PICTURE, SCALE = "controlnet_cond", "controlnet_conditioning_scale"

# Settings of a ControlNet that make it something else than `call` runs.
_REFUSED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "global_pool_conditions")


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The ControlNet, then the UNet's blocks; raises as those do."""
    return (
        BlockSpec(name=COMPONENT, modules=(COMPONENT,)),
        *unet2d_condition.blocks(config, granularity),
    )


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """The UNet's inputs, ``controlnet_cond`` (batch, 3, 8 height, 8 width), a picture in [0, 1], and
    ``controlnet_conditioning_scale`` float32 (batch,), 1 by default.

    Raises:
        UserError: as the UNet's; a ControlNet that needs more than that.
    """
    if config.get("time_cond_proj_dim") is not None:
        raise UserError(f"{CLASS_NAME}: time_cond_proj_dim (LCM) is not supported with a ControlNet; use another UNet")
    control: Mapping[str, Any] = config[COMPONENT]
    for key in _REFUSED:
        if control.get(key):
            raise UserError(f"{CONTROLNET}: {key} = {control[key]!r} is not supported; use another ControlNet")
    channels = int(control.get("conditioning_channels", 3))
    if channels != 3:
        raise UserError(f"{CONTROLNET}: conditioning_channels = {channels}: only pictures with 3 are supported")
    return (
        *unet2d_condition.inputs(config, batch, height, width, text_length),
        InputSpec(PICTURE, (batch, channels, height * VAE_SCALE, width * VAE_SCALE), "model", "condition", "image"),
        InputSpec(SCALE, (batch,), "float32", "condition", "fixed", values=(1.0,)),
    )


def join(unet: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """The UNet with the ControlNet as its submodule ``controlnet``, which returns a flat tuple of what it adds."""
    from torch import nn

    class Branch(nn.Module):
        """A ControlNet as a unit: its outputs are tensors in tuples, which is what can be cut."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, latent: Tensor, scale: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
            """The skips' additions, the mid block's last, each times ``scale`` (B,)."""
            downs, mid = self.net(latent, conditioning_scale=1.0, return_dict=False, **keywords)
            factor = scale.to(mid.dtype).reshape(-1, 1, 1, 1)
            return tuple(tensor * factor for tensor in (*downs, mid))

    unet.add_module(COMPONENT, Branch(others[COMPONENT]))
    return unet


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C', h, w) of the UNet with what its ControlNet adds."""
    shared: dict[str, Any] = {
        "timestep": timestep,
        "encoder_hidden_states": conditions["encoder_hidden_states"],
        "added_cond_kwargs": {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
        or None,
    }
    branch = model.get_submodule(COMPONENT)
    *downs, mid = branch(latent, conditions[SCALE], controlnet_cond=conditions[PICTURE].to(latent.dtype), **shared)
    prediction: Tensor = model(
        latent,
        down_block_additional_residuals=tuple(downs),
        mid_block_additional_residual=mid,
        return_dict=False,
        **shared,
    )[0]
    return prediction


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
    models="the same with a ControlNet",
    refused=("several ControlNets",),
    component="unet",
    blocks=blocks,
    inputs=inputs,
    latent_channels=unet2d_condition.latent_channels,
    granularities=("block", "layer"),
    call=call,
    text=unet2d_condition.text,
    companions={COMPONENT: CONTROLNET},
    pictures={PICTURE: PictureUse()},
    join=join,
)
