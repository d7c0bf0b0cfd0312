"""``dipgo-calibrate``: give a schedule a solver of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.backends import BACKENDS
from dipgo_deploy.cli.common import (
    checked_outputs,
    emit,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    stage_bar,
)
from dipgo_deploy.cli.options import (
    MODEL_HELP,
    PATH,
    Command,
    checkpoint_options,
    class_labels_option,
    device_option,
    forecast_options,
    guidance_option,
    option,
    prompts_option,
    refine_option,
    size_options,
    threads_option,
    version_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.calibrate.engines import Conditions
    from dipgo_deploy.calibrate.refine import RefineOptions
    from dipgo_deploy.schedule.document import Schedule


@click.command(
    name="dipgo-calibrate",
    cls=Command,
    epilog=examples(
        "dipgo-calibrate --model fashion-sd --schedule uniform.json --images 200 --guidance-scale 4 -o fitted.json",
        "dipgo-calibrate --model ./sd15 --schedule s.json --prompts prompts.txt --reference ddim:200 -o fitted.json",
        "dipgo-calibrate --engine-dir engines/ten --reference-engine-dir engines/full --prompts prompts.txt",
    ),
)
@option("Model", "--model", show_default="required without --engine-dir", help=MODEL_HELP)
@option(
    "Model",
    "--engine-dir",
    type=PATH,
    show_default="none",
    help="In place of model and schedule: fit with the graphs of this directory, and change its launch list. Such a "
    "fit is not refined, which takes gradients.",
)
@option(
    "Model",
    "--reference-engine-dir",
    type=PATH,
    show_default="required with --engine-dir",
    help="Export of the full run that --engine-dir is fitted to.",
)
@guidance_option
@option(
    "Schedule",
    "--schedule",
    "schedule_file",
    type=PATH,
    show_default="required without --engine-dir",
    help="Schedule file to fit a solver to.",
)
@option(
    "Schedule",
    "--reference",
    show_default="the schedule's own",
    help="Sampler and steps of the full run to come close to, as in ddim:200.",
)
@prompts_option
@class_labels_option
@option(
    "Prompt",
    "--guidance-scale",
    "guidance_scales",
    type=float,
    multiple=True,
    show_default="the pipeline's own",
    help="Scale of the guidance; given several times, the images take them in turn.",
)
@option("Calibration", "--images", type=click.IntRange(min=2), default=200, help="Number of calibration images.")
@option(
    "Calibration",
    "--held-aside",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    help="Share of the images that choose the ridge and give the residuals.",
)
@forecast_options("taylor", "hermite", "weights")
@refine_option
@option("Calibration", "--seed", type=click.IntRange(min=0), default=0, help="Seed of the first image.")
@size_options
@option("Runtime", "--batch", type=click.IntRange(min=1), default=20, help="Images in one evaluation.")
@device_option
@option(
    "Runtime",
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    help="Backend that runs the graphs of --engine-dir.",
)
@threads_option("torch's own")
@option(
    "Output",
    "-o",
    "--output",
    type=PATH,
    show_default="required without --engine-dir",
    help="File for the schedule with its solver; with --engine-dir it goes there, too.",
)
@checkpoint_options("calibration")
@json_option
@quiet_option
@version_option
@checked_outputs("output")
@click.pass_context
def command(
    context: click.Context,
    images: int,
    held_aside: float,
    guidance_scales: tuple[float, ...],
    batch: int,
    seed: int,
    checkpoint: Path | None,
    resume: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Fit the sampler's weights to a schedule, so that its few launches come closest to the full run."""
    from dipgo_deploy.calibrate.core import CalibrationOptions

    on_engines = given["engine_dir"] is not None
    _check_options(context, on_engines)
    options = CalibrationOptions(
        images=images, guidance_scales=guidance_scales, held_aside=held_aside, batch=batch, seed=seed
    )
    options.check()
    console = human_console(as_json)
    target = given["engine_dir"] if on_engines else given["output"]
    how = {"options": options, "folder": checkpoint, "resume": resume}
    # An engine directory's schedule goes with it, and to a file where one is asked for.
    fitted = _with_engines(console, given, how) if on_engines else _with_torch(console, given, how)
    if given["output"] is not None:
        fitted.save(given["output"])
    facts = _facts(target, fitted)
    console.print(
        f"{target}: {fitted.steps} launches fitted to {facts['reference']}; relative error of the final latent "
        f"{facts['residual']:.4g} on images held aside",
        markup=False,
        soft_wrap=True,
    )
    emit(facts, as_json)


# Options that mean something with a model or with engines only.
_OF_TORCH = (
    "model",
    "schedule_file",
    "reference",
    "guidance",
    "height",
    "width",
    "num_frames",
    "device",
    "refine_iterations",
    "forecast",
    "forecast_order",
    "forecast_contraction",
)
_OF_ENGINES = ("reference_engine_dir", "backend")


def _check_options(context: click.Context, on_engines: bool) -> None:
    """Refuse what is missing, and what means nothing here."""
    from dipgo_deploy.errors import UserError

    names = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    others = _OF_TORCH if on_engines else _OF_ENGINES
    default = click.core.ParameterSource.DEFAULT
    for name in others:
        if context.get_parameter_source(name) != default:
            word = "with" if on_engines else "without"
            raise UserError(f"{names[name]}: means nothing {word} --engine-dir; leave it out")
    for name in ("reference_engine_dir",) if on_engines else ("model", "schedule_file", "output"):
        if context.params[name] is None:
            others_than = "" if on_engines else ", or --engine-dir with --reference-engine-dir"
            raise UserError(f"{names[name]}: is missing; give it{others_than}")


def _with_engines(console: Console, given: dict[str, Any], how: dict[str, Any]) -> Schedule:
    """Fit with the engines of a directory, and change it."""
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.staging import check_target
    from dipgo_deploy.calibrate.engines import calibrate_engines, with_solver
    from dipgo_deploy.cli.options import class_label_numbers

    bundle, reference = Bundle.open(given["engine_dir"]), Bundle.open(given["reference_engine_dir"])
    check_target(bundle.path, overwrite=True)
    conditions = _conditions(bundle.manifest, given["prompts"], class_label_numbers(given["class_labels"]))
    with stage_bar(console) as report:
        backend = create_backend(given["backend"], threads=given["threads"])
        fitted = calibrate_engines(bundle, reference, backend, conditions, **how, report=report)
    with_solver(bundle, fitted)
    return fitted


def _conditions(manifest: Manifest, prompts: Path | None, labels: tuple[int, ...] | None) -> Conditions:
    """What the images show: as for a model in torch, but from what the manifest knows."""
    from dipgo_deploy.calibrate.engines import Conditions
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.runtime.requests import class_condition, text_conditions
    from dipgo_deploy.search.prompts import built_in_prompts, read_prompts

    takes_text, takes_classes = bool(text_conditions(manifest)), class_condition(manifest) is not None
    for name, value, takes in (("--prompts", prompts, takes_text), ("--class-labels", labels, takes_classes)):
        if value is not None and not takes:
            raise UserError(f"{name}: the engine directory does not take them; leave it out")
    if takes_text:
        found = built_in_prompts(manifest.model.name) if prompts is None else read_prompts(prompts)
        if found is None:
            raise UserError("--prompts: is missing; give a text file with one prompt a line")
        return Conditions(prompts=found)
    if takes_classes and labels is None:
        named = manifest.components.class_labels
        if not named:
            raise UserError("--class-labels: is missing, and the engine directory names no classes; give numbers")
        labels = tuple(sorted(set(named.values())))
    return Conditions(class_labels=labels or ())


def _with_torch(console: Console, given: dict[str, Any], how: dict[str, Any]) -> Schedule:
    """Fit with the model in torch."""
    from dipgo_deploy.errors import UserError
    from dipgo_deploy.schedule.document import Schedule
    from dipgo_deploy.schedule.forecast import RuleForecast, check_fitted

    schedule, forecast = Schedule.load(given["schedule_file"]), given["forecast"]
    fit_forecast = isinstance(forecast, int)
    if fit_forecast:  # the rule says what is read until the weights are there
        check_fitted(schedule.conditional_only)
        forecast = RuleForecast.model_validate({"kind": "taylor", "order": forecast - 1})
    if forecast is not None:
        if all(map(all, schedule.gates)):
            raise UserError("--forecast: the schedule skips no block, so nothing is forecast; leave it out")
        schedule = schedule.with_forecast(forecast)
    import torch

    from dipgo_deploy.calibrate.fit import calibrate
    from dipgo_deploy.cli.options import class_label_numbers
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.problem import (
        ProblemOptions,
        load_problem,
        sampler_and_steps,
        with_reference,
        with_schedule,
    )

    reference, scales = given["reference"], how["options"].guidance_scales
    full_run = None if reference is None else sampler_and_steps(reference, "--reference")
    quiet_libraries()
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    with stage_bar(console) as report:
        problem = load_problem(
            ProblemOptions(
                model=given["model"],
                sampler=schedule.sampler.class_name,
                steps=schedule.sampler.num_inference_steps,
                granularity=schedule.model.granularity,
                guidance_scale=scales[0] if scales else None,
                prompts=None if given["prompts"] is None else str(given["prompts"]),
                class_labels=class_label_numbers(given["class_labels"]),
                **{name: given[name] for name in ("guidance", "height", "width", "num_frames", "device")},
            ),
            lambda stage: report(stage, 0, 0),
        )
        problem.source.check(schedule)
        fit_to = full_run or (schedule.sampler.class_name, schedule.sampler.num_inference_steps)
        if full_run is not None or schedule.solver is not None:
            problem = with_reference(with_schedule(problem, schedule), *fit_to)
        else:
            problem = with_schedule(problem, schedule)
        refine = refine_options(given["refine_iterations"])
        return calibrate(problem, schedule, **how, refine=refine, fit_forecast=fit_forecast, report=report)


def refine_options(iterations: int) -> RefineOptions | None:
    """What ``--refine-iterations`` says."""
    from dipgo_deploy.calibrate.refine import RefineOptions

    return RefineOptions(iterations=iterations) if iterations else None


def _facts(output: Path, fitted: Schedule) -> dict[str, Any]:
    from dipgo_deploy.calibrate.fitted import residual_of

    assert fitted.solver is not None
    known = fitted.solver.provenance
    reference = known["reference"]
    return {
        "file": str(output),
        "launches": fitted.steps,
        "reference": f"{reference['sampler']}, {reference['num_inference_steps']} steps",
        "images": known["images"],
        "guidance_scales": list(known["guidance_scales"]),
        "ridges": list(known["ridges"]),
        "residuals": list(known["residuals"]),
        "residual": residual_of(fitted.solver),
    }


main = entry_point(command)
