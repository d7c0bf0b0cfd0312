from __future__ import annotations

import pytest
from pydantic import ValidationError

from dipgo_deploy.bundle.manifest import ConditionSpec, TensorSpec
from dipgo_deploy.bundle.shapes import Range, SizeRanges, Sizes, evaluate, evaluate_shape, parse_range
from dipgo_deploy.errors import UserError

AT = {"batch": 3, "height": 96, "width": 64}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("2*batch", 6),
        ("(height//2)*(width//4)", 768),
        ("height//2*width//4", 768),
        ("height - width + 1", 33),
        ("-(width//3) + 100", 79),
        ("2 * (batch + 1) * 2", 16),
        ("height//7", 13),
    ],
)
def test_expressions_mean_what_python_means(expression: str, value: int) -> None:
    assert evaluate(expression, AT) == value == eval(expression, {}, AT)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("depth", "'depth' is not one of batch, height, width"),
        ("2**batch", "only whole numbers"),
        ("batch/2", "only whole numbers"),
        ("(batch", "cannot be read"),
        ("batch)", "cannot be read"),
        ("batch 2", "cannot be read"),
        ("height//(batch - 3)", "division by zero"),
        ("__import__('os')", "only whole numbers"),
        ("", "cannot be read"),
        ("True", "only whole numbers"),
        ("2.5", "only whole numbers"),
        ("+".join(["1"] * 200), "too long"),
        ("(" * 201, "too long"),
    ],
)
def test_other_expressions_are_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(expression, AT)


def test_shapes_and_values_at_sizes() -> None:
    sizes = Sizes(3, 96, 64)
    spec = TensorSpec(name="x", shape=(8, 320, 64, 64), dims=("2*batch", 320, "height//2", "width"), dtype="float16")
    assert spec.at(sizes).shape == (6, 320, 48, 64)
    assert spec.at(sizes).nbytes == 6 * 320 * 48 * 64 * 2 and spec.at(sizes).declared == spec.dims
    fixed = ConditionSpec(
        name="time_ids", shape=(8, 2), dims=("2*batch", 2), dtype="float32", source="fixed", values=(1024, 0)
    ).model_copy(update={"expressions": ("8*height", 0.0)})
    assert fixed.at(sizes).values == (768.0, 0.0) and fixed.at(sizes).shape == (6, 2)
    assert TensorSpec(name="x", shape=(2,), dtype="int64").at(sizes).shape == (2,)
    with pytest.raises(ValueError, match=r"is \(-1,\)"):
        evaluate_shape(("batch - 4",), sizes)
    with pytest.raises(ValidationError, match="only whole numbers"):
        TensorSpec(name="x", shape=(1,), dims=("os.system",), dtype="int64")


def test_ranges() -> None:
    ranges = SizeRanges(
        batch=Range(min=1, opt=1, max=4),
        height=Range(min=64, opt=64, max=128, multiple=8),
        width=Range.static(64),
    )
    assert ranges.min == Sizes(1, 64, 64) and ranges.opt == Sizes(1, 64, 64) and ranges.max == Sizes(4, 128, 64)
    assert Sizes(3, 72, 64) in ranges
    for sizes, message in (
        (Sizes(5, 64, 64), "batch 5: this engine directory takes 1 to 4"),
        (Sizes(1, 68, 64), r"height 68: this engine directory takes 64 to 128 in steps of 8 \(latent pixels\)"),
        (Sizes(1, 136, 64), "height 136"),
        (Sizes(1, 64, 72), "width 72: this engine directory takes 64 only"),
    ):
        with pytest.raises(UserError, match=message):
            ranges.check(sizes)
    with pytest.raises(ValidationError, match="not in order"):
        Range(min=4, opt=2, max=8)
    with pytest.raises(ValidationError, match="not multiples of 8"):
        Range(min=64, opt=68, max=128, multiple=8)


def test_ranges_from_the_command_line() -> None:
    assert parse_range("--batch", "2") == Range(min=2, opt=2, max=2)
    assert parse_range("--batch", "1:4") == Range(min=1, opt=1, max=4)
    assert parse_range("--height", "512:768:1024") == Range(min=512, opt=768, max=1024)
    for text in ("", "0", "1:2:3:4", "4:1", "1:", "a", "-1:2", "1.5", "8:2:9"):
        with pytest.raises(UserError, match=r"--height.*(give a number|not in order)"):
            parse_range("--height", text)
