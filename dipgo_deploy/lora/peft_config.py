"""PEFT's configuration of a LoRA: the factor of each layer's update, and what of it is not low-rank updates alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipgo_deploy.documents import json_object, read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.keys import layer_of
from dipgo_deploy.lora.patterns import PatternError, Patterns

ADAPTER_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
_CONFIG_BYTES = 4 * 2**20
# PEFT's own default.
_DEFAULT_ALPHA = 8
# Ways to begin a training that leave the model's own weights as they are; others train beside changed ones.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)


class PeftConfig:
    """The configuration of one component."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        """Check a configuration.

        Args:
            where: the file, for messages.
            fields: PEFT's ``LoraConfig`` as JSON.

        Raises:
            UserError: another kind of adapter, an option that is not supported, or a field that is not what PEFT
                writes.
        """
        self._where = where
        kind = fields.get("peft_type") or "LORA"
        if kind != "LORA":
            raise UserError(f"{where}: peft_type {_shown(kind)} is not supported, only LORA")
        for name in _UNSUPPORTED:
            if fields.get(name):
                raise UserError(f"{where}: {name} is not supported; merge the LoRA into the model instead")
        if fields.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
            raise UserError(
                f"{where}: init_lora_weights {_shown(fields['init_lora_weights'])} trains beside changed weights of the"
                " model; convert it to a plain LoRA (PEFT: save_pretrained, path_initial_model_for_weight_conversion)"
            )
        self._root = bool(fields.get("use_rslora"))
        self._alpha = self._number("lora_alpha", fields.get("lora_alpha", _DEFAULT_ALPHA))
        self._rank = self._number("r", fields["r"]) if "r" in fields else None
        self._alphas = self._patterns("alpha_pattern", fields.get("alpha_pattern"))
        self._ranks = self._patterns("rank_pattern", fields.get("rank_pattern"))

    def factor(self, module: str, rank: int) -> float:
        """alpha / rank of a module's update, or what takes its place.

        Raises:
            UserError: the configuration says another rank, or its patterns take too long.
        """
        try:
            alpha, told = self._alphas.find(module), self._ranks.find(module)
        except PatternError as error:
            raise UserError(f"{self._where}: a pattern, {error}; correct or remove it") from None
        told = self._rank if told is None else told
        if told is not None and told != rank:
            raise UserError(f"{self._where}: {module}: the rank is {told:g}, the matrices have {rank}; one is wrong")
        return (self._alpha if alpha is None else alpha) / (math.sqrt(rank) if self._root else rank)

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
            raise UserError(f"{self._where}: {name} {_shown(value)} is not a number that it can be; correct it")
        return float(value)

    def _patterns(self, name: str, value: object) -> Patterns:
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self._where}: {name} is not an object; correct or remove it")
        try:
            return Patterns(
                [(key, self._number(f"a value of {name}", number)) for key, number in (value or {}).items()]
            )
        except PatternError as error:
            raise UserError(f"{self._where}: {name} {error}; correct or remove it") from None


def config_beside(file: Path) -> PeftConfig | None:
    """The configuration that PEFT writes beside its file; None where there is none.

    Raises:
        UserError: it cannot be read, or see ``PeftConfig``.
    """
    path = file.with_name(ADAPTER_CONFIG)
    if not path.exists():
        return None
    document = read_document(path, "configuration of PEFT's", "correct or remove it", limit=_CONFIG_BYTES)
    return PeftConfig(str(path), document)


def configs_within(where: str, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """The configurations that diffusers writes into a file's metadata, by component.

    Raises:
        UserError: they are not JSON, or see ``PeftConfig``.
    """
    fields: dict[str, dict[str, Any]] = {}
    try:
        metadata_of = json_object(metadata.get(METADATA, "{}"))
    except UserError as error:
        raise UserError(f"{where}: {METADATA}: {error}; correct or remove it") from None
    for name, value in metadata_of.items():
        layer = layer_of(name)
        fields.setdefault(layer.components[0], {})[layer.module] = value
    return {component: PeftConfig(f"{where}: {METADATA}", found) for component, found in fields.items()}


def _shown(value: object) -> str:
    return ascii(value)[:80]
