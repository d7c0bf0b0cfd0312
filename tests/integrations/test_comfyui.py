"""The nodes as ComfyUI uses them: by their mappings, declared inputs and functions."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from toy_engine import Toy, build

from dipgo_deploy.errors import UserError
from dipgo_deploy.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from dipgo_deploy.runtime.pipeline import Pipeline

DRAWN = {"prompt": "a boot", "negative_prompt": "", "seed": 3, "guidance_scale": 0.0, "count": 1}


def executed(name: str, **inputs: Any) -> tuple[Any, ...]:
    """What ComfyUI does with a node: a new object, its function by name, inputs by keyword."""
    node = NODE_CLASS_MAPPINGS[name]
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
    return outputs


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_declares_what_its_function_takes(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    assert NODE_DISPLAY_NAME_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys() and node.CATEGORY == "dipgo"
    declared = node.INPUT_TYPES()
    parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    assert declared["required"].keys() <= parameters.keys()
    assert open_ended or declared["optional"].keys() <= parameters.keys()
    for group in declared.values():
        for entry in group.values():
            assert isinstance(entry, tuple) and isinstance(entry[0], (str, list))


def test_a_loaded_directory_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    engine = build(tmp_path / "engine", Toy())
    (pipeline,) = executed("DipgoLoadEngines", engine_dir=str(engine), backend="cpu", schedule="")
    (images,) = executed("DipgoDraw", pipeline=pipeline, **{**DRAWN, "negative_prompt": "red", "count": 2})
    wanted = Pipeline.from_engine_dir(engine, "cpu")(
        "a boot", negative_prompt="red", seed=3, num_images_per_prompt=2, output_type="np"
    ).images
    assert isinstance(images, torch.Tensor) and images.dtype == torch.float32
    assert np.array_equal(images.numpy(), wanted)


def test_a_model_of_classes_takes_the_class_as_its_prompt(tmp_path: Path) -> None:
    engine = build(tmp_path / "engine", Toy(kind="class"))
    (pipeline,) = executed("DipgoLoadEngines", engine_dir=str(engine), backend="cpu")
    pictures = [executed("DipgoDraw", pipeline=pipeline, **{**DRAWN, "prompt": name})[0] for name in (" Boot", "2")]
    wanted = Pipeline.from_engine_dir(engine, "cpu")(class_labels=["Boot", 2], seed=[3, 3], output_type="np").images
    np.testing.assert_allclose(torch.cat(pictures).numpy(), wanted, atol=1e-6)


def test_a_directory_that_is_written_again_is_loaded_again(tmp_path: Path) -> None:
    node = NODE_CLASS_MAPPINGS["DipgoLoadEngines"]
    nothing = node.IS_CHANGED(engine_dir=str(tmp_path), backend="cpu")
    assert nothing != nothing  # not a number: never the same
    engine = build(tmp_path / "engine", Toy())
    assert node.IS_CHANGED(str(engine), "cpu") == node.IS_CHANGED(str(engine), "cpu", "")


def test_progress_is_shown_and_a_stop_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    stop: list[BaseException] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int) -> None:
            shown.append((value, total))

    def interrupted() -> None:
        if stop and len(shown) == 2:
            raise stop[0]

    utils: Any = ModuleType("comfy.utils")
    management: Any = ModuleType("comfy.model_management")
    utils.ProgressBar, management.throw_exception_if_processing_interrupted = ProgressBar, interrupted
    for module in (ModuleType("comfy"), utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    pipeline = Pipeline.from_engine_dir(build(tmp_path / "engine", Toy()), "cpu")
    (whole,) = executed("DipgoDraw", pipeline=pipeline, **DRAWN)
    total = shown[0][1]
    assert shown == [(done, total) for done in range(1, total + 1)]
    shown.clear()
    stop.append(InterruptedError())
    with pytest.raises(InterruptedError):
        executed("DipgoDraw", pipeline=pipeline, **DRAWN)
    assert len(shown) == 2
    stop.clear()
    assert torch.equal(executed("DipgoDraw", pipeline=pipeline, **DRAWN)[0], whole)


def test_what_the_directory_does_not_take_is_said(tmp_path: Path) -> None:
    pipeline = Pipeline.from_engine_dir(build(tmp_path / "engine", Toy()), "cpu", load="call")
    with pytest.raises(UserError, match="control_image: a batch of 2; give one picture"):
        executed("DipgoDraw", pipeline=pipeline, control_image=torch.zeros(2, 8, 8, 3), **DRAWN)
    with pytest.raises(UserError, match="control_image"):
        executed("DipgoDraw", pipeline=pipeline, control_image=torch.zeros(1, 8, 8, 3), **DRAWN)
