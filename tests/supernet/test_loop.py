"""The denoising loop against stock diffusers pipelines, and gradients through it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import family_for
from dipgo_deploy.supernet import Evaluation, Supernet, run_loop

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
DDIM = diffusers.DDIMScheduler(set_alpha_to_one=False, **SD)
PNDM = diffusers.PNDMScheduler(
    skip_prk_steps=True, set_alpha_to_one=False, **{k: v for k, v in SD.items() if k != "clip_sample"}
)


def supernet_of(model: nn.Module, granularity: str = "block", kind: str | None = None) -> Supernet:
    specs = family_for(type(model).__name__).blocks(model.config, granularity)
    return Supernet(model, specs, None if kind is None else [kind] * len(specs))


def text(batch: int, guided: bool) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(batch * (2 if guided else 1), 5, 16)}


def full(steps: int, blocks: int) -> list[list[bool]]:
    return [[True] * blocks for _ in range(steps)]


def sd_pipeline(unet: nn.Module, scheduler) -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=type(scheduler).from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_sd_pipeline(unet, scheduler, steps, latents, conditions, scale) -> Tensor:
    embeds = conditions["encoder_hidden_states"]
    negative, positive = embeds.chunk(2) if scale is not None else (None, embeds)
    return sd_pipeline(unet, scheduler)(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        latents=latents.clone(),
        num_inference_steps=steps,
        guidance_scale=1.0 if scale is None else scale,
        output_type="latent",
    ).images


def test_caches_that_are_not_kept_are_gone_and_nothing_else_changes(unet) -> None:
    supernet = supernet_of(unet)
    blocks = [spec.name for spec in supernet.specs]
    gates = full(4, len(blocks))
    gates[2][1] = gates[3][1] = gates[3][2] = False
    latents, conditions = torch.randn(1, 4, 16, 16), text(1, False)

    def read_next(step: int) -> set[str]:
        return {name for name, kept in zip(blocks, gates[min(step + 1, 3)], strict=True) if not kept}

    def run(keep) -> tuple[Tensor, list[tuple[set[str], set[str]]]]:
        held: list[tuple[set[str], set[str]]] = []
        with torch.no_grad():
            return run_loop(
                supernet,
                DDIM,
                gates,
                latents,
                conditions,
                num_inference_steps=4,
                record=lambda evaluation: held.append((set(evaluation.before.tensors), set(evaluation.after.tensors))),
                keep=keep,
            ), held

    (expected, everything), (found, held) = run(None), run(read_next)
    assert torch.equal(found, expected)
    everywhere, one, two = set(blocks), {blocks[1]}, {blocks[1], blocks[2]}
    assert everything == [(set(), everywhere), *[(everywhere, everywhere)] * 3]
    assert held == [(set(), set()), (set(), one), (one, two), (two, two)]
    with pytest.raises(UserError, match="its cache was never written"):
        run(lambda step: set())


@pytest.mark.parametrize("scale", [None, 7.5])
@pytest.mark.parametrize(
    ("scheduler", "evaluations"),
    [
        (DDIM, 6),
        (PNDM, 7),
        (diffusers.EulerDiscreteScheduler.from_config(DDIM.config), 6),
        (diffusers.DPMSolverMultistepScheduler.from_config(DDIM.config), 6),
        (diffusers.HeunDiscreteScheduler.from_config(DDIM.config), 11),
    ],
    ids=lambda value: type(value).__name__,
)
def test_full_schedule_is_the_stock_pipeline_exactly(unet, scheduler, evaluations, scale) -> None:
    latents, conditions = torch.randn(2, 4, 8, 8), text(2, guided=scale is not None)
    before = dict(scheduler.__dict__)
    with torch.no_grad():
        got = run_loop(
            supernet_of(unet),
            scheduler,
            full(evaluations, 9),
            latents,
            conditions,
            num_inference_steps=6,
            guidance_scale=scale,
        )
    assert scheduler.__dict__ == before
    expected = run_sd_pipeline(unet, scheduler, 6, latents, conditions, scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_full_dit_schedule_is_the_stock_pipeline(dit_with_variance, guided, monkeypatch) -> None:
    """With a learned variance. The stock pipeline puts the conditional half first, so guidance differs in rounding."""
    model = dit_with_variance
    finals = []
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler.from_config(DDIM.config))
    pipeline.set_progress_bar_config(disable=True)
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z: finals.append(z * vae.config.scaling_factor) or decode(z))
    # The stock pipeline's null class is 1000 whatever the model; this model has ten classes.
    stock_forward = type(model).forward

    def forward(*args, class_labels, **kwargs):
        return stock_forward(model, *args, class_labels=class_labels.clamp(max=10), **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    pipeline(
        [1, 2], guidance_scale=4.0 if guided else 1.0, generator=torch.Generator().manual_seed(5), num_inference_steps=5
    )
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: stock_forward(model, *args, **kwargs))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([10, 10, 1, 2] if guided else [1, 2])
    with torch.no_grad():
        got = run_loop(
            supernet_of(model),
            DDIM,
            full(5, 4),
            latents,
            {"class_labels": labels},
            num_inference_steps=5,
            guidance_scale=4.0 if guided else None,
        )
    assert got.shape == (2, 4, 8, 8)
    torch.testing.assert_close(got, finals[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheduler", "evaluations"), [(DDIM, 50), (PNDM, 51)], ids=["ddim", "pndm"])
def test_empty_steps_repeat_the_prediction_exactly(unet, scheduler, evaluations, monkeypatch) -> None:
    """Ten full evaluations and forty empty ones, as in the published SD-1.5 schedule at ratio 0.8."""
    runs = {0, 7, 13, 19, 20, 21, 26, 32, 39, 48}
    gates = [[step in runs] * 9 for step in range(evaluations)]
    latents, conditions = torch.randn(1, 4, 8, 8), text(1, guided=True)
    records: list[Evaluation] = []
    with torch.no_grad():
        got = run_loop(
            supernet_of(unet),
            scheduler,
            gates,
            latents,
            conditions,
            num_inference_steps=50,
            guidance_scale=7.5,
            record=records.append,
        )
    for before, after in zip(records, records[1:], strict=False):
        assert torch.equal(before.raw, after.raw) is (after.step not in runs)

    # The stock pipeline, whose UNet answers with its last prediction at the forty other evaluations.
    forward, last, calls = type(unet).forward, [None], [0]

    def repeat(*args, **kwargs):
        if calls[0] in runs:
            last[0] = forward(unet, *args, **kwargs)
        calls[0] += 1
        return last[0]

    monkeypatch.setattr(unet, "forward", repeat)
    expected = run_sd_pipeline(unet, scheduler, 50, latents, conditions, 7.5)
    assert calls[0] == evaluations
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_records_describe_the_loop(dit_with_variance) -> None:
    supernet = supernet_of(dit_with_variance)
    gates = [[True] * 4, [False, True, False, True], [True, False, False, False]]
    conditions = {"class_labels": torch.tensor([10, 10, 4, 5])}
    euler = diffusers.EulerDiscreteScheduler.from_config(DDIM.config)
    records: list[Evaluation] = []
    latents = torch.randn(2, 4, 8, 8)
    final = run_loop(
        supernet, euler, gates, latents, conditions, num_inference_steps=3, guidance_scale=2.0, record=records.append
    )
    replay = diffusers.EulerDiscreteScheduler.from_config(DDIM.config)
    replay.set_timesteps(3)
    sample = latents * replay.init_noise_sigma
    assert [record.step for record in records] == [0, 1, 2]
    assert not records[0].before.tensors
    for record, timestep, keep in zip(records, replay.timesteps, gates, strict=True):
        assert torch.equal(record.timestep, timestep)
        torch.testing.assert_close(record.model_input, replay.scale_model_input(sample, timestep), rtol=0, atol=0)
        batch = torch.cat([record.model_input] * 2)
        # Each record alone is enough to evaluate its step again.
        raw, after = supernet.step(batch, timestep.expand(4), record.conditions, keep, record.before, record.step)
        torch.testing.assert_close(record.raw, raw[:, :4], rtol=0, atol=0)
        for name, tensors in after.tensors.items():
            torch.testing.assert_close(record.after.tensors[name], tensors, rtol=0, atol=0)
        nothing, something = record.raw[:2], record.raw[2:]
        torch.testing.assert_close(record.prediction, nothing + 2.0 * (something - nothing))
        sample = replay.step(record.prediction, timestep, sample).prev_sample
    torch.testing.assert_close(final, sample, rtol=0, atol=0)
    for name, tensors in records[1].after.tensors.items():
        assert torch.equal(tensors[0], records[2].before.tensors[name][0])


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_noise_comes_from_the_generator_or_is_given(dit, name) -> None:
    supernet, latents = supernet_of(dit), torch.randn(1, 4, 8, 8)
    scheduler = getattr(diffusers, name).from_config(DDIM.config)
    common = (supernet, scheduler, full(4, 4), latents, {"class_labels": torch.tensor([1])})

    def seeded(seed: int) -> Tensor:
        return run_loop(*common, num_inference_steps=4, generator=torch.Generator().manual_seed(seed))

    source = torch.Generator().manual_seed(1)
    draws = 3 if name == "LCMScheduler" else 4
    noises = [torch.randn(1, 4, 8, 8, generator=source) for _ in range(draws)]
    with torch.no_grad():
        assert torch.equal(seeded(1), seeded(1))
        assert not torch.allclose(seeded(1), seeded(2))
        assert torch.equal(run_loop(*common, num_inference_steps=4, noises=noises), seeded(1))
        with pytest.raises(UserError, match=f"{name} draws noise of .* has no more"):
            run_loop(*common, num_inference_steps=4, noises=noises[1:])
        with pytest.raises(UserError, match=f"{name} draws noise {draws} times"):
            run_loop(*common, num_inference_steps=4, noises=[*noises, noises[0]])


def test_wrong_rows_and_batches_are_refused(dit) -> None:
    supernet, latents = supernet_of(dit), torch.randn(1, 4, 8, 8)
    labels = {"class_labels": torch.tensor([1])}
    with pytest.raises(UserError, match="50 rows of gates, but PNDMScheduler evaluates the denoiser 51 times"):
        run_loop(supernet, PNDM, full(50, 4), latents, labels, num_inference_steps=50)
    with pytest.raises(UserError, match="class_labels: 1 rows for a model batch of 2"):
        run_loop(supernet, DDIM, full(2, 4), latents, labels, num_inference_steps=2, guidance_scale=3.0)
    gates = [[True, False, True, True]] * 2
    with pytest.raises(UserError, match="evaluation 0, block transformer_blocks.1"):
        run_loop(supernet, DDIM, gates, latents, labels, num_inference_steps=2)


@pytest.mark.parametrize(
    ("name", "granularity", "kind"),
    [("unet", "block", None), ("unet", "layer", None), ("dit", "block", "residual"), ("dit", "block", "output")],
)
def test_gradient_of_a_gate_goes_through_time(request, name, granularity, kind) -> None:
    """A gate of evaluation 2 acts on later steps through the caches; central differences in float64 see all of it."""
    model = request.getfixturevalue(name).double()
    supernet = supernet_of(model, granularity, kind)
    blocks = len(supernet.specs)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(latents)
    if name == "dit":
        conditions = {"class_labels": torch.tensor([10, 2])}
    else:
        conditions = {"encoder_hidden_states": torch.randn(2, 5, 16, dtype=torch.float64)}
    gates = torch.rand(5, blocks, dtype=torch.float64) * 0.8 + 0.1
    gates[0] = 1

    def loss(values: Tensor) -> Tensor:
        final = run_loop(supernet, DDIM, values, latents, conditions, num_inference_steps=5, guidance_scale=3.0)
        return (final * direction).sum()

    variable = gates.clone().requires_grad_(True)
    loss(variable).backward()
    assert variable.grad is not None
    for block in {0, blocks // 2, blocks - 1}:
        width = 1e-4
        up, down = gates.clone(), gates.clone()
        up[2, block] += width
        down[2, block] -= width
        with torch.no_grad():
            slope = float(loss(up) - loss(down)) / (2 * width)
        assert abs(slope) > 1e-6
        assert float(variable.grad[2, block]) == pytest.approx(slope, rel=1e-4)


def test_caches_are_not_detached(dit) -> None:
    """A block that is only computed at evaluation 1 and read later still receives gradient from the last step."""
    supernet = supernet_of(dit, kind="output")
    gate = torch.tensor(0.5, requires_grad=True)
    gates = [[True] * 4, [True, gate, True, True], [True, False, True, True]]
    caches: list[Tensor] = []
    run_loop(
        supernet,
        DDIM,
        gates,
        torch.randn(1, 4, 8, 8),
        {"class_labels": torch.tensor([1])},
        num_inference_steps=3,
        record=lambda evaluation: caches.append(evaluation.after.tensors["transformer_blocks.1"][0]),
    )
    assert torch.equal(caches[1], caches[2]) and not torch.equal(caches[0], caches[1])

    from dipgo_deploy.supernet import CacheState

    labels, state = {"class_labels": torch.tensor([1])}, CacheState()
    for step, row in enumerate(gates):
        # Inputs do not depend on the gate: only the cache can carry its gradient into the last prediction.
        prediction, state = supernet.step(torch.randn(1, 4, 8, 8), torch.tensor([500 - step]), labels, row, state, step)
    prediction.sum().backward()
    assert gate.grad is not None and gate.grad.abs() > 0
