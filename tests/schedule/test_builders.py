from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import family_for
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry, Schedule

SD15 = family_for("UNet2DConditionModel").blocks({}, "block")
SD15_LAYERS = family_for("UNet2DConditionModel").blocks({}, "layer")
WHOLE = tuple(spec.name for spec in SD15)
LAYERS = tuple(spec.name for spec in SD15_LAYERS)


def running(gates: builders.Gates, names: tuple[str, ...], step: int) -> set[str]:
    return {name for name, kept in zip(names, gates[step], strict=True) if kept}


def test_full_and_uniform() -> None:
    assert builders.full(2, 3) == ((True,) * 3,) * 2
    assert builders.uniform(5, 2, 2) == ((True,) * 2, (False,) * 2, (True,) * 2, (False,) * 2, (True,) * 2)
    assert builders.uniform(3, 2, 1) == builders.full(3, 2)
    with pytest.raises(UserError, match="interval: 0"):
        builders.uniform(3, 2, 0)


def two_denoisers(denoisers: tuple[str, ...]) -> builders.Target:
    names = ("transformer.a", "transformer.b", "transformer_2.a")
    return builders.Target(
        model=ModelIdentity(class_name="X+X", config_hash="0" * 64, granularity="block"),
        blocks=tuple(BlockEntry(name=name, cache="output") for name in names),
        sampler=SamplerEntry(class_name="S", config={}, num_inference_steps=len(denoisers)),
        steps=len(denoisers),
        denoisers=denoisers,
    )


def test_each_denoiser_follows_a_rule_by_itself() -> None:
    target = two_denoisers(("transformer",) * 2 + ("transformer_2",) * 3)
    schedule = target.schedule(target.gates(lambda steps, blocks: builders.uniform(steps, blocks, 2)), "uniform", {})
    assert schedule.keep == ("110", "000", "001", "000", "001")
    assert (schedule.format_version, schedule.kept_share) == (4, 4 / 7)
    assert target.schedule([[True] * 3] * 5, "full", {}).keep == ("110", "110", "001", "001", "001")
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.at([0, 2]).denoisers == ("transformer", "transformer_2")
    refused: tuple[tuple[list[list[bool]], str], ...] = (
        (
            [[True] * 3] * 2 + [[False] * 3] * 3,
            "evaluation 2, block transformer_2.a: .* keep the block at evaluation 2",
        ),
        ([[True] * 3] * 6, "6 rows, but steps is 5"),
        ([[True] * 4] * 5, "4 cells, but there are 3 blocks"),
    )
    for gates, words in refused:
        with pytest.raises(UserError, match=words):
            target.schedule(gates, "x", {})


# What DeepCache's own rules (is_skip_step of the package's helper) run between full steps on SD-1.5, by branch id.
DEEPCACHE = {
    0: ({}, {3: [2]}),
    1: ({0: [0]}, {3: [1, 2]}),
    2: ({0: [0, 1]}, {3: [0, 1, 2]}),
    3: ({0: [0, 1, 2]}, {3: [0, 1, 2], 2: [2]}),
    7: ({0: [0, 1, 2], 1: [0, 1, 2], 2: [0]}, {3: [0, 1, 2], 2: [0, 1, 2], 1: [1, 2]}),
    11: (
        {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2], 3: [0, 1]},
        {3: [0, 1, 2], 2: [0, 1, 2], 1: [0, 1, 2], 0: [0, 1, 2]},
    ),
}


@pytest.mark.parametrize("branch", DEEPCACHE)
def test_deepcache_layers_are_those_of_the_package(branch: int) -> None:
    units = {
        side: {i: [name for name in LAYERS if name.startswith(f"{side}_blocks.{i}.")] for i in range(4)}
        for side in ("down", "up")
    }
    down, up = DEEPCACHE[branch]
    expected = {units["down"][i][layer] for i, layers in down.items() for layer in layers}
    expected |= {units["up"][i][layer] for i, layers in up.items() for layer in layers}
    gates = builders.deepcache(7, LAYERS, 3, branch)
    assert running(gates, LAYERS, 1) == running(gates, LAYERS, 5) == expected
    assert all(running(gates, LAYERS, step) == set(LAYERS) for step in (0, 3, 6))


def test_deepcache_counts_as_told() -> None:
    # PNDM's first evaluations: the package takes the third for the second, which has the same timestep.
    gates = builders.deepcache(6, LAYERS, 2, 0, (0, 1, 1, 3, 4, 5))
    assert [all(row) for row in gates] == [True, False, False, False, True, False]
    with pytest.raises(ValueError, match="5 positions for 6 evaluations"):
        builders.deepcache(6, LAYERS, 2, 0, (0, 1, 1, 3, 4))


def test_deepcache_whole_blocks() -> None:
    assert running(builders.deepcache(2, WHOLE, 5, 0), WHOLE, 1) == {"up_blocks.3"}
    assert running(builders.deepcache(2, WHOLE, 5, 2), WHOLE, 1) == {
        "down_blocks.0",
        "down_blocks.1",
        "up_blocks.1",
        "up_blocks.2",
        "up_blocks.3",
    }


def test_deepcache_refusals() -> None:
    with pytest.raises(UserError, match="branches 0 to 3"):
        builders.deepcache(2, WHOLE, 5, 4)
    with pytest.raises(UserError, match="branches 0 to 11"):
        builders.deepcache(2, LAYERS, 5, 12)
    with pytest.raises(UserError, match="UNets only"):
        builders.deepcache(2, ("transformer_blocks.0", "transformer_blocks.1"), 5, 0)


@given(st.integers(2, 20), st.integers(1, 9), st.floats(0, 1), st.integers())
def test_random_removes_the_share_and_never_step_0(steps: int, blocks: int, share: float, seed: int) -> None:
    ratio = share * (steps - 1) / steps
    gates = builders.random(steps, blocks, ratio, seed)
    removed = sum(not kept for row in gates for kept in row)
    assert all(gates[0])
    # The most whole gates within the ratio (an exact product may round either way).
    assert removed <= ratio * steps * blocks + 1e-6
    assert removed + 1 > ratio * steps * blocks - 1e-6
    assert gates == builders.random(steps, blocks, ratio, seed)


def test_random_by_cost_stays_within_the_ratio() -> None:
    costs = [100.0, 10.0, 1.0]
    gates = builders.random(10, 3, 0.5, 3, costs)
    removed = sum(cost for row in gates for cost, kept in zip(costs, row, strict=True) if not kept)
    assert 0.5 * 1110 - 100 < removed <= 0.5 * 1110


def test_random_is_the_same_everywhere() -> None:
    # Pinned: a seed in a provenance has to mean the same schedule on every machine and Python.
    rows = ["".join("01"[kept] for kept in row) for row in builders.random(4, 5, 0.5, 7)]
    assert rows == ["11111", "00101", "00101", "00010"]
    assert builders.random(4, 5, 0.5, 7) != builders.random(4, 5, 0.5, 8)


def test_random_refusals() -> None:
    with pytest.raises(UserError, match="evaluation 0 runs in full, so at most 0.75"):
        builders.random(4, 5, 0.8, 0)
    with pytest.raises(UserError, match="not between 0 and 1"):
        builders.random(4, 5, 1.2, 0)


def test_a_target_makes_a_document_with_its_provenance(unet_target) -> None:
    target = unet_target(6)
    schedule = target.schedule(builders.uniform(6, 9, 2), "uniform", {"interval": 2})
    assert schedule.keep == ("1" * 9, "0" * 9) * 3
    assert schedule.block_names == target.block_names
    assert schedule.provenance["method"] == "uniform"
    assert schedule.provenance["parameters"] == {"interval": 2}
    assert schedule.provenance["tool_version"]
