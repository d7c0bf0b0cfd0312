"""The optimization of the pruner through the whole denoising loop (DiP-GO, arXiv 2410.16942)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from dipgo_deploy.documents import check_same_settings
from dipgo_deploy.errors import UserError
from dipgo_deploy.search import checkpoint
from dipgo_deploy.search.loop_loss import LoopLoss, Precision
from dipgo_deploy.search.losses import sparsity
from dipgo_deploy.search.problem import Problem
from dipgo_deploy.search.pruner import Pruner
from dipgo_deploy.search.samples import SampleStream

LOG_NAME = "log.jsonl"

OptimizerName = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class TrainOptions:
    """How the pruner is optimized. The defaults are the paper's, but for the learning rate and number of iterations.

    Attributes:
        iterations: optimizer steps.
        batch: images a run.
        accumulation: runs an optimizer step.
        alpha: weight of the sparsity term, which is dropped while the share of kept gates is below ``stop_share``.
        relative_price: prices of gates are divided by their mean, so that one alpha suits models of few and of many
            blocks.
        lr: its peak, after ``warmup`` iterations, then a half cosine to 0.
        clip: largest gradient norm, 0 for no clipping.
        temperature: of the softmax, at the first and last iteration, geometric in between.
        save_every: iterations from one checkpoint to the next.
        precision: bf16 runs the denoiser under autocast.
    """

    iterations: int = 200
    batch: int = 1
    accumulation: int = 1
    loss: str = "ssim"
    alpha: float = 1.0
    stop_share: float = 0.2
    relative_price: bool = False
    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-4
    warmup: int = 0
    clip: float = 0.0
    temperature: tuple[float, float] = (1.0, 1.0)
    precision: Precision = "fp32"
    checkpoint_steps: bool = True
    save_every: int = 20


PRESETS: Mapping[str, TrainOptions] = MappingProxyType(
    {
        "small": TrainOptions(iterations=100, optimizer="adam", lr=0.03, alpha=0.5, relative_price=True),
        "paper": TrainOptions(iterations=1000, batch=1, optimizer="sgd", lr=0.1),
    }
)
"""``paper``: the paper's settings for UNets (a DiT takes lr 10). ``small``: for small models and little time."""


@dataclass(frozen=True)
class Progress:
    """A finished iteration of so many: its loss (distance + sparsity), the kept share of the gates, the time taken."""

    iteration: int
    iterations: int
    loss: float
    distance: float
    sparsity: float
    kept: float
    lr: float
    seconds: float


class Trainer:
    """A pruner, its optimizer, and the images it learns from."""

    def __init__(self, problem: Problem, pruner: Pruner, options: TrainOptions, samples: SampleStream) -> None:
        """Raises UserError for a loss on images when the model makes none."""
        self.problem, self.pruner, self.options, self.samples = problem, pruner.to(problem.device), options, samples
        self.optimizer = _optimizer(self.pruner, options)
        self.iteration = 0
        self._loss = LoopLoss(problem, options.loss, options.precision, checkpoint_steps=options.checkpoint_steps)
        gamma = problem.costs.gamma
        scale = sum(gamma) / len(gamma) if options.relative_price else 1.0
        self._prices = [share / scale for share in gamma]

    def iterate(self) -> Progress:
        """One optimizer step.

        Raises:
            FloatingPointError: loss or gradient is not a number; the parameters are as before.
        """
        options, start = self.options, time.perf_counter()
        lr = learning_rate(options, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        distances = []
        first = self.iteration * options.accumulation * options.batch
        for part in range(options.accumulation):
            pairs = self.samples.pairs(first + part * options.batch, options.batch)
            # Made anew for each part: a part's backward pass frees the pruner's graph.
            gates, _ = self.pruner(_temperature(options, self.iteration))
            distance = self._loss(gates, pairs)
            distances.append(distance.item())
            if not math.isfinite(distances[-1]):
                raise FloatingPointError("the loss is not a number")
            (distance / options.accumulation).backward()
        gates, _ = self.pruner(_temperature(options, self.iteration))
        kept = gates.detach().mean().item()
        price = sparsity(gates, self._prices)
        if kept >= options.stop_share:
            (options.alpha * price).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.pruner.parameters(), options.clip or math.inf)
        if not math.isfinite(float(norm)):
            raise FloatingPointError("the gradient is not a number")
        self.optimizer.step()
        self.iteration += 1
        mean = sum(distances) / len(distances)
        paid = options.alpha * price.item() if kept >= options.stop_share else 0.0
        return Progress(
            self.iteration, options.iterations, mean + paid, mean, paid, kept, lr, time.perf_counter() - start
        )


def train(
    trainer: Trainer,
    settings: Mapping[str, Any],
    folder: Path | None = None,
    *,
    resume: bool = False,
    notify: Callable[[Progress], None] = lambda progress: None,
) -> list[list[float]]:
    """Run all iterations and return the keep scores (T x N).

    Args:
        settings: what made the run, checked on resuming.
        folder: checkpoints (at regular intervals) and ``log.jsonl`` go there.
        resume: go on from the checkpoint there, to the same result as a run that was never interrupted.

    Raises:
        UserError: nothing to resume, other settings, or a loss that is not a number: then the state before that
            iteration is kept.
    """
    options = trainer.options
    described = {**settings, "train": asdict(options), "samples": asdict(trainer.samples)}
    if resume:
        if folder is None:
            raise UserError("--resume: needs --checkpoint, the folder to go on from")
        state = checkpoint.load(folder)
        check_same_settings(folder / checkpoint.NAME, described, dict(state.settings))
        state.restore(trainer.pruner, trainer.optimizer)
        trainer.iteration = state.iteration
    with _Log(folder, trainer.iteration) as log:
        try:
            while trainer.iteration < options.iterations:
                progress = trainer.iterate()
                log.write(progress)
                notify(progress)
                if trainer.iteration % options.save_every == 0 or trainer.iteration == options.iterations:
                    _save(trainer, described, folder)
        except FloatingPointError as error:
            _save(trainer, described, folder)
            kept = f"; {folder} keeps the state before it" if folder is not None else ""
            raise UserError(
                f"iteration {trainer.iteration + 1}: {error}{kept}; try a lower --lr, --clip 1, or --precision fp32"
            ) from error
    with torch.no_grad():
        scores: list[list[float]] = trainer.pruner.scores().tolist()
    return scores


def learning_rate(options: TrainOptions, iteration: int) -> float:
    """Linear warm-up to the peak, then half a cosine to 0: a function of the iteration (from 0)."""
    if iteration < options.warmup:
        return options.lr * (iteration + 1) / options.warmup
    share = (iteration - options.warmup) / max(1, options.iterations - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * share))


def _temperature(options: TrainOptions, iteration: int) -> float:
    first, last = options.temperature
    share = iteration / max(1, options.iterations - 1)
    return float(first * (last / first) ** share)


def _optimizer(pruner: Pruner, options: TrainOptions) -> torch.optim.Optimizer:
    parameters = list(pruner.parameters())
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=options.lr, weight_decay=options.weight_decay)


def _save(trainer: Trainer, settings: Mapping[str, Any], folder: Path | None) -> None:
    if folder is not None:
        state = checkpoint.take(trainer.pruner, trainer.optimizer, trainer.iteration, settings)
        checkpoint.save(state, folder)


class _Log:
    """``log.jsonl``, one line an iteration; a resumed run goes on behind the iterations of its checkpoint."""

    def __init__(self, folder: Path | None, iteration: int) -> None:
        self._file: Any = None
        if folder is None:
            return
        path = folder / LOG_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = path.read_text(encoding="utf-8").splitlines()[:iteration] if iteration and path.is_file() else []
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        for line in kept:
            self._file.write(line + "\n")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, progress: Progress) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(progress)) + "\n")
            self._file.flush()
