"""The sections of a report that show what is in the directory: schedule, sampler, memory, origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from dipgo_deploy.engine.budget import size
from dipgo_deploy.engine.contents import lifetimes
from dipgo_deploy.page.shell import facts_table, folded, paragraph, table, text
from dipgo_deploy.report import memory_chart, schedule_chart, solver_chart
from dipgo_deploy.report.chart import key, put, shares
from dipgo_deploy.report.given import Given
from dipgo_deploy.report.subject import Subject
from dipgo_deploy.report.words import count, macs
from dipgo_deploy.schedule.summary import denoisers_line, guidance_line, ranges


def schedule_section(body: ET.Element, subject: Subject) -> None:
    """Heat map of the schedule, and its graphs."""
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
        paragraph(
            body,
            f"Forecast: {subject.schedule.forecast_line}.",
        )
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


def solver_section(body: ET.Element, subject: Subject) -> None:
    """Timesteps of the launches, and the weights of the rows."""
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


def memory_section(body: ET.Element, subject: Subject) -> None:
    """Bytes by part, and the arena over the launches."""
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
    shares(body, ("part", "bytes", ""), parts, size)
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


def origin_section(body: ET.Element, subject: Subject, given: Given) -> None:
    """Where both directories come from: seal, versions, hashes."""
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


def _plain(values: Mapping[str, Any]) -> str:
    """The plain values of a mapping."""
    shown = {name: value for name, value in values.items() if not isinstance(value, Mapping | list | tuple)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
