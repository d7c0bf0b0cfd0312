"""The whole loop of an engine directory beside the supernet's, launch by launch: what each launch gets and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.history import graph_latent
from dipgo_deploy.bundle.manifest import LaunchEntry, VariantEntry
from dipgo_deploy.bundle.names import COEFFICIENTS, HISTORY, PREDICTION, is_weighted, of_half, parse_cache
from dipgo_deploy.compare.metrics import TensorError, Tolerance, inherited, tensor_error
from dipgo_deploy.compare.report import LATENT, Checked
from dipgo_deploy.errors import UserError
from dipgo_deploy.reference.conditions import ReferenceInputs, as_arrays, host
from dipgo_deploy.reference.load import Reference
from dipgo_deploy.reference.recording import as_read, cache_tensor
from dipgo_deploy.reference.steps import stored_block
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.supernet.loop import Evaluation, guided_step

if TYPE_CHECKING:
    from dipgo_deploy.supernet.gated import CacheState


# Block, which of its tensors, which of its stored values (0 the last), and whether the unconditional half alone.
Key = tuple[str, int, int, bool]


class ReferenceLoop:
    """The supernet's loop, one evaluation at a time, so that only one has to be in memory."""

    def __init__(
        self, reference: Reference, inputs: ReferenceInputs, record: Callable[[Evaluation], None] = lambda _: None
    ) -> None:
        """record: called with every evaluation."""
        self._record = record
        self._reference, self._inputs = reference, inputs
        self._step = -1
        self._evaluation: Evaluation | None = None
        self._loop = reference.walk(inputs)
        self.final: torch.Tensor | None = None

    def next(self) -> Evaluation | None:
        """The next evaluation; None after the last one, when ``final`` are the loop's latents."""
        self._evaluation = None
        with torch.no_grad():
            try:
                self._evaluation = next(self._loop)
            except StopIteration as end:
                self.final = end.value
                return None
        self._step += 1
        self._record(self._evaluation)
        return self._evaluation

    @torch.no_grad()
    def on_latent(self, latent: np.ndarray) -> tuple[torch.Tensor, CacheState]:
        """Prediction and caches of the present evaluation from another latent, (B, C, h, w)."""
        at = self._evaluation
        assert at is not None
        model_input = torch.from_numpy(latent).to(at.model_input)
        _, prediction, after = guided_step(
            self._reference.supernet,
            model_input,
            at.timestep,
            self._inputs.conditions,
            self._reference.schedule.gates[at.step],
            at.before,
            at.step,
            self._inputs.guidance_scale,
        )
        return prediction, after

    def to_end(self) -> torch.Tensor:
        """The final latents, (B, C, h, w)."""
        while self.next() is not None:
            pass
        assert self.final is not None
        return self.final


@dataclass
class _Step:
    """One evaluation: what was launched, what the launches got and made; its latent in the engine, and by name what was
    made and is beyond tolerance."""

    names: list[str] = field(default_factory=list)
    given: list[TensorError] = field(default_factory=list)
    made: list[TensorError] = field(default_factory=list)
    latent: np.ndarray | None = None
    beyond: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopResult:
    """What the comparison of a loop found: each evaluation, and the final latents of both sides, (B, C, h, w)."""

    checked: tuple[Checked, ...]
    expected: np.ndarray
    actual: np.ndarray


def compare_loop(
    bundle: Bundle,
    backend: Backend,
    reference: Reference,
    inputs: ReferenceInputs,
    tolerance: Tolerance,
    record: Callable[[Evaluation], None] = lambda _: None,
    of_latents: Tolerance | None = None,
) -> LoopResult:
    """Run both loops from the same noise, each on its own way to the end with every cache fed forward.

    At each launch its latent, the caches that it reads and writes and its prediction are compared, in this order; at an
    evaluation without a launch the prediction that is used again. Buffers that the engine has not written yet hold NaN.

    A model may answer a small change of its latent with a large one of its prediction (at the last timesteps, say). So
    where a latent is within tolerance and what is made of it is not, the model is run on the engine's latent, and what
    the launch made is judged by that; the latents that follow are compared all the same.
    record: called with every evaluation of the supernet. of_latents: the tolerance of latents, in which the errors of
    all launches so far add up; None: as of all else.

    Raises:
        UserError: a graph cannot be loaded or run.
    """
    plan = bundle.manifest.plan
    loop = DenoisingLoop(bundle, backend, poison=True)
    supernet = ReferenceLoop(reference, inputs, record)
    kinds = reference.schedule.cache_kinds
    order = {block: place for place, block in enumerate(kinds)}
    used = predictions_used(reference)
    steps: list[_Step] = []
    latest: list[np.ndarray] = []
    carried: dict[Key, np.ndarray] = {}
    evaluation: Evaluation | None = None

    def close() -> None:
        """Compare the prediction of the evaluation that ends."""
        if evaluation is None or not steps:
            return
        at = steps[-1]
        if latest and used[evaluation.step]:
            made = tensor_error(PREDICTION, latest[0], host(evaluation.prediction), tolerance)
            at.made.append(made)
            if not made.passed:
                at.beyond[PREDICTION] = latest[0]
        if at.beyond:
            at.made = _judged_alone(at, supernet, carried, tolerance)
            at.beyond.clear()

    def advance(step: int) -> None:
        nonlocal evaluation
        while len(steps) <= step:
            close()
            evaluation = None  # its caches may go before the next ones are made
            evaluation = supernet.next()
            if evaluation is None:
                rows = len(reference.schedule.gates)
                raise UserError(f"{bundle.path}: manifest: a launch at evaluation {step} of {rows}; export it again")
            steps.append(_Step())
            if reference.schedule.forecast is not None:  # what was the last stored value is the one before now
                kept_now = dict(zip(kinds, reference.schedule.gates[evaluation.step], strict=True))
                older = {_key_older(key) if kept_now.get(key[0]) else key: held for key, held in carried.items()}
                carried.clear()
                carried.update(older)

    def on_launch(index: int) -> None:
        launch, entry = loop.launches[index], loop.variant(index)
        advance(launch.step)
        assert evaluation is not None
        at = steps[-1]
        at.names.append(entry.name)
        if HISTORY in {spec.name for spec in entry.graph.inputs}:
            latent = graph_latent(loop.fetch(index, HISTORY), loop.fetch(index, COEFFICIENTS), plan.history.chain)
            at.given.append(tensor_error(LATENT, latent, host(evaluation.model_input), of_latents or tolerance))
            at.latent = latent
        kept = dict(zip(kinds, reference.schedule.gates[launch.step], strict=True))
        # In a segment a value that is read may be one that this very evaluation made.
        before = evaluation.before if plan.layout == "variants" else evaluation.after
        unread = _without_weight(entry, launch)
        for tensor in entry.reads:
            name = of_half(tensor, launch.half)
            block = stored_block(name, kinds)
            if tensor in unread or block is None or block not in before.tensors:
                continue
            terms = [(1.0, _key(name)[2])]
            if plan.layout == "segments" and not kept[block] and reference.schedule.forecast is not None:
                # A segment reads the sum where a variant reads what is summed.
                known = before.steps_read(block, "conditional" if launch.guidance == 0 else None)
                weights = reference.schedule.forecast.weights_of(launch.step, order[block], known)
                terms = [(weight, age) for age, weight in enumerate(weights)]
            found = loop.fetch(index, tensor)
            error = tensor_error(name, found, _sum_of(name, before, terms, {}), tolerance)
            if not error.passed and any(_aged(_key(name), age) in carried for _, age in terms):
                error = inherited(error, tensor_error(name, found, _sum_of(name, before, terms, carried), tolerance))
            at.given.append(error)
        for tensor in sorted(entry.writes, key=lambda name: order.get(stored_block(name, kinds) or "", len(order))):
            name = of_half(tensor, launch.half)
            block = stored_block(name, kinds)
            if block in evaluation.after.tensors and (plan.layout == "variants" or kept.get(block or "")):
                found = loop.fetch(index, tensor)
                error = tensor_error(name, found, cache_tensor(name, evaluation.after), tolerance)
                carried.pop(_key(name), None)
                at.made.append(error)
                if not error.passed:
                    at.beyond[name] = np.array(found)
        if launch.slot is not None:
            latest[:] = [loop.fetch(index, PREDICTION)]

    denoised = loop.run(
        host(inputs.latents),
        as_arrays(inputs.conditions),
        noises=np.stack([host(noise) for noise in inputs.noises]) if inputs.noises else None,
        image=None if inputs.start is None else host(inputs.start.latents),
        guidance_scale=1.0 if inputs.guidance_scale is None else inputs.guidance_scale,
        on_launch=on_launch,
    )
    advance(len(reference.schedule.gates) - 1)
    close()
    checked = tuple(
        Checked(number, "..".join(dict.fromkeys([step.names[0], step.names[-1]])) if step.names else None, tensors)
        for number, step in enumerate(steps)
        if (tensors := (*step.given, *step.made))
    )
    return LoopResult(checked, host(supernet.to_end()), denoised)


def _sum_of(
    name: str, state: CacheState, terms: Sequence[tuple[float, int]], carried: Mapping[Key, np.ndarray]
) -> np.ndarray:
    """A sum of the supernet's stored values of a cache, or of the engine's own where they are in ``carried``.

    terms: weights and which of the values, 0 the last.
    """
    key, cache = _key(name), parse_cache(name)
    block, index = key[:2]
    held = [carried.get(_aged(key, age), None) for _, age in terms]
    own = [state.read(block, None if cache is None else cache.half)[age][index] for _, age in terms]
    values = [
        host(tensor) if value is None else as_read(value, tensor.shape) for value, tensor in zip(held, own, strict=True)
    ]
    weighted = [value if weight == 1 else weight * value for (weight, _), value in zip(terms, values, strict=True)]
    total: np.ndarray = weighted[0]
    for value in weighted[1:]:
        total = total + value
    return total


def _judged_alone(
    at: _Step, supernet: ReferenceLoop, carried: dict[Key, np.ndarray], tolerance: Tolerance
) -> list[TensorError]:
    """What an evaluation made; where that is beyond tolerance, judged by the model's values on the engine's latent.

    carried: the engine's values that passed so, for those who read them later; extended.
    """
    if not all(error.passed for error in at.given):
        return at.made
    if at.latent is None:  # nothing was launched: the prediction is an earlier one
        known = {name: carried[_key(name)] for name in at.beyond if _key(name) in carried}
    else:
        prediction, after = supernet.on_latent(at.latent)
        known = {name: host(prediction) if name == PREDICTION else cache_tensor(name, after) for name in at.beyond}
    judged = []
    for error in at.made:
        if error.name in known:
            own = tensor_error(error.name, at.beyond[error.name], known[error.name], tolerance)
            error = inherited(error, own)
            if own.passed:
                carried[_key(error.name)] = at.beyond[error.name]
        judged.append(error)
    return judged


def _key(name: str) -> Key:
    """What is the same of a cache where it is written and where it is read. The conditional half may be read of what
    both halves were written to."""
    cache = parse_cache(name)
    if cache is None:
        return name, 0, 0, False
    return cache.block, cache.index, max(cache.nth - 1, 0), cache.half == "unconditional"


def _aged(key: Key, age: int) -> Key:
    """That of another of the stored values."""
    block, index, _, alone = key
    return block, index, age, alone


def _key_older(key: Key) -> Key:
    return _aged(key, key[2] + 1)


def _without_weight(entry: VariantEntry, launch: LaunchEntry) -> set[str]:
    """The reads that a launch gives no weight: it has to give its variant something."""
    weighted = [name for name in entry.reads if is_weighted(name)]
    return {name for name, weight in zip(weighted, launch.forecast, strict=False) if not weight}


def predictions_used(reference: Reference) -> list[bool]:
    """Per evaluation, whether the sampler gives any weight to its prediction; the engine need not make the others."""
    from dipgo_deploy.sampler import prediction_used, sampler_matrix

    steps = reference.schedule.sampler.num_inference_steps
    matrix = sampler_matrix(
        reference.scheduler, steps, set_timesteps_kwargs=reference.set_timesteps, begin=reference.begin, check=False
    )
    return list(prediction_used(matrix))
