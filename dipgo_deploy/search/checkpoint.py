"""The state of a search on disk: one safetensors file with the tensors, and everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic

NAME = "checkpoint.safetensors"
_MODEL, _OPTIMIZER = "model.", "optimiser."


@dataclass(frozen=True)
class Checkpoint:
    """A search after ``iteration`` finished iterations. settings: what has to be the same to go on from here."""

    iteration: int
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Bring a model and its optimizer to this state."""
        model.load_state_dict(
            {name[len(_MODEL) :]: tensor for name, tensor in self.tensors.items() if name.startswith(_MODEL)}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(_OPTIMIZER):
                parameter, key = name[len(_OPTIMIZER) :].split(".", 1)
                state.setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def take(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, settings: Mapping[str, Any]) -> Checkpoint:
    """A copy of the state of a search."""
    tensors = {f"{_MODEL}{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for parameter, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{parameter}.{key}"] = value.detach().clone()
    return Checkpoint(iteration, dict(settings), tensors)


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write it into ``folder`` (made if need be); an older one is replaced only when this one is complete."""
    from safetensors.torch import save as serialised

    state = {"iteration": checkpoint.iteration, "settings": checkpoint.settings}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in checkpoint.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the checkpoint cannot be written: {error.strerror or error}") from error
    write_atomic(folder / NAME, serialised(tensors, metadata={"state": json.dumps(state)}))


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint of ``folder``; nothing is unpickled.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; leave out --resume to start afresh")
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return Checkpoint(int(state["iteration"]), dict(state["settings"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no checkpoint of a search: {error}") from error
