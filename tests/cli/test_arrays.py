"""Embeddings from files: one array, or several by the names of a model's conditions."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.cli.arrays import load_embeds
from dipgo_deploy.errors import UserError

STATES = np.arange(6, dtype=np.float32).reshape(1, 2, 3) / 7
MASK = np.ones((1, 2), np.int64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "states.npy", STATES)
    np.save(tmp_path / "mask.npy", MASK)
    np.save(tmp_path / "a=b.npy", STATES)
    np.savez(tmp_path / "both.npz", states=STATES, mask=MASK)
    np.savez(tmp_path / "pickled.npz", states=np.array([{}], dtype=object))
    save_file({"states": STATES, "mask": MASK}, tmp_path / "both.safetensors")
    save_file({"states": STATES.astype(ml_dtypes.bfloat16)}, tmp_path / "bf16.safetensors")
    save_file({"states": np.ones((1,), np.uint8)}, tmp_path / "bytes.safetensors")
    for name in ("broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    return tmp_path


def test_one_array_is_one_array(folder: Path) -> None:
    assert load_embeds("--prompt-embeds", ()) is None
    for name in ("states.npy", "a=b.npy"):
        np.testing.assert_array_equal(load_embeds("--prompt-embeds", (str(folder / name),)), STATES)


@pytest.mark.parametrize(
    "given", [("states={0}/states.npy", "mask={0}/mask.npy"), ("{0}/both.npz",), ("{0}/both.safetensors",)]
)
def test_several_have_names(folder: Path, given: tuple[str, ...]) -> None:
    found = load_embeds("--prompt-embeds", tuple(text.format(folder) for text in given))
    assert isinstance(found, dict) and set(found) == {"states", "mask"}
    np.testing.assert_array_equal(found["states"], STATES)
    np.testing.assert_array_equal(found["mask"], MASK)
    assert (found["states"].dtype, found["mask"].dtype) == (np.float32, np.int64)


def test_bfloat16_is_widened(folder: Path) -> None:
    found = load_embeds("--prompt-embeds", (str(folder / "bf16.safetensors"),))
    assert isinstance(found, dict) and found["states"].dtype == np.float32
    np.testing.assert_array_equal(found["states"], STATES.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("{0}/states.npy", "mask={0}/mask.npy"), "one of several; give each with its condition's name, NAME="),
        (("mask={0}/mask.npy", "mask={0}/states.npy"), "mask is given twice"),
        (("mask={0}/none.npy",), "--prompt-embeds mask: .*none.npy: no such file"),
        (("{0}/none.npz",), "none.npz: no such file"),
        (("{0}/broken.npz",), "not a .npz file of arrays"),
        (("{0}/pickled.npz",), "not a .npz file of arrays"),
        (("{0}/broken.safetensors",), "not a .safetensors file of arrays"),
        (("{0}/bytes.safetensors",), "not a .safetensors file of arrays .*states has type U8"),
        (("states={0}/both.npz",), "holds several arrays"),
    ],
)
def test_mistakes_are_one_line(folder: Path, given: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_embeds("--prompt-embeds", tuple(text.format(folder) for text in given))
    assert "\n" not in str(caught.value)
