"""``dipgo-search``: find the schedules of a model that lose least at a given cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    free_output,
    human_console,
    json_option,
    live,
    overwrite_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.search.run import Found, Reporter, SearchOptions

_PATH = click.Path(path_type=Path)
_RATIO = "--prune-ratio"
# They stand here so that the help imports no torch; a test holds them against the library's.
_METHODS = ("dipgo", "dipgo+refine", "refine", "random", "uniform", "deepcache", "genetic", "annealing", "dp")
_LOSSES = ("ssim", "l1", "l2", "ssim+l1", "latent-l1", "latent-l2")


class _ManyRatios(click.Command):
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


@click.command(
    name="search",
    cls=_ManyRatios,
    epilog=examples(
        "dipgo-search --model fashion-dit --steps 50 --prune-ratio 0.8 -o schedule.json",
        "dipgo-search --model fashion-sd --sampler ddim --prune-ratio 0.4 0.6 0.8 --checkpoint run -o schedule.json",
        "dipgo-search --model ./sd15 --prompts prompts.txt --preset paper --method dipgo --prune-ratio 0.8 -o s.json",
        "dipgo-search --model fashion-dit --method uniform --prune-ratio 0.8 -o uniform.json",
        "dipgo-search --model fashion-sd --sampler deis --steps 16 --reference ddim:20 --method refine "
        "--prune-ratio 0.6 -o s.json",
    ),
)
@click.option("--model", required=True, help="fashion-sd, fashion-dit, a folder in diffusers' format, or a hub id.")
@click.option("--sampler", help="ddim, pndm, dpm++2m, euler, ... or a diffusers class. [default: the model's own]")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Denoising steps.")
@click.option(
    "--reference",
    help="Sampler and steps of the run whose images are kept and whose cost is saved of, as in ddim:50; without steps, "
    "as many as --steps.  [default: the full run of --sampler and --steps]",
)
@click.option(
    _RATIO,
    "ratios",
    type=click.FloatRange(0, 1, max_open=True),
    multiple=True,
    required=True,
    help="Share of the cost of the full run to save; several numbers give several schedules from one pruner.",
)
@click.option(
    "-o",
    "--output",
    type=_PATH,
    required=True,
    help="Schedule file; with several ratios each is put before the suffix, as in schedule-0.80.json.",
)
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default="dipgo+refine",
    show_default=True,
    help="dipgo is the paper's; +refine also makes small moves on the true objective; refine does without a pruner.",
)
@click.option("--granularity", type=click.Choice(["block", "layer"]), default="block", show_default=True)
@click.option(
    "--cache",
    type=click.Choice(["output", "residual"]),
    help="[default: the model family's; refinement takes the one that loses least]",
)
@click.option("--prompts", type=_PATH, help="Text file, one prompt a line. [default: those of fashion-sd]")
@click.option("--class-labels", help="Comma-separated numbers, for a class model. [default: all it names]")
@click.option("--height", type=click.IntRange(min=1), help="Image height in pixels. [default: the model's]")
@click.option("--width", type=click.IntRange(min=1), help="Image width in pixels. [default: the model's]")
@click.option("--guidance/--no-guidance", default=None, help="Classifier-free guidance. [default: the pipeline's]")
@click.option("--guidance-scale", type=float, help="[default: the pipeline's own]")
@click.option("--prune-by", type=click.Choice(["macs", "latency"]), default="macs", show_default=True)
@click.option("--max-variants", type=click.IntRange(min=1), help="Raise gates until at most so many graphs are left.")
@click.option("--budget", type=click.IntRange(min=0), default=200, show_default=True, help="Evaluations a ratio.")
@click.option("--images", type=click.IntRange(min=1), default=16, show_default=True, help="Images an evaluation.")
@click.option("--image-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Of these at a time.")
@click.option("--preset", type=click.Choice(["small", "paper"]), default="small", show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), help="Of the pruner.  [default: small 100, paper 1000]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images a run.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Runs an iteration.")
@click.option("--loss", type=click.Choice(_LOSSES), default="ssim", show_default=True)
@click.option("--alpha", type=click.FloatRange(min=0), help="Weight of the sparsity. [default: small 0.5, paper 1]")
@click.option("--stop-share", type=click.FloatRange(0, 1), default=0.2, show_default=True)
@click.option("--optimiser", type=click.Choice(["sgd", "adam", "adamw"]), help="[default: small adam, paper sgd]")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="[default: small 0.03, paper 0.1, DiT 10]")
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option("--weight-decay", type=click.FloatRange(min=0), default=1e-4, show_default=True)
@click.option("--warmup", type=click.IntRange(min=0), default=0, show_default=True, help="Iterations of warm-up.")
@click.option("--clip", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Gradient norm; 0: none.")
@click.option("--temperature", type=(float, float), default=(1.0, 1.0), show_default=True, help="Start and end.")
@click.option("--width-of-queries", type=click.IntRange(min=1), help="D. [default: small 64, paper 512]")
@click.option("--encoder", type=click.Choice(["attention", "linear"]), default="attention", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=1, show_default=True, help="Of the encoder.")
@click.option("--heads", type=click.Choice(["per-gate", "shared"]), default="per-gate", show_default=True)
@click.option("--warm-start", help="Schedule file that the pruner starts at instead of keep-all; or uniform.")
@click.option("--start", "starts", type=_PATH, multiple=True, help="Schedule file that refinement may start at too.")
@click.option("--pool", type=click.IntRange(min=1), help="Learn from so many images. [default: always new ones]")
@click.option("--one-noise", is_flag=True, help="The same noise in all images, as in the authors' code.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's own]")
@click.option("--seed", type=click.IntRange(min=0, max=400_000), default=0, show_default=True)
@click.option("--checkpoint", type=_PATH, help="Folder for the pruner's state and log.jsonl.")
@click.option("--save-every", type=click.IntRange(min=1), default=20, show_default=True, help="Iterations.")
@click.option("--resume", is_flag=True, help="Go on from --checkpoint, to the same result.")
@overwrite_option
@json_option
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
    """Search schedules that save a share of the cost and keep the images as they are."""
    from dipgo_deploy.errors import UserError

    named = output_files(output, options["ratios"])
    outputs = [free_output(path, "--output", overwrite=overwrite) for path in named]
    if resume and checkpoint is None:
        raise UserError("--resume: needs --checkpoint, the folder to go on from")
    import torch

    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import load_problem
    from dipgo_deploy.search.run import choose_cache, search

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    console = human_console(as_json)
    with _reporting(console, options) as reporter:
        problem = load_problem(_problem_options(options), reporter.stage)
        settings = _search_options(options, problem.target.model.class_name, threads)
        if options["cache"] is None and settings.method.endswith("refine"):
            problem = choose_cache(problem, settings, reporter)
        settings = replace(settings, starts=_starts(options["starts"], problem.target))
        paths = dict(zip(options["ratios"], outputs, strict=True))

        def save(one: Found) -> None:
            one.schedule.save(paths[one.target])
            console.print(f"{paths[one.target]}: {_words(one)}", markup=False, soft_wrap=True)

        found = search(problem, settings, folder=checkpoint, resume=resume, reporter=replace(reporter, found=save))
    emit({"schedules": [_facts(paths[one.target], one) for one in found]}, as_json)


def output_files(output: Path, ratios: Sequence[float]) -> list[Path]:
    """One file a ratio."""
    if len(ratios) == 1:
        return [output]
    names = [f"{ratio:.2f}" for ratio in ratios]
    if len(set(names)) < len(names):
        names = [f"{ratio:g}" for ratio in ratios]
    if len(set(names)) < len(names):
        raise click.UsageError(f"{_RATIO}: the same ratio is given twice")
    return [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]


def _problem_options(options: dict[str, Any]) -> Any:
    from dipgo_deploy.search.problem import ProblemOptions, sampler_and_steps

    reference = options["reference"]
    names = ("model", "sampler", "steps", "granularity", "cache", "height", "width", "guidance", "guidance_scale")
    prompts = options["prompts"]
    return ProblemOptions(
        **{name: options[name] for name in names},
        prompts=None if prompts is None else str(prompts),
        class_labels=class_label_numbers(options["class_labels"]),
        reference=None if reference is None else sampler_and_steps(reference, "--reference", options["steps"]),
        device=options["device"],
    )


def class_label_numbers(text: str | None) -> tuple[int, ...] | None:
    """``0,1,2`` as numbers; raises UserError for anything else."""
    from dipgo_deploy.errors import UserError

    if text is None:
        return None
    try:
        labels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--class-labels {text}: is no list of numbers: give them as in 0,1,2") from None
    return labels


def _starts(files: Sequence[Path], target: Any) -> tuple[tuple[str, Any], ...]:
    """Gates of schedule files by name; a start for other blocks or with other caches means something else here."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.document import Schedule

    found = []
    for path in files:
        schedule = Schedule.load(path)
        if schedule.model != target.model or schedule.blocks != target.blocks:
            raise UserError(
                f"--start {path}: was made for another model, or for other blocks or caches of it: leave it out"
            )
        found.append((path.stem, schedule.gates))
    return tuple(found)


def _search_options(options: dict[str, Any], class_name: str, threads: int | None) -> SearchOptions:
    """What was given, and for the rest the preset."""
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.search.pruner import SIZES
    from dipgo_deploy.search.run import SearchOptions
    from dipgo_deploy.search.train import PRESETS

    preset = options["preset"]
    train = PRESETS[preset]
    if preset == "paper" and class_name == "DiTTransformer2DModel":
        train = replace(train, lr=10.0)
    chosen = {name: options[name] for name in ("iterations", "alpha", "optimiser", "lr") if options[name] is not None}
    same = ("batch", "loss", "stop_share", "momentum", "weight_decay", "warmup", "clip", "temperature")
    chosen |= {name: options[name] for name in (*same, "precision", "save_every")}
    size = replace(SIZES[preset], encoder=options["encoder"], layers=options["layers"], heads=options["heads"])
    if options["width_of_queries"] is not None:
        size = replace(size, width=options["width_of_queries"])
    start = options["warm_start"]
    return SearchOptions(
        **{
            name: options[name]
            for name in ("method", "ratios", "budget", "images", "image_batch", "seed", "pool", "one_noise")
        },
        size=size,
        train=replace(train, accumulation=options["accumulate"], **chosen),
        warm_start=start if start is None or start == "uniform" else Schedule.load(start).gates,
        max_variants=options["max_variants"],
        prune_by=options["prune_by"],
        threads=threads,
    )


@contextmanager
def _reporting(console: Console, options: dict[str, Any]) -> Iterator[Reporter]:
    """A progress bar for the pruner and one for the evaluations; plain lines where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dipgo_deploy.search.run import Reporter

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with live(Progress(*columns, console=console, transient=True)) as bars:
        current = bars.add_task("starting", total=None, facts="")

        def stage(name: str) -> None:
            bars.reset(current, description=name, total=None, facts="")
            if not console.is_terminal:
                console.print(name, markup=False)

        def iteration(progress: Any) -> None:
            facts = f"kept {progress.kept:.1%}, loss {progress.loss:.4f}"
            bars.update(current, completed=progress.iteration, total=progress.iterations, facts=facts)
            if not console.is_terminal and progress.iteration % options["save_every"] == 0:
                line = f"iteration {progress.iteration} of {progress.iterations}: {facts}, {progress.seconds:.2f} s"
                console.print(line, markup=False, soft_wrap=True)

        def evaluation(count: int, best: float) -> None:
            bars.update(current, completed=count, facts=f"lowest loss {best:.4f}")
            if not console.is_terminal and count % 50 == 0:
                console.print(f"evaluation {count}: lowest loss {best:.4f}", markup=False)

        yield Reporter(stage, iteration, evaluation)


def _words(found: Found) -> str:
    loss = "" if found.loss is None else f", loss {found.loss:.4f}"
    return f"saves {found.ratio:.4f} of the cost, {found.schedule.kept_share:.1%} of the gates kept{loss}"


def _facts(path: Path, found: Found) -> dict[str, Any]:
    return {
        "file": str(path),
        "target_ratio": found.target,
        "achieved_ratio": found.ratio,
        "kept_gates": found.schedule.kept_share,
        "loss": found.loss,
    }


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


main = entry_point(command)
