"""The report on an engine directory as one page of HTML that needs nothing else. Pure functions of what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from dipgo_deploy.compare.html import curves
from dipgo_deploy.engine.budget import size
from dipgo_deploy.engine.contents import lifetimes
from dipgo_deploy.page.shell import (
    add_script,
    difference,
    facts_table,
    folded,
    new_page,
    paragraph,
    picture_row,
    section,
    table,
    text,
    wide,
    written,
)
from dipgo_deploy.report import memory_chart, quality_chart, schedule_chart, solver_chart, time_chart
from dipgo_deploy.report.chart import key, put
from dipgo_deploy.report.measured import ComparedStep, Comparison, Limit, Profile, Quality
from dipgo_deploy.report.subject import Subject
from dipgo_deploy.report.words import count, macs, milliseconds
from dipgo_deploy.schedule.summary import denoisers_line, guidance_line, ranges

_SECTIONS = {
    "schedule": "Schedule",
    "solver": "Sampler",
    "memory": "Memory",
    "time": "Time",
    "quality": "Quality",
    "pictures": "Pictures",
    "drift": "Drift",
    "origin": "Origin",
}
# Of kernels by block, the most that are listed.
_MOST_BLOCKS = 20


@dataclass(frozen=True)
class Strip:
    """A picture of both directories from the same seed, (H, W, 3) in [0, 1]."""

    caption: str
    full: np.ndarray
    pruned: np.ndarray


@dataclass(frozen=True)
class Given:
    """What a report has besides the directory.

    Attributes:
        against: another directory, such as the full run's.
        profile, against_profile: their times.
        qualities: what ``dipgo-bench quality`` found.
        comparison: what ``dipgo-compare`` found.
        limit: what the machine can do.
        strips: pictures of both; ``no_pictures`` says why there are none.
        drift: how far the latents of both are apart where both launch, and at the end.
    """

    against: Subject | None = None
    profile: Profile | None = None
    against_profile: Profile | None = None
    qualities: Sequence[Quality] = ()
    comparison: Comparison | None = None
    limit: Limit | None = None
    strips: Sequence[Strip] = ()
    no_pictures: str = ""
    drift: Sequence[ComparedStep] = ()


def report_page(subject: Subject, given: Given) -> bytes:
    """The page, UTF-8."""
    root, body = new_page(f"{subject.name}: report")
    _head(body, subject, given)
    _schedule(section(body, _SECTIONS["schedule"], "schedule"), subject)
    _solver(section(body, _SECTIONS["solver"], "solver"), subject)
    _memory(section(body, _SECTIONS["memory"], "memory"), subject)
    _time(section(body, _SECTIONS["time"], "time"), subject, given)
    _quality(section(body, _SECTIONS["quality"], "quality"), subject, given)
    _pictures(section(body, _SECTIONS["pictures"], "pictures"), given)
    _drift(section(body, _SECTIONS["drift"], "drift"), subject, given)
    _origin(section(body, _SECTIONS["origin"], "origin"), subject, given)
    add_script(body)
    return written(root)


def _head(body: ET.Element, subject: Subject, given: Given) -> None:
    facts = subject.facts
    model, sampler = facts["model"], facts["sampler"]
    ET.SubElement(body, "h1").text = text(subject.name)
    scale = facts["scale"] or 1
    height, width = (extent * scale for extent in facts["latent"][-2:])
    pixels = "" if facts["scale"] is None else f", {width}x{height} pixels"
    frames = "" if facts["video_frames"] is None else f", {facts['video_frames']} frames"
    line = (
        f"{model['name']}: {model['class_name']} with {sampler['class_name']}, {sampler['num_inference_steps']} steps; "
        f"{facts['dtype']}, batch {facts['batch']}{pixels}{frames}"
    )
    paragraph(body, line, "quiet")
    launched = len(subject.bundle.manifest.plan.launched)
    figures = {"launches": (f"{launched}", f"for {count(subject.full_evaluations, 'evaluation')}")}
    share = subject.macs_share
    if share:
        figures["multiply-accumulates"] = (f"{share:.1%}", "of the full run's")
        figures["ideal speed-up"] = (f"{1 / share:.2f}", "if time went as they do")
    measured = _speedup(given)
    if measured is not None:
        figures["measured speed-up"] = (f"{measured:.2f}", "of the loop")
    if given.profile is not None:
        figures["the loop"] = (milliseconds(given.profile.loop_seconds), "measured")
    figures["weights"] = (size(facts["memory"]["weights"]), "stored")
    arena = facts["memory"]["arena"]
    figures["caches"] = (size(arena) if arena else "none", "one buffer for all" if arena else "nothing is reused")
    grid = ET.SubElement(ET.SubElement(body, "div", {"class": "figures"}), "dl")
    grid.set("style", "display: contents")
    for name, (value, more) in figures.items():
        card = ET.SubElement(grid, "div")
        ET.SubElement(card, "dt").text = name
        definition = ET.SubElement(card, "dd")
        definition.text = f"{value} "
        ET.SubElement(definition, "small").text = more
    links = ET.SubElement(body, "nav", {"aria-label": "sections"})
    for anchor, title in _SECTIONS.items():
        ET.SubElement(links, "a", href=f"#{anchor}").text = title
    others = [one for one in facts["schedules"] if one["name"] != facts["name"]]
    if others:
        listed = ", ".join(f"{one['name']} ({count(one['launches'], 'launch')})" for one in others)
        paragraph(body, f"The directory has other schedules, which --schedule shows: {listed}.")
    if given.against is not None:
        _beside(body, subject, given.against)


def _beside(body: ET.Element, subject: Subject, other: Subject) -> None:
    """The two directories in a table."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, ours: str, theirs: str) -> None:
        rows.append((name, ours, theirs))

    plans = [one.bundle.manifest.plan for one in (subject, other)]
    add("launches", *(str(len(plan.launched)) for plan in plans))
    add("graphs", *(str(len(plan.variants)) for plan in plans))
    add("multiply-accumulates of a run", *(macs(plan.macs_run) for plan in plans))
    for name in ("weights", "arena", "history"):
        needs = (one.facts["memory"][name] for one in (subject, other))
        add(name, *(size(need) if need else "none" for need in needs))
    names = (subject.name, other.name if other.name != subject.name else str(other.bundle.path))
    table(body, ("", *names), rows, names)


def _schedule(body: ET.Element, subject: Subject) -> None:
    facts, cells, plan = subject.facts, subject.cells, subject.bundle.manifest.plan
    schedule = facts["schedule"]
    worth = schedule["worth"]["line"].removeprefix("worth: ")
    line = (
        f"A row is a {'block' if facts['model']['granularity'] == 'block' else 'layer'}, a column an evaluation of the "
        f"denoiser; the bars are an evaluation's multiply-accumulates. {schedule['kept_gates']:.1%} of the gates kept: "
        f"{worth}."
    )
    paragraph(body, line)
    if "denoisers" in schedule:
        paragraph(body, f"Denoisers: {denoisers_line(schedule['denoisers'])}.")
    if subject.schedule.guidance is not None:
        paragraph(body, f"Guidance: {guidance_line(subject.schedule.guidance)}.")
    key(body, schedule_chart.entries(cells))
    put(body, "schedule-map", schedule_chart.schedule_chart(cells, plan.macs_full))
    if not cells.weights_known:
        paragraph(body, "Blocks that are dead are shown as computed: the directory has no index of its weights.")
    if subject.bundle.manifest.promoted:
        again = count(len(subject.bundle.manifest.promoted), "gate")
        paragraph(body, f"The compiler re-enabled {again} that the schedule skips.")
    if subject.schedule.forecast is not None:
        paragraph(body, f"Forecast: {subject.schedule.forecast.summary(subject.schedule.gates)}.")
    more = folded(body, "the same as a table")
    table(more, schedule_chart.headings(cells), schedule_chart.table_rows(cells))
    more = folded(body, f"{count(len(facts['variants']), 'graph')}, layout {facts['layout']}")
    rows = [
        (
            row["name"],
            row["launches"],
            ranges(row["steps"]),
            macs(row["macs"]),
            f"{len(row['reads'])} ({size(row['read_bytes'])})",
            f"{len(row['writes'])} ({size(row['write_bytes'])})",
        )
        for row in facts["variants"]
    ]
    numbers = ("launches", "each", "reads", "writes")
    table(more, ("graph", "launches", "at evaluations", "each", "reads", "writes"), rows, numbers)


def _solver(body: ET.Element, subject: Subject) -> None:
    facts, plan = subject.facts, subject.bundle.manifest.plan
    solver = subject.schedule.solver
    sampler = f"{facts['sampler']['class_name']}, {facts['sampler']['num_inference_steps']} steps"
    if solver is None:
        paragraph(body, f"The rows of {sampler}. The schedule has no solver of its own.")
    else:
        paragraph(body, f"A solver of its own in place of {sampler}: {solver.summary}.")
    paragraph(body, "Timesteps of the launches, from noise to picture:")
    put(body, "timesteps", solver_chart.timestep_chart(plan))
    many = solver_chart.weights_count(plan)
    if many > solver_chart.MOST_WEIGHTS:
        paragraph(
            body, f"The {many:,} weights of the rows are not drawn: too many to look at; dipgo-inspect --json has them."
        )
        return
    paragraph(body, "Each latent is a weighted sum of the initial noise and the predictions so far (columns).")
    key(body, (("plus", "positive weight"), ("minus", "negative weight")))
    put(body, "rows", solver_chart.solver_chart(plan))
    more = folded(body, "the same as a table")
    columns = solver_chart.columns_of(plan)
    rows = [
        (name, ", ".join(f"{row[slot]:.4g} of {known}" for slot, known in columns if row[slot]))
        for name, row in solver_chart.rows_of(plan)
    ]
    table(more, ("latent at evaluation", "weights"), rows)


def _memory(body: ET.Element, subject: Subject) -> None:
    facts, plan = subject.facts, subject.bundle.manifest.plan
    memory = facts["memory"]
    if facts["sizes"] is not None:
        paragraph(body, "Batch or size is a range: all of this is for the largest.")
    names = {
        "weights": "weights, as stored",
        "arena": "caches (the arena)",
        "history": "history (noise and predictions)",
        "tables": "tables of timesteps",
        "run_rows": "rows made at the start of a run",
        "other": "conditions, coefficients, what components read and write",
    }
    parts = {label: memory[name] for name, label in names.items() if memory[name]}
    _shares(body, ("part", "bytes", ""), parts, size)
    if memory["weights_of_graphs"] is None:
        paragraph(body, "What graphs hold when each has its own weights is not known: there is no index of weights.")
    else:
        paragraph(body, f"Where each graph has its own weights: {size(memory['weights_of_graphs'])}.")
    if not plan.arena_bytes:
        paragraph(body, "Nothing is cached: there is no arena.")
        return
    line = (
        f"The arena over the launches: a rectangle is a value, at its bytes and from the launch that writes it to the "
        f"last that reads it; the bars are what is in use. {size(plan.arena_bytes)}; the values alive at once need "
        f"{size(plan.lower_bound_bytes)}."
    )
    paragraph(body, line)
    _, left_out = memory_chart.drawn_values(plan)
    if left_out:
        paragraph(body, f"Not drawn: {count(left_out, 'value')}, first those that one evaluation makes and needs.")
    kinds = [("second", "cache")]
    if facts["layout"] == "segments":
        kinds.append(("faint", "passed from segment to segment"))
    key(body, (("bar", "bytes in use"), *kinds))
    put(body, "arena", memory_chart.memory_chart(plan))
    more = folded(body, "the same as a table")
    rows = [
        (row["name"], "x".join(map(str, row["shape"])), row["dtype"], size(row["bytes"]), lifetimes(row["values"]))
        for row in facts["caches"]
    ]
    table(more, ("buffer", "shape", "type", "size", "alive at launches"), rows, ("size",))


def _time(body: ET.Element, subject: Subject, given: Given) -> None:
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
    measured = _speedup(given)
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
        _shares(more, (title, "kernels", ""), dict(list(seconds.items())[:_MOST_BLOCKS]), milliseconds)
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


def _quality(body: ET.Element, subject: Subject, given: Given) -> None:
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


def _pictures(body: ET.Element, given: Given) -> None:
    if not given.strips:
        paragraph(body, given.no_pictures, "quiet")
        return
    for strip in given.strips:
        caption, apart = difference(strip.pruned, strip.full)
        full, pruned = (f"{side}, {strip.caption}" for side in ("full", "pruned"))
        picture_row(body, {full: strip.full, pruned: strip.pruned, caption: apart})


def _drift(body: ET.Element, subject: Subject, given: Given) -> None:
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


def _origin(body: ET.Element, subject: Subject, given: Given) -> None:
    for place, one in enumerate((subject, *(() if given.against is None else (given.against,)))):
        if place:
            ET.SubElement(body, "h3").text = f"The other directory, {text(one.name)}"
        facts_table(body, _origin_facts(one))
        more = folded(body, "files and their sha256")
        table(more, ("file", "sha256"), sorted(one.facts["files"].items()))


def _origin_facts(subject: Subject) -> dict[str, str]:
    facts, manifest = subject.facts, subject.bundle.manifest
    schedule = facts["schedule"]
    made = schedule["provenance"]
    method = made.get("method", "how it was made is not said")
    found = {
        "directory": str(subject.bundle.path),
        "seal of the manifest": manifest.seal or "none: it was exported before directories were sealed",
        "made by": f"{facts['created_by']}, format {facts['format_version']}",
        "made with": ", ".join(f"{name} {version}" for name, version in facts["tools"].items()) or "not said",
        "model": f"{facts['model']['name']} ({facts['model']['class_name']})",
        "hash of its configuration": facts["model"]["config_hash"],
        "schedule": f"{method} {_plain(made.get('parameters') or {})}".rstrip(),
        "schedule made by": str(made.get("tool_version", "not said")),
        "sha256 of the schedule": manifest.files.get(manifest.schedule, "not said"),
    }
    engines = facts["engines"]
    found["TensorRT engines, when this page was made"] = (
        "none" if not engines else ", ".join(_engine(row) for row in engines)
    )
    if facts["table_classes"]:
        found["classes"] = f"{', '.join(map(str, facts['table_classes']))} alone"
    return found


def _engine(row: Mapping[str, Any]) -> str:
    return row["name"] if row["problem"] is None else f"{row['name']} ({row['problem']})"


def _missing(body: ET.Element, what: str, command: str, option: str) -> None:
    """What the directory does not hold, and what would give it."""
    line = ET.SubElement(body, "p", {"class": "quiet"})
    line.text = f"No {what} were given. Make them: " if what.endswith("s") else f"No {what} was given. Make it: "
    ET.SubElement(line, "code").text = text(command)
    line[-1].tail = " and give "
    ET.SubElement(line, "code").text = option
    line[-1].tail = "."


def _shares(body: ET.Element, headings: Sequence[str], parts: Mapping[str, float], words: Any) -> None:
    """A table of parts with bars; the largest is the whole width."""
    if not parts:
        return
    most = max(parts.values()) or 1
    rows = [(name, words(value), "") for name, value in parts.items()]
    element = table(body, headings, rows, (headings[1],))
    inside = element.find("tbody")
    assert inside is not None
    for line, value in zip(inside, parts.values(), strict=True):
        line[-1].set("style", "width: 40%")
        line[-1].set("aria-hidden", "true")
        ET.SubElement(line[-1], "span", {"class": "share", "style": f"width: {100 * value / most:.2f}%"})


def _speedup(given: Given) -> float | None:
    """Of the loop, to the other directory's."""
    if given.profile is None or given.against_profile is None:
        return None
    return given.against_profile.loop_seconds / given.profile.loop_seconds


def _allowed(subject: Subject, given: Given) -> float | None:
    """The speed-up that the multiply-accumulates of both directories allow."""
    ours = subject.bundle.manifest.plan.macs_run
    return None if given.against is None or not ours else given.against.bundle.manifest.plan.macs_run / ours


def _plain(values: Mapping[str, Any]) -> str:
    """The plain values of a mapping."""
    shown = {name: value for name, value in values.items() if not isinstance(value, Mapping | list | tuple)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
