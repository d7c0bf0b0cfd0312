"""An engine directory against the torch supernet: each variant (or segment) by itself, and the whole loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, RunResults
from polygraphy.json import save_json

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import VariantEntry
from dipgo_deploy.bundle.stack import graph_latent
from dipgo_deploy.compare.accuracy import Tolerance, compare_runs, silenced
from dipgo_deploy.compare.conditions import ReferenceInputs, as_arrays, host
from dipgo_deploy.compare.recording import LoopRecorder, Recording, run_until_complete
from dipgo_deploy.compare.reference import Reference, VariantReference
from dipgo_deploy.compare.report import Checked, Report
from dipgo_deploy.compare.runners import SupernetRunner, engine_runner
from dipgo_deploy.compare.steps import StepRecorder, StepRecording, StepRunner, recorder_for
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.runtime.image import Decoder, Encoder
from dipgo_deploy.runtime.loop import COEFFICIENTS, PREDICTION, STACK, DenoisingLoop
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
    and on the backend, with polygraphy's ``Comparator``. Segments: evaluations of the supernet's own loop run launch by
    launch until each segment ran, see ``steps``. Loop: both sides start from the same noise and go their own
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
    recorder = recorder_for(plan, reference.schedule, inputs.guidance_scale)
    evaluations: list[_Evaluated] = []
    notify("running the supernet's loop")
    if options.loop:
        latents = _supernet_loop(reference, inputs, recorder, evaluations)
    else:
        run_until_complete(
            recorder,
            reference.supernet,
            reference.scheduler,
            reference.schedule.sampler.num_inference_steps,
            reference.schedule.gates,
            inputs,
            reference.set_timesteps,
        )
    variants: tuple[Checked, ...] = ()
    if isinstance(recorder, StepRecorder):
        if options.variants or options.save_inputs is not None:
            notify("comparing the segments")
            variants, recordings = compare_segments(bundle, recorder.recordings, backend, tolerance, options.threads)
            variants = variants if options.variants else ()
            if options.save_inputs is not None:
                save_inputs(bundle, recordings, options.save_inputs)
    else:
        if options.save_inputs is not None:
            save_inputs(bundle, recorder.recordings, options.save_inputs)
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
    reference: Reference, inputs: ReferenceInputs, recorder: LoopRecorder, evaluations: list[_Evaluated]
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
            set_timesteps_kwargs=reference.set_timesteps,
            start=inputs.start,
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
    with silenced(), _failures_named(bundle, entry, backend):
        results = Comparator.run(runners, data_loader=[_feed(bundle, recording)])
    (errors,) = compare_runs(results, tolerance)
    return Checked(recording.step, entry.name, errors)


def compare_segments(
    bundle: Bundle,
    recordings: Sequence[StepRecording],
    backend: Backend,
    tolerance: Tolerance,
    threads: int | None = None,
) -> tuple[tuple[Checked, ...], tuple[Recording, ...]]:
    """Every segment on ``backend``, within evaluations that start from the supernet's latent.

    Returns what was compared at the first launch of each segment, and at later ones that fail; a segment that writes
    nothing the supernet has (a time embedding) is judged by those that read it. Then each segment's inputs at its first
    launch.

    Raises:
        UserError: a graph cannot be loaded or run.
    """
    plan = bundle.manifest.plan
    checked: list[Checked] = []
    firsts: dict[int, Recording] = {}
    with silenced(), contextlib.ExitStack() as stack:
        runners: dict[int, BaseRunner] = {}

        def run(segment: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            entry = plan.variants[segment]
            with _failures_named(bundle, entry, backend):
                if segment not in runners:
                    runners[segment] = stack.enter_context(engine_runner(bundle, entry, backend, threads))
                return {name: np.array(array) for name, array in runners[segment].infer(feeds).items()}

        evaluate = StepRunner(plan, run)
        for recording in recordings:
            for launched in evaluate(recording.step, recording.inputs):
                first = launched.segment not in firsts
                if first:
                    given = Recording(launched.segment, recording.step, launched.inputs, {})
                    firsts[launched.segment] = given
                names = [name for name in launched.outputs if name in recording.outputs]
                if not names:
                    continue
                wanted = {name: recording.outputs[name] for name in names}
                found = {name: launched.outputs[name].astype(np.float32) for name in names}
                (errors,) = compare_runs(_results([wanted], [found]), tolerance)
                result = Checked(recording.step, plan.variants[launched.segment].name, errors)
                if first or not result.passed:
                    checked.append(result)
    return tuple(checked), tuple(firsts.values())


@contextlib.contextmanager
def _failures_named(bundle: Bundle, entry: VariantEntry, backend: Backend) -> Iterator[None]:
    """What goes wrong inside, in one line with the graph's file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        file = bundle.path / entry.graph.file
        raise UserError(f"{file}: cannot be run on {backend.name}: {one_line(error)}") from error


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
            stack, coefficients = loop.fetch(index, STACK), loop.fetch(index, COEFFICIENTS)
            tensors[LATENT] = graph_latent(stack, coefficients, bundle.manifest.plan.stack.chain)
        if loop.launches[index].slot is not None:
            tensors[PREDICTION] = loop.fetch(index, PREDICTION)
        seen.append(tensors)

    denoised = loop.run(
        host(inputs.latents),
        as_arrays(inputs.conditions),
        noises=np.stack([host(noise) for noise in inputs.noises]) if inputs.noises else None,
        image=None if inputs.start is None else host(inputs.start.latents),
        guidance_scale=1.0 if inputs.guidance_scale is None else inputs.guidance_scale,
        on_launch=on_launch,
    )
    return seen, denoised


def _predictions_used(reference: Reference) -> list[bool]:
    """Per evaluation, whether the sampler gives any weight to its prediction; the engine need not make the others."""
    from dipgo_deploy.sampler import prediction_used, sampler_matrix

    steps = reference.schedule.sampler.num_inference_steps
    matrix = sampler_matrix(
        reference.scheduler, steps, set_timesteps_kwargs=reference.set_timesteps, begin=reference.begin, check=False
    )
    return list(prediction_used(matrix))


def _compare_loop(
    bundle: Bundle,
    evaluations: Sequence[_Evaluated],
    used: Sequence[bool],
    engine: Sequence[dict[str, np.ndarray]],
    tolerance: Tolerance,
) -> tuple[Checked, ...]:
    """Every evaluation: what a launch saw and made; without a launch, the prediction that is used again."""
    plan = bundle.manifest.plan
    launched: dict[int, list[int]] = {}
    for index, launch in enumerate(plan.launches):
        launched.setdefault(launch.step, []).append(index)
    places: list[tuple[int, str | None]] = []
    expected: list[dict[str, np.ndarray]] = []
    actual: list[dict[str, np.ndarray]] = []
    latest: np.ndarray | None = None
    for step, evaluation in enumerate(evaluations):
        found: dict[str, np.ndarray] = {}
        for index in launched.get(step, ()):
            found.update(engine[index])
        latest = found.get(PREDICTION, latest)
        if latest is not None and used[step]:
            found[PREDICTION] = latest
        wanted = {LATENT: evaluation.model_input, PREDICTION: evaluation.prediction}
        if found:
            names = [plan.variants[plan.launches[index].variant].name for index in launched.get(step, ())]
            places.append((step, "..".join(dict.fromkeys([names[0], names[-1]])) if names else None))
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
    """The final latents, the images that each side's own VAE makes of its own latents, and for image-to-image what
    each makes of one picture."""
    wanted, found = {LATENTS: expected}, {LATENTS: actual}
    graph = bundle.manifest.components.vae_decoder
    vae: Any = getattr(reference.source.pipeline, "vae", None)
    pixels = reference.source.family.pixels
    if graph is not None and (pixels or vae is not None):
        wanted[IMAGES] = _pictures(expected) if pixels else _decode(vae, expected)
        found[IMAGES] = Decoder(bundle.path, graph, backend)(actual)
    encoder = bundle.manifest.components.vae_encoder
    if encoder is not None and vae is not None:
        picture = np.random.default_rng(0).random(encoder.inputs[0].shape, np.float32)
        wanted |= _encode(vae, picture)
        found |= Encoder(bundle.path, encoder, backend)(picture)
    (errors,) = compare_runs(_results([wanted], [found]), tolerance)
    return Checked(None, None, errors)


def _pictures(latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, H, W, 3) in [0, 1] of a model on pixels; a grey picture has three equal channels."""
    images = np.clip(latents / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)), np.float32)


def _decode(vae: Any, latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, H, W, 3) in [0, 1], as diffusers' pipelines make them of latents."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        images = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor + shift, return_dict=False)[0]
    return host((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def _encode(vae: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the encoder's graph gives for images float32 (B, H, W, 3) in [0, 1]."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(2 * images - 1).permute(0, 3, 1, 2))
    spread = getattr(encoded, "latent_dist", None)
    mean = encoded.latents if spread is None else spread.mean
    found = {"mean": host((mean - shift) * vae.config.scaling_factor)}
    return found if spread is None else found | {"std": host(spread.std * vae.config.scaling_factor)}


def _results(expected: Sequence[dict[str, np.ndarray]], actual: Sequence[dict[str, np.ndarray]]) -> RunResults:
    results = RunResults()
    results.add(list(expected), runner_name="supernet")
    results.add(list(actual), runner_name="engine")
    return results
