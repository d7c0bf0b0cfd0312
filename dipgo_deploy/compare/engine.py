"""An engine directory against the torch supernet: each variant by itself, and the whole loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.comparator import Comparator, RunResults
from polygraphy.json import save_json

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.compare.accuracy import Tolerance, compare_runs, silenced
from dipgo_deploy.compare.conditions import ReferenceInputs, as_arrays, host
from dipgo_deploy.compare.recording import Recorder, Recording, record_variants
from dipgo_deploy.compare.reference import Reference, VariantReference
from dipgo_deploy.compare.report import Checked, Report
from dipgo_deploy.compare.runners import SupernetRunner, engine_runner
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.image import Decoder
from dipgo_deploy.runtime.loop import COEFFICIENTS, PREDICTION, STACK, DenoisingLoop, final_latent
from dipgo_deploy.supernet.loop import Evaluation, run_loop

LATENT, LATENTS, IMAGES = "latent", "latents", "images"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is compared, and when it passes.

    tolerance: None for the model family's own, by dtype. threads: CPU threads of a variant's own run; None: ONNX
    Runtime's default. save_inputs: folder for each variant's recorded inputs, as polygraphy's JSON.
    """

    variants: bool = True
    loop: bool = True
    tolerance: float | None = None
    absolute: float = 0.0
    threads: int | None = None
    save_inputs: Path | None = None


def compare_engine(
    bundle: Bundle,
    reference: Reference,
    inputs: ReferenceInputs,
    backend: Backend,
    options: Options | None = None,
    notify: Notify = lambda stage: None,
) -> Report:
    """Compare an engine directory with the supernet under the schedule that it records.

    Variants: each runs once on the inputs that it has at its first launch in the supernet's own loop, on the supernet
    and on the backend, with polygraphy's ``Comparator``. Loop: both sides start from the same noise and go their own
    way to the end, every cache fed forward; buffers that the engine has not written yet hold NaN.

    Raises:
        UserError: a graph cannot be loaded or run, or the inputs cannot be saved.
    """
    options = options or Options()
    manifest = bundle.manifest
    backend.check(manifest)
    relative = reference.source.family.tolerances[manifest.dtype] if options.tolerance is None else options.tolerance
    tolerance = Tolerance(relative, options.absolute)
    plan = manifest.plan
    launches = [(launch.step, launch.variant) for launch in plan.launches]
    recorder = Recorder(plan.variants, launches, inputs.guidance_scale, plan.slots)
    evaluations: list[_Evaluated] = []
    notify("running the supernet's loop")
    if options.loop:
        latents = _supernet_loop(reference, inputs, recorder, evaluations)
    else:
        record_variants(
            recorder,
            reference.supernet,
            reference.scheduler,
            reference.schedule.sampler.num_inference_steps,
            reference.schedule.gates,
            inputs,
        )
    if options.save_inputs is not None:
        save_inputs(bundle, recorder.recordings, options.save_inputs)
    variants: tuple[Checked, ...] = ()
    if options.variants:
        side = VariantReference(reference, manifest)
        checked = []
        for number, recording in enumerate(recorder.recordings, 1):
            notify(f"comparing variant {number} of {len(recorder.recordings)}")
            checked.append(compare_variant(bundle, side, recording, backend, tolerance, options.threads))
        variants = tuple(checked)
    if not options.loop:
        return Report(tolerance, variants, (), None)
    notify("running the engine's loop")
    engine, denoised = _engine_loop(bundle, backend, inputs)
    loop = _compare_loop(bundle, evaluations, _predictions_used(reference), engine, tolerance)
    notify("decoding")
    results = _compare_results(bundle, backend, reference, host(latents), denoised, tolerance)
    return Report(tolerance, variants, loop, results)


@dataclass(frozen=True)
class _Evaluated:
    """Of one evaluation of the supernet: model input and prediction, float32 (B, C, h, w)."""

    model_input: np.ndarray
    prediction: np.ndarray


def _supernet_loop(
    reference: Reference, inputs: ReferenceInputs, recorder: Recorder, evaluations: list[_Evaluated]
) -> torch.Tensor:
    def record(evaluation: Evaluation) -> None:
        recorder(evaluation)
        evaluations.append(_Evaluated(host(evaluation.model_input), host(evaluation.prediction)))

    with torch.no_grad():
        return run_loop(
            reference.supernet,
            reference.scheduler,
            reference.schedule.gates,
            inputs.latents,
            inputs.conditions,
            num_inference_steps=reference.schedule.sampler.num_inference_steps,
            guidance_scale=inputs.guidance_scale,
            noises=inputs.noises,
            record=record,
        )


def compare_variant(
    bundle: Bundle,
    reference: VariantReference,
    recording: Recording,
    backend: Backend,
    tolerance: Tolerance,
    threads: int | None = None,
) -> Checked:
    """One variant on the supernet and on ``backend``, on recorded inputs.

    Raises:
        UserError: the graph cannot be loaded or run.
    """
    entry = bundle.manifest.plan.variants[recording.variant]
    runners = [SupernetRunner(reference, entry), engine_runner(bundle, entry, backend, threads)]
    with silenced():
        try:
            results = Comparator.run(runners, data_loader=[_feed(bundle, recording)])
        except UserError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"{bundle.path / entry.graph.file}: cannot be run on {backend.name}: {reason}") from error
    (errors,) = compare_runs(results, tolerance)
    return Checked(recording.step, entry.name, errors)


def save_inputs(bundle: Bundle, recordings: Sequence[Recording], folder: Path) -> None:
    """Write each variant's inputs as ``folder/VARIANT.json``, for polygraphy's ``--load-inputs``.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for recording in recordings:
            name = bundle.manifest.plan.variants[recording.variant].name
            partial = folder / f".{name}.json.partial"
            try:
                with silenced():
                    save_json([_feed(bundle, recording)], str(partial))
                os.replace(partial, folder / f"{name}.json")
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--save-inputs {folder}: cannot be written ({error.strerror}); give another folder") from None


def _feed(bundle: Bundle, recording: Recording) -> dict[str, np.ndarray]:
    """What the variant's graph takes; its half-precision inputs are cast by the runner."""
    graph = bundle.manifest.plan.variants[recording.variant].graph
    return {spec.name: recording.inputs[spec.name] for spec in graph.inputs}


def _engine_loop(
    bundle: Bundle, backend: Backend, inputs: ReferenceInputs
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """The engine's whole loop: per launch the latent and the prediction, where its graph has them; final latents."""
    loop = DenoisingLoop(bundle, backend, poison=True)
    seen: list[dict[str, np.ndarray]] = []

    def on_launch(index: int) -> None:
        tensors = {}
        names = {spec.name for spec in loop.variant(index).graph.inputs}
        if STACK in names:
            weights = loop.fetch(index, COEFFICIENTS)
            tensors[LATENT] = final_latent(loop.fetch(index, STACK), weights.tolist())
        if loop.launches[index].slot is not None:
            tensors[PREDICTION] = loop.fetch(index, PREDICTION)
        seen.append(tensors)

    denoised = loop.run(
        host(inputs.latents),
        as_arrays(inputs.conditions),
        noises=np.stack([host(noise) for noise in inputs.noises]) if inputs.noises else None,
        guidance_scale=1.0 if inputs.guidance_scale is None else inputs.guidance_scale,
        on_launch=on_launch,
    )
    return seen, denoised


def _predictions_used(reference: Reference) -> list[bool]:
    """Per evaluation, whether the sampler gives any weight to its prediction; the engine need not make the others."""
    from dipgo_deploy.sampler import prediction_used, sampler_matrix

    steps = reference.schedule.sampler.num_inference_steps
    return list(prediction_used(sampler_matrix(reference.scheduler, steps, check=False)))


def _compare_loop(
    bundle: Bundle,
    evaluations: Sequence[_Evaluated],
    used: Sequence[bool],
    engine: Sequence[dict[str, np.ndarray]],
    tolerance: Tolerance,
) -> tuple[Checked, ...]:
    """Every evaluation: what a launch saw and made; without a launch, the prediction that is used again."""
    plan = bundle.manifest.plan
    launched = {launch.step: index for index, launch in enumerate(plan.launches)}
    places: list[tuple[int, str | None]] = []
    expected: list[dict[str, np.ndarray]] = []
    actual: list[dict[str, np.ndarray]] = []
    latest: np.ndarray | None = None
    for step, evaluation in enumerate(evaluations):
        found = dict(engine[launched[step]]) if step in launched else {}
        latest = found.get(PREDICTION, latest)
        if latest is not None and used[step]:
            found[PREDICTION] = latest
        wanted = {LATENT: evaluation.model_input, PREDICTION: evaluation.prediction}
        if found:
            variant = plan.variants[plan.launches[launched[step]].variant].name if step in launched else None
            places.append((step, variant))
            expected.append({name: wanted[name] for name in found})
            actual.append(found)
    errors = compare_runs(_results(expected, actual), tolerance)
    return tuple(Checked(step, variant, tensors) for (step, variant), tensors in zip(places, errors, strict=True))


def _compare_results(
    bundle: Bundle,
    backend: Backend,
    reference: Reference,
    expected: np.ndarray,
    actual: np.ndarray,
    tolerance: Tolerance,
) -> Checked:
    """The final latents, and the images that each side's own VAE makes of its own latents."""
    wanted, found = {LATENTS: expected}, {LATENTS: actual}
    graph = bundle.manifest.components.vae_decoder
    vae: Any = getattr(reference.source.pipeline, "vae", None)
    if graph is not None and vae is not None:
        wanted[IMAGES] = _decode(vae, expected)
        found[IMAGES] = Decoder(bundle.path, graph, backend)(actual)
    (errors,) = compare_runs(_results([wanted], [found]), tolerance)
    return Checked(None, None, errors)


def _decode(vae: Any, latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, H, W, 3) in [0, 1], as diffusers' pipelines make them of latents."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor + shift, return_dict=False)[0]
    return host((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def _results(expected: Sequence[dict[str, np.ndarray]], actual: Sequence[dict[str, np.ndarray]]) -> RunResults:
    results = RunResults()
    results.add(list(expected), runner_name="supernet")
    results.add(list(actual), runner_name="engine")
    return results
