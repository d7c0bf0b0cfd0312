"""The denoiser as it is traced: guidance inside, every boundary tensor an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dipgo_deploy.models.family import BlockSpec
from dipgo_deploy.plan.graph import Block, CacheKind
from dipgo_deploy.supernet.cuts import collect, model_dtype


class TracedDenoiser(torch.nn.Module):
    """Wraps a diffusers denoiser, or several that take turns, for one trace.

    ``forward(latent, timestep, [guidance_scale, ...], *conditions)``: latent float32 (B, C, h, w), already scaled as
    the scheduler wants it; timestep float32 (1,); a guidance_scale float32 (1,) for each of the denoisers, only with
    ``guidance``, which joins both halves (``Guidance.combine``) and is None without guidance; with it the conditions
    (named by ``conditions``, handed to the family's ``call``) have batch 2B, the unconditional half first. Returns each
    denoiser's prediction float32 (B, C, h, w) (after guidance; learned variance dropped), then every named value once.
    ``boundary`` says what those are; it is filled while ``forward`` runs.

    denoisers: their paths in ``denoiser``, as a family has them.
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

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        scales = () if self._guidance is None else rest[: len(self._denoisers)]
        batch = latent if self._guidance is None else torch.cat([latent, latent])
        batch = batch.to(model_dtype(self.denoiser))
        conditions = dict(zip(self._conditions, rest[len(scales) :], strict=True))
        times = timestep.expand(batch.shape[0])
        with collect(self.denoiser, self._specs) as cuts:
            predicted = [
                self._call(self.denoiser.get_submodule(path), batch, times, conditions) for path in self._denoisers
            ]
        guided = [self._guided(latent, one, scales[place : place + 1]) for place, one in enumerate(predicted)]
        values = self._boundary.arrange(self._specs, self._cache_kinds, cuts)
        return (*guided, *values)

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

    names: one name per output tensor. blocks: the blocks in terms of these names, aliases resolved.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.blocks: list[Block] = []

    def arrange(
        self, specs: Sequence[BlockSpec], cache_kinds: Mapping[str, CacheKind], cuts: Mapping[str, Any]
    ) -> list[torch.Tensor]:
        """The distinct tensors among all boundary tensors and residual inputs, named in order of execution."""
        self.names.clear()
        self.blocks.clear()
        name_of: dict[int, str] = {}
        tensors: list[torch.Tensor] = []

        def named(tensor: torch.Tensor, name: str) -> str:
            known = name_of.get(id(tensor))
            if known is None:
                name_of[id(tensor)] = known = name
                self.names.append(name)
                tensors.append(tensor)
            return known

        for spec in specs:
            cut = cuts[spec.name]
            kind = cache_kinds[spec.name]
            inputs: tuple[str, ...] = ()
            if kind == "residual":
                inputs = tuple(named(tensor, f"{spec.name}/in{i}") for i, tensor in enumerate(cut.inputs))
            outputs = tuple(named(tensor, f"{spec.name}/out{i}") for i, tensor in enumerate(cut.outputs))
            self.blocks.append(Block(name=spec.name, outputs=outputs, cache=kind, inputs=inputs))
        return tensors
