from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from dipgo_deploy.compare.junit import junit_xml, properties
from dipgo_deploy.compare.metrics import Tolerance, tensor_error
from dipgo_deploy.compare.provenance import parameters_hash
from dipgo_deploy.compare.report import Checked, Part, Report
from dipgo_deploy.errors import UserError

EXACT = Tolerance(0.0)


def error(name: str, value: float):
    return tensor_error(name, np.full(3, value), np.ones(3), EXACT)


def test_every_thing_compared_is_a_case_with_its_own_lines() -> None:
    report = Report(
        EXACT,
        variants=(Checked(0, "v00", (error("noise_pred", 1.0),)),),
        loop=(Checked(0, "v00", (error("latent", 1.0), error("noise_pred", 2.0))), Checked(1, None, ())),
        parts=(Part("weights", "", "the model", ()), Part("tokens", "a", "it", (), "is <b>\x00 & \ud800")),
        pictures=(Part("picture", "a", "it", (error("images", 1.0),)),) * 2,
        skipped=("not drawn",),
    )
    root = ET.fromstring(junit_xml("sd", report, {"a": "b\x01"}))
    counts = {suite.get("name"): (suite.get("tests"), suite.get("failures")) for suite in root}
    assert counts == {
        "comparison": ("1", "0"),
        "parts": ("2", "1"),
        "variants": ("1", "0"),
        "loop": ("2", "1"),
        "pictures": ("2", "0"),
    }
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("8", "2", "0", "1")
    names = [case.get("name") for case in root.iter("testcase")]
    assert len(set(names)) == len(names) and "picture, a (2)" in names and "evaluation 1, no launch" in names
    assert [found.text for found in root.iter("failure")] == [
        "tokens, a: is <b>\\x00 & \\ud800",
        *[line for line in report.failures() if "noise_pred" in line],
    ]
    assert [found.get("message") for found in root.iter("skipped")] == ["not drawn"]
    assert [found.get("value") for found in root.iter("property")] == ["b\\x01"]


def test_a_comparison_that_ended_is_an_error() -> None:
    root = ET.fromstring(junit_xml("sd", Report(EXACT), {}, UserError("no graph; export it again")))
    assert (root.get("tests"), root.get("errors")) == ("1", "1")
    assert [found.get("message") for found in root.iter("error")] == ["no graph; export it again"]


def test_properties_are_flat_and_leave_results_out() -> None:
    facts = {
        "backend": "cpu",
        "models": {"model": {"seal": None, "name": "a"}},
        "tolerances": [{"of": "b"}],
        "loop": [],
    }
    assert properties(facts) == {"backend": "cpu", "models.model.name": "a", "tolerances.0.of": "b"}


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "value"])
def test_the_hash_of_parameters_is_of_all_that_tells_them_apart(change: str) -> None:
    values = torch.arange(6.0)
    other = {
        "name": {"b": values},
        "dtype": {"a": values.view(torch.int32)},
        "shape": {"a": values.reshape(2, 3)},
        "value": {"a": values + 1},
    }[change]
    assert parameters_hash({"a": values}) != parameters_hash(other)
    assert parameters_hash({"a": values, "b": values}) == parameters_hash({"b": values.clone(), "a": values.clone()})
    assert parameters_hash({"a": torch.zeros((), dtype=torch.bfloat16)})
