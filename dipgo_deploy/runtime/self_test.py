"""Does this machine compute the model? The test that an engine directory carries, run on any backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dipgo_deploy.backends.storage import as_bytes, from_storage, to_storage
from dipgo_deploy.bundle.manifest import LaunchEntry, Manifest
from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.bundle.self_test import (
    FINAL,
    LATENT,
    SelfTest,
    alone_tensor,
    condition_tensor,
    prediction_tensor,
)
from dipgo_deploy.difference import relative_error
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.noise import loop_noise

_POISON_BYTE = 0xFF  # all bits set is NaN in every floating type


@dataclass(frozen=True)
class CheckedTensor:
    """A tensor beside its recorded values. relative: largest absolute error over the largest recorded value; infinite
    where the tensor has NaN or infinity."""

    name: str
    relative: float
    passed: bool


@dataclass(frozen=True)
class CheckedPart:
    """What was run at once: a variant by itself, or the loop."""

    name: str
    tensors: tuple[CheckedTensor, ...]

    @property
    def passed(self) -> bool:
        """Whether all tensors are within tolerance."""
        return all(tensor.passed for tensor in self.tensors)

    @property
    def worst(self) -> CheckedTensor:
        """The tensor with the largest error."""
        return max(self.tensors, key=lambda tensor: tensor.relative)


@dataclass(frozen=True)
class SelfTestReport:
    """What a self-test found.

    Attributes:
        parts: each variant by itself, as far as they were recorded, then the loop.
        tolerance: largest ``relative`` that passes; reason: why.
        left_out: variants that run in the loop only.
    """

    parts: tuple[CheckedPart, ...]
    tolerance: float
    reason: str
    left_out: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return all(part.passed for part in self.parts)

    def failures(self) -> Iterator[str]:
        """A line for each tensor beyond tolerance."""
        for part in self.parts:
            for tensor in part.tensors:
                if not tensor.passed:
                    yield (
                        f"{part.name}, {tensor.name}: error {tensor.relative:.2e} of the largest value, more than "
                        f"{self.tolerance:g}"
                    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite error becomes null."""
        return {
            "passed": self.passed,
            "failures": list(self.failures()),
            "tolerance": self.tolerance,
            "reason": self.reason,
            "parts": [
                {
                    "name": part.name,
                    "passed": part.passed,
                    "tensors": [
                        {
                            "name": tensor.name,
                            "relative": tensor.relative if math.isfinite(tensor.relative) else None,
                            "passed": tensor.passed,
                        }
                        for tensor in part.tensors
                    ],
                }
                for part in self.parts
            ],
            "left_out": list(self.left_out),
        }


def run_self_test(test: SelfTest, loop: DenoisingLoop) -> SelfTestReport:
    """Run the test of an engine directory: its recorded launches by themselves, then its loop.

    Raises:
        UserError: a graph cannot be loaded or run.
    """
    recorded = test.recorded
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an infinite error
        parts = [_alone(test, loop, index) for index in recorded.alone]
        parts.append(_loop(test, loop))
    return SelfTestReport(tuple(parts), recorded.tolerance, recorded.reason, recorded.left_out)


def _alone(test: SelfTest, loop: DenoisingLoop, index: int) -> CheckedPart:
    """A launch from the recorded latent and caches."""
    manifest, launch = test.manifest, test.manifest.plan.launches[index]
    variant = manifest.plan.variants[launch.variant]
    prediction, arena = loop.evaluate(
        launch.step,
        test.tensors[alone_tensor(index, LATENT)],
        _conditions(test),
        timestep=launch.timestep,
        guidance_scale=test.recorded.guidance_scale,
        arena=_caches(test, index, launch),
    )
    specs = {spec.name: spec for spec in variant.graph.outputs}
    found = {
        name: from_storage(arena[offset:], specs[name])
        for name, offset in zip(variant.writes, launch.writes, strict=True)
    }
    if prediction is not None:
        found[PREDICTION] = prediction
    expected = {name: test.tensors[alone_tensor(index, name)] for name in specs}
    where = f"variant {variant.name} by itself, evaluation {launch.step}"
    return CheckedPart(where, tuple(_checked(name, found[name], expected[name], test) for name in expected))


def _caches(test: SelfTest, index: int, launch: LaunchEntry) -> np.ndarray:
    """The arena with what a launch reads, NaN everywhere else."""
    variant = test.manifest.plan.variants[launch.variant]
    arena = np.full(test.manifest.plan.arena_bytes, _POISON_BYTE, np.uint8)
    specs = {spec.name: spec for spec in variant.graph.inputs}
    for name, offset in zip(variant.reads, launch.reads, strict=True):
        data = as_bytes(to_storage(test.tensors[alone_tensor(index, name)], specs[name].dtype))
        arena[offset : offset + data.nbytes] = data
    return arena


def _loop(test: SelfTest, loop: DenoisingLoop) -> CheckedPart:
    """The loop from the seed's noise, as far as it was recorded."""
    manifest, plan, recorded = test.manifest, test.manifest.plan, test.recorded
    noise = loop_noise(recorded.seed, sample_shape(manifest), plan.noises, picture=plan.image_slot is not None)
    final = loop.run(
        noise.latents,
        _conditions(test),
        noises=np.stack(noise.draws) if noise.draws else None,
        image=noise.picture,
        guidance_scale=recorded.guidance_scale,
        count=None if recorded.whole else max(recorded.predictions) + 1,
    )
    history = loop.history()
    tensors = []
    for index in recorded.predictions:
        launch = plan.launches[index]
        assert launch.slot is not None  # checked when the test was read
        expected = test.tensors[prediction_tensor(index)]
        tensors.append(_checked(f"prediction of evaluation {launch.step}", history[launch.slot], expected, test))
    if not recorded.whole:
        return CheckedPart("beginning of the loop", tuple(tensors))
    tensors.append(_checked("final latents", final, test.tensors[FINAL], test))
    return CheckedPart("loop", tuple(tensors))


def sample_shape(manifest: Manifest) -> tuple[int, ...]:
    """(B, C, [f,] h, w); manifest: at its sizes."""
    return (manifest.batch, *manifest.latent.shape)


def _conditions(test: SelfTest) -> dict[str, np.ndarray]:
    return {spec.name: test.tensors[condition_tensor(spec.name)] for spec in test.manifest.conditions}


def _checked(name: str, found: np.ndarray, expected: np.ndarray, test: SelfTest) -> CheckedTensor:
    relative = relative_error(found, expected)
    return CheckedTensor(name, relative, relative <= test.recorded.tolerance)
