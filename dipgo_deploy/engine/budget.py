"""What a run will need of the device's memory, reckoned before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dipgo_deploy.bundle.manifest import Manifest, TensorSpec
from dipgo_deploy.bundle.prologue import run_row_bytes
from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.buffers import ALIGNMENT

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the device while everything of an engine directory is loaded.

    Scratch is not in it: only a loaded engine tells.

    Attributes:
        weights: by engine; engines do not share them.
        arena: cache tensors.
        history: latents and predictions.
        other: conditions, schedules, rows that are made at the start of a run, and what components read and write.
    """

    weights: Mapping[str, int]
    arena: int
    history: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.weights.values()) + self.arena + self.history + self.other

    def line(self) -> str:
        """One line with the parts."""
        return (
            f"{mib(self.total)} (weights of {len(self.weights)} engines {mib(sum(self.weights.values()))}, caches "
            f"{mib(self.arena)}, predictions {mib(self.history)}, other {mib(self.other)}; scratch comes on top)"
        )


def memory_need(manifest: Manifest, weights: Mapping[str, int]) -> MemoryNeed:
    """The need of a manifest whose engines have ``weights`` bytes of weights."""
    plan, latent = manifest.plan, manifest.latent
    sample = manifest.batch * math.prod(latent.shape) * 4
    components = [spec for graph in manifest.components.graphs for spec in (*graph.inputs, *graph.outputs)]
    rows = len(plan.launches) * (4 * plan.slots + ALIGNMENT)
    return MemoryNeed(
        weights=dict(weights),
        arena=plan.arena_bytes,
        history=plan.slots * sample,
        other=_bytes(components) + _bytes(manifest.conditions) + rows + run_row_bytes(plan),
    )


def check_budget(need: MemoryNeed, limit: int, whose: str) -> None:
    """Refuse a need above ``limit`` bytes; ``whose`` says what the limit is.

    Raises:
        UserError: by how much, of what, and what would help.
    """
    over = need.total - limit
    if over <= 0:
        return
    raise UserError(
        f"the run needs {need.line()}, {mib(over)} more than {whose} of {mib(limit)}; export with each weight in "
        "one graph (--layout segments), fewer variants (--max-variants), a smaller dtype, batch or size (stripping "
        "saves disk, not GPU memory)"
    )


def parse_bytes(option: str, text: str) -> int:
    """``8GiB``, ``8G``, ``500m`` or plain bytes, as an integer.

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if match is None or not 1 <= size < 2**62 or not math.isfinite(size):
        raise UserError(f"{option} {text}: give a size such as 8GiB, 500MiB or a number of bytes")
    return int(size)


def mib(nbytes: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def size(nbytes: int) -> str:
    """Bytes in the unit that suits them, from KiB on."""
    return f"{nbytes / 2**10:.1f} KiB" if nbytes < 2**20 else mib(nbytes)


def _bytes(specs: list[TensorSpec] | tuple[TensorSpec, ...]) -> int:
    return sum(spec.nbytes for spec in specs)
