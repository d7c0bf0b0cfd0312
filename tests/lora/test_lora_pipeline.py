"""LoRA in an engine directory against the same LoRA merged into the torch model that the directory came from."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from lora_files import Engine, diffusers_keys, kohya_keys, make_updates, merge_into, old_keys, save_lora  # noqa: E402
from tiny_engines import schedule_for, write  # noqa: E402

from dipgo_deploy.bundle.directory import Bundle, reseal  # noqa: E402
from dipgo_deploy.bundle.weights import WeightsIndex  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.export.exporter import ExportOptions, plan_export  # noqa: E402
from dipgo_deploy.lora.file import LoraChoice  # noqa: E402
from dipgo_deploy.lora.merge import Coverage, merge_loras  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.sampler import make_scheduler  # noqa: E402
from dipgo_deploy.supernet.gated import Supernet  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402
from dipgo_deploy.supernet.loop import run_loop  # noqa: E402

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = [
    f"{ATTENTION}.attn1.to_q",  # square: its shape does not tell whether it is stored transposed
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
    "up_blocks.1.attentions.1.proj_in",  # 1x1 convolution
    "up_blocks.1.resnets.0.conv1",  # 3x3
    "down_blocks.0.downsamplers.0.conv",  # strided
    "mid_block.resnets.0.time_emb_proj",
    "time_embedding.linear_1",
]


def reference(engine, latents, conditions, guidance_scale, *changes):
    """The final latents of the torch supernet, the (updates, scale) of ``changes`` merged into its weights."""
    schedule = Bundle.open(engine.path).load_schedule()
    model, family, config = load_denoiser(engine.model)
    for updates, scale in changes:
        merge_into(model, updates, scale)
    specs = family.blocks(config, schedule.model.granularity)
    supernet = Supernet(model, specs, [schedule.cache_kinds[spec.name] for spec in specs])
    with torch.no_grad():
        return run_loop(
            supernet,
            make_scheduler(schedule.sampler.class_name, schedule.sampler.config),
            schedule.gates,
            torch.from_numpy(latents),
            conditions,
            num_inference_steps=schedule.sampler.num_inference_steps,
            guidance_scale=guidance_scale,
        ).numpy()


def inputs():
    random = np.random.default_rng(1)
    return random.normal(size=(1, 4, 8, 8)).astype(np.float32), random.normal(size=(1, 77, 16)).astype(np.float32)


def draw(pipeline):
    latents, text = inputs()
    return pipeline(prompt_embeds=text, latents=latents, output_type="latent").latents


def unet_reference(unet, *changes):
    latents, text = inputs()
    return reference(unet, latents, {"encoder_hidden_states": torch.from_numpy(text)}, None, *changes)


def relative(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


def unet_updates(unet, seed=0):
    return make_updates(load_denoiser(unet.model)[0], UNET, seed)


def whole(layers):
    return (Coverage("denoiser", layers, (), ()),)


def pipeline_of(engine, **options):
    return Pipeline.from_engine_dir(engine.path, "cpu", threads=1, **options)


def test_the_index_tells_how_each_parameter_is_stored(unet):
    parameters = dict(load_denoiser(unet.model)[0].named_parameters())
    index = WeightsIndex.load(unet.path / "graphs")
    data = (unet.path / "graphs/weights.bin").read_bytes()
    seen, transposed, square = set(), 0, 0
    for stored in index.tensors.values():
        if stored.parameter is None:
            continue
        values = np.frombuffer(data, np.float32, stored.length // 4, stored.offset).reshape(stored.shape)
        want = parameters[stored.parameter].detach().numpy()
        assert stored.parameter_shape == want.shape
        np.testing.assert_array_equal(values.T if stored.transposed else values, want)
        seen.add(stored.parameter)
        transposed += stored.transposed
        square += stored.transposed and stored.shape[0] == stored.shape[1]
    assert {f"{name}.weight" for name in UNET} <= seen
    assert transposed and square


def test_segments_take_the_same_changes(unet, tmp_path):
    options = ExportOptions(timestep_tables=False, guidance=False, layout="segments")
    planned = plan_export(str(unet.model), Bundle.open(unet.path).load_schedule(), options)
    updates = unet_updates(unet)
    file = save_lora(tmp_path / "a.safetensors", updates, alpha=6.0)
    pipeline = pipeline_of(Engine(unet.model, write(planned, tmp_path / "engine")))
    before = draw(pipeline)
    assert pipeline.load_lora(file, 0.7).applied == len(UNET)
    assert relative(draw(pipeline), unet_reference(unet, (updates, 1.4))) < 1e-4
    pipeline.unload_lora()
    np.testing.assert_array_equal(draw(pipeline), before)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("load", ["eager", "lazy"])
def test_equals_the_merged_model_and_is_undone_bit_for_bit(unet, tmp_path, share, load):
    updates = unet_updates(unet)
    file = save_lora(tmp_path / "a.safetensors", updates, alpha=6.0)  # alpha / rank = 2
    pipeline = pipeline_of(unet, share_weights=share, load=load)
    before = draw(pipeline)
    assert relative(before, unet_reference(unet)) < 1e-4

    report = pipeline.load_lora(file, 0.7)
    assert (report.applied, report.components, report.left_out) == (len(UNET), whole(len(UNET)), ())
    changed = draw(pipeline)
    assert relative(changed, unet_reference(unet, (updates, 1.4))) < 1e-4
    assert relative(changed, before) > 1e-2

    pipeline.unload_lora()
    assert pipeline.loras == ()
    np.testing.assert_array_equal(draw(pipeline), before)


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_a_weight_that_is_stored_in_parts(dit, tmp_path, layout):
    linear = "transformer_blocks.0.norm1.linear"
    schedule = schedule_for(dit.model, granularity="layer")
    planned = plan_export(
        str(dit.model), schedule, ExportOptions(timestep_tables=False, layout=layout, components=False)
    )
    engine = Engine(dit.model, write(planned, tmp_path / "engine"))
    parts = [w for w in WeightsIndex.load(engine.path / "graphs").tensors.values() if w.parameter == f"{linear}.weight"]
    assert len(parts) == 4
    updates = make_updates(load_denoiser(dit.model)[0], [linear])
    file = save_lora(tmp_path / "a.safetensors", updates, alpha=3.0)
    pipeline = pipeline_of(engine)
    latents, _ = inputs()

    def drawn():
        return pipeline(class_labels=[1], latents=latents, guidance_scale=2.0, output_type="latent").latents

    before = drawn()
    assert pipeline.load_lora(file, 0.7).applied == 1
    labels = torch.tensor([10, 1])
    want = reference(engine, latents, {"class_labels": labels}, 2.0, (updates, 0.7))
    assert relative(drawn(), want) < 1e-4
    assert relative(before, want) > 1e-3
    pipeline.unload_lora()
    np.testing.assert_array_equal(drawn(), before)


def test_variants_without_a_layer_are_reported(unet, tmp_path):
    block = [name for name in UNET if name.startswith(ATTENTION)]
    updates = make_updates(load_denoiser(unet.model)[0], block)
    report = pipeline_of(unet, load="call").load_lora(save_lora(tmp_path / "a.safetensors", updates))
    counts = list(report.graphs.values())
    assert len(counts) == len(Bundle.open(unet.path).manifest.plan.variants)
    assert set(counts) == {0, len(block)}


def test_the_engines_own_test_is_of_the_model_without(dit, tmp_path):
    updates = make_updates(load_denoiser(dit.model)[0], ["transformer_blocks.0.attn1.to_q"])
    pipeline = Pipeline.from_engine_dir(dit.path, "cpu", threads=1, load="lazy")
    pipeline.load_lora(save_lora(tmp_path / "a.safetensors", updates))
    with pytest.raises(UserError, match="self_test: a LoRA is loaded"):
        pipeline.self_test()


def test_scale_0_changes_nothing(unet, tmp_path):
    pipeline = pipeline_of(unet)
    before = draw(pipeline)
    assert pipeline.load_lora(save_lora(tmp_path / "a.safetensors", unet_updates(unet)), 0).applied == len(UNET)
    np.testing.assert_array_equal(draw(pipeline), before)


def test_two_add_up(unet, tmp_path):
    first, second = unet_updates(unet, 1), unet_updates(unet, 2)
    files = [
        (save_lora(tmp_path / "1.safetensors", first), 0.5),
        (save_lora(tmp_path / "2.safetensors", second), -1.0),
    ]
    want = unet_reference(unet, (first, 0.5), (second, -1.0))
    pipeline = pipeline_of(unet)
    for file, scale in files:
        pipeline.load_lora(file, scale)
    got = draw(pipeline)
    assert relative(got, want) < 1e-4
    np.testing.assert_array_equal(draw(pipeline_of(unet, lora=files)), got)


@pytest.mark.parametrize(
    "keys", [old_keys("unet."), kohya_keys("lora_unet_"), diffusers_keys(""), diffusers_keys("base_model.model.")]
)
def test_every_spelling_gives_the_same_weights(unet, tmp_path, keys):
    updates = unet_updates(unet)
    bundle = Bundle.open(unet.path)
    first = save_lora(tmp_path / "a.safetensors", updates, alpha=1.0)
    second = save_lora(tmp_path / "b.safetensors", updates, keys, alpha=1.0)
    graph = bundle.path / bundle.manifest.plan.variants[0].graph.file
    mine, theirs = (merge_loras(bundle, [LoraChoice(file)]).of(graph) for file in (first, second))
    assert mine.keys() == theirs.keys() and len(mine) >= len(UNET)
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_bfloat16_files_are_their_values(unet, tmp_path):
    updates = unet_updates(unet)
    rounded = {name: tuple(t.bfloat16().float() for t in pair) for name, pair in updates.items()}
    pipeline = pipeline_of(unet, load="call")
    pipeline.load_lora(save_lora(tmp_path / "a.safetensors", updates, dtype=torch.bfloat16))
    assert relative(draw(pipeline), unet_reference(unet, (rounded, 1.0))) < 1e-4


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("load", ["eager", "lazy"])
def test_segments_equal_the_merged_model_too(unet_segments, tmp_path, share, load):
    updates = unet_updates(unet_segments)
    file = save_lora(tmp_path / "a.safetensors", updates, alpha=6.0)
    pipeline = pipeline_of(unet_segments, share_weights=share, load=load)
    before = draw(pipeline)
    assert relative(before, unet_reference(unet_segments)) < 1e-4
    report = pipeline.load_lora(file, 0.7)
    assert (report.applied, report.components, report.left_out) == (len(UNET), whole(len(UNET)), ())
    # Each weight is in one segment; several have none of them.
    assert sum(report.graphs.values()) == len(UNET) and 0 in report.graphs.values()
    changed = draw(pipeline)
    assert relative(changed, unet_reference(unet_segments, (updates, 1.4))) < 1e-4
    assert relative(changed, before) > 1e-2
    pipeline.unload_lora()
    np.testing.assert_array_equal(draw(pipeline), before)


@pytest.mark.parametrize("layout", ["dit", "dit_segments"])
def test_a_transformer_with_guidance(layout, request, tmp_path):
    dit = request.getfixturevalue(layout)
    modules = [f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn1.to_v", "ff.net.2", "norm1.linear")]
    updates = make_updates(load_denoiser(dit.model)[0], modules)
    file = save_lora(tmp_path / "a.safetensors", updates, diffusers_keys("transformer."))
    latents = inputs()[0]
    pipeline = Pipeline.from_engine_dir(dit.path, "cpu", threads=1, lora=[(file, 1.0)])
    got = pipeline(class_labels=1, latents=latents, guidance_scale=3.0, output_type="latent").latents
    labels = torch.tensor([10, 1])
    assert relative(got, reference(dit, latents, {"class_labels": labels}, 3.0, (updates, 1.0))) < 1e-4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda u: {"elsewhere.to_q": next(iter(u.values()))},
            "first: elsewhere.to_q.; nothing of it can be",
        ),
        (lambda u: {f"{ATTENTION}.attn1.to_q": u["time_embedding.linear_1"]}, "it changes a weight of shape"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(unet, tmp_path, spoil, message):
    updates = unet_updates(unet)
    pipeline = pipeline_of(unet)
    pipeline.load_lora(save_lora(tmp_path / "good.safetensors", updates))
    before = draw(pipeline)
    with pytest.raises(UserError, match=message):
        pipeline.load_lora(save_lora(tmp_path / "bad.safetensors", spoil(updates)))
    assert len(pipeline.loras) == 1
    np.testing.assert_array_equal(draw(pipeline), before)


def test_what_does_not_fit_is_refused_and_with_partial_left_out_and_named(unet, tmp_path):
    updates = unet_updates(unet)
    more = {**updates, "elsewhere.to_q": next(iter(updates.values()))}
    extra = {"text_encoder.x.lora_A.weight": torch.ones(1, 2), "text_encoder.x.lora_B.weight": torch.ones(2, 1)}
    file = save_lora(tmp_path / "a.safetensors", more, extra=extra | {"unet.y.hada_w1_a": torch.ones(2, 2)})
    pipeline = pipeline_of(unet, load="call")
    with pytest.raises(UserError) as caught:
        pipeline.load_lora(file)
    message = str(caught.value)
    assert "1 of its 10 layers of the denoiser are none of this model's (first: elsewhere.to_q)" in message
    assert "there is no text_encoder here for its 1 layers" in message
    assert "1 keys change the model in a way that is not supported (LoHa: unet.y.hada_w1_a)" in message
    assert "--lora-partial" in message and "made for another model" not in message
    assert pipeline.loras == ()
    report = pipeline.load_lora(file, partial=True)
    assert report.applied == len(UNET) and report.left_out == ("unet.y.hada_w1_a",)
    denoiser = Coverage("denoiser", len(UNET), ("elsewhere.to_q",), ())
    assert set(report.components) == {denoiser, Coverage("text_encoder", 0, ("x",), ())}
    assert relative(draw(pipeline), unet_reference(unet, (updates, 1.0))) < 1e-4


def test_differences_of_weights_and_biases_are_added(unet, tmp_path):
    module, random = "mid_block.resnets.0.conv1", torch.Generator().manual_seed(5)
    model, family, config = load_denoiser(unet.model)
    layer = model.get_submodule(module)
    diff, diff_b = (torch.randn(p.shape, generator=random) * 0.1 for p in (layer.weight, layer.bias))
    flat = f"lora_unet_{module.replace('.', '_')}"
    file = save_lora(tmp_path / "a.safetensors", {}, extra={f"{flat}.diff": diff})
    graph = unet.path / Bundle.open(unet.path).manifest.plan.variants[0].graph.file
    (array,) = merge_loras(Bundle.open(unet.path), [LoraChoice(file, 0.5)]).of(graph).values()
    np.testing.assert_allclose(array, (layer.weight + 0.5 * diff).detach().numpy(), rtol=1e-6, atol=1e-7)
    both = save_lora(tmp_path / "b.safetensors", {}, extra={f"{flat}.diff": diff, f"{flat}.diff_b": diff_b})
    # 128 bytes of bias stay within the graphs, where they cannot be changed.
    with pytest.raises(UserError, match="1 of its 1 layers of the denoiser are none of this model's"):
        pipeline_of(unet, load="call").load_lora(both)


def test_values_that_are_not_finite_are_refused(unet, dit, tmp_path):
    updates = unet_updates(unet)
    bad = {**updates, UNET[0]: tuple(matrix * float("inf") for matrix in updates[UNET[0]])}
    pipeline = pipeline_of(unet, load="call")
    with pytest.raises(UserError, match=f"{UNET[0]}.*holds NaN or infinity"):
        pipeline.load_lora(save_lora(tmp_path / "a.safetensors", bad))
    good = save_lora(tmp_path / "b.safetensors", updates, alpha=1e30)
    with pytest.raises(UserError, match="scale times alpha / rank is no finite number"):
        pipeline.load_lora(good, 1e30)
    for scale in (float("nan"), float("inf"), 1e300):
        with pytest.raises(UserError, match="finite"):
            pipeline.load_lora(good, scale)
    half = Engine(
        dit.model,
        write(
            plan_export(
                str(dit.model),
                schedule_for(dit.model),
                ExportOptions(timestep_tables=False, layout="variants", dtype="fp16"),
            ),
            tmp_path / "engine",
        ),
    )
    module = "transformer_blocks.0.attn1.to_q"
    file = save_lora(tmp_path / "c.safetensors", make_updates(load_denoiser(dit.model)[0], [module]))
    pipeline = pipeline_of(half)
    with pytest.raises(UserError, match="too large for float16 with the LoRA; take a smaller scale"):
        pipeline.load_lora(file, 1e9)
        pipeline.load()
    assert pipeline.loras == ()


def test_weights_stored_as_one_are_not_changed_alone(unet, tmp_path):
    folder = shutil.copytree(unet.path, tmp_path / "engine")
    path = folder / "graphs/weights.json"
    index = json.loads(path.read_text())
    index["tensors"]["time_embedding.linear_1.weight"]["equal"] = ["other.weight"]
    path.write_text(json.dumps(index))
    reseal(folder)
    file = save_lora(tmp_path / "a.safetensors", unet_updates(unet))
    with pytest.raises(UserError, match="stored as one with other.weight"):
        Pipeline.from_engine_dir(folder, "cpu", lora=[(file, 1.0)], load="call")
    path.unlink()
    with pytest.raises(UserError, match=r"weights\.json: missing"):
        merge_loras(Bundle(folder, Bundle.open(unet.path).manifest), [LoraChoice(file)])


def test_lazy_loads_what_is_launched_and_memory_is_told(unet):
    pipeline = pipeline_of(unet, load="lazy")
    memory = pipeline.memory()
    assert memory["graphs_loaded"] == 0 < memory["graphs"]
    assert memory["host"]["rss"] >= memory["host"]["pss"] > 2**20
    assert memory["device"] == {}
    eager = pipeline_of(unet)
    assert eager.memory()["graphs_loaded"] == memory["graphs"]
    np.testing.assert_array_equal(draw(pipeline), draw(eager))
    assert pipeline.memory()["graphs_loaded"] == memory["graphs"]
    latents, text = inputs()
    pipeline = pipeline_of(unet, load="lazy")
    loop = pipeline._loaded.loop(pipeline.bundle)
    loaded = []
    conditions = {"encoder_hidden_states": text}
    loop.run(latents, conditions, on_launch=lambda _: loaded.append(pipeline.memory()["graphs_loaded"]))
    assert loaded[0] == 1
    with pytest.raises(UserError, match="load 'later'"):
        pipeline_of(unet, load="later")


def test_sessions_share_one_copy_of_changed_weights_for_as_long_as_they_are_used(unet, tmp_path):
    pipeline = pipeline_of(unet, share_weights=True)
    pipeline.load_lora(save_lora(tmp_path / "a.safetensors", unet_updates(unet)))
    changed = pipeline.backend.shared_weights._changed
    (values,) = changed.values()
    assert len(values) == len(
        merge_loras(pipeline.bundle, [LoraChoice(tmp_path / "a.safetensors")])._changes[unet.path / "graphs"]
    )
    pipeline.unload_lora()
    gc.collect()
    assert not len(changed)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_merged_in_float32_and_rounded_once_to_the_export_s_dtype(dit, tmp_path, dtype):
    planned = plan_export(
        str(dit.model), schedule_for(dit.model), ExportOptions(timestep_tables=False, layout="variants", dtype=dtype)
    )
    engine = Engine(dit.model, write(planned, tmp_path / "engine"))
    module = "transformer_blocks.0.attn1.to_q"
    model = load_denoiser(dit.model)[0]
    updates = make_updates(model, [module])
    file = save_lora(tmp_path / "a.safetensors", updates)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    weight = model.get_submodule(module).weight
    with torch.no_grad():
        weight.copy_(weight.to(wanted).float())
    merge_into(model, updates, 1.0)
    want = weight.detach().to(wanted).view(torch.int16).numpy()

    bundle = Bundle.open(engine.path)
    merged = merge_loras(bundle, [LoraChoice(file)]).of(bundle.path / bundle.manifest.plan.variants[0].graph.file)
    (array,) = merged.values()
    stored = WeightsIndex.load(engine.path / "graphs").tensors[next(iter(merged))]
    bits = array.view(np.int16)
    difference = np.abs((bits.T if stored.transposed else bits).astype(int) - want)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.05  # the product's last bit is not defined
    if dtype == "fp16":  # ONNX Runtime has no bf16 for the CPU
        latents = inputs()[0]
        pipeline = pipeline_of(engine, lora=[(file, 1.0)])
        got = pipeline(class_labels=1, latents=latents, guidance_scale=3.0, output_type="latent").latents
        labels = torch.tensor([10, 1])
        assert relative(got, reference(dit, latents, {"class_labels": labels}, 3.0, (updates, 1.0))) < 2e-2
