from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.sublayers import sublayers
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.importers.registry import import_schedule
from dipgo_deploy.schedule.importers.smoothcache import read_gates

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "published-schedules"
DIT = tuple(spec.name for spec in sublayers("transformer_blocks", 3, ("attn1", "ff")))
# FLUX's kinds of blocks; SD3's, of which not every block has every part; two stacks with the same parts.
FLUX = (
    *(spec.name for spec in sublayers("transformer_blocks", 2, ("attn", "ff", "ff_context"))),
    *(spec.name for spec in sublayers("single_transformer_blocks", 2, ("proj_out",))),
)
SD3 = tuple(
    f"transformer_blocks.{part}"
    for part in ("0.attn", "0.ff", "0.ff_context", "1.attn", "1.attn2", "1.ff", "1.ff_context", "2.attn", "2.ff")
)
TWO_STACKS = tuple(
    spec.name for stack in ("text_blocks", "image_blocks") for spec in sublayers(stack, 2, ("attn", "mlp"))
)
MakeTarget = Callable[..., Target]


def read(document: Any, names: tuple[str, ...] = DIT) -> list[str]:
    return ["".join("01"[kept] for kept in row) for row in read_gates(json.dumps(document).encode(), names)]


def test_a_kind_is_every_layer_of_it() -> None:
    assert read({"attn": [1, 0, 1], "mlp": [1, 1, 0]}) == ["111111", "010101", "101010"]
    assert read({"mlp": [1, 1, 0], "attn": [1, 0, 1]}) == ["111111", "010101", "101010"]
    assert read({"attn1": [1, 0], "ff": [1, 1]}) == ["111111", "010101"]


def test_a_kind_that_is_not_given_is_always_computed() -> None:
    assert read({"attn1": [1, 0, 0]}) == ["111111", "010101", "010101"]


def test_one_list_a_layer() -> None:
    document = {
        f"{kind}-{number}": [1, number == 1 and kind == "mlp"] for number in range(3) for kind in ("attn", "mlp")
    }
    document = {key: [int(entry) for entry in row] for key, row in document.items()}
    assert read(document) == ["111111", "000100"]
    # One kind by layer, the other as a whole.
    assert read({"attn-2": [1, 1], "attn-0": [1, 0], "attn-1": [1, 0], "mlp": [1, 0]}) == ["111111", "000010"]


def test_other_transformers() -> None:
    assert read({"attn": [1, 0], "ff_context": [1, 0]}, FLUX) == ["1" * 8, "01001011"]
    assert read({"mlp": [1, 0], "proj_out": [1, 0]}, FLUX) == ["1" * 8, "10110100"]
    assert read({"attn-0": [1, 0], "attn-1": [1, 1]}, FLUX) == ["1" * 8, "01111111"]
    assert read({"ff_context": [1, 0], "attn2-1": [1, 0]}, SD3) == ["1" * 9, "110101011"]
    assert read({"attn": [1, 0]}, TWO_STACKS) == ["1" * 8, "01010101"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=5))
def test_gates_come_cell_by_cell(rows: list[list[int]]) -> None:
    keys = [f"{kind}-{number}" for number in range(3) for kind in ("attn", "mlp")]
    document = {key: [row[column] for row in rows] for column, key in enumerate(keys)}
    assert read(document) == ["".join(map(str, row)) for row in rows]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "has no list of 0 and 1"),
        ([1, 0], "not a JSON object but a list"),
        ({"attn": 1}, "'attn': not a list of 0 and 1"),
        ({"attn": []}, "'attn': not a list of 0 and 1"),
        ({"attn": [1, 2]}, "'attn': evaluation 1 is 2, not 0 or 1"),
        ({"attn": [1, True]}, "'attn': evaluation 1 is True, not 0 or 1"),
        ({"attn": [1, 0.0]}, "'attn': evaluation 1 is 0.0, not 0 or 1"),
        ({"norm1": [1, 0]}, "no layers of kind 'norm1', only attn1, ff"),
        ({"attn": [1, 0], "mlp": [1]}, "transformer_blocks.0.attn1 has 2 entries, but transformer_blocks.0.ff has 1"),
        ({"attn": [1, 0], "attn1": [1, 1]}, "'attn1': transformer_blocks.0.attn1 has a list already"),
        ({"attn": [1, 0], "attn-1": [1, 1]}, "'attn-1': transformer_blocks.1.attn1 has a list already"),
        ({"attn-3": [1, 0]}, "attn-3: no such layer in this model, whose blocks count to 2"),
        ({"attn-0": [1, 0], "attn-2": [1, 0]}, "attn-1 is missing; give all layers of a kind, or none"),
    ],
)
def test_refusals_are_one_line(document: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(document)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"attn": [1, 0]', "line 1, column 16: the file is cut off"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"attn": [1], "attn": [0]}', "the key 'attn' stands twice"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"attn": [' + b"1," * 1_000_001 + b"1]}", "more than 1,000,000 values"),
        (b"{" + b",".join(b'"x%d": [1]' % i for i in range(500)) + b"}", "500 lists for the"),
    ],
)
def test_broken_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_gates(data, DIT)


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(UserError, match="transformer_blocks.0 of this model is no layer inside a transformer block"):
        read({"attn": [1]}, ("transformer_blocks.0", "transformer_blocks.1"))
    with pytest.raises(UserError, match="down_blocks.0.attentions.0 of this model is no layer"):
        read({"attn": [1]}, ("down_blocks.0.attentions.0", "mid_block"))
    with pytest.raises(UserError, match="attn-0 can be in text_blocks or image_blocks"):
        read({"attn-0": [1]}, TWO_STACKS)
    with pytest.raises(UserError, match="attn2-0: no such layer in this model, whose blocks count to 1"):
        read({"attn2-0": [1]}, SD3)


def test_a_file_makes_a_schedule(tmp_path: Path, dit_target: MakeTarget) -> None:
    path = tmp_path / "fora.json"
    path.write_text(json.dumps({"attn": [1, 0, 1, 0], "mlp": [1, 0, 1, 0]}))
    schedule = import_schedule("smoothcache", path, dit_target(3, 4))
    assert schedule.keep == ("111111", "000000") * 2
    assert schedule.provenance["method"] == "import smoothcache"
    assert schedule.provenance["parameters"]["file"] == "fora.json"
    with pytest.raises(UserError, match=r"fora.json: .*evaluates the denoiser 6 times"):
        import_schedule("smoothcache", path, dit_target(3, 6))
    path.write_text(json.dumps({"attn": [0, 1], "mlp": [1, 0]}))
    with pytest.raises(UserError, match=r"evaluation 0, block transformer_blocks.0.attn1: its cache is read before"):
        import_schedule("smoothcache", path, dit_target(3, 2))


# name -> steps, share of the gates that is kept, kept gates of the first evaluations
RELEASED = {
    "smoothcache-30-N-2-fora.json": (30, 16 / 30, [56, 0, 56, 0]),
    "smoothcache-50-N-2-l2c.json": (50, 0.762857, [56, 0, 56, 1, 56, 0, 56, 0, 56, 3]),
    "smoothcache-50-N-3-threshold-0.18.json": (50, 0.48, [56, 0, 0, 0, 56]),
    "smoothcache-diffuser_schedule.json": (50, 0.74, [56, 28, 56, 28, 28, 56]),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_schedules(name: str, dit_target: MakeTarget) -> None:
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this repository")
    steps, share, kept = RELEASED[name]
    schedule = import_schedule("smoothcache", path, dit_target(28, steps))
    assert schedule.kept_share == pytest.approx(share, abs=1e-6)
    assert [sum(row) for row in schedule.gates[: len(kept)]] == kept
