from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from lora_files import make_updates, save_lora  # noqa: E402

from dipgo_deploy.cli.run import main  # noqa: E402
from dipgo_deploy.runtime.pipeline import Pipeline  # noqa: E402
from dipgo_deploy.supernet.load import load_denoiser  # noqa: E402


def test_run_with_a_lora_and_what_it_reports(dit, tmp_path, capsys):
    updates = make_updates(load_denoiser(dit.model)[0], ["transformer_blocks.0.attn1.to_q"])
    lora = save_lora(tmp_path / "a.safetensors", {**updates, "elsewhere": (torch.ones(1, 2), torch.ones(2, 1))})
    target = tmp_path / "out.npy"
    options = [
        "--engine-dir",
        str(dit.path),
        "--class-labels",
        "bag",
        "--guidance-scale",
        "2",
        "--output-type",
        "latent",
    ]
    options += ["--backend", "cpu", "--threads", "1", "--lora", f"{lora}:0.5", "-o", str(target), "--json"]
    assert main(options) == 2
    assert "1 of its 2 layers of the denoiser are none of this model's (first: elsewhere)" in capsys.readouterr().err
    assert not target.exists()
    assert main([*options, "--lora-partial"]) == 0
    printed = capsys.readouterr()
    (report,) = json.loads(printed.out)["loras"]
    assert (report["applied"], report["scale"], report["left_out"]) == (1, 0.5, [])
    (part,) = report["components"]
    assert part == {"component": "denoiser", "applied": 1, "not_applied": ["elsewhere"], "not_computed": []}
    assert "scale 0.5, applied 1 of 2 layers of the denoiser" in printed.err
    assert "left out, as this model has no such layers: elsewhere of the denoiser" in printed.err
    pipeline = Pipeline.from_engine_dir(dit.path, "cpu", threads=1, lora=[(lora, 0.5)], lora_partial=True)
    want = pipeline(class_labels="bag", guidance_scale=2.0, output_type="latent").latents
    np.testing.assert_array_equal(np.load(target), want)
