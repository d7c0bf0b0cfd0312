"""``dipgo-bench``: measure schedules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import (
    checked_outputs,
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    stages,
)
from dipgo_deploy.cli.options import (
    MODEL_HELP,
    PATH,
    Group,
    checkpoint_options,
    class_labels_option,
    device_option,
    engine_dir_option,
    guidance_option,
    model_option,
    of_several_options,
    option,
    prompts_option,
    size_options,
    threads_option,
    version_option,
)

if TYPE_CHECKING:
    from dipgo_deploy.bench.quality import Case, Row
    from dipgo_deploy.bench.statistics import Estimate
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.search.problem import Problem

_FILE_WIDTH = 240
_ALL_COLUMNS = 160
# What a picture that is all but the full run's is asked for.
_WANTED_SSIM = (0.99, 0.995)


@click.group(
    name="dipgo-bench",
    cls=Group,
    epilog=examples("dipgo-bench quality pruned.json uniform.json --model fashion-dit --solver ddim:10"),
)
@version_option
def command() -> None:
    """Measure what schedules do to the images, and where the time of a run goes."""


@command.command(
    epilog=examples(
        "dipgo-bench quality pruned.json uniform.json --model fashion-dit --solver ddim:10 --solver dpm++2m:10",
        "dipgo-bench quality s-*.json --model fashion-sd --per-condition 50 -o quality.json --plot quality.png",
        "dipgo-bench quality fitted-*.json --model fashion-sd --baselines --guidance-scale 4 --strip worst.png",
    )
)
@click.argument("files", type=PATH, nargs=-1)
@model_option
@guidance_option
@option(
    "Schedule",
    "--sampler",
    show_default="the first schedule's, or the model's own",
    help="Sampler of the full run.",
)
@option(
    "Schedule",
    "--steps",
    "--num-inference-steps",
    type=click.IntRange(min=1),
    show_default="the first schedule's, or 50",
    help="Steps of the full run.",
)
@option(
    "Schedule", "--any-sampler", is_flag=True, help="Take schedules with other samplers or steps than the full run's."
)
@option("Schedule", "--any-cache", is_flag=True, help="Take schedules with another kind of cache than the first.")
@prompts_option
@class_labels_option
@option(
    "Prompt",
    "--guidance-scale",
    "guidance_scales",
    type=float,
    multiple=True,
    show_default="the pipeline's own",
    help="Scale of the guidance; given several times, everything is measured at each.",
)
@option(
    "Measurement",
    "--solver",
    "solvers",
    multiple=True,
    show_default="none",
    help="Plain sampler and steps to measure beside the schedules, as in ddim:10; can be given several times.",
)
@option(
    "Measurement",
    "--baselines",
    is_flag=True,
    help="Also measure plain solvers with as many launches as each schedule is worth, and give differences to the best "
    "of them.",
)
@option(
    "Measurement",
    "--launches",
    show_default="none",
    help="Numbers of launches of further baselines, as in 4,5,7.",
)
@option(
    "Measurement",
    "--calibrate",
    "calibration_images",
    type=click.IntRange(min=2),
    show_default="none",
    help="Also measure every schedule without a fitted solver with one, fitted on this many other images.",
)
@option(
    "Measurement",
    "--uncalibrated",
    is_flag=True,
    help="Also measure every fitted schedule without its solver, under the sampler of the full run.",
)
@option(
    "Measurement",
    "--per-condition",
    type=click.IntRange(min=2),
    default=20,
    help="Images for each prompt or class.",
)
@option(
    "Measurement",
    "--metric-weights",
    type=PATH,
    show_default="none",
    help="Folder with weights of learned judges, in folders lpips, clip, hps and image-reward.",
)
@option("Measurement", "--seed", type=click.IntRange(min=0), default=0, help="Seed of the first image.")
@option(
    "Measurement", "--by-ratio", is_flag=True, help="Compare each case with the first one that saves about as much."
)
@size_options
@option(
    "Runtime", "--batch", type=click.IntRange(min=1), show_default="20, of videos 1", help="Images in one evaluation."
)
@device_option
@threads_option("torch's own")
@option("Output", "-o", "--output", type=PATH, old=["--out"], show_default="none", help="JSON file for the result.")
@option(
    "Output", "--plot", type=PATH, show_default="none", help="Picture to draw of the result; needs the extra bench."
)
@option(
    "Output",
    "--strip",
    type=PATH,
    show_default="none",
    help="PNG for the images of every case where the first schedule is worst.",
)
@option("Output", "--strip-images", type=click.IntRange(1, 50), default=8, help="Images in a row of --strip.")
@checkpoint_options("measurement")
@json_option
@quiet_option
@checked_outputs("output", "plot", "strip")
def quality(
    files: tuple[Path, ...],
    solvers: tuple[str, ...],
    baselines: bool,
    launches: str | None,
    calibration_images: int | None,
    uncalibrated: bool,
    guidance_scales: tuple[float, ...],
    threads: int | None,
    output: Path | None,
    plot: Path | None,
    strip: Path | None,
    strip_images: int,
    as_json: bool,
    checkpoint: Path | None,
    metric_weights: Path | None,
    **options: Any,
) -> None:
    """Measure the images of schedules against those of the full run with the same seeds; videos frame by frame.

    FILES are schedules of one model and sampler. The first is what the others are compared with, image by image. For
    the built-in models a classifier says what it recognises.
    """
    from dipgo_deploy.bench.plot import check_plot, plot_quality
    from dipgo_deploy.schedule.document import Schedule

    schedules = [(str(path), Schedule.load(path)) for path in files]
    counts = _counts(launches, baselines)
    if plot is not None:
        check_plot(plot)
    import torch

    from dipgo_deploy.bench.metrics import learned, learned_there, to_the_full_run
    from dipgo_deploy.bench.quality import FULL_RUN, fewest_launches, measure, solver_case
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import load_problem, with_guidance_scale

    solver_cases = [solver_case(text) for text in solvers]
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)

    def tell(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    if metric_weights is not None:
        learned_there(metric_weights)
    metrics, notes = to_the_full_run()
    measuring = {name: options.pop(name) for name in ("per_condition", "seed", "batch", "by_ratio", "resume")}
    taking = {name: options.pop(name) for name in ("any_sampler", "any_cache")}
    rows: list[Row] = []
    with stages(console, "starting") as notify:
        options["guidance_scale"] = guidance_scales[0] if guidance_scales else None
        problem = load_problem(_problem_options(options, [schedule for _, schedule in schedules]), notify)
        if measuring["batch"] is None:
            measuring["batch"] = 20 if problem.source.time_scale is None else 1
        if metric_weights is not None:
            notify("loading the learned judges")
            judges, left_out = learned(metric_weights, prompts=problem.source.text is not None)
            metrics, notes = [*metrics, *judges], [*notes, *left_out]
        if calibration_images is not None:
            schedules = _with_fitted(problem, schedules, calibration_images, notify)
        cases, more = _cases(problem, schedules, counts if baselines else None, uncalibrated, taking)
        cases += solver_cases
        for line in (*notes, *more):
            tell(line)
        notify("making images")
        for scale in guidance_scales or (problem.guidance_scale,):
            at_work = problem if scale in (None, problem.guidance_scale) else with_guidance_scale(problem, scale)
            place = checkpoint if checkpoint is None or len(guidance_scales) < 2 else checkpoint / f"scale-{scale:g}"
            rows += measure(
                at_work,
                cases,
                **measuring,
                metrics=metrics,
                folder=place,
                with_full=True,
                notify=lambda row: tell(_words(row)),
                strip=None if strip is None else _strip_writer(strip, strip_images, scale, len(guidance_scales) > 1),
            )
    sampler = problem.target.sampler
    judged = [row for row in rows if row.name != FULL_RUN.name]
    facts = {
        "model": problem.options.model,
        "reference": {"sampler": sampler.class_name, "steps": sampler.num_inference_steps},
        "guidance_scale": problem.guidance_scale,
        "images": measuring["per_condition"] * len(problem.conditions),
        "conditions": list(problem.names),
        "seed": measuring["seed"],
        "difference_to": _opponents(baselines, measuring["by_ratio"]),
        "macs_full": problem.costs.full,
        "full_run": [row.as_json() for row in rows if row.name == FULL_RUN.name],
        "cases": [row.as_json() for row in judged],
    }
    if baselines:
        facts["fewest_launches"] = [line for least in _WANTED_SSIM for line in fewest_launches(judged, least)]
    _show(console, rows, facts)
    _write(output, facts)
    if plot is not None:
        plot_quality(judged, plot, f"{problem.options.model}, {facts['images']} images")
    emit(facts, as_json)


def _write(output: Path | None, facts: Mapping[str, Any]) -> None:
    from dipgo_deploy.files import write_atomic

    if output is not None:
        write_atomic(output, (json.dumps(facts, indent=2) + "\n").encode())


def _opponents(baselines: bool, by_ratio: bool) -> str:
    if baselines:
        return "the best plain solver that costs about as much, by SSIM"
    return "the first of the same ratio" if by_ratio else "the first"


def _counts(text: str | None, baselines: bool) -> tuple[int, ...]:
    """``4,5,7`` as numbers."""
    from dipgo_deploy.errors import UserError

    if text is None:
        return ()
    if not baselines:
        raise UserError("--launches: is for --baselines; give both")
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--launches {text}: is no list of numbers; give them as in 4,5,7")
    return tuple(int(part) for part in parts)


def _cases(
    problem: Problem,
    schedules: Sequence[tuple[str, Schedule]],
    counts: Sequence[int] | None,
    uncalibrated: bool,
    taking: Mapping[str, bool],
) -> tuple[list[Case], list[str]]:
    """The schedules' cases, with ``uncalibrated`` those without their solvers, and, where ``counts`` is not None, the
    plain solvers beside them; and what was left out."""
    from dipgo_deploy.bench.baselines import baseline_cases, without_solver
    from dipgo_deploy.bench.quality import evaluations_worth, schedule_cases

    cases = schedule_cases(schedules, problem, **taking)
    wanted = sorted({*(counts or ()), *(evaluations_worth(problem, case) for case in cases)})
    left_out = []
    for name, schedule in schedules if uncalibrated else ():
        if schedule.solver is not None:
            case, line = without_solver(problem, name, schedule)
            cases += [] if case is None else [case]
            left_out += [line] if line else []
    if counts is None:
        return cases, left_out
    plain, refused = baseline_cases(problem, wanted)
    return [*cases, *plain], [*left_out, *refused]


def _with_fitted(
    problem: Problem, schedules: Sequence[tuple[str, Schedule]], images: int, notify: Callable[[str], None]
) -> list[tuple[str, Schedule]]:
    """Behind each schedule without a solver the same one with one, fitted to the full run of the problem."""
    from dipgo_deploy.calibrate.fit import CalibrationOptions, calibrate
    from dipgo_deploy.search.problem import with_reference, with_schedule

    sampler = problem.target.sampler
    cases = []
    for name, schedule in schedules:
        cases.append((name, schedule))
        if schedule.solver is not None:
            continue
        problem.source.check(schedule)
        at_work = with_reference(with_schedule(problem, schedule), sampler.class_name, sampler.num_inference_steps)
        label = f"{name}, fitted"
        fitted = calibrate(
            at_work,
            schedule,
            CalibrationOptions(images=images),
            report=partial(_tell_stage, notify, label),
        )
        cases.append((label, fitted))
    return cases


def _tell_stage(notify: Callable[[str], None], label: str, stage: str, done: int, total: int) -> None:
    notify(f"{label}: {stage}")


def _strip_writer(path: Path, count: int, scale: float | None, several: bool) -> Callable[..., None]:
    """Writes the images at which the first case is worst; a file for each guidance scale where there are several."""
    from dipgo_deploy.bench.frames import at_frames
    from dipgo_deploy.bench.quality import REFERENCE
    from dipgo_deploy.bench.strip import strip, worst, write_strip

    def write(rows: Sequence[Row], pictures: Mapping[str, Any], pairs: Sequence[Any]) -> None:
        first = rows[0].frames.get("ssim")
        places = worst(rows[0].per_image["ssim"] if first is None else first.of_worst, count)
        headings = [f"seed {pairs[place].seed}" for place in places]
        chosen = {name: found[places] for name, found in pictures.items()}
        if first is not None:  # of a video, its worst frame
            headings = [f"{one} #{first.worst[place]}" for one, place in zip(headings, places, strict=True)]
            chosen = {name: at_frames(found, first.worst[places]) for name, found in chosen.items()}
        shown = {f"{Path(row.name).name}  {row.ssim.value:.4f}": chosen[row.name] for row in rows}
        target = path.with_name(f"{path.stem}-{scale:g}{path.suffix}") if several else path
        write_strip(strip(chosen[REFERENCE], shown, headings), target)

    return write


def _problem_options(options: dict[str, Any], schedules: Sequence[Any]) -> Any:
    """The full run's settings: what was given, else the first schedule's."""
    from dipgo_deploy.cli.options import class_label_numbers
    from dipgo_deploy.search.problem import ProblemOptions

    chosen = dict(options)
    prompts, labels = chosen.pop("prompts"), class_label_numbers(chosen.pop("class_labels"))
    sampler, steps = chosen.pop("sampler"), chosen.pop("steps")
    if schedules:
        first = schedules[0]
        sampler = sampler or first.sampler.class_name
        steps = steps or first.sampler.num_inference_steps
        chosen |= {"granularity": first.model.granularity}
        kinds = {block.cache for block in first.blocks}
        chosen |= {"cache": kinds.pop()} if len(kinds) == 1 else {}
    return ProblemOptions(
        **chosen,
        sampler=sampler,
        steps=steps or 50,
        prompts=None if prompts is None else str(prompts),
        class_labels=labels,
    )


@command.command(epilog=examples("dipgo-bench profile --engine-dir engines/fashion-sd --threads 1"))
@engine_dir_option
@of_several_options
@option("Measurement", "--repeats", type=click.IntRange(min=1), default=3, help="Runs of the loop.")
@threads_option("the physical cores")
@option(
    "Runtime",
    "--share-weights/--no-share-weights",
    default=False,
    help="Hold one copy of the weights for all graphs: less memory, slower on a CPU.",
)
@option("Output", "-o", "--output", type=PATH, show_default="none", help="JSON file for the result.")
@json_option
@quiet_option
@checked_outputs("output")
def profile(
    engine_dir: Path,
    schedule: str | None,
    launches: int | None,
    repeats: int,
    threads: int | None,
    share_weights: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show where the time of a run goes: its launches, its kernels by block and by operator, and the runtime itself."""
    from dipgo_deploy.bench.profile import profile_loop
    from dipgo_deploy.bundle.directory import Bundle

    bundle = Bundle.open(engine_dir, schedule=schedule, launches=launches)
    console = human_console(as_json)
    with stages(console, "timing the loop, then its kernels"):
        profiled = profile_loop(bundle, repeats=repeats, threads=threads, share_weights=share_weights)
    plan = bundle.manifest.plan
    facts = {
        "engine_dir": str(engine_dir),
        "loop_seconds": profiled.loop,
        "host_seconds": profiled.host,
        "launches": [
            {"step": launch.step, "variant": plan.variants[launch.variant].name, "seconds": seconds}
            for launch, seconds in zip(plan.launches, profiled.launches, strict=True)
        ],
        "kernel_seconds": profiled.kernels,
        "copy_seconds": profiled.copies,
        "blocks": dict(profiled.blocks),
        "operators": dict(profiled.operators),
    }
    _show_profile(console, facts)
    _write(output, facts)
    emit(facts, as_json)


@command.command("graph-costs", epilog=examples("dipgo-bench graph-costs --model fashion-sd --threads 1 -o costs.json"))
@option(
    "Model",
    "--model",
    show_default="chains of large matrix products",
    help="Measure at its native size what its own blocks take: convolutions and small blocks take a multiple of what "
    "large products do. " + MODEL_HELP,
)
@threads_option("the physical cores")
@option(
    "Measurement",
    "--pictures",
    type=click.FloatRange(min=1),
    default=10,
    help="Pictures that a process draws, which share what loading takes: 1 for a process a picture, thousands for a "
    "server.",
)
@option("Output", "-o", "--output", type=PATH, show_default="none", help="JSON file, for dipgo-export --graph-costs.")
@checked_outputs("output")
@json_option
def graph_costs(
    model: str | None,
    threads: int | None,
    pictures: float,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure what a graph costs on this machine: loading it, launching it, and launching it after another one."""
    from dipgo_deploy.bench.graph_costs import measure_graph_costs
    from dipgo_deploy.export.trace import trace_by_name
    from dipgo_deploy.reference.quiet import quiet_libraries

    traced = None
    if model is not None:
        quiet_libraries()
        traced = trace_by_name(model, "block")
    costs = measure_graph_costs(threads, pictures=pictures, model=traced)
    facts = {"model": model, "threads": threads, "costs": vars(costs)}
    human_console(as_json).print(
        f"{costs.macs_per_second / 1e9:.1f} GMACs a second, {costs.launch_seconds * 1e6:.0f} us a launch; a graph "
        f"takes {costs.load_seconds * 1e3:.1f} ms to load and {costs.load_seconds_per_byte * 2**30:.2f} s a GiB of "
        f"weights, and after another one {costs.switch_seconds_per_byte * 2**30:.3f} s a GiB more",
        soft_wrap=True,
        markup=False,
    )
    _write(output, facts)
    emit(facts, as_json)


def _show_profile(console: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table

    launches, kernels = facts["launches"], facts["kernel_seconds"]
    inside = sum(launch["seconds"] for launch in launches)
    console.print(
        f"{facts['loop_seconds'] * 1e3:.2f} ms a loop: {inside * 1e3:.2f} ms in {len(launches)} launches, "
        f"{facts['host_seconds'] * 1e6 / len(launches):.0f} us a launch beside them; with the profiler on, "
        f"{kernels * 1e3:.2f} ms in kernels, {facts['copy_seconds'] / kernels:.0%} of it only moves data",
        soft_wrap=True,
        markup=False,
    )
    variants: dict[str, list[float]] = {}
    for launch in launches:
        variants.setdefault(launch["variant"], []).append(launch["seconds"])
    table = Table(title="launches")
    for heading in ("variant", "launches", "ms each", "share"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, seconds in variants.items():
        mean = sum(seconds) / len(seconds)
        table.add_row(name, str(len(seconds)), f"{mean * 1e3:.3f}", f"{sum(seconds) / inside:.1%}")
    console.print(table)
    for title in ("blocks", "operators"):
        table = Table(title=f"kernels by {title[:-1]}")
        table.add_column(title[:-1])
        for heading in ("ms", "share"):
            table.add_column(heading, justify="right")
        for name, spent in facts[title].items():
            table.add_row(name, f"{spent * 1e3:.3f}", f"{spent / kernels:.1%}")
        console.print(table)


def _show(console: Any, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    wide = not console.is_terminal or console.width >= _ALL_COLUMNS
    names = [name for name in rows[0].metrics if name not in ("ssim", "psnr")]
    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("case", True, lambda row: Path(row.name).name),
        ("guidance", len({row.guidance_scale for row in rows}) > 1, lambda row: f"{row.guidance_scale:g}"),
        ("GMACs", wide, lambda row: f"{row.macs / 1e9:,.2f}"),
        ("saved", wide, lambda row: f"{row.ratio:.1%}"),
        ("launches", True, lambda row: str(row.launches)),
        ("ms", wide, lambda row: f"{row.milliseconds:.1f}"),
        ("SSIM", True, lambda row: _pair(row.ssim, 4)),
        ("worst frame", any(row.frames for row in rows), lambda row: _pair(row.frames["ssim"].estimate, 4)),
        ("better by", True, lambda row: _pair(row.differences.get("ssim"), 4)),
        ("PSNR", wide, lambda row: _pair(row.psnr, 2)),
        *((HEADINGS.get(name, name), wide, partial(_metric, name)) for name in names),
        ("recognised", wide, lambda row: _pair(row.accuracy, 3)),
        ("Frechet", wide, lambda row: _pair(row.frechet, 2)),
    ]
    table = Table(title=f"{facts['model']}: {facts['images']} images beside the full run's, 95% intervals")
    shown = [(heading, cell) for heading, there, cell in columns if there]
    for heading, _ in shown:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in shown))
    # In a file a line may be as long as it needs to be.
    (console if console.is_terminal else Console(file=console.file, width=_FILE_WIDTH, highlight=False)).print(table)
    if not wide:
        console.print("a wider terminal shows more columns, --output has everything", markup=False, soft_wrap=True)
    console.print(
        f"better by: difference of the SSIM to {facts['difference_to']}, image by image; ms: one image's loop in torch",
        markup=False,
        soft_wrap=True,
    )
    for found in facts.get("fewest_launches", []):
        ours, plain = (found[kind] or "none of those measured" for kind in ("ours", "baseline"))
        at = "" if found["guidance_scale"] is None else f", guidance {found['guidance_scale']:g}"
        console.print(
            f"fewest launches for SSIM {found['ssim']:g}{at}: schedules {ours}, plain solvers {plain}",
            markup=False,
            soft_wrap=True,
        )


HEADINGS = {"flip": "FLIP", "haarpsi": "HaarPSI", "gmsd": "GMSD", "lpips": "LPIPS", "clip": "CLIP", "hps": "HPS"}


def _metric(name: str, row: Row) -> str:
    return _pair(row.metrics[name], 4)


def _pair(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.{digits}f} ±{(estimate.high - estimate.low) / 2:.{digits}f}"


def _words(row: Row) -> str:
    return f"{row.name}: {row.ratio:.1%} saved, SSIM {_pair(row.ssim, 4)}"


main = entry_point(command)
