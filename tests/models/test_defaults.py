from __future__ import annotations

import inspect
import json

import pytest

from dipgo_deploy.models.defaults import class_defaults, with_defaults
from dipgo_deploy.models.registry import families

CLASSES = sorted(
    {name for family in families().values() for name in (family.diffusers_class, *family.companions.values())}
)


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_table_is_what_diffusers_has(class_name: str) -> None:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    found = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    known = class_defaults(class_name)
    assert {name: known.get(name, "not in the table") for name in found} == json.loads(json.dumps(found))


def test_defaults_are_filled_in_and_written_in_one_way() -> None:
    given = {"layers_per_block": 3, "mid_block_scale_factor": 1.0, "newer": None, "other": 5, "_class_name": "x"}
    filled = with_defaults(class_defaults("UNet2DConditionModel"), given)
    assert (filled["layers_per_block"], filled["in_channels"], filled["other"]) == (3, 4, 5)
    assert filled["_class_name"] == "x"
    assert type(filled["mid_block_scale_factor"]) is int
    assert "newer" not in filled
    assert with_defaults(class_defaults("NoSuchModel"), {"a": 1}) == {"a": 1}
