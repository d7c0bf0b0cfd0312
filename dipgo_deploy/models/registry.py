"""The known model families, by diffusers class name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import controlnet, dit, flux, pixart, sana, sd3, unet2d, unet2d_condition
from dipgo_deploy.models.family import ModelFamily

FAMILIES: Mapping[str, ModelFamily] = MappingProxyType(
    {
        family.class_name: family
        for family in (
            unet2d_condition.FAMILY,
            controlnet.FAMILY,
            unet2d.FAMILY,
            dit.FAMILY,
            flux.FAMILY,
            sd3.FAMILY,
            pixart.FAMILY,
            sana.FAMILY,
        )
    }
)


def family_for(class_name: str) -> ModelFamily:
    """The family of diffusers class ``class_name``.

    Raises:
        UserError: no family has this class; the message lists the known ones.
    """
    try:
        return FAMILIES[class_name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model class {class_name!r} is not supported: use one of {known}") from None
