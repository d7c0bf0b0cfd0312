"""What the key of a tensor in a LoRA file says: its layer, and which part of that layer's change it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Role = Literal["down", "up", "up_bias", "alpha", "weight", "bias"]

_PAIR = r"(?:\.lora_linear_layer|\.lora)?"
# Ends of keys by role; `weight` and `bias` are differences that are added as they are.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("down", re.compile(_PAIR + r"\.(?:lora_A(?:\.\w+)?|lora_down|down)\.weight$")),
    ("up", re.compile(_PAIR + r"\.(?:lora_B(?:\.\w+)?|lora_up|up)\.weight$")),
    ("up_bias", re.compile(r"\.(?:lora_B(?:\.\w+)?|lora_up)\.bias$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("weight", re.compile(r"\.(?:diff|w_norm)$")),
    ("bias", re.compile(r"\.(?:diff_b|b_norm)$")),
)
# What else changes weights, for the message; the layer's name is what comes before.
_OTHERS = {
    "DoRA": re.compile(r"\.(lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale)$"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
    "LoCon with a middle matrix": re.compile(r"\.lora_mid\.weight$"),
    "an embedding's LoRA": re.compile(r"\.lora_embedding_[AB](\.\w+)?$"),
    "a whole layer (modules_to_save)": re.compile(r"\.modules_to_save(\.\w+)?\.(weight|bias)$"),
    "a whole weight": re.compile(r"\.(weight|bias|scale|set_weight)$"),
}
_UNKNOWN = "an unknown kind of change"

_PEFT_PREFIX = "base_model.model."
_DENOISER = ("denoiser",)
_T5 = ("text_encoder_3", "text_encoder_2")
# Prefix, components that it can mean (the first that the model has), whether the path has underscores for dots.
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("unet.", _DENOISER),
    ("transformer.", _DENOISER),
    ("model.diffusion_model.", _DENOISER),
    ("diffusion_model.", _DENOISER),
    ("lora_unet_", _DENOISER),
    ("lora_transformer_", _DENOISER),
    ("lycoris_", _DENOISER),
    ("text_encoder.", ("text_encoder",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder_3.", ("text_encoder_3",)),
    ("text_encoders.clip_l.transformer.", ("text_encoder",)),
    ("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    ("text_encoders.t5xxl.transformer.", _T5),
    ("lora_te_", ("text_encoder",)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", _T5),
    # a text encoder that PEFT wrote alone; this level of the path may be missing anyway
    ("text_model.", ("text_encoder",)),
)
# diffusers' attention processors: `attn1.processor.to_out_lora` is the update of `attn1.to_out.0`, and in a text
# encoder `self_attn.to_q_lora` that of `self_attn.q_proj`.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora$")
_ENCODER_PROCESSOR = re.compile(r"\.to_(q|k|v|out)_lora$")


@dataclass(frozen=True)
class Layer:
    """The layer that a key is about.

    components: what it can be a layer of, ``denoiser``, ``text_encoder``, ``text_encoder_2`` or ``text_encoder_3``;
    the first that the model has. module: its path as the file has it.
    """

    components: tuple[str, ...]
    module: str

    @property
    def name(self) -> str:
        """For messages and reports."""
        return f"{self.components[0]}: {self.module}"


def layer_of(path: str) -> Layer:
    """The layer of a key without its end."""
    path = path.removeprefix(_PEFT_PREFIX)
    for prefix, components in _PREFIXES:
        if path.startswith(prefix):
            module = path.removeprefix(prefix)
            if components != _DENOISER:
                module = _ENCODER_PROCESSOR.sub(lambda match: f".{match[1]}_proj", module)
            return Layer(components, _denoiser_module(module))
    return Layer(_DENOISER, _denoiser_module(path))


def _denoiser_module(module: str) -> str:
    return _PROCESSOR.sub(lambda match: ".to_out.0" if match[1] == "out" else f".to_{match[1]}", module)


def split_key(key: str) -> tuple[str, Role | None]:
    """The key without its end, and the end's role; (layer's path, None) where the end is not one that is applied."""
    for role, pattern in _ROLES:
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], role
    for pattern in _OTHERS.values():
        match = pattern.search(key)
        if match is not None:
            return key[: match.start()], None
    return key, None


def kind_of_key(key: str) -> str:
    """What a key that is not applied is, in words."""
    return next((kind for kind, pattern in _OTHERS.items() if pattern.search(key)), _UNKNOWN)


def written_by_peft(key: str) -> bool:
    """Whether PEFT itself wrote the key, with its configuration in a file beside it."""
    return key.startswith(_PEFT_PREFIX)
