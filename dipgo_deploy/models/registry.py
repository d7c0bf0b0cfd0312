"""The known model families, by diffusers class name: the built-in ones, and those of other packages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.models import (
    auraflow,
    chroma,
    controlnet,
    dit,
    flux,
    flux2,
    hunyuan,
    ip_adapter,
    ltx,
    ltx_image,
    pixart,
    qwenimage,
    qwenimage_edit,
    sana,
    sd3,
    unet2d,
    unet2d_condition,
    wan,
    wan_first,
    wan_image,
    zimage,
)
from dipgo_deploy.models.family import ModelFamily

GROUP = "dipgo_deploy.families"
"""Group of the entry points by which other packages declare families: each names a `ModelFamily`."""

BUILT_IN = (
    unet2d_condition.FAMILY,
    controlnet.FAMILY,
    ip_adapter.FAMILY,
    unet2d_condition.INPAINT,
    unet2d_condition.REFINER,
    unet2d.FAMILY,
    dit.FAMILY,
    flux.FAMILY,
    flux.FILL,
    flux.CONTROL,
    flux.KONTEXT,
    controlnet.FLUX,
    flux2.FAMILY,
    chroma.FAMILY,
    auraflow.FAMILY,
    sd3.FAMILY,
    controlnet.SD3,
    pixart.FAMILY,
    qwenimage.FAMILY,
    qwenimage_edit.FAMILY,
    zimage.FAMILY,
    sana.FAMILY,
    wan.FAMILY,
    wan.TWO,
    wan_first.FAMILY,
    wan_image.FAMILY,
    wan_image.TWO,
    ltx.FAMILY,
    ltx_image.FAMILY,
    hunyuan.FAMILY,
)

_log = logging.getLogger(__name__)


@functools.cache
def families() -> Mapping[str, ModelFamily]:
    """All families by class name, those of other packages behind the built-in ones.

    An entry point that cannot be loaded, names no family or one of a class that is there already is left out, with one
    line of warning.
    """
    found = {family.class_name: family for family in BUILT_IN}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            family = _loaded(entry)
            if family.class_name in found:
                raise UserError(f"there is a family for {family.class_name} already")
        except UserError as error:
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            _log.warning(
                "model family %s (%s) of %s: %s; it is left out: correct or uninstall the package",
                *(entry.name, entry.value, package, error),
            )
        else:
            found[family.class_name] = family
    return MappingProxyType(found)


def _loaded(entry: EntryPoint) -> ModelFamily:
    try:
        family = entry.load()
    except Exception as error:  # code of others
        raise UserError(f"cannot be loaded ({type(error).__name__}: {one_line(error, 200)})") from error
    if not isinstance(family, ModelFamily):
        raise UserError(f"is a {type(family).__name__}, not a ModelFamily")
    return family


def family_for(class_name: str) -> ModelFamily:
    """The family of diffusers class ``class_name``.

    Raises:
        UserError: no family has this class; the message lists the known ones.
    """
    try:
        return families()[class_name]
    except KeyError:
        known = ", ".join(sorted(families()))
        raise UserError(f"model class {class_name!r} is not supported; use one of {known}") from None
