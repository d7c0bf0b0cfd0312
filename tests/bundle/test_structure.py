"""The check of a launch list: what the compiler makes passes, and what cannot be right is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.structure import check_structure
from dipgo_deploy.errors import UserError

STORED = Path(__file__).parent / "format-4" / "engine" / "manifest.json"
DOCUMENT: dict[str, Any] = json.loads(STORED.read_text())


def refused(document: dict[str, Any]) -> str | None:
    try:
        check_structure(Manifest.model_validate(document))
    except UserError as error:
        return str(error)
    return None


def changed(place: str, value: Any, document: dict[str, Any] = DOCUMENT) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *path, last = place.split(".")
    at: Any = document
    for name in path:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[int(last) if isinstance(at, list) else last] = value
    return document


def launches() -> list[dict[str, Any]]:
    return list(DOCUMENT["plan"]["launches"])


def reader() -> int:
    """A launch that reads a cache."""
    return next(place for place, launch in enumerate(launches()) if launch["reads"])


def test_what_was_exported_passes() -> None:
    assert refused(DOCUMENT) is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("plan.launches.0.variant", 99, "launch 0: there is no variant 99"),
        ("plan.launches.0.variant", -1, "launch 0: there is no variant -1"),
        ("plan.launches.1.step", 0, None),
        ("plan.launches.0.step", 3, "launch 1: evaluation 1 comes after evaluation 3"),
        ("plan.launches.3.step", 40, "evaluation 40 of 4"),
        ("plan.launches.0.timestep", float("nan"), "nan is no timestep"),
        ("plan.launches.0.timestep", -5.0, "-5.0 is no timestep"),
        ("plan.launches.0.coefficients.0", float("inf"), "the weight inf is not finite"),
        ("plan.launches.0.coefficients.0", 1e30, "the weight 1e\\+30"),
        ("plan.launches.0.coefficients.2", 0.5, "launch 0 .*reads slot 2, which is not written yet"),
        ("plan.launches.0.coefficients", [1.0], "1 weights for 5 slots"),
        ("plan.launches.0.slot", 2, "launch 0 .*writes slot 2, the next one is 1"),
        ("plan.launches.0.slot", None, "its prediction has no slot"),
        ("plan.launches.0.slot", 0, "its prediction has no slot"),
        ("plan.final", [1.0], "final: 1 weights for 5 slots"),
        ("plan.final.1", float("nan"), "final: the weight nan"),
        ("plan.slots", 0, "0 slots"),
        ("plan.slots", 2**62, "stack has the shape|weights for"),
        ("plan.noises", -1, "-1 noises"),
        ("plan.noises", 5, "5 for pictures and noises"),
        ("plan.arena_bytes", 2**62, "an arena of"),
        ("plan.arena_bytes", 0, "outside the arena"),
        ("plan.evaluations", 0, "0 evaluations"),
        ("plan.launches", [], "no variants or no launches"),
        ("plan.image_slot", 1, "image_slot 1"),
        ("latent.height", 10**6, "has the shape"),
        ("latent.channels", 0, "extent below 1|has the shape"),
        ("batch", 7, "has the shape"),
        ("plan.variants.0.predicts", False, "predicts is False"),
        ("plan.variants.0.writes", [], "nothing takes its output"),
        ("plan.variants.1.reads", [], "nothing fills its input"),
        ("plan.variants.0.graph.inputs.0.shape", [2**40, 2**40], "has the shape|would take"),
        ("plan.variants.0.graph.inputs.0.shape", [-1], "has the shape"),
        ("plan.variants.0.graph.inputs.0.shape", [10**9] * 100_000, "100000 dimensions"),
        ("conditions.0.shape", [10**9] * 100_000, "100000 dimensions"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(place: str, value: Any, message: str | None) -> None:
    found = refused(changed(place, value))
    if message is None:
        assert found is None
    else:
        import re

        assert found is not None and re.search(message, found), found


@pytest.mark.parametrize("offset", [-256, 2**63, 2**64, 1, 10**12])
def test_offsets_outside_or_unaligned_are_refused(offset: int) -> None:
    for side in ("reads", "writes"):
        place = next(place for place, launch in enumerate(launches()) if launch[side])
        found = refused(changed(f"plan.launches.{place}.{side}.0", offset))
        assert found is not None and ("outside the arena" in found or "not aligned" in found), found


def test_a_read_of_what_was_never_written_is_refused() -> None:
    document = changed(f"plan.launches.{reader()}.reads.0", DOCUMENT["plan"]["arena_bytes"])
    document["plan"]["arena_bytes"] += 2**20
    assert "where nothing was written" in str(refused(document))


def test_a_launch_that_is_gone_is_missed() -> None:
    for place in range(len(launches())):
        document = copy.deepcopy(DOCUMENT)
        del document["plan"]["launches"][place]
        assert refused(document) is not None, place


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_launch_list_that_passes_reads_only_what_was_written(seed: int) -> None:
    """Random changes of offsets, order and slots: whatever passes is right by a naive run over bytes."""
    random = np.random.default_rng(seed)
    document = copy.deepcopy(DOCUMENT)
    listed = document["plan"]["launches"]
    for _ in range(int(random.integers(1, 4))):
        launch = listed[int(random.integers(len(listed)))]
        match int(random.integers(4)):
            case 0:
                side = "reads" if launch["reads"] and random.random() < 0.5 else "writes"
                if launch[side]:
                    other = listed[int(random.integers(len(listed)))]
                    offsets = [*other["reads"], *other["writes"], 0, 256]
                    launch[side][int(random.integers(len(launch[side])))] = int(random.choice(offsets))
            case 1:
                place = int(random.integers(len(listed)))
                listed[place], listed[place - 1] = listed[place - 1], listed[place]
            case 2:
                launch["slot"] = int(random.integers(0, 6))
            case 3:
                launch["coefficients"][int(random.integers(len(launch["coefficients"])))] = float(random.random())
    if refused(document) is not None:
        return
    manifest = Manifest.model_validate(document)
    owner = np.full(manifest.plan.arena_bytes, -1)
    slots = {0}
    for index, launch in enumerate(manifest.plan.launches):
        variant = manifest.plan.variants[launch.variant]
        specs = {spec.name: spec for spec in (*variant.graph.inputs, *variant.graph.outputs)}
        assert all(slot in slots for slot, weight in enumerate(launch.coefficients) if weight)
        for name, offset in zip(variant.reads, launch.reads, strict=True):
            part = owner[offset : offset + specs[name].nbytes]
            assert len(set(part.tolist())) == 1 and part[0] >= 0  # all of one write, none of it overwritten
        for number, (name, offset) in enumerate(zip(variant.writes, launch.writes, strict=True)):
            owner[offset : offset + specs[name].nbytes] = 100 * index + number
        if launch.slot is not None:
            assert launch.slot not in slots
            slots.add(launch.slot)
