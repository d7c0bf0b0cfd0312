"""Schedules whose plan is known by hand."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.explain import plan_summary
from dipgo_deploy.plan.graph import Block, BlockGraph, Value
from dipgo_deploy.plan.model import Cache

KEPT = (0, 7, 13, 19, 20, 21, 26, 32, 39, 48)


def published() -> list[list[bool]]:
    gates = [[step in KEPT] * 9 for step in range(50)]
    gates[7][3] = False
    return gates


def rows(*lines: str) -> list[list[bool]]:
    return [[cell == "1" for cell in line] for line in lines]


def test_published_unet_schedule(unet):
    plan = compile_plan(unet, published())
    assert [launch.step for launch in plan.launches] == list(KEPT)
    assert [launch.variant for launch in plan.launches] == [0, 1] + [0] * 8
    assert [launch.prediction for launch in plan.launches] == list(range(10))
    assert plan.prediction_slots == tuple(sum(kept <= step for kept in KEPT) - 1 for step in range(50))
    full, partial = plan.variants
    d3 = (Cache("D3/out0", "output"), Cache("D3/out1", "output"))
    assert (full.reads, full.writes) == ((), d3)
    assert (partial.reads, partial.writes) == (d3, ())
    assert full.computed == frozenset(unet.values)
    assert partial.computed == frozenset(unet.values) - {"D3/out0", "D3/out1"}
    own = sum(unet.costs[max(unet.values[cache.value].work)] for cache in d3)
    assert (full.macs, partial.macs) == (plan.macs_full, plan.macs_full - own) == (sum(unet.costs), full.macs - own)
    assert plan.macs_run == 10 * full.macs - own
    # Without the plan every step would still compute conv_in, the time embedding and the prediction.
    idle = sum(unet.costs[node] for node in unet.values["conv_in"].work | unet.values["noise_pred"].work)
    assert plan.macs_schedule == plan.macs_run + 40 * idle
    size = sum(-(-unet.values[cache.value].nbytes // 256) * 256 for cache in d3)
    assert plan.arena_bytes == plan.lower_bound_bytes == size


def test_published_unet_schedule_as_one_variant(unet):
    plan = compile_plan(unet, published(), max_variants=1)
    assert plan.promoted == ((7, "D3"),)
    assert plan.keep == tuple((step in KEPT,) * 9 for step in range(50))
    assert len(plan.variants) == 1
    assert plan.variants[0].writes == ()
    assert plan.arena_bytes == plan.lower_bound_bytes == 0
    assert plan.macs_run == 10 * plan.macs_full


def test_removed_residual_block_still_gets_the_current_input(chain):
    plan = compile_plan(chain("residual"), rows("1111", "0101"))
    assert [launch.step for launch in plan.launches] == [0, 1]
    second = plan.variants[1]
    assert second.computed == {"embed", "b1/out0", "b3/out0", "noise_pred"}
    assert second.reads == (Cache("b0/out0", "residual"), Cache("b2/out0", "residual"))
    assert second.macs == 1 + 10**2 + 10**4 + 10**5
    assert plan.variants[0].writes == second.reads


def test_removed_output_block_makes_what_is_before_it_dead(chain):
    plan = compile_plan(chain("output"), rows("1111", "1101", "0011"))
    # Evaluation 1: b2's store is read, b3 reads the timestep. b0 and b1 are needed only for evaluation 2, which reads
    # b1.
    assert plan.variants[1].reads == (Cache("b2/out0", "output"),)
    assert plan.variants[1].computed == {"embed", "b0/out0", "b1/out0", "b3/out0", "noise_pred"}
    assert plan.variants[1].writes == (Cache("b1/out0", "output"),)
    assert plan.variants[2].reads == (Cache("b1/out0", "output"),)


def test_a_step_may_only_refresh_caches(chain):
    graph = chain("output")
    head = Value("noise_pred", 8, frozenset({"b3/out0"}), frozenset({5}))
    graph = replace(graph, values={**graph.values, "noise_pred": head})
    # Evaluation 1 computes b0 .. b2 for evaluation 2, but its own prediction reads the old b3.
    plan = compile_plan(graph, rows("1111", "1110", "0001"))
    assert [launch.prediction for launch in plan.launches] == [0, None, 1]
    assert plan.prediction_slots == (0, 0, 1)
    assert plan.variants[1].computed == {"embed", "b0/out0", "b1/out0", "b2/out0"}
    assert not plan.variants[1].predicts


def test_unused_predictions_are_not_made(chain):
    graph = chain("output")
    gates = rows("1111", "1111", "1111")
    plan = compile_plan(graph, gates, prediction_used=[False, True, False])
    assert [launch.step for launch in plan.launches] == [1]
    assert plan.prediction_slots == (0, 0, 0)
    refreshed = compile_plan(graph, rows("1111", "0000"), prediction_used=[False, True])
    assert [(launch.step, launch.prediction) for launch in refreshed.launches] == [(0, None), (1, 0)]


def constant_block_graph() -> BlockGraph:
    """A block that sees only the text, and one that sees the latent too."""
    return BlockGraph(
        inputs={"stack": "step", "text": "constant"},
        values={
            "text/out0": Value("text/out0", 16, frozenset({"text"}), frozenset({0})),
            "body/out0": Value("body/out0", 16, frozenset({"text/out0", "stack"}), frozenset({1})),
            "noise_pred": Value("noise_pred", 16, frozenset({"body/out0"}), frozenset({2})),
        },
        blocks=(Block("text", ("text/out0",)), Block("body", ("body/out0",))),
        predictions=("noise_pred",),
        costs=(100, 10, 1),
    )


def test_a_kept_block_that_sees_nothing_new_is_not_computed_again():
    plan = compile_plan(constant_block_graph(), rows("11", "11", "11"))
    assert [launch.variant for launch in plan.launches] == [0, 1, 1]
    assert plan.variants[1].reads == (Cache("text/out0", "output"),)
    assert plan.macs_run == 111 + 11 + 11
    assert plan.macs_schedule == 3 * 111


def test_an_older_prediction_than_the_last_is_made_again():
    # A launch list does not say which prediction an evaluation without a launch has: it is the last. Here the block
    # computes from the text alone, but removed it follows the latent: predictions p, q, p.
    graph = BlockGraph(
        inputs={"stack": "step", "text": "constant"},
        values={
            "embed": Value("embed", 16, frozenset({"stack"})),
            "b/out0": Value("b/out0", 16, frozenset({"text"})),
            "noise_pred": Value("noise_pred", 16, frozenset({"b/out0"})),
        },
        blocks=(Block("b", ("b/out0",), "residual", ("embed",)),),
        predictions=("noise_pred",),
    )
    plan = compile_plan(graph, rows("1", "0", "1"))
    assert plan.prediction_slots == (0, 1, 2)
    assert [launch.step for launch in plan.launches] == [0, 1, 2]


def test_one_variant_is_reached_even_where_no_gate_is_left_to_raise():
    plan = compile_plan(constant_block_graph(), rows("11", "11", "11"), max_variants=1)
    assert len(plan.variants) == 1
    assert plan.promoted == ()
    assert plan.macs_run == 3 * 111


def test_promotion_takes_the_cheap_merge(chain):
    # Raising b0 (10) at evaluation 1 or b3 (10,000) at evaluation 2 makes one variant of two; b0 is the cheap one.
    plan = compile_plan(chain("residual"), rows("1111", "0111", "1110"), max_variants=2)
    assert plan.promoted == ((1, "b0"),)
    assert len(plan.variants) == 2


def test_a_merge_may_compute_what_is_dead_and_raise_no_gate(chain):
    # Evaluation 1 keeps b0 .. b2 for nobody, evaluation 2 for evaluations 3 to 5: computing them twice is the cheapest
    # merge.
    gates = rows("1111", "1110", "1110", "0001", "0001", "0001")
    free = compile_plan(chain("output"), gates)
    plan = compile_plan(chain("output"), gates, max_variants=3)
    assert (len(free.variants), len(plan.variants)) == (4, 3)
    assert plan.promoted == ()
    assert plan.macs_run == free.macs_run + 1111


def test_a_merge_never_reads_a_cache_before_it_is_written(chain):
    # Evaluations 0 and 2 look alike, but evaluation 2 reads b3, which evaluation 0 has no store of: they cannot share a
    # variant.
    graph = replace(chain("output"), costs=(1000, 1000, 1000, 1, 1, 1))
    gates = rows("1100", "0011", "1100", "0011")
    plan = compile_plan(graph, gates, prediction_used=[False, True, True, True], max_variants=2)
    assert len(plan.variants) <= 2
    written: set[Cache] = set()
    for launch in plan.launches:
        assert set(plan.variants[launch.variant].reads) <= written
        written |= set(plan.variants[launch.variant].writes)


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_a_read_before_any_store_names_step_and_block(chain, cache):
    with pytest.raises(UserError, match="^evaluation 1 removes block 'b2'") as error:
        compile_plan(chain(cache), rows("1101", "1101", "1101"), prediction_used=[False, True, True])
    assert "\n" not in str(error.value)


def test_a_missing_store_that_nothing_needs_is_no_error(chain):
    plan = compile_plan(chain("output"), rows("0001", "1111"), prediction_used=[False, True])
    assert [launch.step for launch in plan.launches] == [1]


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        ([], {}, "no steps"),
        ([[True] * 4, [True] * 3], {}, "evaluation 1 of the schedule has 3 gates, but the model has 4 blocks"),
        ([[True] * 4], {"max_variants": 0}, "at least 1"),
    ],
)
def test_user_errors(chain, gates, options, message):
    with pytest.raises(UserError, match=message):
        compile_plan(chain("output"), gates, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": ("nothing",)}, "prediction 'nothing'"),
        ({"predictions": ()}, "no prediction"),
        ({"values": {"a": Value("a", 1, frozenset({"b"}))}, "blocks": (), "predictions": ("a",)}, "reads 'b'"),
        ({"blocks": (Block("x", ("b0/out0",)), Block("y", ("b0/out0",)))}, "two blocks"),
        ({"blocks": (Block("x", ("b0/out0",), "residual"),)}, "needs 1 inputs"),
        ({"blocks": (Block("x", ("b9/out0",)),)}, "not a value"),
        ({"blocks": (Block("x", ("b0/out0",), "residual", ("b1/out0",)),)}, "cycle"),
        ({"costs": (1,)}, "node"),
    ],
)
def test_malformed_graphs(chain, change, message):
    graph = replace(chain("output"), **change)
    with pytest.raises(ValueError, match=message):
        compile_plan(graph, [[True] * len(graph.blocks)])


def test_malformed_options(chain):
    with pytest.raises(ValueError, match="prediction_used"):
        compile_plan(chain("output"), rows("1111"), prediction_used=[False])
    with pytest.raises(ValueError, match="prediction_used"):
        compile_plan(chain("output"), rows("1111"), prediction_used=[True, True])
    with pytest.raises(ValueError, match="alignment"):
        compile_plan(chain("output"), rows("1111"), alignment=0)


def test_summary(unet):
    plan = compile_plan(unet, published())
    summary = plan_summary(plan, unet)
    assert json.loads(json.dumps(summary)) == summary
    assert [row["steps"] for row in summary["variants"]] == [[0, 13, 19, 20, 21, 26, 32, 39, 48], [7]]
    caches = unet.values["D3/out0"].nbytes + unet.values["D3/out1"].nbytes
    assert [row["read_bytes"] for row in summary["variants"]] == [0, caches]
    assert [row["write_bytes"] for row in summary["variants"]] == [caches, 0]
    assert summary["launches"][1] == {"step": 7, "variant": "v01", "prediction": 1}
    assert (summary["steps"], summary["steps_without_launch"], summary["predictions"]) == (50, 40, 10)
    assert summary["macs_full_run"] == 50 * plan.macs_full
    assert summary["promoted"] == []
    assert plan_summary(compile_plan(unet, published(), max_variants=1), unet)["promoted"] == [
        {"step": 7, "block": "D3"}
    ]


PRINT_PLAN = """
import random
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import Block, BlockGraph, Value
rng = random.Random(3)
names = [f"b{i}/out0" for i in range(8)]
values = {}
for i, n in enumerate(names):
    values[n] = Value(n, 10 + i % 3, frozenset({"stack", *names[max(0, i - 2):i]}), frozenset({i, 8}))
values["noise_pred"] = Value("noise_pred", 4, frozenset(names[-3:]), frozenset({9}))
blocks = tuple(Block(n[:2], (n,)) for n in names)
graph = BlockGraph({"stack": "step"}, values, blocks, ("noise_pred",), tuple(range(1, 11)))
gates = [[True] * 8] + [[rng.random() < 0.5 for _ in names] for _ in range(15)]
for limit in (None, 3):
    plan = compile_plan(graph, gates, max_variants=limit, alignment=8)
    print([(sorted(v.computed), v.reads, v.writes) for v in plan.variants], plan.launches)
    print(plan.promoted, plan.prediction_slots)
"""


def test_the_plan_does_not_depend_on_hash_seeds():
    texts = [
        subprocess.run(
            [sys.executable, "-c", PRINT_PLAN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1]
    assert texts[0].count(b"Launch(") > 20


@pytest.mark.parametrize("cache", ["output", "residual"])
def test_large_schedules_compile_fast(chain, cache):
    rng = random.Random(0)
    gates = [[True] * 84, *([rng.random() < 0.5 for _ in range(84)] for _ in range(249))]
    start = time.process_time()
    plan = compile_plan(chain(cache, 84), gates)
    assert time.process_time() - start < 2
    assert len(plan.launches) == 250


def test_large_schedules_are_promoted_in_seconds(chain):
    rng = random.Random(0)
    gates = [[True] * 56, *([rng.random() < 0.5 for _ in range(56)] for _ in range(249))]
    start = time.process_time()
    plan = compile_plan(chain("residual", 56), gates, max_variants=4)
    assert time.process_time() - start < 20
    assert len(plan.variants) == 4
