"""One evaluation of a denoiser with gates: the definition of a kept and of a removed block.

The SuperNet of DiP-GO (arXiv 2410.16942): a removed block's consumers read its last computed output. For a residual
cache they read the block's current input plus its last computed ``output - input``. With a forecast, a weighted sum of
the last few takes the place of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, CacheKind, call_with_keywords
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.guidance import PLAIN, Guidance
from dipgo_deploy.schedule.forecast import AS_STORED, Reads
from dipgo_deploy.schedule.guidance import HALVES, Half, share_of_scale
from dipgo_deploy.supernet.cuts import Structure, flatten, residual_inputs, unflatten

Gate = bool | Tensor


@dataclass(frozen=True)
class CacheState:
    """The caches between two evaluations of one image (or batch). Never changed: an evaluation returns a new one.

    tensors: block name -> what the block last stored, one tensor a cut: its outputs, or for a residual cache
    ``output - input``. structures: block name -> how the tensors make up the module's output. Under a forecast only,
    earlier: block name -> what it stored before that, the latest first; stored_at: block name -> the evaluations that
    stored all of these, the latest first. halved: blocks of which a conditional-only evaluation stored the last.
    """

    tensors: Mapping[str, list[Tensor]] = field(default_factory=dict)
    structures: Mapping[str, Structure] = field(default_factory=dict)
    earlier: Mapping[str, tuple[list[Tensor], ...]] = field(default_factory=dict)
    stored_at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    halved: frozenset[str] = frozenset()

    def read(self, block: str, half: Half | None = None) -> tuple[list[Tensor], ...]:
        """What an evaluation reads of a block, the latest first; half: of guidance alone, ``conditional`` where the
        evaluation is conditional only.

        A guided evaluation reads what was stored since the last conditional-only one that stored.
        """
        every = self.stored(block)
        if block in self.halved or not every:
            return every
        # What conditional-only evaluations stored before has half the rows.
        rows = [len(tensor) for tensor in every[0]]
        whole = [[len(tensor) for tensor in tensors] == rows for tensors in every]
        if half is None:
            return tuple(tensors for tensors, all_rows in zip(every, whole, strict=True) if all_rows)
        return tuple(
            [half_of(tensor, half) for tensor in tensors] if all_rows else tensors
            for tensors, all_rows in zip(every, whole, strict=True)
        )

    def steps_read(self, block: str, half: Half | None = None) -> tuple[int, ...]:
        """The evaluations that stored what ``read`` gives; under a forecast only."""
        return self.stored_at[block][: len(self.read(block, half))]

    def stored(self, block: str) -> tuple[list[Tensor], ...]:
        """All that is held of a block, the latest first."""
        return (self.tensors[block], *self.earlier.get(block, ())) if block in self.tensors else ()


class CacheStore(Protocol):
    """Where caches lie between two evaluations."""

    def put(self, tensor: Tensor) -> Tensor:
        """What a ``CacheState`` holds for ``tensor``: the same values, shape and dtype."""
        ...

    def get(self, held: Tensor) -> Tensor:
        """What the model reads for what ``put`` gave."""
        ...


class Supernet:
    """A denoiser whose blocks can be removed at each evaluation. Holds no state between calls; the caches are passed.

    The model's own forward runs, with hooks on the modules named by the specs; it is left as it was found.

    store: where the caches of bool gates lie; None: the tensors themselves, in memory.
    forecast: what removed blocks read; None: what they stored last. Its evaluations are those that ``step`` is told.
    denoisers: the path of the denoiser of each of these; None: the model is one. Blocks of the others do nothing there.
    guidance: how much of the run's guidance each of these has, where there is guidance; 0 is conditional only. None:
    all of it.
    soft_guidance: in its place, shares that may be tensors of one element; both halves are always run.
    """

    store: CacheStore | None = None
    forecast: Reads | None = None
    denoisers: Sequence[str] | None = None
    guidance: Sequence[float] | None = None
    soft_guidance: Sequence[float | Tensor] | None = None

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[BlockSpec],
        cache_kinds: Sequence[CacheKind] | None = None,
        call: Callable[..., Tensor] = call_with_keywords,
        guide: Guidance = PLAIN,
    ) -> None:
        """Wrap ``model`` with blocks ``specs``; ``cache_kinds`` one a block (None: each block's default).

        ``call`` is the family's: (model, latent, timestep, conditions) -> prediction; so is ``guide``.

        Raises:
            UserError: the number of cache kinds is wrong, or a block does not support the one it is given.
        """
        kinds = tuple(cache_kinds) if cache_kinds is not None else tuple(spec.caches[0] for spec in specs)
        if len(kinds) != len(specs):
            raise UserError(f"{len(kinds)} cache kinds for {len(specs)} blocks: give one a block")
        for spec, kind in zip(specs, kinds, strict=True):
            if kind not in spec.caches:
                raise UserError(
                    f"block {spec.name}: cache kind {kind!r} is not supported; use {' or '.join(spec.caches)}"
                )
        self.model = model
        self.specs = tuple(specs)
        self.cache_kinds = kinds
        self.call = call
        self.guide = guide

    def conditional_only(self, step: int) -> bool:
        """Whether an evaluation has none of the run's guidance."""
        return self.soft_guidance is None and self.guidance is not None and self.guidance[step] == 0

    def scale_at(self, step: int, scale: float | None) -> float | Tensor | None:
        """The guidance scale of an evaluation in a run of ``scale``; None without guidance."""
        if scale is None:
            return scale
        if self.soft_guidance is not None:
            # Not `share_of_scale`, for which a share of 1 has no gradient.
            return self.guide.off + self.soft_guidance[step] * (scale - self.guide.off)
        return scale if self.guidance is None else share_of_scale(scale, self.guidance[step], self.guide.off)

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
        """Evaluate the model once.

        A gate is a bool (kept: computed and stored; removed: read from the cache, the module is not run) or a tensor
        in [0, 1] of one element: ``g * current + (1 - g) * cached``, both computed, nothing detached, and the mix is
        what is stored. A tensor of exactly 1 may come before anything was stored and then counts as kept.

        Args:
            latent: (B, C, h, w) model input, the model's dtype.
            timestep: (B,) or (1,).
            conditions: further inputs by name.
            gates: one a block, in the order of the specs.
            state: caches after the previous evaluation, ``CacheState()`` before the first.
            step: index of the evaluation, for messages and for the forecast.
            keep: blocks whose caches are stored or carried on; all by default. Of the others none is
                held; soft gates store all the same.
            conditional: the evaluation is conditional only: of what guided ones stored, twice as many rows, it reads
                the second half.

        Returns:
            The model's prediction (B, C', h, w) and the caches after this evaluation.

        Raises:
            UserError: wrong number of gates, a gate that is no bool or number in [0, 1], a soft one under a forecast,
                or a block that reads a cache which was never written, or of which a guided evaluation lacks a half.
        """
        if len(gates) != len(self.specs):
            raise UserError(f"evaluation {step}: {len(gates)} gates for {len(self.specs)} blocks; give one a block")
        tensors = {name: values for name, values in state.tensors.items() if keep is None or name in keep}
        structures = {name: state.structures[name] for name in tensors}
        earlier = {name: values for name, values in state.earlier.items() if name in tensors}
        stored_at = {name: steps for name, steps in state.stored_at.items() if name in tensors}
        halved = {name for name in state.halved if name in tensors}
        half: Half | None = "conditional" if conditional else None
        denoiser = "" if self.denoisers is None else self.denoisers[step]
        own = f"{denoiser}." if denoiser else ""
        with ExitStack() as stack:
            for place, (spec, kind, raw) in enumerate(zip(self.specs, self.cache_kinds, gates, strict=True)):
                if not spec.name.startswith(own):
                    continue
                gate = _checked(raw, spec, step)
                if self.forecast is not None and not isinstance(gate, bool):
                    raise UserError(
                        f"evaluation {step}, block {spec.name}: a soft gate cannot be forecast; give a bool"
                    )
                module = self.model.get_submodule(spec.name)
                stored = state.tensors.get(spec.name)
                lacks_half = spec.name in state.halved and not conditional
                if stored is None or lacks_half:
                    if not (gate if isinstance(gate, bool) else bool(gate == 1)):
                        raise UserError(
                            f"evaluation {step}, block {spec.name}: removed, but its cache was never written"
                            + (" at a guided evaluation since a conditional-only one wrote it" if lacks_half else "")
                            + "; keep the block at this evaluation or an earlier one"
                        )
                    gate = True
                else:
                    stored = state.read(spec.name, half)[0]
                if gate is False:
                    weights: tuple[float, ...] = AS_STORED
                    if self.forecast is not None:
                        weights = self.forecast.weights_of(step, place, state.steps_read(spec.name, half))
                    terms = list(zip(weights, state.read(spec.name, half), strict=False))
                    reader = _reader(spec, kind, terms, state.structures[spec.name], self.store)
                    stack.enter_context(replaced_forward(module, reader))
                elif gate is not True or keep is None or spec.name in keep:
                    hook = _gate_hook(spec, kind, gate, stored, tensors, structures, self.store)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                    (halved.add if conditional else halved.discard)(spec.name)
                    if self.forecast is not None:
                        older = self.forecast.terms - 1
                        earlier[spec.name] = (state.read(spec.name, half) if half else state.stored(spec.name))[:older]
                        stored_at[spec.name] = (step, *state.stored_at.get(spec.name, ())[:older])
            prediction = self.call(self.model.get_submodule(denoiser), latent, timestep, conditions)
        return prediction, CacheState(tensors, structures, earlier, stored_at, frozenset(halved))


def half_of(rows: Tensor, half: Half) -> Tensor:
    """The rows of one half of guidance."""
    return rows.chunk(2)[HALVES.index(half)]


def _checked(gate: Any, spec: BlockSpec, step: int) -> Gate:
    """``gate`` as a bool, or as the soft gate it is."""
    if isinstance(gate, Tensor) and gate.numel() == 1 and gate.dtype != torch.bool:
        return gate.reshape(())
    if isinstance(gate, Tensor) and gate.numel() != 1 or gate not in (0, 1):
        raise UserError(
            f"evaluation {step}, block {spec.name}: gate {gate!r}; give true, false or a tensor of one element"
        )
    return bool(gate)


def _read(stored: Sequence[Tensor], base: Sequence[Tensor] | None) -> list[Tensor]:
    """What the consumers of a removed block see; ``base`` as `_base` gives it."""
    if base is None:
        return list(stored)
    return [current + tensor for current, tensor in zip(base, stored, strict=True)]


def _base(spec: BlockSpec, kind: CacheKind, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """The block's current inputs, which its caches are relative to; None for output caches."""
    return residual_inputs(spec, args, kwargs) if kind == "residual" else None


def _reader(
    spec: BlockSpec,
    kind: CacheKind,
    terms: Sequence[tuple[float, Sequence[Tensor]]],
    structure: Structure,
    store: CacheStore | None,
) -> Any:
    """A forward for the module of a removed block: no computation, only the cache. terms: what it stored, with weights,
    the latest first."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found: list[Tensor] = []
        for weight, stored in terms:
            held = stored if store is None else [store.get(tensor) for tensor in stored]
            part = held if weight == 1 else [weight * tensor for tensor in held]
            found = [sofar + tensor for sofar, tensor in zip(found, part, strict=True)] if found else list(part)
        return unflatten(_read(found, _base(spec, kind, args, kwargs)), structure)

    return forward


def _gate_hook(
    spec: BlockSpec,
    kind: CacheKind,
    gate: Gate,
    stored: Sequence[Tensor] | None,
    tensors: dict[str, list[Tensor]],
    structures: dict[str, Structure],
    store: CacheStore | None,
) -> Any:
    """A forward hook for a block that is computed: stores, and for a soft gate replaces the output by the mix."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        current, structure = flatten(output)
        base = _base(spec, kind, args, kwargs)
        fresh = current if base is None else [new - old for new, old in zip(current, base, strict=True)]
        structures[spec.name] = structure
        if isinstance(gate, bool):
            tensors[spec.name] = fresh if store is None else [store.put(tensor) for tensor in fresh]
            return output
        assert stored is not None
        # Stored and returned mixes are made apart: (input + residual) - input would not be the residual exactly.
        tensors[spec.name] = [_mix(gate, new, old) for new, old in zip(fresh, stored, strict=True)]
        mixed = [_mix(gate, new, old) for new, old in zip(current, _read(stored, base), strict=True)]
        return unflatten(mixed, structure)

    return hook


def _mix(gate: Tensor, current: Tensor, cached: Tensor) -> Tensor:
    weight = gate.to(current.dtype)
    return weight * current + (1 - weight) * cached
