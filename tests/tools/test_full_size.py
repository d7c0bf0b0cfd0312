"""Published configurations, folders with random weights, and a measured export of a tiny one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.models import family_for  # noqa: E402
from dipgo_deploy.sampler import make_scheduler  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402
from tools.full_size import calibration, find, models, stages  # noqa: E402
from tools.full_size.all import main as all_rows  # noqa: E402
from tools.full_size.all import rows  # noqa: E402
from tools.full_size.export import exported_pixels, main, make_schedule, measure  # noqa: E402
from tools.full_size.table import add_row, as_text, read_rows, summary  # noqa: E402
from tools.full_size.weights import write_model  # noqa: E402

torch.set_num_threads(1)

# Parameters of the published denoisers, and units at each granularity.
KNOWN = {
    "sd-1.5-512": (859_520_964, 9, 24),
    "sd-2.1-768": (865_910_724, 9, 24),
    "sdxl-base-1024": (2_567_463_684, 7, 18),
    "dit-xl-2-256": (None, 28, 56),
    "ddpm-celebahq-256": (113_673_219, None, None),
}
TINY: dict[str, Any] = {
    **find("sdxl"),
    "name": "tiny",
    "config": {
        **find("sdxl")["config"],
        "addition_time_embed_dim": 8,
        "attention_head_dim": 2,
        "block_out_channels": [8, 8, 8],
        "cross_attention_dim": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "projection_class_embeddings_input_dim": 56,
        "sample_size": 8,
        "transformer_layers_per_block": 1,
    },
    "pixels": 64,
}
OPTIONS = {
    "dtype": "fp16",
    "schedule": "random50",
    "granularity": "block",
    "sampler": None,
    "steps": 3,
    "width": 48,
    "height": None,
    "batch": 1,
    "layout": "variants",
    "low_memory": None,
    "max_variants": None,
    "reduced": False,
    "check": True,
    "compare": True,
    "build": False,
    "threads": 1,
    "keep": False,
}


@pytest.mark.parametrize("name", list(models()))
def test_entries_are_what_the_families_and_diffusers_take(name: str) -> None:
    entry = find(name)
    for config in (entry["config"], {**entry["config"], **entry.get("depth", {})}):
        with torch.device("meta"):
            settings = {key: value for key, value in config.items() if not key.startswith("_")}
            model = getattr(diffusers, entry["class_name"])(**settings)
        assert set(settings) <= set(model.config)  # no setting that diffusers would not know
    parameters, *units = KNOWN.get(name, (None, None, None))
    if parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    family = family_for(entry["class_name"])
    for granularity, count in zip(("block", "layer"), units, strict=False):
        assert count is None or len(family.blocks(entry["config"], granularity)) == count
    assert set(entry["scheduler_config"]) <= set(make_scheduler(entry["scheduler"], entry["scheduler_config"]).config)
    latent = entry["pixels"] // entry.get("latent_scale", 8)
    batch = 2 if family.guidance else 1
    size = (latent,) * family.axes
    specs = family.inputs(entry["config"], batch, *size, entry["text_length"])
    assert specs[0].role == "latent"


def test_names_can_be_shortened() -> None:
    assert find("sdxl") is find("sdxl-base-1024")
    with pytest.raises(UserError, match=r"s: several models .* sd-1.5-512"):
        find("s")
    with pytest.raises(UserError, match="x: no models"):
        find("x")


def test_sizes_are_those_of_the_latent() -> None:
    told = [exported_pixels(find(name), 256) for name in ("sd-1.5", "sana-1600m", "ddpm")]
    assert told == [256, 64, 256]  # latents of 32, 8 and 256 pixels
    with pytest.raises(UserError, match="40 pixels: give a multiple of 32"):
        exported_pixels(find("sana-1600m"), 40)


@pytest.mark.parametrize("shard", [2**30, 20_000])
def test_a_folder_with_random_weights_is_one_that_diffusers_loads(
    shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.full_size.weights.SHARD_BYTES", shard)
    count = write_model(TINY, TINY["config"], "fp32", tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert (len(files) > 1) == (shard < 2**30)
    model, _, config = load_denoiser(tmp_path / "model")
    assert TINY["config"].items() <= config.items()  # the class's defaults stand beside it
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == count
    weight = parameters["mid_block.resnets.0.conv1.weight"]
    assert weight.std().item() == pytest.approx((8 * 9) ** -0.5, rel=0.1)
    assert all(parameter.isfinite().all() and parameter.abs().sum() > 0 for parameter in parameters.values())


def test_tables_of_positions_are_the_models_own(tmp_path: Path) -> None:
    """Buffers that are saved are not drawn: here SD3's position table."""
    config = {
        "sample_size": 8,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    }
    entry = {**find("sd3-medium"), "config": config}
    write_model(entry, {"_class_name": entry["class_name"], **config}, "fp16", tmp_path / "model")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "model")
    want = diffusers.SD3Transformer2DModel(**config).state_dict()["pos_embed.pos_embed"]
    torch.testing.assert_close(model.state_dict()["pos_embed.pos_embed"], want, rtol=1e-3, atol=1e-3)


def test_a_model_of_two_denoisers_is_a_pipelines_folder(tmp_path: Path) -> None:
    published = find("wan-2.2")
    small = {"attention_head_dim": 12, "num_attention_heads": 2, "ffn_dim": 16, "num_layers": 2, "text_dim": 8}
    config = {**published["config"], **small, "freq_dim": 8}
    count = write_model(published, config, "fp32", tmp_path / "model")
    model, _, _ = load_denoiser(tmp_path / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    first, second = (dict(part.named_parameters()) for part in model.children())
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)
    schedule = make_schedule(published, tmp_path / "model", {**OPTIONS, "steps": 5})
    assert schedule.denoisers == ("transformer",) * 2 + ("transformer_2",) * 3
    assert [sum(row) for row in schedule.gates[:3]] == [2, 0, 2]  # each begins in full


def test_schedules_by_name(tmp_path: Path) -> None:
    write_model(TINY, TINY["config"], "fp32", tmp_path / "model")
    kept = {}
    for name in ("full", "uniform3", "random50"):
        schedule = make_schedule(TINY, tmp_path / "model", {**OPTIONS, "schedule": name, "steps": 6})
        assert schedule.sampler.class_name == "EulerDiscreteScheduler"
        kept[name] = sum(map(sum, schedule.gates))
    assert kept == {"full": 42, "uniform3": 14, "random50": 21}
    published = make_schedule(TINY, tmp_path / "model", {**OPTIONS, "schedule": "published", "steps": 4})
    assert published.model.granularity == "layer" and published.provenance["method"] == "deepcache"
    shallow = {block.name for block, kept in zip(published.blocks, published.gates[1], strict=True) if kept}
    assert [all(row) for row in published.gates] == [True, False, False, True]
    assert shallow == {"up_blocks.2.resnets.1"}
    nobody = {**TINY, "published": None}
    with pytest.raises(UserError, match="--schedule published: nobody published gates for tiny"):
        make_schedule(nobody, tmp_path / "model", {**OPTIONS, "schedule": "published"})
    with pytest.raises(UserError, match="--schedule most: give full"):
        make_schedule(TINY, tmp_path / "model", {**OPTIONS, "schedule": "most"})


def test_the_published_gates_are_those_of_sd15s_blocks(tmp_path: Path) -> None:
    entry = find("sd-1.5")
    folder = tmp_path / "model"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entry["config"]))
    scheduler = {"_class_name": entry["scheduler"], **entry["scheduler_config"]}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    schedule = make_schedule(entry, folder, {**OPTIONS, "schedule": "published"})
    assert (schedule.steps, len(schedule.blocks), sum(any(row) for row in schedule.gates)) == (50, 9, 10)


def test_a_measured_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(stage: str, arguments: Any, log: Path) -> dict[str, Any]:
        return {**stages.STAGES[stage](arguments), "peak_rss": 3 * 2**30}

    monkeypatch.setattr("tools.full_size.export.run_stage", at_once)
    monkeypatch.setattr(calibration, "run_stage", at_once)
    options = {"steps": 4, "interval": 2, "images": 2, "height": None, "width": 48, "reduced": False}
    row = calibration.measure(TINY, options, tmp_path, print)
    took = row["calibrate"]
    assert (took["launches"], took["full"], took["evaluations"]) == (2, 4, 2 * (4 + 2))
    assert took["guidance"] and 0 < took["residual"] < 10
    file = tmp_path / "rows.json"
    for _ in range(2):
        calibration.add_row(file, row)
    assert len(read_rows(file)) == 1
    assert "| tiny | 48x64 | 0.00 | 2 | 2 of 4 | 12 |" in file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_measured_export(tmp_path: Path) -> None:
    said: list[str] = []
    row = measure(TINY, {**OPTIONS, "out": tmp_path / "work"}, said.append)
    assert said == [
        "tiny-fp16: drawing random weights",
        "tiny-fp16: exporting",
        "tiny-fp16: comparing the loop with the supernet",
    ]
    export, compare = row["export"], row["compare"]
    assert export["checker"] == "passed"
    assert export["graphs"] >= 2 and 2 <= export["launches"] <= export["evaluations"] == 3
    assert set(export["stages"]) >= {"loading the model", "tracing the denoiser", "planning"}
    assert 0 < sum(export["stages"].values()) <= export["seconds"]
    assert export["peak_rss"] > 2**26 and export["engine_dir_bytes"] > export["weights_bytes"]
    # Two bytes a parameter, but tensors of up to 256 bytes, of which a tiny model has many, are in the graphs.
    assert 1.2 * row["weights"]["parameters"] < export["weights_bytes"] < 2.2 * row["weights"]["parameters"]
    assert compare["passed"] and compare["first_failure"] is None
    for part in (export["variants"], compare["loop"], compare["latents"]):
        assert 0 < part["relative"] < 2e-2 and part["psnr"] > 30 and part["cosine"] > 0.999
    assert export["low_memory"] is False and 2**26 < export["libraries_rss"] < export["peak_rss"]
    assert not (tmp_path / "work/tiny-fp16.engine").exists()

    collected = tmp_path / "rows.json"
    add_row(collected, row)
    add_row(collected, row)
    add_row(collected, {**row, "dtype": "bf16"})
    assert [stored["dtype"] for stored in read_rows(collected)] == ["bf16", "fp16"]
    page = collected.with_suffix(".md").read_text()
    assert page == as_text(read_rows(collected))
    assert "| tiny | fp16 | 48x64 |" in page
    assert f"{export['launches']} launches of 3 evaluations" in summary(row)


def test_a_static_interval_is_every_unit_at_every_second_step(tmp_path: Path) -> None:
    entry = find("dit")
    folder = tmp_path / "model"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entry["config"]))
    scheduler = {"_class_name": entry["scheduler"], **entry["scheduler_config"]}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    schedule = make_schedule(entry, folder, {**OPTIONS, "schedule": "published"})
    assert (len(schedule.blocks), [sum(row) for row in schedule.gates]) == (56, [56, 0, 56])


def test_all_rows_name_models_and_options_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    listed = rows()
    assert {name for name, _ in listed.values()} >= {"sd-1.5-512", "ddpm-celebahq-256", "flux.1-dev-1024"}
    for model, options in listed.values():
        entry = find(model)
        assert not options["reduced"] or entry["depth"]
        assert options["schedule"] != "published" or entry["published"]
        assert options["compare"] and options["build"] and options["check"] and options["batch"] == 1
    assert all_rows(["--list", "--only", "dit-xl-2-256:fp32"]) == 0
    assert capsys.readouterr().out.split() == ["dit-xl-2-256:fp32:random50", "dit-xl-2-256:fp32:published"]


def test_a_row_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def fake(entry: dict[str, Any], options: dict[str, Any], say: Any) -> dict[str, Any]:
        measured.append((entry["name"], options["schedule"]))
        (options["out"] / "models").mkdir(parents=True, exist_ok=True)
        if options["schedule"] == "random50":
            raise UserError("no room")
        return {"row": entry["name"]}

    added = []
    monkeypatch.setattr("tools.full_size.all.measure", fake)
    monkeypatch.setattr("tools.full_size.all.add_row", lambda path, row: added.append(row))
    monkeypatch.setattr("tools.full_size.all.summary", str)
    assert all_rows(["--only", "dit-xl-2-256:fp32", "--only", "ddpm", "--out", str(tmp_path)]) == 2
    assert [schedule for _, schedule in measured] == ["random50", "published"] * 2
    assert added == [{"row": "dit-xl-2-256"}, {"row": "ddpm-celebahq-256"}]
    assert not (tmp_path / "models").exists()
    assert "2 of 4 rows failed: dit-xl-2-256:fp32:random50" in capsys.readouterr().err


def test_a_stage_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sdxl", "--out", str(tmp_path), "--reduced"]) == 2
    assert "sdxl-base-1024 is small enough or has no reduced depth" in capsys.readouterr().err
    broken = {**TINY, "config": {**TINY["config"], "norm_num_groups": 3}}
    with pytest.raises(UserError, match=r"weights failed: .*num_channels") as caught:
        measure(broken, {**OPTIONS, "out": tmp_path}, lambda line: None)
    assert "\n" not in str(caught.value)


def test_the_published_page_is_made_of_the_published_rows() -> None:
    path = Path(__file__).parents[2] / "docs/results/full-size.json"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == as_text(read_rows(path))
