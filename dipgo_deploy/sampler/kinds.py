"""What a sampler expects of a model: the noise of a diffusion, the velocity of a flow, or a preconditioned output.

Names and settings only, without diffusers: a sampler of another kind than the model's runs and draws nothing of use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dipgo_deploy.errors import UserError

Kind = Literal["diffusion", "flow", "edm", "trigflow"]

_BY_CLASS: Mapping[str, Kind] = {
    "FlowMatch": "flow",
    "FlowMap": "flow",
    "LTXEulerAncestralRF": "flow",
    "Helios": "flow",
    "MiniMaxH3": "flow",
    "Piflow": "flow",
    "RFD4Proteina": "flow",
    "EDM": "edm",
    "CosineDPMSolver": "edm",
    "CMStochasticIterative": "edm",
    "SCM": "trigflow",
}
"""Beginning of a diffusers class -> its kind, where the class has no other."""

_WORDS: Mapping[Kind, str] = {
    "diffusion": "diffusion models (prediction of noise, v or the picture)",
    "flow": "flow matching",
    "edm": "EDM's preconditioned models",
    "trigflow": "TrigFlow models",
}


def kind_of(class_name: str, config: Mapping[str, Any]) -> Kind:
    """The kind of a diffusers scheduler by class and configuration."""
    for beginning, kind in _BY_CLASS.items():
        if class_name.startswith(beginning):
            return kind
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas") is True
    return "flow" if flow else "diffusion"


def check_kind(class_name: str, config: Mapping[str, Any], expected: Kind) -> None:
    """Refuse (UserError) a sampler of another kind than the model's."""
    kind = kind_of(class_name, config)
    if kind == expected:
        return
    names = {"flow": "flow-euler, flow-heun, flow-unipc or flow-dpm++2m", "diffusion": "ddim, dpm++2m, euler or unipc"}
    use = names.get(expected)
    raise UserError(
        f"sampler {class_name}: is for {_WORDS[kind]}, but this model is for {_WORDS[expected]}; "
        + (f"use {use}" if use else "use the model's own sampler")
    )
