"""The tables of supported models are what the registry says."""

from __future__ import annotations

import pytest

from dipgo_deploy.models.registry import BUILT_IN
from tools.model_table import placed, tables


def test_the_documents_have_the_tables_of_the_registry() -> None:
    for path, table in tables().items():
        text = path.read_text(encoding="utf-8")
        assert placed(text, table) == text, f"{path.name}: run python -m tools.model_table"
        assert table.count("\n") == len(BUILT_IN) + 2
    assert all(family.models for family in BUILT_IN)


def test_a_file_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="begin"):
        placed("no marks", "| |\n")
