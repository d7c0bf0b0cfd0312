from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import jsonschema
import pytest

from dipgo_deploy.cli.search import command
from dipgo_deploy.errors import UserError
from dipgo_deploy.search import config
from dipgo_deploy.search.config import PrunerConfig, json_schema, load_config
from dipgo_deploy.search.losses import IMAGE_LOSSES, LATENT_LOSSES
from dipgo_deploy.search.pruner import PrunerSize
from dipgo_deploy.search.run import SearchOptions
from dipgo_deploy.search.train import TrainOptions

DOCUMENT: dict[str, Any] = {
    "iterations": 300,
    "loss": "l1",
    "optimizer": "adamw",
    "lr": 0.05,
    "temperature": [2, 0.5],
    "width": 32,
    "one_noise": True,
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "formats.md"


def written(folder: Path, text: str) -> Path:
    path = folder / "pruner.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_as_it_says(tmp_path: Path) -> None:
    read = load_config(written(tmp_path, json.dumps(DOCUMENT)))
    assert read.chosen() == DOCUMENT | {"temperature": (2, 0.5)}
    assert load_config(written(tmp_path, "{}")) == PrunerConfig()


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ({"alpha": -1}, "alpha: Input should be greater than or equal to 0, not -1"),
        ({"lr": "0.1"}, "lr: Input should be a valid number"),
        ({"iterations": True}, "iterations: Input should be a valid integer"),
        ({"optimiser": "sgd"}, "optimiser: Extra inputs are not permitted (iterations, batch, accum"),
        ({"loss": "lpips"}, "loss: Input should be 'ssim'"),
        ({"temperature": [1, 0]}, "temperature.1: Input should be greater than 0"),
        ([], "not a JSON object but a list; write it as in"),
    ],
)
def test_mistakes_name_file_and_field(tmp_path: Path, document: Any, line: str) -> None:
    path = written(tmp_path, json.dumps(document))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)
    if isinstance(document, dict):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, json_schema())


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pruner.json: not JSON .line 1, column 2: .*; write it as in"):
        load_config(written(tmp_path, "{lr"))
    with pytest.raises(UserError, match=r"none.json: no such file"):
        load_config(tmp_path / "none.json")


def test_the_fields_are_those_of_the_library() -> None:
    known = {field.name for kind in (TrainOptions, PrunerSize, SearchOptions) for field in fields(kind)}
    assert set(PrunerConfig.model_fields) <= known
    hints = get_type_hints(PrunerConfig)
    assert get_args(get_args(hints["loss"])[0]) == (*IMAGE_LOSSES, *LATENT_LOSSES)


def test_the_shipped_schema_and_the_documentation_are_current() -> None:
    shipped = Path(config.__file__).with_name("config.schema.json")
    assert json.loads(shipped.read_text()) == json_schema(), "regenerate it: see json_schema()"
    jsonschema.validate(DOCUMENT, json_schema())
    option = next(param for param in command.params if param.name == "config_file")
    assert isinstance(option, click.Option) and option.help is not None
    assert option.help.endswith(f": {', '.join(PrunerConfig.model_fields)}.")
    page = PAGE.read_text(encoding="utf-8")
    for name, field in PrunerConfig.model_fields.items():
        assert f"| `{name}` | {field.description} |" in page
