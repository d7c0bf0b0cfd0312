"""The check of an export: the engine directory as it was written, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import corners
from dipgo_deploy.compare.metrics import Agreement, worst
from dipgo_deploy.errors import ToleranceError

if TYPE_CHECKING:
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.compare.self_test import SelfTestRecorder
    from dipgo_deploy.reference.source import Source


def verify_written(
    bundle: Bundle,
    source: Source,
    notify: Callable[[str], None] = lambda stage: None,
    note: Callable[[str], None] = lambda line: None,
    self_test: SelfTestRecorder | None = None,
) -> Agreement:
    """Compare a written directory with the loaded model, whose modules are all in float32: all that ``dipgo-compare``
    does but the runs from prompt to picture. How far the denoiser agrees.

    Open sizes: all of it at the usual ones, and the variants by themselves at the corners of the ranges that differ in
    more than the batch, because an extent that the trace took for a constant shows only at another one. bf16 graphs are
    not run: ONNX Runtime's CPU provider has no kernels for them. self_test: records the loop at the usual sizes.

    Raises:
        ToleranceError: names what is wrong first. UserError: a graph cannot be run.
    """
    agreements = []
    for place, (at_sizes, where) in enumerate(sizes_compared(bundle)):
        report = _report(at_sizes, source, notify, self_test, whole=place == 0)
        agreements.append(passed(report, where))
        for line in report.skipped:
            note(line)
    return worst(agreements)


def sizes_compared(bundle: Bundle) -> Iterator[tuple[Bundle, str]]:
    """The directory at each of the sizes that are compared, and how a message about it begins: at the usual sizes,
    then at the corners of the ranges; as it is where nothing is open."""
    manifest = bundle.manifest
    if manifest.sizes is None:
        yield bundle, ""
        return
    for sizes in dict.fromkeys((manifest.usual_sizes, *corners(manifest.sizes))):
        yield bundle.at(sizes), f"at {sizes.batch} x {sizes.height}x{sizes.width}: "


def passed(report: Report, where: str) -> Agreement:
    """How far the denoiser agrees. Raises ToleranceError, which says that nothing was written, where anything fails."""
    failure = report.first_failure()
    if failure is not None:
        raise ToleranceError(f"{where}{failure}; nothing was written")
    return report.agreement


def _report(
    bundle: Bundle,
    source: Source,
    notify: Callable[[str], None],
    self_test: SelfTestRecorder | None,
    *,
    whole: bool,
) -> Report:
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.compare.engine import Options, compare_engine
    from dipgo_deploy.compare.pictures import cases
    from dipgo_deploy.reference.load import reference_of

    reference = reference_of(bundle, source)
    inputs = reference.inputs(bundle.manifest)
    options = Options(
        loop=whole,
        components=whole,
        cases=tuple(cases(bundle.manifest)) if whole else (),
        self_test=self_test if whole else None,
    )
    # One copy of the weights for all graphs: many variants would take that many times the model.
    return compare_engine(bundle, reference, inputs, create_backend("cpu", share_weights=True), options, notify)
