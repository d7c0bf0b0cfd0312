"""What the campaign breaks: two tiny models, their schedules and engine directories, a picture. Made from seeds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dipgo_deploy.cli.main import main as dipgo
from dipgo_deploy.models.location import resolve_model

CLASS = "1"
PROMPT = "a photo of a bag"
STEPS = 4
CLASS_RUN = ("--class-labels", CLASS)
TEXT_RUN = ("--prompt", PROMPT, "--image", "picture.png")


@dataclass(frozen=True)
class Material:
    """Where everything lies, below ``root``."""

    root: Path

    @property
    def class_model(self) -> Path:
        """A class-conditioned transformer of two blocks with a VAE: 300 KB."""
        return self.root / "class-model"

    @property
    def text_model(self) -> Path:
        """``fashion-sd`` with a small random UNet."""
        return self.root / "text-model"

    @property
    def class_schedule(self) -> Path:
        """Three variants, caches in use."""
        return self.root / "class.json"

    @property
    def fitted_schedule(self) -> Path:
        """The same with a solver of its own."""
        return self.root / "fitted.json"

    @property
    def class_engine(self) -> Path:
        """Engine directory of the class model."""
        return self.root / "engines" / "class"

    @property
    def text_engine(self) -> Path:
        """Engine directory of the text model, from a picture: text encoder, tokenizer, both halves of the VAE."""
        return self.root / "engines" / "text"

    @property
    def picture(self) -> Path:
        """What the text engine starts from."""
        return self.root / "picture.png"

    def reference(self, engine: Literal["class", "text"]) -> np.ndarray:
        """The pictures of an engine directory before anything was changed, float32 (n, H, W, 3)."""
        return np.load(self.root / f"{engine}.npy")


def make(root: Path) -> Material:
    """Make all that is missing in ``root``, in a process of its own.

    Raises:
        RuntimeError: a command failed; its own message is on stderr.
    """
    material = Material(root)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "done").is_file():
        in_child(lambda: _make(material))
        (root / "done").touch()
    return material


def in_child(call: Callable[[], Any]) -> None:
    """Call it in a forked process: this one starts no threads and keeps no memory.

    Raises:
        RuntimeError: it failed.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the campaign's own material cannot be made: see above")


def run_arguments(engine_dir: str | Path, arguments: Sequence[str], output: str = "out.npy") -> list[str]:
    """A run on one thread of the CPU whose pictures are written as an array."""
    options = ("--output-type", "np", "-o", output, "--backend", "cpu", "--threads", "1")
    return ["run", "--engine-dir", str(engine_dir), *arguments, *options]


def link_tree(source: Path, target: Path, own: Sequence[str]) -> None:
    """Copy an engine directory with hard links, but for the files named in ``own``, which are copied."""
    copies = {source / name for name in own}

    def copy(one: str, other: str) -> None:
        if Path(one) in copies:
            shutil.copyfile(one, other)
        else:
            os.link(one, other)

    shutil.copytree(source, target, copy_function=copy)


def _make(material: Material) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.chdir(material.root)
    _save_class_model(material.class_model)
    _save_text_model(material.text_model)
    _save_picture(material.picture)
    (material.root / "engines").mkdir(exist_ok=True)
    for name, schedule, options, arguments in (
        ("class", ("random", "--ratio", "0.4", "--seed", "3"), (), CLASS_RUN),
        ("text", ("full",), ("--strength", "0.75"), TEXT_RUN),
    ):
        model, engine_dir = str(material.root / f"{name}-model"), str(material.root / "engines" / name)
        sampler = ("--sampler", "ddim", "--steps", str(STEPS))
        _run("schedule", *schedule, "--model", model, *sampler, "-o", f"{name}.json")
        export = ("--model", model, "--schedule", f"{name}.json", "--engine-dir", engine_dir, "--no-check")
        _run("export", *export, "--layout", "variants", *options)
        _run(*run_arguments(engine_dir, arguments, f"{name}.npy"))
    fit = ("--model", str(material.class_model), "--schedule", "class.json", "-o", "fitted.json")
    _run("calibrate", *fit, "--images", "4", "--batch", "2", "--threads", "1")


def _run(*argv: str) -> None:
    status = dipgo(argv)
    if status:
        raise RuntimeError(f"dipgo {' '.join(argv)}: exit status {status}")


def _save_class_model(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the stock pipeline takes 1000 as the class of nothing
    )
    with torch.no_grad():
        for parameter in transformer.parameters():  # the zeros it starts with would hide what is changed
            parameter.add_(0.05 * torch.randn(parameter.shape))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    DiTPipeline(transformer.eval(), vae.eval(), scheduler).save_pretrained(folder)
    index = folder / "model_index.json"
    names = {str(number): name for number, name in enumerate(("boot", "bag", "coat"))}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))


def _save_text_model(folder: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(resolve_model("fashion-sd"), folder)
    shutil.rmtree(folder / "unet")
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.eval().save_pretrained(folder / "unet")


def _save_picture(path: Path) -> None:
    from PIL import Image

    rows = np.linspace(0, 255, 64)
    Image.fromarray(
        np.stack([np.add.outer(rows, rows) / 2, np.tile(rows, (64, 1)), np.full((64, 64), 90.0)], -1).astype(np.uint8)
    ).save(path)
