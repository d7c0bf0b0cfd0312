"""``dipgo-compare``: an engine directory against the model that it was exported from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.backends import BACKENDS
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.cli.common import (
    checked_outputs,
    entry_point,
    examples,
    human_console,
    json_option,
    quiet_option,
    stages,
)
from dipgo_deploy.cli.compared import Outputs
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    engine_dir_option,
    of_several_options,
    option,
    threads_option,
    version_option,
)
from dipgo_deploy.cli.run import parse_labels
from dipgo_deploy.cli.sides import MODEL, against_side, check_against
from dipgo_deploy.errors import NotFiniteError, UserError

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.reference.load import Reference


def _size(name: str, what: str) -> Any:
    """An option for a size that was exported as a range."""
    text = f"{what}, where it was exported as a range."
    return option("Shape", name, type=click.IntRange(min=1), show_default="the range's usual one", help=text)


@click.command(
    name="dipgo-compare",
    cls=Command,
    epilog=examples(
        "dipgo-compare --engine-dir engines/fashion-sd",
        'dipgo-compare --engine-dir engines/fashion-sd --prompt "a sneaker" --seed 7 --json',
        "dipgo-compare --engine-dir engines/sd15 --model ./sd15 --backend cuda --loop-only",
        "dipgo-compare --engine-dir engines/sd15 --model ./sd15 --backend tensorrt-rtx  # engines of dipgo-build",
        "dipgo-compare --engine-dir engines/fashion-dit --variants-only --save-inputs inputs --save-outputs outputs",
    ),
)
@engine_dir_option
@of_several_options
@option(
    "Model",
    "--model",
    show_default="the one that the engine directory names",
    help="Model that the engine directory was exported from.",
)
@option(
    "Prompt",
    "--prompt",
    "prompts",
    multiple=True,
    show_default="a plain one, and long, empty and unusual ones",
    help="Text prompt: one for all images of a launch, or one each.",
)
@option(
    "Prompt",
    "--class-labels",
    multiple=True,
    show_default="the first, the middle and the last one",
    help="Class names or ids: one for all images of a launch, or one each.",
)
@option("Prompt", "--seed", type=int, default=0, help="Seed of the initial noise, as in dipgo-run.")
@option(
    "Prompt",
    "--guidance-scale",
    type=float,
    show_default="the engine directory's",
    help="Scale of the guidance; 1 is none.",
)
@_size("--batch", "Number of images in a launch")
@_size("--height", "Image height in pixels")
@_size("--width", "Image width in pixels")
@option("Comparison", "--variants-only", is_flag=True, help="Compare only each graph by itself.")
@option("Comparison", "--loop-only", is_flag=True, help="Compare only the whole loop.")
@option(
    "Comparison",
    "--against",
    metavar="SIDE",
    show_default="everything with the model",
    help="Compare the loop with another side: model (in torch, under the schedule), stock (diffusers' own pipeline "
    "without a schedule), a backend (cpu, cuda, openvino, tensorrt, tensorrt-rtx) or another engine directory. With "
    "--bisect: the engine directory whose graphs are right.",
)
@option(
    "Comparison",
    "--cross",
    is_flag=True,
    help="At each evaluation run the other side on this side's latent and caches too: what an evaluation makes, and "
    "what it inherits.",
)
@option(
    "Comparison", "--no-pictures", is_flag=True, help="Leave out the runs from prompt to picture, which take longest."
)
@option(
    "Comparison",
    "--tolerance",
    type=float,
    show_default="by dtype, 0.0001 for fp32",
    help="Largest error that passes, as a share of a tensor's largest value.",
)
@option(
    "Comparison",
    "--atol",
    type=float,
    default=0.0,
    help="Largest absolute error that passes, whatever the tolerance says.",
)
@option(
    "Runtime",
    "--backend",
    type=click.Choice([name for name in BACKENDS if name != "auto"]),
    default="cpu",
    help="Backend that runs the graphs: ONNX Runtime on cpu or cuda, OpenVINO, or engines that dipgo-build made.",
)
@threads_option("the physical cores")
@option(
    "Output",
    "--save-inputs",
    type=PATH,
    show_default="none",
    help="Folder for the inputs of each graph, as polygraphy run --load-inputs takes them.",
)
@option(
    "Output",
    "--save-outputs",
    type=PATH,
    show_default="none",
    help="Folder for what the model makes of these inputs, as polygraphy run --load-outputs takes it.",
)
@option(
    "Output",
    "--bisect",
    type=PATH,
    show_default="none",
    help="Folder for the first node that is wrong, where a graph is: with its weights, its inputs, what it gives and "
    "ought to give, and the polygraphy command that shows it. It must not exist.",
)
@option(
    "Output",
    "--junit",
    type=PATH,
    show_default="none",
    help="JUnit XML to write, a test case for each part, variant, evaluation and picture.",
)
@option(
    "Output",
    "--html",
    type=PATH,
    show_default="none",
    help="A page to write: curves of the error, the pictures that differ most, and all tables, in one file.",
)
@checked_outputs("junit", "html")
@json_option
@quiet_option
@version_option
def command(
    engine_dir: Path,
    schedule: str | None,
    launches: int | None,
    model: str | None,
    prompts: tuple[str, ...],
    class_labels: tuple[str, ...],
    seed: int,
    guidance_scale: float | None,
    batch: int | None,
    height: int | None,
    width: int | None,
    backend: str,
    threads: int | None,
    variants_only: bool,
    loop_only: bool,
    against: str | None,
    cross: bool,
    no_pictures: bool,
    tolerance: float | None,
    atol: float,
    save_inputs: Path | None,
    save_outputs: Path | None,
    bisect: Path | None,
    junit: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare an engine directory with the model that it was exported from.

    \b
    In the order of a run:
      - the list of launches with the sampler, and the weights with the model's;
      - tokens, encoded prompts and the VAE with those of diffusers' own pipeline;
      - each graph by itself, on inputs recorded from a real loop;
      - the whole loop, with every cache fed forward;
      - pictures from prompts with those of diffusers' own pipeline, under the same seed.

    Where the schedule skips blocks, diffusers' pipeline runs with the supernet (the model in torch with gates) in place
    of its denoiser. The exit status is 1 beyond the tolerance, and the first launch, graph and tensor that are wrong
    are named; --json, --junit and --html have all of them.
    """
    if variants_only and loop_only:
        raise click.UsageError("give --variants-only or --loop-only, not both")
    for name, value in (("--tolerance", tolerance), ("--atol", atol)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} {value}: give a number of at least 0")
    for name, folder in (("--save-inputs", save_inputs), ("--save-outputs", save_outputs)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{name} {folder}: is a file; give a folder")
    if save_inputs is not None and save_outputs is not None and save_inputs.resolve() == save_outputs.resolve():
        raise UserError(f"--save-outputs {save_outputs}: has files of the same names; give another folder")
    if bisect is not None:
        from dipgo_deploy.compare.bisect_folder import check_folder

        check_folder(bisect, "--bisect", backend)
    other = check_against(against)
    if bisect is not None and (cross or against is not None and other is None):
        raise click.UsageError("--bisect goes with --against ENGINE_DIR only, and not with --cross")
    beside = bisect is None and (against is not None or cross)
    if beside:
        given = (variants_only, loop_only, no_pictures, save_inputs is not None, save_outputs is not None)
        names = ("--variants-only", "--loop-only", "--no-pictures", "--save-inputs", "--save-outputs")
        if unused := next((name for name, value in zip(names, given, strict=True) if value), None):
            raise click.UsageError(f"{unused}: not with --against or --cross, which compare the loop and its results")
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle

    opened = Bundle.open(engine_dir, schedule=schedule, launches=launches)
    if bisect is not None and opened.manifest.dtype == "bf16":
        raise UserError("--bisect: bf16 graphs do not run on a CPU; bisect the same export in fp32 or fp16")
    if bisect is not None and opened.schedules:
        raise UserError("--bisect: not with several schedules in one directory; bisect an export of this one alone")
    bundle = at_sizes(opened, batch, height, width)
    labels = class_ids(bundle.manifest, prompts, class_labels, guidance_scale)
    created = create_backend(backend, threads=threads)
    created.check(bundle.manifest)
    from dipgo_deploy.compare.worst import WorstPictures

    outputs = Outputs(engine_dir, junit, html, as_json)
    worst = WorstPictures()
    if beside:
        with stages(human_console(as_json), "comparing") as notify:
            report, facts = against_side(
                bundle,
                created,
                against or MODEL,
                model=model,
                prompts=prompts,
                labels=labels,
                guidance_scale=guidance_scale,
                seed=seed,
                tolerance=tolerance,
                absolute=atol,
                cross=cross,
                threads=threads,
                pictures=worst,
                notify=notify,
            )
        common = {"engine_dir": str(engine_dir), "dtype": bundle.manifest.dtype, "backend": created.name, "seed": seed}
        outputs.write(report, {**common, **facts}, None, worst.pairs)
        return
    from dipgo_deploy.compare.engine import Options, compare_engine, tolerance_of
    from dipgo_deploy.compare.pictures import cases
    from dipgo_deploy.compare.report import Report
    from dipgo_deploy.compare.runners import graphs_on
    from dipgo_deploy.reference.conditions import PROMPT, label_of
    from dipgo_deploy.reference.load import load_reference
    from dipgo_deploy.reference.quiet import quiet_libraries

    quiet_libraries()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    console = human_console(as_json)
    manifest = bundle.manifest
    with stages(console, "loading the model") as notify:
        reference = load_reference(bundle, model)
        inputs = reference.inputs(
            manifest,
            guidance_scale=manifest.guidance_scale if guidance_scale is None else guidance_scale,
            prompts=prompts or (PROMPT,),
            labels=labels or (label_of(bundle.manifest),),
            seed=seed,
        )
        whole = not (variants_only or loop_only)
        asked = labels if class_labels else ()
        options = Options(
            variants=not loop_only,
            loop=not variants_only,
            components=whole,
            pictures=whole and not no_pictures,
            cases=tuple(cases(manifest, prompts, asked, guidance_scale=guidance_scale, seed=seed)) if whole else (),
            tolerance=tolerance,
            absolute=atol,
            open_graph=graphs_on(created, threads),
            save_inputs=save_inputs,
            save_outputs=save_outputs,
            seen=worst.take,
        )
        error: UserError | NotFiniteError | None = None
        try:
            report = compare_engine(bundle, reference, inputs, created, options, notify)
        except (UserError, NotFiniteError) as ended:
            # Whoever reads the result in a file learns of it too.
            error, report = ended, Report(tolerance_of(manifest, reference, options))
        of: dict[str, Any] = {}
        if as_json or junit is not None or html is not None:
            notify("hashing the model")
            of = _provenance(bundle, reference, report, asked=tolerance is not None)
        if bisect is not None:
            of["bisect"] = {"line": "nothing is beyond tolerance, so there is nothing to bisect"}
        if bisect is not None and (error or report.first_failure()):
            from dipgo_deploy.cli.bisect import bisected

            try:
                of["bisect"] = bisected(
                    bundle,
                    reference,
                    inputs,
                    created,
                    options,
                    tolerance_of(manifest, reference, options),
                    bisect,
                    whole=opened,
                    model=model,
                    against=other,
                    notify=notify,
                )
            except UserError as ended:  # the comparison itself is still told
                of["bisect"] = {"line": f"not bisected: {ended}"}
    facts = {
        "engine_dir": str(engine_dir),
        "model": reference.source.name,
        "dtype": manifest.dtype,
        "backend": created.name,
        "seed": seed,
        "guidance_scale": inputs.guidance_scale,
        **of,
    }
    outputs.write(report, facts, error, worst.pairs)


def _provenance(bundle: Bundle, reference: Reference, report: Report, *, asked: bool) -> dict[str, Any]:
    from dipgo_deploy.compare.provenance import models, tolerances, versions

    source = reference.source
    return {
        "models": models(bundle, source),
        "versions": versions(bundle),
        "tolerances": tolerances(source, bundle.manifest, report.tolerance, asked=asked),
    }


def at_sizes(bundle: Bundle, batch: int | None, height: int | None, width: int | None) -> Bundle:
    """The engine directory at the sizes asked for (height and width in pixels), the usual ones of its ranges otherwise.

    Raises:
        UserError: sizes that it does not take.
    """
    manifest = bundle.manifest
    usual = manifest.usual_sizes
    found = {}
    for name, given in (("batch", batch), ("height", height), ("width", width)):
        allowed = Range.static(getattr(usual, name)) if manifest.sizes is None else getattr(manifest.sizes, name)
        scale = 1 if name == "batch" else manifest.latent.scale or 1
        if given is not None and (given % scale or given // scale not in allowed):
            raise UserError(f"--{name} {given}: this engine directory takes {allowed.describe(scale)}")
        found[name] = getattr(usual, name) if given is None else given // scale
    return bundle.at(Sizes(**found))


def class_ids(
    manifest: Manifest, prompts: tuple[str, ...], class_labels: tuple[str, ...], guidance_scale: float | None
) -> tuple[int, ...]:
    """The class ids asked for, after everything was checked against the engine directory.

    Raises:
        UserError: what dipgo-run would refuse too, or a number of prompts or labels that is not 1 or the batch.
    """
    import numpy as np

    from dipgo_deploy.reference.conditions import DEFAULT_GUIDANCE_SCALE, PROMPT, label_of
    from dipgo_deploy.runtime.given_pictures import picture_conditions
    from dipgo_deploy.runtime.requests import Asked, check_request, class_condition, text_conditions

    labels = parse_labels(class_labels)
    for name, given in (("--prompt", prompts), ("--class-labels", labels)):
        if len(given) not in (0, 1, manifest.batch):
            raise UserError(f"{name}: {len(given)} given for a batch of {manifest.batch}; give one, or one each")
    has_encoder = manifest.components.text_encoder is not None
    if text_conditions(manifest) and not has_encoder and not prompts:
        # There is nothing to ask for: the reference takes noise for an embedding.
        others = tuple(spec for spec in manifest.conditions if spec.source != "text")
        manifest = manifest.model_copy(update={"conditions": others})
    scale = guidance_scale
    distilled = any(spec.source == "guidance" for spec in manifest.conditions)
    if (manifest.guidance or distilled) and scale is None and manifest.guidance_scale is None:
        scale = DEFAULT_GUIDANCE_SCALE
    latent = manifest.latent
    asked = Asked(
        image_latents=None if manifest.sampler.strength is None else np.zeros((1, *latent.shape), np.float32),
        conditions={spec.name: np.zeros((1, *spec.shape[1:]), np.float32) for spec in picture_conditions(manifest)},
        prompt=list(prompts) or (PROMPT if text_conditions(manifest) else None),
        class_labels=labels or (label_of(manifest) if class_condition(manifest) is not None else None),
        guidance_scale=scale,
        output_type="latent",
    )
    request = check_request(manifest, asked)
    return () if request.classes is None else tuple(int(label) for label in request.classes)


main = entry_point(command)
