"""The report on a stored engine directory: what it says, and what a browser makes of it. No torch, no ONNX."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ask, needs_chromium
from html_pages import Page
from report_inputs import COMPARISON, LIMIT, PROFILE, QUALITY, written

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.report import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.report.cells import Cells, Column
from dipgo_deploy.report.given import Given, Strip, read_given
from dipgo_deploy.report.page import report_page
from dipgo_deploy.report.schedule_chart import schedule_chart, table_rows
from dipgo_deploy.report.subject import Subject, read_subject
from dipgo_deploy.schedule.solver import Solver

STORED = Path(__file__).parents[1] / "bundle" / "format-4" / "engine"
TITLES = ["Schedule", "Sampler", "Memory", "Time", "Quality", "Pictures", "Drift", "Origin"]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return read_subject(Bundle.open(STORED))


@pytest.fixture(scope="module")
def whole(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A page with everything in it."""
    folder = tmp_path_factory.mktemp("measured")
    theirs = {**PROFILE, "engine_dir": str(STORED), "loop_seconds": 0.108}
    ours = {**PROFILE, "engine_dir": "copy"}
    copy = Path(shutil.copytree(STORED, folder / "copy"))
    files = [written(folder, one) for one in ({**ours, "engine_dir": str(copy)}, theirs, LIMIT, QUALITY, COMPARISON)]
    other = subject
    mine = read_subject(Bundle.open(copy))
    random = np.random.default_rng(0)
    strip = Strip("seed 3", random.random((8, 8, 3)), random.random((8, 8, 3)))
    return report_page(mine, replace(read_given(mine, other, files), strips=[strip], no_pictures=""))


def test_a_directory_alone_says_what_it_does_not_hold(subject: Subject) -> None:
    raw = report_page(subject, read_given(subject, None, []))
    page = Page(raw)
    assert page.open == [] and page.headings == ["engine", *TITLES]
    assert all(source.startswith("#") and source[1:] in page.ids for source in page.sources)
    assert b"http" not in raw and b"@import" not in raw
    assert [figure.split()[0] for figure in page.figures] == ["4", "58.1%", "1.72", "77.9", "8.0"]
    for line in (
        "No times were given. Make them: dipgo-bench profile --engine-dir ",
        "--model tiny-dit --baselines -o quality.json and give --bench quality.json.",
        "No pictures: give --against",
        "No drift from the model in torch was given. Make it: dipgo-compare --engine-dir",
        "The schedule has no solver of its own",
    ):
        assert page.said(line), line


def test_charts_and_tables_say_the_same(subject: Subject) -> None:
    page = Page(report_page(subject, Given(no_pictures="none")))
    chart = page.charts["schedule-map"]
    assert chart["cells"] == ["0101"] * 4  # computed, reused, computed, reused
    assert chart["columns"][1].startswith("evaluation 1, timestep 500: v01, ")
    assert [chart["texts"][note] for note in chart["notes"]["0"][1][2:]] == [
        "reads cache.transformer_blocks.0.attn1/out0 (2.0 KiB at byte 0), written at evaluation 0"
    ]
    assert ["transformer_blocks.0.ff", "0, 2", "1, 3"] in page.rows
    rows = page.charts["rows"]
    assert rows["rows"][-1] == "final latent" and rows["columns"] == [
        "initial noise",
        *(f"prediction {n}" for n in (1, 2, 3, 4)),
    ]
    assert rows["cells"][0] == "10000" and set(rows["cells"][-1]) <= {"1", "2"}
    # Each chart has a name, and is reached with the keyboard.
    groups = [label for role, label in page.named if role == "group"]
    assert len(groups) == len(page.charts) == 4 and all("arrow keys" in label for label in groups)
    assert {label for role, label in page.named if role == "img"} == {one.partition(";")[0] for one in groups[:3]} | {
        groups[3].removesuffix("; arrow keys go through it")
    }
    used = [mark for mark in page.charts["arena"]["marks"] if "in use" in mark[4]]
    assert len(used) == 4 and all("8.0 KiB in use" in mark[4] for mark in used)


def test_the_other_schedules_of_a_directory_are_named(subject: Subject) -> None:
    schedules = [{"name": name, "launches": launches, "graphs": []} for name, launches in (("a", 4), ("b", 1))]
    page = Page(report_page(replace(subject, facts={**subject.facts, "name": "a", "schedules": schedules}), Given()))
    assert page.said("The directory has other schedules, which --schedule shows: b (1 launch).")


def test_a_solver_of_its_own_stands_for_the_steps_of_its_sampler(subject: Subject) -> None:
    rows = tuple(tuple(1.0 if column <= row else 0.0 for column in range(5)) for row in range(4))
    made = {"reference": {"sampler": "DDIMScheduler", "num_inference_steps": 8}, "images": 12}
    solver = Solver(timesteps=(9.0, 6.0, 3.0, 0.0), rows=rows, final=(1.0,) * 5, noises=0, provenance=made)
    sampler = subject.schedule.sampler.model_copy(update={"num_inference_steps": 8})
    schedule = subject.schedule.model_copy(update={"solver": solver, "sampler": sampler})
    fitted = replace(subject, schedule=schedule)
    assert subject.macs_share is not None and fitted.macs_share == pytest.approx(subject.macs_share / 2)
    page = Page(report_page(fitted, Given(no_pictures="none")))
    assert page.figures[0] == "4 for 8 evaluations" and page.figures[2].startswith("3.44 ")
    assert page.said(
        "A solver of its own in place of DDIMScheduler, 4 steps: 4 launches fitted to DDIMScheduler, 8 steps"
    )


def test_what_was_measured_is_shown(whole: bytes) -> None:
    page = Page(whole)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["the loop"] == ["54 ms"] and rows["in 4 launches"] == ["52 ms"]
    assert rows["speed-up"] == ["2.00; the multiply-accumulates allow 1.00 (200%)"]
    assert rows["v00"] == ["2", "21 ms", "80.8%"]  # the last of the tables with it
    assert rows["ours"][:4] == ["2", "2 GMACs", "0.9900 (0.9860 to 0.9940)", "0.0500 (0.0400 to 0.0600)"]
    assert page.said("beyond tolerance (loop, evaluation 2)") and page.said("Not compared: no prompt")
    assert sum(source.startswith("data:image/png;base64,") for source in page.sources) == 3
    times = page.charts["times"]["marks"]
    # Two evaluations run whole; the ideal is between them.
    assert times[0][4].endswith("20 ms, ideal 21 ms, the machine's limit 8 ms")
    assert times[2][4].endswith("22 ms, ideal 21 ms, the machine's limit 8 ms")
    assert ["v00", "2", "8 ms", "cpu 16 ms (2.00 times)"] in page.rows
    assert page.said("50 GMACs and 9.31 GiB a second")


def test_nothing_of_a_name_becomes_part_of_the_page(subject: Subject) -> None:
    facts = {**subject.facts, "model": {**subject.facts["model"], "name": "</script><script>alert(1)</script>"}}
    cells = replace(subject.cells, blocks=("</script><b>", *subject.cells.blocks[1:]))
    raw = report_page(replace(subject, facts=facts, cells=cells), Given(no_pictures="none"))
    assert b"alert(1)</script>" not in raw and b"</script><b>" not in raw
    assert Page(raw).charts["schedule-map"]["rows"][0] == "</script><b>"


def test_a_thousand_evaluations_of_a_large_model_stay_below_a_megabyte(subject: Subject) -> None:
    """As many values are stored as the blocks are computed."""
    blocks = tuple(f"transformer_blocks.{n}" for n in range(57))
    columns = tuple(Column(step, 1.0 * step, ("v00",), 10) for step in range(1000))
    row = tuple(int(step % 5 > 0) for step in range(1000))
    notes = {(block, step): ("reads a", "reads b") for block in range(57) for step in range(1000) if step % 5}
    cells = Cells(blocks, columns, (row,) * 57, notes, True)
    chart = schedule_chart(cells, 10)
    assert chart.data["notes"][0][:2] == [[1, 4, 0, 1], [6, 9, 0, 1]]
    paths = [path.get("d", "") for path in chart.drawing.iter("path")]
    assert len(paths) == 2
    assert len(report_page(replace(subject, cells=cells), Given(no_pictures="none"))) < 10**6
    assert table_rows(cells)[0][1].startswith("0, 5, 10")


def test_a_limit_of_other_graphs_is_refused(subject: Subject, tmp_path: Path) -> None:
    other = {**LIMIT, "graphs": LIMIT["graphs"][:1]}
    with pytest.raises(UserError, match=r"its graphs are not those of .*engine; measure that, or leave it out"):
        read_given(subject, None, [written(tmp_path, other)])


def test_a_directory_of_another_model_is_refused(subject: Subject) -> None:
    manifest = subject.bundle.manifest
    model = manifest.model.model_copy(update={"class_name": "UNet2DModel"})
    bundle = replace(subject.bundle, manifest=manifest.model_copy(update={"model": model}))
    with pytest.raises(UserError, match=r"--against .*: is of UNet2DModel, .* of DiTTransformer2DModel; give"):
        read_given(subject, replace(subject, bundle=bundle), [])


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([str(STORED), *options]) == 2
    return capsys.readouterr().err


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    assert main([str(STORED), "--bench", str(written(tmp_path, PROFILE)), "--json", "-o", str(target)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bytes"] == target.stat().st_size < 2**20
    assert "report.html: the page" in printed.err
    against = ["--against", str(STORED), "-o", str(tmp_path / "two.html")]
    assert main([str(STORED), *against]) == 0
    assert "No pictures: one of the directories has no VAE." in capsys.readouterr().out
    assert Page((tmp_path / "two.html").read_bytes()).said("one of the directories has no VAE")
    assert main([str(STORED), *against, "--no-pictures"]) == 0
    assert "--prompt and --class-labels: are for pictures of two directories" in refused(capsys, "--prompt", "a bag")
    assert "--prompt: tiny-dit takes none; leave it out" in refused(capsys, *against, "--prompt", "a bag")
    assert main([str(STORED), "--bench", str(tmp_path / "none.json"), "-o", str(tmp_path / "other.html")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err and not (tmp_path / "other.html").exists()


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dipgo_deploy.cli.report import main; status = main(sys.argv[1:]);"
        "print(status, *sorted({'torch', 'diffusers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(STORED), "-o", str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0"


PROBE = """
const tip = document.querySelector('.tip');
const said = {};
for (const holder of document.querySelectorAll('.scroll[id]')) {
  const svg = holder.querySelector('svg');
  svg.scrollIntoView({block: 'center'});
  const box = svg.getBoundingClientRect();
  const data = JSON.parse(document.querySelector(`script[data-chart="${holder.id}"]`).textContent);
  const scale = box.width / svg.viewBox.baseVal.width;
  const [x, y] = data.marks
    ? [data.marks[0][0] + data.marks[0][2] / 2, data.marks[0][1] + data.marks[0][3] / 2]
    : [data.x + 0.5 * data.width, data.y + 1.5 * data.height];
  const at = {clientX: box.left + x * scale, clientY: box.top + y * scale, bubbles: true};
  svg.dispatchEvent(new PointerEvent('pointermove', at));
  const hovered = tip.textContent;
  const place = tip.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent('pointerleave'));
  const left = tip.textContent;
  const press = (key) => {
    holder.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    return tip.textContent;
  };
  const names = holder.parentElement.querySelectorAll('.names div');
  const first = names.length ? names[0].getBoundingClientRect().top - box.top : null;
  said[holder.id] = {hovered, left, right: press('ArrowRight'), escaped: press('Escape'), first, y: data.y,
    inside: place.left >= 0 && place.right <= innerWidth && place.top >= 0 && place.bottom <= innerHeight};
}
const style = getComputedStyle(document.body);
return {said, width: innerWidth, over: document.documentElement.scrollWidth - innerWidth,
  ink: style.color, page: style.backgroundColor};
"""


def _light(colour: str) -> float:
    numbers = [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    return sum(numbers) / 3


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (500, True)])
def test_in_a_browser(whole: bytes, tmp_path: Path, width: int, dark: bool) -> None:
    found = ask(whole, tmp_path, PROBE, width=width, dark=dark)
    assert found["width"] == width and found["over"] <= 0  # the page itself is never wider than the window
    assert (_light(found["page"]) < 128 < _light(found["ink"])) is dark
    charts: dict[str, Any] = found["said"]
    assert charts.keys() == {"schedule-map", "timesteps", "rows", "arena", "times", "quality-0"}
    for name, chart in charts.items():
        assert chart["hovered"] and chart["inside"] and chart["left"] == "", name
        assert chart["right"] and chart["escaped"] == "", name
        if chart["first"] is not None and "y" in chart:  # names stand beside their rows
            assert abs(chart["first"] - chart["y"]) < 3, name
    assert charts["schedule-map"]["hovered"].splitlines()[:2] == [
        "transformer_blocks.0.ff, evaluation 0, timestep 750: v00, 279 kMACs (100.0% of a full evaluation)",
        "computed",
    ]
    assert charts["schedule-map"]["hovered"].splitlines()[2].startswith("writes cache.transformer_blocks.0.ff/out0")
    assert charts["times"]["hovered"].endswith("20 ms, ideal 21 ms, the machine's limit 8 ms")
