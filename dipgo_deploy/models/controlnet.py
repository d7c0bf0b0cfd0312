"""A denoiser with ControlNets beside it (arXiv 2302.05543): ``UNet2DConditionModel`` of Stable Diffusion 1.x, 2.x and
XL with one or several ``ControlNetModel``, FLUX.1's and Stable Diffusion 3's transformers with one of theirs.

A ControlNet sees the current latent, so it runs at every evaluation as the denoiser does: it is traced together with
it, as one more unit ``controlnet`` (``controlnet_1``, ...) in front of the denoiser's own, at both granularities (10
and 25 units for SD-1.5). Its cached outputs are the tensors that it adds to what the denoiser's blocks hand on, times
the conditioning scale.

As the model of a schedule the pair has a name of its own, and a configuration that is the denoiser's with the
ControlNets' in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models import flux, sd3, unet2d_condition
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, numbered
from dipgo_deploy.models.packed import PACK, pack
from dipgo_deploy.models.unet_text import VAE_SCALE

if TYPE_CHECKING:
    from torch import Tensor, nn

COMPONENT = "controlnet"
CONTROLNET = "ControlNetModel"
CLASS_NAME = f"{unet2d_condition.CLASS_NAME}+{CONTROLNET}"
PICTURE, SCALE = "controlnet_cond", "controlnet_conditioning_scale"
# ControlNets of one model: the names of their conditions are known before any model is.
MOST = 8

# Settings of a ControlNet that make it something else than `call` runs.
_REFUSED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "global_pool_conditions")


def nets(config: Mapping[str, Any]) -> list[str]:
    """The names of the ControlNets that a configuration has: ``controlnet``, ``controlnet_1``, ...

    Raises:
        UserError: more than 8.
    """
    names = numbered(COMPONENT, config)
    if len(names) > MOST:
        raise UserError(f"{COMPONENT}: {len(names)} ControlNets; at most {MOST} are supported")
    return names


def _suffix(net: str) -> str:
    return net.removeprefix(COMPONENT)


def _with_nets(
    family: ModelFamily,
    companion: str,
    control: Callable[[Mapping[str, Any], Sequence[str], int, int, int], Sequence[InputSpec]],
    use: PictureUse,
    **changes: Any,
) -> ModelFamily:
    """A family with ControlNets of class ``companion``.

    control(config, names, batch, height, width): the conditions that the ControlNets look at, after a check of their
    settings.
    """

    def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
        own = tuple(BlockSpec(name=net, modules=(net,)) for net in nets(config))
        return (*own, *family.blocks(config, granularity))

    def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text: int) -> tuple[InputSpec, ...]:
        names = nets(config)
        scales = [
            InputSpec(f"{SCALE}{_suffix(net)}", (batch,), "float32", "condition", "fixed", values=(1.0,))
            for net in names
        ]
        pairs = zip(control(config, names, batch, height, width), scales, strict=True)
        return (*family.inputs(config, batch, height, width, text), *(spec for pair in pairs for spec in pair))

    suffixes = ["", *(f"_{place}" for place in range(1, MOST))]
    several = bool(changes.get("several"))
    return replace(
        family,
        class_name=f"{family.class_name}+{companion}",
        blocks=blocks,
        inputs=inputs,
        companions={COMPONENT: companion},
        join=join,
        pictures={
            f"{PICTURE}{suffix}": use.model_copy(update={"place": place})
            for place, suffix in enumerate(suffixes if several else suffixes[:1])
        },
        given=changes.pop("given", None),
        image_to_image=None,
        refused=changes.pop("refused", ()),
        **changes,
    )


def join(denoiser: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """The denoiser with each ControlNet as a submodule of its name, which returns a flat tuple of what it adds."""
    from torch import nn

    class Branch(nn.Module):
        """A ControlNet as a unit: its outputs are tensors in tuples, which is what can be cut."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, latent: Tensor, scale: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
            """All that is added, each times ``scale`` (B,), in the order in which the ControlNet returns it."""
            added = self.net(latent, conditioning_scale=1.0, return_dict=False, **keywords)
            tensors = [one for part in added if part is not None for one in (part if _is_many(part) else (part,))]
            factor = scale.to(tensors[0].dtype).reshape(-1, *(1,) * (tensors[0].ndim - 1))
            return tuple(tensor * factor for tensor in tensors)

    for name, net in others.items():
        denoiser.add_module(name, Branch(net))
    return denoiser


def _is_many(part: Any) -> bool:
    return isinstance(part, tuple | list)


def _added(
    model: nn.Module, conditions: Mapping[str, Tensor], run: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What all ControlNets add together. run(branch, picture, scale): what one does."""
    total: tuple[Tensor, ...] = ()
    for place in range(MOST):
        suffix = f"_{place}" if place else ""
        if f"{PICTURE}{suffix}" not in conditions:
            break
        branch = model.get_submodule(f"{COMPONENT}{suffix}")
        added = run(branch, conditions[f"{PICTURE}{suffix}"], conditions[f"{SCALE}{suffix}"])
        total = tuple(one + other for one, other in zip(total, added, strict=True)) if total else added
    return total


def _others(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's own conditions."""
    return {name: tensor for name, tensor in conditions.items() if not name.startswith((PICTURE, SCALE))}


def _unet_control(
    config: Mapping[str, Any], names: Sequence[str], batch: int, height: int, width: int
) -> list[InputSpec]:
    """``controlnet_cond`` (batch, 3, 8 height, 8 width), a picture in [0, 1], of each.

    Raises:
        UserError: a ControlNet that needs more than that.
    """
    if config.get("time_cond_proj_dim") is not None:
        raise UserError(f"{CLASS_NAME}: time_cond_proj_dim (LCM) is not supported with a ControlNet; use another UNet")
    for net in names:
        for key in _REFUSED:
            if config[net].get(key):
                raise UserError(f"{CONTROLNET}: {key} = {config[net][key]!r} is not supported; use another ControlNet")
        channels = int(config[net].get("conditioning_channels", 3))
        if channels != 3:
            raise UserError(f"{CONTROLNET}: conditioning_channels = {channels}: only pictures with 3 are supported")
    shape = (batch, 3, height * VAE_SCALE, width * VAE_SCALE)
    return [InputSpec(f"{PICTURE}{_suffix(net)}", shape, "model", "condition", "image") for net in names]


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C', h, w) of the UNet with what its ControlNets add."""
    shared: dict[str, Any] = {
        "timestep": timestep,
        "encoder_hidden_states": conditions["encoder_hidden_states"],
        "added_cond_kwargs": {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
        or None,
    }
    *downs, mid = _added(
        model,
        conditions,
        lambda branch, picture, scale: branch(latent, scale, controlnet_cond=picture.to(latent.dtype), **shared),
    )
    prediction: Tensor = model(
        latent,
        down_block_additional_residuals=tuple(downs),
        mid_block_additional_residual=mid,
        return_dict=False,
        **shared,
    )[0]
    return prediction


def _flux_control(
    config: Mapping[str, Any], names: Sequence[str], batch: int, height: int, width: int
) -> list[InputSpec]:
    """``controlnet_cond`` (batch, C, height, width): latents of a picture.

    Raises:
        UserError: a ControlNet with modes (Union) or that looks at pixels (XLabs'), or is distilled from guidance where
            the transformer is not.
    """
    net = config[names[0]]
    for key in ("num_mode", "conditioning_embedding_channels"):
        if net.get(key) is not None:
            raise UserError(f"FluxControlNetModel: {key} = {net[key]!r} is not supported; use another ControlNet")
    if net.get("guidance_embeds") and not config["guidance_embeds"]:
        raise UserError("FluxControlNetModel: guidance_embeds: takes a guidance scale, its transformer takes none")
    if net.get("in_channels", 64) != config["in_channels"]:
        raise UserError(f"FluxControlNetModel: in_channels {net.get('in_channels')}, but {config['in_channels']} here")
    shape = (batch, flux.latent_channels(config), height, width)
    return [InputSpec(PICTURE, shape, "model", "condition", "image")]


def flux_call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w) of FLUX's transformer with what its ControlNet adds to both kinds of blocks."""
    branch: Any = model.get_submodule(COMPONENT)
    net, own = branch.net, _others(conditions)
    tokens, picture = pack(latent), pack(conditions[PICTURE].to(latent.dtype))
    rows, columns = latent.shape[2] // PACK, latent.shape[3] // PACK
    shared = dict(own) if net.config.guidance_embeds else {**own, "guidance": None}
    with flux.prepared(net, timestep, shared, rows, columns) as keywords:
        added = branch(tokens, conditions[SCALE], controlnet_cond=picture, **keywords)
    count = len(net.controlnet_blocks)
    extra = {"controlnet_block_samples": list(added[:count]) or None}
    extra["controlnet_single_block_samples"] = list(added[count:]) or None
    return flux.call(model, latent, timestep, own, **extra)


def _sd3_control(
    config: Mapping[str, Any], names: Sequence[str], batch: int, height: int, width: int
) -> list[InputSpec]:
    """``controlnet_cond`` (batch, C, height, width): latents of a picture, without the VAE's shift.

    Raises:
        UserError: a ControlNet of another kind than the published ones of SD3 (InstantX).
    """
    net = config[names[0]]
    usual = {"use_pos_embed": True, "force_zeros_for_pooled_projection": True, "extra_conditioning_channels": 0}
    for key, value in usual.items():
        if net.get(key, value) != value:
            raise UserError(f"SD3ControlNetModel: {key} = {net[key]!r} is not supported, only {value!r}")
    if net.get("joint_attention_dim", 0) is None:
        raise UserError("SD3ControlNetModel: joint_attention_dim = None (SD3.5 large's) is not supported")
    return [InputSpec(PICTURE, (batch, int(config["in_channels"]), height, width), "model", "condition", "image")]


def sd3_call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w) of SD3's transformer with what its ControlNet, which sees no pooled text, adds."""
    states, pooled = conditions["encoder_hidden_states"], conditions["pooled_projections"]
    added = model.get_submodule(COMPONENT)(
        latent,
        conditions[SCALE],
        controlnet_cond=conditions[PICTURE].to(latent.dtype),
        timestep=timestep,
        encoder_hidden_states=states,
        pooled_projections=pooled.new_zeros(pooled.shape),
    )
    prediction: Tensor = model(
        latent,
        timestep=timestep,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        block_controlnet_hidden_states=list(added),
        return_dict=False,
    )[0]
    return prediction


FAMILY = _with_nets(
    unet2d_condition.FAMILY,
    CONTROLNET,
    _unet_control,
    PictureUse(),
    pipelines=("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"),
    models="Stable Diffusion 1.x, 2.x, XL with ControlNets",
    refused=("ControlNetUnionModel", "guess_mode", "control_guidance_start and _end"),
    call=call,
    several={COMPONENT: "MultiControlNetModel"},
)
FLUX = _with_nets(
    flux.FAMILY,
    "FluxControlNetModel",
    _flux_control,
    PictureUse(form="latents", drawn="before", each=True),
    pipelines=("FluxControlNetPipeline",),
    models="FLUX.1 with a ControlNet",
    refused=("several ControlNets", "Union (control_mode)", "XLabs' ControlNets"),
    call=flux_call,
    given=flux.given,
)
SD3 = _with_nets(
    sd3.FAMILY,
    "SD3ControlNetModel",
    _sd3_control,
    PictureUse(form="latents", drawn="apart", each=True, shifted=False),
    pipelines=("StableDiffusion3ControlNetPipeline",),
    models="Stable Diffusion 3 with a ControlNet",
    refused=("several ControlNets", "SD3.5 large's ControlNets"),
    call=sd3_call,
)
