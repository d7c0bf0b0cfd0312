"""What gates cost, and which of them do anything: read off the traced block graph by the plan's own analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.index import index_graph
from dipgo_deploy.plan.live import Demand, demand
from dipgo_deploy.plan.model import Plan
from dipgo_deploy.plan.values import Assignment
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.schedule.forecast import Reads
from dipgo_deploy.search.halves import joined, parted

_REMEMBERED = 20_000


@dataclass(frozen=True)
class Analysis:
    """What is left of gates (T rows of `Costs.width`) when nothing without effect is computed.

    Attributes:
        gates: the gates that do something; the first evaluation whole.
        kept: those of blocks, T x N; ``gates`` has no others unless halves of guidance are gates.
        guidance: per evaluation, how much it has of it.
        cost: of all launches.
        launches: the evaluations at which something is computed.
        prediction_slots: per evaluation, the number of the prediction that its sampler is given; evaluations with the
            same number have the same prediction.
        predicts: the evaluations that make a new prediction, in the order of the numbers.
    """

    gates: Gates
    kept: Gates
    guidance: tuple[float, ...]
    cost: int
    launches: frozenset[int]
    prediction_slots: tuple[int, ...]
    predicts: tuple[int, ...]


class Costs:
    """Costs of gates of one traced model, in the unit of its graph's ``costs`` (multiply-accumulates).

    full: cost of the full run that ratios are shares of. own_full: of T full evaluations, the same unless another run
    is the reference. gamma: per block, the share of one full evaluation that goes when the block goes at one
    evaluation, together with all that is then computed for nothing (DiP-GO's weight of a gate). own: per block, the
    share of its own nodes. width: gates in a row.
    """

    def __init__(
        self,
        graph: BlockGraph,
        steps: int,
        used: Sequence[bool] | None = None,
        *,
        reference_steps: int | None = None,
        forecast: Reads | None = None,
        guidance: Sequence[float] | None = None,
        guidance_gates: bool = False,
    ) -> None:
        """Take the graph, T, and per evaluation whether the sampler gives its prediction any weight (default: all).

        reference_steps: full evaluations of the run that ratios are shares of, None for T. forecast: what removed
        blocks read; the analysis then leaves gates as they are, because what is stored decides what is read. guidance:
        per evaluation, how much it has of it (default: all); 0 costs half. guidance_gates: it is searched instead: a
        row has one gate more, the last, for the unconditional half (see ``halves``). gamma and own have it, too.
        """
        self.forecast, self.guidance_gates = forecast, guidance_gates
        self.guidance = tuple(guidance or (1.0,) * steps)
        if guidance_gates or 0 in self.guidance:
            graph = graph.with_halves()
        self.graph, self.steps = graph, steps
        self.blocks = tuple(block.name for block in graph.schedule_blocks)
        self.width = len(self.blocks) + guidance_gates
        self._index = index_graph(graph)
        self._used = tuple(used) if used is not None else (True,) * steps
        self._known: dict[tuple[int, ...], Analysis] = {}
        self.step_cost = self._index.costs.macs(self._index.gated((1 << len(self.blocks)) - 1))
        self.own_full = steps * self.step_cost
        self.full = self.own_full if reference_steps is None else reference_steps * self.step_cost
        if self.full <= 0:
            raise ValueError("the graph has no cost: it cannot be pruned by it")
        outputs, count = self._index.outputs, len(self.blocks)
        # What says that an evaluation computes a block, guided or conditional only.
        self._outputs = tuple(
            mask | (outputs[count + place] if graph.halves else 0) for place, mask in enumerate(outputs[:count])
        )
        self.gamma = tuple(1 - self._cost_without(gate) / self.step_cost for gate in range(self.width))
        own = tuple(self._index.costs.macs(mask) / self.step_cost for mask in outputs[:count])
        self.own = (*own, *self.gamma[count:])

    def analyse(self, gates: Sequence[Sequence[bool]]) -> Analysis:
        """What is left of ``gates`` (T, `width`); the first evaluation counts as kept whole, whatever it says."""
        rows = ((1 << self.width) - 1, *(_mask(row) for row in gates[1:]))
        if len(rows) != self.steps:
            raise ValueError(f"{len(rows)} rows of gates for {self.steps} steps")
        if rows not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[rows] = self._analysis(*self._asked(rows))
        return self._known[rows]

    def _asked(self, rows: Sequence[int]) -> tuple[Gates, tuple[float, ...]]:
        """Gates of blocks and guidance of masks of gates."""
        gates = tuple(tuple(bool(row >> gate & 1) for gate in range(self.width)) for row in rows)
        return parted(gates) if self.guidance_gates else (gates, self.guidance)

    def _demand(
        self, kept: Gates, guidance: Sequence[float], used: Sequence[bool], forecast: Reads | None = None
    ) -> Demand:
        count = len(self.blocks)
        assignments = [
            Assignment(_mask(row) << count if share == 0 else _mask(row), denoiser=int(share == 0), guidance=share)
            for row, share in zip(kept, guidance, strict=True)
        ]
        return demand(self._index, assignments, used, forecast)

    def ratio(self, gates: Sequence[Sequence[bool]]) -> float:
        """Share of the cost of the reference's full run that ``gates`` save, at most 1."""
        return 1 - self.analyse(gates).cost / self.full

    def clean(self, gates: Sequence[Sequence[bool]]) -> Gates:
        """``gates`` without those that have no effect: removal goes on to all that was computed for removed blocks."""
        return self.analyse(gates).gates

    def limited(self, gates: Sequence[Sequence[bool]], max_variants: int) -> Gates:
        """``gates`` with as many re-enabled as it takes to need at most ``max_variants`` distinct graphs."""
        analysis = self.analyse(gates)
        kept = self._compiled(analysis, max_variants=max_variants).keep
        return joined(kept, analysis.guidance) if self.guidance_gates else kept

    def variants(self, gates: Sequence[Sequence[bool]]) -> int:
        """Number of distinct graphs that ``gates`` need."""
        return len(self._compiled(self.analyse(gates)).variants)

    def _compiled(self, analysis: Analysis, max_variants: int | None = None) -> Plan:
        return compile_plan(
            self.graph,
            analysis.kept,
            max_variants=max_variants,
            prediction_used=list(self._used),
            guidance=analysis.guidance,
        )

    @property
    def whole(self) -> Gates:
        """The gates of the full run."""
        return ((True,) * self.width,) * self.steps

    def patterns(self) -> tuple[tuple[bool, ...], ...]:
        """Rows that make sense of themselves: what is left of an evaluation when one block is removed, most costly
        first.

        For a UNet with output caches these are the shallow paths of DeepCache, from the graph alone. The full and the
        empty row are among them. Where halves of guidance are gates, each is there guided and conditional only.
        """
        count = len(self.blocks)
        full, empty = (True,) * count, (False,) * count
        rows = {full, empty, *(self._row_without(block) for block in range(count))}
        if self.guidance_gates:
            rows = {(*row, half) for row in rows for half in (False, any(row))}
        return tuple(sorted(rows, key=lambda row: (-self._cost_of(row), row)))

    def _cost_of(self, row: Sequence[bool]) -> int:
        """Of the kept blocks, and of what is no block's."""
        macs = self._index.costs.macs(self._index.gated(_mask(row[: len(self.blocks)])))
        return macs // 2 if self.guidance_gates and not row[-1] else macs

    def _analysis(self, asked: Gates, guidance: tuple[float, ...]) -> Analysis:
        index, count = self._index, len(self.blocks)
        demands = self._demand(asked, guidance, self._used, self.forecast)
        rows = [[False] * count for _ in range(self.steps)]
        rows[0] = [True] * count
        for launch in demands.launches:
            for block in range(count):
                if launch.computed & self._outputs[block]:
                    rows[launch.step][block] = True
        kept = asked if self.forecast is not None else tuple(map(tuple, rows))
        gates = kept
        if self.guidance_gates:
            before = guidance
            kept, guidance = parted(joined(kept, guidance))
            if guidance != before:  # of an evaluation of which nothing is left
                return self._analysis(kept, guidance)
            gates = joined(kept, guidance)
        return Analysis(
            gates=gates,
            kept=kept,
            guidance=guidance,
            cost=demands.macs(index),
            launches=frozenset(launch.step for launch in demands.launches),
            prediction_slots=demands.prediction_slots,
            predicts=tuple(launch.step for launch in demands.launches if launch.predicts),
        )

    def _without(self, gate: int) -> Demand:
        """Three evaluations, a block removed at the middle one, or its unconditional half."""
        kept, guidance = [[True] * len(self.blocks) for _ in range(3)], [1.0] * 3
        if gate < len(self.blocks):
            kept[1][gate] = False
        else:
            guidance[1] = 0.0
        return self._demand(tuple(map(tuple, kept)), guidance, (True,) * 3)

    def _cost_without(self, gate: int) -> int:
        return self._without(gate).macs(self._index) - 2 * self.step_cost

    def _row_without(self, block: int) -> tuple[bool, ...]:
        computed = 0
        for launch in self._without(block).launches:
            if launch.step == 1:
                computed = launch.computed
        return tuple(bool(computed & outputs) for outputs in self._outputs)


def latency_graph(graph: BlockGraph, seconds: dict[str, float]) -> BlockGraph:
    """``graph`` with measured time in place of multiply-accumulates: each value costs its own nanoseconds.

    seconds: per value, what its own nodes take; every value has to be in it.
    """
    missing = sorted(set(graph.values) - set(seconds))
    if missing:
        raise UserError(f"latency table: no time for {missing[0]}; measure again")
    names = list(graph.values)
    values = {name: replace(graph.values[name], work=frozenset({place})) for place, name in enumerate(names)}
    return replace(graph, values=values, costs=tuple(max(0, round(seconds[name] * 1e9)) for name in names))


def _mask(row: Sequence[bool]) -> int:
    return sum(1 << block for block, kept in enumerate(row) if kept)
