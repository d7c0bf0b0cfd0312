"""What a comparison found. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo_deploy.compare.metrics import Agreement, TensorError, Tolerance

LATENT, LATENTS, IMAGES = "latent", "latents", "images"


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
class Part:
    """Something beside the denoiser's launches that was compared.

    Attributes:
        name: ``launch list``, ``weights``, ``tokens``, ``conditions``, ``VAE`` or ``picture``.
        place: of what, such as a launch or a prompt.
        reference: what it was compared with.
        tensors: what was compared, in order.
        note: what is wrong in words, where numbers do not say it.
    """

    name: str
    place: str
    reference: str
    tensors: tuple[TensorError, ...]
    note: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is as it should be."""
        return self.note is None and all(tensor.passed for tensor in self.tensors)

    @property
    def where(self) -> str:
        """Name and place."""
        return f"{self.name}, {self.place}" if self.place else self.name

    def failures(self) -> Iterator[str]:
        """A line for each tensor that is wrong."""
        where = self.where
        if self.note is not None:
            yield f"{where}: {self.note}"
        for tensor in self.tensors:
            if not tensor.passed:
                yield _failure(where, tensor, self.reference)


@dataclass(frozen=True)
class Outcome:
    """One thing that was compared, with its verdict.

    Attributes:
        section: ``parts``, ``variants``, ``loop``, ``results`` or ``pictures``.
        name: which of them.
        tensors: what was compared, in order.
        failures: a line for each tensor beyond tolerance, and for what is wrong in words.
    """

    section: str
    name: str
    tensors: tuple[TensorError, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Agreement of an engine directory with the model.

    What was not asked for is empty or None.

    Attributes:
        parts: what a run needs before its first launch (launch list, weights, tokens, conditions, VAE).
        variants: each variant by itself on recorded inputs.
        loop: each evaluation of the whole loop, caches fed forward, in order; then ``results``, its latents and
            images.
        pictures: from prompt to picture.
        skipped: a line for everything that was not compared.
        reference: what graphs and loop were compared with, in words.
    """

    tolerance: Tolerance
    variants: tuple[Checked, ...] = ()
    loop: tuple[Checked, ...] = ()
    results: Checked | None = None
    parts: tuple[Part, ...] = ()
    pictures: tuple[Part, ...] = ()
    skipped: tuple[str, ...] = ()
    reference: str = "the supernet"

    @property
    def passed(self) -> bool:
        """Whether everything is within tolerance."""
        return self.first_failure() is None

    def first_failure(self) -> str | None:
        """One line about the first tensor beyond tolerance, None if there is none."""
        return next(self.failures(), None)

    def failures(self) -> Iterator[str]:
        """One line for each tensor beyond tolerance, in the order of a run: what comes before the first launch, then
        each evaluation (what its launches get, what its variants make of recorded inputs, what they make in the loop),
        then the results and the pictures."""
        for part in self.parts:
            yield from part.failures()
        steps = sorted({checked.step for checked in (*self.variants, *self.loop) if checked.step is not None})
        for step in steps:
            loop = [checked for checked in self.loop if checked.step == step]
            alone = [checked for checked in self.variants if checked.step == step]
            yield from (line for checked in loop for line in self._of_loop(checked, given=True))
            for checked in alone:
                yield from self._of_variant(checked)
            yield from (line for checked in loop for line in self._of_loop(checked, given=False))
        if self.results is not None:
            yield from self._of_results(self.results)
        for part in self.pictures:
            yield from part.failures()

    def outcomes(self) -> Iterator[Outcome]:
        """Everything that was compared, with its verdict: each part, variant at one of its launches, evaluation of the
        loop, the results and each picture."""
        for part in self.parts:
            yield _of_part("parts", part)
        for checked in self.variants:
            name = f"{checked.variant}, evaluation {checked.step}"
            yield Outcome("variants", name, checked.tensors, tuple(self._of_variant(checked)))
        for checked in self.loop:
            lines = (*self._of_loop(checked, given=True), *self._of_loop(checked, given=False))
            yield Outcome("loop", f"evaluation {checked.step}, {_launched(checked)}", checked.tensors, lines)
        if self.results is not None:
            name = "after the last evaluation"
            yield Outcome("results", name, self.results.tensors, tuple(self._of_results(self.results)))
        for part in self.pictures:
            yield _of_part("pictures", part)

    def _of_variant(self, checked: Checked) -> Iterator[str]:
        where = f"variant {checked.variant} by itself, evaluation {checked.step}"
        return (_failure(where, tensor, self.reference) for tensor in checked.tensors if not tensor.passed)

    def _of_results(self, checked: Checked) -> Iterator[str]:
        where = "loop, after the last evaluation"
        return (_failure(where, tensor, self.reference) for tensor in checked.tensors if not tensor.passed)

    def _of_loop(self, checked: Checked, *, given: bool) -> Iterator[str]:
        where = f"loop, evaluation {checked.step}, {_launched(checked)}"
        for tensor in checked.tensors:
            if not tensor.passed and given_to_launch(tensor.name) == given:
                yield _failure(where, tensor, self.reference)

    @property
    def agreement(self) -> Agreement:
        """The largest error, the smallest PSNR and the smallest cosine of the denoiser's tensors."""
        from dipgo_deploy.compare.metrics import Agreement, worst

        checked = (*self.variants, *self.loop, *(() if self.results is None else (self.results,)))
        return worst(
            Agreement(tensor.relative, tensor.psnr, tensor.cosine) for group in checked for tensor in group.tensors
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite (an error with NaN, the PSNR of equal tensors) becomes null."""
        return {
            "passed": self.passed,
            "first_failure": self.first_failure(),
            "failures": list(self.failures()),
            "reference": self.reference,
            "tolerance": asdict(self.tolerance),
            "parts": [_plain_part(part) for part in self.parts],
            "variants": [_plain(checked) for checked in self.variants],
            "loop": [_plain(checked) for checked in self.loop],
            "results": None if self.results is None else _plain(self.results),
            "pictures": [_plain_part(part) for part in self.pictures],
            "skipped": list(self.skipped),
        }


def given_to_launch(name: str) -> bool:
    """Whether a tensor of the loop is an input of its launch: the latent, or a cache that is read."""
    return name == LATENT or (not name.startswith("new_") and "/out" in name)


def collapsed(loop: Sequence[Checked]) -> list[list[Checked]]:
    """Evaluations in order; those without a launch that follow one another, together."""
    runs: list[list[Checked]] = []
    for checked in loop:
        if runs and checked.variant is None and runs[-1][0].variant is None:
            runs[-1].append(checked)
        else:
            runs.append([checked])
    return runs


def _of_part(section: str, part: Part) -> Outcome:
    return Outcome(section, part.where, part.tensors, tuple(part.failures()))


def _launched(checked: Checked) -> str:
    return "no launch" if checked.variant is None else f"variant {checked.variant}"


def _failure(where: str, tensor: TensorError, reference: str) -> str:
    itself = "" if tensor.made is None else f", {tensor.made:.2e} of them made by the launch itself"
    return (
        f"{where}, {tensor.name}: error {tensor.relative:.2e} of its largest value "
        f"(absolute {tensor.max_absolute:.2e}) against {reference}{itself}, above {tensor.limit:g}"
    )


def _plain(checked: Checked) -> dict[str, Any]:
    return {
        "step": checked.step,
        "variant": checked.variant,
        "passed": checked.passed,
        "tensors": _plain_tensors(checked.tensors),
    }


def _plain_part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "place": part.place,
        "reference": part.reference,
        "passed": part.passed,
        "note": part.note,
        "tensors": _plain_tensors(part.tensors),
    }


def _plain_tensors(tensors: tuple[TensorError, ...]) -> list[dict[str, Any]]:
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in map(asdict, tensors)
    ]
