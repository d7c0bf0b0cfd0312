from __future__ import annotations

import numpy as np
import pytest
import torch

from dipgo_deploy.compare.graphs import frugal_session
from dipgo_deploy.difference import relative_error
from dipgo_deploy.reference.recording import Recorder, cache_tensor, run_until_complete
from dipgo_deploy.sampler import sampler_matrix
from dipgo_deploy.supernet import CacheState

ENGINES = ("unet_ddim", "unet_pndm", "dit_residual", "dit_output")


def test_the_tensor_of_another_name_is_refused():
    with pytest.raises(ValueError, match="'noise_pred' is not the name of a cache"):
        cache_tensor("noise_pred", CacheState())


def record(bundle, reference, given, **options):
    plan = bundle.manifest.plan
    launches = [(launch.step, launch.variant) for launch in plan.launches]
    recorder = Recorder(plan.variants, launches, plan.slots, **options)
    run_until_complete(recorder, reference, given)
    return recorder.recordings


@pytest.mark.parametrize("engine", ENGINES)
def test_each_variant_is_recorded_at_its_first_launch_and_its_last(engine, request, opened, inputs):
    bundle, reference = opened(request.getfixturevalue(engine))
    plan = bundle.manifest.plan
    given = inputs(bundle, reference)
    recordings = record(bundle, reference, given)
    first = {launch.variant: launch.step for launch in reversed(plan.launches)}
    last = {launch.variant: launch.step for launch in plan.launches}
    assert {(recording.variant, recording.step) for recording in recordings} == {*first.items(), *last.items()}
    once = record(bundle, reference, given, again=False)
    assert {recording.variant: recording.step for recording in once} == first and len(once) == len(first)
    timesteps = sampler_matrix(reference.scheduler, reference.schedule.sampler.num_inference_steps).timesteps
    for recording in recordings:
        entry = plan.variants[recording.variant]
        fed = {spec.name: recording.inputs[spec.name] for spec in entry.graph.inputs}
        assert {spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in entry.graph.inputs} == {
            name: (array.shape, array.dtype) for name, array in fed.items()
        }
        assert recording.inputs["timestep"] == timesteps[recording.step]
        outputs = {name: tensor.shape for name, tensor in recording.outputs.items()}
        assert {spec.name: spec.shape for spec in entry.graph.outputs} == outputs


def test_a_cache_that_is_read_matters(dit_residual, opened, inputs):
    bundle, reference = opened(dit_residual)
    recordings = record(bundle, reference, inputs(bundle, reference))
    variants = bundle.manifest.plan.variants
    recording = next(recording for recording in recordings if variants[recording.variant].reads)
    entry = variants[recording.variant]
    noise = np.random.default_rng(0)
    with frugal_session(bundle, entry) as run:
        assert relative_error(run(recording.inputs)["noise_pred"], recording.outputs["noise_pred"]) < 1e-5
        for name in entry.reads:
            cache = recording.inputs[name]
            changed = {**recording.inputs, name: cache + noise.normal(size=cache.shape).astype(np.float32)}
            assert relative_error(run(changed)["noise_pred"], recording.outputs["noise_pred"]) > 1e-2


def test_noise_is_the_runtimes_and_depends_on_the_seed(dit_output, opened, inputs):
    bundle, reference = opened(dit_output)
    one, same, other = (inputs(bundle, reference, seed=seed) for seed in (3, 3, 4))
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(one.latents.shape, generator=generator) for _ in range(1 + bundle.manifest.plan.noises)]
    assert len(one.noises) == bundle.manifest.plan.noises > 0
    for got, again, want in zip((one.latents, *one.noises), (same.latents, *same.noises), drawn, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert not torch.allclose(one.latents, other.latents)
    assert one.guidance_scale is None


def test_conditions_are_one_for_all_or_one_each(dit_output, dit_residual, unet_ddim, opened, inputs):
    two = opened(dit_output)
    assert inputs(*two, labels=(7,)).conditions["class_labels"].tolist() == [7, 7]
    assert inputs(*two, labels=(7, 2)).conditions["class_labels"].tolist() == [7, 2]
    guided = opened(dit_residual)
    assert inputs(*guided, labels=(7,)).conditions["class_labels"].tolist() == [10, 7]
    assert inputs(*guided, guidance_scale=2.5).guidance_scale == 2.5
    assert inputs(*guided).guidance_scale == 4.0  # DiTPipeline's own
    text = opened(unet_ddim)
    assert inputs(*text).guidance_scale == 7.5  # a bare denoiser has none of its own
    first, second = (inputs(*text, prompts=(p,)).conditions["encoder_hidden_states"] for p in ("a bag", "a coat"))
    assert first.shape == (2, 77, 16)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
