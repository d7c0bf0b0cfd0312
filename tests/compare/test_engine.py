"""Real exported engine directories against the supernet, right ones and ones that were made wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from tiny_engines import changed, corrupted, save_dit_pipeline, schedule_for, stored_weights, write

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.runners import BackendRunner, engine_runner, graphs_on
from dipgo_deploy.difference import relative_error
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.reference.load import load_reference

ENGINES = ("unet_ddim", "unet_pndm", "dit_residual", "dit_output")


@pytest.fixture
def compare(opened, inputs, backend):
    def run(engine_dir, options=None, **more):
        bundle, reference = opened(engine_dir)
        return bundle.manifest.plan, compare_engine(
            bundle, reference, inputs(bundle, reference, **more), backend, options
        )

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_engine_agrees_everywhere(engine, request, compare):
    plan, report = compare(request.getfixturevalue(engine))
    assert report.passed and report.first_failure() is None
    assert report.tolerance.relative == 1e-4
    entries = {variant.name: variant for variant in plan.variants}
    assert {checked.variant for checked in report.variants} == set(entries)
    for checked in report.variants:
        outputs = {spec.name for spec in entries[checked.variant].graph.outputs}
        assert {tensor.name for tensor in checked.tensors} == outputs
    reads = {name for variant in plan.variants for name in variant.reads}
    seen = {tensor.name for checked in report.loop for tensor in checked.tensors}
    assert reads < seen and {name for variant in plan.variants for name in variant.writes} < seen
    launched = {launch.step: plan.variants[launch.variant].name for launch in plan.launches}
    # With these settings PNDM gives its last prediction no weight: the engine does not make it.
    steps = range(plan.evaluations - (engine == "unet_pndm"))
    assert [(checked.step, checked.variant) for checked in report.loop] == [
        (step, launched.get(step)) for step in steps
    ]
    assert all("noise_pred" in {tensor.name for tensor in checked.tensors} for checked in report.loop)
    assert "latent" in {tensor.name for tensor in report.loop[0].tensors}
    images = {"images"} if engine == "dit_residual" else set()
    assert {tensor.name for tensor in report.results.tensors} == {"latents"} | images
    for checked in (*report.variants, *report.loop, report.results):
        for tensor in checked.tensors:
            assert tensor.relative < 1e-4 and tensor.cosine > 0.999999 and tensor.psnr > 80
    # Two runtimes never agree to the last bit in all tensors: an error of zero everywhere would be a comparison of
    # something with itself.
    assert any(tensor.relative > 0 for checked in report.variants for tensor in checked.tensors)
    assert report.results.tensors[0].relative > 0


def test_parts_can_be_left_out(unet_ddim, compare):
    _, variants = compare(unet_ddim, Options(loop=False))
    assert variants.variants and not variants.loop and variants.results is None
    _, loop = compare(unet_ddim, Options(variants=False))
    assert loop.loop and loop.results is not None and not loop.variants


def test_seed_and_guidance_change_what_is_compared(dit_residual, compare):
    options = Options(variants=False)
    psnr = {
        compare(dit_residual, options, **more)[1].results.tensors[0].psnr
        for more in ({}, {"seed": 1}, {"guidance_scale": 1.5})
    }
    assert len(psnr) == 3


def test_a_tolerance_that_is_too_small_fails(unet_ddim, compare):
    _, report = compare(unet_ddim, Options(tolerance=1e-12))
    assert not report.passed
    assert "above 1e-12" in report.first_failure()
    assert compare(unet_ddim, Options(tolerance=1e-12, absolute=1.0))[1].passed


def test_a_wrong_weight_is_found_in_the_variants_that_have_it(dit_residual, tmp_path, compare, opened):
    plan = opened(dit_residual)[0].manifest.plan
    graph = plan.variants[0].graph.file.removeprefix("graphs/")
    path = corrupted(dit_residual, tmp_path / "bad", graph, "transformer_blocks.3.ff.net.0.proj.weight")
    _, report = compare(path)
    # Block 3 is computed where its cache is not read; its weight is used nowhere else.
    last = "residual.transformer_blocks.3/out0"
    wrong = {checked.variant for checked in report.variants if not checked.passed}
    assert wrong == {variant.name for variant in plan.variants if last not in variant.reads}
    assert "v00" in wrong and len(wrong) < len(plan.variants)
    weight, variant, *_ = report.failures()
    assert weight.startswith("weights, graphs, transformer_blocks.3.ff.net.0.proj.weight, values: error 2.00e+00 ")
    assert variant.startswith("variant v00 by itself, evaluation 0, ")
    bad = next(checked for checked in report.variants if checked.variant == "v00")
    names = {tensor.name for tensor in bad.tensors if not tensor.passed}
    assert names == {"noise_pred", "new_residual.transformer_blocks.3/out0"} & {tensor.name for tensor in bad.tensors}


@pytest.mark.parametrize("launch", [1, 3])
def test_a_wrong_coefficient_shows_at_its_own_step(launch, dit_residual, tmp_path, compare):
    def edit(manifest):
        manifest["plan"]["launches"][launch]["coefficients"][0] *= 1.01

    plan, report = compare(changed(dit_residual, tmp_path / "bad", edit))
    step = plan.launches[launch].step
    name = plan.variants[plan.launches[launch].variant].name
    assert all(checked.passed for checked in report.variants)
    row, loop, *_ = report.failures()
    assert row.startswith(f"launch list, launch {launch} (evaluation {step}, variant {name}), coefficients: error ")
    assert row.endswith(" against the sampler, above 1e-12")
    assert loop.startswith(f"loop, evaluation {step}, variant {name}, latent: ")
    assert all(checked.passed for checked in report.loop[:step])


def test_a_wrong_final_weight_shows_after_the_last_step(dit_residual, tmp_path, compare):
    def edit(manifest):
        manifest["plan"]["final"][0] += 0.01

    _, report = compare(changed(dit_residual, tmp_path / "bad", edit))
    assert all(checked.passed for checked in (*report.variants, *report.loop))
    row, loop, *_ = report.failures()
    assert row.startswith("launch list, after the last launch, final: ")
    assert loop.startswith("loop, after the last evaluation, latents: ")


def test_a_cache_at_the_wrong_place_shows_where_it_is_read(dit_residual, tmp_path, compare):
    found = {}

    def edit(manifest):
        for launch in manifest["plan"]["launches"]:
            if len(set(launch["reads"])) > 1:
                # Swapped, two residuals that are only ever added up would give the right sum.
                launch["reads"][0] = launch["reads"][1]
                found["step"] = launch["step"]
                found["name"] = manifest["plan"]["variants"][launch["variant"]]["reads"][0]
                return

    _, report = compare(changed(dit_residual, tmp_path / "bad", edit))
    assert all(checked.passed for checked in report.variants)
    assert report.first_failure().startswith(f"loop, evaluation {found['step']}, variant v")
    assert f", {found['name']}: " in report.first_failure()


def test_memory_that_was_never_written_is_not_zero(unet_ddim, opened, inputs, backend):
    """A read before any write must show even where zeros would nearly be right; no directory with one is opened."""
    bundle, reference = opened(unet_ddim)
    document = json.loads(bundle.manifest.dumps())
    first = next(launch for launch in document["plan"]["launches"] if launch["reads"])
    first["reads"] = [document["plan"]["arena_bytes"]] * len(first["reads"])
    document["plan"]["arena_bytes"] += 2**20
    bad = Bundle(bundle.path, Manifest.model_validate(document))
    report = compare_engine(bad, reference, inputs(bad, reference), backend, Options(variants=False, tolerance=1e9))
    assert "error inf of its largest value" in report.first_failure()


def test_promoted_and_half_precision_engines(dit_folder, tmp_path, compare):
    folder = dit_folder / "transformer"
    schedule = schedule_for(folder, seed=5)
    options = ExportOptions(layout="variants", dtype="fp16", max_variants=2)
    engine_dir = write(plan_export(str(folder), schedule, options), tmp_path / "fp16")
    plan, report = compare(engine_dir)
    assert len(plan.variants) == 2 and Bundle.open(engine_dir).manifest.promoted
    assert report.passed and report.tolerance.relative == 2e-2
    worst = max(tensor.relative for checked in report.loop for tensor in checked.tensors)
    assert worst > 1e-5  # it is half precision that was compared
    assert not compare(engine_dir, Options(tolerance=1e-6))[1].passed


def test_polygraphys_runner_and_the_backends_own_give_the_same(unet_ddim, compare, backend):
    @contextlib.contextmanager
    def own(bundle, entry):
        with BackendRunner(bundle.path, entry.graph, backend) as runner:
            yield runner.infer

    found = []
    for open_graph in (graphs_on(backend), own):
        _, report = compare(unet_ddim, Options(loop=False, components=False, open_graph=open_graph))
        found.append([tensor.relative for checked in report.variants for tensor in checked.tensors])
        assert report.passed
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_inputs_are_saved_for_polygraphy(dit_residual, tmp_path, compare, opened, backend):
    folder, outputs = tmp_path / "new" / "inputs", tmp_path / "new" / "outputs"
    _, report = compare(dit_residual, Options(loop=False, save_inputs=folder, save_outputs=outputs))
    assert report.skipped == ()
    bundle, _ = opened(dit_residual)
    plan = bundle.manifest.plan
    assert {path.name for path in folder.iterdir()} == {f"{variant.name}.json" for variant in plan.variants}
    launches = [launch.variant for launch in plan.launches]
    for number, entry in enumerate(plan.variants):
        feeds = load_json(str(folder / f"{entry.name}.json"))
        assert len(feeds) == min(2, launches.count(number))
        assert all(list(feed) == [spec.name for spec in entry.graph.inputs] for feed in feeds)
        with engine_runner(bundle, entry, backend) as runner:
            found = [{name: np.array(array) for name, array in runner.infer(feed).items()} for feed in feeds]
        ((_, expected),) = RunResults.load(str(outputs / f"{entry.name}.json")).items()
        assert len(expected) == len(feeds)
        for ours, theirs in zip(found, expected, strict=True):
            assert set(ours) == set(theirs) == {spec.name for spec in entry.graph.outputs}
            assert all(relative_error(ours[name], theirs[name]) < 1e-4 for name in ours)
    # The line of the documentation, on a graph that is wrong; test_readme runs it on one that is right.
    name = plan.variants[0].name
    weight = next(name for name in stored_weights(dit_residual, plan.variants[0]) if name.startswith("transformer_b"))
    wrong = corrupted(dit_residual, tmp_path / "wrong", f"{name}.onnx", weight)
    line = ["polygraphy", "run", wrong / "graphs" / f"{name}.onnx", "--onnxrt", "--check-error-stat", "max"]
    line += ["--load-inputs", folder / f"{name}.json", "--load-outputs", outputs / f"{name}.json"]
    done = subprocess.run([*line, "--rtol", "0", "--atol", "1e-4"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout + done.stderr


def test_a_folder_that_cannot_be_written(dit_residual, tmp_path, compare):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save-inputs .*file/inputs: cannot be written"):
        compare(dit_residual, Options(loop=False, save_inputs=tmp_path / "file" / "inputs"))


def test_a_graph_that_is_no_graph(dit_residual, tmp_path, compare):
    path = changed(dit_residual, tmp_path / "bad", lambda manifest: None)
    (path / "graphs" / "v00.onnx").write_bytes(b"no graph")
    reseal(path)
    for options in (Options(loop=False), Options(variants=False)):
        with pytest.raises(UserError, match=r"v00\.onnx"):
            compare(path, options)


def test_another_model_is_refused(dit_residual, unet_folder, dit_folder, tmp_path):
    bundle = Bundle.open(dit_residual)
    with pytest.raises(UserError, match="UNet2DConditionModel with configuration .* exported from DiTTransformer2D"):
        load_reference(bundle, str(unet_folder))
    longer = save_dit_pipeline(tmp_path / "longer", layers=5)
    with pytest.raises(UserError, match="give that model with --model"):
        load_reference(bundle, str(longer))
    assert load_reference(bundle, str(dit_folder / "transformer")).source.pipeline is None


def test_a_model_that_is_gone_is_said_with_the_option(dit_residual, tmp_path):
    bundle = Bundle.open(dit_residual)
    gone = str(tmp_path / "gone")
    model = bundle.manifest.model.model_copy(update={"name": gone})
    moved = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"model": model}))
    with pytest.raises(UserError, match=r"gone: no such folder.*--model gives another place"):
        load_reference(moved)


def test_without_a_vae_on_one_side_there_are_no_images(dit_residual, dit_folder, inputs, backend):
    bundle = Bundle.open(dit_residual)
    reference = load_reference(bundle, str(dit_folder / "transformer"))
    given = inputs(bundle, reference, guidance_scale=4.0)
    report = compare_engine(bundle, reference, given, backend, Options(variants=False))
    assert [tensor.name for tensor in report.results.tensors] == ["latents"]
    assert np.isfinite(report.results.tensors[0].psnr)
