from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_inputs import COMPARISON, LIMIT, PROFILE, QUALITY, written

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.report.measured import Comparison, Limit, Profile, Quality, read_measured, sides

STORED = Path(__file__).parents[1] / "bundle" / "format-4" / "engine"
PLAN = Manifest.load(STORED).plan


def test_files_say_themselves_what_they_are(tmp_path: Path) -> None:
    kinds = [read_measured(written(tmp_path, document)) for document in (PROFILE, QUALITY, COMPARISON, LIMIT)]
    assert [type(one) for one in kinds] == [Profile, Quality, Comparison, Limit]
    assert kinds[2].loop[2].tensors[0].relative == math.inf  # null: not finite


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "is no measurement; give what `dipgo-bench profile -o`"),
        ({**PROFILE, "launches": []}, "launches: .*measure it again"),
        ({**QUALITY, "cases": [{**QUALITY["cases"][0], "ssim": 1}]}, "cases.*ssim.*measure it again"),
        ({**COMPARISON, "tolerance": {}}, "tolerance.relative"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    path = written(tmp_path, document)
    with pytest.raises(UserError, match=message) as caught:
        read_measured(path)
    assert str(caught.value).startswith(str(path))


def test_a_profile_goes_to_the_directory_of_its_launches() -> None:
    ours, theirs = (STORED, PLAN), (Path("full"), PLAN.model_copy(update={"launches": PLAN.launches[:1]}))
    of_ours = Profile.model_validate(PROFILE)
    of_theirs = Profile.model_validate({**PROFILE, "launches": PROFILE["launches"][:1]})
    pairs = [(Path("1.json"), of_theirs), (Path("2.json"), of_ours)]
    assert sides(pairs, ours, theirs) == (of_ours, of_theirs)
    assert sides([], ours, None) == (None, None)
    with pytest.raises(UserError, match=r"1.json: its launches are not those of .*engine; measure that"):
        sides(pairs, ours, None)
    with pytest.raises(UserError, match=r"1.json: a second profile of .*engine; give one"):
        sides([pairs[1], (Path("1.json"), of_ours)], ours, theirs)
    # Of two directories with the same launches the path decides.
    named = of_ours.model_copy(update={"engine_dir": "full"})
    assert sides([(Path("1.json"), named)], ours, (Path("full"), PLAN)) == (None, named)


def test_strict_json_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(PROFILE)[:-1])
    with pytest.raises(UserError, match="not JSON"):
        read_measured(path)
