"""CLIP's image encoder, of which pictures become a condition: what its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo_deploy.errors import UserError

# What the runtime does with a picture before the encoder: the settings of CLIP's image processor, which are its
# defaults. Of sizes only the number counts, whatever it is called.
_PREPARED: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def side_of(config: Mapping[str, Any]) -> int:
    """Pixels of the side of the picture that it takes."""
    return int(config.get("image_size", 224))


def states_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many states it makes of a picture, and how wide each is."""
    return (side_of(config) // int(config.get("patch_size", 32))) ** 2 + 1, int(config.get("hidden_size", 768))


def check_processor(where: object, processor: Mapping[str, Any], encoder: Mapping[str, Any]) -> None:
    """Refuse (UserError) a preparation of pictures that is not CLIP's for this encoder. where: its file."""
    for key, value in _PREPARED.items():
        if processor.get(key, value) != value:
            raise UserError(f"{where}: {key} = {processor[key]!r}: pictures are prepared with {value!r} only")
    for key in ("size", "crop_size"):
        given = processor.get(key, side_of(encoder))
        sides = set(given.values()) if isinstance(given, Mapping) else {given}
        if sides != {side_of(encoder)}:
            raise UserError(f"{where}: {key} = {given!r}, its image encoder takes {side_of(encoder)} pixels")
