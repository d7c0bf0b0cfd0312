"""Engine directories of earlier versions: what ``docs/reference/formats.md`` promises of them.

``format-N`` holds a directory of that format version, exported by the code of the time from a tiny DiT (two blocks,
layers, four DDIM steps, every second one full, no components), and the latents that it gave.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.bundle.manifest import FORMAT_VERSION, UNSEALED_VERSION, seal_of
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.pipeline import Pipeline

HERE = Path(__file__).parent
STORED = sorted(HERE.glob("format-*"))
CURRENT = HERE / f"format-{FORMAT_VERSION}"

needs_stored = pytest.mark.skipif(not CURRENT.is_dir(), reason="no directory of this format version is kept yet")


def latents(engine: Path, **options: Any) -> np.ndarray:
    pipeline = Pipeline.from_engine_dir(engine, "cpu", threads=1, **options)
    return pipeline(class_labels=[1], seed=0, guidance_scale=2.0, output_type="latent").latents


def check_latents(engine: Path) -> None:
    expected = np.load(CURRENT / "latents.npy")
    np.testing.assert_allclose(latents(engine), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CURRENT / "engine", tmp_path / "engine"))


def change_manifest(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = engine / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps({**document, "seal": seal_of(document)}))


def test_a_directory_is_kept() -> None:
    assert STORED


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.name)
def test_a_stored_directory_runs_as_it_did_or_is_refused_by_version(stored: Path) -> None:
    version = json.loads((stored / "engine" / "manifest.json").read_text())["format_version"]
    if version in (UNSEALED_VERSION, FORMAT_VERSION):
        check_latents(stored / "engine")
    else:
        with pytest.raises(UserError, match=rf"format_version {version}, this version reads {UNSEALED_VERSION} to"):
            latents(stored / "engine")


@needs_stored
@pytest.mark.parametrize("where", [(), ("plan",), ("sampler",), ("components",)], ids=lambda where: ".".join(where))
def test_an_unknown_field_is_refused_by_name(engine: Path, where: tuple[str, ...]) -> None:
    def add(document: dict[str, Any]) -> None:
        for name in where:
            document = document[name]
        document["later"] = 1

    change_manifest(engine, add)
    with pytest.raises(UserError, match=re.escape(f"manifest.json: {'.'.join((*where, 'later'))}: ")):
        latents(engine)


@needs_stored
def test_a_field_that_was_added_later_may_be_missing(engine: Path) -> None:
    change_manifest(engine, lambda document: document["plan"].pop("layout"))
    change_manifest(engine, lambda document: document["sampler"].pop("set_timesteps"))
    check_latents(engine)


@needs_stored
def test_without_an_index_of_weights_it_runs_but_takes_no_lora(engine: Path, tmp_path: Path) -> None:
    lora, layer = tmp_path / "lora.safetensors", "transformer.transformer_blocks.0.attn1.to_q"
    down, up = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, lora)
    assert not np.allclose(latents(engine, lora=[(lora, 1.0)]), latents(engine))
    (engine / "graphs" / "weights.json").unlink()
    change_manifest(engine, lambda document: document["files"].pop("graphs/weights.json"))
    check_latents(engine)
    with pytest.raises(UserError, match=r"weights\.json: missing"):
        latents(engine, lora=[(lora, 1.0)])
