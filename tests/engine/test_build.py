"""Keys, refusals and interruptions, on a toy engine directory whose engines build in a fraction of a second."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import onnx
import pytest
from devices import no_gpu
from onnx import helper as oh
from toy_engine import Toy, build, manifest_of, replace_manifest

from dipgo_deploy.backends.tensorrt_plans import BuildFlags
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import TensorSpec
from dipgo_deploy.bundle.weights import weights_of
from dipgo_deploy.cli.build import main
from dipgo_deploy.engine.build import BuildOptions, BuildReport, Observer, build_engines
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import sole_user

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")

BACKEND = "tensorrt-rtx"
ALL = ["full", "cached", "mixed", "refresh", "text_encoder", "vae"]


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine_dir = build(tmp_path_factory.mktemp("built") / "engine", Toy())
    build_engines(engine_dir, BACKEND)
    return engine_dir


@pytest.fixture
def built_dir(built_once: Path, tmp_path: Path) -> Path:
    """A toy engine directory of one's own with its engines."""
    return shutil.copytree(built_once, tmp_path / "built")


def built(report: BuildReport) -> dict[str, str]:
    return {engine.name: engine.reason for engine in report.built}


def options(**flags: object) -> BuildOptions:
    return BuildOptions(flags=BuildFlags(**flags))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_everything_is_built_once(toy_dir):
    first = build_engines(toy_dir, BACKEND)
    assert built(first) == dict.fromkeys(ALL, "not built yet")
    assert first.folder == toy_dir / "plans" / f"{BACKEND}-{first.version}-portable"
    assert sorted(p.name for p in first.folder.iterdir()) == sorted(
        [f"{name}.{suffix}" for name in ALL for suffix in ("plan", "json")]
    )
    assert built(build_engines(toy_dir, BACKEND)) == {}
    assert built(build_engines(toy_dir, BACKEND, BuildOptions(build=False))) == {}


@pytest.mark.parametrize(
    ("weight", "users"), [("wa", {"full", "mixed", "refresh"}), ("wb", {"full", "mixed", "cached"})]
)
def test_one_changed_weight_byte(built_dir, weight, users):
    tensor, file = weights_of(built_dir / "graphs/full.onnx")[weight], built_dir / "graphs/weights.bin"
    flip(file, tensor.offset + tensor.length - 1)
    reseal(built_dir)
    assert built(build_engines(built_dir, BACKEND)) == dict.fromkeys(users, "changed: weights")
    flip(file, tensor.offset - 1 if tensor.offset else tensor.length)  # padding, which no graph uses
    reseal(built_dir)
    assert built(build_engines(built_dir, BACKEND)) == {}


def test_one_changed_graph(built_dir):
    path = built_dir / "graphs/mixed.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Tanh").op_type = "Sigmoid"
    path.write_bytes(model.SerializeToString())
    reseal(built_dir)
    assert built(build_engines(built_dir, BACKEND)) == {"mixed": "changed: graph"}


def test_one_changed_flag(built_dir):
    for flags, reason in (
        ({"opt_level": 1}, "opt_level"),
        ({"opt_level": 1, "tf32": True}, "tf32"),
    ):
        assert built(build_engines(built_dir, BACKEND, options(**flags))) == dict.fromkeys(ALL, f"changed: {reason}")
        assert built(build_engines(built_dir, BACKEND, options(**flags))) == {}


def test_one_changed_profile(built_dir, tmp_path):
    """Another batch: every graph that has it changes; the text encoder, which has not, is kept."""
    other = build(tmp_path / "other", Toy(batch=3))
    shutil.copytree(built_dir / "plans", other / "plans")
    rebuilt = built(build_engines(other, BACKEND))
    assert list(rebuilt) == [name for name in ALL if name != "text_encoder"]
    assert all("profile" in reason for reason in rebuilt.values())


def test_targets_lie_side_by_side(built_dir):
    report = build_engines(built_dir, BACKEND, BuildOptions(compute_capabilities=("12.0", "8.9")))
    assert list(built(report)) == ALL
    assert report.folder.name.endswith("-sm89-sm120")
    assert built(build_engines(built_dir, BACKEND)) == {}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plan: flip(plan, plan.stat().st_size // 2), "damaged"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "damaged"),
        (lambda plan: plan.unlink(), "damaged"),
        (lambda plan: plan.with_suffix(".json").unlink(), "not built yet"),
        (lambda plan: plan.with_suffix(".json").write_text("{"), "not built yet"),
    ],
)
def test_an_engine_counts_only_if_it_is_whole(built_dir, damage, reason):
    plan = next((built_dir / "plans").iterdir()) / "cached.plan"
    damage(plan)
    with pytest.raises(UserError, match=f"cached \\({reason}"):
        build_engines(built_dir, BACKEND, BuildOptions(build=False))
    rebuilt = built(build_engines(built_dir, BACKEND))
    assert list(rebuilt) == ["cached"] and rebuilt["cached"].startswith(reason)


def test_a_record_whose_key_is_not_that_of_its_content_is_ignored(built_dir):
    path = next((built_dir / "plans").iterdir()) / "cached.json"
    document = json.loads(path.read_text())
    document["inputs"]["weights"] = "0" * 64
    path.write_text(json.dumps(document))
    assert built(build_engines(built_dir, BACKEND)) == {"cached": "not built yet"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2, 4, 8, 9)}, r"tensor noise_pred is output float32 \(2, 4, 8, 8\) there, .*\(2, 4, 8, 9\)"),
        ({"dtype": "float16"}, "tensor noise_pred is output float32 .* there, output float16"),
        ({"name": "noise"}, "tensor noise is missing there"),
    ],
)
def test_a_network_unlike_the_manifest_is_refused(toy_dir, change, message, monkeypatch):
    monkeypatch.setattr("dipgo_deploy.bundle.directory.check_structure", lambda manifest: None)  # refuses some too
    manifest = manifest_of(Toy())
    variant = manifest.plan.variants[0]
    output = TensorSpec(**{**variant.graph.outputs[0].model_dump(), **change})
    graph = variant.graph.model_copy(update={"outputs": (output, *variant.graph.outputs[1:])})
    variants = (variant.model_copy(update={"graph": graph}), *manifest.plan.variants[1:])
    plan = manifest.plan.model_copy(update={"variants": variants})
    files = Bundle.open(toy_dir).manifest.files
    (toy_dir / "manifest.json").write_text(replace_manifest(manifest, plan=plan.model_dump(), files=files).dumps())
    with pytest.raises(UserError, match=r"full\.onnx: " + message):
        build_engines(toy_dir, BACKEND)


def test_a_refused_node_is_named(toy_dir):
    """A Squeeze of a dimension that is not 1, as a careless export of PixArt emits it."""
    path = toy_dir / "graphs/refresh.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = list(model.graph.node)
    squeeze = [
        oh.make_node("Constant", [], ["squeezed_axes"], value_ints=[1]),
        oh.make_node("Squeeze", ["biased", "squeezed_axes"], ["squeezed"], name="careless/Squeeze"),
        oh.make_node("Add", ["biased", "squeezed"], ["widened"]),
    ]
    at = next(index for index, node in enumerate(nodes) if node.op_type == "Tanh")
    nodes[at].input[0] = "widened"
    model.graph.ClearField("node")
    model.graph.node.extend([*nodes[:at], *squeeze, *nodes[at:]])
    path.write_bytes(model.SerializeToString())
    reseal(toy_dir)
    with pytest.raises(UserError, match=r"refresh\.onnx: TensorRT-RTX refuses it: node careless/Squeeze \(Squeeze\)"):
        build_engines(toy_dir, BACKEND)


def test_finished_engines_stay_when_a_later_one_fails(toy_dir):
    path = toy_dir / "graphs/mixed.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"Tanh", b"Tahn"))
    reseal(toy_dir)
    with pytest.raises(UserError, match=r"mixed\.onnx: TensorRT-RTX refuses it"):
        build_engines(toy_dir, BACKEND)
    path.write_bytes(whole)
    reseal(toy_dir)
    assert list(built(build_engines(toy_dir, BACKEND))) == ALL[2:]


class CtrlC(Observer):
    """Ctrl-C while the third engine is being built."""

    def __init__(self) -> None:
        self.index = -1
        self.cancelled = False

    def started(self, name: str, index: int, count: int, reason: str) -> None:
        self.index = index

    def progressed(self, fraction: float) -> None:
        if self.index == 2:
            self.index = -1
            os.kill(os.getpid(), signal.SIGINT)

    def cancelling(self) -> None:
        self.cancelled = True


@pytest.fixture
def sigint():
    """What Ctrl-C does by default; in a process that was started in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_leaves_finished_engines_and_nothing_half_written(toy_dir):
    observer = CtrlC()
    with pytest.raises(KeyboardInterrupt):
        build_engines(toy_dir, BACKEND, observer=observer)
    assert observer.cancelled
    folder = next((toy_dir / "plans").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == [
        "cached.json",
        "cached.plan",
        "full.json",
        "full.plan",
    ]
    assert list(built(build_engines(toy_dir, BACKEND))) == ALL[2:]


def test_what_a_killed_build_left_is_removed(built_dir):
    folder = next((built_dir / "plans").iterdir())
    (folder / ".full.plan.abc.partial").write_bytes(b"half")
    (folder / "full.plan").unlink()
    assert list(built(build_engines(built_dir, BACKEND))) == ["full"]
    assert not list(folder.glob(".*.partial"))


def test_one_build_at_a_time_in_a_folder(built_dir):
    folder = next((built_dir / "plans").iterdir())
    (folder / "full.plan").unlink()
    with sole_user(folder, "--engine-dir"), pytest.raises(UserError, match="another process works there"):
        build_engines(built_dir, BACKEND)
    assert list(built(build_engines(built_dir, BACKEND))) == ["full"]


def test_over_budget_nothing_starts(toy_dir):
    before = tree(toy_dir)
    with pytest.raises(UserError, match=r"the run needs .*MiB more than --memory-budget of 0\.0 MiB; .*--max-variants"):
        build_engines(toy_dir, BACKEND, BuildOptions(memory_budget=1000))
    assert tree(toy_dir) == before
    need = build_engines(toy_dir, BACKEND, BuildOptions(memory_budget=2**30)).need
    assert need.weights == {"full": 2048, "cached": 1024, "mixed": 2048, "refresh": 1024, "text_encoder": 0, "vae": 0}
    assert need.arena == manifest_of(Toy()).plan.arena_bytes
    assert need.history == Toy().slots * 2 * 4 * 8 * 8 * 4


REFUSED = [
    ("--backend quantum", "'quantum' is not one of"),
    ("--backend tensorrt-rtx --version-compatible", "--version-compatible: not with --backend tensorrt-rtx"),
    ("--backend tensorrt-rtx --hardware-compatible", "choose them with --compute-capability"),
    ("--backend tensorrt --compute-capability 8.6", "--compute-capability: not with --backend tensorrt"),
    ("--backend tensorrt-rtx --compute-capability 1.0", "--compute-capability 1.0: TensorRT-RTX"),
    ("--backend tensorrt-rtx --compute-capability current,8.6", "current stands alone"),
    ("--backend tensorrt-rtx --opt-level 9", "--opt-level"),
    ("--backend tensorrt-rtx --memory-budget lots", "--memory-budget lots: give a size"),
    ("--backend tensorrt-rtx --workspace -1", "--workspace -1: give a size"),
    ("--backend tensorrt-rtx --memory-budget 1k", "more than --memory-budget"),
    ("--backend tensorrt-rtx --no-build", "build without --no-build"),
]
REFUSED_WITHOUT_GPU = [
    ("--backend tensorrt-rtx --strip", "--strip: refittable engines are built with a GPU only"),
    ("--backend tensorrt-rtx --compute-capability current", "--compute-capability current: no NVIDIA GPU"),
    ("--backend tensorrt", "backend tensorrt: TensorRT builds on a GPU only"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED + (REFUSED_WITHOUT_GPU if no_gpu() else []))
def test_mistakes_are_one_line_and_leave_nothing(toy_dir, capfd, line, message):
    before = tree(toy_dir)
    assert main(["--engine-dir", str(toy_dir), *line.split()]) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert tree(toy_dir) == before


def test_the_command_reports(toy_dir, capfd):
    line = ["--engine-dir", str(toy_dir), "--backend", BACKEND, "--timing-cache", str(toy_dir / "t.cache")]
    assert main([*line, "--json"]) == 0
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    assert [engine["name"] for engine in report["engines"]] == ALL
    assert {engine["status"] for engine in report["engines"]} == {"built"}
    assert "--timing-cache: TensorRT-RTX keeps no timings; ignored" in printed.err
    assert main(line) == 0
    printed = capfd.readouterr()
    assert "0 built, 6 kept" in printed.out and printed.err == ""


def test_verify_refuses_a_changed_directory(toy_dir):
    flip(toy_dir / "graphs/weights.bin", 0)
    with pytest.raises(UserError, match=r"weights\.bin: its sha256 differs"):
        build_engines(toy_dir, BACKEND, verify=True)


def test_weights_outside_the_folder_are_refused(toy_dir):
    path = toy_dir / "graphs/full.onnx"
    (toy_dir / "other.bin").write_bytes((toy_dir / "graphs/weights.bin").read_bytes())
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../other.bi"))
    reseal(toy_dir)
    with pytest.raises(UserError, match=r"full\.onnx: TensorRT-RTX refuses it: .*Failed to import initializer: wa"):
        build_engines(toy_dir, BACKEND)
