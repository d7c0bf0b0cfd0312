"""The loss of soft gates through the whole denoising loop, with gradients, in little memory."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.evaluate import full_latents
from dipgo_deploy.search.losses import IMAGE_LOSSES, LATENT_LOSSES
from dipgo_deploy.search.problem import Pair, Problem
from dipgo_deploy.supernet import CacheState, Gate, Supernet

Precision = Literal["fp32", "bf16"]

# Full runs that are kept because the same images come again: at most so many latents.
_REFERENCES = 4096


class CheckpointedSupernet(Supernet):
    """A supernet that keeps nothing of an evaluation but its inputs and outputs: the evaluation is run again on the way
    back.

    So the memory of a loop with gradients grows with T only by latents, predictions and caches.
    """

    def step(
        self,
        latent: Tensor,
        timestep: Tensor,
        conditions: Mapping[str, Tensor],
        gates: Sequence[Gate] | Tensor,
        state: CacheState,
        step: int,
        keep: Collection[str] | None = None,
        *,
        conditional: bool = False,
    ) -> tuple[Tensor, CacheState]:
        """See `Supernet.step`."""
        names = list(state.tensors)
        counts = [len(state.tensors[name]) for name in names]
        caches = [tensor for name in names for tensor in state.tensors[name]]
        structures: dict[str, Any] = {}
        halved: set[str] = set()
        written: list[tuple[str, int]] = []

        def run(sample: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            rest = iter(flat)
            row = [gate if isinstance(gate, bool) else next(rest) for gate in gates]
            before = CacheState(
                {name: [next(rest) for _ in range(count)] for name, count in zip(names, counts, strict=True)},
                state.structures,
                halved=state.halved,
            )
            evaluate = super(CheckpointedSupernet, self).step
            prediction, after = evaluate(sample, timestep, conditions, row, before, step, keep, conditional=conditional)
            structures.update(after.structures)
            halved.update(after.halved)
            written[:] = [(name, len(tensors)) for name, tensors in after.tensors.items()]
            return prediction, *(tensor for tensors in after.tensors.values() for tensor in tensors)

        soft = [gate for gate in gates if not isinstance(gate, bool)]
        if not any(tensor.requires_grad for tensor in (latent, *soft, *caches)):
            return super().step(latent, timestep, conditions, gates, state, step, keep, conditional=conditional)
        # The re-entrant kind wants flat tensors, but keeps no graph of the evaluation. The other one does: a node for
        # every operation of every evaluation, which for a small model is more than the tensors.
        outputs = checkpointed(run, latent, *soft, *caches, use_reentrant=True, preserve_rng_state=False)
        rest = iter(outputs[1:])
        tensors = {name: [next(rest) for _ in range(count)] for name, count in written}
        return outputs[0], CacheState(tensors, structures, halved=frozenset(halved))


class LoopLoss:
    """Mean distance of images to their full run, as a differentiable function of T x N gates. Keeps the full runs."""

    def __init__(
        self, problem: Problem, loss: str, precision: Precision = "fp32", *, checkpoint_steps: bool = True
    ) -> None:
        """Raises UserError for a loss on images when the model makes none."""
        problem.check_loss(loss)
        self._problem, self._precision = problem, precision
        net = problem.supernet
        kind = CheckpointedSupernet if checkpoint_steps else Supernet
        self._supernet = kind(net.model, net.specs, net.cache_kinds, net.call, net.guide)
        self._on_images = loss in IMAGE_LOSSES
        self._distance = IMAGE_LOSSES[loss] if self._on_images else LATENT_LOSSES[loss]
        self._references: dict[Pair, Tensor] = {}

    def __call__(self, gates: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The loss (scalar) of ``gates`` (T, N) in [0, 1] for these images; the first evaluation is whole.

        Where halves of guidance are gates, (T, N + 1): the last is the evaluation's share of the guidance. Both halves
        are run, whatever it is, and stored.
        """
        problem, count = self._problem, len(self._problem.target.blocks)
        rows: list[Sequence[Gate]] = [[True] * count, *(list(row[:count]) for row in gates[1:])]
        if problem.costs.guidance_gates:
            self._supernet.soft_guidance = _shares(gates)
        with self._autocast():
            latents = problem.run(problem.batch(pairs), rows, self._supernet)
        reference = self.reference(pairs)
        if not self._on_images:
            return self._distance(latents, reference).mean()
        with torch.no_grad():
            wanted = problem.decode(reference)
        return self._distance(problem.decode(latents), wanted).mean()

    def gradient(self, gates: Gates, pairs: Sequence[Pair]) -> np.ndarray:
        """(T, `Costs.width`) float64: how the loss would change, to first order, with each of these hard gates."""
        leaf = torch.tensor(gates, dtype=torch.float32, device=self._problem.device, requires_grad=True)
        self(leaf, pairs).backward()
        assert leaf.grad is not None
        found: np.ndarray = leaf.grad.double().cpu().numpy()
        return found

    def reference(self, pairs: Sequence[Pair]) -> Tensor:
        """Final latents of the full run (B, C, h, w)."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._references]
        if missing:
            if len(self._references) + len(missing) > _REFERENCES:
                self._references = {pair: self._references[pair] for pair in pairs if pair not in missing}
            with self._autocast():
                latents = full_latents(self._problem, missing)
            self._references.update(zip(missing, latents, strict=True))
        return torch.stack([self._references[pair] for pair in pairs])

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision == "fp32":
            return contextlib.nullcontext()
        # Without the cache of cast weights: it would not outlive a checkpointed evaluation.
        return torch.autocast(self._problem.device.type, torch.bfloat16, cache_enabled=False)


def _shares(gates: Tensor) -> list[float | Tensor]:
    """How much guidance each evaluation has under T x (N + 1) gates; one that keeps no block goes on with that of the
    one before, as in ``halves``."""
    shares: list[float | Tensor] = [1.0]
    for row in gates[1:]:
        shares.append(row[-1] if bool(row[:-1].any()) else shares[-1])
    return shares
