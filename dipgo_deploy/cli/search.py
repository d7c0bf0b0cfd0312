"""``dipgo-search``: find the schedules of a model that lose least at a given cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.calibrate import refine_options
from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    free_output,
    human_console,
    json_option,
    overwrite_option,
    progress_bars,
    progress_lines,
    quiet_option,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    F,
    cache_option,
    checkpoint_options,
    class_label_numbers,
    class_labels_option,
    device_option,
    granularity_option,
    guidance_option,
    guidance_scale_option,
    model_option,
    option,
    prompts_option,
    refine_option,
    sampler_options,
    size_options,
    threads_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.calibrate.core import CalibrationOptions
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.search.config import PrunerConfig
    from dipgo_deploy.search.problem import Problem
    from dipgo_deploy.search.run import Found, Reporter, SearchOptions

_RATIO = "--prune-ratio"
_MOST_LAUNCHES = 1000
# They stand here so that the help imports no torch; a test holds them against the library's.
_METHODS = ("dipgo", "dipgo+refine", "refine", "random", "uniform", "deepcache", "genetic", "annealing", "dp")
# Flags of earlier releases, now fields of --config: the type of the value, and the field.
_FLAGS: dict[str, tuple[Any, str]] = {
    "--batch": (int, "batch"),
    "--accumulate": (int, "accumulation"),
    "--loss": (str, "loss"),
    "--alpha": (float, "alpha"),
    "--stop-share": (float, "stop_share"),
    "--optimiser": (str, "optimizer"),
    "--lr": (float, "lr"),
    "--momentum": (float, "momentum"),
    "--weight-decay": (float, "weight_decay"),
    "--warmup": (int, "warmup"),
    "--clip": (float, "clip"),
    "--temperature": ((float, float), "temperature"),
    "--width-of-queries": (int, "width"),
    "--encoder": (str, "encoder"),
    "--layers": (int, "layers"),
    "--heads": (str, "heads"),
    "--pool": (int, "pool"),
}


class _ManyRatios(Command):
    """``--prune-ratio 0.4 0.6`` as well as ``--prune-ratio 0.4 --prune-ratio 0.6``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_ratios(args))


def spread_ratios(args: Sequence[str]) -> list[str]:
    """Repeat ``--prune-ratio`` in front of each of the numbers that follow it."""
    spread: list[str] = []
    inside = False
    for place, argument in enumerate(args):
        if inside and args[place - 1] != _RATIO:
            inside = _is_number(argument)
            if inside:
                spread.append(_RATIO)
        if argument == _RATIO:
            inside = True
        spread.append(argument)
    return spread


def _pruner_flags(function: F) -> F:
    """The hidden flags of ``_FLAGS``, each the parameter ``pruner_`` and the field."""
    for flag, (kind, name) in _FLAGS.items():
        function = option("Pruner", flag, f"pruner_{name}", type=kind, hidden=True)(function)
    return option("Pruner", "--one-noise", "pruner_one_noise", is_flag=True, default=None, hidden=True)(function)


@click.command(
    name="dipgo-search",
    cls=_ManyRatios,
    epilog=examples(
        "dipgo-search --model fashion-dit --steps 50 --prune-ratio 0.8 -o schedule.json",
        "dipgo-search --model fashion-sd --sampler ddim --front 4:10 -o schedule.json",
        "dipgo-search --model fashion-sd --sampler ddim --prune-ratio 0.4 0.6 0.8 --checkpoint run -o schedule.json",
        "dipgo-search --model ./sd15 --prompts prompts.txt --preset paper --method dipgo --prune-ratio 0.8 -o s.json",
        "dipgo-search --model fashion-dit --method uniform --prune-ratio 0.8 -o uniform.json",
        "dipgo-search --model fashion-sd --sampler deis --steps 16 --reference ddim:20 --method refine "
        "--prune-ratio 0.6 -o s.json",
    ),
)
@model_option
@guidance_option
@sampler_options
@option(
    "Schedule",
    "--reference",
    show_default="the full run of --sampler and --steps",
    help="Run whose images the schedules have to keep, and whose cost they save a share of: sampler and steps, as in "
    "ddim:50, or a sampler with as many steps as --steps.",
)
@granularity_option()
@cache_option("the model family's; refinement takes the one that loses least")
@prompts_option
@class_labels_option
@guidance_scale_option
@option(
    "Search",
    _RATIO,
    "ratios",
    type=click.FloatRange(0, 1, max_open=True),
    multiple=True,
    show_default="none",
    help="Share of the cost of the full run to save; several numbers give several schedules from one pruner.",
)
@option(
    "Search",
    "--launches",
    type=click.IntRange(min=1),
    multiple=True,
    show_default="none",
    help="Instead of a ratio: this many launches of the whole denoiser, where under the solver that is fitted to them "
    "they come closest to the full run; can be given several times.",
)
@option("Search", "--front", show_default="none", help="Every number of launches from one to another, as in 4:10.")
@option(
    "Search",
    "--method",
    type=click.Choice(_METHODS),
    default="dipgo+refine",
    help="How schedules are found: dipgo is the paper's pruner; +refine also makes small moves on the true objective; "
    "refine does without a pruner; the others are baselines.",
)
@option(
    "Search",
    "--prune-by",
    type=click.Choice(["macs", "latency"]),
    default="macs",
    help="What a cost is: multiply-accumulates, or the time on this machine's CPU.",
)
@option(
    "Search",
    "--max-variants",
    type=click.IntRange(min=1),
    show_default="no limit",
    help="Merge graphs until at most this many are left, by computing the cheapest skipped blocks after all.",
)
@option(
    "Search",
    "--budget",
    type=click.IntRange(min=0),
    default=200,
    help="How often the true objective may be computed for each ratio.",
)
@option(
    "Search",
    "--images",
    type=click.IntRange(min=1),
    default=16,
    help="Images that the true objective is the mean over.",
)
@option(
    "Search",
    "--start",
    "starts",
    type=PATH,
    multiple=True,
    show_default="none",
    help="Schedule file that refinement may start at too; can be given several times.",
)
@option(
    "Search",
    "--search-guidance",
    is_flag=True,
    help="Let the search also leave out the unconditional half of evaluations: each has one more gate, and is "
    f"conditional only without it, at half the cost. With {_RATIO}.",
)
@option("Search", "--seed", type=click.IntRange(min=0, max=400_000), default=0, help="Seed of the search.")
@option(
    "Pruner",
    "--preset",
    type=click.Choice(["small", "paper"]),
    default="small",
    help="Size and settings of the pruner: for small models and little time, or those of the paper.",
)
@option(
    "Pruner",
    "--iterations",
    type=click.IntRange(min=1),
    show_default="small 100, paper 1000",
    help="Iterations of the training of the pruner.",
)
@option(
    "Pruner",
    "--config",
    "config_file",
    type=PATH,
    show_default="none",
    help='JSON object in a file, such as {"lr": 0.05}, with hyper-parameters of the pruner that take the place of the '
    "preset's: iterations, batch, accumulation, loss, alpha, stop_share, optimizer, lr, momentum, weight_decay, "
    "warmup, clip, temperature, precision, width, encoder, layers, heads, pool, one_noise.",
)
@option(
    "Pruner",
    "--warm-start",
    show_default="keep every gate",
    help="Schedule file that the training starts at, or `uniform`: for each ratio a pruner of its own, which starts at "
    "the uniform interval.",
)
@_pruner_flags
@option(
    "Calibration",
    "--calibrate/--no-calibrate",
    default=True,
    help="Judge gates under the solver that is fitted to them, and write it into the schedule; without it a schedule "
    "keeps the sampler, as in the paper.",
)
@option(
    "Calibration",
    "--calibration-images",
    type=click.IntRange(min=2),
    default=200,
    help="Images that the solver of a schedule is fitted to.",
)
@refine_option
@size_options
@option(
    "Runtime",
    "--image-batch",
    type=click.IntRange(min=1),
    default=16,
    help="Images of the true objective that go through the model at once.",
)
@option(
    "Runtime",
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    show_default="fp32",
    help="Precision of the denoiser in the training; bf16 runs it under autocast.",
)
@device_option
@threads_option("torch's own")
@option(
    "Output",
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="Schedule file; with several ratios or numbers of launches each is put before the suffix, as in "
    "schedule-0.80.json.",
)
@checkpoint_options("training of the pruner, and its log")
@option(
    "Output",
    "--save-every",
    type=click.IntRange(min=1),
    default=20,
    help="Iterations from one checkpoint to the next.",
)
@overwrite_option
@json_option
@quiet_option
@version_option
def command(
    output: Path,
    overwrite: bool,
    checkpoint: Path | None,
    resume: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Search schedules that save a share of the cost, or have few launches, and keep the images as they are."""
    from dipgo_deploy.calibrate.core import CalibrationOptions

    targets = _targets(options)
    named = output_files(output, targets)
    paths = {
        target: free_output(path, "--output", overwrite=overwrite) for target, path in zip(targets, named, strict=True)
    }
    if options["search_guidance"]:
        from dipgo_deploy.search.run import check_guidance_gates

        if not options["ratios"]:
            raise click.UsageError(f"--search-guidance: launches are searched whole and guided; use {_RATIO}")
        check_guidance_gates(options["method"], options["max_variants"])
    pruner = pruner_config(options)
    fit = CalibrationOptions(images=options["calibration_images"], batch=options["image_batch"])
    if options["calibrate"]:
        fit.check("--calibration-images")
    import torch

    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import load_problem

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)
    with _reporting(console, options) as reporter:
        problem = load_problem(_problem_options(options), reporter.stage)

        def save(target: float, schedule: Schedule, words: str) -> None:
            schedule.save(paths[target])
            console.print(f"{paths[target]}: {words}", markup=False, soft_wrap=True)

        if options["ratios"]:
            settings = _search_options(options, pruner, problem.target.model.class_name, threads)
            facts = _search_ratios(problem, settings, fit, options, save, checkpoint, resume, reporter)
        else:
            facts = _search_launches(problem, targets, fit, options, save, checkpoint, resume, reporter)
    emit({"schedules": [{"file": str(paths[target]), **one} for target, one in facts.items()]}, as_json)


def _targets(options: dict[str, Any]) -> tuple[float, ...]:
    """Ratios, or numbers of launches."""
    front = _front(options["front"])
    given = [name for name, values in ((_RATIO, options["ratios"]), ("--launches", options["launches"])) if values]
    if front:
        given.append("--front")
    if len(given) != 1:
        both = f"{' and '.join(given)}: " if given else ""
        raise click.UsageError(f"{both}give one of {_RATIO}, --launches and --front")
    if not options["ratios"] and not options["calibrate"]:
        raise click.UsageError(f"--no-calibrate: launches are searched under their fitted solver; use {_RATIO}")
    targets: tuple[float, ...] = options["ratios"] or options["launches"] or front
    return targets


def _front(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= _MOST_LAUNCHES):
        raise click.UsageError(f"--front {text}: is no range; give the least and the most launches, as in 4:10")
    return tuple(range(int(low), int(high) + 1))


def _search_ratios(
    problem: Problem,
    settings: SearchOptions,
    fit: CalibrationOptions,
    options: dict[str, Any],
    save: Callable[[float, Schedule, str], None],
    checkpoint: Path | None,
    resume: bool,
    reporter: Reporter,
) -> dict[float, dict[str, Any]]:
    from dipgo_deploy.calibrate.fit import calibrate
    from dipgo_deploy.calibrate.objective import calibrated_objective
    from dipgo_deploy.search.evaluate import Objective
    from dipgo_deploy.search.problem import with_guidance
    from dipgo_deploy.search.run import choose_cache, search

    def finish(schedule: Schedule) -> Schedule:
        refine = refine_options(options["refine_iterations"])
        found = with_guidance(problem, schedule.guidance)
        return calibrate(found, schedule, fit, refine=refine, report=reporter.progress)

    with TemporaryDirectory() as folder:

        def objective(searched: Problem) -> Objective:
            own = Path(mkdtemp(dir=folder))
            return calibrated_objective(
                searched, settings.train.loss, own, settings.images, on_evaluation=reporter.evaluation
            )

        judge = objective if options["calibrate"] else None
        if options["cache"] is None and settings.method.endswith("refine"):
            problem = choose_cache(problem, settings, reporter, judge)
        settings = replace(settings, starts=_starts(options["starts"], problem.target, options["search_guidance"]))
        found = search(
            problem,
            settings,
            folder=checkpoint,
            resume=resume,
            reporter=replace(reporter, found=lambda one: save(one.target, one.schedule, _words(one))),
            objective=judge,
            finish=finish if options["calibrate"] else None,
        )
    return {one.target: _facts(one) for one in found}


def _search_launches(
    problem: Problem,
    counts: Sequence[float],
    fit: CalibrationOptions,
    options: dict[str, Any],
    save: Callable[[float, Schedule, str], None],
    checkpoint: Path | None,
    resume: bool,
    reporter: Reporter,
) -> dict[float, dict[str, Any]]:
    from dipgo_deploy.calibrate.fit import calibrated_launches
    from dipgo_deploy.calibrate.launch_search import LaunchSearchOptions

    def found(count: int, schedule: Schedule) -> None:
        error = _launch_facts(schedule)["residual"]
        words = f"{count} launches; relative error of the final latent {error:.4g} on images held aside"
        save(count, schedule, words)

    schedules = calibrated_launches(
        problem,
        [int(count) for count in counts],
        fit,
        search=LaunchSearchOptions(budget=options["budget"]),
        refine=refine_options(options["refine_iterations"]),
        folder=checkpoint,
        resume=resume,
        report=reporter.progress,
        found=found,
    )
    return {count: _launch_facts(schedule) for count, schedule in schedules.items()}


def _launch_facts(schedule: Schedule) -> dict[str, Any]:
    from dipgo_deploy.calibrate.fitted import residual_of

    assert schedule.solver is not None
    return {
        "launches": schedule.steps,
        "timesteps": list(schedule.solver.timesteps),
        "residual": residual_of(schedule.solver),
    }


def output_files(output: Path, ratios: Sequence[float]) -> list[Path]:
    """One file a ratio, or a number of launches."""
    if len(ratios) == 1:
        return [output]
    names = [f"{ratio}" if isinstance(ratio, int) else f"{ratio:.2f}" for ratio in ratios]
    if len(set(names)) < len(names):
        names = [f"{ratio:g}" for ratio in ratios]
    if len(set(names)) < len(names):
        raise click.UsageError(f"{_RATIO}, --launches: the same number is given twice")
    return [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]


def _problem_options(options: dict[str, Any]) -> Any:
    from dipgo_deploy.search.problem import ProblemOptions, sampler_and_steps

    reference = options["reference"]
    names = ("model", "sampler", "steps", "granularity", "cache", "height", "width", "num_frames", "guidance")
    prompts = options["prompts"]
    return ProblemOptions(
        **{name: options[name] for name in names},
        guidance_scale=options["guidance_scale"],
        prompts=None if prompts is None else str(prompts),
        class_labels=class_label_numbers(options["class_labels"]),
        reference=None if reference is None else sampler_and_steps(reference, "--reference", options["steps"]),
        device=options["device"],
        guidance_gates=options["search_guidance"],
    )


def _starts(files: Sequence[Path], target: Any, halves: bool) -> tuple[tuple[str, Any], ...]:
    """Gates of schedule files by name; a start for other blocks or with other caches means something else here."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.document import Schedule

    found = []
    for path in files:
        schedule = Schedule.load(path)
        if schedule.model != target.model or schedule.blocks != target.blocks:
            raise UserError(
                f"--start {path}: was made for another model, or for other blocks or caches of it; leave it out"
            )
        found.append((path.stem, _gates_of(path, schedule, halves)))
    return tuple(found)


def _warm_gates(file: str, halves: bool) -> Any:
    from dipgo_deploy.schedule.document import Schedule

    return _gates_of(file, Schedule.load(file), halves)


def _gates_of(file: str | Path, schedule: Schedule, halves: bool) -> Any:
    """Gates as a search has them. It runs caches and guidance as they are, so others would be judged by what they do
    not do. halves: unconditional halves are gates."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.search.halves import joined

    if schedule.forecast is not None:
        raise UserError(f"{file}: has a forecast, which a search does not run; give a schedule without one")
    if schedule.guidance is not None and not halves:
        raise UserError(
            f"{file}: has a guidance of its own, which a search does not run without --search-guidance; give that, or "
            "a schedule without one"
        )
    guidance = schedule.guidance or (1.0,) * schedule.steps
    if not set(guidance) <= {0.0, 1.0}:
        raise UserError(f"{file}: has shares of the guidance, which a search does not run; give a schedule without one")
    return joined(schedule.gates, guidance) if halves else schedule.gates


def pruner_config(options: dict[str, Any]) -> PrunerConfig:
    """Hyper-parameters from ``--config`` and, above them, from flags; flags that go away are named on stderr.

    Raises:
        UserError: the file or a flag is wrong.
    """
    from dipgo_deploy.search.config import PrunerConfig, load_config, with_values

    flags = {name: flag for flag, (_, name) in _FLAGS.items()} | {"one_noise": "--one-noise"}
    old = {name: options[f"pruner_{name}"] for name in flags if options[f"pruner_{name}"] is not None}
    if old:
        fields = ", ".join(f"{flags[name]} as {name}" for name in old)
        click.echo(f"{fields}: belongs into the file of --config; the flags go away with the next release", err=True)
    config = PrunerConfig() if options["config_file"] is None else load_config(options["config_file"])
    given = {name: options[name] for name in ("iterations", "precision") if options[name] is not None}
    return with_values(config, old | given)


def _search_options(
    options: dict[str, Any], config: PrunerConfig, class_name: str, threads: int | None
) -> SearchOptions:
    """What was given, and for the rest the preset."""
    from dipgo_deploy.search.pruner import SIZES
    from dipgo_deploy.search.run import SearchOptions
    from dipgo_deploy.search.train import PRESETS

    preset = options["preset"]
    train = replace(PRESETS[preset], save_every=options["save_every"])
    if preset == "paper" and class_name == "DiTTransformer2DModel":
        train = replace(train, lr=10.0)
    chosen = config.chosen()
    size = {name: chosen.pop(name) for name in ("width", "encoder", "layers", "heads") if name in chosen}
    stream = {name: chosen.pop(name) for name in ("pool", "one_noise") if name in chosen}
    start = options["warm_start"]
    return SearchOptions(
        **{name: options[name] for name in ("method", "ratios", "budget", "images", "image_batch", "seed")},
        **stream,
        size=replace(SIZES[preset], **size),
        train=replace(train, **chosen),
        warm_start=start if start is None or start == "uniform" else _warm_gates(start, options["search_guidance"]),
        max_variants=options["max_variants"],
        prune_by=options["prune_by"],
        threads=threads,
    )


@contextmanager
def _reporting(console: Console, options: dict[str, Any]) -> Iterator[Reporter]:
    """A progress bar for the pruner and one for the evaluations; plain lines where there is no terminal."""
    from dipgo_deploy.search.run import Reporter

    tell = progress_lines(console)
    with progress_bars(console, "facts") as bars:
        current = bars.add_task("starting", total=None, facts="")

        def stage(name: str) -> None:
            bars.reset(current, description=name, total=None, facts="")
            tell(name)

        def iteration(progress: Any) -> None:
            facts = f"kept {progress.kept:.1%}, loss {progress.loss:.4f}"
            bars.update(current, completed=progress.iteration, total=progress.iterations, facts=facts)
            if progress.iteration % options["save_every"] == 0:
                tell(f"iteration {progress.iteration} of {progress.iterations}: {facts}, {progress.seconds:.2f} s")

        def evaluation(count: int, best: float) -> None:
            bars.update(current, completed=count, facts=f"lowest loss {best:.4f}")
            if count % 50 == 0:
                tell(f"evaluation {count}: lowest loss {best:.4f}")

        def progress(name: str, done: int, total: int) -> None:
            if name != progressing[-1]:
                progressing.append(name)
                stage(name)
            bars.update(current, completed=done, total=total or None)

        progressing = [""]
        yield Reporter(stage, iteration, evaluation, progress=progress)


def _words(found: Found) -> str:
    loss = "" if found.loss is None else f", loss {found.loss:.4f}"
    half = sum(found.schedule.conditional_only)
    halves = f", {half} of {found.schedule.steps} evaluations conditional only" if half else ""
    return f"saves {found.ratio:.4f} of the cost, {found.schedule.kept_share:.1%} of the gates kept{halves}{loss}"


def _facts(found: Found) -> dict[str, Any]:
    return {
        "target_ratio": found.target,
        "achieved_ratio": found.ratio,
        "kept_gates": found.schedule.kept_share,
        "loss": found.loss,
        "launches": found.schedule.steps if found.schedule.solver is not None else None,
        "conditional_only": sum(found.schedule.conditional_only),
    }


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


main = entry_point(command)
