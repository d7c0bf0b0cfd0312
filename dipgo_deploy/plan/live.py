"""The demand walk: what must be computed, read and stored at each evaluation for the predictions used. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dipgo_deploy.plan.costs import bits
from dipgo_deploy.plan.index import GraphIndex
from dipgo_deploy.plan.values import Assignment, Numbering, Term, Terms, number_values
from dipgo_deploy.schedule.forecast import Reads


@dataclass(frozen=True)
class Need:
    """One launch before variants are shared: masks of values.

    Attributes:
        step: evaluation index.
        computed: by their own nodes.
        reads: block outputs taken from their cache (for a residual cache, added to the current input).
        stores: block outputs whose cache a later launch reads from this one.
        predicts: makes a new noise prediction.
        denoiser: which of the predictions is its evaluation's.
    """

    step: int
    computed: int
    reads: int
    stores: int
    predicts: bool
    denoiser: int = 0


@dataclass(frozen=True)
class Demand:
    """Everything the used predictions need.

    Attributes:
        launches: the evaluations at which something is needed, ascending.
        stored: per evaluation and value, the evaluation whose store a plain read gets.
        forecasts: per evaluation the values that are read as other sums of stored ones.
        guided: per evaluation, whether it is; else it is conditional only.
        prediction_slots: per evaluation, the prediction slot that its sampler is given.
        missing: (step, value) of each needed read of a cache that was never stored, ascending; the demand is only
            meaningful when it is empty.
    """

    launches: tuple[Need, ...]
    stored: tuple[tuple[int, ...], ...]
    prediction_slots: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]
    forecasts: tuple[Mapping[int, Terms], ...]
    guided: tuple[bool, ...]

    def stored_as(self, index: GraphIndex, value: int, step: int) -> int:
        """What evaluation ``step`` stored for reads of ``value``: itself, or what it is the conditional half of."""
        return index.whole[value] if self.guided[step] and index.whole[value] >= 0 else value

    def read(self, step: int, value: int) -> Terms:
        """What a read at an evaluation gets, the latest value first."""
        return self.forecasts[step].get(value) or (Term(1.0, self.stored[step][value]),)

    def macs(self, index: GraphIndex) -> int:
        """Multiply-accumulates of all launches."""
        return sum(index.costs.macs(launch.computed) for launch in self.launches)


def demand(
    index: GraphIndex, assignments: Sequence[Assignment], used: Sequence[bool], forecast: Reads | None = None
) -> Demand:
    """Number the values, then walk back from the predictions, last evaluation first.

    used: per evaluation, whether the sampler gives any weight to its prediction; a prediction that no used evaluation
    has is not made, and an evaluation whose prediction equals an earlier one gets that one.
    forecast: what removed blocks read; None: the value that they stored last.
    """
    numbering = number_values(index, assignments, forecast)
    predicts = _new_predictions(numbering, assignments, used)
    guided = tuple(index.guided[assignment.denoiser] for assignment in assignments)
    stores = [0] * len(assignments)
    launches, missing = [], []
    for step in range(len(assignments) - 1, -1, -1):
        assignment, stored, ready = assignments[step], numbering.stored[step], numbering.computed[step]
        needed = assignment.need | stores[step]
        for value in bits(stores[step]):
            if index.base[value] >= 0:
                needed |= 1 << index.base[value]  # the residual is output - input: both are needed
        if predicts[step]:
            needed |= 1 << index.predictions[assignment.denoiser]
        computed = reads = 0
        while needed:
            # Values are in topological order, so the highest one left is needed by no other one left.
            value = needed.bit_length() - 1
            bit = 1 << value
            needed ^= bit
            if ready & bit:
                computed |= bit
                needed |= index.reads_mask[value]
                continue
            reads |= bit
            if value in numbering.forecasts[step]:
                for term in numbering.forecasts[step][value]:
                    whole = index.whole[value] if guided[term.stored] else -1
                    stores[term.stored] |= bit if whole < 0 else 1 << whole
            elif stored[value] < 0:
                missing.append((step, value))
            else:
                whole = index.whole[value] if guided[stored[value]] else -1
                stores[stored[value]] |= bit if whole < 0 else 1 << whole
            if index.base[value] >= 0:
                needed |= 1 << index.base[value]
        if computed or reads:
            launches.append(Need(step, computed, reads, stores[step], predicts[step], assignment.denoiser))
    launches.reverse()
    slots = _slots(numbering, [launch.step for launch in launches if launch.predicts])
    return Demand(tuple(launches), numbering.stored, slots, tuple(sorted(missing)), numbering.forecasts, guided)


def _new_predictions(numbering: Numbering, assignments: Sequence[Assignment], used: Sequence[bool]) -> list[bool]:
    """Whether each evaluation makes a prediction: if any used one has its number, and the last one made has another.

    One that was made before the last, as where guided evaluations and others take turns, is made again: what has no
    launch repeats the last prediction, for everyone who reads a launch list.
    """
    used_numbers = {number for number, use in zip(numbering.prediction, used, strict=True) if use}
    last: int | None = None
    predicts = []
    for number, assignment in zip(numbering.prediction, assignments, strict=True):
        predicts.append(assignment.predict or (number in used_numbers and number != last))
        if predicts[-1]:
            last = number
    return predicts


def _slots(numbering: Numbering, steps: Sequence[int]) -> tuple[int, ...]:
    """Slot of each evaluation's prediction: the last that was made; also for one never made, which has no weight."""
    slots, latest = [], 0
    slot_of = {step: slot for slot, step in enumerate(steps)}
    for step in range(len(numbering.prediction)):
        latest = slot_of.get(step, latest)
        slots.append(latest)
    return tuple(slots)
