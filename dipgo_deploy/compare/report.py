"""What a comparison found. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo_deploy.compare.accuracy import TensorError, Tolerance


@dataclass(frozen=True)
class Checked:
    """Tensors that belong together: a variant's outputs, an evaluation of the loop, or the loop's results.

    step: evaluation, None after the last one. variant: name of the variant that was launched (of several segments
    ``first..last``), None where none was.
    """

    step: int | None
    variant: str | None
    tensors: tuple[TensorError, ...]

    @property
    def passed(self) -> bool:
        """Whether all tensors are within tolerance."""
        return all(tensor.passed for tensor in self.tensors)

    @property
    def worst(self) -> TensorError:
        """The tensor with the largest relative error, one beyond tolerance first."""
        return max(self.tensors, key=lambda tensor: (not tensor.passed, tensor.relative))


@dataclass(frozen=True)
class Report:
    """Agreement of an engine directory with the supernet.

    variants: each variant by itself on recorded inputs; empty if not asked for. loop: each evaluation of the whole
    loop, caches fed forward, in order; then ``results``, its latents and images. Empty and None if not asked for.
    """

    tolerance: Tolerance
    variants: tuple[Checked, ...]
    loop: tuple[Checked, ...]
    results: Checked | None

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return self.first_failure() is None

    def first_failure(self) -> str | None:
        """One line about the first tensor beyond tolerance (variants first, then the loop), None if there is none."""
        for where, checked in self._all():
            for tensor in checked.tensors:
                if not tensor.passed:
                    return (
                        f"{where}, {tensor.name}: error {tensor.relative:.2e} of its largest value "
                        f"(absolute {tensor.max_absolute:.2e}) against the supernet, above {self.tolerance.relative:g}"
                    )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite (an error with NaN, the PSNR of equal tensors) becomes null."""
        return {
            "passed": self.passed,
            "first_failure": self.first_failure(),
            "tolerance": asdict(self.tolerance),
            "variants": [_plain(checked) for checked in self.variants],
            "loop": [_plain(checked) for checked in self.loop],
            "results": None if self.results is None else _plain(self.results),
        }

    def _all(self) -> Iterator[tuple[str, Checked]]:
        for checked in self.variants:
            yield f"variant {checked.variant} by itself, step {checked.step}", checked
        for checked in self.loop:
            yield f"loop, step {checked.step}, {_launched(checked.variant)}", checked
        if self.results is not None:
            yield "loop, after the last step", self.results


def _launched(variant: str | None) -> str:
    return "no launch" if variant is None else f"variant {variant}"


def _plain(checked: Checked) -> dict[str, Any]:
    tensors = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in map(asdict, checked.tensors)
    ]
    return {"step": checked.step, "variant": checked.variant, "passed": checked.passed, "tensors": tensors}
