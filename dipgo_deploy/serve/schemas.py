"""What clients send and get: OpenAI's images interface, with the parameters of a pipeline besides. Limits on all."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

LONGEST_PROMPT = 32_000
"""Characters, as OpenAI's models take at most."""
SEEDS = 2**32
"""Only so many seeds differ: more bits of a seed than 32 do not count."""

MOST_CONTROLS = 8
"""ControlNets of a model."""
MOST_PIXELS = 2**22
"""Of a picture that a request gives: 2048 x 2048."""
_Text = pydantic.Field(default=None, max_length=LONGEST_PROMPT)


class GenerationRequest(pydantic.BaseModel):
    """Body of ``POST /v1/images/generations``. What is not given is as the engine directory has it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = pydantic.Field(
        default=None,
        max_length=300,
        description="a directory's name, or NAME:SCHEDULE; needed where there are several",
    )
    prompt: str | None = _Text
    negative_prompt: str | None = _Text
    class_label: int | str | None = pydantic.Field(default=None, description="of a class model: an id or a name")
    n: int = pydantic.Field(default=1, ge=1, le=1000, description="pictures")
    size: str | None = pydantic.Field(
        default=None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT in pixels, or auto"
    )
    seed: int | None = pydantic.Field(
        default=None,
        ge=0,
        lt=SEEDS,
        description="of the first picture, the others count up from it; None: a random one",
    )
    guidance_scale: float | None = pydantic.Field(default=None, ge=0, le=1000)
    guidance_scale_2: float | None = pydantic.Field(
        default=None, ge=0, le=1000, description="of the second denoiser, of a model of two"
    )
    image: str | None = pydantic.Field(default=None, description="in base64: what to start from, or draw into or after")
    mask_image: str | None = pydantic.Field(default=None, description="in base64: white where image is drawn into")
    control_image: str | list[str] | None = pydantic.Field(
        default=None, description="in base64: of a ControlNet, or one for each of several"
    )
    control_scale: float | list[float] | None = pydantic.Field(
        default=None, description="factor of what the ControlNet adds, or one for each of several"
    )
    ip_adapter_image: str | None = pydantic.Field(default=None, description="in base64: what an IP-Adapter draws after")
    ip_adapter_scale: float | None = pydantic.Field(default=None, ge=-100, le=100)
    strength: float | None = pydantic.Field(
        default=None, gt=0, le=1, description="checked: that which the directory was exported with"
    )
    num_inference_steps: int | None = pydantic.Field(
        default=None, ge=1, le=100_000, description="checked: those that the directory was compiled for"
    )
    schedule: str | None = pydantic.Field(default=None, max_length=300, description="one of a directory's schedules")
    launches: int | None = pydantic.Field(
        default=None, ge=1, le=100_000, description="or the one with launches at so many evaluations"
    )
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    user: str | None = pydantic.Field(default=None, max_length=512, description="taken for OpenAI's clients, not used")

    @pydantic.field_validator("control_image", "control_scale")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, list) and not 1 <= len(value) <= MOST_CONTROLS:
            raise ValueError(f"1 to {MOST_CONTROLS} of them")
        return value

    @pydantic.field_validator("class_label")
    @classmethod
    def _short(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and len(value) > 300:
            raise ValueError("at most 300 characters")
        return value

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """Width and height."""
        if self.size in (None, "auto"):
            return None, None
        width, height = str(self.size).split("x")
        return int(width), int(height)


class GeneratedImage(pydantic.BaseModel):
    """One picture. seed: with which alone (``n`` 1) it is drawn again."""

    b64_json: str
    seed: int


class GenerationResponse(pydantic.BaseModel):
    """Answer to ``POST /v1/images/generations``. created: seconds since 1970. size: WIDTHxHEIGHT."""

    created: int
    model: str
    size: str
    output_format: str
    data: list[GeneratedImage]


class ModelEntry(pydantic.BaseModel):
    """A directory, or one schedule of a directory with several, of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dipgo_deploy"
    architecture: str
    schedule: str
    num_inference_steps: int
    launches: int
    batch: int


class ModelList(pydantic.BaseModel):
    """Answer to ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorEntry(pydantic.BaseModel):
    """What is wrong. type: as OpenAI names it. param: the field, where it is one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(pydantic.BaseModel):
    """Body of every answer that is no success."""

    error: ErrorEntry
