"""Where an engine directory goes wrong: the first evaluation, its graph, a block tensor of it, and then the node.

A graph that is beyond tolerance by itself is held against a reference graph, value by value. Each of its nodes runs on
what the *reference* gives its inputs, so that what is wrong with the result is what this node makes, and not what it
inherits. A graph that is right with optimisations off is wrong on its backend only: then inner values are marked as
outputs there, and the first one beyond tolerance is where it goes wrong. Where the reference graph differs from the
model too, the exporter is at fault: then values are held against what the model's modules give in torch, where names
map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.prologue import prologue_entry
from dipgo_deploy.compare.graphs import OpenGraph, failures_named
from dipgo_deploy.compare.inner import InnerGraph, RunModel, made_name, run_plainly
from dipgo_deploy.compare.metrics import Tolerance, tensor_error
from dipgo_deploy.compare.rows import prologue_inputs, with_rows
from dipgo_deploy.compare.step_runner import StepRunner
from dipgo_deploy.difference import peak
from dipgo_deploy.errors import UserError, one_line

if TYPE_CHECKING:
    import onnx

    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.manifest import VariantEntry
    from dipgo_deploy.reference.recording import Recording
    from dipgo_deploy.reference.steps import StepRecording

Arrays = Mapping[str, np.ndarray]
Sound = Callable[[str], "Bundle"]
"""A dtype -> reference graphs in it: of the same launches, with the same inputs and outputs."""
Modules = Callable[[int], Arrays]
"""An evaluation -> what each module of the model gives at it, by its dotted path."""

# What is held at once of inner values.
_CHUNK_BYTES = 2**30
_MOST_NAMED = 8


@dataclass(frozen=True)
class Located:
    """Where it goes wrong.

    Attributes:
        evaluation, graph: of the first launch that is beyond tolerance by itself; the graph's name.
        tensor: the first of its outputs that is; error: how far, of its largest value.
        inside: ``graph`` (it computes something else than the reference), ``backend`` (it is right with optimisations
            off) or ``exporter`` (it computes what the reference graph does, and not what the model does).
        against: what it was held against.
        value: the inner value that is wrong, None where none is beyond tolerance by itself.
        nodes: what makes it of values that the reference has, in order; names and operators. Of the exporter all nodes
            between those values that the model's modules give too.
        made: error of that value alone, made of the reference's inputs, over its largest value; infinite where it
            cannot be computed or has another shape.
        beyond: whether ``made`` is beyond tolerance. Else no node is by itself, and this one makes most of it.
        note: a line more, such as why it cannot be computed.
        part: ``nodes`` as a model, weights in ``folder``; reference: the same of the reference, where it is another.
        inputs, actual, expected: what ``part`` gets, gives, and ought to give, under its own names.
    """

    evaluation: int
    graph: str
    tensor: str
    error: float
    inside: str
    against: str
    value: str | None
    nodes: tuple[tuple[str, str], ...]
    made: float
    beyond: bool
    note: str
    part: onnx.ModelProto
    folder: Path
    reference: tuple[onnx.ModelProto, Path] | None
    inputs: Arrays
    actual: Arrays
    expected: Arrays

    @property
    def line(self) -> str:
        """In one line."""
        where = f"evaluation {self.evaluation}, graph {self.graph}, {self.tensor}"
        if self.value is None:
            return f"{where}: {self.note}"
        nodes = ", ".join(f"{name} ({kind})" for name, kind in self.nodes[:_MOST_NAMED])
        nodes += f" and {len(self.nodes) - _MOST_NAMED} more" if len(self.nodes) > _MOST_NAMED else ""
        made = f"makes an error of {self.made:.2e}"
        if math.isinf(self.made):
            made = "cannot be computed" if self.note else "gives another shape, or what is not finite"
        most = "" if self.beyond else ", the largest: none is beyond tolerance by itself"
        word = "node" if len(self.nodes) == 1 else "nodes"
        if self.inside == "exporter":
            word = f"exported otherwise than the model computes it, in {word}"
        return f"{where}: {word} {nodes} {made}{most}{self.note and ': '}{self.note}"


@dataclass(frozen=True)
class _Wrong:
    """A launch that is beyond tolerance by itself, with what it got."""

    evaluation: int
    entry: VariantEntry
    inputs: Arrays
    tensor: str
    error: float
    expected: np.ndarray


def locate(
    bundle: Bundle,
    recordings: Sequence[Recording] | Sequence[StepRecording],
    open_graph: OpenGraph,
    sound: Sound,
    tolerance: Tolerance,
    *,
    on_backend: RunModel | None = None,
    modules: Modules | None = None,
    against: str = "the same graph exported again",
) -> Located | None:
    """Find the first node that is wrong; None where every graph by itself is within tolerance.

    Args:
        bundle: the engine directory, in fp32 or fp16: ONNX Runtime's CPU provider has no kernels for bf16.
        recordings: of the supernet's loop: of variants, or of evaluations for the layout ``segments``.
        open_graph: how the backend runs a graph.
        sound: reference graphs, made when they are asked for.
        tolerance: what passes.
        on_backend: how the backend runs a graph with other outputs; None where it cannot (engines that are built).
        modules: the model in torch; None where it is not there.
        against: what ``sound`` is, in words.

    Raises:
        UserError: a reference that does not fit, or one that differs from the model too and ``modules`` is None.
    """
    dtype, segments = bundle.manifest.dtype, not bundle.manifest.plan.one_launch_each
    given = list(with_rows(bundle, recordings, open_graph))  # type: ignore[type-var]
    found: _Wrong | None
    if segments:
        found = _prologue(bundle, sound(dtype), recordings, open_graph, tolerance)
        found = found or _first(_within(bundle, sound(dtype), given, open_graph), tolerance)  # type: ignore[arg-type]
    else:
        found = _first(_alone(bundle, given, open_graph), tolerance)  # type: ignore[arg-type]
        if found is not None and bundle.manifest.plan.prologue is not None:
            found = _prologue(bundle, sound(dtype), recordings, open_graph, tolerance) or found
    if found is None:
        return None
    graph = InnerGraph(bundle.path / found.entry.graph.file)
    try:
        plain = graph.run(found.inputs, [found.tensor])[found.tensor]
    except Exception:  # ONNX Runtime's exceptions share no base class; which node fails is found below
        plain = None
    if plain is not None and _passes(plain, found.expected, tolerance):
        return _in_backend(graph, found, on_backend, tolerance)
    reference = InnerGraph(_same_graph(sound(dtype), bundle, found.entry))
    if dtype != "fp32" and not _passes(_value(reference, found), found.expected, tolerance):
        reference = InnerGraph(_same_graph(sound("fp32"), bundle, found.entry))
        against += " in fp32"
    if not _passes(_value(reference, found), found.expected, tolerance):
        if modules is None:
            raise UserError(
                f"--bisect: graph {found.entry.name} and {against} both differ from the model in {found.tensor}: what "
                "is wrong is in the model's files, or in how this version exports it"
            )
        return _in_exporter(graph, found, modules(found.evaluation), tolerance)
    return _in_graph(graph, reference, found, tolerance, against)


def _first(launches: Iterator[tuple[int, VariantEntry, Arrays, Arrays, Arrays]], tolerance: Tolerance) -> _Wrong | None:
    for step, entry, inputs, actual, expected in launches:
        for name, wanted in expected.items():
            error = tensor_error(name, actual[name].astype(np.float32, copy=False), wanted, tolerance)
            if not error.passed:
                return _Wrong(step, entry, inputs, name, error.relative, wanted)
    return None


def _alone(
    bundle: Bundle, recordings: Sequence[Recording], open_graph: OpenGraph
) -> Iterator[tuple[int, VariantEntry, Arrays, Arrays, Arrays]]:
    """Each variant on recorded inputs: evaluation, graph, inputs, outputs, and the supernet's outputs."""
    for recording in sorted(recordings, key=lambda recording: recording.step):
        entry = bundle.manifest.plan.variants[recording.variant]
        inputs = {spec.name: recording.inputs[spec.name] for spec in entry.graph.inputs}
        yield recording.step, entry, inputs, _run(bundle, entry, open_graph, inputs), recording.outputs


def _within(
    bundle: Bundle, sound: Bundle, recordings: Sequence[StepRecording], open_graph: OpenGraph
) -> Iterator[tuple[int, VariantEntry, Arrays, Arrays, Arrays]]:
    """Each segment on what the reference's segments give it, beside the model's outputs where it has them, else the
    reference's."""
    plan = bundle.manifest.plan
    evaluate = StepRunner(plan, lambda index, feeds: _plainly(sound, bundle, plan.variants[index], feeds))
    for recording in recordings:
        for launched in evaluate(recording.step, recording.inputs):
            entry = plan.variants[launched.segment]
            yield (
                recording.step,
                entry,
                launched.inputs,
                _run(bundle, entry, open_graph, launched.inputs),
                {name: recording.outputs.get(name, array) for name, array in launched.outputs.items()},
            )


def _prologue(
    bundle: Bundle,
    sound: Bundle,
    recordings: Sequence[Recording] | Sequence[StepRecording],
    open_graph: OpenGraph,
    tolerance: Tolerance,
) -> _Wrong | None:
    """What the prologue makes beside what the reference's does; None where there is none, or it is within tolerance."""
    plan = bundle.manifest.plan
    if plan.prologue is None or not recordings:
        return None
    entry, first = prologue_entry(plan), recordings[0]
    inputs = prologue_inputs(plan.prologue, first.inputs, plan.halves[-1])
    actual = _run(bundle, entry, open_graph, inputs)
    return _first(iter([(first.step, entry, inputs, actual, _plainly(sound, bundle, entry, inputs))]), tolerance)


def _run(bundle: Bundle, entry: VariantEntry, open_graph: OpenGraph, inputs: Arrays) -> Arrays:
    """The graph's outputs; NaN where it cannot be loaded or run: what is wrong in it is looked for."""
    try:
        with failures_named(bundle, entry), open_graph(bundle, entry) as run:
            return {name: np.array(array) for name, array in run(inputs).items()}
    except UserError:
        return {spec.name: np.full(spec.shape, np.nan, np.float32) for spec in entry.graph.outputs}


def _plainly(sound: Bundle, bundle: Bundle, entry: VariantEntry, feeds: Arrays) -> dict[str, np.ndarray]:
    graph = InnerGraph(_same_graph(sound, bundle, entry))
    return graph.run(feeds, graph.outputs)


def _same_graph(sound: Bundle, bundle: Bundle, entry: VariantEntry) -> Path:
    """The file of the reference graph that has the inputs and outputs of ``entry``.

    Raises:
        UserError: there is none: it is of another schedule, or compiled otherwise.
    """
    names = _names(entry)
    plan = sound.manifest.plan
    there = (*plan.variants, *(() if plan.prologue is None else (prologue_entry(plan),)))
    other = next((other for other in there if _names(other) == names), None)
    if other is None:
        raise UserError(
            f"--bisect: no graph of {sound.path} has the inputs and outputs of {bundle.path / entry.graph.file}; give "
            "an engine directory of the same model, schedule and layout with --against"
        )
    return sound.path / other.graph.file


def _names(entry: VariantEntry) -> tuple[frozenset[str], frozenset[str]]:
    return (
        frozenset(spec.name for spec in entry.graph.inputs),
        frozenset(spec.name for spec in entry.graph.outputs),
    )


def _value(graph: InnerGraph, wrong: _Wrong) -> np.ndarray:
    return graph.run(wrong.inputs, [wrong.tensor])[wrong.tensor]


def _passes(actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> bool:
    return tensor_error("", actual.astype(np.float32, copy=False), expected, tolerance).passed


def _in_graph(graph: InnerGraph, reference: InnerGraph, wrong: _Wrong, tolerance: Tolerance, against: str) -> Located:
    """The first node that makes an error of its own beyond tolerance, else the one that makes the largest."""
    worst: _Made | None = None
    for made in _made_by_nodes(graph, reference, wrong):
        if worst is None or made.error > worst.error:
            worst = made
        if made.error > tolerance.relative:
            break
    if worst is None:
        raise UserError(f"--bisect: graph {wrong.entry.name} and {against} have no value of one name on the way")
    part = graph.part(worst.places, [worst.value], worst.given)
    return Located(
        evaluation=wrong.evaluation,
        graph=wrong.entry.name,
        tensor=wrong.tensor,
        error=wrong.error,
        inside="graph",
        against=against,
        value=worst.value,
        nodes=_named(graph, worst.places),
        made=worst.error,
        beyond=worst.error > tolerance.relative,
        note=worst.note,
        part=part,
        folder=graph.folder,
        reference=(reference.part(worst.mirror, [worst.value], worst.reference_given), reference.folder),
        inputs=worst.given,
        actual={} if worst.actual is None else {worst.value: worst.actual},
        expected={worst.value: worst.expected},
    )


@dataclass(frozen=True)
class _Made:
    """What the nodes at ``places`` make of a value when they are given the reference's values; mirror: places of the
    nodes that make it in the reference."""

    value: str
    places: tuple[int, ...]
    mirror: tuple[int, ...]
    error: float
    given: dict[str, np.ndarray]
    reference_given: dict[str, np.ndarray]
    actual: np.ndarray | None
    expected: np.ndarray
    note: str = ""


def _made_by_nodes(graph: InnerGraph, reference: InnerGraph, wrong: _Wrong) -> Iterator[_Made]:
    """Each value on the way to the wrong output that the reference has too, in order."""
    known = set(reference.values)
    on_the_way = {name for place in graph.ancestors(wrong.tensor) for name in graph.nodes[place].output}
    common = [name for name in graph.values if name in on_the_way and name in known]
    cut = set(common)
    groups = {
        name: _Group(graph.ancestors(name, until=cut - {name}), reference.ancestors(name, until=cut - {name}))
        for name in common
    }
    inputs = reference.given(wrong.inputs)
    for chunk in _chunks(common, reference.nbytes(inputs)):
        needed = {name for value in chunk for name in graph.read_by(groups[value].places)}
        theirs = {name for value in chunk for name in reference.read_by(groups[value].mirror)}
        inner = sorted({*((needed | theirs) & cut), *chunk})
        values = {**inputs, **reference.run(wrong.inputs, inner)}
        given = {name: graph.cast(name, array) for name, array in values.items()} | graph.given(wrong.inputs)
        yield from _made(graph, reference, chunk, groups, given, values)


@dataclass(frozen=True)
class _Group:
    """Places of the nodes that make a value of those that both graphs have: in the graph, and in the reference."""

    places: tuple[int, ...]
    mirror: tuple[int, ...]


def _made(
    graph: InnerGraph,
    reference: InnerGraph,
    chunk: Sequence[str],
    groups: Mapping[str, _Group],
    given: dict[str, np.ndarray],
    values: Arrays,
) -> Iterator[_Made]:
    """The values of a chunk in one run, or where that fails, of its halves. given: the reference's ``values`` in the
    graph's types."""
    places = sorted({place for value in chunk for place in groups[value].places})
    failed = ""
    try:
        found = run_plainly(graph.part(places, chunk, given), graph.folder, given)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if len(chunk) > 1:
            half = len(chunk) // 2
            yield from _made(graph, reference, chunk[:half], groups, given, values)
            yield from _made(graph, reference, chunk[half:], groups, given, values)
            return
        failed, found = one_line(error), {}
    for value in chunk:
        group, actual, expected = groups[value], found.get(made_name(value)), values[value]
        yield _Made(
            value,
            group.places,
            group.mirror,
            math.inf if actual is None else _difference(actual, expected),
            {name: given[name] for name in graph.read_by(group.places) if name in given},
            {name: values[name] for name in reference.read_by(group.mirror)},
            actual,
            expected,
            failed,
        )


def _chunks(values: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Values in order, so many at once as are held."""
    chunk: list[str] = []
    total = 0
    for value in values:
        size = sizes.get(value, 0)
        if chunk and total + size > _CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
        chunk.append(value)
        total += size
    if chunk:
        yield chunk


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest finite expected value. Inner values may be infinite on purpose (masks):
    what is so on both sides is equal."""
    if actual.shape != expected.shape:
        return math.inf
    found, wanted = actual.astype(np.float64), expected.astype(np.float64)
    equal = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    if equal.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(found - wanted)[~equal]
    largest = float(difference.max())
    return largest / peak(wanted[np.isfinite(wanted)]) if math.isfinite(largest) else math.inf


def _in_exporter(graph: InnerGraph, wrong: _Wrong, modules: Arrays, tolerance: Tolerance) -> Located:
    """The nodes before the first value that is not what a module of the model gives, and behind those that are."""
    on_the_way = {name for place in graph.ancestors(wrong.tensor) for name in graph.nodes[place].output}
    leaving = {value: path for value, path in graph.leaving_scopes(modules).items() if value in on_the_way}
    actual = graph.run(wrong.inputs, list(leaving))
    wanted = {value: modules[path] for value, path in leaving.items() if modules[path].shape == actual[value].shape}
    actual |= graph.run(wrong.inputs, [wrong.tensor])
    wanted[wrong.tensor] = wrong.expected
    right: list[str] = []
    for value in [value for value in graph.values if value in wanted]:
        error = _difference(actual[value].astype(np.float32, copy=False), wanted[value])
        if error > tolerance.relative:
            break
        right.append(value)
    places = graph.ancestors(value, until=right)
    inner = sorted(graph.read_by(places) - graph.inputs.keys())
    given = graph.given(wrong.inputs) | graph.run(wrong.inputs, inner)
    given = {name: given[name] for name in graph.read_by(places)}
    path = leaving.get(value)
    return Located(
        evaluation=wrong.evaluation,
        graph=wrong.entry.name,
        tensor=wrong.tensor,
        error=wrong.error,
        inside="exporter",
        against="the model's modules in torch",
        value=value,
        nodes=_named(graph, places),
        made=error,
        beyond=True,
        note="" if path is None else f"module {path}",
        part=graph.part(places, [value], given),
        folder=graph.folder,
        reference=None,
        inputs=given,
        actual={value: actual[value]},
        expected={value: wanted[value].astype(actual[value].dtype, copy=False)},
    )


def _in_backend(graph: InnerGraph, wrong: _Wrong, on_backend: RunModel | None, tolerance: Tolerance) -> Located:
    """The first value that the backend makes wrong, with inner values as outputs, of those that it makes right."""
    against = "ONNX Runtime on the CPU with optimisations off"
    places = graph.ancestors(wrong.tensor)
    value, note, error = None, "", math.inf
    if on_backend is None:
        note = "the graph is right; what this backend built of it is not, and cannot be looked into"
    else:
        value, error = _first_marked(graph, wrong, on_backend, places, tolerance)
        if value is None:
            note = (
                "the graph is right, and so is what the backend makes of it with inner values as outputs: it fuses them"
            )
    given = graph.given(wrong.inputs)
    wanted = wrong.tensor if value is None else value
    region = places
    if value is not None:
        region, given = _smallest(graph, wrong, on_backend, value, tolerance)
    actual, expected = {}, run_plainly(graph.part(region, [wanted], given), graph.folder, given)
    if on_backend is not None:
        actual = on_backend(graph.part(region, [wanted], given), graph.folder, given)
    return Located(
        evaluation=wrong.evaluation,
        graph=wrong.entry.name,
        tensor=wrong.tensor,
        error=wrong.error,
        inside="backend",
        against=against,
        value=value,
        nodes=_named(graph, region) if value is not None else (),
        made=error,
        beyond=value is not None,
        note=note,
        part=graph.part(region, [wanted], given),
        folder=graph.folder,
        reference=None,
        inputs=given,
        actual=actual,
        expected=expected,
    )


def _first_marked(
    graph: InnerGraph, wrong: _Wrong, on_backend: RunModel, places: Sequence[int], tolerance: Tolerance
) -> tuple[str | None, float]:
    """The first value beyond tolerance in a run of the backend that gives all of them."""
    values = [name for place in places for name in graph.nodes[place].output if name]
    for chunk in _chunks(values, graph.nbytes(graph.given(wrong.inputs))):
        actual = graph.run(wrong.inputs, chunk, on_backend)
        expected = graph.run(wrong.inputs, chunk)
        for name in chunk:
            error = _difference(actual[name], expected[name])
            if error > tolerance.relative:
                return name, error
    return None, math.inf


def _smallest(
    graph: InnerGraph, wrong: _Wrong, on_backend: RunModel | None, value: str, tolerance: Tolerance
) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """The fewest nodes before ``value`` (one, two, four and so on) that the backend makes it wrong with, and what they
    get; all of them where no fewer do."""
    before = graph.ancestors(value)
    count = 1
    while on_backend is not None and count < len(before):
        region = before[-count:]
        inner = sorted(graph.read_by(region) - graph.inputs.keys())
        given = {**graph.given(wrong.inputs), **graph.run(wrong.inputs, inner)}
        given = {name: given[name] for name in graph.read_by(region)}
        part = graph.part(region, [value], given)
        actual = on_backend(part, graph.folder, given)[value]
        if _difference(actual, run_plainly(part, graph.folder, given)[value]) > tolerance.relative:
            return region, given
        count *= 2
    return before, graph.given(wrong.inputs)


def _named(graph: InnerGraph, places: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return tuple((graph.nodes[place].name, graph.nodes[place].op_type) for place in places)
