"""The sections of a report that show what was measured: time, quality, pictures, drift; or what would measure it."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from dipgo_deploy.compare.html import curves
from dipgo_deploy.engine.budget import size
from dipgo_deploy.page.shell import difference, facts_table, folded, paragraph, picture_row, table, text, wide
from dipgo_deploy.report import quality_chart, time_chart
from dipgo_deploy.report.chart import key, put, shares
from dipgo_deploy.report.given import Given
from dipgo_deploy.report.measured import Limit, Profile
from dipgo_deploy.report.subject import Subject
from dipgo_deploy.report.words import count, macs, milliseconds

# Of kernels by block, the most that are listed.
_MOST_BLOCKS = 20


def time_section(body: ET.Element, subject: Subject, given: Given) -> None:
    """The loop, its launches and kernels, beside what would be ideal."""
    profile, plan = given.profile, subject.bundle.manifest.plan
    directory = subject.bundle.path
    if given.limit is not None:
        _limit(body, given.limit)
    if profile is None:
        _missing(body, "times", f"dipgo-bench profile --engine-dir {directory} -o times.json", "--bench times.json")
        return
    wanted = time_chart.ideal(plan, profile)
    inside = sum(launch.seconds for launch in profile.launches)
    rows = {
        "the loop": milliseconds(profile.loop_seconds),
        f"in {count(len(profile.launches), 'launch')}": milliseconds(inside),
        "beside them (uploads, the walk of the list, the last sum)": milliseconds(profile.host_seconds),
        "kernels, in a run with the profiler": milliseconds(profile.kernel_seconds),
        "of that, only moving data": milliseconds(profile.copy_seconds),
    }
    if wanted is not None:
        rows["ideal: the same multiply-accumulates at the median speed of whole evaluations"] = (
            f"{milliseconds(wanted.loop)}, {wanted.loop / profile.loop_seconds:.0%} of the loop"
        )
    other = given.against_profile
    measured = given.speedup
    if other is not None and measured is not None:
        rows["the loop of the other directory"] = milliseconds(other.loop_seconds)
        allowed = _allowed(subject, given)
        beside = "" if allowed is None else f"; the multiply-accumulates allow {allowed:.2f} ({measured / allowed:.0%})"
        rows["speed-up"] = f"{measured:.2f}{beside}"
    facts_table(body, rows)
    if wanted is None:
        paragraph(
            body, "There is no ideal: no evaluation runs whole, which would say what a multiply-accumulate takes."
        )
    if other is None:
        paragraph(body, "The speed-up is not measured: give --against and a profile of that directory too.", "quiet")
    paragraph(body, "Each launch:")
    marks = [("bar", "measured")] + ([] if wanted is None else [("ideal", "ideal")])
    marks += [] if given.limit is None else [("least-key", "the machine's limit")]
    key(body, marks)
    put(body, "times", time_chart.time_chart(plan, profile, wanted, given.limit))
    more = folded(body, "by graph, block and operator")
    table(more, ("graph", "launches", "mean", "share"), _by_graph(profile), ("launches", "mean", "share"))
    for title, seconds in (("block", profile.blocks), ("operator", profile.operators)):
        shares(more, (title, "kernels", ""), dict(list(seconds.items())[:_MOST_BLOCKS]), milliseconds)
        if len(seconds) > _MOST_BLOCKS:
            paragraph(more, f"{len(seconds) - _MOST_BLOCKS} more in the profile.")


def _limit(body: ET.Element, limit: Limit) -> None:
    ceiling = limit.ceiling
    paragraph(
        body,
        f"Graphs run alone, beside the least that this machine allows: {macs(ceiling.macs_per_second)} and "
        f"{size(int(ceiling.bytes_per_second))} a second.",
    )
    rows = [
        (
            graph.name,
            graph.launches,
            milliseconds(graph.least_seconds),
            ", ".join(
                f"{backend} {milliseconds(found.median)} ({found.median / graph.least_seconds:.2f} times)"
                if graph.least_seconds
                else f"{backend} {milliseconds(found.median)}"
                for backend, found in graph.seconds.items()
            ),
        )
        for graph in limit.graphs
    ]
    table(body, ("graph", "launches", "least", "median"), rows, ("launches", "least"))


def _by_graph(profile: Profile) -> list[tuple[str, int, str, str]]:
    found: dict[str, list[float]] = {}
    for launch in profile.launches:
        found.setdefault(launch.variant, []).append(launch.seconds)
    inside = sum(map(sum, found.values())) or 1.0
    return [
        (name, len(seconds), milliseconds(sum(seconds) / len(seconds)), f"{sum(seconds) / inside:.1%}")
        for name, seconds in found.items()
    ]


def _allowed(subject: Subject, given: Given) -> float | None:
    """The speed-up that the multiply-accumulates of both directories allow."""
    ours = subject.bundle.manifest.plan.macs_run
    return None if given.against is None or not ours else given.against.bundle.manifest.plan.macs_run / ours


def quality_section(body: ET.Element, subject: Subject, given: Given) -> None:
    """SSIM to the full run's pictures, with intervals."""
    if not given.qualities:
        schedule = subject.bundle.path / subject.bundle.manifest.schedule
        model = subject.bundle.manifest.model.name
        _missing(
            body,
            "quality",
            f"dipgo-bench quality {schedule} --model {model} --baselines -o quality.json",
            "--bench quality.json",
        )
    for place, quality in enumerate(given.qualities):
        line = (
            f"SSIM to the pictures of the full run ({quality.reference.sampler}, {quality.reference.steps} steps) of "
            f"{quality.model} from the same seeds, {count(quality.images, 'image')}; lines are 95% intervals."
        )
        paragraph(body, line)
        ranked = [case for case in quality.cases if not case.baseline] + [
            case for case in quality.cases if case.baseline
        ]
        kinds = [("dot", "schedule")] + ([("hollow", "plain solver")] if any(case.baseline for case in ranked) else [])
        key(body, kinds)
        put(body, f"quality-{place}", quality_chart.quality_chart(ranked))
        rows = [
            (
                name,
                case.launches,
                macs(case.macs),
                quality_chart.interval(case.ssim, 4),
                "-" if case.difference is None else quality_chart.interval(case.difference, 4),
                quality_chart.interval(case.psnr, 1),
                quality_chart.interval(case.accuracy, 3),
            )
            for name, case in zip(quality_chart.names(ranked), ranked, strict=True)
        ]
        against = {case.against for case in ranked if case.against}
        more = folded(body, "all numbers")
        heads = ("case", "launches", "cost", "SSIM", "SSIM, better by", "PSNR", "recognised")
        table(more, heads, rows, ("launches", "cost"))
        if against:
            paragraph(more, f"better by: image by image, than {', '.join(sorted(map(text, against)))}")


def pictures_section(body: ET.Element, given: Given) -> None:
    """The same seeds in both directories."""
    if not given.strips:
        paragraph(body, given.no_pictures, "quiet")
        return
    for strip in given.strips:
        caption, apart = difference(strip.pruned, strip.full)
        full, pruned = (f"{side}, {strip.caption}" for side in ("full", "pruned"))
        picture_row(body, {full: strip.full, pruned: strip.pruned, caption: apart})


def drift_section(body: ET.Element, subject: Subject, given: Given) -> None:
    """How far the latents are from the other directory, and everything from the model in torch."""
    found = given.comparison
    if given.drift:
        line = (
            "The latent beside the other directory's from the same noise, at evaluations of that directory that both "
            f"launch; the last is the final one. Root mean square of the difference over the latent's own, "
            f"{given.drift[-1].tensors[0].relative:.2e} at the end:"
        )
        paragraph(body, line)
        if len(given.drift) > 1:
            wide(body, curves(given.drift, 0.0))
    if found is None or not found.loop:
        command = f"dipgo-compare --engine-dir {subject.bundle.path} --json > compare.json"
        _missing(body, "drift from the model in torch", command, "--bench compare.json")
        return
    verdict = "everything within" if found.passed else f"beyond tolerance ({found.first_failure}), which is"
    paragraph(
        body,
        f"Largest error at each evaluation, caches fed forward, against {found.reference}: {verdict} "
        f"{found.tolerance.relative:g} of the largest value (dashed).",
        "good" if found.passed else "bad",
    )
    wide(body, curves(found.loop, found.tolerance.relative))
    for reason in found.skipped:
        paragraph(body, f"Not compared: {reason}", "quiet")


def _missing(body: ET.Element, what: str, command: str, option: str) -> None:
    """What the directory does not hold, and what would give it."""
    line = ET.SubElement(body, "p", {"class": "quiet"})
    line.text = f"No {what} were given. Make them: " if what.endswith("s") else f"No {what} was given. Make it: "
    ET.SubElement(line, "code").text = text(command)
    line[-1].tail = " and give "
    ET.SubElement(line, "code").text = option
    line[-1].tail = "."
