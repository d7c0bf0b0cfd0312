"""Graphs by themselves against recordings of the supernet. Torch-free: a process that runs graphs need not have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.backends.onnxruntime_pairs import suit_folder
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import VariantEntry
from dipgo_deploy.bundle.names import PREDICTION
from dipgo_deploy.compare.metrics import TensorError, Tolerance, tensor_error
from dipgo_deploy.compare.report import Checked
from dipgo_deploy.compare.step_runner import StepRunner
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.reference.recording import Recording, as_read
from dipgo_deploy.reference.steps import StepRecording

if TYPE_CHECKING:
    import onnxruntime

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
# Opens a graph of a directory: its inputs (float32 or int64; half precision is cast) -> its outputs.
OpenGraph = Callable[[Bundle, VariantEntry], AbstractContextManager[Run]]


def compare_variants(
    bundle: Bundle, recordings: Iterable[Recording], open_graph: OpenGraph, tolerance: Tolerance
) -> Iterator[Checked]:
    """Every variant on its recorded inputs (``with_rows``), one after the other.

    Raises:
        UserError: a graph cannot be loaded or run.
    """
    for recording in recordings:
        entry = bundle.manifest.plan.variants[recording.variant]
        inputs = {spec.name: recording.inputs[spec.name] for spec in entry.graph.inputs}
        with failures_named(bundle, entry), open_graph(bundle, entry) as run:
            outputs = run(inputs)
        yield Checked(recording.step, entry.name, _errors(outputs, recording.outputs, tolerance))


def compare_segments(
    bundle: Bundle,
    recordings: Iterable[StepRecording],
    open_graph: OpenGraph,
    tolerance: Tolerance,
    *,
    keep_open: bool = True,
) -> tuple[tuple[Checked, ...], tuple[Recording, ...]]:
    """Every segment, within evaluations that start from the supernet's latent.

    Returns what was compared at the first launch of each segment, and at later ones that fail; a segment that writes
    nothing the supernet has (a time embedding) is judged by those that read it. Then each segment's inputs at its first
    launch, with the outputs that the supernet has. keep_open: all segments' graphs at once; else one, which takes less
    memory and more time.

    Raises:
        UserError: a graph cannot be loaded or run.
    """
    plan = bundle.manifest.plan
    checked: list[Checked] = []
    firsts: dict[int, Recording] = {}
    with ExitStack() as stack:
        opened: dict[int, Run] = {}

        def run(segment: int, feeds: dict[str, np.ndarray]) -> Arrays:
            entry = plan.variants[segment]
            with failures_named(bundle, entry):
                if not keep_open:
                    with open_graph(bundle, entry) as once:
                        return dict(once(feeds))
                if segment not in opened:
                    opened[segment] = stack.enter_context(open_graph(bundle, entry))
                return {name: np.array(array) for name, array in opened[segment](feeds).items()}

        evaluate = StepRunner(plan, run)
        for recording in recordings:
            for launched in evaluate(recording.step, recording.inputs):
                first = launched.segment not in firsts
                launch = plan.launches[launched.index]
                names = launched.outputs.keys() & recording.outputs.keys()
                names -= {PREDICTION} if launch.passes is not None else set()  # the model has the guided one alone
                wanted = {name: array for name, array in recording.outputs.items() if name in names}
                if launch.half is not None:
                    wanted = {n: as_read(a, launched.outputs[n].shape, launch.half) for n, a in wanted.items()}
                if first:
                    firsts[launched.segment] = Recording(launched.segment, recording.step, launched.inputs, wanted)
                if not wanted:
                    continue
                errors = _errors(launched.outputs, wanted, tolerance)
                result = Checked(recording.step, plan.variants[launched.segment].name, errors)
                if first or not result.passed:
                    checked.append(result)
    return tuple(checked), tuple(firsts.values())


def _errors(outputs: Arrays, expected: Arrays, tolerance: Tolerance) -> tuple[TensorError, ...]:
    return tuple(
        tensor_error(name, outputs[name].astype(np.float32, copy=False), wanted, tolerance)
        for name, wanted in expected.items()
    )


@contextmanager
def failures_named(bundle: Bundle, entry: VariantEntry) -> Iterator[None]:
    """What goes wrong inside, in one line with the graph's file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UserError(f"{bundle.path / entry.graph.file}: cannot be run: {one_line(error)}") from error


def frugal_session(bundle: Bundle, entry: VariantEntry) -> AbstractContextManager[Run]:
    """A graph on ONNX Runtime's CPU provider that runs once or a few times: its weights stay in their file, mapped.

    That provider has no kernels for bf16.
    """
    import onnxruntime

    options = _frugal_options(half=bundle.manifest.dtype != "fp32")
    file = bundle.path / entry.graph.file
    suit_folder(options, file.parent)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in entry.graph.outputs]

    def run(inputs: Arrays) -> Arrays:
        feeds = {spec.name: inputs[spec.name].astype(spec.dtype, copy=False) for spec in entry.graph.inputs}
        return dict(zip(names, session.run(names, feeds), strict=True))

    return nullcontext(run)


def _frugal_options(*, half: bool) -> onnxruntime.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each of these would copy the weights, once or more, for a graph that runs once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.enable_cpu_mem_arena = False
    if half:
        # The default order may convert the weights of many layers to float32 before any of them is used. Without
        # conversions it is the better one, by a sixth of the activations.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return options
