"""What a stock pipeline hands its denoiser and its ControlNets, as the latent, timestep and conditions of a family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.ip_adapter import SCALE as ADAPTER_SCALE
from dipgo_deploy.models.ip_adapter import scale_set
from dipgo_deploy.models.packed import PACK, unpack

if TYPE_CHECKING:
    from torch import Tensor, nn

_IMAGENET_NULL = 1000


class StockCall:
    """Reads the arguments of the denoisers of a family's stock pipelines.

    family: of the denoiser. shapes: of the conditions by name, with the batch in front. null: the class of the
    unconditional half; None where there is none.
    """

    def __init__(self, family: ModelFamily, shapes: Mapping[str, tuple[int, ...]], null: int | None) -> None:
        self._family, self._shapes, self._null = family, shapes, null
        self._control: dict[str, Any] = {}
        self.beside = tuple(name for name in family.companions if name not in family.denoisers)

    @contextmanager
    def controlnets_seen(self, pipeline: Any) -> Iterator[None]:
        """While this lasts, ControlNets compute nothing: what they are given is kept for the denoiser's own call."""
        with ExitStack() as stack:
            for name in self.beside:
                stack.enter_context(replaced_forward(getattr(pipeline, name), self._companion))
            yield

    def _companion(self, *args: Any, **kwargs: Any) -> tuple[tuple[()], None]:
        if kwargs.get("guess_mode"):
            raise UserError("guess_mode: a ControlNet for the conditional half alone is not supported; leave it out")
        self._control = kwargs
        return (), None

    def with_null(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """DiTPipeline writes the null class of ImageNet's 1000; a model of fewer classes has another one."""
        import torch

        labels = kwargs.get("class_labels")
        if labels is None or self._null is None:
            return kwargs
        return {**kwargs, "class_labels": torch.where(labels == _IMAGENET_NULL, self._null, labels)}

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Latent, timestep and conditions by name, with a row for each of the latent's.

        module: a denoiser. forward: its own, which the arguments are for. The latent may still be tokens (B, T, D).

        Raises:
            UserError: scales of an IP-Adapter that differ from layer to layer.
        """
        latent, timestep, conditions = (
            self._family.given(args, kwargs) if self._family.given else _given(forward, args, kwargs)
        )
        conditions = {**conditions, **self._seen_by_controlnets(latent)}
        if ADAPTER_SCALE in self._shapes:
            conditions[ADAPTER_SCALE] = latent.new_full((len(latent),), scale_set(module))
        return self._taken_apart(latent, timestep, conditions)

    def _seen_by_controlnets(self, latent: Tensor) -> dict[str, Tensor]:
        """Their pictures (latents (B, C, h, w) where those are packed) and scales."""
        found = _tensors(_control(self._control), len(latent))
        return {
            name: unpack(tensor, *(extent // PACK for extent in latent.shape[2:])) if tensor.ndim == 3 else tensor
            for name, tensor in found.items()
        }

    def _taken_apart(
        self, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """The latent without what the pipeline joined to it."""
        joined = self._family.joined
        counts = {name: shape[1] for name, shape in self._shapes.items() if name in joined}
        first, *others = latent.split([latent.shape[1] - sum(counts.values()), *counts.values()], dim=1)
        return first, timestep, {**conditions, **dict(zip(joined, others, strict=True))}


def _given(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latent, timestep and conditions of a ``forward`` whose first two arguments are the former."""
    import torch

    latent = args[0] if args else kwargs[next(iter(inspect.signature(forward).parameters))]
    timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
    return latent, timestep, _tensors(kwargs, len(latent))


def _control(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of one or several ControlNets what the family calls conditions."""
    import torch

    found: dict[str, Any] = {}
    for name, own in (("controlnet_cond", "controlnet_cond"), ("conditioning_scale", "controlnet_conditioning_scale")):
        values = keywords.get(name)
        several = values if isinstance(values, list | tuple) else [] if values is None else [values]
        for place, value in enumerate(several):
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor([float(value)])
            found[f"{own}_{place}" if place else own] = tensor
    return found


def _tensors(keywords: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """Keyword arguments that are tensors, also those in dictionaries, each with a row for every one of the latent's."""
    import torch

    tensors: dict[str, Tensor] = {}
    for name, value in keywords.items():
        if isinstance(value, Mapping):
            tensors |= _tensors(value, rows)
        elif isinstance(value, torch.Tensor) and value.ndim:
            tensors[name] = value.expand(rows, *value.shape[1:]) if len(value) == 1 else value
    return tensors
