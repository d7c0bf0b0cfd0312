from __future__ import annotations

from toy_engine import Toy, manifest_of

from dipgo_deploy.bundle.names import stored_name
from dipgo_deploy.bundle.stored import stored_values


def test_each_value_lives_from_its_write_to_its_last_read() -> None:
    plan = manifest_of(Toy(dtype="fp16")).plan
    values = stored_values(plan)
    # full writes, cached and mixed read; mixed writes, mixed reads; mixed writes what refresh replaces elsewhere.
    assert [(value.written, value.read, value.last) for value in values] == [
        (0, (1, 2), 2),
        (2, (3,), 3),
        (3, (), 3),
        (4, (5,), 5),
    ]
    assert [value.offset for value in values] == [0, plan.arena_bytes // 2, 0, plan.arena_bytes // 2]
    assert {value.name for value in values} == {"cache.a/out0"}
    assert {(value.spec.shape, value.spec.dtype) for value in values} == {((4, 4, 8, 8), "float16")}


def test_a_stored_value_is_named_as_its_readers_name_it() -> None:
    assert stored_name("new_cache.down.0/out1", ["cache.down.0/out1@2"]) == "cache.down.0/out1"
    assert stored_name("new_value.pos", []) == "value.pos"
    # A sum is read by other sums, too, which have no name for it.
    assert stored_name("sum", ["term0", "value.up.0/out0"]) == "value.up.0/out0"
    assert stored_name("sum", ["term0"]) == "sum"
