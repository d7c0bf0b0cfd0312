from __future__ import annotations

import json
from pathlib import Path

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.files import weights_of

STEM = "diffusion_pytorch_model.safetensors"


def write(path: Path, types: dict[str, str]) -> None:
    """A safetensors file without numbers: every tensor is empty."""
    header = json.dumps({name: {"dtype": kind, "shape": [0], "data_offsets": [0, 0]} for name, kind in types.items()})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (
            {"a.weight": "U8", "a.weight.quant_state.bitsandbytes__nf4": "U8"},
            "bitsandbytes, 4 bits: a.weight.quant_state.bitsandbytes__nf4",
        ),
        ({"a.weight": "I8", "a.SCB": "F32"}, "bitsandbytes, 8 bits: a.SCB"),
        ({"scaled_fp8": "F8_E4M3", "a.weight": "F8_E4M3"}, "ComfyUI, scaled fp8: scaled_fp8"),
        ({"a.weight": "F8_E4M3", "a.scale_weight": "F32"}, "ComfyUI, scaled fp8: a.scale_weight"),
        ({"a.weight": "F8_E4M3", "a.comfy_quant": "U8"}, "ComfyUI: a.comfy_quant"),
        ({"a.weight": "F8_E5M2"}, "a.weight is F8_E5M2"),
        ({"a.qweight": "I32", "a.wscales": "BF16"}, "SVDQuant: a.wscales"),
        ({"a.weight:qdata": "I8", "a.weight:scale": "F32"}, "torchao: a.weight:qdata"),
        ({"a.weight._data": "I8", "a.weight._scale": "F32"}, "quanto: a.weight._data"),
    ],
)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, types: dict[str, str], message: str) -> None:
    write(tmp_path / STEM, {"b.bias": "F16", **types})
    with pytest.raises(UserError, match=rf"{STEM}: its weights are quantised \({message}\); give the model's own"):
        weights_of(tmp_path, "diffusers")


def test_other_small_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    write(tmp_path / STEM, {"a.weight": "BF16", "mask": "U8", "position_ids": "I64"})
    assert weights_of(tmp_path, "diffusers").files == (tmp_path / STEM,)
