"""Stable Diffusion 3 and 3.5 in small: two streams, three text encoders, against the supernet and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from family_checks import (
    assert_pictures_equal_stock,
    build_with_tensorrt_rtx,
    check_family,
    plan_for,
    schedule_for,
    with_gates,
)
from flow_pipelines import T5_WIDTH, save_sd3, sd3_transformer, sd35_transformer
from safetensors.numpy import save_file
from sd_pipelines import NEGATIVE, PROMPT, assert_equals_supernet, psnr, relative, stock

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.cli.run import command as run_command
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish
from dipgo_deploy.models import family_for
from dipgo_deploy.reference.source import load_source
from dipgo_deploy.runtime.pipeline import Pipeline
from tools.full_size.sd3 import MODELS

FAMILY = family_for("SD3Transformer2DModel")
FULL_SIZE = {entry["name"]: entry["config"] for entry in MODELS}
STEPS, SCALE = 4, 5.0
TOKENS = 16 + 256  # of the tiny CLIP's tokenizer, and of T5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "small", small=True)


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd35")
    sd35_transformer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def traced(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS))


@pytest.fixture(scope="module")
def engine(traced: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full schedule of the model's own sampler, with components."""
    return publish(traced, tmp_path_factory.mktemp("sd3-engine") / "x").path


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=3, guidance_scale=SCALE, **call).images)


def test_the_manifest_says_where_the_conditions_come_from(engine: Path) -> None:
    manifest = Bundle.open(engine).manifest
    conditions = {spec.name: (spec.source, spec.shape) for spec in manifest.conditions}
    assert conditions == {
        "encoder_hidden_states": ("text", (2, TOKENS, T5_WIDTH)),
        "pooled_projections": ("text", (2, 20)),
    }
    encoder = manifest.components.text_encoder
    assert encoder is not None and not encoder.zeros_without_negative
    assert [(entry.file, entry.length) for entry in encoder.tokenizers] == [
        ("tokenizer/tokenizer.json", 16),
        ("tokenizer_2/tokenizer.json", 16),
        ("tokenizer_3/tokenizer.json", 256),
    ]
    assert manifest.guidance and manifest.guidance_scale == 7.0  # the pipeline's own default


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("output", ["latent", "np"])
def test_equals_diffusers_own_pipeline(engine: Path, own: Any, negative: str | None, output: str) -> None:
    call = {"prompt": PROMPT, "negative_prompt": negative, "output_type": output}
    want = stock(own, steps=STEPS, guidance_scale=SCALE, **call)
    assert relative(ours(engine, **call), want) <= 1e-4


@pytest.mark.parametrize("sampler", ["flow-heun", "flow-unipc"])
def test_equals_it_with_other_samplers(
    traced: PlannedExport, model: Path, own: Any, sampler: str, tmp_path: Path
) -> None:
    with_gates(traced, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    with torch.no_grad():
        states, negative, pooled, negative_pooled = own.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    got = ours(
        tmp_path / "x",
        prompt_embeds={"encoder_hidden_states": states.numpy(), "pooled_projections": pooled.numpy()},
        negative_prompt_embeds={
            "encoder_hidden_states": negative.numpy(),
            "pooled_projections": negative_pooled.numpy(),
        },
        output_type="latent",
    )
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent", "guidance_scale": SCALE}
    assert relative(got, stock(own, sampler=sampler, steps=STEPS, **call)) <= 1e-4


def test_the_command_takes_embeddings_by_name(engine: Path, own: Any, tmp_path: Path) -> None:
    """In each form, what the prompts themselves give."""
    with torch.no_grad():
        states, negative, pooled, negative_pooled = own.encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    names = ("encoder_hidden_states", "pooled_projections")
    halves = {"prompt": (states, pooled), "negative-prompt": (negative, negative_pooled)}
    forms: dict[str, list[str]] = {"npy": [], "npz": [], "safetensors": []}
    for half, tensors in halves.items():
        arrays = {name: tensor.numpy().copy() for name, tensor in zip(names, tensors, strict=True)}
        np.savez(tmp_path / f"{half}.npz", **arrays)
        save_file(arrays, tmp_path / f"{half}.safetensors")
        for kind in ("npz", "safetensors"):
            forms[kind] += [f"--{half}-embeds", str(tmp_path / f"{half}.{kind}")]
        for name, array in arrays.items():
            np.save(tmp_path / f"{half}.{name}.npy", array)
            forms["npy"] += [f"--{half}-embeds", f"{name}={tmp_path / f'{half}.{name}.npy'}"]
    call = ["--engine-dir", str(engine), "--backend", "cpu", "--threads", "1", "--seed", "3", "--load", "lazy"]
    call += ["--guidance-scale", str(SCALE), "--output-type", "latent", "-o", str(tmp_path / "out.npy"), "--overwrite"]
    want = ours(engine, prompt=PROMPT, negative_prompt=NEGATIVE, output_type="latent")
    for form in forms.values():
        result = CliRunner().invoke(run_command, [*call, *form], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert relative(np.load(tmp_path / "out.npy"), want) <= 1e-5
    refused = CliRunner().invoke(run_command, [*call, *forms["npy"][:2]])
    assert isinstance(refused.exception, UserError)
    assert "needs encoder_hidden_states, pooled_projections" in str(refused.exception)


def test_dynamic_shifting_is_the_pipelines(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mu`` as the pipeline itself gives it to its scheduler."""
    given: dict[str, Any] = {}

    def set_timesteps(*args: Any, **options: Any) -> None:
        given.update(options)
        raise StopIteration

    config = {**own.scheduler.config, "use_dynamic_shifting": True}
    monkeypatch.setattr(own, "scheduler", type(own.scheduler).from_config(config))
    monkeypatch.setattr(own.scheduler, "set_timesteps", set_timesteps)
    with pytest.raises(StopIteration):
        own(PROMPT, height=64, width=96)
    found = FAMILY.set_timesteps({}, config, 8, 12, STEPS)
    assert found["mu"] == pytest.approx(given["mu"], rel=1e-12) and set(found) == {"mu"}
    assert FAMILY.set_timesteps({}, {"shift": 3.0}, 8, 12, STEPS) == {}


def test_random_schedule_of_blocks(traced: PlannedExport, model: Path, engine: Path, tmp_path: Path) -> None:
    with_gates(traced, schedule_for(model, steps=STEPS, ratio=0.5), tmp_path / "x", components=False)
    assert_equals_supernet(tmp_path / "x")
    assert_pictures_equal_stock(tmp_path / "x", engine)


@pytest.mark.parametrize(
    ("granularity", "cache"), [pytest.param("block", "output", marks=pytest.mark.slow), ("layer", "output")]
)
def test_random_schedules_of_sd35(sd35: Path, granularity: Any, cache: Any, tmp_path: Path) -> None:
    check_family(sd35, tmp_path / "x", steps=STEPS, sampler="flow-euler", granularity=granularity, cache=cache)


def test_one_trace_is_good_for_several_heights(small: Path, tmp_path: Path) -> None:
    height = Range(min=8, opt=16, max=48, multiple=4)
    planned = plan_for(small, schedule_for(small, steps=STEPS), components=False, height=height, width=16)
    publish(planned, tmp_path / "x")
    own = StableDiffusion3Pipeline.from_pretrained(small)
    with torch.no_grad():
        states, negative, pooled, negative_pooled = own.encode_prompt(PROMPT, None, None)
    call = {"output_type": "latent", "height": 28}
    got = ours(
        tmp_path / "x",
        prompt_embeds={"encoder_hidden_states": states.numpy(), "pooled_projections": pooled.numpy()},
        negative_prompt_embeds={
            "encoder_hidden_states": negative.numpy(),
            "pooled_projections": negative_pooled.numpy(),
        },
        **call,
    )
    assert got.shape == (1, 4, 14, 8)
    want = stock(own, steps=STEPS, prompt=PROMPT, guidance_scale=SCALE, width=16, **call)
    assert relative(got, want) <= 1e-4


def test_tensorrt_rtx_builds_fp32(engine: Path) -> None:
    assert build_with_tensorrt_rtx(engine) == 3


@pytest.mark.slow
def test_fp16_is_close(small: Path, tmp_path: Path) -> None:
    # Thirteen bits less than float32 in each layer of the denoiser and the encoders, four steps fed back. T5's output
    # projections stay in float32, as transformers wants it.
    bundle = publish(plan_for(small, schedule_for(small, steps=STEPS), dtype="fp16"), tmp_path / "x")
    own = StableDiffusion3Pipeline.from_pretrained(small)
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "np"}
    assert psnr(ours(bundle.path, **call), stock(own, steps=STEPS, guidance_scale=SCALE, **call)) > 40
    assert build_with_tensorrt_rtx(bundle.path) == 3


@pytest.mark.slow
def test_tensorrt_rtx_builds_bf16(small: Path, tmp_path: Path) -> None:
    schedule = schedule_for(small, steps=2, ratio=0.5, granularity="layer")
    bundle = publish(plan_for(small, schedule, dtype="bf16"), tmp_path / "x")
    assert len(bundle.manifest.plan.variants) == 2
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants) + 2


def test_without_t5_there_are_zeros_in_its_place(tmp_path: Path) -> None:
    source = load_source(str(save_sd3(tmp_path / "model", with_t5=False, small=True)))
    scheme = source.text
    assert scheme is not None
    assert scheme.encoders == ("text_encoder", "text_encoder_2")
    assert [entry.attribute for entry in scheme.tokenizers] == ["tokenizer", "tokenizer_2"]
    pipeline = source.pipeline
    ids = {
        name: tokenizer(PROMPT, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        for name, tokenizer in (("input_ids", pipeline.tokenizer), ("input_ids_2", pipeline.tokenizer_2))
    }
    with torch.no_grad():
        found = scheme.encode(pipeline, ids)
        states, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None)
    assert scheme.length == states.shape[1] == TOKENS
    torch.testing.assert_close(found["encoder_hidden_states"], states)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    assert not states[:, 16:].any()


def test_units_of_the_published_sizes() -> None:
    counts = {
        name: tuple(len(FAMILY.blocks(config, granularity)) for granularity in ("block", "layer"))
        for name, config in FULL_SIZE.items()
    }
    assert counts == {"sd3-medium-1024": (24, 71), "sd3.5-medium-1024": (24, 84), "sd3.5-large-1024": (38, 113)}
    first, *_, last = FAMILY.blocks(FULL_SIZE["sd3.5-large-1024"], "block")
    assert first.residual_inputs == ("encoder_hidden_states", "hidden_states")
    assert (last.name, last.residual_inputs) == ("transformer_blocks.37", ("hidden_states",))
    layers = [spec.name for spec in FAMILY.blocks(FULL_SIZE["sd3.5-medium-1024"], "layer")]
    assert layers[:4] == [f"transformer_blocks.0.{part}" for part in ("attn", "attn2", "ff", "ff_context")]
    assert layers[52:55] == [f"transformer_blocks.13.{part}" for part in ("attn", "ff", "ff_context")]
    assert layers[-2:] == ["transformer_blocks.23.attn", "transformer_blocks.23.ff"]


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_blocks_are_disjoint_modules_in_the_order_in_which_they_run(granularity: Any) -> None:
    transformer = sd35_transformer()
    specs = FAMILY.blocks(transformer.config, granularity)
    ran: list[str] = []
    for spec in specs:
        module = transformer.get_submodule(spec.name)
        module.register_forward_hook(lambda *_, name=spec.name: ran.append(name))
    with torch.no_grad():
        conditions = {
            "encoder_hidden_states": torch.zeros(1, 3, T5_WIDTH),
            "pooled_projections": torch.zeros(1, 20),
        }
        FAMILY.call(transformer, torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), conditions)
    assert ran == [spec.name for spec in specs]
    owned = [parameter for spec in specs for parameter in transformer.get_submodule(spec.name).parameters()]
    assert len(set(map(id, owned))) == len(owned)
    free = {
        name.split(".")[0]
        for name, parameter in transformer.named_parameters()
        if id(parameter) not in set(map(id, owned))
    }
    modulation = {"transformer_blocks"} if granularity == "layer" else set()
    assert free == {"pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"} | modulation


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: FAMILY.blocks({}, "node"), "granularity 'node'"),
        (lambda: FAMILY.inputs({}, 1, 9, 8, 4), "latent of 9x8.*multiples of 2"),
        (lambda: FAMILY.inputs(FULL_SIZE["sd3-medium-1024"], 1, 386, 128, 4), "position embeddings end at 384"),
        (lambda: FAMILY.inputs({}, 1, 8, 8), "give text_length"),
    ],
)
def test_refusals_are_one_line(act: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_size_that_is_no_multiple_of_a_patch_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        plan_export(str(model), schedule_for(model), ExportOptions(layout="variants", width=72))


def test_sd3_has_less_than_sd35() -> None:
    names = {spec.name for spec in FAMILY.blocks(sd3_transformer().config, "layer")}
    more = {spec.name for spec in FAMILY.blocks(sd35_transformer().config, "layer")}
    assert more - names == {"transformer_blocks.0.attn2", "transformer_blocks.1.attn2"} and names < more
