"""Diffusers pipelines that are in memory only, saved for what reads models from folders."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dipgo_deploy.bundle.staging import scratch_directory
from dipgo_deploy.errors import OneLineError, UserError
from dipgo_deploy.models.location import INDEX, lasting_name


def is_pipeline(model: object) -> bool:
    """Whether ``model`` is a diffusers pipeline; imports nothing of diffusers for a name, a path or a number."""
    if type(model).__module__.partition(".")[0] in sys.stdlib_module_names:
        return False
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(model, diffusers.DiffusionPipeline)


def pipeline_name(pipeline: Any) -> str:
    """Where a pipeline was loaded from; its class where it was put together in memory."""
    return lasting_name(str(pipeline.name_or_path or type(pipeline).__name__))


@contextlib.contextmanager
def saved_pipeline(pipeline: Any, target: Path) -> Iterator[str]:
    """A folder with ``pipeline`` as it is now, gone when the block ends. It takes the weights' size on the disk of
    ``target``, beside which it lies.

    Raises:
        UserError: LoRA adapters that are not merged into the weights; what the block raises, with "the pipeline" in
            place of the folder.
    """
    for name, part in pipeline.components.items():
        if getattr(part, "peft_config", None):
            raise UserError(
                f"model: the pipeline's {name} has adapters beside its weights: call fuse_lora and "
                "unload_lora_weights first, or give their files to dipgo-run --lora"
            )
    with scratch_directory(target) as scratch:
        folder = scratch / "model"
        pipeline.save_pretrained(folder)
        labels = getattr(pipeline, "labels", None)
        if labels:  # DiTPipeline reads its classes' names from there and does not save them
            names: dict[str, list[str]] = {}
            for label, number in labels.items():
                names.setdefault(str(number), []).append(label)
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            index["id2label"] = {number: ", ".join(several) for number, several in names.items()}
            (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        try:
            yield str(folder)
        except OneLineError as error:
            raise type(error)(str(error).replace(str(folder), "the pipeline")) from error
