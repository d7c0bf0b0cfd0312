"""Schedules made by rule: full, uniform, DeepCache, random. Each gives T x N gates; evaluation 0 always runs in
full."""

from __future__ import annotations

import random as _random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dipgo_deploy._version import __version__
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.document import (
    BlockEntry,
    Gates,
    ModelIdentity,
    SamplerEntry,
    Schedule,
    denoiser_of,
    gate_rows,
    guidance_row,
)
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.schedule.solver import Rows, Solver, extrapolated

_UNIT = re.compile(r"(?P<side>down|up)_blocks\.(?P<index>\d+)(?P<layer>\..+)?")


@dataclass(frozen=True)
class Target:
    """What a schedule is made for.

    Attributes:
        model: its identity.
        blocks: in order of execution.
        sampler: with its number of steps.
        steps: T, its evaluations of the denoiser.
        timesteps: T numbers, what the denoiser is told at each; empty where it is not known.
        size: extents of the latent that the timesteps are those of, where they depend on it.
        matrix: makes the sampler's matrix.
        embeddings: makes what the model makes of the timesteps alone, (T, D) and (T, any); None where it is not known.
        denoisers: T names, of a model of several: which one the pipeline runs at each evaluation; else empty.
    """

    model: ModelIdentity
    blocks: tuple[BlockEntry, ...]
    sampler: SamplerEntry
    steps: int
    timesteps: tuple[float, ...] = ()
    size: tuple[int, ...] | None = None
    matrix: Callable[[], Rows] | None = None
    embeddings: Callable[[], tuple[Any, Any]] | None = None
    denoisers: tuple[str, ...] = ()

    @property
    def most_steps(self) -> int:
        """Rows that a file may have: one too many is told with the right number."""
        return self.steps + 1

    def complete(self) -> Target:
        """Itself, as a `PendingTarget` gives it."""
        return self

    def extrapolated(
        self,
        launched: Sequence[int],
        weights: Sequence[Sequence[float]],
        provenance: Mapping[str, Any],
        sigmas: Sequence[float] | None = None,
    ) -> Solver:
        """The sampler with predictions in between that are weighted sums of launched ones (``solver.extrapolated``)."""
        if self.matrix is None:
            raise ValueError("this target has no sampler to ask")
        latent = {} if self.size is None else {"latent": list(self.size)}
        return extrapolated(self.matrix(), launched, weights, {**provenance, **latent}, sigmas)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' names in order of execution."""
        return tuple(block.name for block in self.blocks)

    def gates(self, rule: Callable[[int, int], Gates]) -> Gates:
        """The T x N gates of a rule, which gives them for so many evaluations and blocks: each denoiser follows it by
        itself, from its own first evaluation on."""
        of_block = [denoiser_of(name) if self.denoisers else "" for name in self.block_names]
        at = self.denoisers or ("",) * self.steps
        cells: dict[tuple[int, int], bool] = {}
        for denoiser in dict.fromkeys(at):
            steps = [step for step, name in enumerate(at) if name == denoiser]
            blocks = [block for block, name in enumerate(of_block) if name == denoiser]
            for step, row in zip(steps, rule(len(steps), len(blocks)), strict=True):
                cells.update({(step, block): kept for block, kept in zip(blocks, row, strict=True)})
        everything = range(len(self.blocks))
        return tuple(tuple(cells.get((step, block), False) for block in everything) for step in range(self.steps))

    def schedule(self, gates: Sequence[Sequence[bool]], method: str, parameters: Mapping[str, Any]) -> Schedule:
        """The document for these gates (T x N), with how they were made as its provenance. Blocks of a denoiser that an
        evaluation does not run are not kept there, whatever their gates say."""
        several: dict[str, Any] = {}
        keep = gate_rows(gates)
        if self.denoisers:
            several = {"denoisers": self.denoisers, "format_version": 4}
            names = self.block_names
            validation.check_rows(keep, names, self.steps)
            keep = tuple(
                "".join(cell if denoiser_of(name) == denoiser else "0" for name, cell in zip(names, row, strict=True))
                for denoiser, row in zip(self.denoisers, keep, strict=True)
            )
        return Schedule(
            **several,
            model=self.model,
            blocks=self.blocks,
            steps=self.steps,
            keep=keep,
            sampler=self.sampler,
            provenance={"method": method, "parameters": dict(parameters), "tool_version": __version__},
        )


@dataclass(frozen=True)
class PendingTarget:
    """A `Target` for which the sampler has yet to be made, which takes seconds: a file is read before.

    Attributes:
        block_names: in order of execution.
        most_steps: more evaluations than any sampler makes.
        complete: makes the sampler.
    """

    block_names: tuple[str, ...]
    most_steps: int
    complete: Callable[[], Target]


def with_guidance(
    schedule: Schedule, guidance: Sequence[float], parameters: Mapping[str, Any]
) -> tuple[Schedule, tuple[tuple[int, str], ...]]:
    """A schedule with this guidance, one number an evaluation, and the gates (evaluation, block) that are kept for it:
    guided evaluations whose cache would have no unconditional half compute the block.

    parameters: go into the provenance.

    Raises:
        UserError: as for a document.
    """
    shares = guidance_row(guidance)
    half = [share == 0 for share in guidance]
    gates = [list(row) for row in schedule.gates]
    validation.check_guidance(guidance, schedule.steps)
    lacking = validation.missing_halves(gates, schedule.runs, half)
    for step, block, _ in lacking:
        gates[step][block] = True
    provenance = {**to_json(schedule.provenance), "guidance": dict(parameters)}
    kept = schedule.with_guidance(None).with_gates(gates, provenance)
    names = schedule.block_names
    return kept.with_guidance(shares), tuple((step, names[block]) for step, block, _ in lacking)


def full(steps: int, blocks: int) -> Gates:
    """Everything runs at every evaluation."""
    return ((True,) * blocks,) * steps


def uniform(steps: int, blocks: int, interval: int) -> Gates:
    """Every block runs at evaluations 0, interval, 2*interval, ...; nothing runs in between."""
    _check_interval(interval)
    return tuple((step % interval == 0,) * blocks for step in range(steps))


def deepcache(
    steps: int, names: Sequence[str], interval: int, branch: int, positions: Sequence[int] | None = None
) -> Gates:
    """DeepCache (Ma et al., CVPR 2024) on a UNet: between full evaluations only the shallow branches run.

    Every block runs at evaluations 0, interval, 2*interval, ... . In between, the branches up to ``branch`` run,
    counted from the outermost (0) inwards:

    - layers: exactly what the DeepCache package (0.1.1) computes for ``cache_interval`` and ``cache_branch_id``.
      Branch b is the skip connection of layer l of the p-th pair of down block p and up block n-1-p, where b counts the
      layers of the up blocks, outermost pair first. SD-1.5 has 3 a pair, so p = b // 3, l = b % 3; the package takes
      that for granted, so for a UNet with another number its ``cache_branch_id`` is 3 p + l. What runs: the pairs
      outside p whole; of down block p the layers before l; of up block n-1-p its last l + 1 layers, the upsampler
      belonging to the last one.
    - whole blocks: branch p is the p-th pair. What runs: the pairs outside p whole, and up block n-1-p: the smallest
      set of whole blocks that contains DeepCache's branch for (p, l = 0).

    names: the blocks in order of execution. positions: the number that stands for each evaluation in place of its own
    (T ints, as ``dipgo_deploy.sampler.step_positions`` gives them): the package goes by the first evaluation of the
    same timestep, which is another one for samplers that evaluate a timestep twice (PNDM, Heun). Raises UserError for a
    model without down and up blocks.
    """
    _check_interval(interval)
    counted = range(steps) if positions is None else positions
    if len(counted) != steps:
        raise ValueError(f"{len(counted)} positions for {steps} evaluations")
    return shallow_between([position % interval == 0 for position in counted], names, branch)


def shallow_between(full: Sequence[bool], names: Sequence[str], branch: int) -> Gates:
    """DeepCache with these full evaluations (T); ``names`` and ``branch`` as for ``deepcache``."""
    shallow = _shallow_blocks(names, branch)
    return tuple(tuple(whole or name in shallow for name in names) for whole in full)


def random(steps: int, blocks: int, ratio: float, seed: int, costs: Sequence[float] | None = None) -> Gates:
    """Gates removed at random, never at evaluation 0.

    ratio: share of the cost of all T x N gates that is removed, 0 to 1 (0.8 removes 80 %), met from below: gates go in
    a random order, each that would exceed the ratio is kept. costs: cost of each block (N numbers, e.g. its MACs);
    None counts gates. The same arguments give the same gates on every machine and Python version. Raises UserError
    when the ratio cannot be reached because evaluation 0 stays.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio: {ratio:g} is not between 0 and 1")
    weights = [1.0] * blocks if costs is None else [float(cost) for cost in costs]
    budget = ratio * steps * sum(weights)
    removable = (steps - 1) * sum(weights)
    slack = 1e-9 * max(budget, 1.0)
    if budget > removable + slack:
        raise UserError(
            f"ratio: {ratio:g} cannot be reached: evaluation 0 runs in full, so at most "
            f"{removable / (steps * sum(weights)):.4g} can be removed in {steps} steps"
        )
    # Only Random.random() is promised to give the same numbers in every Python version, so the order comes from it.
    source = _random.Random(seed)
    cells = sorted((source.random(), step, block) for step in range(1, steps) for block in range(blocks))
    gates = [[True] * blocks for _ in range(steps)]
    removed = 0.0
    for _, step, block in cells:
        if removed + weights[block] <= budget + slack:
            removed += weights[block]
            gates[step][block] = False
    return tuple(tuple(row) for row in gates)


def _check_interval(interval: int) -> None:
    if interval < 1:
        raise UserError(f"interval: {interval} is less than 1")


def _shallow_blocks(names: Sequence[str], branch: int) -> frozenset[str]:
    """The blocks that run at every evaluation, for DeepCache's ``branch``."""
    down: dict[int, list[str]] = {}
    up: dict[int, list[str]] = {}
    whole = True
    for name in names:
        match = _UNIT.fullmatch(name)
        if match is None:
            continue
        whole = whole and match["layer"] is None
        (down if match["side"] == "down" else up).setdefault(int(match["index"]), []).append(name)
    if not down or len(down) != len(up):
        raise UserError("deepcache: this model has no pairs of down and up blocks: it is for UNets only")
    # Pairs from the outermost inwards; in each, the up block's layers from the last one to the first.
    pairs = [(down[index], up[len(up) - 1 - index][::-1]) for index in sorted(down)]
    branches = [(pair, layer) for pair, (_, ups) in enumerate(pairs) for layer in range(len(ups))]
    if not 0 <= branch < len(branches):
        raise UserError(f"branch: {branch} is not one of this model's branches 0 to {len(branches) - 1}")
    last, layer = branches[branch]
    shallow = {name for downs, ups in pairs[:last] for name in (*downs, *ups)}
    shallow.update(pairs[last][0][: 0 if whole else layer], pairs[last][1][: layer + 1])
    return frozenset(shallow)
