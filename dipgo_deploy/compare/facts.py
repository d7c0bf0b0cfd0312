"""What a manifest says of prompts, classes, sizes and defaults, against what the model says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dipgo_deploy.compare.report import Part
from dipgo_deploy.reference.conditions import has_text_encoder

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.reference.load import Reference

NAME = "manifest"


def check_facts(manifest: Manifest, reference: Reference) -> list[Part]:
    """One part for each field that differs, or one for all. The manifest is that of one choice of sizes."""
    source, components = reference.source, manifest.components
    distilled = any(spec.source == "guidance" for spec in reference.conditions)
    guided = manifest.guidance or distilled
    default = source.default_guidance_scale(from_picture=manifest.sampler.strength is not None) if guided else None
    facts: dict[str, tuple[Any, Any]] = {
        "guidance_scale": (manifest.guidance_scale, default),
        "guidance_off": (manifest.guidance_off, source.family.guide.off),
    }
    for spec in reference.conditions:
        if spec.source == "class":
            facts["components.null_class"] = (components.null_class, spec.null)
            facts["components.classes"] = (components.classes, source.config.get("num_class_embeds"))
    if manifest.latent.scale is not None:
        facts["latent.scale"] = (manifest.latent.scale, source.scale)
    labels = getattr(source.pipeline, "labels", None)
    if components.class_labels is not None and labels:
        facts["components.class_labels"] = (components.class_labels, dict(labels))
    given = {spec.name: spec for spec in manifest.conditions}
    for wanted in reference.conditions:
        found = given[wanted.name]
        facts[f"condition {wanted.name}, source"] = (found.source, wanted.source)
        if wanted.source == "fixed":
            facts[f"condition {wanted.name}, values"] = (tuple(found.values), tuple(wanted.values))
    facts |= _text(manifest, reference)
    wrong = [
        Part(NAME, name, "the model", (), f"is {found!r}, the model's is {wanted!r}")
        for name, (found, wanted) in facts.items()
        if found != wanted
    ]
    return wrong or [Part(NAME, "", "the model", ())]


def _text(manifest: Manifest, reference: Reference) -> dict[str, tuple[Any, Any]]:
    encoder, scheme = manifest.components.text_encoder, reference.source.text
    if encoder is None or scheme is None or not has_text_encoder(reference.source):
        return {}
    facts: dict[str, tuple[Any, Any]] = {
        name: (getattr(encoder, name), getattr(scheme, name))
        for name in ("zeros_without_negative", "lowercase", "prefix", "around", "removed", "unescape")
    }
    for entry, spec in zip(encoder.tokenizers, scheme.tokenizers, strict=False):
        tokenizer = spec.of(reference.source.pipeline)
        facts |= {
            f"{spec.attribute}, length": (entry.length, spec.length),
            f"{spec.attribute}, pad_id": (entry.pad_id, int(tokenizer.pad_token_id)),
            f"{spec.attribute}, ids": (entry.ids, spec.ids),
            f"{spec.attribute}, mask": (entry.mask, spec.mask),
            f"{spec.attribute}, padding": (entry.padding, spec.padding),
            f"{spec.attribute}, special": (entry.special, spec.special),
            f"{spec.attribute}, plain": (entry.plain, spec.plain),
        }
    facts["tokenizers"] = (len(encoder.tokenizers), len(scheme.tokenizers))
    return facts
