"""Where a loop's time goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from toy_engine import Toy, build

from dipgo_deploy.bench import profile
from dipgo_deploy.bench.profile import OUTSIDE, block_modules, block_of, sum_kernels
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.report.measured import Profile, read_measured


def _kernel(name: str, operator: str, microseconds: int) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}


def test_kernels_go_to_the_innermost_block_and_nothing_is_lost():
    modules = {name: name for name in ("transformer_blocks.1", "transformer_blocks.10", "transformer_blocks.1.ff")}
    events = [
        _kernel("transformer_blocks.1/Add_3", "Add", 1),
        _kernel("transformer_blocks.10.ff.net.0/MatMul_4", "MatMul", 10),
        _kernel("transformer_blocks.1.ff.net.0/MatMul_5", "MatMul", 100),
        _kernel("latent/WeightedSum", "MatMul", 1000),
        {"cat": "Session", "name": "model_run", "dur": 5000},
        {"cat": "Node", "name": "transformer_blocks.1/Add_3_fence_before", "dur": 7, "args": {"op_name": "Add"}},
    ]
    by_block, by_operator = sum_kernels(events, modules)
    assert by_block == pytest.approx(
        {
            "transformer_blocks.1": 1e-6,
            "transformer_blocks.10": 1e-5,
            "transformer_blocks.1.ff": 1e-4,
            OUTSIDE: 1e-3,
        }
    )
    assert list(by_operator) == ["MatMul", "Add"]
    assert sum(by_operator.values()) == pytest.approx(1111e-6)


def test_a_unit_of_a_unet_has_the_kernels_of_its_resnet_too() -> None:
    config = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    config |= {"layers_per_block": 1, "mid_block_type": None, "block_out_channels": [32]}
    model = SimpleNamespace(class_name="UNet2DConditionModel", config=config, granularity="layer")
    modules = block_modules(SimpleNamespace(manifest=SimpleNamespace(model=model)))  # type: ignore[arg-type]
    nodes = ("down_blocks.0.resnets.0.conv1/Conv_1", "down_blocks.0.attentions.0.proj_in/Conv_2", "conv_in/Conv_0")
    assert [block_of(node, modules) for node in nodes] == [*["down_blocks.0.attentions.0"] * 2, OUTSIDE]


def test_profile_of_an_engine_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dipgo_deploy.cli.bench import command

    folder, written = build(tmp_path / "engine", Toy()), tmp_path / "times.json"
    monkeypatch.setattr(profile, "block_modules", lambda bundle: {"a": "a"})
    result = CliRunner().invoke(
        command, ["profile", "--engine-dir", str(folder), "--threads", "1", "--json", "-o", str(written)]
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    plan = Manifest.load(folder).plan
    assert [launch["step"] for launch in facts["launches"]] == [launch.step for launch in plan.launches]
    assert all(launch["seconds"] > 0 for launch in facts["launches"])
    inside = sum(launch["seconds"] for launch in facts["launches"])
    assert facts["host_seconds"] == pytest.approx(facts["loop_seconds"] - inside)
    assert facts["host_seconds"] > 0
    assert sum(facts["blocks"].values()) == pytest.approx(sum(facts["operators"].values()))
    assert facts["kernel_seconds"] >= facts["copy_seconds"] >= 0
    read = read_measured(written)  # as dipgo-report does
    assert isinstance(read, Profile) and read.fits(plan) and read.loop_seconds == facts["loop_seconds"]
