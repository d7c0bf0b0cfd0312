"""``dipgo-run``: pictures from an engine directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dipgo_deploy.cli import many, ray_pool
from dipgo_deploy.cli.arrays import load_array, load_embeds, load_picture
from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    free_output,
    human_console,
    json_option,
    lora_line,
    lora_options,
    overwrite_option,
    progress_bars,
    quiet_option,
)
from dipgo_deploy.cli.options import (
    PATH,
    Command,
    backend_option,
    engine_dir_option,
    of_several_options,
    option,
    threads_option,
    version_option,
)
from dipgo_deploy.cli.outputs import FPS, check_kind, check_suffix, write_output
from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.runtime.parameters import parameters_text

if TYPE_CHECKING:
    from dipgo_deploy.backends.tensorrt_queue import GraphMode
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.runtime.pipeline import LoadMode, Pipeline

# Nothing is loaded before the arguments were checked.
_LOAD: dict[str | None, LoadMode] = {"eager": "call", "lazy": "lazy", None: "auto"}
_DEFAULT_VIDEO = "output.mp4"
_DEFAULT_FOLDER = "pictures"
_MOST_NAMED = 10  # rows that could not be drawn; --json has all
_DEFAULT_OUTPUT = {"pil": "output.png", "np": "output.npy", "latent": "output.npy"}


@click.command(
    name="dipgo-run",
    cls=Command,
    epilog=examples(
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a sneaker" -o sneaker.png',
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a bag" --prompt "a coat" --num-images 4 --seed 7',
        "dipgo-run --engine-dir engines/fashion-dit --class-labels sneaker,bag,3 -o grid.png",
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a shirt" --output-type latent -o latents.npy',
        'dipgo-run --engine-dir engines/sd15 --prompt "a castle" --lora style.safetensors:0.8 --load lazy',
        'dipgo-run --engine-dir engines/sd15-img2img --prompt "a castle" --image sketch.png',
        "dipgo-run --engine-dir engines/fashion-sd --prompts prompts.csv --shard 1/4 -o pictures",
        "dipgo-run --engine-dir engines/fashion-sd --self-test --backend tensorrt",
        'dipgo-run --engine-dir engines/wan --prompt "a cat walks on grass" --fps 16 -o clip.mp4',
    ),
)
@engine_dir_option
@of_several_options
@option(
    "Model",
    "--verify",
    is_flag=True,
    help="Check the hash of every file of the engine directory first; else a large one is hashed only once.",
)
@option(
    "Comparison",
    "--self-test",
    is_flag=True,
    help="Draw nothing: run the test that the engine directory carries, and compare with the model's recorded values. "
    "The exit status is 1 beyond tolerance.",
)
@option(
    "Prompt", "--prompt", "prompts", multiple=True, show_default="none", help="Text prompt; can be given several times."
)
@option(
    "Prompt",
    "--prompts",
    "prompts_file",
    type=PATH,
    metavar="FILE",
    show_default="none",
    help="File of prompts, one picture a row, each written to a file of its own in the folder --output: .txt, or .csv "
    "or .jsonl with prompt, negative_prompt, class_label, seed, guidance_scale, height, width, name. What is there is "
    "not drawn again.",
)
@option(
    "Prompt",
    "--shard",
    metavar="I/N",
    show_default="all",
    help="Of --prompts every N-th row from the I-th on, for one of N machines.",
)
@option(
    "Prompt",
    "--class-labels",
    "class_labels",
    multiple=True,
    show_default="none",
    help="Class names or ids of a class model, with commas between them; can be given several times.",
)
@option(
    "Prompt",
    "--negative-prompt",
    show_default="empty",
    help="Text that the pictures should not show; works with guidance only.",
)
@option(
    "Prompt",
    "--num-images",
    "--num-images-per-prompt",
    type=click.IntRange(min=1),
    default=1,
    help="Pictures for each prompt or class label.",
)
@option(
    "Prompt",
    "--seed",
    type=int,
    default=0,
    help="Seed of the initial noise, which is that of diffusers' CPU generator in float32.",
)
@option(
    "Prompt",
    "--guidance-scale",
    type=float,
    show_default="the engine directory's",
    help="Scale of the guidance; 1 is none.",
)
@option(
    "Prompt",
    "--guidance-scale-2",
    type=float,
    show_default="the same",
    help="Of the second denoiser, of a model of two (Wan 2.2).",
)
@option(
    "Prompt",
    "--prompt-embeds",
    multiple=True,
    metavar="[NAME=]FILE",
    show_default="none",
    help="Embeddings (prompts, L, D), .npy, in place of --prompt. A model with several text conditions takes "
    "NAME=FILE.npy for each, or all of them by name in one .npz or .safetensors.",
)
@option(
    "Prompt",
    "--negative-prompt-embeds",
    multiple=True,
    metavar="[NAME=]FILE",
    show_default="none",
    help="Embeddings of the negative prompt, in the same form.",
)
@option(
    "Image",
    "--image",
    "images",
    multiple=True,
    type=PATH,
    show_default="none",
    help="Picture to start from (an engine directory exported with --strength), to draw into or to draw after: one for "
    "all prompts, or one each.",
)
@option(
    "Image",
    "--mask-image",
    "mask_images",
    multiple=True,
    type=PATH,
    show_default="none",
    help="Mask of an inpainting model, white where it draws into --image: one for all prompts, or one each.",
)
@option(
    "Image",
    "--strength",
    type=float,
    show_default="the engine directory's",
    help="Share of the steps that is run from --image; the engine directory has one, and another is refused.",
)
@option(
    "Image",
    "--control-image",
    "control_images",
    multiple=True,
    type=PATH,
    show_default="none",
    help="Picture that a ControlNet or FLUX Control looks at: one for all prompts, or one each; with several "
    "ControlNets one for each of those.",
)
@option(
    "Image",
    "--control-scale",
    "--controlnet-conditioning-scale",
    "control_scale",
    multiple=True,
    type=float,
    show_default="1",
    help="Factor of what the ControlNet adds; with several ControlNets one for all, or one each.",
)
@option(
    "Image",
    "--ip-adapter-image",
    "ip_adapter_images",
    multiple=True,
    type=PATH,
    show_default="none",
    help="Picture that an IP-Adapter draws after: one for all prompts, or one each.",
)
@option(
    "Image",
    "--ip-adapter-scale",
    type=float,
    show_default="1",
    help="Factor of what the IP-Adapter adds.",
)
@option(
    "Image", "--latents", type=PATH, show_default="drawn from --seed", help="Initial unit noise (n, C, h, w), .npy."
)
@option(
    "Shape",
    "--height",
    type=click.IntRange(min=1),
    show_default="the exported one",
    help="Image height in pixels, where it was exported with a range.",
)
@option(
    "Shape",
    "--width",
    type=click.IntRange(min=1),
    show_default="the exported one",
    help="Image width in pixels, where it was exported with a range.",
)
@option(
    "Shape",
    "--num-frames",
    type=click.IntRange(min=1),
    show_default="the exported ones",
    help="Frames of the video; the engine directory has so many, and another number is refused.",
)
@lora_options("to add to the weights of all graphs")
@backend_option
@threads_option("the physical cores")
@option(
    "Runtime",
    "--share-weights/--no-share-weights",
    default=None,
    show_default="on cuda only",
    help="Hold one copy of the weights for all graphs: less memory, slower on a CPU.",
)
@option(
    "Runtime",
    "--load",
    type=click.Choice(["eager", "lazy"]),
    show_default="lazy on cpu and openvino, else eager",
    help="Load all graphs before the first launch, or each at its own first launch.",
)
@option(
    "Runtime",
    "--cuda-graph",
    type=click.Choice(["off", "step", "loop"]),
    default="off",
    help="TensorRT: capture no CUDA graph, one for each launch, or one for the whole loop.",
)
@option(
    "Ray",
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    show_default="none: in this process",
    help="Draw the rows of --prompts on workers of Ray (extra ray): on this machine, with auto in the cluster that it "
    "is part of, or in the one at HOST:PORT. All machines have to share the folder --output.",
)
@option(
    "Ray",
    "--ray-concurrency",
    type=click.IntRange(min=1),
    show_default="as many as there is room for",
    help="Number of workers; each loads the engine directory once.",
)
@option(
    "Ray",
    "--ray-num-cpus",
    type=click.IntRange(min=1),
    show_default="all of a machine's; 1 with a GPU",
    help="Cores of each worker, and without --threads its CPU threads.",
)
@option(
    "Ray",
    "--ray-num-gpus",
    type=click.FloatRange(min=0, max=64),
    show_default="1 where there are any and --backend uses them",
    help="GPUs of each worker; 0.5 lets two share one.",
)
@option(
    "Output",
    "--output-type",
    type=click.Choice(["pil", "np", "latent"]),
    default="pil",
    help="A picture or video (several in a grid), images float32 (n, [F,] H, W, 3), or latents float32 "
    "(n, C, [f,] h, w).",
)
@option(
    "Output",
    "--fps",
    type=click.IntRange(min=1, max=240),
    show_default="the model's own",
    help="Frames a second of the video that is written.",
)
@option("Output", "-o", "--output", type=PATH, show_default="output.png, .mp4 or .npy", help="File to write.")
@option(
    "Output",
    "--name-pattern",
    default="{name}.png",
    help="Of --prompts: name of a row's file, of {index}, {seed} and {name}, which is the index where a row has none.",
)
@option(
    "Output",
    "--parameters/--no-parameters",
    default=True,
    help="Write what a picture was made with into its file, as text that other programs read.",
)
@overwrite_option
@json_option
@quiet_option
@version_option
@click.pass_context
def command(
    ctx: click.Context,
    engine_dir: Path,
    self_test: bool,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    shard: str | None,
    class_labels: tuple[str, ...],
    negative_prompt: str | None,
    num_images: int,
    seed: int,
    guidance_scale: float | None,
    guidance_scale_2: float | None,
    images: tuple[Path, ...],
    mask_images: tuple[Path, ...],
    strength: float | None,
    control_images: tuple[Path, ...],
    ip_adapter_images: tuple[Path, ...],
    ip_adapter_scale: float | None,
    control_scale: tuple[float, ...],
    height: int | None,
    width: int | None,
    num_frames: int | None,
    fps: int | None,
    latents: Path | None,
    prompt_embeds: tuple[str, ...],
    negative_prompt_embeds: tuple[str, ...],
    output_type: str,
    output: Path | None,
    name_pattern: str,
    parameters: bool,
    overwrite: bool,
    backend: str,
    threads: int | None,
    share_weights: bool | None,
    load: str | None,
    loras: tuple[str, ...],
    lora_partial: bool,
    cuda_graph: GraphMode,
    verify: bool,
    schedule: str | None,
    launches: int | None,
    ray: str | None,
    ray_concurrency: int | None,
    ray_num_cpus: int | None,
    ray_num_gpus: float | None,
    as_json: bool,
) -> None:
    """Generate pictures or videos from an engine directory. Needs no torch.

    Several are written as one grid. A video goes to .mp4 (with the extra `video`), .webp, .gif, or as PNG frames to a
    folder, whose name has no suffix. The output appears under its name only when it is complete.
    """
    if self_test:
        _refuse_drawing(ctx)
    for name in ("shard", "name_pattern", "ray") if prompts_file is None else _NOT_OF_ROWS:
        _refuse(ctx, name, "without --prompts" if prompts_file is None else "with --prompts")
    for name in ("ray_concurrency", "ray_num_cpus", "ray_num_gpus") if ray is None else ():
        _refuse(ctx, name, "without --ray")
    if output is not None and prompts_file is None:
        check_suffix(output, output_type)
    arrays = {
        "latents": load_array("--latents", latents),
        "prompt_embeds": load_embeds("--prompt-embeds", prompt_embeds),
        "negative_prompt_embeds": load_embeds("--negative-prompt-embeds", negative_prompt_embeds),
    }
    pictures = {
        name: [load_picture(f"--{name.replace('_', '-')}", path) for path in paths] or None
        for name, paths in (
            ("image", images),
            ("mask_image", mask_images),
            ("control_image", control_images),
            ("ip_adapter_image", ip_adapter_images),
        )
    }
    from dipgo_deploy.lora.file import parse_choice
    from dipgo_deploy.runtime.pipeline import Pipeline

    options: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "share_weights": share_weights,
        "cuda_graph": cuda_graph,
        "verify": verify,
        "schedule": schedule,
        "launches": launches,
        "load": _LOAD[load],
        "lora": [parse_choice(text) for text in loras],
        "lora_partial": lora_partial,
    }
    if prompts_file is not None:
        usual = {
            "negative_prompt": negative_prompt,
            "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "height": height,
            "width": width,
            "num_frames": num_frames,
        }
        asked_rows = {
            "file": prompts_file,
            "folder": output or Path(_DEFAULT_FOLDER),
            "pattern": name_pattern,
            "seed": seed,
            "part": shard,
            "overwrite": overwrite,
        }
        opening = ray_pool.Opening(engine_dir, options)
        pool = None if ray is None else ray_pool.Pool(ray, ray_concurrency, ray_num_cpus, ray_num_gpus)
        failed = _draw_rows(opening, pool, asked_rows, usual, fps, parameters, as_json)
        ctx.exit(1 if failed else 0)
    pipeline = Pipeline.from_engine_dir(engine_dir, **options)
    if self_test:
        _self_test(pipeline, as_json)
        return
    video, fps = _video(pipeline.bundle.manifest, output_type, fps)
    asked = output or Path(_DEFAULT_VIDEO if video else _DEFAULT_OUTPUT[output_type])
    check_kind(asked, output_type, video=video)
    target = free_output(asked, "--output", overwrite=overwrite)
    with _progress() as progress:
        result = pipeline(
            list(prompts) or None,
            negative_prompt=negative_prompt,
            class_labels=parse_labels(class_labels) or None,
            num_images_per_prompt=num_images,
            seed=seed,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            strength=strength,
            ip_adapter_scale=ip_adapter_scale,
            control_scale=control_scale or None,
            height=height,
            width=width,
            num_frames=num_frames,
            output_type=output_type,  # type: ignore[arg-type]  # click checked the choice
            callback=progress,
            **arrays,  # type: ignore[arg-type]  # latents and embeddings only
            **pictures,  # type: ignore[arg-type]  # pictures only
        )
    manifest = pipeline.bundle.manifest
    text = None
    if parameters and output_type == "pil":
        text = parameters_text(
            manifest,
            prompts=prompts,
            negative_prompts=(negative_prompt or "",),
            class_labels=parse_labels(class_labels),
            seeds=(seed,),
            guidance_scale=guidance_scale,
            size=result.images[0].size,
            loras=pipeline.loras,
        )
    write_output(target, result.videos if video else result.images, fps, text)
    memory = pipeline.memory()
    timings = {name: round(seconds, 6) for name, seconds in asdict(result.timings).items()}
    kind = "video" if video else "image"
    human_console(as_json).print(
        f"{target}: {len(result.latents)} {kind}(s), {manifest.model.name} on {pipeline.backend.name}, "
        f"{result.launches} launches, {timings['loop']:.3f} s in the loop, {timings['total']:.3f} s in all",
        markup=False,
        soft_wrap=True,
    )
    human_console(as_json).print(
        "\n".join([*map(lora_line, pipeline.loras), memory_line(memory)]), markup=False, soft_wrap=True
    )
    emit(
        {
            "output": str(target),
            "output_type": output_type,
            "images": len(result.latents),
            "shape": list(result.latents.shape),
            "model": manifest.model.name,
            "backend": pipeline.backend.name,
            "seed": seed,
            "schedule": manifest.name or None,
            "evaluations": manifest.plan.evaluations,
            "launches": result.launches,
            "seconds": timings,
            "memory": memory,
            "loras": [asdict(report) for report in pipeline.loras],
        },
        as_json,
    )


main = entry_point(command)

# What goes with --self-test: how the engine directory is run, not what is drawn.
_OF_SELF_TEST = {
    "self_test",
    "engine_dir",
    "schedule",
    "launches",
    "verify",
    "backend",
    "threads",
    "share_weights",
    "load",
    "cuda_graph",
    "as_json",
}


def _refuse_drawing(ctx: click.Context) -> None:
    """Refuse (UserError) options of what would be drawn."""
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in _OF_SELF_TEST:
            raise UserError(f"{param.opts[0]}: nothing is drawn with --self-test; leave one of them out")


# What a row says itself, or what rows cannot have.
_NOT_OF_ROWS = (
    "prompts",
    "class_labels",
    "num_images",
    "images",
    "mask_images",
    "strength",
    "control_images",
    "control_scale",
    "ip_adapter_images",
    "ip_adapter_scale",
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "output_type",
)


def _refuse(ctx: click.Context, name: str, why: str) -> None:
    """Refuse (UserError) an option that was given on the command line."""
    if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
        param = next(param for param in ctx.command.params if param.name == name)
        raise UserError(f"{param.opts[0]}: means nothing {why}; leave it out")


def _video(manifest: Manifest, output_type: str, fps: int | None) -> tuple[bool, int]:
    """Whether videos are written, and their frames a second; raises UserError for frames a second of anything else."""
    video = output_type == "pil" and manifest.latent.frames is not None
    if fps is not None and not video:
        raise UserError(f"--fps {fps}: no video is written; leave it out")
    return video, fps or manifest.latent.fps or FPS


def _draw_rows(
    opening: ray_pool.Opening,
    pool: ray_pool.Pool | None,
    asked: Mapping[str, Any],
    usual: Mapping[str, Any],
    fps: int | None,
    parameters: bool,
    as_json: bool,
) -> int:
    """Draw the rows of a file of prompts, here or with a pool, and say how many; how many could not be drawn."""
    from rich.console import Console

    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.runtime.pipeline import Pipeline

    pipeline, options = None, opening.options
    if pool is None:
        pipeline = Pipeline.from_engine_dir(opening.engine_dir, **options)
        manifest = pipeline.bundle.manifest
    else:  # the workers open it
        names = ("schedule", "launches", "verify")
        manifest = Bundle.open(opening.engine_dir, **{name: options[name] for name in names}).manifest
    video, fps = _video(manifest, "pil", fps)
    plan = many.planned(**asked, batch=manifest.batch, video=video)
    drawing = many.Drawing(usual, fps, parameters, plan.overwrite)
    console, start = human_console(as_json), time.perf_counter()
    facts: dict[str, Any] = {"folder": str(plan.folder), "model": manifest.model.name}
    failed: Mapping[int, str] = {}
    with progress_bars(Console(stderr=True)) as bar:
        task = bar.add_task("pictures", total=plan.left)
        if pipeline is not None:
            many.draw(pipeline, plan, drawing, done=lambda count: bar.advance(task, count))
            facts |= {"backend": pipeline.backend.name, "memory": pipeline.memory()}
        elif pool is not None:
            outcome = ray_pool.draw(
                pool,
                opening,
                manifest,
                plan,
                drawing,
                started=lambda line: console.print(line, markup=False, soft_wrap=True),
                done=lambda count: bar.advance(task, count),
            )
            failed = outcome.failed
            rows = [{"row": index, "error": error} for index, error in failed.items()]
            facts |= {"backend": options["backend"], "workers": outcome.workers, "failed": rows}
    seconds = time.perf_counter() - start
    facts |= {"drawn": plan.left - len(failed), "skipped": plan.skipped, "seconds": round(seconds, 6)}
    there = f", {plan.skipped} there already (--overwrite draws them again)" if plan.skipped else ""
    console.print(f"{plan.folder}: {facts['drawn']} drawn in {seconds:.1f} s{there}", markup=False, soft_wrap=True)
    for index, error in list(failed.items())[:_MOST_NAMED]:
        click.echo(f"error: --prompts: row {index}: {error}", err=True)
    if len(failed) > _MOST_NAMED:
        click.echo(f"error: --prompts: {len(failed)} rows could not be drawn, the first are above", err=True)
    emit(facts, as_json)
    return len(failed)


def _self_test(pipeline: Pipeline, as_json: bool) -> None:
    """Run the directory's own test and say what came of it.

    Raises:
        ToleranceError: a tensor is beyond tolerance.
    """
    report = pipeline.self_test()
    manifest, console = pipeline.bundle.manifest, human_console(as_json)
    for part in report.parts:
        verdict = "ok" if part.passed else "BEYOND TOLERANCE"
        worst = f"{part.worst.name} within {part.worst.relative:.1e} of the model's largest value"
        console.print(f"{part.name}: {worst}, {verdict}", markup=False, soft_wrap=True)
    if report.left_out:
        console.print(f"in the loop only: {', '.join(report.left_out)}", markup=False, soft_wrap=True)
    line = f"tolerance {report.tolerance:g} ({report.reason})"
    console.print(f"{manifest.model.name} on {pipeline.backend.name}: {line}", markup=False, soft_wrap=True)
    facts = {"engine_dir": str(pipeline.bundle.path), "model": manifest.model.name, "dtype": manifest.dtype}
    emit({**facts, "backend": pipeline.backend.name, **report.as_dict()}, as_json)
    failure = next(report.failures(), None)
    if failure is not None:
        raise ToleranceError(f"{failure}; this backend, driver or device does not compute the exported model")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over the launches, on stderr, only where that is a terminal."""
    from rich.console import Console

    with progress_bars(Console(stderr=True)) as bar:
        task = bar.add_task("denoising", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def memory_line(memory: Mapping[str, Any]) -> str:
    """One line about ``Pipeline.memory()``."""
    parts = [f"{memory['graphs_loaded']} of {memory['graphs']} graphs loaded"]
    parts += [f"{name} {size / 2**20:.0f} MiB" for name, size in memory["host"].items()]
    parts += [f"device {name} {size / 2**20:.0f} MiB" for name, size in memory["device"].items()]
    return f"memory: {', '.join(parts)}"


def parse_labels(texts: tuple[str, ...]) -> list[int | str]:
    """Class names and ids from the command line: split at commas; what is a whole number is an id.

    Raises:
        UserError: an empty label.
    """
    labels: list[int | str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if not part:
            raise UserError("--class-labels: an empty label; give names or ids with single commas between")
        # No class has a number of so many digits; Python refuses to read those of thousands.
        labels.append(int(part) if part.removeprefix("-").isdecimal() and len(part) < 20 else part)
    return labels
