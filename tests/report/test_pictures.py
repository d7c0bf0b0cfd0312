"""Pictures of two toy directories, and how far their latents are apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_engine import Toy, build, manifest_of

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import MANIFEST_NAME, LaunchEntry, Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.report.pictures import Wanted, check_wanted, draw, matched

TOY = Toy(kind="class", batch=1, noises=0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Two directories that differ in the last launch's row and in the final one."""
    folder = tmp_path_factory.mktemp("pair")
    ours, theirs = build(folder / "ours", TOY), build(folder / "theirs", TOY)
    plan = manifest_of(TOY).plan
    last = plan.launches[-1]
    changed = last.model_copy(update={"coefficients": tuple(2 * weight for weight in last.coefficients)})
    other = plan.model_copy(update={"launches": (*plan.launches[:-1], changed), "final": plan.final[::-1]})
    manifest = Manifest.load(ours).model_copy(update={"plan": other})
    (ours / MANIFEST_NAME).write_text(manifest.dumps())
    return reseal(ours), Bundle.open(theirs)


def cpu() -> Any:
    return create_backend("cpu", threads=1)


def test_the_same_is_drawn_in_both(pair: tuple[Bundle, Bundle]) -> None:
    stages: list[str] = []
    drawn = draw(*pair, Wanted(class_labels=("bag", 0), num_images=2, seed=3), cpu, stages.append)
    assert [strip.caption for strip in drawn.strips] == [
        f"class {label}, seed 3, picture {number}" for label in ("bag", 0) for number in (1, 2)
    ]
    assert all(strip.full.shape == strip.pruned.shape == (8, 8, 3) for strip in drawn.strips)
    assert not np.array_equal(drawn.strips[0].full, drawn.strips[0].pruned)
    assert stages == [f"drawing with {pair[1].path}", f"drawing with {pair[0].path}"]
    # Up to the last launch the loops are the same; its latent is twice the other's.
    assert [(point.step, round(point.tensors[0].relative, 6)) for point in drawn.drift[:-1]] == [
        *((step, 0.0) for step in range(1, 5)),
        (5, 1.0),
    ]
    assert drawn.drift[-1].step == 6 and drawn.drift[-1].tensors[0].relative > 0.01


def test_the_first_classes_are_drawn_where_none_are_asked_for(pair: tuple[Bundle, Bundle]) -> None:
    drawn = draw(pair[1], pair[1], Wanted(), cpu, lambda stage: None)
    assert [strip.caption for strip in drawn.strips] == [
        "class boot, seed 0",
        "class bag, seed 0",
        "class coat, seed 0",
    ]
    assert all(np.array_equal(strip.full, strip.pruned) for strip in drawn.strips)
    assert all(point.tensors[0].relative == 0 for point in drawn.drift)


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        (TOY, replace(TOY, vae=False), "one of the directories has no VAE"),
        (TOY, replace(TOY, batch=2), "not of one size and batch"),
        (Toy(kind="text", batch=1), Toy(kind="text", batch=1), "give --prompt"),
        (TOY, TOY, ""),
    ],
)
def test_why_nothing_is_drawn(ours: Toy, theirs: Toy, line: str) -> None:
    assert line in check_wanted(manifest_of(ours), manifest_of(theirs), Wanted())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(prompts=("a boot",)), "--prompt: .* takes none; leave it out"),
        (Wanted(class_labels=(0, 1, 2), num_images=6), "--num-images: 18 pictures in all, a page has at most 16"),
    ],
)
def test_what_cannot_be_asked_for(wanted: Wanted, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_wanted(manifest_of(TOY), manifest_of(TOY), wanted)


def test_evaluations_of_a_solver_of_its_own_are_matched_by_their_timesteps() -> None:
    plan = manifest_of(TOY).plan

    def with_launches(*at: tuple[int, float]) -> Any:
        launches = [
            LaunchEntry(step=step, variant=0, timestep=t, coefficients=(1.0,), reads=(), writes=(), slot=None)
            for step, t in at
        ]
        return plan.model_copy(update={"launches": tuple(launches), "evaluations": at[-1][0] + 1})

    full = with_launches((0, 900.0), (1, 600.0), (2, 600.0), (3, 300.0))
    assert matched(with_launches((0, 900.0), (2, 600.0), (3, 300.0)), full) == {0: 0, 2: 2, 3: 3}
    # 600 is there twice, and 450 is none of its timesteps.
    assert matched(with_launches((0, 900.0), (1, 600.0), (2, 450.0)), full) == {0: 0}
    assert matched(with_launches((0, 900.0), (1, 300.0)), full) == {0: 0, 1: 3}
