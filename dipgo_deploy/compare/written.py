"""The check of an export: the engine directory as it was written, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Sizes, corners
from dipgo_deploy.compare.metrics import Agreement, worst
from dipgo_deploy.errors import ToleranceError

if TYPE_CHECKING:
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.reference.source import Source


def verify_written(
    bundle: Bundle,
    source: Source,
    notify: Callable[[str], None] = lambda stage: None,
    note: Callable[[str], None] = lambda line: None,
) -> Agreement:
    """Compare a written directory with the loaded model, whose modules are all in float32: all that ``dipgo-compare``
    does but the runs from prompt to picture. How far the denoiser agrees.

    Open sizes: all of it at the usual ones, and the variants by themselves at the corners of the ranges that differ in
    more than the batch, because an extent that the trace took for a constant shows only at another one. bf16 graphs are
    not run: ONNX Runtime's CPU provider has no kernels for them.

    Raises:
        ToleranceError: names what is wrong first. UserError: a graph cannot be run.
    """
    found = []
    for place, sizes in enumerate(sizes_compared(bundle)):
        at_sizes = bundle if sizes is None else bundle.at(sizes)
        report = _report(at_sizes, source, notify, whole=place == 0)
        failure = report.first_failure()
        if failure is not None:
            at = "" if sizes is None else f"at {sizes.batch} x {sizes.height}x{sizes.width}: "
            raise ToleranceError(f"{at}{failure}; nothing was written")
        for line in report.skipped:
            note(line)
        found.append(report.agreement)
    return worst(found)


def sizes_compared(bundle: Bundle) -> tuple[Sizes | None, ...]:
    """None where nothing is open; else the usual sizes, then the corners of the ranges."""
    ranges = bundle.manifest.sizes
    if ranges is None:
        return (None,)
    return tuple(dict.fromkeys((bundle.manifest.usual_sizes, *corners(ranges))))


def _report(bundle: Bundle, source: Source, notify: Callable[[str], None], *, whole: bool) -> Report:
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.compare.engine import Options, compare_engine
    from dipgo_deploy.compare.pictures import cases
    from dipgo_deploy.reference.conditions import reference_inputs
    from dipgo_deploy.reference.load import reference_of

    manifest, latent = bundle.manifest, bundle.manifest.latent
    reference = reference_of(bundle, source)
    inputs = reference_inputs(
        source,
        reference.conditions,
        (manifest.batch, latent.channels, latent.height, latent.width),
        noises=manifest.plan.noises,
        guidance=manifest.guidance,
        begin=reference.begin,
    )
    options = Options(loop=whole, components=whole, cases=tuple(cases(manifest)) if whole else ())
    # One copy of the weights for all graphs: many variants would take that many times the model.
    return compare_engine(bundle, reference, inputs, create_backend("cpu", share_weights=True), options, notify)
