"""Sampler names, configs and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.sampler import SAMPLERS, evaluations, make_scheduler, scheduler_from_folder, step_positions

# diffusers hands torch tensors to numpy in ways that numpy has announced to drop.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_name_makes_its_class_with_the_models_betas(name: str) -> None:
    class_name, settings = SAMPLERS[name]
    for spelling in (name, name.upper()):
        scheduler = make_scheduler(spelling, CONFIG)
        assert type(scheduler) is getattr(diffusers, class_name)
        assert {key: scheduler.config[key] for key in settings} == dict(settings)
    if not class_name.startswith("FlowMatch"):
        assert scheduler.config.beta_end == 0.012


@pytest.mark.parametrize("name", ["ddim", "unipc", "DPMSolverSinglestepScheduler"])
def test_equals_what_a_diffusers_user_writes(name: str) -> None:
    scheduler = make_scheduler(name, CONFIG)
    assert scheduler.config == type(scheduler).from_config(CONFIG).config


def test_deis_can_follow_unipc() -> None:
    unipc = make_scheduler("unipc", CONFIG)
    assert make_scheduler("deis", unipc.config).config.solver_type == "logrho"


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [("ddim", 50, 50), ("pndm", 50, 51), ("plms", 4, 5), ("heun", 50, 99), ("euler", 7, 7), ("flow-euler", 4, 4)],
)
def test_evaluations(name: str, steps: int, expected: int) -> None:
    scheduler = make_scheduler(name, CONFIG)
    scheduler.set_timesteps(9)
    before = scheduler.timesteps.clone()
    assert evaluations(scheduler, steps) == expected
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [("ddim", 4, (0, 1, 2, 3)), ("pndm", 4, (0, 1, 1, 3, 4)), ("heun", 3, (0, 1, 1, 3, 3)), ("euler", 2, (0, 1))],
)
def test_step_positions(name: str, steps: int, expected: tuple[int, ...]) -> None:
    assert step_positions(make_scheduler(name, CONFIG), steps) == expected


def test_evaluations_takes_the_pipelines_arguments() -> None:
    scheduler = make_scheduler("flow-euler", {"use_dynamic_shifting": True})
    assert evaluations(scheduler, 4, set_timesteps_kwargs={"mu": 1.0}) == 4


@pytest.mark.parametrize(("name", "steps"), [("ddim", 0), ("ddim", -3), ("pndm", 1001), ("lcm", 60)])
def test_impossible_steps_are_refused_by_name(name: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"{SAMPLERS[name][0]}.*{steps}"):
        evaluations(make_scheduler(name, CONFIG), steps)


@pytest.mark.parametrize("name", ["nosuch", "UNet2DConditionModel", "ddim ", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown; use ddim, pndm.*or a diffusers scheduler class"):
        make_scheduler(name, CONFIG)


def test_a_config_the_class_refuses_is_one_line() -> None:
    with pytest.raises(UserError, match="sampler ddim: DDIMScheduler refuses.*zigzag") as caught:
        make_scheduler("ddim", {"beta_schedule": "zigzag"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", ["scheduler", ""])
def test_folder(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    scheduler = scheduler_from_folder(tmp_path)
    assert type(scheduler) is diffusers.PNDMScheduler
    assert scheduler.config == diffusers.PNDMScheduler.from_pretrained(folder).config


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no scheduler"), ("{", "JSON"), ("[]", "not a JSON object"), ('{"beta_end": 1}', "_class_name")],
)
def test_a_folder_without_a_scheduler_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "scheduler_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        scheduler_from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
