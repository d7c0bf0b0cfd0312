"""The file of ``dipgo-search --config``: hyper-parameters of the pruner, as JSON. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.validation import one_line

_MAX_BYTES = 2**20
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class PrunerConfig(BaseModel):
    """Hyper-parameters of the pruner. What is left out is the preset's, or the default that the description names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    iterations: Count | None = Field(default=None, description="Optimizer steps. Presets: small 100, paper 1000.")
    batch: Count | None = Field(default=None, description="Images in one run of the loop. Default: 1.")
    accumulation: Count | None = Field(default=None, description="Runs of the loop in one optimizer step. Default: 1.")
    loss: Literal["ssim", "l1", "l2", "ssim+l1", "latent-l1", "latent-l2"] | None = Field(
        default=None, description="Distance to the full run. Default: ssim, which is 1 - SSIM of the decoded images."
    )
    alpha: float | None = Field(
        default=None, ge=0, description="Weight of the price of the kept gates. Presets: small 0.5, paper 1."
    )
    stop_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="While less than this share of the gates is kept, they have no price. Default: 0.2.",
    )
    optimizer: Literal["sgd", "adam", "adamw"] | None = Field(
        default=None, description="Optimizer of the pruner. Presets: small adam, paper sgd."
    )
    lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate. Presets: small 0.03, paper 0.1 and for a DiT 10."
    )
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Momentum of SGD. Default: 0.")
    weight_decay: float | None = Field(default=None, ge=0, description="Weight decay. Default: 0.0001.")
    warmup: int | None = Field(
        default=None, ge=0, description="Iterations in which the learning rate rises. Default: 0."
    )
    clip: float | None = Field(
        default=None, ge=0, description="Largest norm of the gradient; 0 does not clip. Default: 0."
    )
    temperature: tuple[Positive, Positive] | None = Field(
        default=None,
        strict=False,
        description="Temperature of the softmax at the first and the last iteration. Default: [1, 1].",
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="bf16 runs the denoiser under autocast. Default: fp32."
    )
    width: Count | None = Field(default=None, description="Width of a query. Presets: small 64, paper 512.")
    encoder: Literal["attention", "linear"] | None = Field(
        default=None, description="Self-attention over all gates, or stacked linear layers. Default: attention."
    )
    layers: Count | None = Field(default=None, description="Layers of the encoder. Default: 1.")
    heads: Literal["per-gate", "shared"] | None = Field(
        default=None, description="One MLP for each gate, or one for all. Default: per-gate."
    )
    pool: Count | None = Field(
        default=None, description="Learn from this many images, again and again. Default: always new ones."
    )
    one_noise: bool | None = Field(
        default=None, description="Give all images the same noise, as the authors' code does. Default: false."
    )

    def chosen(self) -> dict[str, Any]:
        """What the file says, by name."""
        return self.model_dump(exclude_none=True)


def load_config(path: str | os.PathLike[str]) -> PrunerConfig:
    """The configuration in a file.

    Raises:
        UserError: it cannot be read, is no JSON object, or has a field that is unknown or out of range.
    """
    document = read_document(path, "configuration of the pruner", 'write it as in {"lr": 0.1}', limit=_MAX_BYTES)
    try:
        return with_values(PrunerConfig(), document)
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from error


def with_values(config: PrunerConfig, values: Mapping[str, Any]) -> PrunerConfig:
    """The same with some values changed; raises UserError that names the field of a wrong one."""
    try:
        return PrunerConfig.model_validate({**config.chosen(), **values})
    except ValidationError as error:
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        fields = f" ({', '.join(PrunerConfig.model_fields)} are the fields)" if unknown else ""
        raise UserError(f"{one_line(error)}{fields}") from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file (shipped as ``config.schema.json``)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PrunerConfig.model_json_schema()}
