"""The page of a comparison: whole, without anything from elsewhere, light and dark."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
from html_pages import Page
from PIL import Image

from dipgo_deploy.compare.html import curves, html_page
from dipgo_deploy.compare.metrics import TensorError, Tolerance, tensor_error
from dipgo_deploy.compare.report import Checked, Part, Report
from dipgo_deploy.compare.worst import Pair, WorstPictures
from dipgo_deploy.errors import UserError

TOLERANCE = Tolerance(1e-4)
SOUND = TensorError("noise_pred", 1e-6, 2e-6, 1.0, 110.0, passed=True, limit=1e-4)
WRONG = replace(SOUND, relative=3e-2, passed=False)
BROKEN = replace(WRONG, relative=math.inf)
CACHE = replace(SOUND, name="new_cache.<b>/out0", relative=5e-7)
LATENT = replace(SOUND, name="latent", relative=0.0)


def report(*predictions: TensorError | None) -> Report:
    """A loop with these predictions; None where nothing was launched."""
    loop = tuple(
        Checked(step, None, (SOUND,)) if error is None else Checked(step, "v<0>", (LATENT, CACHE, error))
        for step, error in enumerate(predictions)
    )
    return Report(TOLERANCE, loop=loop, skipped=("a <line>",), results=Checked(None, None, (SOUND,)))


def test_the_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    pictures = [Pair("class <0>", np.full((4, 6, 3), 0.5, np.float32), np.full((4, 6, 3), 0.25, np.float32), 1.0)]
    part = Part("weights", "", "the model", (), "x.<w>: differs")
    found = replace(report(SOUND, None, None, WRONG), parts=(part,))
    page = html_page("engines/<sd>", found, {"seed": 3, "versions": {"here": {"numpy": "2"}}}, pictures)
    assert page.startswith(b"<!DOCTYPE html>") and b"<sd>" not in page and b"&lt;sd&gt;" in page
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert b"http" not in page and b"@import" not in page and b"<script" not in page
    assert b"prefers-color-scheme: dark" in page and b"color-scheme: light dark" in page
    ours, theirs, difference = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in parsed.sources
    )
    assert ours.shape == (4, 6, 3) and (ours == 128).all() and (theirs == 64).all() and (difference == 255).all()
    assert ["weights", "the model", "different", "x.<w>: differs", "beyond"] in parsed.rows
    assert ["versions.here.numpy", "2"] in parsed.rows
    assert b"2 beyond tolerance; first: weights: x.&lt;w&gt;: differs" in page


def test_evaluations_without_a_launch_are_one_row() -> None:
    rows = Page(html_page("x", report(SOUND, None, None, SOUND, None), {})).rows
    assert [row[0] for row in rows if "no launch" in row] == ["1-2", "4"]
    assert [row[0] for row in rows if "v<0>" in row] == ["0"] * 3 + ["3"] * 3
    assert b"everything is within 0.0001" in html_page("x", report(SOUND), {})


def test_crosswise_the_page_has_what_is_made_and_what_is_inherited() -> None:
    crossed = replace(WRONG, made=1e-6, carried=3e-2, passed=True)
    page = html_page("x", report(SOUND, crossed), {})
    assert ["1", "v<0>", "noise_pred", "3.00e-02", "1.00e-06", "3.00e-02", "inherited", "ok"] in Page(page).rows
    assert {"made", "inherited"} <= {text.text for text in curves(report(SOUND, crossed).loop, 1e-4).iter("text")}


def test_curves_lie_where_the_errors_are() -> None:
    svg = curves(report(SOUND, WRONG, BROKEN).loop, 1e-4)
    (limit,) = [line for line in svg.iter("line") if line.get("class") == "limit"]
    dots = {dot.find("title").text: float(dot.get("cy")) for dot in svg.iter("circle")}
    edge = float(limit.get("y1"))
    below, above = dots["noise_pred, evaluation 0: 2.00e-06"], dots["noise_pred, evaluation 1: 3.00e-02"]
    assert above < edge < below  # y goes downwards
    assert dots["noise_pred, evaluation 2: inf"] <= above
    box = [float(value) for value in svg.get("viewBox").split()]
    points = [float(value) for line in svg.iter("polyline") for value in re.split("[ ,]", line.get("points"))]
    assert all(0 <= value <= box[2] for value in points[::2]) and all(0 <= value <= box[3] for value in points[1::2])
    assert {"noise_pred", "latent", "worst cache"} <= {text.text for text in svg.iter("text")}


def test_a_comparison_that_ended_with_an_error_is_told() -> None:
    page = html_page("x", Report(TOLERANCE), {}, error=UserError("no such <model>"))
    assert b"not compared to the end: no such &lt;model&gt;" in page and b"<svg" not in page
    assert Page(page).open == []


def test_the_worst_pictures_are_kept() -> None:
    kept = WorstPictures()
    grey = np.full((2, 3, 4, 4, 3), 0.5, np.float32)
    for place in range(6):
        other = grey.copy()
        other[1, 2] += 0.01 * place  # of a video one frame differs
        kept.take(str(place), other, grey)
    kept.take("another shape", grey[:1], grey)
    assert [pair.place for pair in kept.pairs] == ["5", "4", "3", "2"]
    assert kept.pairs[0].actual.shape == (4, 4, 3)
    assert kept.pairs[0].error == tensor_error("", kept.pairs[0].actual, kept.pairs[0].expected, TOLERANCE).relative
