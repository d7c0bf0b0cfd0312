"""Train the miniature models of ``dipgo_deploy/assets`` from Fashion-MNIST, on the CPU.

Run from the repository's root, in this order (``docs/training.md`` has the recorded run)::

    export PYTHONPATH=.
    python tools/train_fashion.py data --source package/src/clothes
    python tools/train_fashion.py vae
    python tools/train_fashion.py classifier
    python tools/train_fashion.py latents
    python tools/train_fashion.py sd
    python tools/train_fashion.py dit
    python tools/train_fashion.py evaluate sd
    python tools/train_fashion.py evaluate dit
    python tools/train_fashion.py summary

Everything in between (arrays, checkpoints, logs) lies in the work folder, ``--work``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dipgo_deploy.quality.judge import (
    CLASS_NAMES,
    STATS_NAME,
    WEIGHTS_NAME,
    Judge,
    build_network,
    feature_statistics,
    frechet_distance,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

SEED = 20240711
HELDOUT_PER_CLASS = 1000
IMAGES_PER_CLASS = 7000
PIXELS = 28
PADDING = 2
SCALING_FACTOR = 0.18215
"""The autoencoder is rescaled after its training so that SD-1.5's own factor gives latents of unit deviation."""

NULL_CLASS = 1000
"""The row of the label embedding that the stock ``DiTPipeline`` uses for guidance."""

DROPOUT = 0.1
"""The share of training examples that lose their caption or class, for classifier-free guidance."""

MAX_TOKENS = 16
ASSETS = Path(__file__).resolve().parent.parent / "dipgo_deploy" / "assets"

SYNONYMS: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt", "tee", "t-shirt top"),
    "trouser": ("trouser", "pair of trousers", "pair of pants"),
    "pullover": ("pullover", "sweater", "jumper"),
    "dress": ("dress", "gown", "frock"),
    "coat": ("coat", "jacket", "overcoat"),
    "sandal": ("sandal", "open sandal", "strappy shoe"),
    "shirt": ("shirt", "button-up shirt", "blouse"),
    "sneaker": ("sneaker", "trainer", "running shoe"),
    "bag": ("bag", "handbag", "purse"),
    "ankle boot": ("ankle boot", "boot", "bootie"),
}

TEMPLATES: tuple[str, ...] = (
    "{}",
    "a {}",
    "the {}",
    "one {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a small photo of a {}",
    "a small picture of a {}",
    "a {} on black",
    "a {} on a black background",
    "a product photo of a {}",
)

SHADES: tuple[tuple[str, ...], ...] = (("dark", "black"), ("grey", "medium"), ("light", "white"))
"""Words for the three thirds of a class's images, ordered by the mean brightness of the article's pixels."""


class Log:
    """A JSON-lines log that is echoed to the standard output."""

    def __init__(self, path: Path) -> None:
        """Start an empty log at ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._start = time.monotonic()

    def write(self, **values: Any) -> None:
        """Write one record, with the seconds since the log's start."""
        line = json.dumps({"seconds": round(time.monotonic() - self._start, 1), **values})
        self._file.write(line + "\n")
        self._file.flush()
        click.echo(line)


class Ema:
    """Exponential moving average of modules' parameters, with a warm-up of the decay."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        """Start the average at the modules' present parameters; ``decay`` is its final value."""
        self._live = [p for module in modules for p in module.parameters()]
        self._mean = [p.detach().clone() for p in self._live]
        self._decay, self._steps = decay, 0

    def update(self) -> None:
        """Take in the parameters as they are now."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._live], 1.0 - decay)

    def swap(self) -> None:
        """Exchange the modules' parameters with the average; a second call undoes the first."""
        with torch.no_grad():
            for live, mean in zip(self._live, self._mean, strict=True):
                kept = live.clone()
                live.copy_(mean)
                mean.copy_(kept)


class Budget:
    """How long a training runs: for a number of minutes or, if ``steps`` is positive, for that many steps."""

    def __init__(self, minutes: float, steps: int = 0) -> None:
        """Start the clock."""
        self._minutes, self._steps, self._start = minutes, steps, time.monotonic()

    def share(self, step: int) -> float:
        """Share of the run that lies behind ``step``, the number of finished steps; 1 or more ends it."""
        if self._steps > 0:
            return step / self._steps
        return (time.monotonic() - self._start) / (60 * self._minutes)


def cosine(done: float, peak: float, warm_up: float = 0.02) -> float:
    """Learning rate after the share ``done`` (0 to 1) of a run: linear warm-up, then half a cosine to 1% of peak."""
    if done < warm_up:
        return peak * max(done / warm_up, 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (done - warm_up) / (1.0 - warm_up)))))


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches for ever, each pass over ``count`` items in a new order; the last short batch is left."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def replace_folder(made: Path, final: Path) -> None:
    """Put the folder ``made`` in the place of ``final`` by renaming."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(made, final)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- data


def load_split(work: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split: images uint8 ``(N, 32, 32)`` and labels int64 ``(N,)``; ``split`` is train or heldout."""
    with np.load(work / "data.npz", allow_pickle=False) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Repeat grey images ``(N, H, W)`` to ``(N, H, W, 3)``."""
    return np.repeat(images[..., None], 3, axis=3)


def as_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 ``(N, 32, 32)`` into float32 ``(N, 3, 32, 32)`` in [-1, 1]."""
    grey = torch.from_numpy(images).float().div_(127.5).sub_(1.0)
    return grey[:, None].expand(-1, 3, -1, -1)


def brightness_thirds(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Say for each image in which third of its class its article's mean brightness lies: int64 0, 1 or 2."""
    article = images > 20
    total = np.where(article, images, 0).sum(axis=(1, 2), dtype=np.float64)
    mean = total / np.maximum(article.sum(axis=(1, 2)), 1)
    thirds = np.zeros(len(labels), dtype=np.int64)
    for label in range(len(CLASS_NAMES)):
        rows = labels == label
        thirds[rows] = np.digitize(mean[rows], np.quantile(mean[rows], (1 / 3, 2 / 3)))
    return thirds


def read_source(source: Path) -> np.ndarray:
    """Read the npm package's ten JSON files: uint8 ``(10, 7000, 28, 28)``.

    Raises:
        ValueError: a file does not hold 7,000 images of whole numbers from 0 to 255.
    """
    classes = []
    for label in range(len(CLASS_NAMES)):
        path = source / f"{label}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["data"]
        values = np.asarray([row for row in rows if row], dtype=np.float64)  # 0.json has two empty rows
        whole = values.size and values.min() >= 0 and values.max() <= 255 and (values == np.rint(values)).all()
        if values.size != IMAGES_PER_CLASS * PIXELS**2 or not whole:
            raise ValueError(f"{path} does not hold {IMAGES_PER_CLASS} images of whole numbers from 0 to 255")
        classes.append(values.astype(np.uint8).reshape(IMAGES_PER_CLASS, PIXELS, PIXELS))
    return np.stack(classes)


# --------------------------------------------------------------------------------------------------- autoencoder


def build_vae() -> AutoencoderKL:
    """Build the untrained autoencoder: ``(N, 3, 32, 32)`` to latents ``(N, 4, 8, 8)``."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=SCALING_FACTOR,
    )


def train_vae(work: Path, budget: Budget, batch: int, rate: float, kl_weight: float) -> None:
    """Train the autoencoder and save it, rescaled, as ``vae.pt`` in the work folder."""
    torch.manual_seed(SEED)
    images, _ = load_split(work, "train")
    heldout = as_tensor(load_split(work, "heldout")[0][::20])
    log, vae = Log(work / "vae.jsonl"), build_vae()
    ema = Ema([vae], 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    order = batches(len(images), batch, torch.Generator().manual_seed(SEED))
    log.write(event="start", parameters=sum(p.numel() for p in vae.parameters()))
    for step in itertools.count():
        done = budget.share(step)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = cosine(done, rate)
        x = as_tensor(images[next(order).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.std)).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = (decoded - x).abs().mean() + (decoded - x).square().mean() + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update()
        if step % 100 == 0:
            log.write(step=step, loss=round(loss.item(), 5), kl=round(kl.item(), 3))
        if step % 1000 == 999:
            ema.swap()
            save_vae(vae, images, work)
            ema.swap()
    ema.swap()
    save_vae(vae, images, work)
    with torch.no_grad():
        error = (vae(heldout).sample.clamp(-1, 1) - heldout).div(2)
    psnr = -10 * error.square().mean().log10().item()
    log.write(event="end", steps=step, heldout_mae=error.abs().mean().item(), psnr=psnr)


def save_vae(vae: AutoencoderKL, images: np.ndarray, work: Path) -> None:
    """Save a copy of ``vae`` whose latents have zero mean and deviation ``1 / SCALING_FACTOR`` in every channel."""
    with torch.no_grad():
        posterior = vae.encode(as_tensor(images[::60])).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(
            posterior.std.shape, generator=torch.Generator().manual_seed(SEED)
        )
    copied = build_vae()
    copied.load_state_dict(vae.state_dict())
    rescale_vae(copied, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * SCALING_FACTOR)
    torch.save(copied.state_dict(), work / "vae.tmp")
    os.replace(work / "vae.tmp", work / "vae.pt")


def rescale_vae(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Fold ``z -> (z - mean) / deviation`` into the 1x1 convolutions on either side of the latents.

    Args:
        vae: changed in place; its reconstructions stay what they were.
        mean: ``(4,)``.
        deviation: ``(4,)``, positive.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        quant.weight[:4].div_(deviation[:, None, None, None])
        quant.bias[:4].sub_(mean).div_(deviation)
        quant.bias[4:].sub_(2.0 * deviation.log())
        post.bias.add_(post.weight[:, :, 0, 0] @ mean)
        post.weight.mul_(deviation[None, :, None, None])


def load_vae(work: Path) -> AutoencoderKL:
    """Load the work folder's autoencoder, in evaluation mode; untrained if there is none yet."""
    vae = build_vae()
    if (work / "vae.pt").is_file():
        vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    return vae.eval()


# ---------------------------------------------------------------------------------------------------- classifier


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift a batch ``(N, 1, 32, 32)`` by up to two pixels and mirror half of it, the batch as one."""
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    moved = functional.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, 2 + dy : 34 + dy, 2 + dx : 34 + dx]
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def train_classifier(work: Path, budget: Budget, batch: int, rate: float) -> None:
    """Train the judge's network and write the judge's folder."""
    torch.manual_seed(SEED)
    images, labels = load_split(work, "train")
    targets, network, log = torch.from_numpy(labels), build_network(), Log(work / "classifier.jsonl")
    ema = Ema([network], 0.999)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    order = batches(len(images), batch, generator)
    for step in itertools.count():
        done = budget.share(step)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = cosine(done, rate, 0.1)
        rows = next(order)
        x = shifted(as_tensor(images[rows.numpy()])[:, :1], generator)
        loss = functional.cross_entropy(network(x), targets[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()
        if step % 100 == 0:
            log.write(step=step, loss=round(loss.item(), 4))
    ema.swap()
    save_judge(network, work, log, step)


def save_judge(network: nn.Sequential, work: Path, log: Log, steps: int) -> None:
    """Write the judge's two files and log its accuracy and reference distances."""
    from safetensors.torch import save_file

    made, final = work / "judge.new", ASSETS / "judge"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, made / WEIGHTS_NAME)
    images, labels = load_split(work, "heldout")
    judge = Judge(network, np.zeros(0), np.zeros((0, 0)))
    mean, covariance = feature_statistics(judge.features(as_rgb(images)))
    np.savez(made / STATS_NAME, mean=mean, covariance=covariance, count=np.int64(len(images)))
    accuracy = float((judge.classify(as_rgb(images)) == labels).mean())
    train_images, _ = load_split(work, "train")
    reference = feature_statistics(judge.features(as_rgb(train_images[:: len(train_images) // 1000][:1000])))
    distance = frechet_distance(*reference, mean, covariance)
    log.write(event="end", steps=steps, heldout_accuracy=accuracy, frechet_of_1000_training_images=distance)
    replace_folder(made, final)


# ------------------------------------------------------------------------------------------------------ captions


def caption_table() -> list[list[str]]:
    """List the captions of each class and third: entry ``3 * label + third``, all of one length.

    Half of an entry's captions name the brightness and half do not.
    """
    table = []
    for name, shades in itertools.product(CLASS_NAMES, SHADES):
        plain = [template.format(noun) for template in TEMPLATES for noun in SYNONYMS[name]]
        shaded = [t.format(f"{shade} {noun}") for t in TEMPLATES for noun in SYNONYMS[name] for shade in shades]
        table.append([c.replace("a image", "an image") for c in plain + plain + shaded])
    return table


def build_tokenizer(merges: int = 400) -> CLIPTokenizer:
    """Train a byte-level BPE vocabulary on the captions and order it as CLIP's: bytes, final bytes, merges, marks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trainer_side = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_side.normalizer = normalizers.Lowercase()
    trainer_side.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    trainer_side.train_from_iterator((c for entry in caption_table() for c in entry), trainer)
    learned = [tuple(pair) for pair in json.loads(trainer_side.to_str())["model"]["merges"]]
    words = alphabet + [c + "</w>" for c in alphabet] + list(dict.fromkeys(a + b for a, b in learned))
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=learned, model_max_length=MAX_TOKENS
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save ``tokenizer.json`` and the configuration, and beside them CLIP's ``vocab.json`` and ``merges.txt``."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Give the token numbers of captions as the stock pipeline does: int64 ``(N, 16)``."""
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


# -------------------------------------------------------------------------------------------------------- models


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder: token numbers ``(N, 16)`` to ``(N, 16, 64)``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Build the untrained U-Net, with SD-1.5's blocks: latents ``(N, 4, 8, 8)`` and text ``(N, 16, 64)``."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 64, 96),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_dit() -> DiTTransformer2DModel:
    """Build the DiT: latents ``(N, 4, 8, 8)``; modulation, output and unused labels start at zero."""
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=10,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    clear_unused_labels(dit)
    return dit


def clear_unused_labels(dit: DiTTransformer2DModel) -> None:
    """Set the label embeddings' rows to zero, except the ten classes and the null class."""
    with torch.no_grad():
        for block in dit.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight[len(CLASS_NAMES) : NULL_CLASS] = 0.0


def sd_scheduler() -> Any:
    """Build SD-1.5's scheduler; its ``clip_sample`` is for the schedulers made from its configuration, as there."""
    from diffusers import PNDMScheduler

    return PNDMScheduler.from_config(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "epsilon",
            "clip_sample": False,
        }
    )


def dit_scheduler() -> Any:
    """Build DiT-XL/2's scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
    )


def stored_weights(name: str) -> dict[str, Tensor]:
    """Read a file of ``dipgo_deploy/assets``, as float32."""
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(ASSETS / name).items()}


def save_model(final: Path, made: Path, write: Callable[[Path], None]) -> None:
    """Write a pipeline's folder aside with ``write`` and put it in the place of ``final``."""
    shutil.rmtree(made, ignore_errors=True)
    write(made)
    replace_folder(made, final)


def write_sd(folder: Path, unet: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer, vae: nn.Module) -> None:
    """Write a stock ``StableDiffusionPipeline`` folder; the modules are left as they are.

    The weights are 16-bit, but for the small text encoder's: transformers would load those as 16-bit, too, where
    diffusers loads them as 32-bit, and the two would not fit together.
    """
    from diffusers import StableDiffusionPipeline

    half_unet, half_vae = build_unet(), build_vae()
    for half, full in ((half_unet, unet), (half_vae, vae)):
        half.load_state_dict(full.state_dict())
        half.half()
    pipeline = StableDiffusionPipeline(
        vae=half_vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=half_unet,
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder / "tokenizer")


def write_dit(folder: Path, dit: nn.Module, vae: nn.Module) -> None:
    """Write a stock ``DiTPipeline`` folder with 16-bit weights; the modules are left as they are."""
    from diffusers import DiTPipeline

    half_dit, half_vae = build_dit(), build_vae()
    half_dit.load_state_dict(dit.state_dict())
    half_vae.load_state_dict(vae.state_dict())
    clear_unused_labels(half_dit)
    pipeline = DiTPipeline(transformer=half_dit.half(), vae=half_vae.half(), scheduler=dit_scheduler())
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8"))
    config["id2label"] = {str(i): name for i, name in enumerate(CLASS_NAMES)}
    index.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- diffusion


def cache_latents(work: Path) -> None:
    """Encode the training images once: scaled means and deviations, float16, in ``latents.npz``."""
    vae = load_vae(work)
    images, labels = load_split(work, "train")
    means, deviations = [], []
    with torch.no_grad():
        for start in range(0, len(images), 500):
            posterior = vae.encode(as_tensor(images[start : start + 500])).latent_dist
            means.append((posterior.mean * SCALING_FACTOR).half())
            deviations.append((posterior.std * SCALING_FACTOR).half())
    mean, std = torch.cat(means), torch.cat(deviations)
    thirds = brightness_thirds(images, labels)
    np.savez(work / "latents.npz", mean=mean.numpy(), std=std.numpy(), labels=labels, thirds=thirds)
    total = (mean.float().var() + std.float().square().mean()).sqrt().item()
    click.echo(json.dumps({"deviation": total, "noise": std.float().mean().item()}))


def weighted_loss(predicted: Tensor, noise: Tensor, alphas: Tensor, gamma: float = 5.0) -> tuple[Tensor, Tensor]:
    """Mean squared error of the noise, weighted min(SNR, gamma) / SNR, and unweighted."""
    errors = (predicted - noise).square().mean(dim=(1, 2, 3))
    ratio = alphas / (1.0 - alphas)
    return (errors * (ratio.clamp(max=gamma) / ratio)).mean(), errors.mean()


def train_diffusion(
    work: Path,
    name: str,
    budget: Budget,
    batch: int,
    rate: float,
    modules: list[nn.Module],
    alphas_cumprod: Tensor,
    predict: Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor],
    save: Callable[[], None],
) -> None:
    """Train ``modules`` to predict noise; call ``save`` under the average every five minutes and at the end.

    Args:
        work: has ``latents.npz``; receives the log ``<name>.jsonl``.
        name: of the log.
        budget: the run's length, to which the learning rate's schedule is keyed.
        batch: latents a step.
        rate: peak learning rate.
        modules: what is trained.
        alphas_cumprod: ``(1000,)`` of the scheduler.
        predict: from noisy latents ``(N, 4, 8, 8)``, timesteps, labels, thirds and a generator to predicted noise.
        save: writes the model's folder.
    """
    with np.load(work / "latents.npz", allow_pickle=False) as arrays:
        mean, std = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"])
        labels, thirds = torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["thirds"])
    parameters = [p for module in modules for p in module.parameters()]
    log, ema = Log(work / f"{name}.jsonl"), Ema(modules, 0.999)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    order = batches(len(labels), batch, generator)
    log.write(event="start", parameters=[sum(p.numel() for p in module.parameters()) for module in modules])
    window, saved = [0.0, 0.0], time.monotonic()
    for step in itertools.count():
        done = budget.share(step)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = cosine(done, rate)
        rows = next(order)
        clean = mean[rows].float()
        clean += std[rows].float() * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, len(alphas_cumprod), (batch,), generator=generator)
        alphas = alphas_cumprod[timesteps]
        scale = alphas[:, None, None, None]
        noisy = scale.sqrt() * clean + (1.0 - scale).sqrt() * noise
        loss, plain = weighted_loss(predict(noisy, timesteps, labels[rows], thirds[rows], generator), noise, alphas)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update()
        window = [window[0] + loss.item() / 100, window[1] + plain.item() / 100]
        if step % 100 == 99:
            log.write(step=step + 1, loss=round(window[0], 5), plain=round(window[1], 5), share=round(done, 4))
            window = [0.0, 0.0]
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            ema.swap()
            save()
            ema.swap()
    ema.swap()
    save()
    log.write(event="end", steps=step, examples=step * batch)


def pretrain_text(text: nn.Module, table: Tensor, steps: int, batch: int = 128, rate: float = 2e-3) -> float:
    """Teach the text encoder to tell classes and shades apart before the U-Net learns from it.

    Every position from a caption's end mark on learns to give the class and the shade (none, or one of three)
    through a linear head, which is then dropped.

    Args:
        text: the text encoder, trained in place.
        table: the captions' token numbers, ``(30, K, 16)``, as :func:`caption_table` orders them.
        steps: of AdamW.
        batch: captions a step.
        rate: learning rate.

    Returns:
        The share of positions whose class was right in the last step; 0 for no steps.
    """
    shades, classes, generator, right = len(SHADES), len(CLASS_NAMES), torch.Generator().manual_seed(SEED), 0.0
    head = nn.Linear(64, classes + shades + 1)
    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        entry = torch.randint(0, len(table), (batch,), generator=generator)
        column = torch.randint(0, table.shape[1], (batch,), generator=generator)
        tokens = table[entry, column]
        ended = tokens == tokens[:, -1:]
        scores = head(text(tokens)[0])[ended]
        # The second half of an entry's captions names the shade (see caption_table).
        shade = torch.where(column >= table.shape[1] // 2, 1 + entry % shades, 0)
        wanted, wanted_shade = ((v[:, None].expand_as(ended))[ended] for v in (entry // shades, shade))
        loss = functional.cross_entropy(scores[:, :classes], wanted)
        loss = loss + functional.cross_entropy(scores[:, classes:], wanted_shade)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (scores[:, :classes].argmax(dim=1) == wanted).float().mean().item()
    return right


def train_sd(work: Path, budget: Budget, batch: int, rate: float, text_steps: int, resume: bool) -> None:
    """Train the U-Net and the text encoder together and write ``fashion-sd``.

    Args:
        work: the work folder.
        budget: the run's length.
        batch: latents a step.
        rate: peak learning rate.
        text_steps: steps of :func:`pretrain_text`, from new weights; 0 for none.
        resume: start from the U-Net of ``fashion-sd`` and, without ``text_steps``, from its text encoder.
    """
    torch.manual_seed(SEED)
    tokenizer, vae, unet = build_tokenizer(), load_vae(work), build_unet()
    text = build_text_encoder(tokenizer)
    if resume:
        unet.load_state_dict(stored_weights("fashion-sd/unet/diffusion_pytorch_model.safetensors"))
    if resume and not text_steps:
        text.load_state_dict(stored_weights("fashion-sd/text_encoder/model.safetensors"))
    table = torch.stack([encode(tokenizer, captions) for captions in caption_table()])
    empty = encode(tokenizer, [""])[0]

    def predict(noisy: Tensor, steps: Tensor, labels: Tensor, thirds: Tensor, generator: torch.Generator) -> Tensor:
        column = torch.randint(0, table.shape[1], labels.shape, generator=generator)
        tokens = table[3 * labels + thirds, column]
        tokens[torch.rand(labels.shape, generator=generator) < DROPOUT] = empty
        # Captions repeat within a batch (the empty one most of all), so each is encoded once.
        unique, back = tokens.unique(dim=0, return_inverse=True)
        return unet(noisy, steps, text(unique)[0][back]).sample

    def save() -> None:
        save_model(ASSETS / "fashion-sd", work / "fashion-sd.new", lambda f: write_sd(f, unet, text, tokenizer, vae))

    for module in (unet, text):
        module.eval()
    click.echo(json.dumps({"text_accuracy": pretrain_text(text, table, text_steps)}))
    train_diffusion(work, "sd", budget, batch, rate, [unet, text], sd_scheduler().alphas_cumprod, predict, save)


def train_dit(work: Path, budget: Budget, batch: int, rate: float, resume: bool) -> None:
    """Train the DiT, from the one of ``fashion-dit`` if ``resume``, and write ``fashion-dit``."""
    torch.manual_seed(SEED)
    vae, dit = load_vae(work), build_dit()
    if resume:
        dit.load_state_dict(stored_weights("fashion-dit/transformer/diffusion_pytorch_model.safetensors"))

    def predict(noisy: Tensor, steps: Tensor, labels: Tensor, thirds: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(labels.shape, generator=generator) < DROPOUT
        return dit(noisy, timestep=steps, class_labels=torch.where(dropped, NULL_CLASS, labels)).sample

    def save() -> None:
        save_model(ASSETS / "fashion-dit", work / "fashion-dit.new", lambda f: write_dit(f, dit, vae))

    # In training mode each block would drop labels on its own; one draw a batch serves all blocks instead.
    dit.eval()
    train_diffusion(work, "dit", budget, batch, rate, [dit], dit_scheduler().alphas_cumprod, predict, save)


# ---------------------------------------------------------------------------------------------------- evaluation


def generate(
    model: str, per_class: int, steps: int, guidance: float, seed: int, chunk: int = 100
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generate with a committed model's stock pipeline and DDIM.

    Args:
        model: sd or dit.
        per_class: images of each class; the classes alternate.
        steps: of DDIM.
        guidance: scale of the classifier-free guidance.
        seed: of the one generator of all starting noise.
        chunk: images a batch.

    Yields:
        Images uint8 ``(n, 32, 32, 3)`` and their labels int64 ``(n,)``, batch by batch.
    """
    from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline

    folder = ASSETS / f"fashion-{model}"
    pipeline = (StableDiffusionPipeline if model == "sd" else DiTPipeline).from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    labels = np.tile(np.arange(len(CLASS_NAMES)), per_class)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    settings["generator"] = torch.Generator().manual_seed(seed)
    for part in np.split(labels, range(chunk, len(labels), chunk)):
        if model == "sd":
            prompts = [f"a photo of a {CLASS_NAMES[i]}".replace("a ankle", "an ankle") for i in part]
            images = pipeline(prompt=prompts, **settings).images
        else:
            images = pipeline(class_labels=part.tolist(), **settings).images
        yield np.rint(images * 255).astype(np.uint8), part


def save_grid(images: np.ndarray, path: Path, columns: int = 10, zoom: int = 2) -> None:
    """Save images ``(N, H, W, 3)`` as one PNG, row by row."""
    from PIL import Image

    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    grid = np.concatenate([row for row in rows if row.shape == rows[0].shape], axis=0)
    Image.fromarray(grid.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)


def evaluate_model(work: Path, model: str, per_class: int, steps: int, guidance: float, seed: int) -> None:
    """Generate, judge and print one JSON record; save a grid of the first 100 images in the work folder."""
    start, judge, parts = time.monotonic(), Judge.load(), []
    for images, labels in generate(model, per_class, steps, guidance, seed):
        parts.append((images, labels, judge.classify(images) == labels))
        accuracy = np.concatenate([right for _, _, right in parts]).mean()
        click.echo(f"{sum(len(p[1]) for p in parts)} images, {accuracy:.3f} right", err=True)
    took = time.monotonic() - start
    images, labels, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    np.savez(work / f"generated-{model}.npz", images=images, labels=labels)
    record = {
        "model": f"fashion-{model}",
        "images": len(labels),
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "accuracy": round(float(right.mean()), 4),
        "accuracy_by_class": {n: round(float(right[labels == i].mean()), 3) for i, n in enumerate(CLASS_NAMES)},
        "frechet": round(judge.frechet(images), 4),
        "seconds": round(took, 1),
    }
    save_grid(images[:100], work / f"grid-{model}-{guidance:g}.png")
    with (work / "evaluate.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    click.echo(json.dumps(record))


def read_log(path: Path, points: int = 25) -> list[dict[str, Any]]:
    """Read a JSON-lines log, thinned to about ``points`` losses; its other records are all kept."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [r for r in records if "event" not in r]
    kept = losses[:: max(1, len(losses) // points)] + losses[-1:]
    return [r for r in records if "event" in r or r in kept]


def summarise(work: Path) -> dict[str, Any]:
    """Gather the thinned logs, the evaluations of 1,000 images and the file sizes of a run."""
    names = sorted(path.stem for path in work.glob("*.jsonl") if path.stem != "evaluate")
    evaluations = [json.loads(line) for line in (work / "evaluate.jsonl").read_text(encoding="utf-8").splitlines()]
    files = sorted(p for folder in ("fashion-sd", "fashion-dit", "judge") for p in (ASSETS / folder).rglob("*"))
    return {
        "seed": SEED,
        "evaluations": [e for e in evaluations if e["images"] >= 1000],
        "bytes": {p.relative_to(ASSETS).as_posix(): p.stat().st_size for p in files if p.is_file()},
        "logs": {name: read_log(work / f"{name}.jsonl") for name in names},
    }


# ------------------------------------------------------------------------------------------------------- command


@click.group()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/train"), help="Folder for everything.")
@click.option("--threads", type=int, default=1, help="CPU threads.")
@click.pass_context
def main(context: click.Context, work: Path, threads: int) -> None:
    """Train and measure the miniature models."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    context.obj = work


@main.command()
@click.option("--source", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of 0.json ...")
@click.pass_obj
def data(work: Path, source: Path) -> None:
    """Read the npm package's files, pad to 32x32 and split."""
    images = np.pad(read_source(source), ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    cut = IMAGES_PER_CLASS - HELDOUT_PER_CLASS
    splits = {"train": images[:, :cut], "heldout": images[:, cut:]}
    arrays: dict[str, Any] = {}
    for name, part in splits.items():
        arrays[f"{name}_images"] = part.reshape(-1, *part.shape[2:])
        arrays[f"{name}_labels"] = np.repeat(np.arange(len(part)), part.shape[1])
    np.savez(work / "data.npz", **arrays)
    click.echo(json.dumps({key: list(value.shape) for key, value in arrays.items()}))


@main.command()
@click.option("--minutes", default=9.0)
@click.option("--steps", default=0, help="Run for so many steps instead of minutes.")
@click.option("--batch", default=48)
@click.option("--rate", default=2e-3)
@click.option("--kl-weight", default=2e-4)
@click.pass_obj
def vae(work: Path, minutes: float, steps: int, batch: int, rate: float, kl_weight: float) -> None:
    """Train the autoencoder."""
    train_vae(work, Budget(minutes, steps), batch, rate, kl_weight)


@main.command()
@click.option("--minutes", default=5.0)
@click.option("--steps", default=0, help="Run for so many steps instead of minutes.")
@click.option("--batch", default=128)
@click.option("--rate", default=4e-3)
@click.pass_obj
def classifier(work: Path, minutes: float, steps: int, batch: int, rate: float) -> None:
    """Train the judge."""
    train_classifier(work, Budget(minutes, steps), batch, rate)


@main.command()
@click.pass_obj
def latents(work: Path) -> None:
    """Encode the training images."""
    cache_latents(work)


@main.command()
@click.option("--minutes", default=34.0)
@click.option("--steps", default=0, help="Run for so many steps instead of minutes.")
@click.option("--batch", default=32)
@click.option("--rate", default=1e-3)
@click.option("--text-steps", default=300, help="Steps that the text encoder learns alone first, from new weights.")
@click.option("--resume", is_flag=True, help="Start from the committed weights.")
@click.pass_obj
def sd(work: Path, minutes: float, steps: int, batch: int, rate: float, text_steps: int, resume: bool) -> None:
    """Train the miniature Stable Diffusion."""
    train_sd(work, Budget(minutes, steps), batch, rate, text_steps, resume)


@main.command()
@click.option("--minutes", default=34.0)
@click.option("--steps", default=0, help="Run for so many steps instead of minutes.")
@click.option("--batch", default=48)
@click.option("--rate", default=1e-3)
@click.option("--resume", is_flag=True, help="Start from the committed weights.")
@click.pass_obj
def dit(work: Path, minutes: float, steps: int, batch: int, rate: float, resume: bool) -> None:
    """Train the miniature DiT."""
    train_dit(work, Budget(minutes, steps), batch, rate, resume)


@main.command()
@click.pass_obj
def skeleton(work: Path) -> None:
    """Write both folders with untrained weights (to build against while training runs)."""
    torch.manual_seed(SEED)
    tokenizer, autoencoder = build_tokenizer(), load_vae(work)
    unet, text, transformer = build_unet(), build_text_encoder(tokenizer), build_dit()
    save_model(
        ASSETS / "fashion-sd",
        work / "fashion-sd.new",
        lambda folder: write_sd(folder, unet, text, tokenizer, autoencoder),
    )
    save_model(
        ASSETS / "fashion-dit", work / "fashion-dit.new", lambda folder: write_dit(folder, transformer, autoencoder)
    )


@main.command()
@click.argument("model", type=click.Choice(["sd", "dit"]))
@click.option("--per-class", default=100)
@click.option("--steps", default=50)
@click.option("--guidance", default=4.0)
@click.option("--seed", default=0)
@click.pass_obj
def evaluate(work: Path, model: str, per_class: int, steps: int, guidance: float, seed: int) -> None:
    """Generate with a committed model and judge the images."""
    evaluate_model(work, model, per_class, steps, guidance, seed)


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs/results/training.json"))
@click.pass_obj
def summary(work: Path, output: Path) -> None:
    """Write the run's logs, evaluations and sizes into one small file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(summarise(work), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
