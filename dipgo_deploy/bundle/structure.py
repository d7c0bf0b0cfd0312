"""What the launch list of a manifest has to satisfy, whoever wrote it: pure functions, no file is read.

A launch list that passes reads nothing that was not written before it with the same shape and type, overwrites nothing
that is read later, and keeps inside its buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dipgo_deploy.bundle.manifest import Graph, LaunchEntry, Manifest, PlanEntry, TensorSpec, VariantEntry
from dipgo_deploy.bundle.names import (
    COEFFICIENTS,
    FORECAST,
    GUIDANCE_SCALES,
    HISTORY,
    HISTORY_BEFORE,
    PREDICTION,
    TIMESTEP,
    is_run_row,
    is_table,
    is_weighted,
)
from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.buffers import ALIGNMENT
from dipgo_deploy.schedule.guidance import HALVES, Half
from dipgo_deploy.schedule.validation import MAX_GUIDANCE

# No sampler's weights, and no timestep, come near these.
MOST_WEIGHT = 1e6
MOST_TIMESTEP = 1e6
# Bytes of one buffer; what is larger is not meant.
MOST_BYTES = 2**40
MOST_DIMENSIONS = 16


class StructureError(ValueError):
    """What is wrong with a launch list, in one line."""


def check_structure(manifest: Manifest) -> None:
    """Refuse a manifest whose launches cannot be right.

    Raises:
        UserError: one line that names the launch, variant or field.
    """
    try:
        _check(manifest)
    except StructureError as error:
        raise UserError(f"{error}; export the engine directory again") from None


def _check(manifest: Manifest) -> None:
    plan = manifest.plan
    _check_counts(plan)
    halves = plan.halves
    for spec in manifest.conditions:
        _check_shape("conditions", spec)
        whole = len(halves) == 1 or (bool(spec.shape) and spec.shape[0] % len(halves) == 0)
        _require(whole, f"conditions: {spec.name} has no two halves, and launches have one each")
    for where, graph in _graphs(manifest):
        _check_graph(where, graph)
    components = manifest.components
    for what, chunks, graphs in (
        ("vae_chunks", components.vae_chunks, components.decoders),
        ("vae_encoder_chunks", components.vae_encoder_chunks, components.encoders),
    ):
        strange = [chunk.graph for chunk in chunks if chunk.graph >= len(graphs)]
        _require(not strange, f"{what}: there is no graph {strange[:1]}")
    latent = manifest.latent
    sample = (manifest.batch, *latent.shape)
    _require(min(sample) >= 1, f"latent: {sample} has an extent below 1")
    for variant in plan.variants:
        _check_variant(manifest, variant, sample)
    _check_rows(manifest)
    _check_weights("final", plan.final, plan.slots)
    written: set[int] = _given_slots(plan)
    arena = _Arena(plan.arena_bytes)
    step = -1
    for index, launch in enumerate(plan.launches):
        where = f"launch {index}"
        _require(0 <= launch.variant < len(plan.variants), f"{where}: there is no variant {launch.variant}")
        _require(launch.step >= step, f"{where}: evaluation {launch.step} comes after evaluation {step}")
        step = launch.step
        _check_denoiser(where, manifest, launch)
        _check_half(where, launch, plan.variants[launch.variant], halves)
        _check_launch(where, plan, launch, plan.variants[launch.variant], written, arena)
    _require(step < plan.evaluations, f"launches: evaluation {step} of {plan.evaluations}")
    for slot, weight in enumerate(plan.final):
        _require(not weight or slot in written, f"final: reads slot {slot}, which nothing writes")
    unwritten = set(range(plan.history.chain - plan.spare)) - written
    _require(not unwritten, f"slots: nothing writes {sorted(unwritten)}")
    spare = set(range(plan.history.chain - plan.spare, plan.history.chain)) & written
    _require(not spare, f"slots: {sorted(spare)} is written, and said to be spare")


def _check_counts(plan: PlanEntry) -> None:
    _require(bool(plan.variants) and bool(plan.launches), "plan: has no variants or no launches")
    _require(plan.slots >= 1 and plan.noises >= 0, f"plan: {plan.slots} slots, {plan.noises} noises")
    behind = plan.noises + (plan.image_slot is not None)
    _require(plan.slots - behind >= 1, f"plan: {plan.slots} slots with {behind} for pictures and noises")
    chain = plan.slots - behind
    _require(plan.spare < chain, f"plan: {plan.spare} of {plan.slots} slots are spare")
    _require(plan.image_slot in (None, chain), f"plan: image_slot {plan.image_slot}, it belongs at {chain}")
    _require(0 <= plan.arena_bytes <= MOST_BYTES, f"plan: an arena of {plan.arena_bytes} bytes")
    _require(plan.evaluations >= 1, f"plan: {plan.evaluations} evaluations")
    used = {launch.variant for launch in plan.launches}
    idle = [variant.name for place, variant in enumerate(plan.variants) if place not in used]
    _require(not idle, f"plan: no launch runs {', '.join(idle[:3])}")


def _graphs(manifest: Manifest) -> Iterator[tuple[str, Graph]]:
    components = manifest.components
    for variant in manifest.plan.variants:
        yield f"variant {variant.name}", variant.graph
    if manifest.plan.prologue is not None:
        yield "prologue", manifest.plan.prologue
    if components.text_encoder is not None:
        yield "text_encoder", components.text_encoder.graph
    for graph in components.decoders:
        yield "vae_decoder", graph
    for graph in components.encoders:
        yield "vae_encoder", graph
    if components.image_encoder is not None:
        yield "image_encoder", components.image_encoder


def _check_graph(where: str, graph: Graph) -> None:
    names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
    _require(len(set(names)) == len(names), f"{where}: an input or output is named twice")
    for spec in (*graph.inputs, *graph.outputs):
        _check_shape(where, spec)
        _require(spec.nbytes <= MOST_BYTES, f"{where}: {spec.name} would take {spec.nbytes} bytes")


def _check_shape(where: str, spec: TensorSpec) -> None:
    """Before anything is multiplied: products of a long hostile list take for ever."""
    _require(len(spec.shape) <= MOST_DIMENSIONS, f"{where}: {spec.name} has {len(spec.shape)} dimensions")
    right = all(0 <= extent <= MOST_BYTES for extent in spec.shape)
    _require(right, f"{where}: {spec.name} has the shape {str(spec.shape)[:100]}")


def _check_variant(manifest: Manifest, variant: VariantEntry, sample: tuple[int, ...]) -> None:
    where = f"variant {variant.name}"
    inputs = {spec.name: spec for spec in variant.graph.inputs}
    outputs = {spec.name: spec for spec in variant.graph.outputs}
    _require(set(variant.reads) <= inputs.keys(), f"{where}: reads what is no input of its graph")
    _require(set(variant.writes) <= outputs.keys(), f"{where}: writes what is no output of its graph")
    _require(len(set(variant.reads)) == len(variant.reads), f"{where}: reads one input twice")
    _require(len(set(variant.writes)) == len(variant.writes), f"{where}: writes one output twice")
    conditions = {spec.name: spec for spec in manifest.conditions}
    known = {HISTORY, HISTORY_BEFORE, COEFFICIENTS, TIMESTEP, FORECAST, *GUIDANCE_SCALES, *variant.reads, *conditions}
    tables = {name for name in inputs if is_table(name)} if manifest.plan.table_timesteps else set()
    strange = sorted(inputs.keys() - known - tables - {name for name in inputs if is_run_row(name)})
    _require(not strange, f"{where}: nothing fills its input {', '.join(strange[:3])}")
    lost = sorted(outputs.keys() - {PREDICTION, *variant.writes})
    _require(not lost, f"{where}: nothing takes its output {', '.join(lost[:3])}")
    _require(variant.predicts == (PREDICTION in outputs), f"{where}: predicts is {variant.predicts}")
    _require((HISTORY in inputs) == (COEFFICIENTS in inputs), f"{where}: has the history without its weights")
    weighted = any(map(is_weighted, variant.reads))
    _require(not weighted or FORECAST in inputs, f"{where}: reads stored values without their weights")
    slots, halves = manifest.plan.slots, len(manifest.plan.halves)
    wanted = {
        HISTORY: (slots, *sample),
        HISTORY_BEFORE: (slots, *sample),
        COEFFICIENTS: (slots,),
        PREDICTION: sample,
        FORECAST: (weighted_reads(variant),),
        **{name: rows_shape(spec, halves) for name, spec in conditions.items()},
    }
    for name, spec in (*inputs.items(), *outputs.items()):
        shape = wanted.get(name, spec.shape)
        _require(spec.shape == shape, f"{where}: {name} has the shape {spec.shape}, not {shape}")
        if name in conditions:
            _require(spec.dtype == conditions[name].dtype, f"{where}: {name} is {spec.dtype}")


def _check_rows(manifest: Manifest) -> None:
    """Rows of tables and of what is made at the start of a run."""
    plan, conditions = manifest.plan, {spec.name: spec for spec in manifest.conditions}
    rows: dict[str, TensorSpec] = {}
    for variant in plan.variants:
        for spec in variant.graph.inputs:
            if is_table(spec.name) or is_run_row(spec.name):
                other = rows.setdefault(spec.name, spec)
                same = (other.shape, other.dtype) == (spec.shape, spec.dtype)
                _require(same, f"variant {variant.name}: {spec.name} is not what it is elsewhere")
    labels = [spec for spec in manifest.conditions if spec.source == "class"]
    _require(not plan.table_classes or bool(labels), "table_classes: the model takes no classes")
    _require(len(set(plan.table_classes)) == len(plan.table_classes), "table_classes: a class stands twice")
    made = {}
    if plan.prologue is not None:
        made = {spec.name: spec for spec in plan.prologue.outputs}
        strange = sorted(name for name in made if not is_run_row(name))
        _require(not strange, f"prologue: nothing takes its output {', '.join(strange[:3])}")
        own = any(launch.guidance != 1 for launch in plan.launches)
        for spec in plan.prologue.inputs:
            scale = spec.name in GUIDANCE_SCALES
            _require(not (scale and own), f"prologue: takes {spec.name}, of which launches have their own")
            if not scale:
                wanted = conditions.get(spec.name)
                _require(wanted is not None, f"prologue: nothing fills its input {spec.name}")
                same = wanted is not None and (rows_shape(wanted, len(plan.halves)), wanted.dtype) == (
                    spec.shape,
                    spec.dtype,
                )
                _require(same, f"prologue: {spec.name} is not what the conditions say")
    for name, spec in rows.items():
        if not is_run_row(name):
            continue
        if name in made:
            shapes = (spec.shape, (len(plan.table_timesteps), *spec.shape))
            right = made[name].shape in shapes and made[name].dtype == spec.dtype
            _require(right, f"prologue: {name} is {made[name].dtype} {made[name].shape}, graphs take {spec.shape}")
        else:
            _require(bool(plan.table_classes), f"variant: nothing fills its input {name}")
            (images,) = rows_shape(labels[0], len(plan.halves))
            second = any(launch.reads_second_halves for launch in plan.launches)
            counts = (images, images // 2) if second else (images,)
            _require(spec.shape[:1] in {(count,) for count in counts}, f"variant: {name} has the shape {spec.shape}")


def rows_shape(spec: TensorSpec, halves: int) -> tuple[int, ...]:
    """The shape of a condition as launches take it: all rows (1), or those of one half of guidance (2)."""
    return (spec.shape[0] // halves, *spec.shape[1:]) if spec.shape else ()


def weighted_reads(variant: VariantEntry) -> int:
    """How many of a graph's reads have a weight of the launch: those of a forecast, or of a weighted sum all."""
    return sum(map(is_weighted, variant.reads)) or len(variant.reads)


def _given_slots(plan: PlanEntry) -> set[int]:
    """Slots that are filled before the first launch."""
    return {0, *range(plan.history.chain, plan.slots)}


def _check_denoiser(where: str, manifest: Manifest, launch: LaunchEntry) -> None:
    """A launch's denoiser is one of the model's, and its graph takes no other's guidance scale."""
    count = max(1, len(manifest.model.denoisers))
    _require(count <= len(GUIDANCE_SCALES), f"model.denoisers: {count}, more than {len(GUIDANCE_SCALES)}")
    _require(0 <= launch.denoiser < count, f"{where}: there is no denoiser {launch.denoiser}")
    taken = {spec.name for spec in manifest.plan.variants[launch.variant].graph.inputs} & set(GUIDANCE_SCALES)
    own = GUIDANCE_SCALES[launch.denoiser]
    _require(taken <= {own}, f"{where}: its graph takes {', '.join(sorted(taken))}, its denoiser has {own}")
    right = math.isfinite(launch.guidance) and 0 <= launch.guidance <= MAX_GUIDANCE
    _require(right, f"{where}: {launch.guidance} is no share of the guidance")
    _require(manifest.guidance or launch.guidance == 1, f"{where}: has guidance, the engine directory has none")
    _require(not taken or launch.guidance != 0, f"{where}: is conditional only, and its graph takes {own}")


def _guides(launch: LaunchEntry, variant: VariantEntry) -> bool:
    """Whether a launch makes the guided prediction of those of the two halves."""
    return launch.half is None and set(variant.reads) == {*HALVES}


def _check_half(where: str, launch: LaunchEntry, variant: VariantEntry, halves: Sequence[Half | None]) -> None:
    """A launch has one of the plan's halves of guidance, or guides."""
    guides = _guides(launch, variant)
    _require(guides or launch.half in halves, f"{where}: says nothing of which half of guidance it has")
    alone = launch.guidance == 0 and (guides or launch.half == HALVES[0])
    _require(not alone, f"{where}: is conditional only, and has the other half")


def _check_launch(
    where: str, plan: PlanEntry, launch: LaunchEntry, variant: VariantEntry, written: set[int], arena: _Arena
) -> None:
    inputs = {spec.name: spec for spec in variant.graph.inputs}
    outputs = {spec.name: spec for spec in variant.graph.outputs}
    where = f"{where} ({variant.name})"
    _require(
        math.isfinite(launch.timestep) and 0 <= launch.timestep <= MOST_TIMESTEP,
        f"{where}: {launch.timestep} is no timestep",
    )
    tabled = launch.timestep in plan.table_timesteps or not any(is_table(name) or is_run_row(name) for name in inputs)
    _require(tabled, f"{where}: there is no row of tables for its timestep {launch.timestep}")
    if HISTORY in inputs:
        _check_weights(where, launch.coefficients, plan.slots)
        for slot, weight in enumerate(launch.coefficients):
            _require(not weight or slot in written, f"{where}: reads slot {slot}, which is not written yet")
    else:
        _require(not launch.coefficients, f"{where}: has weights for a history that its graph does not take")
    _check_weights(where, launch.forecast, weighted_reads(variant) if FORECAST in inputs else 0, "stored values")
    _require(len(launch.reads) == len(variant.reads), f"{where}: {len(launch.reads)} offsets to read from")
    _require(len(launch.writes) == len(variant.writes), f"{where}: {len(launch.writes)} offsets to write to")
    guides = _guides(launch, variant)
    second = launch.reads_second_halves
    reads = []
    for name, offset in zip(variant.reads, launch.reads, strict=True):
        of = name if guides else launch.half
        reads.append(arena.read(where, offset, inputs[name], of, second_half=second))
    spans: list[tuple[int, int]] = []
    written_to = [*zip(variant.writes, launch.writes, strict=True)]
    if launch.passes is not None:
        _require(variant.predicts and launch.half is not None, f"{where}: passes on what it does not predict")
        written_to.append((PREDICTION, launch.passes))
    for name, offset in written_to:
        span = arena.span(where, offset, outputs[name])
        taken = next((other for other in (*reads, *spans) if _meet(span, other)), None)
        _require(taken is None, f"{where}: writes bytes {span[0]} to {span[1]}, which it reads or writes as well")
        spans.append(span)
        arena.write(span, outputs[name], launch.half)
    if variant.predicts and launch.passes is None:
        slot = -1 if launch.slot is None else launch.slot
        _require(1 <= slot < plan.history.chain, f"{where}: its prediction has no slot ({launch.slot})")
        # The sum over the history takes differences of neighbours, so predictions come in the order of their slots.
        _require(slot == _filled(written), f"{where}: writes slot {slot}, the next one is {_filled(written)}")
        written.add(slot)
    else:
        _require(launch.slot is None, f"{where}: slot {launch.slot} without a prediction")


def _filled(written: set[int]) -> int:
    """The first slot of the chain that is not written yet."""
    slot = 0
    while slot in written:
        slot += 1
    return slot


@dataclass(frozen=True)
class _Written:
    span: tuple[int, int]
    shape: tuple[int, ...]
    dtype: str
    of: str | None = None


class _Arena:
    """What lies where in the arena after the launches so far."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._written: dict[int, _Written] = {}

    def span(self, where: str, offset: int, spec: TensorSpec, *, aligned: bool = True) -> tuple[int, int]:
        """First byte and the one after the last. aligned: as the start of what was written is."""
        end = offset + spec.nbytes
        _require(offset >= 0 and end <= self._nbytes, f"{where}: {spec.name} at {offset} is outside the arena")
        right = not aligned or offset % ALIGNMENT == 0
        _require(right, f"{where}: {spec.name} at {offset} is not aligned to {ALIGNMENT} bytes")
        return offset, end

    def read(
        self, where: str, offset: int, spec: TensorSpec, of: str | None, *, second_half: bool = False
    ) -> tuple[int, int]:
        """What is read, which has to be what was written, or (second_half) the second half of its rows. of: the half of
        guidance that has to have written it."""
        span = self.span(where, offset, spec, aligned=not second_half)
        there = self._written.get(offset) or (self._second_half(span) if second_half else None)
        _require(there is not None, f"{where}: reads {spec.name} at {offset}, where nothing was written")
        assert there is not None
        found, wanted = (there.shape, there.dtype), (spec.shape, spec.dtype)
        _require(found == wanted, f"{where}: reads {spec.name} as {wanted}, written was {found}")
        _require(there.of == of, f"{where}: reads {spec.name} of the half {of}, written was that of {there.of}")
        return span

    def _second_half(self, span: tuple[int, int]) -> _Written | None:
        """What was written there as the conditional half of a cache."""
        for other in self._written.values():
            rows = other.shape[0] if other.shape else 0
            if rows % 2 == 0 and rows and span == (sum(other.span) // 2, other.span[1]):
                return _Written(span, (rows // 2, *other.shape[1:]), other.dtype)
        return None

    def write(self, span: tuple[int, int], spec: TensorSpec, of: str | None) -> None:
        for offset in [offset for offset, other in self._written.items() if _meet(span, other.span)]:
            del self._written[offset]
        self._written[span[0]] = _Written(span, spec.shape, spec.dtype, of)


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _check_weights(where: str, weights: Sequence[float], count: int, of: str = "slots") -> None:
    _require(len(weights) == count, f"{where}: {len(weights)} weights for {count} {of}")
    absurd = next((weight for weight in weights if not abs(weight) <= MOST_WEIGHT), None)
    _require(absurd is None, f"{where}: the weight {absurd} is not finite or beyond {MOST_WEIGHT:g}")


def _require(right: bool, message: str) -> None:
    if not right:
        raise StructureError(message)
