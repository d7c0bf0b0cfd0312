"""An engine directory against the model, in the order of a run: launch list, weights, components, each variant (or
segment) by itself, the whole loop, and from prompt to picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.compare.facts import check_facts
from dipgo_deploy.compare.graphs import OpenGraph, compare_segments, compare_variants, frugal_session
from dipgo_deploy.compare.launch_list import check_launch_list
from dipgo_deploy.compare.loop import LoopResult, compare_loop
from dipgo_deploy.compare.metrics import Tolerance, tensor_error
from dipgo_deploy.compare.pictures import Pictures
from dipgo_deploy.compare.report import IMAGES, LATENTS, Checked, Part, Report
from dipgo_deploy.compare.stock import Case, StockFailure, StockPipeline
from dipgo_deploy.compare.weights import check_weights
from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.conditions import ReferenceInputs, host
from dipgo_deploy.reference.load import Reference
from dipgo_deploy.reference.recording import Recording, run_until_complete
from dipgo_deploy.reference.steps import StepRecorder, recorder_for
from dipgo_deploy.reference.vae import decoded, from_vae, scaling_and_shift, to_images
from dipgo_deploy.runtime.image import Decoder, Encoder
from dipgo_deploy.runtime.pipeline import Pipeline

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
        UserError: a graph cannot be loaded or run, or the inputs cannot be saved.
    """
    options = options or Options()
    manifest = bundle.manifest
    backend.check(manifest)
    relative = reference.source.family.tolerances[manifest.dtype] if options.tolerance is None else options.tolerance
    tolerance = Tolerance(relative, options.absolute)
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
            pictures = Pictures(Pipeline(bundle, backend, lazy=True), stock, tolerance)
    if pictures is not None and manifest.components.text_encoder is None and reference.source.text is not None:
        skipped.append("prompts are not compared: the engine directory has no text encoder")
        pictures = None
    if pictures is not None and options.components:
        notify("comparing tokens and conditions")
        components += _each_case(options.cases, pictures.components, skipped)
    variants, loop = _denoiser(bundle, reference, inputs, backend, options, tolerance, notify)
    results = None
    if loop is not None:
        notify("decoding")
        components += _vae(bundle, backend, reference, loop.expected, tolerance)
        results = _results(bundle, backend, reference, loop, tolerance)
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
    notify: Notify,
) -> tuple[tuple[Checked, ...], LoopResult | None]:
    """The variants by themselves and the loop; the supernet's loop runs once for both."""
    if not (options.variants or options.loop or options.save_inputs is not None):
        return (), None
    alone = options.variants or options.save_inputs is not None
    recorder = recorder_for(bundle, reference.schedule, inputs.guidance_scale)
    loop = None
    if options.loop:
        notify("running both loops")
        record = recorder if alone else lambda evaluation: None
        loop = compare_loop(bundle, backend, reference, inputs, tolerance, record)
    else:
        notify("running the supernet's loop")
        run_until_complete(recorder, reference, inputs)
    checked: tuple[Checked, ...] = ()
    recordings: Sequence[Recording] = ()
    if isinstance(recorder, StepRecorder):
        if alone:
            notify("comparing the segments")
            checked, recordings = compare_segments(bundle, recorder.recordings, options.open_graph, tolerance)
    else:
        recordings = recorder.recordings
        if options.variants:
            notify(f"comparing {len(bundle.manifest.plan.variants)} variants")
            checked = tuple(compare_variants(bundle, recordings, options.open_graph, tolerance))
    if options.save_inputs is not None:
        save_inputs(bundle, recordings, options.save_inputs)
    return checked if options.variants else (), loop


def save_inputs(bundle: Bundle, recordings: Iterable[Recording], folder: Path) -> None:
    """Write each variant's inputs as ``folder/VARIANT.json``, for polygraphy's ``--load-inputs``: one set for each of
    the launches that were recorded.

    Raises:
        UserError: the folder cannot be written.
    """
    from polygraphy.json import save_json

    from dipgo_deploy.compare.runners import silenced

    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    for recording in recordings:
        entry = bundle.manifest.plan.variants[recording.variant]
        # Half-precision inputs are cast by the runner.
        given = {spec.name: recording.inputs[spec.name] for spec in entry.graph.inputs}
        feeds.setdefault(entry.name, []).append(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, sets in feeds.items():
            partial = folder / f".{name}.json.partial"
            try:
                with silenced():
                    save_json(sets, str(partial))
                os.replace(partial, folder / f"{name}.json")
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--save-inputs {folder}: cannot be written ({error.strerror}); give another folder") from None


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
        picture = np.random.default_rng(0).random(encoder.inputs[0].shape, np.float32)
        expected |= _encode(vae, picture)
        actual |= Encoder(bundle.path, encoder, backend)(picture)
    errors = tuple(tensor_error(name, actual[name], expected[name], tolerance) for name in expected)
    return [Part("VAE", "", "the model's own", errors)] if errors else []


def _results(bundle: Bundle, backend: Backend, reference: Reference, loop: LoopResult, tolerance: Tolerance) -> Checked:
    """The final latents, and the images that each side's own VAE makes of its own latents."""
    errors = [tensor_error(LATENTS, loop.actual, loop.expected, tolerance)]
    images = _decoded(bundle, reference, loop.expected)
    if images is not None:
        decoder = Decoder(bundle.path, bundle.manifest.components, backend)
        errors.append(tensor_error(IMAGES, decoder(loop.actual), images, tolerance))
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


def _encode(vae: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the encoder's graph gives for images float32 (B, H, W, 3) in [0, 1]."""
    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(2 * images - 1).permute(0, 3, 1, 2))
    spread = getattr(encoded, "latent_dist", None)
    mean = encoded.latents if spread is None else spread.mean
    found = {"mean": host(from_vae(vae, mean))}
    return found if spread is None else found | {"std": host(spread.std * scaling_and_shift(vae)[0])}
