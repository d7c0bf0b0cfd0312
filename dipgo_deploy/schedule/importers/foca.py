"""FoCa (arXiv 2508.16211) as cache-dit has it: a recursion over computed and estimated values.

An estimate goes from the last computed value along the mean of two slopes: that between the last two computed values,
and that between the last two of all, estimates among them; for at most three steps' worth, and behind that ever less of
it. The second slope makes each estimate depend on those before it, and so on all values that were computed, ever less.
"""

from __future__ import annotations

from collections.abc import Sequence

from dipgo_deploy.schedule.importers.linear import Value, total

_HORIZON = 3.0


def reads(computed: Sequence[bool]) -> list[Value]:
    """What stands for each evaluation."""
    values: list[Value] = []
    full: list[int] = []  # computed evaluations
    last: Value | None = None
    before: Value | None = None
    for step, run in enumerate(computed):
        if run:
            full.append(step)
            last, before = {step: 1.0}, last
            values.append(last)
            continue
        if len(full) < 2 or last is None or before is None:
            values.append({full[-1]: 1.0} if full else {})
            continue
        anchor: Value = {full[-1]: 1.0}
        slopes = total((1.0, anchor), (-1.0, {full[-2]: 1.0}), (1.0, last), (-1.0, before))
        elapsed = float(step - full[-1])
        # Beyond the horizon the whole way is taken in the share that the horizon has of the distance.
        length = elapsed if elapsed <= _HORIZON else _HORIZON * _HORIZON / elapsed
        estimate = total((1.0, anchor), (length / 2, slopes))
        last, before = estimate, last
        values.append(estimate)
    return values
