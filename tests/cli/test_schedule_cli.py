from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dipgo_deploy.cli import schedule as cli
from dipgo_deploy.cli.schedule import main
from dipgo_deploy.extras import install
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.importers.registry import KINDS
from dipgo_deploy.schedule.solver import Solver

ASSETS = Path(cli.__file__).resolve().parents[1] / "assets"
VERBS = ("full", "uniform", "deepcache", "random", "import", "export", "guidance", "validate", "show", "diff")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "uniform.json"
    options = ["--model", "fashion-sd", "--sampler", "ddim", "--steps", "6", "--interval", "3", "-o", str(path)]
    assert main(["uniform", *options]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS), *(("import", name) for name in KINDS)])
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]) -> None:
    assert main([*verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:\n" in text
    assert " ".join(("dipgo-schedule", *verb)) in text


def test_what_a_schedule_is_worth_is_said(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    line = "equals 2 plain DDIM steps on 2 of these 6 timesteps"
    assert line in capsys.readouterr().out  # as it was made
    for verb in ("show", "validate"):
        assert main([verb, str(made)]) == 0
        assert line in capsys.readouterr().out
        assert main([verb, str(made), "--json"]) == 0
        worth = json.loads(capsys.readouterr().out)["worth"]
        assert (worth["plain_steps"], worth["evaluations"]) == (2, 2)
        assert line in worth["line"]


@pytest.mark.parametrize(
    ("arguments", "method", "keep"),
    [
        (["full"], "full", ["1" * 9] * 4),
        (["uniform", "--interval", "2"], "uniform", ["1" * 9, "0" * 9] * 2),
        (["deepcache", "--interval", "2", "--branch", "1"], "deepcache", ["1" * 9, "100000011"] * 2),
    ],
)
def test_making(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], method: str, keep: list[str]
) -> None:
    path = tmp_path / "s.json"
    options = ["--model", "fashion-sd", "--sampler", "ddim", "--steps", "4", "-o", str(path), "--json"]
    assert main([*arguments, *options]) == 0
    captured = capsys.readouterr()
    schedule = Schedule.load(path)
    assert list(schedule.keep) == keep
    assert schedule.provenance["method"] == method
    facts = json.loads(captured.out)
    assert (facts["file"], facts["steps"], facts["blocks"]) == (str(path), 4, 9)
    assert facts["kept_gates"] == pytest.approx(schedule.kept_share)
    assert captured.err.startswith(f"{path}: UNet2DConditionModel, 4 evaluations x 9 blocks")


def test_deepcache_goes_by_timesteps(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    options = ["--model", "fashion-sd", "--sampler", "pndm", "--steps", "5", "--interval", "2", "-o", str(path)]
    assert main(["deepcache", *options]) == 0
    # PNDM evaluates its second timestep twice.
    assert [row == "1" * 9 for row in Schedule.load(path).keep] == [True, False, False, False, True, False]


def test_random_is_reproducible(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        options = ["--model", "fashion-dit", "--sampler", "ddim", "--steps", "10", "--ratio", "0.5", "--seed", seed]
        assert main(["random", *options, "-o", str(file)]) == 0
    first, again, other = map(Schedule.load, files)
    assert first == again
    assert first.keep != other.keep
    assert first.kept_share == 0.5
    assert main(["diff", str(files[0]), str(files[1])]) == 0


def test_import_csv_for_a_sampler_that_evaluates_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, path = tmp_path / "keep.csv", tmp_path / "s.json"
    table.write_text("1,1,1,1,1,1,1,1,1\n0,0,0,0,0,0,0,0,0\n1,1,1,0,1,1,1,1,1\n")
    options = ["--model", "fashion-sd", "--steps", "3", "-o", str(path), "--overwrite"]
    assert main(["import", "csv", str(table), "--sampler", "pndm", *options]) == 0
    schedule = Schedule.load(path)
    assert schedule.keep == ("1" * 9, "0" * 9, "111011111", "111011111")
    assert schedule.provenance["parameters"]["last_row_repeated"] == 1
    path.unlink()
    table.write_text("1,1,1,1,1,1,1,1,1\n")
    refused(capsys, ["import", "csv", str(table), "--sampler", "pndm", *options], "evaluates the denoiser 4 times")
    assert not path.exists()


def test_import_smoothcache_is_about_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "fora.json", tmp_path / "s.json"
    source.write_text('{"attn": [1, 0, 1], "mlp": [1, 1, 0]}')
    options = ["--model", "fashion-dit", "--sampler", "ddim", "--steps", "3", "-o", str(path), "--overwrite"]
    assert main(["import", "smoothcache", str(source), *options]) == 0
    schedule = Schedule.load(path)
    assert schedule.model.granularity == "layer"
    assert schedule.block_names[:2] == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff")
    pairs = len(schedule.blocks) // 2
    assert schedule.keep == ("11" * pairs, "01" * pairs, "10" * pairs)
    assert main(["validate", str(path), "--model", "fashion-dit"]) == 0
    refused(capsys, ["import", "smoothcache", str(source), *options, "--granularity", "block"], "--granularity layer")
    refused(capsys, ["import", "smoothcache", str(source), *options, "--cache", "residual"], "cannot have a cache")


def test_import_l2c_router_takes_a_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = tmp_path / "router.pt", tmp_path / "s.json"
    options = ["--model", "fashion-dit", "--sampler", "ddim", "--steps", "2", "-o", str(path), "--overwrite"]
    source.write_text("no checkpoint")
    refused(capsys, ["import", "l2c-router", str(source), *options], f"{source}: not a file of torch.save")
    layers = 2 * json.loads((ASSETS / "fashion-dit" / "transformer" / "config.json").read_text())["num_layers"]
    # sigmoid(-1) = 0.27 for all layers but the first, sigmoid(1) = 0.73
    scores = torch.tensor([1.0] + [-1.0] * (layers - 1))
    torch.save({"routers": {"0.prob": scores, "1.prob": scores}}, source)
    for threshold, row in (("0.1", "1" * layers), ("0.5", "1" + "0" * (layers - 1)), ("0.9", "0" * layers)):
        assert main(["import", "l2c-router", str(source), *options, "--threshold", threshold]) == 0
        assert Schedule.load(path).keep == ("1" * layers, row)
    refused(capsys, ["import", "l2c-router", str(source), *options, "--threshold", "1"], "--threshold")


def test_import_dipgo_gates_refuses_what_it_would_have_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, path = tmp_path / "evil.pkl", tmp_path / "s.json"
    evil.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    options = ["--model", "fashion-sd", "--sampler", "ddim", "-o", str(path)]
    refused(capsys, ["import", "dipgo-gates", str(evil), *options], "refers to os.system")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evil.pkl"]


def test_settings_of_another_program_become_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path, back = tmp_path / "cache.json", tmp_path / "s.json", tmp_path / "back.json"
    config = {"Fn_compute_blocks": 1, "steps_computation_policy": "static", "steps_computation_mask": "1101"}
    source.write_text(json.dumps({"cache_config": config}))
    options = ["--model", "fashion-dit", "--sampler", "ddim", "--steps", "4"]
    assert main(["import", "cache-dit", str(source), *options, "-o", str(path)]) == 0
    assert Schedule.load(path).keep[2].rstrip("0") == "1"
    assert main(["export", "cache-dit", str(path), "-o", str(back)]) == 0
    assert main(["import", "cache-dit", str(back), *options, "-o", str(path), "--overwrite"]) == 0
    refused(
        capsys, ["export", "smoothcache", str(path), "-o", str(back), "--overwrite"], f"{path}: transformer_blocks.0 "
    )
    # Three numbers: a solver of its own, and an evaluation for each launch.
    source.write_text('{"cache_interval": 2, "disable_cache_before_step": 2, "disable_cache_after_step": -1}')
    options = ["--model", "fashion-dit", "--sampler", "ddim", "--steps", "8", "-o", str(path), "--overwrite"]
    assert main(["import", "openvino-taylorseer", str(source), *options]) == 0
    schedule = Schedule.load(path)
    assert schedule.solver is not None and schedule.steps == len(schedule.solver.timesteps) == 5
    assert schedule.solver.summary == "5 launches as by openvino-taylorseer"
    assert "with weights of its own in place of those of DDIM" in capsys.readouterr().out
    assert main(["validate", str(path), "--model", "fashion-dit"]) == 0
    refused(
        capsys,
        ["import", "first-block-cache", str(source), *options],
        "so what runs is not known before a run; give cache-dit",
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dipgo-gates", b"cos\nsystem\n(S'true'\ntR.", "refers to os.system, which no schedule needs: refused"),
        ("l2c-router", b"PK\x03\x04", "it is no complete zip archive"),
    ],
)
def test_hostile_content_is_refused_before_torch_and_diffusers_are_loaded(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / "evil").write_bytes(content)
    model = "fashion-sd" if name == "dipgo-gates" else "fashion-dit"
    options = [str(tmp_path / "evil"), "--model", model, "--sampler", "ddim", "-o", str(tmp_path / "s.json")]
    code = (
        f"from dipgo_deploy.cli.schedule import main; status = main(['import', {name!r}, *{options!r}])\n"
        "import sys; print(status, {'torch', 'diffusers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert words in done.stderr
    assert done.stdout.splitlines()[-1] == "2 set()"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["full", "--model", "no-model", "-o", "x.json"], "no-model: no such folder"),
        (["full", "--model", "fashion-sd", "--sampler", "nonsense", "-o", "x.json"], "nonsense"),
        (["full", "--model", "fashion-sd", "--cache", "residual", "-o", "x.json"], "cannot have a cache"),
        (["full", "--model", "fashion-sd"], "Missing option '-o'"),
        (["full", "--model", "fashion-sd", "--sampler", "ddim", "-o", "no/folder/x.json"], "no/folder does not exist"),
        (["uniform", "--model", "fashion-sd", "--interval", "0", "-o", "x.json"], "--interval"),
        (["deepcache", "--model", "fashion-dit", "--interval", "2", "-o", "x.json"], "UNets only"),
        (
            ["deepcache", "--model", "fashion-sd", "--interval", "2", "--branch", "9", "-o", "x.json"],
            "branch: 9 is not one of this model's branches 0 to 3",
        ),
        (
            ["random", "--model", "fashion-sd", "--ratio", "1", "--steps", "2", "-o", "x.json"],
            "evaluation 0 runs in full",
        ),
        (["validate", "none.json"], "none.json: no such file"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, words)
    assert list(tmp_path.iterdir()) == []


def test_validate(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["validate", str(made), "--model", "fashion-sd", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["valid"] is True
    assert facts["checked"] == ["format", "gates", "sampler", "model"]
    refused(capsys, ["validate", str(made), "--model", "fashion-dit"], f"{made}: model.class_name: made for")


def test_validate_refuses_a_wrong_number_of_rows(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(made.read_text())
    document["steps"], document["keep"] = 5, document["keep"][:5]
    made.write_text(json.dumps(document))
    refused(capsys, ["validate", str(made)], f"{made}: steps: 5 rows, but DDIMScheduler with 6 steps evaluates")


def test_validate_without_diffusers_says_what_it_did_not_check(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main(["validate", str(made)]) == 0
    out = capsys.readouterr().out
    assert "valid (format, gates):" in out
    assert f"not checked; {install('export')}" in out


def test_another_configuration_can_be_allowed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(made.read_text())
    document["model"]["config_hash"] = "0" * 64
    made.write_text(json.dumps(document))
    refused(capsys, ["validate", str(made), "--model", "fashion-sd"], "(--allow-other-config accepts it)")
    assert main(["validate", str(made), "--model", "fashion-sd", "--allow-other-config"]) == 0


def test_show_draws_blocks_by_steps(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "down_blocks.0  █··█··" in lines
    assert "mid_block      █··█··" in lines
    assert any(re.fullmatch(r"kept gates +33.3%", line) for line in lines)


def test_show_knows_a_fitted_solver(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Schedule.load(made)
    solver = Solver.model_validate(
        {
            "timesteps": [900, 100],
            "rows": [[1, 0, 0], [1, 1, 0]],
            "final": [1, 1, 1],
            "provenance": {
                "reference": {"sampler": "DDIMScheduler", "num_inference_steps": 50},
                "images": 200,
                "guidance_scales": [4, 7.5],
                "residuals": [0.0, 0.01, 0.0234],
            },
        }
    )
    fitted = plain.with_solver(solver, ((True,) * len(plain.blocks),) * 2)
    fitted.save(tmp_path / "fitted.json")
    assert main(["show", str(tmp_path / "fitted.json")]) == 0
    shown = capsys.readouterr().out
    assert (
        "solver      2 launches fitted to DDIMScheduler, 50 steps on 200 images at guidance 4, 7.5 (relative" in shown
    )
    assert "costs what 2 plain evaluations cost" in shown and "nothing is saved" not in shown
    assert main(["show", str(tmp_path / "fitted.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["solver"]["images"] == 200
    assert Solver.model_validate({**solver.model_dump(), "provenance": {}}).summary == "2 launches fitted"


def test_show_wraps_long_schedules(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(made.read_text())
    document["steps"] = 150
    document["keep"] = [*document["keep"][:1] * 149, "0" * 9]
    made.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["show", str(made)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mid_block")]
    assert len(rows) > 1
    assert "".join(line[len("down_blocks.0") + 2 :] for line in rows) == "█" * 149 + "·"
    assert all(len(line) <= 80 for line in rows)


@pytest.mark.slow  # traces the model
def test_show_with_a_model_tells_what_the_compiler_makes_of_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", str(made), "--model", "fashion-sd", "--json"]) == 0
    captured = capsys.readouterr()
    facts: dict[str, Any] = json.loads(captured.out)
    # Empty steps only repeat the last prediction: two launches of one variant, and nothing is ever read from a cache.
    assert (facts["variants"], facts["launches"], facts["peak_cache_bytes"]) == (1, 2, 0)
    assert facts["launched_macs"] == pytest.approx(2 / 6)
    assert facts["kept_macs"] >= facts["launched_macs"]
    assert facts["keep"] == ["1" * 9, "0" * 9, "0" * 9] * 2
    assert "launches    2 for 6 evaluations" in captured.err


def test_guidance_of_evaluations(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "guided.json"
    capsys.readouterr()
    assert main(["guidance", str(made), "--conditional", "3-5", "--share", "1=0.5", "-o", str(output)]) == 0
    assert "guidance: all 0, 0.5 1, all 2, conditional only 3-5" in capsys.readouterr().out
    assert Schedule.load(output).guidance == (1.0, 0.5, 1.0, 0.0, 0.0, 0.0)
    assert main(["show", str(output)]) == 0
    assert re.search(r"guidance +all 0, 0.5 1, all 2, conditional only 3-5", capsys.readouterr().out)
    assert main(["guidance", str(made), "--conditional", "0-1", "-o", str(tmp_path / "late.json")]) == 0
    assert "gates are kept for unconditional halves, the first of down_blocks.0 at evaluation 2" in (
        capsys.readouterr().out
    )
    other = str(tmp_path / "other.json")
    refused(capsys, ["guidance", str(made), "-o", other], "nothing is to change; give --conditional or --share")


def test_diff_names_what_changed_and_exits_1(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule.load(made)
    gates = [list(row) for row in schedule.gates]
    gates[4][4] = True
    other = tmp_path / "other.json"
    schedule.with_gates(gates, {"method": "by hand"}).save(other)
    capsys.readouterr()
    assert main(["diff", str(made), str(other)]) == 1
    out = capsys.readouterr().out
    assert "evaluation 4, block mid_block: removed -> kept\n" in out
    assert "provenance.method: uniform -> by hand\n" in out
    assert main(["diff", str(made), str(other), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["gates"] == [{"step": 4, "block": "mid_block", "before": False, "after": True}]
    assert main(["diff", str(made), str(made)]) == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_cannot_be_read_is_refused_before_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = ["--model", str(tmp_path / "no-model"), "-o", str(tmp_path / "s.json")]
    refused(capsys, ["import", name, str(tmp_path / "missing"), *options], "missing: no such file")
    refused(capsys, ["import", name, str(tmp_path), *options], "not a regular file")


def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.json"
    options = ["full", "--model", "fashion-sd", "--sampler", "ddim", "--steps", "2", "-o", str(path)]
    path.write_text("mine")
    assert main(options) == 0 and path.read_text() == "mine"
    assert f"{path} exists: writing s-1.json (--overwrite replaces it)" in capsys.readouterr().err
    assert main([*options, "--overwrite"]) == 0 and path.read_bytes() == (tmp_path / "s-1.json").read_bytes()


def test_a_forecast_goes_into_the_schedule_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    made = ["--model", "fashion-dit", "--steps", "6", "--interval", "2", "-o", str(path)]
    assert main(["uniform", *made, "--forecast", "hermite", "--forecast-order", "2"]) == 0
    line = "hermite, order 2, of 30 reads; 20 come before enough values are stored, and use those there are"
    assert f"forecast: {line}" in capsys.readouterr().out
    forecast = Schedule.load(path).forecast
    assert forecast is not None and (forecast.kind, forecast.order, forecast.contraction) == ("hermite", 2, 0.5)
    assert main(["show", str(path), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["forecast"]["reads"] == 30 and line in shown.err
    assert main(["validate", str(path)]) == 0 and line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["uniform", "--interval", "2", "--forecast-order", "1"], "means nothing without --forecast"),
        (
            ["uniform", "--interval", "2", "--forecast", "taylor", "--forecast-contraction", "0.5"],
            "belongs to --forecast hermite",
        ),
        (["full", "--forecast", "taylor"], "no block is skipped"),
    ],
)
def test_forecast_options_that_mean_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*options, "--model", "fashion-dit", "--steps", "4", "-o", str(tmp_path / "s.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()
