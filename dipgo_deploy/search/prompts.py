"""What images are made of during a search: prompts from a file, or class labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.quality.judge import CLASS_NAMES


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; blank lines do not count.

    Raises:
        UserError: no such file, not text, or no prompt in it.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; give a text file, one prompt a line") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def built_in_prompts(model: str) -> tuple[str, ...] | None:
    """The prompts that the built-in text model was trained with; None for any other model."""
    if model != "fashion-sd":
        return None
    return tuple(f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASS_NAMES)


def known_labels(labels: Mapping[str, int], model_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The class labels that a pipeline names (name -> label), or all that its denoiser has an embedding for."""
    return tuple(sorted(set(labels.values()))) or tuple(range(class_count(model_config) or 0))


def class_count(model_config: Mapping[str, Any]) -> int | None:
    """How many classes a denoiser has an embedding for, the null class not counted; None for one without classes."""
    count = model_config.get("num_embeds_ada_norm", model_config.get("num_class_embeds"))
    return None if count is None else int(count)


def check_labels(labels: tuple[int, ...], model_config: Mapping[str, Any]) -> None:
    """Refuse (UserError) labels that the model has no embedding for."""
    count = class_count(model_config) or 0
    for label in labels:
        if not 0 <= label < count:
            raise UserError(f"--class-labels: {label} is no class of this model; give 0 to {count - 1}")
