"""The denoiser as it is traced: guidance inside, every boundary tensor an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dipgo_deploy.models.family import BlockSpec
from dipgo_deploy.plan.graph import Block, CacheKind
from dipgo_deploy.schedule.guidance import CONDITIONAL
from dipgo_deploy.supernet.cuts import collect, model_dtype


class TracedDenoiser(torch.nn.Module):
    """Wraps a diffusers denoiser, or several that take turns, for one trace.

    ``forward(latent, timestep, [guidance_scale, ...], *conditions)``: latent float32 (B, C, h, w), already scaled as
    the scheduler wants it; timestep float32 (1,); a guidance_scale float32 (1,) for each of the denoisers, only with
    ``guidance``, which joins both halves (``Guidance.combine``) and is None without guidance; with it the conditions
    (named by ``conditions``, handed to the family's ``call``) have batch 2B, the unconditional half first. Returns each
    denoiser's prediction float32 (B, C, h, w) (after guidance; learned variance dropped), then every named value once.
    ``boundary`` says what those are; it is filled while ``forward`` runs.

    denoisers: their paths in ``denoiser``, as a family has them. apart: one half of guidance at a time: the conditions
    have batch B, ``unconditional`` and ``conditional`` float32 (B, C, h, w) come before them, and the guided prediction
    of those two, of each denoiser, after all predictions. conditional: also evaluate each of them conditional only, on
    B latents and the second half of the conditions; its prediction, and its named values with ``CONDITIONAL``
    behind their names, come after those of guidance.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        specs: Sequence[BlockSpec],
        cache_kinds: Mapping[str, CacheKind],
        conditions: Sequence[str],
        call: Callable[..., torch.Tensor],
        *,
        channels: int,
        guidance: Callable[..., torch.Tensor] | None,
        boundary: BoundaryTensors,
        denoisers: Sequence[str] = ("",),
        apart: bool = False,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._specs = tuple(specs)
        self._cache_kinds = dict(cache_kinds)
        self._conditions = tuple(conditions)
        self._call = call
        self._channels = channels
        self._guidance = guidance
        self._boundary = boundary
        self._denoisers = tuple(denoisers)
        self._apart = apart
        self._conditional = conditional

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        scales = () if self._guidance is None else rest[: len(self._denoisers)]
        halves, given = rest[len(scales) :][: 2 * self._apart], rest[len(scales) + 2 * self._apart :]
        together = self._guidance is not None and not self._apart
        batch = torch.cat([latent, latent]) if together else latent
        conditions = dict(zip(self._conditions, given, strict=True))
        self._boundary.clear()
        predicted, values = self._evaluated(batch, timestep, conditions)
        if self._apart:
            assert self._guidance is not None
            guided = [self._guidance(*halves, scale) for scale in scales]
            return (*(one[:, : self._channels].float() for one in predicted), *guided, *values)
        made = [self._guided(latent, one, scales[place : place + 1]) for place, one in enumerate(predicted)]
        if self._conditional:
            second = {name: rows[rows.shape[0] // 2 :] for name, rows in conditions.items()}
            predicted, others = self._evaluated(latent, timestep, second, CONDITIONAL)
            made += [one[:, : self._channels].float() for one in predicted]
            values += others
        return (*made, *values)

    def _evaluated(
        self, batch: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor], suffix: str = ""
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the denoisers predict, and the boundary's values."""
        batch = batch.to(model_dtype(self.denoiser))
        times = timestep.expand(batch.shape[0])
        with collect(self.denoiser, self._specs) as cuts:
            predicted = [
                self._call(self.denoiser.get_submodule(path), batch, times, conditions) for path in self._denoisers
            ]
        return predicted, self._boundary.arrange(self._specs, self._cache_kinds, cuts, suffix)

    def _guided(self, latent: torch.Tensor, predicted: torch.Tensor, scale: Sequence[torch.Tensor]) -> torch.Tensor:
        predicted = predicted[:, : self._channels].float()
        if self._guidance is not None:
            # With an open batch torch cannot tell that `chunk` gives two; where it is not open the plainer graph stays.
            halves = predicted.chunk(2) if isinstance(latent.shape[0], int) else ()
            unconditional, conditional = halves or predicted.unflatten(0, (2, -1)).unbind(0)
            predicted = self._guidance(unconditional, conditional, scale[0])
        return predicted


class BoundaryTensors:
    """What the outputs after the predictions are: filled by ``arrange`` during a trace.

    names: one name per output tensor. blocks: the blocks in terms of these names, aliases resolved. halves: of
    conditional-only values those of guidance.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.blocks: list[Block] = []
        self.halves: dict[str, str] = {}

    def clear(self) -> None:
        """Forget an earlier evaluation."""
        self.names.clear()
        self.blocks.clear()
        self.halves.clear()

    def arrange(
        self, specs: Sequence[BlockSpec], cache_kinds: Mapping[str, CacheKind], cuts: Mapping[str, Any], suffix: str
    ) -> list[torch.Tensor]:
        """The distinct tensors among all boundary tensors and residual inputs, named in order of execution, with
        ``suffix`` behind names of values and blocks: of a conditional-only evaluation, after that of guidance."""
        name_of: dict[int, str] = {}
        tensors: list[torch.Tensor] = []

        def named(tensor: torch.Tensor, name: str) -> str:
            known = name_of.get(id(tensor))
            if known is None:
                name_of[id(tensor)] = known = name + suffix
                self.names.append(known)
                if suffix:
                    self.halves[known] = name
                tensors.append(tensor)
            return known

        for spec in specs:
            cut = cuts[spec.name]
            kind = cache_kinds[spec.name]
            inputs: tuple[str, ...] = ()
            if kind == "residual":
                inputs = tuple(named(tensor, f"{spec.name}/in{i}") for i, tensor in enumerate(cut.inputs))
            outputs = tuple(named(tensor, f"{spec.name}/out{i}") for i, tensor in enumerate(cut.outputs))
            self.blocks.append(Block(name=spec.name + suffix, outputs=outputs, cache=kind, inputs=inputs))
        return tensors
