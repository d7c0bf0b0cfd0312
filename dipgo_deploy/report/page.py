"""The report on an engine directory as one page of HTML that needs nothing else. Pure functions of what was read."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from dipgo_deploy.engine.budget import size
from dipgo_deploy.page.shell import add_script, new_page, paragraph, section, table, text, written
from dipgo_deploy.report.directory_sections import memory_section, origin_section, schedule_section, solver_section
from dipgo_deploy.report.given import Given
from dipgo_deploy.report.measured_sections import drift_section, pictures_section, quality_section, time_section
from dipgo_deploy.report.subject import Subject
from dipgo_deploy.report.words import count, macs, milliseconds

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


def report_page(subject: Subject, given: Given) -> bytes:
    """The page, UTF-8."""
    root, body = new_page(f"{subject.name}: report")
    _head(body, subject, given)
    schedule_section(section(body, _SECTIONS["schedule"], "schedule"), subject)
    solver_section(section(body, _SECTIONS["solver"], "solver"), subject)
    memory_section(section(body, _SECTIONS["memory"], "memory"), subject)
    time_section(section(body, _SECTIONS["time"], "time"), subject, given)
    quality_section(section(body, _SECTIONS["quality"], "quality"), subject, given)
    pictures_section(section(body, _SECTIONS["pictures"], "pictures"), given)
    drift_section(section(body, _SECTIONS["drift"], "drift"), subject, given)
    origin_section(section(body, _SECTIONS["origin"], "origin"), subject, given)
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
    measured = given.speedup
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
