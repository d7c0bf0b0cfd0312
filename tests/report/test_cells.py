"""What becomes of each block at each evaluation, on launch lists made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from toy_engine import Toy, manifest_of

from dipgo_deploy.bundle.manifest import Graph, LaunchEntry, Manifest, PlanEntry, TensorSpec, VariantEntry
from dipgo_deploy.bundle.weights import StoredWeight
from dipgo_deploy.report.cells import COMPUTED, DEAD, FORECAST, NO_LAUNCH, OTHER, REUSED, cells_of

A, B = "blocks.0", "blocks.1"
BYTES = 64


def spec(name: str) -> TensorSpec:
    return TensorSpec(name=name, shape=(1, 16), dtype="float32")


def variant(name: str, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> VariantEntry:
    graph = Graph(file=f"graphs/{name}.onnx", inputs=tuple(map(spec, reads)), outputs=tuple(map(spec, writes)))
    return VariantEntry(name=name, graph=graph, reads=tuple(reads), writes=tuple(writes), predicts=True, macs=10)


def manifest(variants: Sequence[VariantEntry], launches: Sequence[LaunchEntry], evaluations: int) -> Manifest:
    usual = manifest_of(Toy(kind="none"))
    plan: PlanEntry = usual.plan.model_copy(
        update={"variants": tuple(variants), "launches": tuple(launches), "evaluations": evaluations}
    )
    return usual.model_copy(update={"plan": plan})


def launch(
    step: int, number: int, reads: Sequence[int] = (), writes: Sequence[int] = (), weights: Sequence[float] = ()
) -> LaunchEntry:
    offsets = {"reads": tuple(reads), "writes": tuple(writes), "forecast": tuple(weights)}
    return LaunchEntry(step=step, variant=number, timestep=9.0 - step, coefficients=(1.0,), slot=1 + step, **offsets)


def weights(*blocks: str) -> dict[str, StoredWeight]:
    return {
        f"{block}.w": StoredWeight(parameter=f"{block}.weight", shape=(4,), dtype="float", offset=0, length=16)
        for block in blocks
    }


FULL = variant("full", writes=(f"new_cache.{A}/out0", f"new_cache.{B}/out0"))
KEPT = ((True, True),)
RUNS = ((True, True),)


def test_computed_reused_dead_and_no_launch() -> None:
    reads_b = variant("reads", reads=(f"cache.{B}/out0",))
    found = cells_of(
        manifest([FULL, reads_b], [launch(0, 0, writes=(0, 256)), launch(1, 1, reads=(256,))], 3),
        (A, B),
        (*KEPT, (False, False), (False, False)),
        RUNS * 3,
        (weights(A, B), {}),
    )
    # Of A nothing is read at evaluation 1, of B what evaluation 0 stored.
    assert found.states == ((COMPUTED, DEAD, NO_LAUNCH), (COMPUTED, REUSED, NO_LAUNCH))
    assert found.notes[1, 0] == (f"writes cache.{B}/out0 (0.1 KiB at byte 256), last read at evaluation 1",)
    assert found.notes[1, 1] == (f"reads cache.{B}/out0 (0.1 KiB at byte 256), written at evaluation 0",)
    assert found.notes[0, 0] == (f"writes cache.{A}/out0 (0.1 KiB at byte 0), never read",)
    assert [(column.graphs, column.macs, column.timestep) for column in found.columns] == [
        (("full",), 10, 9.0),
        (("reads",), 10, 8.0),
        ((), 0, None),
    ]


def test_a_block_that_is_kept_for_nothing_is_dead() -> None:
    only_b = variant("only", writes=(f"new_cache.{B}/out0",))
    made = manifest([FULL, only_b], [launch(0, 0, writes=(0, 256)), launch(1, 1, writes=(256,))], 2)
    found = cells_of(made, (A, B), KEPT * 2, RUNS * 2, (weights(A, B), weights(B)))
    assert found.states == ((COMPUTED, DEAD), (COMPUTED, COMPUTED))
    assert found.notes[0, 1] == ("the schedule keeps it, and nothing needs what it would give",)
    # Nobody can tell without the weights.
    unknown = cells_of(made, (A, B), KEPT * 2, RUNS * 2, None)
    assert unknown.states == ((COMPUTED, COMPUTED), (COMPUTED, COMPUTED)) and not unknown.weights_known


def test_equal_weights_of_two_blocks_are_no_sign_of_either() -> None:
    """A bias of zeros is stored once for both."""
    shared = StoredWeight(parameter=f"{A}.bias", equal=(f"{B}.bias",), shape=(1,), dtype="float", offset=0, length=4)
    only_b = variant("only", writes=(f"new_cache.{B}/out0",))
    made = manifest([FULL, only_b], [launch(0, 0, writes=(0, 256)), launch(1, 1, writes=(256,))], 2)
    graphs = [{**weights(A, B), "zeros": shared}, {**weights(B), "zeros": shared}]
    assert cells_of(made, (A, B), KEPT * 2, RUNS * 2, graphs).states[0] == (COMPUTED, DEAD)


def test_a_weighted_sum_is_a_forecast() -> None:
    two = variant("two", reads=(f"cache.{A}/out0@1", f"cache.{A}/out0@2", f"cache.{B}/out0"))
    launches = [
        launch(0, 0, writes=(0, 256)),
        launch(1, 0, writes=(512, 768)),
        launch(2, 1, reads=(512, 0, 768), weights=(2.0, -1.0)),
        launch(3, 1, reads=(512, 0, 768), weights=(1.0, 0.0)),
    ]
    gates = (*KEPT * 2, (False, False), (False, False))
    found = cells_of(manifest([FULL, two], launches, 4), (A, B), gates, RUNS * 4, (weights(A, B), {}))
    assert found.states == ((COMPUTED, COMPUTED, FORECAST, FORECAST), (COMPUTED, COMPUTED, REUSED, REUSED))
    assert [note.split(" (")[0] for note in found.notes[0, 2]] == [
        f"reads 2 times cache.{A}/out0",
        f"reads -1 times cache.{A}/out0",
    ]
    assert len(found.notes[0, 3]) == 1  # a weight of zero reads nothing


def test_segments_of_one_evaluation_count_together() -> None:
    """The segment that computes B reads what A's gave at the same evaluation, or at an earlier one."""
    first = variant("first", writes=(f"new_value.{A}/out0",))
    second = variant("second", reads=(f"value.{A}/out0",))
    launches = [launch(0, 0, writes=(0,)), launch(0, 1, reads=(0,)), launch(1, 1, reads=(0,))]
    gates = ((True, True), (False, True))
    found = cells_of(manifest([first, second], launches, 2), (A, B), gates, RUNS * 2, (weights(A), weights(B)))
    assert found.states == ((COMPUTED, REUSED), (COMPUTED, COMPUTED))
    assert found.columns[0].graphs == ("first", "second") and found.columns[0].macs == 20


def test_a_sum_of_segments_with_weights_is_a_forecast() -> None:
    """A weighted sum serves every place: its inputs have no names of blocks, what it reads has."""
    write = variant("write", writes=(f"new_value.{A}/out0",))
    total = variant("weighted2", reads=("a", "b"), writes=("sum",))
    launches = [
        launch(0, 0, writes=(0,)),
        launch(1, 0, writes=(256,)),
        launch(2, 1, reads=(256, 0), writes=(512,), weights=(2.0, -1.0)),
    ]
    gates = ((True,), (True,), (False,))
    made = manifest([write, total], launches, 3)
    assert cells_of(made, (A,), gates, ((True,),) * 3, (weights(A), {})).states == ((COMPUTED, COMPUTED, FORECAST),)


def test_re_enabled_gates_and_other_denoisers() -> None:
    made = manifest([FULL], [launch(0, 0, writes=(0, 256))], 1).model_copy(update={"promoted": ((0, A),)})
    found = cells_of(made, (A, B), KEPT, ((True, False),), (weights(A, B),))
    assert found.states == ((COMPUTED,), (OTHER,))
    assert "re-enabled: the schedule skips it" in found.notes[0, 0]


def test_a_conditional_only_launch_reads_the_second_half_of_what_a_guided_one_stored() -> None:
    whole, half = (2, 16), (1, 16)
    written = TensorSpec(name=f"new_cache.{A}/out0", shape=whole, dtype="float32")
    full = VariantEntry(
        name="full",
        graph=Graph(file="full.onnx", inputs=(), outputs=(written,)),
        reads=(),
        writes=(written.name,),
        predicts=True,
        macs=10,
    )
    read = TensorSpec(name=f"cache.{A}/out0/conditional", shape=half, dtype="float32")
    cached = VariantEntry(
        name="cached",
        graph=Graph(file="cached.onnx", inputs=(read,), outputs=()),
        reads=(read.name,),
        writes=(),
        predicts=True,
        macs=5,
    )
    alone = launch(1, 1, reads=(read.nbytes,)).model_copy(update={"guidance": 0.0})
    made = manifest([full, cached], [launch(0, 0, writes=(0,)), alone], 2)
    found = cells_of(made, (A,), ((True,), (False,)), ((True,),) * 2, (weights(A), {}))
    assert found.states == ((COMPUTED, REUSED),) and found.columns[1].guidance == 0
