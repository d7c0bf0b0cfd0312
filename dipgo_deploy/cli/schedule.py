"""``dipgo-schedule``: make, import, check, show and compare schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from dipgo_deploy.cli.common import (
    checked_outputs,
    drawable,
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    reading_options,
    stages,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    Group,
    allow_other_config_option,
    cache_option,
    forecast_options,
    granularity_option,
    graph_costs_options,
    model_option,
    option,
    options,
    sampler_options,
    threads_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.schedule.builders import PendingTarget
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.forecast import RuleForecast
    from dipgo_deploy.schedule.importers.base import Importer, Setting

F = TypeVar("F", bound=Callable[..., Any])

_interval_option = option(
    "Schedule",
    "--interval",
    type=click.IntRange(min=1),
    required=True,
    help="Evaluations from one that runs in full to the next.",
)


@click.group(
    name="schedule",
    cls=Group,
    epilog=examples(
        "dipgo-schedule uniform --model fashion-sd --steps 50 --interval 5 -o uniform.json",
        "dipgo-schedule deepcache --model fashion-sd --interval 3 --branch 0 -o deepcache.json",
        "dipgo-schedule import dipgo-gates gates.pkl --model fashion-sd --sampler ddim --steps 50 -o gates.json",
        "dipgo-schedule import smoothcache 50-N-2-fora.json --model fashion-dit --sampler ddim --steps 50 -o fora.json",
        "dipgo-schedule show gates.json --model fashion-sd",
    ),
)
@version_option
def command() -> None:
    """Make, import, check and show schedules: which blocks of a model run at which evaluation."""


def _target_options(function: F, granularity: Literal["block", "layer"] = "block") -> F:
    """The options that say what a schedule is made for, and where it goes. granularity: the default one."""
    decorate = options(
        model_option,
        reading_options,
        sampler_options,
        granularity_option(granularity),
        cache_option("the model family's"),
        forecast_options("taylor", "hermite"),
        option("Output", "-o", "--output", type=PATH, required=True, help="Schedule file to write."),
        checked_outputs("output"),
        json_option,
    )
    return decorate(function)


def _pending(
    model: str,
    sampler: str | None,
    steps: int,
    granularity: Literal["block", "layer"],
    cache: Literal["output", "residual"] | None,
) -> PendingTarget:
    from dipgo_deploy.models.target import pending_target

    return pending_target(model, sampler, steps, granularity, cache)


def _pending_for(file: Path, options: Mapping[str, Any]) -> PendingTarget:
    """The target of a file that can be read at all."""
    from dipgo_deploy.files import read_bytes

    read_bytes(file)
    return _pending(**options)


def _write(schedule: Schedule, output: Path, as_json: bool, forecast: RuleForecast | None) -> None:
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.summary import guidance_line, schedule_facts, schedule_line

    if forecast is not None:
        if schedule.gates == schedule.runs:
            raise UserError("--forecast: no block is skipped, so nothing is forecast; leave it out")
        schedule = schedule.with_forecast(forecast)
    schedule.save(output)
    console = human_console(as_json)
    console.print(f"{output}: {schedule_line(schedule)}", markup=False, soft_wrap=True)
    console.print(schedule_facts(schedule)["worth"]["line"], markup=False, soft_wrap=True)
    if schedule.forecast is not None:
        console.print(f"forecast: {schedule.forecast_line}", markup=False, soft_wrap=True)
    if schedule.guidance is not None:
        console.print(f"guidance: {guidance_line(schedule.guidance)}", markup=False, soft_wrap=True)
    emit({"file": str(output), **schedule_facts(schedule)}, as_json)


@command.command(epilog=examples("dipgo-schedule full --model fashion-sd --sampler ddim --steps 50 -o full.json"))
@_target_options
def full(output: Path, as_json: bool, forecast: RuleForecast | None, **options: Any) -> None:
    """Every block runs at every evaluation."""
    from dipgo_deploy.schedule import builders

    target = _pending(**options).complete()
    gates = target.gates(builders.full)
    _write(target.schedule(gates, "full", {}), output, as_json, forecast)


@command.command(epilog=examples("dipgo-schedule uniform --model fashion-dit --steps 50 --interval 5 -o uniform.json"))
@_interval_option
@_target_options
def uniform(interval: int, output: Path, as_json: bool, forecast: RuleForecast | None, **options: Any) -> None:
    """Every block runs at every INTERVAL-th evaluation, none in between."""
    from dipgo_deploy.schedule import builders

    target = _pending(**options).complete()
    gates = target.gates(lambda steps, blocks: builders.uniform(steps, blocks, interval))
    _write(target.schedule(gates, "uniform", {"interval": interval}), output, as_json, forecast)


@command.command(
    epilog=examples(
        "dipgo-schedule deepcache --model fashion-sd --interval 3 --branch 0 -o deepcache.json",
        "dipgo-schedule deepcache --model fashion-sd --granularity layer --interval 5 --branch 2 -o deepcache.json",
    )
)
@_interval_option
@option(
    "Schedule",
    "--branch",
    type=click.IntRange(min=0),
    default=0,
    help="Innermost branch that runs at every evaluation: DeepCache's cache_branch_id with --granularity layer, the "
    "pair of a down and an up block (0 is the outermost) with --granularity block.",
)
@_target_options
def deepcache(
    interval: int, branch: int, output: Path, as_json: bool, forecast: RuleForecast | None, **options: Any
) -> None:
    """DeepCache: between full evaluations only the shallow branches of a UNet run."""
    from dipgo_deploy.models import family_for
    from dipgo_deploy.models.target import nominal_set_timesteps
    from dipgo_deploy.sampler import make_scheduler, step_positions
    from dipgo_deploy.schedule import builders

    target = _pending(**options).complete()
    scheduler = make_scheduler(target.sampler.class_name, target.sampler.config)
    steps = target.sampler.num_inference_steps
    timesteps = nominal_set_timesteps(family_for(target.model.class_name), {}, scheduler, steps)
    positions = step_positions(scheduler, steps, set_timesteps_kwargs=timesteps)
    gates = builders.deepcache(target.steps, target.block_names, interval, branch, positions)
    _write(target.schedule(gates, "deepcache", {"interval": interval, "branch": branch}), output, as_json, forecast)


@command.command(epilog=examples("dipgo-schedule random --model fashion-sd --ratio 0.5 --seed 1 -o random.json"))
@option("Schedule", "--ratio", type=click.FloatRange(0, 1), required=True, help="Share of all gates that is removed.")
@option("Schedule", "--seed", type=int, default=0, help="Seed of the random choice.")
@_target_options
def random(ratio: float, seed: int, output: Path, as_json: bool, forecast: RuleForecast | None, **options: Any) -> None:
    """Remove gates at random; the first evaluation always runs in full."""
    from dipgo_deploy.schedule import builders

    target = _pending(**options).complete()
    gates = target.gates(lambda steps, blocks: builders.random(steps, blocks, ratio, seed))
    _write(target.schedule(gates, "random", {"ratio": ratio, "seed": seed}), output, as_json, forecast)


class _Kinds(Group):
    """A command for each kind of file, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from dipgo_deploy.schedule.importers.registry import KINDS

        return list(KINDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from dipgo_deploy.schedule.importers.registry import KINDS, REFUSED, importer

        return _import_command(importer(cmd_name)) if cmd_name in (*KINDS, *REFUSED) else None


@command.group(
    name="import",
    cls=_Kinds,
    epilog=examples(
        "dipgo-schedule import dipgo-gates gates.pkl --model fashion-sd --sampler pndm --steps 50 -o gates.json",
        "dipgo-schedule import smoothcache 50-N-2-fora.json --model fashion-dit --sampler ddim --steps 50 -o fora.json",
        "dipgo-schedule import l2c-router DDIM50_router.pt --model DiT-XL-2-256 --sampler ddim --steps 50 -o l2c.json",
        "dipgo-schedule import csv keep.csv --model fashion-dit --steps 50 -o keep.json",
    ),
)
def import_group() -> None:
    """Read schedules of other programs.

    A file with one row less than the sampler has evaluations gets its last row twice.
    """


@command.command(
    name="export",
    epilog=examples(
        "dipgo-schedule export smoothcache fora.json -o for-smoothcache.json",
        "dipgo-schedule export cache-dit schedule.json -o cache.json",
    ),
)
@click.argument("kind")
@click.argument("file", type=PATH)
@option("Output", "-o", "--output", type=PATH, required=True, help="File to write.")
@checked_outputs("output")
@json_option
def export(kind: str, file: Path, output: Path, as_json: bool) -> None:
    """Write a schedule as another program's file, where that says all of it.

    KIND is smoothcache or cache-dit.
    """
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.files import write_atomic
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.importers.registry import WRITTEN, importer
    from dipgo_deploy.schedule.summary import schedule_line

    write = importer(kind).write
    if write is None:
        raise UserError(f"{kind}: cannot be written; give one of {', '.join(WRITTEN)}")
    schedule = Schedule.load(file)
    with _naming(file):
        text = write(schedule)
    write_atomic(output, text.encode())
    human_console(as_json).print(f"{output}: {schedule_line(schedule)}, for {kind}", markup=False, soft_wrap=True)
    emit({"file": str(output), "kind": kind}, as_json)


def _import_command(importer: Importer) -> click.Command:
    """The command that reads one kind of file."""

    @click.argument("file", type=PATH)
    def read(file: Path, output: Path, as_json: bool, forecast: RuleForecast | None, **given: Any) -> None:
        from dipgo_deploy.schedule.importers.base import import_with

        settings = {setting.name: given.pop(setting.name) for setting in importer.settings}
        given["cache"] = given["cache"] or importer.cache
        schedule, notes = import_with(importer, file, _pending_for(file, given), **settings)
        for note in notes:
            human_console(as_json).print(f"{file}: {note}", markup=False, soft_wrap=True)
        _write(schedule, output, as_json, forecast)

    read.__doc__ = f"{importer.title}\n\nFILE is {importer.file}."
    decorated = _target_options(read, importer.granularity)
    for setting in reversed(importer.settings):
        decorated = _setting_option(setting)(decorated)
    line = f"dipgo-schedule import {importer.kind} {importer.example}"
    return click.command(name=importer.kind, cls=Command, epilog=examples(line))(decorated)


def _setting_option(setting: Setting) -> Callable[[F], F]:
    kind: Any = setting.type
    if setting.choices:
        kind = click.Choice(setting.choices)
    elif setting.least is not None:
        kind = click.FloatRange(setting.least, setting.most, min_open=True, max_open=True)
    default = {"show_default": setting.default_text} if setting.default is None else {"default": setting.default}
    return option("Schedule", f"--{setting.name.replace('_', '-')}", type=kind, help=setting.help, **default)


@command.command(
    epilog=examples(
        "dipgo-schedule guidance schedule.json --conditional 30-49 -o cheaper.json",
        "dipgo-schedule guidance schedule.json --share 0-9=0.5 --conditional 45-49 -o other.json",
    )
)
@click.argument("file", type=PATH)
@option(
    "Schedule",
    "--conditional",
    multiple=True,
    metavar="FIRST-LAST",
    help="Evaluations without guidance, at half the cost: the unconditional half of the batch is not computed. May be "
    "given several times.",
    show_default="none",
)
@option(
    "Schedule",
    "--share",
    multiple=True,
    metavar="FIRST-LAST=SHARE",
    help="Evaluations with this much of a run's guidance: the scale is 1 + SHARE x (guidance scale - 1). May be given "
    "several times.",
    show_default="1 for all",
)
@option("Output", "-o", "--output", type=PATH, required=True, help="Schedule file to write.")
@checked_outputs("output")
@json_option
def guidance(file: Path, conditional: tuple[str, ...], share: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Say how much classifier-free guidance each evaluation of a schedule has.

    Blocks are kept where a guided evaluation would read a cache that a conditional-only one wrote, which has no
    unconditional half.
    """
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.builders import with_guidance
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.guidance import shares_of

    if not conditional and not share:
        raise UserError("guidance: nothing is to change; give --conditional or --share")
    schedule = Schedule.load(file)
    shares = shares_of(schedule.guidance or (1.0,) * schedule.steps, conditional, share)
    with _naming(file):
        made, kept = with_guidance(schedule, shares, {"conditional": list(conditional), "share": list(share)})
    if kept:
        step, block = kept[0]
        human_console(as_json).print(
            f"{file}: {len(kept)} gates are kept for unconditional halves, the first of {block} at evaluation {step}",
            markup=False,
            soft_wrap=True,
        )
    if schedule.solver is not None:
        human_console(as_json).print(
            f"{file}: its solver's weights are for another guidance; fit them again with dipgo-calibrate",
            markup=False,
            soft_wrap=True,
        )
    _write(made, output, as_json, None)


@command.command(
    epilog=examples(
        "dipgo-schedule weigh searched.json --model fashion-sd -o weighed.json",
        "dipgo-schedule weigh searched.json --model ./sd15 --pictures 1000 --threads 8 -o server.json",
    )
)
@click.argument("file", type=PATH)
@model_option
@reading_options
@allow_other_config_option
@graph_costs_options
@threads_option("the physical cores")
@option("Output", "-o", "--output", type=PATH, required=True, help="Schedule file to write.")
@checked_outputs("output")
@json_option
@quiet_option
def weigh(
    file: Path,
    model: str,
    allow_other_config: bool,
    graph_costs: Path | None,
    pictures: float | None,
    threads: int | None,
    output: Path,
    as_json: bool,
) -> None:
    """Compute skipped blocks of a schedule after all where a further graph costs more than it saves.

    What that is is measured on this machine. A line says what became of the schedule, also where it stays as written.
    """
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.export.weighing import fitted_to_its_gates, read_graph_costs
    from dipgo_deploy.optimize.weighing import Weighing, weighed_by_name
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.summary import schedule_facts, schedule_line

    costs = None if graph_costs is None else read_graph_costs(graph_costs)
    weighing = Weighing(costs, pictures, threads)
    weighing.check()
    schedule = Schedule.load(file)
    if fitted_to_its_gates(schedule):
        raise UserError(f"{file}: rows were fitted to its gates; weigh the schedule that they are fitted to")
    _check_model(schedule, model, allow_other_config)
    quiet_libraries()
    console = human_console(as_json)
    with stages(console, "loading the model") as stage:
        found, line, used = weighed_by_name(model, schedule, weighing, stage)
    found.save(output)
    console.print(line, markup=False, soft_wrap=True)
    console.print(f"{output}: {schedule_line(found)}", markup=False, soft_wrap=True)
    facts = {"file": str(output), "weighed": line, "graph_costs": None if used is None else vars(used)}
    emit({**facts, **schedule_facts(found)}, as_json)


@command.command(epilog=examples("dipgo-schedule validate schedule.json --model fashion-sd"))
@click.argument("file", type=PATH)
@option("Model", "--model", show_default="none", help="Also check that the schedule was made for this model.")
@allow_other_config_option
@json_option
def validate(file: Path, model: str | None, allow_other_config: bool, as_json: bool) -> None:
    """Check a schedule file: format, gates, number of rows for its sampler, and the model if one is given."""
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.summary import schedule_facts, schedule_line

    schedule = Schedule.load(file)
    checked = ["format", "gates"]
    with _naming(file):
        # The number of rows is checked against the real scheduler, which the base installation does not have.
        if find_spec("diffusers") is not None:
            from dipgo_deploy.models.target import check_sampler

            check_sampler(schedule)
            checked.append("sampler")
        if model is not None:
            _check_model(schedule, model, allow_other_config)
            checked.append("model")
    console = human_console(as_json)
    console.print(f"{file}: valid ({', '.join(checked)}): {schedule_line(schedule)}", markup=False, soft_wrap=True)
    console.print(schedule_facts(schedule)["worth"]["line"], markup=False, soft_wrap=True)
    if schedule.forecast is not None:
        console.print(f"forecast: {schedule.forecast_line}", markup=False, soft_wrap=True)
    if "sampler" not in checked:
        from dipgo_deploy.extras import install

        console.print(f"number of rows for the sampler not checked; {install('export')}", markup=False, soft_wrap=True)
    emit({"file": str(file), "valid": True, "checked": checked, **schedule_facts(schedule)}, as_json)


@command.command(epilog=examples("dipgo-schedule show schedule.json", "dipgo-schedule show s.json --model fashion-sd"))
@click.argument("file", type=PATH)
@option(
    "Model",
    "--model",
    show_default="none",
    help="Also trace this model, and show the MACs kept, the variants, the launches and the memory of the caches.",
)
@allow_other_config_option
@json_option
@quiet_option
def show(file: Path, model: str | None, allow_other_config: bool, as_json: bool) -> None:
    """Show a schedule as a grid of blocks (rows) and evaluations (columns)."""
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.summary import schedule_facts

    schedule = Schedule.load(file)
    facts, console = schedule_facts(schedule), human_console(as_json)
    if model is not None:
        with _naming(file):
            _check_model(schedule, model, allow_other_config)
        with stages(console, f"tracing {model}"):
            facts.update(_planned(schedule, model))
    _print_grid(schedule, console)
    _print_facts(facts, schedule, console)
    emit({"file": str(file), **facts, "keep": list(schedule.keep)}, as_json)


@command.command(name="list", epilog=examples("dipgo-schedule list", "dipgo-schedule list --model fashion-sd"))
@option("Model", "--model", show_default="all", help="Only those of this built-in model.")
@json_option
def list_built_in(model: str | None, as_json: bool) -> None:
    """Built-in schedules: wherever a schedule file is taken, so is one of these names."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.built_in import built_in_schedules
    from dipgo_deploy.schedule.document import Schedule

    rows = []
    for name, path in built_in_schedules().items():
        if model is not None and not name.startswith(f"{model}-"):
            continue
        schedule = Schedule.load(path)
        sampler = f"{schedule.sampler.class_name}, {schedule.sampler.num_inference_steps} steps"
        kept = schedule.kept_share
        rows.append({"name": name, "sampler": sampler, "evaluations": schedule.steps, "kept_gates": kept})
        solver = ", a solver of its own" if schedule.solver is not None else ""
        click.echo(f"{name}: {sampler}; {schedule.steps} evaluations, {kept:.0%} of the gates{solver}", err=as_json)
    if not rows:
        raise UserError(f"--model {model}: no schedule comes with the package for it; leave it out to see all")
    emit({"schedules": rows}, as_json)


@command.command(epilog=examples("dipgo-schedule diff before.json after.json"))
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@json_option
@click.pass_context
def diff(ctx: click.Context, before: Path, after: Path, as_json: bool) -> None:
    """Show what differs between two schedules. Exit status 1 when something does."""
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.frozen import to_json

    difference = Schedule.load(before).diff(Schedule.load(after))
    console = human_console(as_json)
    for name, (old, new) in difference.fields.items():
        console.print(f"{name}: {to_json(old)} -> {to_json(new)}", markup=False, soft_wrap=True)
    for change in difference.gates:
        verb = "kept -> removed" if change.before else "removed -> kept"
        console.print(f"evaluation {change.step}, block {change.block}: {verb}", markup=False, soft_wrap=True)
    if not difference:
        console.print("no difference")
    emit(
        {
            "differ": bool(difference),
            "fields": {name: {"before": to_json(a), "after": to_json(b)} for name, (a, b) in difference.fields.items()},
            "gates": [
                {"step": change.step, "block": change.block, "before": change.before, "after": change.after}
                for change in difference.gates
            ],
        },
        as_json,
    )
    ctx.exit(1 if difference else 0)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name in front of a user's mistake that a check inside finds."""
    from dipgo_deploy.errors import UserError

    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _check_model(schedule: Schedule, model: str, allow_other_config: bool) -> None:
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.models.target import check_schedule

    try:
        check_schedule(schedule, model, allow_other_config=allow_other_config)
    except UserError as error:
        hint = " (--allow-other-config accepts it)" if str(error).startswith("model.config_hash") else ""
        raise UserError(f"{error}{hint}") from error


def _planned(schedule: Schedule, model: str) -> dict[str, Any]:
    """What the compiler makes of the schedule on this model, traced at its native size."""
    from dipgo_deploy.export.planning import denoiser_numbers
    from dipgo_deploy.export.trace import trace_blocks
    from dipgo_deploy.models.location import denoiser_config, pipeline_index
    from dipgo_deploy.plan.compile import compile_plan

    family, config = denoiser_config(model)
    graph = trace_blocks(model, schedule.model.granularity, schedule.cache_kinds)
    plan = compile_plan(
        graph.with_halves() if any(schedule.conditional_only) else graph,
        schedule.gates,
        denoisers=denoiser_numbers(family, schedule),
        forecast=schedule.forecast,
        guidance=schedule.guidance,
    )
    full_macs = plan.macs_full * schedule.steps
    return {
        "kept_macs": plan.macs_schedule / full_macs if full_macs else 1.0,
        "launched_macs": plan.macs_run / full_macs if full_macs else 1.0,
        "variants": len(plan.variants),
        "launches": len(plan.launches),
        "peak_cache_bytes": plan.arena_bytes,
        "batch_of": "one image, guidance" if family.is_guided(config, pipeline_index(model)) else "one image",
    }


def _print_grid(schedule: Schedule, console: Console) -> None:
    """One line a block; a dot is a removed gate, and a blank an evaluation of another denoiser. Evaluations that do not
    fit the width follow below."""
    from rich.text import Text

    kept, removed = tuple(drawable(console, "█·", "#."))
    margin = max(len(name) for name in schedule.block_names) + 2
    width = max(10, (console.width - margin) // 10 * 10)
    for start in range(0, schedule.steps, width):
        stop = min(start + width, schedule.steps)
        ruler = "".join(f"{step:<10d}" for step in range(start, stop, 10))
        console.print(Text(" " * margin + ruler[: stop - start + 3].rstrip(), style="dim"), soft_wrap=True)
        for column, name in enumerate(schedule.block_names):
            line = Text(f"{name:<{margin}}")
            for row, runs in zip(schedule.gates[start:stop], schedule.runs[start:stop], strict=True):
                gate = kept if row[column] else removed if runs[column] else " "
                line.append(gate, style="green" if row[column] else "dim")
            console.print(line, soft_wrap=True)
        console.print()


def _print_facts(facts: Mapping[str, Any], schedule: Schedule, console: Console) -> None:
    from dipgo_deploy.schedule.summary import denoisers_line, guidance_line

    provenance, solver, forecast = facts["provenance"], schedule.solver, schedule.forecast
    lines = {
        "model": f"{facts['model']['class_name']}, {facts['blocks']} units ({facts['model']['granularity']})",
        "sampler": f"{facts['sampler']}, {facts['num_inference_steps']} steps, {facts['steps']} evaluations",
        **({} if schedule.denoisers is None else {"denoisers": denoisers_line(schedule.denoisers)}),
        **({} if schedule.guidance is None else {"guidance": guidance_line(schedule.guidance)}),
        **({} if solver is None else {"solver": solver.summary}),
        **({} if forecast is None else {"forecast": schedule.forecast_line}),
        "made by": str(provenance.get("method", "not said")),
        "kept gates": f"{facts['kept_gates']:.1%}",
        "worth": facts["worth"]["line"].removeprefix("worth: "),
    }
    if "variants" in facts:
        lines["kept MACs"] = f"{facts['kept_macs']:.1%} ({facts['launched_macs']:.1%} launched)"
        lines["variants"] = str(facts["variants"])
        lines["launches"] = f"{facts['launches']} for {facts['steps']} evaluations"
        lines["peak cache"] = f"{facts['peak_cache_bytes'] / 1024:,.1f} KiB (fp32, {facts['batch_of']})"
    for name, value in lines.items():
        console.print(f"{name:<12}{value}", markup=False, soft_wrap=True)


main = entry_point(command)
