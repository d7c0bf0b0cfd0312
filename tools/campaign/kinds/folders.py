"""Model folders: configurations, weights and tokenizer files changed; schedule made, exported, run, and compared with
the stock pipeline of the same changed folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.bundle.self_test import SELF_TEST_NAME
from tools.campaign.kinds import safetensors
from tools.campaign.material import CLASS, CLASS_RUN, PROMPT, STEPS, Material, link_tree, run_arguments
from tools.campaign.mutate import change_bytes, change_json, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

# Of pictures from 0 to 1: float32 graphs against torch over four steps.
_NEAR = 2e-3
_GUIDANCE = 4.0


@dataclass(frozen=True)
class Configurations:
    """Configurations of the class model changed: ``dipgo-schedule`` reads them, no weights."""

    material: Material
    name: str = "model configurations"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """``model_index.json``, or the configuration of the denoiser or the scheduler."""
        base = pick(random, (self.material.class_model, self.material.class_model, self.material.text_model))
        denoiser = "unet" if base == self.material.text_model else "transformer"
        file = pick(random, ("model_index.json", f"{denoiser}/config.json", "scheduler/scheduler_config.json"))
        label = _changed_json(base, folder / "model", file, random)
        argv = ["schedule", "uniform", "--interval", "2", "--model", "model", "--steps", str(STEPS), "-o", "out.json"]
        return Trial(f"{file}: {label}", [argv], _nothing_to_compare, outputs=("out.json",))


@dataclass(frozen=True)
class Folders:
    """Any file of a model folder changed; what is exported draws what the stock pipeline draws, or is refused."""

    material: Material
    name: str = "model folders"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """Both models in turn."""
        base = pick(random, (self.material.class_model, self.material.text_model))
        text = base == self.material.text_model
        names = [path.relative_to(base).as_posix() for path in sorted(base.rglob("*")) if path.is_file()]
        file = pick(random, names)
        if file.endswith(".json") and random.random() < 0.8:
            label = _changed_json(base, folder / "model", file, random)
        else:
            label = _changed_bytes(base, folder / "model", file, random)
        schedule = ["schedule", "full", "--model", "model", "--steps", str(STEPS), "-o", "../schedule.json"]
        export = ["export", "--model", "model", "--schedule", "../schedule.json", "--engine-dir", "engine"]
        guidance = ("--guidance-scale", str(_GUIDANCE), "--seed", "3")
        run = run_arguments("engine", (*(("--prompt", PROMPT) if text else CLASS_RUN), *guidance))

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            try:
                stock = _stock(folder / "model", text)
            except BaseException as error:
                return Verdict.SILENT, f"the stock pipeline refuses it: {type(error).__name__}: {error}"[:300]
            ours = np.load(folder / "out.npy")
            if stock.shape != ours.shape:
                return Verdict.SILENT, f"shape {ours.shape}, the stock pipeline's {stock.shape}"
            difference = float(np.abs(stock.astype(np.float64) - ours).max())
            if not difference <= _NEAR:
                return Verdict.SILENT, f"pictures differ from the stock pipeline's by up to {difference:.2g}"
            return Verdict.VALID, ""

        outputs = ("engine", "out.npy", *_inside_engine(self.material, text))
        return Trial(f"{base.name}: {file}: {label}", [schedule, export, run], accepted, outputs)


def _stock(folder: Path, text: bool) -> np.ndarray:
    """Pictures of the stock pipeline, as ``dipgo-run`` is asked for."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"prompt": PROMPT} if text else {"class_labels": [int(CLASS)]}
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        result = pipeline(
            **given,
            guidance_scale=_GUIDANCE,
            num_inference_steps=STEPS,
            generator=generator,
            output_type="np" if text else "numpy",
        )
    return np.asarray(result.images)


def _inside_engine(material: Material, text: bool) -> list[str]:
    engine = material.text_engine if text else material.class_engine
    # The material's engines were not compared when they were exported, so they carry no test.
    return [f"engine/{name}" for name in {SELF_TEST_NAME, *(path.name for path in engine.iterdir())}]


def _nothing_to_compare(ran: Ran) -> tuple[Verdict, str]:
    return Verdict.VALID, ""


def _changed_json(base: Path, folder: Path, file: str, random: np.random.Generator) -> str:
    link_tree(base, folder, [file])
    label, content = change_json(json.loads((base / file).read_bytes()), random)
    (folder / file).write_bytes(content)
    return label


def _changed_bytes(base: Path, folder: Path, file: str, random: np.random.Generator) -> str:
    link_tree(base, folder, [file])
    path = folder / file
    how = pick(random, ("bytes", "bytes", "header", "header", "missing", "missing", "folder", "fifo"))
    if how == "header" and not file.endswith(".safetensors"):
        how = "bytes"
    if how == "bytes":
        label, content = change_bytes(path.read_bytes(), random)
        path.write_bytes(content)
        return label
    if how == "header":
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        dice = random.random()
        key = pick(random, [name for name in header if name != "__metadata__"])
        if dice < 0.3:
            header[f"_orig_mod.{key}"] = header.pop(key)
            label = f"header: {key} under _orig_mod."
        elif dice < 0.6:
            header[f"{key}x"] = header.pop(key)
            label = f"header: {key} renamed"
        else:
            label, content = safetensors.change(header, content[8 + length :], random)
            path.write_bytes(content)
            return label
        path.write_bytes(safetensors.assemble(json.dumps(header).encode(), content[8 + length :]))
        return label
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    return how
