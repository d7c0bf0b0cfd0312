from __future__ import annotations

import threading

import pytest
from toy_engine import Toy, manifest_of

from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS, flavour_of, import_flavour
from dipgo_deploy.backends.tensorrt_plans import BuildFlags, GpuTarget, KeyInputs, ShapeRange
from dipgo_deploy.engine import timing_cache
from dipgo_deploy.engine.budget import MemoryNeed, check_budget, memory_need, mib, parse_bytes
from dipgo_deploy.engine.phases import Phases
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic

INPUTS = KeyInputs(
    graph="a",
    weights="b",
    profile={"x": ShapeRange(min=(1,), opt=(1,), max=(1,))},
    flags=BuildFlags(),
    backend="tensorrt",
    version="11.4.0",
    target=GpuTarget(gpu="NVIDIA L4", capabilities=("8.9",)),
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"graph": "z"}, ["graph"]),
        ({"weights": "z"}, ["weights"]),
        ({"profile": {"x": ShapeRange(min=(1,), opt=(1,), max=(2,))}}, ["profile"]),
        ({"flags": BuildFlags(opt_level=4, tf32=True)}, ["opt_level", "tf32"]),
        ({"flags": BuildFlags(max_aux_streams=1)}, ["max_aux_streams"]),
        ({"version": "11.4.1"}, ["version"]),
        ({"target": GpuTarget(gpu="NVIDIA L4", capabilities=("9.0",))}, ["target"]),
        ({"target": GpuTarget(gpu="NVIDIA L40", capabilities=("8.9",))}, ["target"]),
        ({"backend": "tensorrt-rtx", "version": "1"}, ["backend", "version"]),
    ],
)
def test_every_input_is_part_of_the_key(change, named):
    other = INPUTS.model_copy(update=change)
    assert other.key != INPUTS.key
    assert other.differences(INPUTS) == named
    assert INPUTS.differences(INPUTS) == []
    assert KeyInputs.model_validate_json(other.model_dump_json()).key == other.key


def test_targets_have_folder_names():
    assert GpuTarget().label == "portable"
    assert GpuTarget(capabilities=("8.6", "12.0")).label == "sm86-sm120"
    assert GpuTarget(gpu="NVIDIA GeForce RTX 4090", capabilities=("8.9",)).label == "nvidia-geforce-rtx-4090-sm89"


def test_phases_are_one_number_that_never_goes_back():
    phases = Phases()
    phases.start("whole", None, 4)
    phases.step("whole", 0)
    assert phases.fraction == 0.25
    phases.start("part", "whole", 2)
    phases.start("inner", "part", 10)
    phases.step("inner", 4)
    assert phases.fraction == pytest.approx(0.25 + 0.25 * 0.25)
    phases.step("part", 0)
    phases.finish("inner")
    assert phases.fraction == pytest.approx(0.25 + 0.25 * 0.5)
    phases.start("part", "whole", 100)  # the same name again: from the start
    phases.step("part", 0)
    assert phases.fraction == pytest.approx(0.375)
    phases.step("unknown", 3)
    phases.step("whole", 3)
    assert phases.fraction == 1.0


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("2k", 2048), ("1.5GiB", 3 * 2**29), ("500 MB", 500 * 2**20), ("1T", 2**40)]
)
def test_sizes(text, nbytes):
    assert parse_bytes("--workspace", text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1q", "1e3", "nan", "inf", "9" * 30])
def test_wrong_sizes(text):
    with pytest.raises(UserError, match="--workspace"):
        parse_bytes("--workspace", text)


def test_the_budget_counts_everything_and_says_by_how_much_it_is_over():
    manifest = manifest_of(Toy(batch=2))
    need = memory_need(manifest, {"full": 3 * 2**20, "cached": 2**20})
    sample = 2 * 4 * 8 * 8 * 4
    assert need.history == Toy().slots * sample
    assert need.arena == manifest.plan.arena_bytes
    assert need.total == 4 * 2**20 + need.arena + need.history + need.other
    assert need.other > 2 * sample  # at least what the VAE reads and writes
    check_budget(need, need.total, "--memory-budget")
    with pytest.raises(UserError, match=r"weights of 2 engines 4\.0 MiB.* 2\.0 MiB more than the memory of NVIDIA L4"):
        check_budget(need, need.total - 2 * 2**20, "the memory of NVIDIA L4")
    assert mib(MemoryNeed({}, 0, 0, 3 * 2**30).total) == "3.00 GiB"


def test_a_missing_module_is_named(monkeypatch):
    with pytest.raises(UserError, match="--backend cuda: has no engines"):
        flavour_of("cuda")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"backend tensorrt: TensorRT is missing .*pip install .*\[tensorrt\]"):
        import_flavour(FLAVOURS["tensorrt"])


def test_a_write_is_whole_or_not_there(tmp_path):
    write_atomic(tmp_path / "a", b"1")
    write_atomic(tmp_path / "a", memoryview(b"22"))
    assert (tmp_path / "a").read_bytes() == b"22"
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "a", b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "folder", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_the_timing_cache_file_waits_for_its_lock(tmp_path):
    """RTX's own timing cache does nothing, so only the file's handling shows here."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = tmp_path / "caches" / "timing.cache"
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    config = builder.create_builder_config()
    timing_cache.attach(config, path)
    with timing_cache._locked(path):
        thread = threading.Thread(target=timing_cache.merge, args=(config, path))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
