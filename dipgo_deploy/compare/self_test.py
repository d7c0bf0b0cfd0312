"""Records the test that an engine directory carries, of the model's own loop while that runs for a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.names import HISTORY
from dipgo_deploy.bundle.self_test import (
    FINAL,
    LATENT,
    Recorded,
    SelfTest,
    alone_specs,
    alone_tensor,
    condition_tensor,
    loop_specs,
    nbytes,
    prediction_tensor,
)
from dipgo_deploy.models.family import tolerance_reason
from dipgo_deploy.reference.conditions import ReferenceInputs, as_arrays, host
from dipgo_deploy.runtime.noise import loop_noise
from dipgo_deploy.runtime.self_test import sample_shape

if TYPE_CHECKING:
    from dipgo_deploy.compare.report import Checked
    from dipgo_deploy.reference.load import Reference
    from dipgo_deploy.reference.recording import Recording
    from dipgo_deploy.supernet.loop import Evaluation

SEED = 0
_PREDICTIONS = 3


class SelfTestRecorder:
    """Takes every evaluation of the model's loop, then what was compared, and makes a test of it of at most ``limit``
    bytes: the loop with a few of its predictions, and as many variants by themselves as there is room for.

    bundle: at its usual sizes. whole: False where the model's loop is not run to its end. Weights in fewer bits are
    not expected to give final latents either: the errors of all launches add up in them. needed: bytes of the least
    that can be recorded. test: None before ``finish``.
    """

    def __init__(self, bundle: Bundle, limit: int, *, whole: bool = True) -> None:
        self._manifest = bundle.manifest
        self.limit = limit
        self._whole = whole and bundle.manifest.quantized is None
        launches = bundle.manifest.plan.launches
        whole = self._whole
        predicting = [index for index, launch in enumerate(launches) if launch.slot is not None]
        self.needed = nbytes(loop_specs(bundle.manifest, () if whole else (predicting[0],), whole=whole))
        some = np.linspace(0, len(predicting) - 1, _PREDICTIONS).round().astype(int)
        self._chosen = {launches[predicting[place]].step: predicting[place] for place in some}
        self._predictions: dict[int, np.ndarray] = {}
        self.test: SelfTest | None = None

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation of the model's loop."""
        launch = self._chosen.get(evaluation.step)
        if launch is not None:
            self._predictions[launch] = host(evaluation.prediction)

    def finish(
        self,
        inputs: ReferenceInputs,
        recordings: Iterable[Recording],
        final: np.ndarray | None,
        tolerance: float,
        compared: Sequence[Checked] | None = None,
    ) -> None:
        """Make the test.

        Args:
            inputs: what the loop started from, of ``SEED``.
            recordings: of variants; none of the layout ``segments``.
            final: the model's final latents, float32 (B, C, h, w); None of a loop that did not come to its end.
            tolerance: of the comparison, relative.
            compared: evaluations of the engine's loop. Where the engine was judged by the model on its own latent, the
                prediction is not expected of others: they have no model. None where no engine was run: then only the
                first prediction is, whose latent is the noise itself.

        Raises:
            ValueError: ``inputs`` are of another seed.
        """
        manifest = self._manifest
        plan = manifest.plan
        self._check_seed(inputs)
        expected = self._expected(compared)
        tensors = {FINAL: final} if self._whole and final is not None else {}
        tensors |= {condition_tensor(name): rows for name, rows in as_arrays(inputs.conditions).items()}
        kept: tuple[int, ...] = ()
        for launch in expected:
            if nbytes(loop_specs(manifest, (*kept, launch), whole=self._whole)) <= self.limit:
                kept = (*kept, launch)
                tensors[prediction_tensor(launch)] = self._predictions[launch]
        used = nbytes(loop_specs(manifest, kept, whole=self._whole))
        alone: dict[int, int] = {}
        for recording in recordings:
            launch = next(
                index
                for index, launch in enumerate(plan.launches)
                if (launch.step, launch.variant) == (recording.step, recording.variant)
            )
            size = nbytes(alone_specs(manifest, launch))
            if recording.variant not in alone and used + size <= self.limit:
                used += size
                alone[recording.variant] = launch
                tensors |= _tensors_of(recording, launch, plan.variants[recording.variant].reads)
        self.test = SelfTest(
            Recorded(
                seed=SEED,
                guidance_scale=1.0 if inputs.guidance_scale is None else inputs.guidance_scale,
                sizes=(manifest.batch, manifest.latent.height, manifest.latent.width),
                tolerance=tolerance,
                reason=tolerance_reason(manifest.dtype, manifest.quantized),
                predictions=kept,
                alone=tuple(alone.values()),
                left_out=tuple(variant.name for place, variant in enumerate(plan.variants) if place not in alone),
                whole=self._whole,
            ),
            tensors,
            manifest,
        )

    def _expected(self, compared: Sequence[Checked] | None) -> list[int]:
        """Launches whose predictions any engine has to make from its own latent."""
        launches = sorted(self._predictions)
        if compared is None:
            return launches[:1]
        inherited = {checked.step for checked in compared for error in checked.tensors if error.made is not None}
        return [launch for launch in launches if self._manifest.plan.launches[launch].step not in inherited]

    def _check_seed(self, inputs: ReferenceInputs) -> None:
        plan = self._manifest.plan
        noise = loop_noise(SEED, sample_shape(self._manifest), plan.noises, picture=plan.image_slot is not None)
        if not np.array_equal(noise.latents, host(inputs.latents)):
            raise ValueError(f"a self-test is recorded of seed {SEED}")


def record_alone(bundle: Bundle, reference: Reference, tolerance: float, recorder: SelfTestRecorder) -> None:
    """Record the test where nothing is compared: the model's loop runs for it alone."""
    from dipgo_deploy.compare.loop import ReferenceLoop
    from dipgo_deploy.reference.recording import Recorder
    from dipgo_deploy.reference.steps import recorder_for

    inputs = reference.inputs(bundle.manifest, seed=SEED)
    variants = recorder_for(bundle, reference.schedule, again=False)

    def record(evaluation: Evaluation) -> None:
        variants(evaluation)
        recorder(evaluation)

    final = host(ReferenceLoop(reference, inputs, record).to_end())
    recordings = variants.recordings if isinstance(variants, Recorder) else ()
    recorder.finish(inputs, recordings, final, tolerance)


def _tensors_of(recording: Recording, launch: int, reads: Sequence[str]) -> dict[str, np.ndarray]:
    found = {alone_tensor(launch, LATENT): recording.inputs[HISTORY][0]}  # the latent stands alone in the first slot
    found |= {alone_tensor(launch, name): recording.inputs[name] for name in reads}
    return found | {alone_tensor(launch, name): values for name, values in recording.outputs.items()}
