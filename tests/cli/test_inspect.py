from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.bundle.directory import reseal
from dipgo_deploy.bundle.manifest import seal_of
from dipgo_deploy.cli.inspect import main

STORED = Path(__file__).parents[1] / "bundle" / "format-4" / "engine"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "engine"))


def test_a_directory_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(STORED)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "model DiTTransformer2DModel (tiny-dit), 4 units (layer)",
        "latent 1 x 4x8x8, fp32, 64x64 pixels",
        "launches 4 of 2 graphs, layout variants",
        "v01 2 1, 3 4.51e+04 4 (8.0 KiB) 0 (0.0 KiB) yes",
        "v00 graphs/v00.onnx",
        "cache.transformer_blocks.0.ff/out0 2x16x16 float32 2.0 KiB 0-1, 2-3",
        "weights 77.9 KiB stored, 123.8 KiB where each graph has its own",
        "history 5.0 KiB",
        "made by dipgo_deploy 0.1.0, format 4",
        "schedule uniform",
        "tools torch ",
    ):
        assert text in shown, text
    assert "engine " not in shown  # there are none


def test_what_a_directory_may_have_besides(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine / "manifest.json"
    document = json.loads(path.read_text())
    fixed = {name: {"min": 8, "opt": 8, "max": 16, "multiple": 4} for name in ("height", "width")}
    document["sizes"] = {"batch": {"min": 1, "opt": 1, "max": 1}, **fixed}
    document["promoted"] = [[1, "transformer_blocks.0.ff"]]
    path.write_text(json.dumps({**document, "seal": seal_of(document)}))
    (engine / "plans/tensorrt-11-x").mkdir(parents=True)
    (engine / "plans/tensorrt-11-x/v00.plan").write_bytes(b"")
    assert main([str(engine)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sizes batch 1 only, height 64 to 128 in steps of 32, width 64 to 128 in steps of 32; all shapes" in shown
    assert "re-enabled 1 gates" in shown
    assert "tensorrt-11-x/v00 0.0 KiB has no record that can be read" in shown


def test_json_is_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(STORED), "--json", "--verify"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["engine_dir"] == str(STORED) and len(facts["launches"]) == 4 and "Launches" in printed.err


def test_a_difference_is_status_1(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--diff", str(STORED), str(engine)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    path = engine / "manifest.json"
    document = json.loads(path.read_text())
    document["tools"] = {f"tool{number}": "1" for number in range(40)}
    path.write_text(json.dumps({**document, "seal": seal_of(document)}))
    assert main(["--diff", str(STORED), str(engine), "--json"]) == 1
    printed = capsys.readouterr()
    found: dict[str, Any] = json.loads(printed.out)
    count = len(found["differences"])
    assert (found["differ"], found["before"], found["after"]) == (True, str(STORED), str(engine))
    assert found["differences"][-1] == {
        "section": "tools",
        "place": ["tool39"],
        "before": None,
        "after": "1",
        "only": "after",
    }
    assert printed.err.splitlines()[-1] == f"tools: {count - 30} more; --json has them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["{engine}", "{engine}"], "2 directories given; give one, or two with --diff"),
        (["--diff", "{engine}"], "1 directories given; give one, or two with --diff"),
        (["{tmp}"], "no manifest.json there"),
        (["--diff", "{engine}", "{tmp}"], "no manifest.json there"),
    ],
)
def test_mistakes_are_one_line(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([word.format(engine=engine, tmp=tmp_path) for word in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_changed_file_is_refused(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = engine / "graphs/v00.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    assert main([str(engine)]) == 2
    assert "v00.onnx: its sha256 differs from the manifest's" in capsys.readouterr().err
    reseal(engine)
    assert main([str(engine)]) == 0


def test_neither_torch_nor_onnx_is_loaded() -> None:
    code = (
        "import sys; from dipgo_deploy.cli.inspect import main; status = main(sys.argv[1:]);"
        "print(status, *sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(STORED)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines()[-1].strip(), done.stderr) == ("0", "")
