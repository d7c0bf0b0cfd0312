"""What the compiler's middle produces: variants, launches and the cache arena. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dipgo_deploy.plan.graph import CacheKind
from dipgo_deploy.schedule.guidance import Half


class Cache(NamedTuple):
    """One cache tensor: the last computed ``output`` of a value, or its last ``residual`` (output - input).

    nth: 0 for one that is read as it is, or written; of a forecast the n-th last stored one, read with a weight.
    """

    value: str
    kind: CacheKind
    nth: int = 0


@dataclass(frozen=True)
class Variant:
    """One static graph: what is computed, which caches are read, which are written.

    Attributes:
        computed: named values computed by their own nodes (the prediction included when ``predicts``).
        reads, writes: caches in sorted order; reads become graph inputs, writes graph outputs.
        macs: multiply-accumulates of a launch.
        prediction: of a variant that predicts, the value that it is.
        guides: whether it makes the guided prediction of the two halves', its inputs ``HALVES``, and nothing else.
    """

    name: str
    computed: frozenset[str]
    reads: tuple[Cache, ...]
    writes: tuple[Cache, ...]
    predicts: bool
    macs: int
    prediction: str = ""
    guides: bool = False


@dataclass(frozen=True)
class Launch:
    """One run of a variant.

    Attributes:
        step: evaluation index 0..T-1.
        variant: index into ``Plan.variants``.
        reads, writes: byte offsets into the cache arena, in the order of the variant's reads and writes; no write
            overlaps a read of the same launch.
        prediction: slot of the prediction that this launch makes (0, 1, ...), or None when it only refreshes caches.
        weights: of the reads that have one, in their order; a variant that several launches share may read more stored
            values than a launch needs, which then have the weight zero and the offset of the last one.
        half: of guidance, where its halves are launched one after the other.
        passes: where in the arena its prediction goes, for the launch that makes the guided one.
    """

    step: int
    variant: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    prediction: int | None
    weights: tuple[float, ...] = ()
    half: Half | None = None
    passes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Variants, launches in order, and where each cache lives.

    Attributes:
        keep: the T x N gates that are run (after promotion).
        prediction_slots: per evaluation, the prediction slot that the sampler is given.
        arena_bytes: size of the one cache buffer.
        lower_bound_bytes: the most cache bytes alive at one launch, which no allocation can beat.
        macs_full: of one full evaluation; where denoisers differ, the mean over all evaluations.
        macs_schedule: of a run that skips exactly what the schedule removes, launch or not, dead computation included.
        macs_run: of the launches.
        promoted: (step, block name) of each gate re-enabled to meet ``max_variants``.
    """

    keep: tuple[tuple[bool, ...], ...]
    variants: tuple[Variant, ...]
    launches: tuple[Launch, ...]
    prediction_slots: tuple[int, ...]
    arena_bytes: int
    lower_bound_bytes: int
    macs_full: int
    macs_schedule: int
    macs_run: int
    promoted: tuple[tuple[int, str], ...] = ()
