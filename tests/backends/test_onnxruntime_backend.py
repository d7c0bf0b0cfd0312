from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from toy_engine import Toy, build, manifest_of, replace_manifest, weights

from dipgo_deploy.backends import create_backend, onnxruntime_weights
from dipgo_deploy.backends import onnxruntime as backend_module
from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.backends.storage import from_storage, to_storage
from dipgo_deploy.bundle.history import graph_coefficients
from dipgo_deploy.bundle.manifest import Graph, TensorSpec
from dipgo_deploy.bundle.weights import StoredWeight, WeightsIndex
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.memory import process_memory

TOY = Toy()


@pytest.fixture
def backend() -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend("cpu", threads=1)


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return build(tmp_path / "engine", TOY)


def graph(name: str) -> Graph:
    return next(variant.graph for variant in manifest_of(TOY).plan.variants if variant.name == name)


def test_memory_is_aligned_zeroed_and_addressable_in_parts(backend):
    memory = backend.allocate(1000)
    assert memory.address % 256 == 0
    spec = TensorSpec(name="x", shape=(3,), dtype="float32")
    np.testing.assert_array_equal(backend.download(memory, spec), np.zeros(3))
    part = memory.at(512, 12)
    backend.upload(part, np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(backend.download(part, spec), [1, 2, 3])
    np.testing.assert_array_equal(backend.download(memory, spec), np.zeros(3))
    with pytest.raises(ValueError, match="do not fit"):
        backend.upload(part, np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="outside"):
        memory.at(996, 8)


def test_a_download_is_a_copy(backend):
    memory = backend.allocate(8)
    spec = TensorSpec(name="x", shape=(1,), dtype="int64")
    first = backend.download(memory, spec)
    backend.upload(memory, np.array([7], np.int64))
    assert first[0] == 0


def test_a_graph_runs_on_bound_addresses(backend, engine_dir):
    executable = backend.load(engine_dir, graph("refresh"))
    specs = {spec.name: spec for spec in (*executable.graph.inputs, *executable.graph.outputs)}
    tensors = {name: backend.allocate(spec.nbytes) for name, spec in specs.items()}
    launch = executable.bind(tensors)
    stack = np.random.default_rng(0).normal(size=specs["stack"].shape).astype(np.float32)
    for slot in (0, 3):  # the same binding, other data
        backend.upload(tensors["stack"], stack)
        backend.upload(
            tensors["coefficients"], graph_coefficients(np.eye(TOY.slots)[slot].tolist(), TOY.slots - TOY.noises)
        )
        launch()
        got = backend.download(tensors["new_cache.a/out0"], specs["new_cache.a/out0"])
        np.testing.assert_allclose(got, np.tanh(weights()["wa"] * np.concatenate([stack[slot]] * 2)), atol=1e-6)


def test_binding_keeps_its_memory_alive(backend, engine_dir):
    executable = backend.load(engine_dir, graph("cached"))
    specs = (*executable.graph.inputs, *executable.graph.outputs)
    launch = executable.bind({spec.name: backend.allocate(spec.nbytes) for spec in specs})
    junk = [np.full(1 << 16, 255, np.uint8) for _ in range(64)]
    launch()  # would write into freed memory
    assert all((array == 255).all() for array in junk)


def test_binding_needs_every_name_and_enough_memory(backend, engine_dir):
    executable = backend.load(engine_dir, graph("refresh"))
    with pytest.raises(KeyError, match="stack"):
        executable.bind({})
    small = {spec.name: backend.allocate(4) for spec in (*executable.graph.inputs, *executable.graph.outputs)}
    with pytest.raises(ValueError, match="stack: needs"):
        executable.bind(small)


def damaged(engine_dir: Path, how: str) -> Graph:
    path = engine_dir / "graphs/full.onnx"
    wanted = graph("full")
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "no weights":
        (engine_dir / "graphs/weights.bin").unlink()
    elif how == "short weights":
        (engine_dir / "graphs/weights.bin").write_bytes(b"\0" * 100)
    elif how == "other shape":
        first = wanted.inputs[0].model_copy(update={"shape": (99, *wanted.inputs[0].shape[1:])})
        return wanted.model_copy(update={"inputs": (first, *wanted.inputs[1:])})
    elif how == "other dtype":
        last = wanted.outputs[-1].model_copy(update={"dtype": "float16"})
        return wanted.model_copy(update={"outputs": (*wanted.outputs[:-1], last)})
    elif how == "one input more":
        more = TensorSpec(name="extra", shape=(1,), dtype="float32")
        return wanted.model_copy(update={"inputs": (*wanted.inputs, more)})
    elif how == "one output less":
        return wanted.model_copy(update={"outputs": wanted.outputs[:1]})
    return wanted


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "named in the manifest but missing"),
        ("truncated", r"full\.onnx"),
        ("no weights", r"(full\.onnx|weights\.bin).*"),
        ("short weights", r"(full\.onnx|weights\.bin).*"),
        ("other shape", "input stack is tensor"),
        ("other dtype", "output new_cache.a/out0 is tensor"),
        ("one input more", "input extra is missing in the graph"),
        ("one output less", "output new_cache.a/out0 is .* missing in the manifest"),
    ],
)
def test_a_damaged_graph_is_one_clear_line(engine_dir, how, message, share_weights, capfd):
    wanted = damaged(engine_dir, how)
    with pytest.raises(UserError, match=message) as caught:
        OnnxRuntimeBackend("cpu", threads=1, share_weights=share_weights).load(engine_dir, wanted)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_run_that_fails_names_the_graph(tmp_path, capfd):
    toy = Toy(kind="class")
    backend = OnnxRuntimeBackend("cpu", threads=1)
    variant = manifest_of(toy).plan.variants[0]
    executable = backend.load(build(tmp_path, toy), variant.graph)
    specs = (*variant.graph.inputs, *variant.graph.outputs)
    tensors = {spec.name: backend.allocate(spec.nbytes) for spec in specs}
    backend.upload(tensors["class_labels"], np.full(4, 1000, np.int64))
    with pytest.raises(UserError, match=r"full\.onnx: the run failed: .*"):
        executable.bind(tensors)()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not process_memory(), reason="the kernel does not tell")
def test_all_graphs_take_their_intermediates_from_one_arena(tmp_path, backend):
    """Eight graphs with 16 MiB of intermediates each, run in turn: 128 MiB if every session kept its own."""
    large = helper.make_tensor("shape", TensorProto.INT64, [1], [2**22])
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Sin", ["wide"], ["sine"]),
        helper.make_node("ReduceMax", ["sine"], ["y"], keepdims=0),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1]), ("y", []))]
    made = helper.make_graph(nodes, "wide", value[:1], value[1:], [large])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    entry = Graph(
        file="g.onnx",
        inputs=(TensorSpec(name="x", shape=(1,), dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=(), dtype="float32"),),
    )
    executables = [backend.load(tmp_path, entry) for _ in range(8)]
    tensors = {"x": backend.allocate(4), "y": backend.allocate(4)}
    backend.upload(tensors["x"], np.array([1], np.float32))
    before = process_memory()["rss"]
    for executable in executables:
        executable.bind(tensors)()
    assert process_memory()["rss"] - before < 64 * 2**20
    assert backend.download(tensors["y"], entry.outputs[0]) == pytest.approx(np.sin(1))


def test_shared_weights_are_one_mapping_for_all_graphs(engine_dir):
    backend = OnnxRuntimeBackend("cpu", threads=1, share_weights=True)
    for name in ("full", "mixed", "refresh"):
        backend.load(engine_dir, graph(name))
    assert len(backend.shared_weights.values) == 2  # wa and wb, once each


def test_shared_weights_outside_the_folder_are_refused(engine_dir):
    path = engine_dir / "graphs/full.onnx"
    (engine_dir / "other.bin").write_bytes((engine_dir / "graphs/weights.bin").read_bytes())
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../other.bi"))
    with pytest.raises(UserError, match="path escapes model directory"):
        OnnxRuntimeBackend("cpu", share_weights=True).load(engine_dir, graph("full"))


def test_shared_weights_that_their_file_does_not_hold_are_refused(engine_dir):
    path = engine_dir / "graphs/weights.json"
    path.write_text(path.read_text().replace('"shape":[1,', '"shape":[1000,', 1))
    with pytest.raises(UserError, match=r"weights\.bin: wa cannot be read"):
        OnnxRuntimeBackend("cpu", share_weights=True).load(engine_dir, graph("full"))


def test_bf16_is_refused_on_the_cpu_by_name(backend):
    with pytest.raises(UserError, match="backend cpu: .*bf16"):
        backend.check(manifest_of(Toy(dtype="bf16")))
    backend.check(replace_manifest(manifest_of(TOY)))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is there")
def test_cuda_is_refused_by_name_where_it_is_not_and_auto_takes_the_cpu():
    with pytest.raises(UserError, match="backend cuda"):
        create_backend("cuda")
    assert create_backend("auto").name == "cpu"


def test_cuda_that_fell_back_to_the_cpu_is_an_error(engine_dir, backend):
    backend.name, backend._provider = "cuda", "CUDAExecutionProvider"
    backend._ort = FallingBack()
    with pytest.raises(UserError, match="fell back to the CPU"):
        backend.load(engine_dir, graph("full"))


class FallingBack:
    """An ONNX Runtime whose CUDA provider does not start: it warns and runs on the CPU."""

    SessionOptions = onnxruntime.SessionOptions

    @staticmethod
    def InferenceSession(path: str, options: object, **_: object) -> object:  # noqa: N802
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "quantum"}, "backend 'quantum': choose one of"),
        ({"name": "cpu", "threads": 0}, "threads 0"),
    ],
)
def test_wrong_backend_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        create_backend(**arguments)


def test_bfloat16_storage_is_torchs():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    values = np.concatenate(
        [random.normal(size=1000) * 10.0 ** random.integers(-30, 30, 1000), [0, -0.0, np.inf, -np.inf, np.nan, 3.4e38]]
    ).astype(np.float32)
    want = torch.from_numpy(values).bfloat16()
    stored = to_storage(values, "bfloat16")
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(stored[finite], want.view(torch.uint16).numpy()[finite])
    back = from_storage(stored.view(np.uint8), TensorSpec(name="x", shape=values.shape, dtype="bfloat16"))
    np.testing.assert_array_equal(back, want.float().numpy())


@pytest.mark.parametrize(("limit", "reordered"), [(0, False), (2**28, True)])
def test_large_convolutions_keep_their_layout(tmp_path, monkeypatch, limit, reordered):
    """ONNX Runtime's own layout is seen in the graph that a session runs: nodes that reorder."""
    random = np.random.default_rng(0)
    weights = [numpy_helper.from_array(random.normal(size=(16, 16, 3, 3)).astype(np.float32), f"w{i}") for i in (0, 1)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "w1"], ["y"], pads=[1, 1, 1, 1]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 16, 8, 8)) for name in "xy"]
    made = helper.make_graph(nodes, "convolutions", values[:1], values[1:], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    image = random.normal(size=(1, 16, 8, 8)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": image})[0]
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert backend_module._convolution_bytes(tmp_path / "g.onnx") == 0  # unknown
    shape = (16, 16, 3, 3)
    stored = {
        name: StoredWeight(parameter=None, shape=shape, dtype="float", offset=place * 9216, length=9216)
        for place, name in enumerate(("w0", "w1"))
    }
    (tmp_path / "weights.json").write_text(WeightsIndex(tensors=stored).model_dump_json())
    assert backend_module._convolution_bytes(tmp_path / "g.onnx") == 2 * 16 * 16 * 9 * 4
    monkeypatch.setattr(backend_module, "_LARGE_CONVOLUTIONS", limit)

    class Saving(OnnxRuntimeBackend):
        def session_options(self):
            options = super().session_options()
            options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
            return options

    specs = [TensorSpec(name=name, shape=(1, 16, 8, 8), dtype="float32") for name in "xy"]
    backend = Saving("cpu", threads=1, quick_start=True)
    executable = backend.load(tmp_path, Graph(file="g.onnx", inputs=(specs[0],), outputs=(specs[1],)))
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert ("ReorderInput" in kinds) == reordered
    tensors = {spec.name: backend.allocate(spec.nbytes) for spec in specs}
    backend.upload(tensors["x"], image)
    executable.bind(tensors)()
    np.testing.assert_allclose(backend.download(tensors["y"], specs[1]), expected, rtol=1e-4, atol=1e-4)


def test_the_model_behind_values_on_a_device_is_an_identity():
    model = onnx.load_from_string(onnxruntime_weights._IDENTITY)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Identity", ["x"], ["y"])
