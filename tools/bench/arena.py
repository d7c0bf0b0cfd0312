"""Cache memory of shipped, published and random schedules against what no allocation can beat; nothing is run.

python -m tools.bench.arena --model fashion-sd --model fashion-dit --collect docs/results/arena.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import Gates, Schedule
from tools.bench.pairs import SCHEDULES, full_schedule
from tools.bench.tables import table, with_earlier

RATIOS = (0.2, 0.4, 0.5, 0.6, 0.75, 0.9)
_PATH = click.Path(path_type=Path)


@click.command(name="arena")
@click.option("--model", "models", multiple=True, required=True, help="Built-in model or folder.")
@click.option("--schedule", "files", type=_PATH, multiple=True, help="Further schedules of these models.")
@click.option("--granularity", "granularities", type=click.Choice(["block", "layer"]), multiple=True)
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True, help="Of the random schedules.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Random schedules of a ratio.")
@click.option("--segments/--no-segments", default=True, show_default=True, help="That layout too.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    models: tuple[str, ...],
    files: tuple[Path, ...],
    granularities: tuple[Any, ...],
    steps: int,
    seeds: int,
    segments: bool,
    collect: Path | None,
    as_json: bool,
) -> None:
    """Plan every schedule in both layouts, one trace for each model and granularity."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, replan
    from dipgo_deploy.export.planning import in_segments
    from dipgo_deploy.reference.quiet import quiet_libraries

    quiet_libraries()
    console = human_console(as_json)
    rows: list[dict[str, Any]] = []
    for model in models:
        for granularity in granularities or ("block", "layer"):
            target = schedule_target(model, "ddim", steps, granularity)
            blank = target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})
            traced = plan_export(
                model, full_schedule(blank), ExportOptions(layout="variants", components=False, check=False)
            )
            for name, schedule in _schedules(blank, files, seeds):
                try:
                    planned = replan(traced, schedule)
                except UserError:
                    continue  # made for another model, or for other cache kinds
                layouts: dict[str, Any] = {"variants": planned.plan}
                if segments:
                    layouts["segments"] = in_segments(planned)
                for layout, plan in layouts.items():
                    rows.append(
                        {
                            "model": Path(model).name,
                            "granularity": granularity,
                            "schedule": name,
                            "layout": layout,
                            "arena_bytes": plan.arena_bytes,
                            "lower_bound_bytes": plan.lower_bound_bytes,
                        }
                    )
            console.print(f"{model}, {granularity}: {len(rows)} plans so far", markup=False)
    if collect is not None:
        rows = with_earlier(collect, rows, _key)
        collect.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
        collect.with_suffix(".md").write_text(as_text(rows), encoding="utf-8")
    console.print(as_text(rows), markup=False, soft_wrap=True)
    emit({"rows": rows}, as_json)


main = entry_point(command)


def _schedules(blank: Schedule, files: Sequence[Path], seeds: int) -> Iterator[tuple[str, Schedule]]:
    names = [block.name for block in blank.blocks]
    steps, units = blank.steps, len(names)
    for path in [*sorted(SCHEDULES.glob("*.json")), *sorted((SCHEDULES / "searched").glob("*.json")), *files]:
        yield path.stem, Schedule.load(path)
    by_rule: dict[str, Gates] = {"uniform5": builders.uniform(steps, units, 5)}
    if names[0].startswith("down_blocks"):
        by_rule["deepcache5"] = builders.deepcache(steps, names, 5, 0)
    for ratio in RATIOS:
        for seed in range(seeds):
            by_rule[f"random{round(100 * ratio)}, seed {seed}"] = builders.random(steps, units, ratio, seed)
    for name, gates in by_rule.items():
        yield name, blank.with_gates(gates, provenance={"method": name, "parameters": {}})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["granularity"], row["schedule"], row["layout"]


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers: per model, granularity and layout, and every plan above 1.05 times the bound."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["granularity"], row["layout"]), []).append(row)
    above = [row for row in rows if _over(row) > 1.05]
    lines = [
        "# Cache memory against the lower bound\n",
        "Size of the cache arena over the most bytes of caches alive at one launch, which no allocation can beat "
        "(`dipgo-export --plan-only` reports both before anything is built). Schedules: all that are shipped and fit "
        "the model, published ones, by rule, and random ones that remove "
        f"{', '.join(f'{ratio:.0%}' for ratio in RATIOS)} of the gates. The bound leaves out what a graph writes at a "
        "launch and nobody reads (another launch of the same graph is read), which needs its room all the same. Made "
        "by `python -m tools.bench.arena`.\n",
        table(
            ("model, granularity, layout", "plans", "largest arena, MiB", "mean / bound", "worst / bound"),
            [
                (
                    ", ".join(group),
                    str(len(members)),
                    f"{max(row['arena_bytes'] for row in members) / 2**20:.2f}",
                    f"{sum(map(_over, members)) / len(members):.4f}",
                    f"{max(map(_over, members)):.4f}",
                )
                for group, members in groups.items()
            ],
        ),
        f"{len(above)} of {len(rows)} plans are more than 5% above the bound.\n",
    ]
    if above:
        lines.append(
            table(
                ("model, granularity, layout", "schedule", "arena, KiB", "bound, KiB"),
                [
                    (
                        f"{row['model']}, {row['granularity']}, {row['layout']}",
                        row["schedule"],
                        f"{row['arena_bytes'] / 1024:.0f}",
                        f"{row['lower_bound_bytes'] / 1024:.0f}",
                    )
                    for row in above
                ],
            )
        )
    return "\n".join(lines)


def _over(row: Mapping[str, Any]) -> float:
    bound = row["lower_bound_bytes"]
    return float(row["arena_bytes"]) / bound if bound else 1.0


if __name__ == "__main__":
    raise SystemExit(main(None))
