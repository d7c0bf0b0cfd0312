"""Value numbering over the steps: which values are new, which are what they were. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dipgo_deploy.plan.index import GraphIndex
from dipgo_deploy.schedule.forecast import AS_STORED, MOST_TERMS, Reads


class Term(NamedTuple):
    """A stored value in a weighted sum: its weight, and the evaluation that stored it."""

    weight: float
    stored: int


Terms = tuple[Term, ...]


class _Stored(NamedTuple):
    """A value as a kept block stored it at an evaluation: the evaluation that computed it (an earlier one where it is
    unchanged), its number, and that of what it is a residual of."""

    step: int
    computed: int
    number: int
    source: int


@dataclass(frozen=True)
class Assignment:
    """What one evaluation is asked to do: by the schedule, and by whoever wants two evaluations to share a variant.

    Attributes:
        gates: mask of the blocks that the evaluation keeps; a denoiser's are kept at its own evaluations only.
        compute: mask of kept values to compute even when they are what the cache holds already.
        need: mask of values to make available even when nothing uses them.
        predict: make a new prediction even when nothing uses it.
        denoiser: which of the predictions is the evaluation's.
        guidance: how much guidance a guided one has.
    """

    gates: int
    compute: int = 0
    need: int = 0
    predict: bool = False
    denoiser: int = 0
    guidance: float = 1.0


@dataclass(frozen=True)
class Numbering:
    """Per step: what is computed and what the caches hold.

    Attributes:
        computed: mask of the values that this evaluation computes, if it needs them; the other block outputs come from
            their cache.
        stored: per value, the evaluation whose store a read at this evaluation would get, or -1 if there is none.
        prediction: number of the noise prediction; equal numbers are equal tensors.
        forecasts: the values that are read as another sum than the one that ``stored`` names, if this evaluation reads
            them, the latest value first.
    """

    computed: tuple[int, ...]
    stored: tuple[tuple[int, ...], ...]
    prediction: tuple[int, ...]
    forecasts: tuple[Mapping[int, Terms], ...]


def number_values(index: GraphIndex, assignments: Sequence[Assignment], forecast: Reads | None = None) -> Numbering:
    """Give every value at every evaluation a number such that equal numbers mean equal tensors.

    A kept block output whose number is the stored one is not computed again: it counts as removed. For a residual
    cache its input must be the stored one too, because ``input + (output - input)`` is only then the output.

    What a guided evaluation stores has a conditional half, which is stored, too. What a conditional-only one stores has
    no other half: the guided value, or that of the unconditional half, is not stored any more.
    """
    numbers: dict[tuple[float, ...], int] = {}
    rows: dict[tuple[float, ...], int] = {}
    count, blocks = len(index.names), index.schedule_blocks
    held = [-1] * count  # number of the value at its last computation
    held_source = [-1] * count  # number of what it is a residual of, at that time
    stored = [-1] * count
    alone = [-1] * count  # the last conditional-only evaluation that stored it
    last: list[tuple[_Stored, ...]] = [()] * count  # for forecasts, the latest first
    computed_rows, stored_rows, predictions, forecasts = [], [], [], []

    def half_of(number: int) -> int:
        # No value has this place, so it meets no other key.
        return -1 if number < 0 else numbers.setdefault((count, number), len(numbers))

    for step, assignment in enumerate(assignments):
        kept = index.gated(assignment.gates, assignment.denoiser)
        prediction, guided = index.predictions[assignment.denoiser], index.guided[assignment.denoiser]
        computed = 0
        now: list[int] = []
        terms: dict[int, Terms] = {}
        for value in range(count):
            base = index.base[value]
            base_now = now[base] if base >= 0 else -1
            if kept >> value & 1:
                moment = step if index.stepwise[value] else -1
                # The scale is part of a guided prediction.
                scale = (assignment.guidance,) if value == prediction else ()
                key = (value, moment, *scale, *[now[read] for read in index.reads[value]])
                number = numbers.setdefault(key, len(numbers))
                unchanged = index.block[value] >= 0 and number == held[value] and base_now == held_source[value]
                if not unchanged or assignment.compute >> value & 1:
                    computed |= 1 << value
                    held[value], held_source[value], stored[value] = number, base_now, step
                    if (half := index.half[value]) >= 0:
                        held[half], held_source[half], stored[half] = half_of(number), half_of(base_now), step
                lost = -1 if guided else max(index.whole[value], index.paired[value])
                if lost >= 0:
                    held[lost], held_source[lost], stored[lost], last[lost] = -1, -1, -1, ()
                    alone[value] = step
                for one in (value, index.half[value]) if forecast is not None else ():
                    # What no prediction needs is kept in both forms.
                    if one >= 0 and not (last[one] and last[one][0].step == step):
                        fresh = _Stored(step, stored[one], held[one], held_source[one])
                        last[one] = (fresh, *last[one][: MOST_TERMS - 1])
            elif (
                forecast is not None
                and (known := [one for one in last[value] if not guided or one.step > alone[value]])
                and (weights := forecast.weights_of(step, index.block[value] % blocks, [one.step for one in known]))
                != AS_STORED
            ):
                used = known[: len(weights)]
                terms[value] = tuple(Term(weight, one.computed) for weight, one in zip(weights, used, strict=True))
                which = rows.setdefault(weights, len(rows))
                held_numbers = [number for one in used for number in (one.number, one.source)]
                # One number more than the key of a plain read has at least: they never meet.
                number = numbers.setdefault((~value, base_now, which, *held_numbers), len(numbers))
            elif base_now == held_source[value]:
                # An output cache (both -1), or a residual added to the very input it was taken from. A value that was
                # never stored has no number (-1): reading it is an error that the demand walk reports.
                number = held[value]
            else:
                key = (~value, base_now, held[value], held_source[value])
                number = numbers.setdefault(key, len(numbers))
            now.append(number)
        computed_rows.append(computed)
        stored_rows.append(tuple(stored))
        predictions.append(now[prediction])
        forecasts.append(terms)
    return Numbering(tuple(computed_rows), tuple(stored_rows), tuple(predictions), tuple(forecasts))
