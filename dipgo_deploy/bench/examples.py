"""Inputs of the right shape for a run whose result nobody looks at."""

from __future__ import annotations

import numpy as np

from dipgo_deploy.bundle.manifest import ConditionSpec, TensorSpec


def example_input(spec: ConditionSpec | TensorSpec, random: np.random.Generator) -> np.ndarray:
    """An input of ``spec.shape``, float32 or int64: the condition's own values where it has some, else normal values;
    ones for whole numbers, which are a mask that hides nothing and a class that every model has."""
    if isinstance(spec, ConditionSpec) and spec.values:
        rows = np.array(spec.values).reshape(1, *spec.shape[1:])
        return np.repeat(rows, spec.shape[0], axis=0).astype(np.int64 if spec.dtype == "int64" else np.float32)
    if spec.dtype == "int64":
        return np.ones(spec.shape, np.int64)
    return random.standard_normal(spec.shape, dtype=np.float32)
