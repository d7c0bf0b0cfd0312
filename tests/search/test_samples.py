from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.search.prompts import built_in_prompts, check_labels, known_labels, read_prompts
from dipgo_deploy.search.samples import SampleStream, held_out


def test_every_round_goes_through_all_conditions_with_new_seeds() -> None:
    pairs = SampleStream(4, seed=3).pairs(0, 12)
    for turn in range(3):
        assert {pair.condition for pair in pairs[4 * turn : 4 * turn + 4]} == {0, 1, 2, 3}
    assert len({pair.seed for pair in pairs}) == 12
    assert SampleStream(4, seed=3).pairs(5, 4) == pairs[5:9]


def test_a_pool_repeats_and_one_noise_is_one() -> None:
    stream = SampleStream(3, pool=5)
    assert stream.pairs(0, 5) == stream.pairs(5, 5)
    assert {pair.seed for pair in SampleStream(3, seed=7, one_noise=True).pairs(0, 9)} == {7}


def test_held_out_images_are_in_order_and_never_searched_on() -> None:
    pairs = held_out(3, 2)
    assert [pair.condition for pair in pairs] == [0, 0, 1, 1, 2, 2]
    assert len({pair.seed for pair in pairs}) == 6
    assert not {pair.seed for pair in pairs} & {pair.seed for pair in SampleStream(3).pairs(0, 1000)}


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog  \r\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.txt: no such file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_labels() -> None:
    config = {"num_embeds_ada_norm": 4}
    assert known_labels({"one": 0, "other": 2}, config) == (0, 2)
    assert known_labels({}, config) == (0, 1, 2, 3)
    with pytest.raises(UserError, match="4 is no class"):
        check_labels((0, 4), config)


def test_only_the_built_in_text_model_has_prompts() -> None:
    prompts = built_in_prompts("fashion-sd")
    assert prompts is not None
    assert "a photo of an ankle boot" in prompts
    assert built_in_prompts("fashion-dit") is None
