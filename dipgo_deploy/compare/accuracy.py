"""Tensors of two runs side by side, with polygraphy's comparison functions."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    IterationResult,
    PsnrCompareFunc,
    RunResults,
    SimpleCompareFunc,
)
from polygraphy.logger import G_LOGGER

from dipgo_deploy.compare.metrics import peak

# Reported, not required: any cosine and PSNR passes, only the largest error counts.
_ANY_COSINE, _ANY_PSNR = -1.0, -math.inf


def silenced() -> AbstractContextManager[Any]:
    """polygraphy's log, which goes to stdout, switched off; what is critical still raises."""
    return G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1)


@dataclass(frozen=True)
class Tolerance:
    """When a tensor passes: its largest absolute error is at most ``relative`` of the reference's largest absolute
    value, or at most ``absolute``."""

    relative: float
    absolute: float = 0.0

    def of(self, expected: np.ndarray) -> float:
        """The largest absolute error allowed."""
        return max(self.relative * peak(expected), self.absolute)


@dataclass(frozen=True)
class TensorError:
    """One tensor against its reference.

    max_absolute: largest absolute difference. relative: that over the reference's largest absolute value. Both are
    infinite where the tensor has NaN or infinity. cosine: -1 to 1. psnr: in dB over the reference's largest value.
    """

    name: str
    max_absolute: float
    relative: float
    cosine: float
    psnr: float
    passed: bool


def compare_runs(results: RunResults, tolerance: Tolerance) -> list[tuple[TensorError, ...]]:
    """The errors of each iteration: first runner the reference, second the one that is judged.

    Raises:
        ValueError: an iteration whose runs have no tensor, or not the same ones.
    """
    (_, expected), (_, actual) = results
    for wanted, found in zip(expected, actual, strict=True):
        if not wanted or set(wanted) != set(found):
            raise ValueError(f"tensors {sorted(found)} cannot be compared with {sorted(wanted)}")

    def largest_error(wanted: IterationResult, found: IterationResult) -> OrderedDict[str, Any]:
        allowed = {name: tolerance.of(tensor) for name, tensor in wanted.items()}
        compare = SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="max")
        return compare(wanted, found)

    functions = [largest_error, CosineSimilarityCompareFunc(_ANY_COSINE), PsnrCompareFunc(_ANY_PSNR)]
    with silenced(), np.errstate(all="ignore"):
        accuracy = Comparator.compare_accuracy(results, compare_func=functions)
    ((_, errors),), ((_, cosines),), ((_, psnrs),) = (result.items() for result in accuracy)
    return [
        tuple(
            _tensor_error(name, tensor, errors[i][name], cosines[i][name], psnrs[i][name])
            for name, tensor in run.items()
        )
        for i, run in enumerate(expected)
    ]


def _tensor_error(name: str, expected: np.ndarray, error: Any, cosine: Any, psnr: Any) -> TensorError:
    if isinstance(error, bool):  # polygraphy's answer to different shapes
        return TensorError(name, math.inf, math.inf, math.nan, -math.inf, passed=False)
    largest = error.max_absdiff if math.isfinite(error.max_absdiff) else math.inf
    return TensorError(
        name=name,
        max_absolute=largest,
        relative=largest / peak(expected),
        cosine=float(cosine.cosine_similarity),
        psnr=float(psnr.psnr),
        passed=bool(error),
    )
