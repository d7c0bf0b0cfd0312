from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.location import resolve_model
from dipgo_deploy.models.registry import family_for
from dipgo_deploy.models.target import (
    check_sampler,
    check_sampler_kind,
    check_schedule,
    default_steps,
    nominal_set_timesteps,
    schedule_target,
)
from dipgo_deploy.sampler import make_scheduler
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.identity import config_hash


def full_schedule(**options: Any) -> Schedule:
    target = schedule_target(**options)
    return target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})


def test_a_unet_with_its_own_scheduler() -> None:
    target = schedule_target("fashion-sd", num_inference_steps=50)
    config = json.loads((Path(resolve_model("fashion-sd")) / "unet" / "config.json").read_text())
    assert target.model.model_dump() == {
        "class_name": "UNet2DConditionModel",
        "config_hash": config_hash(config),
        "granularity": "block",
    }
    assert target.block_names == (
        *(f"down_blocks.{i}" for i in range(4)),
        "mid_block",
        *(f"up_blocks.{i}" for i in range(4)),
    )
    assert {block.cache for block in target.blocks} == {"output"}
    # PNDM evaluates one step twice: its rows are counted by the scheduler, not by the steps asked for.
    assert (target.sampler.class_name, target.sampler.num_inference_steps, target.steps) == ("PNDMScheduler", 50, 51)
    assert target.sampler.config["skip_prk_steps"] is True
    assert not [key for key in target.sampler.config if key.startswith("_")]


@pytest.mark.parametrize(
    ("sampler", "class_name", "evaluations"),
    [("ddim", "DDIMScheduler", 10), ("heun", "HeunDiscreteScheduler", 19), ("DDPMScheduler", "DDPMScheduler", 10)],
)
def test_a_named_sampler(sampler: str, class_name: str, evaluations: int) -> None:
    target = schedule_target("fashion-dit", sampler, 10)
    assert (target.sampler.class_name, target.steps) == (class_name, evaluations)


def test_a_sampler_with_infinite_settings_survives_the_file(tmp_path: Path) -> None:
    schedule = full_schedule(model="fashion-sd", sampler="dpm++2m", num_inference_steps=5)
    assert schedule.sampler.config["lambda_min_clipped"] == float("-inf")
    schedule.save(tmp_path / "s.json")
    again = Schedule.load(tmp_path / "s.json")
    assert again == schedule
    check_sampler(again)


def test_steps_that_a_pipeline_takes_by_itself(tmp_path: Path) -> None:
    assert default_steps("fashion-dit") == (50, "DiTPipeline")
    for name, steps in (("PixArtAlphaPipeline", (20, "PixArtAlphaPipeline")), ("NoSuchPipeline", (50, ""))):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert default_steps(str(tmp_path)) == steps


def test_cache_kinds() -> None:
    assert {block.cache for block in schedule_target("fashion-dit", "ddim", 4).blocks} == {"residual"}
    assert {block.cache for block in schedule_target("fashion-dit", "ddim", 4, cache="output").blocks} == {"output"}
    with pytest.raises(UserError, match="down_blocks.0 cannot have a cache of kind 'residual', only output"):
        schedule_target("fashion-sd", "ddim", 4, cache="residual")


def test_granularity() -> None:
    fine = schedule_target("fashion-sd", "ddim", 4, granularity="layer")
    assert len(fine.blocks) > 9
    assert fine.model.granularity == "layer"


def test_a_denoiser_folder_needs_a_sampler() -> None:
    folder = str(Path(resolve_model("fashion-sd")) / "unet")
    with pytest.raises(UserError, match="has no scheduler/scheduler_config.json; name a sampler"):
        schedule_target(folder)
    assert schedule_target(folder, "ddim", 4).model == schedule_target("fashion-sd", "ddim", 4).model


def test_check_schedule_against_models(tmp_path: Path) -> None:
    schedule = full_schedule(model="fashion-sd", sampler="ddim", num_inference_steps=4)
    check_schedule(schedule, "fashion-sd")
    with pytest.raises(UserError, match="made for UNet2DConditionModel, this model is DiTTransformer2DModel"):
        check_schedule(schedule, "fashion-dit")
    config = json.loads((Path(resolve_model("fashion-sd")) / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": 99}))
    with pytest.raises(UserError, match="model.config_hash: made for the configuration"):
        check_schedule(schedule, str(tmp_path))
    check_schedule(schedule, str(tmp_path), allow_other_config=True)


def test_check_sampler_counts_evaluations() -> None:
    schedule = full_schedule(model="fashion-sd", sampler="pndm", num_inference_steps=4)
    assert schedule.steps == 5
    check_sampler(schedule)
    short = Schedule(**{**schedule.model_dump(), "steps": 4, "keep": schedule.keep[:4]})
    with pytest.raises(UserError, match="4 rows, but PNDMScheduler with 4 steps evaluates the denoiser 5 times"):
        check_sampler(short)


def test_a_sampler_of_another_kind_is_refused_from_the_configuration_alone() -> None:
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler: is for flow matching, but this model is for"):
        schedule_target("fashion-sd", "flow-euler", 4)
    # A document that names such a sampler, for this very model.
    schedule = full_schedule(model="fashion-sd", sampler="ddim", num_inference_steps=4)
    sampler = schedule.sampler.model_copy(update={"class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(UserError, match="is for flow matching"):
        check_schedule(schedule.model_copy(update={"sampler": sampler}), "fashion-sd")


def test_without_a_scheduler_the_family_says_the_kind(tmp_path: Path) -> None:
    config = {"_class_name": "SD3Transformer2DModel", "num_layers": 2, "sample_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="EulerDiscreteScheduler: is for diffusion models.*use flow-euler"):
        check_sampler_kind(str(tmp_path), "EulerDiscreteScheduler", {})
    check_sampler_kind(str(tmp_path), "FlowMatchHeunDiscreteScheduler", {})


@pytest.mark.parametrize("steps", [10**9, 0])
def test_steps_out_of_range_are_refused_before_a_list_of_them_is_made(steps: int) -> None:
    scheduler = make_scheduler("flow-euler", {})
    with pytest.raises(UserError, match=f"FlowMatchEulerDiscreteScheduler: {steps} inference steps; at (most|least)"):
        nominal_set_timesteps(family_for("FluxTransformer2DModel"), {}, scheduler, steps)
