from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from dipgo_deploy.export.passes.layouts import NoteLayouts
from dipgo_deploy.export.passes.names import note_parameter
from dipgo_deploy.export.stored import StoredParameter, stored_parameter


def test_a_weight_is_told_by_its_values() -> None:
    module = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("plain", "turned", "scaled", "twin")})
    module["twin"].load_state_dict(module["plain"].state_dict())
    held = {name: module[name].weight.detach().numpy() for name in module}
    stored = {
        "plain.weight": held["plain"],
        "turned.weight": np.ascontiguousarray(held["turned"].T),
        "scaled.weight": 2 * held["scaled"],  # the exporter folded something into it
        "val_1": held["plain"],  # nobody knows where from
    }
    values = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in stored.items()}
    for name in list(stored)[:3]:
        note_parameter(values[name], name)
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=list(values.values())), ir_version=10)
    wrapper = torch.nn.ModuleDict({"denoiser": module})
    NoteLayouts(wrapper, "denoiser.")(model)
    assert {name: stored_parameter(value.const_value) for name, value in values.items()} == {
        "plain.weight": StoredParameter("plain.weight", transposed=False, equal=("twin.weight",)),
        "turned.weight": StoredParameter("turned.weight", transposed=True),
        "scaled.weight": None,
        "val_1": None,
    }


def test_not_a_number_is_equal_to_itself() -> None:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    value = ir.Value(name="weight", const_value=ir.tensor(module.weight.detach().numpy(), name="weight"))
    note_parameter(value, "weight")
    NoteLayouts(module, "")(ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10))
    assert stored_parameter(value.const_value) == StoredParameter("weight", transposed=False)
