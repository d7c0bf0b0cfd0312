"""``dipgo-run``: pictures from an engine directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from dipgo_deploy.backends import BACKENDS
from dipgo_deploy.cli.arrays import load_array, load_embeds, load_picture
from dipgo_deploy.cli.common import (
    emit,
    entry_point,
    examples,
    free_output,
    human_console,
    json_option,
    live,
    lora_line,
    lora_partial_option,
    overwrite_option,
    version_option,
)
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import written_whole

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dipgo_deploy.backends.tensorrt_queue import GraphMode
    from dipgo_deploy.runtime.pipeline import LoadMode

_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Nothing is loaded before the arguments were checked.
_LOAD: dict[str | None, LoadMode] = {"eager": "call", "lazy": "lazy", None: "auto"}
_DEFAULT_OUTPUT = {"pil": "output.png", "np": "output.npy", "latent": "output.npy"}


@click.command(
    name="dipgo-run",
    epilog=examples(
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a sneaker" -o sneaker.png',
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a bag" --prompt "a coat" --num-images 4 --seed 7',
        "dipgo-run --engine-dir engines/fashion-dit --class-labels sneaker,bag,3 -o grid.png",
        'dipgo-run --engine-dir engines/fashion-sd --prompt "a shirt" --output-type latent -o latents.npy',
        'dipgo-run --engine-dir engines/sd15 --prompt "a castle" --lora style.safetensors:0.8 --load lazy',
        'dipgo-run --engine-dir engines/sd15-img2img --prompt "a castle" --image sketch.png',
    ),
)
@click.option("--engine-dir", required=True, type=click.Path(path_type=Path), help="Made by dipgo-export.")
@click.option("--prompt", "prompts", multiple=True, help="Text prompt; can be given several times.")
@click.option(
    "--class-labels", "class_labels", multiple=True, help="Class names or ids, with commas between or given repeatedly."
)
@click.option("--negative-prompt", help="What the pictures should not show (with guidance).  [default: empty]")
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pictures for each prompt or class label.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="diffusers' CPU generator's stream, in float32.")
@click.option("--guidance-scale", type=float, help="1 is no guidance.  [default: the engine directory's]")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Picture to start from, for an engine directory exported with --strength: one, or one for each prompt.",
)
@click.option("--strength", type=float, help="Checked against the engine directory's.")
@click.option("--height", type=click.IntRange(min=1), help="In pixels, where it was exported with a range.")
@click.option("--width", type=click.IntRange(min=1), help="The same.  [default: the usual ones of the ranges]")
@click.option(
    "--control-image",
    "control_images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Picture that a ControlNet looks at: one, or one for each prompt.",
)
@click.option("--control-scale", type=float, help="Of what the ControlNet adds.  [default: 1]")
@click.option("--latents", type=click.Path(path_type=Path), help="Initial unit noise (n, C, h, w), .npy.")
@click.option(
    "--prompt-embeds",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Embeddings (prompts, L, D), .npy, not --prompt. A model with several text conditions takes NAME=FILE.npy for "
    "each, or all of them by name in one .npz or .safetensors.",
)
@click.option(
    "--negative-prompt-embeds", multiple=True, metavar="[NAME=]FILE", help="The same for the negative prompt."
)
@click.option(
    "--output-type",
    type=click.Choice(["pil", "np", "latent"]),
    default="pil",
    show_default=True,
    help="A picture (several in a grid), images float32 (n, H, W, 3), or latents float32 (n, C, h, w).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write.  [default: output.png or output.npy]",
)
@overwrite_option
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="ONNX Runtime on cpu or cuda, or engines made by dipgo-build; auto: cuda where it works, else cpu.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the physical cores]")
@click.option(
    "--share-weights/--no-share-weights",
    default=None,
    help="One copy of the weights for all graphs: less memory, slower on CPU.  [default: on cuda only]",
)
@click.option(
    "--load",
    type=click.Choice(["eager", "lazy"]),
    help="Load all graphs before the first launch, or each at its own.  [default: lazy on cpu]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="LoRA file or folder (safetensors) to add, to all variants; can be given several times.",
)
@lora_partial_option
@click.option(
    "--cuda-graph",
    type=click.Choice(["off", "step", "loop"]),
    default="off",
    show_default=True,
    help="TensorRT: a captured graph for each launch, or one for the whole loop.",
)
@click.option("--verify", is_flag=True, help="Check the hash of every file of the engine directory first.")
@json_option
@version_option
def command(
    engine_dir: Path,
    prompts: tuple[str, ...],
    class_labels: tuple[str, ...],
    negative_prompt: str | None,
    num_images: int,
    seed: int,
    guidance_scale: float | None,
    images: tuple[Path, ...],
    strength: float | None,
    control_images: tuple[Path, ...],
    control_scale: float | None,
    height: int | None,
    width: int | None,
    latents: Path | None,
    prompt_embeds: tuple[str, ...],
    negative_prompt_embeds: tuple[str, ...],
    output_type: str,
    output: Path | None,
    overwrite: bool,
    backend: str,
    threads: int | None,
    share_weights: bool | None,
    load: str | None,
    loras: tuple[str, ...],
    lora_partial: bool,
    cuda_graph: GraphMode,
    verify: bool,
    as_json: bool,
) -> None:
    """Generate pictures from an engine directory. Needs no torch.

    Several pictures are written as one grid. The output appears under its name only when it is complete.
    """
    asked = output or Path(_DEFAULT_OUTPUT[output_type])
    check_suffix(asked, output_type)
    target = free_output(asked, "--output", overwrite=overwrite)
    arrays = {
        "latents": load_array("--latents", latents),
        "prompt_embeds": load_embeds("--prompt-embeds", prompt_embeds),
        "negative_prompt_embeds": load_embeds("--negative-prompt-embeds", negative_prompt_embeds),
    }
    pictures = [load_picture("--image", path) for path in images]
    controls = [load_picture("--control-image", path) for path in control_images]
    from dipgo_deploy.lora.file import parse_choice
    from dipgo_deploy.runtime.pipeline import Pipeline

    choices = [parse_choice(text) for text in loras]
    pipeline = Pipeline.from_engine_dir(
        engine_dir,
        backend,
        threads=threads,
        share_weights=share_weights,
        cuda_graph=cuda_graph,
        verify=verify,
        load=_LOAD[load],
        lora=choices,
        lora_partial=lora_partial,
    )
    with _progress() as progress:
        result = pipeline(
            list(prompts) or None,
            negative_prompt=negative_prompt,
            class_labels=parse_labels(class_labels) or None,
            num_images_per_prompt=num_images,
            seed=seed,
            guidance_scale=guidance_scale,
            image=pictures or None,
            strength=strength,
            control_image=controls or None,
            control_scale=control_scale,
            height=height,
            width=width,
            output_type=output_type,  # type: ignore[arg-type]  # click checked the choice
            callback=progress,
            **arrays,  # type: ignore[arg-type]  # latents and embeddings only
        )
    write_output(target, result.images)
    manifest = pipeline.bundle.manifest
    memory = pipeline.memory()
    timings = {name: round(seconds, 6) for name, seconds in asdict(result.timings).items()}
    human_console(as_json).print(
        f"{target}: {len(result.latents)} image(s), {manifest.model.name} on {pipeline.backend.name}, "
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
            "evaluations": manifest.plan.evaluations,
            "launches": result.launches,
            "seconds": timings,
            "memory": memory,
            "loras": [asdict(report) for report in pipeline.loras],
        },
        as_json,
    )


main = entry_point(command)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over the launches, on stderr, only where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with live(Progress(*columns, console=Console(stderr=True), transient=True)) as bar:
        task = bar.add_task("denoising", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def memory_line(memory: Mapping[str, Any]) -> str:
    """One line about ``Pipeline.memory()``."""
    parts = [f"{memory['graphs_loaded']} of {memory['graphs']} graphs loaded"]
    parts += [f"{name} {size / 2**20:.0f} MiB" for name, size in memory["host"].items()]
    parts += [f"device {name} {size / 2**20:.0f} MiB" for name, size in memory["device"].items()]
    return f"memory: {', '.join(parts)}"


def parse_labels(given: tuple[str, ...]) -> list[int | str]:
    """Class names and ids from the command line: split at commas; what is a whole number is an id.

    Raises:
        UserError: an empty label.
    """
    labels: list[int | str] = []
    for part in (part.strip() for text in given for part in text.split(",")):
        if not part:
            raise UserError("--class-labels: an empty label; give names or ids with single commas between")
        # No class has a number of so many digits; Python refuses to read those of thousands.
        labels.append(int(part) if part.removeprefix("-").isdecimal() and len(part) < 20 else part)
    return labels


def check_suffix(path: Path, output_type: str) -> None:
    """Refuse (UserError) a suffix that does not fit the output type, before any work is done."""
    suffixes = list(_PICTURES) if output_type == "pil" else [".npy"]
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--output {path}: output type {output_type} is written to {', '.join(suffixes)}")


def write_output(path: Path, images: list[Image] | np.ndarray) -> None:
    """Write pictures (as a grid) or an array under a name of its own, then rename.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with written_whole(path) as file:
            _write(file, path.suffix.lower(), images)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None


def _write(file: BinaryIO, suffix: str, images: list[Image] | np.ndarray) -> None:
    if not isinstance(images, list):
        import numpy as np

        np.save(file, images, allow_pickle=False)
        return
    from dipgo_deploy.runtime.image import grid

    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    grid(images).save(file, _PICTURES[suffix], **options)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
