"""Value numbering over the steps: which values are new, which are what they were. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipgo_deploy.plan.index import GraphIndex


@dataclass(frozen=True)
class Assignment:
    """What one evaluation is asked to do: by the schedule, and by whoever wants two evaluations to share a variant.

    Attributes:
        gates: mask of the blocks that the evaluation keeps.
        compute: mask of kept values to compute even when they are what the cache holds already.
        need: mask of values to make available even when nothing uses them.
        predict: make a new prediction even when nothing uses it.
    """

    gates: int
    compute: int = 0
    need: int = 0
    predict: bool = False


@dataclass(frozen=True)
class Numbering:
    """Per step: what is computed and what the caches hold.

    Attributes:
        computed: mask of the values that this evaluation computes, if it needs them; the other block outputs come from
            their cache.
        stored: per value, the evaluation whose store a read at this evaluation would get, or -1 if there is none.
        prediction: number of the noise prediction; equal numbers are equal tensors.
    """

    computed: tuple[int, ...]
    stored: tuple[tuple[int, ...], ...]
    prediction: tuple[int, ...]


def number_values(index: GraphIndex, assignments: Sequence[Assignment]) -> Numbering:
    """Give every value at every evaluation a number such that equal numbers mean equal tensors.

    A kept block output whose number is the stored one is not computed again: it counts as removed. For a residual
    cache its input must be the stored one too, because ``input + (output - input)`` is only then the output.
    """
    numbers: dict[tuple[int, ...], int] = {}
    count = len(index.names)
    held = [-1] * count  # number of the value at its last computation
    held_source = [-1] * count  # number of what it is a residual of, at that time
    stored = [-1] * count
    computed_rows, stored_rows, predictions = [], [], []
    for step, assignment in enumerate(assignments):
        kept = index.gated(assignment.gates)
        computed = 0
        now: list[int] = []
        for value in range(count):
            base = index.base[value]
            base_now = now[base] if base >= 0 else -1
            if kept >> value & 1:
                moment = step if index.stepwise[value] else -1
                key = (value, moment, *[now[read] for read in index.reads[value]])
                number = numbers.setdefault(key, len(numbers))
                unchanged = index.block[value] >= 0 and number == held[value] and base_now == held_source[value]
                if not unchanged or assignment.compute >> value & 1:
                    computed |= 1 << value
                    held[value], held_source[value], stored[value] = number, base_now, step
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
        predictions.append(now[index.prediction])
    return Numbering(tuple(computed_rows), tuple(stored_rows), tuple(predictions))
