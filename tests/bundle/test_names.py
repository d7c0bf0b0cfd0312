from __future__ import annotations

from itertools import product

import pytest

from dipgo_deploy.bundle.names import (
    CacheName,
    cache_input,
    cache_output,
    parse_cache,
    segment_input,
    segment_output,
)


@pytest.mark.parametrize("write", [cache_input, cache_output, segment_output])
def test_what_was_written_is_read(write) -> None:
    for kind, block, index in product(("output", "residual"), ("mid_block", "up_blocks.1.attentions.2"), (0, 10)):
        assert parse_cache(write(kind, f"{block}/out{index}")) == CacheName(block, index, kind)


def test_a_segment_reads_values_only() -> None:
    assert parse_cache(segment_input("mid_block/out1")) == CacheName("mid_block", 1, "output")


def test_no_two_tensors_of_a_graph_have_one_name() -> None:
    kinds = ("output", "residual")
    variant = {write(kind, "a/out0") for write in (cache_input, cache_output) for kind in kinds}
    assert len(variant) == 4
    assert len({segment_input("a/out0"), *(segment_output(kind, "a/out0") for kind in kinds)}) == 3


@pytest.mark.parametrize("name", ["noise_pred", "cache.mid_block/in0", "mid_block/out0", "cache./out0", "cache.a/out"])
def test_other_names_are_none_of_a_cache(name: str) -> None:
    assert parse_cache(name) is None
