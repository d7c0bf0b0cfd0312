"""Which calls an engine directory is compared at with the stock pipeline."""

from __future__ import annotations

from pathlib import Path

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.compare.pictures import cases


def test_a_scale_is_asked_for_where_there_is_one(dit_residual: Path) -> None:
    """Of the scales that are no default: a directory without guidance refuses every one."""
    guided = Bundle.open(dit_residual).manifest
    assert guided.guidance
    assert [case.guidance_scale for case in cases(guided)] == [None, 2.0]
    assert [case.guidance_scale for case in cases(guided.model_copy(update={"guidance": False}))] == [None, None]
