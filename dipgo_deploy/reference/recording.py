"""Real inputs and reference outputs of each variant, recorded from the supernet's own denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dipgo_deploy.bundle.names import (
    COEFFICIENTS,
    FORECAST,
    GUIDANCE_SCALES,
    HISTORY,
    HISTORY_BEFORE,
    PREDICTION,
    TIMESTEP,
    CacheName,
    parse_cache,
)
from dipgo_deploy.reference.conditions import ReferenceInputs, as_arrays, host
from dipgo_deploy.schedule.guidance import Half

if TYPE_CHECKING:
    from dipgo_deploy.reference.load import Reference
    from dipgo_deploy.supernet.gated import CacheState
    from dipgo_deploy.supernet.loop import Evaluation


class VariantNames(Protocol):
    """What is recorded of a variant: the graph's input names of caches, its output names of caches."""

    @property
    def reads(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def writes(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def predicts(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Recording:
    """One launch of a variant.

    Attributes:
        variant: index into the plan's variants.
        step: evaluation.
        inputs: every input that its graph can have by name, float32 or int64; rows of tables are not recorded.
        outputs: the supernet's float32 values by graph output name.
    """

    variant: int
    step: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Recorder:
    """Records each variant at its first launch and its last; give it to ``run_loop`` as ``record``. For the layout
    ``variants``.

    launches: (step, variant) of each launch, in order. slots: entries of the history. again: False for the first launch
    only, so that the loop need not run to its end. forecasts: evaluation -> its launch's weights of stored values.
    """

    def __init__(
        self,
        variants: Sequence[VariantNames],
        launches: Iterable[tuple[int, int]],
        slots: int,
        *,
        again: bool = True,
        forecasts: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        self._forecasts = forecasts or {}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for step, variant in launches:
            first.setdefault(variant, step)
            last[variant] = step
        self._variants = variants
        self._variant_at = {step: variant for variant, step in first.items()}
        if again:
            self._variant_at |= {step: variant for variant, step in last.items()}
        self._slots = slots
        self.recordings: list[Recording] = []

    @property
    def complete(self) -> bool:
        """Whether all launches that are recorded were seen."""
        return len(self.recordings) == len(self._variant_at)

    def stored(self, step: int) -> set[str]:
        """Blocks whose caches are recorded after evaluation ``step``."""
        index = self._variant_at.get(step)
        return set() if index is None else {cache_block(name) for name in self._variants[index].writes}

    def __call__(self, evaluation: Evaluation) -> None:
        """Take one evaluation of the loop."""
        index = self._variant_at.get(evaluation.step)
        if index is None:
            return
        variant = self._variants[index]
        inputs = evaluation_inputs(evaluation, self._slots)
        inputs.update({name: cache_tensor(name, evaluation.before) for name in variant.reads})
        if row := self._forecasts.get(evaluation.step):
            inputs[FORECAST] = np.array(row, np.float32)
        outputs = {PREDICTION: host(evaluation.prediction)} if variant.predicts else {}
        outputs.update({name: cache_tensor(name, evaluation.after) for name in variant.writes})
        self.recordings.append(Recording(index, evaluation.step, inputs, outputs))


class LoopRecorder(Protocol):
    """Takes evaluations of the supernet's loop until it has what it wants."""

    @property
    def complete(self) -> bool: ...  # noqa: D102

    def __call__(self, evaluation: Evaluation) -> None: ...  # noqa: D102


def run_until_complete(
    recorder: LoopRecorder,
    reference: Reference,
    inputs: ReferenceInputs,
    keep: Callable[[int], Collection[str]] | None = None,
) -> None:
    """Run the supernet's loop for as long as ``recorder`` is not complete; ``keep`` as ``run_loop`` has it."""
    import torch

    with torch.no_grad():
        for evaluation in reference.walk(inputs, keep):
            recorder(evaluation)
            if recorder.complete:
                break
            del evaluation  # its caches may go before the next ones are made


def evaluation_inputs(evaluation: Evaluation, slots: int) -> dict[str, np.ndarray]:
    """All graph inputs of an evaluation but the caches, float32 or int64."""
    inputs = launch_inputs(host(evaluation.model_input), float(evaluation.timestep), slots)
    inputs.update(as_arrays(evaluation.conditions))
    if evaluation.guidance_scale is not None:
        inputs.update({name: np.array([evaluation.guidance_scale], np.float32) for name in GUIDANCE_SCALES})
    return inputs


def launch_inputs(model_input: np.ndarray, timestep: float, slots: int) -> dict[str, np.ndarray]:
    """Graph inputs that make ``model_input`` (B, C, h, w) the latent: it stands alone in slot 0 of the history."""
    history = np.zeros((slots, *model_input.shape), np.float32)
    history[0] = model_input
    coefficients = np.zeros(slots, np.float32)
    coefficients[0] = 1.0
    before = np.concatenate([np.zeros_like(history[:1]), history[:-1]])
    time = np.array([timestep], np.float32)
    return {HISTORY: history, HISTORY_BEFORE: before, COEFFICIENTS: coefficients, TIMESTEP: time}


def cache_tensor(name: str, state: CacheState) -> np.ndarray:
    """The supernet's tensor of a cache, float32. Of a stored value that there is not yet the last one: a launch that
    shares its variant with others may have to read it, without weight.

    Raises:
        ValueError: not the name of a cache.
    """
    cache = _parsed(name)
    stored = state.read(cache.block, cache.half)
    return host(stored[cache.nth - 1 if 0 < cache.nth <= len(stored) else 0][cache.index])


def as_read(stored: np.ndarray, shape: Sequence[int], half: Half | None = None) -> np.ndarray:
    """What a launch that reads an array of this shape gets of both halves' rows: all of it, or its own half, which is
    the conditional one where the launch has none named."""
    if not stored.ndim or not shape or len(stored) != 2 * shape[0]:
        return stored
    return stored[: shape[0]] if half == "unconditional" else stored[shape[0] :]


def cache_block(name: str) -> str:
    """The block of a cache by its graph input or output name.

    Raises:
        ValueError: not the name of a cache.
    """
    return _parsed(name).block


def _parsed(name: str) -> CacheName:
    cache = parse_cache(name)
    if cache is None:
        raise ValueError(f"{name!r} is not the name of a cache")
    return cache
