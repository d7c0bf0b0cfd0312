from __future__ import annotations

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import dipgo_deploy.schedule.document as document_module
from dipgo_deploy import files
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.schedule.builders import with_guidance
from dipgo_deploy.schedule.document import GateChange, Schedule, gate_rows, json_schema
from dipgo_deploy.schedule.guidance import shares_of
from dipgo_deploy.schedule.identity import config_hash
from dipgo_deploy.schedule.summary import schedule_facts
from dipgo_deploy.schedule.worth import worth_of

_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_json = st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    names = draw(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
    steps = draw(st.integers(1, 8))
    rows = [[True] * len(names)]
    rows += [draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names))) for _ in range(steps - 1)]
    finite_or_not = _scalars.filter(lambda value: value not in ("Infinity", "-Infinity")) | st.just(-math.inf)
    return Schedule(
        model={
            "class_name": draw(st.text(min_size=1)),
            "config_hash": config_hash({"seed": draw(st.integers())}),
            "granularity": draw(st.sampled_from(["block", "layer"])),
        },
        blocks=[{"name": name, "cache": draw(st.sampled_from(["output", "residual"]))} for name in names],
        steps=steps,
        keep=gate_rows(rows),
        sampler={
            "class_name": draw(st.text(min_size=1)),
            "config": draw(st.dictionaries(st.text(), finite_or_not)),
            "num_inference_steps": draw(st.integers(1, 1000)),
        },
        provenance=draw(st.dictionaries(st.text(), _json)),
    )


@settings(deadline=None)
@given(schedules())
def test_round_trip_keeps_everything(schedule: Schedule) -> None:
    text = schedule.to_json()
    again = Schedule.from_json(text.encode())
    assert again == schedule
    assert again.to_json() == text
    assert not schedule.diff(again)
    assert hash(again) == hash(schedule)
    jsonschema.validate(json.loads(text), json_schema())


@given(schedules(), st.data())
def test_diff_names_exactly_the_changed_gates(schedule: Schedule, data: st.DataObject) -> None:
    gates = [list(row) for row in schedule.gates]
    later = [(step, column) for step in range(1, schedule.steps) for column in range(len(schedule.blocks))]
    flipped = data.draw(st.lists(st.sampled_from(later), unique=True)) if later else []
    for step, column in flipped:
        gates[step][column] = not gates[step][column]
    difference = schedule.diff(schedule.with_gates(gates))
    assert dict(difference.fields) == {}
    assert difference.gates == tuple(
        GateChange(step, schedule.block_names[column], schedule.gates[step][column], gates[step][column])
        for step, column in sorted(flipped)
    )
    assert bool(difference) == bool(flipped)


@given(schedules(), st.data())
def test_a_cache_read_before_it_was_written_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    column = data.draw(st.integers(0, len(schedule.blocks) - 1))
    first_kept = data.draw(st.integers(1, schedule.steps))
    gates = [list(row) for row in schedule.gates]
    for step in range(first_kept):
        gates[step][column] = False
    with pytest.raises(UserError) as caught:
        schedule.with_gates(gates)
    said = one_line(f"evaluation 0, block {schedule.block_names[column]}: its cache is read before")
    assert said in str(caught.value)


def test_gates_and_shares(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    assert schedule.gates == ((True, True, True), (False, False, False), (True, False, True), (False, True, False))
    assert schedule.kept_share == 6 / 12
    assert schedule.block_names == ("down_blocks.0", "mid_block", "up_blocks.0")
    assert schedule.cache_kinds == {"down_blocks.0": "output", "mid_block": "output", "up_blocks.0": "output"}


def test_the_file_is_readable_line_by_line(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    Schedule(**document).save(path)
    lines = path.read_text().splitlines()
    assert '    "101",' in lines
    assert '    {"name": "mid_block", "cache": "output"},' in lines
    assert Schedule.load(path) == Schedule(**document)
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": ["111", "000", "1x1", "010"]}, "keep: evaluation 2, block mid_block: 'x' is not 0 or 1"),
        ({"keep": ["111", "000", "1", "010"]}, "evaluation 2 has 1 cells, block mid_block is the first without one"),
        ({"keep": ["111", "000", "1111", "010"]}, "evaluation 2 has 4 cells, but there are 3 blocks"),
        ({"keep": ["111", "000", "101"]}, "keep: 3 rows, but steps is 4"),
        ({"keep": ["011", "111", "101", "010"]}, "evaluation 0, block down_blocks.0: its cache is read before"),
        ({"keep": [[1, 1, 1], "000", "101", "010"]}, "keep.0: Input should be a valid string"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1, not 0"),
        ({"steps": "4"}, "steps: Input should be a valid integer, not '4'"),
        ({"steps": True}, "steps: "),
        ({"blocks": []}, "blocks: the list is empty"),
        ({"blocks": [{"name": "a", "cache": "output"}] * 3}, "blocks: a is listed twice (positions 0 and 1)"),
        ({"blocks": [{"name": "a", "cache": "delta"}]}, "blocks.0.cache: "),
        ({"format_version": 6}, "format_version: 6 is not known, only 1 to 5"),
        ({"format_version": "1"}, "format_version: '1' is not known"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"model": {"class_name": "U", "config_hash": "zz", "granularity": "block"}}, "model.config_hash: "),
        ({"provenance": {"ratio": math.nan}}, "provenance: "),
        ({"provenance": {"tensor": object()}}, "a value of type object has no form in JSON"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(
    document: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        Schedule(**{**document, **changes})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(document: dict[str, Any]) -> None:
    for name in ("model", "blocks", "steps", "keep", "sampler"):
        with pytest.raises(UserError, match=f"^{name}: Field required$"):
            Schedule(**{key: value for key, value in document.items() if key != name})


def test_a_file_cut_off_anywhere_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    text = Schedule(**document).to_json()
    path = tmp_path / "cut.json"
    for length in range(len(text.rstrip())):
        path.write_text(text[:length])
        with pytest.raises(UserError) as caught:
            Schedule.load(path)
        assert str(caught.value).startswith(f"{path}: not JSON (line ")
        assert "cut off" in str(caught.value), (length, str(caught.value))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"{}", "format_version: is missing"),
        (b'{"format_version": 1, "steps": 1, "steps": 2}', "'steps' stands twice"),
        (b'{"format_version": NaN}', "NaN is no JSON number"),
        (b'{"format_version": true}', "format_version: True is not known"),
        (b'{"format_version": 1e400}', "1e400 is too large a number"),
        (b'{"a" 1}', "not JSON"),
        (b"[" * 100_000, "nested more than 64 deep"),
    ],
)
def test_files_that_are_no_schedule(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Schedule.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_oversized_missing_and_special_files(tmp_path: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(UserError, match="larger than 16 MiB"):
        Schedule.load(big)
    with pytest.raises(UserError, match="no such file"):
        Schedule.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="not a regular file"):
        Schedule.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.json"
    schedule = Schedule(**document)
    schedule.save(path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        schedule.with_gates([[True] * 3] * 4).save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]
    with pytest.raises(UserError, match="cannot be written"):
        schedule.save(tmp_path / "nowhere" / "s.json")


def test_it_cannot_be_changed(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    with pytest.raises(ValidationError):
        schedule.steps = 3  # type: ignore[misc]
    for change in (
        lambda: schedule.sampler.config.update(a=1),
        lambda: schedule.sampler.config.__setitem__("beta_start", 0),
        lambda: schedule.provenance["parameters"].clear(),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    document["sampler"]["config"]["beta_start"] = 0.5
    assert schedule.sampler.config["beta_start"] == 0.1
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


def test_infinite_settings_survive_strict_json(document: dict[str, Any]) -> None:
    document["sampler"]["config"] = {"lambda_min_clipped": -math.inf, "betas": [0.1, math.inf]}
    text = Schedule(**document).to_json()
    assert json.loads(text, parse_constant=lambda token: pytest.fail(token))
    assert Schedule.from_json(text).sampler.config == {"lambda_min_clipped": -math.inf, "betas": (0.1, math.inf)}


def test_with_gates_checks_and_keeps_the_rest(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    other = schedule.with_gates([[1, 1, 1]] * 4, provenance={"method": "promoted"})
    assert other.keep == ("111",) * 4
    assert other.provenance == {"method": "promoted"}
    assert other.sampler == schedule.sampler
    assert schedule.with_gates(schedule.gates) == schedule
    with pytest.raises(UserError, match="evaluation 1, column 2: 2 is not 0 or 1"):
        schedule.with_gates([[1, 1, 1], [1, 1, 2], [1, 1, 1], [1, 1, 1]])


def test_diff_of_other_fields(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    document["sampler"] = {"class_name": "PNDMScheduler", "config": {"beta_start": 0.2}, "num_inference_steps": 3}
    document["blocks"][1]["cache"] = "residual"
    document["steps"], document["keep"] = 3, ["111", "000", "100"]
    difference = schedule.diff(Schedule(**document))
    assert difference.fields == {
        "blocks": (
            ["down_blocks.0 (output)", "mid_block (output)", "up_blocks.0 (output)"],
            ["down_blocks.0 (output)", "mid_block (residual)", "up_blocks.0 (output)"],
        ),
        "steps": (4, 3),
        "sampler.class_name": ("DDIMScheduler", "PNDMScheduler"),
        "sampler.config.beta_start": (0.1, 0.2),
        "sampler.num_inference_steps": (4, 3),
    }
    assert difference.gates == (GateChange(2, "up_blocks.0", True, False),)


def test_check_model(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    caches = {"down_blocks.0": ("output",), "mid_block": ("output",), "up_blocks.0": ("output",)}
    schedule.check_model("UNet2DConditionModel", "a" * 64, caches)
    schedule.check_model("UNet2DConditionModel", "c" * 64, caches, allow_other_config=True)

    def refused(words: str, class_name: str = "UNet2DConditionModel", digest: str = "a" * 64, **given: Any) -> None:
        with pytest.raises(UserError) as caught:
            schedule.check_model(class_name, digest, given.get("caches", caches))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("made for UNet2DConditionModel, this model is DiTTransformer2DModel", class_name="DiTTransformer2DModel")
    refused("made for the configuration aaaaaaaaaaaa..., this model has cccccccccccc...", digest="c" * 64)
    refused("up_blocks.1 of this model is missing", caches={**caches, "up_blocks.1": ("output",)})
    refused("up_blocks.0 is no block of this model", caches={"down_blocks.0": ("output",), "mid_block": ("output",)})
    refused("cannot have a cache of kind 'output', only residual", caches={**caches, "mid_block": ("residual",)})
    reordered = {name: caches[name] for name in ("mid_block", "down_blocks.0", "up_blocks.0")}
    refused("down_blocks.0 stands at position 0, where the model runs mid_block", caches=reordered)


def test_check_evaluations(document: dict[str, Any]) -> None:
    schedule = Schedule(**document)
    schedule.check_evaluations(4)
    with pytest.raises(UserError, match="4 rows, but DDIMScheduler with 4 steps evaluates the denoiser 5 times"):
        schedule.check_evaluations(5)


def test_guidance_is_a_number_an_evaluation(document: dict[str, Any]) -> None:
    schedule = Schedule(**document).with_gates([[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]])
    assert schedule.conditional_only == (False,) * 4
    guided = schedule.with_guidance([1, 0.5, 1, 0])
    assert (guided.format_version, guided.guidance) == (5, (1.0, 0.5, 1.0, 0.0))
    assert Schedule.from_json(guided.to_json()) == guided
    assert guided.with_guidance([1] * 4) == schedule  # all of it is what it is without
    assert guided.at([0, 2]).guidance is None and guided.at([0, 3]).guidance == (1.0, 0.0)
    assert schedule_facts(guided)["guidance"] == [1.0, 0.5, 1.0, 0.0]
    assert worth_of(guided).evaluations == pytest.approx((3 + 2 + 2 + 1.5) / 3)
    assert "format_version: 4 has no guidance; give 5" in _refused(
        {**json.loads(guided.to_json()), "format_version": 4}
    )
    for wrong, words in (
        ([1, 1, 1], "guidance: 3 numbers for 4 evaluations"),
        ([1, 1, 1, -0.5], "guidance.3: Input should be greater than or equal to 0"),
        ([1, 1, 1, float("nan")], "guidance.3"),
        ([1, 1, 1, "1"], "guidance.3"),
        # Evaluation 2 skips the middle, which evaluation 0 wrote without an unconditional half.
        ([0, 0, 1, 1], "evaluation 2, block mid_block: is guided, and its cache has no unconditional half"),
    ):
        assert words in _refused({**json.loads(guided.to_json()), "guidance": wrong})


def test_blocks_are_kept_for_unconditional_halves(document: dict[str, Any]) -> None:
    schedule = Schedule(**document).with_gates([[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1]])
    made, kept = with_guidance(schedule, [0, 0, 1, 1], {"conditional": ["0-1"]})
    assert kept == ((2, "mid_block"),)
    assert made.gates == ((True,) * 3, (True, False, True), (True,) * 3, (True, False, True))
    assert made.provenance["guidance"] == {"conditional": ("0-1",)}


@pytest.mark.parametrize(
    ("conditional", "shares", "words"),
    [
        (["3-1"], [], "--conditional 3-1: ends before it begins; give 1-3"),
        (["x"], [], "--conditional x: give evaluations, as in 30-49"),
        (["1=0.5"], [], "give evaluations, as in 30-49"),
        ([], ["1"], "--share 1: give evaluations, as in 10-19=0.5"),
        ([], ["1=1e"], "1e is no number"),
        (["2-4"], [], "there are the evaluations 0 to 3"),
        (["1"], ["0-2=0.5"], "evaluation 1 is named twice"),
    ],
)
def test_shares_are_read(conditional: list[str], shares: list[str], words: str) -> None:
    assert shares_of([1.0] * 4, ["3"], ["0-1=0.5"]) == (0.5, 0.5, 1.0, 0.0)
    with pytest.raises(UserError, match=re.escape(words)):
        shares_of([1.0] * 4, conditional, shares)


def _refused(document: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Schedule.model_validate(document)
    return str(caught.value)


def test_the_shipped_schema_is_current() -> None:
    shipped = Path(document_module.__file__).with_name("schedule.schema.json")
    assert json.loads(shipped.read_text()) == json_schema(), "regenerate it: see json_schema()"


def test_the_schema_refuses_what_the_code_refuses(document: dict[str, Any]) -> None:
    jsonschema.validate(document, json_schema())
    for changes in ({"keep": ["12"]}, {"steps": 0}, {"format_version": 6}, {"guidance": [-1]}, {"extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, **changes}, json_schema())


def test_config_hash_ignores_order_and_private_keys() -> None:
    digest = config_hash({"b": [1, 2], "a": {"x": None}})
    assert len(digest) == 64
    assert digest == config_hash({"_class_name": "U", "a": {"x": None}, "b": (1, 2)})
    assert digest != config_hash({"a": {"x": None}, "b": [2, 1]})
