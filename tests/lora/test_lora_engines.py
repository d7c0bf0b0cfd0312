"""LoRA in TensorRT engines: built with NVIDIA's own parser and builder (no GPU needed), and looked up by key."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from lora_files import make_updates, save_lora  # noqa: E402

from dipgo_deploy.backends.tensorrt import collecting_logger, feed_model, find_plan  # noqa: E402
from dipgo_deploy.backends.tensorrt_cuda import Device, NoDeviceError, find_device  # noqa: E402
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS, import_flavour  # noqa: E402
from dipgo_deploy.backends.tensorrt_plans import BuildFlags, PlanRecord, WeightHashes  # noqa: E402
from dipgo_deploy.bundle.directory import Bundle  # noqa: E402
from dipgo_deploy.engine.build import BuildOptions, build_engines  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.lora.file import LoraChoice  # noqa: E402
from dipgo_deploy.lora.merge import merge_loras  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402

RTX = "tensorrt-rtx"
HERE = Device("Some GPU", "8.9", 2**34)
MODULES = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"]


@pytest.fixture
def module():
    try:
        return import_flavour(FLAVOURS[RTX])
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def lora(dit, tmp_path):
    updates = make_updates(load_denoiser(dit.model)[0], MODULES)
    return save_lora(tmp_path / "a.safetensors", updates)


def statuses(report):
    return {engine.name: engine.status for engine in report.engines}


def test_engines_with_a_lora_lie_beside_those_without(dit, lora, module, tmp_path):
    plain = build_engines(dit.path, RTX)
    with_lora = BuildOptions(lora=((lora, 0.5),))
    changed = build_engines(dit.path, RTX, with_lora)
    affected = {name for name, status in statuses(changed).items() if status == "built"}
    counts = {name.split("/")[-1].removesuffix(".onnx"): n for name, n in changed.loras[0].graphs.items()}
    assert affected == {name for name, count in counts.items() if count} and affected
    assert statuses(changed)["vae_decoder"] == "kept"  # none of its weights changed
    assert set(statuses(build_engines(dit.path, RTX, with_lora)).values()) == {"kept"}
    assert set(statuses(build_engines(dit.path, RTX)).values()) == {"kept"}
    other_scale = statuses(build_engines(dit.path, RTX, BuildOptions(lora=((lora, 0.75),))))
    assert {name for name, status in other_scale.items() if status == "built"} == affected

    before = {engine.name: engine.path.read_bytes() for engine in plain.engines}
    for engine in changed.engines:
        assert (engine.path.read_bytes() != before[engine.name]) == (engine.name in affected)

    bundle = Bundle.open(dit.path)
    graph = bundle.manifest.plan.variants[0].graph
    found = {}
    for scale in (None, 0.5, 0.75):
        identity = (
            ()
            if scale is None
            else merge_loras(bundle, [LoraChoice(lora, scale)]).identity_of(bundle.path / graph.file)
        )
        found[scale], record = find_plan(
            bundle.path, graph, FLAVOURS[RTX], module.__version__, HERE, WeightHashes(), lora=identity
        )
        assert record.inputs.lora == identity and len(identity) == (scale is not None)
    assert len(set(found.values())) == 3
    unknown = merge_loras(bundle, [LoraChoice(lora, 2.0)]).identity_of(bundle.path / graph.file)
    with pytest.raises(UserError, match="built without this LoRA .*--lora.* and without --refit"):
        find_plan(bundle.path, graph, FLAVOURS[RTX], module.__version__, HERE, WeightHashes(), lora=unknown)

    # One that was built refittable would do.
    path = found[None].with_suffix(".json")
    record = json.loads(path.read_text())
    record["inputs"]["flags"]["refit"] = True
    inputs = PlanRecord.model_validate({**record, "key": ""}).inputs
    path.write_text(json.dumps({**record, "key": inputs.key}))
    fits, _ = find_plan(bundle.path, graph, FLAVOURS[RTX], module.__version__, HERE, WeightHashes(), lora=unknown)
    assert fits == found[None]


def test_segments_of_which_some_have_the_layers(dit_segments, lora, module):
    plain = build_engines(dit_segments.path, RTX)
    changed = build_engines(dit_segments.path, RTX, BuildOptions(lora=((lora, 0.5),)))
    counts = {name.split("/")[-1].removesuffix(".onnx"): n for name, n in changed.loras[0].graphs.items()}
    assert sum(counts.values()) == len(MODULES)  # each weight is in one segment
    affected = {name for name, status in statuses(changed).items() if status == "built"}
    assert affected == {name for name, count in counts.items() if count} and 0 < len(affected) < len(plain.engines)
    before = {engine.name: engine.path.read_bytes() for engine in plain.engines}
    for engine in changed.engines:
        assert (engine.path.read_bytes() != before[engine.name]) == (engine.name in affected)


def test_the_parsed_network_holds_the_merged_weights(dit, lora, module):
    bundle = Bundle.open(dit.path)
    file = bundle.path / bundle.manifest.plan.variants[0].graph.file
    changed = merge_loras(bundle, [LoraChoice(lora, 1.0)]).of(file)
    logger = collecting_logger(module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    assert feed_model(parser, file, changed)
    constants = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.CONSTANT:
            layer.__class__ = module.IConstantLayer
            constants.append(np.array(layer.weights).reshape(-1))
    for name, array in changed.items():
        flat = array.reshape(-1)
        assert any(c.size == flat.size and np.array_equal(c, flat) for c in constants), name
    wrong = {name: array[:1] for name, array in changed.items()}
    parser = module.OnnxParser(builder.create_network(0), logger)
    with pytest.raises(UserError, match="does not take the changed weight"):
        feed_model(parser, file, wrong)


def test_what_cannot_be_is_refused_by_name(dit, lora, module):
    with pytest.raises(UserError, match="--strip with --lora"):
        build_engines(dit.path, RTX, BuildOptions(flags=BuildFlags(strip=True), lora=((lora, 1.0),)))
    try:
        find_device()
    except NoDeviceError:
        with pytest.raises(UserError, match="--refit: refittable engines are built with a GPU only"):
            build_engines(dit.path, RTX, BuildOptions(flags=BuildFlags(refit=True)))
