"""The tables of supported models in ``README.md`` and ``docs/models.md``, from the registry and the published sizes.

``python -m tools.model_table`` writes them between their marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dipgo_deploy.lora.merge import KIND_OF_CLASS
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.registry import BUILT_IN
from tools.full_size import models

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- python -m tools.model_table: begin -->", "<!-- end -->"


def tables() -> dict[Path, str]:
    """The table of each file."""
    published = list(models().values())
    return {ROOT / "README.md": _short(), ROOT / "docs/models.md": _whole(published)}


def placed(text: str, table: str) -> str:
    """A file's text with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"no {BEGIN} and {END} in it")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def _short() -> str:
    headings = ("model", "diffusers class", "image-to-image", "pictures it needs", "video")
    rows = [
        (family.models, _classes(family), _from_picture(family), _pictures(family), _video(family))
        for family in BUILT_IN
    ]
    return _markdown(headings, rows)


def _whole(published: Sequence[dict[str, Any]]) -> str:
    headings = (
        *("model", "diffusers class", "pipelines", "units: blocks / layers", "caches", "open sizes"),
        *("image-to-image", "pictures it needs", "ControlNet", "LoRA", "video", "refused"),
    )
    with_control = {family.diffusers_class for family in BUILT_IN if "controlnet" in family.companions}
    rows = []
    for family in BUILT_IN:
        entries = [entry for entry in published if _is_of(entry, family)]
        units = [(entry["name"], *_counts(family, entry["config"])) for entry in entries]
        kinds = {
            kind for spec in family.blocks(entries[0]["config"] if entries else {}, "block") for kind in spec.caches
        }
        rows.append(
            (
                family.models,
                _classes(family),
                ", ".join(f"`{name}`" for name in family.pipelines),
                ", ".join(f"{name} {blocks} / {layers}" for name, blocks, layers in units) or "as without",
                ", ".join(sorted(kinds, reverse=True)),
                _open(family),
                _from_picture(family),
                _pictures(family),
                "is one" if "controlnet" in family.companions else _yes(family.class_name in with_control or None),
                "yes, with its authors' names too" if family.diffusers_class in KIND_OF_CLASS else "yes",
                _video(family),
                ", ".join(family.refused),
            )
        )
    return _markdown(headings, rows)


def _is_of(entry: dict[str, Any], family: ModelFamily) -> bool:
    """Whether a published model has the blocks of this family's denoiser, or of each where it has several."""
    several = tuple(entry.get("pipeline", {}).get("denoisers", ("",)))
    if len(family.denoisers) > 1 or len(several) > 1:
        return entry["class_name"] == family.diffusers_class and several == family.denoisers
    # A variant without companions has the blocks of its class.
    return entry["class_name"] == (family.class_name if family.companions else family.diffusers_class)


def _counts(family: ModelFamily, config: dict[str, Any]) -> tuple[int, int]:
    return len(family.blocks(config, "block")), len(family.blocks(config, "layer"))


def _classes(family: ModelFamily) -> str:
    return " with ".join(f"`{name}`" for name in (family.diffusers_class, *family.companions.values()))


def _from_picture(family: ModelFamily) -> str:
    return "only" if family.starts else _yes(family.image_to_image)


def _pictures(family: ModelFamily) -> str:
    """The options of dipgo-run that give them."""
    uses = family.pictures.values()
    start = ["image"] if family.starts else []
    arguments = dict.fromkeys([*start, *(use.argument for use in uses), *("mask_image" for use in uses if use.masked)])
    return ", ".join(f"`--{argument.replace('_', '-')}`" for argument in arguments) or "none"


def _open(family: ModelFamily) -> str:
    if family.frames_per_latent is not None:
        return "none"
    return "batch" if family.size_multiple is None else "batch, height, width"


def _yes(value: object) -> str:
    return "no" if value is None else "yes"


def _video(family: ModelFamily) -> str:
    return _yes(family.frames_per_latent)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (headings, ["---"] * len(headings), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write them."""
    for path, table in tables().items():
        path.write_text(placed(path.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
