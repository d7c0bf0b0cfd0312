"""An engine directory against the model, in the order of a run: launch list, weights, components, each variant (or
segment) by itself, the whole loop, and from prompt to picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Components, Manifest
from dipgo_deploy.compare.facts import check_facts
from dipgo_deploy.compare.graphs import OpenGraph, compare_segments, compare_variants, frugal_session
from dipgo_deploy.compare.launch_list import check_launch_list
from dipgo_deploy.compare.loop import LoopResult, compare_loop
from dipgo_deploy.compare.metrics import WHOLE, Tolerance, image_errors, tensor_error
from dipgo_deploy.compare.pictures import Pictures
from dipgo_deploy.compare.report import IMAGES, LATENTS, Checked, Part, Report
from dipgo_deploy.compare.rows import with_rows
from dipgo_deploy.compare.saved import save_inputs, save_outputs
from dipgo_deploy.compare.self_test import SelfTestRecorder
from dipgo_deploy.compare.stock import Case, StockFailure, StockPipeline
from dipgo_deploy.compare.weights import check_weights
from dipgo_deploy.compare.worst import Seen, nobody
from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.conditions import ReferenceInputs, host
from dipgo_deploy.reference.load import Reference
from dipgo_deploy.reference.recording import Recorder, Recording, run_until_complete
from dipgo_deploy.reference.steps import StepRecorder, recorder_for
from dipgo_deploy.reference.vae import decoded, deviation_of, from_images, from_vae, to_images
from dipgo_deploy.runtime.image import Decoder, Encoder, with_grey
from dipgo_deploy.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from dipgo_deploy.supernet.loop import Evaluation

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is compared, and when it passes.

    Attributes:
        components: manifest, launch list, weights, tokens, conditions and VAE.
        pictures: from prompt to picture. Both at ``cases``.
        tolerance: None for the model family's own, by dtype.
        open_graph: how a variant's graph is run by itself.
        save_inputs: folder for each variant's recorded inputs, as polygraphy's JSON.
        save_outputs: folder for what the model makes of them, likewise.
        self_test: records the test that the engine directory carries, where the loop is compared.
        seen: is shown every picture of both sides.
    """

    variants: bool = True
    loop: bool = True
    components: bool = True
    pictures: bool = False
    cases: tuple[Case, ...] = ()
    tolerance: float | None = None
    absolute: float = 0.0
    open_graph: OpenGraph = frugal_session
    save_inputs: Path | None = None
    save_outputs: Path | None = None
    self_test: SelfTestRecorder | None = None
    seen: Seen = nobody


def compare_engine(
    bundle: Bundle,
    reference: Reference,
    inputs: ReferenceInputs,
    backend: Backend,
    options: Options | None = None,
    notify: Notify = lambda stage: None,
) -> Report:
    """Compare an engine directory with the model under the schedule that it records.

    Launch list: coefficients and timesteps against the sampler. Weights: values against the model's. Components: what
    the text encoders and the denoiser get of prompts, against the stock pipeline; the VAE. Variants: each runs on the
    inputs that it has at its first and at its last launch in the supernet's own loop. Segments: evaluations of the
    supernet's own loop run launch by launch until each segment ran twice, see ``steps``. Loop: see ``compare_loop``.
    Pictures: see ``pictures``.

    Raises:
        UserError: a graph cannot be loaded or run, or inputs or outputs cannot be saved.
    """
    options = options or Options()
    manifest = bundle.manifest
    backend.check(manifest)
    tolerance = tolerance_of(manifest, reference, options)
    parts: list[Part] = []
    if options.components:
        notify("checking manifest, launch list and weights")
        parts += check_facts(manifest, reference)
        parts += check_launch_list(manifest, reference)
        parts += check_weights(bundle, reference.source)
    try:
        return _run(bundle, reference, inputs, backend, options, tolerance, parts, notify)
    except (UserError, ValueError) as error:
        if all(part.passed for part in parts):
            raise
        # What is wrong was found already, and is why it does not run.
        return Report(tolerance=tolerance, parts=tuple(parts), skipped=(f"not run any further: {error}",))


def tolerance_of(manifest: Manifest, reference: Reference, options: Options) -> Tolerance:
    """Of what graphs make: the one asked for, else that of the model's family."""
    own = reference.source.family.tolerance(manifest.dtype, manifest.quantized)
    return Tolerance(own if options.tolerance is None else options.tolerance, options.absolute)


def results_tolerance(manifest: Manifest, reference: Reference, options: Options) -> Tolerance:
    """Of latents and pictures. In fewer bits the errors of all launches add up in them, as far as another
    picture: only what is off by more than the largest value is certainly broken."""
    tolerance = tolerance_of(manifest, reference, options)
    broken = options.tolerance is None and manifest.quantized is not None
    return replace(tolerance, relative=WHOLE) if broken else tolerance


def beside_tolerance(manifest: Manifest, reference: Reference, options: Options) -> Tolerance:
    """Of conditions and VAE, which are never in fewer bits."""
    own = reference.source.family.tolerance(manifest.dtype)
    return Tolerance(own if options.tolerance is None else options.tolerance, options.absolute)


def _run(
    bundle: Bundle,
    reference: Reference,
    inputs: ReferenceInputs,
    backend: Backend,
    options: Options,
    tolerance: Tolerance,
    parts: Sequence[Part],
    notify: Notify,
) -> Report:
    """All that needs graphs to run, after ``parts``."""
    manifest = bundle.manifest
    beside = beside_tolerance(manifest, reference, options)
    of_results = results_tolerance(manifest, reference, options)
    components: list[Part] = []
    drawn: list[Part] = []
    skipped: list[str] = []
    pictures: Pictures | None = None
    if options.cases and (options.components or options.pictures):
        try:
            stock = StockPipeline(manifest, reference)
        except UserError as error:
            skipped.append(f"not compared with the stock pipeline: {error}")
        else:
            pictures = Pictures(
                Pipeline(bundle, backend, lazy=True), stock, of_results, options.seen, conditions=beside
            )
    if pictures is not None and manifest.components.text_encoder is None and reference.source.text is not None:
        skipped.append("prompts are not compared: the engine directory has no text encoder")
        pictures = None
    if pictures is not None and options.components:
        notify("comparing tokens and conditions")
        components += _each_case(options.cases, pictures.components, skipped)
    variants, loop = _denoiser(bundle, reference, inputs, backend, options, tolerance, of_results, skipped, notify)
    results = None
    if loop is not None:
        notify("decoding")
        components += _vae(bundle, backend, reference, loop.expected, beside)
        results = _results(bundle, backend, reference, loop, of_results, options.seen)
    if pictures is not None and options.pictures:
        notify("drawing with both pipelines")
        drawn = _each_case(options.cases, pictures.picture, skipped)
    return Report(
        tolerance=tolerance,
        variants=variants,
        loop=() if loop is None else loop.checked,
        results=results,
        parts=(*parts, *components),
        pictures=tuple(drawn),
        skipped=tuple(skipped),
    )


def _each_case(cases: Iterable[Case], compare: Callable[[Case], list[Part]], skipped: list[str]) -> list[Part]:
    found: list[Part] = []
    for case in cases:
        try:
            found += compare(case)
        except StockFailure as error:
            if str(error) not in skipped:
                skipped.append(str(error))
    return found


def _denoiser(
    bundle: Bundle,
    reference: Reference,
    inputs: ReferenceInputs,
    backend: Backend,
    options: Options,
    tolerance: Tolerance,
    of_latents: Tolerance,
    skipped: list[str],
    notify: Notify,
) -> tuple[tuple[Checked, ...], LoopResult | None]:
    """The variants by themselves and the loop; the supernet's loop runs once for both. skipped: gets a line for what
    could not be saved."""
    saved = options.save_inputs is not None or options.save_outputs is not None
    alone = options.variants or saved
    if not (alone or options.loop):
        return (), None
    recorder = recorder_for(bundle, reference.schedule)
    loop = None
    if options.loop:
        notify("running both loops")
        takers = [*([recorder] if alone else []), *([options.self_test] if options.self_test else [])]

        def record(evaluation: Evaluation) -> None:
            for take in takers:
                take(evaluation)

        loop = compare_loop(bundle, backend, reference, inputs, tolerance, record, of_latents)
    else:
        notify("running the supernet's loop")
        run_until_complete(recorder, reference, inputs)
    checked: tuple[Checked, ...] = ()
    recordings: Sequence[Recording] = ()
    if loop is not None and options.self_test is not None:
        of_variants = recorder.recordings if isinstance(recorder, Recorder) else ()
        options.self_test.finish(inputs, of_variants, loop.expected, tolerance.relative, loop.checked)
    if isinstance(recorder, StepRecorder):
        if alone:
            notify("comparing the segments")
            steps = with_rows(bundle, recorder.recordings, options.open_graph)
            checked, recordings = compare_segments(bundle, steps, options.open_graph, tolerance)
    else:
        recordings = tuple(with_rows(bundle, recorder.recordings, options.open_graph)) if alone else ()
        if options.variants:
            notify(f"comparing {len(bundle.manifest.plan.variants)} variants")
            checked = tuple(compare_variants(bundle, recordings, options.open_graph, tolerance))
    if options.save_inputs is not None:
        save_inputs(bundle, recordings, options.save_inputs)
    if options.save_outputs is not None:
        skipped += save_outputs(bundle, recordings, options.save_outputs)
    return checked if options.variants else (), loop


def _vae(
    bundle: Bundle, backend: Backend, reference: Reference, latents: np.ndarray, tolerance: Tolerance
) -> list[Part]:
    """The decoder on latents of the supernet's loop, and for image-to-image the encoder on a picture."""
    expected: dict[str, np.ndarray] = {}
    actual: dict[str, np.ndarray] = {}
    images = _decoded(bundle, reference, latents)
    components = bundle.manifest.components
    encoder = components.vae_encoder
    if images is not None:
        expected[IMAGES] = images
        actual[IMAGES] = Decoder(bundle.path, components, backend)(latents)
    vae = getattr(reference.source.pipeline, "vae", None)
    if encoder is not None and vae is not None:
        shape = encoder.inputs[0].shape
        picture = np.random.default_rng(0).random((shape[0], *shape[-3:]), np.float32)
        expected |= _encode(vae, _whole_video(components, picture) if len(shape) > 4 else picture)
        actual |= Encoder(bundle.path, components.encoders, backend, components.vae_encoder_chunks)(picture)
    errors = tuple(tensor_error(name, actual[name], expected[name], tolerance) for name in expected)
    return [Part("VAE", "", "the model's own", errors)] if errors else []


def _results(
    bundle: Bundle, backend: Backend, reference: Reference, loop: LoopResult, tolerance: Tolerance, seen: Seen
) -> Checked:
    """The final latents, and the images that each side's own VAE makes of its own latents."""
    errors = [tensor_error(LATENTS, loop.actual, loop.expected, tolerance)]
    images = _decoded(bundle, reference, loop.expected)
    if images is not None:
        decoder = Decoder(bundle.path, bundle.manifest.components, backend)
        drawn = decoder(loop.actual)
        errors += image_errors(IMAGES, drawn, images, tolerance)
        seen("the loop's own", drawn, images)
    return Checked(None, None, tuple(errors))


def _decoded(bundle: Bundle, reference: Reference, latents: np.ndarray) -> np.ndarray | None:
    """Images float32 (B, H, W, 3) in [0, 1] as the model makes them; None where one side has no VAE."""
    if bundle.manifest.components.vae_decoder is None:
        return None
    if reference.source.family.pixels:
        return _pictures(latents)
    vae = getattr(reference.source.pipeline, "vae", None)
    return None if vae is None else _decode(vae, latents)


def _pictures(latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, H, W, 3) in [0, 1] of a model on pixels; a grey picture has three equal channels."""
    images = np.clip(latents / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)), np.float32)


def _decode(vae: Any, latents: np.ndarray) -> np.ndarray:
    """Images float32 (B, [F,] H, W, 3) in [0, 1], as diffusers' pipelines make them of latents."""
    with torch.no_grad():
        return host(to_images(decoded(vae, torch.from_numpy(latents))))


def _whole_video(components: Components, picture: np.ndarray) -> np.ndarray:
    """The video (B, F, H, W, 3) that encoders of videos make of a picture (B, H, W, 3)."""
    last = components.vae_encoder_chunks[-1:]
    graph = components.encoders[last[0].graph if last else 0]
    frames = graph.inputs[0].shape[1] + (last[0].start if last else 0)
    return with_grey(picture, 0, (len(picture), frames, *picture.shape[1:]))


def _encode(vae: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the encoder's graph gives for images float32 (B, [F,] H, W, 3) in [0, 1]."""
    with torch.no_grad():
        encoded = vae.encode(from_images(vae, torch.from_numpy(images)))
    spread = getattr(encoded, "latent_dist", None)
    mean = encoded.latents if spread is None else spread.mean
    found = {"mean": host(from_vae(vae, mean))}
    return found if spread is None else found | {"std": host(deviation_of(vae, spread.std))}
