from __future__ import annotations

import html
import io
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_engines import LABELS, changed, corrupted, save_dit_pipeline, schedule_for, write

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import Components, ConditionSpec
from dipgo_deploy.cli.compare import class_ids, main
from dipgo_deploy.cli.compared import show
from dipgo_deploy.compare.metrics import TensorError, Tolerance
from dipgo_deploy.compare.report import Checked, Report
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.report.measured import Comparison, read_measured

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    planned = plan_export(str(model), schedule_for(model), ExportOptions(layout="variants"))
    return write(planned, tmp_path_factory.mktemp("engines") / "dit")


def command(engine_dir: Path, *more: object) -> list[str]:
    return ["--engine-dir", str(engine_dir), "--threads", "1", *map(str, more)]


def test_agreement_is_shown(engine, capsys):
    assert main(command(engine)) == 0
    printed = capsys.readouterr()
    assert "variants by themselves" in printed.out and "the whole loop" in printed.out
    assert "launch list: " in printed.out and "picture, classes, class 0: " in printed.out
    assert "picture, several classes, class 2: " in printed.out
    assert "PSNR" in printed.out and "everything is within 0.0001 of the supernet" in printed.out
    assert "beyond" not in printed.out
    assert printed.err == ""


def test_json_is_all_there_is_on_stdout(engine, tmp_path, capfd):
    assert main(command(engine, "--class-labels", "bag", "--seed", 5, "--guidance-scale", 2, "--json")) == 0
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    assert "the whole loop" in printed.err
    assert report["passed"] is True and report["first_failure"] is None
    assert report["tolerance"] == {"relative": 1e-4, "absolute": 0.0}
    assert (report["dtype"], report["backend"], report["seed"], report["guidance_scale"]) == ("fp32", "cpu", 5, 2.0)
    keys = {"name", "max_absolute", "relative", "cosine", "psnr", "passed", "limit", "made", "carried"}
    assert keys == set(report["variants"][0]["tensors"][0])
    assert len(report["loop"]) == 6 and report["loop"][0]["step"] == 0
    assert [tensor["name"] for tensor in report["results"]["tensors"]] == ["latents", "images"]
    parts = {part["name"] for part in report["parts"]}
    assert parts == {"manifest", "launch list", "weights", "conditions", "VAE"}
    assert [part["place"] for part in report["pictures"]] == ["classes, class 1"] and report["skipped"] == []
    assert all(part["passed"] for part in (*report["parts"], *report["pictures"]))
    written = tmp_path / "compare.json"
    written.write_text(printed.out)
    read = read_measured(written)  # as dipgo-report does
    assert isinstance(read, Comparison) and [step.step for step in read.loop] == list(range(6))


def test_beyond_tolerance_is_status_1_and_one_line(engine, tmp_path, capfd):
    bad = corrupted(engine, tmp_path / "bad", "v00.onnx", "transformer_blocks.3.ff.net.0.proj.weight")
    assert main(command(bad, "--json", "--junit", tmp_path / "compare.xml", "--html", tmp_path / "compare.html")) == 1
    printed = capfd.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("error: weights, graphs, transformer_blocks.3.ff.net.0.proj.weight, values: error 2.00e+00")
    assert any(
        failure.startswith("variant v00 by itself, evaluation 0, ") for failure in json.loads(printed.out)["failures"]
    )
    report = json.loads(printed.out)
    assert report["passed"] is False and f"error: {report['first_failure']}" == line
    assert "beyond" in printed.err
    sides = report["models"]
    assert sides["engine_dir"]["config_hash"] == sides["model"]["config_hash"]
    assert len(sides["model"]["weights"]) == len(sides["engine_dir"]["seal"]) == 64
    assert "graphs/weights.bin" in sides["engine_dir"]["weights"]
    assert report["versions"]["here"]["torch"] == report["versions"]["engine_dir"]["torch"] == torch.__version__
    assert [row["relative"] for row in report["tolerances"]] == [1e-4, 0.0]
    assert all(row["reason"] for row in report["tolerances"]) and report["error"] is None
    page = (tmp_path / "compare.html").read_text()
    assert f"first: {report['first_failure']}" in html.unescape(page) and "<svg" in page
    assert page.count("data:image/png") == 3 * 4  # both sides of four pictures, and their difference
    assert all(digest in page for digest in sides["engine_dir"]["weights"].values())
    root = ET.parse(tmp_path / "compare.xml").getroot()
    assert [suite.get("name") for suite in root] == ["comparison", "parts", "variants", "loop", "results", "pictures"]
    assert len(root.findall("testsuite[@name='loop']/testcase")) == len(report["loop"])
    told = "\n".join(str(failure.text) for failure in root.iter("failure")).splitlines()
    assert sorted(told) == sorted(report["failures"])
    failed = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert root.get("failures") == str(len(failed)) and root.get("errors") == "0"
    assert root.get("tests") == str(len(list(root.iter("testcase"))))
    given = {entry.get("name"): entry.get("value") for entry in root.iter("property")}
    assert given["models.engine_dir.seal"] == sides["engine_dir"]["seal"] and given["backend"] == "cpu"


def test_the_loop_names_its_first_bad_step(engine, tmp_path, capfd):
    found = {}

    def edit(manifest):
        launch = manifest["plan"]["launches"][2]
        launch["coefficients"][1] += 0.05
        found.update(step=launch["step"], variant=manifest["plan"]["variants"][launch["variant"]]["name"])

    bad = changed(engine, tmp_path / "bad", edit)
    assert main(command(bad, "--variants-only")) == 0
    assert main(command(bad, "--loop-only")) == 1
    wanted = f"error: loop, evaluation {found['step']}, variant {found['variant']}, latent: error "
    assert capfd.readouterr().err.splitlines()[-1].startswith(wanted)
    assert main(command(bad, "--loop-only", "--tolerance", "1000")) == 0
    assert main(command(bad, "--loop-only", "--atol", "1000")) == 0


def test_another_place_of_the_model_and_saved_inputs(engine, model, tmp_path):
    options = ["--model", model / "transformer", "--variants-only", "--save-inputs", tmp_path / "inputs"]
    assert main(command(engine, *options)) == 0
    names = {entry["name"] for entry in json.loads((engine / "manifest.json").read_text())["plan"]["variants"]}
    assert {path.stem for path in (tmp_path / "inputs").iterdir()} == names


def test_a_comparison_that_ends_with_an_error_says_so_in_both_files(engine, tmp_path, capfd):
    bad = Path(shutil.copytree(engine, tmp_path / "bad"))
    (bad / "graphs" / "v00.onnx").write_bytes(b"no graph")
    reseal(bad)
    assert main(command(bad, "--variants-only", "--json", "--junit", tmp_path / "compare.xml")) == 2
    printed = capfd.readouterr()
    facts, root = json.loads(printed.out), ET.parse(tmp_path / "compare.xml").getroot()
    assert facts["passed"] is False and f"error: {facts['error']}" == printed.err.splitlines()[-1]
    assert "v00.onnx" in facts["error"] and facts["models"] and facts["versions"]
    assert (root.get("errors"), root.get("failures")) == ("1", "0")
    assert [found.get("message") for found in root.iter("error")] == [facts["error"]]


def test_evaluations_without_a_launch_are_one_row():
    def checked(step, variant, relative):
        passed = relative < 1e-4
        return Checked(step, variant, (TensorError("noise_pred", relative, relative, 1.0, 80.0, passed, 1e-4),))

    loop = (checked(0, "v00", 0), *(checked(n, None, 1e-6 * n) for n in (1, 2, 3)), checked(4, "v01", 0))
    console = Console(width=120, file=io.StringIO())
    show(console, Report(Tolerance(1e-4), loop=(*loop, checked(5, None, 1.0), checked(6, None, 0.0))), "model")
    rows = [line.split() for line in console.file.getvalue().splitlines() if "noise_pred" in line]
    rows = [[cell for cell in row if cell not in ("│", "|")] for row in rows]
    assert [row[0] for row in rows] == ["0", "1-3", "4", "5-6"]
    assert rows[1][1:3] == ["no", "launch"] and rows[1][4] == "3.00e-06" and rows[3][-1] == "beyond"


def test_a_bare_text_denoiser_needs_no_prompt_and_takes_none(engine):
    manifest = Bundle.open(engine).manifest
    text = ConditionSpec(name="encoder_hidden_states", shape=(2, 77, 16), dtype="float32", source="text")
    bare = manifest.model_copy(update={"conditions": (text,), "guidance_scale": None, "components": Components()})
    assert class_ids(bare, (), (), None) == ()
    with pytest.raises(UserError, match="no text encoder"):
        class_ids(bare, ("a bag",), (), None)
    assert class_ids(manifest, (), ("coat",), None) == (LABELS["coat"],)
    two = manifest.model_copy(update={"batch": 2})
    assert class_ids(two, (), ("coat,0",), None) == (LABELS["coat"], 0)


ERRORS = [
    ("", "--variants-only --loop-only", "not both"),
    ("", "--tolerance -1", "--tolerance -1.0: give a number of at least 0"),
    ("", "--tolerance nan", "--tolerance nan: give a number of at least 0"),
    ("", "--atol inf", "--atol inf: give a number of at least 0"),
    ("", "--tolerance much", "--tolerance"),
    ("", "--backend quantum", "--backend"),
    ("", "--threads 0", "--threads"),
    ("", "--seed x", "--seed"),
    ("", "--seed 99999999999999999999", "seed 99999999999999999999"),
    ("", "--guidance-scale 0.5", "guidance_scale: 0.5"),
    ("", "--prompt hat", "prompt: this engine directory takes class labels"),
    ("", "--class-labels hat", f"no class is named 'hat'; the names are {', '.join(sorted(LABELS))}"),
    ("", "--class-labels bag,boot", "--class-labels: 2 given for a batch of 1"),
    ("", "--class-labels bag,,boot", "an empty label"),
    ("", "--save-inputs {tmp}/file", "file: is a file; give a folder"),
    ("", "--junit {tmp}/none/a.xml", "--junit {tmp}/none/a.xml: the folder {tmp}/none does not exist"),
    ("", "--model {tmp}/none", "none: no such folder"),
    ("", "--model {tmp}/file", "is a file"),
    ("none", "", "no manifest.json"),
]


@pytest.mark.parametrize(("where", "line", "message"), ERRORS)
def test_mistakes_are_one_line(engine, tmp_path, capfd, where, line, message):
    (tmp_path / "file").write_text("")
    words = [word.replace("{tmp}", str(tmp_path)) for word in line.split()]
    assert main(command(tmp_path / where if where else engine, *words)) == 2
    printed = capfd.readouterr()
    assert message.replace("{tmp}", str(tmp_path)) in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_shows_examples(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "dipgo-compare --engine-dir engines/fashion-sd" in printed
    assert "--save-inputs" in printed
