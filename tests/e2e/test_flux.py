"""FLUX.1 in small: a packed latent, double and single blocks, against the supernet and diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import FluxPipeline
from family_checks import (
    assert_pictures_equal_stock,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    schedule_for,
    with_gates,
)
from flow_pipelines import T5_WIDTH, flux_transformer, save_flux
from sd_pipelines import PROMPT, assert_equals_supernet, psnr, relative, stock

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.flux import MODELS

FAMILY = family_for("FluxTransformer2DModel")
FULL_SIZE = {entry["name"]: entry["config"] for entry in MODELS}
STEPS, SCALE = 4, 2.0
HEIGHT, WIDTH = 64, 96  # pixels: 4 x 6 tokens
SIZE = {"height": HEIGHT, "width": WIDTH}
SMALL = {"height": HEIGHT // 4, "width": WIDTH // 4}  # of the small pipelines, whose VAE has scale 2
TOKENS = 512


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux") / "small", small=True)


@pytest.fixture(scope="module")
def own(dev: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(dev)


@pytest.fixture(scope="module")
def traced(dev: Path) -> PlannedExport:
    return plan_for(dev, schedule_for(dev, steps=STEPS), **SIZE)


@pytest.fixture(scope="module")
def engine(traced: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(traced, tmp_path_factory.mktemp("flux-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    return np.asarray(Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)(seed=3, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
    """The stock pipeline's pictures, or its latents unpacked."""
    scale = pipeline.vae_scale_factor
    size = SIZE if scale == 8 else SMALL
    found = stock(pipeline, sampler=sampler, steps=STEPS, **size, **call)
    if call["output_type"] != "latent":
        return found
    return np.asarray(pipeline._unpack_latents(torch.from_numpy(found), size["height"], size["width"], scale))


def test_the_manifest_says_where_the_conditions_come_from(engine: Path) -> None:
    manifest = Bundle.open(engine).manifest
    conditions = {spec.name: (spec.source, spec.shape, spec.dtype) for spec in manifest.conditions}
    assert conditions == {
        "encoder_hidden_states": ("text", (1, TOKENS, T5_WIDTH), "float32"),
        "pooled_projections": ("text", (1, 8), "float32"),
        "guidance": ("guidance", (1,), "float32"),
    }
    encoder = manifest.components.text_encoder
    assert encoder is not None
    assert [(entry.file, entry.length) for entry in encoder.tokenizers] == [
        ("tokenizer/tokenizer.json", 16),
        ("tokenizer_2/tokenizer.json", 512),
    ]
    assert not manifest.guidance and manifest.guidance_scale == 3.5  # the pipeline's own default
    latent = manifest.latent
    assert (latent.channels, latent.height, latent.width) == (4, 8, 12)


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("output", ["latent", "np"])
def test_equals_diffusers_own_pipeline(engine: Path, own: Any, scale: float | None, output: str) -> None:
    call = {"prompt": PROMPT, "output_type": output}
    want = theirs(own, **call, **({} if scale is None else {"guidance_scale": scale}))
    assert relative(ours(engine, guidance_scale=scale, **call), want) <= 1e-4


def test_guidance_makes_a_difference(engine: Path) -> None:
    one, two = (ours(engine, prompt=PROMPT, output_type="latent", guidance_scale=scale) for scale in (3.5, SCALE))
    assert relative(one, two) > 1e-3


@pytest.mark.parametrize("sampler", ["flow-unipc", "flow-dpm++2m"])
def test_equals_it_with_other_samplers(
    traced: PlannedExport, dev: Path, own: Any, sampler: str, tmp_path: Path
) -> None:
    with_gates(traced, schedule_for(dev, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    with torch.no_grad():
        states, pooled, _ = own.encode_prompt(PROMPT)
    embeds = {"encoder_hidden_states": states.numpy(), "pooled_projections": pooled.numpy()}
    got = ours(tmp_path / "x", prompt_embeds=embeds, output_type="latent")
    assert relative(got, theirs(own, sampler=sampler, prompt=PROMPT, output_type="latent")) <= 1e-4


def test_schnell_has_no_guidance(tmp_path: Path) -> None:
    """FLUX.1-schnell's static shift and sigmas, which are those of every size: here the height stays open, and the
    rotary table in the graph is put together for it. The bundle takes embeddings."""
    folder = save_flux(tmp_path / "schnell", guidance=False, small=True)
    height = Range(min=8, opt=SMALL["height"], max=32, multiple=4)
    planned = plan_for(folder, schedule_for(folder, steps=STEPS), components=False, height=height, width=SMALL["width"])
    bundle = publish(planned, tmp_path / "x")
    assert [spec.name for spec in bundle.manifest.conditions] == ["encoder_hidden_states", "pooled_projections"]
    assert bundle.manifest.guidance_scale is None
    pipeline = FluxPipeline.from_pretrained(folder)
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(PROMPT)
    embeds = {"encoder_hidden_states": states.numpy(), "pooled_projections": pooled.numpy()}
    call = {"output_type": "latent", "height": 28}
    got = ours(bundle.path, prompt_embeds=embeds, **call)
    want = stock(pipeline, steps=STEPS, prompt=PROMPT, guidance_scale=0.0, width=SMALL["width"], **call)
    want = pipeline._unpack_latents(torch.from_numpy(want), 28, SMALL["width"], 2).numpy()
    assert got.shape == (1, 4, 14, 12)
    assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("changes", [{}, {"use_flow_sigmas": True}, {"use_dynamic_shifting": False, "max_shift": 0.9}])
def test_timesteps_are_the_pipelines(own: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``sigmas`` and ``mu`` as the pipeline itself gives them to its scheduler, bit for bit.

    A ``mu`` that the scheduler makes no use of is left out.
    """
    given: dict[str, Any] = {}

    class Scheduler:
        def __init__(self, config: Any) -> None:
            self.config = config

        def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **rest: Any):
            given.update(rest)
            if sigmas is not None:
                given["sigmas"] = list(sigmas)
            raise StopIteration

    config = type(own.scheduler.config)({**own.scheduler.config, **changes})
    monkeypatch.setattr(own, "scheduler", Scheduler(config))
    with pytest.raises(StopIteration):
        own(PROMPT, num_inference_steps=7, **SIZE)
    if not config["use_dynamic_shifting"]:
        assert given.pop("mu") > 0
    assert dict(FAMILY.set_timesteps({}, config, 8, 12, 7)) == given
    assert ("sigmas" in given) != ("use_flow_sigmas" in changes)


def test_random_schedule_of_blocks(traced: PlannedExport, dev: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(traced, schedule_for(dev, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


@pytest.mark.parametrize(
    ("granularity", "cache"), [pytest.param("block", "output", marks=pytest.mark.slow), ("layer", "output")]
)
def test_random_schedules_of_other_units(dev: Path, granularity: Any, cache: Any, tmp_path: Path) -> None:
    schedule = schedule_for(dev, steps=STEPS, ratio=0.5, granularity=granularity, cache=cache)
    publish(plan_for(dev, schedule, components=False, **SIZE), tmp_path / "x")
    assert_equals_supernet(tmp_path / "x")


def test_the_graph_has_no_float64(engine: Path) -> None:
    """The model computes its rotary table in float64, which TensorRT does not."""
    graphs = sorted((engine / "graphs").glob("*.onnx"))
    assert graphs
    for path in graphs:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
        kinds |= {tensor.data_type for tensor in graph.initializer}
        kinds |= {node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
        assert onnx.TensorProto.FLOAT in kinds
        assert onnx.TensorProto.DOUBLE not in kinds


def test_therotary_table_is_the_models_own() -> None:
    """Against the model's float64 computation, at the published extents and 1024 x 1536 pixels."""
    transformer = flux_transformer()
    transformer.pos_embed.axes_dim = (16, 56, 56)
    rows, columns = 64, 96
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    want = transformer.pos_embed(torch.cat([torch.zeros(5, 3), ids]))
    from dipgo_deploy.models.flux import rotary_table

    with rotary_table(transformer, 5, rows, columns):
        got = transformer.pos_embed(torch.zeros(1))
    for found, expected in zip(got, want, strict=True):
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert "forward" not in vars(transformer.pos_embed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_round_timestep_and_guidance(dtype: torch.dtype) -> None:
    """Of 1000 times either, rounded, the sine would be that of another number; diffusers' own forward rounds them."""
    timestep, scale = torch.tensor([857.3]), torch.tensor([3.3])
    sinusoids: dict[str, list[torch.Tensor]] = {"float32": [], "half": []}
    for name, model in {"float32": flux_transformer(), "half": flux_transformer().to(dtype)}.items():
        model.time_text_embed.time_proj.register_forward_hook(lambda _, _in, out, n=name: sinusoids[n].append(out))
        wanted = next(model.parameters()).dtype
        conditions = {
            "encoder_hidden_states": torch.randn(1, 5, T5_WIDTH).to(wanted),
            "pooled_projections": torch.randn(1, model.config.pooled_projection_dim).to(wanted),
            "guidance": scale,
        }
        with torch.no_grad():
            FAMILY.call(model, torch.randn(1, 4, 4, 6).to(wanted), timestep, conditions)
        assert not model.time_text_embed._forward_pre_hooks
    assert len(sinusoids["half"]) == 2
    for found, expected in zip(sinusoids["half"], sinusoids["float32"], strict=True):
        assert torch.equal(found, expected)


def test_tensorrt_rtx_builds_fp32(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 3


def test_fp16_is_close(small: Path, tmp_path: Path) -> None:
    # Thirteen bits less than float32 in each layer of the denoiser and the encoders, four steps fed back. T5's output
    # projections stay in float32, as transformers wants it.
    bundle = publish(plan_for(small, schedule_for(small, steps=STEPS), dtype="fp16", **SMALL), tmp_path / "x")
    call = {"prompt": PROMPT, "output_type": "np"}
    assert psnr(ours(bundle.path, **call), theirs(FluxPipeline.from_pretrained(small), **call)) > 40
    # A timestep that was rounded to float16 gives 9e-3 at the second evaluation; the first one's is a whole number.
    for evaluation in loop_report(bundle.path, variants=False).loop:
        assert evaluation.worst.relative < 3e-3
    assert build_with_tensorrt_rtx(bundle.path) == 3


def test_tensorrt_rtx_builds_bf16(small: Path, tmp_path: Path) -> None:
    schedule = schedule_for(small, steps=2, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(small, schedule, dtype="bf16", **SMALL), tmp_path / "x")
    assert len(bundle.manifest.plan.variants) == 2
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


def test_it_can_be_searched(small: Path, tmp_path: Path) -> None:
    """The search's loops go through the family's call and timesteps: a full run is the stock pipeline's."""
    from dipgo_deploy.search.evaluate import full_latents
    from dipgo_deploy.search.loop_loss import LoopLoss
    from dipgo_deploy.search.problem import Pair, ProblemOptions, load_problem, with_sampler

    prompts = str(tmp_path / "prompts.txt")
    Path(prompts).write_text(PROMPT + "\n", encoding="utf-8")
    options = ProblemOptions(str(small), steps=STEPS, prompts=prompts, guidance_scale=SCALE, **SMALL)
    problem = load_problem(options)
    assert problem.guidance_scale is None  # no second half of the batch
    pipeline = problem.source.pipeline
    call = {"prompt": PROMPT, "output_type": "latent", "guidance_scale": SCALE}
    pair = [Pair(0, 3)]
    assert relative(full_latents(problem, pair).numpy(), theirs(pipeline, **call)) <= 1e-4
    other = with_sampler(problem, "flow-unipc", STEPS)
    want = theirs(pipeline, sampler="flow-unipc", **call)
    assert relative(full_latents(other, pair).numpy(), want) <= 1e-4
    gates = torch.ones(problem.steps, len(problem.target.blocks))
    loss = LoopLoss(problem, "latent-l2")
    gradient = loss.gradient(((True,) * gates.shape[1],) * 3 + ((False,) * gates.shape[1],), pair)
    assert np.isfinite(gradient).all() and gradient[3].any()
    assert float(loss(gates, pair)) == pytest.approx(0, abs=1e-8)
    with pytest.raises(UserError, match="--guidance: .* takes the scale as an input"):
        load_problem(replace(options, guidance=True))
    with pytest.raises(UserError, match="give --prompts"):
        load_problem(replace(options, prompts=None))


def test_units_of_the_published_sizes() -> None:
    for config in FULL_SIZE.values():
        blocks, layers = (FAMILY.blocks(config, granularity) for granularity in ("block", "layer"))
        assert (len(blocks), len(layers)) == (57, 171)
        assert [spec.name for spec in blocks[18:20]] == ["transformer_blocks.18", "single_transformer_blocks.0"]
        assert {spec.residual_inputs for spec in blocks} == {("encoder_hidden_states", "hidden_states")}
        assert [spec.name for spec in layers[:3]] == [f"transformer_blocks.0.{part}" for part in PARTS]
        assert layers[56].name == "transformer_blocks.18.ff_context"
        assert [spec.name for spec in layers[57:60]] == [
            f"single_transformer_blocks.0.{part}" for part in ("proj_mlp", "attn", "proj_out")
        ]
    dev, schnell = (FAMILY.inputs(FULL_SIZE[name], 1, 128, 128, TOKENS) for name in FULL_SIZE)
    assert dev[0].shape == (1, 16, 128, 128)
    assert [spec.name for spec in dev if spec not in schnell] == ["guidance"]


PARTS = ("attn", "ff", "ff_context")


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_blocks_are_disjoint_modules_in_the_order_in_which_they_run(granularity: Any) -> None:
    transformer = flux_transformer()
    specs = FAMILY.blocks(transformer.config, granularity)
    ran: list[str] = []
    for spec in specs:
        transformer.get_submodule(spec.name).register_forward_hook(lambda *_, name=spec.name: ran.append(name))
    conditions = {
        "encoder_hidden_states": torch.zeros(1, 3, T5_WIDTH),
        "pooled_projections": torch.zeros(1, 8),
        "guidance": torch.ones(1),
    }
    with torch.no_grad():
        FAMILY.call(transformer, torch.zeros(1, 4, 8, 12), torch.tensor([1.0]), conditions)
    assert ran == [spec.name for spec in specs]
    modules = [transformer.get_submodule(path) for spec in specs for path in spec.modules]
    owned = [id(parameter) for module in modules for parameter in module.parameters()]
    assert len(set(owned)) == len(owned)
    free = {name.split(".")[0] for name, parameter in transformer.named_parameters() if id(parameter) not in owned}
    modulation = {"transformer_blocks", "single_transformer_blocks"} if granularity == "layer" else set()
    assert free == {"time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"} | modulation


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: FAMILY.blocks({}, "node"), "granularity 'node'"),
        (lambda: FAMILY.inputs({}, 1, 9, 8, 4), "latent of 9x8.*multiples of 16 pixels"),
        (lambda: FAMILY.inputs({}, 1, 8, 8), "give text_length"),
        # FLUX.1-Fill and FLUX.1-Canny get a picture beside the latent.
        (lambda: FAMILY.latent_channels({"in_channels": 384, "out_channels": 64}), "in_channels 384, out_channels 64"),
    ],
)
def test_refusals_are_one_line(act: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 72, "width": 64}, "multiples of 16 pixels"),
        ({"height": 60, "width": 64}, "--height 60: give a multiple of 8 pixels"),
        ({"guidance": True, **SIZE}, "--guidance: .* takes the scale as an input; leave it out"),
    ],
)
def test_options_that_do_not_fit_are_refused(dev: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_export(str(dev), schedule_for(dev), ExportOptions(**options))


def test_a_sampler_that_takes_no_sigmas_is_refused(dev: Path) -> None:
    with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler: cannot do 50 inference steps.*sigmas"):
        schedule_for(dev, steps=50, sampler="flow-heun")
