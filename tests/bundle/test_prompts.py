from __future__ import annotations

import pytest

from dipgo_deploy.bundle.prompts import prepared
from dipgo_deploy.models.family import TextScheme


@pytest.mark.parametrize(
    ("settings", "negative", "text"),
    [
        ({}, False, " A [IMG] Shoe "),
        ({"lowercase": True, "prefix": "Draw: "}, False, "Draw: a [img] shoe"),
        ({"lowercase": True, "prefix": "Draw: "}, True, "a [img] shoe"),
        ({"around": ("<user>", "</user>"), "removed": ("[IMG]",)}, False, "<user> A  Shoe </user>"),
        ({"around": ("<user>", "</user>"), "prefix": "Draw:"}, True, "<user> A [IMG] Shoe </user>"),
        ({"around": ("<user>", "</user>"), "prefix": "Draw:"}, False, "<user>Draw: A [IMG] Shoe </user>"),
    ],
)
def test_what_is_tokenized(settings: dict[str, object], negative: bool, text: str) -> None:
    scheme = TextScheme(length=8, encode=lambda pipeline, tokens: {}, **settings)  # type: ignore[arg-type]
    assert prepared(scheme, " A [IMG] Shoe ", negative=negative) == text
